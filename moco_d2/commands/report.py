r"""Write tables, curves and one HTML page about pretraining, probes and detectors.

    moco-d2 report output/trials -o output/report
    moco-d2 report output/moco_v2 output/probe_knn.json output/trials/voc0712_faster_rcnn_R_50_C4_24k -o output/report
    moco-d2 report output/moco_v1 output/moco_v2 --curves curves.png

Writes report.html (open it in a browser), report.md, report.tex (needs booktabs), report.csv (one line a figure) and
runs.csv (one line a run); with --curves a picture of the curves of pretraining runs, which may be going on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and write the report, the picture, or both."""
    parser = cli.new_parser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=cli.expanded, metavar="RUNS", help="folders of runs, or above them; files of probes"
    )
    parser.add_argument("-o", "--output", type=cli.expanded, metavar="FOLDER", help="folder for the report")
    parser.add_argument("--curves", type=cli.path, metavar="FILE.png", help="picture of the pretraining runs' curves")
    parser.add_argument(
        "--compare", nargs=2, default=(), metavar=("A", "B"),
        help="two initialisations to compare class by class (default: the first one and the first baseline)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if not (args.output or args.curves):
        parser.error("nothing to write: give --output FOLDER, --curves FILE.png, or both")
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    if args.curves:
        print(_draw_curves(args.runs, args.curves))
    if args.output:
        from moco_d2.reports.report import write_report

        for path in write_report(args.runs, args.output, args.compare):
            print(path)


def _draw_curves(runs: Sequence[str], path: Path) -> Path:
    from moco_d2.io.files import check_named_file
    from moco_d2.reports.content import read
    from moco_d2.reports.pictures import draw_pretraining_curves, is_picture

    if path.suffix != ".png":
        raise ValueError(f"--curves {path}: the picture is a PNG; choose a name that ends in .png")
    target = check_named_file(path, is_picture)
    content = read(runs)
    for problem in content.left_out:
        logging.warning("left out: %s", problem)
    if not content.pretrainings:
        raise ValueError(f"--curves draws pretraining runs, and there is none in {', '.join(runs)}")
    draw_pretraining_curves(content.pretrainings, target)
    return path

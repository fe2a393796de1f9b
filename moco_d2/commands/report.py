r"""Write tables, curves and one HTML page about finished fine-tuning runs.

    moco-d2 report output/trials -o output/report
    moco-d2 report output/trials/voc0712_faster_rcnn_R_50_C4_24k some/other/run -o output/report

Writes report.html (open it in a browser), report.md, report.tex (needs booktabs), report.csv (one line a figure) and
runs.csv (one line a run).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the runs and write the report."""
    parser = cli.new_parser("report", __doc__)
    parser.add_argument(
        "runs", nargs="+", type=cli.expanded, metavar="RUNS", help="folders of runs, or folders above them"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=cli.expanded, metavar="FOLDER", help="folder for the report"
    )
    parser.add_argument(
        "--compare", nargs=2, default=(), metavar=("A", "B"),
        help="two initialisations to compare class by class (default: the first one and the first baseline)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    from moco_d2.reports.report import write_report

    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    for path in write_report(args.runs, args.output, args.compare):
        print(path)

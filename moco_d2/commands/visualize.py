r"""Draw training samples, what one or two detectors find, or an experiment in one picture.

    moco-d2 visualize samples --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x --output output/samples
    moco-d2 visualize detections --run output/moco --output output/moco_page
    moco-d2 visualize detections --run output/random --run output/moco --output output/page DATASETS.TEST '("my_val",)'
    moco-d2 visualize overview --pretraining output/moco_v2 --run output/moco --run output/random --output overview.png

A run is a folder with config.yaml and model_final.pth, or a checkpoint beside its config.yaml. Of one run the page
shows the worst and the best pictures, of two runs those where they differ most (moco_d2/reports/visualize.py defines
the measure). Open index.html in the output folder; the folder can be moved or sent.
The overview has the curves of a pretraining (kNN accuracy, loss) beside detections of finished runs and the labels.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and make the page."""
    parser = cli.new_parser("visualize", __doc__)
    pages = parser.add_subparsers(dest="page", required=True)
    samples = pages.add_parser("samples", help="training pictures as the model sees them")
    samples.add_argument("--config-file", required=True, metavar="FILE", help="path or shipped name of a config")
    detections = pages.add_parser("detections", help="test pictures with labels and detections, worst and best first")
    overview = pages.add_parser("overview", help="a picture of an experiment: curves of a pretraining, detections")
    overview.add_argument("--pretraining", required=True, type=cli.path, metavar="RUN", help="folder of a pretraining")
    for page in (detections, overview):
        page.add_argument("--run", action="append", required=True, type=cli.path, help="give it twice to compare two")
    overview.add_argument("--output", required=True, type=cli.path, metavar="FILE", help="a new file, .png")
    overview.add_argument("--count", type=int, default=3, help="test pictures (default: %(default)s)")
    detections.add_argument("--pictures", type=int, default=500, help="test pictures to look at; 0: all (default: 500)")
    for page in (samples, detections):
        page.add_argument("--output", required=True, type=cli.path, metavar="FOLDER", help="a new folder")
        page.add_argument("--count", type=int, default=12, help="pictures shown, of each kind (default: 12)")
        page.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    make_page(parser.parse_args(argv))


def make_page(args: argparse.Namespace) -> None:
    """Make the page or picture, and print its path."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if args.page == "detections" and args.pictures < 0:
        raise ValueError(f"--pictures is {args.pictures}; it must be at least 1, or 0 for all")
    from moco_d2.config import load_cfg
    from moco_d2.io.files import check_named_file
    from moco_d2.reports.overview import draw_overview
    from moco_d2.reports.visualize import detections_page, samples_page

    if args.page == "samples":
        page = samples_page(load_cfg(args.config_file, args.opts), args.output, args.count)
    elif args.page == "detections":
        runs = {}
        for run in args.run:
            path = run / "model_final.pth" if run.is_dir() or run.suffix != ".pth" else run
            runs[path.parent.name if path.parent.name not in runs else str(path)] = path
        page = detections_page(runs, args.output, args.count, args.pictures, args.opts)
    else:
        page = check_named_file(args.output, lambda path: False)
        names = [run.name for run in args.run]
        runs = {run.name.replace("_", " ") if names.count(run.name) == 1 else str(run): run for run in args.run}
        draw_overview(args.pretraining, runs, page, args.count)
    print(page)

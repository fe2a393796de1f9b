r"""Make a page of pictures: training samples, or what one or two detectors find.

    moco-d2 visualize samples --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x --output output/samples
    moco-d2 visualize detections --run output/moco --output output/moco_page
    moco-d2 visualize detections --run output/random --run output/moco --output output/page DATASETS.TEST '("my_val",)'

A run is a folder with config.yaml and model_final.pth, or a checkpoint beside its config.yaml. Of one run the page
shows the worst and the best pictures, of two runs those where they differ most (moco_d2/reports/visualize.py defines
the measure). Open index.html in the output folder; the folder can be moved or sent.
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
    detections.add_argument(
        "--run", action="append", required=True, type=cli.path, help="give it twice to compare two runs"
    )
    detections.add_argument("--pictures", type=int, default=500, help="test pictures to look at; 0: all (default: 500)")
    for page in (samples, detections):
        page.add_argument("--output", required=True, type=cli.path, metavar="FOLDER", help="a new folder")
        page.add_argument("--count", type=int, default=12, help="pictures shown, of each kind (default: 12)")
        page.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    make_page(parser.parse_args(argv))


def make_page(args: argparse.Namespace) -> None:
    """Make the page, and print its path."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if args.page == "detections" and args.pictures < 0:
        raise ValueError(f"--pictures is {args.pictures}; it must be at least 1, or 0 for all")
    from moco_d2.config import load_cfg
    from moco_d2.reports.visualize import detections_page, samples_page

    if args.page == "samples":
        page = samples_page(load_cfg(args.config_file, args.opts), args.output, args.count)
    else:
        runs = {}
        for run in args.run:
            path = run / "model_final.pth" if run.is_dir() or run.suffix != ".pth" else run
            runs[path.parent.name if path.parent.name not in runs else str(path)] = path
        page = detections_page(runs, args.output, args.count, args.pictures, args.opts)
    print(page)

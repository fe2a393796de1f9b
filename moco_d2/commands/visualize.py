r"""Draw samples, detections, what a backbone sees, or an experiment in one picture.

    moco-d2 visualize samples --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x --output output/samples
    moco-d2 visualize detections --run output/moco --output output/moco_page
    moco-d2 visualize detections --run output/random --run output/moco --output output/page DATASETS.TEST '("my_val",)'
    moco-d2 visualize overview --pretraining output/moco_v2 --run output/moco --run output/random --output overview.png
    moco-d2 visualize attention --weights output/dino/backbone.pth --pictures FOLDER --output output/attention
    moco-d2 visualize neighbours --weights output/moco_v2/backbone.pth --pictures imagenet_val --output output/nearest

A run is a folder with config.yaml and model_final.pth, or a checkpoint beside its config.yaml. Of one run the page
shows the worst and the best pictures, of two runs those where they differ most (moco_d2/reports/visualize.py defines
the measure). Open index.html in the output folder; the folder can be moved or sent.
The overview has the curves of a pretraining (kNN accuracy, loss) beside detections of finished runs and the labels.
Attention maps are those of a ViT's class token, head by head; neighbours are the pictures whose features are most
similar (docs/probes.md). Both take the weights that moco-d2 probe takes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

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
    attention = pages.add_parser("attention", help="where the class token of a ViT looks, head by head")
    neighbours = pages.add_parser("neighbours", help="the pictures whose features are most similar to a picture's")
    for page in (attention, neighbours):
        _add_backbone(page)
    neighbours.add_argument("--queries", type=cli.expanded, metavar="SET", help="pictures to ask for (default: these)")
    neighbours.add_argument("--k", type=int, default=8, help="neighbours of each query (default: %(default)s)")
    for page in (samples, detections, attention, neighbours):
        page.add_argument("--output", required=True, type=cli.path, metavar="FOLDER", help="a new folder")
        page.add_argument("--count", type=int, default=12, help="pictures shown, of each kind (default: 12)")
        page.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    make_page(parser.parse_args(argv))


def _add_backbone(page: argparse.ArgumentParser) -> None:
    page.add_argument(
        "--weights", required=True, type=cli.expanded, metavar="FILE", help="checkpoint, moco-d2://NAME, or random"
    )
    page.add_argument("--pictures", required=True, type=cli.expanded, metavar="SET", help="a folder, or a labelled set")
    page.add_argument("--size", type=int, default=0, metavar="PIXELS", help="of the pictures as the network sees them")
    page.add_argument("--config-file", default="", metavar="FILE", help="path or shipped name of a config, for random")


def make_page(args: argparse.Namespace) -> None:
    """Make the page or picture, and print its path."""
    if args.count < 1:
        raise ValueError(f"--count is {args.count}; it must be at least 1")
    if args.page in ("attention", "neighbours"):
        print(_page_of_a_backbone(args))
        return
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


def _page_of_a_backbone(args: argparse.Namespace) -> Path:
    if args.size < 0 or getattr(args, "k", 1) < 1:
        raise ValueError("--size and --k must be at least 1")
    from moco_d2.config import load_cfg, use_available_device
    from moco_d2.data.labelled import open_pictures
    from moco_d2.probes.backbone import load_backbone
    from moco_d2.probes.features import side
    from moco_d2.reports.backbone_pages import attention_page, neighbours_page

    cfg = load_cfg(args.config_file, args.opts)
    use_available_device(cfg)
    pictures, backbone = open_pictures(args.pictures), load_backbone(args.weights, cfg)
    if args.page == "attention":
        return attention_page(backbone, pictures, args.output, cfg, args.count, args.size)
    queries = open_pictures(args.queries) if args.queries else None
    size = args.size or side(pictures, backbone.facts)
    return neighbours_page(backbone, pictures, args.output, cfg, size, args.count, args.k, queries)

r"""Measure what a backbone has learned, by nearest neighbours or a linear classifier.

    moco-d2 probe knn --weights output/moco_v2/backbone.pth --train imagenet_train --val imagenet_val
    moco-d2 probe knn --weights random --config-file Pretrain/moco_v2_R50_200ep --data FOLDER --k 1 20 200
    moco-d2 probe linear --protocol moco --weights moco-d2://moco_v2_800ep --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/linear

docs/probes.md describes sets, weights, protocols and the file that is written.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Sequence
from typing import Any

from moco_d2.commands import cli

_PROTOCOLS = ("moco", "moco_v3", "simsiam", "swav", "barlow_twins", "dino", "moco_cached")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    built = cli.new_parser("probe", __doc__)
    kinds = built.add_subparsers(dest="kind", required=True, metavar="knn|linear")
    knn = kinds.add_parser("knn", help="weighted k-nearest neighbours of features")
    _add_common(knn)
    knn.add_argument("--config-file", default="", metavar="FILE", help="config: data sets of your own, SSL.ENCODER")
    knn.add_argument("--k", nargs="+", default=["1", "20", "200"], metavar="K", help="neighbours (1 20 200)")
    knn.add_argument("--temperature", type=float, default=0.07, help=".07: InstDisc, DINO; .1: MoCo's CIFAR demo")
    knn.add_argument("--size", type=int, metavar="PIXELS", help="side of the crop (224; CIFAR: 32)")
    linear = kinds.add_parser("linear", help="a linear classifier on frozen features")
    _add_common(linear)
    linear.add_argument("--protocol", required=True, choices=_PROTOCOLS, help="published protocol; moco_cached: fast")
    for name, kind in (("batch", int), ("epochs", int), ("lr", float), ("size", int)):
        linear.add_argument(f"--{name}", type=kind, help="another value than the protocol's, which is then modified")
    cli.add_launch_arguments(linear, needs_config=False)
    for part in (knn, linear):
        part.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return built


def _add_common(part: argparse.ArgumentParser) -> None:
    part.add_argument(
        "--weights", required=True, type=cli.expanded, metavar="FILE", help="checkpoint, moco-d2://NAME, or random"
    )
    part.add_argument("--train", type=cli.expanded, metavar="SET", help="labelled set to learn from")
    part.add_argument("--val", type=cli.expanded, metavar="SET", help="labelled set to test on")
    part.add_argument("--data", type=cli.expanded, metavar="SET", help="both, if one name or folder holds both")
    part.add_argument("--output", type=cli.path, metavar="FILE", help="write the result as JSON")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and probe."""
    args = parser().parse_args(argv)
    args.train, args.val = args.train or args.data, args.val or args.data
    if not args.train or not args.val:
        raise ValueError("the labelled sets are missing: give --train and --val, or --data for a folder with both")
    if args.kind == "knn":
        knn(args)
    else:
        cli.run(linear, args)


def knn(args: argparse.Namespace) -> None:
    """Probe by nearest neighbours, print a table, and write the result if a file is named."""
    from detectron2.utils.logger import setup_logger

    from moco_d2.config import load_cfg, use_available_device
    from moco_d2.layers.knn import check_votes
    from moco_d2.probes import result
    from moco_d2.probes.backbone import load_backbone
    from moco_d2.probes.features import side
    from moco_d2.probes.knn import probe_knn

    ks = [int(word) for word in itertools.takewhile(re.compile(r"-?\d+").fullmatch, args.k)]
    opts = [*args.k[len(ks) :], *args.opts]  # argparse takes the words after --k, too
    check_votes(ks, args.temperature)
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size is {args.size}; it must be at least 1 pixel")
    result.check_output(args.output)
    setup_logger(name="moco_d2", abbrev_name="moco_d2")
    cfg = load_cfg(args.config_file, opts)
    use_available_device(cfg)
    train, val = _sets(cfg, args)
    backbone = load_backbone(args.weights, cfg)
    content = probe_knn(backbone, train, val, cfg, args.size or side(val), ks, args.temperature)
    _print(content)
    if args.output:
        result.write(content, args.output)


def linear(args: argparse.Namespace) -> None:
    """Train and test a linear classifier in this process."""
    from detectron2.utils import comm

    from moco_d2.probes import result
    from moco_d2.probes.backbone import load_backbone
    from moco_d2.probes.features import side
    from moco_d2.probes.linear import probe_linear
    from moco_d2.probes.protocols import changed

    result.check_output(args.output)
    changed(args.protocol, batch=args.batch, epochs=args.epochs, lr=args.lr, size=args.size)
    cfg = cli.setup(args)
    train, val = _sets(cfg, args)
    size = args.size or (side(val) if val.arrays is not None else None)
    protocol = changed(args.protocol, batch=args.batch, epochs=args.epochs, lr=args.lr, size=size)
    content = probe_linear(load_backbone(args.weights, cfg), train, val, cfg, *protocol, resume=args.resume)
    if comm.is_main_process():
        _print(content)
        if args.output:
            result.write(content, args.output)


def _sets(cfg: Any, args: argparse.Namespace) -> Any:
    """Open both labelled sets, those of DATASETS.CUSTOM among them."""
    from moco_d2.data.labelled import open_pair
    from moco_d2.detection.datasets import register_custom

    if cfg.DATASETS.CUSTOM:
        both = cfg.clone()
        both.defrost()
        both.DATASETS.TRAIN, both.DATASETS.TEST = (args.train,), (args.val,)
        register_custom(both)
    return open_pair(args.train, args.val)


def _print(content: dict[str, Any]) -> None:
    from tabulate import tabulate

    train, val = content["train"], content["val"]
    print(f"weights  {content['weights']['path']} ({content['weights']['facts']['origin']})")
    print(f"sets     {train['pictures']} pictures of {train['name']}; tested on {val['pictures']} of {val['name']}")
    print(tabulate(content["results"], "keys", tablefmt="pipe", floatfmt=".2f"))

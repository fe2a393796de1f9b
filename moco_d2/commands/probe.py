r"""Measure what a backbone has learned: neighbours, a linear classifier, few labels.

    moco-d2 probe knn --weights output/moco_v2/backbone.pth --train imagenet_train --val imagenet_val
    moco-d2 probe knn --weights random --config-file Pretrain/moco_v2_R50_200ep --data FOLDER --k 1 20 200
    moco-d2 probe linear --protocol moco --weights moco-d2://moco_v2_800ep --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/linear
    moco-d2 probe semi --protocol swav_1 --list 1percent.txt --weights FILE --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/semi

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
_SEMI_PROTOCOLS = ("swav_1", "swav_10", "barlow_twins_1", "barlow_twins_10", "vicreg_1", "vicreg_10")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    built = cli.new_parser("probe", __doc__)
    kinds = built.add_subparsers(dest="kind", required=True, metavar="knn|linear|semi")
    knn = kinds.add_parser("knn", help="weighted k-nearest neighbours of features")
    _add_common(knn)
    knn.add_argument("--k", nargs="+", default=["1", "20", "200"], metavar="K", help="neighbours (1 20 200)")
    knn.add_argument("--temperature", type=float, default=0.07, help=".07: InstDisc, DINO; .1: MoCo's CIFAR demo")
    knn.add_argument("--size", type=int, metavar="PIXELS", help="side of the crop (224; CIFAR: 32)")
    cli.add_launch_arguments(knn, needs_config=False, resumes=False)
    linear = kinds.add_parser("linear", help="a linear classifier on frozen features")
    _add_common(linear)
    linear.add_argument("--protocol", required=True, choices=_PROTOCOLS, help="published protocol; moco_cached: fast")
    semi = kinds.add_parser("semi", help="backbone and classifier, fine-tuned on few labels")
    _add_common(semi)
    semi.add_argument("--protocol", required=True, choices=_SEMI_PROTOCOLS, help="published protocol; _10: of 10 %%")
    labels = semi.add_mutually_exclusive_group(required=True)
    labels.add_argument("--list", type=cli.path, metavar="FILE", help="names of the labelled training pictures")
    labels.add_argument("--percent", type=float, metavar="P", help="draw them by SEED, as many of each class")
    semi.add_argument("--write-list", type=cli.path, metavar="FILE", help="write the names of the labelled pictures")
    semi.add_argument("--backbone-lr", type=float, help="another value than the protocol's, which is then modified")
    for part in (linear, semi):
        for name, kind in (("batch", int), ("epochs", int), ("lr", float), ("size", int)):
            part.add_argument(f"--{name}", type=kind, help="another value than the protocol's, which is then modified")
        cli.add_launch_arguments(part, needs_config=False)
    for part in (knn, linear, semi):
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
        words = list(itertools.takewhile(re.compile(r"-?\d+").fullmatch, args.k))
        args.opts = [*args.k[len(words) :], *args.opts]  # argparse takes the words after --k, too
        args.k = [int(word) for word in words]
        cli.run(knn, args, writes=False)
    cli.run(classifier, args)


def knn(args: argparse.Namespace) -> None:
    """Probe by nearest neighbours in this process, print a table, and write the result if a file is named."""
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from moco_d2.config import load_cfg, use_available_device
    from moco_d2.layers.knn import check_votes
    from moco_d2.probes import result
    from moco_d2.probes.backbone import load_backbone
    from moco_d2.probes.features import side
    from moco_d2.probes.knn import probe_knn

    cli.leave_on_signals()
    check_votes(args.k, args.temperature)
    if args.size is not None and args.size < 1:
        raise ValueError(f"--size is {args.size}; it must be at least 1 pixel")
    result.check_output(args.output)
    setup_logger(distributed_rank=comm.get_rank(), name="moco_d2", abbrev_name="moco_d2")
    cfg = load_cfg(args.config_file, args.opts)
    use_available_device(cfg)
    train, val = _sets(cfg, args)
    backbone = load_backbone(args.weights, cfg)
    content = probe_knn(backbone, train, val, cfg, args.size or side(val), args.k, args.temperature)
    _report(content, args)


def classifier(args: argparse.Namespace) -> None:
    """Train and test a linear classifier in this process, on frozen features or together with the backbone."""
    from moco_d2.probes import result
    from moco_d2.probes.backbone import load_backbone
    from moco_d2.probes.features import side
    from moco_d2.probes.linear import probe_linear
    from moco_d2.probes.protocols import changed

    result.check_output(args.output)
    fields = ("batch", "epochs", "lr", "size", "backbone_lr", "percent")
    values = {name: getattr(args, name, None) for name in fields}
    published, *_ = changed(args.protocol)
    changed(args.protocol, **values)
    cfg = cli.setup(args)
    train, val = _sets(cfg, args)
    labels: dict[str, Any] = {}
    if args.kind == "semi":
        pictures = len(train)
        train, labels = _few_labels(train, cfg.SEED, args)
        percent = 100 * len(train) / pictures
        # Classes of different sizes make it differ a little: SimCLR's list of 1 % has 12 or 13 pictures of a class.
        near = abs(percent - published.percent) <= 0.1 * published.percent
        values["percent"] = None if near else round(percent, 2)
    if val.arrays is not None:
        values["size"] = args.size or side(val)
    protocol = changed(args.protocol, **values)
    backbone = load_backbone(args.weights, cfg)
    _report(probe_linear(backbone, train, val, cfg, *protocol, resume=args.resume, labels=labels), args)


def _few_labels(train: Any, seed: int, args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Return the labelled part of a training set, and what the result says of it."""
    from detectron2.utils import comm

    from moco_d2.data.label_lists import as_list, drawn, listed
    from moco_d2.io.files import named_file
    from moco_d2.io.provenance import sha256

    if args.list:
        part = listed(train, args.list)
        labels = {"list": str(args.list), "sha256": sha256(args.list), "pictures": len(part)}
    else:
        part = drawn(train, args.percent, seed)
        labels = {"drawn percent": args.percent, "seed": seed, "pictures": len(part)}
    if args.write_list and comm.is_main_process():
        text = as_list(part, train)
        with named_file(args.write_list, lambda path: path.read_bytes() == text) as file:
            file.write(text)
    return part, labels


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


def _report(content: dict[str, Any], args: argparse.Namespace) -> None:
    """Print the result and write it if a file is named, in the main process."""
    from detectron2.utils import comm
    from tabulate import tabulate

    from moco_d2.probes import result

    if not comm.is_main_process():
        return
    train, val = content["train"], content["val"]
    print(f"weights  {content['weights']['path']} ({content['weights']['facts']['origin']})")
    print(f"sets     {train['pictures']} pictures of {train['name']}; tested on {val['pictures']} of {val['name']}")
    print(tabulate(content["results"], "keys", tablefmt="pipe", floatfmt=".2f"))
    if args.output:
        result.write(content, args.output)

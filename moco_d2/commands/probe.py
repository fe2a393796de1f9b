r"""Measure what a backbone has learned: by nearest neighbours, a linear classifier, or detectors over a pretraining.

    moco-d2 probe knn --weights output/moco_v2/backbone.pth --train imagenet_train --val imagenet_val
    moco-d2 probe knn --weights random --config-file Pretrain/moco_v2_R50_200ep --data FOLDER --k 1 20 200
    moco-d2 probe linear --protocol moco --weights moco-d2://moco_v2_800ep --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/linear
    moco-d2 probe detection output/moco_v2 --protocol voc0712_faster_rcnn_R_50_C4_24k --checkpoints every 20 epochs \
        --weights random --output output/over_run

docs/probes.md describes sets, weights, protocols and the file that is written.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from moco_d2.commands import cli, trials

_PROTOCOLS = ("moco", "moco_v3", "simsiam", "swav", "barlow_twins", "dino", "moco_cached")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    built = cli.new_parser("probe", __doc__)
    kinds = built.add_subparsers(dest="kind", required=True, metavar="knn|linear|detection")
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
    detection = kinds.add_parser("detection", help="detectors fine-tuned from the checkpoints of a pretraining")
    _add_detection(detection)
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


def _add_detection(part: argparse.ArgumentParser) -> None:
    part.add_argument("run", type=cli.path, metavar="RUN", help="OUTPUT_DIR of a moco-d2 pretrain, finished or not")
    part.add_argument("--protocol", required=True, metavar="NAME", help="name of a protocol (docs/configs.md)")
    part.add_argument("--output", required=True, type=cli.path, metavar="FOLDER", help="for weights, trials and page")
    part.add_argument(
        "--checkpoints", nargs="+", default=["all"], metavar="WHICH",
        help="every N epochs, every N iterations, or numbers, as in 20 50 200 epochs (default: all)",
    )  # fmt: skip
    part.add_argument(
        "--weights", nargs="+", default=[], metavar="WEIGHTS",
        help="to compare with: random, supervised, converted files, as moco-d2 trials takes them",
    )  # fmt: skip
    part.add_argument("--seeds", default="0", help="such as 0-4 or 0,2,7 (default: 0)")
    part.add_argument("--num-gpus", type=int, default=1, help="processes of a training (without GPUs: on the CPU)")
    part.add_argument("--dry-run", action="store_true", help="check everything, list the checkpoints and stop")


def main(argv: Sequence[str] | None = None) -> int | None:
    """Read the command line and probe."""
    words = list(sys.argv[1:] if argv is None else argv)
    opts: list[str] = []
    if words[:1] == ["detection"]:  # RUN is no key, even in capitals
        words, opts = trials.split(words, start=2)
    args = parser().parse_args(words)
    if args.kind == "detection":
        return detection(args, opts)
    args.train, args.val = args.train or args.data, args.val or args.data
    if not args.train or not args.val:
        raise ValueError("the labelled sets are missing: give --train and --val, or --data for a folder with both")
    if args.kind == "knn":
        knn(args)
    else:
        cli.run(linear, args)
    return None


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


def detection(args: argparse.Namespace, opts: Sequence[str]) -> int:
    """Fine-tune detectors from checkpoints of a pretraining, and draw the results; return the exit code."""
    from moco_d2.reports import over_run
    from moco_d2.reports.over_run_page import write_page

    logging.getLogger("fvcore").setLevel(logging.ERROR)  # hides the list of tensors that the check of the weights loads
    seeds = trials.read_seeds(args.seeds)
    run = over_run.read_pretraining(args.run, args.output)
    print(f"{args.run}: {run.cfg.SSL.METHOD}, checkpoints of {run.describe(run.checkpoints)}", flush=True)
    chosen, note = run.choose(" ".join(args.checkpoints))
    print(*[f"note: {note}"] * bool(note), f"probed: {run.describe(chosen)}", sep="\n", flush=True)
    rest = args.weights, seeds, opts, args.num_gpus
    over_run.check(run, args.protocol, args.output, *rest)
    if args.dry_run:
        for one in chosen:
            over_run.check_convertible(one)
        print(f"dry run passed: {len(seeds) * (len(chosen) + len(args.weights))} trials")
        return 0
    over_run.check_convertible(chosen[0])  # nothing is written if the encoder cannot be converted
    over_run.claim(run, args.protocol, args.output)
    with cli.stop_on_signals():
        for one in chosen:
            new = over_run.convert(one, args.output)
            print(f"{one.label}: {'converted' if new else 'converted before'}", flush=True)
        planned = over_run.plan(args.protocol, args.output, chosen, *rest)
        draw = functools.partial(write_page, run, args.protocol, args.output)
        code = trials.run_all(planned, args.num_gpus, after=draw)
        print(*draw(), sep="\n")
    return code

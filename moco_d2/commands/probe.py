r"""Measure what a backbone has learned: kNN, classifiers, few labels, detectors.

    moco-d2 probe knn --weights output/moco_v2/backbone.pth --train imagenet_train --val imagenet_val
    moco-d2 probe knn --weights random --config-file Pretrain/moco_v2_R50_200ep --data FOLDER --k 1 20 200
    moco-d2 probe linear --protocol moco --weights moco-d2://moco_v2_800ep --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/linear
    moco-d2 probe semi --protocol swav_1 --list 1percent.txt --weights FILE --num-gpus 8 \
        --train imagenet_train --val imagenet_val OUTPUT_DIR output/semi
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

_PROTOCOLS = (
    "moco", "moco_v3", "moco_v3_vit", "simsiam", "swav", "barlow_twins", "dino", "dino_vit_s", "moco_cached",
)  # fmt: skip
_SEMI_PROTOCOLS = ("swav_1", "swav_10", "barlow_twins_1", "barlow_twins_10", "vicreg_1", "vicreg_10")


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    built = cli.new_parser("probe", __doc__)
    kinds = built.add_subparsers(dest="kind", required=True, metavar="knn|linear|semi|detection")
    knn = kinds.add_parser("knn", help="weighted k-nearest neighbours of features")
    _add_common(knn)
    knn.add_argument("--k", nargs="+", default=["1", "20", "200"], metavar="K", help="neighbours (1 20 200)")
    knn.add_argument("--temperature", type=float, default=0.07, help=".07: InstDisc, DINO; .1: MoCo's CIFAR demo")
    knn.add_argument("--size", type=int, metavar="PIXELS", help="side of the crop (224, or a ViT's own; CIFAR: 32)")
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
    detection = kinds.add_parser("detection", help="detectors fine-tuned from the checkpoints of a pretraining")
    _add_detection(detection)
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
        numbers = list(itertools.takewhile(re.compile(r"-?\d+").fullmatch, args.k))
        args.opts = [*args.k[len(numbers) :], *args.opts]  # argparse takes the words after --k, too
        args.k = [int(number) for number in numbers]
    if not args.config_file:  # as pretraining's configs have it, instead of Detectron2's default
        args.opts = ["DATALOADER.NUM_WORKERS", "-1", *args.opts]
    if args.kind == "knn":
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
    content = probe_knn(backbone, train, val, cfg, args.size or side(val, backbone.facts), args.k, args.temperature)
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

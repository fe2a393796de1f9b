#!/usr/bin/env python3
"""Measure this project's parts against what they replace, on synthetic data of a chosen size.

    python -m benchmarks eval                                      # COCO's and VOC's metrics: about two minutes
    python -m benchmarks eval --images 5000 --detections 100       # the size of the real test sets: about ten minutes
    python -m benchmarks convert                                   # a training checkpoint: about a minute
    python -m benchmarks step                                      # a step of pretraining: some ten minutes
    python -m benchmarks step --device cuda --batch 256 --size 224 --autocast bfloat16 --channels-last --roofline
    python -m benchmarks feed --device cuda --batch 256 --size 224 --autocast bfloat16 --channels-last --workers 4 8 14
    python -m benchmarks kernels                                   # operations and memory of a step, only counted
    python -m benchmarks kernels --lower --encoder resnet18 --batch 64 --size 32 --autocast bfloat16 --channels-last
    python -m benchmarks methods                                   # a step of every method: minutes a method
    python -m benchmarks parts                                     # losses and optimizers: about a minute
    python -m benchmarks data                                      # from JPEG files to views: about a minute
    python -m benchmarks scale                                     # many files, shards, streams: about a minute
    python -m benchmarks scale --files 1300000 --folders 1000      # as many as ImageNet's; $TMPDIR names another disk
    python -m benchmarks startup                                   # --help of every command
    python -m benchmarks proof --width 0.25 --epochs 12            # the authors' CIFAR-10 demo: two hours on a CPU core

Prints a table and, with --output, writes it as JSON together with commit, command and versions; proof's is a folder.
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moco_d2.commands import cli

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def check(args: argparse.Namespace, **least: int) -> None:
    """Raise ValueError for a number that is too small.

    Args:
        args: the command line.
        least: the smallest number that each option takes.
    """
    for name, smallest in least.items():
        if getattr(args, name) < smallest:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least {smallest}")


def evaluation(args: argparse.Namespace) -> None:
    """Time every COCO backend, and VOC's evaluator against Detectron2's."""
    check(args, images=1, detections=1)

    from benchmarks.evaluation import coco_rows, voc_rows
    from benchmarks.measure import machine, tables

    rows = [*coco_rows(args.images, args.detections), *voc_rows(args.images, args.detections)]
    settings = {"images": args.images, "detections": args.detections, "machine": machine("cpu")}
    tables({"rows": [*map(asdict, rows)]}, settings, args.output, ("", "", ".2f", ".2f", ".1f", ".1e"))


def conversion(args: argparse.Namespace) -> None:
    """Time the conversion of a MoCo v2 training checkpoint against ``torch.load`` of it."""
    check(args, repeats=1)

    from benchmarks.conversion import rows
    from benchmarks.measure import machine, tables

    settings = {"width": args.width, "repeats": args.repeats, "machine": machine("cpu")}
    tables({"rows": [*map(asdict, rows(args.width, args.repeats))]}, settings, args.output)


def step(args: argparse.Namespace) -> None:
    """Time a step of pretraining against its encoders alone, the authors' and lightly's form of it, and plain DDP."""
    check(args, repeats=2, batch=1, size=1)  # the spread needs two
    from benchmarks.measure import machine, tables

    cfg, opts = _step_config(args)
    from benchmarks.step import ddp_rows, memory_rows, part_rows, step_rows

    found: dict[str, Any] = {
        "step": step_rows(cfg, args.repeats),
        "parts": part_rows(cfg, args.repeats),
        "memory": memory_rows(cfg),
    }
    if args.device == "cpu":
        found["two processes"] = ddp_rows(cfg, args.repeats)
    over = next(row["ratio"] for row in found["step"] if row["what"] == "ours")
    slowest = max(found["parts"][:-1], key=lambda row: row["seconds"])["what"]
    found["bottleneck"] = f"the encoders, {min(1, 1 / over):.0%} of a step; of the rest, the {slowest}"
    if args.roofline:
        from benchmarks.kernels import roofline

        found["roofline"] = roofline(cfg, next(r["images/s in a row"] for r in found["step"] if r["what"] == "ours"))
    tables(found, {**opts, "machine": machine(args.device)}, args.output)


def feed(args: argparse.Namespace) -> None:
    """Time steps on image files against steps on views that are there, for several numbers of loader processes."""
    check(args, repeats=1, batch=1, size=1, images=1)
    if min(args.workers) < 0:
        raise ValueError(f"--workers is {min(args.workers)}; it must be 0 or more")
    from benchmarks.measure import machine, tables

    cfg, opts = _step_config(args)
    from benchmarks.feed import measure

    cfg.DATASETS.TRAIN = [args.folder] if args.folder else []
    found = {"feed": measure(cfg, args.workers, args.repeats, args.images)}
    tables(found, {**opts, "folder": args.folder, "machine": machine(args.device)}, args.output)


def _step_config(args: argparse.Namespace) -> tuple[CfgNode, dict[str, Any]]:
    """Return MoCo v2's config with the options of a step, checked, and these options by key."""
    import logging

    import torch

    from moco_d2.config import load_cfg

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch finds no GPU here; without --device the CPU measures")
    opts = {
        "MODEL.DEVICE": args.device, "SOLVER.IMS_PER_BATCH": args.batch, "DATA.CROP_SIZE": args.size,
        "SSL.ENCODER.NAME": args.encoder, "ENGINE.AUTOCAST": args.autocast, "SEED": 0,
        "ENGINE.CHANNELS_LAST": args.channels_last, "ENGINE.COMPILE": getattr(args, "compile", False),
    }  # fmt: skip
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", [*map(str, itertools.chain(*opts.items())), *args.opts])
    from moco_d2.engine.preflight import check_config

    check_config(cfg, world_size=1)
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK  # as moco-d2 pretrain does
    logging.disable(logging.INFO)
    return cfg, {**opts, "threads": _threads(args.device)}


def _threads(device: str) -> int:
    """Return torch's number of threads; on a CPU it becomes one, because CPU seconds count the waiting of others."""
    import torch

    if device == "cpu":
        torch.set_num_threads(1)
    return torch.get_num_threads()


def kernels(args: argparse.Namespace) -> None:
    """Count a step's operations and the memory that they move, or the kernels of a compiled encoder."""
    check(args, batch=8, size=1)
    import logging

    from benchmarks.measure import machine, tables

    cfg, opts = _step_config(args)
    logging.disable(logging.WARNING)  # one BN group is meant here
    from benchmarks.kernels import compiled_rows, step_rows

    found = {"encoder, compiled": compiled_rows(cfg)} if args.lower else {"step": step_rows(cfg)}
    tables(found, {**opts, "machine": machine(args.device)}, args.output, ("", "", ".1f"))


def methods(args: argparse.Namespace) -> None:
    """Time a step of every method against its networks alone, and against MoCo v2."""
    check(args, repeats=2, batch=2, size=1)
    import logging

    import torch

    from benchmarks.measure import machine, tables
    from benchmarks.methods import registered, rows

    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and torch finds no GPU here; without --device the CPU measures")
    names = registered(args.methods)
    opts = {
        "MODEL.DEVICE": args.device, "SOLVER.IMS_PER_BATCH": args.batch, "DATA.CROP_SIZE": args.size,
        "SSL.ENCODER.NAME": args.encoder, "SSL.ENCODER.ARGS.stem": "imagenet", "SEED": 0,
    }  # fmt: skip
    logging.disable(logging.INFO)
    settings = {**opts, "machine": machine(args.device), "threads": _threads(args.device)}
    found, left_out = rows(names, [*map(str, itertools.chain(*opts.items())), *args.opts], args.repeats)
    content = {"a step": found, **{f"not measured, {number}": why for number, why in enumerate(left_out, start=1)}}
    tables(content, settings, args.output, ("", "", ".3f", ".2f", ".2f", ".0f", ".0f"))


def parts(args: argparse.Namespace) -> None:
    """Time NCE, Sinkhorn and LARS against plain forms of their equations."""
    check(args, repeats=2)
    if not 0 < args.scale <= 1:
        raise ValueError(f"--scale is {args.scale}; it must be above 0 and at most 1")
    from benchmarks.measure import machine, tables
    from benchmarks.parts import rows

    settings = {"repeats": args.repeats, "scale": args.scale, "machine": machine("cpu"), "threads": _threads("cpu")}
    tables(rows(args.repeats, args.scale), settings, args.output)


def data(args: argparse.Namespace) -> None:
    """Time every backend of the loader against the authors' loader."""
    check(args, images=1, size=1, repeats=1)

    from benchmarks.data import AUGMENTATION, measure
    from benchmarks.measure import machine, tables

    found = measure(args.folder, args.images, args.size, args.repeats)
    settings = {"folder": args.folder, "images": args.images, "size": args.size, "augmentation": AUGMENTATION}
    tables(found, {**settings, "machine": machine("cpu"), "threads": 1}, args.output)


def scale(args: argparse.Namespace) -> None:
    """Time the listing, packing and planning of sets of millions of images."""
    check(args, files=1, folders=1, shards=64, samples=16, images=1, repeats=2)  # a batch of 1024 in 64 processes

    from benchmarks.measure import machine, tables
    from benchmarks.scale import Sizes, measure

    sizes = Sizes(args.files, args.folders, args.shards, args.samples, args.images)
    found = measure(sizes, args.repeats)
    tables(found, {**asdict(sizes), "machine": machine("cpu")}, args.output)


def startup(args: argparse.Namespace) -> None:
    """Time ``--help`` of every command against ``import torch``."""
    check(args, repeats=1)

    from benchmarks.measure import help_times, tables

    tables({"startup": help_times(args.repeats)}, {}, args.output)


def proof(args: argparse.Namespace) -> None:
    """Pretrain on CIFAR-10 as the MoCo authors' demo does, and draw the curve over theirs."""
    check(args, epochs=1)

    from benchmarks.proof import run

    run(args)


def _add_steps(commands: Any) -> None:
    """Add the benchmarks of steps."""
    words = "KEY VALUE pairs of the config come last"
    step_ = commands.add_parser("step", help=f"a step of pretraining; {words}")
    step_.set_defaults(run=step)
    kernels_ = commands.add_parser("kernels", help=f"operations and memory of a step; {words}")
    kernels_.set_defaults(run=kernels)
    feed_ = commands.add_parser("feed", help=f"steps on image files; {words}")
    feed_.set_defaults(run=feed)
    methods_ = commands.add_parser("methods", help=f"a step of every method; {words}")
    methods_.set_defaults(run=methods)
    for command, batch, size in ((step_, 32, 64), (feed_, 32, 64), (kernels_, 256, 224), (methods_, 32, 64)):
        command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
        command.add_argument("--encoder", default="resnet50", metavar="NAME", help="(default: %(default)s)")
        command.add_argument("--batch", type=int, default=batch, help="images of a step (default: %(default)s)")
        command.add_argument(
            "--size", type=int, default=size, help="pixels of a large view's side (default: %(default)s)"
        )
        command.add_argument("opts", nargs="*", metavar="KEY VALUE", help="config overrides")
    for command in (step_, feed_, methods_):
        command.add_argument("--repeats", type=int, default=7, help="steps of each kind (default: %(default)s)")
    for command in (step_, feed_, kernels_):
        command.add_argument("--autocast", default="", metavar="TYPE", help="bfloat16 or float16 (default: none)")
        command.add_argument("--channels-last", action="store_true", help="ENGINE.CHANNELS_LAST")
    for command in (step_, feed_):
        command.add_argument("--compile", action="store_true", help="ENGINE.COMPILE")
    step_.add_argument("--roofline", action="store_true", help="compare with the speed of the memory")
    feed_.add_argument("--folder", default="", help="of images (default: 500 x 375 JPEGs are drawn)")
    feed_.add_argument("--images", type=int, default=512, help="to draw, at least a batch (default: %(default)s)")
    feed_.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], metavar="N", help="loader processes (default: 1 2)"
    )
    kernels_.add_argument("--lower", action="store_true", help="compile the encoder and count its kernels instead")
    methods_.add_argument("--methods", nargs="+", default=(), metavar="NAME", help="SSL.METHOD (default: all)")


def _add_proof(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=proof)
    command.add_argument(
        "--pictures", type=cli.expanded, default="", metavar="CIFAR",
        help="CIFAR-10: torchvision's folder, an .npz, or a folder with train/ and test/ (default: downloaded)",
    )  # fmt: skip
    command.add_argument("--epochs", type=int, default=200, help="of the schedule (default: %(default)s)")
    command.add_argument("--width", type=float, default=1.0, help="of the ResNet-18 (default: %(default)s)")
    command.add_argument("--draw", action="store_true", help="only draw what the run in the folder has recorded so far")
    command.add_argument(
        "-o", "--output", type=cli.path, default=Path("output/proof"), metavar="FOLDER",
        help="a new folder, or one whose run is continued (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = commands.add_parser("eval", help="COCO's and VOC's metrics")
    command.set_defaults(run=evaluation)
    command.add_argument("--images", type=int, default=1000, help="number of pictures (default: %(default)s)")
    command.add_argument("--detections", type=int, default=100, help="detections per picture (default: %(default)s)")
    command = commands.add_parser("convert", help="conversion of a training checkpoint")
    command.set_defaults(run=conversion)
    command.add_argument("--width", type=float, default=1.0, help="of the ResNet-50 (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=5, help="runs of each, alternated (default: %(default)s)")
    _add_steps(commands)
    command = commands.add_parser("parts", help="losses and optimizers against plain forms")
    command.set_defaults(run=parts)
    command.add_argument("--repeats", type=int, default=7, help="turns of each form (default: %(default)s)")
    command.add_argument("--scale", type=float, default=1.0, help="of the papers' sizes (default: %(default)s)")
    command = commands.add_parser("data", help="from image files to batches of views")
    command.set_defaults(run=data)
    command.add_argument("--folder", default="", help="of images (default: 500 x 375 JPEGs are drawn)")
    command.add_argument("--images", type=int, default=64, help="number of them (default: %(default)s)")
    command.add_argument("--size", type=int, default=224, help="side of a view in pixels (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    command = commands.add_parser("scale", help="folders of many files, shards and streams")
    command.set_defaults(run=scale)
    command.add_argument("--files", type=int, default=100_000, help="listed in folders (default: %(default)s)")
    command.add_argument("--folders", type=int, default=100, help="of them (default: %(default)s)")
    command.add_argument("--shards", type=int, default=94_000, help="of the stream (default: %(default)s)")
    command.add_argument("--samples", type=int, default=10_000, help="images in each (default: %(default)s)")
    command.add_argument("--images", type=int, default=2000, help="packed and read (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=5, help="rounds (default: %(default)s)")
    command = commands.add_parser("startup", help="--help of every command")
    command.set_defaults(run=startup)
    command.add_argument("--repeats", type=int, default=5, help="runs of each (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("-o", "--output", type=cli.path, metavar="FILE", help="write the numbers as JSON")
    _add_proof(commands.add_parser("proof", help="the authors' CIFAR-10 demo; KEY VALUE pairs of the config come last"))
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    cli.guard(main)

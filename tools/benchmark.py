#!/usr/bin/env python3
"""Measure this project's parts against what they replace, on made-up data of a chosen size.

    tools/benchmark.py eval                                      # COCO's and VOC's metrics: about two minutes
    tools/benchmark.py eval --images 5000 --detections 100       # the size of the real test sets: about ten minutes
    tools/benchmark.py convert                                   # a training checkpoint: about a minute

Prints a table and, with --output, writes it as JSON together with commit, command and versions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import cli


def evaluation(args: argparse.Namespace) -> None:
    """Time every COCO backend, and VOC's evaluator against Detectron2's."""
    for name in ("images", "detections"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")

    from benchmark_evaluation import coco_rows, voc_rows
    from measure import report

    rows = [*coco_rows(args.images, args.detections), *voc_rows(args.images, args.detections)]
    report(rows, {"images": args.images, "detections": args.detections}, args.output)


def conversion(args: argparse.Namespace) -> None:
    """Time the conversion of a MoCo v2 training checkpoint against ``torch.load`` of it."""
    if args.repeats < 1:
        raise ValueError(f"--repeats is {args.repeats}; it must be at least 1")

    from benchmark_conversion import FORMATS, HEADERS, rows
    from measure import report

    report(
        [*rows(args.width, args.repeats)], {"width": args.width, "repeats": args.repeats}, args.output, HEADERS, FORMATS
    )


def main() -> None:
    """Read the command line and run one benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="BENCHMARK")
    command = commands.add_parser("eval", help="COCO's and VOC's metrics")
    command.set_defaults(run=evaluation)
    command.add_argument("--images", type=int, default=1000, help="number of pictures (default: %(default)s)")
    command.add_argument("--detections", type=int, default=100, help="detections per picture (default: %(default)s)")
    command = commands.add_parser("convert", help="conversion of a training checkpoint")
    command.set_defaults(run=conversion)
    command.add_argument("--width", type=float, default=1.0, help="of the ResNet-50 (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=5, help="runs of each, alternated (default: %(default)s)")
    for command in commands.choices.values():
        command.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the numbers as JSON")
    args = parser.parse_args()
    try:
        args.run(args)
    except ValueError as error:
        cli.fail(str(error))


if __name__ == "__main__":
    main()

"""Convert any ResNet or plain ViT checkpoint to Detectron2's names, and prove the result.

    moco-d2 convert output/backbone.pth output/moco_v2.pth
    moco-d2 convert checkpoint.pth out.pth --prefix student.net. --report report.json
    moco-d2 convert output/voc/model_final.pth tuned.pth --to torchvision

docs/checkpoints.md explains sources, proof and report; docs/catalog.md explains --list, --bake and --to.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from moco_d2.commands import cli


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    built = cli.new_parser("convert", __doc__)
    built.add_argument(
        "input", nargs="?", type=cli.expanded, help="checkpoint: .pth, .pth.tar, .pt, .bin, .safetensors, .pkl, .npz"
    )
    built.add_argument(
        "output", nargs="?", type=cli.expanded, help="file to write: .pth (tensors only) or .pkl (numpy arrays)"
    )
    built.add_argument("--source", default="", metavar="KEY", help="project that wrote the file, if the file does not "
                       "show it")  # fmt: skip
    built.add_argument("--prefix", help="start of the wanted network's keys, if the file contains several networks")
    built.add_argument("--drop", action="append", default=[], metavar="REGEX", help="leave out the keys in which it is "
                       "found, such as '^my_head\\.'; never the backbone's (may be repeated)")  # fmt: skip
    built.add_argument("--with", dest="parts", default="", metavar="PARTS", help="also keep what SoCo and ReSim "
                       "pretrain beside the ResNet: fpn, or fpn,box_head")  # fmt: skip
    built.add_argument("--norm", default="", choices=("GN",), help="GN: accept a network with GroupNorm")
    built.add_argument("--heads", type=int, default=0, metavar="N", help="a ViT's number of heads, which weights do not"
                       " show, if it is unusual")  # fmt: skip
    built.add_argument("--report", type=cli.path, metavar="FILE", help="write the full report as JSON")
    built.add_argument(
        "--picture", type=cli.path, metavar="FILE", help="compare the networks on this picture, not on a drawn scene"
    )
    built.add_argument("--no-proof", action="store_true", help="do not compare with Detectron2's network")
    instead = built.add_mutually_exclusive_group()
    instead.add_argument("--bake", action="store_true", help="make the weights take Detectron2's default input")
    instead.add_argument(
        "--to", choices=("torchvision", "timm", "moco"), help="the way back: write a file for other tools"
    )
    instead.add_argument("--list", action="store_true", help="list the published weights that can be named")
    return built


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line asks for; return the exit code."""
    args = parser().parse_args(argv)
    if not args.list and args.output is None:
        parser().error("the following arguments are required: input, output")
    of_conversions = {"--source": args.source, "--prefix": args.prefix, "--drop": args.drop, "--with": args.parts,
                      "--norm": args.norm, "--heads": args.heads, "--report": args.report}  # fmt: skip
    for option, given in of_conversions.items():
        if given and (args.list or args.to):
            parser().error(f"{option} belongs to a conversion; leave it out with {'--list' if args.list else '--to'}")
    if args.picture and (args.list or args.to or args.no_proof):
        parser().error("--picture belongs to the proof of a conversion; leave it out with --list, --to and --no-proof")
    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    from moco_d2.exits import attempt

    return attempt(lambda: (other_work if args.list or args.to else convert)(args))


def convert(args: argparse.Namespace) -> None:
    """Convert, and print the summary of the report."""
    from moco_d2.convert import Choice, can_prove
    from moco_d2.convert.report import check_report, convert_and_report, summary, write_report

    if not args.no_proof and not can_prove():
        raise ValueError(
            "the conversion cannot be proved, because detectron2 is missing, so nothing was written: install it "
            "(python -m moco_d2.install_detectron2), or accept an unproven file with --no-proof"
        )
    parts = tuple(filter(None, args.parts.split(",")))
    if args.report:
        check_report(args.report, args.input, args.output)
    choice = Choice(source=args.source, prefix=args.prefix, norm=args.norm, parts=parts, drop=tuple(args.drop),
                    heads=args.heads)  # fmt: skip
    content = convert_and_report(args.input, args.output, not args.no_proof, choice, args.picture, args.bake)
    if args.report:
        write_report(content, args.report)
    print("\n".join(summary(content)))


def other_work(args: argparse.Namespace) -> None:
    """List the published weights, or write a converted backbone for other tools."""
    from moco_d2.convert.back import restore
    from moco_d2.convert.catalog import listing

    if args.list:
        print(listing())
        return
    backbone = restore(args.input, args.output, args.to)
    print(f"weights  {backbone.facts.origin}" + (f" ({backbone.facts.recipe})" if backbone.facts.recipe else ""))
    for note in backbone.notes:
        print(f"note     {note}")
    print(f"written  {args.output}: {len(backbone.tensors)} tensors")

"""Draw small sample data sets on which every shipped config runs.

    moco-d2 samples output/datasets

OUT becomes a $DETECTRON2_DATASETS root of some five thousand pictures, in half a minute. It has VOC2007, VOC2012, coco,
lvis, cityscapes and imagenet in the folders and file formats of the real data sets, with their class names and category
ids. The same seed gives the same files. datasets/README.md says more.
"""

from __future__ import annotations

from collections.abc import Sequence

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and draw."""
    parser = cli.new_parser("samples", __doc__)
    parser.add_argument(
        "out", type=cli.path, metavar="OUT", help="a new folder, or one that this command filled, which is replaced"
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other pictures (default: 0)")
    args = parser.parse_args(argv)
    from moco_d2.samples.make import SPLITS, make_all

    make_all(args.out, args.seed)
    for split, count in SPLITS.items():
        print(f"{count:5d} pictures  {split}")
    print(f"in {args.out}; use it with: export DETECTRON2_DATASETS={args.out}")

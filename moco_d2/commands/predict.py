r"""Find objects on pictures with a trained detector: drawn, and as a COCO file.

    moco-d2 predict --run output/voc_moco_v2 --output found photos/
    moco-d2 predict --run output/voc_moco_v2/model_0009999.pth --output found a.jpg b.png --score 0.3
    moco-d2 predict --run output/voc_moco_v2 --output found photos/ MODEL.DEVICE cpu

The run's folder is enough (config.yaml, model_final.pth, classes.json); its data sets need not be there. OUTPUT gets
predictions.json, which has every detection that the detector returns, and pictures/, which shows those of --score or
more. Boxes are in pixels of the upright picture. Pictures that cannot be read are named and left out; then the exit
code is 1. KEY VALUE pairs, which override the run's config, come last. docs/from_python.md does it from Python.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from moco_d2.commands import cli
from moco_d2.commands.trials import split


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, predict, and print where the results are."""
    parser = cli.new_parser("predict", __doc__)
    parser.add_argument("--run", required=True, type=cli.path, help="folder of a finished run, or a checkpoint in it")
    parser.add_argument("--output", required=True, type=cli.path, metavar="FOLDER", help="a new folder")
    parser.add_argument("--score", type=float, default=0.5, help="lowest score that is drawn (default: %(default)s)")
    parser.add_argument(
        "pictures", nargs="+", type=cli.path, metavar="PICTURE", help="pictures, or folders of pictures"
    )
    words, opts = split(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(words)
    if not 0 <= args.score <= 1:
        raise ValueError(f"--score is {args.score}; it must be between 0 and 1")
    from moco_d2.reports.predictions import FILE, predict

    left_out = predict(args.run, args.pictures, args.output, args.score, opts)
    print(Path(args.output) / FILE)
    return 1 if left_out else 0

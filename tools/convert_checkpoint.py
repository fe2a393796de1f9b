#!/usr/bin/env python3
"""Convert a checkpoint to Detectron2's names; the same as ``moco-d2 convert``.

    tools/convert_checkpoint.py output/moco_v2/backbone.pth output/moco_v2.pth

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.convert import main

if __name__ == "__main__":
    cli.guard(main)

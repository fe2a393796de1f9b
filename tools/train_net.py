#!/usr/bin/env python3
"""Fine-tune or evaluate a detector; the same as ``moco-d2 train``.

    tools/train_net.py --config-file PascalVOC-Detection/faster_rcnn_R_50_C4_24k MODEL.WEIGHTS moco_v2.pth

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.train import main

if __name__ == "__main__":
    cli.guard(main)

#!/usr/bin/env python3
"""Fine-tune a protocol's detector from several weights, over several seeds; the same as ``moco-d2 trials``.

    tools/run_trials.py --protocol voc0712_faster_rcnn_R_50_C4_24k --weights moco_v2.pth random --seeds 0-4

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.trials import main

if __name__ == "__main__":
    cli.guard(main)

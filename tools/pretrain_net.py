#!/usr/bin/env python3
"""Pretrain a backbone without labels; the same as ``moco-d2 pretrain``.

    tools/pretrain_net.py --config-file Pretrain/moco_v2_R50_200ep --num-gpus 8 OUTPUT_DIR output/moco_v2

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.pretrain import main

if __name__ == "__main__":
    cli.guard(main)

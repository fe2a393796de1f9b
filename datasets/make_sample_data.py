#!/usr/bin/env python3
"""Draw a small $DETECTRON2_DATASETS root for every shipped config; the same as ``moco-d2 samples``.

datasets/make_sample_data.py OUT

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.samples import main

if __name__ == "__main__":
    cli.guard(main)

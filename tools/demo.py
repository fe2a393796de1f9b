#!/usr/bin/env python3
"""Run the whole pipeline on sample pictures; the same as ``moco-d2 demo``.

    tools/demo.py --output output/demo

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.demo import main

if __name__ == "__main__":
    cli.guard(main)

#!/usr/bin/env python3
"""Make a page of training samples or of detections; the same as ``moco-d2 visualize``.

    tools/visualize.py detections --run output/moco --output output/moco_page

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.visualize import main

if __name__ == "__main__":
    cli.guard(main)

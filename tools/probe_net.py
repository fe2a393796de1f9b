#!/usr/bin/env python3
"""Measure what a backbone has learned; the same as ``moco-d2 probe``.

    tools/probe_net.py knn --weights output/moco_v2/backbone.pth --data FOLDER

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.probe import main

if __name__ == "__main__":
    cli.guard(main)

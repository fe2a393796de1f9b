#!/usr/bin/env python3
"""Evaluate detections that lie in a file; the same as ``moco-d2 evaluate``.

    tools/evaluate_json.py --predictions detections.json --dataset coco_2017_val

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.evaluate import main

if __name__ == "__main__":
    cli.guard(main)

#!/usr/bin/env python3
"""Write tables, curves and a page about finished fine-tuning runs; the same as ``moco-d2 report``.

    tools/report.py output/trials -o output/report

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.report import main

if __name__ == "__main__":
    cli.guard(main)

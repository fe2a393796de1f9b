#!/usr/bin/env python3
r"""Make tables, curves and one HTML page of finished fine-tuning runs.

    tools/report.py output/trials -o output/report
    tools/report.py output/trials/voc0712_faster_rcnn_R_50_C4_24k some/other/run -o output/report

Writes report.html (open it in a browser), report.md, report.tex (needs booktabs), report.csv (a line a figure) and
runs.csv (a line a run).
"""

import argparse
import logging

from moco_d2.commands import cli


def main() -> None:
    """Read the runs and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs", nargs="+", type=cli.expanded, metavar="RUNS", help="folders of runs, or folders above them"
    )
    parser.add_argument(
        "-o", "--output", required=True, type=cli.expanded, metavar="FOLDER", help="where the report goes"
    )
    parser.add_argument(
        "--compare", nargs=2, default=(), metavar=("A", "B"),
        help="the two initialisations compared class by class (default: the first and the first baseline)",
    )  # fmt: skip
    args = parser.parse_args()
    from moco_d2.reports.report import write_report

    logging.basicConfig(level=logging.WARNING, format="note: %(message)s")
    for path in write_report(args.runs, args.output, args.compare):
        print(path)


if __name__ == "__main__":
    cli.guard(main)

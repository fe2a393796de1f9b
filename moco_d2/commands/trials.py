r"""Fine-tune a protocol's detector from several weights, over several seeds.

    moco-d2 trials --protocol voc0712_faster_rcnn_R_50_C4_24k --weights moco_v2.pth supervised random \
        --seeds 0-4 --num-gpus 8
    moco-d2 trials --config-file examples/own_data.yaml --weights mine.pth supervised --fractions 1 2 5 10 100
    moco-d2 report output/trials -o output/report

Run it again to continue: a finished trial is not repeated, an interrupted one resumes from its last checkpoint. Several
processes can share one folder (one a GPU, say); no trial runs twice. The exit code is 0 if all trials are done, 1 if
some failed or run elsewhere, 2 if the command is wrong, 75 if it was asked to stop (SIGTERM, SIGUSR1, Ctrl-C), 130
after a second Ctrl-C; after 75 and 130 the same command continues. KEY VALUE pairs come last. docs/trials.md says more.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moco_d2.commands import cli

if TYPE_CHECKING:
    from moco_d2.reports.trials import Trial

KEY = re.compile(r"[A-Z][A-Z_]+(\.[A-Z]\S*)?")  # SEED, SOLVER.MAX_ITER, SSL.ARGS.dim


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; KEY VALUE pairs begin at the first word that looks like a key."""
    parser = cli.new_parser("trials", __doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--protocol", default="", metavar="NAME", help="name of a protocol (docs/configs.md)")
    what.add_argument("--config-file", default="", type=cli.expanded, metavar="FILE", help="a config of your own")
    parser.add_argument(
        "--weights", required=True, nargs="+", metavar="WEIGHTS",
        help="converted files, as PATH or LABEL=PATH, and baselines: supervised (or supervised=PATH), random",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0-4", help="such as 0-4 or 0,2,7 (default: 0-4)")
    parser.add_argument(
        "--fractions", nargs="+", type=float, default=[100.0], metavar="PERCENT",
        help="parts of the training labels; each contains the smaller ones (default: 100)",
    )  # fmt: skip
    parser.add_argument("--output", type=cli.path, default=Path("output/trials"), help="(default: output/trials)")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of a training (without GPUs: on the CPU)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the trials and stop")
    words, opts = split(words)
    args = parser.parse_args(words)
    args.opts = opts
    return args


def split(words: Sequence[str], start: int = 0) -> tuple[list[str], list[str]]:
    """Split a command line before its first KEY; an option with several values would take what follows.

    Args:
        words: of the command line.
        start: number of words at the beginning that are no keys.
    """
    first = next((place for place in range(start, len(words)) if KEY.fullmatch(words[place])), len(words))
    return list(words[:first]), list(words[first:])


def read_seeds(text: str) -> list[int]:
    """Read ``0-4`` or ``0,2,7``."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            raise ValueError(f"--seeds {text}: write a range or a list, such as 0-4 or 0,2,7")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return seeds


def run_trial(trial: Trial, num_gpus: int) -> str:
    """Run one trial unless it is done or another process runs it; return its outcome."""
    from moco_d2.reports import trials

    with trials.locked(trial.folder) as lock:
        if lock is None:
            print("  skipped: another process runs it")
            return "run elsewhere"
        if trials.state(trial) == "done":  # another process may have finished it in the meantime
            return "done before"
        trials.prepare(trial)
        command = [
            "train", "--config-file", trial.config, "--num-gpus", str(num_gpus),
            "--resume", *trial.opts,  # an attempt that ended before its first checkpoint begins anew
        ]  # fmt: skip
        log = trial.folder / trials.LOG
        return cli.attempt(["-m", "moco_d2", *command], log, lock, lambda: trials.state(trial) == "done")


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, run the missing trials, and print the outcomes."""
    args = parse(sys.argv[1:] if argv is None else argv)
    from moco_d2.reports import trials

    logging.getLogger("fvcore").setLevel(logging.ERROR)  # hides the list of tensors that the check of the weights loads
    seeds = read_seeds(args.seeds)
    planned = trials.plan(
        args.protocol, args.weights, seeds, args.output, args.fractions, args.opts, args.num_gpus, args.config_file
    )
    return run_all(planned, args.num_gpus, args.dry_run)


def run_all(
    planned: Sequence[Trial], num_gpus: int, dry_run: bool = False, after: Callable[[], object] = lambda: None
) -> int:
    """Run the missing trials, print the outcomes, and return the exit code.

    Args:
        planned: by :func:`moco_d2.reports.trials.plan`.
        num_gpus: processes of each training.
        dry_run: whether to list the trials only.
        after: called after each training that this command has finished.
    """
    from moco_d2.reports import trials

    outcomes: list[tuple[str, Trial]] = []
    with cli.stop_on_signals():
        for number, trial in enumerate(planned, start=1):
            state = trials.state(trial)
            print(f"[{number}/{len(planned)}] {trial.name}: {state}", flush=True)
            if not dry_run:
                outcomes.append(("done before" if state == "done" else run_trial(trial, num_gpus), trial))
                if outcomes[-1][0] == "done":
                    after()
    if dry_run:
        return 0
    counts = Counter(outcome for outcome, _ in outcomes)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    open_ones = [(outcome, trial) for outcome, trial in outcomes if not outcome.startswith("done")]
    for outcome, trial in open_ones:
        print(f"  {outcome}: {trial.name}, {trial.folder}")
    return 1 if open_ones else 0

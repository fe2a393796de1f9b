#!/usr/bin/env python3
r"""Fine-tune a protocol's detector from each of several weights, over several seeds: what the papers' tables average.

    tools/run_trials.py --protocol voc0712_faster_rcnn_R_50_C4_24k --weights moco_v2.pth supervised random \
        --seeds 0-4 --num-gpus 8
    tools/run_trials.py --protocol ... --weights mine.pth supervised --fractions 1 2 5 10 100 --seeds 0-2
    tools/report.py output/trials -o output/report

Run it again to continue: what is done is not repeated, what was cut off goes on from its last checkpoint. Several may
run at once on one folder (one a GPU, say); no trial is run twice. The exit code is 0 when all trials asked for are
done, 1 when some failed or are run elsewhere, 2 when the command is wrong, 75 when it was asked to stop (SIGTERM,
SIGUSR1), 130 when it was interrupted: then the same command continues. KEY VALUE pairs come last. More is in
docs/trials.md.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from moco_d2.commands import cli

if TYPE_CHECKING:
    from moco_d2.reports.trials import Trial

TRAIN_NET = Path(__file__).resolve().parent / "train_net.py"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
KEY = re.compile(r"[A-Z][A-Z_]+(\.[A-Z]\S*)?")  # SEED, SOLVER.MAX_ITER, SSL.ARGS.dim


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what follows the first KEY are KEY VALUE pairs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", required=True, metavar="NAME", help="name of a protocol (docs/configs.md)")
    parser.add_argument(
        "--weights", required=True, nargs="+", metavar="WEIGHTS",
        help="converted files, as PATH or LABEL=PATH; or the baselines: supervised (or supervised=PATH), random",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0-4", help="such as 0-4 or 0,2,7 (default: 0-4)")
    parser.add_argument(
        "--fractions", nargs="+", type=float, default=[100.0], metavar="PERCENT",
        help="parts of the training labels, each within the next (default: 100)",
    )  # fmt: skip
    parser.add_argument("--output", type=cli.path, default=Path("output/trials"), help="(default: output/trials)")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of a training (without GPUs: on the CPU)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the trials and stop")
    first_key = next((place for place, word in enumerate(words) if KEY.fullmatch(word)), len(words))
    args = parser.parse_args(words[:first_key])
    args.opts = words[first_key:]
    return args


def read_seeds(text: str) -> list[int]:
    """Read ``0-4`` or ``0,2,7``."""
    seeds: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not found:
            raise ValueError(f"--seeds {text}: write a range or a list, such as 0-4 or 0,2,7")
        seeds += range(int(found[1]), int(found[2] or found[1]) + 1)
    return seeds


def run_trial(trial: Trial, num_gpus: int) -> str:
    """Run one trial unless it is done or another process runs it; return what became of it."""
    from moco_d2.reports import trials

    with trials.locked(trial) as lock:
        if lock is None:
            print("  another run_trials is at it: left to that one")
            return "run elsewhere"
        if trials.state(trial) == "done":  # another process may have finished it since we looked
            return "done before"
        trials.prepare(trial)
        command = [
            str(TRAIN_NET), "--config-file", trial.config, "--num-gpus", str(num_gpus),
            "--resume", *trial.opts,  # an attempt that ended before its first checkpoint begins anew
        ]  # fmt: skip
        print(f"  $ {shlex.join(command)}", flush=True)
        # The lock goes along: should we be killed, the folder stays locked while the training lives.
        code = cli.follow(command, trial.folder / trials.LOG, cli.PROGRESS, pass_fds=[lock])
        if code == 0 and trials.state(trial) == "done":
            return "done"
        if code == os.EX_TEMPFAIL:
            print("  was asked to stop and has saved; the same command continues", flush=True)
            sys.exit(code)
        print(f"  failed with code {code}; its log is {trial.folder / trials.LOG}", flush=True)
        return "failed"


def main() -> int:
    """Check everything, run what is missing, and say what became of it."""
    args = parse(sys.argv[1:])
    from moco_d2.reports import trials

    logging.getLogger("fvcore").setLevel(logging.ERROR)  # what the check of the weights loads is nobody's business
    seeds = read_seeds(args.seeds)
    planned = trials.plan(
        args.protocol, args.weights, seeds, args.output, args.fractions, args.opts, processes=args.num_gpus
    )
    outcomes: list[tuple[str, Trial]] = []
    for number, trial in enumerate(planned, start=1):
        state = trials.state(trial)
        print(f"[{number}/{len(planned)}] {trial.name}: {state}", flush=True)
        if args.dry_run:
            continue
        outcomes.append(("done before" if state == "done" else run_trial(trial, args.num_gpus), trial))
    if args.dry_run:
        return 0
    counts = Counter(outcome for outcome, _ in outcomes)
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    open_ones = [(outcome, trial) for outcome, trial in outcomes if not outcome.startswith("done")]
    for outcome, trial in open_ones:
        print(f"  {outcome}: {trial.name}, {trial.folder}")
    return 1 if open_ones else 0


def heed() -> None:
    """Leave at SIGTERM and SIGUSR1; on the way out the training is asked to stop and waited for while it saves."""

    def leave(*_: object) -> NoReturn:
        for number in SIGNALS:  # A second one shall not end that wait.
            signal.signal(number, signal.SIG_IGN)
        sys.exit(os.EX_TEMPFAIL)

    for number in SIGNALS:
        signal.signal(number, leave)


if __name__ == "__main__":
    heed()
    cli.guard(main)

r"""Compare pretrainings at equal budget: methods, or the paper's K and m.

    moco-d2 sweep figure3 --views 500000 --data pictures --output output/figure3      # K for the three mechanisms
    moco-d2 sweep momentum --views 500000 --data pictures --output output/momentum    # m of MoCo's key encoder
    moco-d2 sweep --methods moco_v2 simclr byol --views 500000 --data pictures --linear \
        --detect quick_voc0712_faster_rcnn_R_50_C4 --output output/methods DATASETS.TRAIN '("/folder/of/images",)'

Each run is a moco-d2 pretrain in OUTPUT/NAME. sweep.json, sweep.md and sweep.png collect loss, kNN, linear accuracy,
AP, speed and memory. Run it again to continue: a finished run is not repeated, an interrupted one resumes. The exit
code is 0 if all is done, 1 if a run failed or runs elsewhere, 2 if the command is wrong, 75 and 130 if it was stopped.
KEY VALUE pairs, for all runs, come last. docs/sweeps.md says more.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moco_d2.commands import cli, trials

if TYPE_CHECKING:
    from moco_d2.reports.sweep import SweepRun


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line; KEY VALUE pairs begin at the first word that looks like a key."""
    parser = cli.new_parser("sweep", __doc__)
    parser.add_argument("sweep", nargs="?", type=cli.expanded, help="figure3, momentum, or a file (docs/sweeps.md)")
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="instead: recipes to compare, as byol, or configs"
    )
    parser.add_argument("--recipes", default="R50", help="which of the recipes: R50 or cifar10_R18 (default: R50)")
    parser.add_argument("--views", type=int, metavar="N", help="pictures shown to each run (default: as its config)")
    parser.add_argument("--data", default="", type=cli.expanded, metavar="SET", help="labelled pictures, for kNN")
    parser.add_argument("--linear", action="store_true", help="a linear classifier (moco_cached) on the same pictures")
    parser.add_argument("--detect", metavar="PROTOCOL", help="fine-tune a detector from each run, and from random")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help="only these runs, as byol or 'MoCo_*'")
    parser.add_argument("--output", type=cli.path, default=Path("output/sweep"), help="(default: output/sweep)")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of a training (without GPUs: on the CPU)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, list the runs and stop")
    words, opts = trials.split(words)
    args = parser.parse_args(words)
    if bool(args.sweep) == bool(args.methods):
        parser.error("give either the name or file of a sweep, or --methods")
    args.opts = opts
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Check everything, run what is missing, and write the table and the picture."""
    args = parse(sys.argv[1:] if argv is None else argv)
    from moco_d2.reports import sweep as sweeps
    from moco_d2.reports.sweep_page import write_page

    logging.getLogger("fvcore").setLevel(logging.ERROR)
    sweep = (
        sweeps.of_methods(args.methods, args.recipes) if args.methods else sweeps.read_sweep(args.sweep, args.recipes)
    )
    runs = sweeps.plan(sweep, args.output, args.opts, args.views, args.data, args.only, args.num_gpus)
    if args.linear and not all(run.cfg.SSL.MONITOR.DATASET for run in runs):
        raise ValueError("--linear needs labelled pictures: add --data SET")
    if args.detect:
        from moco_d2.reports.trials import plan

        # With random weights, which need no file: so protocol, data sets and machine are checked.
        plan(args.detect, ["random"], [0], _detection(args), processes=args.num_gpus)
    if args.dry_run:
        for number, run in enumerate(runs, start=1):
            print(f"[{number}/{len(runs)}] {run.name}: {sweeps.state(run)}, {run.length}")
        return 0
    notes: dict[str, str] = {}
    with cli.stop_on_signals():
        code = _pretrain(runs, args, notes, lambda: write_page(sweep, runs, args.output, notes))
        code |= _probe(runs, args, notes) if args.linear else 0
        code |= _detect(runs, args, notes) if args.detect else 0
        print("", *write_page(sweep, runs, args.output, notes), sep="\n")
    return code


def _detection(args: argparse.Namespace) -> Path:
    from moco_d2.reports.sweep_page import DETECTION

    folder: Path = args.output / DETECTION
    return folder


def _pretrain(
    runs: Sequence[SweepRun], args: argparse.Namespace, notes: dict[str, str], after: Callable[[], object]
) -> int:
    """Run the missing pretrainings, note those that failed, and return the exit code."""
    from moco_d2.reports import sweep as sweeps

    counts: Counter[str] = Counter()
    for number, run in enumerate(runs, start=1):
        before = sweeps.state(run)
        print(f"[{number}/{len(runs)}] {run.name}: {before}, {run.length}", flush=True)
        outcome = "done before" if before == "done" else _pretrain_one(run, args.num_gpus)
        counts[outcome] += 1
        if not outcome.startswith("done"):
            notes[run.name] = f"{outcome}; its log is {run.folder / sweeps.LOG}"
        if outcome != "done before":
            after()
    print("\n" + ", ".join(f"{count} {outcome}" for outcome, count in counts.items()))
    for name, note in notes.items():
        print(f"  {name}: {note}")
    return int(bool(notes))


def _pretrain_one(run: SweepRun, processes: int) -> str:
    from moco_d2.reports import sweep as sweeps
    from moco_d2.reports.trials import locked

    with locked(run.folder) as lock:
        if lock is None:
            return "run elsewhere"
        if sweeps.state(run) == "done":  # another process may have finished it in the meantime
            return "done before"
        sweeps.prepare(run)
        log = run.folder / sweeps.LOG
        return cli.attempt(sweeps.command(run, processes), log, lock, lambda: sweeps.state(run) == "done")


def _probe(runs: Sequence[SweepRun], args: argparse.Namespace, notes: dict[str, str]) -> int:
    """Train the missing linear classifiers, note those that failed, and return the exit code."""
    from moco_d2.reports import sweep as sweeps
    from moco_d2.reports.trials import locked

    code = 0
    for run in sweeps.finished(runs):
        folder = sweeps.probe_folder(run.name, args.output)
        result = folder / "probe.json"
        with locked(folder) as lock:
            if lock is None:
                code, notes[run.name] = 1, "the linear classifier is trained elsewhere"
            if lock is None or result.is_file():
                continue
            print(f"{run.name}: linear classifier", flush=True)
            command, log = sweeps.probe_command(run, args.output, args.num_gpus), folder / sweeps.LOG
            if cli.attempt(command, log, lock, result.is_file) == "failed":
                code, notes[run.name] = 1, f"the linear classifier failed; its log is {log}"
    return code


def _detect(runs: Sequence[SweepRun], args: argparse.Namespace, notes: dict[str, str]) -> int:
    """Convert the backbones, note those that Detectron2 cannot take, fine-tune detectors; return the exit code."""
    from moco_d2.reports import over_run
    from moco_d2.reports import sweep as sweeps
    from moco_d2.reports.pretraining import BACKBONE
    from moco_d2.reports.sweep_page import REFERENCE
    from moco_d2.reports.trials import plan

    weights = [REFERENCE]
    for run in sweeps.finished(runs):
        checkpoint = over_run.Checkpoint(0, run.name, run.folder / BACKBONE)
        try:
            over_run.convert(checkpoint, args.output)
        except ValueError as error:
            notes.setdefault(run.name, f"no detector: {error}")
            continue
        weights.append(f"{run.name}={args.output / over_run.WEIGHTS / run.name}.pth")
    planned = plan(args.detect, weights, [0], _detection(args), processes=args.num_gpus)
    return trials.run_all(planned, args.num_gpus)

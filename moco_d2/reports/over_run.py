"""Detection over a pretraining: the AP of detectors fine-tuned from its checkpoints, with its kNN accuracy and loss.

Each checkpoint is converted and then fine-tuned by :mod:`moco_d2.reports.trials`. The output folder contains
``request.json`` (the pretraining and the protocol that it belongs to), ``weights/LABEL.pth`` with the report of its
conversion, the trials, and what :mod:`moco_d2.reports.over_run_page` makes of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from moco_d2.config import load_cfg, roles, settings
from moco_d2.convert import convert_state
from moco_d2.convert.report import convert_and_report, write_report
from moco_d2.io import files
from moco_d2.io.checkpoints import checkpoint_sha256, forget_checkpoint, some
from moco_d2.io.checkpoints import read_checkpoint as read
from moco_d2.reports import trials
from moco_d2.reports.records import RESULTS, read_json
from moco_d2.reports.trials import Trial
from moco_d2.running.checkpoints import iteration, periodic

WEIGHTS, REQUEST = "weights", "request.json"
PAGE = ("detection_over_run.json", "detection_over_run.html", "detection_over_run.png")

_ALL = "all"
_FORM = "write all, every 20 epochs, every 5000 iterations, or numbers, as in 20 50 200 epochs"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of a pretraining.

    Attributes:
        iteration: number of iterations that were done.
        label: its name in folders and tables.
        path: the file; None if only its converted weights are left.
    """

    iteration: int
    label: str
    path: Path | None


@dataclass(frozen=True)
class CheckpointedRun:
    """A pretraining and its checkpoints, the oldest first.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        cfg: its config.
        steps_per_epoch: iterations of an epoch.
        checkpoints: those in its folder and those converted earlier.
    """

    folder: Path
    cfg: CfgNode
    steps_per_epoch: int
    checkpoints: tuple[Checkpoint, ...]

    @property
    def unit(self) -> str:
        """What its progress is counted in: epochs, or iterations if the config gives its length so."""
        return "epoch" if self.cfg.SOLVER.EPOCHS else "iteration"

    def place(self, done: int) -> float:
        """Return a number of iterations in the unit."""
        return done / self.steps_per_epoch if self.unit == "epoch" else done

    def describe(self, checkpoints: Sequence[Checkpoint]) -> str:
        """Return in words where checkpoints are."""
        places = ", ".join(f"{round(self.place(one.iteration), 2):g}" for one in checkpoints)
        return f"{self.unit}{'s' * (len(checkpoints) != 1)} {places}"

    def choose(self, request: str) -> tuple[list[Checkpoint], str]:
        """Return the checkpoints that ``--checkpoints`` asks for, and a note about those that were not kept.

        Of ``every N``, the checkpoint nearest to each multiple is taken, at most a quarter of N away; of numbers of
        epochs, the nearest at most half an epoch away.

        Raises:
            ValueError: the request cannot be read, there are none, or a number has none; the message lists those that
                exist.
        """
        if request.split() == [_ALL]:
            return list(self.checkpoints), ""
        found = re.fullmatch(r"(every )?([1-9]\d*(?: [1-9]\d*)*) (epoch|iteration)s?", " ".join(request.split()))
        numbers = [int(word) for word in found[2].split()] if found else []
        if not found or (found[1] and len(numbers) > 1):
            raise ValueError(f"--checkpoints {request}: {_FORM}")
        unit = self.steps_per_epoch if found[3] == "epoch" else 1
        wanted, away = [number * unit for number in numbers], unit // 2
        if found[1]:
            away = wanted[0] // 4
            wanted = list(range(wanted[0], self.checkpoints[-1].iteration + away + 1, wanted[0]))
        nearest = [min(self.checkpoints, key=lambda one: abs(one.iteration - w)) for w in wanted]
        pairs = list(zip(wanted, nearest, strict=True))
        chosen = [one for w, one in pairs if abs(one.iteration - w) <= away]
        missing = [str(w // unit) for w, one in pairs if abs(one.iteration - w) > away]
        note = ""
        if missing or not wanted:
            note = (
                f"{self.folder} has no checkpoint of {found[3]} {', '.join(missing) or numbers[0]}; it has those of "
                f"{self.describe(self.checkpoints)}. SOLVER.CHECKPOINT_KEEP_EVERY keeps those at multiples of so many "
                f"iterations while it trains (an epoch has {self.steps_per_epoch}), SOLVER.CHECKPOINT_KEEP 0 keeps all"
            )
        if not chosen or (missing and not found[1]):
            raise ValueError(f"--checkpoints {request}: {note}")
        return list(dict.fromkeys(chosen)), note


def read_pretraining(folder: Path, output: Path) -> CheckpointedRun:
    """Read which checkpoints a pretraining has, and which were converted into the output folder earlier.

    Raises:
        ValueError: the folder is not that of a pretraining, has no checkpoints, or one cannot be read.
    """
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder} has no config.yaml: give the OUTPUT_DIR of a moco-d2 pretrain")
    paths, final = periodic(folder), folder / "model_final.pth"
    found = {iteration(path) + 1: path for path in paths}
    last = final if final.is_file() else paths[-1] if paths else None
    if last is None:
        raise ValueError(
            f"{folder} has no checkpoints (model_*.pth): SOLVER.CHECKPOINT_PERIOD says when a pretraining writes them, "
            "SOLVER.CHECKPOINT_KEEP and SOLVER.CHECKPOINT_KEEP_EVERY which ones it keeps"
        )
    content = read(last)
    trainer = content.get("trainer")
    run = trainer.get("run") if isinstance(trainer, Mapping) else None
    # Detectors and linear probes have checkpoints, too, but no length of a pretraining in them.
    if not isinstance(run, Mapping) or not {"number of images", "number of iterations"} <= run.keys():
        kind = "a detector" if (folder / RESULTS).is_file() else "something else"
        raise ValueError(
            f"{folder} is not the folder of a pretraining: {last.name} is a checkpoint of {kind}; give the OUTPUT_DIR "
            "of a moco-d2 pretrain"
        )
    found.setdefault(int(content["iteration"]) + 1, last)
    cfg = load_cfg(folder / "config.yaml")
    empty = CheckpointedRun(folder, cfg, run["number of images"] // run["SOLVER.IMS_PER_BATCH"], ())
    listed = {label: Checkpoint(done, label, path) for done, path in found.items() for label in [_label(empty, done)]}
    earlier = {one.label: one for one in converted(output)}
    return replace(empty, checkpoints=tuple(sorted((earlier | listed).values(), key=lambda one: one.iteration)))


def _label(run: CheckpointedRun, done: int) -> str:
    if run.unit == "iteration":
        return f"iteration_{done:07d}"
    return f"epoch_{run.place(done):07.2f}".removesuffix(".00")


def converted(output: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints whose converted weights are in the output folder."""
    for report in sorted((output / WEIGHTS).glob("*.json")):
        done = read_json(report).get("iteration")
        if isinstance(done, int) and _weights(output, report.stem).is_file():
            yield Checkpoint(done, report.stem, None)


def _weights(output: Path, label: str) -> Path:
    return output / WEIGHTS / f"{label}.pth"


def check(
    run: CheckpointedRun, protocol: str, output: Path, references: Sequence[str], seeds: Sequence[int],
    opts: Sequence[str] = (), processes: int = 1,
) -> None:  # fmt: skip
    """Check all that can be checked before the first conversion; nothing is written.

    Raises:
        ValueError: the output folder belongs to another pretraining or protocol; or see
            :func:`moco_d2.reports.trials.plan`.
    """
    files.check_claim(output, [REQUEST, WEIGHTS, *PAGE], "--output")
    earlier, asked = read_json(output / REQUEST), _request(run, protocol)
    changed = {key: f"{key} {earlier.get(key)}, not {asked.get(key)}" for key in {**earlier, **asked}
               if earlier.get(key) != asked.get(key)}  # fmt: skip
    if earlier and changed:
        raise ValueError(
            f"--output {output} is of another pretraining or protocol: it has {some(changed.values())}; choose another "
            "--output"
        )
    # With random weights, which need no file: so protocol, keys, data sets and machine are checked.
    trials.plan(protocol, list(dict.fromkeys(["random", *references])), seeds, output, (100.0,), opts, processes)


def _request(run: CheckpointedRun, protocol: str) -> dict[str, Any]:
    recipe = settings(run.cfg, roles.PRETRAINING, roles.RECIPE)
    request: dict[str, Any] = json.loads(json.dumps({"protocol": protocol, "SEED": run.cfg.SEED, **recipe}))
    return request


def claim(run: CheckpointedRun, protocol: str, output: Path) -> None:
    """Create the output folder, and record which pretraining and protocol it belongs to."""
    files.claim(output, [REQUEST, WEIGHTS, *PAGE], "--output")
    with files.one_line(output, "--output"), files.atomic_write(output / REQUEST) as file:
        file.write(json.dumps(_request(run, protocol), indent=1).encode() + b"\n")


def check_convertible(checkpoint: Checkpoint) -> None:
    """Check that a checkpoint can be converted, without the proof.

    Raises:
        CheckpointError: it cannot.
    """
    if checkpoint.path:
        convert_state(read(checkpoint.path), checkpoint.path)
        forget_checkpoint()


def convert(checkpoint: Checkpoint, output: Path) -> bool:
    """Convert a checkpoint, with proof, unless this was done before; return whether it was converted now.

    Raises:
        ValueError: it cannot be converted, or the output folder has another checkpoint's weights of this name.
    """
    target = _weights(output, checkpoint.label)
    report = target.parent / f"{checkpoint.label}.json"
    if checkpoint.path is None:
        return False
    if target.is_file() and (made := read_json(report)):
        if made.get("input", {}).get("sha256") != checkpoint_sha256(checkpoint.path):
            raise ValueError(
                f"{target} was converted from another file than {checkpoint.path} is now; choose another --output"
            )
        return False
    content = convert_and_report(checkpoint.path, target)
    write_report({**content, "iteration": checkpoint.iteration}, report)
    forget_checkpoint()
    return True


def plan(
    protocol: str, output: Path, chosen: Collection[Checkpoint], references: Sequence[str], seeds: Sequence[int],
    opts: Sequence[str] = (), processes: int = 1,
) -> list[Trial]:  # fmt: skip
    """Return the trials of the chosen checkpoints, which are converted, and of the references.

    All trials of the folder are compared with the request, those of other checkpoints and seeds, too: they stand in
    one picture.

    Raises:
        ValueError: see :func:`moco_d2.reports.trials.plan`.
    """
    labels = [one.label for one in converted(output)]
    begun = [int(path.name[4:]) for path in (output / protocol).glob("*/seed*") if path.name[4:].isdecimal()]
    weights = [*references, *(str(_weights(output, label)) for label in labels)]
    every = trials.plan(protocol, weights, {*seeds, *begun}, output, (100.0,), opts, processes)
    left_out = {*labels} - {one.label for one in chosen}
    return [trial for trial in every if trial.seed in seeds and trial.init.label not in left_out]

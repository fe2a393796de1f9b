"""A finished run or evaluation, as a report reads it from its folder."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moco_d2.config import INITS, load_cfg, roles, settings
from moco_d2.model_zoo import config_changes
from moco_d2.reports.records import EVALUATION, FRACTION, RESULTS, read_result, read_scalars, read_trial

BASELINES = tuple(init for init in INITS if init != "moco")


@dataclass(frozen=True)
class Run:
    """One finished fine-tuning run, or one evaluation of a trained detector.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        result: its results; fields that an earlier version did not write count as empty.
        trial: its ``trial.json``, if it is a trial.
        evaluation: whether it is an evaluation alone (``--eval-only``), whose weights are the trained detector's.
    """

    folder: Path
    result: Mapping[str, Any]
    trial: Mapping[str, Any]
    evaluation: bool = False

    @property
    def file(self) -> Path:
        """The file with its results."""
        return self.folder / (EVALUATION if self.evaluation else RESULTS)

    @property
    def protocol(self) -> str:
        """The protocol's name."""
        return str(self.result.get("protocol") or "no protocol")

    @property
    def weights(self) -> Mapping[str, Any]:
        """Path, SHA-256 and facts of its initial weights."""
        return self.result.get("weights") or {}

    @property
    def sha256(self) -> str:
        """SHA-256 of the weights; empty if unknown or random."""
        return self.weights.get("sha256") or self.trial.get("weights", {}).get("sha256") or ""

    @cached_property
    def init(self) -> str:
        """Its initialisation, under the name of published rows; empty if unknown."""
        path, facts = self.weights.get("path"), self.weights.get("facts") or {}
        if self.evaluation:
            return ""
        if path == "":
            return "random"
        if self.trial.get("init", {}).get("kind") == "supervised":
            return "supervised"
        if "ImageNetPretrained/MSRA/" in (path or "") or facts.get("origin", "").startswith(
            "ImageNet-supervised, MSRA"
        ):
            return "supervised"
        return facts.get("recipe") or facts.get("protocol") or ""  # the name in earlier versions

    @cached_property
    def label(self) -> str:
        """Its initialisation in a word; of an evaluation, the checkpoint."""
        if self.evaluation:
            return "/".join(Path(self.weights.get("path") or "unknown").with_suffix("").parts[-2:])
        if self.init in BASELINES:
            return self.init
        return self.trial.get("init", {}).get("label") or Path(self.weights.get("path") or "unknown").stem

    @property
    def percent(self) -> float:
        """Percentage of the training labels that it used."""
        if self._changes is None:
            return float((self.settings or {}).get(FRACTION[:-1], 100.0))
        return next((float(c.partition("=")[2]) for c in self._changes or () if c.startswith(FRACTION)), 100.0)

    @property
    def changes(self) -> tuple[str, ...] | None:
        """``KEY=value`` where its config departs from the protocol, without the labels' part; None if unknown."""
        if self._changes is None:
            return None
        return tuple(change for change in self._changes if not change.startswith(FRACTION))

    @cached_property
    def _changes(self) -> list[str] | None:
        if "config_changes" in self.result:
            changes: list[str] | None = self.result["config_changes"]
            return changes
        try:
            return config_changes(load_cfg(self.folder / ("eval_only" * self.evaluation) / "config.yaml"))
        except ValueError:  # no such file, keys of another version, or not a shipped protocol
            return None

    @cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """``{key: value}`` of its protocol's keys, by the ``config.yaml`` in its folder; None if it cannot be read."""
        try:
            cfg = load_cfg(self.folder / ("eval_only" * self.evaluation) / "config.yaml")
        except ValueError:
            return None
        return settings(cfg, roles.DETECTION, roles.PROTOCOL)

    def pictures(self, test_set: str) -> tuple[int | None, int | None]:
        """Return the numbers of pictures that it was trained on and tested on; None if not recorded."""
        counts = self.result.get("pictures") or {}
        return counts.get("train"), counts.get("test", {}).get(test_set)

    @property
    def parts(self) -> tuple[str, ...]:
        """The components of its detector that were pretrained in addition to the backbone."""
        return () if self.evaluation else tuple((self.weights.get("facts") or {}).get("parts", ()))

    @property
    def scaled(self) -> str:
        """In words, the settings that were scaled to the number of processes; empty if none were."""
        changed = self.result.get("scaled") or {}
        parts = (f"{key.rpartition('.')[2]} {before} -> {after}" for key, (before, after) in sorted(changed.items()))
        batches = self.engine.get("ACCUMULATE", 1)
        each = f" with {batches} batches per step" if batches > 1 else ""
        return f"scaled to {self.processes} process(es){each}: {', '.join(parts)}" if changed else ""

    @property
    def engine(self) -> Mapping[str, Any]:
        """Its performance options, and the number of batches per step."""
        return self.result.get("engine") or {}

    @property
    def performance(self) -> str:
        """In words, the performance options that were on."""
        return ", ".join(f"{key} {value}" for key, value in self.engine.items() if value and key != "ACCUMULATE")

    @property
    def processes(self) -> str:
        """Number of processes."""
        return str(self.result.get("processes", "?"))

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """``{test set: {"bbox/AP": value}}``, without metrics that have no value."""
        return {
            test_set: {
                f"{task}/{name}": float(value)
                for task, values in (tasks or {}).items() for name, value in values.items()
                if value is not None and math.isfinite(value)
            }
            for test_set, tasks in (self.result.get("metrics") or {}).items()
        }  # fmt: skip

    def curve(self, key: str) -> list[tuple[int, float]]:
        """Return (iteration, value) of a scalar in ``metrics.json``; a repeated iteration has its last value.

        A trained detector's evaluation has no curves.
        """
        if self.evaluation:
            return []
        points = {line["iteration"]: float(line[key]) for line in read_scalars(self.folder) if key in line}
        return sorted(points.items())


def read_run(folder: str | os.PathLike[str], evaluation: bool = False) -> Run:
    """Read a finished run, or the evaluation in its folder.

    Raises:
        ValueError: there are no readable results, or ``trial.json`` is damaged.
    """
    folder = Path(folder)
    return Run(folder, read_result(folder, EVALUATION if evaluation else RESULTS), read_trial(folder), evaluation)

"""Content of a report: the runs and probes in folders, and the origin of their figures."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from moco_d2.reports import pretraining, summary
from moco_d2.reports.pretraining import Backbones, Pretraining, Probe, build_backbones
from moco_d2.reports.records import PROBES, RESULTS
from moco_d2.reports.run import Run
from moco_d2.reports.summary import Table


@dataclass(frozen=True)
class Content:
    """What a report shows.

    Attributes:
        runs: of detectors.
        pretrainings: finished or not.
        probes: of backbones.
        labels: of the rows to compare class by class.
        left_out: what could not be read, with the reason.
    """

    runs: Sequence[Run]
    pretrainings: Sequence[Pretraining]
    probes: Sequence[Probe]
    labels: Sequence[str]
    left_out: Sequence[str]

    @cached_property
    def tables(self) -> list[Table]:
        """The tables of the runs."""
        return summary.build_tables(self.runs)

    @cached_property
    def backbones(self) -> Backbones | None:
        """The table of backbones; none if there are detectors only."""
        if not self.pretrainings and not self.probes:
            return None
        return build_backbones(self.pretrainings, self.probes, self.tables)

    def origins(self) -> list[dict[str, str]]:
        """Return the origin of each run's figures."""
        others = (*map(_origin_of_pretraining, self.pretrainings), *map(_origin_of_probe, self.probes))
        return [*others, *map(provenance, self.runs)]


def read(paths: Iterable[str | os.PathLike[str]], labels: Sequence[str] = ()) -> Content:
    """Read all runs and probes in folders and below them; see :func:`write_report`.

    Raises:
        ValueError: a path contains none that can be read.
    """
    runs: dict[Path, Run] = {}
    pretrainings: dict[Path, Pretraining] = {}
    probes: list[Probe] = []
    left_out: list[str] = []
    for path in map(Path, paths):
        problems: list[str] = []
        found = summary.find_runs([path], problems.append, required=False)
        started, probed = pretraining.find(path, problems.append)
        if not (found or started or probed):
            if problems:
                raise ValueError(f"{path} contains no finished run that can be read:\n" + "\n".join(problems))
            raise ValueError(
                f"{path} contains no finished run, no pretraining run and no probe: there is no {RESULTS} and "
                f"no {PROBES} in it or below, and no folder that moco-d2 pretrain wrote"
            )
        for run in found:
            runs.setdefault(run.file, run)
        for one in started:
            pretrainings.setdefault(one.folder, one)
        for probe in probed:  # a linear probe's result may be in its folder and under the name that --output gave
            if all(probe.content != other.content for other in probes):
                probes.append(probe)
        left_out += problems
    return Content(list(runs.values()), list(pretrainings.values()), probes, labels, left_out)


def provenance(run: Run) -> dict[str, str]:
    """Return the origin of a run's figures: folder, code, weights, machine, settings."""
    result, weights = run.result, run.weights
    versions = {**(result.get("versions") or {}), "python": result.get("python")}
    return {
        "protocol": run.protocol,
        "pre-train": run.label,
        "labels": f"{run.percent:g}%",
        "seed": str(result.get("seed", "")),
        "folder": str(run.folder),
        "commit": str(result.get("commit") or ""),
        "date": str(result.get("date") or ""),
        "hardware": f"{run.processes} x {result.get('device', '?')}",
        "iterations": str(result.get("iterations", "")),
        "weights": str(weights.get("path") or ""),
        "weights SHA-256": run.sha256,
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "performance options": run.performance,
        "departures": _departures(run),
        "scaled": run.scaled,
        "pictures": _pictures(run),
        "config file": str(run.trial.get("config_file", "")),
        "origin of the weights": str((weights.get("facts") or {}).get("origin", "")),
        "command": str(result.get("command") or ""),
    }


def _departures(run: Run) -> str:
    if run.changes is not None:
        return " ".join(run.changes)
    return "not recorded" if run.settings is None else ""  # not a shipped protocol: there is nothing to depart from


def _pictures(run: Run) -> str:
    counts = run.result.get("pictures") or {}
    parts = [f"{counts['train']} for training"] if "train" in counts else []
    return ", ".join([*parts, *(f"{count} in {name}" for name, count in counts.get("test", {}).items())])


def _origin_of_pretraining(run: Pretraining) -> dict[str, str]:
    epochs, loss, knn = run.progress()
    return {
        "protocol": "pretraining", "pre-train": run.recipe, "folder": str(run.folder), "origin": run.origin,
        "epochs": epochs, "loss": loss, "monitor kNN": knn,
    }  # fmt: skip


def _origin_of_probe(probe: Probe) -> dict[str, str]:
    content, weights = probe.content, probe.content["weights"]
    return {
        "protocol": probe.name,
        "pre-train": (weights.get("facts") or {}).get("recipe") or "",
        "seed": str(content.get("seed", "")),
        "folder": str(probe.file),
        "commit": str(content.get("commit") or ""),
        "date": str(content.get("date") or ""),
        "hardware": str(content.get("device") or ""),
        "weights": str(weights.get("path") or ""),
        "weights SHA-256": str(weights.get("sha256") or ""),
        "departures": " ".join(content.get("changes") or ()),
        "command": str(content.get("command") or ""),
    }

"""Figures of a report: means of finished runs over seeds, and their differences from published rows and baselines.

Runs are averaged only if they are the same experiment: protocol, departures from it, weights (by SHA-256) and part of
the labels agree, and only the seed differs.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moco_d2.config import INITS, load_cfg
from moco_d2.model_zoo import Protocol, Published, config_changes, get_protocol
from moco_d2.reports.records import EVALUATION, FRACTION, RESULTS, read_result, read_scalars, read_trial

logger = logging.getLogger(__name__)

BASELINES = tuple(init for init in INITS if init != "moco")
TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint", "sem_seg": ""}  # in a report's order, in words
AUGMENTED = "_TTA"  # suffix of a task's name: evaluated with test-time augmentation
MAIN = ("AP", "AP50", "AP75", "mIoU")  # the metrics that papers print; the others are in the CSV files
PER_CLASS = ("AP-", "IoU-", "ACC-")  # as Detectron2's evaluators name them
FLAG_STD = 2  # differences of more than this many published standard deviations are flagged


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


@dataclass(frozen=True)
class Cell:
    """Mean and sample standard deviation (n - 1; None for a single value) of a metric over runs."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """Summarise values."""
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))

    def __str__(self) -> str:
        return f"{self.mean:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else "") + f" ({self.n})"


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only, on one test set."""

    label: str
    init: str
    percent: float
    runs: tuple[Run, ...]
    cells: Mapping[str, Cell]


@dataclass(frozen=True)
class Difference:
    """A row's means minus another row's or a published row's, and the metrics whose difference is flagged."""

    row: Row
    against: str
    deltas: Mapping[str, float]
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Table:
    """Runs of one protocol, in one variant, on one test set.

    Attributes:
        protocol: None if it is not a known protocol.
        name: the protocol's name, known or not.
        test_set: name of the data set.
        variant: in words, how the runs depart from the protocol; empty if they do not.
        comparable: whether the runs may be compared with the published rows.
        columns: the metrics shown, ``task/name``.
        rows: means of our runs.
        notes: remarks for the reader.
    """

    protocol: Protocol | None
    name: str
    test_set: str
    variant: str
    comparable: bool
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def published(self) -> tuple[Published, ...]:
        """The protocol's published rows; empty if our rows must not be compared with them."""
        return self.protocol.published if self.protocol and self.comparable else ()

    @property
    def percents(self) -> list[float]:
        """The percentages of the labels that were used, ascending."""
        return sorted({row.percent for row in self.rows})

    @cached_property
    def differences(self) -> list[Difference]:
        """The differences of each row from the published row of its init, and from baselines on the same labels."""
        found = []
        for row in self.rows:
            for published in self.published if row.percent == 100 else ():
                if published.init == row.init:
                    found.append(_to_published(row, published, self.columns))
            # Between the baselines there is one difference only: supervised minus random.
            for other in self.rows if row.init != "random" else ():
                if other.init in BASELINES and other.init != row.init and other.percent == row.percent:
                    means = {metric: cell.mean for metric, cell in other.cells.items()}
                    found.append(Difference(row, f"{other.label}, run here", _deltas(row, means, self.columns)))
        return found


def find_runs(
    paths: Iterable[str | os.PathLike[str]], report: Callable[[str], None] = logger.warning, required: bool = True
) -> list[Run]:
    """Read every finished run and evaluation in folders and below them.

    Args:
        paths: the folders.
        report: called with a message for each result that is left out, because it is damaged or another program's.
        required: whether each path must contain a run.

    Raises:
        ValueError: a path contains no run, and must.
    """
    runs: dict[Path, Run] = {}
    for path in paths:
        problems: list[str] = []
        found = sorted(file.parent.resolve() / file.name for n in (RESULTS, EVALUATION) for file in Path(path).rglob(n))
        for file in found:
            try:
                runs.setdefault(file, read_run(file.parent, evaluation=file.name == EVALUATION))
            except ValueError as error:
                problems.append(str(error))
        if not found and required:
            raise ValueError(f"{path} contains no finished run: there is no {RESULTS} in it or below")
        if len(problems) == len(found) and required:
            raise ValueError(f"{path} contains no finished run that can be read:\n" + "\n".join(problems))
        for problem in problems:
            report(problem)
    return list(runs.values())


def read_run(folder: str | os.PathLike[str], evaluation: bool = False) -> Run:
    """Read a finished run, or the evaluation in its folder.

    Raises:
        ValueError: there are no readable results, or ``trial.json`` is damaged.
    """
    folder = Path(folder)
    return Run(folder, read_result(folder, EVALUATION if evaluation else RESULTS), read_trial(folder), evaluation)


def build_tables(runs: Iterable[Run]) -> list[Table]:
    """Sort runs into tables, one for each protocol, variant and test set."""
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        for test_set in run.metrics:
            groups.setdefault((run.protocol, _variant(run), test_set), []).append(run)
    return [_table(*key, groups[key]) for key in sorted(groups)]


def per_class(first: Row, second: Row) -> dict[str, list[tuple[str, Cell, Cell]]]:
    """Compare two rows class by class.

    Returns:
        ``{"bbox/AP": [(class, first's, second's), ...]}``, from the first row's largest gain to its largest loss.
    """
    found: dict[str, list[tuple[str, Cell, Cell]]] = {}
    for metric in first.cells.keys() & second.cells.keys():
        if _is_per_class(metric):
            name, _, class_name = metric.partition("-")
            found.setdefault(name, []).append((class_name, first.cells[metric], second.cells[metric]))
    for entries in found.values():
        entries.sort(key=lambda entry: (entry[2].mean - entry[1].mean, entry[0]))
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def compared(table: Table, labels: Sequence[str] = ()) -> tuple[Row, Row] | None:
    """Return the two rows to compare class by class, among those with the most labels.

    Args:
        table: of the rows.
        labels: the rows' labels; by default the first row that is not a baseline, and the first baseline.

    Returns:
        The rows, or None if the table does not have them.
    """
    rows = {row.label: row for row in table.rows if row.percent == table.percents[-1]}
    if labels:
        return (rows[labels[0]], rows[labels[1]]) if rows.keys() >= set(labels) else None
    ours = [row for row in rows.values() if row.init not in BASELINES]
    others = sorted((row for row in rows.values() if row.init in BASELINES), key=lambda row: BASELINES.index(row.init))
    both = [*ours[:1], *others[:1]] if ours and others else [*ours, *others][:2]
    return (both[0], both[1]) if len(both) == 2 else None


def heading(metric: str) -> str:
    """Return a metric in words: ``box AP`` for ``bbox/AP``, ``box AP with TTA`` for ``bbox_TTA/AP``."""
    task, _, name = metric.partition("/")
    plain = task.removesuffix(AUGMENTED)
    return f"{TASKS.get(plain, plain)} {name}".strip() + (" with TTA" if task != plain else "")


def _variant(run: Run) -> str:
    if run.changes is None:
        changes = "config not recorded"
    else:
        changes = f"modified: {' '.join(run.changes)}" if run.changes else ""
    kind = "evaluation alone (--eval-only)" * run.evaluation
    parts = f"pretrained in addition to the backbone: {', '.join(run.parts)}" if run.parts else ""
    return "; ".join(filter(None, (kind, changes, parts, run.scaled)))


def _table(name: str, variant: str, test_set: str, runs: Sequence[Run]) -> Table:
    try:
        protocol = get_protocol(name)
    except ValueError:
        protocol = None
    rows = tuple(_rows(runs, test_set))
    metrics = {
        f"{task}/{metric}"
        for run in runs
        for task, values in (run.result["metrics"][test_set] or {}).items()
        for metric in values
    }
    printed = [metric for published in protocol.published for metric in published.metrics] if protocol else []
    columns = [m for m in metrics if m in printed or m.partition("/")[2] in MAIN]
    return Table(
        protocol, name, test_set, variant,
        comparable=runs[0].changes == () and not (runs[0].parts or runs[0].evaluation),
        columns=tuple(sorted(columns, key=_order)),
        rows=rows,
        notes=tuple(_notes(rows)),
    )  # fmt: skip


def _rows(runs: Sequence[Run], test_set: str) -> Iterator[Row]:
    groups: dict[tuple[float, str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.percent, run.label, run.sha256), []).append(run)
    names = Counter((percent, label) for percent, label, _ in groups)
    ranks = {label: rank for rank, label in enumerate(BASELINES, start=1)}
    for percent, label, sha256 in sorted(groups, key=lambda k: (-k[0], ranks.get(k[1], 0), k[1:])):
        group = sorted(groups[percent, label, sha256], key=lambda run: (run.result.get("seed", 0), str(run.folder)))
        values: dict[str, list[float]] = {}
        for run in group:
            for metric, value in run.metrics[test_set].items():
                values.setdefault(metric, []).append(value)
        shown = label if names[percent, label] == 1 else f"{label} [{sha256[:8] or 'SHA-256 unknown'}]"
        cells = {metric: Cell.of(values[metric]) for metric in sorted(values, key=_order)}
        yield Row(shown, group[0].init, percent, tuple(group), cells)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        seeds = Counter(run.result.get("seed") for run in row.runs)
        twice = [str(seed) for seed, count in seeds.items() if count > 1]
        if twice:
            yield f"{row.label}: several runs have seed {', '.join(twice)}, so they are not independent"
        if any(cell.n != len(row.runs) for metric, cell in row.cells.items() if not _is_per_class(metric)):
            yield f"{row.label}: some of its {len(row.runs)} runs lack a metric; n is in parentheses"
        if len(ways := {run.performance for run in row.runs}) > 1:
            options = "; ".join(sorted(way or "none" for way in ways))
            yield f"{row.label}: its runs differ in their performance options: {options}"
    commits = {run.result["commit"] for row in rows for run in row.runs if run.result.get("commit")}
    if len(commits) > 1:
        yield f"the runs come from {len(commits)} different commits"


def _to_published(row: Row, published: Published, columns: Sequence[str]) -> Difference:
    deltas = _deltas(row, published.metrics, columns)
    # Rounded, because 82.8 - 82.4 is slightly more than twice 0.2 in floating point.
    flags = {m for m, d in deltas.items() if m in published.std and round(abs(d) - FLAG_STD * published.std[m], 9) > 0}
    return Difference(row, f"{published.label}, published", deltas, frozenset(flags))


def _deltas(row: Row, means: Mapping[str, float], columns: Sequence[str]) -> dict[str, float]:
    return {
        metric: row.cells[metric].mean - means[metric] for metric in columns if metric in row.cells and metric in means
    }


def _is_per_class(metric: str) -> bool:
    return metric.partition("/")[2].startswith(PER_CLASS)


def _order(metric: str) -> tuple[int, int, str]:
    task, _, name = metric.partition("/")
    tasks = [*TASKS, *(f"{task}{AUGMENTED}" for task in TASKS)]
    return (
        tasks.index(task) if task in tasks else len(tasks),
        MAIN.index(name) if name in MAIN else len(MAIN),
        metric,
    )

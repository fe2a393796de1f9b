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

from moco_d2.config import flat, get_cfg
from moco_d2.model_zoo import Protocol, Published, get_protocol, list_protocols
from moco_d2.reports.records import EVALUATION, FRACTION, RESULTS
from moco_d2.reports.run import BASELINES, Run, read_run

logger = logging.getLogger(__name__)

TASKS = {"bbox": "box", "segm": "mask", "keypoints": "keypoint", "sem_seg": ""}  # in a report's order, in words
AUGMENTED = "_TTA"  # suffix of a task's name: evaluated with test-time augmentation
MAIN = ("AP", "AP50", "AP75", "mIoU")  # the metrics that papers print; the others are in the CSV files
PER_CLASS = ("AP-", "IoU-", "ACC-")  # as Detectron2's evaluators name them
FLAG_STD = 2  # differences of more than this many published standard deviations are flagged


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


# Student's t at 97.5 %, for 1 to 10 degrees of freedom; of 1.96 for many, 2.2 is on the safe side.
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)


def beyond_noise(first: Cell, second: Cell) -> bool:
    """Tell whether two means differ by more than their noise: Welch's t-test at 5 %.

    Without a standard deviation of each, so with a single run, nothing is known of the noise, and the answer is no.
    """
    if first.std is None or second.std is None:
        return False
    a, b = first.std**2 / first.n, second.std**2 / second.n
    if a + b == 0:
        return first.mean != second.mean
    freedom = (a + b) ** 2 / (a**2 / max(first.n - 1, 1) + b**2 / max(second.n - 1, 1))
    return abs(first.mean - second.mean) > _T[min(int(freedom), len(_T)) - 1] * math.sqrt(a + b)


@dataclass(frozen=True)
class Row:
    """Runs that differ in their seed only, on one test set."""

    label: str
    init: str
    percent: float
    runs: tuple[Run, ...]
    cells: Mapping[str, Cell]

    @property
    def origin(self) -> str:
        """Origin of its weights, as their facts state it; empty for a baseline, or if unknown."""
        facts = self.runs[0].weights.get("facts") or {}
        return "" if self.init in BASELINES else str(facts.get("origin", "")).replace("unknown", "")


@dataclass(frozen=True)
class Difference:
    """A row's means minus another row's or a published row's.

    Attributes:
        row: the row.
        against: the other one, in words.
        deltas: by metric.
        flags: the metrics whose difference is flagged.
        clear: the metrics whose difference is :func:`beyond_noise`.
    """

    row: Row
    against: str
    deltas: Mapping[str, float]
    flags: frozenset[str] = frozenset()
    clear: frozenset[str] = frozenset()


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
        config: of a protocol that is not shipped: its keys that differ from the defaults, with their values.
    """

    protocol: Protocol | None
    name: str
    test_set: str
    variant: str
    comparable: bool
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def published(self) -> tuple[Published, ...]:
        """The protocol's published rows; empty if our rows must not be compared with them."""
        return self.protocol.published if self.protocol and self.comparable else ()

    @property
    def pictures(self) -> str:
        """Numbers of pictures, in words; empty if no run recorded them."""
        counts = {(row.percent, *run.pictures(self.test_set)) for row in self.rows for run in row.runs}
        parts = [
            f"{train} for training" + (f" ({percent:g}% of the labels)" if self.percents != [100] else "")
            for percent, train in sorted({(p, train) for p, train, _ in counts if train is not None}, reverse=True)
        ]
        parts += [f"{test} for testing" for test in sorted({test for *_, test in counts if test is not None})]
        return f"pictures: {', '.join(parts)}" if parts else ""

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
                    deltas = _deltas(row, means, self.columns)
                    clear = frozenset(m for m in deltas if beyond_noise(row.cells[m], other.cells[m]))
                    found.append(Difference(row, f"{other.label}, run here", deltas, clear=clear))
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


def build_tables(runs: Iterable[Run]) -> list[Table]:
    """Sort runs into tables, one for each protocol, variant and test set."""
    runs = list(runs)
    own = _own_variants(runs)
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        for test_set in run.metrics:
            groups.setdefault((run.protocol, _variant(run, own.get(run.file)), test_set), []).append(run)
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


def _own_variants(runs: Iterable[Run]) -> dict[Path, str]:
    """Return how runs of a protocol that is not shipped differ from one another: they are not averaged."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.changes is None and run.settings is not None and run.protocol not in list_protocols():
            groups.setdefault(run.protocol, []).append(run)
    found = {}
    for group in groups.values():
        values = [{key: value for key, value in (run.settings or {}).items() if key != FRACTION[:-1]} for run in group]
        # A key that one of them lacks is turned off by another, which differs and is named.
        keys = sorted(
            {k for each in values for k in each if any(k in other and other[k] != each[k] for other in values)}
        )
        for run, each in zip(group, values, strict=True):
            found[run.file] = " ".join(f"{key}={each[key]}" for key in keys if key in each)
    return found


def _variant(run: Run, own: str | None = None) -> str:
    if own is not None:
        changes = own
    elif run.changes is None:
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
        config={} if protocol else _stated(runs[0].settings or {}),
    )  # fmt: skip


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a config that differ from their default."""
    defaults = flat(get_cfg())
    return {key: value for key, value in config.items() if value != defaults.get(key) and key != FRACTION[:-1]}


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
    cells = {m: Cell(published.metrics[m], published.std.get(m), published.trials) for m in deltas}
    clear = frozenset(m for m, cell in cells.items() if beyond_noise(row.cells[m], cell))
    return Difference(row, f"{published.label}, published", deltas, frozenset(flags), clear)


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

"""Pretraining runs and probes in a report: one row a backbone, with all that was measured of it.

A backbone is known by the SHA-256 of its file, or of the file that it was converted from. So a probe of a run's
``backbone.pth`` or ``model_*.pth``, and a detector that was fine-tuned from the converted file, stand in the run's row.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from moco_d2.convert.catalog import list_entries
from moco_d2.io.checkpoints import CheckpointError, checkpoint_sha256, read_facts
from moco_d2.model_zoo import Published
from moco_d2.probes.protocols import PROTOCOLS
from moco_d2.reports.records import PROBES, RECORD, RESULTS, SCALARS, read_probe, read_scalars
from moco_d2.reports.run import BASELINES, Run
from moco_d2.reports.summary import Cell, Table, heading

BACKBONE, CONFIG = "backbone.pth", "config.yaml"
KNN = "monitor/knn_top1"
_SKIPPED = "unreadable_images"  # a scalar that pretraining records from its first line on, and no other training
_DONE = re.compile(r", (\d+) of (\d+) iterations")  # in the origin of a backbone of ours
_NETWORK = re.compile(r", its network `.*`$")  # added to it when another network of the method is converted
# Facts of the shape of a ResNet or a ViT.
_SHAPE = ("depth", "stem_channels", "res2_channels", "groups", "width_per_group", "norm", "patch", "dim", "heads")

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run, finished or not.

    Attributes:
        folder: its ``OUTPUT_DIR``.
        recipe: its recipe, with ``unfinished`` and ``modified`` if it is.
        origin: what ``backbone.pth`` says about itself; empty before the first checkpoint.
        epochs: length in epochs; 0 if the config states iterations only.
        records: the lines of ``metrics.json``.
    """

    folder: Path
    recipe: str
    origin: str
    epochs: float
    records: tuple[Mapping[str, float], ...]

    def scalar(self, key: str, done: int | None = None) -> list[tuple[int, float]]:
        """Return (iterations done, value) of a scalar, perhaps up to a number of iterations only.

        A run that was resumed has some iterations twice; the later value counts.
        """
        points = {int(r["iteration"]) + 1: r[key] for r in self.records if key in r}
        return sorted((x, y) for x, y in points.items() if done is None or x <= done)

    @cached_property
    def steps_per_epoch(self) -> float:
        """Number of iterations per epoch; 0 if nothing was recorded that tells it."""
        return next((x / y for x, y in reversed(self.scalar("epoch")) if y), 0.0)

    def progress(self, done: int | None = None) -> tuple[str, str, str]:
        """Return epochs, loss, and the monitor's first and last kNN accuracy, in words."""
        epochs, losses, knn = (self.scalar(key, done) for key in ("epoch", "total_loss", KNN))
        reached = f"{epochs[-1][1]:.4g}" if epochs else "-"
        length = f" of {self.epochs:g}" if self.epochs else ""
        accuracy = f"{knn[0][1]:.1f} -> {knn[-1][1]:.1f}" if knn else "-"
        return reached + length, f"{losses[-1][1]:.4g}" if losses else "-", accuracy


@dataclass(frozen=True)
class Probe:
    """The result of a probe, and its file."""

    file: Path
    content: Mapping[str, Any]

    @property
    def name(self) -> str:
        """The kind of probe; of a classifier, with its protocol."""
        kind = "kNN" if self.content["probe"] == "knn" else str(self.content["probe"])
        return " ".join(filter(None, (kind, self.content.get("protocol"))))

    def figures(self) -> Iterator[tuple[str, float]]:
        """Yield the name and the top-1 accuracy of each figure: one for each k, or that of the last epoch."""
        rows = self.content["results"]
        for row in rows if self.content["probe"] == "knn" else rows[:1]:
            yield self.name + (f" (k {row['k']}, T {row['temperature']:g})" if "k" in row else ""), row["top1"]


@dataclass(frozen=True)
class Column:
    """What was measured of backbones: the accuracy of a probe, or the AP of a detector.

    Attributes:
        heading: of the column.
        long: the heading with all that tells it from others.
        published: published figures of ``metric``.
    """

    heading: str
    long: str
    metric: str = "top1"
    published: tuple[Published, ...] = ()


@dataclass
class Row:
    """A backbone.

    Attributes:
        label: of the row.
        recipe: of its pretraining, with ``unfinished`` and ``modified``.
        init: its initialisation under the name of published rows.
        progress: see :meth:`Pretraining.progress`.
        values: key of a column -> what was measured.
    """

    label: str
    recipe: str
    init: str
    sha256: str = ""
    progress: tuple[str, str, str] = ("-", "-", "-")
    values: dict[Key, list[float]] = field(default_factory=dict)

    def cell(self, key: Key) -> str:
        """Return mean, standard deviation and number of a column's values, or a dash."""
        return str(Cell.of(self.values[key])) if key in self.values else "-"


@dataclass(frozen=True)
class Backbones:
    """The rows of a report's table of backbones, and its columns by their keys."""

    rows: tuple[Row, ...]
    columns: Mapping[Key, Column]

    def published(self, row: Row) -> dict[Key, Published]:
        """Return the published figures of a row's initialisation, by column."""
        found = {
            key: next((p for p in column.published if p.init == row.init and column.metric in p.metrics), None)
            for key, column in self.columns.items()
        }
        return {key: published for key, published in found.items() if published}


def find(path: str | Path, report: Callable[[str], None]) -> tuple[list[Pretraining], list[Probe]]:
    """Read the pretraining runs and the results of probes in a folder and below it, or a probe's file.

    Args:
        path: the folder or file.
        report: called with a message for each that is left out, because it is damaged or another program's.
    """
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob(PROBES))
    folders = {file.parent for name in (BACKBONE, SCALARS) for file in path.rglob(name) if _is_run(file)}
    runs: list[Pretraining] = []
    probes: list[Probe] = []
    for place in (*sorted(folders), *files):
        try:
            if place in folders:
                runs.append(read_pretraining(place.resolve()))
            else:
                probes.append(Probe(place.resolve(), read_probe(place)))
        except ValueError as error:
            report(str(error))
    return runs, probes


def _is_run(file: Path) -> bool:
    """Return whether a file belongs to a pretraining, and not to a training of a detector or a classifier."""
    folder = file.parent
    if not (folder / CONFIG).is_file() or (folder / RESULTS).exists() or (folder / RECORD).exists():
        return False
    return file.name == BACKBONE or any(_SKIPPED in record for record in read_scalars(folder))


def read_pretraining(folder: Path) -> Pretraining:
    """Read a run; it may be going on.

    Raises:
        ValueError: ``metrics.json`` has no figures, or ``config.yaml`` or ``backbone.pth`` is damaged.
    """
    records = tuple(read_scalars(folder))
    if not any("total_loss" in record for record in records):
        raise ValueError(f"{folder / SCALARS} is missing or damaged: it has no figures of a pretraining run")
    try:
        config = yaml.safe_load((folder / CONFIG).read_text())
        protocol, epochs = config["PROTOCOL"], float(config["SOLVER"]["EPOCHS"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is missing or damaged ({type(error).__name__})") from error
    facts = read_facts(folder / BACKBONE) if (folder / BACKBONE).is_file() else None
    recipe = facts.recipe if facts else f"{protocol} (unfinished)".strip()
    return Pretraining(folder, recipe, facts.origin if facts else "", epochs, records)


def run_names(runs: Iterable[Pretraining]) -> list[str]:
    """Return a name for each run: its folder's, with as many folders above it as tell the runs apart."""
    parts = [run.folder.parts for run in runs]
    names = ["/".join(part[-1:]) for part in parts]
    for length in range(2, max(map(len, parts), default=0) + 1):
        if len(set(names)) == len(names):
            break
        names = ["/".join(part[-length:]) for part in parts]
    return names


def build_backbones(runs: Sequence[Pretraining], probes: Sequence[Probe], tables: Sequence[Table]) -> Backbones:
    """Join runs, probes and the tables of detectors to rows."""
    names = dict(zip((run.folder for run in runs), run_names(runs), strict=True))
    rows: dict[Key, Row] = {}
    for run in runs:
        rows[run.folder, run.origin] = Row(names[run.folder], run.recipe, run.recipe, progress=run.progress())
    columns: dict[Key, Column] = {}

    def add(key: Key, column: Column, value: float, weights: Mapping[str, Any], detector: Run | None) -> None:
        row, made = _row(runs, names, weights, detector)
        columns.setdefault(key, column)
        rows.setdefault(row, made).values.setdefault(key, []).append(value)

    for probe in probes:
        for key, column, value in _measured(probe):
            add(key, column, value, probe.content["weights"], None)
    for table in tables:
        key, column = ("detector", table.name, table.variant, table.test_set), _detector_column(table)
        for detector in [run for row in table.rows if row.percent == 100 for run in row.runs if not run.evaluation]:
            if column.metric in (metrics := detector.metrics[table.test_set]):
                add(key, column, metrics[column.metric], detector.weights, detector)
    ranks = {init: rank for rank, init in enumerate(BASELINES, start=1)}
    ordered = sorted(rows.values(), key=lambda row: (ranks.get(row.init, 0), row.label))
    return Backbones(tuple(_told_apart(ordered)), _headed(columns))


def _row(
    runs: Sequence[Pretraining], names: Mapping[Path, str], weights: Mapping[str, Any], detector: Run | None
) -> tuple[Key, Row]:
    """Return the key of the row of some weights, and the row if it is new."""
    facts = weights.get("facts") or {}
    origin, path = facts.get("origin", ""), weights.get("path") or ""
    root = weights.get("source_sha256") or weights.get("sha256") or ""
    recipe = facts.get("recipe") or facts.get("protocol") or ""
    if not root and path in ("", "random"):
        network = f"R-{facts['depth']}" if "depth" in facts else "encoder unknown"
        if "dim" in facts:
            network = f"ViT, {facts['depth']} blocks of {facts['dim']}, patch {facts['patch']}"
        return ("random", *(facts.get(key) for key in _SHAPE)), Row(f"random, {network}", "", "random")
    network = "".join(_NETWORK.findall(origin))
    stated = _DONE.search(origin)
    done, length = map(int, stated.groups()) if stated else (0, 0)
    for run in runs if done else ():
        if _has(run, root, origin.removesuffix(network), done, length):
            label = f"{names[run.folder]}, {done} iterations{network}"
            return (run.folder, origin), Row(label, recipe, recipe, root, run.progress(done))
    stem = Path(path).stem or "unknown"
    label = detector.label if detector else "/".join(Path(path).with_suffix("").parts[-2:]) or stem
    return (root or path, network), Row(label, recipe, detector.init if detector else recipe, root)


def _has(run: Pretraining, sha256: str, origin: str, done: int, length: int) -> bool:
    """Return whether a file of a run has this SHA-256; only its states after ``done`` iterations are read."""
    names = [BACKBONE] * (origin == run.origin) + [f"model_{done - 1:07d}.pth"] + ["model_final.pth"] * (done == length)
    for file in (run.folder / name for name in names):
        try:
            if file.is_file() and checkpoint_sha256(file) == sha256:
                return True
        except CheckpointError:  # a run that is going on replaces its files
            continue
    return False


def _measured(probe: Probe) -> Iterator[tuple[Key, Column, float]]:
    """Yield key, column and value of each figure of a probe."""
    sets, size = [probe.content[half] for half in ("train", "val")], probe.content.get("size")
    of = Path(sets[1]["name"]).name
    changes = probe.content.get("changes") or ()
    known = ", ".join(f"{one['pictures']} of {one['name']}" for one in sets)
    for name, value in probe.figures():
        long = f"{name}, {of} [{'; '.join((known, f'{size} px', *changes))}]"
        published = _published_linear(probe.content)
        yield (name, long), Column(f"{name}, {of}", long, "top1", published), float(value)


def _published_linear(content: Mapping[str, Any]) -> tuple[Published, ...]:
    """Return the catalogue's figures of the pretrainings whose authors evaluated them under a probe's protocol."""
    if (content["probe"], content["train"]["name"], content["val"]["name"]) != (
        "linear", "imagenet_train", "imagenet_val",
    ):  # fmt: skip
        return ()
    return tuple(
        Published(e.recipe, e.title, {"top1": float(e.published)}, {}, 1, e.stated_in)
        for e in list_entries().values()
        if re.fullmatch(r"\d+(\.\d+)?", e.published) and _own_protocol(e.recipe) == content.get("protocol")
    )


def _own_protocol(recipe: str) -> str:
    """Return the linear protocol of a recipe's authors: recipes begin with the method's name, as protocols do."""
    return max((name for name in PROTOCOLS if recipe.startswith(f"{name}_")), key=len, default="")


def _detector_column(table: Table) -> Column:
    metric = table.columns[0] if table.columns else ""
    name = f"{heading(metric)}, {table.name}" + " (modified)" * (not table.comparable)
    about = "; ".join(filter(None, (table.test_set, table.variant)))
    return Column(name, f"{name} [{about}]", metric, table.published)


def _headed(columns: Mapping[Key, Column]) -> dict[Key, Column]:
    """Give columns of one heading their long ones."""
    counts = Counter(column.heading for column in columns.values())
    return {
        key: Column(c.long if counts[c.heading] > 1 else c.heading, c.long, c.metric, c.published)
        for key, c in columns.items()
    }


def _told_apart(rows: Sequence[Row]) -> Iterator[Row]:
    """Add the SHA-256 to labels that several rows have."""
    counts = Counter(row.label for row in rows)
    for row in rows:
        if counts[row.label] > 1 and row.sha256:
            row.label += f" [{row.sha256[:8]}]"
        yield row

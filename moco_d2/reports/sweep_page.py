"""Results of a sweep: a row of figures for each run in JSON and Markdown, and a picture beside the paper's curves."""

from __future__ import annotations

import json
import statistics
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from moco_d2.io import files
from moco_d2.io.provenance import provenance
from moco_d2.reports.curves import plot_lines
from moco_d2.reports.pictures import save_figure
from moco_d2.reports.pretraining import KNN, Pretraining
from moco_d2.reports.records import RESULTS, is_number, read_probe, read_result, read_scalars
from moco_d2.reports.summary import heading
from moco_d2.reports.sweep import Sweep, SweepRun, probe_folder, state

PAGE = ("sweep.json", "sweep.md", "sweep.png")
DETECTION = "detection"  # the folder of the trials
REFERENCE = "random"  # the detector's initialisation that the runs are compared with

_LAST = 10  # the loss is a mean over the last of so many parts of the run
# Figures in the order of the table: key of a row, heading, format.
_FIGURES = {
    "loss": ("loss", ".4g"), "knn_before": ("kNN before, %", ".1f"), "knn": ("kNN, %", ".1f"),
    "linear": ("linear, %", ".1f"), "images_per_second": ("images/s", ".0f"),
    "peak_memory_gib": ("peak memory, GiB", ".2f"),
}  # fmt: skip


def write_page(sweep: Sweep, runs: Sequence[SweepRun], output: Path, notes: Mapping[str, str]) -> list[str]:
    """Write JSON, Markdown and PNG about what the runs have measured so far.

    Args:
        sweep: the sweep.
        runs: its runs, done or not.
        output: the sweep's folder.
        notes: ``{name of a run: what became of it}``, for those that failed or could not be converted.

    Returns:
        Lines for the screen: the table, and the paths of the files.
    """
    files.claim(output, PAGE, "--output")
    records = {run.name: Pretraining(run.folder, "", "", 0, tuple(read_scalars(run.folder))) for run in runs}
    rows = [{**measure(run, records[run.name], output), "note": notes.get(run.name, "")} for run in runs]
    reference = {"run": REFERENCE, "detection": found} if (found := _detection(REFERENCE, output)) else None
    content = {"title": sweep.title, "axis": sweep.axis, "paper": sweep.paper, "runs": rows, "reference": reference,
               **provenance()}  # fmt: skip
    table = markdown(sweep, rows, reference)
    with files.one_line(output, "--output"):
        for name, text in zip(PAGE, (json.dumps(content, indent=1), f"# {sweep.title}\n\n{table}"), strict=False):
            with files.atomic_write(output / name) as file:
                file.write(text.encode() + b"\n")
        painters = list(_painters(sweep, runs, rows, records, reference))
        if painters:
            _draw(painters, output / PAGE[2])
    return [table, *(str(output / name) for name in PAGE if (output / name).is_file())]


def measure(run: SweepRun, recorded: Pretraining, output: Path) -> dict[str, Any]:
    """Return the figures of a run, finished or not; those that were not measured are missing."""
    losses, knn = recorded.scalar("total_loss"), recorded.scalar(KNN)
    speed, memory = ([value for _, value in recorded.scalar(key)] for key in ("images_per_second", "peak_memory_gib"))
    batch = run.cfg.SOLVER.IMS_PER_BATCH
    row: dict[str, Any] = {
        "run": run.name, "line": run.line.name, "value": run.value, "config": run.line.config, "state": state(run),
        "batch": batch, "pictures": losses[-1][0] * batch if losses else 0,
    }  # fmt: skip
    paper = run.line.values.get(run.value)
    row |= {} if paper is None else {"paper": paper}
    if losses:
        row["loss"] = statistics.fmean(value for _, value in losses[-max(1, len(losses) // _LAST) :])
    if knn:
        row |= {"knn_before": knn[0][1], "knn": knn[-1][1]}
    if row["state"] == "done" and (probe := probe_folder(run.name, output) / "probe.json").is_file():
        row["linear"] = read_probe(probe)["results"][0]["top1"]
    row |= {"images_per_second": statistics.median(speed)} if speed else {}
    row |= {"peak_memory_gib": max(memory)} if memory else {}
    row |= {"detection": found} if (found := _detection(run.name, output)) else {}
    return row


def _detection(name: str, output: Path) -> dict[str, float]:
    """Return ``{heading: first figure of each task}`` of the detectors that started from a run."""
    found = {}
    for path in sorted((output / DETECTION).glob(f"*/{name}/seed0/{RESULTS}")):
        result = read_result(path.parent)
        for test_set, tasks in result["metrics"].items():
            for task, metrics in (tasks or {}).items():
                metric = "AP" if "AP" in metrics else next(iter(metrics), "")
                if is_number(metrics.get(metric)):
                    found[f"{heading(f'{task}/{metric}')}, {result['protocol']} on {test_set}"] = metrics[metric]
    return found


def markdown(sweep: Sweep, rows: Sequence[Mapping[str, Any]], reference: Mapping[str, Any] | None) -> str:
    """Return the table, what its columns are, and the runs of which something is missing."""
    from tabulate import tabulate

    every = [*rows, *([reference] if reference else [])]
    detectors = list(dict.fromkeys(key for row in every for key in row.get("detection", ())))
    used = [key for key in _FIGURES if any(key in row for row in rows)]
    paper = ["paper, %"] * any("paper" in row for row in rows)
    head = ["run", "pictures", *(_FIGURES[key][0] for key in used), *detectors, *paper]
    body = [
        [
            row["run"], row.get("pictures", ""), *(_cell(row.get(key), _FIGURES[key][1]) for key in used),
            *(_cell(row.get("detection", {}).get(key), ".1f") for key in detectors),
            *[_cell(row.get("paper"), ".1f") for _ in paper],
        ]
        for row in every
    ]  # fmt: skip
    lines = [tabulate(body, head, tablefmt="pipe", disable_numparse=True), ""]
    lines += [f"Paper: {sweep.paper}. Its figures are not ours, and of another size.", ""] * bool(paper)
    open_ones = [(row, row["note"]) for row in rows if row["note"] or row["state"] != "done"]
    return "\n".join([*lines, *(f"* {row['run']}: {note or 'not finished'}" for row, note in open_ones)]).rstrip()


def _cell(value: Any, form: str) -> str:
    return f"{value:{form}}" if is_number(value) else "-" if value is None else str(value)


Painter = Callable[[Any], None]


def _painters(
    sweep: Sweep,
    runs: Sequence[SweepRun],
    rows: Sequence[Mapping[str, Any]],
    records: Mapping[str, Pretraining],
    reference: Mapping[str, Any] | None,
) -> Iterator[Painter]:
    """Yield the plots: the sweep's points beside the paper's, or a bar a run, then kNN and loss over pictures."""
    if sweep.axis:
        done = [row for row in rows if row["state"] == "done"]
        ours = next((key for key in ("linear", "knn") if done and all(key in row for row in done)), "loss")
        for key, title in ((ours, f"ours: {_FIGURES[ours][0]}"), ("paper", f"paper: {sweep.paper.partition('(')[0]}")):
            if any(is_number(row.get(key)) for row in rows):
                yield partial(_paint_points, title, rows, key, sweep.axis)
    else:
        bars = {heading: {r["run"]: r[key] for r in rows if key in r} for key, (heading, _) in _FIGURES.items()}
        del bars[_FIGURES["loss"][0]], bars[_FIGURES["knn_before"][0]]  # losses of methods are not comparable
        for row in [*rows, *([reference] if reference else [])]:
            for key, value in row.get("detection", {}).items():
                bars.setdefault(key, {})[row["run"]] = value
        yield from (partial(_paint_bars, title, values) for title, values in bars.items() if values)
    for key, title in ((KNN, "kNN top-1 of held-out pictures, %"), ("total_loss", "loss, as a part of its range")):
        lines = {run.name: _curve(run, records[run.name], key) for run in runs}
        if any(lines.values()):
            yield partial(_paint_curves, title, {name: [line] for name, line in lines.items() if line})


def _curve(run: SweepRun, recorded: Pretraining, key: str) -> list[tuple[float, float]]:
    """Return (pictures, value) of a scalar; a loss as a part of its range, because methods have different ones."""
    batch, points = run.cfg.SOLVER.IMS_PER_BATCH, recorded.scalar(key)
    if key == KNN:
        return [((done if place else 0) * batch, value) for place, (done, value) in enumerate(points)]
    low, high = (limit((value for _, value in points), default=0.0) for limit in (min, max))
    return [(done * batch, (value - low) / ((high - low) or 1)) for done, value in points]


def _paint_points(title: str, rows: Sequence[Mapping[str, Any]], key: str, label: str, axis: Any) -> None:
    values = list(dict.fromkeys(row["value"] for row in rows))
    lines = {
        name: [[(float(values.index(r["value"])), r[key]) for r in rows if r["line"] == name and is_number(r.get(key))]]
        for name in dict.fromkeys(row["line"] for row in rows)
    }
    plot_lines(axis, title, lines, x=label)
    axis.set_xticks(range(len(values)), [f"{value:g}" if is_number(value) else str(value) for value in values])


def _paint_bars(title: str, values: Mapping[str, float], axis: Any) -> None:
    names = list(values)[::-1]  # the first one on top
    bars = axis.barh(names, [values[name] for name in names], color="#2f7ed8")
    axis.bar_label(bars, fmt="%.4g", padding=2, fontsize=8)
    axis.set(title=textwrap.fill(title, 45))
    axis.margins(x=0.15)


def _paint_curves(title: str, lines: Mapping[str, Sequence[Sequence[tuple[float, float]]]], axis: Any) -> None:
    plot_lines(axis, title, lines, x="pictures shown")
    axis.legend(frameon=False, fontsize=7, ncols=1 + len(lines) // 8)


def _draw(painters: Sequence[Painter], path: Path) -> None:
    rows = -(-len(painters) // 2)
    figure = Figure(figsize=(11, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, paint in zip(axes, painters, strict=False):
        paint(axis)
    for axis in axes[len(painters) :]:
        axis.set_visible(False)
    save_figure(figure, path)

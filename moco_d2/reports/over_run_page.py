"""Page about detection over a pretraining: a picture of AP, kNN accuracy and loss, and a table of the same numbers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import moco_d2
from moco_d2.engine.build import outline
from moco_d2.engine.monitor import DIAGNOSTICS as MONITORED
from moco_d2.io import files
from moco_d2.io.provenance import provenance
from moco_d2.methods import Diagnostic
from moco_d2.reports.curves import Line, draw_panels, plot_lines
from moco_d2.reports.over_run import PAGE, CheckpointedRun, converted
from moco_d2.reports.pictures import save_panels
from moco_d2.reports.records import RESULTS, read_scalars
from moco_d2.reports.report import signed
from moco_d2.reports.summary import Cell, build_tables, find_runs, heading

_KNN = MONITORED[0]
_POINTS = 400  # most points of a curve
_LINES = ("#2f7ed8", "#e0732b", "#2a9d6f", "#a35fc4")


def write_page(run: CheckpointedRun, protocol: str, output: Path) -> list[str]:
    """Write JSON, HTML and PNG about the trials in the output folder that are finished.

    Returns:
        Lines for the screen: the table, what it shows, and the paths of the files; empty if no trial is finished.
    """
    if not any((output / protocol).rglob(RESULTS)):
        return []
    curves = {one.key: _curve(run, one.key) for one in (_loss(run), _KNN)}
    content = collect(run, protocol, output, curves)
    painters = _painters(run, content, curves)
    picture = draw_panels(f"detection over {run.folder.name}", painters)
    texts = {PAGE[0]: json.dumps(content, indent=1) + "\n", PAGE[1]: _html(run, content, picture)}
    with files.one_line(output, "--output"):
        for name, text in texts.items():
            with files.atomic_write(output / name) as file:
                file.write(text.encode())
        save_panels(painters, output / PAGE[2])
    shown = [line for result in content["results"] for line in _text(run, content, result)]
    return [*shown, *(str(output / name) for name in PAGE)]


def collect(
    run: CheckpointedRun, protocol: str, output: Path, curves: Mapping[str, Sequence[tuple[int, float]]]
) -> dict[str, Any]:
    """Return the numbers of the page.

    Returns:
        ``checkpoints`` (label, iteration, epoch, and the loss and kNN accuracy recorded last by then) and ``results``:
        for each test set, and each variant of the protocol, the mean, std and number of runs of each metric by label.
        Labels that are not a checkpoint's are references.
    """
    finished = [one for one in find_runs([output / protocol]) if not one.evaluation and one.percent == 100]
    results = [
        {
            "test_set": table.test_set,
            "variant": table.variant,
            "metrics": list(table.columns),
            "rows": {
                row.label: {m: vars(row.cells[m]) for m in table.columns if m in row.cells} for row in table.rows
            },
        }
        for table in build_tables(finished) if table.columns
    ]  # fmt: skip
    tested = {label for result in results for label in result["rows"]}
    points = sorted((one for one in converted(output) if one.label in tested), key=lambda one: one.iteration)
    return {
        "run": str(run.folder.absolute()),
        "method": run.cfg.SSL.METHOD,
        "protocol": protocol,
        "checkpoints": [
            {
                "label": one.label, "iteration": one.iteration, "epoch": one.iteration / run.steps_per_epoch,
                **{key: _last(curve, one.iteration) for key, curve in curves.items()},
            }
            for one in points
        ],
        "results": results,
        **provenance(),
    }  # fmt: skip


def _loss(run: CheckpointedRun) -> Diagnostic:
    return next(one for one in outline(run.cfg).diagnostics() if one.key == "total_loss")


def _curve(run: CheckpointedRun, key: str) -> list[tuple[int, float]]:
    """Return (iterations done, value); the monitor's first value is that before training."""
    curve: dict[int, float] = {}
    for record in read_scalars(run.folder):
        if key in record:
            before = key == _KNN.key and not curve and record["iteration"] == 0
            curve[0 if before else int(record["iteration"]) + 1] = record[key]
    return sorted(curve.items())


def _last(curve: Sequence[tuple[int, float]], done: int) -> float | None:
    return next((value for at, value in reversed(curve) if 0 < at <= done), None)


def _thin(points: Sequence[tuple[float, float]]) -> Line:
    """Return means of consecutive points, at most ``_POINTS`` of them."""
    size = -(-len(points) // _POINTS) or 1
    groups = (points[start : start + size] for start in range(0, len(points), size))
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _painters(
    run: CheckpointedRun, content: Mapping[str, Any], curves: Mapping[str, Sequence[tuple[int, float]]]
) -> list[Callable[[Any], None]]:
    """Return the plots from the top: AP, kNN accuracy if it was recorded, loss."""
    panels: list[Callable[[Any], None]] = [partial(_paint_results, run, content)]
    for one, title in ((_KNN, _KNN.panel), (_loss(run), f"loss of {run.cfg.SSL.METHOD}")):
        if curve := curves[one.key]:
            line = _thin([(run.place(done), value) for done, value in curve])
            chance = [] if one.reference is None else [(one.reference_label, one.reference)]
            panels.append(partial(plot_lines, title=title, lines={one.label: [line]}, references=chance))
    marks = [run.place(one["iteration"]) for one in content["checkpoints"]]

    def finish(paint: Callable[[Any], None], last: bool, axis: Any) -> None:
        for mark in marks:
            axis.axvline(mark, color="grey", linewidth=0.6, alpha=0.35, zorder=0)
        paint(axis)
        axis.set(xlabel=f"{run.unit} of pretraining" if last else "")
        axis.set_xlim(left=0)

    return [partial(finish, paint, paint is panels[-1]) for paint in panels]


def _paint_results(run: CheckpointedRun, content: Mapping[str, Any], axis: Any) -> None:
    """Draw the first metric of each result with its std over seeds, and references as dashed lines."""
    several = len(content["results"]) > 1
    for result, colour in zip(content["results"], _LINES, strict=False):
        metric = result["metrics"][0]
        name = f"{heading(metric)}, {result['test_set']}" if several else heading(metric)
        points = [
            (run.place(one["iteration"]), cell["mean"], cell["std"] or 0)
            for one in content["checkpoints"] if (cell := _cell(result, one["label"], metric))
        ]  # fmt: skip
        if points:
            x, y, error = zip(*points, strict=True)
            axis.errorbar(
                x,
                y,
                error if any(error) else None,
                color=colour,
                label=name,
                marker="o",
                markersize=4,
                capsize=3,
                linewidth=1.4,
            )
        for label, style in zip(_references(content, result), ("--", ":", "-.") * len(result["rows"]), strict=False):
            if cell := _cell(result, label, metric):
                shown = f"{label}, {result['test_set']}" if several else label
                axis.axhline(cell["mean"], color=colour if several else "grey", linestyle=style, label=shown)
    axis.set(title=f"{content['protocol']}, fine-tuned from each checkpoint")
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=9)


def _cell(result: Mapping[str, Any], label: str, metric: str) -> Any:
    return result["rows"].get(label, {}).get(metric)


def _references(content: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    points = {one["label"] for one in content["checkpoints"]}
    return [label for label in result["rows"] if label not in points]


def rows(
    run: CheckpointedRun, content: Mapping[str, Any], result: Mapping[str, Any]
) -> tuple[list[str], list[list[str]]]:
    """Return the head and the lines of a result's table: the references, then the checkpoints.

    "change" is that of the first metric since the checkpoint before.
    """
    metrics = result["metrics"]
    recorded = {"total_loss": ("loss", ".3f"), _KNN.key: ("kNN, %", _KNN.form)}
    kept = [key for key in recorded if any(one[key] is not None for one in content["checkpoints"])]
    head = [run.unit, *map(heading, metrics), "change", *(recorded[key][0] for key in kept)]

    def cells(label: str) -> list[str]:
        return [str(Cell(**cell)) if (cell := _cell(result, label, m)) else "-" for m in metrics]

    body = [[label, *cells(label), "", *[""] * len(kept)] for label in _references(content, result)]
    before = None
    for one in content["checkpoints"]:
        if not (cell := _cell(result, one["label"], metrics[0])):
            continue
        change = "" if before is None else signed(cell["mean"] - before)
        before = cell["mean"]
        values = ["-" if one[key] is None else f"{one[key]:{recorded[key][1]}}" for key in kept]
        body.append([f"{round(run.place(one['iteration']), 2):g}", *cells(one["label"]), change, *values])
    return head, body


def finding(run: CheckpointedRun, content: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return in words where the first metric is highest, and from where on it is no more than one std lower."""
    metric = result["metrics"][0]
    points = [
        (one["iteration"], cell) for one in content["checkpoints"] if (cell := _cell(result, one["label"], metric))
    ]
    if len(points) < 2:
        return ""
    best, cell = max(points, key=lambda point: point[1]["mean"])
    text = f"{heading(metric)} is highest at {run.unit} {round(run.place(best), 2):g}: {Cell(**cell)}."
    if cell["std"] is None:
        return f"{text} One seed does not tell differences of a point from noise; --seeds 0-2 adds some."
    first = next(done for done, other in points if other["mean"] >= cell["mean"] - cell["std"])
    if first == best:
        return f"{text} Every earlier checkpoint is more than one standard deviation below."
    at = f"{run.unit} {round(run.place(first), 2):g}"
    return f"{text} The first checkpoint within one standard deviation of it is that of {at}."


def _text(run: CheckpointedRun, content: Mapping[str, Any], result: Mapping[str, Any]) -> list[str]:
    from tabulate import tabulate

    head, body = rows(run, content, result)
    table = tabulate(body, head, tablefmt="github", disable_numparse=True, stralign="left")
    return [f"\n{_title(content, result)}", table, finding(run, content, result)]


def _title(content: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    variant = f" ({result['variant']})" if result["variant"] else ""
    return f"{content['protocol']} on {result['test_set']}{variant}"


def _html(run: CheckpointedRun, content: Mapping[str, Any], picture: str) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page, report = (
        resources.files(__package__).joinpath(f"{name}.html").read_text() for name in ("over_run", "report")
    )
    style = report.partition("<style>")[2].partition("</style>")[0]  # the pages of this folder look alike
    return environment.from_string(page).render(
        content=content,
        picture=Markup(picture),
        style=Markup(style),
        tables=[
            (_title(content, result), *rows(run, content, result), finding(run, content, result))
            for result in content["results"]
        ],
        version=moco_d2.__version__,
        date=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
    )

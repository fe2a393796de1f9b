"""Line plots: curves on an axis, and a report's plots as SVG text in the colours of the page around it."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from moco_d2.reports.summary import Row, Table, heading

Line = Sequence[tuple[float, float]]

_INK = "#010203"  # a placeholder for the page's text colour, which SVG calls currentColor
_COLOURS = ("#2f7ed8", "#e0732b", "#2a9d6f", "#a35fc4", "#d6479b", "#8a8d2d", "#c0392b", "#4bb3c3")
_KINDS = ("-", "--", ":", "-.")
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "grid.color")


def plot_lines(
    axis: Any,
    title: str,
    lines: Mapping[str, Sequence[Line]],
    references: Iterable[tuple[str, float]] = (),
    x: str = "iteration",
) -> None:
    """Plot lines over iterations or epochs on an axis, with a legend.

    Args:
        axis: of matplotlib.
        title: of the plot.
        lines: label to its lines, each a sequence of (x, value); lines of one label have one colour.
        references: (label, value) of constants, drawn as dashed lines.
        x: label of the horizontal axis.
    """
    for style, (label, found) in zip(_styles(lines), lines.items(), strict=True):
        for number, line in enumerate(found):
            axis.plot(
                *(zip(*line, strict=True) if line else ((), ())), **style, label=None if number else label,
                linewidth=1.4, alpha=0.85, marker="o" if len(line) < 20 else None, markersize=3.5,
            )  # fmt: skip
    for label, value in references:
        axis.axhline(value, color="grey", linestyle="--", linewidth=1, label=label)
    axis.set(title=title, xlabel=x)
    axis.xaxis.set_major_formatter(_short)
    axis.grid(alpha=0.2)
    axis.legend(frameon=False, fontsize=9)


def learning_curves(table: Table) -> list[str]:
    """Draw a table's first metric, if it was measured during training, and the loss over iterations.

    Args:
        table: of the runs, whose folders contain ``metrics.json``.

    Returns:
        ``<svg>`` elements, one for each quantity that was recorded.
    """
    metric = _metric(table)
    drawings = []
    # Detectron2 puts the test set before a metric's name if there are several.
    for title, keys in ((heading(metric), [metric, f"{table.test_set}/{metric}"]), ("total loss", ["total_loss"])):
        lines = {
            row.label: list(filter(None, _lines(row, keys)))
            for row in table.rows if row.percent == table.percents[-1]
        }  # fmt: skip
        if any(len(line) > 1 for found in lines.values() for line in found):
            drawings.append(_draw(_name(table, title), partial(plot_lines, title=title, lines=lines)))
    return drawings


def draw_lines(name: str, *panel: Any) -> str:
    """Draw the arguments of :func:`plot_lines` and return an ``<svg>`` element; its name is unique on the page."""
    return _draw(name, lambda axis: plot_lines(axis, *panel))


def fraction_curves(table: Table) -> str:
    """Draw a table's first metric over the part of the labels, with mean and standard deviation.

    Returns:
        An ``<svg>`` element; empty if all runs used the same part.
    """
    if len(table.percents) < 2 or not table.columns:
        return ""
    metric = _metric(table)
    labels = list(dict.fromkeys(row.label for row in table.rows))

    def paint(axis: Any) -> None:
        for label, style in zip(labels, _styles(labels), strict=True):
            points = sorted(
                (row.percent, row.cells[metric].mean, row.cells[metric].std or 0)
                for row in table.rows if row.label == label and metric in row.cells
            )  # fmt: skip
            if points:
                x, y, error = zip(*points, strict=True)
                axis.errorbar(x, y, error, **style, label=label, marker="o", markersize=4, capsize=3)
        axis.set_xscale("log")
        axis.set_xticks(table.percents, [f"{percent:g}%" for percent in table.percents])
        axis.minorticks_off()
        axis.set(xlabel="part of the training labels", ylabel=heading(metric))
        axis.grid(alpha=0.2)
        axis.legend(frameon=False, fontsize=9)

    return _draw(_name(table, "label fractions"), paint)


def draw_panels(name: str, painters: Sequence[Callable[[Any], None]]) -> str:
    """Draw plots one below the other, with one horizontal axis.

    Args:
        name: see :func:`_draw`.
        painters: functions that draw on axes, from the top.

    Returns:
        An ``<svg>`` element.
    """

    def paint(axes: Any) -> None:
        for axis, painter in zip(axes[:, 0], painters, strict=True):
            painter(axis)

    return _draw(name, paint, (7.5, 2.6 * len(painters)), nrows=len(painters), sharex=True, squeeze=False)


def _short(value: float, _position: int) -> str:
    """Write a number below a tick: 192000 as 192k, because labels of six digits touch in a small plot."""
    return str(EngFormatter(sep="")(value)) if abs(value) >= 10_000 else f"{value:g}"


def _name(table: Table, what: str) -> str:
    return f"{what}, {table.name} on {table.test_set}" + f" ({table.variant})" * bool(table.variant)


def _metric(table: Table) -> str:
    return table.columns[0] if table.columns else ""


def _lines(row: Row, keys: Sequence[str]) -> Iterator[list[tuple[int, float]]]:
    for run in row.runs:
        yield next(filter(None, map(run.curve, keys)), [])


def _styles(labels: Collection[str]) -> list[dict[str, str]]:
    """Return a colour and a kind of line for each label; the kind changes when the colours begin again."""
    numbers, several = range(len(labels)), len(_COLOURS)
    return [{"color": _COLOURS[n % several], "linestyle": _KINDS[n // several % len(_KINDS)]} for n in numbers]


def _draw(name: str, paint: Callable[[Any], None], size: tuple[float, float] = (5.2, 3.3), **layout: Any) -> str:
    """Return what ``paint`` draws on axes as an ``<svg>`` element.

    Args:
        name: of the drawing, unique on the page. Ids follow from it, so that they are the same each time.
        paint: a function that draws on axes.
        size: in inches.
        layout: of matplotlib's ``Figure.subplots``.
    """
    style: dict[Any, Any] = dict.fromkeys(_INKED, _INK)
    style |= {"svg.hashsalt": name, "axes.spines.top": False, "axes.spines.right": False}
    file = io.StringIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        paint(figure.subplots(**layout))
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(name)}" ', 1)

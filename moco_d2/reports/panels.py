"""Panels of pretraining runs: curves of the method's diagnostics, and of what the monitor measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from moco_d2.config import load_cfg
from moco_d2.engine.build import outline
from moco_d2.engine.monitor import DIAGNOSTICS as MONITORED
from moco_d2.engine.step import FIRST_LAYER
from moco_d2.methods import Diagnostic
from moco_d2.reports.curves import Line, draw_lines
from moco_d2.reports.pretraining import CONFIG, Pretraining, run_names


class Panel(NamedTuple):
    """One plot: the arguments of :func:`moco_d2.reports.curves.plot_lines`.

    Attributes:
        title: of the plot.
        lines: label to lines of (x, value).
        references: (label, value) of constants.
        x: what the lines are over: ``iteration`` or ``epoch``.
    """

    title: str
    lines: dict[str, list[Line]]
    references: list[tuple[str, float]]
    x: str


def panels_of_run(run: Pretraining) -> list[Panel]:
    """Return the panels of one run, over iterations; diagnostics with the same title share a panel."""
    panels: dict[str, Panel] = {}
    for one in _diagnostics(run):
        panel = panels.setdefault(one.panel, Panel(one.panel, {}, [], "iteration"))
        panel.lines.setdefault(one.label.removeprefix("-"), []).append(run.scalar(one.key))
        panel.references.extend(_reference(one))
    return list(panels.values())


def panels_of_runs(runs: Sequence[Pretraining]) -> list[Panel]:
    """Return the panels that compare runs, over epochs: one for each diagnostic, with a line a run.

    The lines are over iterations if a run has not recorded its epochs.
    """
    panels: dict[str, Panel] = {}
    x = "epoch" if all(run.steps_per_epoch for run in runs) else "iteration"
    for name, run in zip(run_names(runs), runs, strict=True):
        diagnostics = _diagnostics(run)
        shared = Counter(one.panel for one in diagnostics)
        for one in diagnostics:
            title = one.panel + f": {one.label.removeprefix('-')}" * (shared[one.panel] > 1)
            panel = panels.setdefault(one.key, Panel(title, {}, [], x))
            step = run.steps_per_epoch if x == "epoch" else 1
            panel.lines[name] = [[(done / step, value) for done, value in run.scalar(one.key)]]
            # A constant that several runs share is drawn once.
            panel.references.extend(found for found in _reference(one) if found not in panel.references)
    return list(panels.values())


def drawings(runs: Sequence[Pretraining]) -> list[str]:
    """Return the panels of one run or of several as ``<svg>`` elements."""
    panels = panels_of_run(runs[0]) if len(runs) == 1 else panels_of_runs(runs)
    return [draw_lines(f"pretraining, {panel.title}", *panel) for panel in panels]


def _reference(one: Diagnostic) -> list[tuple[str, float]]:
    return [] if one.reference is None else [(f"{one.reference_label}: {one.reference:.3g}", one.reference)]


def _diagnostics(run: Pretraining) -> list[Diagnostic]:
    """Return the diagnostics that a run recorded, the loss first."""
    try:
        own: Sequence[Diagnostic] = outline(load_cfg(run.folder / CONFIG)).diagnostics()
    except (KeyError, ValueError):  # a method of the user's own, which is not registered here
        own = [Diagnostic("total_loss", "loss", "loss")]
    recorded = {key for record in run.records for key in record}
    return [one for one in (*own, FIRST_LAYER, *MONITORED) if one.key in recorded]

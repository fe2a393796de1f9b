"""Tables of fine-tuning results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

COLUMNS = ("pre-train", "protocol", "test set", "AP", "AP50", "AP75", "mask AP", "iterations")


def read_result(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the ``results.json`` that a fine-tuning run leaves in its folder.

    Raises:
        ValueError: the run has none, because it did not finish or is no fine-tuning run.
    """
    path = Path(folder) / "results.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: the run has not finished, or {folder} holds no fine-tuning run")
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def rows(init: str, result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the table's rows of a run, one a test set, as ``COLUMNS``; a metric without a value is a dash."""

    def show(metrics: Mapping[str, Any], task: str, name: str) -> str:
        value = metrics.get(task, {}).get(name)
        return "-" if value is None else f"{value:.2f}"

    return [
        (
            init,
            result["protocol"],
            test_set,
            *(show(metrics, "bbox", name) for name in ("AP", "AP50", "AP75")),
            show(metrics, "segm", "AP"),
            str(result["iterations"]),
        )
        for test_set, metrics in result["metrics"].items()
    ]


def table(runs: list[tuple[str, str | os.PathLike[str]]]) -> str:
    """Return a Markdown table of finished runs.

    Args:
        runs: what each was started from, in words, and its folder.

    Raises:
        ValueError: a run has no result.
    """
    body = [row for init, folder in runs for row in rows(init, read_result(folder))]
    # Figures stay the strings they are, or tabulate would drop their trailing zeros.
    return str(tabulate(body, COLUMNS, tablefmt="github", disable_numparse=True, stralign="left"))

"""What the benchmarks share: the clock, and the table of measurements."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        problem: what was done.
        by: the library that did it.
        seconds: by the clock.
        cpu_seconds: over all cores: other programs hardly change them.
        ratio: CPU seconds of the problem's reference over these.
        difference: the largest from the reference's numbers.
    """

    problem: str
    by: str
    seconds: float
    cpu_seconds: float
    ratio: float
    difference: float


def timed(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """Return the result of ``work()``, its seconds and its CPU seconds."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - clock, time.process_time() - cpu


def largest_difference(values: Any, reference: Any) -> float:
    """Return the largest difference between two arrays; where both are nan there is none."""
    import numpy as np

    values, reference = np.asarray(values, float), np.asarray(reference, float)
    equal = (values == reference) | (np.isnan(values) & np.isnan(reference))
    return float(np.abs(values - reference)[~equal].max(initial=0))


HEADERS = ("problem", "by", "seconds", "CPU s", "ratio", "difference")
FORMATS = ("", "", ".2f", ".2f", ".1f", ".1e")


def report(
    rows: Sequence[Any],
    settings: dict[str, Any],
    output: Path | None,
    headers: Sequence[str] = HEADERS,
    formats: Sequence[str] = FORMATS,
) -> None:
    """Print the rows, dataclasses, and write them with what they depend on."""
    from tabulate import tabulate

    from moco_d2.atomic import atomic_write
    from moco_d2.provenance import provenance

    print(tabulate([tuple(asdict(row).values()) for row in rows], headers, tablefmt="pipe", floatfmt=formats))
    if output:
        content = {**settings, "rows": [asdict(row) for row in rows], "machine": platform.machine(), **provenance()}
        with atomic_write(output) as file:
            file.write(json.dumps(content, indent=2).encode())

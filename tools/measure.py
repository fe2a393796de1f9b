"""What the benchmarks share: the clock, and the table of measurements."""

from __future__ import annotations

import itertools
import json
import platform
import time
from collections.abc import Callable
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


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most memory that ``work()`` holds on the CPU at a time, beyond what was held before."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


def largest_difference(values: Any, reference: Any) -> float:
    """Return the largest difference between two arrays; where both are nan there is none."""
    import numpy as np

    values, reference = np.asarray(values, float), np.asarray(reference, float)
    equal = (values == reference) | (np.isnan(values) & np.isnan(reference))
    return float(np.abs(values - reference)[~equal].max(initial=0))


def report(rows: list[Row], settings: dict[str, Any], output: Path | None) -> None:
    """Print the rows, and write them with what they depend on."""
    from tabulate import tabulate

    from moco_d2.atomic import atomic_write
    from moco_d2.provenance import provenance

    headers = ("problem", "by", "seconds", "CPU s", "ratio", "difference")
    formats = ("", "", ".2f", ".2f", ".1f", ".1e")
    print(tabulate([tuple(asdict(row).values()) for row in rows], headers, tablefmt="pipe", floatfmt=formats))
    if output:
        content = {**settings, "rows": [asdict(row) for row in rows], "machine": platform.machine(), **provenance()}
        with atomic_write(output) as file:
            file.write(json.dumps(content, indent=2).encode())

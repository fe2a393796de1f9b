"""Parts that the benchmarks share: the clock, memory figures, and the table of measurements."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from moco_d2.__main__ import COMMANDS

Result = TypeVar("Result")
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        problem: the work.
        by: the library that did it.
        seconds: wall-clock time.
        cpu_seconds: over all cores; other programs hardly change them.
        ratio: CPU seconds of the problem's reference divided by these.
        difference: the largest difference from the reference's numbers.
    """

    problem: str
    by: str
    seconds: float
    cpu_seconds: float
    ratio: float
    difference: float


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of the work in this process, over all cores; other programs hardly change them."""
    start = time.process_time()
    work()
    return time.process_time() - start


def alternate(
    works: Mapping[str, Callable[[], object]],
    repeats: int,
    warm_up: int,
    seconds: Callable[[Callable[[], object]], float] = cpu_seconds,
) -> dict[str, list[float]]:
    """Time each work ``repeats`` times, in turns, so that a machine that slows down slows all of them.

    Args:
        works: the functions to time, by name.
        repeats: turns that count.
        warm_up: turns before these, which do not count.
        seconds: the clock.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(warm_up + repeats):
        for name, work in works.items():
            taken = seconds(work)
            if turn >= warm_up:
                times[name].append(taken)
    return times


def compare(times: Mapping[str, list[float]]) -> list[dict[str, Any]]:
    """Return name, median, quartiles and ratio of each; the ratio to the first is the median over the turns."""
    made, reference = [], next(iter(times.values()))
    for name, taken in times.items():
        low, middle, high = statistics.quantiles(taken, n=4, method="inclusive")
        ratio = statistics.median(a / b for a, b in zip(taken, reference, strict=True))
        made.append({"what": name, "seconds": middle, "quartiles": [low, high], "ratio": ratio})
    return made


def in_new_process(preload: Sequence[str], work: Callable[..., Result], *arguments: Any) -> Result:
    """Return ``work(*arguments)``, run in a new process, in which no earlier work has left memory.

    The modules ``preload`` are imported once, by the server from which all such processes are forked.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*preload])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(work, *arguments).result()


def memory(what: str) -> float:
    """Return a memory figure of this process in bytes: a field of Linux' ``/proc/self/status``; nan elsewhere."""
    found = re.search(rf"{what}:\s+(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * float(found[1]) if found else float("nan")


def timed(work: Callable[[], Result]) -> tuple[Result, float, float]:
    """Return the result of ``work()``, its seconds and its CPU seconds."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - clock, time.process_time() - cpu


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak memory of ``work()`` on the CPU, beyond what was held before."""
    import torch

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        work()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)), default=0)


def largest_difference(values: Any, reference: Any) -> float:
    """Return the largest difference between two arrays; two nan count as equal."""
    import numpy as np

    values, reference = np.asarray(values, float), np.asarray(reference, float)
    equal = (values == reference) | (np.isnan(values) & np.isnan(reference))
    return float(np.abs(values - reference)[~equal].max(initial=0))


def help_times(repeats: int) -> list[dict[str, Any]]:
    """Return CPU seconds of each command's ``--help``, medians, and their ratio to ``python -c "import torch"``."""
    commands = {"import torch": ["-c", "import torch"], "import moco_d2": ["-c", "import moco_d2"]}
    commands |= {f"moco-d2 {name}": ["-m", "moco_d2", name, "--help"] for name in COMMANDS}
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, words in commands.items():
            before = os.times()
            subprocess.run([sys.executable, *words], check=True, stdout=subprocess.DEVNULL)
            after = os.times()
            times[name].append(sum(after[2:4]) - sum(before[2:4]))  # of children
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return [{"what": n, "seconds": m, "ratio": m / medians["import torch"]} for n, m in medians.items()]


def machine(device: str) -> str:
    """Return the name of the processor or GPU that measured, without the host's name."""
    if device != "cpu":
        import torch

        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def tables(
    found: dict[str, Any],
    settings: dict[str, Any],
    output: Path | None,
    floatfmt: str | Sequence[str] = ".3f",
) -> None:
    """Print each list of rows as a table and each sentence as a line; write them to JSON with settings and commit.

    Args:
        found: rows, each ``{column: value}``, or a sentence, by title.
        settings: the benchmark's arguments.
        output: JSON file, if any.
        floatfmt: number format of all columns, or of each.
    """
    from tabulate import tabulate

    from moco_d2.io.files import has_keys, named_file
    from moco_d2.io.provenance import provenance

    for title, content in found.items():
        if isinstance(content, str):
            print(f"\n{title}: {content}")
            continue
        shown = [
            {
                key: " to ".join(f"{v:.3f}" for v in value) if isinstance(value, list) else value
                for key, value in row.items()
            }
            for row in content
        ]
        print(f"\n{title}", tabulate(shown, "keys", tablefmt="pipe", floatfmt=floatfmt), sep="\n")
    if output:
        with named_file(output, has_keys(*settings, "command", "date")) as file:
            file.write(json.dumps({**settings, **found, **provenance()}, indent=2).encode())

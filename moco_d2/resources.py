"""Processor cores and memory that this process may use, and how many loader processes they are enough for."""

from __future__ import annotations

import math
import os
import re
import shutil
from pathlib import Path

# A container's own limits: control groups of version 2, and of version 1.
_GROUPS = Path("/sys/fs/cgroup")
_MEMORY = Path("/proc/meminfo")
_SHARED = Path("/dev/shm")

MOST = 32  # loader processes for one GPU, which none outruns: each prepares 250 images of 224 pixels a second and more
_OWN = 300e6  # bytes that a loader process needs for itself
AHEAD = 2  # batches that each loader process prepares in advance, torch's default


def cores() -> int:
    """Return the number of cores: those that the process is bound to, within its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, period = _read("cpu.max") or _read("cpu/cpu.cfs_quota_us") + _read("cpu/cpu.cfs_period_us") or [-1, 1]
    return max(1, int(min(bound, quota / period))) if quota > 0 else bound


def memory() -> float:
    """Return the bytes of memory that are free, at most the container's; infinity if the system does not say."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _MEMORY.read_text()) if _MEMORY.exists() else None
    limits = _read("memory.max") or _read("memory/memory.limit_in_bytes") or [math.inf]
    return min(1024 * float(found[1]) if found else math.inf, *limits)


def loader_processes(processes: int, gpu: bool, batch: float) -> int:
    """Return how many loader processes feed each of the training processes of this machine.

    With a GPU, all its cores but two, one of which launches its work. Without, an eighth of the cores, because they are
    needed for the training, which takes far longer than the preparation of its images. At most :data:`MOST`, at least
    1; and the batches that they prepare in advance fit into a half of the free memory, and into shared memory.

    Args:
        processes: training processes of this machine.
        gpu: whether they use GPUs.
        batch: bytes of a process's batch.
    """
    mine = cores() // processes
    shared = shutil.disk_usage(_SHARED).free if _SHARED.exists() else math.inf
    fitting = min(memory() / 2 / (AHEAD * batch + _OWN), shared / (AHEAD * batch + 1)) / processes
    return max(1, int(min(mine - 2 if gpu else mine // 8, MOST, fitting)))


def _read(name: str) -> list[float]:
    """Return the numbers in a file of the control group, "max" as infinity; none if there is no such file."""
    try:
        return [math.inf if word == "max" else float(word) for word in (_GROUPS / name).read_text().split()]
    except OSError:
        return []

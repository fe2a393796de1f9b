"""Time and memory of a conversion of a training checkpoint, for ``python -m benchmarks convert``."""

from __future__ import annotations

import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.measure import STATUS, in_new_process, memory, timed
from moco_d2.convert import can_prove, convert_checkpoint, prove
from moco_d2.convert.report import convert_and_report
from moco_d2.facts import ResNetFacts
from moco_d2.io.provenance import sha256
from moco_d2.layers.resnet import build_resnet

KEYS, CHANNELS = 65536, 128  # MoCo's queue


@dataclass(frozen=True)
class Row:
    """The cost of one way to handle a checkpoint, each run in a process of its own.

    Attributes:
        problem: the file.
        work: what was done with it.
        seconds: median of the wall-clock time.
        cpu_seconds: median of the CPU time of all cores.
        ratio: ``seconds`` divided by those of ``torch.load``.
        peak: peak resident memory minus that before the work, divided by the file's size; mapped pages of files count.
        private: the same for memory that no file backs, sampled every millisecond.
    """

    problem: str
    work: str
    seconds: float
    cpu_seconds: float
    ratio: float
    peak: float
    private: float


def rows(width: float, repeats: int) -> Iterator[Row]:
    """Compare with reading the whole file, ``torch.load(weights_only=True)``, for both formats of ``torch.save``."""
    with tempfile.TemporaryDirectory() as folder:
        content = _checkpoint(width)
        for name, zipped in (("zip", True), ("before torch 1.6", False)):
            path = Path(folder) / "checkpoint.pth.tar"
            torch.save(content, path, _use_new_zipfile_serialization=zipped)
            size = path.stat().st_size
            works = {
                "torch.load": _load,
                "conversion": _convert,
                "conversion, both SHA-256, report": _report,
                **({"proof alone": _prove} if can_prove() else {}),
            }
            sha256(path)  # brings the file into the page cache, so that all read it from there
            runs: dict[str, list[tuple[float, float]]] = {work: [] for work in works}
            for _ in range(repeats):
                for work, function in works.items():
                    runs[work].append(_fresh(_clocked, function, path))
            medians = {work: [statistics.median(values) for values in zip(*runs[work], strict=True)] for work in works}
            for work, function in works.items():
                peaks = [bytes_ / size for bytes_ in _fresh(_peaks, function, path)]
                seconds, cpu = medians[work]
                ratio = seconds / medians["torch.load"][0]
                yield Row(f"{name}, {size / 1e6:.0f} MB", work, seconds, cpu, ratio, *peaks)


def _checkpoint(width: float) -> dict[str, Any]:
    """Return a checkpoint as the authors' MoCo v2 saves it: two encoders with heads, the queue, and SGD's momentum."""
    torch.manual_seed(0)
    encoder = build_resnet("resnet50", width=width)
    inside = encoder.fc.in_features
    encoder.fc = nn.Sequential(nn.Linear(inside, inside), nn.ReLU(), nn.Linear(inside, CHANNELS))
    optimizer = torch.optim.SGD(encoder.parameters(), 0.03, momentum=0.9, weight_decay=1e-4)
    encoder(torch.randn(2, 3, 64, 64)).sum().backward()  # also fills the norms' statistics
    optimizer.step()
    state = {f"module.encoder_{e}.{name}": t.clone() for e in "qk" for name, t in encoder.state_dict().items()}
    state["module.queue"] = nn.functional.normalize(torch.randn(CHANNELS, int(KEYS * width)), dim=0)
    state["module.queue_ptr"] = torch.zeros(1, dtype=torch.long)
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer.state_dict()}


def _load(path: Path, output: Path) -> Callable[[], Any]:
    return partial(torch.load, path, map_location="cpu", weights_only=True)


def _convert(path: Path, output: Path) -> Callable[[], Any]:
    return partial(convert_checkpoint, path, output, proof=False)


def _report(path: Path, output: Path) -> Callable[[], Any]:
    return partial(convert_and_report, path, output, proof=False)


def _prove(path: Path, output: Path) -> Callable[[], Any]:
    made, _ = convert_checkpoint(path, output, proof=False)
    assert isinstance(made.facts, ResNetFacts)
    return partial(prove, made.facts, made.source_tensors, made.tensors)


def _fresh(measure: Callable[..., tuple[float, float]], *arguments: Any) -> tuple[float, float]:
    preload = ["moco_d2.convert.report", *(["detectron2.modeling"] if can_prove() else [])]
    return in_new_process(preload, measure, *arguments)


def _clocked(function: Callable[[Path, Path], Callable[[], Any]], path: Path) -> tuple[float, float]:
    _, seconds, cpu = timed(function(path, path.with_name("out.pth")))
    return seconds, cpu


def _peaks(function: Callable[[Path, Path], Callable[[], Any]], path: Path) -> tuple[float, float]:
    """Return the peak of resident and private memory in bytes, minus that before the work; nan outside Linux."""
    work = function(path, path.with_name("out.pth"))
    if not STATUS.exists():
        return float("nan"), float("nan")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the current value
    before, private, done = memory("VmHWM"), [memory("RssAnon")], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            private.append(memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()  # the result counts as memory too
    private.append(memory("RssAnon"))
    done.set()
    watcher.join()
    del kept
    return memory("VmHWM") - before, max(private) - private[0]

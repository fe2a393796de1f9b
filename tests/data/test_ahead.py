"""Batches made ahead of the step on a GPU: the order, a resume, errors in their turn, bounded memory."""

import functools
import itertools
import os
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from moco_d2.data import EpochSampler, FileSource, SkipLog, ViewDataset, ViewLoader, build_augmentation, build_backend
from moco_d2.data import loader as module
from moco_d2.data.loader import PINNED, Batch, one_ahead

CPU = torch.device("cpu")


class Stream:
    """Stands for a GPU's stream, and notes what happens."""

    def __init__(self, notes: list[str], name: str) -> None:
        self.notes, self.name, self.events = notes, name, 0

    def wait_stream(self, other: "Stream") -> None:
        self.notes.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.events += 1
        self.notes.append(f"{self.name}: batch {self.events} begins")
        return f"batch {self.events}"

    def wait_event(self, event: str) -> None:
        self.notes.append(f"{self.name} waits for {event}")


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 40, 50, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number:02d}.png")
    return [str(path) for path in sorted(tmp_path.glob("*.png"))]


def loader(files: list[str], folder: Path, start: int = 0, workers: int = 0) -> ViewLoader:
    augmentation = build_augmentation("swav_2x6", 32)
    dataset = ViewDataset(FileSource(files), augmentation, 3, build_backend("device", CPU))
    return ViewLoader(dataset, EpochSampler(len(files), 4, 3, start=start), workers, CPU, SkipLog(folder, 0.1))


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the streams of loaders with :func:`on_a_stream`."""
    found: list[str] = []
    step = Stream(found, "step")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: step)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: found.append("used"))
    return found


def on_a_stream(made: ViewLoader, notes: list[str]) -> ViewLoader:
    made._stream = Stream(notes, "side")  # type: ignore[assignment]
    return made


def test_an_item_is_yielded_when_the_next_has_been_taken_and_an_error_comes_in_its_turn() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(3):
            taken.append(number)
            yield number
        raise OSError("the disk is gone")

    ahead = one_ahead(items())
    assert taken == []
    assert [(next(ahead), len(taken)) for _ in range(3)] == [(0, 2), (1, 3), (2, 3)]
    with pytest.raises(OSError, match="the disk is gone"):
        next(ahead)
    assert list(one_ahead(iter("abc"))) == ["a", "b", "c"] and list(one_ahead(iter(()))) == []
    with pytest.raises(ValueError, match="at once"):
        next(one_ahead(int("at once") for _ in range(1)))


@pytest.mark.parametrize("workers", [0, 2])
def test_ahead_the_views_are_the_same_also_after_a_resume(
    files: list[str], tmp_path: Path, notes: list[str], workers: int
) -> None:
    plain = list(itertools.islice(loader(files, tmp_path), 5))
    ahead = list(itertools.islice(on_a_stream(loader(files, tmp_path, workers=workers), notes), 5))
    resumed = list(itertools.islice(on_a_stream(loader(files, tmp_path, 3, workers), []), 2))
    for one, other in zip([*plain, *plain[3:]], [*ahead, *resumed], strict=True):
        assert len(one.images) == 8 and all(map(torch.equal, one.images, other.images))
        assert torch.equal(one.index, other.index) and torch.equal(one.boxes, other.boxes)
    used = ["used"] * 10  # eight views, their numbers and boxes
    assert notes[: 4 + 2 * 10 + 2] == [
        "side waits for step", "side: batch 1 begins", "side: batch 2 begins", "step waits for batch 1", *used,
        "side: batch 3 begins", "step waits for batch 2", *used,
    ]  # fmt: skip


def test_what_is_unreadable_is_logged_with_the_batch_that_lacks_it(
    files: list[str], tmp_path: Path, notes: list[str]
) -> None:
    third = [files[index] for _, index in list(itertools.islice(EpochSampler(len(files), 4, 3), 3))[2]]
    for file in third:
        os.remove(file)
    made = on_a_stream(loader(files, tmp_path), notes)
    made.skips.limit = 1.0
    batches = iter(made)
    for _ in range(2):
        next(batches)
    assert made.skips.paths == set(), "the third batch has begun, but was not trained on"
    next(batches)
    assert made.skips.paths == set(third)
    assert '"iteration": 2' in (tmp_path / "skipped.jsonl").read_text()


def test_one_batch_is_held_while_the_next_is_made(
    files: list[str], tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = on_a_stream(loader(files, tmp_path), notes)
    begin, seen, held = made._begin, list[weakref.ref[Batch]](), list[int]()

    def counted(batch: Batch) -> Any:
        held.append(sum(one() is not None for one in seen))
        seen.append(weakref.ref(batch))
        return begin(batch)

    monkeypatch.setattr(made, "_begin", counted)
    for _ in itertools.islice(made, 4):
        pass
    assert held == [0, 1, 1, 1, 1], "that of the step has been given back, and its pinned memory"


def test_few_batches_wait_in_pinned_memory_however_many_workers_there_are(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[Batch] = []

    def pin(self: Batch) -> Batch:
        pinned.append(self)
        return self

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(module.Batch, "pin_memory", pin)
    monkeypatch.setattr(module, "DataLoader", functools.partial(DataLoader, prefetch_factor=8))  # as 4 workers together
    made = loader(files, tmp_path, workers=1)
    made.device = torch.device("cuda")  # which it asks for memory only
    batches = made._batches()
    next(batches)
    until = time.monotonic() + 20
    while len(pinned) < PINNED + 2 and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.3)
    assert len(pinned) == PINNED + 2, "one delivered, two in the queue, one on the way to it"
    closing = time.monotonic()
    del batches
    assert time.monotonic() - closing < 4, "torch's thread looks every five seconds"

"""A run says when it waits for its loader, what helps, and when it no longer waits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage

from moco_d2.data.backends import Backend, Cv2Backend, DeviceBackend, PilBackend
from moco_d2.engine.hooks import PretrainMetrics

PERIOD = 20


def messages(
    waits: list[float], caplog: pytest.LogCaptureFixture, backend: Backend, device: str = "cpu"
) -> list[tuple[int, str]]:
    """Return what is said, with the step, of a run whose steps take a second, of which ``waits`` for images."""
    loader = SimpleNamespace(
        skips=SimpleNamespace(paths=()), workers=3, device=torch.device(device),
        dataset=SimpleNamespace(backend=backend),
    )  # fmt: skip
    hook = PretrainMetrics(SimpleNamespace(recorded={}, diagnostics=lambda: (), recording=True), 8, 1, PERIOD)  # type: ignore[arg-type]
    hook.trainer = SimpleNamespace(iter=0, start_iter=0, max_iter=len(waits), data_loader=loader)
    said = []
    with EventStorage() as storage, caplog.at_level(logging.INFO, logger="moco_d2.engine.hooks"):
        for step, wait in enumerate(waits):
            hook.trainer.iter = storage.iter = step
            hook.before_step()
            storage.put_scalars(time=1.0, data_time=wait)
            caplog.clear()
            hook.after_step()
            said += [(step + 1, record.getMessage()) for record in caplog.records]
        assert storage.latest()["images_per_second"][0] == 8
    return said


def test_waiting_is_said_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    said = messages([0.5] * 60 + [0.0] * 40, caplog, PilBackend())
    assert [step for step, _ in said] == [40, 80], "not in the first period, when workers start"
    assert said[0][1].startswith("the loader is the bottleneck: 50 % of a step is spent waiting for images (0.500 of ")
    assert said[1][1] == "the loader keeps up again: 0 % of a step is spent waiting for images"


def test_a_tenth_of_a_step_is_no_reason_to_say_anything(caplog: pytest.LogCaptureFixture) -> None:
    assert messages([0.09] * 100, caplog, PilBackend()) == []


@pytest.mark.parametrize(
    ("backend", "device", "remedies"),
    [
        (PilBackend(), "cpu", ", DATA.BACKEND cv2"),
        (Cv2Backend(), "cpu", ""),
        (Cv2Backend(), "cuda", ", DATA.BACKEND device"),
        (PilBackend(), "cuda", ", DATA.BACKEND device"),
        (DeviceBackend(), "cuda", ""),
    ],
)
def test_the_remedies_are_those_there_are(
    backend: Backend, device: str, remedies: str, caplog: pytest.LogCaptureFixture
) -> None:
    ((_, said),) = messages([0.5] * 40, caplog, backend, device)
    assert said.endswith(f"Remedies: more worker processes (DATALOADER.NUM_WORKERS is 3){remedies}")

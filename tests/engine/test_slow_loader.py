"""A run says when it waits for its loader, what helps, and when it no longer waits."""

import logging
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch.overrides import TorchFunctionMode

from moco_d2.data.backends import Backend, Cv2Backend, DeviceBackend, PilBackend
from moco_d2.engine.hooks import PretrainMetrics, in_one_transfer
from moco_d2.engine.idle import IdleTime

PERIOD = 20


def messages(
    waits: list[float],
    caplog: pytest.LogCaptureFixture,
    backend: Backend,
    device: str = "cpu",
    idle: float | None = None,
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
            storage.put_scalars(time=1.0, data_time=wait, **({} if idle is None else {"device_idle": idle}))
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


def test_a_gpu_that_has_work_does_not_wait_whatever_its_host_does(caplog: pytest.LogCaptureFixture) -> None:
    assert messages([0.9] * 60, caplog, DeviceBackend(), "cuda", idle=0.0) == []
    ((step, said),) = messages([0.9] * 60, caplog, DeviceBackend(), "cuda", idle=0.3)
    assert step == 40 and "30 % of a step is spent waiting for images" in said


class Event:
    """Stands for an event on a GPU; it is reached at the second that ``clock`` says when it is recorded."""

    clock = 0.0

    def record(self) -> None:
        self.at = Event.clock

    def elapsed_time(self, other: "Event") -> float:
        return 1000 * (other.at - self.at)


def test_idle_is_the_gap_between_steps_but_no_more_than_the_hosts_wait() -> None:
    idle = IdleTime(Event)  # type: ignore[arg-type]
    # Per step: the host's wait for its images, and the seconds at which the GPU comes to its start and its end.
    for iteration, (waited, start, end) in enumerate([(3, 3, 4), (0.9, 4, 5), (0.5, 5.5, 6), (0.25, 7, 8)]):
        Event.clock = start
        idle.images_arrived(iteration, waited)
        Event.clock = end
        idle.step_ends()
    assert idle.read() == [(1, 0.0), (2, 0.5), (3, 0.25)], "the host was ahead; the loader was late; hooks took a while"
    assert idle.read() == []


class Reads(TorchFunctionMode):
    """Counts what reads values from a device."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.__float__)
        return function(*args, **(kwargs or {}))


def test_metrics_are_read_in_one_transfer() -> None:
    scalars = {"a": torch.tensor(0.1), "b": torch.tensor(3), "c": torch.tensor(0.5, dtype=torch.float16)}
    with Reads() as reads:
        found = in_one_transfer(scalars)
    assert reads.count == 1 and found == {name: value.item() for name, value in scalars.items()}
    assert in_one_transfer({}) == {}

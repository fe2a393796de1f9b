"""Hooks of pretraining: the method's own hooks, its diagnostics, and the progress line."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from detectron2.engine import HookBase
from detectron2.utils.events import get_event_storage

from moco_d2.data.backends import DeviceBackend, PilBackend
from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod
from moco_d2.running.progress import ProgressPrinter, peak_memory_gib

logger = logging.getLogger(__name__)

# Fraction of a step that may be spent waiting for the loader before the log warns.
LOADER_SHARE = 0.1


class MethodSchedule(HookBase):
    """Call the method's ``before_epoch``, ``before_step`` and ``after_step``."""

    def __init__(self, method: SSLMethod, steps_per_epoch: int, replay: Callable[[], Iterator[Views]]) -> None:
        """Set up.

        Args:
            method: the SSL method.
            steps_per_epoch: iterations per epoch.
            replay: returns the batches of the epoch that begins.
        """
        self.method, self.steps_per_epoch, self.replay = method, steps_per_epoch, replay

    def before_step(self) -> None:
        """Run the method's schedules and, at the start of an epoch, its ``before_epoch``."""
        epoch, step = divmod(self.trainer.iter, self.steps_per_epoch)
        if step == 0:
            self.method.before_epoch(epoch, self.replay)
        self.method.before_step(self.trainer.iter / self.trainer.max_iter, self.trainer.iter / self.steps_per_epoch)

    def after_step(self) -> None:
        """Let the method update what depends on the new weights."""
        self.method.after_step()


class PretrainMetrics(HookBase):
    """Record the method's diagnostics, images per second, epoch, memory and unreadable images every ``period`` steps.

    The diagnostics are those of this process; averaging them over processes is not worth the communication.
    """

    def __init__(self, method: SSLMethod, batch: int, steps_per_epoch: int, period: int) -> None:
        self.method, self.batch, self.steps_per_epoch, self.period = method, batch, steps_per_epoch, period
        self.loader_is_slow, self.collapsed = False, False

    def before_step(self) -> None:
        """Record diagnostics only on the iterations that are logged, because they are not free."""
        step = self.trainer.iter + 1
        self.method.recording = step % self.period == 0 or step == self.trainer.max_iter

    def after_step(self) -> None:
        """Record the scalars of this step."""
        if not self.method.recording:
            return
        storage = get_event_storage()
        scalars = in_one_transfer(self.method.recorded)
        self._warn_of_collapse(scalars)
        scalars["epoch"] = (self.trainer.iter + 1) / self.steps_per_epoch
        scalars["peak_memory_gib"] = peak_memory_gib()
        scalars["unreadable_images"] = len(self.trainer.data_loader.skips.paths)
        if "time" in storage.histories():
            scalars["images_per_second"] = self.batch / storage.history("time").avg(self.period)
            # Not in the first period, in which workers start and cuDNN may choose algorithms.
            if self.trainer.iter + 1 - self.trainer.start_iter >= 2 * self.period:
                waits = "device_idle" if "device_idle" in storage.histories() else "data_time"
                self._warn_of_slow_loader(
                    storage.history(waits).avg(self.period), storage.history("time").avg(self.period)
                )
        storage.put_scalars(**scalars, smoothing_hint=False)

    def _warn_of_collapse(self, scalars: Mapping[str, float]) -> None:
        """Warn, once per run, when a diagnostic shows that the network has collapsed."""
        for one in self.method.diagnostics():
            low, value = one.collapsed_below, scalars.get(one.key)
            if low is not None and value is not None and value < low and not self.collapsed:
                logger.warning(
                    "%s is %.2g, but %.2g when features spread evenly: the network maps all images to nearly the same "
                    "point. Check augmentation, lr and batch norm; with more images and steps it may recover",
                    one.key, value, one.reference or low,
                )  # fmt: skip
                self.collapsed = True

    def _warn_of_slow_loader(self, waited: float, step: float) -> None:
        """Warn when the loader becomes the bottleneck, and log when it no longer is."""
        slow = waited > LOADER_SHARE * step
        if slow and not self.loader_is_slow:
            loader = self.trainer.data_loader
            remedies = [f"more worker processes (DATALOADER.NUM_WORKERS is {loader.workers})"]
            if loader.device.type != "cpu" and not isinstance(loader.dataset.backend, DeviceBackend):
                remedies.append("DATA.BACKEND device")
            elif isinstance(loader.dataset.backend, PilBackend):
                remedies.append("DATA.BACKEND cv2")
            logger.warning(
                "the loader is the bottleneck: %.0f %% of a step is spent waiting for images (%.3f of %.3f s). "
                "Remedies: %s",
                100 * waited / step, waited, step, ", ".join(remedies),
            )  # fmt: skip
        elif self.loader_is_slow and not slow:
            logger.info("the loader keeps up again: %.0f %% of a step is spent waiting for images", 100 * waited / step)
        self.loader_is_slow = slow


def in_one_transfer(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the values of scalar tensors, which are read from the device at once."""
    values = torch.stack([value.detach().double() for value in scalars.values()]).tolist() if scalars else []
    return dict(zip(scalars, values, strict=True))


class PretrainPrinter(ProgressPrinter):
    """The progress line of pretraining: time left, loss, diagnostics, lr and speed."""

    def __init__(self, max_iter: int, method: SSLMethod) -> None:
        super().__init__(max_iter)
        self.method = method

    def write(self) -> None:
        """Log the line."""
        storage = get_event_storage()
        if storage.iter == self._max_iter or "total_loss" not in storage.histories():  # at the end, or before a step
            return
        values = {name: history.latest() for name, history in storage.histories().items()}
        eta = self._get_eta(storage) or str(datetime.timedelta(0))
        values["total_loss"] = storage.history("total_loss").median(self._window_size)
        loss, *others = [
            (one.key, one.label, one.form) for one in self.method.diagnostics() if not one.label.startswith("-")
        ]
        line = [f"eta {eta}", f"iter {storage.iter + 1}/{self._max_iter}"]
        shown = [
            loss,
            ("epoch", "epoch", ".2f"),
            *others,
            ("lr", "lr", ".4g"),
            ("images_per_second", "images/s", ".1f"),
            ("device_idle", "idle s", ".3f") if "device_idle" in values else ("data_time", "data s", ".3f"),
        ]
        line += [f"{label} {values[name]:{form}}" for name, label, form in shown if name in values]
        if torch.cuda.is_available():
            line.append(f"max mem {torch.cuda.max_memory_allocated() / 2**20:.0f}M")
        self.logger.info("  ".join(line))

"""Checkpoints of a run: written completely or not at all, checked before use, and limited in number.

``torch.save`` writes zip archives, in which every record has a CRC-32 and the table of contents comes last. A truncated
or altered checkpoint is therefore detected without a second file of checksums.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer

from moco_d2.io.checkpoints import CheckpointError, open_checkpoint
from moco_d2.io.files import atomic_write, remove
from moco_d2.io.version import FileVersion
from moco_d2.running.weights import refuse_stubs

logger = logging.getLogger(__name__)

# 74: the exit code when a checkpoint cannot be written.
EXIT_NOT_WRITTEN = os.EX_IOERR

_POINTER = "last_checkpoint"


class NotWrittenError(OSError):
    """A checkpoint could not be written; the previous one is unchanged."""

    exit_code = EXIT_NOT_WRITTEN


def write_tensors(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint file completely or not at all.

    Raises:
        NotWrittenError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        with atomic_write(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        # torch's writer fails again when it closes the archive; the system's error is the context of that one.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise NotWrittenError(_explain(Path(path), cause)) from error
    logger.info("wrote %s", path)


def save_run(checkpointer: Checkpointer, name: str, **extra: Any) -> None:
    """Write ``<name>.pth`` with the model, everything registered with the checkpointer, and ``extra``.

    Raises:
        FloatingPointError: there are non-finite weights, from which a run cannot continue. They occur with a finite
            loss, too, if its gradient is not finite.
    """
    nonfinite = [key for key, weight in checkpointer.model.named_parameters() if not weight.isfinite().all()]
    if nonfinite:
        raise FloatingPointError(f"{name}.pth is not written: weights are infinite or NaN ({', '.join(nonfinite[:3])})")
    state = {key: item.state_dict() for key, item in checkpointer.checkpointables.items()}
    data = {"model": checkpointer.model.state_dict(), **state, **extra}
    write_tensors(data, Path(checkpointer.save_dir) / f"{name}.pth")


def point_to(checkpointer: Checkpointer, name: str) -> None:
    """Make ``<name>.pth`` the checkpoint that resuming starts from."""
    pointer = Path(checkpointer.save_dir) / _POINTER
    try:
        with atomic_write(pointer) as file:
            file.write(f"{name}.pth".encode())
    except OSError as error:
        raise NotWrittenError(_explain(pointer, error)) from error


def has_run(folder: str | os.PathLike[str]) -> bool:
    """Tell whether there are checkpoints in a folder that ``--resume`` would continue from, intact or not."""
    return bool(_candidates(Path(folder)))


def last_intact(folder: str | os.PathLike[str]) -> str:
    """Return the last undamaged checkpoint of a run, or an empty string if there are no checkpoints.

    The main process reads the whole file and decides for all. Every process must call this.

    Raises:
        ValueError: there are checkpoints, and all are damaged.
    """
    chosen = _last_intact(Path(folder)) if comm.is_main_process() else ""
    return str(comm.all_gather(chosen)[0])


def _last_intact(folder: Path) -> str:
    candidates = _candidates(folder)
    if not candidates:
        return ""
    problems = []
    for path in candidates:
        problem = " ".join(damage(path).split())
        if not problem:
            return str(path)
        logger.warning("the checkpoint %s is damaged (%s): trying another one", path, problem)
        problems.append(f"{path.name}: {problem}")
    raise ValueError(
        f"all {len(candidates)} checkpoints in {folder} are damaged ({problems[0]}): restore one from a copy, or start "
        "again in another OUTPUT_DIR"
    )


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints to resume from, the best first; empty if there is no run."""
    pointer = folder / _POINTER
    if not pointer.is_file():
        return []
    named = folder / pointer.read_text(errors="replace").strip()
    # Later ones come from an abandoned continuation of the run, or from a run killed before it moved the pointer.
    others = sorted(periodic(folder), key=lambda path: (path.name > named.name, -iteration(path)))
    return list(dict.fromkeys([named, *others]))


def damage(path: str | os.PathLike[str]) -> str:
    """Return why a run cannot resume from a checkpoint file, all of which is read; empty if it can."""
    try:
        version = FileVersion.now([Path(path)])
    except (OSError, ValueError) as error:  # ValueError: a damaged pointer may contain any name
        return f"{type(error).__name__}: {error}"
    # A run checks the file twice: before it reads data, and when it starts.
    return _damage(version) if version.settled else _damage.__wrapped__(version)


@lru_cache(maxsize=4)
def _damage(version: FileVersion) -> str:
    (path,) = version.paths
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad}"
        read_run(path)  # headers have no checksum; tensors are not read
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    except Exception as error:  # zipfile raises nearly anything, depending on where the damage is
        return f"{type(error).__name__}: {error}"
    return ""


def check_resumable(path: str | os.PathLike[str]) -> None:
    """Refuse to resume from a file that contains weights only: the run would silently start from iteration 0.

    Raises:
        CheckpointError: it is not a checkpoint of a training.
    """
    content = open_checkpoint(path).content
    missing = [key for key in ("model", "trainer") if not isinstance(content.get(key), Mapping)]
    if missing:
        raise CheckpointError(
            f"{path} is not a checkpoint that a run can resume from: it has no {' and no '.join(missing)}; start a new "
            f"run in another OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's checkpoint for resuming.

    Everything except the model is copied: the tensors are views of the mapped file, and optimizers keep the tensors
    that they are given and change them in place.

    Raises:
        CheckpointError: it cannot be read, or is not a run's.
    """
    checkpoint = open_checkpoint(path)
    refuse_stubs(checkpoint, "model")
    return {key: value if key == "model" else copy.deepcopy(value) for key, value in checkpoint.content.items()}


def recorded_seed(folder: str | os.PathLike[str]) -> int | None:
    """Return the ``SEED`` of the run in a folder, or None if there is no run. Every process must call this.

    All checkpoints of a run have the same seed, so that no file is read completely.
    """
    seed = _recorded_seed(Path(folder)) if comm.is_main_process() else None
    return cast("int | None", comm.all_gather(seed)[0])


def _recorded_seed(folder: Path) -> int | None:
    for path in _candidates(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # check the record with the seed: torch ignores its checksum
                archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
            run = open_checkpoint(path).content["trainer"]["run"]
            return int(run["SEED"])
        except Exception as error:  # as in damage()
            logger.debug("no seed in %s: %s", path, error)
    return None


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return ``{setting: "... was A and is B"}`` for the settings that differ from those in the checkpoint."""
    keys = dict.fromkeys([*then, *now])
    return {key: f"{key} was {then.get(key)} and is {now.get(key)}" for key in keys if then.get(key) != now.get(key)}


class PeriodicCheckpoint(HookBase):
    """Saves every ``period`` steps and at the end, and removes old checkpoints.

    Detectron2's hook removes only the checkpoints that its own process has written, so that a run that is interrupted
    often fills the disk.

    Attributes:
        saved: the last iteration that was saved.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        period: int,
        keep: int = 0,
        keep_every: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Create the hook in every process; only the main process writes.

        Args:
            checkpointer: writes the files.
            period: in iterations.
            keep: number of checkpoints to keep, the newest; 0 for all.
            keep_every: checkpoints at multiples of this many iterations are kept as well; 0 for none.
            check: called in every process before each checkpoint; raises if the state must not be saved.
        """
        self.checkpointer, self.check = checkpointer, check
        self.period, self.keep, self.keep_every = period, keep, keep_every
        self.saved = -1

    def after_step(self) -> None:
        """Save if a checkpoint is due."""
        done = self.trainer.iter + 1
        if done % self.period == 0:
            self.save()
        if done == self.trainer.max_iter:
            self._write("model_final")

    def save(self) -> None:
        """Save this step unless it is saved already, and remove old checkpoints."""
        step = self.trainer.iter
        if step == self.saved:
            return
        self._write(f"model_{step:07d}")
        self.saved = step
        if self.keep and comm.is_main_process():
            # Later ones come from a run that was resumed from an earlier checkpoint; this run will overwrite them.
            mine = [path for path in periodic(Path(self.checkpointer.save_dir)) if iteration(path) <= step]
            for path in mine[: -self.keep]:
                if not self.keep_every or (iteration(path) + 1) % self.keep_every:
                    remove(path)

    def _write(self, name: str) -> None:
        self.check()
        self.checkpointer.save(name, iteration=self.trainer.iter)


def periodic(folder: Path) -> list[Path]:
    """Return a run's checkpoints with a number, oldest first."""
    return sorted(folder.glob("model_" + 7 * "[0-9]" + "*.pth"), key=iteration)


def iteration(path: Path) -> int:
    """Return the iteration, from 0, after which a :func:`periodic` checkpoint was written."""
    return int(path.stem.removeprefix("model_"))


def _explain(path: Path, error: OSError) -> str:
    # The folder may have been removed, too.
    room = f" ({shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free)" if path.parent.is_dir() else ""
    pointer = path.parent / _POINTER
    kept = path.parent / pointer.read_text().strip() if pointer.is_file() else "none yet"
    return (
        f"cannot write {path}: {error.strerror}{room}. The last checkpoint is untouched: {kept}. "
        "Make room and continue with --resume"
    )

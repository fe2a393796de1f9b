"""Checkpoints that can be trusted: whole or not there, checked before they are used, and no more than asked for.

``torch.save`` writes zip archives, in which every record carries a CRC-32 and the table of contents comes last: a
truncated or altered checkpoint shows without a second file that would have to be kept in step with the first.
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
    """A checkpoint could not be written; the one before it is as it was."""

    exit_code = EXIT_NOT_WRITTEN


def write_tensors(data: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write a checkpoint file that is whole or not there.

    Raises:
        NotWrittenError: the disk is full, or the file cannot be written for another reason.
    """
    try:
        with atomic_write(path) as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        # torch's writer, failing a second time while it closes the archive, hides the system's error behind its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise NotWrittenError(_explain(Path(path), cause)) from error
    logger.info("wrote %s", path)


def save_run(keeper: Checkpointer, name: str, **extra: Any) -> None:
    """Write ``<name>.pth`` with the model, everything registered with the checkpointer, and ``extra``.

    Raises:
        FloatingPointError: weights are not finite, so that nothing could be continued from them. A finite loss does not
            exclude that: its gradient may be at fault.
    """
    spoilt = [key for key, weight in keeper.model.named_parameters() if not weight.isfinite().all()]
    if spoilt:
        raise FloatingPointError(f"{name}.pth is not written: weights are infinite or NaN ({', '.join(spoilt[:3])})")
    state = {key: item.state_dict() for key, item in keeper.checkpointables.items()}
    write_tensors({"model": keeper.model.state_dict(), **state, **extra}, Path(keeper.save_dir) / f"{name}.pth")


def point_to(keeper: Checkpointer, name: str) -> None:
    """Make ``<name>.pth`` the checkpoint that resuming starts from."""
    try:
        with atomic_write(Path(keeper.save_dir) / _POINTER) as file:
            file.write(f"{name}.pth".encode())
    except OSError as error:
        raise NotWrittenError(_explain(Path(keeper.save_dir) / _POINTER, error)) from error


def last_whole(folder: str | os.PathLike[str]) -> str:
    """Return the last checkpoint of a run that is whole, or nothing where a run has left none.

    The main process reads the file through and decides for all. Every process must call this.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    chosen = _last_whole(Path(folder)) if comm.is_main_process() else ""
    return str(comm.all_gather(chosen)[0])


def _last_whole(folder: Path) -> str:
    candidates = _candidates(folder)
    if not candidates:
        return ""
    problems = []
    for path in candidates:
        problem = " ".join(damage(path).split())
        if not problem:
            return str(path)
        logger.warning("the checkpoint %s is damaged (%s): another is used", path, problem)
        problems.append(f"{path.name}: {problem}")
    raise ValueError(
        f"none of the {len(candidates)} checkpoints in {folder} is whole ({problems[0]}): start again in another "
        "OUTPUT_DIR, or copy one back that is whole elsewhere"
    )


def _candidates(folder: Path) -> list[Path]:
    """Return the checkpoints to resume from, the best first, or none where a run has left none."""
    pointer = folder / _POINTER
    if not pointer.is_file():
        return []
    named = folder / pointer.read_text(errors="replace").strip()
    # Those after the named one are of a run that went another way, or of one killed before it moved the pointer.
    others = sorted(_periodic(folder), key=lambda path: (path.name > named.name, -_iteration(path)))
    return list(dict.fromkeys([named, *others]))


def damage(path: str | os.PathLike[str]) -> str:
    """Say why a checkpoint file cannot be resumed from, having read all of it; empty if it can."""
    try:
        version = FileVersion.now([Path(path)])
    except (OSError, ValueError) as error:  # ValueError: a name that a broken pointer made up
        return f"{type(error).__name__}: {error}"
    # A run asks before it reads data, and again when it starts.
    return _damage(version) if version.settled else _damage.__wrapped__(version)


@lru_cache(maxsize=4)
def _damage(version: FileVersion) -> str:
    (path,) = version.paths
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
        if bad:
            return f"checksum of {bad}"
        read_run(path)  # headers have no checksum; this reads no tensor
    except CheckpointError as error:
        return str(error).removeprefix(f"{path}: ")
    except Exception as error:  # Depending on where the damage is, zipfile raises nearly anything.
        return f"{type(error).__name__}: {error}"
    return ""


def check_resumable(path: str | os.PathLike[str]) -> None:
    """Refuse to resume from a file that holds weights alone: the run would begin anew without a word.

    Raises:
        CheckpointError: it is no checkpoint of a training.
    """
    content = open_checkpoint(path).content
    missing = [key for key in ("model", "trainer") if not isinstance(content.get(key), Mapping)]
    if missing:
        raise CheckpointError(
            f"{path} is no checkpoint of a run that could go on: it holds no {' and no '.join(missing)}; start a new "
            f"run in another OUTPUT_DIR with MODEL.WEIGHTS {path}"
        )


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run's checkpoint for resuming.

    What stands beside the model is copied: optimizers keep what they are given and change it in place, and the tensors
    are views of the mapped file.

    Raises:
        CheckpointError: it cannot be read, or is no run's.
    """
    checkpoint = open_checkpoint(path)
    refuse_stubs(checkpoint, "model")
    return {key: value if key == "model" else copy.deepcopy(value) for key, value in checkpoint.content.items()}


def recorded_seed(folder: str | os.PathLike[str]) -> int | None:
    """Return the ``SEED`` of the run in a folder, or None where there is no run. Every process must call this.

    All checkpoints of a run have the same, so that none is read through for it.
    """
    seed = _recorded_seed(Path(folder)) if comm.is_main_process() else None
    return cast("int | None", comm.all_gather(seed)[0])


def _recorded_seed(folder: Path) -> int | None:
    for path in _candidates(folder):
        try:
            with zipfile.ZipFile(path) as archive:  # The record that the seed is in: torch ignores its checksum.
                archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
            run = open_checkpoint(path).content["trainer"]["run"]
            return int(run["SEED"])
        except Exception as error:  # as in damage()
            logger.debug("no seed in %s: %s", path, error)
    return None


def changed_settings(then: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Return, by name and in words, the settings in which a run differs from the one that left the checkpoint."""
    keys = dict.fromkeys([*then, *now])
    return {key: f"{key} was {then.get(key)} and is {now.get(key)}" for key in keys if then.get(key) != now.get(key)}


class PeriodicCheckpoint(HookBase):
    """Save every ``period`` steps and at the end, and remove old checkpoints.

    Detectron2's own hook knows only the checkpoints of its own process, so that a run that is interrupted often fills
    the disk.

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
        """Set up, in every process; only the main one writes.

        Args:
            checkpointer: writes.
            period: in iterations.
            keep: number of checkpoints to keep, the newest; 0 for all.
            keep_every: those after every so many iterations are kept besides; 0 for none.
            check: called in every process before each checkpoint; raises where there is nothing worth saving.
        """
        self.checkpointer, self.check = checkpointer, check
        self.period, self.keep, self.keep_every = period, keep, keep_every
        self.saved = -1

    def after_step(self) -> None:
        """Save if it is time."""
        done = self.trainer.iter + 1
        if done % self.period == 0:
            self.save()
        if done == self.trainer.max_iter:
            self._write("model_final")

    def save(self) -> None:
        """Save this step, unless it is saved already, and remove what is too old."""
        step = self.trainer.iter
        if step == self.saved:
            return
        self._write(f"model_{step:07d}")
        self.saved = step
        if self.keep and comm.is_main_process():
            # Later ones are left by a run that was continued from an earlier place; this one comes to them yet.
            mine = [path for path in _periodic(Path(self.checkpointer.save_dir)) if _iteration(path) <= step]
            for path in mine[: -self.keep]:
                if not self.keep_every or (_iteration(path) + 1) % self.keep_every:
                    remove(path)

    def _write(self, name: str) -> None:
        self.check()
        self.checkpointer.save(name, iteration=self.trainer.iter)


def _periodic(folder: Path) -> list[Path]:
    """Return the checkpoints with a number, oldest first."""
    return sorted(folder.glob("model_" + 7 * "[0-9]" + "*.pth"), key=_iteration)


def _iteration(path: Path) -> int:
    return int(path.stem.removeprefix("model_"))


def _explain(path: Path, error: OSError) -> str:
    # The folder may be gone, too.
    room = f" ({shutil.disk_usage(path.parent).free / 2**20:.1f} MiB free)" if path.parent.is_dir() else ""
    pointer = path.parent / _POINTER
    kept = path.parent / pointer.read_text().strip() if pointer.is_file() else "none yet"
    return (
        f"cannot write {path}: {error.strerror}{room}. The last checkpoint is untouched: {kept}. "
        "Make room and continue with --resume"
    )

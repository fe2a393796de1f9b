"""A run's folder, ``OUTPUT_DIR``: one command at a time writes there, and none over what another one left."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from detectron2.utils import comm

from moco_d2.io import files, locks
from moco_d2.running.checkpoints import check_resumable, last_whole

logger = logging.getLogger(__name__)

# Seconds that --resume waits for the command before it: what was killed a moment ago may still be ending.
PATIENCE = 60.0

_POINTER = "last_checkpoint"
# What only a run leaves that has trained. A fresh one would mix with it.
_TRAINED = (
    _POINTER, "model_" + 7 * "[0-9]" + "*.pth", "model_final.pth", "backbone.pth", "metrics.json", "results.json",
)  # fmt: skip
# What training and evaluation write besides; the copies in datasets/ are looked after where they are made.
_TRAINING = (
    *_TRAINED, "classes.json", "config.yaml", "log.txt", "log.txt.rank*", "events.out.tfevents.*", "inference", "TTA",
    "skipped.jsonl", "training_subset.json",
)  # fmt: skip
_EVALUATION = ("eval_only", "inference", "TTA", "results_eval_only.json")
# What Detectron2 opens for writing as it stands: through a link, it would write into the file that the link leads to.
_OPENED = ("config.yaml", "log.txt", "metrics.json", "skipped.jsonl", "eval_only/config.yaml", "eval_only/log.txt")


def claim(output_dir: str, resume: bool = False, evaluates: bool = False) -> None:
    """Take a run's folder for this command until its processes end. Every process must call this.

    The main process decides for all: with several machines, too, one process holds the lock.

    Args:
        output_dir: ``OUTPUT_DIR``.
        resume: whether the run in it is continued.
        evaluates: whether a detector is only evaluated.

    Raises:
        ValueError: another command writes there, something is there that would be overwritten or mixed with, or
            nothing can be written.
    """
    problem = ""
    if comm.is_main_process():
        try:
            _claim(Path(output_dir), resume, evaluates)
        except ValueError as error:
            problem = str(error)
    problem = str(comm.all_gather(problem)[0])
    if problem:
        raise ValueError(problem)


def check(output_dir: str, resume: bool = False) -> None:
    """Refuse, for a dry run, what :func:`claim` would refuse for a training, or a resumed one; nothing is written.

    Every process must call this.

    Raises:
        ValueError: it would.
    """
    files.check_folder(output_dir, "OUTPUT_DIR")
    if not resume:
        refuse_to_overwrite(output_dir)
    _refuse_links(Path(output_dir))
    files.check_claim(output_dir, _TRAINING, "OUTPUT_DIR", resume and _trusted(Path(output_dir)))
    if resume and (path := last_whole(output_dir)):
        check_resumable(path)


def refuse_to_overwrite(output_dir: str) -> None:
    """Raise ValueError when a folder holds a run, over which a new one would write.

    A run is told by what training leaves: ``last_checkpoint``, ``model_*.pth``, ``backbone.pth``, ``results.json``, or
    a ``metrics.json`` with a line in it. A command that ended before its first step leaves a log and a config, and may
    be given again.
    """
    folder = Path(output_dir)
    for pattern in _TRAINED:
        for path in sorted(folder.glob(pattern)):
            if path.name == "metrics.json" and path.is_file() and not path.stat().st_size:
                continue
            name = path.read_text(errors="replace").strip() if pattern == _POINTER and path.is_file() else path.name
            raise ValueError(
                f"{output_dir} holds a run already ({name}): continue it with --resume, or choose another OUTPUT_DIR"
            )


def _claim(folder: Path, resume: bool, evaluates: bool) -> None:
    fresh = not (resume or evaluates)
    if fresh:
        refuse_to_overwrite(str(folder))
    files.make_folder(folder, "OUTPUT_DIR")
    _refuse_links(folder)
    _lock(folder, PATIENCE if resume else 0)
    if resume and _trusted(folder):
        files.remove_leftovers(folder)  # With the lock held, nobody is writing there.
    if fresh:  # The command that held the lock may have left a run.
        refuse_to_overwrite(str(folder))
    files.claim(folder, _EVALUATION if evaluates else _TRAINING, "OUTPUT_DIR", not fresh and _trusted(folder))


def _trusted(folder: Path) -> bool:
    """Tell whether a folder is a run's by its pointer: of ours from before there were notes, or of Detectron2's."""
    return (folder / _POINTER).is_file()


def _refuse_links(folder: Path) -> None:
    for path in (folder / name for name in _OPENED):
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            raise ValueError(
                f"{path} is a link, and writing into it would change another file: put a copy in its place, or choose "
                "another OUTPUT_DIR"
            )


def _lock(folder: Path, patience: float) -> None:
    path, deadline = folder / locks.LOCK, time.monotonic() + patience
    with files.one_line(folder, "OUTPUT_DIR"):
        while not locks.holds(path) and locks.lock(path) is None:
            if time.monotonic() > deadline:
                raise ValueError(
                    f"another command writes to OUTPUT_DIR {folder} ({locks.holder(path)}): wait for its end, or "
                    "choose another OUTPUT_DIR"
                )
            if patience:
                logger.warning("waiting for the end of %s, which writes to %s", locks.holder(path), folder)
            time.sleep(min(5.0, patience / 4))

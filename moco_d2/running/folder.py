"""The folder of a run, ``OUTPUT_DIR``: one command at a time writes there, and none overwrites another run."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from detectron2.utils import comm

from moco_d2.io import files, locks
from moco_d2.running.checkpoints import check_resumable, last_intact

logger = logging.getLogger(__name__)

# Seconds that --resume waits for the previous command: one that was killed a moment ago may still be ending.
RESUME_TIMEOUT = 60.0

_POINTER = "last_checkpoint"
# Files that only a run that has trained leaves. A new run would mix with it.
_TRAINED = (
    _POINTER, "model_" + 7 * "[0-9]" + "*.pth", "model_final.pth", "backbone.pth", "metrics.json", "results.json",
    "probe.json",
)  # fmt: skip
# All files that training and evaluation write, without the copies of labels in datasets/ (detection/labels/).
_TRAINING = (
    *_TRAINED, "classes.json", "config.yaml", "log.txt", "log.txt.rank*", "events.out.tfevents.*", "inference", "TTA",
    "skipped.jsonl", "training_subset.json",
)  # fmt: skip
_EVALUATION = ("eval_only", "inference", "TTA", "results_eval_only.json")
# Files that Detectron2 opens for writing in place: through a link, it would write into the file behind the link.
_OPENED = ("config.yaml", "log.txt", "metrics.json", "skipped.jsonl", "eval_only/config.yaml", "eval_only/log.txt")


def claim(output_dir: str, resume: bool = False, evaluates: bool = False) -> None:
    """Claim a run's folder for this command until its processes end. Every process must call this.

    The main process decides for all processes, on several machines as well, and holds the lock.

    Args:
        output_dir: ``OUTPUT_DIR``.
        resume: whether the run in it is continued.
        evaluates: whether a detector is evaluated only.

    Raises:
        ValueError: another command writes there, files there would be overwritten or mixed with the run's, or the
            folder cannot be written to.
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
    """Check, for a dry run, that :func:`claim` would not refuse a training, or a resumed one; nothing is written.

    Every process must call this.

    Raises:
        ValueError: it would refuse it.
    """
    files.check_folder(output_dir, "OUTPUT_DIR")
    if not resume:
        refuse_to_overwrite(output_dir)
    if locks.is_held(lock := Path(output_dir, locks.LOCK)):
        raise ValueError(_occupied(lock))
    _refuse_links(Path(output_dir))
    files.check_claim(output_dir, _TRAINING, "OUTPUT_DIR", resume and _trusted(Path(output_dir)))
    if resume and (path := last_intact(output_dir)):
        check_resumable(path)


def refuse_to_overwrite(output_dir: str) -> None:
    """Refuse a folder in which a new run would overwrite another one.

    A run is recognised by ``last_checkpoint``, ``model_*.pth``, ``backbone.pth``, ``results.json``,
    ``probe.json``, or a ``metrics.json`` that is not empty. A command that ended before its first step leaves a log and
    a config only, and may be repeated.

    Raises:
        ValueError: the folder contains a run.
    """
    folder = Path(output_dir)
    for pattern in _TRAINED:
        for path in sorted(folder.glob(pattern)):
            if path.name == "metrics.json" and path.is_file() and not path.stat().st_size:
                continue
            name = path.read_text(errors="replace").strip() if pattern == _POINTER and path.is_file() else path.name
            raise ValueError(
                f"{output_dir} contains a run already ({name}): continue it with --resume, or choose another OUTPUT_DIR"
            )


def _claim(folder: Path, resume: bool, evaluates: bool) -> None:
    fresh = not (resume or evaluates)
    if fresh:
        refuse_to_overwrite(str(folder))
    files.make_folder(folder, "OUTPUT_DIR")
    _refuse_links(folder)
    _lock(folder, RESUME_TIMEOUT if resume else 0)
    if resume and _trusted(folder):
        files.remove_leftovers(folder)  # this command holds the lock, so no other one is writing
    if fresh:  # the command that held the lock before may have left a run
        refuse_to_overwrite(str(folder))
    files.claim(folder, _EVALUATION if evaluates else _TRAINING, "OUTPUT_DIR", not fresh and _trusted(folder))


def _trusted(folder: Path) -> bool:
    """Tell by its pointer whether a folder is a run's: Detectron2's, or of a version that did not list its files."""
    return (folder / _POINTER).is_file()


def _refuse_links(folder: Path) -> None:
    for path in (folder / name for name in _OPENED):
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            raise ValueError(
                f"{path} is a link, and writing to it would change another file: replace it by a copy, or choose "
                "another OUTPUT_DIR"
            )


def _occupied(lock: Path) -> str:
    return (
        f"another command writes to OUTPUT_DIR {lock.parent} ({locks.holder(lock)}): wait until it ends, or choose "
        "another OUTPUT_DIR"
    )


def _lock(folder: Path, timeout: float) -> None:
    path, deadline = folder / locks.LOCK, time.monotonic() + timeout
    with files.one_line(folder, "OUTPUT_DIR"):
        while not locks.holds(path) and locks.lock(path) is None:
            if time.monotonic() > deadline:
                raise ValueError(_occupied(path))
            if timeout:
                logger.warning("waiting for %s, which writes to %s, to end", locks.holder(path), folder)
            time.sleep(min(5.0, timeout / 4))

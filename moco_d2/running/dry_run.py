"""Findings that the dry runs of both stages share: parameters, peak memory, times, problems."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moco_d2.running.progress import peak_memory_gib


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Discard what libraries print, such as COCO's evaluation."""
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield


def one_list(problems: Sequence[str], most: int = 100) -> str:
    """Return problems as one message, a line each: the first ``most``, and the number of the others."""
    lines = [" ".join(problem.split()) for problem in problems[:most]]
    return "\n".join([*lines, f"... and {len(problems) - most} more problems"] if len(problems) > most else lines)


def recipe(name: str, changes: Sequence[str] | None) -> str:
    """Return a recipe's or protocol's name and its changes; ``changes`` is None for a name that is not shipped."""
    if changes is None:
        return f"{name or 'none'}, not a shipped one, so there are no published figures for it"
    return name + (", as shipped" if not changes else f", modified: {' '.join(changes)}")


def parameters(model: nn.Module) -> str:
    """Return the numbers of parameters and of trained parameters of a network, as text."""
    counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or not trained) for trained in (False, True)]
    return f"{counts[0] / 1e6:.1f} M parameters, {counts[1] / 1e6:.1f} M trained"


def peak_memory() -> str:
    """Return the peak memory of this process, as text: on the GPU if there is one."""
    on = f"on {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "in this process"
    return f"{peak_memory_gib():.1f} GiB peak {on}"


def duration(seconds: float) -> str:
    """Return a time as ``days, h:mm:ss``."""
    return str(datetime.timedelta(seconds=round(seconds)))

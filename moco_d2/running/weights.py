"""The file of ``MODEL.WEIGHTS``: local or downloaded, and safe to train from."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from detectron2.utils.file_io import PathManager

from moco_d2.io import forms
from moco_d2.io.checkpoints import Checkpoint, CheckpointError, some
from moco_d2.io.sharded import find_index


def local_path(path: str, what: str = "MODEL.WEIGHTS") -> str:
    """Return the local path of a file in a config; an address is downloaded first.

    Args:
        path: a path or an address.
        what: the key, for messages.

    Raises:
        ValueError: it cannot be downloaded, is a folder without weights, or does not exist.
    """
    bare = urlparse(path)._replace(query="").geturl()  # Detectron2 accepts FILE?matching_heuristics=True
    try:
        local = PathManager.get_local_path(bare)
    except Exception as error:  # network libraries raise nearly anything
        raise ValueError(
            f"{what} {path} could not be downloaded ({error}).\n  Download it elsewhere and give the file's path"
        ) from error
    if os.path.isfile(local):
        return str(local)
    if os.path.isdir(local):
        index = find_index(Path(local))
        if index is None:
            raise ValueError(f"{what} {path}: {forms.of_folder(Path(local))}")
        return str(index)
    folder = os.path.dirname(local) or "."
    beside = os.listdir(folder) if os.path.isdir(folder) else []
    near = difflib.get_close_matches(os.path.basename(local), beside, n=3)
    hint = f"; nearest in {folder}: {', '.join(near)}" if near else ""
    raise ValueError(f"{what} {path} does not exist{hint}")


def refuse_stubs(checkpoint: Checkpoint, place: str) -> None:
    """Refuse to train from a file that names classes or functions, which the safe reader does not load.

    Args:
        checkpoint: the file.
        place: dotted path of its weights, empty for the top level.

    Raises:
        CheckpointError: the file names code; the message has a command that writes the weights alone.
    """
    if checkpoint.stubbed:
        path = checkpoint.path
        raise CheckpointError(
            f"{path}: refers to Python code ({some(checkpoint.stubbed, 3)}), and training reads files of tensors and "
            "plain values only; write the weights to a file of their own, which does not run that code: "
            + command_for_weights_alone(path, checkpoint.content, place)
        )


def command_for_weights_alone(
    path: str | os.PathLike[str], content: Mapping[str, Any], place: str, part: str = ""
) -> str:
    """Return the command that writes a file's weights, with the facts about their input, to a file of their own.

    Args:
        path: the file.
        content: of the file.
        place: dotted path of the weights in it, empty for the top level, or for that of its parts (``part.name``) if
            the top level has no tensors.
        part: text that the wanted names contain; empty for all names.
    """
    wanted = f"{json.dumps(part)} in k and " if part else ""
    items = "c" + "".join(f"[{json.dumps(key)}]" for key in place.split(".") if key) + ".items()"
    if not place and not any(hasattr(value, "shape") for value in content.values()):
        items = '((f"{a}.{b}", v) for a, p in c.items() if hasattr(p, "items") for b, v in p.items())'
    kept = [key for key in ("facts", "matching_heuristics", "__author__") if key in content]
    return forms.python(
        "import torch; from moco_d2.convert import read_checkpoint; "
        f"c = read_checkpoint({forms.text(Path(path))}); "
        f'm = {{k: torch.as_tensor(v) for k, v in {items} if {wanted}hasattr(v, "shape")}}; '
        f'torch.save({{"model": m{"".join(f", {json.dumps(key)}: c[{json.dumps(key)}]" for key in kept)}}}, '
        f"{forms.text(forms.beside(Path(path)))})"
    )

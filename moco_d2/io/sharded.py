"""Checkpoints in several files, with an index (``*.index.json``, as Hugging Face writes) of which part holds what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moco_d2.io.errors import CheckpointError, some

INDEX = ".index.json"

_INDEX_BYTES = 1 << 26  # the index of 400 GB of weights has some 10 MB
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.[A-Za-z]+$")


def find_index(folder: Path) -> Path | None:
    """Return the index in a folder, preferably that of safetensors, or None."""
    found = sorted(folder.glob(f"*{INDEX}"), key=lambda path: ("safetensors" not in path.name, path.name))
    return found[0] if found else None


def refuse_part(path: Path) -> None:
    """Refuse a single part of several.

    Raises:
        CheckpointError: the file is one; the message names the index.
    """
    part = _PART.search(path.name)
    if not part or int(part[2]) == 1:
        return
    start = path.name[: part.start()]
    index = next((index for index in path.parent.glob(f"*{INDEX}") if index.name.startswith(start)), None)
    advice = (
        f"give the index: {index}" if index else f"download the whole folder, with its {start}.*{INDEX}, and give that"
    )
    raise CheckpointError(f"{path}: part {int(part[1])} of {int(part[2])} of a checkpoint; {advice}")


def parts_of(index: Path) -> dict[Path, set[str]]:
    """Return part -> names of its tensors.

    Raises:
        CheckpointError: the index is damaged, or names parts that are not in its folder.
    """
    if index.stat().st_size > _INDEX_BYTES:
        raise CheckpointError(
            f"{index}: larger than {_INDEX_BYTES >> 20} MB, too large for an index; give the checkpoint's own index"
        )
    try:
        places = json.loads(index.read_bytes(), object_pairs_hook=_without_repetition)["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{index}: not an index of parts ({type(error).__name__}: {' '.join(str(error).split())[:120]}); it must "
            "be JSON with a `weight_map`; download it again"
        ) from error
    if not isinstance(places, Mapping) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: its `weight_map` must name a part for each tensor; download it again")
    found: dict[Path, set[str]] = {}
    for key, name in places.items():
        if name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            raise CheckpointError(
                f"{index}: names the part {name!r}; it must be the name of a file in the folder of the index"
            )
        found.setdefault(index.with_name(name), set()).add(key)
    missing = sorted(path.name for path in found if not path.is_file())
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of {len(found)} parts are missing ({some(missing)}); download them into the "
            "same folder"
        )
    return found


def join(index: Path, parts: Mapping[Path, set[str]], read: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
    """Read all parts into one mapping.

    Args:
        index: for messages.
        parts: of :func:`parts_of`.
        read: the reader of one part.

    Raises:
        CheckpointError: a part lacks a tensor of the index, or two parts hold the same one.
    """
    content: dict[str, Any] = {}
    for path, names in parts.items():
        held = read(path)
        for found, words in (
            (content.keys() & held.keys(), "holds tensors that another part holds too"),
            (names - held.keys(), "lacks tensors that the index says it holds"),
        ):
            if found:
                raise CheckpointError(
                    f"{index}: {path.name} {words} ({some(sorted(map(str, found)), 3)}); the parts come from different "
                    "downloads; download all of them again"
                )
        content.update(held)
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("it has a name twice")
    return content

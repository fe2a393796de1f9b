"""Small parts of a labelled set: those that a list of files names, or a draw of as many pictures of each class."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path, PurePosixPath

import numpy as np

from moco_d2.data.labelled import LabelledSet
from moco_d2.io.errors import some
from moco_d2.seeding import stream_seed


def listed(pictures: LabelledSet, path: Path) -> LabelledSet:
    """Return the pictures that a file lists, in the set's order.

    Args:
        pictures: the set.
        path: a text file with a name a line: a file's name, as in SimCLR's ``1percent.txt``, or the end of its path.
            Of a detection data set, a picture stands for all its objects.

    Raises:
        ValueError: the file cannot be read or is empty; a name is not in the set, stands for several files, or is there
            twice; or a class of the set has no picture.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"the list {path} cannot be read ({error}); give a text file with a name a line") from error
    names = ["/".join(PurePosixPath(line.strip()).parts).lstrip("/") for line in lines if line.strip()]
    if not names:
        raise ValueError(f"the list {path} is empty; it must name a picture a line")
    found: dict[str, list[int]] = {name: [] for name in names}
    for parts in sorted({name.count("/") + 1 for name in found}):
        for number, file in enumerate(pictures.files):
            if (end := "/".join(file.rsplit("/", parts)[-parts:])) in found:
                found[end].append(number)
    if missing := [name for name, numbers in found.items() if not numbers]:
        raise ValueError(
            f"the list {path} names {len(missing)} pictures that are not in {pictures.name}: {some(missing, 3)}; take "
            "the list that was made for this set"
        )
    if several := [name for name, numbers in found.items() if len({pictures.files[n] for n in numbers}) > 1]:
        raise ValueError(
            f"the list {path} has {len(several)} names that stand for several files of {pictures.name}: "
            f"{some(several, 3)}; write more of their paths"
        )
    files = Counter(pictures.files[found[name][0]] for name in names)
    if twice := [file for file, count in files.items() if count > 1]:
        raise ValueError(f"the list {path} names {len(twice)} pictures more than once: {some(twice, 3)}; remove them")
    part = pictures.part(sorted(number for numbers in found.values() for number in numbers))
    empty = set(pictures.without_pictures())
    if without := [name for name in part.without_pictures() if name not in empty]:
        raise ValueError(
            f"the list {path} has no picture of {len(without)} of the {len(pictures.classes)} classes: "
            f"{some(without, 3)}; a classifier needs some of each"
        )
    return part


def drawn(pictures: LabelledSet, percent: float, seed: int) -> LabelledSet:
    """Return a random part with as many pictures of each class, in the set's order; a small class is taken whole.

    With the same seed a smaller part is in a larger one.

    Args:
        pictures: the set.
        percent: of its pictures, in (0, 100]; at least one of each class is drawn.
        seed: of the draw.

    Raises:
        ValueError: the percentage is out of range.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"--percent is {percent:g}; it must be above 0 and at most 100")
    labels, generator = pictures.labels.numpy(), np.random.default_rng(stream_seed(seed))
    classes = np.unique(labels)
    each = max(1, round(percent / 100 * len(labels) / len(classes)))
    chosen = [generator.permutation(np.flatnonzero(labels == one))[:each] for one in classes]
    return pictures.part(np.sort(np.concatenate(chosen)).tolist())


def as_list(part: LabelledSet, whole: LabelledSet) -> bytes:
    """Return the text of a list for :func:`listed`: the path of each file in the folder that holds the whole set.

    Raises:
        ValueError: the pictures are objects, of which several may be in a file.
    """
    if whole.boxes is not None:
        raise ValueError(f"{whole.name} consists of objects, which a list of files cannot name: leave out --write-list")
    root = os.path.commonpath([os.path.dirname(file) for file in whole.files])
    names = dict.fromkeys(os.path.relpath(file, root) for file in part.files)
    return "".join(f"{name}\n" for name in names).encode()

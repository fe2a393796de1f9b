"""Entries of ``DATASETS.CUSTOM``, and checks that VOC and COCO labels share.

Labels are read, validated and normalised to the form that Detectron2's loaders, pycocotools and the evaluators expect.
A missing or unusual value is filled in or converted if its meaning is certain (``iscrowd``, ``area``, ``difficult``,
ids that are text or start at 0). Anything else is a problem, reported with file, line and record. ``report`` either
raises at the first problem (a run) or collects them all (``--dry-run``).

``files.py`` opens label files, ``fields.py`` holds the rules of their fields, ``coco.py`` and ``voc.py`` read the two
formats.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from moco_d2.io.files import name_problem
from moco_d2.io.paths import expand
from moco_d2.io.pictures import describe, picture_size
from moco_d2.messages import did_you_mean

Report = Callable[[str], None]

_KEYS = (
    "name", "format", "root", "json", "annotations", "images", "split", "classes", "leave_out", "bad_labels", "mirror",
)  # fmt: skip
_BAD_LABELS = ("refuse", "drop")
# Pixels by which a box may extend beyond its image: tools round, and some count VOC's coordinates from 0, not from 1.
_SLACK = 1.0
# What differs between two faults of the same kind: paths and numbers.
_VARYING = re.compile(r"\S*/\S*|-?\d[\d.e+-]*")
_ALIKE = 5  # faults of one kind that are always listed one by one


@dataclass(frozen=True)
class Entry:
    """One item of ``DATASETS.CUSTOM``; its fields are explained in ``moco_d2/config/keys.py``."""

    name: str
    format: str
    root: Path
    json: Path | None
    images: Path | None
    split: str
    classes: tuple[str, ...]
    leave_out: tuple[str, ...] = ()
    mirror: tuple[tuple[str, str], ...] | None = None
    annotations: Path | None = None
    bad_labels: str = "refuse"


@dataclass(frozen=True)
class Needs:
    """What a config requires of labels.

    Attributes:
        masks: every object needs a mask.
        polygons: masks must be polygons.
        keypoints: number of keypoints of an object; 0 if none are needed.
        sizes: compare each picture's size with its labels; this opens every picture.
        trains: the data set is trained on, so it must have objects.
        flip: how pictures are mirrored in training (``INPUT.RANDOM_FLIP``).
    """

    masks: bool = False
    polygons: bool = False
    keypoints: int = 0
    sizes: bool = False
    trains: bool = True
    flip: str = "none"

    @classmethod
    def of(cls, cfg: CfgNode, sizes: bool, trains: bool = True) -> Needs:
        """Read the needs from a detector's config."""
        keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0
        polygons = cfg.INPUT.MASK_FORMAT == "polygon"
        return cls(cfg.MODEL.MASK_ON, polygons, keypoints, sizes, trains, cfg.INPUT.RANDOM_FLIP)


class Setting(str):
    """A problem that a key of the config solves: the object itself is not bad."""


@dataclass
class Faults:
    """Faults of a data set's objects or pictures; those of bad objects can be dropped (``bad_labels: drop``).

    Attributes:
        entry: the data set.
        report: gets the faults that are not dropped.
        total: number of objects or pictures that were looked at.
        refused: whether :meth:`settle` reported a fault.
    """

    entry: Entry
    report: Report
    total: int = 0
    refused: bool = False
    _found: list[tuple[str, str, bool]] = field(default_factory=list)

    def add(self, where: str, problem: str, bad: bool = False) -> None:
        """Note a fault.

        Args:
            where: the beginning of its message, which tells the place.
            problem: the rest, which tells what is wrong.
            bad: whether the labels of one object are wrong, so that the set can be used without it.
        """
        self._found.append((where, problem, bad and not isinstance(problem, Setting)))

    def settle(self) -> list[str]:
        """Report the faults; return those whose objects are dropped instead, a line each.

        Faults of one kind are reported in one line if more than half of the set has them. The set then is in another
        form than expected, and is not used without those objects either.
        """
        bad = [where + problem for where, problem, droppable in self._found if droppable]
        drops = self.entry.bad_labels == "drop" and len(bad) <= self.total / 2
        rest = [fault for fault in self._found if not (drops and fault[2])]
        self.refused = bool(rest)
        kinds = Counter(_kind(problem) for _, problem, _ in rest)
        told: set[str] = set()
        for where, problem, droppable in rest:
            kind = _kind(problem)
            if kinds[kind] > max(_ALIKE, self.total / 2):
                if kind not in told:
                    self.report(
                        f"{where}{problem} (and {kinds[kind] - 1} more of {self.total} alike: the whole set is in "
                        "another form)"
                    )
                told.add(kind)
                continue
            if droppable and "bad" not in told:
                problem += self._way_out(len(bad))
                told.add("bad")
            self.report(where + problem)
        return bad if drops else []

    def _way_out(self, bad: int) -> str:
        if self.entry.bad_labels == "drop":
            return f"; bad_labels: drop is for single objects, and {bad} of {self.total} are bad"
        hint = "; to drop bad objects add bad_labels: drop to the entry of DATASETS.CUSTOM"
        return hint * bool(self.entry.bad_labels)


def _kind(problem: str) -> str:
    return _VARYING.sub("", problem)


def parse_entries(items: Sequence[Any], report: Report) -> list[Entry]:
    """Read ``DATASETS.CUSTOM``; invalid items are reported and left out."""
    entries: dict[str, Entry] = {}
    for number, item in enumerate(items):
        where = f"DATASETS.CUSTOM[{number}]"
        problems = list(_entry_problems(item))
        if not problems and item["name"] in entries:
            problems = [f"another entry has the name {item['name']!r}; choose a new one"]
        for problem in problems:
            report(f"{where}: {problem}")
        if not problems:
            entries[item["name"]] = _entry(item)
    return list(entries.values())


def _entry_problems(item: Any) -> Iterator[str]:
    if not isinstance(item, Mapping):
        yield f"{item!r} is not a mapping; write {{name: ..., format: voc or coco, root: ...}}"
        return
    for key in item:
        if key not in _KEYS:
            yield f"unknown key {key!r}; the keys are {', '.join(_KEYS)}{did_you_mean(key, _KEYS)}"
    for key in ("name", "format"):
        if not isinstance(item.get(key), str) or not item[key]:
            yield f"{key} is missing; it must be text"
    # A path is refused, not shortened, because DATASETS.TRAIN and the results use the same name.
    if isinstance(item.get("name"), str) and item["name"] and (problem := name_problem(item["name"])):
        last = Path(item["name"]).name
        plain = last if name_problem(last) is None else "mine"
        yield f"name {item['name']!r} {problem}; files are named after it: choose a plain name such as {plain!r}"
    if isinstance(item.get("format"), str) and item["format"] not in ("voc", "coco"):
        yield f"format is {item['format']!r}; it must be voc or coco"
    for key in ("root", "json", "annotations", "images", "split"):
        if not isinstance(item.get(key, ""), str):
            yield f"{key} is {item[key]!r}; it must be text"
    if item.get("format") == "voc" and not item.get("root"):
        yield "root is missing; it must be the folder that holds Annotations and JPEGImages"
    if item.get("format") == "voc" and item.get("json"):
        yield "json is a key of format coco; remove it, or change format"
    if item.get("format") == "coco" and item.get("annotations"):
        yield "annotations is a key of format voc; the labels of format coco are in json"
    if (bad := item.get("bad_labels", _BAD_LABELS[0])) not in _BAD_LABELS:
        yield f"bad_labels is {bad!r}; it must be {' or '.join(_BAD_LABELS)}"
    if item.get("format") == "coco" and not any(item.get(key) for key in ("json", "split", "images")):
        yield "json is missing; it must be the file with the labels (or give root and split)"
    for key in ("classes", "leave_out"):
        names = item.get(key, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            yield f"{key} is {names!r}; it must be a list of names"
            return
        if len({*names}) != len(names):
            yield f"{key} names {next(c for c in names if list(names).count(c) > 1)!r} twice"
    for name in item.get("leave_out", []):
        if name in item.get("classes", []):
            yield f"leave_out names {name!r}, and so does classes; remove it from one of them"
    yield from _mirror_problems(item)


def _mirror_problems(item: Mapping[str, Any]) -> Iterator[str]:
    pairs = item.get("mirror")
    if pairs is None:
        return
    if item.get("format") == "voc":
        yield "mirror is a key of format coco, because VOC labels have no keypoints; remove it"
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in pairs
    ):
        yield f"mirror is {pairs!r}; it must be a list of pairs of keypoint names, [[left, right], ...]"
        return
    names = [name for pair in pairs for name in pair]
    if len({*names}) != len(names):
        yield f"mirror names {next(name for name in names if names.count(name) > 1)!r} twice"


def _entry(item: Mapping[str, Any]) -> Entry:
    root = Path(expand(item.get("root", ".")))
    split, labels, images = (item.get(key, "") for key in ("split", "json", "images"))
    if item["format"] == "coco" and split:  # COCO's own layout
        labels = labels or f"annotations/instances_{split}.json"
        images = images or split
    folders = {"json": labels, "images": images, "annotations": item.get("annotations", "")}
    under = {key: root / expand(value) if value else None for key, value in folders.items()}
    if item["format"] == "coco" and under["images"] is None:
        under["images"] = root
    mirror = item.get("mirror")
    return Entry(
        item["name"], item["format"], root, split=split, **under,
        classes=tuple(item.get("classes", ())), leave_out=tuple(item.get("leave_out", ())),
        mirror=None if mirror is None else tuple((left, right) for left, right in mirror),
        bad_labels=item.get("bad_labels", _BAD_LABELS[0]),
    )  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """Return names for a message, at most ten of them."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "") or "none"


def size_problem(path: Path, labelled: tuple[int, int]) -> str | None:
    """Return how a picture differs from the (width, height) in its labels, or None."""
    try:
        found = picture_size(path)
    except OSError as error:
        return f"{path} cannot be read as a picture: {describe(error)}"
    if found == labelled:
        return None
    return (
        f"gives the size {labelled[0]} x {labelled[1]}, but {path} has {found[0]} x {found[1]} pixels (EXIF rotation "
        "applied); correct the labels, or save the picture upright"
    )


def box_problem(box: Sequence[float], width: float, height: float) -> str | None:
    """Return what is wrong with a box (x0, y0, x1, y1) of an image, or None; it completes "has a box that ..."."""
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return "has zero area; correct it, or remove the object"
    # Detectron2 clips boxes to the image, and trains on none that is then empty.
    if outside(box, width, height) or x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        return f"lies outside the image of {width:g} x {height:g}; correct it, or remove the object"
    return None


def outside(box: Sequence[float], width: float, height: float) -> bool:
    """Return whether a box (x0, y0, x1, y1) extends beyond its image by more than a pixel."""
    x0, y0, x1, y1 = box
    return min(x0, y0) < -_SLACK or x1 > width + _SLACK or y1 > height + _SLACK

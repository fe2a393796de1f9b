"""Users' own data sets (``DATASETS.CUSTOM``): the entries, and what checks of VOC and COCO labels have in common.

Labels are read, checked and normalised to what Detectron2's loaders, pycocotools and the evaluators expect.
What a file leaves out is filled in where its meaning is certain (``iscrowd``, ``area``, ``difficult``, ids that are
words or start at 0); all else is a problem, named by file, line and record. Problems go to ``report``, which collects
them or raises: one path serves the run that stops at the first and ``--dry-run``, which tells all.

``label_files.py`` opens the files, ``custom_fields.py`` holds the rules of their fields, ``custom_coco.py`` and
``custom_voc.py`` read the two formats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from moco_d2.io.files import name_problem
from moco_d2.io.paths import expand
from moco_d2.io.pictures import describe, picture_size
from moco_d2.messages import did_you_mean

Report = Callable[[str], None]

_KEYS = ("name", "format", "root", "json", "images", "split", "classes", "leave_out", "mirror")
# Pixels by which a box may leave its image: tools round, and some write VOC boxes from 0 instead of 1.
_SLACK = 1.0


@dataclass(frozen=True)
class Entry:
    """One item of ``DATASETS.CUSTOM``; see ``moco_d2/config/__init__.py`` for the meaning of its fields."""

    name: str
    format: str
    root: Path
    json: Path | None
    images: Path | None
    split: str
    classes: tuple[str, ...]
    leave_out: tuple[str, ...] = ()
    mirror: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True)
class Needs:
    """What the config wants of labels.

    Attributes:
        masks: every object needs one.
        polygons: masks must be polygons.
        keypoints: their number; 0 for none.
        sizes: compare every picture with the size in its labels, which opens all of them.
        trains: the set is trained on: it must have objects.
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


def parse_entries(items: Sequence[Any], report: Report) -> list[Entry]:
    """Read ``DATASETS.CUSTOM``; items that cannot be understood are reported and left out."""
    entries: dict[str, Entry] = {}
    for number, item in enumerate(items):
        where = f"DATASETS.CUSTOM[{number}]"
        problems = list(_entry_problems(item))
        if not problems and item["name"] in entries:
            problems = [f"the name {item['name']!r} is used twice"]
        for problem in problems:
            report(f"{where}: {problem}")
        if not problems:
            entries[item["name"]] = _entry(item)
    return list(entries.values())


def _entry_problems(item: Any) -> Iterator[str]:
    if not isinstance(item, Mapping):
        yield f"{item!r} is no mapping; write {{name: ..., format: voc or coco, root: ...}}"
        return
    for key in item:
        if key not in _KEYS:
            yield f"no key {key!r}{did_you_mean(key, _KEYS)}; the keys are {', '.join(_KEYS)}"
    for key in ("name", "format"):
        if not isinstance(item.get(key), str) or not item[key]:
            yield f"{key} is missing"
    # A path is refused, not rewritten: DATASETS.TRAIN and the results name the set, too, and would say something else.
    if isinstance(item.get("name"), str) and item["name"] and (problem := name_problem(item["name"])):
        last = Path(item["name"]).name
        plain = last if name_problem(last) is None else "mine"
        yield f"name {item['name']!r} {problem}; it becomes a file's name: give a plain one, such as {plain!r}"
    if isinstance(item.get("format"), str) and item["format"] not in ("voc", "coco"):
        yield f"format is {item['format']!r}; it must be voc or coco"
    for key in ("root", "json", "images", "split"):
        if not isinstance(item.get(key, ""), str):
            yield f"{key} is {item[key]!r}; it must be text"
    if item.get("format") == "voc" and not item.get("root"):
        yield "root is missing: the folder that holds Annotations and JPEGImages"
    if item.get("format") == "voc" and item.get("json"):
        yield "json is for format coco"
    if item.get("format") == "coco" and not any(item.get(key) for key in ("json", "split", "images")):
        yield "json is missing: the file with the labels (or give root and split)"
    for key in ("classes", "leave_out"):
        names = item.get(key, [])
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
            yield f"{key} is {names!r}; it must be a list of names"
            return
        if len({*names}) != len(names):
            yield f"{key} names {next(c for c in names if list(names).count(c) > 1)!r} twice"
    for name in item.get("leave_out", []):
        if name in item.get("classes", []):
            yield f"leave_out names {name!r}, which is one of classes"
    yield from _mirror_problems(item)


def _mirror_problems(item: Mapping[str, Any]) -> Iterator[str]:
    pairs = item.get("mirror")
    if pairs is None:
        return
    if item.get("format") == "voc":
        yield "mirror is for format coco: the VOC format has no keypoints"
    if not isinstance(pairs, (list, tuple)) or not all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(name, str) for name in pair)
        for pair in pairs
    ):
        yield f"mirror is {pairs!r}; it must be a list of pairs of keypoints' names, [[left, right], ...]"
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
    under = {key: root / expand(value) if value else None for key, value in (("json", labels), ("images", images))}
    if item["format"] == "coco" and under["images"] is None:
        under["images"] = root
    mirror = item.get("mirror")
    return Entry(
        item["name"], item["format"], root, split=split, **under,
        classes=tuple(item.get("classes", ())), leave_out=tuple(item.get("leave_out", ())),
        mirror=None if mirror is None else tuple((left, right) for left, right in mirror),
    )  # fmt: skip


def listed(names: Sequence[str]) -> str:
    """Return names as a message gives them: not all of COCO's eighty."""
    return ", ".join(names[:10]) + (f", ... ({len(names)} in all)" if len(names) > 10 else "") or "none"


def size_problem(path: Path, said: tuple[int, int]) -> str | None:
    """Return how a picture differs from the (width, height) that its labels say, or None."""
    try:
        found = picture_size(path)
    except OSError as error:
        return f"{path} cannot be read as a picture: {describe(error)}"
    if found != said:
        return f"says {said[0]} x {said[1]} pixels, but {path} has {found[0]} x {found[1]} (EXIF rotation applied)"
    return None


def box_problem(box: Sequence[float], width: float, height: float) -> str | None:
    """Return what is wrong with a box (x0, y0, x1, y1) of an image, or None."""
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        return "has zero area"
    return f"lies outside the image of {width:g} x {height:g}" if outside(box, width, height) else None


def outside(box: Sequence[float], width: float, height: float) -> bool:
    """Return whether a box (x0, y0, x1, y1) leaves its image by more than a pixel."""
    x0, y0, x1, y1 = box
    return min(x0, y0) < -_SLACK or x1 > width + _SLACK or y1 > height + _SLACK

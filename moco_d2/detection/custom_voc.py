"""VOC folders as labelling tools write them, read, checked and made plain."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from detectron2.structures import BoxMode

from moco_d2.data.listing import EXTENSIONS
from moco_d2.detection.custom import Entry, Needs, Report, box_problem, listed, size_problem
from moco_d2.io.pictures import picture_size
from moco_d2.nearest import did_you_mean


@dataclass(frozen=True)
class VocLabels:
    """A VOC folder made plain.

    Attributes:
        records: in Detectron2's format; each annotation also says whether it is ``difficult``.
        classes: in the order of the detector's outputs.
        plain: whether the evaluator, too, can read the folder as it stands.
    """

    records: list[dict[str, Any]]
    classes: list[str]
    plain: bool


class VocFolder:
    """A folder in VOC's layout or near it: where its annotations, pictures and lists are.

    Without ``Annotations`` the XML files lie in the root itself; without ``JPEGImages`` the pictures do.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        labels = entry.root / "Annotations"
        self.labels = labels if labels.is_dir() else entry.root
        pictures = entry.images or entry.root / "JPEGImages"
        self.pictures = pictures if entry.images or pictures.is_dir() else entry.root

    @property
    def split_file(self) -> Path | None:
        """The list of the split's images; None when all images are meant."""
        split = self.entry.split
        if not split:
            return None
        return self.entry.root / (split if split.endswith(".txt") else f"ImageSets/Main/{split}.txt")

    @cached_property
    def files(self) -> dict[str, Path]:
        """The pictures by their path in the folder without extension."""
        return {key: path for key, path in walk(self.pictures) if path.suffix.lower() in EXTENSIONS}

    @cached_property
    def xml_files(self) -> dict[str, Path]:
        """The annotations by their path in the folder without extension."""
        return {key: path for key, path in walk(self.labels) if path.suffix.lower() == ".xml"}

    @cached_property
    def plain(self) -> bool:
        """Whether annotations and list are where VOC has them, and a line of the list is a name, no more."""
        path = self.split_file
        if self.labels == self.entry.root or path is None or self.entry.split.endswith(".txt"):
            return False
        lines = filter(None, map(str.strip, path.read_text(encoding="utf-8").splitlines()))
        return list(lines) == [name for _, name in self.names(self.xml_files)]

    def names(self, known: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
        """Yield (where it is named, name) of each image of the split.

        Args:
            known: names that exist. A line may hold further columns and a name may hold spaces: the longest beginning
                of the line that is a known name counts, or else its first word.
        """
        path = self.split_file
        if path is None:
            yield from ((str(known[name]), name) for name in sorted(known))
            return
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
            words = list(re.finditer(r"\S+", line))
            if words:
                options = [line[words[0].start() : word.end()] for word in reversed(words)]
                options = [os.path.splitext(o)[0] if o.lower().endswith(EXTENSIONS) else o for o in options]
                yield f"{path}:{number}", next((option for option in options if option in known), options[-1])


def walk(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (path in the folder without extension, path) of all files, sorted."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            yield str(path.relative_to(folder).with_suffix("")), path


def read_voc(entry: Entry, needs: Needs, report: Report) -> VocLabels | None:
    """Read and check VOC labels; None when there is nothing to read."""
    folder = VocFolder(entry)
    for path in (entry.root, folder.split_file, folder.pictures):
        if path is not None and not path.exists():
            report(f"data set {entry.name!r}: {path} is not there")
            return None
    if needs.masks or needs.keypoints:
        what = "masks: set MODEL.MASK_ON False" if needs.masks else "keypoints: set MODEL.KEYPOINT_ON False"
        report(f"data set {entry.name!r}: the VOC format has no {what}")
    classes = list(entry.classes) or voc_classes(folder)
    records: dict[str, dict[str, Any]] = {}
    plain = folder.plain
    for where, name in folder.names(folder.xml_files):
        if name in records:
            report(f"{where}: {name!r} is listed twice: duplicate id")
        elif name not in folder.xml_files:
            report(f"{where}: missing annotation {folder.labels / name}.xml")
        else:
            record = _voc_record(folder, name, classes, needs, report)
            if record:
                plain &= record.pop("plain")
                records[name] = record
    said = folder.split_file or folder.labels
    if not records:
        report(f"{said}: empty split: no image of it can be used")
    elif not any(record["annotations"] for record in records.values()):
        report(f"{said}: empty split: none of its {len(records)} images has a usable object")
    return VocLabels(list(records.values()), classes, plain)


def voc_classes(folder: VocFolder) -> list[str]:
    """Return the sorted names of all objects in the folder, whatever the split, so that splits agree."""
    names = set()
    for path in folder.xml_files.values():
        try:
            names |= {_text(item, "name") for item in parse_xml(path).iter("object")}
        except expat.ExpatError:
            continue  # reported where its image is used
    return sorted(names - {""})


def parse_xml(path: Path) -> ElementTree.Element:
    """Parse an XML file; each element says its line in the attribute ``line``.

    Raises:
        expat.ExpatError: it is not well-formed.
    """
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler = lambda tag, attributes: builder.start(
        tag, {**attributes, "line": str(parser.CurrentLineNumber)}
    )
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    parser.Parse(path.read_bytes(), True)
    return builder.close()


def _voc_record(
    folder: VocFolder, name: str, classes: Sequence[str], needs: Needs, report: Report
) -> dict[str, Any] | None:
    path = folder.xml_files[name]
    try:
        tree = parse_xml(path)
    except expat.ExpatError as error:
        report(f"{path}:{error.lineno}: no valid XML: {error}")
        return None
    stem = os.path.splitext(_text(tree, "filename"))[0]
    picture = folder.files.get(name) or folder.files.get(stem)
    if picture is None:
        report(f"{path}:1: missing image {folder.pictures / name} with any of {' '.join(EXTENSIONS)}")
        return None
    try:
        size = [int(float(_text(tree, f"size/{side}") or 0)) for side in ("width", "height")]
        width, height = size if all(size) else picture_size(picture)
    except (OSError, ValueError) as error:
        report(f"{path}:1: cannot tell the size of {picture}: {error}")
        return None
    wrong = size_problem(picture, (width, height)) if needs.sizes else None
    if wrong:
        report(f"{path}:1: {wrong}")
        return None
    annotations = [_voc_object(item, path, (width, height), classes, report) for item in tree.iter("object")]
    return {
        "file_name": str(picture),
        "image_id": name,
        "height": height,
        "width": width,
        "annotations": [annotation for annotation in annotations if annotation],
        "plain": all(map(_is_plain, tree.iter("object"))),
    }


def _is_plain(item: ElementTree.Element) -> bool:
    """Return whether the evaluator reads an object as we do."""
    return item.findtext("difficult", "0").strip().isdecimal() and item.findtext("name") == _text(item, "name")


def _voc_object(
    item: ElementTree.Element, path: Path, size: tuple[int, int], classes: Sequence[str], report: Report
) -> dict[str, Any] | None:
    where = f"{path}:{item.get('line')}"
    name = _text(item, "name")
    if name not in classes:
        report(f"{where}: unknown class {name!r}{did_you_mean(name, classes)}; the classes are {listed(classes)}")
        return None
    texts = [_text(item, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        corners = [float(text) for text in texts]
    except ValueError:
        corners = [math.nan]
    if not all(map(math.isfinite, corners)):
        report(f"{where}: object {name!r} has bndbox {texts}; xmin, ymin, xmax and ymax must be numbers")
        return None
    x0, y0, x1, y1 = corners
    # Coordinates count from 1 and include the last pixel. A box with xmin = xmax would be one pixel wide, but tools
    # write it for a click without a drag.
    box = [x0 - 1, y0 - 1, x1, y1]
    problem = "has zero area" if x1 <= x0 or y1 <= y0 else box_problem(box, *size)
    if problem:
        report(f"{where}: object {name!r} has a box {corners} that {problem}")
        return None
    return {
        "category_id": classes.index(name),
        "bbox": box,
        "bbox_mode": BoxMode.XYXY_ABS,
        "difficult": _text(item, "difficult") in ("1", "true", "True"),
    }


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()

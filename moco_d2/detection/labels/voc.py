"""Reader of VOC folders as labelling tools write them: validates and normalises them."""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from xml.etree import ElementTree

from detectron2.structures import BoxMode

from moco_d2.data.listing import EXTENSIONS, is_hidden
from moco_d2.detection.labels.fields import flag, number, side
from moco_d2.detection.labels.files import Text, parse_xml, read_text
from moco_d2.detection.labels.sets import Entry, Faults, Needs, Report, box_problem, listed, size_problem
from moco_d2.io.pictures import picture_size
from moco_d2.messages import did_you_mean

Record = dict[str, Any]


@dataclass(frozen=True)
class VocLabels:
    """A normalised VOC folder.

    Attributes:
        records: in Detectron2's format; annotations also have ``difficult``. If the folder has no labels, the records
            have no annotations.
        classes: their names, in the order of the detector's outputs.
        changed: whether the evaluator cannot read the folder as it is.
        labelled: False if the folder has no labels, so that nothing can be evaluated.
        notes: what was left out, for the log.
        dropped: the faults of the objects that were dropped, a line each.
    """

    records: list[Record]
    classes: list[str]
    changed: bool
    labelled: bool
    notes: list[str]
    dropped: list[str]


class VocFolder:
    """A folder in VOC's layout or a similar one: the places of its annotations, pictures and lists.

    If there is no ``Annotations`` the XML files are in the root; if there is no ``JPEGImages`` the pictures are. The
    entry may name other folders.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        labels = entry.annotations or entry.root / "Annotations"
        self.labels = labels if entry.annotations or labels.is_dir() else entry.root
        pictures = entry.images or entry.root / "JPEGImages"
        self.pictures = pictures if entry.images or pictures.is_dir() else entry.root
        self.hidden: set[Path] = set()  # hidden files and folders, which are left out

    @property
    def split_file(self) -> Path | None:
        """The list of the split's images; None if the split is all images."""
        split = self.entry.split
        if not split:
            return None
        return self.entry.root / (split if split.endswith(".txt") else f"ImageSets/Main/{split}.txt")

    @cached_property
    def listing(self) -> Text:
        """The text of the split's list.

        Raises:
            ValueError: the file cannot be read as text.
        """
        return read_text(self.split_file) if self.split_file else Text("", True)

    @cached_property
    def files(self) -> dict[str, list[Path]]:
        """The pictures by their path in the folder without extension; several pictures may share it."""
        found: dict[str, list[Path]] = {}
        for key, path in walk(self.pictures, self.hidden):
            if path.suffix.lower() in EXTENSIONS:
                found.setdefault(key, []).append(path)
        return found

    @cached_property
    def xml_files(self) -> dict[str, Path]:
        """The annotations by their path in the folder without extension."""
        return {key: path for key, path in walk(self.labels, self.hidden) if path.suffix.lower() == ".xml"}

    @cached_property
    def standard(self) -> bool:
        """Whether annotations and list are at VOC's places, and each line of the list is a name and nothing else."""
        if self.split_file is None or self.entry.split.endswith(".txt"):
            return False
        if self.labels != self.entry.root / "Annotations":
            return False
        lines = filter(None, map(str.strip, self.listing.text.splitlines()))
        return self.listing.utf8 and list(lines) == [name for _, name in self.names(self.xml_files)]

    def names(self, known: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield (place of the name, name) of each image of the split.

        Args:
            known: names that exist. Lines may have further columns, and names may contain spaces: the name is the
                longest beginning of the line that is known, with or without a picture's extension, or else the first
                word.
        """
        path = self.split_file
        if path is None:
            yield from ((str(self.labels / name), name) for name in sorted(known))
            return
        for row, line in enumerate(self.listing.text.splitlines(), 1):
            words = list(re.finditer(r"\S+", line))
            if words:
                starts = [line[words[0].start() : word.end()] for word in reversed(words)]
                options = [o for start in starts for o in (start, _without_extension(start))]
                yield f"{path}:{row}", next((option for option in options if option in known), options[-1])

    def picture(self, name: str, filename: str) -> Path:
        """Return the picture of an image.

        The picture has the annotation's name. If several pictures have it, ``<filename>`` with its extension decides.
        If none has it, ``<filename>`` names the picture.

        Args:
            name: the annotation's path in its folder without extension.
            filename: ``<filename>``; it may have folders of another machine, or be empty.

        Raises:
            ValueError: there is no such picture, or there are several and ``filename`` does not decide.
        """
        filename = filename.replace("\\", "/")
        named = PurePosixPath(filename).name
        stem, own = _without_extension(named), _without_extension(name)
        for key in (name, own, _without_extension(filename), os.path.join(os.path.dirname(name), stem), stem):
            found = self.files.get(key, [])
            if key == own != name:  # a.jpg.xml, or a.jpg in a list
                found = [path for path in found if path.name == os.path.basename(name)]
            if len(found) > 1:
                exact = [path for path in found if path.name == named]
                found = exact or [path for path in found if path.name.lower() == named.lower()]
                if len(found) != 1:
                    several = ", ".join(path.name for path in self.files[key])
                    raise ValueError(
                        f"several pictures are called {key} ({several}), and <filename> in the annotation is "
                        f"{filename!r}; set it to one of them, or move the others to another folder"
                    )
            if found:
                return found[0]
        raise ValueError(f"missing image: {self.pictures / name} does not exist with any of {' '.join(EXTENSIONS)}")

    def unlabelled(self) -> Iterator[tuple[str, str]]:
        """Yield (place of the name, name) of each image of the split, with or without an annotation.

        If several pictures share a name, only the one in ``<filename>`` of the annotation is yielded.
        """
        if self.split_file is not None:
            yield from self.names({*self.files, *(k + p.suffix for k, paths in self.files.items() for p in paths)})
            return
        for key, paths in self.files.items():
            meant = paths
            if len(paths) > 1 and (filename := self.filename(key)):
                with contextlib.suppress(ValueError):  # it names none of them
                    meant = [self.picture(key, filename)]
            yield from ((str(path), key + path.suffix if len(paths) > 1 else key) for path in meant)

    def filename(self, name: str) -> str:
        """Return the ``<filename>`` of an annotation; empty if there is none or it cannot be read."""
        try:
            return _text(parse_xml(self.xml_files[name]).root, "filename")
        except (KeyError, ValueError):
            return ""


def _without_extension(name: str) -> str:
    return os.path.splitext(name)[0] if name.lower().endswith(EXTENSIONS) else name


def walk(folder: Path, hidden: set[Path]) -> Iterator[tuple[str, Path]]:
    """Yield (path in the folder without extension, path) of all files, sorted; hidden ones are added to ``hidden``."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        hidden |= {Path(parent, name) for name in (*folders, *names) if is_hidden(name)}
        folders[:] = sorted(name for name in folders if not is_hidden(name) and not _leads_up(Path(parent, name)))
        for name in sorted(name for name in names if not is_hidden(name)):
            path = Path(parent, name)
            yield str(path.relative_to(folder).with_suffix("")), path


def _leads_up(folder: Path) -> bool:
    """Return whether a folder is a link to one above it, which would make the walk endless."""
    return folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve())


def read_voc(entry: Entry, needs: Needs, report: Report) -> VocLabels | None:
    """Read and validate VOC labels; None if the folder cannot be read at all."""
    folder = VocFolder(entry)
    places = ((entry.root, Path.is_dir), (folder.split_file, Path.is_file), (folder.pictures, Path.is_dir))
    for path, there in (*places, (folder.labels, Path.is_dir)):
        if path is not None and not there(path):
            what = f"is not a {'file' if there is Path.is_file else 'folder'}" if path.exists() else "does not exist"
            report(f"data set {entry.name!r}: {path} {what}")
            return None
    try:
        folder.listing  # noqa: B018  read here, so that later uses cannot fail
    except ValueError as error:
        report(str(error))
        return None
    without = not needs.trains and not folder.xml_files
    labels = _read_pictures(folder, report) if without else _read_labels(folder, needs, report)
    if folder.hidden:
        few = ", ".join(sorted(path.name for path in folder.hidden)[:3])
        labels.notes.append(f"{len(folder.hidden)} hidden files and folders are left out, for example {few}")
    return labels


def _read_pictures(folder: VocFolder, report: Report) -> VocLabels:
    """Return the pictures of a folder without labels."""
    records: dict[str, Record] = {}
    for where, name in folder.unlabelled():
        if name in records:
            report(f"{where}: {name!r} is listed twice; remove one line")
            continue
        try:
            picture = folder.picture(name, folder.filename(name))
            width, height = picture_size(picture)
        except (OSError, ValueError) as error:
            report(f"{where}: {error}")
            continue
        records[name] = {"file_name": str(picture), "image_id": name, "height": height, "width": width}
    entry = folder.entry
    if not records:
        report(f"{folder.split_file or folder.pictures}: no usable image")
    if not entry.classes:
        report(f"data set {entry.name!r} has no labels; add classes, the names of the detector's classes, to its entry")
    note = "no labels: detections are saved, but not evaluated"
    return VocLabels(list(records.values()), list(entry.classes), False, False, [note], [])


def _read_labels(folder: VocFolder, needs: Needs, report: Report) -> VocLabels:
    entry = folder.entry
    if needs.masks or needs.keypoints:
        what = "masks; pass MODEL.MASK_ON False" if needs.masks else "keypoints; pass MODEL.KEYPOINT_ON False"
        report(f"data set {entry.name!r}: VOC labels have no {what}")
    classes = list(entry.classes) or voc_classes(folder, report)
    records: dict[str, Record] = {}
    left_out: Counter[str] = Counter()
    standard, owners = folder.standard, dict[str, Path]()
    pictures, objects = Faults(entry, report), Faults(entry, report)
    for where, name in folder.names(folder.xml_files):
        pictures.total += 1
        if name in records:
            report(f"{where}: {name!r} is listed twice; remove one line")
        elif name not in folder.xml_files:
            pictures.add(f"{where}: ", f"missing annotation: {folder.labels / name}.xml does not exist")
        elif name != name.strip() or re.search(r"[\r\n]", name):
            own = str(folder.xml_files[name])
            report(f"{own!r}: a name must have no line break, and no space at either end; rename it")
        else:
            record = _voc_record(folder, name, classes, needs, pictures, objects)
            if record:
                standard &= record.pop("standard")
                left_out.update(record.pop("left_out"))
                records[name] = record
                path, picture = folder.xml_files[name], record["file_name"]
                if owners.setdefault(picture, path) != path:
                    report(f"{path}:1: has the picture of {owners[picture]}, {picture}; remove one annotation")
    pictures.settle()
    dropped = objects.settle()
    source = folder.split_file or folder.labels
    if not records:
        report(f"{source}: no usable image")
    elif not any(record["annotations"] for record in records.values()):
        report(f"{source}: none of the {len(records)} images has a usable object")
    notes = [f"{count} objects of {name} are left out" for name, count in sorted(left_out.items())]
    return VocLabels(list(records.values()), classes, not standard, True, notes, dropped)


def voc_classes(folder: VocFolder, report: Report) -> list[str]:
    """Return the sorted class names of all objects in the folder, not just the split's, so that splits agree."""
    names = set()
    for path in folder.xml_files.values():
        try:
            names |= {_text(item, "name") for item in parse_xml(path).root.iter("object")}
        except ValueError:
            continue  # reported where its image is used
    entry = folder.entry
    for name in entry.leave_out:
        if name not in names:
            near = did_you_mean(name, names)
            report(f"data set {entry.name!r}: leave_out names {name!r}, but {folder.labels} has no such object{near}")
    return sorted(names - {"", *entry.leave_out})


def _voc_record(
    folder: VocFolder, name: str, classes: Sequence[str], needs: Needs, pictures: Faults, objects: Faults
) -> Record | None:
    path = folder.xml_files[name]
    try:
        tree, standard = parse_xml(path)
    except ValueError as error:
        pictures.add("", str(error))
        return None
    items = list(tree.iter("object"))
    if tree.tag != "annotation" and not items:
        pictures.add(f"{path}:1: ", f"not a VOC annotation; the root must be <annotation>, not <{tree.tag}>")
        return None
    try:
        picture = folder.picture(name, _text(tree, "filename"))
        width, height = _size(tree, picture)
        if needs.sizes and (problem := size_problem(picture, (width, height))):
            raise ValueError(problem)
    except ValueError as error:
        pictures.add(f"{path}:1: ", str(error))
        return None
    direct = items == tree.findall("object")  # The evaluator reads no others.
    left_out = [item for item in items if _text(item, "name") in folder.entry.leave_out]
    annotations = [_voc_object(i, path, (width, height), classes, objects) for i in items if i not in left_out]
    return {
        "file_name": str(picture),
        "image_id": name,
        "height": height,
        "width": width,
        "annotations": [annotation for annotation in annotations if annotation],
        # The evaluator would read objects that are dropped.
        "standard": all((standard, path.suffix == ".xml", direct, *annotations, *map(_is_standard, items))),
        "left_out": Counter(_text(item, "name") for item in left_out),
    }


def _size(tree: ElementTree.Element, picture: Path) -> tuple[int, int]:
    """Return width and height from the annotation, or from the picture if the annotation does not give them.

    Raises:
        ValueError: the annotation's size is not valid, or the picture cannot be read.
    """
    texts = [_text(tree, f"size/{which}") for which in ("width", "height")]
    try:
        sides = [side(text) if text else None for text in texts]
    except ValueError:
        raise ValueError(f"has size {texts}; width and height must be positive whole numbers") from None
    if sides[0] is not None and sides[1] is not None:
        return sides[0], sides[1]
    try:
        return picture_size(picture)
    except (OSError, ValueError) as error:
        raise ValueError(f"the size of {picture} cannot be read: {error}") from None


def _is_standard(item: ElementTree.Element) -> bool:
    """Return whether the evaluator reads an object in the same way."""
    return item.findtext("difficult", "0").strip() in ("0", "1") and item.findtext("name") == _text(item, "name")


def _voc_object(
    item: ElementTree.Element, path: Path, size: tuple[int, int], classes: Sequence[str], faults: Faults
) -> Record | None:
    where = f"{path}:{item.get('line')}: "
    faults.total += 1
    name = _text(item, "name")
    if name not in classes:
        way_out = f"; to ignore its objects add leave_out: [{name}] to the entry of DATASETS.CUSTOM"
        hint = did_you_mean(name, classes) or way_out
        unknown = f"unknown class {name!r}; the classes are {listed(classes)}{hint}"
        faults.add(where, unknown if name else "object without a name; add <name> with its class", bad=not name)
        return None
    texts = [_text(item, f"bndbox/{which}") for which in ("xmin", "ymin", "xmax", "ymax")]
    try:
        x0, y0, x1, y1 = (float(number(text)) for text in texts)
    except ValueError:
        faults.add(where, f"object {name!r} has bndbox {texts}; xmin, ymin, xmax and ymax must be numbers", bad=True)
        return None
    # Coordinates start at 1 and include the last pixel, so a box with xmin = xmax would be one pixel wide. But
    # tools write it for a click without a drag.
    box = [x0 - 1, y0 - 1, x1, y1]
    problem = box_problem(box if x1 > x0 and y1 > y0 else [0.0] * 4, *size)
    if problem:
        faults.add(where, f"object {name!r} has a box {[x0, y0, x1, y1]} that {problem}", bad=True)
        return None
    try:
        difficult = bool(flag(_text(item, "difficult") or "0"))
    except ValueError:
        stated = _text(item, "difficult")
        faults.add(where, f"object {name!r} has difficult {stated!r}; it must be 0 or 1", bad=True)
        return None
    return {"category_id": classes.index(name), "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "difficult": difficult}


def _text(element: ElementTree.Element, path: str) -> str:
    return (element.findtext(path) or "").strip()

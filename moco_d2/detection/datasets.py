"""Registration of data sets: the built-in ones that Detectron2 lacks, and the user's own (``DATASETS.CUSTOM``)."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances, register_pascal_voc
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from moco_d2.builtin_sets import DATASETS, Dataset, voc_colors
from moco_d2.data.listing import EXTENSIONS
from moco_d2.detection.label_images import LabelIndexHandler, load_sem_seg
from moco_d2.detection.labels.coco import CocoLabels, keypoint_metadata, missing_picture, picture_name, read_coco
from moco_d2.detection.labels.fields import text
from moco_d2.detection.labels.files import JsonFile, shown
from moco_d2.detection.labels.sets import Entry, Needs, Report, parse_entries
from moco_d2.detection.labels.voc import VocFolder, VocLabels, read_voc, walk
from moco_d2.io import files

logger = logging.getLogger(__name__)

ROOT = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets"))  # read at import, as Detectron2 does


# Built-in data sets.


def register_builtin(record: Dataset, root: str = ROOT) -> None:
    """Register a built-in data set of kind ``voc``, ``coco`` or ``sem_seg``, unless Detectron2 has registered it.

    Args:
        record: the data set.
        root: the folder of all data sets.
    """
    if record.name in DatasetCatalog:
        return
    file, *folders = (os.path.join(root, path) for path in record.needed)
    meta = MetadataCatalog.get(record.name)
    if record.kind == "sem_seg":
        labels, images = folders
        DatasetCatalog.register(record.name, lambda: load_sem_seg(images, labels, file))
        meta.set(stuff_classes=list(record.classes), stuff_colors=voc_colors(len(record.classes)), ignore_label=255)
        meta.set(image_root=images, sem_seg_root=labels, split_file=file, evaluator_type="sem_seg")
    elif record.kind == "voc":  # The metric of 2012 is the area under the curve.
        folder, split = os.path.dirname(folders[0]), Path(file).stem
        register_pascal_voc(record.name, folder, split, 2012, record.classes)
        meta.set(evaluator_type="pascal_voc")
    elif record.kind == "coco":
        classes = {"thing_classes": list(record.classes)} if record.classes else {}  # or those of the file
        register_coco_instances(record.name, classes, file, folders[0])


PathManager.register_handler(LabelIndexHandler())
for _record in DATASETS.values():
    register_builtin(_record)


# The user's own data.


def register_custom(cfg: CfgNode, *, labels: bool = True, train: bool = True) -> None:
    """Register the entries of ``DATASETS.CUSTOM`` and validate those that are used. Call it in every process.

    If Detectron2 or an evaluator cannot read labels as they are, a normalised copy is written to
    ``OUTPUT_DIR/datasets``. The user's files are never changed; a copy that would replace one is refused.

    Args:
        cfg: config; masks or keypoints are needed if it trains them.
        labels: False for pretraining, which needs the pictures only (labels only for ``SSL.MONITOR``).
        train: whether the training sets are used; False for an evaluation.

    Raises:
        ValueError: the first problem, with file, line and record.
    """
    _register_all(cfg, _raise, labels=labels, train=train)


def custom_problems(cfg: CfgNode) -> list[str]:
    """Return all problems of the entries of ``DATASETS.CUSTOM`` that are used, and register what can be read.

    Call it in every process. In addition to :func:`register_custom`, it opens every picture and compares its size with
    the labels.
    """
    problems: list[str] = []
    _register_all(cfg, problems.append, sizes=True)
    return problems


def check_copies(cfg: CfgNode) -> None:
    """Refuse an ``OUTPUT_DIR`` in which copies of labels would replace foreign files; nothing is written.

    Raises:
        ValueError: a copy would replace a file or folder that this project did not write.
    """

    def ignore(problem: str) -> None:
        """Leave other problems to :func:`register_custom`."""

    entries = parse_entries(cfg.DATASETS.CUSTOM, ignore)
    for entry in entries:
        place = _copy_of(entry, Path(cfg.OUTPUT_DIR))
        if entry.name not in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            continue
        if problem := _place_problem(place, entries) or _taken(place):  # Only then the labels are read.
            read: Callable[..., CocoLabels | VocLabels | None] = read_coco if entry.format == "coco" else read_voc
            labels = read(entry, Needs.of(cfg, False, entry.name in cfg.DATASETS.TRAIN), ignore)
            if labels and labels.changed:
                raise ValueError(problem)
        if entry.bad_labels == "drop":
            files.check_claim(place.parent, [files.exactly(_list_of(entry))], "OUTPUT_DIR")


def _register_all(
    cfg: CfgNode, report: Report, *, labels: bool = True, train: bool = True, sizes: bool = False
) -> None:
    if labels:
        used = {*(cfg.DATASETS.TRAIN if train else ()), *cfg.DATASETS.TEST}
    else:  # only pretraining's monitor reads labels
        used = {cfg.SSL.MONITOR.DATASET, cfg.SSL.MONITOR.VAL}
    points, sigmas = cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS, len(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    if labels and cfg.DATASETS.CUSTOM and cfg.MODEL.KEYPOINT_ON and sigmas != points != 17:
        report(f"TEST.KEYPOINT_OKS_SIGMAS has {sigmas} values; COCO's evaluation needs {points}, one per keypoint")
    entries = parse_entries(cfg.DATASETS.CUSTOM, report)
    for entry in entries:
        place = _copy_of(entry, Path(cfg.OUTPUT_DIR))
        if entry.name in DatasetCatalog and not MetadataCatalog.get(entry.name).get("custom"):
            report(f"DATASETS.CUSTOM: the name {entry.name!r} is taken by a registered data set; choose a new one")
            continue
        for catalog in (DatasetCatalog, MetadataCatalog):
            if entry.name in catalog.list():
                catalog.remove(entry.name)
        MetadataCatalog.get(entry.name).set(custom=True, list_pictures=lambda entry=entry: list_pictures(entry))
        if entry.name not in used:
            DatasetCatalog.register(entry.name, lambda entry=entry: [{"file_name": f} for f in list_pictures(entry)])
            continue
        needs = Needs.of(cfg, sizes, train and entry.name in cfg.DATASETS.TRAIN)
        register = _register_coco if entry.format == "coco" else _register_voc
        register(entry, needs, report, place, _place_problem(place, entries))
    comm.synchronize()  # The other processes read the copies that the first one writes.


def _register_coco(entry: Entry, needs: Needs, report: Report, place: Path, problem: str) -> None:
    labels = read_coco(entry, needs, report)
    path, images = str(entry.json), str(entry.images)
    if labels and labels.changed:
        path = str(place)
        _write_copy(lambda: _write_coco(place, labels.content), entry, place, problem, report)

    def load() -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = load_coco_json(path, images, entry.name)
        labelled = labels is None or "annotations" in labels.content
        return records if labelled else [_without(record, "annotations") for record in records]

    DatasetCatalog.register(entry.name, load)
    MetadataCatalog.get(entry.name).set(json_file=path, image_root=images, evaluator_type="coco")
    if labels:
        _tell(entry, labels, place.parent, report)
        categories = labels.content["categories"]
        MetadataCatalog.get(entry.name).set(
            thing_classes=labels.classes,
            thing_dataset_id_to_contiguous_id={c["id"]: index for index, c in enumerate(categories)},
            own_ids=labels.own_ids,
            left_out_ids=labels.left_out_ids,
            **keypoint_metadata(categories, entry.mirror),
        )


def _without(record: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != field}


def _tell(entry: Entry, labels: CocoLabels | VocLabels, folder: Path, report: Report) -> None:
    """Log the notes on a data set's labels, and list the objects that were dropped in a file."""
    MetadataCatalog.get(entry.name).set(dropped=labels.dropped)
    notes, path = labels.notes, folder / _list_of(entry)
    if not comm.is_main_process():
        return
    if labels.dropped:
        notes = [*notes, f"{len(labels.dropped)} bad objects are dropped (bad_labels: drop); {path} lists them"]
        try:
            files.claim(folder, [files.exactly(path.name)], "OUTPUT_DIR")
            with files.one_line(path), files.atomic_write(path) as file:
                file.write("".join(f"{line}\n" for line in labels.dropped).encode())
        except ValueError as error:
            report(str(error))
    for note in notes:
        logger.info("data set %s: %s", entry.name, note)


def _list_of(entry: Entry) -> str:
    """Return the name of the list of a data set's dropped objects, beside the copy of its labels."""
    return f"{entry.name}.dropped.txt"


def _register_voc(entry: Entry, needs: Needs, report: Report, place: Path, problem: str) -> None:
    labels = read_voc(entry, needs, report)
    folder, split = entry.root, entry.split
    if labels and labels.changed:
        folder, split = place, "all"
        _write_copy(lambda: _write_voc(place, labels.records, labels.classes), entry, place, problem, report)

    def load() -> list[dict[str, Any]]:
        again = read_voc(entry, Needs(trains=needs.trains), lambda problem: None)
        return again.records if again else []

    DatasetCatalog.register(entry.name, load)
    # The metric of 2012 is the area under the curve, that of 2007 its mean at eleven points.
    MetadataCatalog.get(entry.name).set(dirname=str(folder), split=split, year=2012, evaluator_type="pascal_voc")
    if labels:
        _tell(entry, labels, place.parent, report)
        MetadataCatalog.get(entry.name).set(thing_classes=labels.classes, labelled=labels.labelled)


def _copy_of(entry: Entry, output_dir: Path) -> Path:
    """Return where the normalised copy of a data set's labels is written, if one is needed."""
    return output_dir / "datasets" / (f"{entry.name}.json" if entry.format == "coco" else entry.name)


def _place_problem(place: Path, entries: Sequence[Entry]) -> str:
    """Return why a copy of labels cannot be written to a place: data set files are there; empty if it can."""
    there = Path(os.path.realpath(place))
    for entry in entries:
        folder = VocFolder(entry)
        labels = (folder.labels, entry.root / "ImageSets") if entry.format == "voc" else ()
        pictures = entry.images if entry.format == "coco" else folder.pictures
        for path in (*labels, pictures, entry.json, folder.split_file if labels else None):
            if path is None:
                continue
            own, where = Path(os.path.realpath(path)), ""
            if there == own or there in own.parents:
                where = "it would replace"
            elif path in labels and own in there.parents:  # It would be read as further annotations.
                where = "it would be among the annotations in"
            if where:
                return (
                    f"the normalised copy of the labels cannot be written to {place}: {where} {own} of data set "
                    f"{entry.name!r}; choose another OUTPUT_DIR"
                )
    return ""


def _taken(place: Path) -> str:
    """Return why a copy of labels must not replace the file or folder at a place; empty if it may."""
    try:
        if place.suffix == ".json":
            files.check_claim(place.parent, [files.exactly(place.name)], "OUTPUT_DIR")
        else:
            files.check_replaceable(place, "OUTPUT_DIR")
    except ValueError as error:
        return str(error)
    return ""


def _write_copy(write: Callable[[], None], entry: Entry, place: Path, problem: str, report: Report) -> None:
    """Write the copy of a data set's labels in the main process, unless there is a problem with its place."""
    if problem:
        report(problem)
    elif comm.is_main_process():
        try:
            write()
        except ValueError as error:
            report(str(error))
        else:
            source = entry.json or entry.root
            logger.info("data set %s: a normalised copy of the labels %s is in %s", entry.name, source, place)


def _write_coco(path: Path, content: dict[str, Any]) -> None:
    """Write labels as a COCO file; it may replace only an earlier copy."""
    files.claim(path.parent, [files.exactly(path.name)], "OUTPUT_DIR")
    with files.one_line(path), files.atomic_write(path) as file:
        file.write(json.dumps(content).encode())


def _write_voc(folder: Path, records: Sequence[dict[str, Any]], classes: Sequence[str]) -> None:
    """Write annotations and their list in VOC's layout; they may replace only an earlier copy."""
    with files.replaced_folder(folder, "OUTPUT_DIR") as new:
        files.write_text(new, "ImageSets/Main/all.txt", "".join(f"{record['image_id']}\n" for record in records))
        for record in records:
            files.write_text(new, f"Annotations/{record['image_id']}.xml", _voc_xml(record, classes))


def _voc_xml(record: dict[str, Any], classes: Sequence[str]) -> str:
    lines = [f"<size><width>{record['width']}</width><height>{record['height']}</height><depth>3</depth></size>"]
    for item in record["annotations"]:
        corners = (item["bbox"][0] + 1, item["bbox"][1] + 1, *item["bbox"][2:])
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value:.10g}</{side}>" for side, value in sides)
        lines.append(
            f"<object><name>{escape(classes[item['category_id']])}</name>"
            f"<difficult>{int(item['difficult'])}</difficult><bndbox>{box}</bndbox></object>"
        )
    return "<annotation>\n" + "\n".join(lines) + "\n</annotation>\n"


def list_pictures(entry: Entry) -> list[str]:
    """Return the pictures of a data set; labels are not needed.

    Raises:
        ValueError: there is no list of pictures, or a picture is missing.
    """
    if entry.format == "coco":
        assert entry.images is not None
        if entry.json is None or not entry.json.exists():
            return [str(path) for _, path in walk(_folder(entry, entry.images), set()) if _is_picture(path)]
        return _coco_pictures(JsonFile(entry.json, _raise), _folder(entry, entry.images))
    folder = VocFolder(entry)
    _folder(entry, folder.pictures)
    if folder.split_file is not None and not folder.split_file.is_file():
        raise ValueError(f"data set {entry.name!r}: {folder.split_file} does not exist")
    pictures = []
    for where, name in folder.unlabelled():
        try:
            pictures.append(str(folder.picture(name, folder.filename(name))))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    return pictures


def _coco_pictures(file: JsonFile, folder: Path) -> list[str]:
    pictures = []
    for index, record in file.records("images"):
        try:
            stated = text(record.get("file_name"))
        except ValueError:
            file.problem("images", index, f"has file_name {shown(record.get('file_name'))}; it must be text")
            continue
        name = picture_name(folder, stated)
        if name is None:
            file.problem("images", index, missing_picture(folder, stated))
        pictures.append(str(folder / str(name)))
    return pictures


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


def _folder(entry: Entry, path: Path) -> Path:
    if not path.is_dir():
        raise ValueError(f"data set {entry.name!r}: {path} is not a folder; it must be the folder of the pictures")
    return path


def _raise(problem: str) -> None:
    raise ValueError(problem)

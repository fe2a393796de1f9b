"""Records of the built-in data sets: registration, preflight, doctor and datasets/README.md follow from them.

The module imports the standard library only: the doctor reads it even if torch or Detectron2 is missing.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dataset:
    """A data set under ``$DETECTRON2_DATASETS``, where all its paths start.

    Attributes:
        name: the name that ``DATASETS.TRAIN`` and ``TEST`` use.
        kind: how it is read and evaluated: ``voc``, ``coco``, ``lvis``, ``cityscapes``, ``sem_seg`` (label images) or
            ``folders`` (one folder a class; pretraining only).
        group: the data set as people call it; its splits are reported together.
        get_from: where to get it.
        pictures: patterns of the pictures' paths. The stars stand for a picture's name; a pattern that ends in a star
            matches pictures of any format.
        labels: patterns of the files that each picture needs beside it, with the same stars.
        files: lists and JSON files of the split. A ``.txt`` file names the split's pictures, one a line.
        classes: names by index; needed only if Detectron2 itself does not register the data set.
    """

    name: str
    kind: str
    group: str
    get_from: str
    pictures: tuple[str, ...]
    labels: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def listing(self) -> str:
        """The text file that names the split's pictures; empty if the split is all pictures of its folders."""
        return next((path for path in self.files if path.endswith(".txt")), "")

    @property
    def needed(self) -> tuple[str, ...]:
        """The files and folders that must exist."""
        folders = (folder_of(pattern) for pattern in (*self.labels, *self.pictures))
        return tuple(dict.fromkeys((*self.files, *folders)))


def folder_of(pattern: str) -> str:
    """Return the folder below which a pattern's files are."""
    return pattern.partition("*")[0].rpartition("/")[0]


VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog",
    "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_VOC = "http://host.robots.ox.ac.uk/pascal/VOC/"
_SBD = "http://home.bharathh.info/pubs/codes/SBD/download.html"
_COCO = "https://cocodataset.org/#download"
_LVIS = "https://www.lvisdataset.org/dataset"
_CITYSCAPES = "https://www.cityscapes-dataset.com/downloads/"


def _voc(year: int, split: str) -> Dataset:
    root = f"VOC{year}"
    return Dataset(
        f"voc_{year}_{split}", "voc", f"VOC {year}", _VOC,
        (f"{root}/JPEGImages/*.jpg",), (f"{root}/Annotations/*.xml",), (f"{root}/ImageSets/Main/{split}.txt",),
    )  # fmt: skip


def _voc_sem_seg(split: str, labels: str, get_from: str) -> Dataset:
    return Dataset(
        f"voc_2012_{split}_sem_seg", "sem_seg", "VOC 2012 semantic segmentation", get_from,
        ("VOC2012/JPEGImages/*.jpg",), (f"VOC2012/{labels}/*.png",), (f"VOC2012/ImageSets/Segmentation/{split}.txt",),
        ("background", *VOC_CLASSES),
    )  # fmt: skip


def _coco(name: str, group: str, split: str, task: str) -> Dataset:
    pictures, labels = f"coco/{split}2017/*.jpg", f"coco/annotations/{task}_{split}2017.json"
    return Dataset(f"{name}_{split}", "coco", group, _COCO, (pictures,), files=(labels,))


def _lvis(version: str, split: str, *folders: str) -> Dataset:
    pictures = tuple(f"coco/{folder}/*.jpg" for folder in folders)
    labels = f"lvis/lvis_{version}_{split}.json"
    return Dataset(f"lvis_{version}_{split}", "lvis", f"LVIS {version}", _LVIS, pictures, files=(labels,))


def _cityscapes(task: str, split: str, *labels: str) -> Dataset:
    return Dataset(
        f"cityscapes_fine_{task}_seg_{split}", "cityscapes", "Cityscapes", _CITYSCAPES,
        (f"cityscapes/leftImg8bit/{split}/*/*_leftImg8bit.png",),
        tuple(f"cityscapes/gtFine/{split}/*/*_gtFine_{label}" for label in labels),
    )  # fmt: skip


_RECORDS = (
    Dataset("imagenet_train", "folders", "ImageNet", "https://image-net.org/download.php", ("imagenet/train/*/*",)),
    _voc(2007, "trainval"),
    _voc(2007, "test"),
    _voc(2012, "trainval"),
    # VOC's 1,464 training pictures and those of SBD that are not in val: 10,582.
    _voc_sem_seg("train_aug", "SegmentationClassAug", _SBD),
    _voc_sem_seg("val", "SegmentationClass", _VOC),
    *(_coco("coco_2017", "COCO", split, "instances") for split in ("train", "val")),
    *(_coco("keypoints_coco_2017", "COCO keypoints", split, "person_keypoints") for split in ("train", "val")),
    _lvis("v0.5", "train", "train2017"),
    _lvis("v0.5", "val", "val2017"),
    _lvis("v1", "train", "train2017"),
    _lvis("v1", "val", "train2017", "val2017"),  # 15,000 of its pictures are from COCO's train
    *(_cityscapes("instance", split, "polygons.json", "instanceIds.png") for split in ("train", "val")),
    # Training reads the labelTrainIds, the evaluation the labelIds.
    *(_cityscapes("sem", split, "labelTrainIds.png", "labelIds.png") for split in ("train", "val")),
)
DATASETS = {record.name: record for record in _RECORDS}


def voc_colors(count: int) -> list[list[int]]:
    """Return VOC's colour of each class: the bits of its index go to red, green and blue in turn, from the top."""
    return [
        [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(8)) for channel in range(3)]
        for index in range(count)
    ]

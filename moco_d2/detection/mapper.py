"""Mapper from a data set's record to a detector's input: Detectron2's mapper with this project's picture reader.

Any fault of a picture or its labels raises a :class:`~moco_d2.io.pictures.PictureError` that names the picture and
its first annotation that cannot be used.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager

from moco_d2.io.pictures import MAX_PIXELS, PictureError, describe, naming, open_picture, read_image, upright_grey


def read_pixels(path: str, image_format: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return a picture's pixels, (H, W, C), in one of Detectron2's formats (``RGB``, ``BGR``, ``L``, ...).

    Raises:
        PictureError: see :func:`moco_d2.io.pictures.read_image`.
    """
    with naming(path), PathManager.open(path, "rb") as file:
        return np.asarray(utils.convert_PIL_to_numpy(read_image(file, max_pixels), image_format))


def read_label_image(path: str, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Return the class of each pixel, (H, W): the pixel values of the grey image, as Detectron2 reads them.

    Raises:
        PictureError: the file cannot be read.
    """
    with naming(path), PathManager.open(path, "rb") as file:
        return np.asarray(upright_grey(open_picture(file, max_pixels)))


class PictureMapper(DatasetMapper):
    """Detectron2's ``DatasetMapper`` with another picture reader, and errors that name what cannot be used."""

    @configurable
    def __init__(self, is_train: bool, *, max_pixels: int, **kwargs: Any) -> None:
        """Set up; ``max_pixels`` is ``DATA.MAX_PIXELS``, the other arguments are Detectron2's."""
        super().__init__(is_train, **kwargs)
        self.max_pixels = max_pixels

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """Read the arguments of the constructor from a detector's config."""
        arguments = {**super().from_config(cfg, is_train), "max_pixels": cfg.DATA.MAX_PIXELS}
        if is_train and cfg.INPUT.JITTER.SCALE:
            # Boxes are recomputed from masks, because that of a cut object is smaller than the cut box.
            arguments |= {"augmentations": large_scale_jitter(cfg), "recompute_boxes": cfg.MODEL.MASK_ON}
        return arguments

    def __call__(self, dataset_dict: Mapping[str, Any]) -> dict[str, Any]:
        """Read, augment and label a picture.

        Args:
            dataset_dict: a record in Detectron2's format.

        Raises:
            PictureError: the picture or its labels cannot be used.
        """
        record = copy.deepcopy(dict(dataset_dict))  # it is changed below
        path = record["file_name"]
        image = read_pixels(path, self.image_format, self.max_pixels)
        if problem := size_mismatch(record, image.shape[1], image.shape[0]):
            raise PictureError(f"{path}: {problem}")
        utils.check_image_size(record, image)  # adds the size if the labels do not give it
        labels = record.pop("sem_seg_file_name", None)
        given = T.AugInput(image, sem_seg=self._label_image(labels, image) if labels else None)
        transforms = self.augmentations(given)
        shape = given.image.shape[:2]
        record["image"] = torch.as_tensor(np.ascontiguousarray(given.image.transpose(2, 0, 1)))
        if given.sem_seg is not None:
            record["sem_seg"] = torch.as_tensor(given.sem_seg.astype("long"))
        if self.proposal_topk is not None:
            utils.transform_proposals(record, shape, transforms, proposal_topk=self.proposal_topk)
        if not self.is_train:
            record.pop("annotations", None)
        elif "annotations" in record:
            self._label(record, transforms, shape)
        return record

    def _label_image(self, path: str, image: np.ndarray) -> np.ndarray:
        labels = read_label_image(path, self.max_pixels)
        if labels.shape != image.shape[:2]:
            sizes = f"{labels.shape[1]} x {labels.shape[0]} pixels, its picture {image.shape[1]} x {image.shape[0]}"
            raise PictureError(f"{path}: the label image has {sizes}; the sizes must be equal")
        return labels

    def _label(self, record: dict[str, Any], transforms: Any, shape: tuple[int, int]) -> None:
        """Turn the annotations into instances."""
        annotations = copy.deepcopy(record["annotations"])
        try:
            self._transform_annotations(record, transforms, shape)
        except Exception as error:  # numpy, pycocotools and Detectron2 raise many classes
            which = self._first_bad(annotations, transforms, shape)
            problem = f"{which} cannot be used: {describe(error)}; correct it in the labels"
            raise PictureError(f"{record['file_name']}: {problem}") from error

    def _first_bad(self, annotations: Sequence[Mapping[str, Any]], transforms: Any, shape: tuple[int, int]) -> str:
        """Name the first annotation that fails on its own."""
        for number, annotation in enumerate(annotations):
            try:
                self._transform_annotations({"annotations": [copy.deepcopy(annotation)]}, transforms, shape)
            except Exception:
                known = f"with id {annotation['id']!r}" if "id" in annotation else f"number {number}, counted from 0,"
                return f"its annotation {known} and bbox {annotation.get('bbox')}"
        return "the list of its annotations"


def large_scale_jitter(cfg: CfgNode) -> list[T.Augmentation]:
    """Return the augmentations of ``INPUT.JITTER``: flip, scale, and cut, as ViTDet trains (arXiv 2203.16527)."""
    jitter, flip = cfg.INPUT.JITTER, cfg.INPUT.RANDOM_FLIP
    low, high = jitter.SCALE
    flips = [] if flip == "none" else [T.RandomFlip(horizontal=flip == "horizontal", vertical=flip == "vertical")]
    return [
        *flips,
        T.ResizeScale(low, high, jitter.SIZE, jitter.SIZE),
        T.FixedSizeCrop((jitter.SIZE, jitter.SIZE), pad=jitter.PAD),
    ]


def size_mismatch(record: Mapping[str, Any], width: int, height: int) -> str:
    """Return how an upright picture's size differs from that in its labels; empty if it does not."""
    labelled = record.get("width", width), record.get("height", height)
    if labelled == (width, height):
        return ""
    return (
        f"the labels give the size {labelled[0]} x {labelled[1]}, but the picture has {width} x {height} pixels (EXIF "
        "rotation applied): correct the labels, or save the picture upright"
    )

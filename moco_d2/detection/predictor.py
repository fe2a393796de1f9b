"""A trained detector that finds objects on pictures; its run's folder is all that it needs.

predict = Predictor("output/voc_moco_v2")
found = predict("picture.jpg")["instances"]
print([predict.classes[number] for number in found.pred_classes])
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import Metadata
from detectron2.engine import DefaultPredictor
from PIL import Image

from moco_d2.config import load_cfg, use_available_device
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.classes import read_class_names
from moco_d2.detection.mapper import read_pixels
from moco_d2.detection.preflight import building
from moco_d2.detection.weights import all_names, load_weights

FINAL = "model_final.pth"


class Predictor:
    """A trained detector or segmenter, called with a picture.

    Pictures are read as in training and evaluation (upright, 8 bits, the channel order, pixel mean and size of the
    config), so a picture gets the detections that an evaluation of it saves.

    Attributes:
        checkpoint: the file with its weights.
        cfg: its config.
        model: the network, in evaluation mode.
        names: names of classes and keypoints, as Detectron2's Visualizer takes them.
    """

    def __init__(self, run: str | os.PathLike[str], opts: Sequence[str] = ()) -> None:
        """Load a detector.

        Args:
            run: the folder of a finished run, or a checkpoint with the run's ``config.yaml`` in its folder.
            opts: ``KEY VALUE`` overrides of the config, such as ``MODEL.DEVICE cpu``.

        Raises:
            ValueError: a file is missing, the checkpoint does not fill the detector or contradicts its config, or the
                detector takes its proposals from a file.
        """
        self.checkpoint = checkpoint_of(run)
        self._predictor = load_predictor(self.checkpoint, opts=opts)
        self.cfg, self.model = self._predictor.cfg, self._predictor.model
        if self.cfg.MODEL.LOAD_PROPOSALS:
            raise ValueError(
                "MODEL.LOAD_PROPOSALS is True: the detector needs proposals, which a picture does not have"
            )
        self.names = Metadata(name=str(self.checkpoint), **read_class_names(self.checkpoint.parent))

    @property
    def classes(self) -> list[str]:
        """The names of the classes, by number; empty if the run has no ``classes.json``."""
        return list(self.names.get("thing_classes") or self.names.get("stuff_classes") or ())

    def read(self, picture: str | os.PathLike[str]) -> np.ndarray:
        """Return the upright pixels of a picture, (H, W, 3) RGB of 8 bits.

        Raises:
            PictureError: the file is not a picture, or cannot be used.
        """
        return read_pixels(os.fspath(picture), "RGB", self.cfg.DATA.MAX_PIXELS)

    def __call__(self, picture: str | os.PathLike[str] | Image.Image | np.ndarray) -> dict[str, Any]:
        """Return what the detector finds.

        Args:
            picture: a file, an upright picture of PIL, or pixels (H, W, 3), RGB of 8 bits.

        Returns:
            Detectron2's output on the CPU: ``instances`` with boxes x0, y0, x1, y1 in pixels of the upright picture,
            ``scores`` in 0..1 and ``pred_classes``; or ``sem_seg``, (classes, H, W), of a segmenter.

        Raises:
            PictureError: the file is not a picture, or cannot be used.
            ValueError: the pixels have another form.
        """
        if isinstance(picture, str | os.PathLike):
            pixels = self.read(picture)
        else:
            pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            form = f"{pixels.dtype} of shape {pixels.shape}"
            raise ValueError(f"the pixels are {form}; they must be uint8 of shape (H, W, 3), RGB")
        found = self._predictor(pixels[:, :, ::-1])
        return {name: value.to("cpu") for name, value in found.items() if hasattr(value, "to")}


def checkpoint_of(run: str | os.PathLike[str]) -> Path:
    """Return the checkpoint of a finished run, by its folder or the checkpoint itself.

    Raises:
        ValueError: there is none.
    """
    path = Path(run)
    if path.is_dir() and not (path / FINAL).is_file():
        raise ValueError(
            f"{path} has no {FINAL}: the training has not finished, or it is another folder; finish it, or name one of "
            "the run's checkpoints"
        )
    path = path / FINAL if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; name the folder of a finished run, or one of its checkpoints")
    return path


def load_predictor(
    weights: str | os.PathLike[str], threshold: float | None = None, opts: Sequence[str] = ()
) -> DefaultPredictor:
    """Return a trained detector that takes images (H, W, 3) in BGR.

    Args:
        weights: a checkpoint, with its run's ``config.yaml`` in the same folder.
        threshold: lowest score of the detections that are returned; None for the config's.
        opts: ``KEY VALUE`` overrides of the config.

    Raises:
        ValueError: one of the files is missing, or the checkpoint does not fill the detector.
    """
    weights = Path(weights)
    config = weights.parent / "config.yaml"
    if not config.is_file():
        raise ValueError(f"{config} is missing; put the run's config.yaml into the folder of the checkpoint")
    cfg = load_cfg(config, opts)
    use_available_device(cfg)
    cfg.MODEL.WEIGHTS = ""  # loaded below, where missing weights are an error
    if threshold is not None:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = threshold
    with building():
        predictor = DefaultPredictor(cfg)
    load_weights(TransferCheckpointer(predictor.model), cfg, str(weights), all_names)
    return predictor

"""Names of a detector's classes and keypoints, saved with a run so that it can be used without its data sets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

CLASSES = "classes.json"
# Metadata that Detectron2's Visualizer needs to draw predictions.
_NAMES = ("thing_classes", "stuff_classes", "keypoint_names", "keypoint_flip_map", "keypoint_connection_rules")


def class_names(cfg: CfgNode) -> dict[str, Any]:
    """Return the names of a detector's classes and keypoints, from the metadata of its first data set.

    Args:
        cfg: config of the detector. Its data sets must be registered. A data set that takes its classes from the
            labels must have been read before.
    """
    metadata = MetadataCatalog.get((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)[0])
    return {name: metadata.get(name) for name in _NAMES if metadata.get(name)}


def read_class_names(run: Path) -> dict[str, Any]:
    """Return the names that :func:`class_names` gave, from a run's folder; none if an earlier version trained it.

    Raises:
        ValueError: the file is damaged.
    """
    path = run / CLASSES
    if not path.is_file():
        return {}
    try:
        names = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}; remove it to use numbers as names") from error
    if not isinstance(names, dict):
        raise ValueError(f"{path} is damaged: it must contain an object; remove it to use numbers as names")
    return {name: value for name, value in names.items() if name in _NAMES}

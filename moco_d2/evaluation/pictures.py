"""Pictures for people who would rather look than read: the pretraining curve, the views, the detections."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.utils.visualizer import Visualizer

from moco_d2.atomic import atomic_write
from moco_d2.config import load_cfg
from moco_d2.data import ViewDataset, build_recipe, list_images

FolderLike = str | os.PathLike[str]


def draw_pretraining_curve(run: FolderLike, path: FolderLike) -> None:
    """Draw loss, contrast accuracy, similarities, and feature std with lr, of a pretraining run.

    Args:
        run: its folder, with ``metrics.json`` and ``config.yaml``.
        path: the PNG to write.
    """
    records = [json.loads(line) for line in (Path(run) / "metrics.json").read_text().splitlines()]
    args = load_cfg(Path(run) / "config.yaml").SSL.ARGS
    figure, axes = _figure(2, 2, (10, 6.4))
    panels: list[tuple[str, dict[str, str], tuple[float, str] | None]] = [
        ("loss", {"total_loss": "InfoNCE"}, (math.log(1 + args.queue_size), "chance, log(1 + K)")),
        ("contrast accuracy", {"contrast_acc1": "top-1", "contrast_acc5": "top-5"}, None),
        ("cosine similarity", {"positive_similarity": "positive key", "negative_similarity": "queue"}, None),
        ("feature std", {"feature_std": "std"}, (1 / math.sqrt(args.dim), "spread evenly, 1/sqrt(C)")),
    ]
    for axis, (title, curves, line) in zip(axes.flat, panels, strict=True):
        for key, label in curves.items():
            points = [(r["iteration"] + 1, r[key]) for r in records if key in r]
            axis.plot(*zip(*points, strict=True), label=label, linewidth=1.8, marker=".", markersize=4)
        if line:
            axis.axhline(line[0], color="grey", linestyle="--", linewidth=1, label=line[1])
        axis.set(title=title, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=9)
    _save_figure(figure, path)


def draw_view_pairs(cfg: CfgNode, path: FolderLike, count: int = 8) -> None:
    """Draw pictures as pretraining sees them: one column a picture, one row a view.

    Args:
        cfg: config of a pretraining run.
        path: the PNG to write.
        count: number of pictures.
    """
    recipe = build_recipe(cfg.DATA.RECIPE, cfg.DATA.CROP_SIZE)
    files = list_images(cfg.DATASETS.TRAIN)
    dataset = ViewDataset(files[:: max(1, len(files) // count)][:count], recipe, max(cfg.SEED, 0))
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (recipe.pixels.mean, recipe.pixels.std))
    figure, axes = _figure(len(recipe.views), len(dataset), (1.5 * len(dataset), 1.6 * len(recipe.views)))
    for column in range(len(dataset)):
        for row, view in enumerate(dataset[0, column].views):
            levels = (view.numpy() * std + mean).clip(0, 255).astype(np.uint8)
            axes[row, column].imshow(levels.transpose(1, 2, 0))
            axes[row, column].set_axis_off()
    figure.suptitle(f"views of {cfg.DATA.RECIPE}, one picture a column", fontsize=11)
    _save_figure(figure, path)


def draw_detections(runs: Mapping[str, FolderLike], path: FolderLike, count: int = 4, threshold: float = 0.25) -> None:
    """Draw test pictures: ground truth, then the detections of each run.

    Args:
        runs: heading to folder of a finished run (``config.yaml``, ``model_final.pth``), all on the same test set.
        path: the PNG to write.
        count: number of pictures.
        threshold: score from which a detection is drawn.
    """
    predictors = {name: _predictor(Path(folder), threshold) for name, folder in runs.items()}
    test_set = next(iter(predictors.values())).cfg.DATASETS.TEST[0]
    metadata = MetadataCatalog.get(test_set)
    records = DatasetCatalog.get(test_set)
    records = records[:: max(1, len(records) // count)][:count]
    figure, axes = _figure(1 + len(predictors), len(records), (3.6 * len(records), 3 * (1 + len(predictors))))
    for column, record in enumerate(records):
        image = read_image(record["file_name"], "BGR")
        drawings = {"ground truth": _visualizer(image, metadata).draw_dataset_dict(record)}
        for name, predictor in predictors.items():
            instances = predictor(image)["instances"].to("cpu")
            drawings[name] = _visualizer(image, metadata).draw_instance_predictions(instances)
        for axis, (name, drawing) in zip(axes[:, column], drawings.items(), strict=True):
            axis.imshow(drawing.get_image())
            axis.set_axis_off()
            if column == 0:
                axis.set_title(f"{name} (score >= {threshold})" if name in predictors else name, loc="left")
    _save_figure(figure, path)


def _predictor(folder: Path, threshold: float) -> DefaultPredictor:
    cfg = load_cfg(folder / "config.yaml")
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = threshold
    return DefaultPredictor(cfg)


def _visualizer(image: np.ndarray, metadata: Any) -> Visualizer:
    # Enlarge small pictures, so that captions can be read.
    return Visualizer(image[:, :, ::-1], metadata, scale=max(1.0, 480 / image.shape[1]))


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    # Without pyplot: no global state, no display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save_figure(figure: Any, path: FolderLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with atomic_write(path) as file:
        file.write(buffer.getvalue())

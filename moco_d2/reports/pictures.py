"""Pictures of a run: the pretraining curve, the views, the detections."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from detectron2.utils.visualizer import Visualizer
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from moco_d2.data import ViewDataset, build_augmentation, build_backend, open_source
from moco_d2.detection.mapper import read_label_image, read_pixels
from moco_d2.detection.predictor import load_predictor
from moco_d2.io.files import atomic_write
from moco_d2.reports.curves import plot_lines
from moco_d2.reports.panels import Panel, panels_of_run, panels_of_runs
from moco_d2.reports.pretraining import Pretraining, read_pretraining

FolderLike = str | os.PathLike[str]
SOFTWARE = "moco_d2"  # in the header of our pictures, so that only those are replaced


def draw_pretraining_curve(run: FolderLike, path: FolderLike) -> None:
    """Draw the loss and the method's other diagnostics of a pretraining run, and what its monitor measured.

    Args:
        run: its folder, with ``metrics.json`` and ``config.yaml``.
        path: of the PNG.

    Raises:
        ValueError: the run recorded nothing.
    """
    _draw_panels(panels_of_run(read_pretraining(Path(run))), path)


def draw_pretraining_curves(runs: Sequence[Pretraining], path: FolderLike) -> None:
    """Draw the same of several runs over epochs, with a line a run.

    Args:
        runs: finished or not.
        path: of the PNG.
    """
    _draw_panels(panels_of_runs(runs), path)


def _draw_panels(panels: Sequence[Panel], path: FolderLike) -> None:
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure, axes = _figure(rows, columns, (5 * columns, 3.2 * rows))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, panels, strict=False):
        plot_lines(axis, *panel)
    save_figure(figure, path)


def save_panels(painters: Sequence[Callable[[Any], None]], path: FolderLike) -> None:
    """Draw plots as :func:`moco_d2.reports.curves.draw_panels` does, into a PNG."""
    figure = Figure(figsize=(7.5, 2.6 * len(painters)), layout="constrained")
    for axis, paint in zip(figure.subplots(len(painters), sharex=True, squeeze=False)[:, 0], painters, strict=True):
        paint(axis)
    save_figure(figure, path)


def draw_view_pairs(cfg: CfgNode, path: FolderLike, count: int = 8) -> None:
    """Draw images as pretraining sees them: a column per image, a row per view.

    Args:
        cfg: config of a pretraining run.
        path: of the PNG.
        count: number of images.
    """
    augmentation = build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE)
    source = open_source(cfg.DATASETS.TRAIN)
    dataset = ViewDataset(source, augmentation, max(cfg.SEED, 0), build_backend("pil", torch.device("cpu")))
    chosen = range(0, len(source), max(1, len(source) // count))[:count]
    figure, axes = _figure(len(augmentation.views), len(chosen), (1.5 * len(chosen), 1.6 * len(augmentation.views)))
    for column, index in enumerate(chosen):
        for row, view in enumerate(dataset[0, index].views):
            axes[row, column].imshow(view)
            axes[row, column].set_axis_off()
    figure.suptitle(f"views of {cfg.DATA.AUGMENTATION}, an image per column", fontsize=11)
    save_figure(figure, path)


def draw_detections(runs: Mapping[str, FolderLike], path: FolderLike, count: int = 4, threshold: float = 0.25) -> None:
    """Draw test images with their ground truth, and with the detections of each run.

    Args:
        runs: heading to folder of a finished run (``config.yaml``, ``model_final.pth``), all on the same test set.
        path: of the PNG.
        count: number of images.
        threshold: lowest score of a detection that is drawn.
    """
    predictors = {name: load_predictor(Path(folder) / "model_final.pth", threshold) for name, folder in runs.items()}
    cfg = next(iter(predictors.values())).cfg
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
    records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    records = records[:: max(1, len(records) // count)][:count]
    figure, axes = _figure(1 + len(predictors), len(records), (3.6 * len(records), 3 * (1 + len(predictors))))
    for column, record in enumerate(records):
        image = read_pixels(record["file_name"], "RGB", cfg.DATA.MAX_PIXELS)
        drawings = {"ground truth": draw_scene(image, metadata, Scene.labelled(record, cfg))}
        for name, predictor in predictors.items():
            drawings[name] = draw_scene(image, metadata, Scene.predicted(predictor(image[:, :, ::-1])))
        for axis, (name, drawing) in zip(axes[:, column], drawings.items(), strict=True):
            axis.imshow(drawing)
            axis.set_axis_off()
            if column == 0:
                axis.set_title(f"{name} (score >= {threshold})" if name in predictors else name, loc="left")
    save_figure(figure, path)


@dataclass(frozen=True)
class Scene:
    """The objects or pixel classes on an image: labels, a training sample, or a detector's output.

    Attributes:
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        classes: N numbers.
        scores: N, or None for labels.
        masks: N, in any form that Detectron2's Visualizer accepts, or None.
        keypoints: (N, K, 3) x, y and visibility or score, or None.
        sem_seg: (H, W) class of each pixel, or None.
    """

    boxes: np.ndarray
    classes: list[int]
    scores: list[float] | None = None
    masks: Sequence[Any] | None = None
    keypoints: np.ndarray | None = None
    sem_seg: np.ndarray | None = None

    @classmethod
    def labelled(cls, record: Mapping[str, Any], cfg: CfgNode) -> Scene:
        """Return the labels in a data set's record, as far as the config's detector learns them."""
        items = [item for item in record.get("annotations", ()) if not item.get("iscrowd")]
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
        masks = cfg.MODEL.MASK_ON and all("segmentation" in item for item in items)
        keypoints = cfg.MODEL.KEYPOINT_ON and all("keypoints" in item for item in items)
        sem_seg = None
        if "sem_seg_file_name" in record and not items:
            sem_seg = read_label_image(record["sem_seg_file_name"], cfg.DATA.MAX_PIXELS)
        return cls(
            np.array(boxes, float).reshape(-1, 4),
            [item["category_id"] for item in items],
            masks=[item["segmentation"] for item in items] if masks else None,
            keypoints=np.array([np.reshape(item["keypoints"], (-1, 3)) for item in items]) if keypoints else None,
            sem_seg=sem_seg,
        )

    @classmethod
    def trained_on(cls, sample: Mapping[str, Any]) -> Scene:
        """Return a training sample, as Detectron2's mapper gives it to a model."""
        if "instances" not in sample:
            return cls(np.zeros((0, 4)), [], sem_seg=sample["sem_seg"].numpy())
        found = sample["instances"]
        masks = found.get("gt_masks") if found.has("gt_masks") else None
        if masks is not None:
            masks = masks.polygons if hasattr(masks, "polygons") else list(masks.tensor.numpy())
        keypoints = found.get("gt_keypoints").tensor.numpy() if found.has("gt_keypoints") else None
        return cls(found.gt_boxes.tensor.numpy(), found.gt_classes.tolist(), masks=masks, keypoints=keypoints)

    @classmethod
    def predicted(cls, output: Mapping[str, Any]) -> Scene:
        """Return a model's output for one image."""
        if "instances" not in output:
            return cls(np.zeros((0, 4)), [], sem_seg=output["sem_seg"].argmax(0).cpu().numpy())
        found = output["instances"].to("cpu")
        return cls(
            found.pred_boxes.tensor.numpy(),
            found.pred_classes.tolist(),
            found.scores.tolist(),
            list(found.pred_masks.numpy()) if found.has("pred_masks") else None,
            found.pred_keypoints.numpy() if found.has("pred_keypoints") else None,
        )

    def choose(self, indices: Sequence[int]) -> Scene:
        """Return some of the objects."""
        return Scene(
            self.boxes[list(indices)],
            [self.classes[i] for i in indices],
            None if self.scores is None else [self.scores[i] for i in indices],
            None if self.masks is None else [self.masks[i] for i in indices],
            None if self.keypoints is None else self.keypoints[list(indices)],
            self.sem_seg,
        )


def draw_scene(image: np.ndarray, metadata: Any, scene: Scene, colors: Sequence[Any] | None = None) -> np.ndarray:
    """Draw a scene on an image with Detectron2's Visualizer, and return the drawing.

    Args:
        image: (H, W, 3) RGB.
        metadata: of the data set: names of classes, skeleton of keypoints, colours of pixels.
        scene: what to draw.
        colors: one per object; by default one per class.
    """
    # Small images are enlarged and large ones get larger letters, so that captions are legible.
    width = image.shape[1]
    visualizer = Visualizer(image, metadata, max(1.0, 480 / width), font_size_scale=max(1.0, width / 600))
    if scene.sem_seg is not None:
        return np.asarray(visualizer.draw_sem_seg(scene.sem_seg, area_threshold=0, alpha=0.6).get_image())
    if colors is None:  # hues in steps of the golden ratio, so that neighbours differ
        colors = [hsv_to_rgb((0.618034 * number % 1, 0.9, 0.95)) for number in scene.classes]
    names = metadata.get("thing_classes")
    labels = [names[number] if names else str(number) for number in scene.classes]
    if scene.scores is not None:
        labels = [f"{label} {score:.0%}" for label, score in zip(labels, scene.scores, strict=True)]
    drawing = visualizer.overlay_instances(
        boxes=scene.boxes, labels=labels, masks=scene.masks, keypoints=scene.keypoints, assigned_colors=list(colors)
    )
    return np.asarray(drawing.get_image())


def is_picture(path: Path) -> bool:
    """Return whether a file is a picture that this module drew."""
    with path.open("rb") as file:
        head = file.read(256)
    return head.startswith(b"\x89PNG") and f"Software\0{SOFTWARE}".encode() in head


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Any, path: FolderLike) -> None:
    """Write a matplotlib figure as a PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": SOFTWARE})
    with atomic_write(path) as file:
        file.write(buffer.getvalue())

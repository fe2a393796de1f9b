"""Picture of a whole experiment: what a pretraining learned over its iterations, and what detectors find then."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure

from moco_d2.config import load_cfg
from moco_d2.detection.datasets import register_custom
from moco_d2.detection.mapper import read_pixels
from moco_d2.detection.predictor import load_predictor
from moco_d2.engine.build import outline
from moco_d2.engine.monitor import DIAGNOSTICS
from moco_d2.reports.curves import plot_lines
from moco_d2.reports.pictures import FolderLike, Scene, draw_scene, save_figure
from moco_d2.reports.records import read_scalars
from moco_d2.reports.run import read_run

KNN = DIAGNOSTICS[0]


def draw_overview(
    pretraining: FolderLike, runs: Mapping[str, FolderLike], path: FolderLike, count: int = 3, threshold: float = 0.25
) -> None:
    """Draw the kNN accuracy and the loss of a pretraining, beside the detections of the detectors fine-tuned from it.

    Args:
        pretraining: folder of the run; the accuracy is there if it had a monitor (``SSL.MONITOR``).
        runs: heading to folder of a finished fine-tuning run, all on the same test set. The box AP joins the heading.
        path: of the PNG.
        count: number of test images, evenly spaced, a column each; below them stand the labels.
        threshold: lowest score of a detection that is drawn.

    Raises:
        ValueError: a folder has no finished run of its kind, or the runs have different test sets.
    """
    records = list(read_scalars(Path(pretraining)))
    method = outline(load_cfg(Path(pretraining) / "config.yaml")).diagnostics()
    (loss,) = (one for one in method if one.key == "total_loss")
    curves = {one: [(r["iteration"] + 1, r[one.key]) for r in records if one.key in r] for one in (KNN, loss)}
    curves = {one: points for one, points in curves.items() if points}
    if loss not in curves:
        raise ValueError(f"{Path(pretraining) / 'metrics.json'} is missing, or has no figures of a pretraining run")
    rows = _detections(runs, count, threshold)

    columns = len(next(iter(rows.values())))
    figure = Figure(figsize=(3.6 + 2.8 * columns, 2.2 * len(rows)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[3.6, 2.8 * columns])
    left, right = parts
    for axis, (one, points) in zip(left.subplots(len(curves), 1, squeeze=False).flat, curves.items(), strict=True):
        references = [(one.reference_label, one.reference)] if one.reference is not None else []
        plot_lines(axis, one.panel, {one.label.removeprefix("-"): [points]}, references)
    axes = right.subplots(len(rows), columns, squeeze=False)
    for line, (title, drawings) in zip(axes, rows.items(), strict=True):
        line[0].set_title(title, loc="left", fontsize=11)
        for axis, drawing in zip(line, drawings, strict=True):
            axis.imshow(drawing)
            axis.set_axis_off()
    save_figure(figure, path)


def _detections(runs: Mapping[str, FolderLike], count: int, threshold: float) -> dict[str, list[np.ndarray]]:
    """Return a row of drawings for each run, and one of the labels, by heading."""
    results = {name: read_run(folder) for name, folder in runs.items()}
    predictors = {name: load_predictor(Path(folder) / "model_final.pth", threshold) for name, folder in runs.items()}
    tests = {predictor.cfg.DATASETS.TEST[:1] for predictor in predictors.values()}
    if len(tests) != 1 or tests == {()}:
        raise ValueError(f"{len(runs)} runs of test sets {sorted(tests)}: the picture takes runs of one test set")
    cfg = next(iter(predictors.values())).cfg
    register_custom(cfg, train=False)
    ((name,),) = tests
    metadata, records = MetadataCatalog.get(name), DatasetCatalog.get(name)
    records = [records[i] for i in np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)]
    images = [read_pixels(record["file_name"], "RGB", cfg.DATA.MAX_PIXELS) for record in records]
    rows = {}
    for title, predictor in predictors.items():
        ap = results[title].metrics.get(name, {}).get("bbox/AP")
        found = [Scene.predicted(predictor(image[:, :, ::-1])) for image in images]
        drawings = [draw_scene(image, metadata, scene) for image, scene in zip(images, found, strict=True)]
        rows[title if ap is None else f"{title}: AP {ap:.1f}"] = drawings
    labels = [Scene.labelled(record, cfg) for record in records]
    rows["labels"] = [draw_scene(image, metadata, scene) for image, scene in zip(images, labels, strict=True)]
    return rows

"""Pages of pictures: a detector's training samples, and the detections of one or two detectors, worst and best first.

A page is a self-contained folder: ``index.html`` and its pictures.
"""

from __future__ import annotations

import html
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import DefaultPredictor
from detectron2.structures import BoxMode

from moco_d2.detection.datasets import register_custom
from moco_d2.detection.mapper import read_pixels
from moco_d2.detection.predictor import load_predictor
from moco_d2.detection.preflight import check_run
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.io.files import empty_folder
from moco_d2.reports.page import figure, write_page
from moco_d2.reports.pictures import Scene, draw_scene
from moco_d2.reports.ranking import Outcome, Rating, best_threshold, f1, match, mean_iou, rank

logger = logging.getLogger(__name__)

_LOWEST_SCORE = 0.05  # as in Detectron2's and COCO's evaluation
_COLORS = {1: (0.1, 0.75, 0.2), 0: (0.95, 0.15, 0.15), -1: (0.6, 0.6, 0.6)}  # by Outcome.kinds


def samples_page(cfg: CfgNode, folder: str | os.PathLike[str], count: int = 24) -> Path:
    """Draw training samples as the model gets them: scaled, cropped and flipped, with their labels.

    Args:
        cfg: config of a detector.
        folder: of the page; new or empty.
        count: number of samples.

    Returns:
        The page.

    Raises:
        ValueError: the folder is not empty, or there is a mistake in the config or the data sets.
    """
    folder = empty_folder(folder, "--output")
    figures = []
    with tempfile.TemporaryDirectory() as scratch:
        cfg = _with_output(cfg, scratch)
        register_custom(cfg)
        check_run(cfg, world_size=1)
        metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
        samples = (sample for batch in TransferTrainer.build_train_loader(cfg) for sample in batch)
        for number, sample in zip(range(count), samples, strict=False):
            image = convert_image_to_rgb(sample["image"].permute(1, 2, 0), cfg.INPUT.FORMAT)
            height, width = image.shape[:2]
            caption = f"{Path(sample['file_name']).name}, {width} x {height}"
            drawing = draw_scene(image, metadata, Scene.trained_on(sample))
            figures.append(figure(folder, f"{number:03d}", drawing, caption))
    sets = html.escape(", ".join(cfg.DATASETS.TRAIN))
    text = f"<p>{len(figures)} samples of {sets}, after the augmentations of the config.</p>"
    return write_page(folder, "Training samples", text + f'<div class="grid">{"".join(figures)}</div>')


def detections_page(
    runs: Mapping[str, str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    count: int = 12,
    pictures: int = 500,
    opts: Sequence[str] = (),
) -> Path:
    """Draw test images with their labels and one or two checkpoints' detections: worst images first, then the best.

    Args:
        runs: heading to checkpoint (with its run's ``config.yaml`` in its folder), one or two of the same test set.
        folder: of the page; new or empty.
        count: number of images under each heading.
        pictures: number of images of the first test set that are evaluated, evenly spaced; 0 for all.
        opts: ``KEY VALUE`` overrides of the configs (``DATASETS.TEST`` for another test set).

    Returns:
        The page.

    Raises:
        ValueError: the folder is not empty, checkpoints cannot be loaded or compared, or there is a mistake in the test
            set.
    """
    folder = empty_folder(folder, "--output")
    predictors = {name: load_predictor(path, _LOWEST_SCORE, opts) for name, path in runs.items()}
    tests = {predictor.cfg.DATASETS.TEST[:1] for predictor in predictors.values()}
    if len(predictors) not in (1, 2) or len(tests) != 1 or tests == {()}:
        raise ValueError(f"{len(runs)} runs of test sets {sorted(tests)}: a page takes one or two runs of one set")
    if any(predictor.cfg.MODEL.LOAD_PROPOSALS for predictor in predictors.values()):
        raise ValueError("MODEL.LOAD_PROPOSALS is True: a page cannot show a detector whose proposals come from a file")
    with tempfile.TemporaryDirectory() as scratch:
        for predictor in predictors.values():
            cfg = _with_output(predictor.cfg, scratch)
            register_custom(cfg, train=False)
            check_run(cfg, world_size=1, train=False)
        records = DatasetCatalog.get(cfg.DATASETS.TEST[0])
    if not {"annotations", "sem_seg_file_name"} & records[0].keys():
        raise ValueError(f"test set {cfg.DATASETS.TEST[0]!r} has no labels to compare with")
    if 0 < pictures < len(records):
        records = [records[index] for index in np.linspace(0, len(records) - 1, pictures).round().astype(int)]
    segments = "sem_seg_file_name" in records[0] and not records[0].get("annotations")
    kind = _Segmenter if segments else _Detector
    shown = [kind(name, predictor, records) for name, predictor in predictors.items()]
    text = _summary(shown, cfg.DATASETS.TEST[0])
    for title, chosen in rank([one.ratings for one in shown], list(runs), count).items():
        rows = (_row(folder, index, records[index], shown) for index in chosen)
        text += f"<h2>{html.escape(title)}</h2>" + "".join(rows)
        if not chosen:
            text += "<p>None.</p>"
    return write_page(folder, " and ".join(runs), text)


class _Checkpoint:
    """A trained model with its ratings on all images.

    Attributes:
        ratings: a rating per image.
        facts: its figures over all images, as text.
    """

    ratings: list[Rating]
    facts: str

    def __init__(self, title: str, predictor: DefaultPredictor) -> None:
        self.title, self.cfg, self._predictor = title, predictor.cfg, predictor
        self.metadata = MetadataCatalog.get(predictor.cfg.DATASETS.TEST[0])

    def predict(self, record: Mapping[str, Any]) -> Scene:
        """Return the model's output for an image, highest scores first."""
        scene = Scene.predicted(self._predictor(self._read(record, "BGR")))
        return (
            scene if scene.scores is None else scene.choose(np.argsort(-np.array(scene.scores), kind="stable").tolist())
        )

    def _read(self, record: Mapping[str, Any], image_format: str) -> np.ndarray:
        return read_pixels(record["file_name"], image_format, self.cfg.DATA.MAX_PIXELS)

    def draw(self, record: Mapping[str, Any]) -> np.ndarray:
        """Return a drawing of the model's output for an image."""
        return draw_scene(self._read(record, "RGB"), self.metadata, self.predict(record))


class _Detector(_Checkpoint):
    """A model of boxes, with masks or keypoints, rated by F1 at IoU .5."""

    def __init__(self, title: str, predictor: DefaultPredictor, records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(title, predictor)
        # Predictions are not kept: masks of all images would not fit into memory.
        outcomes = [self._match(record, self.predict(record)) for record in records]
        self.threshold = best_threshold(outcomes)
        counts = [outcome.counts(self.threshold) for outcome in outcomes]
        self.ratings = [
            Rating(f1(*c), c[1] + c[2], c[0], f"F1 {f1(*c):.2f}: {c[0]} right, {c[1]} wrong, {c[2]} missed")
            for c in counts
        ]
        together = np.sum(counts, axis=0)
        self.facts = (
            f"F1 {f1(*together):.3f} over all ({together[0]} right, {together[1]} wrong, {together[2]} missed) "
            f"with detections of score {self.threshold:.2f} or more"
            if any(len(outcome.scores) for outcome in outcomes)
            else f"no detection of score {_LOWEST_SCORE} or more on any image"
        )

    @staticmethod
    def _match(record: Mapping[str, Any], scene: Scene) -> Outcome:
        items = record["annotations"]
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
        crowd = np.array([bool(item.get("iscrowd")) for item in items], bool)
        difficult = np.array([bool(item.get("difficult")) for item in items], bool)
        return match(scene, np.reshape(boxes, (-1, 4)), [i["category_id"] for i in items], crowd | difficult, crowd)

    def draw(self, record: Mapping[str, Any]) -> np.ndarray:
        """Return a drawing of the detections: right in green, wrong in red, not counted in grey."""
        scene = self.predict(record)
        assert scene.scores is not None
        scene = scene.choose([i for i, score in enumerate(scene.scores) if score >= self.threshold])
        colors = [_COLORS[kind] for kind in self._match(record, scene).kinds]
        return draw_scene(self._read(record, "RGB"), self.metadata, scene, colors)


class _Segmenter(_Checkpoint):
    """A model of semantic segmentation, rated by the mean IoU."""

    def __init__(self, title: str, predictor: DefaultPredictor, records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(title, predictor)
        self.ratings = []
        for record in records:
            labels, found = Scene.labelled(record, self.cfg).sem_seg, self.predict(record).sem_seg
            assert labels is not None and found is not None
            quality = mean_iou(found, labels, self.metadata.ignore_label)
            self.ratings.append(Rating(quality, 0, 0, f"mean IoU {quality:.2f}"))
        self.facts = f"mean IoU per image {np.mean([rating.quality for rating in self.ratings]):.3f}"


def _summary(shown: Sequence[_Checkpoint], test_set: str) -> str:
    text = f"<p>{len(shown[0].ratings)} images of {html.escape(test_set)}."
    if isinstance(shown[0], _Detector):
        text += (
            " Boxes of detections: right in green, wrong in red, not counted (on a crowd or a difficult object) in "
            "grey. F1 is that of an image's boxes at IoU .5, with each checkpoint's own best score threshold."
        )
    rows = "".join(f"<tr><th>{html.escape(one.title)}</th><td>{one.facts}</td></tr>" for one in shown)
    if len(shown) == 2:
        first, second = (np.array([rating.quality for rating in one.ratings]) for one in shown)
        rows += (
            f"<tr><th>{html.escape(shown[1].title)} is</th><td>better on {(second > first).sum()}, worse on "
            f"{(second < first).sum()}, equal on {(second == first).sum()} images</td></tr>"
        )
    return f"{text}</p><table>{rows}</table>"


def _row(folder: Path, index: int, record: Mapping[str, Any], shown: Sequence[_Checkpoint]) -> str:
    """Draw an image's labels and the output of each checkpoint."""
    image = read_pixels(record["file_name"], "RGB", shown[0].cfg.DATA.MAX_PIXELS)
    truth = draw_scene(image, shown[0].metadata, Scene.labelled(record, shown[0].cfg))
    figures = [figure(folder, f"{index:05d}-labels", truth, f"labels of {Path(record['file_name']).name}")]
    for number, one in enumerate(shown):
        caption = f"{one.title}: {one.ratings[index].words}"
        figures.append(figure(folder, f"{index:05d}-{number}", one.draw(record), caption))
    return f'<div class="row">{"".join(figures)}</div>'


def _with_output(cfg: CfgNode, folder: str) -> CfgNode:
    """Return the config with another ``OUTPUT_DIR``, because files written by checks are not part of the page."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    return cfg

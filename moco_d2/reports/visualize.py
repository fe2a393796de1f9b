"""Pages of pictures: what a detector is trained on, and what one or two of them find, worst and best first.

A page is a folder with ``index.html`` and the pictures it shows, to be moved or mailed as it is.

How pictures are ranked:

* Objects: F1 = 2 TP / (2 TP + FP + FN) of a picture's boxes at IoU .5. Detections take objects of their class in the
  order of their scores, each the one they overlap most that is still free. What falls on a crowd or on a difficult
  object does not count. (AP is not defined for one picture.) Detections count from a score that each checkpoint has of
  its own: the one that gives it the highest F1 over all pictures, so that of two checkpoints neither suffers from timid
  scores.
* Semantic segmentation: the mean IoU of the classes that are on the picture or that the model sees there.
* Two checkpoints: by the second one's figure minus the first one's.

Ties are broken by the number of errors (worst) or of objects found (best).
"""

from __future__ import annotations

import html
import io
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.engine import DefaultPredictor
from detectron2.structures import Boxes, BoxMode, pairwise_iou
from PIL import Image

from moco_d2.detection.datasets import register_custom
from moco_d2.detection.mapper import read_pixels
from moco_d2.detection.preflight import check_run
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.io.files import atomic_write, empty_folder
from moco_d2.reports.pictures import Scene, draw_scene, load_predictor

logger = logging.getLogger(__name__)

_LOWEST_SCORE = 0.05  # as in Detectron2's and COCO's evaluation
_WIDTH = 1000  # of a drawing, in pixels, at most
_COLORS = {1: (0.1, 0.75, 0.2), 0: (0.95, 0.15, 0.15), -1: (0.6, 0.6, 0.6)}  # by Outcome.kinds

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1500px; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin-bottom: 2rem; } th, td { padding: .2rem .9rem .2rem 0; text-align: left; }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .6rem; margin-bottom: 1.4rem; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: .8rem; }
figure { margin: 0; } img { width: 100%; height: auto; } figcaption { font-size: 13px; overflow-wrap: anywhere; }
"""


# What a detector is trained on.


def samples_page(cfg: CfgNode, folder: str | os.PathLike[str], count: int = 24) -> Path:
    """Draw training samples as the model gets them: scaled, cropped and flipped, with what it learns from them.

    Args:
        cfg: config of a detector.
        folder: where the page is made; new or empty.
        count: number of samples.

    Returns:
        The page.

    Raises:
        ValueError: the folder is in use, or the data sets are not in order.
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
            figures.append(_figure(folder, f"{number:03d}", drawing, caption))
    sets = html.escape(", ".join(cfg.DATASETS.TRAIN))
    text = f"<p>{len(figures)} samples of {sets}, after the augmentations of the config.</p>"
    return _write_page(folder, "Training samples", text + f'<div class="grid">{"".join(figures)}</div>')


# What detectors find.


def detections_page(
    runs: Mapping[str, str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    count: int = 12,
    pictures: int = 500,
    opts: Sequence[str] = (),
) -> Path:
    """Draw what one or two checkpoints find on test pictures beside the labels, worst first and then the best.

    Args:
        runs: heading to checkpoint (its run's ``config.yaml`` beside it), one or two of the same test set.
        folder: where the page is made; new or empty.
        count: number of pictures of each kind.
        pictures: of the first test set, looked at in all; evenly spaced. 0 for all.
        opts: further ``KEY VALUE`` pairs for the configs (``DATASETS.TEST`` for another test set).

    Returns:
        The page.

    Raises:
        ValueError: the folder is in use, checkpoints cannot be loaded or compared, or the test set is not in order.
    """
    folder = empty_folder(folder, "--output")
    predictors = {name: load_predictor(path, _LOWEST_SCORE, opts) for name, path in runs.items()}
    tests = {predictor.cfg.DATASETS.TEST[:1] for predictor in predictors.values()}
    if len(predictors) not in (1, 2) or len(tests) != 1 or tests == {()}:
        raise ValueError(f"one or two runs of one test set are shown, not {len(runs)} of {sorted(tests)}")
    if any(predictor.cfg.MODEL.LOAD_PROPOSALS for predictor in predictors.values()):
        raise ValueError("MODEL.LOAD_PROPOSALS is True: a detector that takes its proposals from a file is not shown")
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
    judges = [
        (_PixelJudge if "sem_seg_file_name" in records[0] and not records[0].get("annotations") else _ObjectJudge)(
            name, predictor, records
        )
        for name, predictor in predictors.items()
    ]
    text = _summary(judges, cfg.DATASETS.TEST[0])
    for title, chosen in rank([judge.verdicts for judge in judges], list(runs), count).items():
        text += f"<h2>{html.escape(title)}</h2>" + "".join(
            _row(folder, index, records[index], judges) for index in chosen
        )
        if not chosen:
            text += "<p>None.</p>"
    return _write_page(folder, " and ".join(runs), text)


@dataclass(frozen=True)
class Verdict:
    """How well a checkpoint does on a picture.

    Attributes:
        quality: 0 to 1.
        errors: number of wrong and missed objects.
        found: number of objects found.
        words: the same for the reader.
    """

    quality: float
    errors: int
    found: int
    words: str


def rank(verdicts: Sequence[Sequence[Verdict]], names: Sequence[str], count: int) -> dict[str, list[int]]:
    """Return headings with the pictures below them, by the rules at the top of this file.

    Args:
        verdicts: of one or two checkpoints, a picture each.
        names: of the checkpoints.
        count: number of pictures of each kind.
    """
    if len(verdicts) == 1:
        order = sorted(range(len(verdicts[0])), key=lambda i: (verdicts[0][i].quality, -verdicts[0][i].errors))
        worst = order[:count]
        rest = sorted(order[count:], key=lambda i: (-verdicts[0][i].quality, -verdicts[0][i].found))
        return {"Worst": worst, "Best": rest[:count]}
    pairs = list(zip(*verdicts, strict=True))
    gains = [(second.quality - first.quality, first.errors - second.errors) for first, second in pairs]
    order = sorted(range(len(pairs)), key=lambda i: gains[i])
    return {
        f"{names[1]} worse than {names[0]}": [i for i in order[:count] if gains[i] < (0, 0)],
        f"{names[1]} better than {names[0]}": [i for i in reversed(order[-count:]) if gains[i] > (0, 0)],
    }


class _Judge:
    """One checkpoint, with its verdicts on all pictures."""

    verdicts: list[Verdict]
    facts: str

    def __init__(self, title: str, predictor: DefaultPredictor) -> None:
        self.title, self.cfg, self._predictor = title, predictor.cfg, predictor
        self.metadata = MetadataCatalog.get(predictor.cfg.DATASETS.TEST[0])

    def see(self, record: Mapping[str, Any]) -> Scene:
        """Return the detector's output for a picture, highest scores first."""
        scene = Scene.predicted(self._predictor(self._read(record, "BGR")))
        return (
            scene if scene.scores is None else scene.choose(np.argsort(-np.array(scene.scores), kind="stable").tolist())
        )

    def _read(self, record: Mapping[str, Any], image_format: str) -> np.ndarray:
        return read_pixels(record["file_name"], image_format, self.cfg.DATA.MAX_PIXELS)

    def draw(self, record: Mapping[str, Any]) -> np.ndarray:
        """Return the drawing of what the detector finds on a picture."""
        return draw_scene(self._read(record, "RGB"), self.metadata, self.see(record))


class _ObjectJudge(_Judge):
    """Boxes, with masks or keypoints: F1 at IoU .5."""

    def __init__(self, title: str, predictor: DefaultPredictor, records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(title, predictor)
        # Only these are kept: masks of all pictures would not fit into memory.
        outcomes = [self._judge(record, self.see(record)) for record in records]
        self.threshold = best_threshold(outcomes)
        counts = [outcome.counts(self.threshold) for outcome in outcomes]
        self.verdicts = [
            Verdict(f1(*c), c[1] + c[2], c[0], f"F1 {f1(*c):.2f}: {c[0]} right, {c[1]} wrong, {c[2]} missed")
            for c in counts
        ]
        together = np.sum(counts, axis=0)
        self.facts = (
            f"F1 {f1(*together):.3f} over all ({together[0]} right, {together[1]} wrong, {together[2]} missed) "
            f"with detections from score {self.threshold:.2f} on"
            if any(len(outcome.scores) for outcome in outcomes)
            else f"no detection of score {_LOWEST_SCORE} or more on any picture"
        )

    @staticmethod
    def _judge(record: Mapping[str, Any], scene: Scene) -> Outcome:
        items = record["annotations"]
        boxes = [BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYXY_ABS) for item in items]
        crowd = np.array([bool(item.get("iscrowd")) for item in items], bool)
        difficult = np.array([bool(item.get("difficult")) for item in items], bool)
        return match(scene, np.reshape(boxes, (-1, 4)), [i["category_id"] for i in items], crowd | difficult, crowd)

    def draw(self, record: Mapping[str, Any]) -> np.ndarray:
        """Draw detections by what became of them: green right, red wrong, grey not counted."""
        scene = self.see(record)
        assert scene.scores is not None
        scene = scene.choose([i for i, score in enumerate(scene.scores) if score >= self.threshold])
        colors = [_COLORS[kind] for kind in self._judge(record, scene).kinds]
        return draw_scene(self._read(record, "RGB"), self.metadata, scene, colors)


class _PixelJudge(_Judge):
    """Semantic segmentation: mean IoU."""

    def __init__(self, title: str, predictor: DefaultPredictor, records: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(title, predictor)
        self.verdicts = []
        for record in records:
            labels, found = Scene.labelled(record, self.cfg).sem_seg, self.see(record).sem_seg
            assert labels is not None and found is not None
            quality = mean_iou(found, labels, self.metadata.ignore_label)
            self.verdicts.append(Verdict(quality, 0, 0, f"mean IoU {quality:.2f}"))
        self.facts = f"mean IoU of a picture {np.mean([verdict.quality for verdict in self.verdicts]):.3f}"


@dataclass(frozen=True)
class Outcome:
    """What became of the detections on one picture.

    Attributes:
        scores: (N,) in falling order.
        kinds: (N,) 1 right, 0 wrong, -1 not counted; what a detection becomes does not depend on those of lower score.
        wanted: number of objects to be found.
    """

    scores: np.ndarray
    kinds: np.ndarray
    wanted: int

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Return right, wrong and missed from a score on."""
        kinds = self.kinds[self.scores >= threshold]
        right = int((kinds == 1).sum())
        return right, int((kinds == 0).sum()), self.wanted - right


def match(scene: Scene, boxes: np.ndarray, classes: Sequence[int], ignored: np.ndarray, crowd: np.ndarray) -> Outcome:
    """Match a picture's detections with its objects.

    Args:
        scene: detections, highest scores first.
        boxes: (M, 4) of the objects.
        classes: M numbers.
        ignored: (M,) objects that need not be found.
        crowd: (M,) those of them that may be found many times, a detection counting when half of it lies inside.
    """
    assert scene.scores is not None
    found = Boxes(torch.as_tensor(scene.boxes, dtype=torch.float32).reshape(-1, 4))
    objects = Boxes(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    overlaps = pairwise_iou(found, objects).numpy()
    if crowd.any():
        corners = [fn(found.tensor[:, None, s], objects.tensor[None, :, s]) for fn, s in
                   ((torch.maximum, slice(0, 2)), (torch.minimum, slice(2, 4)))]  # fmt: skip
        inside = (corners[1] - corners[0]).clamp(min=0).prod(-1) / found.area()[:, None].clamp(min=1e-6)
        overlaps[:, crowd] = inside.numpy()[:, crowd]
    free, wanted = np.ones(len(boxes), bool), ~ignored
    kinds = np.zeros(len(scene.scores), int)
    for row, kind in enumerate(scene.classes):
        reach = (overlaps[row] >= 0.5) & (np.array(classes, int) == kind)
        candidates = np.flatnonzero(reach & free & wanted)
        if len(candidates):
            free[candidates[overlaps[row, candidates].argmax()]] = False
            kinds[row] = 1
        elif (reach & ignored).any():
            kinds[row] = -1
    return Outcome(np.array(scene.scores), kinds, int(wanted.sum()))


def f1(right: int, wrong: int, missed: int) -> float:
    """Return F1; a picture without objects and detections has 1."""
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def best_threshold(outcomes: Sequence[Outcome]) -> float:
    """Return the score from which detections give the highest F1 over all pictures together."""
    scores = np.concatenate([outcome.scores for outcome in outcomes])
    kinds = np.concatenate([outcome.kinds for outcome in outcomes])
    if not len(scores):
        return 0.5
    order = np.argsort(-scores, kind="stable")
    right, wrong = np.cumsum(kinds[order] == 1), np.cumsum(kinds[order] == 0)
    wanted = sum(outcome.wanted for outcome in outcomes)
    quality = 2 * right / np.maximum(right + wrong + wanted, 1)
    # Equal scores stand or fall together: only the last of them is a threshold.
    quality[:-1][np.diff(scores[order]) == 0] = -1
    return float(scores[order][quality.argmax()])


def mean_iou(predicted: np.ndarray, labels: np.ndarray, ignore: int) -> float:
    """Return the mean IoU of the classes that a picture has or is said to have, void pixels aside."""
    predicted, labels = predicted[labels != ignore], labels[labels != ignore]
    classes = np.union1d(predicted, labels)
    ious = [((predicted == c) & (labels == c)).sum() / ((predicted == c) | (labels == c)).sum() for c in classes]
    return float(np.mean(ious)) if len(ious) else 1.0


# Pages.


def _summary(judges: Sequence[_Judge], test_set: str) -> str:
    pictures = len(judges[0].verdicts)
    text = f"<p>{pictures} pictures of {html.escape(test_set)}."
    if isinstance(judges[0], _ObjectJudge):
        text += (
            " Boxes of detections: green right, red wrong, grey not counted (a crowd, or a difficult object). A "
            "picture's F1 is that of its boxes at IoU .5, from the score on that suits each checkpoint best."
        )
    rows = "".join(f"<tr><th>{html.escape(judge.title)}</th><td>{judge.facts}</td></tr>" for judge in judges)
    if len(judges) == 2:
        first, second = (np.array([verdict.quality for verdict in judge.verdicts]) for judge in judges)
        rows += (
            f"<tr><th>{html.escape(judges[1].title)} is</th><td>better on {(second > first).sum()}, worse on "
            f"{(second < first).sum()}, alike on {(second == first).sum()} pictures</td></tr>"
        )
    return f"{text}</p><table>{rows}</table>"


def _row(folder: Path, index: int, record: Mapping[str, Any], judges: Sequence[_Judge]) -> str:
    """Draw a picture's labels and what each checkpoint finds."""
    image = read_pixels(record["file_name"], "RGB", judges[0].cfg.DATA.MAX_PIXELS)
    truth = draw_scene(image, judges[0].metadata, Scene.labelled(record, judges[0].cfg))
    figures = [_figure(folder, f"{index:05d}-labels", truth, f"labels of {Path(record['file_name']).name}")]
    for number, judge in enumerate(judges):
        caption = f"{judge.title}: {judge.verdicts[index].words}"
        figures.append(_figure(folder, f"{index:05d}-{number}", judge.draw(record), caption))
    return f'<div class="row">{"".join(figures)}</div>'


def _figure(folder: Path, name: str, drawing: np.ndarray, caption: str) -> str:
    image, buffer = Image.fromarray(drawing), io.BytesIO()
    image.thumbnail((_WIDTH, _WIDTH))
    image.save(buffer, "JPEG", quality=90)
    with atomic_write(folder / "pictures" / f"{name}.jpg") as file:
        file.write(buffer.getvalue())
    size = f'width="{image.width}" height="{image.height}"'
    text = html.escape(caption)
    file_name = f"pictures/{name}.jpg"
    picture = f'<a href="{file_name}"><img src="{file_name}" {size} alt="{text}" loading="lazy"></a>'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


def _write_page(folder: Path, title: str, body: str) -> Path:
    title = html.escape(title)
    head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    with atomic_write(folder / "index.html") as file:
        file.write(
            f"<!DOCTYPE html><html lang='en'><head>{head}</head><body><h1>{title}</h1>{body}</body></html>\n".encode()
        )
    return folder / "index.html"


def _with_output(cfg: CfgNode, folder: str) -> CfgNode:
    """Return the config with another ``OUTPUT_DIR``: what is written on the way is not part of the page."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = folder
    return cfg

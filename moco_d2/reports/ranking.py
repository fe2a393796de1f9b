"""Ranking of test images by how well one or two detectors do on them.

* Objects: F1 = 2 TP / (2 TP + FP + FN) of an image's boxes at IoU .5. Each detection, in descending order of scores, is
  matched with the free object of its class that it overlaps most. Detections on a crowd or a difficult object do not
  count. (AP is not defined for a single image.) Only detections from a threshold on count: each checkpoint has its own,
  which maximises its F1 over all images, so that a checkpoint with low scores is at no disadvantage.
* Semantic segmentation: the mean IoU of the classes in the labels or the prediction of an image.
* Two checkpoints: the second one's figure minus the first one's.

Ties are broken by the number of errors (worst) or of objects found (best).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Boxes, pairwise_iou

from moco_d2.reports.pictures import Scene


@dataclass(frozen=True)
class Outcome:
    """The matching of an image's detections with its objects.

    Attributes:
        scores: (N,) in descending order.
        kinds: (N,) 1 right, 0 wrong, -1 not counted. The kind of a detection does not depend on those of lower score.
        wanted: number of objects to be found.
    """

    scores: np.ndarray
    kinds: np.ndarray
    wanted: int

    def counts(self, threshold: float) -> tuple[int, int, int]:
        """Return the numbers of right, wrong and missed objects, with detections from a score on."""
        kinds = self.kinds[self.scores >= threshold]
        right = int((kinds == 1).sum())
        return right, int((kinds == 0).sum()), self.wanted - right


def match(scene: Scene, boxes: np.ndarray, classes: Sequence[int], ignored: np.ndarray, crowd: np.ndarray) -> Outcome:
    """Match an image's detections with its objects.

    Args:
        scene: detections, highest scores first.
        boxes: (M, 4) of the objects.
        classes: M numbers.
        ignored: (M,) objects that need not be found.
        crowd: (M,) those of them that may be found many times; a detection is on a crowd if half of it lies inside.
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
    """Return F1; it is 1 without objects and detections."""
    return 2 * right / (2 * right + wrong + missed) if right + wrong + missed else 1.0


def best_threshold(outcomes: Sequence[Outcome]) -> float:
    """Return the score threshold with the highest F1 over all images together."""
    scores = np.concatenate([outcome.scores for outcome in outcomes])
    kinds = np.concatenate([outcome.kinds for outcome in outcomes])
    if not len(scores):
        return 0.5
    order = np.argsort(-scores, kind="stable")
    right, wrong = np.cumsum(kinds[order] == 1), np.cumsum(kinds[order] == 0)
    wanted = sum(outcome.wanted for outcome in outcomes)
    quality = 2 * right / np.maximum(right + wrong + wanted, 1)
    # Detections of equal score are in or out together, so only the last of them can be the threshold.
    quality[:-1][np.diff(scores[order]) == 0] = -1
    return float(scores[order][quality.argmax()])


def mean_iou(predicted: np.ndarray, labels: np.ndarray, ignore: int) -> float:
    """Return the mean IoU of the classes in an image's labels or prediction, without void pixels."""
    predicted, labels = predicted[labels != ignore], labels[labels != ignore]
    classes = np.union1d(predicted, labels)
    ious = [((predicted == c) & (labels == c)).sum() / ((predicted == c) | (labels == c)).sum() for c in classes]
    return float(np.mean(ious)) if len(ious) else 1.0


@dataclass(frozen=True)
class Rating:
    """How well a checkpoint does on an image.

    Attributes:
        quality: F1 or mean IoU, 0 to 1.
        errors: number of wrong and missed objects.
        found: number of objects found.
        words: the same as text.
    """

    quality: float
    errors: int
    found: int
    words: str


def rank(ratings: Sequence[Sequence[Rating]], names: Sequence[str], count: int) -> dict[str, list[int]]:
    """Return headings and the indices of the images below them.

    Args:
        ratings: of one or two checkpoints, a rating per image.
        names: of the checkpoints.
        count: number of images under each heading.
    """
    if len(ratings) == 1:
        order = sorted(range(len(ratings[0])), key=lambda i: (ratings[0][i].quality, -ratings[0][i].errors))
        worst = order[:count]
        rest = sorted(order[count:], key=lambda i: (-ratings[0][i].quality, -ratings[0][i].found))
        return {"Worst": worst, "Best": rest[:count]}
    pairs = list(zip(*ratings, strict=True))
    gains = [(second.quality - first.quality, first.errors - second.errors) for first, second in pairs]
    order = sorted(range(len(pairs)), key=lambda i: gains[i])
    return {
        f"{names[1]} worse than {names[0]}": [i for i in order[:count] if gains[i] < (0, 0)],
        f"{names[1]} better than {names[0]}": [i for i in reversed(order[-count:]) if gains[i] > (0, 0)],
    }

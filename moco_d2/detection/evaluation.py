"""Evaluation of a detector on its test sets, one after the other, plainly and with test-time augmentation."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import DatasetEvaluator, inference_on_dataset, print_csv_format
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from moco_d2.detection.metrics.evaluators import library
from moco_d2.detection.results import write_json
from moco_d2.io.files import file_name
from moco_d2.layers.distributed import broadcast_module

logger = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """The metrics of each test set. Only the main process has values.

    Attributes:
        metrics: ``{test set: {task: {metric: value}}}``.
        libraries: ``{test set: library that computed its metrics}``.
        pictures: ``{test set: number of its pictures}``.
    """

    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    pictures: dict[str, int] = field(default_factory=dict)

    def by_task(self) -> dict[str, Any]:
        """Return the metrics in Detectron2's form: if there is one test set, without its name."""
        return next(iter(self.metrics.values())) if len(self.metrics) == 1 else self.metrics

    def joined(self, other: Evaluation) -> Evaluation:
        """Return the tasks of both evaluations, test set by test set."""
        metrics = {name: {**tasks, **other.metrics.get(name, {})} for name, tasks in self.metrics.items()}
        return Evaluation(metrics, {**self.libraries, **other.libraries}, self.pictures)


def evaluate_plainly(
    trainer: type[DefaultTrainer],
    cfg: CfgNode,
    model: nn.Module,
    evaluators: Sequence[DatasetEvaluator] | None = None,
) -> Evaluation:
    """Evaluate on each test set. Every process must call this; all use rank 0's tensors.

    Precise-BN weighs batches by each process's own image sizes, so the processes end with different statistics, and the
    checkpoint holds rank 0's. A mixture would give figures that the saved detector does not have.

    Args:
        trainer: builds the loaders and evaluators.
        cfg: config of the detector.
        model: the detector.
        evaluators: one for each test set; by default the trainer builds them.
    """
    if cfg.TEST.AUG.ENABLED:
        logger.info("first the plain evaluation, then with test-time augmentation (TEST.AUG)")
    broadcast_module(model)
    evaluation = Evaluation()
    for index, name in enumerate(cfg.DATASETS.TEST):
        loader = trainer.build_test_loader(cfg, name)
        evaluator = trainer.build_evaluator(cfg, name) if evaluators is None else evaluators[index]
        evaluation.pictures[name] = len(loader.dataset)
        metrics = inference_on_dataset(model, loader, evaluator)
        if comm.is_main_process():
            if metrics:  # written now, because the evaluation of the next test set may fail
                write_json(metrics_file(cfg, name), {"dataset": name, "metrics": metrics})
            print_csv_format(metrics)
        evaluation.metrics[name], evaluation.libraries[name] = metrics, library(cfg, name, evaluator)
    return evaluation


def evaluate_augmented(trainer: type[DefaultTrainer], cfg: CfgNode, model: nn.Module) -> Evaluation:
    """Evaluate with test-time augmentation (``TEST.AUG``); ``_TTA`` is appended to the names of the tasks.

    Detections are saved in ``OUTPUT_DIR/TTA``.
    """
    aug, own = cfg.TEST.AUG, cfg.clone()
    logger.info(
        "evaluation with test-time augmentation: short sides of %s pixels%s",
        ", ".join(map(str, aug.MIN_SIZES)), ", each mirrored too" if aug.FLIP else "",
    )  # fmt: skip
    own.defrost()
    own.OUTPUT_DIR, own.TEST.AUG.ENABLED = os.path.join(cfg.OUTPUT_DIR, "TTA"), False
    found = evaluate_plainly(trainer, own, GeneralizedRCNNWithTTA(own, model))
    metrics = {name: {f"{task}_TTA": scores for task, scores in tasks.items()} for name, tasks in found.metrics.items()}
    return Evaluation(metrics, found.libraries)


def metrics_file(cfg: CfgNode, dataset_name: str) -> str:
    """Return the file that holds the metrics of a test set."""
    return os.path.join(cfg.OUTPUT_DIR, "inference", file_name(dataset_name), "metrics.json")

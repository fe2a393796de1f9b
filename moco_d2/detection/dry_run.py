"""A dry run of fine-tuning: in a minute or two, every stage of the run once, so that faults show before training."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetFromList,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.datasets import custom_problems
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.metrics.coco import COUNTED
from moco_d2.detection.metrics.evaluators import library
from moco_d2.detection.missing import is_voc_list, missing_files, unreadable
from moco_d2.detection.preflight import check_weights, fit_to_machine, run_problems, scale_to_processes
from moco_d2.detection.proposals import with_proposals
from moco_d2.detection.subsets import training_records
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.detection.weights import all_names, load_weights
from moco_d2.io.pictures import PictureError, describe
from moco_d2.model_zoo import config_changes
from moco_d2.running.dry_run import duration, one_list, parameters, peak_memory, quiet, recipe
from moco_d2.running.picture_check import check_each, evenly

STEPS = 2
IMAGES = 4  # evaluated in each test set
_REGIONS = 100  # evaluated in each picture on the CPU


class Rehearsal(TransferTrainer):
    """A trainer that evaluates a few pictures only and times steps and evaluation.

    Attributes:
        step_seconds: duration of each step.
        evaluation_seconds: duration of the evaluation of all test sets.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__(cfg)
        self.step_seconds: list[float] = []
        self.evaluation_seconds = 0.0

    def run_step(self) -> None:
        """Take a step and time it."""
        start = time.perf_counter()
        super().run_step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.step_seconds.append(time.perf_counter() - start)

    def _evaluate(self) -> dict[str, Any]:
        start = time.perf_counter()
        result = super()._evaluate()
        self.evaluation_seconds = time.perf_counter() - start
        return result

    def _evaluate_augmented(self) -> dict[str, Any]:
        start = time.perf_counter()
        result = super()._evaluate_augmented()
        self.evaluation_seconds += time.perf_counter() - start
        return result

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Build the loader of a test set's first pictures."""
        records = with_proposals(cfg, dataset_name, DatasetCatalog.get(dataset_name))[:IMAGES]
        return build_detection_test_loader(records, mapper=PictureMapper(cfg, is_train=False))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator. Cityscapes' need the whole test set, so here they only take the predictions."""
        evaluator = super().build_evaluator(cfg, dataset_name)
        needs_all = MetadataCatalog.get(dataset_name).evaluator_type.startswith("cityscapes")
        return _WithoutMetrics(evaluator) if needs_all else evaluator


class _WithoutMetrics(DatasetEvaluator):
    """An evaluator that takes predictions and computes no metrics."""

    def __init__(self, evaluator: DatasetEvaluator) -> None:
        self.reset, self.process = evaluator.reset, evaluator.process


def rehearse(cfg: CfgNode) -> Iterator[tuple[str, str]]:
    """Check everything that a run needs, then run a little of it; yield findings as ``(subject, finding)``.

    First data sets, evaluators and weights are checked, and pictures are decoded and mapped with their labels
    (``DATA.DRY_RUN_PICTURES``). Then follow, in ``OUTPUT_DIR``: 2 steps, precise-BN, an evaluation of 4 pictures of
    each test set, and a checkpoint that is read back. On the CPU, where a full step takes minutes, each process trains
    on one picture at a time.

    Args:
        cfg: config of the run, with an ``OUTPUT_DIR`` that may be thrown away.

    Raises:
        ValueError: lists every problem found, one a line.
    """
    world_size = comm.get_world_size()
    full = scale_to_processes(fit_to_machine(cfg, world_size), world_size)
    yield "protocol", recipe(cfg.PROTOCOL, config_changes(cfg))
    yield "schedule", _schedule(full, cfg)
    yield from _check_all(cfg, full)
    counts = yield from _describe_sets(full)
    for name in full.DATASETS.TEST:
        yield "evaluator", f"{name}: {MetadataCatalog.get(name).evaluator_type}, {library(full, name)}"
    small = _shorten(full, world_size)
    with quiet():
        trainer = Rehearsal(small)
        trainer.resume_or_load(resume=False)
    yield "weights", _weights(trainer)
    yield "model", parameters(trainer.model)
    with quiet():
        trainer.train()
    fraction = small.SOLVER.IMS_PER_BATCH / full.SOLVER.IMS_PER_BATCH
    step = trainer.step_seconds[-1] / fraction
    yield "training", _training(trainer, step, fraction)
    shown = sum(min(IMAGES, counts[name]) for name in full.DATASETS.TEST)
    yield "evaluation", f"{shown} pictures, {trainer.evaluation_seconds:.1f} s" + _shortened_evaluation(small, full)
    yield "checkpoint", _reload(trainer)
    yield "memory", peak_memory()
    evaluation = sum(counts[name] for name in full.DATASETS.TEST) * trainer.evaluation_seconds / max(1, shown)
    yield "ETA", _eta(full, step, evaluation)


def _check_all(cfg: CfgNode, full: CfgNode) -> Iterator[tuple[str, str]]:
    """Check everything that needs no training; yield progress.

    Raises:
        ValueError: lists every problem.
    """
    custom = custom_problems(cfg)
    problems = [*custom, *run_problems(full, comm.get_world_size())]
    with quiet():
        try:
            check_weights(full)
        except ValueError as error:
            problems.append(str(error))
    with quiet():
        pictures = _Pictures(full, problems, refused=bool(custom))
    found = yield from check_each(pictures.problem, range(len(pictures)), full.DATALOADER.NUM_WORKERS)
    known = "\n".join(problems)
    problems += [problem for problem in found if problem.partition(": ")[0] not in known]
    if problems:
        raise ValueError(one_list(problems))
    yield "pictures", f"{len(pictures)} decoded, with their labels"


def _describe_sets(cfg: CfgNode) -> Generator[tuple[str, str], None, dict[str, int]]:
    """Yield size, dropped objects and limits of each data set; return the numbers of pictures."""
    counts = {}
    for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
        with quiet():
            records = DatasetCatalog.get(name)
        counts[name] = len(records)
        objects = [[a["category_id"] for a in r.get("annotations", ()) if not a.get("iscrowd")] for r in records]
        most = max(map(len, objects), default=0)
        yield "data", f"{name}: {len(records)} pictures" + f"; objects in a picture: at most {most}" * (most > 0)
        if dropped := MetadataCatalog.get(name).get("dropped"):
            place = f"OUTPUT_DIR/datasets/{name}.dropped.txt"
            yield "dropped", f"{name}: {len(dropped)} bad objects, which a run lists in {place}: {one_list(dropped, 3)}"
        if name in cfg.DATASETS.TEST:
            yield from (("limit", f"{name}: {text}") for text in _limits(cfg, name, objects))
    return counts


def _limits(cfg: CfgNode, name: str, objects: Sequence[Sequence[int]]) -> Iterator[str]:
    """Yield how the numbers of detections that count limit the AP.

    Args:
        cfg: config of the detector.
        name: the test set.
        objects: the classes of each picture's objects, without crowds.
    """
    limit, counts = cfg.TEST.DETECTIONS_PER_IMAGE, [len(classes) for classes in objects]
    if max(counts, default=0) > limit:
        lost = sum(max(0, count - limit) for count in counts) / sum(counts)
        yield (
            f"pictures with more objects than TEST.DETECTIONS_PER_IMAGE, {limit}: {sum(c > limit for c in counts)} of "
            f"{len(counts)}; at least {lost:.1%} of the objects are missed: "
            f"pass TEST.DETECTIONS_PER_IMAGE {max(counts)}"
        )
    own = [max(Counter(classes).values(), default=0) for classes in objects]
    if MetadataCatalog.get(name).evaluator_type == "coco" and (most := max(own, default=0)) > COUNTED:
        yield (
            f"pictures with more than {COUNTED} objects of a class: {sum(c > COUNTED for c in own)} of {len(own)}; "
            f"COCO's AP counts the {COUNTED} best detections of a class in a picture, whatever the config says. "
            f"AP@{most}, which counts {most}, is evaluated beside it"
        )


class _Pictures:
    """The pictures of a run that exist, each with the mapper that reads it; missing ones are added to the problems.

    A training picture is read with its labels, as in training, but without augmentations. With ``refused`` the problems
    contain faults of the user's own sets, which then need not have an object to train on.
    """

    def __init__(self, cfg: CfgNode, problems: list[str], refused: bool) -> None:
        self._cfg, self._problems, self._refused = cfg, problems, refused
        self._parts: list[tuple[PictureMapper, DatasetFromList]] = []
        for name in dict.fromkeys((*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)):
            if name in DatasetCatalog:
                self._add(name)
        self._ends = np.cumsum([len(records) for _, records in self._parts], dtype=int)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def problem(self, number: int) -> str:
        """Return what is wrong with a picture, or an empty string."""
        part = int(np.searchsorted(self._ends, number, side="right"))
        mapper, records = self._parts[part]
        record = records[number - int(self._ends[part]) + len(records)]
        try:
            mapper(record)
        except PictureError as error:
            return str(error)
        except Exception as error:  # Detectron2 raises anything at labels that it cannot read
            return f"{record['file_name']}: {describe(error)}"
        return ""

    def _add(self, name: str) -> None:
        cfg, trained = self._cfg, name in self._cfg.DATASETS.TRAIN
        try:
            records = training_records(cfg, [name]) if trained else DatasetCatalog.get(name)
        except Exception as error:  # loaders raise anything; often the problem is in the list already
            told = self._refused and MetadataCatalog.get(name).get("custom")
            if not told and not any(name in problem for problem in self._problems):
                self._problems.append(str(error) if trained else unreadable(name, error))
            return
        mapper = PictureMapper(cfg, is_train=trained, augmentations=[])
        paths = [record["file_name"] for record in records]
        checked = name in cfg.DATASETS.TEST or is_voc_list(name) or MetadataCatalog.get(name).get("custom")
        if not checked and (missing := missing_files(name, paths)):
            self._problems.append(missing)
        existing = [record for record in records if PathManager.isfile(record["file_name"])]
        chosen = [existing[number] for number in evenly(len(existing), cfg.DATA.DRY_RUN_PICTURES)]
        self._parts.append((mapper, DatasetFromList(chosen, copy=False)))


def _shorten(full: CfgNode, world_size: int) -> CfgNode:
    """Return the config of the dry run: that of the run, already scaled, with a few steps."""
    cfg = full.clone()
    cfg.defrost()
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = STEPS, (), 0
    cfg.TEST.EVAL_PERIOD = 0
    if cfg.MODEL.DEVICE == "cpu":
        cfg.SOLVER.IMS_PER_BATCH = world_size * cfg.SOLVER.ACCUMULATE
        if cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN":
            cfg.MODEL.RPN.POST_NMS_TOPK_TEST = min(cfg.MODEL.RPN.POST_NMS_TOPK_TEST, _REGIONS)
        if cfg.TEST.AUG.ENABLED:
            sizes = sorted(cfg.TEST.AUG.MIN_SIZES)
            cfg.TEST.AUG.MIN_SIZES = (sizes[len(sizes) // 2],)
    # One iteration of precise-BN.
    cfg.TEST.PRECISE_BN.NUM_ITER = 1
    cfg.freeze()
    return cfg


def _schedule(full: CfgNode, cfg: CfgNode) -> str:
    solver = full.SOLVER
    batches = f" in {solver.ACCUMULATE} batches" if solver.ACCUMULATE > 1 else ""
    text = f"{solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{batches}, lr {solver.BASE_LR:g}"
    text += f", steps {solver.STEPS}"
    written = cfg.SOLVER
    if solver.MAX_ITER != written.MAX_ITER:
        original = f"{written.MAX_ITER} of {written.IMS_PER_BATCH}, lr {written.BASE_LR:g}"
        text += f" (written for {written.REFERENCE_WORLD_SIZE} processes: {original})"
    return text


def _weights(trainer: TransferTrainer) -> str:
    path, facts = trainer.weights.path, trainer.weights.facts
    filled = ", ".join(("the whole backbone", *facts.parts))
    return f"{path}: {facts.origin}, {facts.pixels.order}; fills {filled}" if path else "none: random values"


def _training(trainer: Rehearsal, step: float, fraction: float) -> str:
    loss, _ = trainer.storage.latest().get("total_loss", (math.nan, 0))  # recorded in the main process only
    text = f"{STEPS} steps, loss {loss:.3f}, {step:.2f} s a step"
    return text if fraction == 1 else f"{text} (extrapolated from {fraction:.0%} of a batch)"


def _shortened_evaluation(small: CfgNode, full: CfgNode) -> str:
    regions, sizes = small.MODEL.RPN.POST_NMS_TOPK_TEST, len(full.TEST.AUG.MIN_SIZES)
    parts = [f"at most {regions} regions each"] if regions != full.MODEL.RPN.POST_NMS_TOPK_TEST else []
    if len(small.TEST.AUG.MIN_SIZES) < sizes:
        parts.append(f"test-time augmentation at 1 of {sizes} sizes")
    return f" ({', '.join(parts)})" if parts else ""


def _reload(trainer: TransferTrainer) -> str:
    """Read the last checkpoint into a new detector and compare every tensor.

    Raises:
        ValueError: a tensor differs.
    """
    path = Path(trainer.cfg.OUTPUT_DIR) / "model_final.pth"
    comm.synchronize()
    if not comm.is_main_process():
        return ""
    with quiet():
        fresh = trainer.build_model(trainer.cfg)
        load_weights(TransferCheckpointer(fresh), trainer.cfg, str(path), all_names)
    model = trainer.checkpointer.model
    saved, read = model.state_dict(), fresh.state_dict()
    different = [name for name in saved if not torch.equal(saved[name], read[name])]
    if different:
        raise ValueError(f"the checkpoint that was read back differs from the detector: {', '.join(different[:3])}")
    return f"{path.stat().st_size / 2**20:.0f} MiB, saved and read back bit for bit"


def _eta(full: CfgNode, step: float, evaluation: float) -> str:
    return f"training {duration(step * full.SOLVER.MAX_ITER)}, each evaluation {duration(evaluation)}, at this speed"

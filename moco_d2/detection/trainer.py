"""The transfer trainer: Detectron2's, with guarded weights, an evaluator for each test set, and results on disk."""

from __future__ import annotations

import json
import logging
import math
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

import moco_d2
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.classes import CLASSES, class_names
from moco_d2.detection.hooks import EvaluateIfDone, RepeatablePreciseBN
from moco_d2.detection.loader import build_loader
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.metrics.evaluators import build_evaluator, describe_backend
from moco_d2.detection.preflight import building, changes, check_run, fit_to_machine, scale_to_processes, starting_point
from moco_d2.detection.segmentation import build_segmentation_mapper
from moco_d2.detection.step import build_step
from moco_d2.detection.subsets import training_set
from moco_d2.detection.sync_norm import stabilise_sync_norms
from moco_d2.detection.weights import WeightsRecord, all_names, load_weights, random_weights
from moco_d2.io.checkpoints import forget_checkpoint
from moco_d2.io.files import atomic_write, file_name
from moco_d2.io.pictures import PictureError
from moco_d2.io.provenance import provenance
from moco_d2.layers.distributed import broadcast_module, wrap_ddp
from moco_d2.model_zoo import config_changes
from moco_d2.running.checkpoints import PeriodicCheckpoint, changed_settings
from moco_d2.running.mistakes import pictures_in_one_line
from moco_d2.running.preemption import StopWhenAsked
from moco_d2.running.progress import ProgressPrinter
from moco_d2.running.seeds import StepSeed
from moco_d2.seeding import stream_seed

logger = logging.getLogger(__name__)


# A resumed optimizer has the checkpoint's values of these, whatever the config says; the schedule has the config's.
_OPTIMIZER = (
    "BASE_LR", "BIAS_LR_FACTOR", "MOMENTUM", "NESTEROV", "WEIGHT_DECAY", "WEIGHT_DECAY_NORM", "WEIGHT_DECAY_BIAS",
)  # fmt: skip
_SCHEDULE = (
    "LR_SCHEDULER_NAME", "MAX_ITER", "STEPS", "GAMMA", "NUM_DECAYS", "BASE_LR_END", "RESCALE_INTERVAL",
    "WARMUP_FACTOR", "WARMUP_ITERS", "WARMUP_METHOD",
)  # fmt: skip
# Of ENGINE, those that concern detectors.
_SWITCHES = ("AUTOCAST", "CHANNELS_LAST", "COMPILE")


class TransferTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for fine-tuning: on GPUs, one CPU process, or several.

    Attributes:
        seed: what is random in training follows from it, the step, and the process.
        weights: what the detector was started from; set by :meth:`resume_or_load`.
        scaled: the keys that ``SOLVER.REFERENCE_WORLD_SIZE`` changed, as ``{key: (config's value, value used)}``.
        kept: ``KEY=value`` of the optimizer's settings that a resumed run keeps against its config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Check the run, then build model, optimizer, data, schedule, checkpointer and hooks.

        DefaultTrainer's own constructor is not called: it wraps the model for CUDA only.

        Raises:
            ValueError: batch, data sets or evaluators do not allow the run.
        """
        TrainerBase.__init__(self)
        asked, world_size = cfg, comm.get_world_size()
        cfg = scale_to_processes(fit_to_machine(cfg, world_size), world_size)
        check_run(cfg, world_size)
        self.asked, self.cfg, self.scaled = asked, cfg, changes(asked, cfg)
        self.seed = run_seed(cfg)
        for key, (before, after) in self.scaled.items():
            logger.info("for %d process(es) here, %s: %s -> %s", world_size, key, before, after)

        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = build_step(cfg, wrap_ddp(model), self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.weights, self.kept = random_weights(cfg), list[str]()
        self.checkpointer = TransferCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the detector, with the switches of ``ENGINE`` that concern it."""
        with building():
            model = super().build_model(cfg)
        stabilise_sync_norms(model)
        if cfg.ENGINE.CHANNELS_LAST:
            model.backbone.to(memory_format=torch.channels_last)
        if cfg.ENGINE.COMPILE:
            model.backbone.compile()  # in place: names of tensors stay
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, purpose: int = 0) -> DataLoader:
        """Build the loader of training batches: each holds ``1 / SOLVER.ACCUMULATE`` of a step's images.

        Args:
            cfg: config of the detector.
            purpose: loaders of different numbers take other pictures in another order.
        """
        mapper = build_segmentation_mapper(cfg) if cfg.INPUT.RANDOM_SCALE else None
        loader_cfg = cfg.clone()
        loader_cfg.defrost()
        loader_cfg.SOLVER.IMS_PER_BATCH //= cfg.SOLVER.ACCUMULATE
        return build_loader(loader_cfg, stream_seed(run_seed(cfg), purpose), training_set(cfg), mapper)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """Build the loader of a test set."""
        return build_detection_test_loader(cfg, dataset_name, mapper=PictureMapper(cfg, is_train=False))

    def build_writers(self) -> list[EventWriter]:
        """Return Detectron2's writers: progress line, ``metrics.json``, TensorBoard."""
        _, *others = super().build_writers()
        return [ProgressPrinter(self.max_iter), *others]

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Return Detectron2's hooks in its order, with seeds, and with our checkpoints."""
        cfg, solver, main = self.cfg, self.cfg.SOLVER, comm.is_main_process()
        checkpoint = PeriodicCheckpoint(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_KEEP, solver.CHECKPOINT_KEEP_EVERY
        )
        return [
            StepSeed(self.seed, comm.get_rank()),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_precise_bn(),
            checkpoint,  # after precise-BN, which changes the model; before the evaluation, which may fail
            EvaluateIfDone(cfg.TEST.EVAL_PERIOD, self._evaluate),
            EvaluateIfDone(0, self._evaluate_augmented) if cfg.TEST.AUG.ENABLED else None,
            hooks.PeriodicWriter(self.build_writers(), period=20) if main else None,
            StopWhenAsked(checkpoint),
        ]

    def _build_precise_bn(self) -> hooks.HookBase | None:
        if not self.cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # as Detectron2 does, for memory
        loader = self.build_train_loader(cfg, purpose=1)
        return RepeatablePreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluate(self) -> dict[str, Any]:
        begun = time.time()
        try:
            self._last_eval_results = self.test(self.cfg, self.model)
        except Exception as error:
            advice = self._after_failed_evaluation(begun)
            if isinstance(error, PictureError):
                raise PictureError(f"{error}. {advice}") from error
            logger.error("the evaluation failed. %s", advice)
            raise
        if self.iter + 1 >= self.max_iter:  # at once: writers that close, and whatever else follows, may fail
            self._write_results()
        return self._last_eval_results

    def _after_failed_evaluation(self, begun: float) -> str:
        """Say what an evaluation that failed leaves on the disk, and how to repeat it."""
        files = [_metrics_file(self.cfg, name) for name in self.cfg.DATASETS.TEST]
        done = [path for path in files if os.path.exists(path) and os.path.getmtime(path) >= begun - 1]
        kept = f"The metrics of the test sets before it are in {', '.join(done)}. " if done else ""
        if not self.checkpointer.has_checkpoint():
            return f"{kept}There is no checkpoint yet: start again"
        path = self.checkpointer.get_checkpoint_file()
        return f"{kept}Then repeat the command with --resume, or with --eval-only MODEL.WEIGHTS {path}"

    def _evaluate_augmented(self) -> dict[str, Any]:
        augmented = self.test_augmented(self.cfg, self.model)
        self._last_eval_results = joined(self._last_eval_results, augmented)
        self._write_results()
        return augmented

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator that the test set's metadata ask for; it writes down its metrics."""
        if cfg.TEST.AUG.ENABLED:
            logger.info("%s: first the plain evaluation, then with test-time augmentation (TEST.AUG)", dataset_name)
        return _Noted(build_evaluator(cfg, dataset_name), _metrics_file(cfg, dataset_name), dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate on each test set, every process with rank 0's tensors.

        Precise-BN weighs batches by each process's own image sizes, so that processes end with different statistics, of
        which the checkpoint holds rank 0's. Evaluating a mixture would give figures that the saved detector does not.
        """
        broadcast_module(model)
        return super().test(cfg, model, evaluators)

    @classmethod
    def test_augmented(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Evaluate with test-time augmentation (``TEST.AUG``), under the tasks' names with ``_TTA`` behind them.

        Call it after :meth:`test`, which gives every process the same model. Detections are saved in
        ``OUTPUT_DIR/TTA``.
        """
        aug, own = cfg.TEST.AUG, cfg.clone()
        logger.info(
            "evaluation with test-time augmentation: short sides of %s pixels%s",
            ", ".join(map(str, aug.MIN_SIZES)), ", each mirrored too" if aug.FLIP else "",
        )  # fmt: skip
        own.defrost()
        own.OUTPUT_DIR, own.TEST.AUG.ENABLED = os.path.join(cfg.OUTPUT_DIR, "TTA"), False
        results = super().test(own, GeneralizedRCNNWithTTA(own, model))
        if len(cfg.DATASETS.TEST) == 1:  # without its name
            return {f"{task}_TTA": scores for task, scores in results.items()}
        return {name: {f"{task}_TTA": scores for task, scores in tasks.items()} for name, tasks in results.items()}

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue the run in ``OUTPUT_DIR`` (``resume``, where there is one), or start from ``MODEL.WEIGHTS``.

        Raises:
            ValueError: the weights may not be used (see :func:`moco_d2.detection.weights.load_weights`), or a fresh
                start would overwrite a run.
        """
        path, resuming = starting_point(self.cfg, resume)
        if not resuming:
            self.weights = load_weights(self.checkpointer, self.cfg, path)
        # Saved in every checkpoint, so that the finished detector, too, says how it must be fed.
        self.checkpointer.add_checkpointable("facts", self.weights)
        if resuming:
            load_weights(self.checkpointer, self.cfg, path, all_names, checkpointables=None)
            self.start_iter = self.iter + 1
            self.data_loader.batch_sampler.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE
            logger.info("resuming at iteration %d of %d", self.start_iter, self.max_iter)
        forget_checkpoint()
        if comm.is_main_process():  # which alone writes it down: the others need not read the file through
            path, sha256 = self.weights.path or "random", self.weights.sha256
            logger.info("the weights at the start are %s, SHA-256 %s", path, sha256)

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's state: iteration, optimizer, scheduler, what the run began with and follows from."""
        weights = {"path": self.weights.path, "sha256": self.weights.sha256}
        return {**super().state_dict(), "run": self._run(), "weights": weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; warn if the run cannot go on exactly as it would have.

        Raises:
            ValueError: the batch is another one.
        """
        # Not this command's MODEL.WEIGHTS, which may be left out, nor the file as it is by now. Detectron2's own
        # checkpoints do not say.
        began = state.get("weights", {"path": self.cfg.MODEL.WEIGHTS, "sha256": ""})
        self.weights.path, self.weights.sha256 = began["path"], began["sha256"]
        then, now = state.get("run", {}), self._run()
        if then and then["SOLVER.IMS_PER_BATCH"] != now["SOLVER.IMS_PER_BATCH"]:
            raise ValueError(
                f"a run of {_batch(then)} cannot go on with {_batch(now)}: the checkpoint's lr and iteration belong to "
                "its batch. Processes times SOLVER.ACCUMULATE must be what they were"
            )
        changed = changed_settings(then, now)
        kept = {key: changed.pop(key) for key in [f"SOLVER.{name}" for name in _OPTIMIZER] if key in changed}
        if changed:
            logger.warning("the run goes on, but not as it would have gone: %s", "; ".join(changed.values()))
        if kept:
            logger.warning(
                "the checkpoint's optimizer goes on, whatever the config says: %s. For the config's, start a new run "
                "in another OUTPUT_DIR with MODEL.WEIGHTS set to a checkpoint of this one",
                "; ".join(kept.values()),
            )
            # What results.json says is what was trained with, and it is compared with no published row.
            self.kept = [f"{key}={then[key]} (kept on resuming)" for key in kept]
            self.cfg.defrost()
            self.cfg.merge_from_list([word for key in kept for word in (key, then[key])])
            self.cfg.freeze()
        super().load_state_dict(state)

    def _run(self) -> dict[str, Any]:
        return {
            **{f"SOLVER.{name}": self.cfg.SOLVER[name] for name in (*_OPTIMIZER, *_SCHEDULE)},
            "SEED": self.seed,
            "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
            "SOLVER.ACCUMULATE": self.cfg.SOLVER.ACCUMULATE,
            "number of images": len(self.data_loader.dataset),
            "number of processes": comm.get_world_size(),
        }

    def train(self) -> None:
        """Train to the end, evaluate, and write ``results.json``; before, ``classes.json``, which names the classes."""
        if comm.is_main_process():
            write_json(os.path.join(self.cfg.OUTPUT_DIR, CLASSES), class_names(self.cfg))
        with pictures_in_one_line():
            super().train()

    def _write_results(self) -> None:
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            result = describe_result(self.cfg, self._last_eval_results, self.weights)
            departures = config_changes(self.asked)
            result |= {
                "iterations": self.max_iter,
                "scaled": self.scaled,
                "config_changes": None if departures is None else [*departures, *self.kept],
            }
            write_json(os.path.join(self.cfg.OUTPUT_DIR, "results.json"), result)


class _Noted(DatasetEvaluator):
    """An evaluator whose metrics are on the disk before the next test set's evaluation, which may fail, begins."""

    def __init__(self, evaluator: DatasetEvaluator, path: str, dataset_name: str) -> None:
        self.reset, self.process = evaluator.reset, evaluator.process
        self._evaluator, self._path, self._name = evaluator, path, dataset_name

    def evaluate(self) -> Any:
        """Evaluate, and write the metrics in the main process."""
        metrics = self._evaluator.evaluate()
        if metrics and comm.is_main_process():
            write_json(self._path, {"dataset": self._name, "metrics": metrics})
        return metrics


def _metrics_file(cfg: CfgNode, dataset_name: str) -> str:
    return os.path.join(cfg.OUTPUT_DIR, "inference", file_name(dataset_name), "metrics.json")


def _batch(run: Mapping[str, Any]) -> str:
    batch, accumulate, processes = (
        run[key] for key in ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "number of processes")
    )
    return f"{batch} images a step ({processes} process(es), SOLVER.ACCUMULATE {accumulate})"


def run_seed(cfg: CfgNode) -> int:
    """Return ``SEED``, or 0 where it is left open: tools have drawn one by now."""
    return max(0, int(cfg.SEED))


def evaluate(cfg: CfgNode) -> None:
    """Evaluate the trained detector in ``MODEL.WEIGHTS`` on each test set, and write ``results_eval_only.json``.

    Raises:
        ValueError: no weights, weights that do not fill the whole detector, or data sets that are not there.
    """
    cfg = fit_to_machine(cfg, comm.get_world_size())
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("evaluation needs a trained detector: pass MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
    check_run(cfg, comm.get_world_size(), train=False)
    model = TransferTrainer.build_model(cfg)
    weights = load_weights(TransferCheckpointer(model), cfg, cfg.MODEL.WEIGHTS, all_names)
    forget_checkpoint()
    if comm.is_main_process():  # at once: after the evaluation, the file may be another
        logger.info("evaluating %s, SHA-256 %s", weights.path, weights.sha256)
    metrics = TransferTrainer.test(cfg, model)
    if cfg.TEST.AUG.ENABLED:
        metrics = joined(metrics, TransferTrainer.test_augmented(cfg, model))
    if comm.is_main_process():
        # Not results.json: that one tells what training gave, and the folder may be the same.
        path = os.path.join(cfg.OUTPUT_DIR, "results_eval_only.json")
        write_json(path, describe_result(cfg, metrics, weights))


def joined(plain: Mapping[str, Any], augmented: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of an evaluation and of the one with test-time augmentation in one mapping.

    Args:
        plain: ``{task: scores}``, or ``{test set: {task: scores}}`` of several sets.
        augmented: the same form, with other names of tasks.
    """
    shared = {name: {**plain[name], **augmented[name]} for name in plain if name in augmented}
    return {**plain, **augmented, **shared}


def describe_result(cfg: CfgNode, metrics: Mapping[str, Any], weights: WeightsRecord) -> dict[str, Any]:
    """Return a result with what is needed to compare it: protocol, weights, schedule, seed, machine and versions.

    Args:
        cfg: config that ran.
        metrics: what ``DefaultTrainer.test`` returned; a single test set comes without its name.
        weights: what the detector was started from.
    """
    solver = cfg.SOLVER
    cuda = cfg.MODEL.DEVICE != "cpu"
    return {
        "protocol": cfg.PROTOCOL,
        "weights": {"path": weights.path, "sha256": weights.sha256, "facts": weights.facts.as_dict()},
        "metrics": {cfg.DATASETS.TEST[0]: metrics} if len(cfg.DATASETS.TEST) == 1 else metrics,
        "schedule": {key: solver[key] for key in ("IMS_PER_BATCH", "BASE_LR", "STEPS", "MAX_ITER", "WARMUP_ITERS")},
        "evaluators": describe_backend(cfg),
        "engine": {key: cfg.ENGINE[key] for key in _SWITCHES}
        | {"AMP": solver.AMP.ENABLED, "ACCUMULATE": solver.ACCUMULATE},
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "versions": {m.__name__: m.__version__ for m in (moco_d2, detectron2, torch)},
        **provenance(),
    }


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is whole or not there; see :func:`to_json`."""
    with atomic_write(path) as file:
        file.write(to_json(content))
    logger.info("wrote %s", path)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return content as JSON; NaN, which JSON does not know, becomes null."""
    return json.dumps(_plain(content), indent=2, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Turn numpy numbers, tuples and mappings into what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None

"""The trainer of detectors: Detectron2's, with checked weights, an evaluator for each test set, and results on disk."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from fvcore.nn.precise_bn import get_bn_modules
from torch import nn
from torch.utils.data import DataLoader

from moco_d2.config import flat, roles
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.classes import CLASSES, class_names
from moco_d2.detection.evaluation import Evaluation, evaluate_augmented, evaluate_plainly, metrics_file
from moco_d2.detection.hooks import EvaluateIfDone, RepeatablePreciseBN
from moco_d2.detection.loader import build_loader
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.metrics.evaluators import build_evaluator
from moco_d2.detection.optimizer import build_optimizer
from moco_d2.detection.preflight import building, changes, check_run, fit_to_machine, scale_to_processes, starting_point
from moco_d2.detection.results import describe_result, write_json
from moco_d2.detection.segmentation import build_segmentation_mapper
from moco_d2.detection.step import build_step
from moco_d2.detection.subsets import training_set
from moco_d2.detection.sync_norm import stabilise_sync_norms
from moco_d2.detection.weights import all_names, load_weights, random_weights
from moco_d2.io.checkpoints import forget_checkpoint
from moco_d2.io.pictures import PictureError
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.model_zoo import config_changes
from moco_d2.running.checkpoints import PeriodicCheckpoint, changed_settings
from moco_d2.running.compilation import compile_networks, uncompiled
from moco_d2.running.losses import LOG_PERIOD
from moco_d2.running.mistakes import pictures_in_one_line
from moco_d2.running.precision import use_tf32
from moco_d2.running.preemption import StopWhenAsked
from moco_d2.running.progress import ProgressPrinter
from moco_d2.running.seeds import StepSeed
from moco_d2.seeding import stream_seed

logger = logging.getLogger(__name__)


class TransferTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for fine-tuning: on GPUs, one CPU process, or several.

    Attributes:
        seed: every random draw in training follows from it, the step, and the process.
        weights: the weights that the detector started from; set by :meth:`resume_or_load`.
        scaled: the keys that the number of processes or the machine changed, ``{key: (config's value, value used)}``.
        kept: ``KEY=value`` of the optimizer's settings that a resumed run keeps although its config differs.
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Check the run, then build model, optimizer, data, schedule, checkpointer and hooks.

        DefaultTrainer's own constructor is not called: it wraps the model for CUDA only.

        Raises:
            ValueError: the run is not possible with this batch, these data sets or evaluators.
        """
        TrainerBase.__init__(self)
        asked, world_size = cfg, comm.get_world_size()
        cfg = scale_to_processes(fit_to_machine(cfg, world_size), world_size)
        check_run(cfg, world_size)
        self.asked, self.cfg, self.scaled = asked, cfg, changes(asked, cfg)
        self.seed = run_seed(cfg)
        for key, (before, after) in self.scaled.items():
            logger.info("adapted to %d process(es): %s %s -> %s", world_size, key, before, after)

        model = self.build_model(cfg)
        compile_networks(networks(model), cfg, sizes_vary=True)  # in place, so the names of tensors do not change
        optimizer = self.build_optimizer(cfg, model)
        self._trainer = build_step(cfg, wrap_ddp(model), self.build_train_loader(cfg), optimizer)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.weights, self.kept, self.evaluation = random_weights(cfg), list[str](), Evaluation()
        self.checkpointer = TransferCheckpointer(model, cfg.OUTPUT_DIR, trainer=weakref.proxy(self))
        self.start_iter, self.max_iter = 0, cfg.SOLVER.MAX_ITER
        self.register_hooks(self.build_hooks())

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Build the detector, in the memory order that ``ENGINE`` asks for."""
        use_tf32(cfg.ENGINE.TF32)
        with building():
            model = super().build_model(cfg)
        stabilise_sync_norms(model)
        if cfg.ENGINE.CHANNELS_LAST:
            for network in networks(model):
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Build the optimizer that ``SOLVER.OPTIMIZER`` names."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode, purpose: int = 0) -> DataLoader:
        """Build the loader of training batches, each of which has ``1 / SOLVER.ACCUMULATE`` of a step's images.

        Args:
            cfg: config of the detector.
            purpose: a number. Loaders with different numbers draw pictures in different orders.
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
        """Return Detectron2's hooks in its order, with seeds and our checkpoints."""
        cfg, solver, main = self.cfg, self.cfg.SOLVER, comm.is_main_process()
        checkpoint = PeriodicCheckpoint(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_KEEP, solver.CHECKPOINT_KEEP_EVERY,
            check=self._trainer.flush,
        )  # fmt: skip
        return [
            StepSeed(self.seed, comm.get_rank()),
            hooks.IterationTimer(),
            hooks.LRScheduler(),
            self._build_precise_bn(),
            checkpoint,  # after precise-BN, which changes the model, and before the evaluation, which may fail
            EvaluateIfDone(cfg.TEST.EVAL_PERIOD, self._evaluate),
            EvaluateIfDone(0, self._evaluate_augmented) if cfg.TEST.AUG.ENABLED else None,
            hooks.PeriodicWriter(self.build_writers(), period=LOG_PERIOD) if main else None,
            StopWhenAsked(checkpoint),
        ]

    def _build_precise_bn(self) -> hooks.HookBase | None:
        if not self.cfg.TEST.PRECISE_BN.ENABLED or not get_bn_modules(self.model):
            return None
        cfg = self.cfg.clone()
        cfg.defrost()
        cfg.DATALOADER.NUM_WORKERS = 0  # as in Detectron2, to save memory
        loader = self.build_train_loader(cfg, purpose=1)
        return RepeatablePreciseBN(cfg.TEST.EVAL_PERIOD, self.model, loader, cfg.TEST.PRECISE_BN.NUM_ITER)

    def _evaluate(self) -> dict[str, Any]:
        begun = time.time()
        self._trainer.flush()  # a detector whose loss was not finite need not be evaluated
        try:
            with uncompiled(self.cfg):
                self.evaluation = evaluate_plainly(type(self), self.cfg, self.model)
        except Exception as error:
            advice = self._after_failed_evaluation(begun)
            if isinstance(error, PictureError):
                raise PictureError(f"{error}. {advice}") from error
            logger.error("the evaluation failed. %s", advice)
            raise
        if self.iter + 1 >= self.max_iter:  # at once, because later steps (closing writers, say) may fail
            self._write_results()
        return self.evaluation.by_task()

    def _after_failed_evaluation(self, begun: float) -> str:
        """Return what a failed evaluation leaves on the disk, and how to repeat it."""
        files = [metrics_file(self.cfg, name) for name in self.cfg.DATASETS.TEST]
        done = [path for path in files if os.path.exists(path) and os.path.getmtime(path) >= begun - 1]
        kept = f"The metrics of the test sets before it are in {', '.join(done)}. " if done else ""
        if not self.checkpointer.has_checkpoint():
            return f"{kept}There is no checkpoint yet: start again"
        path = self.checkpointer.get_checkpoint_file()
        return f"{kept}Then repeat the command with --resume, or with --eval-only MODEL.WEIGHTS {path}"

    def _evaluate_augmented(self) -> dict[str, Any]:
        with uncompiled(self.cfg):
            augmented = evaluate_augmented(type(self), self.cfg, self.model)
        self.evaluation = self.evaluation.joined(augmented)
        self._write_results()
        return augmented.by_task()

    @property
    def _last_eval_results(self) -> dict[str, Any]:
        """The metrics, as Detectron2's ``train`` compares them with ``TEST.EXPECTED_RESULTS`` and returns them."""
        return self.evaluation.by_task()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """Build the evaluator that the test set's metadata name."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls, cfg: CfgNode, model: nn.Module, evaluators: Sequence[DatasetEvaluator] | None = None
    ) -> dict[str, Any]:
        """Evaluate as :func:`~moco_d2.detection.evaluation.evaluate_plainly` does; return Detectron2's form."""
        return evaluate_plainly(cls, cfg, model, evaluators).by_task()

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue the run in ``OUTPUT_DIR`` if ``resume`` is set and there is one; else load ``MODEL.WEIGHTS``.

        Raises:
            ValueError: the weights may not be used (see :func:`moco_d2.detection.weights.load_weights`), or a fresh
                start would overwrite a run.
        """
        path, resuming = starting_point(self.cfg, resume)
        if not resuming:
            self.weights = load_weights(self.checkpointer, self.cfg, path)
        # Saved in every checkpoint, so that the trained detector's file, too, records the pixels that it expects.
        self.checkpointer.add_checkpointable("facts", self.weights)
        if resuming:
            load_weights(self.checkpointer, self.cfg, path, all_names, checkpointables=None)
            self.start_iter = self.iter + 1
            self.data_loader.batch_sampler.start = self.start_iter * self.cfg.SOLVER.ACCUMULATE
            logger.info("resuming at iteration %d of %d", self.start_iter, self.max_iter)
        forget_checkpoint()
        if comm.is_main_process():  # the others need not read the whole file for its SHA-256
            path, sha256 = self.weights.path or "random", self.weights.sha256
            logger.info("initial weights: %s, SHA-256 %s", path, sha256)

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's state: iteration, optimizer, scheduler, initial weights, and the settings to compare."""
        return {**super().state_dict(), "run": self._run(), "weights": self.weights.files()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; warn of settings that differ from the checkpoint's.

        Raises:
            ValueError: the batch or the optimizer differs.
        """
        # The run's initial weights: this command may name no MODEL.WEIGHTS, or the file may have changed. Detectron2's
        # own checkpoints record neither weights nor settings.
        began = state.get("weights", {"path": self.cfg.MODEL.WEIGHTS, "sha256": ""})
        self.weights.path, self.weights.sha256 = began["path"], began["sha256"]
        self.weights.source_sha256 = began.get("source_sha256", "")
        then, now = state.get("run", {}), self._run()
        if then and then["SOLVER.IMS_PER_BATCH"] != now["SOLVER.IMS_PER_BATCH"]:
            raise ValueError(
                f"a run of {_batch(then)} cannot be resumed with {_batch(now)}: the checkpoint's lr and iteration "
                "belong to its batch. Keep processes times SOLVER.ACCUMULATE as it was"
            )
        for key in ("SOLVER.OPTIMIZER", "SOLVER.LAYER_DECAY"):  # checkpoints of earlier versions have neither
            if key in then and then[key] != now[key]:
                raise ValueError(f"a run with {key} {then[key]} cannot be resumed with {now[key]}: keep it as it was")
        # Checkpoints of earlier versions contain fewer settings.
        changed = changed_settings(then, {key: value for key, value in now.items() if key in then})
        kept = {key: changed.pop(key) for key in roles.resumed(list(changed), roles.CHECKPOINT)}
        if changed:
            logger.warning("the run is resumed with other settings than before: %s", "; ".join(changed.values()))
        if kept:
            logger.warning(
                "the run keeps the checkpoint's optimizer settings, not the config's: %s. To use the config's, start "
                "a new run in another OUTPUT_DIR with MODEL.WEIGHTS set to a checkpoint of this run",
                "; ".join(kept.values()),
            )
            # So that results.json states the settings that were used, and the run counts as modified.
            self.kept = [f"{key}={then[key]} (kept on resuming)" for key in kept]
            self.cfg.defrost()
            self.cfg.merge_from_list([word for key in kept for word in (key, then[key])])
            self.cfg.freeze()
        super().load_state_dict(state)

    def _run(self) -> dict[str, Any]:
        """Return what a resumed run is compared by."""
        values = flat(self.cfg)
        return {
            **{key: values[key] for key in roles.resumed(values, roles.CHECKPOINT, roles.CONFIG)},
            "SEED": self.seed,
            "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
            "SOLVER.ACCUMULATE": self.cfg.SOLVER.ACCUMULATE,
            "number of images": len(self.data_loader.dataset),
            "number of processes": comm.get_world_size(),
        }

    def train(self) -> None:
        """Write ``classes.json`` (the names of the classes), train to the end, evaluate, and write ``results.json``."""
        if comm.is_main_process():
            write_json(os.path.join(self.cfg.OUTPUT_DIR, CLASSES), class_names(self.cfg))
        with pictures_in_one_line():
            super().train()

    def _write_results(self) -> None:
        if comm.is_main_process() and self.cfg.DATASETS.TEST:
            result = describe_result(self.cfg, self.evaluation.metrics, self.evaluation.libraries, self.weights)
            modified = config_changes(self.asked)
            result |= {
                "iterations": self.max_iter,
                "pictures": {"train": len(self.data_loader.dataset), "test": self.evaluation.pictures},
                "scaled": self.scaled,
                "config_changes": None if modified is None else [*modified, *self.kept],
            }
            write_json(os.path.join(self.cfg.OUTPUT_DIR, "results.json"), result)


def networks(model: nn.Module) -> list[nn.Module]:
    """Return the networks of a detector with most of its arithmetic: the backbone and, of C4, conv5 on the regions."""
    parts = dict(model.named_modules())
    return [parts[name] for name in ("backbone", "roi_heads.res5") if name in parts]


def _batch(run: Mapping[str, Any]) -> str:
    batch, accumulate, processes = (
        run[key] for key in ("SOLVER.IMS_PER_BATCH", "SOLVER.ACCUMULATE", "number of processes")
    )
    return f"{batch} images a step ({processes} process(es), SOLVER.ACCUMULATE {accumulate})"


def run_seed(cfg: CfgNode) -> int:
    """Return ``SEED``, or 0 if it is unset; the commands draw one before they train."""
    return max(0, int(cfg.SEED))


def evaluate(cfg: CfgNode) -> None:
    """Evaluate the trained detector in ``MODEL.WEIGHTS`` on each test set, and write ``results_eval_only.json``.

    Raises:
        ValueError: weights are missing or do not fill the whole detector, or data sets are missing.
    """
    cfg = fit_to_machine(cfg, comm.get_world_size())
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs a trained detector: pass MODEL.WEIGHTS OUTPUT_DIR/model_final.pth")
    check_run(cfg, comm.get_world_size(), train=False)
    model = TransferTrainer.build_model(cfg)
    weights = load_weights(TransferCheckpointer(model), cfg, cfg.MODEL.WEIGHTS, all_names)
    forget_checkpoint()
    if comm.is_main_process():  # before the evaluation, during which the file may change
        logger.info("evaluating %s, SHA-256 %s", weights.path, weights.sha256)
    evaluation = evaluate_plainly(TransferTrainer, cfg, model)
    if cfg.TEST.AUG.ENABLED:
        evaluation = evaluation.joined(evaluate_augmented(TransferTrainer, cfg, model))
    if comm.is_main_process():
        # Not results.json, which may be in the same folder and is the result of the training.
        path = os.path.join(cfg.OUTPUT_DIR, "results_eval_only.json")
        result = describe_result(cfg, evaluation.metrics, evaluation.libraries, weights)
        write_json(path, result | {"pictures": {"test": evaluation.pictures}})

"""The pretraining trainer: Detectron2's loop and hooks around an SSL method."""

from __future__ import annotations

import itertools
import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, JSONWriter, TensorboardXWriter

from moco_d2.config.keys import RENAMED
from moco_d2.data import ViewLoader, build_augmentation
from moco_d2.engine.build import configured_method
from moco_d2.engine.checkpoint import PretrainCheckpointer, load_method
from moco_d2.engine.hooks import MethodSchedule, PretrainMetrics, PretrainPrinter
from moco_d2.engine.loader import build_loader
from moco_d2.engine.monitor import Monitor, MonitorHook, probe_period
from moco_d2.engine.optim import IMPLIED, ScheduledOptimizer, build_clipper, build_optimizer, total_steps, trajectory
from moco_d2.engine.preflight import check_config
from moco_d2.engine.step import (
    PretrainStep,
    apply_performance_options,
    chosen_autocast,
    describe_performance_options,
    performance_advice,
)
from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import forget_checkpoint
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.layers.encoders import ENCODERS, encoder_args
from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod, default_args
from moco_d2.model_zoo import pretraining_changes
from moco_d2.running.checkpoints import PeriodicCheckpoint, changed_settings, check_resumable, last_intact
from moco_d2.running.compilation import CudaGraphSteps, uses_cuda_graphs
from moco_d2.running.losses import LOG_PERIOD
from moco_d2.running.mistakes import pictures_in_one_line
from moco_d2.running.preemption import StopWhenAsked
from moco_d2.running.seeds import StepSeed

logger = logging.getLogger(__name__)


class PretrainTrainer(DefaultTrainer):
    """Detectron2's ``DefaultTrainer`` for an SSL method on unlabelled images.

    Attributes:
        method: the SSL method, unwrapped.
        seed: determines everything random (initial weights, data order, augmentation, shuffling).
    """

    def __init__(self, cfg: CfgNode) -> None:
        """Build data, method, optimizer, schedule, checkpointer and hooks.

        DefaultTrainer's own constructor is not called, because it wraps the model for CUDA only.

        Raises:
            ValueError: the config is wrong, or there are too few images; raised before training starts.
        """
        TrainerBase.__init__(self)
        check_config(cfg, comm.get_world_size())
        self.cfg, self.seed = cfg, cfg.SEED
        loader = self.build_train_loader(cfg)
        self.steps_per_epoch = loader.sampler.steps_per_epoch
        self.start_iter, self.max_iter = 0, total_steps(cfg, self.steps_per_epoch)

        self.method = self.build_model(cfg, len(loader.dataset))
        optimizer = build_optimizer(cfg, self.method)
        self.scheduler = ScheduledOptimizer(cfg, optimizer, self.steps_per_epoch)
        self._trainer = PretrainStep(
            wrap_ddp(self.method), loader, optimizer, chosen_autocast(cfg), LOG_PERIOD, self.max_iter,
            build_clipper(cfg),
        )  # fmt: skip
        me = weakref.proxy(self)
        self.checkpointer = PretrainCheckpointer(
            self.method, cfg.OUTPUT_DIR, lambda: me.facts(), lambda state: me.check_run(state), trainer=me
        )
        self.register_hooks(self.build_hooks())
        self._announce(len(loader.dataset))

    @classmethod
    def build_model(cls, cfg: CfgNode, images: int = 1) -> SSLMethod:
        """Build the method for ``images`` images, on its device; ``SEED`` alone determines its weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.SEED)
            method = configured_method(cfg, images)
        return apply_performance_options(method.to(cfg.MODEL.DEVICE), cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> ViewLoader:
        """Build this process's loader."""
        return build_loader(cfg)

    def facts(self) -> BackboneFacts:
        """Return the facts that travel with the exported backbone."""
        pixels = build_augmentation(self.cfg.DATA.AUGMENTATION, self.cfg.DATA.CROP_SIZE).pixels
        # The facts travel to strangers: of a folder they have the name, not the path.
        images = ", ".join(Path(name).name or name for name in self.cfg.DATASETS.TRAIN)
        done = self.iter + 1
        origin = f"moco_d2 {self.cfg.SSL.METHOD} on {images}, {done} of {self.max_iter} iterations"
        origin += f" ({options})" if (options := describe_performance_options(self.cfg)) else ""
        # Results are compared with published ones by this name: only the complete, unchanged recipe may have it.
        notes = ["unfinished"] * (done < self.max_iter) + ["modified"] * bool(recipe_changes(self.cfg, self.method))
        recipe = self.cfg.PROTOCOL + (f" ({', '.join(notes)})" if notes else "")
        describe = ENCODERS[self.cfg.SSL.ENCODER.NAME].describe
        return describe(self.method.backbone(), pixels, origin=origin, recipe=recipe)

    def build_hooks(self) -> list[hooks.HookBase | None]:
        """Return the hooks in the order in which they run."""
        solver = self.cfg.SOLVER
        checkpoint = PeriodicCheckpoint(
            self.checkpointer, solver.CHECKPOINT_PERIOD, solver.CHECKPOINT_KEEP, solver.CHECKPOINT_KEEP_EVERY,
            check=self._trainer.flush,
        )  # fmt: skip
        writers = self.build_writers() if comm.is_main_process() else []
        monitor = []
        if self.cfg.SSL.MONITOR.DATASET:
            files = [writer for writer in writers if not isinstance(writer, PretrainPrinter)]
            period = probe_period(self.cfg, self.steps_per_epoch)
            monitor = [MonitorHook(Monitor(self.cfg, self.method), period, files)]
        return [
            # Each process draws its own numbers (dropout, masks), and all draw alike what they share (a permutation).
            StepSeed(self.seed, stream=comm.get_rank()),
            CudaGraphSteps() if uses_cuda_graphs(self.cfg) else None,
            MethodSchedule(self.method, self.steps_per_epoch, self._replay),
            hooks.IterationTimer(),
            hooks.LRScheduler(self._trainer.optimizer, self.scheduler),
            PretrainMetrics(self.method, solver.IMS_PER_BATCH, self.steps_per_epoch, LOG_PERIOD),
            checkpoint,
            *monitor,
            hooks.PeriodicWriter(writers, period=LOG_PERIOD) if writers else None,
            StopWhenAsked(checkpoint),
        ]

    def _replay(self) -> Iterator[Views]:
        """Yield this process's batches of the epoch that begins, from a second loader."""
        loader = self.build_train_loader(self.cfg)
        loader.sampler.start = self.iter
        yield from itertools.islice(loader, self.steps_per_epoch)

    def build_writers(self) -> list[EventWriter]:
        """Return the writers: progress line, ``metrics.json``, TensorBoard."""
        folder = self.cfg.OUTPUT_DIR
        return [
            PretrainPrinter(self.max_iter, self.method),
            JSONWriter(os.path.join(folder, "metrics.json")),
            TensorboardXWriter(folder),
        ]

    def resume_or_load(self, resume: bool = True) -> None:
        """Continue the run in ``OUTPUT_DIR`` (``resume``), or start from ``MODEL.WEIGHTS`` or from scratch."""
        path = last_intact(self.cfg.OUTPUT_DIR) if resume else ""
        if path:
            check_resumable(path)
            self.checkpointer.load(path)
            self.start_iter = self.iter + 1
            self._trainer.data_loader.sampler.start = self.start_iter
            logger.info("resuming at iteration %d of %d", self.start_iter, self.max_iter)
        elif self.cfg.MODEL.WEIGHTS:
            load_method(self.method, self.cfg.MODEL.WEIGHTS)
        forget_checkpoint()

    def train(self) -> None:
        """Train to the end. A loss that is not finite stops the run; the last good checkpoint stays."""
        try:
            with pictures_in_one_line():
                super().train()
        except FloatingPointError as error:
            kept = self.checkpointer.get_checkpoint_file() if self.checkpointer.has_checkpoint() else "none yet"
            remedies = " or ".join(["a lower SOLVER.BASE_LR", *self.method.remedies_for_divergence()])
            in_float32 = ", or continue this run with --resume and ENGINE.AUTOCAST ''"
            raise FloatingPointError(
                f"{error}\nThe last good checkpoint is kept: {kept}. Start a new run in another OUTPUT_DIR with "
                f"{remedies}, from scratch or with MODEL.WEIGHTS set to that checkpoint"
                f"{in_float32 if chosen_autocast(self.cfg) else ''}"
            ) from error

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's state: iteration, optimizer, scheduler, and the settings that must not change."""
        return {**super().state_dict(), "run": self._run()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`; raises the ValueError of :meth:`check_run`."""
        self.check_run(state)
        super().load_state_dict(state)

    def check_run(self, state: Mapping[str, Any]) -> None:
        """Compare the settings of an interrupted run, in its :meth:`state_dict`, with this one's.

        Raises:
            ValueError: the seed, batch, data, length, recipe, optimizer or schedule of the interrupted run differ, or
                a setting that depends on the number of processes, so the run would not continue exactly.
        """
        # Settings that checkpoints of earlier versions lack: the method's own are taken as unchanged, and these runs
        # decoded at a reduced size. An argument that a method has got since did not change what it computes by default.
        now = self._run()
        implied = {key: value for key, value in IMPLIED.items() if key in now}
        implied |= {f"SSL.ARGS.{key}": value for key, value in default_args(self.cfg.SSL.METHOD).items()}
        # Their encoders had batch norm; a changed name, width or stem shows in the tensors' shapes.
        encoder = {
            k: "BN" if k == "SSL.ENCODER.ARGS.norm" else v for k, v in now.items() if k.startswith("SSL.ENCODER")
        }
        implied |= {**self.method.settings(), **encoder, "DATA.REDUCED_DECODING": True}
        stored = {RENAMED.get(name, name): value for name, value in state.get("run", {}).items()}
        then = implied | stored
        changed = changed_settings(then, now)
        if changed:
            raise ValueError(
                f"cannot resume exactly: {'; '.join(changed.values())}. Restore the setting, or the number of "
                "processes that determines it, or start a new run in another OUTPUT_DIR with MODEL.WEIGHTS set to a "
                "checkpoint of this one"
            )

    def _run(self) -> dict[str, Any]:
        loader = self._trainer.data_loader
        return {
            "SEED": self.seed,
            "SOLVER.IMS_PER_BATCH": self.cfg.SOLVER.IMS_PER_BATCH,
            "number of images": len(loader.dataset),
            "number of iterations": self.max_iter,
            **trajectory(self.cfg),
            **{f"SSL.ARGS.{name}": value for name, value in self.cfg.SSL.ARGS.items()},
            "SSL.ENCODER.NAME": self.cfg.SSL.ENCODER.NAME,
            **{f"SSL.ENCODER.ARGS.{name}": value for name, value in self.cfg.SSL.ENCODER.ARGS.items()},
            "DATA.AUGMENTATION": self.cfg.DATA.AUGMENTATION,
            "DATA.CROP_SIZE": self.cfg.DATA.CROP_SIZE,
            "DATA.REDUCED_DECODING": self.cfg.DATA.REDUCED_DECODING,
            **loader.sampler.settings(),
            **self.method.settings(),
        }

    def _announce(self, images: int) -> None:
        length = f"{self.cfg.SOLVER.EPOCHS} epochs, " if self.cfg.SOLVER.EPOCHS else ""
        batch = self.cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            "%s (%s) on %d images: %s%d iterations of %d images in %d process(es), augmentation %s at %d px",
            self.cfg.SSL.METHOD, _encoder(self.cfg.SSL.ENCODER), images, length, self.max_iter, batch,
            comm.get_world_size(), self.cfg.DATA.AUGMENTATION, self.cfg.DATA.CROP_SIZE,
        )  # fmt: skip
        for name, value in self.method.settings().items():
            logger.info("%s: %s", name, value)
        for departure in self.method.departures():
            logger.warning("%s: the weights will be marked as those of a modified recipe", departure)
        for warning in [*self.method.advice(images, batch, self.max_iter), *performance_advice(self.cfg)]:
            logger.warning("%s", warning)


def _encoder(encoder: CfgNode) -> str:
    """Return the name of an encoder, with the arguments that are not its defaults."""
    defaults = encoder_args(encoder.NAME)
    return ", ".join([encoder.NAME, *(f"{k} {v}" for k, v in encoder.ARGS.items() if v != defaults[k])])


def recipe_changes(cfg: CfgNode, method: SSLMethod) -> list[str] | None:
    """List the differences from the shipped recipe that the config names: settings, then the effect of processes.

    None if the config does not name a shipped recipe.
    """
    changes = pretraining_changes(cfg)
    return None if changes is None else [*changes, *method.departures()]

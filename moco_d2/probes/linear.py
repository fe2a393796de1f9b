"""Linear classifiers under a published protocol: on frozen features, or trained together with the backbone.

A frozen backbone is in evaluation mode throughout, so its features of the test pictures never change: they are
computed once. It is verified to be unchanged at the end of every epoch. If the backbone is trained as well
(semi-supervised), its batch norms use the statistics of all processes' batches, and the test pictures are seen again
after every epoch.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import HookBase, TrainerBase, hooks
from detectron2.utils import comm
from detectron2.utils.events import JSONWriter, TensorboardXWriter, get_event_storage
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from moco_d2.data import EpochSampler, SkipLog, ViewDataset, ViewLoader, build_backend
from moco_d2.data.labelled import LabelledSet
from moco_d2.data.labelled_loader import LabelledSource, crop_and_flip
from moco_d2.data.listing import Paths
from moco_d2.io.files import atomic_write
from moco_d2.layers.batch_norm import use_sync_batch_norm
from moco_d2.layers.distributed import total, wrap_ddp
from moco_d2.layers.knn import hits
from moco_d2.layers.lars import Lars
from moco_d2.layers.vit import LastBlocks
from moco_d2.probes.backbone import Backbone
from moco_d2.probes.features import Features, features_of
from moco_d2.probes.protocols import LinearProtocol
from moco_d2.probes.result import FILE, as_json, describe, result
from moco_d2.running.checkpoints import (
    PeriodicCheckpoint,
    changed_settings,
    check_resumable,
    last_intact,
    point_to,
    read_run,
    save_run,
)
from moco_d2.running.mistakes import pictures_in_one_line
from moco_d2.running.preemption import StopWhenAsked
from moco_d2.running.progress import ProgressPrinter
from moco_d2.running.seeds import seeded
from moco_d2.running.workers import worker_count

logger = logging.getLogger(__name__)

LOG_PERIOD = 20

# What is classified and labels (n,) of this process's share of each batch, from a step on: features (n, C) of a frozen
# backbone, or pictures (n, 3, H, W).
Batches = Callable[[int], Iterator[tuple[torch.Tensor, torch.Tensor]]]


def probe_linear(
    backbone: Backbone,
    train: LabelledSet,
    val: LabelledSet,
    cfg: CfgNode,
    protocol: LinearProtocol,
    name: str,
    changes: Sequence[str] = (),
    resume: bool = False,
    labels: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Train a linear classifier, test it after every epoch, and write ``OUTPUT_DIR/probe.json``.

    The backbone is frozen, or trained as well, as the protocol says. Every process must call this.

    Args:
        backbone: to be probed; moved to ``MODEL.DEVICE``.
        train: labelled pictures to train on.
        val: labelled pictures to test on, of the same classes.
        cfg: SEED, OUTPUT_DIR, MODEL.DEVICE, DATALOADER.NUM_WORKERS, SOLVER.CHECKPOINT_KEEP, DATA's limits and backend.
        protocol: how it is trained.
        name: of the protocol, with ``(modified)`` if it was changed.
        changes: what was changed.
        resume: continue the run in ``OUTPUT_DIR``.
        labels: what the result says of the choice of the training pictures (semi-supervised).

    Returns:
        The content of ``probe.json``, with top-1 and top-5 in percent, of the last epoch and of the best one.

    Raises:
        ValueError: a batch does not fit the set or the processes, the protocol needs a ViT, or the interrupted run was
            another one.
    """
    _check(protocol, len(train))
    if protocol.blocks:
        backbone = replace(backbone, network=LastBlocks(backbone.network, protocol.blocks))
    backbone.network.to(cfg.MODEL.DEVICE)
    tested = (_changing if protocol.backbone_lr else _frozen)(backbone, val, cfg, protocol)
    batches, sampler, skips = (_cached if protocol.cached else _augmented)(backbone, train, cfg, protocol)
    kind = "semi" if protocol.backbone_lr else "linear"
    settings = {
        "SEED": cfg.SEED, "protocol": name, "changes": list(changes), "sha256 of the weights": backbone.sha256,
        "number of images": sampler.size, **_fingerprints(training=train, test=val),
    }  # fmt: skip
    trainer = LinearTrainer(
        backbone.network, batches, tested, len(train.classes), protocol, sampler.steps_per_epoch, cfg, settings
    )
    logger.info(
        "%s probe %s%s: %d pictures of %d classes, %d epochs of %d iterations of %d pictures, lr %s",
        kind, name, f" ({', '.join(changes)})" if changes else "", sampler.size, len(train.classes), protocol.epochs,
        sampler.steps_per_epoch, protocol.batch, " and ".join(f"{lr:g}" for lr in protocol.lrs_at(0) if lr),
    )  # fmt: skip
    trainer.resume_or_start(resume)
    trainer.run()
    sets = {"train": describe(train, skips()), "val": describe(val, trainer.unreadable)}
    sets |= {"labels": dict(labels)} if labels else {}
    found = {"protocol": name, "changes": list(changes), **trainer.results(), **sets, "classes": len(train.classes)}
    content = result(kind, backbone, cfg.SEED, cfg.MODEL.DEVICE, found)
    _write(content, Path(cfg.OUTPUT_DIR) / FILE)
    return content


def _write(content: dict[str, Any], path: Path) -> None:
    if comm.is_main_process():
        with atomic_write(path) as file:
            file.write(as_json(content))


def _fingerprints(**halves: LabelledSet) -> dict[str, Any]:
    """Return what a resumed run compares of its pictures."""
    return {f"fingerprint of the {half} pictures' names": Paths(one.files).fingerprint for half, one in halves.items()}


def _check(protocol: LinearProtocol, pictures: int) -> None:
    if protocol.batch > pictures:
        raise ValueError(
            f"the training set has {pictures} pictures, fewer than a batch of {protocol.batch}: give a smaller --batch "
            "(the lr follows it; the protocol is then called modified)"
        )
    if protocol.batch % comm.get_world_size():
        raise ValueError(f"a batch of {protocol.batch} pictures cannot be divided by {comm.get_world_size()} processes")


def _frozen(backbone: Backbone, val: LabelledSet, cfg: CfgNode, protocol: LinearProtocol) -> Callable[[], Features]:
    """Return a function that gives the test features, computed here, once; it raises if the backbone has changed."""
    network = backbone.network
    before = {key: value.clone() for key, value in network.state_dict().items()}
    features = features_of(backbone, val, cfg, protocol.size, bicubic=protocol.bicubic)

    def tested() -> Features:
        changed = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
        if changed:
            raise RuntimeError(f"the backbone was changed, though it is frozen: {', '.join(changed[:3])}")
        return features

    return tested


def _changing(backbone: Backbone, val: LabelledSet, cfg: CfgNode, protocol: LinearProtocol) -> Callable[[], Features]:
    """Return a function that gives the backbone's present features of the test pictures."""
    return functools.partial(features_of, backbone, val, cfg, protocol.size, bicubic=protocol.bicubic)


def _augmented(
    backbone: Backbone, train: LabelledSet, cfg: CfgNode, protocol: LinearProtocol
) -> tuple[Batches, EpochSampler, Callable[[], int]]:
    """Return batches of augmented pictures or of their features, their sampler, and the number of unreadable ones."""
    pixels, device = backbone.facts.pixels, torch.device(cfg.MODEL.DEVICE)
    source = LabelledSource(train, cfg.DATA.MAX_PIXELS)
    dataset = ViewDataset(
        source, crop_and_flip(protocol.size, pixels), cfg.SEED, build_backend(cfg.DATA.BACKEND, device),
        cfg.DATA.MAX_PIXELS,
    )  # fmt: skip
    sampler = EpochSampler(
        source.lengths, protocol.batch, cfg.SEED, comm.get_rank(), comm.get_world_size(), fingerprint=source.fingerprint
    )
    skips = SkipLog(cfg.OUTPUT_DIR, cfg.DATA.MAX_SKIPPED, comm.get_rank())
    loader, labels = ViewLoader(dataset, sampler, worker_count(cfg), device, skips), train.labels.to(device)

    def batches(start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        sampler.start = start
        for views in loader:
            images = views.images[0] if pixels.order == "RGB" else views.images[0].flip(1)
            if not protocol.backbone_lr:
                with torch.no_grad():
                    images = backbone.network(images)
            yield images, labels[views.index]  # of the pictures really shown

    return batches, sampler, lambda: len(set().union(*comm.all_gather(skips.paths)))


def _cached(
    backbone: Backbone, train: LabelledSet, cfg: CfgNode, protocol: LinearProtocol
) -> tuple[Batches, EpochSampler, Callable[[], int]]:
    """Return batches of the features of the test transform, which are computed here, once."""
    features = features_of(backbone, train, cfg, protocol.size, bicubic=protocol.bicubic).gathered()
    sampler = EpochSampler(len(features.labels), protocol.batch, cfg.SEED, comm.get_rank(), comm.get_world_size())

    def batches(start: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        sampler.start = start
        for keys in sampler:
            chosen = torch.tensor([index for _, index in keys], device=features.labels.device)
            yield features.values[chosen], features.labels[chosen]

    return batches, sampler, lambda: features.unreadable


class LinearTrainer(TrainerBase):
    """Detectron2's loop and hooks around a linear classifier.

    Attributes:
        classifier: the Linear.
        history: accuracies on the test set after each epoch, in percent.
        unreadable: number of test pictures that were left out.
    """

    def __init__(
        self,
        backbone: nn.Module,
        batches: Batches,
        tested: Callable[[], Features],
        classes: int,
        protocol: LinearProtocol,
        steps_per_epoch: int,
        cfg: CfgNode,
        settings: dict[str, Any],
    ) -> None:
        """Build the classifier, its optimizer and the hooks; SEED alone determines the first weights."""
        super().__init__()
        self.batches, self.tested, self.protocol, self.settings = batches, tested, protocol, settings
        self.steps_per_epoch, self.folder = steps_per_epoch, cfg.OUTPUT_DIR
        self.max_iter = protocol.epochs * steps_per_epoch
        self.history: list[dict[str, float]] = []
        self.unreadable = 0
        with torch.no_grad(), seeded(cfg.SEED):
            self.classifier = nn.Linear(backbone(torch.zeros(1, 3, 64, 64, device=cfg.MODEL.DEVICE)).shape[1], classes)
            if not protocol.default_init:
                nn.init.normal_(self.classifier.weight, std=0.01)
                nn.init.zeros_(self.classifier.bias)
        network: nn.Module = self.classifier.to(cfg.MODEL.DEVICE)
        groups = [list(self.classifier.parameters())]
        if protocol.backbone_lr:
            use_sync_batch_norm(backbone.train().requires_grad_(True))
            network = nn.Sequential(OrderedDict(backbone=backbone, classifier=self.classifier))
            groups.append(list(backbone.parameters()))
        self.model, self.optimizer = wrap_ddp(network), _optimizer(protocol, groups)
        self.checkpointer = _LinearCheckpointer(network, self.folder, save_to_disk=comm.is_main_process(), trainer=self)
        checkpoint = PeriodicCheckpoint(self.checkpointer, steps_per_epoch, cfg.SOLVER.CHECKPOINT_KEEP)
        self.register_hooks([
            hooks.IterationTimer(),
            _TestEveryEpoch(),
            checkpoint,
            hooks.PeriodicWriter(self._writers(), period=LOG_PERIOD) if comm.is_main_process() else None,
            StopWhenAsked(checkpoint),
        ])  # fmt: skip

    def _writers(self) -> list[Any]:
        metrics = JSONWriter(os.path.join(self.folder, "metrics.json"))
        return [ProgressPrinter(self.max_iter), metrics, TensorboardXWriter(self.folder)]

    def resume_or_start(self, resume: bool) -> None:
        """Continue the run in ``OUTPUT_DIR``, if there is one and it is asked for."""
        if resume and (path := last_intact(self.folder)):
            check_resumable(path)
            self.checkpointer.load(path)
            self.start_iter = self.iter + 1
            logger.info("resuming at iteration %d of %d", self.start_iter, self.max_iter)

    def run(self) -> None:
        """Train to the end."""
        if self.start_iter < self.max_iter:
            self._data = self.batches(self.start_iter)
            with pictures_in_one_line():
                self.train(self.start_iter, self.max_iter)

    def run_step(self) -> None:
        """Do a step of cross entropy."""
        lrs = self.protocol.lrs_at(self.iter // self.steps_per_epoch)
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):  # there is one group if it is frozen
            group["lr"] = lr
        inputs, labels = next(self._data)
        loss = F.cross_entropy(self.model(inputs), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if (self.iter + 1) % LOG_PERIOD == 0 or self.iter + 1 == self.max_iter:  # reading it waits for the GPU
            mean = float(total(loss.detach())) / comm.get_world_size()
            if not mean < float("inf"):
                raise FloatingPointError(f"the loss is {mean} at iteration {self.iter}: give a lower --lr")
            get_event_storage().put_scalars(
                total_loss=mean, lr=lrs[0], epoch=(self.iter + 1) / self.steps_per_epoch, smoothing_hint=False
            )

    @torch.no_grad()
    def test(self) -> None:
        """Classify the test set, and add the accuracies to the history."""
        tested = self.tested()
        self.unreadable = tested.unreadable
        scores, labels = self.classifier(tested.values), tested.labels
        counts = torch.tensor([hits(scores, labels), hits(scores, labels, 5), len(labels)], device=labels.device)
        top1, top5, count = total(counts).tolist()
        found = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
        self.history.append({"epoch": (self.iter + 1) // self.steps_per_epoch, **found})
        get_event_storage().put_scalars(**found, smoothing_hint=False)
        logger.info("epoch %d: top-1 %.2f %%, top-5 %.2f %%", self.history[-1]["epoch"], *found.values())

    def results(self) -> dict[str, Any]:
        """Return the accuracies of the last, the best and every epoch, and how the classifier was trained."""
        last, best = self.history[-1], max(self.history, key=lambda row: row["top1"])
        return {
            "results": [{"of": "last epoch", **last}, {"of": "best epoch", **best}],
            "by_epoch": self.history,
            "size": self.protocol.size,
            "lr": self.protocol.scaled_lr,
            **({"backbone_lr": self.protocol.lrs_at(0)[1]} if self.protocol.backbone_lr else {}),
            "batch": self.protocol.batch,
            "epochs": self.protocol.epochs,
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the loop's state, and the settings that must not change."""
        state = {"optimizer": self.optimizer.state_dict(), "history": self.history, "run": self.settings}
        return {**super().state_dict(), **state, "unreadable": self.unreadable}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: the interrupted run had other settings.
        """
        if changed := changed_settings(state.get("run", {}), self.settings):
            raise ValueError(
                f"cannot resume exactly: {'; '.join(changed.values())}. Restore the setting, or start a new run in "
                "another OUTPUT_DIR"
            )
        super().load_state_dict(state)
        self.optimizer.load_state_dict(state["optimizer"])
        self.history, self.unreadable = state["history"], state["unreadable"]


def _optimizer(protocol: LinearProtocol, parameters: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    groups = [{"params": group} for group in parameters]
    if protocol.optimizer == "larc":
        return Lars(groups, protocol.scaled_lr, 0.9, protocol.weight_decay, form="larc")
    return torch.optim.SGD(groups, protocol.scaled_lr, 0.9, weight_decay=protocol.weight_decay)


class _TestEveryEpoch(HookBase):
    """Tests the classifier at the end of every epoch."""

    def after_step(self) -> None:
        if (self.trainer.iter + 1) % self.trainer.steps_per_epoch == 0:
            self.trainer.test()


class _LinearCheckpointer(Checkpointer):
    """fvcore's checkpointer with this project's writer and reader."""

    def save(self, name: str, **kwargs: Any) -> None:
        if self.save_to_disk:
            save_run(self, name, **kwargs)
            point_to(self, name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        return read_run(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(checkpoint.pop("model"))
        except RuntimeError as error:
            raise ValueError(
                f"the checkpoint in {self.save_dir} is of another classifier or run: {' '.join(str(error).split())}"
            ) from error

"""MoCo v1 (He et al., arXiv 1911.05722) and v2 (Chen et al., arXiv 2003.04297).

Letters: N images per process, R processes, C feature dimension, K keys in the queue.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import all_gather, own_part
from moco_d2.layers.ema import ema_update_
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import mlp_head, replace_head, without_head
from moco_d2.layers.losses import contrast_rank, info_nce
from moco_d2.layers.queue import FeatureQueue
from moco_d2.layers.shuffle import BNGroups, encode_shuffled
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, ShuffledMethod, check_ranges, feature_spread, register

logger = logging.getLogger(__name__)

QUEUE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@register
class MoCo(ShuffledMethod):
    """Momentum contrast: a query encoder, its moving average (the key encoder), and a queue of past keys.

    The defaults are MoCo v1's. MoCo v2 is ``mlp=True, temperature=0.2``, with its own augmentation and a cosine
    schedule, which the config sets.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.07,
        mlp: bool = False,
        symmetric: bool = False,
        shuffle: bool = True,
        bn_groups: int = 0,
        queue_dtype: str = "float32",
    ) -> None:
        """Build both encoders and the queue.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            queue_size: K, number of negatives.
            momentum: m in [0, 1], decay of the key encoder (Eq. 2).
            temperature: tau > 0 (Eq. 1).
            mlp: use MoCo v2's two-layer head instead of v1's single layer.
            symmetric: use each view as query once and add the two losses. The authors' CIFAR demo has this option;
                the papers do not use it.
            shuffle: shuffling BN (section 3.3). Without it, batch statistics reveal the positive key.
            bn_groups: number of groups per process that have batch statistics of their own. 1 is plain BN. 0 chooses
                the number that makes 8 in total, like the paper's 8 GPUs, but at least one per process. With a single
                group in total, or an encoder whose norm is SyncBN or GN, shuffling has no effect.
            queue_dtype: dtype of the queue. ``bfloat16`` and ``float16`` halve its memory and round the keys.

        Raises:
            ValueError: a value is out of range, the encoder's head is not a Linear, or there are BN groups for an
                encoder without plain batch norm.
        """
        super().__init__()
        check_args(dim, queue_size, momentum, temperature, bn_groups, queue_dtype)
        self.momentum, self.temperature = momentum, temperature
        self.symmetric, self.shuffle = symmetric, shuffle
        self.encoder_q = encoder(num_classes=dim)
        replace_head(self.encoder_q, mlp_head if mlp else lambda head: head)
        self.groups = BNGroups(self.encoder_q, bn_groups, shuffle)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, dim, QUEUE_DTYPES[queue_dtype])

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of two views (N, 3, H, W) of each image: Algorithm 1."""
        x1, x2 = views.images
        if self.training:
            self.check_batch(len(x1))
            ema_update_(self.encoder_k, self.encoder_q, self.momentum)
        if self.symmetric:
            loss_12, keys_2 = self._contrast(x1, x2)
            loss_21, keys_1 = self._contrast(x2, x1)
            loss, keys = loss_12 + loss_21, torch.cat([keys_1, keys_2])
        else:
            loss, keys = self._contrast(x1, x2)
        if self.training:
            self.queue.enqueue(keys)  # After the loss: a step's own keys are never its negatives.
        return {"loss_contrast": loss}

    def backbone(self) -> nn.Module:
        """Return the query encoder without its head: MoCo transfers f_q."""
        return without_head(self.encoder_q)

    def _contrast(self, x_q: torch.Tensor, x_k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of queries x_q against keys x_k, and all processes' keys (R * N, C) in batch order."""
        q = unit_features(self.encoder_q, x_q)  # (N, C)
        all_keys = self._shuffled_keys(x_k)  # (R * N, C)
        k = own_part(all_keys)  # (N, C)
        if self.recording:
            self._record(q, k)
        return info_nce(q, k, self.queue.features, self.temperature), all_keys

    @torch.no_grad()
    def _shuffled_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return all processes' keys (R * N, C) in batch order, encoded in shuffled order (section 3.3)."""
        encode = functools.partial(unit_features, self.encoder_k)
        return encode_shuffled(encode, x) if self.shuffle else all_gather(encode(x))

    @torch.no_grad()
    def _record(self, q: torch.Tensor, k: torch.Tensor) -> None:
        negatives = self.queue.features
        ranks = contrast_rank(q, k, negatives)  # (N,)
        self.recorded = {
            "contrast_acc1": (ranks < 1).float().mean(),
            "contrast_acc5": (ranks < 5).float().mean(),
            "positive_similarity": (q * k).sum(dim=1).mean(),
            "negative_similarity": (q.mean(dim=0) * negatives.mean(dim=0, dtype=q.dtype)).sum(),  # mean over all pairs
            "feature_std": q.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the accuracy against the queue, the similarities, and the spread of the features."""
        k, c = self.queue.features.shape
        chance = math.log(1 + k) * (2 if self.symmetric else 1)
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", chance, "chance, log(1 + K)"),
            Diagnostic("contrast_acc1", "contrast accuracy", "acc@1"),
            Diagnostic("contrast_acc5", "contrast accuracy", "acc@5"),
            Diagnostic("positive_similarity", "cosine similarity", "-positive key"),
            Diagnostic("negative_similarity", "cosine similarity", "-queue"),
            feature_spread(c),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about a queue longer than an epoch, a run too short for the key encoder, and BN groups of one image."""
        keys = images * (2 if self.symmetric else 1)
        found = advice_on_keys(len(self.queue.features), keys, images, batch, steps, self.momentum)
        return found + super().advice(images, batch, steps)

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints as well (see :func:`from_official`)."""
        return from_official(state)


def advice_on_keys(size: int, keys: int, images: int, batch: int, steps: int, momentum: float) -> list[str]:
    """Warn about a queue of ``size`` keys longer than an epoch's, and a run too short for the key encoder."""
    found = []
    if size > keys:
        fits = 1 << max(0, (keys // 4).bit_length() - 1)  # the largest power of two up to a quarter
        smaller = f" and SOLVER.IMS_PER_BATCH {fits} or less" if batch > fits else ""
        remedy = f"set SSL.ARGS.queue_size {fits}{smaller}" if fits >= 16 else "these are too few images"
        found.append(
            f"the queue (SSL.ARGS.queue_size {size}) holds the keys of {size / keys:,.1f} epochs of your {images} "
            "images, so the negatives of an image include its own earlier keys. The queue should hold at most a "
            f"quarter of an epoch: {remedy}"
        )
    left = momentum**steps
    if left > 0.5:
        enough = math.ceil(math.log(0.01) / math.log(momentum)) if momentum < 1 else 0
        longer = f"train for {enough} steps or more (SOLVER.EPOCHS, a smaller SOLVER.IMS_PER_BATCH), or "
        found.append(
            f"after all {steps} steps, {left:.0%} of the key encoder is still its initial weights: "
            f"{longer if enough else ''}lower SSL.ARGS.momentum, which is {momentum:g}"
        )
    return found


def check_args(
    dim: int, queue_size: int, momentum: float, temperature: float, bn_groups: int, queue_dtype: str
) -> None:
    """Raise ValueError if arguments of the constructor are out of range."""
    rules = [
        (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
        (queue_size >= 1, f"queue_size is {queue_size}; it must be at least 1 (the paper's is 65536)"),
        (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the paper's is 0.999)"),
        (temperature > 0, f"temperature is {temperature}; it must be positive (v1: 0.07, v2: 0.2)"),
        (bn_groups >= 0, f"bn_groups is {bn_groups}; it must be positive, or 0 for the paper's 8 in total"),
        (
            queue_dtype in QUEUE_DTYPES,
            f"queue_dtype is {queue_dtype!r}; it must be one of {', '.join(QUEUE_DTYPES)}",
        ),
    ]
    check_ranges(rules)


def from_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate the full ``state_dict`` of an official MoCo v1/v2 checkpoint to this class's names.

    The encoders keep their names without ``module.``; ``queue`` (C, K) becomes ``queue.features`` (K, C), and
    ``queue_ptr`` becomes ``queue.pointer``. Some published files lack the pointer: it is then 0, with a warning. A
    state dict that already has this class's names is returned unchanged.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "queue" in state:
        state["queue.features"] = state.pop("queue").T.contiguous()
        if "queue_ptr" not in state:
            logger.warning("the checkpoint has a queue but no queue_ptr: its first entries are taken as the oldest")
        state["queue.pointer"] = state.pop("queue_ptr", torch.zeros(1, dtype=torch.long))
    return state


def to_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate this class's ``state_dict`` to the authors' layout, which their scripts read."""
    renamed = {f"module.{key}": value for key, value in state.items() if not key.startswith("queue.")}
    renamed["module.queue"] = state["queue.features"].T.contiguous()
    renamed["module.queue_ptr"] = state["queue.pointer"]
    return renamed

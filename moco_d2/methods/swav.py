"""SwAV (Caron et al., arXiv 2006.09882): each view predicts the cluster that another view of its image is assigned to.

Letters: N images per process, R processes, B of all processes, V views, C feature dimension, K prototypes, L features
in a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import nn

from moco_d2.layers.distributed import all_gather, own_part, world_size
from moco_d2.layers.encode import embed
from moco_d2.layers.heads import cut_head, mlp, without_head
from moco_d2.layers.losses import cross_view_entropy
from moco_d2.layers.prototypes import Prototypes, sinkhorn
from moco_d2.layers.queue import FeatureQueue
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, register

LARGE = 2  # The first views are assigned to prototypes; all views predict the assignments.


@register
class SwAV(SSLMethod):
    """Swapped assignments: codes of the large views, balanced by Sinkhorn, are what all other views predict.

    The defaults are those of the paper's large batch. Small batches need the queue.
    """

    memories = ("queues.",)
    prototypes: Prototypes

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 128,
        hidden: int = 2048,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue_size: int = 0,
        queue_start: float = 15.0,
        freeze: float = 1.0,
    ) -> None:
        """Build encoder, head, prototypes and queues.

        Args:
            encoder: see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            hidden: size of the head's hidden layer.
            prototypes: K.
            temperature: tau > 0 of the predictions (Eq. 2).
            epsilon: > 0, smoothness of the codes (Eq. 3).
            iterations: of Sinkhorn; fewer than 3 do not converge.
            queue_size: L, number of past features per large view, in all processes, that help to balance the codes of a
                batch smaller than K; 0: none. A multiple of the number of processes.
            queue_start: epoch from which features are stored. The queue is used once it is full.
            freeze: number of epochs during which the prototypes do not learn.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        counts = {"dim": dim, "hidden": hidden, "prototypes": prototypes, "iterations": iterations}
        scales = {"temperature": temperature, "epsilon": epsilon}
        lengths = {"queue_size": queue_size, "queue_start": queue_start, "freeze": freeze}
        check_ranges([(v >= 1, f"{k} is {v}; it must be at least 1") for k, v in counts.items()])
        check_ranges([(v > 0, f"{k} is {v}; it must be positive") for k, v in scales.items()])
        check_ranges([(v >= 0, f"{k} is {v}; it must be 0 or more") for k, v in lengths.items()])
        self.temperature, self.epsilon, self.iterations = temperature, epsilon, iterations
        self.queue_start, self.freeze, self.epoch = queue_start, freeze, 0.0
        self.encoder = encoder(num_classes=dim)
        self.projection_head = mlp((cut_head(self.encoder), hidden, dim))
        self.prototypes = Prototypes(dim, prototypes)
        self.queue_size = queue_size
        self.queues = nn.ModuleList(FeatureQueue(queue_size, dim) for _ in range(LARGE if queue_size else 0))
        for buffer in self.queues.buffers():
            buffer.zero_()  # marks rows that were never written

    def before_step(self, progress: float, epoch: float) -> None:
        """Remember the time, which decides about the prototypes and the queues."""
        self.epoch = epoch

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of V views, each (N, 3, H_v, W_v): Algorithm 1 with multi-crop (section 3.2)."""
        if self.training:
            self.prototypes.normalise_()
        features = embed(self.encoder, self.projection_head, views.images)  # (V * N, C)
        with torch.autocast(features.device.type, enabled=False):
            features = features.unflatten(0, (len(views.images), -1))  # (V, N, C)
            scores = self.prototypes(features)  # (V, N, K)
            large = list(scores.detach()[:LARGE])
            codes = torch.stack([self._codes(number, own) for number, own in enumerate(large)])  # (2, N, K)
        loss = cross_view_entropy(codes, scores, self.temperature)
        if self.training and self._queueing:  # After the codes: a step's own features are never in its queue.
            for queue, own in zip(self.queues, features.detach(), strict=False):
                cast(FeatureQueue, queue).enqueue(all_gather(own))
        if self.recording:
            self._record(features[0], scores[0])
        return {"loss_swapped": loss}

    @property
    def _queueing(self) -> bool:
        return self.epoch >= self.queue_start and self.queue_size > 0

    @torch.no_grad()
    def _codes(self, number: int, scores: torch.Tensor) -> torch.Tensor:
        """Return the codes (N, K) of a large view's scores (N, K)."""
        if not self._queueing:
            return sinkhorn(scores, self.epsilon, self.iterations)
        # (L, C), equal in all processes: each contributes its part.
        queue = cast(FeatureQueue, self.queues[number]).features
        past = self.prototypes(own_part(queue))  # (L / R, K)
        # The last row is filled last. Until then the queue has no weight. This is decided on the device, which nothing
        # waits for.
        full = (queue[-1] != 0).any()
        both = torch.cat([past, scores])
        return sinkhorn(both, self.epsilon, self.iterations, past=len(past), weight=full.to(both.dtype))

    def after_backward(self) -> None:
        """Freeze the prototypes at the beginning: without a gradient there is no momentum and no decay either."""
        if self.epoch < self.freeze:
            self.prototypes.weight.grad = None

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)

    @torch.no_grad()
    def _record(self, features: torch.Tensor, scores: torch.Tensor) -> None:
        mean = (scores / self.temperature).softmax(dim=1).mean(dim=0)  # (K,)
        self.recorded = {
            "feature_std": features.std(dim=0).mean(),
            "prototypes_used": torch.special.entr(mean).sum().exp(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the spread of the features, and how many prototypes a batch is predicted to use."""
        k, c = self.prototypes.weight.shape
        even = 1 / math.sqrt(c)  # the std of features spread evenly over the sphere; it is 0 if all are one point
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", math.log(k), "equal scores, log K"),
            Diagnostic("feature_std", "feature std", "std", ".4f", even, "spread evenly, 1/sqrt(C)", even / 10),
            Diagnostic("prototypes_used", "prototypes in use", "used", ".0f", k, "all, K", min(2.0, k / 2)),
        )

    def check_batch(self, size: int) -> None:
        """Raise ValueError if the queue cannot be divided among the processes."""
        if self.queue_size % world_size():
            raise ValueError(
                f"SSL.ARGS.queue_size is {self.queue_size}; it must be a multiple of the number of processes, "
                f"{world_size()}"
            )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about fewer features than prototypes, which then cannot all be used."""
        k = len(self.prototypes.weight)
        seen = batch + self.queue_size
        if seen >= k:
            return []
        return [
            f"a step balances {seen} features (batch and SSL.ARGS.queue_size) over {k} prototypes, so most prototypes "
            f"get less than one: lower SSL.ARGS.prototypes, or set SSL.ARGS.queue_size to {k - batch} or more"
        ]

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' checkpoints as well (see :func:`from_official`)."""
        return from_official(state)


def from_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate an official state dict of SwAV or DeepCluster v2 to these classes' names.

    The head and the prototypes keep their names without ``module.``; the ResNet, whose names are torchvision's, becomes
    ``encoder.``. A state dict that already has these names is returned unchanged.
    """
    state = {key.removeprefix("module."): value for key, value in state.items()}
    if "conv1.weight" not in state:
        return state
    own = ("projection_head.", "prototypes.")
    return {key if key.startswith(own) else f"encoder.{key}": value for key, value in state.items()}

"""DeepCluster v2 (Caron et al., arXiv 2006.09882, appendix), and v1's head (arXiv 1807.05520) as a switch.

Letters: N images per process, R processes, n images of the data set, V views, C feature dimension, K clusters, H
clusterings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import (
    all_gather,
    gather_rows,
    share,
    shared_normal_,
    shared_permutation,
    to_device,
    total,
    world_size,
)
from moco_d2.layers.encode import embed
from moco_d2.layers.heads import cut_head, mlp, without_head
from moco_d2.layers.kmeans import spherical_kmeans
from moco_d2.layers.memory_bank import MemoryBank
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, register
from moco_d2.methods.swav import LARGE, from_official

UNLABELLED = -100  # cross_entropy leaves this label out


class Memory(nn.Module):
    """The latest features of every image, and the clusters of the previous epoch's; equal in all processes.

    Attributes:
        banks: for each large view a bank (n, C).
        seen: (n,), whether an image was shown since the last clustering.
        labels: (H, n), the cluster of each image, or ``UNLABELLED``.
    """

    seen: torch.Tensor
    labels: torch.Tensor

    def __init__(self, images: int, dim: int, clusterings: int) -> None:
        super().__init__()
        self.banks = nn.ModuleList(MemoryBank(images, dim, momentum=0.0) for _ in range(LARGE))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.uint8))
        self.register_buffer("labels", torch.full((clusterings, images), UNLABELLED))

    def write(self, features: torch.Tensor, index: torch.Tensor) -> None:
        """Store features (2, N, C) of the large views of images (N,), from all processes."""
        for bank, own in zip(self.banks, features.detach(), strict=True):
            cast(MemoryBank, bank).update(own, index)
        self.seen.index_fill_(0, all_gather(index), 1)


@register
class DeepClusterV2(SSLMethod):
    """Clusters of the previous epoch's features are the labels of this epoch's views.

    Every epoch, H spherical k-means cluster the features that training has seen; the centroids classify. With
    ``reset_head`` a Linear layer classifies, learns, and starts anew with the clusters each epoch, as in v1.
    """

    memories = ("memory.",)

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        images: int,
        dim: int = 128,
        hidden: int = 2048,
        clusters: int = 3000,
        clusterings: int = 3,
        temperature: float = 0.1,
        iterations: int = 10,
        reset_head: bool = False,
    ) -> None:
        """Build encoder, head, centroids and memory.

        Args:
            encoder: see :class:`~moco_d2.layers.encoders.Encoder`.
            images: n.
            dim: C, size of a feature.
            hidden: size of the head's hidden layer.
            clusters: K of each clustering. An epoch of fewer images has as many clusters as images.
            clusterings: H; they take the features of the two large views in turn.
            temperature: tau > 0 of the predictions.
            iterations: of k-means.
            reset_head: classify by a learnt Linear layer, as DeepCluster v1 does, instead of the centroids.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        counts = {"dim": dim, "hidden": hidden, "clusters": clusters, "clusterings": clusterings}
        check_ranges([(v >= 1, f"{k} is {v}; it must be at least 1") for k, v in counts.items()])
        check_ranges([(temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.1)")])
        check_ranges([(iterations >= 0, f"iterations is {iterations}; it must be 0 or more (the paper's is 10)")])
        self.dim, self.temperature, self.iterations, self.clusters = dim, temperature, iterations, clusters
        self.encoder = encoder(num_classes=dim)
        self.projection_head = mlp((cut_head(self.encoder), hidden, dim))
        self.heads = nn.ModuleList(nn.Linear(dim, clusters, bias=reset_head) for _ in range(clusterings))
        # The centroids are no trainable parameters: k-means alone sets them.
        self.heads.requires_grad_(reset_head)
        self.reset_head = reset_head
        self.memory = Memory(images, dim, clusterings)

    def before_epoch(self, epoch: int, replay: Callable[[], Iterator[Views]]) -> None:
        """Cluster the features of the last epoch; before the first one, those of a pass over its views."""
        if epoch == 0:
            with torch.no_grad():
                for views in replay():
                    large = [embed(self.encoder, self.projection_head, [view]) for view in views.images[:LARGE]]
                    self.memory.write(torch.stack(large), views.index)
        self._cluster()

    @torch.no_grad()
    def _cluster(self) -> None:
        """Set the labels of the images that were seen, and the heads."""
        memory = self.memory
        rows = memory.seen.nonzero()[:, 0]  # (M,), the same in all processes
        memory.labels.fill_(UNLABELLED)
        for number, head in enumerate(self.heads):
            bank, linear = cast(MemoryBank, memory.banks[number % LARGE]), cast(nn.Linear, head)
            first = bank.rows(rows[to_device(shared_permutation(len(rows))[: self.clusters], rows.device)])
            # Each process clusters its share of the rows; the sums run over all.
            centroids, labels = spherical_kmeans(bank.rows(share(rows)), first, self.iterations)
            memory.labels[number, rows] = gather_rows(labels)
            if self.reset_head:
                shared_normal_(linear.weight, std=0.01)
                nn.init.zeros_(linear.bias)
            else:
                linear.weight[: len(centroids)] = centroids  # fewer than K if fewer images were seen
        memory.seen.zero_()

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of V views: the mean over the clusterings of the views' cross-entropy with the labels."""
        features = embed(self.encoder, self.projection_head, views.images)  # (V * N, C)
        labels = self.memory.labels[:, views.index]  # (H, N)
        # Some images have no label, and their number differs between processes. The divisor is that of all processes,
        # times 1 / R because the gradients are averaged.
        labelled = total((labels != UNLABELLED).sum(dim=1)).clamp(min=1)  # (H,)
        losses = []
        with torch.autocast(features.device.type, enabled=False):
            for head, own, count in zip(self.heads, labels, labelled, strict=True):
                scores = head(features) / self.temperature  # (V * N, K)
                every = own.repeat(len(views.images))  # (V * N,)
                entropy = F.cross_entropy(scores, every, ignore_index=UNLABELLED, reduction="sum")
                losses.append(entropy * world_size() / (count * len(views.images)))
        large = features.detach().unflatten(0, (len(views.images), -1))[:LARGE]  # (2, N, C)
        if self.training:
            self.memory.write(large, views.index)
        if self.recording:
            self._record(large[0], scores.detach(), every)
        return {"loss_cluster": torch.stack(losses).mean()}

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)

    @torch.no_grad()
    def _record(self, features: torch.Tensor, scores: torch.Tensor, labels: torch.Tensor) -> None:
        right = (scores.argmax(dim=1) == labels).sum()
        self.recorded = {
            "feature_std": features.std(dim=0).mean(),
            "cluster_accuracy": right / (labels != UNLABELLED).sum().clamp(min=1),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the spread of the features, and how often a view's cluster is predicted."""
        even = 1 / math.sqrt(self.dim)
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", math.log(self.clusters), "equal scores, log K"),
            Diagnostic("feature_std", "feature std", "std", ".4f", even, "spread evenly, 1/sqrt(C)", even / 10),
            Diagnostic("cluster_accuracy", "cluster accuracy", "acc", ".3f", 1 / self.clusters, "chance, 1/K"),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about clusters of few images."""
        if images >= 10 * self.clusters:
            return []
        return [
            f"{self.clusters} clusters of {images} images hold {images / self.clusters:.1f} each: lower "
            f"SSL.ARGS.clusters to {max(2, images // 100)} or so"
        ]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' checkpoints as well: ``prototypes.prototypes0`` becomes ``heads.0``."""
        return {key.replace("prototypes.prototypes", "heads."): value for key, value in from_official(state).items()}

"""DenseCL (Wang et al., CVPR 2021, arXiv 2011.09157): MoCo v2 with a second contrast, of the cells of feature maps.

Letters: N images per process, R processes, D features of the encoder, C feature dimension, S cells of the last feature
map, K keys in a queue.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import all_gather, exchange, own_part, to_device
from moco_d2.layers.ema import ema_update_
from moco_d2.layers.encode import check_feature_map, feature_map
from moco_d2.layers.heads import head_name, mlp_head, replace_head, without_head
from moco_d2.layers.losses import contrast_rank, info_nce
from moco_d2.layers.queue import FeatureQueue
from moco_d2.layers.shuffle import BNGroups, shuffle
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, ShuffledMethod, check_ranges, feature_spread, register
from moco_d2.methods.moco import QUEUE_DTYPES, advice_on_keys, check_args

# Patterns of the published code's names, and ours.
_OFFICIAL = (
    (r"^(encoder_[qk])\.0\.", r"\1.network."),
    (r"^(encoder_[qk])\.1\.mlp\.", r"\1.network.fc."),
    (r"^(encoder_[qk])\.1\.mlp2\.", r"\1.dense."),
    (r"^queue$", "queue.features"),
    (r"^queue2$", "dense_queue.features"),
    (r"^queue_ptr$", "queue.pointer"),
    (r"^queue2_ptr$", "dense_queue.pointer"),
)


class DenseEncoder(nn.Module):
    """An encoder with two heads: MoCo v2's on the pooled feature map, and one of 1x1 convolutions on the map."""

    def __init__(self, network: nn.Module, dim: int) -> None:
        super().__init__()
        check_feature_map(network)
        self.network = network
        self.dense: nn.Sequential

        def heads(fc: nn.Linear) -> nn.Module:
            wide = fc.in_features
            self.dense = nn.Sequential(nn.Conv2d(wide, wide, 1), nn.ReLU(), nn.Conv2d(wide, dim, 1))
            return mlp_head(fc)

        replace_head(network, heads)
        for layer in self.head:
            if isinstance(layer, nn.Linear):  # as published; the convolutions have PyTorch's initialisation
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)

    @property
    def head(self) -> nn.Sequential:
        """The head on the pooled map."""
        found: nn.Sequential = getattr(self.network, head_name(self.network))
        return found

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the map (N, D, S), the global feature (N, C) and the dense features (N, C, S), not normalised."""
        features = feature_map(self.network, x)
        return features.flatten(2), self.head(features.mean((2, 3))), self.dense(features).flatten(2)


@register
class DenseCL(ShuffledMethod):
    """MoCo v2 on pooled features, and the same on cells: each cell finds its like in the other view by the backbone."""

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 128,
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        dense_weight: float = 0.5,
        shuffle: bool = True,
        bn_groups: int = 0,
        queue_dtype: str = "float32",
    ) -> None:
        """Build both encoders and both queues.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            dim: C, size of a feature.
            queue_size: K, number of negatives in each of the two queues.
            momentum: m in [0, 1], decay of the key encoder.
            temperature: tau > 0 of both contrasts.
            dense_weight: lambda in [0, 1] (Eq. 3), the share of the dense contrast; 0 is MoCo v2.
            shuffle: shuffling BN, as in MoCo.
            bn_groups: number of groups per process that have batch statistics of their own; 0 for 8 in total. See MoCo.
            queue_dtype: dtype of the queues. ``bfloat16`` and ``float16`` halve their memory and round the keys.

        Raises:
            ValueError: a value is out of range, the encoder's head is not a Linear, or there are BN groups for an
                encoder without plain batch norm.
        """
        super().__init__()
        check_args(dim, queue_size, momentum, temperature, bn_groups, queue_dtype)
        check_ranges([
            (0 <= dense_weight <= 1, f"dense_weight is {dense_weight}; it must be in [0, 1] (the paper's is 0.5)"),
        ])  # fmt: skip
        self.momentum, self.temperature, self.dense_weight = momentum, temperature, dense_weight
        self.shuffle = shuffle
        self.encoder_q = DenseEncoder(encoder(num_classes=dim), dim)
        self.groups = BNGroups(self.encoder_q, bn_groups, shuffle)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue = FeatureQueue(queue_size, dim, QUEUE_DTYPES[queue_dtype])
        self.dense_queue = FeatureQueue(queue_size, dim, QUEUE_DTYPES[queue_dtype])

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute both losses of two views (N, 3, H, W) of each image."""
        x_q, x_k = views.images
        if self.training:
            self.check_batch(len(x_q))
            ema_update_(self.encoder_k, self.encoder_q, self.momentum)
        cells_q, q, dense_q, _ = _unit(self.encoder_q(x_q))
        cells_k, dense_k, all_keys, all_dense_keys = self._keys(x_k)
        k = own_part(all_keys)  # (N, C)
        positives = matched(cells_q.detach(), cells_k, dense_k)  # (N, C, S)
        rows_q, rows_k = dense_q.mT.flatten(0, 1), positives.mT.flatten(0, 1)  # (N * S, C)
        if self.recording:
            self._record(q, k, rows_q, rows_k)
        contrast = info_nce(q, k, self.queue.features, self.temperature)
        dense = info_nce(rows_q, rows_k, self.dense_queue.features, self.temperature)
        if self.training:  # After the losses: a step's own keys are never its negatives.
            self.queue.enqueue(all_keys)
            self.dense_queue.enqueue(all_dense_keys)
        return {"loss_contrast": (1 - self.dense_weight) * contrast, "loss_dense": self.dense_weight * dense}

    @torch.no_grad()
    def _keys(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return this process's cells and dense keys of x, and all processes' keys and pooled dense keys (R * N, C)."""
        x, back = shuffle(x) if self.shuffle else (x, None)
        cells, k, dense, pooled = _unit(self.encoder_k(x))
        keys, dense_keys = all_gather(k), all_gather(pooled)
        if back is None:
            return cells, dense, keys, dense_keys
        order = to_device(back, x.device)
        return exchange(cells, back), exchange(dense, back), keys[order], dense_keys[order]

    def backbone(self) -> nn.Module:
        """Return the query encoder without its heads."""
        return without_head(self.encoder_q.network)

    @torch.no_grad()
    def _record(self, q: torch.Tensor, k: torch.Tensor, rows_q: torch.Tensor, rows_k: torch.Tensor) -> None:
        self.recorded = {
            "contrast_acc1": (contrast_rank(q, k, self.queue.features) < 1).float().mean(),
            "positive_similarity": (q * k).sum(dim=1).mean(),
            "dense_similarity": (rows_q * rows_k).sum(dim=1).mean(),
            "feature_std": q.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the accuracy against the queue, both similarities, and the spread of the features."""
        k, c = self.queue.features.shape
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", math.log(1 + k), "chance, log(1 + K)"),
            Diagnostic("contrast_acc1", "contrast accuracy", "acc@1"),
            Diagnostic("positive_similarity", "cosine similarity", "-positive key"),
            Diagnostic("dense_similarity", "cosine similarity", "-matched cell"),
            feature_spread(c),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about queues longer than an epoch, a run too short for the key encoder, and BN groups of one image."""
        found = advice_on_keys(len(self.queue.features), images, images, batch, steps, self.momentum)
        return found + super().advice(images, batch, steps)

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the published code's training checkpoints as well; ours pass unchanged."""
        renamed = {}
        for key, value in state.items():
            name = key.removeprefix("module.")
            if name.startswith("backbone."):
                continue  # the query encoder's network once more
            for theirs, ours in _OFFICIAL:
                name = re.sub(theirs, ours, name)
            is_queue = key != name and name.endswith("queue.features")  # (C, K) there, (K, C) here
            renamed[name] = value.T.contiguous() if is_queue else value
        return renamed


def _unit(encoded: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> list[torch.Tensor]:
    """Return cells, global and dense features, and the mean dense feature (N, C), normalised in float32 or wider."""
    cells, features, dense = (part.to(torch.promote_types(part.dtype, torch.float32)) for part in encoded)
    # The mean is of features that are not normalised yet.
    return [F.normalize(part, dim=1) for part in (cells, features, dense, dense.mean(dim=2))]


@torch.no_grad()
def matched(cells_q: torch.Tensor, cells_k: torch.Tensor, dense_k: torch.Tensor) -> torch.Tensor:
    """Return, for each cell of a query's map, the dense key of the cell of the key's map that is most similar (Eq. 4).

    Args:
        cells_q: (N, D, S) of the query's backbone, L2-normalised.
        cells_k: (N, D, S) of the key's backbone, L2-normalised.
        dense_k: (N, C, S).

    Returns:
        (N, C, S).
    """
    nearest = (cells_q.mT @ cells_k).argmax(dim=2)  # (N, S)
    return dense_k.gather(2, nearest[:, None].expand(-1, dense_k.shape[1], -1))

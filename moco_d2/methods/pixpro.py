"""PixPro, pixel-level consistency (Xie et al., CVPR 2021, arXiv 2011.10043).

Letters: N images per process, C feature dimension, (h, w) feature map of a view, S = h w its pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.ema import cosine_momentum, ema_update_
from moco_d2.layers.encode import check_feature_map, feature_map
from moco_d2.layers.heads import head_name, replace_head, without_head
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register


class PixelEncoder(nn.Module):
    """An encoder whose head projects each pixel of the last feature map: (N, 3, H, W) -> (N, C, h, w)."""

    def __init__(self, network: nn.Module, hidden: int, dim: int) -> None:
        super().__init__()
        check_feature_map(network)
        self.network = network

        def projector(fc: nn.Linear) -> nn.Module:
            wide = nn.Conv2d(fc.in_features, hidden, 1)
            return nn.Sequential(wide, nn.BatchNorm2d(hidden), nn.ReLU(), nn.Conv2d(hidden, dim, 1))

        replace_head(network, projector)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the projected map, not normalised."""
        projected: torch.Tensor = getattr(self.network, head_name(self.network))(feature_map(self.network, x))
        return projected


@register
class PixPro(SSLMethod):
    """Pixels of two views that show the same place agree: one smoothed by its like, the other by a moving average.

    The published instance branch (PixPro*) is not offered.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        dim: int = 256,
        hidden: int = 4096,
        momentum: float = 0.99,
        distance: float = 0.7,
        power: float = 2.0,
    ) -> None:
        """Build the online network, its moving average, and the transform of the propagation.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`. Its output
                is replaced by a projection of its last feature map.
            dim: C, size of a pixel's feature.
            hidden: size of the projector's hidden layer.
            momentum: m in [0, 1], decay of the target network at the start; it rises to 1 along a cosine.
            distance: T > 0 (Eq. 1): two pixels are a positive pair if they are closer than T times the diagonal of a
                pixel (the larger view's).
            power: gamma > 0 (Eq. 3), sharpness of the similarity by which a pixel takes from the others.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 256)"),
            (hidden >= 1, f"hidden is {hidden}; it must be at least 1 (the paper's is 4096)"),
            (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the paper's is 0.99)"),
            (distance > 0, f"distance is {distance}; it must be positive (the paper's is 0.7)"),
            (power > 0, f"power is {power}; it must be positive (the paper's is 2)"),
        ])  # fmt: skip
        self.start_momentum = self.momentum = momentum
        self.distance, self.power = distance, power
        self.online = PixelEncoder(encoder(num_classes=dim), hidden, dim)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.value_transform = nn.Conv2d(dim, dim, 1)

    def before_step(self, progress: float, epoch: float) -> None:
        """Set the target network's momentum for this step."""
        self.momentum = cosine_momentum(self.start_momentum, progress)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the consistency of two views (N, 3, H, W) of each image, in both directions (Eq. 4)."""
        x1, x2 = views.images
        maps = self.online(x1), self.online(x2)  # (N, C, h, w); one pass a view: batch norm sees the views apart
        y1, y2 = map(self._propagated, maps)  # (N, S, C)
        if self.training:
            ema_update_(self.target, self.online, self.momentum)
        with torch.no_grad():
            z1, z2 = _pixels(self.target(x1)), _pixels(self.target(x2))  # (N, S, C)
            positive = positive_pairs(views.boxes[0], views.boxes[1], maps[0].shape[2:], self.distance)  # (N, S, S)
        if self.recording:
            self._record(y1, z1, z2, positive)
        return {"loss_pixel": consistency(y1, z2, positive) + consistency(y2, z1, positive.mT)}

    def _propagated(self, features: torch.Tensor) -> torch.Tensor:
        """Return a map's pixels (N, S, C) after the pixel propagation module, normalised."""
        values = _pixels(self.value_transform(features))
        return F.normalize(propagate(_pixels(features), values, self.power), dim=2)

    def backbone(self) -> nn.Module:
        """Return the online encoder without its projector: PixPro transfers it."""
        return without_head(self.online.network)

    @torch.no_grad()
    def _record(self, y1: torch.Tensor, z1: torch.Tensor, z2: torch.Tensor, positive: torch.Tensor) -> None:
        pairs = positive.sum()
        self.recorded = {
            "positive_similarity": (y1 @ z2.mT * positive).sum() / pairs.clamp(min=1),
            "positive_pairs": pairs / positive.shape[:2].numel(),
            "feature_std": z1.flatten(0, 1).std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the pairs' similarity and number, and the spread of the pixels' features."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", -4.0, "all pairs agree, all images overlap"),
            Diagnostic("positive_similarity", "cosine similarity", "sim"),
            Diagnostic("positive_pairs", "positive pairs of a pixel", "-pairs", ".2f"),
            feature_spread(self.value_transform.out_channels),
        )

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the published code's training checkpoints as well; ours pass unchanged."""
        renamed = {}
        for key, value in state.items():
            name = key.removeprefix("module.")
            part, _, rest = name.partition(".")
            ours = {"encoder": "online.network", "encoder_k": "target.network"}
            if part in ours:
                name = f"{ours[part]}.{rest}"
            elif part in ("projector", "projector_k"):
                layer, _, kind = rest.partition(".")
                place = {"linear1": 0, "bn1": 1, "linear2": 3}.get(layer, layer)
                name = f"{'online' if part == 'projector' else 'target'}.network.fc.{place}.{kind}"
            renamed[name] = value
        return renamed


def _pixels(features: torch.Tensor) -> torch.Tensor:
    """Return the pixels (N, S, C) of a map (N, C, h, w), normalised, in float32 or wider."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return F.normalize(wide.flatten(2).mT, dim=2)


def propagate(pixels: torch.Tensor, values: torch.Tensor, power: float) -> torch.Tensor:
    """Pixel propagation (Eq. 3): y_i = sum_j max(x_i . x_j, 0)^power values_j, over all pixels of a view, i included.

    Args:
        pixels: (N, S, C), L2-normalised.
        values: (N, S, C), L2-normalised.
        power: gamma, > 0.

    Returns:
        (N, S, C), not normalised.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        return (pixels @ pixels.mT).clamp(min=0).pow(power) @ values


def positive_pairs(first: torch.Tensor, second: torch.Tensor, shape: Sequence[int], distance: float) -> torch.Tensor:
    """Return which pixels of two views show the same place (Eq. 1): (N, S, S), true if their centres are close.

    Close means below ``distance`` times the diagonal of a pixel in the view whose pixels are larger. All lengths are
    parts of the image's width and height.

    Args:
        first: (N, 4) box of one view: x0, y0, x1, y1 as parts of the image; x0 > x1 if it is mirrored.
        second: (N, 4) box of the other.
        shape: (h, w) of the views' feature maps.
        distance: T, > 0. With T < 1 / sqrt(2), equal square boxes have no other pairs than each pixel with itself.
    """
    rows, columns = (torch.arange(size, device=first.device) for size in shape)
    steps = torch.stack(torch.broadcast_tensors(columns, rows[:, None]), dim=2).flatten(0, 1)  # (S, 2): x, y
    centres, diagonals = [], []
    for box in (first, second):
        extent = box[:, 2:] - box[:, :2]  # negative in x if mirrored
        pixel = torch.stack([extent[:, 0] / shape[1], extent[:, 1] / shape[0]], dim=1)  # (N, 2)
        centres.append(box[:, None, :2] + (steps + 0.5) * pixel[:, None])  # (N, S, 2)
        diagonals.append(pixel.norm(dim=1))  # (N,)
    largest = torch.maximum(*diagonals)
    apart = torch.cdist(centres[0], centres[1], compute_mode="donot_use_mm_for_euclid_dist")  # (N, S, S)
    return apart < distance * largest[:, None, None]


def consistency(pixels: torch.Tensor, targets: torch.Tensor, positive: torch.Tensor) -> torch.Tensor:
    """Return -2 times the mean cosine of an image's positive pairs, mean over images; 0 for images without pairs.

    Args:
        pixels: (N, S, C), L2-normalised.
        targets: (N, S, C), L2-normalised.
        positive: (N, S, S), true for positive pairs.
    """
    with torch.autocast(pixels.device.type, enabled=False):
        chosen = positive.to(pixels.dtype)
        similarity = (pixels @ targets.mT * chosen).sum((1, 2)) / (chosen.sum((1, 2)) + 1e-6)
        return -2 * similarity.mean()

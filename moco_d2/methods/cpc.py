"""CPC, contrastive predictive coding (van den Oord et al., arXiv 1807.03748), with v2's additions (arXiv 1905.09272).

Letters: N images per process, R processes, (h, w) grid of an image's patches, D features of the encoder, P = R N h w
patches of all processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import gather, own_part, rank, shared_draw, world_size
from moco_d2.layers.heads import head_name, replace_head, without_head
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register

BLOCKS = 5  # residual blocks of the context network


def context_network(features: int, hidden: int) -> nn.Sequential:
    """Build the context network, (N, D, h, w) -> the same: a place sees its own row and those above, in full width."""

    def block() -> nn.Module:
        layers = [
            nn.Conv2d(features, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1)),
            nn.ZeroPad2d((0, 0, 1, 0)),  # a row on top: the next convolution sees a row and the one above
            nn.Conv2d(hidden, hidden, (2, 1)), nn.ReLU(), nn.Conv2d(hidden, features, 1),
        ]  # fmt: skip
        return _Residual(*layers)

    return nn.Sequential(*(block() for _ in range(BLOCKS)), nn.ReLU())


class _Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = super().forward(x)
        return x + changed


@register
class CPC(SSLMethod):
    """The patches above predict the features of patches further down, among those of other places and images.

    The defaults are v1's, as the code of Greedy InfoMax has them. v2 adds ``directions=4``, ``drop_colours=True``,
    ``negatives=0``, ``steps=1, skip=2``. The whole encoder is trained, not its first three stages alone.
    """

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        patch: int = 64,
        stride: int = 32,
        hidden: int = 256,
        steps: int = 5,
        skip: int = 1,
        negatives: int = 16,
        directions: int = 1,
        drop_colours: bool = False,
    ) -> None:
        """Build the encoder, and for each direction a context network and a prediction for each step.

        Args:
            encoder: called as ``encoder(num_classes=1)``, without batch norm; see
                :class:`~moco_d2.layers.encoders.Encoder`. Its output layer is left out.
            patch: side of a patch in pixels.
            stride: distance of patches in pixels; half a patch in v1.
            hidden: channels inside the context network.
            steps: number of rows that are predicted from each row.
            skip: number of rows below a row that are not predicted, because their patches overlap its own: step k
                predicts row u + k + skip from row u.
            negatives: number of other patches to tell the predicted one from, drawn with replacement among all images
                and rows that are predicted; 0: all patches of all images.
            directions: 1 (downwards), or 4 (v2: upwards and sideways too, by turning the grid).
            drop_colours: leave each patch only one of its three colour channels, drawn anew (v2).

        Raises:
            ValueError: a value is out of range, the encoder has batch norm, or its head is not a Linear.
        """
        super().__init__()
        check_ranges([
            (patch >= 1, f"patch is {patch}; it must be at least 1 pixel (v1's is 64)"),
            (stride >= 1, f"stride is {stride}; it must be at least 1 pixel (v1's is 32)"),
            (hidden >= 1, f"hidden is {hidden}; it must be at least 1 (the papers' is 256)"),
            (steps >= 1, f"steps is {steps}; it must be at least 1 (v1's is 5)"),
            (skip >= 0, f"skip is {skip}; it must be 0 or more (v1's is 1)"),
            (negatives >= 0, f"negatives is {negatives}; it must be positive, or 0 for all patches"),
            (directions in (1, 4), f"directions is {directions}; it must be 1 (downwards) or 4"),
        ])  # fmt: skip
        self.patch, self.stride, self.skip, self.negatives = patch, stride, skip, negatives
        self.steps, self.drop_colours = steps, drop_colours
        self.encoder = encoder(num_classes=1)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.encoder.modules()):
            raise ValueError(
                "CPC's encoder must have no batch norm, whose statistics link the patches of an image: set "
                "SSL.ENCODER.ARGS.norm to GN"
            )
        head = getattr(self.encoder, head_name(self.encoder), None)
        replace_head(self.encoder, lambda fc: nn.Identity())
        self.features = int(head.in_features)  # type: ignore[union-attr]
        self.context = nn.ModuleList(context_network(self.features, hidden) for _ in range(directions))
        predictions = range(directions * steps)  # W_k of each direction
        self.predict = nn.ModuleList(nn.Conv2d(self.features, self.features, 1, bias=False) for _ in predictions)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of the first view (N, 3, H, W), the mean over directions and steps."""
        z = self._grid(views.images[0])  # (N, D, h, w)
        total, right = z.new_zeros(()), z.new_zeros(())
        for turn, context in enumerate(self.context):
            turned = torch.rot90(z, turn, (2, 3))
            c = context(turned)
            for k in range(self.steps):
                predicted = self.predict[turn * self.steps + k](c)
                loss, accuracy = predictive_loss(predicted, turned, k + 1 + self.skip, self.negatives)
                total, right = total + loss / len(self.predict), right + accuracy / len(self.predict)
        if self.recording:
            spread = F.normalize(z.detach().movedim(1, 3).flatten(0, 2), dim=1).std(dim=0).mean()
            self.recorded = {"patch_acc1": right, "feature_std": spread}
        return {"loss_patches": total}

    def _grid(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features (N, D, h, w) of the patches of (N, 3, H, W), each encoded alone."""
        patches = x.unfold(2, self.patch, self.stride).unfold(3, self.patch, self.stride)  # (N, 3, h, w, p, p)
        n, _, h, w = patches.shape[:4]
        least = self.steps + self.skip + 1
        if min(h, w) < least:
            raise ValueError(
                f"images of {x.shape[2]} pixels have a grid of {h} x {w} patches (SSL.ARGS.patch {self.patch}, stride "
                f"{self.stride}), but SSL.ARGS.steps {self.steps} and skip {self.skip} need {least} rows: raise "
                "DATA.CROP_SIZE, or lower stride, steps or skip"
            )
        patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # (N * h * w, 3, p, p)
        if self.drop_colours and self.training:
            kept = own_part(shared_draw(3, (world_size() * len(patches),), x.device))
            patches = patches * F.one_hot(kept, 3)[:, :, None, None]
        z: torch.Tensor = self.encoder(patches)
        # Scores are dot products without normalisation or temperature, so they are computed in float32 or wider.
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        grid: torch.Tensor = z.unflatten(0, (n, h, w)).movedim(3, 1)
        return grid

    def backbone(self) -> nn.Module:
        """Return the encoder, to be applied to whole images."""
        return without_head(self.encoder)

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the share of patches that are told from the others, and the spread of the features."""
        chance = math.log(1 + self.negatives) if self.negatives else None
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", chance, "chance, log(1 + negatives)" if chance else ""),
            Diagnostic("patch_acc1", "contrast accuracy", "acc@1"),
            feature_spread(self.features),
        )


def predictive_loss(
    predicted: torch.Tensor, z: torch.Tensor, below: int, negatives: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the InfoNCE loss of predicted features among those of other patches, and its accuracy without gradient.

    With equal scores the loss is log(1 + negatives), or log(P) with all patches.

    Args:
        predicted: (N, D, h, w), W_k c: place (u, v) predicts the patch at (u + below, v).
        z: (N, D, h, w), features of the patches; they have a gradient too.
        below: number of rows, in 1 .. h - 1.
        negatives: number drawn for each place, with replacement, among the rows from ``below`` of all processes'
            images; 0: all patches of all processes.
    """
    n, _, h, w = z.shape
    with torch.autocast(z.device.type, enabled=False):
        queries = predicted[:, :, : h - below].to(z.dtype).movedim(1, 3).flatten(0, 2)  # (M, D), M = N (h - below) w
        everyone = gather(z.movedim(1, 3).flatten(0, 2))  # (P, D)
        scores = queries @ everyone.T  # (M, P)
        places = torch.arange(h * w, device=z.device)[below * w :]
        images = torch.arange(n, device=z.device) + rank() * n
        own = (images[:, None] * (h * w) + places).flatten()  # (M,), numbers of the predicted patches
        if negatives:
            drawn = own_part(
                shared_draw(world_size() * n * len(places), (world_size() * len(own), negatives), z.device)
            )
            others = drawn // len(places) * (h * w) + places[drawn % len(places)]  # (M, negatives)
            scores, own = scores.gather(1, torch.cat([own[:, None], others], dim=1)), torch.zeros_like(own)
        return F.cross_entropy(scores, own), (scores.detach().argmax(dim=1) == own).float().mean()

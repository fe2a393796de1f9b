"""A method that uses everything the contract offers, for tests: two view sizes, index, memory, own group, EMA.

Only fixtures and scripts of the tests register it, because other tests walk the registries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.data.augment import AUGMENTATIONS, Apply, Augmentation, Crop, View
from moco_d2.layers.distributed import gather
from moco_d2.layers.ema import cosine_momentum, ema_update_
from moco_d2.layers.encode import by_resolution
from moco_d2.layers.heads import without_head
from moco_d2.layers.memory_bank import MemoryBank
from moco_d2.layers.views import Views
from moco_d2.methods.base import METHODS, Diagnostic, SSLMethod


class Toy(SSLMethod):
    """Every view should predict the target's feature of its image, and the bank's row of it."""

    seen: torch.Tensor

    def __init__(self, encoder: Callable[..., nn.Module], images: int, dim: int = 8, start: float = 0.9) -> None:
        """Build online network, target, predictor and bank."""
        super().__init__()
        self.start, self.progress = start, 0.0
        self.online = encoder(num_classes=dim)
        self.target = copy.deepcopy(self.online).requires_grad_(False)
        self.predictor = nn.Linear(dim, dim)
        self.bank = MemoryBank(images, dim)
        # Which images the first epoch will show, found by looking ahead, and which it did show.
        self.register_buffer("ahead", torch.zeros(images, dtype=torch.long))
        self.register_buffer("seen", torch.zeros(images, dtype=torch.long))

    def before_epoch(self, epoch: int, replay: Callable[[], Iterator[Views]]) -> None:
        """Count the images that this process will see."""
        for views in replay() if epoch == 0 else ():
            self.ahead.index_add_(0, views.index, torch.ones_like(views.index))

    def before_step(self, progress: float, epoch: float) -> None:
        """Remember how far training is, and when the predictor begins to learn."""
        self.progress, self.frozen = progress, epoch < 1

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute two losses."""
        if self.frozen:
            self.seen.index_add_(0, views.index, torch.ones_like(views.index))
        features = F.normalize(by_resolution(self.online, views.images).float(), dim=1)  # (V N, C)
        predicted = F.normalize(self.predictor(features), dim=1).unflatten(0, (len(views.images), -1))
        with torch.no_grad():
            wanted = F.normalize(self.target(views.images[0]).float(), dim=1)  # (N, C)
        rows = F.normalize(self.bank.rows(views.index), dim=1)
        if self.recording:
            self.recorded = {"toy_similarity": (predicted.detach() * wanted).sum(-1).mean()}
        self.bank.update(wanted, views.index)
        spread = gather(features[: len(wanted)]).mean(0).square().sum()
        area = (views.boxes[..., 2] - views.boxes[..., 0]).abs() * (views.boxes[..., 3] - views.boxes[..., 1])
        return {
            "loss_target": (2 - 2 * (predicted * wanted).sum(-1)).mul(area).mean(),
            "loss_bank": (2 - 2 * (predicted * rows).sum(-1)).mean() + spread,
        }

    def after_backward(self) -> None:
        """Freeze the predictor in the first epoch."""
        if self.frozen:
            for parameter in self.predictor.parameters():
                parameter.grad = None

    def after_step(self) -> None:
        """Move the target."""
        ema_update_(self.target, self.online, cosine_momentum(self.start, self.progress))

    def param_groups(self) -> list[dict[str, Any]]:
        """Keep the predictor's lr constant."""
        return [
            {"params": self.online.parameters()},
            {"params": self.predictor.parameters(), "constant_lr": True, "no_weight_decay": True},
        ]

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss and a similarity."""
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f"),
            Diagnostic("toy_similarity", "toy", "similar", ".3f", 1.0, "equal"),
        )

    def backbone(self) -> nn.Module:
        """Return the target without head: another network than the one that is trained."""
        return without_head(self.target)


def toy_augmentation(size: int) -> Augmentation:
    """Two large views and two small ones."""
    large = View(Crop(size, (0.4, 1.0), bicubic=True), (Apply("grey", 0.2), Apply("flip", 0.5)))
    small = View(Crop(size // 2, (0.1, 0.4)), (Apply("flip", 0.5),))
    return Augmentation((large, large, small, small))


def register() -> None:
    """Make the method and its augmentation known."""
    METHODS["Toy"], AUGMENTATIONS["toy"] = Toy, toy_augmentation


def unregister() -> None:
    """Undo :func:`register`."""
    del METHODS["Toy"], AUGMENTATIONS["toy"]

"""A data set and an encoder so small that a collapse shows within seconds."""

from __future__ import annotations

import torch
from torch import nn

from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod

IMAGES, BATCH = 256, 64


class TinyEncoder(nn.Module):
    """One hidden layer; it maps (N, 3, 4, 4) to (N, num_classes)."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(48, 32), nn.BatchNorm1d(32), nn.ReLU())
        self.fc = nn.Linear(32, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(x))


def train_on_toy_set(method: SSLMethod, lr: float, steps: int) -> float:
    """Train on noisy views of random images, and return the last step's ``feature_std``."""
    images = torch.randn(IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(99))
    sgd = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr, momentum=0.9)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        index = torch.randperm(IMAGES, generator=generator)[:BATCH]
        noise = 0.3 * torch.randn(2, BATCH, 3, 4, 4, generator=generator)
        method.before_step(step / steps, 0.0)
        loss = sum(method(Views(list(images[index] + noise), index, torch.zeros(2, BATCH, 4))).values())
        sgd.zero_grad(), loss.backward(), sgd.step(), method.after_step()
    return method.recorded["feature_std"].item()

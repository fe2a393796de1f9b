#!/usr/bin/env python3
"""The methods without Detectron2: MoCo v2 in a training loop of your own.

    examples/plain_torch.py

``moco_d2.layers``, ``moco_d2.methods`` and ``moco_d2.convert`` need torch only. The encoder is torchvision's network,
unchanged. Random tensors stand for the images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torchvision.models import resnet18

from moco_d2.exits import guard
from moco_d2.facts import ResNetFacts
from moco_d2.layers.views import Views
from moco_d2.methods import build_method


def pretrain(steps: int, batch: int = 16, size: int = 64) -> dict[str, torch.Tensor]:
    """Train for some steps and return the weights of the backbone, under torchvision's names."""
    args = {"dim": 64, "queue_size": 256, "momentum": 0.99, "temperature": 0.2, "mlp": True, "bn_groups": 2}
    method = build_method("MoCo", resnet18, args)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.03, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        images = [torch.randn(batch, 3, size, size) for _ in range(2)]  # two views of each image
        views = Views(images, torch.arange(batch), torch.tensor([0.0, 0, 1, 1]).expand(2, batch, 4))
        method.before_step(step / steps, epoch=0)
        losses = method(views)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        method.after_backward()
        optimizer.step()
        method.after_step()
        print(f"step {step}: " + ", ".join(f"{name} {loss.item():.4f}" for name, loss in losses.items()))
    return method.backbone().state_dict()


def main() -> None:
    """Pretrain for a few steps and save a file that ``moco-d2 convert`` reads."""
    facts = ResNetFacts(depth=18, res2_channels=64, origin="examples/plain_torch.py")
    path = Path("output/plain_torch.pth")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": pretrain(steps=3), "facts": facts.as_dict()}, path)
    print(f"written {path}; next: moco-d2 convert {path} output/plain_torch_detectron2.pth")


if __name__ == "__main__":
    guard(main)

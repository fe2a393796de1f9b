"""ResNet encoders by name, under torchvision's parameter names, at any width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_d2.facts import BackboneFacts, Pixels
from moco_d2.messages import unknown_name

# depth: (block, blocks per stage)
DEPTHS: dict[int, tuple[Any, tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
    152: (Bottleneck, (3, 8, 36, 3)),
}

# name: (depth, groups, width per group)
ARCHITECTURES: dict[str, tuple[int, int, int]] = {
    "resnet18": (18, 1, 64),
    "resnet34": (34, 1, 64),
    "resnet50": (50, 1, 64),
    "resnet101": (101, 1, 64),
    "resnet152": (152, 1, 64),
    "resnext50_32x4d": (50, 32, 4),
    "resnext101_32x8d": (101, 32, 8),
    "resnext101_64x4d": (101, 64, 4),
    "wide_resnet50_2": (50, 1, 128),
    "wide_resnet101_2": (101, 1, 128),
}


class ScaledResNet(ResNet):
    """torchvision's ResNet with every channel count multiplied by ``width``, parameter names unchanged.

    At width 2 and 4 these are the published "R50w2x" and "R50w4x"; 1/4 is for quick runs. (``wide_resnet50_2`` is
    something else: it widens the bottlenecks only.)
    """

    def __init__(self, width: float, block: Any, layers: list[int], **kwargs: Any) -> None:
        self.width = width
        super().__init__(block, layers, **kwargs)
        self.fc: nn.Module = nn.Linear(int(512 * block.expansion * width), kwargs.get("num_classes", 1000))

    def _make_layer(self, block: Any, planes: int, *args: Any, **kwargs: Any) -> nn.Sequential:
        if planes == 64:  # The first stage: torchvision has just built the stem, with 64 channels at any width.
            self.inplanes = int(64 * self.width)
            self.conv1 = nn.Conv2d(3, self.inplanes, 7, stride=2, padding=3, bias=False)
            self.bn1 = self._norm_layer(self.inplanes)
        return super()._make_layer(block, int(planes * self.width), *args, **kwargs)


def build_resnet(name: str = "resnet50", num_classes: int = 1000, width: float = 1.0, stem: str = "imagenet") -> ResNet:
    """Build a ResNet with torchvision's names and initialisation (the demo's for a CIFAR stem).

    Args:
        name: a key of ``ARCHITECTURES``.
        num_classes: outputs of ``fc``.
        width: multiplier of every channel count; ``64 * width`` must be a whole number that ``groups`` divides.
        stem: ``imagenet`` (7x7 stride 2, max-pool), or ``cifar`` (3x3 stride 1, no pool: the authors' CIFAR demo).

    Raises:
        ValueError: an unknown name or stem, or an impossible width.
    """
    if name not in ARCHITECTURES:
        raise ValueError(unknown_name("the encoder", name, ARCHITECTURES))
    if stem not in ("imagenet", "cifar"):
        raise ValueError(f"encoder stem is {stem!r}; it must be 'imagenet' or 'cifar'")
    depth, groups, width_per_group = ARCHITECTURES[name]
    if width <= 0 or (64 * width) % 1 or int(64 * width) * width_per_group // 64 < 1:
        raise ValueError(f"encoder width is {width}; 64 * width must be a positive whole number (0.25, 0.5, 1, 2, 4)")
    block, blocks = DEPTHS[depth]
    network = ScaledResNet(
        width, block, list(blocks), num_classes=num_classes, groups=groups, width_per_group=width_per_group
    )
    if stem == "cifar":
        # With PyTorch's own initialisation, unlike the other convolutions: the demo replaces this one afterwards, too.
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def network_for(facts: BackboneFacts) -> ResNet:
    """Build the torchvision network that a backbone's facts describe, head removed (``fc`` is an identity).

    With ``stride_in_1x1`` the strides of the bottlenecks move to their first convolution, as in Caffe's ResNets.

    Raises:
        ValueError: an unknown depth.
    """
    if facts.depth not in DEPTHS:
        raise ValueError(f"depth is {facts.depth}; known depths are {', '.join(map(str, DEPTHS))}")
    block, blocks = DEPTHS[facts.depth]
    width = facts.stem_channels / 64
    # ScaledResNet multiplies the planes by width, torchvision then by width_per_group / 64.
    per_group = round(facts.width_per_group / width)
    network = ScaledResNet(width, block, list(blocks), groups=facts.groups, width_per_group=per_group)
    network.fc = nn.Identity()
    if facts.stride_in_1x1:
        for bottleneck in network.modules():
            if isinstance(bottleneck, Bottleneck):
                bottleneck.conv1.stride, bottleneck.conv2.stride = bottleneck.conv2.stride, (1, 1)
    return network


def describe(network: nn.Module, pixels: Pixels | None = None, **kwargs: Any) -> BackboneFacts:
    """Read a ResNet's facts off its parameter shapes.

    Args:
        network: any module with torchvision's ResNet names; a head may be present.
        pixels: the input it is trained with (default: ImageNet RGB).
        kwargs: ``origin`` and ``protocol``.

    Raises:
        ValueError: the parameters are not those of a known ResNet depth.
    """
    return facts_from_shapes({k: tuple(v.shape) for k, v in network.state_dict().items()}, pixels or Pixels(), **kwargs)


def facts_from_shapes(shapes: dict[str, torch.Size | tuple[int, ...]], pixels: Pixels, **kwargs: Any) -> BackboneFacts:
    """Read facts off the shapes of a state dict under torchvision's names (see :func:`describe`)."""
    blocks = tuple(len({k.split(".")[1] for k in shapes if k.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in shapes else BasicBlock
    depth = next((d for d, shape in DEPTHS.items() if shape == (block, blocks)), None)
    if depth is None or "conv1.weight" not in shapes:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"not a ResNet of depth {known}: {blocks} {block.__name__} blocks in layer1..layer4")
    conv2 = shapes["layer1.0.conv2.weight"]
    groups = conv2[0] // conv2[1]
    last = shapes[f"layer1.0.conv{3 if block is Bottleneck else 2}.weight"]
    return BackboneFacts(
        depth=depth,
        stem_channels=shapes["conv1.weight"][0],
        res2_channels=last[0],
        groups=groups,
        width_per_group=conv2[0] // groups,
        pixels=pixels,
        **kwargs,
    )

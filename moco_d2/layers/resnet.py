"""ResNets by name, under torchvision's parameter names, of any width, with batch, synchronised or group norm."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from moco_d2.facts import Pixels, ResNetFacts
from moco_d2.layers.batch_norm import SyncBatchNorm2d
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


STEMS = ("imagenet", "cifar")
NORM_GROUPS = 32  # of every group norm, as in Detectron2
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": SyncBatchNorm2d,
    "GN": functools.partial(nn.GroupNorm, NORM_GROUPS),
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


def build_resnet(
    name: str = "resnet50",
    num_classes: int = 1000,
    width: float = 1.0,
    stem: str = "imagenet",
    norm: str = "BN",
    zero_init_residual: bool = False,
) -> ResNet:
    """Build a ResNet with torchvision's names and initialisation.

    Args:
        name: a key of ``ARCHITECTURES``.
        num_classes: outputs of ``fc``.
        width: multiplier of every channel count: 1 is the paper's, 2 and 4 its wide networks, 0.25 is for quick runs.
            It is a multiple of 1/64, of 1/4 for ``resnext50_32x4d`` and ``resnext101_64x4d``, of 1/8 for
            ``resnext101_32x8d``.
        stem: ``imagenet`` (7x7 convolution of stride 2, max-pool), or ``cifar`` (3x3 of stride 1, no pool: the MoCo
            authors' CIFAR demo; cannot be converted for detection).
        norm: ``BN`` (statistics of each process's batch), ``SyncBN`` (of all processes' batches), or ``GN`` (group norm
            with 32 groups, which needs a width that is a multiple of 0.5; detectors then have MODEL.RESNETS.NORM GN).
        zero_init_residual: start with the last norm of every block at 0, so that each block is the identity (Goyal et
            al., arXiv 1706.02677).

    Raises:
        ValueError: an argument has an unknown or impossible value.
    """
    if name not in ARCHITECTURES:
        raise ValueError(unknown_name("SSL.ENCODER.NAME", name, ARCHITECTURES))
    for key, value, choices in (("stem", stem, STEMS), ("norm", norm, NORMS)):
        if value not in choices:
            raise ValueError(unknown_name(f"SSL.ENCODER.ARGS.{key}", value, choices))
    depth, groups, width_per_group = ARCHITECTURES[name]
    fraction = min(64, width_per_group)  # so that stem and groups have whole numbers of channels
    if width <= 0 or (fraction * width) % 1:
        raise ValueError(
            f"SSL.ENCODER.ARGS.width is {width}; for {name} it must be a positive multiple of 1/{fraction} "
            "(0.25, 0.5, 1, 2, 4)"
        )
    if norm == "GN" and int(64 * width) % NORM_GROUPS:
        raise ValueError(
            f"SSL.ENCODER.ARGS.width is {width}; with norm GN it must be a multiple of 0.5, because the {NORM_GROUPS} "
            "groups must divide the number of channels"
        )
    block, blocks = DEPTHS[depth]
    network = ScaledResNet(
        width, block, list(blocks), num_classes=num_classes, groups=groups, width_per_group=width_per_group,
        norm_layer=NORMS[norm], zero_init_residual=zero_init_residual,
    )  # fmt: skip
    if stem == "cifar":
        # Replaced after the initialisation, as in the demo, so that it alone has PyTorch's default weights.
        network.conv1 = nn.Conv2d(3, network.conv1.out_channels, 3, stride=1, padding=1, bias=False)
        network.maxpool = nn.Identity()
    return network


def network_for(facts: ResNetFacts) -> ResNet:
    """Build the torchvision network that a backbone's facts describe, without head (``fc`` is an identity).

    With ``stride_in_1x1`` a bottleneck has its stride in the first convolution, as in Caffe's ResNets.

    Raises:
        ValueError: an unknown depth.
    """
    if facts.depth not in DEPTHS:
        raise ValueError(f"depth is {facts.depth}; the known depths are {', '.join(map(str, DEPTHS))}")
    block, blocks = DEPTHS[facts.depth]
    width = facts.stem_channels / 64
    # ScaledResNet multiplies the planes by width, torchvision then by width_per_group / 64.
    per_group = round(facts.width_per_group / width)
    network = ScaledResNet(
        width, block, list(blocks), groups=facts.groups, width_per_group=per_group, norm_layer=NORMS[facts.norm]
    )
    network.fc = nn.Identity()
    if facts.stride_in_1x1:
        for bottleneck in network.modules():
            if isinstance(bottleneck, Bottleneck):
                bottleneck.conv1.stride, bottleneck.conv2.stride = bottleneck.conv2.stride, (1, 1)
    return network


def describe(network: nn.Module, pixels: Pixels | None = None, **kwargs: Any) -> ResNetFacts:
    """Return a ResNet's facts, read off the shapes of its tensors.

    Args:
        network: any module with torchvision's ResNet names, with or without head.
        pixels: the input that it is trained with (default: ImageNet RGB).
        kwargs: ``origin`` and ``recipe``.

    Raises:
        ValueError: the shapes are not those of a known ResNet depth.
    """
    return facts_from_shapes({k: tuple(v.shape) for k, v in network.state_dict().items()}, pixels or Pixels(), **kwargs)


def facts_from_shapes(shapes: dict[str, torch.Size | tuple[int, ...]], pixels: Pixels, **kwargs: Any) -> ResNetFacts:
    """Return the facts of a state dict under torchvision's names, by its shapes (see :func:`describe`)."""
    blocks = tuple(len({k.split(".")[1] for k in shapes if k.startswith(f"layer{s}.")}) for s in (1, 2, 3, 4))
    block = Bottleneck if "layer1.0.conv3.weight" in shapes else BasicBlock
    depth = next((d for d, shape in DEPTHS.items() if shape == (block, blocks)), None)
    if depth is None or "conv1.weight" not in shapes:
        known = ", ".join(map(str, DEPTHS))
        raise ValueError(f"not a ResNet of depth {known}: layer1 to layer4 have {blocks} {block.__name__} blocks")
    conv2 = shapes["layer1.0.conv2.weight"]
    groups = conv2[0] // conv2[1]
    last = shapes[f"layer1.0.conv{3 if block is Bottleneck else 2}.weight"]
    return ResNetFacts(
        depth=depth,
        stem_channels=shapes["conv1.weight"][0],
        res2_channels=last[0],
        groups=groups,
        width_per_group=conv2[0] // groups,
        norm="BN" if "bn1.running_mean" in shapes else "GN",
        pixels=pixels,
        **kwargs,
    )

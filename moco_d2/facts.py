"""What a weight file says about itself, so that nobody has to guess how to feed it.

Every file this project writes carries a :class:`BackboneFacts` as a plain dictionary under the key ``facts``. The same
record answers three questions: which Detectron2 keys build and feed the network (:meth:`BackboneFacts.config`), which
torchvision network it was (``depth``, ``groups``, channel counts), and whether a config contradicts the weights
(:meth:`BackboneFacts.contradictions`).

This module is the floor of the package: standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol


class Config(Protocol):
    """The part of a yacs ``CfgNode`` that :meth:`BackboneFacts.contradictions` reads."""

    MODEL: Any
    INPUT: Any


@dataclass(frozen=True)
class Pixels:
    """How pixels must be prepared, in Detectron2's units.

    Attributes:
        order: channel order, ``RGB`` or ``BGR``.
        mean: per-channel mean in that order, 0..255 (``MODEL.PIXEL_MEAN``).
        std: per-channel divisor in that order, 0..255 (``MODEL.PIXEL_STD``; Caffe-lineage weights use 1).
    """

    order: str = "RGB"
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)

    def __post_init__(self) -> None:
        if self.order not in ("RGB", "BGR"):
            raise ValueError(f"pixel order is {self.order!r}; it must be 'RGB' or 'BGR'")
        for name in ("mean", "std"):
            values = tuple(float(v) for v in getattr(self, name))
            if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
                raise ValueError(f"pixel {name} is {values}; it must be three finite numbers (std: positive)")
            object.__setattr__(self, name, values)

    def __str__(self) -> str:
        return f"{self.order}, mean {list(self.mean)}, std {list(self.std)}"


IMAGENET_RGB = Pixels()
CAFFE_BGR = Pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


@dataclass(frozen=True)
class BackboneFacts:
    """One ResNet backbone: its shape, where its strides sit, how to feed it and where it comes from.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        stem_channels: output channels of ``conv1`` (64 at width 1).
        res2_channels: output channels of the first residual stage (256, or 64 for depth 18 and 34, at width 1).
        groups: groups of the 3x3 convolutions (32 for ResNeXt-50 32x4d).
        width_per_group: bottleneck channels of the first stage per group (64 at width 1).
        stride_in_1x1: whether a bottleneck strides in its first 1x1 convolution (Caffe) or in its 3x3 (torchvision).
        pixels: the input the weights were trained with.
        origin: where the weights come from, in words.
        protocol: the pretraining recipe's name (``moco_v2_R50_200ep``), empty when unknown.
        parts: what of a detector is pretrained beside the backbone: ``fpn``, ``box_head``, ... Fine-tuning from such
            weights is another protocol.
    """

    depth: int = 50
    stem_channels: int = 64
    res2_channels: int = 256
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = False
    pixels: Pixels = field(default_factory=Pixels)
    origin: str = "unknown"
    protocol: str = ""
    parts: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and lists, fit for any file format."""
        facts = asdict(self)
        facts["pixels"] = {k: list(v) if isinstance(v, tuple) else v for k, v in facts["pixels"].items()}
        facts["parts"] = list(self.parts)
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> BackboneFacts:
        """Rebuild facts from :meth:`as_dict`'s form.

        Raises:
            ValueError: a field is unknown or has an impossible value.
        """
        known = cls.__dataclass_fields__
        unknown = sorted(set(facts) - set(known))
        if unknown:
            raise ValueError(f"unknown backbone facts {unknown}; known are {sorted(known)}")
        values = dict(facts) | {"parts": tuple(facts.get("parts", ()))}
        if "pixels" in values:
            pixels = values["pixels"]
            values["pixels"] = Pixels(pixels["order"], tuple(pixels["mean"]), tuple(pixels["std"]))
        return cls(**values)

    def config(self) -> dict[str, Any]:
        """Return the Detectron2 keys, with values, under which these weights mean what they meant in pretraining."""
        return {
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem_channels,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_channels,
            "MODEL.RESNETS.NUM_GROUPS": self.groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width_per_group,
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            "MODEL.PIXEL_MEAN": list(self.pixels.mean),
            "MODEL.PIXEL_STD": list(self.pixels.std),
            "INPUT.FORMAT": self.pixels.order,
        }

    def contradictions(self, cfg: Config, tolerance: float = 0.01) -> list[str]:
        """List the keys of ``cfg`` that disagree with these facts, one readable line each (empty: all agree).

        Args:
            cfg: a Detectron2 config.
            tolerance: largest accepted difference of a mean or std, in 0..255 units (files round differently).
        """
        lines = []
        for key, wanted in self.config().items():
            value: Any = cfg
            for part in key.split("."):
                value = getattr(value, part)
            if isinstance(wanted, list):
                agree = len(value) == len(wanted) and all(
                    abs(v - w) <= tolerance for v, w in zip(value, wanted, strict=True)
                )
            else:
                agree = value == wanted
            if not agree:
                shown = list(value) if isinstance(wanted, list) else value
                lines.append(f"{key} is {shown} in the config, but the weights need {wanted}")
        return lines

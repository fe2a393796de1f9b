"""The facts of a backbone: a weight file's description of its network and of the input that it expects.

Every weight file of this project contains a :class:`BackboneFacts` as a plain dictionary under the key ``facts``. It
states which network the weights belong to, which Detectron2 keys build and feed that network
(:meth:`BackboneFacts.config`), and where a config contradicts the weights (:meth:`BackboneFacts.contradictions`).

The module needs the standard library only.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Protocol

NORMS = ("BN", "GN")
BASIC_DEPTHS = (18, 34)  # of basic blocks; the deeper ResNets have bottlenecks
# MODEL.BACKBONE.NAME: this project's builder of BASIC_DEPTHS, and Detectron2's, which build their full width only.
BASIC_BUILDER = "build_basic_resnet_backbone"
FULL_WIDTH_BUILDERS = ("build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone")
DILATED_BUILDER = "build_resnet_dilated_c5_backbone"  # this project's
VIT_BUILDER = "build_vit_sfp_backbone"  # this project's: ViT and simple feature pyramid
FULL_WIDTH = 64  # RES2_OUT_CHANNELS of BASIC_DEPTHS at full width


class Config(Protocol):
    """The part of a yacs ``CfgNode`` that :meth:`BackboneFacts.contradictions` reads."""

    MODEL: Any
    INPUT: Any


@dataclass(frozen=True)
class Pixels:
    """The input of a network, in Detectron2's units.

    Attributes:
        order: channel order, ``RGB`` or ``BGR``.
        mean: mean of each channel in that order, 0..255 (``MODEL.PIXEL_MEAN``).
        std: divisor of each channel in that order, 0..255 (``MODEL.PIXEL_STD``; 1 for weights from Caffe).
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


@dataclass(frozen=True, kw_only=True)
class BackboneFacts(ABC):
    """What the facts of every kind of backbone have in common; the kinds are the classes of ``KINDS``.

    Attributes:
        pixels: the input that the weights were trained with.
        origin: where the weights come from, in words.
        recipe: name of the pretraining recipe (``moco_v2_R50_200ep``), empty if unknown.
        parts: the other parts of a detector that are pretrained: ``fpn``, ``box_head``, ... Fine-tuning from such
            weights is another protocol.
        kind: family of networks, a key of ``KINDS``. Files of earlier versions lack it: they contain a ResNet.
        other_builders: values of ``MODEL.BACKBONE.NAME`` that build another network.
    """

    kind: ClassVar[str]
    other_builders: ClassVar[tuple[str, ...]]
    pixels: Pixels = field(default_factory=Pixels)
    origin: str = "unknown"
    recipe: str = ""
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("origin", "recipe"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be a text")

    def as_dict(self) -> dict[str, Any]:
        """Return the facts as numbers, strings, lists and dictionaries, which every file format can hold."""
        facts = {"kind": self.kind} | asdict(self)
        facts["pixels"] = {k: list(v) if isinstance(v, tuple) else v for k, v in facts["pixels"].items()}
        facts["parts"] = list(self.parts)
        return facts

    @staticmethod
    def from_dict(facts: Mapping[str, Any]) -> BackboneFacts:
        """Return the facts that :meth:`as_dict` wrote, in this version or an earlier one.

        Raises:
            ValueError: the kind of network or a field is unknown, or a field has an impossible value.
        """
        if not isinstance(facts, Mapping):
            raise ValueError(f"they are a {type(facts).__name__}; they must be a mapping")
        values = dict(facts) | {"parts": tuple(facts.get("parts", ()))}
        if isinstance(facts.get("parts"), str):
            raise ValueError(f"parts is {facts['parts']!r}; it must be a list of names")
        kind = values.pop("kind", ResNetFacts.kind)
        if kind not in KINDS:
            raise ValueError(
                f"the backbone is of kind {kind!r}, and this version of moco_d2 knows {', '.join(KINDS)} "
                "only: install a newer version"
            )
        if "protocol" in values:  # the name of `recipe` in earlier versions
            values["recipe"] = values.pop("protocol")
        known = [entry.name for entry in fields(KINDS[kind])]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"unknown backbone facts {unknown}; the known ones are {sorted(known)}")
        if "pixels" in values:
            pixels = values["pixels"]
            values["pixels"] = Pixels(pixels["order"], tuple(pixels["mean"]), tuple(pixels["std"]))
        return KINDS[kind](**values)

    @property
    @abstractmethod
    def network(self) -> str:
        """The network in words, for messages: ``ResNet-50``."""

    def config(self) -> dict[str, Any]:
        """Return the Detectron2 keys and values that build the pretrained network and feed it as in pretraining."""
        return {
            "MODEL.PIXEL_MEAN": list(self.pixels.mean),
            "MODEL.PIXEL_STD": list(self.pixels.std),
            "INPUT.FORMAT": self.pixels.order,
        }

    def contradictions(self, cfg: Config, tolerance: float = 0.01) -> list[str]:
        """Return a message for each key of ``cfg`` that contradicts these facts (see :meth:`disagreements`)."""
        found = self.disagreements(cfg, tolerance)
        return [
            f"{key} is {value} in the config, but the weights need {wanted}" for key, (value, wanted) in found.items()
        ]

    def disagreements(self, cfg: Config, tolerance: float = 0.01) -> dict[str, tuple[Any, Any]]:
        """Return ``{key: (value in the config, value that the weights need)}`` for the keys of :meth:`config`.

        Args:
            cfg: a Detectron2 config.
            tolerance: largest accepted difference of a mean or std, in 0..255 (files round differently).
        """
        found = {}
        for key, wanted in self.config().items():
            value: Any = cfg
            for part in key.split("."):
                value = getattr(value, part)
            if isinstance(wanted, list):
                value = list(value)
                agree = len(value) == len(wanted) and all(
                    abs(v - w) <= tolerance for v, w in zip(value, wanted, strict=True)
                )
            elif key == "MODEL.BACKBONE.NAME":  # a user's own builder may build the same network
                agree = value not in self.other_builders
            else:
                agree = value == wanted
            if not agree:
                found[key] = (value, wanted)
        return found


@dataclass(frozen=True, kw_only=True)
class ResNetFacts(BackboneFacts):
    """The facts of a ResNet: its shape, its strides, its input and its origin.

    Attributes:
        depth: 18, 34, 50, 101 or 152.
        stem_channels: output channels of ``conv1`` (64 at width 1).
        res2_channels: output channels of the first residual stage (256, or 64 for depth 18 and 34, at width 1).
        groups: groups of the 3x3 convolutions (32 for ResNeXt-50 32x4d).
        width_per_group: bottleneck channels of the first stage per group (64 at width 1).
        stride_in_1x1: whether a bottleneck strides in its first 1x1 convolution (Caffe) or in its 3x3 (torchvision).
        norm: ``BN``, batch norm of any kind, or ``GN``, group norm.
    """

    kind = "resnet"
    other_builders = (*FULL_WIDTH_BUILDERS, VIT_BUILDER)
    depth: int = 50
    stem_channels: int = 64
    res2_channels: int = 256
    groups: int = 1
    width_per_group: int = 64
    stride_in_1x1: bool = False
    norm: str = "BN"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, ("depth", "stem_channels", "res2_channels", "groups", "width_per_group"))
        if type(self.stride_in_1x1) is not bool:
            raise ValueError(f"stride_in_1x1 is {self.stride_in_1x1!r}; it must be True or False")
        if self.norm not in NORMS:
            raise ValueError(f"the norm is {self.norm!r}; it must be {' or '.join(NORMS)}")

    @property
    def network(self) -> str:
        """The network in words."""
        return f"ResNet-{self.depth}"

    def config(self) -> dict[str, Any]:
        """Return the Detectron2 keys and values that build the pretrained network and feed it as in pretraining."""
        # Which batch norm a detector has (frozen, synchronised, ...) is the protocol's choice.
        norm = {"MODEL.RESNETS.NORM": self.norm} if self.norm != "BN" else {}
        other_width = self.depth in BASIC_DEPTHS and self.res2_channels != FULL_WIDTH
        return {
            **({"MODEL.BACKBONE.NAME": BASIC_BUILDER} if other_width else {}),
            "MODEL.RESNETS.DEPTH": self.depth,
            "MODEL.RESNETS.STEM_OUT_CHANNELS": self.stem_channels,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": self.res2_channels,
            "MODEL.RESNETS.NUM_GROUPS": self.groups,
            "MODEL.RESNETS.WIDTH_PER_GROUP": self.width_per_group,
            "MODEL.RESNETS.STRIDE_IN_1X1": self.stride_in_1x1,
            **super().config(),
            **norm,
        }


@dataclass(frozen=True, kw_only=True)
class ViTFacts(BackboneFacts):
    """The facts of a plain vision transformer (ViT): its shape, its input and its origin.

    Attributes:
        patch: side of a square patch, in pixels.
        dim: size of a token.
        depth: number of blocks.
        heads: of each block's attention; the shapes of the weights do not show it.
        image: side of the square pictures that its position embedding is for, in pixels.
        class_token: whether the position embedding begins with the class token's.
    """

    kind = "vit"
    other_builders = (BASIC_BUILDER, DILATED_BUILDER, *FULL_WIDTH_BUILDERS)
    patch: int = 16
    dim: int = 384
    depth: int = 12
    heads: int = 6
    image: int = 224
    class_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, ("patch", "dim", "depth", "heads", "image"))
        if type(self.class_token) is not bool:
            raise ValueError(f"class_token is {self.class_token!r}; it must be True or False")
        for whole, part in (("dim", "heads"), ("image", "patch")):
            if getattr(self, whole) % getattr(self, part):
                raise ValueError(f"{whole} is {getattr(self, whole)}; it must be a multiple of {part}")

    @property
    def network(self) -> str:
        """The network in words."""
        return f"ViT of {self.depth} blocks, {self.dim} features, {self.heads} heads, patches of {self.patch}"

    def config(self) -> dict[str, Any]:
        """Return the Detectron2 keys and values that build the pretrained network and feed it as in pretraining."""
        return {
            "MODEL.BACKBONE.NAME": VIT_BUILDER,
            "MODEL.VIT.PATCH_SIZE": self.patch,
            "MODEL.VIT.EMBED_DIM": self.dim,
            "MODEL.VIT.DEPTH": self.depth,
            "MODEL.VIT.NUM_HEADS": self.heads,
            "MODEL.VIT.PRETRAIN_IMAGE_SIZE": self.image,
            "MODEL.VIT.PRETRAIN_CLASS_TOKEN": self.class_token,
            **super().config(),
        }


KINDS: dict[str, type[BackboneFacts]] = {facts.kind: facts for facts in (ResNetFacts, ViTFacts)}


def check_counts(facts: BackboneFacts, names: Iterable[str]) -> None:
    """Raise ValueError if one of these fields is not a positive whole number."""
    for name in names:
        value = getattr(facts, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} is {value!r}; it must be a positive whole number")

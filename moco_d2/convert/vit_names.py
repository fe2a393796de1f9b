"""Names of a ViT's tensors: one :class:`VitNaming` per family of code. All are stated beside timm's.

timm's names are those of MoCo v3, DINO, MAE, DeiT and this project too, and of Detectron2's ViT, which has no class
token and no last norm.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from moco_d2.facts import ViTFacts

# The start of the names of a detector's ViT under the simple feature pyramid.
IN_DETECTOR = "backbone.net."
CLASS_TOKEN, LAST_NORM = "cls_token", ("norm.weight", "norm.bias")
# What Detectron2's ViT has no place for.
BESIDE = (CLASS_TOKEN, *LAST_NORM)
BESIDE_KEY = "beside"  # top-level key of a converted file for these

_MLP_RATIO = 4  # as in moco_d2.layers.timm_vit, which needs timm
_LAYERS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")


@dataclass(frozen=True)
class VitNaming:
    """How one family of code spells the tensors of a ViT.

    Attributes:
        cls_token: the class token.
        pos_embed: the position embedding.
        patch: start of the names of the patch projection's weight and bias.
        norm: the same of the last norm.
        block: start of the names of block ``b``, from 0.
        layers: what follows for the layers of a block, in timm's order: norm, query-key-value (three starts if they
            are separate), projection, norm, and the two layers of the MLP.
    """

    cls_token: str
    pos_embed: str
    patch: str
    norm: str
    block: str
    layers: tuple[tuple[str, ...], ...]

    @property
    def probe(self) -> str:
        """A tensor of the first block whose name, with that of the patch projection, shows this naming."""
        return self.block.format(b=0) + self.layers[4][0] + "weight"

    def names(self, depth: int) -> dict[str, tuple[str, ...]]:
        """Return timm's name -> the names here (several, if they are to be joined), in timm's order."""
        return _names(self, depth)


@functools.cache
def _names(naming: VitNaming, depth: int) -> dict[str, tuple[str, ...]]:
    layers: dict[str, tuple[str, ...]] = {"patch_embed.proj": (naming.patch,)}
    for number in range(depth):
        start = naming.block.format(b=number)
        layers |= {
            f"blocks.{number}.{name}": tuple(start + own for own in spelled)
            for name, spelled in zip(_LAYERS, naming.layers, strict=True)
        }
    layers["norm"] = (naming.norm,)
    single = {CLASS_TOKEN: (naming.cls_token,), "pos_embed": (naming.pos_embed,)}
    return single | {
        f"{layer}.{kind}": tuple(own + kind for own in spelled)
        for layer, spelled in layers.items()
        for kind in ("weight", "bias")
    }


TIMM = VitNaming(
    cls_token=CLASS_TOKEN,
    pos_embed="pos_embed",
    patch="patch_embed.proj.",
    norm="norm.",
    block="blocks.{b}.",
    layers=tuple((f"{name}.",) for name in _LAYERS),
)
HUGGING_FACE = VitNaming(
    cls_token="embeddings.cls_token",
    pos_embed="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection.",
    norm="layernorm.",
    block="encoder.layer.{b}.",
    layers=(
        ("layernorm_before.",),
        tuple(f"attention.attention.{name}." for name in ("query", "key", "value")),
        ("attention.output.dense.",),
        ("layernorm_after.",),
        ("intermediate.dense.",),
        ("output.dense.",),
    ),
)
# The same project's DINOv2.
HUGGING_FACE_DINOV2 = replace(
    HUGGING_FACE,
    layers=(("norm1.",), *HUGGING_FACE.layers[1:3], ("norm2.",), ("mlp.fc1.",), ("mlp.fc2.",)),
)
# state_dict() since version 5, which still saves the names above.
HUGGING_FACE_5 = replace(
    HUGGING_FACE,
    block="layers.{b}.",
    layers=(
        ("layernorm_before.",),
        tuple(f"attention.{letter}_proj." for letter in "qkv"),
        ("attention.o_proj.",),
        ("layernorm_after.",),
        ("mlp.fc1.",),
        ("mlp.fc2.",),
    ),
)
TORCHVISION_VIT = VitNaming(
    cls_token="class_token",
    pos_embed="encoder.pos_embedding",
    patch="conv_proj.",
    norm="encoder.ln.",
    block="encoder.layers.encoder_layer_{b}.",
    layers=(
        ("ln_1.",),
        ("self_attention.in_proj_",),
        ("self_attention.out_proj.",),
        ("ln_2.",),
        ("mlp.0.",),
        ("mlp.3.",),
    ),
)
# The released files of torchvision, which it renames on loading.
TORCHVISION_VIT_RELEASED = replace(
    TORCHVISION_VIT, layers=(*TORCHVISION_VIT.layers[:4], ("mlp.linear_1.",), ("mlp.linear_2.",))
)

VIT_NAMINGS = (
    TIMM,
    HUGGING_FACE,
    HUGGING_FACE_5,
    HUGGING_FACE_DINOV2,
    TORCHVISION_VIT,
    TORCHVISION_VIT_RELEASED,
)


def detectron2_name(name: str) -> str:
    """Return the name of a tensor in a detector; what has no place there keeps timm's."""
    return name if name in BESIDE else IN_DETECTOR + name


def vit_shapes(facts: ViTFacts) -> dict[str, tuple[int, ...]]:
    """Return timm's name -> shape for the ViT that facts describe, without head, in timm's order."""
    dim, hidden = facts.dim, _MLP_RATIO * facts.dim
    rows = (facts.image // facts.patch) ** 2 + facts.class_token
    of_layer = {
        "patch_embed.proj": (dim, 3, facts.patch, facts.patch),
        "attn.qkv": (3 * dim, dim),
        "attn.proj": (dim, dim),
        "mlp.fc1": (hidden, dim),
        "mlp.fc2": (dim, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for name in TIMM.names(facts.depth):
        layer, _, kind = name.rpartition(".")
        weight = of_layer.get(layer) or of_layer.get(layer.split(".", 2)[-1], (dim,))
        shapes[name] = weight if kind == "weight" else weight[:1]
    return shapes | {CLASS_TOKEN: (1, 1, dim), "pos_embed": (1, rows, dim)}

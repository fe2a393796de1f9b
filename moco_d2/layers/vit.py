"""Vision transformers (ViT; Dosovitskiy et al., arXiv 2010.11929) under timm's names, for MoCo v3 and DINO.

Letters: N images, D size of a token, h x w patches of an image.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from moco_d2.facts import Pixels, ViTFacts
from moco_d2.messages import unknown_name

POSITIONS = ("learned", "sincos")
INITS = ("timm", "dino", "moco_v3")


def build_vit(
    num_classes: int = 1000,
    dim: int = 384,
    depth: int = 12,
    heads: int = 6,
    patch: int = 16,
    image: int = 224,
    position: str = "learned",
    init: str = "timm",
    freeze_patches: bool = False,
    drop_path: float = 0.0,
) -> Any:
    """Build a ViT with timm's names.

    Args:
        num_classes: outputs of ``head``.
        dim: D, a multiple of ``heads``, and of 4 with ``sincos``.
        depth: number of blocks.
        heads: of each block's attention. MoCo v3's ViT-S has 12, DINO's and DeiT's 6.
        patch: side of a patch, in pixels.
        image: side of the pictures that the position embedding is for, in pixels, a multiple of ``patch``; for other
            sizes it is interpolated.
        position: ``learned``, or ``sincos``, MoCo v3's, which is fixed.
        init: ``timm``, truncated normal; ``dino``, the same with a class token of std .02 instead of 1e-6; or
            ``moco_v3``, uniform.
        freeze_patches: keep the patch projection at its random weights, MoCo v3's remedy for unstable training.
        drop_path: the last block's rate of stochastic depth, in [0, 1); the other blocks' rates rise to it linearly.

    Raises:
        ValueError: an argument has an unknown or impossible value, or timm is missing.
    """
    for key, value, choices in (("position", position, POSITIONS), ("init", init, INITS)):
        if value not in choices:
            raise ValueError(unknown_name(f"SSL.ENCODER.ARGS.{key}", value, choices))
    if not 0 <= drop_path < 1:
        raise ValueError(f"SSL.ENCODER.ARGS.drop_path is {drop_path}; it must be in [0, 1)")
    if position == "sincos" and dim % 4:
        raise ValueError(f"SSL.ENCODER.ARGS.dim is {dim}; with position sincos it must be a multiple of 4")
    try:
        ViTFacts(patch=patch, dim=dim, depth=depth, heads=heads, image=image)
    except ValueError as error:
        raise ValueError(f"SSL.ENCODER.ARGS.{error}") from None
    network = _timm_vit(
        num_classes=num_classes, embed_dim=dim, depth=depth, num_heads=heads, patch_size=patch, img_size=image,
        drop_path_rate=drop_path,
    )  # fmt: skip
    if init == "dino":
        nn.init.trunc_normal_(network.cls_token, std=0.02)
    if init == "moco_v3":
        _init_as_moco_v3(network)
    if position == "sincos":
        network.pos_embed.data.copy_(sincos_position(image // patch, dim))
        network.pos_embed.requires_grad_(False)
    if freeze_patches:
        network.patch_embed.proj.requires_grad_(False)
    return network


def _timm_vit(**kwargs: Any) -> Any:
    try:
        from moco_d2.layers.timm_vit import ViT
    except ModuleNotFoundError as error:
        raise ValueError(f"a ViT needs timm ({error}): pip install 'moco_d2[vit]'") from error
    return ViT(**kwargs)


def sincos_position(side: int, dim: int) -> torch.Tensor:
    """Return MoCo v3's fixed position embedding: (1, 1 + side * side, dim), 0 for the class token.

    With D/4 frequencies f, a patch in row y and column x has sin(f y), cos(f y), sin(f x), cos(f x), in this order.

    Args:
        side: patches in a row and in a column.
        dim: D, a multiple of 4.
    """
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float32) / (dim // 4))
    angles = torch.arange(side, dtype=torch.float32)[:, None] * frequencies  # (side, D/4)
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, D/2)
    rows, columns = along[:, None].expand(-1, side, -1), along[None].expand(side, -1, -1)
    patches = torch.cat([rows, columns], dim=2).flatten(0, 1)  # (side * side, D)
    return torch.cat([torch.zeros(1, dim), patches])[None]


def _init_as_moco_v3(network: Any) -> None:
    """Set uniform weights (Glorot), the query, key and value projections as three matrices; biases are 0."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            bound = math.sqrt(6 / (inputs + (outputs // 3 if name.endswith("qkv") else outputs)))
            nn.init.uniform_(module.weight, -bound, bound)
            nn.init.zeros_(module.bias)
    projection = network.patch_embed.proj
    bound = math.sqrt(6 / (projection.weight[0].numel() + projection.out_channels))
    nn.init.uniform_(projection.weight, -bound, bound)
    nn.init.zeros_(projection.bias)
    nn.init.normal_(network.cls_token, std=1e-6)


class LastBlocks(nn.Module):
    """A ViT's class tokens after each of its last blocks, all under the ViT's own last norm, concatenated.

    DINO's linear classifiers of ViT-S take those of four blocks.
    """

    def __init__(self, network: Any, blocks: int) -> None:
        """Set up.

        Args:
            network: a ViT, with or without head.
            blocks: number of blocks, at most the ViT's.

        Raises:
            ValueError: the network is no ViT, or has fewer blocks.
        """
        super().__init__()
        depth = len(getattr(network, "blocks", ()))
        if depth < blocks:
            found = f"this one has {depth}" if depth else "this network is none"
            raise ValueError(f"the class tokens of the last {blocks} blocks need a ViT of as many blocks; {found}")
        self.network, self.count = network, blocks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (N, blocks * D) of (N, 3, H, W), the last block's at the end."""
        layers = self.network.get_intermediate_layers(x, n=self.count, return_prefix_tokens=True, norm=True)
        return torch.cat([prefix[:, 0] for _, prefix in layers], dim=1)


@torch.no_grad()
def class_attention(network: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the attention of the class token to every patch in the last block, of each head: (N, heads, h, w).

    A head's attention to the patches and to the class token itself is 1 in sum.

    Args:
        network: a ViT in evaluation mode.
        x: (N, 3, H, W).
    """
    attention = network.blocks[-1].attn
    grid = network.patch_embed.dynamic_feat_size(x.shape[2:])
    found: list[torch.Tensor] = []
    handle = attention.qkv.register_forward_hook(lambda module, inputs, output: found.append(output))
    try:
        network(x)
    finally:
        handle.remove()
    # Each (N, heads, tokens, D / heads).
    q, k, _ = found[0].unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    weights: torch.Tensor = (q[:, :, :1] @ k.transpose(2, 3) * attention.scale).softmax(dim=3)  # (N, heads, 1, tokens)
    maps: torch.Tensor = weights[:, :, 0, 1:].unflatten(2, grid)
    return maps


def network_for(facts: ViTFacts) -> Any:
    """Build the ViT that a backbone's facts describe, without head (``head`` is an identity).

    Raises:
        ValueError: the facts say that its position embedding has no class token's.
    """
    if not facts.class_token:
        raise ValueError("class_token is False; only ViTs with a class token can be built")
    network = build_vit(1, facts.dim, facts.depth, facts.heads, facts.patch, facts.image)
    network.head = nn.Identity()
    return network


def describe(network: nn.Module, pixels: Pixels | None = None, **kwargs: Any) -> ViTFacts:
    """Return a ViT's facts, by the shapes of its tensors and, for the number of heads, its first block.

    Args:
        network: a ViT with timm's names, with or without head.
        pixels: the input that it is trained with (default: ImageNet RGB).
        kwargs: ``origin`` and ``recipe``.

    Raises:
        ValueError: it is no plain ViT.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    heads = getattr(getattr(network, "blocks", [None])[0], "attn", None)
    if heads is None:
        raise ValueError("not a plain ViT with timm's names: its first block has no attn")
    return facts_from_shapes(shapes, heads.num_heads, pixels or Pixels(), **kwargs)


def facts_from_shapes(
    shapes: dict[str, torch.Size | tuple[int, ...]], heads: int, pixels: Pixels, **kwargs: Any
) -> ViTFacts:
    """Return the facts of a state dict under timm's names, by its shapes.

    Args:
        shapes: by name.
        heads: number of heads, which shapes do not show.
        pixels: the input.
        kwargs: ``origin`` and ``recipe``.

    Raises:
        ValueError: it is no plain ViT.
    """
    blocks = {int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name))}
    needed = ("patch_embed.proj.weight", "pos_embed", "cls_token")
    if blocks != set(range(len(blocks))) or not blocks or any(name not in shapes for name in needed):
        raise ValueError(
            f"not a plain ViT with timm's names: it needs {', '.join(needed)}, and blocks.0, blocks.1, ..."
        )
    dim, _, patch, _ = shapes["patch_embed.proj.weight"]
    rows = shapes["pos_embed"][1]
    side = math.isqrt(rows - 1)
    if side * side + 1 != rows:
        raise ValueError(f"not a ViT of square pictures with one class token: its position embedding has {rows} rows")
    return ViTFacts(
        patch=patch, dim=dim, depth=len(blocks), heads=heads, image=side * patch, pixels=pixels, **kwargs
    )  # fmt: skip

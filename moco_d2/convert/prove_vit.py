"""Proof of a ViT's conversion: the source's network and Detectron2's compute the same patch tokens.

Detectron2's ViT has no class token in its sequence, so that patches cannot attend to it, as they do in the source. The
proof compares like with like: timm's network, whose own forward runs without the class token, and Detectron2's ViT with
global attention and without relative positions, both before the last norm and at the size of pretraining. What leaving
the class token out changes, and what the two ways to resize the position embedding differ in, is measured apart.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moco_d2.convert.prove import (
    ProofError,
    as_the_source_prepares,
    can_prove,
    check_differences,
    drawn_scene,
    load_strictly,
    relative,
)
from moco_d2.convert.vit_names import CLASS_TOKEN, IN_DETECTOR
from moco_d2.facts import ViTFacts
from moco_d2.layers.encoders import network_for

TOKENS = "tokens"
_LARGER, _SMALLER = 1.5, 0.5  # than the pretraining size


def check_provable() -> None:
    """Check that the proof of a ViT can be made.

    Raises:
        ProofError: Detectron2 or timm is missing.
    """
    if not can_prove():
        raise ProofError("the proof cannot be made: detectron2 is not installed")
    if importlib.util.find_spec("timm") is None:
        raise ProofError(
            "the proof of a ViT cannot be made, because timm is missing: pip install 'moco_d2[vit]', or accept an "
            "unproven file with --no-proof"
        )


def prove_vit(
    facts: ViTFacts,
    source: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    picture: torch.Tensor | None = None,
) -> dict[str, float]:
    """Compare the patch tokens of timm's ViT with those of Detectron2's, in eval mode, on noise and on a picture.

    Args:
        facts: what both networks are built from.
        source: the tensors that were read, under timm's names.
        written: the tensors that were written, under a detector's names.
        picture: (3, H, W), RGB, 0..255, resized to the pretraining size; None: a drawn scene.

    Returns:
        ``tokens`` -> max|a - b| / max|a| over all features, the larger of the two pictures.

    Raises:
        ProofError: the difference reaches the limit, a network cannot hold its tensors, or a library is missing.
    """
    check_provable()
    differences = {TOKENS: 0.0}
    with torch.no_grad():
        original, copied = _without_class_token(_source(facts, source)), detectron2_vit(facts, written)
        for image in _pictures(facts.image, picture):
            # Detectron2's input is stated by the facts' config in pixels of 0..255, the source's in 0..1.
            wanted = {TOKENS: _tokens(original, as_the_source_prepares(image, facts.pixels))}
            difference = relative(wanted, copied(_as_detectron2_prepares(image, facts)))[TOKENS]
            # Not max(), which may lose a NaN.
            differences[TOKENS] = differences[TOKENS] if differences[TOKENS] > difference else difference
    check_differences(differences)
    return differences


def measure_apart(
    facts: ViTFacts, source: Mapping[str, torch.Tensor], written: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Measure where Detectron2's ViT differs from the source by its construction, on a drawn scene.

    Args:
        facts: what both networks are built from.
        source: the tensors that were read, under timm's names.
        written: those under a detector's names.

    Returns:
        Name -> mean|a - b| / mean|a| of the tokens. ``class token`` is the source with its class token in the sequence
        (left out if the file has none); ``larger`` and ``smaller`` are pictures of 1.5 and 0.5 times the pretraining
        size, for which pretraining (DINO's rule) and Detectron2 resize the position embedding in different ways.
    """
    with torch.no_grad():
        whole, copied = _source(facts, source), detectron2_vit(facts, written)
        bare = _without_class_token(whole)

        def compare(network: Any, side: int) -> float:
            image = _resized(drawn_scene(), side)
            own = _tokens(network, as_the_source_prepares(image, facts.pixels))
            other = copied(_as_detectron2_prepares(image, facts))[TOKENS]
            return float((own - other).abs().mean() / own.abs().mean())

        sides = {name: _side(facts, factor) for name, factor in (("larger", _LARGER), ("smaller", _SMALLER))}
        return ({"class token": compare(whole, facts.image)} if CLASS_TOKEN in source else {}) | {
            name: compare(bare, side) for name, side in sides.items()
        }


def _side(facts: ViTFacts, factor: float) -> int:
    return max(1, round(facts.image // facts.patch * factor)) * facts.patch


def _pictures(side: int, picture: torch.Tensor | None) -> list[torch.Tensor]:
    noise = torch.randn(3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return [_resized(drawn_scene() if picture is None else picture, side), 118 + 58 * noise]


def _resized(picture: torch.Tensor, side: int) -> torch.Tensor:
    resize = functools.partial(nn.functional.interpolate, size=(side, side), mode="bilinear", antialias=True)
    resized: torch.Tensor = resize(picture.double()[None])[0]
    return resized


def _as_detectron2_prepares(picture: torch.Tensor, facts: ViTFacts) -> torch.Tensor:
    config = facts.config()
    image = (picture if config["INPUT.FORMAT"] == "RGB" else picture.flip(0)).double()  # (3, H, W)
    mean, std = (
        torch.tensor(config[f"MODEL.PIXEL_{name}"], dtype=torch.float64)[:, None, None] for name in ("MEAN", "STD")
    )
    return ((image - mean) / std)[None]


def _source(facts: ViTFacts, tensors: Mapping[str, torch.Tensor]) -> Any:
    network = network_for(facts)
    # A file without them was accepted as such, and the tokens before the last norm need neither.
    fresh = [name for name in ("norm.", CLASS_TOKEN) if not any(key.startswith(name) for key in tensors)]
    load_strictly(network, tensors, "the source network", fresh)
    return network.eval().double()


def _without_class_token(network: Any) -> Any:
    """Return a copy of timm's network whose sequence has no class token, nor its position."""
    bare = copy.deepcopy(network)
    bare.cls_token, bare.num_prefix_tokens = None, 0
    bare.pos_embed = nn.Parameter(network.pos_embed[:, 1:])
    return bare


def _tokens(network: Any, image: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens before the last norm: (N, D, h, w)."""
    tokens: list[torch.Tensor] = network.forward_intermediates(image, indices=1, norm=False, intermediates_only=True)
    return tokens[0]


def detectron2_vit(facts: ViTFacts, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return Detectron2's ViT with global attention, in float64; ``tensors``: under a detector's names.

    Raises:
        ProofError: it cannot hold the tensors, or needs others.
    """
    from detectron2.modeling.backbone.vit import ViT

    from moco_d2.layers.timm_vit import EPS, import_former_place

    import_former_place()
    network = ViT(
        img_size=facts.image,
        patch_size=facts.patch,
        embed_dim=facts.dim,
        depth=facts.depth,
        num_heads=facts.heads,
        norm_layer=functools.partial(nn.LayerNorm, eps=EPS),
        pretrain_img_size=facts.image,
        pretrain_use_cls_token=facts.class_token,
        out_feature=TOKENS,
    )
    own = {name.removeprefix(IN_DETECTOR): tensor for name, tensor in tensors.items()}
    load_strictly(network, own, "Detectron2's network")
    return network.eval().double()

"""One ViT checkpoint per known layout, built around timm's tensors; the renaming is spelled here a second time."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moco_d2.facts import ViTFacts
from moco_d2.layers.vit import build_vit, describe, sincos_position

State = dict[str, torch.Tensor]
SHAPE: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "patch": 8, "image": 32}
RECIPE = {"origin": "a run of the tests", "recipe": "a_recipe"}


@functools.cache
def network(seed: int = 0) -> Any:
    """A ViT in which every tensor does something, as after training: with fresh ones many mistakes do not show."""
    torch.manual_seed(seed)
    net = build_vit(3, **SHAPE)
    for name, tensor in net.named_parameters():
        nn.init.normal_(tensor, mean=1.0 if "norm" in name and "weight" in name else 0.0, std=0.2)
    return net


def trunk(seed: int = 0) -> State:
    return {key: value.clone() for key, value in network(seed).state_dict().items() if not key.startswith("head.")}


def facts() -> ViTFacts:
    return describe(network(), **RECIPE)


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def head(prefix: str = "head.") -> State:
    return {f"{prefix}weight": torch.ones(3, 32), f"{prefix}bias": torch.ones(3)}


def fixed(mae: bool) -> State:
    """A trunk with the fixed position embedding of MoCo v3 (row first) or MAE (column first)."""
    position = sincos_position(4, 32)
    if mae:
        position = torch.cat([position[..., 16:], position[..., :16]], dim=2)
    return trunk() | {"pos_embed": position}


def _own_training() -> dict[str, Any]:
    model = under("teacher.net.", trunk()) | under("student.net.", trunk(1)) | head("teacher.head.")
    return {"model": model, "facts": facts().as_dict(), "backbone": {"method": "DINO", "prefix": "teacher.net."}}


def _moco_v3() -> dict[str, Any]:
    base = fixed(mae=False) | {"head.0.weight": torch.ones(4, 32), "head.1.running_mean": torch.ones(4)}
    state = under("module.base_encoder.", base) | under("module.momentum_encoder.", trunk(1) | head())
    return {"epoch": 300, "arch": "vit_small", "state_dict": state | head("module.predictor.0."), "optimizer": {}}


def _dino() -> dict[str, Any]:
    teacher = under("backbone.", trunk()) | head("head.mlp.0.")
    student = under("module.backbone.", trunk(1)) | head("module.head.mlp.0.")
    return {"student": student, "teacher": teacher, "args": argparse.Namespace(arch="vit_small"), "epoch": 3}


def _mae() -> dict[str, Any]:
    decoder = {"mask_token": torch.ones(1, 1, 8), "decoder_pos_embed": torch.ones(1, 17, 8)}
    decoder |= {"decoder_embed.weight": torch.ones(8, 32), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return {"model": fixed(mae=True) | decoder}


def _mae_finetuned() -> dict[str, Any]:
    state = {key: value for key, value in trunk().items() if not key.startswith("norm.")}
    return {"model": state | head("fc_norm.") | head(), "args": argparse.Namespace(nb_classes=3)}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every key by the rules that match it, in turn."""
    out = {}
    for key, value in state.items():
        for pattern, new in rules:
            key = re.sub(pattern, new, key)
        out[key] = value
    return out


def hugging_face(state: State) -> State:
    split = {}
    for key, value in state.items():
        parts = ("query", "key", "value") if ".qkv." in key else ()
        split |= {key.replace("qkv", part): value[n * 32 : (n + 1) * 32] for n, part in enumerate(parts)}
        split |= {} if parts else {key: value}
    return renamed(
        split,
        (r"^cls_token", "embeddings.cls_token"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.(\d+)\.", r"encoder.layer.\1."),
        (r"\.norm1\.", ".layernorm_before."),
        (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.attn\.", ".attention.attention."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."),
    )


def torchvision(state: State, first: str = "mlp.linear_1", second: str = "mlp.linear_2") -> State:
    return renamed(
        state,
        (r"^cls_token", "class_token"),
        (r"^pos_embed", "encoder.pos_embedding"),
        (r"^patch_embed\.proj", "conv_proj"),
        (r"^norm\.", "encoder.ln."),
        (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
        (r"\.norm(\d)\.", r".ln_\1."),
        (r"\.attn\.qkv\.", ".self_attention.in_proj_"),
        (r"\.attn\.proj\.", ".self_attention.out_proj."),
        (r"mlp\.fc1", first),
        (r"mlp\.fc2", second),
    )


# source -> the file; those without facts of their own need --heads, because their tokens are too small for any rule.
LAYOUTS: dict[str, Callable[[], dict[str, Any]]] = {
    "moco_d2-vit": lambda: {"state_dict": trunk(), "facts": facts().as_dict()},
    "moco_d2-training-vit": _own_training,
    "detectron2-vit": lambda: {
        "model": under("backbone.net.", {k: v for k, v in trunk().items() if not re.match(r"cls_token|norm\.", k)})
        | head("roi_heads.box_predictor.cls_score.")
    },
    "moco_v3-vit": _moco_v3,
    "moco_v3-vit-backbone": lambda: {"state_dict": under("module.", fixed(mae=False) | head()), "epoch": 90},
    "dino-vit": _dino,
    "dino-vit-student": _dino,
    "mae": _mae,
    "mae-finetuned": _mae_finetuned,
    "dinov2": lambda: dict(trunk() | {"mask_token": torch.ones(1, 32)}),
    "dino-vit-backbone": trunk,
    "deit": lambda: {"model": trunk() | head()},
    "timm-vit": lambda: {"state_dict": trunk(1) | head(), "state_dict_ema": trunk() | head(), "arch": "vit_tiny"},
    "transformers-vit-mae": lambda: under("vit.", hugging_face(trunk())) | head("decoder.decoder_embed."),
    "transformers-vit": lambda: under("vit.", hugging_face(trunk())) | head("classifier."),
    "transformers-vit-imagenet": lambda: hugging_face(trunk()) | head("pooler.dense."),
    "torchvision-vit": lambda: torchvision(trunk()) | head("heads.head."),
}
# Files that show no input, or hold two networks of which the other is meant.
ASKED = ("dino-vit-student", "timm-vit", "transformers-vit", "transformers-vit-imagenet")

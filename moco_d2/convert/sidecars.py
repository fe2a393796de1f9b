"""Sidecar files of Hugging Face's hub: JSON in the folder of the weights that declares the network and its input.

A missing or unreadable file is ignored, and the defaults of the source's record apply. A file that declares the
impossible is an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moco_d2.facts import Pixels
from moco_d2.io.checkpoints import CheckpointError

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
VIT_EPSILON = 1e-6  # of the norms of the ViTs built here


@dataclass(frozen=True)
class Sidecars:
    """What sidecar files declare.

    Attributes:
        file: the name of the one that may declare the input.
        pixels: the input; None: not declared.
        stride_in_1x1: where bottlenecks stride; None: not declared.
        heads: of a ViT's attention; None: not declared.
        notes: for the report.
    """

    file: str
    pixels: Pixels | None = None
    stride_in_1x1: bool | None = None
    heads: int | None = None
    notes: tuple[str, ...] = ()


def read_sidecar(path: Any, name: str = CONFIG) -> dict[str, Any]:
    """Return the content of a JSON file in the folder of the checkpoint ``path``, or nothing."""
    try:
        content = json.loads((_folder(path) / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def read_timm(path: Any) -> Sidecars:
    """Return the input, and perhaps a ViT's number of heads, that timm's ``config.json`` declares.

    Raises:
        CheckpointError: the mean or std is impossible.
    """
    config = read_sidecar(path)
    trained, arguments = config.get("pretrained_cfg"), config.get("model_args")
    fed = {"image_mean": trained.get("mean"), "image_std": trained.get("std")} if isinstance(trained, dict) else {}
    heads = arguments.get("num_heads") if isinstance(arguments, dict) else None
    return Sidecars(CONFIG, _pixels(fed, path, CONFIG), heads=heads if type(heads) is int else None)


def read_transformers(path: Any) -> Sidecars:
    """Return what the ``config.json`` and ``preprocessor_config.json`` of transformers declare.

    Raises:
        CheckpointError: Detectron2's ResNet cannot compute this network, or the mean or std is impossible.
    """
    config = read_sidecar(path)
    if config.get("hidden_act", "relu") != "relu":
        raise CheckpointError(
            f"{path}: its config.json says that hidden_act is {config['hidden_act']!r}; only networks with relu can be "
            "converted"
        )
    if config.get("downsample_in_first_stage"):
        raise CheckpointError(
            f"{path}: its config.json has downsample_in_first_stage; Detectron2's ResNet has stride 1 in that stage, "
            "so this network cannot be converted"
        )
    pixels, notes = _preprocessed(path, "ImageNet's are assumed")
    stride = bool(config.get("downsample_in_bottleneck")) if config else None
    return Sidecars(PREPROCESSOR, pixels, stride, notes=notes)


def read_transformers_vit(path: Any) -> Sidecars:
    """Return what the ``config.json`` and ``preprocessor_config.json`` of transformers declare of a ViT.

    Raises:
        CheckpointError: Detectron2's ViT cannot compute this network, or the mean or std is impossible.
    """
    config = read_sidecar(path)
    if config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(
            f"{path}: its config.json says that hidden_act is {config['hidden_act']!r}; Detectron2's ViT has gelu, so "
            "only networks with gelu can be converted"
        )
    pixels, notes = _preprocessed(path, "they must be chosen")
    epsilon, heads = config.get("layer_norm_eps"), config.get("num_attention_heads")
    if isinstance(epsilon, float) and epsilon != VIT_EPSILON:
        notes += (
            f"the epsilon of its norms is {epsilon:g} by its config.json, here {VIT_EPSILON:g}: where features vary "
            f"little (a variance near {VIT_EPSILON:g}), they differ from the source's",
        )
    return Sidecars(PREPROCESSOR, pixels, heads=heads if type(heads) is int else None, notes=notes)


def _preprocessed(path: Any, otherwise: str) -> tuple[Pixels | None, tuple[str, ...]]:
    """Return the input that the preprocessor declares, and a note if it is there but does not."""
    pixels = _pixels(read_sidecar(path, PREPROCESSOR), path, PREPROCESSOR)
    unclear = pixels is None and (_folder(path) / PREPROCESSOR).exists()
    return pixels, (f"its {PREPROCESSOR} holds no readable mean and std: {otherwise}",) if unclear else ()


def _folder(path: Any) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent  # a checkpoint of several files is given by folder


def _pixels(fed: Mapping[str, Any], path: Any, name: str) -> Pixels | None:
    """Return what an image processor makes of pixels, (pixel * factor - mean) / std, in Detectron2's units."""
    try:
        factor = fed.get("rescale_factor", 1 / 255) if fed.get("do_rescale", True) else 1
        statistics: list[Any] = [fed.get("image_mean"), fed.get("image_std")]
        if not fed.get("do_normalize", True):
            statistics = [[0.0] * 3, [1.0] * 3]
        if None in statistics:
            return None
        # Rounded, because 0.224 * 255 is not quite 57.12.
        scaled: list[Any] = [[round(float(value) / factor, 6) for value in values] for values in statistics]
        return Pixels("RGB", *scaled)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: the {name} in its folder declares an impossible input ({error}); correct it, or move it away"
        ) from error

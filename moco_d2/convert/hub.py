"""What Hugging Face's hub keeps beside a weight file: how the network is built, and how it is fed.

What is not there, or cannot be read, says nothing, and the source's record holds; what says the impossible is an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moco_d2.convert.sources import CheckpointSource
from moco_d2.facts import Pixels
from moco_d2.io.checkpoints import CheckpointError

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"


def read_beside(path: Any, name: str = _CONFIG) -> dict[str, Any]:
    """Return the content of a JSON file in the folder of ``path``, or nothing."""
    try:
        content = json.loads((_folder(path) / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _folder(path: Any) -> Path:
    return Path(path) if Path(path).is_dir() else Path(path).parent  # a checkpoint in several parts may be given so


def told_beside(source: CheckpointSource, path: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the facts that weights do not show, by the files beside ``path`` or else by the source's record.

    Returns:
        ``pixels`` and ``stride_in_1x1`` of the facts, and notes.

    Raises:
        CheckpointError: Detectron2's ResNet cannot compute what they say, or the mean or std is impossible.
    """
    config, name, stride = read_beside(path), _CONFIG, source.stride_in_1x1
    trained = config.get("pretrained_cfg")  # timm's
    fed = {"image_mean": trained.get("mean"), "image_std": trained.get("std")} if isinstance(trained, dict) else {}
    if source.key.startswith("transformers"):
        name, fed = _PREPROCESSOR, read_beside(path, _PREPROCESSOR)
        if config:
            _check_network(config, path)
            stride = bool(config.get("downsample_in_bottleneck"))
    try:
        pixels = _pixels(fed)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise CheckpointError(f"{path}: the {name} beside it cannot be followed: {error}") from error
    notes = []
    if pixels is None and name == _PREPROCESSOR and (_folder(path) / name).exists():
        notes.append(f"the {name} beside the file says no mean and std that can be read: ImageNet's are assumed")
    if pixels not in (None, source.pixels):
        notes.append(f"mean and std of the pixels are those of the {name} beside the file")
    return {"pixels": pixels or source.pixels, "stride_in_1x1": stride}, notes


def _check_network(config: dict[str, Any], path: Any) -> None:
    if config.get("hidden_act", "relu") != "relu":
        raise CheckpointError(f"{path}: its activation is {config['hidden_act']}; Detectron2's ResNet has ReLU")
    if config.get("downsample_in_first_stage"):
        raise CheckpointError(f"{path}: strides in the first stage (its config.json); Detectron2's ResNet cannot")


def _pixels(fed: dict[str, Any]) -> Pixels | None:
    """Return what an image processor makes of pixels, (pixel * factor - mean) / std, in Detectron2's units."""
    factor = fed.get("rescale_factor", 1 / 255) if fed.get("do_rescale", True) else 1
    statistics: list[Any] = [fed.get("image_mean"), fed.get("image_std")]
    if not fed.get("do_normalize", True):
        statistics = [[0.0] * 3, [1.0] * 3]
    if None in statistics:
        return None
    # Rounded, because 0.224 * 255 is not quite 57.12.
    scaled: list[Any] = [[round(float(value) / factor, 6) for value in values] for values in statistics]
    return Pixels("RGB", *scaled)

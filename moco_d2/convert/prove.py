"""Proof of a conversion: two networks compute the same features of two pictures.

A wrong name, a wrong stride or a wrong block gives other features, even if every key was mapped. The source network is
torchvision's with the tensors that were read. The other network is Detectron2's, built from the facts, with the tensors
that were written.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moco_d2.convert.parts import LEVELS, PART_PREFIXES, Component, needs, part_of, rebuild
from moco_d2.facts import BASIC_BUILDER, Pixels, ResNetFacts
from moco_d2.io.pictures import describe, open_picture, upright_rgb
from moco_d2.layers.resnet import network_for

STAGES = ("res2", "res3", "res4", "res5")
# Both networks compute in float64: in float32, rounding in the preparation of a picture can grow beyond this limit if
# norms have small variances, as early in training. Any mistake gives differences of percents.
TOLERANCE = 1e-5
_SIDE, _SMALLEST = 512, 32  # pixels of a user's picture
_NOISE = (3, 64, 96)  # not square, so that a swap of height and width shows


class ProofError(ValueError):
    """The converted network computes other features than its source, or the proof cannot be made."""


def can_prove() -> bool:
    """Return whether Detectron2 is installed, which the proof needs."""
    return importlib.util.find_spec("detectron2") is not None


def prove(
    facts: ResNetFacts,
    source: Mapping[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
    picture: torch.Tensor | None = None,
    source_pixels: Pixels | None = None,
) -> dict[str, float]:
    """Compare the source network with Detectron2's, stage by stage, in eval mode, on noise and on a picture.

    Each network gets the pictures as its own pipeline prepares them: 0..1 with mean and std for the source; the
    config's ``INPUT.FORMAT``, ``PIXEL_MEAN`` and ``PIXEL_STD`` for Detectron2.

    Args:
        facts: what both networks are built from.
        source: the tensors that were read, under torchvision's names.
        written: the tensors that were written, under Detectron2's names.
        picture: (3, H, W), RGB, 0..255; None: a drawn scene.
        source_pixels: the input of ``source``, if ``written`` takes another (:mod:`moco_d2.convert.bake`).

    Returns:
        Stage name -> max|a - b| / max|a| over all features of the stage, the larger of the two pictures.

    Raises:
        ProofError: a difference reaches ``TOLERANCE``, a network cannot hold its tensors, or Detectron2 is missing.
    """
    if not can_prove():
        raise ProofError("the proof cannot be made: detectron2 is not installed")
    differences = dict.fromkeys(STAGES, 0.0)
    with torch.no_grad():
        original = _source_network(facts, source)
        config = _detectron2_config(facts)
        copy = _detectron2_network(config, written)
        for image in (drawn_scene() if picture is None else picture, _noise()):
            wanted = _stages(original, as_the_source_prepares(image, source_pixels or facts.pixels))
            for stage, difference in relative(wanted, copy(_as_detectron2_prepares(image, config))).items():
                # Not max(), which may lose a NaN.
                differences[stage] = differences[stage] if differences[stage] > difference else difference
    check_differences(differences)
    return differences


def prove_parts(
    facts: ResNetFacts,
    source: Mapping[str, torch.Tensor],
    parts: Sequence[Component],
    written: Mapping[str, torch.Tensor],
    source_pixels: Pixels | None = None,
) -> dict[str, float]:
    """Compare torchvision's pyramid and box head with Detectron2's, in eval mode, on noise.

    Each pyramid gets the features of its own ResNet, so that swapped levels show.

    Args:
        facts: what both networks are built from.
        source: the backbone that was read, under torchvision's names.
        parts: those that were read.
        written: everything that was written, under Detectron2's names.
        source_pixels: as in :func:`prove`.

    Returns:
        Level (``p2``, ..., if the source trains all layers that it is made of) or ``box_head`` -> largest relative
        difference, as in :func:`prove`.

    Raises:
        ProofError: as in :func:`prove`.
    """
    differences: dict[str, float] = {}
    with torch.no_grad():
        for component in parts:
            if component.part.name == "fpn":
                image = as_the_source_prepares(_noise(), source_pixels or facts.pixels)
                features = _stages(_source_network(facts, source), image)
                differences |= relative(*_pyramids(component, facts, features, written))
            else:
                differences |= relative(*_box_heads(component, facts, written))
    check_differences(differences)
    return differences


def _pyramids(
    component: Component,
    facts: ResNetFacts,
    features: dict[str, torch.Tensor],
    written: Mapping[str, torch.Tensor],
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return the levels of both pyramids; ``features``: of the source's ResNet."""
    original = _source_part(component, facts)
    wanted = {f"p{stage[-1]}": feature for stage, feature in original(features).items()}
    config = _detectron2_config(facts)
    if config.MODEL.BACKBONE.NAME != BASIC_BUILDER:  # which builds a pyramid for FPN.IN_FEATURES
        config.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    config.MODEL.FPN.IN_FEATURES = list(STAGES)
    _set_needs(config, component)
    copy = _detectron2_backbone(config)
    tensors = {
        name.removeprefix("backbone.") if part_of(name) == "fpn" else f"bottom_up.{name}": tensor
        for name, tensor in written.items()
        if part_of(name) != "box_head"
    }
    roles = [layer.role for layer in component.part.layers]
    fresh = [
        f"fpn_{kind}{level}." for kind in ("lateral", "output") for level in LEVELS if f"{kind}{level}" not in roles
    ]
    load_strictly(copy, tensors, "Detectron2's pyramid", fresh)
    got = copy.double()(_as_detectron2_prepares(_noise(), config))
    # A level is made of its own output layer and of all laterals from the top down to it.
    whole = [f"p{n}" for n in LEVELS if {f"output{n}", *(f"lateral{m}" for m in LEVELS if m >= n)} <= set(roles)]
    return {level: wanted[level] for level in whole}, {level: got[level] for level in whole}


def _box_heads(
    component: Component, facts: ResNetFacts, written: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead

    config: Any = get_cfg()
    _set_needs(config, component)
    channels, side = config.MODEL.ROI_BOX_HEAD.CONV_DIM, config.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION
    regions = torch.randn(4, channels, side, side, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    copy = FastRCNNConvFCHead(config, ShapeSpec(channels=channels, height=side, width=side)).eval()
    prefix = PART_PREFIXES["box_head"]
    own = {name.removeprefix(prefix): tensor for name, tensor in written.items() if name.startswith(prefix)}
    load_strictly(copy, own, "Detectron2's box head")
    return {"box_head": _source_part(component, facts)(regions)}, {"box_head": copy.double()(regions)}


def _source_part(component: Component, facts: ResNetFacts) -> Any:
    network, tensors = rebuild(component, facts), component.as_torchvision()
    held = {name.rpartition(".")[0] for name in tensors}
    fresh = [name for name in network.state_dict() if name.rpartition(".")[0] not in held]
    load_strictly(network, tensors, "the source's part", fresh)
    return network.eval().double()


def _set_needs(config: Any, component: Component) -> None:
    wanted = needs({name: tuple(tensor.shape) for name, tensor in component.tensors.items()})
    # In one process SyncBN computes what BN does, which also runs without a GPU.
    wanted = {key: "BN" if value == "SyncBN" else value for key, value in wanted.items()}
    config.merge_from_list([item for pair in wanted.items() for item in pair])


def check_differences(differences: Mapping[str, float]) -> None:
    """Refuse differences that reach the limit.

    Raises:
        ProofError: one does.
    """
    # "not <", so that a NaN fails.
    if wrong := {stage: d for stage, d in differences.items() if not d < TOLERANCE}:
        shown = ", ".join(f"{stage} by {d:.1e}" for stage, d in wrong.items())
        raise ProofError(f"the proof failed: features differ at {shown} (limit {TOLERANCE:.0e})")


def other_padding(
    facts: ResNetFacts, source: Mapping[str, torch.Tensor], padding: str, source_pixels: Pixels | None = None
) -> dict[str, float]:
    """Measure how much torchvision's padding, which is Detectron2's too, changes the features of a picture.

    Args:
        facts: what the network is built from.
        source: its tensors under torchvision's names.
        padding: ``pool`` (SAME in the max-pooling) or ``all`` (SAME everywhere), as TensorFlow and JAX pad.
        source_pixels: as in :func:`prove`.

    Returns:
        Stage name -> mean|a - b| / mean|a|.
    """
    with torch.no_grad():
        network = _source_network(facts, source)
        image = as_the_source_prepares(drawn_scene(), source_pixels or facts.pixels)
        even = _stages(network, image)
        for module in [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.MaxPool2d)]:
            strided = module.stride in (2, (2, 2)) and module.padding not in (0, (0, 0))
            if strided and (padding == "all" or isinstance(module, torch.nn.MaxPool2d)):
                _pad_as_same(module)
        own = _stages(network, image)
    return {s: ((own[s] - even[s]).abs().mean() / own[s].abs().mean()).item() for s in STAGES}


def _pad_as_same(module: Any) -> None:
    """Make a strided layer pad as TensorFlow's SAME does for even sizes: the extra row and column below and right."""
    kernel = module.kernel_size if isinstance(module.kernel_size, int) else module.kernel_size[0]
    before, after = (kernel - 2) // 2, (kernel - 1) // 2
    fill = float("-inf") if isinstance(module, torch.nn.MaxPool2d) else 0.0
    module.padding = 0 if isinstance(module, torch.nn.MaxPool2d) else (0, 0)
    module.register_forward_pre_hook(
        lambda _, inputs: torch.nn.functional.pad(inputs[0], (before, after, before, after), value=fill)
    )


def read_picture(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read a picture for :func:`prove`: (3, H, W), RGB, 0..255, shrunk to at most 512 pixels a side.

    Raises:
        ValueError: the file is missing, too small, or not a readable picture.
    """
    try:
        with open(path, "rb") as file:
            picture = upright_rgb(open_picture(file))
    except Exception as error:  # damaged files make decoders raise anything
        raise ValueError(f"{path}: cannot be read as a picture ({describe(error)}); give a JPEG or PNG file") from error
    picture.thumbnail((_SIDE, _SIDE))
    if min(picture.size) < _SMALLEST:
        raise ValueError(
            f"{path}: {picture.width}x{picture.height} pixels; a proof needs at least {_SMALLEST} on each side"
        )
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()


def drawn_scene(height: int = 128, width: int = 160) -> torch.Tensor:
    """Draw a picture with shades, edges and texture, different in every channel: (3, H, W), RGB, 0..255."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    sky = torch.stack([120 + 60 * y, 150 + 50 * y, 230 - 40 * y])
    ground = torch.stack([90 + 40 * torch.sin(40 * x), 110 + 25 * torch.sin(55 * y), 50 + 20 * x])
    picture = torch.where(y < 0.6 + 0.05 * torch.sin(9 * x), sky, ground)
    disc = (x - 0.7) ** 2 + (y - 0.3) ** 2 < 0.03
    house = (x - 0.3).abs().lt(0.12) & (y - 0.55).abs().lt(0.2)
    picture = torch.where(disc, torch.tensor([250.0, 220.0, 60.0])[:, None, None], picture)
    picture = torch.where(house, torch.tensor([170.0, 60.0, 45.0])[:, None, None], picture)
    grain = torch.randn(3, height, width, generator=torch.Generator().manual_seed(1))
    return (picture + 6 * grain).clamp(0, 255).round()


def _noise() -> torch.Tensor:
    """Return noise of the brightness and contrast of pictures: (3, H, W), RGB."""
    noise = torch.randn(_NOISE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return 118 + 58 * noise


def as_the_source_prepares(picture: torch.Tensor, pixels: Pixels) -> torch.Tensor:
    """Return a picture as most pipelines prepare it, from 0..1: (1, 3, H, W) of float64."""
    image = (picture if pixels.order == "RGB" else picture.flip(0)).double()  # (3, H, W)
    mean, std = (_column(values) / 255 for values in (pixels.mean, pixels.std))
    return ((image / 255 - mean) / std)[None]


def _as_detectron2_prepares(picture: torch.Tensor, config: Any) -> torch.Tensor:
    image = (picture if config.INPUT.FORMAT == "RGB" else picture.flip(0)).double()  # (3, H, W)
    mean, std = (_column(values) for values in (config.MODEL.PIXEL_MEAN, config.MODEL.PIXEL_STD))
    return ((image - mean) / std)[None]


def _column(values: Sequence[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None, None]


def relative(wanted: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return name -> max|a - b| / max|a|.

    Raises:
        ProofError: shapes differ, or there is nothing to compare.
    """
    differences = {}
    for stage, a in wanted.items():  # (N, C, H', W')
        b = got[stage]
        if a.shape != b.shape:
            raise ProofError(f"the proof failed: {stage} is {tuple(b.shape)}, in the source {tuple(a.shape)}")
        largest = a.abs().max().item()
        if not 0 < largest < float("inf"):
            raise ProofError(
                f"the proof cannot be made: the source network's {stage} is zero or not finite ({largest})"
            )
        differences[stage] = (a - b).abs().max().item() / largest
    return differences


def _source_network(facts: ResNetFacts, tensors: Mapping[str, torch.Tensor]) -> Any:
    network = network_for(facts)
    load_strictly(network, tensors, "the source network")
    return network.eval().double()


def _stages(network: Any, image: torch.Tensor) -> dict[str, torch.Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(image))))  # (N, C, H/4, W/4)
    features = {}
    for stage, layer in zip(STAGES, (network.layer1, network.layer2, network.layer3, network.layer4), strict=True):
        features[stage] = x = layer(x)
    return features


def _detectron2_config(facts: ResNetFacts) -> Any:
    # Imported here, because conversion itself works without Detectron2.
    from detectron2.config import get_cfg

    cfg: Any = get_cfg()
    settings: dict[str, Any] = {
        **facts.config(),
        "MODEL.RESNETS.OUT_FEATURES": list(STAGES),
        "MODEL.RESNETS.NORM": facts.norm,
        "MODEL.BACKBONE.FREEZE_AT": 0,
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    return cfg


def _detectron2_network(config: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    network = _detectron2_backbone(config)
    load_strictly(network, tensors, "Detectron2's network")
    return network.double()


def _detectron2_backbone(config: Any) -> Any:
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone

    from moco_d2 import basic_resnet  # noqa: F401  (registers its builder)

    return build_backbone(config, ShapeSpec(channels=3)).eval()


def load_strictly(
    network: torch.nn.Module, tensors: Mapping[str, torch.Tensor], which: str, fresh: Sequence[str] = ()
) -> None:
    """Load strictly, except for batch counters, which were dropped on purpose, and names with a start in ``fresh``.

    Raises:
        ProofError: the network cannot hold the tensors, or needs others.
    """
    try:
        keys = network.load_state_dict(dict(tensors), strict=False)
    except RuntimeError as error:  # a shape
        raise ProofError(
            f"the proof failed: {which} cannot hold the tensors: {' '.join(str(error).split())}"
        ) from error
    missing = [key for key in keys.missing_keys if not key.endswith("num_batches_tracked")]
    missing = [key for key in missing if not key.startswith(tuple(fresh))]
    if missing or keys.unexpected_keys:
        raise ProofError(f"the proof failed: {which} lacks {missing} and has no place for {keys.unexpected_keys}")

"""Checked loading of weights: a detector starts from a complete backbone that is fed as in pretraining, or not at all.

Detectron2 only warns of tensors that a file does not fill, and trains them from random values; and it cannot know that
a file needs RGB. Either mistake costs a whole schedule and looks like a bad pretraining method, so both are errors.
Only ``MODEL.WEIGHTS ""`` means random initialisation.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import SimpleFeaturePyramid
from torch import nn

from moco_d2.convert.parts import PART_PREFIXES, needs, part_of
from moco_d2.detection.backbones import MSRA
from moco_d2.detection.checkpointer import load_content
from moco_d2.detection.weight_file import COUNTER, convert_hint, read_weight_file
from moco_d2.facts import CAFFE_BGR, VIT_BUILDER, BackboneFacts, Pixels, ResNetFacts, ViTFacts
from moco_d2.io.checkpoints import facts_in, some
from moco_d2.io.version import FileVersion
from moco_d2.running.weights import local_path

logger = logging.getLogger(__name__)

# MODEL.WEIGHTS of the configs for which the user must choose weights (configs/Base/init-moco.yaml).
REQUIRED = "REQUIRED"

_SHOWN = 3  # tensors named in an error

_VIT = "backbone.net."  # what precedes timm's names in a detector on a ViT
_RELATIVE = (".rel_pos_h", ".rel_pos_w")  # relative positions, which pretraining does not have
# What pretraining has, and Detectron2's ViT does not: it is made of the patches alone, and its pyramid has norms.
_LEFT_OUT = ("cls_token", "norm.weight", "norm.bias")


@dataclass
class WeightsRecord:
    """The weights that a detector started from. The facts are saved in every checkpoint, as in a backbone's file.

    Attributes:
        path: ``MODEL.WEIGHTS``, empty for random initialisation.
        facts: the file's facts, or the config's if the file has none.
        source_sha256: SHA-256 of the file that it was converted from; empty if it does not say so.
        version: version of the file that was read; None for random initialisation.
    """

    path: str
    facts: BackboneFacts
    source_sha256: str = ""
    version: FileVersion | None = field(default=None, compare=False)

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 of the file that was read; empty for random initialisation.

        Raises:
            ValueError: the file has changed since.
        """
        return self.version.sha256() if self.version else ""

    def files(self) -> dict[str, str]:
        """Return the path and the two SHA-256, as results and checkpoints record them."""
        return {"path": self.path, "sha256": self.sha256, "source_sha256": self.source_sha256}

    def state_dict(self) -> dict[str, Any]:
        """Return the facts; Detectron2's checkpointer calls this."""
        return self.facts.as_dict()

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        """Restore the facts from a checkpoint that is resumed."""
        self.facts = BackboneFacts.from_dict(facts)


def pretrained_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that pretraining must fill: the ResNet, and conv5 if it is the box head (C4).

    Of a ViT they are all but the relative positions. The norm that :class:`Res5ROIHeadsExtraNorm` adds is new, and no
    computation reads ``num_batches_tracked``: both are left out.
    """
    backbone = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    if _is_vit(model):
        backbone = _VIT
    return [
        name
        for name in all_names(model)
        if name.startswith((backbone, "roi_heads.res5."))
        and not name.startswith("roi_heads.res5.norm.")
        and not name.endswith(_RELATIVE)
    ]


def _is_vit(model: nn.Module) -> bool:
    return isinstance(getattr(model, "backbone", None), SimpleFeaturePyramid)


def all_names(model: nn.Module) -> list[str]:
    """Return the names of the tensors that a file must fill to be evaluated or resumed."""
    return [name for name in model.state_dict() if not name.endswith(COUNTER)]


def check_source(path: str) -> None:
    """Check that ``MODEL.WEIGHTS`` is empty or names an existing file; an address is downloaded.

    Raises:
        ValueError: it is the placeholder of the shipped configs, or the file does not exist.
    """
    _refuse_placeholder(path)
    if path:
        local_path(path)


def _refuse_placeholder(path: str) -> None:
    if path == REQUIRED:
        raise ValueError(
            "this config starts from weights of your choice, but MODEL.WEIGHTS is not set.\n"
            "  Pass MODEL.WEIGHTS PATH, a file written by moco-d2 convert, "
            'or use the config with the suffix _random (MODEL.WEIGHTS "")'
        )


def load_weights(
    checkpointer: DetectionCheckpointer,
    cfg: CfgNode,
    path: str,
    names: Callable[[nn.Module], Sequence[str]] = pretrained_names,
    checkpointables: Sequence[str] | None = (),
) -> WeightsRecord:
    """Load a file into a detector, or raise an error that tells why it may not be used.

    Args:
        checkpointer: the detector's.
        cfg: config of the detector.
        path: a path, an address that Detectron2 knows, or empty for random initialisation.
        names: the tensors that the file must fill: :func:`pretrained_names`, or :func:`all_names` to evaluate.
        checkpointables: what else is loaded (optimizer, ...); ``None`` for everything that is registered.

    Returns:
        The record of the weights.

    Raises:
        ValueError: the file does not exist or is of another kind; its facts contradict the config; or tensors are
            missing, of another shape, not floating-point, or non-finite.
    """
    _refuse_placeholder(path)
    if not path:
        logger.info("MODEL.WEIGHTS is empty: the detector starts from random weights")
        return random_weights(cfg)
    model = checkpointer.model
    file = read_weight_file(path, model.state_dict().keys())
    content = _as_in_vit(file.content, model, path) if _is_vit(model) else file.content
    source = str(content.get("source_sha256", ""))
    record = replace(_check_facts(content, cfg, path), source_sha256=source, version=file.version)
    with _record_filled(model) as filled:
        load_content(checkpointer, content, path, checkpointables)
    wanted = names(model)
    missing = [name for name in wanted if name not in filled]
    if missing:
        raise ValueError(_explain_missing(path, content, model, missing, len(wanted)))
    state = model.state_dict()
    beside = [name for name in all_names(model) if name in filled and name not in wanted]
    cast = [n for n in (*wanted, *beside) if state[n].is_floating_point() and not filled[n].is_floating_point]
    if cast:
        raise ValueError(
            f"{path}: {len(cast)} tensors hold {filled[cast[0]]}, not floating-point numbers ({some(cast, _SHOWN)}), "
            "and would be rounded or cut: use the weights from before they were quantised"
        )
    broken = [name for name in (*wanted, *beside) if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors hold NaN or infinity ({some(broken, _SHOWN)}), so the run that wrote them "
            "had diverged: use an earlier checkpoint"
        )
    logger.info("%s fills all %d tensors that it must fill", path, len(wanted))
    if names is pretrained_names:
        _check_parts(path, content, cfg, model, filled)
        # Derived from what was filled, because files without facts, such as a trained detector's, have parts too.
        parts = tuple(dict.fromkeys(_part(name) for name in beside))
        record.facts = replace(record.facts, parts=parts)
        if parts:
            logger.info("%s also fills %s: another protocol than with a backbone alone", path, ", ".join(parts))
    return record


def random_weights(cfg: CfgNode) -> WeightsRecord:
    """Return the record of a detector that starts from random values."""
    return WeightsRecord("", replace(facts_of(cfg), origin="random initialisation"))


def facts_of(cfg: CfgNode) -> BackboneFacts:
    """Return the facts that a config implies for its backbone and pixels."""
    pixels = Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD))
    if cfg.MODEL.BACKBONE.NAME == VIT_BUILDER:
        vit = cfg.MODEL.VIT
        return ViTFacts(
            patch=vit.PATCH_SIZE, dim=vit.EMBED_DIM, depth=vit.DEPTH, heads=vit.NUM_HEADS,
            image=vit.PRETRAIN_IMAGE_SIZE, class_token=vit.PRETRAIN_CLASS_TOKEN, pixels=pixels,
        )  # fmt: skip
    resnet = cfg.MODEL.RESNETS
    return ResNetFacts(
        depth=resnet.DEPTH,
        stem_channels=resnet.STEM_OUT_CHANNELS,
        res2_channels=resnet.RES2_OUT_CHANNELS,
        groups=resnet.NUM_GROUPS,
        width_per_group=resnet.WIDTH_PER_GROUP,
        stride_in_1x1=resnet.STRIDE_IN_1X1,
        norm="GN" if resnet.NORM == "GN" else "BN",
        pixels=pixels,
    )


def _check_facts(content: Mapping[str, Any], cfg: CfgNode, path: str) -> WeightsRecord:
    facts, implied = facts_in(content, path), facts_of(cfg)
    if facts is not None:
        why = f"by its facts; origin: {facts.origin}"
    elif _is_msra(content, path):
        # The check of missing tensors finds a wrong depth, so one rule serves.
        resnet = implied if isinstance(implied, ResNetFacts) else ResNetFacts()
        facts = replace(resnet, stride_in_1x1=True, pixels=CAFFE_BGR, origin="ImageNet-supervised, MSRA (Caffe)")
        why = "it is the original Caffe ResNet"
    else:
        facts = replace(implied, origin="unknown")
        more = f"STRIDE_IN_1X1 {facts.stride_in_1x1}" if isinstance(facts, ResNetFacts) else facts.network
        logger.info(
            "%s carries no facts, so the config's are assumed (%s, mean %s, std %s, %s)",
            path, facts.pixels.order, facts.pixels.mean, facts.pixels.std, more,
        )  # fmt: skip
        return WeightsRecord(path, facts)
    if facts.kind != implied.kind and cfg.MODEL.BACKBONE.NAME in facts.other_builders:
        raise ValueError(
            f"{path} holds a {facts.network} ({why}), but the config's backbone, {cfg.MODEL.BACKBONE.NAME}, is a "
            f"{implied.network}.\n  Pass weights of a {implied.network}, or use a config for a {facts.network}"
        )
    lines = facts.contradictions(cfg)
    if lines:
        needed = facts.config()
        keys = [line.split(" ", 1)[0] for line in lines]
        remedy = " ".join(f'{key} "{needed[key]}"' for key in keys)
        raise ValueError(
            f"{path} contradicts the config ({why}):\n"
            + "".join(f"    {line}\n" for line in lines)
            + f"  Pass {remedy}, or other weights"
        )
    return WeightsRecord(path, facts)


def _as_in_vit(content: Mapping[str, Any], model: nn.Module, path: str) -> dict[str, Any]:
    """Return a file's content with the names of a detector on a ViT, so that Detectron2 need not match any.

    Its heuristics would take the last norm, ``norm.weight``, for one of the pyramid's.

    Raises:
        ValueError: the file's ViT has blocks or layers that the detector's does not have.
    """
    held, own = content["model"], model.state_dict().keys()
    names = {name: _VIT + name if _VIT + name in own and name not in own else name for name in held}
    without = [name for name in held if name.removeprefix(_VIT) in _LEFT_OUT]
    if without:
        logger.info("%s: %s are left out: Detectron2's ViT does not have them", path, ", ".join(without))
    homeless = [
        name
        for name in held
        if names[name] not in own and name.removeprefix(_VIT).startswith(("blocks.", "patch_embed."))
    ]
    if homeless:
        raise ValueError(
            f"{path} has {len(homeless)} tensors of a ViT for which the detector has no place ({some(homeless, _SHOWN)}"
            "): it would compute something else.\n  Check MODEL.VIT.DEPTH and REL_POS; Detectron2's ViT has no "
            "LayerScale and no norms of queries and keys"
        )
    state = {names[name]: tensor for name, tensor in held.items() if name not in without}
    return {**content, "model": state, "matching_heuristics": False}


def _part(name: str) -> str:
    """Name the part of a detector that a tensor belongs to, as ``part_of`` does, also in a detector on a ViT."""
    if name.endswith(_RELATIVE):
        return "relative_positions"
    return "pyramid" if name.startswith("backbone.simfp_") else part_of(name)


def _check_parts(
    path: str, content: Mapping[str, Any], cfg: CfgNode, model: nn.Module, filled: Mapping[str, torch.dtype]
) -> None:
    """Refuse a detector that has no place for a tensor of the parts that a converted file carries (FPN, ...)."""
    facts = facts_in(content, path)
    # Of a trained detector (which has no heuristics) a part may be used, as for other classes.
    parts = facts.parts if facts and content.get("matching_heuristics") else ()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    held = {
        name: tuple(t.shape) for name, t in content["model"].items() if part_of(name) in parts and COUNTER not in name
    }
    # Names that the detector does not have reach load_state_dict, too.
    homeless = [name for name in held if name not in filled.keys() & shapes.keys()]
    biases = [name for name in homeless if name.endswith(".bias") and _normed(model, name.removesuffix(".bias"))]
    if biases:
        logger.info("%d biases of %s are not loaded: the batch norms after them would subtract them", len(biases), path)
    lines = [
        f"{name} is {shapes[name]} in the detector, {held[name]} in the file"
        if name in shapes
        else f"{name} is not in the detector"
        for name in homeless
        if name not in biases
    ]
    if not lines:
        return
    wanted = {key: value for key, value in needs(held).items() if not _agrees(cfg, key, value)}
    remedy = ", or pass " + " ".join(f'{key} "{value}"' for key, value in wanted.items()) if wanted else ""
    if not any(name.startswith(PART_PREFIXES["fpn"]) for name in shapes):
        remedy = ", or use a detector with an FPN (a config with FPN in its name)"
    raise ValueError(
        f"{path} holds more than a backbone ({', '.join(parts)}), and {len(lines)} of its tensors have no place in "
        f"this detector: {_first(lines)}.\n  Convert the original again without --with{remedy}"
    )


def _normed(model: nn.Module, layer: str) -> bool:
    """Whether a layer has a norm that subtracts its batch's mean, and with it any bias."""
    norm = getattr(dict(model.named_modules()).get(layer), "norm", None)
    return isinstance(norm, nn.modules.batchnorm._BatchNorm)


def _agrees(cfg: CfgNode, key: str, value: Any) -> bool:
    for part in key.split("."):
        cfg = cfg[part]
    # Any norm will do: the protocol decides which one.
    return bool(cfg) == bool(value) if key.endswith(".NORM") else bool(cfg == value)


def _is_msra(content: Mapping[str, Any], path: str) -> bool:
    """Recognise Caffe's ResNets of 2015 by their address in Detectron2's zoo, or by the names in the file.

    Their first convolution has a bias, unlike in any other file with Caffe2's names.
    """
    return MSRA in path or {"conv1_b", "res2_0_branch2a_w"} <= set(content["model"])


@contextmanager
def _record_filled(model: nn.Module) -> Iterator[dict[str, torch.dtype]]:
    """Collect names and types of what reaches ``load_state_dict``, after all renaming, heuristics and shape checks.

    The list of missing keys is less reliable: Detectron2 and FrozenBN change it.
    """
    filled: dict[str, torch.dtype] = {}
    handle = model.register_load_state_dict_pre_hook(
        lambda _, state, *__: filled.update({name: tensor.dtype for name, tensor in state.items()})
    )
    try:
        yield filled
    finally:
        handle.remove()


def _explain_missing(path: str, content: Mapping[str, Any], model: nn.Module, missing: list[str], total: int) -> str:
    state = content["model"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    absent, misshapen = [], []
    for name in missing:
        held = next((key for key in _file_names(name) if key in state), None)
        if held is not None and tuple(state[held].shape) != shapes[name]:
            misshapen.append(f"{name} is {shapes[name]} in the detector, {tuple(state[held].shape)} in the file")
        else:
            absent.append(name)
    text = f"{path} fills {total - len(missing)} of {total} tensors; {len(missing)} would stay random: "
    parts = [_first(misshapen)] if misshapen else []
    parts += [f"not in the file: {some(absent, _SHOWN)}"] if absent else []
    text += "; ".join(parts)
    if misshapen:
        keys = (
            "MODEL.VIT (PRETRAIN_IMAGE_SIZE for pos_embed)" if _is_vit(model) else "MODEL.RESNETS.DEPTH, its width keys"
        )
        return f"{text}.\n  The file holds another network: check {keys}, and NUM_CLASSES"
    if len(missing) == total:
        return f"{text}.\n  The file has names such as {some(state, 3)}.{convert_hint(path)}"
    return f"{text}.\n  The file is incomplete: convert the original again with moco-d2 convert"


def _file_names(name: str) -> list[str]:
    """Return the names that a detector's tensor can have in the file of a detector or a backbone."""
    return [name, *(name.removeprefix(prefix) for prefix in ("backbone.bottom_up.", _VIT, "backbone.", "roi_heads."))]


def _first(lines: Sequence[str]) -> str:
    """Return the first few of several findings, and how many more there are."""
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return "; ".join(lines[:_SHOWN]) + more

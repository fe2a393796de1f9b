"""The guard on weights: a detector starts from the whole backbone, fed as in pretraining, or it does not start.

Detectron2 warns about tensors that a file does not fill and trains them from random values; it cannot know that a file
wants RGB. Both mistakes cost a schedule and look like a bad pretraining method, so here they are errors. Random
initialisation is asked for by ``MODEL.WEIGHTS ""`` and by nothing else.
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
from torch import nn

from moco_d2.convert.parts import PART_PREFIXES, needs, part_of
from moco_d2.detection.checkpointer import load_content
from moco_d2.detection.weight_file import convert_hint, read_weight_file
from moco_d2.facts import CAFFE_BGR, BackboneFacts, Pixels
from moco_d2.io.checkpoints import facts_in, some
from moco_d2.io.version import FileVersion
from moco_d2.running.weights import local_path

logger = logging.getLogger(__name__)

# MODEL.WEIGHTS of the configs that start from weights of the user's choice (configs/Base/init-moco.yaml).
REQUIRED = "REQUIRED"

_SHOWN = 10  # keys listed in an error
_COUNTER = "num_batches_tracked"


@dataclass
class WeightsRecord:
    """What a detector was started from. Its facts are saved in every checkpoint, as in a backbone's file.

    Attributes:
        path: ``MODEL.WEIGHTS``, empty for random initialisation.
        facts: the file's facts, or those of the config where the file carries none.
        version: of the file that was read; None for random initialisation.
    """

    path: str
    facts: BackboneFacts
    version: FileVersion | None = field(default=None, compare=False)

    @cached_property
    def sha256(self) -> str:
        """Of the file that was read; empty for random initialisation.

        Raises:
            ValueError: the file has changed since.
        """
        return self.version.sha256() if self.version else ""

    def state_dict(self) -> dict[str, Any]:
        """Return the facts; Detectron2's checkpointer calls this."""
        return self.facts.as_dict()

    def load_state_dict(self, facts: Mapping[str, Any]) -> None:
        """Take the facts of a checkpoint that is resumed."""
        self.facts = BackboneFacts.from_dict(facts)


def pretrained_names(model: nn.Module) -> list[str]:
    """Name the tensors of a detector that pretraining must fill: the ResNet, and conv5 where it is the box head (C4).

    The norm that :class:`Res5ROIHeadsExtraNorm` adds is new and left out, and so is ``num_batches_tracked``, which no
    computation reads.
    """
    backbone = "backbone.bottom_up." if hasattr(model.backbone, "bottom_up") else "backbone."
    return [
        name
        for name in all_names(model)
        if name.startswith((backbone, "roi_heads.res5.")) and not name.startswith("roi_heads.res5.norm.")
    ]


def all_names(model: nn.Module) -> list[str]:
    """Name the tensors that a trained detector must fill to be evaluated or resumed."""
    return [name for name in model.state_dict() if not name.endswith(_COUNTER)]


def check_source(path: str) -> None:
    """Check that ``MODEL.WEIGHTS`` names a file that is there (fetching it if it is an address), or is empty.

    Raises:
        ValueError: it is the placeholder of the shipped configs, or there is no such file.
    """
    _refuse_placeholder(path)
    if path:
        local_path(path)


def _refuse_placeholder(path: str) -> None:
    if path == REQUIRED:
        raise ValueError(
            "this config starts from weights of your choice and none were given.\n"
            "  Pass MODEL.WEIGHTS PATH, a file written by tools/convert_checkpoint.py, "
            'or take the config that ends in _random (MODEL.WEIGHTS "")'
        )


def load_weights(
    checkpointer: DetectionCheckpointer,
    cfg: CfgNode,
    path: str,
    names: Callable[[nn.Module], Sequence[str]] = pretrained_names,
    checkpointables: Sequence[str] | None = (),
) -> WeightsRecord:
    """Load a file into a detector, or say exactly why it may not be used.

    Args:
        checkpointer: of the detector.
        cfg: config of the detector.
        path: a path, an address that Detectron2 knows, or empty for random initialisation.
        names: which tensors the file has to fill: :func:`pretrained_names`, or :func:`all_names` to evaluate.
        checkpointables: what else is loaded (optimizer, ...); ``None`` for everything there is.

    Returns:
        What is known about the weights.

    Raises:
        ValueError: no file, a file of another kind, facts that contradict the config, tensors missing, of another
            shape, or not finite.
    """
    _refuse_placeholder(path)
    if not path:
        logger.info("MODEL.WEIGHTS is empty: the detector starts from random weights")
        return random_weights(cfg)
    model = checkpointer.model
    file = read_weight_file(path, model.state_dict().keys())
    content = file.content
    record = replace(_check_facts(content, cfg, path), version=file.version)
    with _record_filled(model) as filled:
        load_content(checkpointer, content, path, checkpointables)
    wanted = names(model)
    missing = [name for name in wanted if name not in filled]
    if missing:
        raise ValueError(_explain_missing(path, content, model, missing, len(wanted)))
    state = model.state_dict()
    beside = [name for name in all_names(model) if name in filled and name not in wanted]
    broken = [name for name in (*wanted, *beside) if not torch.isfinite(state[name]).all()]
    if broken:
        raise ValueError(
            f"{path}: {len(broken)} tensors hold NaN or infinity, so the run that wrote them had diverged:\n"
            + _listed(broken)
        )
    logger.info("%s fills all of the %d tensors wanted from it", path, len(wanted))
    if names is pretrained_names:
        _check_parts(path, content, cfg, model, filled)
        # Known by what was filled: files that say nothing of themselves, as a trained detector's, have parts too.
        parts = tuple(dict.fromkeys(part_of(name) for name in beside))
        record.facts = replace(record.facts, parts=parts)
        if parts:
            logger.info("%s also fills %s: another protocol than a pretrained backbone", path, ", ".join(parts))
    return record


def random_weights(cfg: CfgNode) -> WeightsRecord:
    """Return what is known about a detector that no file was loaded into."""
    return WeightsRecord("", replace(facts_of(cfg), origin="random initialisation"))


def facts_of(cfg: CfgNode) -> BackboneFacts:
    """Return the facts under which a config builds and feeds its backbone."""
    resnet = cfg.MODEL.RESNETS
    return BackboneFacts(
        depth=resnet.DEPTH,
        stem_channels=resnet.STEM_OUT_CHANNELS,
        res2_channels=resnet.RES2_OUT_CHANNELS,
        groups=resnet.NUM_GROUPS,
        width_per_group=resnet.WIDTH_PER_GROUP,
        stride_in_1x1=resnet.STRIDE_IN_1X1,
        norm="GN" if resnet.NORM == "GN" else "BN",
        pixels=Pixels(cfg.INPUT.FORMAT, tuple(cfg.MODEL.PIXEL_MEAN), tuple(cfg.MODEL.PIXEL_STD)),
    )


def _check_facts(content: Mapping[str, Any], cfg: CfgNode, path: str) -> WeightsRecord:
    facts = facts_in(content, path)
    if facts is not None:
        why = f"by its facts; origin: {facts.origin}"
    elif _is_msra(content, path):
        # The depth is left to the coverage check, so that one rule serves.
        facts = replace(facts_of(cfg), stride_in_1x1=True, pixels=CAFFE_BGR, origin="ImageNet-supervised, MSRA (Caffe)")
        why = "it is the original Caffe ResNet"
    else:
        facts = replace(facts_of(cfg), origin="unknown")
        logger.info(
            "%s carries no facts: it is assumed to want what the config says (%s, mean %s, std %s, STRIDE_IN_1X1 %s)",
            path, facts.pixels.order, facts.pixels.mean, facts.pixels.std, facts.stride_in_1x1,
        )  # fmt: skip
        return WeightsRecord(path, facts)
    lines = facts.contradictions(cfg)
    if lines:
        needed = facts.config()
        keys = [line.split(" ", 1)[0] for line in lines]
        remedy = " ".join(f'{key} "{needed[key]}"' for key in keys)
        raise ValueError(
            f"{path} contradicts the config ({why}):\n" + _listed(lines) + f"\n  Pass {remedy}, or other weights"
        )
    return WeightsRecord(path, facts)


def _check_parts(path: str, content: Mapping[str, Any], cfg: CfgNode, model: nn.Module, filled: set[str]) -> None:
    """Refuse a detector without a place for every tensor of the parts that a converted file says to hold."""
    facts = facts_in(content, path)
    # A trained detector may be taken in part, as for other classes; it has no heuristics, by which only ours are known.
    parts = facts.parts if facts and content.get("matching_heuristics") else ()
    shapes = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    held = {
        name: tuple(t.shape) for name, t in content["model"].items() if part_of(name) in parts and _COUNTER not in name
    }
    # What the detector does not have reaches load_state_dict too.
    homeless = [name for name in held if name not in filled & shapes.keys()]
    biases = [name for name in homeless if name.endswith(".bias") and _normed(model, name.removesuffix(".bias"))]
    if biases:
        logger.info("%d biases of %s are left out: the batch norms behind them subtract them", len(biases), path)
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
        remedy = ", or take a detector with an FPN (configs that have FPN in their names)"
    raise ValueError(
        f"{path} holds more than a backbone ({', '.join(parts)}), and {len(lines)} of its tensors have no place in "
        "this detector:\n" + _listed(lines) + f"\n  Convert the original again without --with{remedy}"
    )


def _normed(model: nn.Module, layer: str) -> bool:
    """Whether a layer has a norm that subtracts its batch's mean, and with it any bias."""
    norm = getattr(dict(model.named_modules()).get(layer), "norm", None)
    return isinstance(norm, nn.modules.batchnorm._BatchNorm)


def _agrees(cfg: CfgNode, key: str, value: Any) -> bool:
    for part in key.split("."):
        cfg = cfg[part]
    # Which batch norm it is, is the protocol's.
    return bool(cfg) == bool(value) if key.endswith(".NORM") else bool(cfg == value)


def _is_msra(content: Mapping[str, Any], path: str) -> bool:
    """Tell Caffe's ResNets of 2015 by their address in Detectron2's zoo, or by their file's names.

    Their first convolution has a bias, which no other file under Caffe2's names has.
    """
    return "ImageNetPretrained/MSRA/" in path or {"conv1_b", "res2_0_branch2a_w"} <= set(content["model"])


@contextmanager
def _record_filled(model: nn.Module) -> Iterator[set[str]]:
    """Collect the names that reach ``load_state_dict``: behind every renaming, heuristic and shape check.

    Looking there is safer than at the list of missing keys, which Detectron2 and FrozenBN amend.
    """
    filled: set[str] = set()
    handle = model.register_load_state_dict_pre_hook(lambda _, state, *__: filled.update(state))
    try:
        yield filled
    finally:
        handle.remove()


def _explain_missing(path: str, content: Mapping[str, Any], model: nn.Module, missing: list[str], total: int) -> str:
    state = content["model"]
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    lines, misshapen = [], 0
    for name in missing:
        held = next((key for key in _file_names(name) if key in state), None)
        if held is not None and tuple(state[held].shape) != shapes[name]:
            misshapen += 1
            lines.append(f"{name} is {shapes[name]} in the detector, {tuple(state[held].shape)} in the file")
        else:
            lines.append(f"{name} is not in the file")
    text = f"{path} fills {total - len(missing)} of {total} tensors; {len(missing)} would stay random:\n" + _listed(
        lines
    )
    if misshapen:
        text += (
            "\n  The file holds another network: check MODEL.RESNETS.DEPTH, the width keys beside it, and NUM_CLASSES"
        )
    elif len(missing) == total:
        text += f"\n  The file holds names such as {some(state, 3)}.{convert_hint(path)}"
    else:
        text += "\n  The file is incomplete: convert the original again with tools/convert_checkpoint.py"
    return text


def _file_names(name: str) -> list[str]:
    """Return the names that a detector's tensor can have in a file: a detector's, or a backbone's."""
    return [name, *(name.removeprefix(prefix) for prefix in ("backbone.bottom_up.", "backbone.", "roi_heads."))]


def _listed(lines: Sequence[str]) -> str:
    more = [f"    ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n".join([f"    {line}" for line in lines[:_SHOWN]] + more)

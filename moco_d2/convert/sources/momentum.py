"""Pairs of a query encoder and its moving average, and this project's own pretraining files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moco_d2.convert.parts import Layer, Part
from moco_d2.convert.sources.record import LIGHTNING, QUERY, QUEUE, RESIM_BIASES, CheckpointSource, unwrap, without_fc
from moco_d2.io.checkpoints import CheckpointError, backbone_in

# Tete-Xiao/ReSim moco/models.py: laterals of conv3 to conv5, outputs on conv3 and conv4 only. The published files were
# trained without --fpn-bn; with it, a convolution and its norm are an nn.Sequential.
_RESIM_FPN = tuple(
    Part(
        name="fpn",
        what="ReSim's FPN",
        keys=r"^encoder_q\.fpn_(lateral|output)\d",
        layers=tuple(
            Layer(role, f"encoder_q.fpn_{role}{conv}", f"encoder_q.fpn_{role}{norm}" if norm else "")
            for role in ("lateral3", "lateral4", "lateral5", "output3", "output4")
        ),
        note=note,
    )
    for conv, norm, note in (("", "", RESIM_BIASES), (".0", ".1", ""))
)


def declared_by_file(source: CheckpointSource, checkpoint: Mapping[Any, Any], path: Any) -> CheckpointSource:
    """Take the prefix from the file, which names its method; files without this entry are older and MoCo's."""
    found = backbone_in(checkpoint, path)
    if found is None:
        return source
    if found.prefix is None:
        raise CheckpointError(
            f"{path}: a training checkpoint of {found.method}, whose backbone is no sub-module of the method; convert "
            "the backbone.pth in the same folder, which pretraining wrote with it"
        )
    prefix = unwrap(found.prefix)
    return replace(
        source,
        prefix=prefix,
        encoder=f"the backbone that {found.method} transfers",
        declared=f"its entry `backbone` says that {found.method}'s backbone is under `{prefix}` in `model`",
    )


MOMENTUM = (
    CheckpointSource(
        name="moco_d2 backbone",
        key="moco_d2",
        origin="moco_d2",
        containers=("state_dict",),
        top_level=("facts",),
        signature=(r"^conv1\.weight$",),
    ),
    CheckpointSource(
        name="moco_d2 training checkpoint",
        key="moco_d2-training",
        origin="moco_d2",
        containers=("model",),
        prefix="encoder_q.",
        rest="the rest of the method's training checkpoint",
        others=r"^model\.",
        encoder=QUERY,
        adapt=declared_by_file,
    ),
    CheckpointSource(
        name="ReSim",
        key="resim",
        origin="ReSim",
        arxiv="2103.12902",
        containers=("state_dict", ""),
        prefix="encoder_q.",
        signature=(r"^(encoder_q\.)?fpn_(lateral|output)\d",),
        dropped=(without_fc("encoder_q."), QUEUE),
        parts=_RESIM_FPN,
        encoder=QUERY,
    ),
    CheckpointSource(
        name="lightning-bolts MoCo",
        key="bolts-moco",
        origin="MoCo v2 of lightning-bolts",
        arxiv="2003.04297",
        containers=("state_dict",),
        prefix="encoder_q.",
        top_level=(LIGHTNING,),
        dropped=(without_fc("encoder_q."), QUEUE),
        encoder=QUERY,
    ),
    CheckpointSource(
        name="MoCo",
        key="moco",
        origin="MoCo v1 or v2 (no head in the file to tell)",
        arxiv="1911.05722, 2003.04297",
        containers=("state_dict", ""),
        prefix="encoder_q.",
        dropped=(without_fc("encoder_q."), QUEUE),
        variants=(
            (r"^encoder_q\.fc\.weight$", "MoCo v1 (one linear layer as head)", "1911.05722"),
            (r"^encoder_q\.fc\.0\.weight$", "MoCo v2 (two layers as head)", "2003.04297"),
        ),
        encoder=QUERY,
    ),
    CheckpointSource(
        name="PCL",
        key="pcl",
        origin="PCL v1 or v2",
        arxiv="2005.04966",
        containers=("state_dict",),
        prefix="encoder_q.",
        dropped=(without_fc("encoder_q."), QUEUE),
        encoder=QUERY,
    ),
    CheckpointSource(
        name="MoCo v3",
        key="moco_v3",
        origin="MoCo v3",
        arxiv="2104.02057",
        containers=("state_dict",),
        prefix="base_encoder.",
        dropped=(without_fc("base_encoder.", "projector"), (r"^predictor\.", "predictor")),
        encoder="base_encoder is what MoCo v3 transfers; momentum_encoder is its moving average",
    ),
)

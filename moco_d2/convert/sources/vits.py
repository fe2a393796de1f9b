"""Vision transformers (ViT): the records of their sources, and the kinds that cannot be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moco_d2.convert.sidecars import read_transformers_vit
from moco_d2.convert.sources.momentum import declared_by_file
from moco_d2.convert.sources.record import ANY, CheckpointSource
from moco_d2.convert.sources.unsupported import Unsupported
from moco_d2.convert.vit_names import (
    HUGGING_FACE,
    HUGGING_FACE_5,
    HUGGING_FACE_DINOV2,
    IN_DETECTOR,
    TIMM,
    TORCHVISION_VIT,
    TORCHVISION_VIT_RELEASED,
    VitNaming,
)
from moco_d2.facts import IMAGENET_RGB, Pixels

HALF_RGB = Pixels("RGB", (127.5, 127.5, 127.5), (127.5, 127.5, 127.5))  # mean and std 0.5

# Size of a token -> heads, where it is not a head of 64 features: ViT-H, ViT-g and ViT-G.
OTHER_HEADS = {1280: 16, 1408: 16, 1664: 16}
_MOCO_V3_HEADS = {384: 12, 768: 12}


@dataclass(frozen=True)
class VitSource(CheckpointSource):
    """Where one project keeps a ViT. The fields of a ResNet's record have their meaning, except ``naming``.

    Attributes:
        namings: how the network's tensors may be spelled after the prefix.
        heads: size of a token -> number of heads, where the project departs from the usual numbers.
        position: whose fixed position embedding the file must have: ``moco_v3``, ``mae``; empty: any.
        partial: whether the file may lack the class token and the last norm, as a detector does.
    """

    namings: tuple[VitNaming, ...] = (TIMM,)
    heads: Mapping[int, int] = field(default_factory=dict)
    position: str = ""
    partial: bool = False

    @property
    def has_signature(self) -> bool:
        """Whether something besides the network itself shows this source."""
        return bool(self.position) or super().has_signature


_MASK = (r"(^|\.)mask_token$", "token of masked patches")
_HEAD = (r"^(head|fc_norm|head_drop)\b", "head")
_DECODER = (r"^decoder(_|\.|$)", "MAE's decoder")
_ANYWHERE = ("state_dict_ema", "model_ema", "state_dict", "model", "")
_ITS_TRAINED = r"^(state_dict|model)\.$"  # beside the moving average, which is preferred

VIT_SOURCES: tuple[VitSource, ...] = (
    VitSource(
        name="moco_d2 ViT backbone",
        key="moco_d2-vit",
        origin="moco_d2",
        containers=("state_dict",),
        top_level=("facts",),
    ),
    VitSource(
        name="moco_d2 ViT training checkpoint",
        key="moco_d2-training-vit",
        origin="moco_d2",
        containers=("model",),
        prefix="base_encoder.",
        top_level=("facts", "backbone"),
        rest="the rest of the method's training checkpoint",
        others=r"^model\.",
        adapt=declared_by_file,
    ),
    VitSource(
        name="ViT of moco_d2 or Detectron2",
        key="detectron2-vit",
        origin="Detectron2's ViT",
        containers=("model",),
        prefix=IN_DETECTOR,
        rest="the rest of the detector",
        partial=True,
        notes=("a detector's ViT may attend in windows, which weights do not show: a plain ViT then differs",),
    ),
    VitSource(
        name="MoCo v3 ViT",
        key="moco_v3-vit",
        origin="MoCo v3",
        arxiv="2104.02057",
        containers=("state_dict",),
        prefix="base_encoder.",
        dropped=((r"^base_encoder\.head\.", "projector"), (r"^predictor\.", "predictor")),
        heads=_MOCO_V3_HEADS,
        encoder="base_encoder is what MoCo v3 transfers; momentum_encoder is its moving average",
    ),
    VitSource(
        name="MoCo v3 ViT, without its other parts",
        key="moco_v3-vit-backbone",
        origin="MoCo v3, by its fixed position embedding",
        arxiv="2104.02057",
        containers=_ANYWHERE,
        position="moco_v3",
        dropped=(_HEAD,),
        heads=_MOCO_V3_HEADS,
    ),
    VitSource(
        name="DINO training checkpoint, ViT",
        key="dino-vit",
        origin="DINO",
        arxiv="2104.14294",
        containers=("teacher",),
        prefix="backbone.",
        dropped=((r"^(head|dino_head|ibot_head)\.", "head of pretraining"), _MASK),
        encoder="the teacher is what DINO's own evaluations take; it is the moving average of the student",
    ),
    VitSource(
        name="DINO training checkpoint, student's ViT",
        key="dino-vit-student",
        origin="DINO's student",
        arxiv="2104.14294",
        containers=("student",),
        prefix="backbone.",
        dropped=((r"^(head|dino_head|ibot_head)\.", "head of pretraining"), _MASK),
        on_request=True,
    ),
    VitSource(
        name="MAE",
        key="mae",
        origin="MAE, by its fixed position embedding",
        arxiv="2111.06377",
        containers=("model", ""),
        position="mae",
        dropped=(_DECODER, _MASK, _HEAD),
    ),
    VitSource(
        name="MAE, fine-tuned",
        key="mae-finetuned",
        origin="MAE, fine-tuned, by its fc_norm",
        arxiv="2111.06377",
        containers=("model", ""),
        signature=(r"^fc_norm\.",),
        dropped=(_HEAD,),
    ),
    VitSource(
        name="DINOv2 without LayerScale",
        key="dinov2",
        origin="DINOv2, by its mask_token",
        arxiv="2304.07193",
        containers=("", "state_dict", "model"),
        signature=(r"^mask_token$",),
        never=r"^decoder",
        dropped=(_MASK, _HEAD),
    ),
    VitSource(
        name="ViT without a head, as DINO releases it",
        key="dino-vit-backbone",
        origin="timm's names without a head: DINO or another method",
        containers=_ANYWHERE,
        never=r"^(head|fc_norm|mask_token|decoder)",
        others=_ITS_TRAINED,
        notes=("files of DINO and of other methods look the same; ImageNet's mean and std are assumed",),
    ),
    VitSource(
        name="DeiT, or another ViT with ImageNet's mean and std",
        key="deit",
        origin="timm's names with a classifier",
        containers=_ANYWHERE,
        signature=(r"^head\.",),
        dropped=(_HEAD,),
        others=_ITS_TRAINED,
    ),
    VitSource(
        name="timm's ViT with mean and std 0.5",
        key="timm-vit",
        origin="timm's names with a classifier",
        containers=("state_dict_ema", "state_dict", ""),
        signature=(r"^head\.",),
        dropped=(_HEAD,),
        pixels=HALF_RGB,
        others=_ITS_TRAINED,
    ),
    VitSource(
        name="Hugging Face ViT-MAE",
        key="transformers-vit-mae",
        origin="MAE of transformers",
        arxiv="2111.06377",
        containers=("",),
        prefix="vit.",
        top_level=(r"decoder\.\S+",),
        namings=(HUGGING_FACE, HUGGING_FACE_5),
        dropped=(_DECODER,),
        sidecars=read_transformers_vit,
    ),
    *(
        VitSource(
            name=f"Hugging Face ViT with {whose}",
            key=key,
            origin="ViT of transformers",
            containers=("", "state_dict"),
            prefix=ANY,
            namings=(HUGGING_FACE, HUGGING_FACE_5, HUGGING_FACE_DINOV2),
            dropped=((r"(^|\.)(pooler|classifier|decoder)\.", "head"), _MASK),
            pixels=pixels,
            sidecars=read_transformers_vit,
        )
        for key, whose, pixels in (
            ("transformers-vit", "mean and std 0.5", HALF_RGB),
            ("transformers-vit-imagenet", "ImageNet's mean and std", IMAGENET_RGB),
        )
    ),
    VitSource(
        name="torchvision ViT",
        key="torchvision-vit",
        origin="torchvision ViT",
        containers=("model_ema", "", "state_dict", "model"),
        namings=(TORCHVISION_VIT, TORCHVISION_VIT_RELEASED),
        dropped=((r"^heads\.", "classifier"), (r"^n_averaged$", "count of the average")),
        others=_ITS_TRAINED,
    ),
)

_ONLY = "Detectron2's ViT has no place for that, so only plain ViTs can be converted"
INVISIBLE_IN_VITS = (
    "weights do not show the activation and the epsilon of the norms: GELU and 1e-6 are assumed, as in timm, MoCo v3, "
    "DINO and MAE"
)

# What else is inside a network that begins as a ViT.
VIT_UNSUPPORTED: tuple[Unsupported, ...] = (
    Unsupported(
        r"(^|\.)(reg_token|register_tokens|detection_tokens)$",
        "a ViT with register tokens (DINOv2 with registers, or alike)",
        f"every patch attends to them; {_ONLY}: use the weights without registers and LayerScale",
    ),
    Unsupported(
        r"(^|\.)(dist_token|distillation_token)$|(^|\.)head_dist\.",
        "a distilled DeiT (it has a distillation token)",
        f"{_ONLY}: use DeiT's weights without distillation",
    ),
    Unsupported(
        r"(^|\.)(relative_position_bias_table|relative_position_index|rel_pos_bias|q_bias|v_bias)\b",
        "a BEiT, or another ViT with relative positions",
        "Detectron2's ViT has relative positions of another form; only plain ViTs can be converted",
    ),
    Unsupported(
        r"(^|\.)(ls[12]\.gamma|layer_scale\d?\.lambda\d?|gamma_[12]|lambda_[12])$",
        "a ViT with LayerScale (DINOv2, DeiT III, CaiT, BEiT)",
        f"{_ONLY}; without these factors its features would be wrong",
    ),
    Unsupported(
        r"(^|\.)(norm_pre|ln_pre|pre_layrnorm|pre_layernorm)\.",
        "CLIP's ViT (a norm before the first block)",
        _ONLY,
    ),
    Unsupported(r"(^|\.)attn\.(q_norm|k_norm)\.", "a ViT that normalises queries and keys", _ONLY),
    Unsupported(
        r"(^|\.)mlp\.(w\d+|fc1_[gx]|gate_proj|norm|weights_(in|out))\.", "a ViT with gated MLPs (SwiGLU)", _ONLY
    ),
    Unsupported(r"(^|\.)attn_pool\.", "a ViT that pools with attention (SigLIP)", _ONLY),
    Unsupported(r"(^|\.)patch_embed\.backbone\.", "a ResNet and a ViT in one (a hybrid ViT)", _ONLY),
    Unsupported(
        r"(^|\.)attn\.rel_pos_[hw]$",
        "a ViT with Detectron2's relative positions, which detectors train",
        "other networks have no place for them; convert the weights that the detector started from",
    ),
)

"""Networks that are met in the field and cannot be converted."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lookalike:
    """Something that is met in the field and cannot be converted, by a pattern in its keys.

    Attributes:
        pattern: regular expression searched in every key, wrappers removed.
        found: what the file is.
        advice: what the user can do.
    """

    pattern: str
    found: str
    advice: str


_ONLY = "only ResNets as torchvision and Detectron2 build them can be converted"
_STEM = "Detectron2's ResNet has one 7x7 convolution there; it cannot hold these weights"

LOOKALIKES: tuple[Lookalike, ...] = (
    # Before the transformers, whose blocks have a norm1 too.
    Lookalike(
        r"(^|\.)(block\d\.unit\d+\.|stages\.\d\.blocks\.\d+\.(conv1|norm1)\.weight$)",
        "BiT (pre-activation, weight-standardised convolutions)",
        _ONLY,
    ),
    Lookalike(
        r"(^|\.)(patch_embed\.|cls_token$|blocks\.\d+\.(attn|norm1|mlp)\.)",
        "a vision transformer (patch_embed, blocks)",
        "only ResNets can be converted",
    ),
    Lookalike(r"(^|\.)attnpool\.", "CLIP's ResNet (attention pooling, three stem convolutions)", _ONLY),
    Lookalike(
        r"(^|\.)(l_to_ab|ab_to_l)\.|(^|\.)encoder[12]\.conv1\.",
        "CMC's two half-width encoders for luminance and colour",
        "neither sees RGB pictures; only CMC's single-encoder files can be converted",
    ),
    Lookalike(
        r"(^|\.)(main_conv|mixing_conv|conv2\.paths|conv2\.attn)\.",
        "a ResNet with selective kernels (SK, as in SimCLR v2's sk1)",
        "use the file without selective kernels (sk0)",
    ),
    Lookalike(
        r"(^|\.)layer\d\.\d+\.(se|se_module|conv2\.fc1|conv2\.se)\.",
        "a ResNet with channel attention (SE, ResNeSt)",
        _ONLY,
    ),
    Lookalike(
        r"(_packed_params|\.zero_point$|\.weight_fake_quant\.|activation_post_process|\.SCB$)",
        "a quantised network",
        "convert the float checkpoint that it was made from",
    ),
    Lookalike(
        r"(^|\.)conv1\.0\.weight$|(^|\.)stem\.[012]\.conv\.|(^|\.)net\.0\.2\.weight$",
        "a ResNet with a stem of three 3x3 convolutions (ResNet-C, -D, -S)",
        _STEM,
    ),
    Lookalike(
        r"(^|\.)downsample\.2\.",
        "a ResNet that pools in its shortcuts (ResNet-D)",
        "Detectron2's ResNet strides in the shortcut convolution; it cannot hold these weights",
    ),
    Lookalike(
        r"(^|\.)(layer)?\d\.0\.shortcut\.0\.weight$",
        "lightly's own ResNet (a CIFAR stem: 3x3 without pooling)",
        "pretrain with torchvision's ResNet",
    ),
)

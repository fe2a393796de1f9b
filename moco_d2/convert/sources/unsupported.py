"""Networks that are common but cannot be converted, by patterns in their keys."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unsupported:
    """A kind of network that cannot be converted.

    Attributes:
        pattern: regular expression searched in every key without its wrappers.
        found: what the file is.
        advice: what the user can do.
    """

    pattern: str
    found: str
    advice: str


_ONLY = "only ResNets as torchvision and Detectron2 build them can be converted"
_PLAIN = (
    "of vision transformers, only plain ViTs can be converted: one square convolution as patch_embed, a class token, "
    "and blocks, as in timm, MoCo v3, DINO, MAE, transformers and torchvision"
)
_STEM = "Detectron2's ResNet has one 7x7 convolution there; it cannot hold these weights"

UNSUPPORTED: tuple[Unsupported, ...] = (
    # Before all others: a network of any kind may come with adapters or reparametrised weights.
    Unsupported(
        r"(^|\.)lora_\w+\.|\.base_layer\.",
        "a network with LoRA adapters",
        "merge them into the weights (PEFT's merge_and_unload()) and save the network's state_dict()",
    ),
    Unsupported(
        r"(^|\.)parametrizations\.|\.weight_[gv]$|\.weight_(orig|mask)$",
        "a network with reparametrised weights (weight norm, spectral norm or pruning)",
        "make them plain (torch.nn.utils: parametrize.remove_parametrizations, remove_weight_norm, prune.remove) and "
        "save the network's state_dict()",
    ),
    # Before the transformers, whose blocks have a norm1 too.
    Unsupported(
        r"(^|\.)(block\d\.unit\d+\.|stages\.\d\.blocks\.\d+\.(conv1|norm1)\.weight$)",
        "BiT (pre-activation, weight-standardised convolutions)",
        _ONLY,
    ),
    Unsupported(
        r"(^|\.)(_?conv_stem\.|features\.(\d+\.){1,2}block\.\d+\.\d+\.|features\.\d+\.conv\.\d)",
        "an EfficientNet or a MobileNet",
        "only ResNets can be converted",
    ),
    Unsupported(
        r"(^|\.)(conv_dw|dwconv|downsample_layers\.\d)\.|\.(layer_scale|layer_scale_parameter)$",
        "a ConvNeXt, or another network with depthwise convolutions",
        "only ResNets can be converted",
    ),
    Unsupported(
        r"(^|\.)layers\.\d+\.blocks\.\d+\.(attn|attention)\.|features\.\d+\.\d+\.attn\.",
        "a Swin transformer (a pyramid with shifted windows)",
        _PLAIN,
    ),
    Unsupported(r"(^|\.)(pre_layrnorm|ln_pre)\.", "CLIP's vision transformer (a norm before the first block)", _PLAIN),
    Unsupported(
        r"(^|\.)(patch_embed\.|(cls|class)_token$|blocks\.\d+\.(attn|norm1|mlp)\.)",
        "a vision transformer of another form (patch_embed, blocks)",
        _PLAIN,
    ),
    Unsupported(
        r"(^|\.)(encoder\.layers?\.(\d+|encoder_layer_\d+)|transformer\.resblocks|embeddings\.(word|token)_embeddings?)\.",
        "a transformer (layers with attention)",
        "only ResNets can be converted",
    ),
    Unsupported(
        r"(^|\.)(denseblock\d|Mixed_\d\w|inception\d\w|level\d\.tree\d|stage\d\.\d\.(fuse_layers|branch\d)|features\.\d+\.squeeze|s\d\.b\d+"
        r"|trunk_output)\.",
        "a DenseNet, Inception, DLA, HRNet, ShuffleNet, SqueezeNet or RegNet",
        "only ResNets can be converted",
    ),
    Unsupported(r"(^|\.)attnpool\.", "CLIP's ResNet (attention pooling, three stem convolutions)", _ONLY),
    Unsupported(
        r"(^|\.)(l_to_ab|ab_to_l)\.|(^|\.)encoder[12]\.conv1\.",
        "CMC's two half-width encoders for luminance and colour",
        "neither sees RGB pictures; only CMC's single-encoder files can be converted",
    ),
    Unsupported(
        r"(^|\.)(main_conv|mixing_conv|conv[12]\.paths|conv[12]\.attn)\.",
        "a ResNet with selective kernels (SK, as in SimCLR v2's sk1)",
        "use the file without selective kernels (sk0)",
    ),
    Unsupported(
        r"(^|\.)(layer\d\.\d+\.(se|se_module|conv2\.fc1|conv2\.se)|layers\.\d+\.layer\.\d\.attention)\.",
        "a ResNet or RegNet with channel attention (SE, ResNeSt)",
        _ONLY,
    ),
    Unsupported(
        r"(^|\.)layer\d\.\d+\.(convs|bns)\.\d",
        "a Res2Net (convolutions in scales)",
        _ONLY,
    ),
    Unsupported(
        r"(_packed_params|\.zero_point$|\.weight_fake_quant\.|activation_post_process|\.SCB$)",
        "a quantised network",
        "convert the float checkpoint that it was made from",
    ),
    # Before the deep stems, whose pattern its blocks have too.
    Unsupported(r"(^|\.)layer\d\.\d+\.conv\d\.0\.", "a network for video (R3D, MC3, R(2+1)D)", _ONLY),
    Unsupported(
        r"(^|\.)conv1\.0\.weight$|(^|\.)stem\.[012]\.conv\.|(^|\.)net\.0\.2\.weight$",
        "a ResNet with a stem of three 3x3 convolutions (ResNet-C, -D, -S)",
        _STEM,
    ),
    Unsupported(
        r"(^|\.)downsample\.2\.",
        "a ResNet that pools in its shortcuts (ResNet-D)",
        "Detectron2's ResNet strides in the shortcut convolution; it cannot hold these weights",
    ),
    Unsupported(
        r"(^|\.)(layer)?\d\.0\.shortcut\.0\.weight$",
        "lightly's own ResNet (a CIFAR stem: 3x3 without pooling)",
        "pretrain with torchvision's ResNet",
    ),
    # After all others: what most of timm's networks are built of.
    Unsupported(
        r"(^|\.)stages\.\d+\.(blocks\.)?\d+\.\w",
        "one of timm's networks of stages (CSPNet, NFNet, RegNet, CLIP's ResNet, ...)",
        "of timm's networks, the ResNets (resnet18 to resnet152, ResNeXt, Wide ResNet) can be converted",
    ),
    Unsupported(
        r"^(features\.)?\d+\.bias$",
        "a VGG, an AlexNet, or another row of convolutions and linear layers",
        "only ResNets can be converted",
    ),
)

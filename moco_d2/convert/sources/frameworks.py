"""Frameworks with their own names: VISSL, Classy Vision, TensorFlow, JAX and Caffe2."""

from __future__ import annotations

from moco_d2.convert.names import CAFFE2, CAFFE2_AFFINE, CAFFE2_SHORT, CLASSY_VISION, SEPARIUS, TENSORFLOW
from moco_d2.convert.sources.byol import BYOL
from moco_d2.convert.sources.record import CLASSIFIER, UNIT_RGB, CheckpointSource, without_fc
from moco_d2.facts import CAFFE_BGR

_SAME_POOLING = (
    "the source pads its max-pooling on the right and below only (TensorFlow's SAME); Detectron2 pads on all sides, so "
    "its features are shifted by half a stem pixel"
)

FACEBOOK = (
    CheckpointSource(
        name="VISSL",
        key="vissl",
        origin="VISSL",
        containers=("classy_state_dict.base_model.model.trunk", "model_state_dict"),
        prefix="_feature_blocks.",
        dropped=(without_fc("_feature_blocks.", "classifier"),),
        encoder="the backbone; a momentum encoder, if any, is in the file's `loss`",
    ),
    CheckpointSource(
        name="VISSL, backbone in a base model",
        key="vissl-base",
        origin="VISSL",
        containers=("classy_state_dict.base_model.model.trunk", "model_state_dict", ""),
        prefix="base_model._feature_blocks.",
        dropped=(without_fc("base_model._feature_blocks.", "classifier"),),
        encoder="the backbone; a momentum encoder, if any, is in the file's `loss`",
    ),
    CheckpointSource(
        name="Classy Vision",
        key="classy_vision",
        origin="Classy Vision",
        containers=("classy_state_dict.base_model.model.trunk", "model_state_dict", ""),
        naming=CLASSY_VISION,
        dropped=((r"^(_heads|heads|head)\.", "head"),),
    ),
)

OTHER_NAMES = (
    CheckpointSource(
        name="Separius' SimCLRv2",
        key="simclr-separius",
        origin="SimCLR v2 of Separius",
        arxiv="2006.10029",
        containers=("resnet",),
        naming=SEPARIUS,
        dropped=(CLASSIFIER,),
        pixels=UNIT_RGB,
    ),
    CheckpointSource(
        name="Google's SimCLR",
        key="simclr",
        origin="SimCLR v1 or v2",
        arxiv="2002.05709, 2006.10029",
        containers=("",),
        prefix="base_model/",
        naming=TENSORFLOW,
        dropped=(
            (r"/(Momentum|Adam|Adam_1)$", "optimizer"),
            (r"^head_(contrastive|supervised)", "head"),
            (r"^global_step$", "step counter"),
        ),
        pixels=UNIT_RGB,
        padding="pool",
        average="simclr-ema",
        encoder="base_model is the network; ema_model/base_model is its moving average",
        notes=(_SAME_POOLING,),
    ),
    CheckpointSource(
        name="Google's SimCLR, moving average",
        key="simclr-ema",
        origin="SimCLR v2, moving average",
        arxiv="2006.10029",
        containers=("",),
        prefix="ema_model/base_model/",
        naming=TENSORFLOW,
        dropped=((r"/(Momentum|Adam|Adam_1)$", "optimizer"),),
        pixels=UNIT_RGB,
        padding="pool",
        notes=(_SAME_POOLING,),
        on_request=True,
    ),
    BYOL,
    *(
        CheckpointSource(
            name="Caffe2 ResNet (MSRA)",
            key=key,
            origin="Caffe2 names (MSRA)",
            arxiv="1512.03385",
            containers=("", "blobs"),
            naming=naming,
            dropped=(
                (r"^(fc1000|pred|cls_score)_[wb]$", "classifier"),
                (r"^conv1_b$", "bias of conv1, which Caffe2's ResNet and Detectron2 do not apply"),
                (r"_momentum$", "optimizer"),
                (r"^(lr|weight_order)$", "solver"),
                (
                    r"^(fpn|rpn|conv_rpn|bbox_pred|fc6|fc7|mask|conv_fcn|kps|head_conv|retnet|conv5_mask|_\[)",
                    "detector's parts",
                ),
            ),
            pixels=CAFFE_BGR,
            stride_in_1x1=True,
            notes=("order, mean and stride are those of every published Caffe2 ResNet; weights do not show them",),
        )
        for key, naming in (("caffe2", CAFFE2), ("caffe2-short", CAFFE2_SHORT), ("caffe2-affine", CAFFE2_AFFINE))
    ),
)

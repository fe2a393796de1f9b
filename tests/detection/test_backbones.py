"""Backbones of basic blocks: Detectron2's own at full width, of any other width too, and refused where it must be."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model

from moco_d2.config import load_cfg
from moco_d2.detection.preflight import run_problems
from moco_d2.facts import ResNetFacts

C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k"
FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x"
OURS = ("MODEL.BACKBONE.NAME", "build_basic_resnet_backbone")


def basic(name, *opts, depth=18, width=64):
    return load_cfg(name, [
        "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", str(depth), "MODEL.RESNETS.STEM_OUT_CHANNELS", str(width),
        "MODEL.RESNETS.RES2_OUT_CHANNELS", str(width), *opts,
    ])  # fmt: skip


@pytest.mark.parametrize(("name", "depth", "frozen"), [(C4, 34, "2"), (FPN, 18, "0"), (RETINANET, 18, "0")])
def test_at_full_width_the_network_is_detectron2s_from_the_first_weight_to_the_features(name, depth, frozen):
    networks = []
    for builder in ((), OURS):
        torch.manual_seed(0)
        cfg = basic(name, "MODEL.BACKBONE.FREEZE_AT", frozen, *builder, depth=depth)
        networks.append(build_backbone(cfg, ShapeSpec(channels=3)).eval())
    (theirs, ours), image = networks, torch.randn(1, 3, 64, 96)
    assert str(theirs) == str(ours) and theirs.output_shape() == ours.output_shape()
    assert [(n, p.requires_grad) for n, p in theirs.named_parameters()] == [
        (n, p.requires_grad) for n, p in ours.named_parameters()
    ]
    features = theirs(image)
    assert features.keys() == (got := ours(image)).keys()
    assert all(torch.equal(features[name], got[name]) for name in features)


@pytest.mark.parametrize(("depth", "width"), [(18, 64), (34, 16)])
def test_conv5_of_a_c4_detector_is_the_stage_that_a_complete_backbone_has(depth, width):
    complete = basic(C4, *OURS, "MODEL.RESNETS.OUT_FEATURES", "('res5',)", depth=depth, width=width)
    stage = build_backbone(complete, ShapeSpec(channels=3)).res5.state_dict()
    model = build_model(basic(C4, *(() if width == 64 else OURS), depth=depth, width=width))
    head = {name: t.shape for name, t in model.roi_heads.res5.state_dict().items() if not name.startswith("norm.")}
    assert head == {name: tensor.shape for name, tensor in stage.items()}
    assert model.roi_heads.res5.norm.num_features == model.roi_heads.box_predictor.cls_score.in_features == 8 * width
    assert model.roi_heads.res5[0].conv1.stride == (2, 2)


def test_detectron2s_builder_of_another_width_is_refused_with_the_name_of_ours():
    found = [line for line in run_problems(basic(FPN, width=16), 1) if "RESNETS" in line]
    assert found == [
        "MODEL.BACKBONE.NAME is build_resnet_fpn_backbone, which builds a ResNet-18 with 64 channels in res2 only, but "
        "MODEL.RESNETS.RES2_OUT_CHANNELS is 16: pass MODEL.BACKBONE.NAME build_basic_resnet_backbone"
    ]
    narrow = ResNetFacts(depth=18, stem_channels=16, res2_channels=16, width_per_group=64)
    assert narrow.contradictions(basic(FPN, width=16)) == [
        "MODEL.BACKBONE.NAME is build_resnet_fpn_backbone in the config, "
        "but the weights need build_basic_resnet_backbone"
    ]
    for builder in (OURS, ("MODEL.BACKBONE.NAME", "my_own")):
        assert narrow.contradictions(basic(FPN, *builder, width=16)) == []
    for cfg in (basic(FPN), basic(FPN, *OURS, width=16)):
        assert not [line for line in run_problems(cfg, 1) if "RESNETS" in line]


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [("DEPTH", "50", "18 or 34$"), ("NUM_GROUPS", "2", "1, .* no groups"), ("RES5_DILATION", "2", "1, .* no dilation"),
     ("DEFORM_ON_PER_STAGE", "[False, False, False, True]", "False for every stage, .* no deformable")],
)  # fmt: skip
def test_what_basic_blocks_do_not_have_is_refused(key, value, rule):
    cfg = basic(FPN, *OURS, f"MODEL.RESNETS.{key}", value)
    with pytest.raises(ValueError, match=rf"^MODEL\.RESNETS\.{key} is .*; .*it must be {rule}") as told:
        build_backbone(cfg, ShapeSpec(channels=3))
    assert str(told.value) in list(run_problems(cfg, 1))

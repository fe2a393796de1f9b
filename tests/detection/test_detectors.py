"""Every protocol's detector builds and takes a training step; the C4 head is the authors'."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from small_detector import COCO_FPN, SHORT, VOC_C4, small_cfg
from torch import nn

import moco_d2.detection  # noqa: F401  (registers the heads)
from moco_d2.config import list_configs

# Detectron2's anchors call meshgrid in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

LEAVES = [name for name in list_configs() if not name.startswith("Pretrain/") and name.endswith("_random")]


def batch(masks):
    """Return two training inputs of different sizes with two boxes each."""
    inputs = []
    for height, width in ((96, 128), (112, 96)):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [40.0, 30, 90, 80]]))
        instances.gt_classes = torch.tensor([3, 7])
        if masks:
            bits = torch.zeros(2, height, width, dtype=torch.bool)
            bits[0, 10:70, 10:60], bits[1, 30:80, 40:90] = True, True
            instances.gt_masks = BitMasks(bits)
        inputs.append({"image": torch.randint(0, 255, (3, height, width)).float(), "instances": instances})
    return inputs


@pytest.mark.parametrize("name", LEAVES)
def test_detector_builds_at_quarter_width_and_trains_every_layer(name):
    torch.manual_seed(0)
    cfg = small_cfg(name, *SHORT)
    if cfg.MODEL.MASK_ON:
        cfg.INPUT.MASK_FORMAT = "bitmask"
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch(cfg.MODEL.MASK_ON))
    expected = {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert set(losses) == expected | ({"loss_mask"} if cfg.MODEL.MASK_ON else set())
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without  # FREEZE_AT 0: the stem is trained, too


@pytest.fixture(scope="module")
def c4():
    return build_model(small_cfg(VOC_C4))


def test_extra_norm_has_the_authors_names_and_width(c4):
    extra = {k: tuple(v.shape) for k, v in c4.state_dict().items() if k.startswith("roi_heads.res5.norm.")}
    names = ("weight", "bias", "running_mean", "running_var")
    assert extra == {f"roi_heads.res5.norm.{n}": (512,) for n in names} | {
        "roi_heads.res5.norm.num_batches_tracked": ()
    }
    assert c4.roi_heads.box_predictor.cls_score.in_features == 512


def test_extra_norm_is_applied_last(c4):
    assert [name for name, _ in c4.roi_heads.res5.named_children()] == ["0", "1", "2", "norm"]
    out = c4.train().roi_heads.res5(torch.randn(8, 256, 14, 14))  # (R, C, 7, 7)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(512), atol=1e-4, rtol=0)


def test_heads_without_a_norm_are_refused():
    cfg = small_cfg(VOC_C4, "MODEL.RESNETS.NORM", "")
    with pytest.raises(ValueError, match=r"needs MODEL\.RESNETS\.NORM"):
        build_model(cfg)


def test_norms_sit_where_the_protocol_says():
    fpn = build_model(small_cfg(COCO_FPN))
    norms = (nn.SyncBatchNorm, nn.BatchNorm2d)
    assert sum(isinstance(m, norms) for m in fpn.backbone.bottom_up.modules()) == 53
    # Four lateral and four output convolutions.
    assert sum(isinstance(m, norms) for m in fpn.backbone.modules()) == 53 + 8
    assert not any(isinstance(m, norms) for m in fpn.roi_heads.modules())

"""Every protocol's detector builds and takes a training step; the C4 head is the authors'."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.layers.batch_norm import NaiveSyncBatchNorm
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage
from small_detector import COCO_FPN, DILATED, SHORT, VOC_C4, small_cfg
from torch import nn

from moco_d2.detection.segmentation import RandomScaleCrop
from moco_d2.detection.weights import load_weights, pretrained_names
from moco_d2.model_zoo import get_protocol, list_protocols

# Detectron2's anchors call meshgrid in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")

PROTOCOLS = [name for name in list_protocols() if not name.startswith("quick_")]
BOX = {"loss_cls", "loss_box_reg"}


def expected_losses(cfg):
    """Return the names of the losses that a config's detector must have."""
    if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
        return {"loss_sem_seg"}
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return BOX
    return {
        *BOX, "loss_rpn_cls", "loss_rpn_loc", *["loss_mask"] * cfg.MODEL.MASK_ON,
        *["loss_keypoint"] * cfg.MODEL.KEYPOINT_ON,
    }  # fmt: skip


def batch(cfg, classes=(0, 0)):
    """Return two training inputs of different sizes, with two boxes each, or with labels of pixels."""
    inputs = []
    for height, width in ((96, 128), (112, 96)):
        image = torch.randint(0, 255, (3, height, width)).float()
        if cfg.MODEL.META_ARCHITECTURE == "SemanticSegmentor":
            inputs.append({"image": image, "sem_seg": torch.randint(0, 3, (height, width))})
            continue
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[10.0, 10, 60, 70], [40.0, 30, 90, 80]]))
        instances.gt_classes = torch.tensor(classes)
        bits = torch.zeros(2, height, width, dtype=torch.bool)
        bits[0, 10:70, 10:60], bits[1, 30:80, 40:90] = True, True
        instances.gt_masks = BitMasks(bits)
        points = torch.tensor([[30.0, 40.0, 2.0], [60.0, 50.0, 2.0]])[:, None].repeat(1, 17, 1)
        instances.gt_keypoints = Keypoints(points)
        inputs.append({"image": image, "instances": instances})
    return inputs


@pytest.mark.parametrize("name", PROTOCOLS)
def test_detector_builds_at_quarter_width_and_trains_every_layer(name):
    torch.manual_seed(0)
    cfg = small_cfg(get_protocol(name).config + "_random", *SHORT, "INPUT.MASK_FORMAT", "bitmask")
    model = build_model(cfg).train()
    with EventStorage():
        losses = model(batch(cfg))
    assert set(losses) == expected_losses(cfg)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None]
    assert not without  # FREEZE_AT 0: the stem is trained, too


def test_dilated_c5_has_stride_16_512_channels_and_a_norm():
    backbone = build_model(small_cfg(DILATED)).backbone.eval()
    assert backbone.output_shape()["c5"] == ShapeSpec(channels=512, stride=16)
    top = backbone(torch.randn(1, 3, 64, 96))["c5"]
    assert top.shape == (1, 512, 4, 6) and top.min() == 0
    assert backbone.top.kernel_size == (3, 3) and backbone.top.bias is None and backbone.top.norm is not None
    # conv5 keeps conv4's resolution by dilation alone: the weights are those of the undilated network.
    (shortcut, first), second = backbone.bottom_up.res5[0].conv2.stride, backbone.bottom_up.res5[0].conv2.dilation
    assert (shortcut, first, second) == (1, 1, (2, 2))


def test_dilated_c5_takes_the_whole_backbone_from_a_converted_file(converted_file):
    cfg = small_cfg(DILATED, "MODEL.WEIGHTS", converted_file)
    model = build_model(cfg)
    load_weights(DetectionCheckpointer(model), cfg, str(converted_file))
    held = torch.load(converted_file)["model"]
    torch.testing.assert_close(model.backbone.bottom_up.res5[2].conv3.weight, held["res5.2.conv3.weight"])
    assert len(pretrained_names(model)) == len(held)


def test_fcn_logits_sit_on_the_pixels_that_features_are_centred_on():
    head = build_model(small_cfg("SemanticSegmentation/fcn16s_R_50_VOC_30k")).sem_seg_head
    assert [(c.dilation, c.kernel_size, c.out_channels) for c in head.convs] == [((6, 6), (3, 3), 256)] * 2
    assert (head.stride, head.predictor.out_channels) == (16, 21)
    coarse = torch.arange(12.0).reshape(1, 1, 3, 4)
    fine = head._enlarge(coarse)
    assert fine.shape == (1, 1, 48, 64)
    torch.testing.assert_close(fine[:, :, ::16, ::16], coarse)
    torch.testing.assert_close(fine[0, 0, 0, :33], torch.linspace(0, 2, 33))
    assert (fine[0, 0, 0, 48:] == 3).all()


def test_scale_and_crop_keeps_picture_and_labels_together_and_fills_with_void():
    labels = np.arange(1, 31, dtype=np.uint8).repeat(20).reshape(30, 20).repeat(4, 0).repeat(4, 1)  # rows of one value
    picture = labels[:, :, None].repeat(3, 2)
    sizes = set()
    for seed in range(20):
        np.random.seed(seed)  # noqa: NPY002  (Detectron2's augmentations draw from the global generator)
        inputs = T.AugInput(picture.copy(), sem_seg=labels.copy())
        transform = RandomScaleCrop((0.5, 2.0), (97, 113), fill=7, void=255)(inputs)
        assert inputs.image.shape == (97, 113, 3) and inputs.sem_seg.shape == (97, 113)
        void = inputs.sem_seg == 255
        assert (inputs.image[void] == 7).all()
        assert (abs(inputs.image[~void].astype(int) - inputs.sem_seg[~void][:, None].astype(int)) <= 1).all()
        sizes.add(transform[0].new_h)
    assert min(sizes) >= 60 and max(sizes) <= 240 and len(sizes) > 10


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
    assert type(c4.roi_heads.res5.norm) is type(c4.backbone.stem.conv1.norm) is NaiveSyncBatchNorm


def test_extra_norm_is_applied_last(c4):
    assert [name for name, _ in c4.roi_heads.res5.named_children()] == ["0", "1", "2", "norm"]
    out = c4.train().roi_heads.res5(torch.randn(8, 256, 14, 14))  # (R, C, 7, 7)
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(512), atol=1e-4, rtol=0)


def test_heads_without_a_norm_are_refused():
    cfg = small_cfg(VOC_C4, "MODEL.RESNETS.NORM", "")
    with pytest.raises(ValueError, match=r"MODEL\.RESNETS\.NORM is empty"):
        build_model(cfg)


def test_norms_sit_where_the_protocol_says():
    fpn = build_model(small_cfg(COCO_FPN))
    norms = (nn.SyncBatchNorm, nn.BatchNorm2d)
    assert sum(isinstance(m, norms) for m in fpn.backbone.bottom_up.modules()) == 53
    # Four lateral and four output convolutions.
    assert sum(isinstance(m, norms) for m in fpn.backbone.modules()) == 53 + 8
    assert not any(isinstance(m, norms) for m in fpn.roi_heads.modules())

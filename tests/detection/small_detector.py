"""The shipped configs at a quarter of the width and with a few proposals: seconds on the CPU."""

from __future__ import annotations

from moco_d2.config import load_cfg

VOC_C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k"
DILATED = "PascalVOC-Detection/faster_rcnn_R_50_dilated_C5_24k"
COCO_C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x"
COCO_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"


def _opts(keys):
    return [str(word) for pair in keys.items() for word in pair]


QUARTER = _opts({
    "MODEL.DEVICE": "cpu",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
})  # fmt: skip
VIT = _opts({
    "MODEL.VIT.EMBED_DIM": 24,
    "MODEL.VIT.DEPTH": 2,
    "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.GLOBAL_BLOCKS": (1,),
    "MODEL.VIT.SQUARE_PAD": 128,
})  # fmt: skip
SHORT = _opts({
    "INPUT.MIN_SIZE_TRAIN": (96,),
    "INPUT.MIN_SIZE_TEST": 96,
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.STEPS": (),
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.WARMUP_ITERS": 0,
    "TEST.PRECISE_BN.NUM_ITER": 2,
    "DATALOADER.NUM_WORKERS": 0,
    "SEED": 1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
})  # fmt: skip


def small_cfg(name, *opts):
    """Return a shipped config at a quarter of the width, for the CPU."""
    return load_cfg(name, [*QUARTER, *(VIT if "ViT" in name else ()), *map(str, opts)])

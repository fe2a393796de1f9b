"""The shipped configs: all load, and the merged trees are the published recipes key for key."""

from __future__ import annotations

import json
from pathlib import Path

import detectron2.config
import pytest
import yaml
from detectron2 import model_zoo

from moco_d2.config import config_files, flat, list_configs, load_cfg

# The quick schedules are shipped configs with smaller numbers, under names of their own.
DETECTION = [name for name in list_configs() if not name.startswith(("Pretrain/", "quick_schedules/"))]
INITS = ("", "_supervised", "_random")
VOC_C4 = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k"
COCO = "COCO-InstanceSegmentation/mask_rcnn_R_50_"

# facebookresearch/moco, commit 1999df8, detection/configs, on top of Detectron2's defaults.
AUTHORS_C4 = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 6000,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 1000,
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeadsExtraNorm",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "naiveSyncBN",
    "TEST.PRECISE_BN.ENABLED": True,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
}
AUTHORS_VOC = {
    "MODEL.MASK_ON": False,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
    "INPUT.MIN_SIZE_TRAIN": (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    "INPUT.MIN_SIZE_TEST": 800,
    "DATASETS.TRAIN": ("voc_2007_trainval", "voc_2012_trainval"),
    "DATASETS.TEST": ("voc_2007_test",),
    "SOLVER.STEPS": (18000, 22000),
    "SOLVER.MAX_ITER": 24000,
    "SOLVER.WARMUP_ITERS": 100,
}
AUTHORS_COCO = {
    "MODEL.MASK_ON": True,
    "INPUT.MIN_SIZE_TRAIN": (640, 672, 704, 736, 768, 800),
    "INPUT.MIN_SIZE_TEST": 800,
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
}
ONE_X = {"SOLVER.STEPS": (60000, 80000), "SOLVER.MAX_ITER": 90000}
TWO_X = {"SOLVER.STEPS": (120000, 160000), "SOLVER.MAX_ITER": 180000}
AUTHORS_MOCO = {  # the *_moco.yaml files; the others leave Detectron2's BGR defaults
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "INPUT.FORMAT": "RGB",
}
# The paper's FPN: Detectron2's own mask_rcnn_R_50_FPN with these differences.
PAPER_FPN = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.FPN.NORM": "SyncBN",
    "TEST.PRECISE_BN.ENABLED": True,
}
PUBLISHED = [
    (VOC_C4, AUTHORS_C4 | AUTHORS_VOC),
    (f"{COCO}C4_1x", AUTHORS_C4 | AUTHORS_COCO | ONE_X),
    (f"{COCO}C4_2x", AUTHORS_C4 | AUTHORS_COCO | TWO_X),
    (f"{COCO}FPN_1x", PAPER_FPN | ONE_X),
    (f"{COCO}FPN_2x", PAPER_FPN | TWO_X),
]


def flat(cfg, prefix=""):
    """Return {dotted key: value} of a config's leaves."""
    leaves = {}
    for key, value in cfg.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def detectron2_keys(cfg):
    """Return the leaves that Detectron2 knows, without the initial weights."""
    known = flat(detectron2.config.get_cfg())
    return {key: value for key, value in flat(cfg).items() if key in known and key != "MODEL.WEIGHTS"}


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_loads_names_its_protocol_and_survives_a_dump(name, tmp_path):
    cfg = load_cfg(name)
    assert cfg.PROTOCOL
    dumped = tmp_path / "config.yaml"
    dumped.write_text(cfg.dump())
    # Through JSON, because YAML turns Detectron2's nested tuples into lists.
    assert json.dumps(flat(load_cfg(dumped))) == json.dumps(flat(cfg))


def test_the_set_of_detection_configs():
    assert sorted(DETECTION) == sorted(name + init for name, _ in PUBLISHED for init in INITS)


@pytest.mark.parametrize("name", DETECTION)
def test_leaves_are_short(name):
    assert len(config_files(name)[0].read_text().splitlines()) < 15


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("name", "table"), PUBLISHED, ids=[name for name, _ in PUBLISHED])
def test_merged_tree_is_the_published_recipe_key_for_key(name, table, init):
    reference = detectron2.config.get_cfg()
    if "FPN" in name:
        reference.merge_from_file(model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"))
    expected = detectron2_keys(reference)
    changes = table | ({} if init == "_supervised" else AUTHORS_MOCO)
    assert set(changes) <= set(expected)
    expected |= changes
    merged = detectron2_keys(load_cfg(name + init))
    different = {key: (merged[key], expected[key]) for key in expected if merged[key] != expected[key]}
    assert not different


def test_heads_of_the_fpn_have_no_norm():
    cfg = load_cfg(f"{COCO}FPN_1x")
    heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_MASK_HEAD
    assert [(head.NORM, head.NUM_CONV, head.NUM_FC) for head in heads[:1]] == [("", 0, 2)]
    assert (heads[1].NORM, heads[1].NUM_CONV) == ("", 4)


def test_quick_schedules_do_not_bear_a_published_protocols_name():
    published = {load_cfg(name).PROTOCOL for name in list_configs() if not name.startswith("quick_")}
    quick = {load_cfg(name).PROTOCOL for name in list_configs() if name.startswith("quick_")}
    assert len(quick) == 3 and all(name.startswith("quick_") for name in quick) and not quick & published


def test_precise_bn_takes_detectron2s_200_iterations():
    assert {load_cfg(name).TEST.PRECISE_BN.NUM_ITER for name in DETECTION} == {200}


@pytest.mark.parametrize("name", [name for name, _ in PUBLISHED])
def test_weights_are_asked_for_random_is_explicit_and_the_protocol_is_the_same(name):
    moco, supervised, random = (load_cfg(name + init) for init in INITS)
    assert (moco.MODEL.WEIGHTS, random.MODEL.WEIGHTS) == ("REQUIRED", "")
    assert supervised.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert len({cfg.PROTOCOL for cfg in (moco, supervised, random)}) == 1


def test_protocol_names_are_unique():
    protocols = [load_cfg(name).PROTOCOL for name, _ in PUBLISHED]
    assert len(set(protocols)) == len(protocols)


def test_init_parts_set_the_same_keys_so_that_one_replaces_another():
    parts = sorted((config_files(VOC_C4)[0].parents[1] / "Base").glob("init-*.yaml"))
    keys = {part.stem: set(flat(yaml.safe_load(part.read_text()))) for part in parts}
    assert len(keys) == 3
    assert len({frozenset(value) for value in keys.values()}) == 1, keys

"""The shipped configs: all load, and the merged trees are the published recipes key for key."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import detectron2.config
import pytest
import yaml
from detectron2 import model_zoo
from detectron2.config import CfgNode

from moco_d2.config import INITS, add_config, config_files, flat, list_configs, load_cfg
from moco_d2.data import AUGMENTATIONS
from moco_d2.layers.encoders import ENCODERS, Encoder
from moco_d2.messages import unknown_name
from moco_d2.methods import METHODS
from moco_d2.model_zoo import (
    config_changes,
    get_config,
    get_protocol,
    list_protocols,
    pretraining_changes,
    protocol_table,
    published_tables,
    recipe_table,
)

# The quick schedules are shipped configs with smaller numbers, under names of their own.
DETECTION = [name for name in list_configs() if not name.startswith(("Pretrain/", "quick_schedules/"))]
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
# SwAV's and Barlow Twins' text.
HIGH_LR = {"SOLVER.BASE_LR": 0.1, "SOLVER.WARMUP_ITERS": 1000, "SOLVER.WARMUP_FACTOR": 0.333}
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
SIX_X = {"SOLVER.STEPS": (480000, 520000), "SOLVER.MAX_ITER": 540000}
VOC07 = {  # the paper's 9k iterations; the steps are 24k's, scaled
    "DATASETS.TRAIN": ("voc_2007_trainval",),
    "SOLVER.STEPS": (6750, 8250),
    "SOLVER.MAX_ITER": 9000,
}
# What the paper says of every detector: all layers fine-tuned, BN trained and synchronised, in new layers too.
TUNED = {"MODEL.BACKBONE.FREEZE_AT": 0, "MODEL.RESNETS.NORM": "SyncBN", "TEST.PRECISE_BN.ENABLED": True}
PAPER_FPN = TUNED | {"MODEL.FPN.NORM": "SyncBN"}
PAPER_DILATED = TUNED | {
    "MODEL.BACKBONE.NAME": "build_resnet_dilated_c5_backbone",
    "MODEL.RPN.IN_FEATURES": ["c5"],
    "MODEL.ROI_HEADS.IN_FEATURES": ["c5"],
}
NORM_IN_HEADS = {  # Detectron2's Misc/mask_rcnn_R_50_FPN_3x_syncbn
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "SyncBN",
    "MODEL.ROI_MASK_HEAD.NORM": "SyncBN",
}
LVIS = {"DATALOADER.SAMPLER_TRAIN": "RepeatFactorTrainingSampler", "TEST.DETECTIONS_PER_IMAGE": 300}
SEGMENTATION = {
    "MODEL.META_ARCHITECTURE": "SemanticSegmentor",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",
    "MODEL.RESNETS.OUT_FEATURES": ["res5"],
    "MODEL.RESNETS.RES5_DILATION": 2,
    "MODEL.SEM_SEG_HEAD.NAME": "FCN16sHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res5"],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 256,
    "MODEL.SEM_SEG_HEAD.NORM": "SyncBN",
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.WARMUP_ITERS": 0,
    "INPUT.MIN_SIZE_TEST": 0,
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute",
}
VOC_SEGMENTATION = SEGMENTATION | {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 21,
    "DATASETS.TRAIN": ("voc_2012_train_aug_sem_seg",),
    "DATASETS.TEST": ("voc_2012_val_sem_seg",),
    "INPUT.CROP.SIZE": [513, 513],
    "SOLVER.BASE_LR": 0.003,
    "SOLVER.STEPS": (21000, 27000),
    "SOLVER.MAX_ITER": 30000,
}
CITYSCAPES_SEGMENTATION = SEGMENTATION | {
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19,
    "DATASETS.TRAIN": ("cityscapes_fine_sem_seg_train",),
    "DATASETS.TEST": ("cityscapes_fine_sem_seg_val",),
    "INPUT.CROP.SIZE": [769, 769],
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.STEPS": (63000, 81000),
    "SOLVER.MAX_ITER": 90000,
}
# Detectron2's projects/ViTDet, and its common/models/mask_rcnn_vitdet.py, in words of yacs.
VITDET = {
    "MODEL.BACKBONE.NAME": "build_vit_sfp_backbone",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.NORM": "SyncBN",  # from the part with R50-FPN's heads; a ViT does not read it
    "MODEL.FPN.NORM": "LN",
    "MODEL.RPN.CONV_DIMS": [-1, -1],
    "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.NORM": "LN",
    "MODEL.ROI_MASK_HEAD.NORM": "LN",
    "INPUT.MIN_SIZE_TEST": 1024,
    "INPUT.MAX_SIZE_TEST": 1024,
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.REFERENCE_WORLD_SIZE": 64,
    "SOLVER.BASE_LR": 0.0001,
    "SOLVER.WEIGHT_DECAY": 0.1,
    "SOLVER.MAX_ITER": 184375,
    "SOLVER.STEPS": (163889, 177546),
    "SOLVER.WARMUP_ITERS": 250,
    "SOLVER.WARMUP_FACTOR": 0.001,
    "SOLVER.AMP.ENABLED": True,
}
VOC = "PascalVOC-Detection/faster_rcnn_R_50_"
# Of each config: the file of Detectron2's own that it starts from (none: the defaults), and all that differs.
D2_MASK_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
PUBLISHED = {
    VOC_C4: ("", AUTHORS_C4 | AUTHORS_VOC),
    f"{VOC}C4_24k_lr0.1": ("", AUTHORS_C4 | AUTHORS_VOC | HIGH_LR),
    f"{VOC}C4_24k_lr0.1_rpn0.2": ("", AUTHORS_C4 | AUTHORS_VOC | HIGH_LR | {"MODEL.RPN.LOSS_WEIGHT": 0.2}),
    f"{VOC}C4_VOC07_9k": ("", AUTHORS_C4 | AUTHORS_VOC | VOC07),
    f"{VOC}dilated_C5_24k": ("Base-RCNN-DilatedC5", PAPER_DILATED | AUTHORS_VOC),
    f"{VOC}FPN_24k": ("Base-RCNN-FPN", PAPER_FPN | AUTHORS_VOC),
    f"{COCO}C4_1x": ("", AUTHORS_C4 | AUTHORS_COCO | ONE_X),
    f"{COCO}C4_1x_lr0.03": ("", AUTHORS_C4 | AUTHORS_COCO | ONE_X | {"SOLVER.BASE_LR": 0.03}),
    f"{COCO}C4_2x": ("", AUTHORS_C4 | AUTHORS_COCO | TWO_X),
    f"{COCO}FPN_1x": (D2_MASK_FPN, PAPER_FPN | ONE_X),
    f"{COCO}FPN_2x": (D2_MASK_FPN, PAPER_FPN | TWO_X),
    f"{COCO}FPN_6x": (D2_MASK_FPN, PAPER_FPN | SIX_X),
    f"{COCO}FPN_4conv1fc_1x": (D2_MASK_FPN, PAPER_FPN | NORM_IN_HEADS | ONE_X),
    f"{COCO}FPN_4conv1fc_2x": (D2_MASK_FPN, PAPER_FPN | NORM_IN_HEADS | TWO_X),
    f"{COCO}FPN_4conv1fc_6x": (D2_MASK_FPN, PAPER_FPN | NORM_IN_HEADS | SIX_X),
    "COCO-InstanceSegmentation/mask_rcnn_ViT_B_SFP_100ep": (D2_MASK_FPN, VITDET),
    "COCO-InstanceSegmentation/mask_rcnn_ViT_B_SFP_1x": (
        D2_MASK_FPN, VITDET | {"SOLVER.MAX_ITER": 22500, "SOLVER.STEPS": (20000, 21667)},
    ),
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_2x": ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x", PAPER_FPN | TWO_X),
    "COCO-Detection/retinanet_R_50_FPN_1x": ("COCO-Detection/retinanet_R_50_FPN_1x", PAPER_FPN),
    "LVIS-InstanceSegmentation/mask_rcnn_R_50_FPN_v0.5_1x": (
        "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", PAPER_FPN | LVIS | ONE_X,
    ),
    "LVIS-InstanceSegmentation/mask_rcnn_R_50_FPN_v0.5_2x": (
        "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", PAPER_FPN | LVIS | TWO_X,
    ),
    "LVIS-InstanceSegmentation/mask_rcnn_R_50_FPN_v1_2x": (
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x", PAPER_FPN | LVIS | TWO_X,
    ),
    "Cityscapes/mask_rcnn_R_50_FPN_24k": ("Cityscapes/mask_rcnn_R_50_FPN", PAPER_FPN),
    "SemanticSegmentation/fcn16s_R_50_VOC_30k": ("", VOC_SEGMENTATION),
    "SemanticSegmentation/fcn16s_R_50_Cityscapes_90k": ("", CITYSCAPES_SEGMENTATION),
}  # fmt: skip
# Meant for 8 GPUs and scaled to what there is; with 8 nothing changes. Keys without a say in these detectors.
OURS = {"SOLVER.REFERENCE_WORLD_SIZE": 8}


def our_keys():
    """Return the leaves that importing this project adds to Detectron2's."""
    alone = CfgNode({group: CfgNode() for group in ("SOLVER", "DATASETS", "INPUT", "TEST")})
    add_config(alone)
    return set(flat(alone))


def detectron2_keys(cfg):
    """Return the leaves that Detectron2 knows without us, without the initial weights."""
    known = set(flat(detectron2.config.get_cfg())) - our_keys()
    return {key: value for key, value in flat(cfg).items() if key in known and key != "MODEL.WEIGHTS"}


def same(one, other):
    """Tell whether two values of a config are equal, be they lists or tuples."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == pytest.approx(other) if isinstance(one, float) else one == other


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_loads_names_its_protocol_and_survives_a_dump(name, tmp_path):
    cfg = load_cfg(name)
    assert cfg.PROTOCOL
    dumped = tmp_path / "config.yaml"
    dumped.write_text(cfg.dump())
    # Through JSON, because YAML turns Detectron2's nested tuples into lists.
    assert json.dumps(flat(load_cfg(dumped))) == json.dumps(flat(cfg))


def test_each_detection_config_is_a_protocol_of_the_model_zoo_and_in_the_table_here():
    zoo = {get_protocol(name).config for name in list_protocols() if not name.startswith("quick_")}
    assert set(DETECTION) == zoo == set(PUBLISHED)


@pytest.mark.parametrize("name", list_protocols())
def test_a_protocols_config_bears_its_name_under_every_init(name):
    for init in INITS:
        cfg = get_config(name, init)
        assert name == cfg.PROTOCOL and config_changes(cfg) == []


def test_a_departure_from_the_protocol_is_told_and_machine_and_weights_are_none():
    opts = ["MODEL.WEIGHTS", "x.pth", "SEED", "3", "DATALOADER.NUM_WORKERS", "1", "ENGINE.CHANNELS_LAST", "True"]
    protocol = "coco_mask_rcnn_R_50_FPN_1x"
    assert config_changes(get_config(protocol, opts=opts)) == []
    changed = get_config(protocol, "supervised", [*opts, "SOLVER.BASE_LR", "0.04", "MODEL.FPN.NORM", ""])
    assert sorted(config_changes(changed)) == ["MODEL.FPN.NORM=", "SOLVER.BASE_LR=0.04"]
    changed.PROTOCOL = "mine"
    assert config_changes(changed) is None


def test_unknown_protocols_and_inits_are_named_with_the_nearest():
    with pytest.raises(
        ValueError, match="no protocol 'coco_mask_rcnn_R50_FPN_1x'; nearest: coco_mask_rcnn_R_50_FPN_1x"
    ):
        get_protocol("coco_mask_rcnn_R50_FPN_1x")
    with pytest.raises(ValueError, match="init is 'msra'; it must be one of moco, supervised, random"):
        get_config("coco_mask_rcnn_R_50_FPN_1x", "msra")


WRONG = {  # key: (value, complaint)
    "SOLVER.BASE_LRR": ("3", "no config key SOLVER.BASE_LRR; did you mean 'SOLVER.BASE_LR' or"),
    "SOLVER.GAMMA": ("x", "SOLVER.GAMMA is 'x'; it must be a float, as 0.1 is"),
    "SOLVER.MOMENTUM.X": ("1", "no config key SOLVER.MOMENTUM.X; did you mean 'SOLVER.MOMENTUM' or"),
    "SOLVER.STEPS": ("5", "SOLVER.STEPS is 5; it must be a list or tuple, as ("),
    "SEED": ("two", "SEED is 'two'; it must be an int, as "),
    "DATA": ("5", "DATA is a group of keys and cannot be set to 5; it has "),
}
FILE = """
SOLVER: {BASE_LRR: 3, GAMMA: x, MOMENTUM: {X: 1}, STEPS: 5}
SEED: two
DATA: 5
SSL: {ARGS: {any: 1}}
VERSION: 2
"""


@pytest.mark.parametrize("source", ["the command line", "a file"])
def test_all_unknown_keys_and_wrong_types_are_named_at_once(source: str, tmp_path: Path):
    own = tmp_path / "own.yaml"
    own.write_text(FILE)
    right = ["SOLVER.WEIGHT_DECAY_BIAS", "0.1", "SOLVER.WEIGHT_DECAY", "0"]
    words = [*right, *itertools.chain.from_iterable((key, value) for key, (value, _) in WRONG.items())]
    with pytest.raises(ValueError) as caught:
        load_cfg(*((own, right) if source == "a file" else ("", words)))
    lines = str(caught.value).splitlines()
    assert len(lines) == len(WRONG)
    for line, (_, complaint) in zip(lines, WRONG.values(), strict=True):
        assert line.startswith(f"{own if source == 'a file' else source}: {complaint}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("SEED: !!python/object/apply:os.mkdir [ran]", "plain values only"),
        ("SEED: [1", "expected ',' or ']'"),
        ("", "is empty"),
        ("- SEED", "contains a list"),
        ("1: 2", "no config key 1"),
        ("_BASE_: nowhere.yaml", "_BASE_ is 'nowhere.yaml': there is no such file relative to the config"),
        ("_BASE_: it.yaml", "leads back to the file itself"),
        ("_BASE_: 3", "_BASE_ is 3; it must be a path"),
        ("_BASE_: $NOT_SET/a.yaml", "_BASE_ is '$NOT_SET/a.yaml': the environment variable NOT_SET is not set"),
        ("SOLVER: {GAMMA: 0.5}\nSEED: 1\nSOLVER: {MAX_ITER: 5}", "the key SOLVER appears twice, again in line 3 of "),
        ("SOLVER: {GAMMA: 0.5, GAMMA: 0.6}", "the key GAMMA appears twice"),
        ("DATASETS: {CUSTOM: {name: a, format: voc, root: d}}", "DATASETS.CUSTOM is a mapping; it must be a list"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_config_is_refused_in_one_line_and_runs_nothing(text, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("it.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(said)) as caught:
        load_cfg("it.yaml")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("it.yaml: ")
    assert not Path("ran").exists()


def test_an_encoders_arguments_have_defaults_earlier_names_and_those_of_the_encoder_that_is_taken(
    tmp_path, monkeypatch
):
    plain = {"width": 1.0, "stem": "imagenet", "norm": "BN", "zero_init_residual": False}
    assert dict(load_cfg("Pretrain/moco_v2_R50_200ep").SSL.ENCODER.ARGS) == plain
    (tmp_path / "a.yaml").write_text("SSL: {ENCODER: {WIDTH: 0.5, ARGS: {norm: GN}}}")
    cfg = load_cfg(tmp_path / "a.yaml", ["SSL.ENCODER.STEM", "cifar", "SSL.ENCODER.NAME", "resnet18"])
    assert dict(cfg.SSL.ENCODER.ARGS) == {**plain, "width": 0.5, "stem": "cifar", "norm": "GN"}

    def build_tiny(num_classes: int, width: float = 2.0) -> None: ...

    monkeypatch.setitem(ENCODERS, "tiny", Encoder(build_tiny, build_tiny))
    assert dict(load_cfg(tmp_path / "a.yaml", ["SSL.ENCODER.NAME", "tiny"]).SSL.ENCODER.ARGS) == {"width": 0.5}
    (tmp_path / "b.yaml").write_text("SSL: {ENCODER: {WIDTH: 0.5, ARGS: {width: 1.0}}}")
    with pytest.raises(ValueError, match=r"SSL\.ENCODER\.WIDTH is the earlier name of SSL\.ENCODER\.ARGS\.width"):
        load_cfg(tmp_path / "b.yaml")
    with pytest.raises(ValueError, match=r"no config key SSL\.ENCODER\.ARGS\.widths; did you mean '\S+width'"):
        load_cfg("Pretrain/moco_v2_R50_200ep", ["SSL.ENCODER.ARGS.widths", "2.0"])


def test_the_line_that_asks_for_code_is_named_in_the_base_that_holds_it(tmp_path):
    (tmp_path / "base.yaml").write_text("SEED: 1\nVERSION: !!python/object/apply:eval ['2']\n")
    (tmp_path / "own.yaml").write_text("_BASE_: base.yaml\n")
    with pytest.raises(ValueError, match=r"own.yaml: line 2 of \S+base.yaml asks for code, but a config may"):
        load_cfg(tmp_path / "own.yaml")


@pytest.mark.parametrize("suffix", ["", ".yaml", "_supervised", "_random.yaml"])
def test_a_base_may_be_a_shipped_configs_name_but_a_file_beside_the_config_goes_first(suffix, tmp_path):
    name = f"{COCO}FPN_1x{suffix.removesuffix('.yaml')}"
    (tmp_path / "own.yaml").write_text(f"_BASE_: {COCO}FPN_1x{suffix}\nSEED: 7\n")
    expected = load_cfg(name)
    expected.SEED = 7
    assert load_cfg(tmp_path / "own.yaml") == expected
    beside = tmp_path / f"{COCO}FPN_1x{suffix}"
    beside.parent.mkdir()
    beside.write_text("SOLVER: {MAX_ITER: 3}\n")
    assert load_cfg(tmp_path / "own.yaml").SOLVER.MAX_ITER == 3


def test_what_is_nearest_to_a_name():
    with pytest.raises(ValueError, match=r"no config key solver.base_lr; did you mean 'SOLVER.BASE_LR'\?$"):
        load_cfg("", ["solver.base_lr", "1.0"])
    with pytest.raises(ValueError, match=r"no config file '/', neither as a path nor by name; configs/README.md lists"):
        load_cfg("/")
    with pytest.raises(ValueError, match=r"the config file '\$NOT_SET/a': the environment variable NOT_SET"):
        load_cfg("$NOT_SET/a")
    assert unknown_name("KEY", "x", ("", "auto")) == "KEY is 'x'; it must be one of empty, auto"


def test_published_rows_of_the_paper():
    rows = {row.init: row for row in get_protocol("voc0712_faster_rcnn_R_50_C4_24k").published}
    assert rows["moco_v2_R50_800ep"].metrics == {"bbox/AP50": 82.5, "bbox/AP": 57.4, "bbox/AP75": 64.0}
    assert (rows["random"].std["bbox/AP75"], rows["random"].trials) == (0.4, 5)
    # Another lr is another protocol; a figure that was not published is missing.
    other = {row.init: row.metrics for row in get_protocol("voc0712_faster_rcnn_R_50_C4_24k_lr0.1").published}
    assert other["barlow_twins_R50_1000ep"]["bbox/AP"] == 56.8 and not other.keys() & rows.keys()
    assert rows["densecl_R50_200ep"].metrics == {"bbox/AP": 58.7}
    # The two detectors that papers call FPN are two protocols: same backbone weights, another figure.
    paper, other = (
        {row.init: row.metrics["bbox/AP"] for row in get_protocol(f"coco_mask_rcnn_R_50_{kind}_1x").published}
        for kind in ("FPN", "FPN_4conv1fc")
    )
    assert (paper["supervised"], other["supervised"]) == (38.9, 39.7)


def test_figures_of_detectors_that_no_config_builds_are_printed_and_belong_to_no_protocol():
    assert "MAE table 4, another detector than ViTDet's, no config here builds it" in published_tables()
    assert not {"coco_mask_rcnn_ViT_FPN", "coco_mask_rcnn_ViT_SFP"} & set(list_protocols())
    (row,) = get_protocol("coco_mask_rcnn_ViT_B_SFP_100ep").published
    assert row.metrics == {"bbox/AP": 51.6, "segm/AP": 45.9}


def test_the_documented_tables_are_the_model_zoos():
    root = Path(__file__).parents[2]
    assert "| `moco_v2_R50_200ep` | `Pretrain/moco_v2_R50_200ep` | `MoCo` | resnet50 | 200 | 256 |" in recipe_table()
    remedy = "run python -m moco_d2.model_zoo, and put what it prints there"
    assert protocol_table() in (root / "docs/configs.md").read_text(), remedy
    assert published_tables() in (root / "docs/configs.md").read_text(), remedy
    assert protocol_table() in (root / "configs/README.md").read_text(), remedy
    text = (root / "docs/configs.md").read_text()
    assert {name for name in list_configs() if name.startswith("Pretrain/") and f"| `{name}` |" not in text} == set()


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_merged_tree_is_the_published_recipe_key_for_key(name, init):
    base, table = PUBLISHED[name]
    reference = detectron2.config.get_cfg()
    if base:
        path = model_zoo.get_config_file(f"{base}.yaml")
        reference.merge_from_file(path, allow_unsafe=True)  # RetinaNet's file computes its anchors
    expected = detectron2_keys(reference)
    changes = OURS | table | ({} if init == "supervised" else AUTHORS_MOCO)
    assert set(changes) <= set(expected)
    expected |= changes
    merged = detectron2_keys(load_cfg(name + INITS[init]))
    different = {key: (merged[key], expected[key]) for key in expected if not same(merged[key], expected[key])}
    assert not different


def test_quick_schedules_do_not_bear_a_published_protocols_name():
    published = {load_cfg(name).PROTOCOL for name in list_configs() if not name.startswith("quick_")}
    quick = {load_cfg(name).PROTOCOL for name in list_configs() if name.startswith("quick_")}
    assert all(name.startswith("quick_") for name in quick) and not quick & published


@pytest.mark.parametrize("name", list_configs())
def test_every_shipped_config_is_a_protocol_or_a_recipe_from_which_it_does_not_depart(name):
    cfg = load_cfg(name)
    assert [config_changes(cfg), pretraining_changes(cfg)] in ([[], None], [None, []])
    assert cfg.SSL.METHOD in METHODS and cfg.SSL.ENCODER.NAME in ENCODERS and cfg.DATA.AUGMENTATION in AUGMENTATIONS


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_asked_for_random_is_explicit_and_the_protocol_is_the_same(name):
    moco, supervised, random = (load_cfg(name + suffix) for suffix in INITS.values())
    assert (moco.MODEL.WEIGHTS, random.MODEL.WEIGHTS) == ("REQUIRED", "")
    assert supervised.MODEL.WEIGHTS == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert len({cfg.PROTOCOL for cfg in (moco, supervised, random)}) == 1


def test_init_parts_set_the_same_keys_so_that_one_replaces_another():
    parts = sorted((config_files(VOC_C4)[0].parents[1] / "Base").glob("init-*.yaml"))
    keys = {part.stem: set(flat(yaml.safe_load(part.read_text()))) for part in parts}
    assert len(keys) == 3
    assert len({frozenset(value) for value in keys.values()}) == 1, keys

"""A small detector trained with many switches on: test-time augmentation is done, and the table of roles is true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.solver import build_lr_scheduler
from recorded_cfg import RecordedCfg
from small_detector import COCO_C4, COCO_FPN, SHORT, small_cfg

from moco_d2.config import flat, load_cfg, roles
from moco_d2.config.roles import DETECTION
from moco_d2.detection.datasets import register_custom
from moco_d2.detection.dry_run import rehearse
from moco_d2.detection.evaluation import Evaluation
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.preflight import check_run, run_problems
from moco_d2.detection.segmentation import build_segmentation_mapper
from moco_d2.detection.trainer import TransferTrainer, evaluate
from moco_d2.reports.summary import build_tables, find_runs, heading

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    # Detectron2's: an evaluation without detections has no metrics, and a scheduler starts before the optimizer.
    pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning"),
]

RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x"
SEGMENTER = "SemanticSegmentation/fcn16s_R_50_VOC_30k"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_2x"
VIT = "COCO-InstanceSegmentation/mask_rcnn_ViT_B_SFP_100ep"
AUGMENTED = ["TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)"]
SETS = ["MODEL.WEIGHTS", "", "DATASETS.TRAIN", "('tiny',)", "DATASETS.TEST", "('tiny',)"]
# As many switches on as go together; others are built below.
ON = [
    "INPUT.CROP.ENABLED", "True", "DATASETS.FRACTION", "75.0", "SOLVER.CLIP_GRADIENTS.ENABLED", "True",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "norm", "DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler",
]  # fmt: skip

# Read only where there is more than a test has.
ELSEWHERE = {
    "VERSION": "by files that are merged",
    "CUDNN_BENCHMARK": "by default_setup, which the commands call",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER": "with LVIS's counts of classes",
    "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": "with labels of keypoints",
    "DATASETS.PROPOSAL_FILES_TRAIN": "with files of proposals",
    "DATASETS.PROPOSAL_FILES_TEST": "with files of proposals",
}
# Read to see that they have their defaults.
LOOKED_AT = {"SSL.METHOD", "SSL.ENCODER.NAME"}


@pytest.fixture(scope="module")
def tiny(dataset_root: Path) -> Iterator[None]:
    coco = dataset_root / "coco"
    register_coco_instances("tiny", {}, str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"))
    yield
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


@pytest.fixture(scope="module")
def trained(tiny: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, set[str]]:
    """Return the folder of a run with test-time augmentation, its config, and the keys that it read."""
    folder = tmp_path_factory.mktemp("trained")
    cfg = small_cfg(COCO_C4, *SHORT, *SETS, *AUGMENTED, *ON, "OUTPUT_DIR", folder, "SOLVER.MAX_ITER", 1)
    RecordedCfg.read.clear()
    recorded = RecordedCfg(cfg)
    register_custom(recorded)
    trainer = TransferTrainer(recorded)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return folder, cfg, set(RecordedCfg.read)


def test_results_log_and_report_have_both_evaluations(trained: tuple[Path, Any, set[str]]) -> None:
    folder, cfg, _ = trained
    result = json.loads((folder / "results.json").read_text())
    scores = result["metrics"]["tiny"]
    assert list(scores) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    assert scores["bbox"].keys() == scores["bbox_TTA"].keys()
    assert "TEST.AUG.ENABLED=True" in result["config_changes"]
    assert "bbox_TTA/AP" in json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    plain, augmented = (folder / f"{part}inference/tiny/coco_instances_results.json" for part in ("", "TTA/"))
    assert json.loads(plain.read_text()) != json.loads(augmented.read_text())
    (table,) = build_tables(find_runs([folder]))
    assert [heading(column) for column in table.columns][::3] == [
        "box AP",
        "mask AP",
        "box AP with TTA",
        "mask AP with TTA",
    ]

    again = cfg.clone()
    again.MODEL.WEIGHTS = str(folder / "model_final.pth")
    evaluate(again)
    assert json.loads((folder / "results_eval_only.json").read_text())["metrics"] == result["metrics"]


def test_results_of_several_sets_are_joined_set_by_set() -> None:
    plain, augmented = ({name: {task: {"AP": 1.0}} for name in "ab"} for task in ("bbox", "bbox_TTA"))
    both = Evaluation(plain, dict.fromkeys("ab", "hotcoco 1")).joined(Evaluation(augmented, {"b": "pycocotools 2"}))
    assert both.metrics == both.by_task() == {name: {**plain[name], **augmented[name]} for name in "ab"}
    assert both.libraries == {"a": "hotcoco 1", "b": "pycocotools 2"}


@pytest.mark.parametrize("config", [RETINANET, SEGMENTER, KEYPOINTS])
def test_detectors_without_test_time_augmentation_are_refused_by_name(config: str, tiny: None) -> None:
    cfg = small_cfg(config, *SHORT, *SETS, *AUGMENTED)
    said = "MODEL.KEYPOINT_ON True" if config == KEYPOINTS else f"MODEL.META_ARCHITECTURE {cfg.MODEL.META_ARCHITECTURE}"
    (problem,) = (problem for problem in run_problems(cfg, 1) if "TEST.AUG" in problem)
    assert f"of GeneralizedRCNN, not {said}: pass TEST.AUG.ENABLED False" in problem


def test_a_dry_run_evaluates_with_it_at_one_size(tiny: None, tmp_path: Path) -> None:
    cfg = small_cfg(COCO_FPN, *SHORT, *SETS, *AUGMENTED, "OUTPUT_DIR", tmp_path, "MODEL.MASK_ON", "False")
    found = dict(rehearse(cfg))
    assert found["evaluation"].endswith("(test-time augmentation at 1 of 2 sizes)")
    assert (tmp_path / "TTA/inference/tiny/coco_instances_results.json").is_file()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("SEED", 2**32, "it must be below 2**32"),
        ("DATALOADER.NUM_WORKERS", -1, "it must be 0 (no worker processes) or more"),
        ("SOLVER.MAX_ITER", 0, "it must be positive"),
        ("SOLVER.MOMENTUM", 1.5, "it must be in [0, 1)"),
        ("SOLVER.STEPS", (20, 10), "it must be iterations in rising order"),
        ("SOLVER.STEPS", ("10",), "its items must be of the same kind as in (30000,)"),
        ("SOLVER.BASE_LR", float("nan"), "it must be finite"),
        ("MODEL.PIXEL_MEAN", ["x", 0.0, 0.0], "its items must be of the same kind as in ["),
        ("TEST.AUG.MIN_SIZES", (), "it must be one or more short sides in pixels"),
        ("TEST.DETECTIONS_PER_IMAGE", 0, "it must be positive"),
        ("TEST.EXPECTED_RESULTS", [["bbox", "AP", 1]], "it must be a list of [task, metric, value, tolerance]"),
        ("INPUT.MIN_SIZE_TRAIN", (), "it must be one or more short sides in pixels, above 0"),
        ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "foo", "it must be choice or range"),
        ("INPUT.RANDOM_FLIP", "foo", "it must be one of horizontal, vertical, none"),
        ("INPUT.MAX_SIZE_TRAIN", 0, "it must be positive"),
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 0, "it must be positive"),
    ],
)
def test_values_that_cannot_be_are_named_before_anything_is_built(key: str, value: Any, said: str, tiny: None) -> None:
    cfg = small_cfg(COCO_C4, *SHORT, *SETS, *AUGMENTED)
    cfg.merge_from_list([key, value])
    with pytest.raises(ValueError) as caught:
        check_run(cfg, world_size=1)
    found = [line for line in str(caught.value).splitlines() if "classes" not in line]
    assert len(found) == 1 and found[0].startswith(f"{key} is {value!r}; ") and said in found[0]


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("DATASETS.TRAIN", ({"tiny": 1},), "it must contain names and paths, as text"),
        ("INPUT.FORMAT", "GBR", "it must be RGB or BGR"),
        ("INPUT.MIN_SIZE_TRAIN", (0,), "it must be one or more short sides in pixels, above 0"),
        ("INPUT.MIN_SIZE_TEST", -1, "it must be positive, or 0"),
        ("INPUT.CROP.SIZE", [0.9], "it must be height and width"),
        ("MODEL.PIXEL_MEAN", [1.0], "it must be three numbers"),
        ("MODEL.PIXEL_STD", [0.0, 1.0, 1.0], "it must be three numbers above 0"),
        ("MODEL.BACKBONE.FREEZE_AT", 9, "it must be 0 (nothing is frozen) to 5"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[]], "it must be one list of positive numbers for all feature maps, or one"),
        ("MODEL.ANCHOR_GENERATOR.SIZES", [[32.0], [64.0]], "one list for each of the 1 in MODEL.RPN.IN_FEATURES"),
        ("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, -1.0]], "it must be one list of positive numbers"),
        ("MODEL.RPN.IN_FEATURES", [], "it must name one or more feature maps"),
        ("MODEL.RPN.BATCH_SIZE_PER_IMAGE", 0, "it must be positive"),
        ("SOLVER.GAMMA", -1.0, "it must be positive"),
    ],
)
def test_values_of_which_detectron2_would_fail_later_are_named_first(
    key: str, value: Any, said: str, tiny: None
) -> None:
    cfg = small_cfg(COCO_C4, *SHORT, *SETS)
    cfg.merge_from_list([key, value])
    found = [problem for problem in run_problems(cfg, 1) if "classes" not in problem]
    assert len(found) == 1 and found[0].startswith(f"{key} is {value!r}; ") and said in found[0]


def test_anchors_are_equally_many_on_all_feature_maps_of_rpn_and_retinanet(tiny: None) -> None:
    for config, sizes, count in ((COCO_FPN, [[32], [64], [128], [256], [512, 640]], "3 or 6"), (RETINANET, [[8]], "")):
        cfg = small_cfg(config, *SHORT, *SETS, "MODEL.ANCHOR_GENERATOR.SIZES", sizes)
        found = [problem for problem in run_problems(cfg, 1) if "classes" not in problem]
        assert len(found) == bool(count) and all(f" gives {count} anchors a position" in problem for problem in found)
    cfg.merge_from_list(
        ["MODEL.RETINANET.IN_FEATURES", ["p3", "p4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32]]]
    )
    (problem,) = (problem for problem in run_problems(cfg, 1) if "classes" not in problem)
    assert problem.endswith("one list for each of the 2 in MODEL.RETINANET.IN_FEATURES")


def test_the_table_of_roles_says_what_detectors_read(trained: tuple[Path, Any, set[str]]) -> None:
    _, cfg, in_training = trained
    built = [
        small_cfg(KEYPOINTS, "MODEL.MASK_ON", "True"), small_cfg(RETINANET), small_cfg(SEGMENTER),
        small_cfg(SEGMENTER, "MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"),
        small_cfg(COCO_FPN, "MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", 2.0),
        small_cfg(
            COCO_FPN, "MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
        ),
    ]  # fmt: skip
    read = set(in_training)
    for other in built:
        RecordedCfg.read.clear()
        recorded = RecordedCfg(other)
        build_model(recorded)
        _check(other, RecordedCfg.read, "MODEL.", but=("MODEL.WEIGHTS", "MODEL.LOAD_PROPOSALS"))
        read |= RecordedCfg.read
    RecordedCfg.read.clear()
    vit = RecordedCfg(small_cfg(VIT))
    TransferTrainer.build_optimizer(vit, build_model(vit))
    # Every init states the stride.
    _check(
        vit, RecordedCfg.read, "MODEL.", but=("MODEL.WEIGHTS", "MODEL.LOAD_PROPOSALS", "MODEL.RESNETS.STRIDE_IN_1X1")
    )
    PictureMapper(vit, is_train=True)
    read |= RecordedCfg.read
    RecordedCfg.read.clear()
    build_segmentation_mapper(RecordedCfg(small_cfg(SEGMENTER)))
    DatasetMapper(RecordedCfg(small_cfg(COCO_FPN, "MODEL.LOAD_PROPOSALS", "True")), is_train=True)
    DatasetMapper(RecordedCfg(small_cfg(COCO_FPN, "MODEL.LOAD_PROPOSALS", "True")), is_train=False)
    rotated = RecordedCfg(small_cfg(COCO_FPN, "MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"))
    build_anchor_generator(rotated, [ShapeSpec(stride=4)] * 5)
    for schedule in ("WarmupCosineLR", "WarmupStepWithFixedGammaLR"):
        own = RecordedCfg(small_cfg(COCO_FPN, *SHORT, "SOLVER.LR_SCHEDULER_NAME", schedule))
        build_lr_scheduler(own, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    read |= RecordedCfg.read

    _check(cfg, in_training)
    keys = flat(cfg)
    undeclared = {key for key in read if roles.role(key, DETECTION) == roles.UNREAD} - LOOKED_AT
    assert not undeclared, "read, and in the table not read by fine-tuning"
    never = {key for key in keys if roles.role(key, DETECTION) != roles.UNREAD} - read
    assert never == set(ELSEWHERE)


def _check(cfg: Any, read: set[str], group: str = "", but: tuple[str, ...] = ()) -> None:
    """Assert that a detector read every key of a group that the table calls read, switches considered."""
    values, defaults = flat(cfg), flat(load_cfg())
    wanted = {
        key
        for key in values
        if key.startswith(group) and roles.role(key, DETECTION) != roles.UNREAD
        if not roles.turned_off(key, DETECTION, values, defaults)
    }
    missing = wanted - read - set(ELSEWHERE) - set(but)
    assert not missing, f"{cfg.MODEL.META_ARCHITECTURE} of {cfg.PROTOCOL} does not read what the table says it does"

"""Detectors on a plain ViT: ViTDet's network and optimizer, guarded weights, jitter, every stage with a tiny one."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from omegaconf import ListConfig
from small_detector import COCO_FPN, VOC_C4, small_cfg

from moco_d2.config import load_cfg
from moco_d2.detection.checkpointer import TransferCheckpointer
from moco_d2.detection.dry_run import rehearse
from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.optimizer import build_optimizer
from moco_d2.detection.preflight import fit_to_machine, run_problems
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.detection.weights import all_names, facts_of, load_weights, pretrained_names
from moco_d2.facts import ResNetFacts, ViTFacts
from moco_d2.layers.vit import build_vit, describe
from moco_d2.reports import pretraining, report, trials
from moco_d2.reports.summary import build_tables, find_runs

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]

VITDET = "COCO-InstanceSegmentation/mask_rcnn_ViT_B_SFP_100ep"
QUICK = "quick_schedules/mask_rcnn_ViT_SFP_quick"
NET = "backbone.net."
# A quarter of the quick ViT.
TINY = {
    "MODEL.DEVICE": "cpu", "MODEL.VIT.EMBED_DIM": 24, "MODEL.VIT.DEPTH": 2, "MODEL.VIT.NUM_HEADS": 2,
    "MODEL.VIT.GLOBAL_BLOCKS": (1,), "MODEL.VIT.PRETRAIN_IMAGE_SIZE": 32, "MODEL.VIT.SQUARE_PAD": 96,
    "INPUT.JITTER.SIZE": 96, "INPUT.MIN_SIZE_TEST": 96, "INPUT.MAX_SIZE_TEST": 96, "DATALOADER.NUM_WORKERS": 0,
}  # fmt: skip


def tiny(*opts, name=QUICK):
    words = [word for pair in TINY.items() for word in pair]
    return load_cfg(name, [str(word) for word in (*words, *opts)])


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return build_vit(10, dim=24, depth=2, heads=2, patch=8, image=32)


@pytest.fixture(scope="module")
def vit_file(network, tmp_path_factory):
    """A converted file: ``vit_file(prefix, change)`` writes a variant."""
    folder = tmp_path_factory.mktemp("vit")
    numbers = iter(range(100))

    def write(prefix=NET, change=lambda content: None):
        state = {n: t for n, t in network.state_dict().items() if not n.startswith("head.")}
        content = {
            "model": {prefix + name: tensor for name, tensor in state.items()}, "matching_heuristics": True,
            "facts": describe(network, origin="a test", recipe="moco_v3_test").as_dict(),
        }  # fmt: skip
        change(content)
        path = folder / f"{next(numbers)}.pth"
        torch.save(content, path)
        return path

    return write


def load(cfg, path, names=pretrained_names):
    model = build_model(cfg)
    return model, load_weights(TransferCheckpointer(model), cfg, str(path), names)


def refusal(cfg, path):
    with pytest.raises(ValueError) as caught:
        load(cfg, path)
    return str(caught.value)


def test_the_detector_and_its_optimizer_are_those_of_detectron2s_vitdet_config(monkeypatch):
    cfg = load_cfg(f"{VITDET}_random", ["MODEL.DEVICE", "cpu"])
    lazy = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    for name in ("trunc_normal_", "normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_"):
        monkeypatch.setattr(
            torch.nn.init, name, lambda tensor, *_, **__: tensor
        )  # values take seconds, and say nothing
    ours, theirs = build_model(cfg), instantiate(lazy)
    assert {n: t.shape for n, t in ours.state_dict().items()} == {n: t.shape for n, t in theirs.state_dict().items()}
    assert str(ours).replace("ViTPyramid", "SimpleFeaturePyramid") == str(theirs)
    assert ours.backbone.output_shape() == theirs.backbone.output_shape()
    assert ours.backbone.padding_constraints == theirs.backbone.padding_constraints

    def settings(module):
        plain = (bool, int, float, str, tuple, list, dict, type(None), ListConfig)
        values = {k: v for k, v in vars(module).items() if isinstance(v, plain) and not k.startswith("_")}
        return {k: list(v) if isinstance(v, (tuple, ListConfig)) else v for k, v in values.items()}

    ours.roi_heads.box_predictor.loss_weight["loss_cls"] = 1.0  # the default, which LazyConfig states
    for part in ("proposal_generator", "roi_heads", "roi_heads.box_predictor"):
        assert settings(ours.get_submodule(part)) == settings(theirs.get_submodule(part)), part
    windows = [block.window_size for block in ours.backbone.net.blocks]
    assert windows == [block.window_size for block in theirs.backbone.net.blocks] and windows.count(0) == 4

    names = {parameter: name for name, parameter in ours.named_parameters()}
    found = {
        names[parameter]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, ours).param_groups
        for parameter in group["params"]
    }
    assert found.keys() == set(names.values())
    for name, (lr, decay) in found.items():
        block = re.match(r"backbone\.net\.blocks\.(\d+)\.", name)
        above = 12 - int(block[1]) if block else 13 if name.startswith(NET) else 0
        assert lr == pytest.approx(1e-4 * 0.7**above), name
        assert decay == (0 if name == f"{NET}pos_embed" or re.search(r"net.*\.norm\d\.", name) else 0.1), name
    assert not fit_to_machine(cfg, 1).SOLVER.AMP.ENABLED, "Detectron2's AMP ends in an assertion on the CPU"


@pytest.mark.parametrize("prefix", ["", NET])
def test_a_whole_vit_fills_the_backbone_under_either_name_and_position_embeddings_keep_their_size(
    prefix, network, vit_file, caplog
):
    with caplog.at_level("INFO", logger="moco_d2"):
        model, record = load(tiny(), vit_file(prefix))
    state, names = model.state_dict(), pretrained_names(model)
    assert len(names) == 2 * 12 + 3 and f"{NET}blocks.0.attn.rel_pos_h" in state
    for name in names:
        assert torch.equal(state[name], network.state_dict()[name.removeprefix(NET)]), name
    assert state[f"{NET}pos_embed"].shape == (1, 17, 24)
    assert record.facts == describe(network, origin="a test", recipe="moco_v3_test")
    assert f"{prefix}cls_token, {prefix}norm.weight, {prefix}norm.bias are left out" in caplog.text
    assert (state["backbone.simfp_3.0.norm.weight"] == 1).all(), "the last norm is not taken for the pyramid's"
    image = {"image": torch.zeros(3, 70, 96), "height": 70, "width": 96}
    assert "instances" in model.eval()([image])[0]


def test_without_padding_to_a_square_pictures_of_any_size_pass(network, vit_file):
    model, _ = load(tiny("MODEL.VIT.SQUARE_PAD", 0), vit_file())
    images = [{"image": torch.zeros(3, *size)} for size in ((70, 41), (33, 90))]
    padded = model.preprocess_image(images).tensor
    assert padded.shape[-2:] == (80, 96)
    with torch.no_grad():
        assert {k: tuple(v.shape[2:]) for k, v in model.backbone(padded).items()} == {
            "p2": (20, 24), "p3": (10, 12), "p4": (5, 6), "p5": (3, 3),
        }  # fmt: skip


def without(*names):
    return lambda content: [content["model"].pop(NET + name) for name in names]


def add(**tensors):
    return lambda c: (c.pop("facts"), c["model"].update({NET + k.replace("__", "."): v for k, v in tensors.items()}))


@pytest.mark.parametrize(
    ("change", "opts", "words"),
    [
        (without("blocks.1.mlp.fc1.bias"), (), "would stay random: not in the file: backbone.net.blocks.1.mlp"),
        (without("pos_embed"), (), "not in the file: backbone.net.pos_embed"),
        (add(blocks__0__ls1__gamma=torch.ones(24)), (), "no place (backbone.net.blocks.0.ls1.gamma)"),
        (add(blocks__2__norm1__bias=torch.ones(24)), (), "Check MODEL.VIT.DEPTH and REL_POS"),
        (add(), ("MODEL.VIT.PRETRAIN_IMAGE_SIZE", 64), "pos_embed is (1, 65, 24) in the detector, (1, 17, 24) in the"),
        (lambda c: None, ("MODEL.VIT.NUM_HEADS", 3), 'Pass MODEL.VIT.NUM_HEADS "2", or other weights'),
        (lambda c: None, ("INPUT.FORMAT", "BGR"), 'Pass INPUT.FORMAT "RGB"'),
    ],
)  # fmt: skip
def test_what_would_leave_the_vit_random_or_change_it_is_refused(change, opts, words, vit_file):
    assert words in refusal(tiny(*opts), vit_file(change=change))


def test_a_resnet_in_a_vits_config_and_a_vit_in_a_resnets_are_refused_by_both_names(vit_file, converted_file):
    said = refusal(tiny(), converted_file)
    assert "holds a ResNet-50 (by its facts; origin: a test), but the config's backbone, build_vit_sfp_backbone" in said
    assert "use a config for a ResNet-50" in said and "is a ViT of 2 blocks, 24 features, 2 heads" in said
    for name in (COCO_FPN, VOC_C4):
        said = refusal(small_cfg(name), vit_file())
        assert "holds a ViT of 2 blocks" in said and "is a ResNet-50.\n  Pass weights of a ResNet-50" in said
    assert isinstance(facts_of(tiny()), ViTFacts) and isinstance(facts_of(small_cfg(COCO_FPN)), ResNetFacts)
    (problem,) = (p for p in run_problems(load_cfg(f"{QUICK}_supervised"), 1) if "MODEL.WEIGHTS" in p)
    assert "R-50.pkl, a ResNet, but" in problem and "without the suffix _supervised" in problem


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.VIT.NUM_HEADS", 5, "MODEL.VIT.EMBED_DIM is 24; it must be a multiple of NUM_HEADS, 5"),
        ("MODEL.VIT.GLOBAL_BLOCKS", (1, 2), "it must be numbers of blocks, 0 to 1"),
        ("MODEL.VIT.SCALES", (2.0, 0.5), "each half of the one before"),
        ("MODEL.VIT.SQUARE_PAD", 64, "INPUT.JITTER.SIZE is 96; it must be at most MODEL.VIT.SQUARE_PAD, 64"),
        ("INPUT.JITTER.SCALE", (2.0, 1.0), "it must be two positive factors"),
        ("SOLVER.OPTIMIZER", "lars", "it must be one of sgd, adamw in fine-tuning"),
        ("SOLVER.LAYER_DECAY", 0.0, "it must be in (0, 1]"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_told_before_data_are_read(key, value, said):
    assert any(key.rpartition(".")[0] in p and said in p for p in run_problems(tiny(key, value), 1))


def test_timms_warning_does_not_reach_users_and_without_timm_the_remedy_is_told_before_a_run(monkeypatch):
    monkeypatch.delitem(sys.modules, "timm.models.layers", raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_model(tiny())
    monkeypatch.setitem(sys.modules, "timm", None)  # as if it were not installed
    remedy = "MODEL.BACKBONE.NAME is build_vit_sfp_backbone, which needs timm: pip install 'moco_d2[vit]'"
    assert remedy in list(run_problems(tiny(), 1))
    with pytest.raises(ValueError, match=re.escape(remedy)):
        build_model(tiny())


@pytest.mark.parametrize("pad", [False, True])
def test_boxes_and_masks_follow_the_jittered_picture(pad, tmp_path):
    from PIL import Image

    picture = np.zeros((60, 90, 3), np.uint8)
    picture[10:50, 20:70] = 255  # the object
    Image.fromarray(picture).save(tmp_path / "a.png")
    record = {
        "file_name": str(tmp_path / "a.png"), "height": 60, "width": 90,
        "annotations": [{"bbox": [20, 10, 50, 40], "bbox_mode": 1, "category_id": 0, "iscrowd": 0,
                         "segmentation": [[20, 10, 70, 10, 70, 50, 20, 50]]}],
    }  # fmt: skip
    opts = ["INPUT.JITTER.SCALE", (0.1, 2.0), "INPUT.JITTER.PAD", pad, "INPUT.MASK_FORMAT", "bitmask"]
    mapper = PictureMapper(tiny(*opts), is_train=True)
    sizes = set()
    for seed in range(25):
        np.random.seed(seed)  # noqa: NPY002  (Detectron2's augmentations draw from the global generator)
        example = mapper(record)
        image, instances = example["image"], example["instances"]
        assert max(image.shape) <= 96 and (not pad or image.shape[1:] == (96, 96))
        sizes.add(tuple(image.shape[1:]))
        if not len(instances):
            continue
        white = image[0] > 200
        mask, box = instances.gt_masks.tensor[0], instances.gt_boxes.tensor[0]
        assert (mask ^ white).float().sum() <= 0.15 * mask.sum() + 8, "up to the smoothing of edges"
        rows, columns = (mask.any(1 - axis).nonzero().flatten() for axis in (0, 1))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert sizes == {(96, 96)} if pad else len(sizes) > 5


SHORT = [
    "DATASETS.TRAIN", "('vit_coco',)", "DATASETS.TEST", "('vit_coco',)", "SEED", 1, "SOLVER.IMS_PER_BATCH", 2,
    "SOLVER.MAX_ITER", 2, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0, "SOLVER.CHECKPOINT_PERIOD", 1,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.VIT.DROP_PATH", 0.2,
]  # fmt: skip


@pytest.fixture
def pictures(dataset_root):
    coco = dataset_root / "coco"
    register_coco_instances("vit_coco", {}, str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"))
    yield
    DatasetCatalog.remove("vit_coco")
    MetadataCatalog.remove("vit_coco")


def train(cfg, resume=False):
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.train()
    return trainer


@pytest.mark.usefixtures("pictures")
def test_from_weights_through_dry_run_training_and_evaluation_to_a_report_and_resumed_to_the_bit(vit_file, tmp_path):
    weights = vit_file("")
    said = dict(rehearse(tiny(*SHORT, "MODEL.WEIGHTS", weights, "OUTPUT_DIR", tmp_path / "dry")))
    assert said["weights"].endswith("a test, RGB; fills the whole backbone")
    assert said["checkpoint"].endswith("read back bit for bit")

    words = [str(word) for pair in TINY.items() for word in pair] + [str(word) for word in SHORT]
    words = words[: words.index("SEED")] + words[words.index("SEED") + 2 :]
    planned = trials.plan("quick_coco_mask_rcnn_ViT_SFP", [f"mine={weights}", "random"], [1], tmp_path, opts=words)
    for trial in planned:
        trials.prepare(trial)
        trained = train(trial.cfg)
    folder, again = planned[1].folder, tmp_path / "again"
    again.mkdir()
    shutil.copy(folder / "model_0000000.pth", again)
    (again / "last_checkpoint").write_text("model_0000000.pth")
    cfg = planned[1].cfg.clone()
    cfg.OUTPUT_DIR = str(again)
    resumed = train(cfg, resume=True)
    states = [trainer.model.state_dict() for trainer in (trained, resumed)]
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    moments = [trainer.optimizer.state_dict()["state"] for trainer in (trained, resumed)]
    assert all(torch.equal(m["exp_avg_sq"], moments[1][key]["exp_avg_sq"]) for key, m in moments[0].items())
    for key, value in (("SOLVER.OPTIMIZER", "sgd"), ("SOLVER.LAYER_DECAY", 1.0)):
        cfg.merge_from_list([key, value])
        with pytest.raises(ValueError, match=f"a run with {key} .* cannot be resumed with {value}"):
            TransferTrainer(cfg).resume_or_load(resume=True)
        cfg = planned[1].cfg.clone()
        cfg.OUTPUT_DIR = str(again)

    result = json.loads((planned[0].folder / "results.json").read_text())
    assert result["weights"]["facts"] == torch.load(weights)["facts"] and {"bbox", "segm"} == set(
        result["metrics"]["vit_coco"]
    )
    (table,) = build_tables(find_runs([tmp_path / "quick_coco_mask_rcnn_ViT_SFP"]))
    backbones = pretraining.build_backbones([], [], [table])
    assert {row.label for row in backbones.rows} == {"mine", "random, ViT, 2 blocks of 24, patch 8"}
    text = report.write_report([planned[0].folder.parents[1]], tmp_path / "report")[0].read_text()
    assert "| mine" in text and "quick_coco_mask_rcnn_ViT_SFP" in text


@pytest.mark.usefixtures("pictures")
def test_a_trained_detector_is_evaluated_and_fine_tuned_again(vit_file, tmp_path):
    cfg = tiny(*SHORT, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", vit_file(), "OUTPUT_DIR", tmp_path)
    trained = train(cfg)
    path = tmp_path / "model_final.pth"
    model, record = load(cfg, path, all_names)
    assert all(torch.equal(tensor, trained.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (record.facts.origin, record.facts.heads) == ("a test", 2)
    _, record = load(cfg, path)
    assert {"pyramid", "relative_positions", "box_head"} <= set(record.facts.parts)
    assert "Check MODEL.VIT.DEPTH and REL_POS" in refusal(tiny("MODEL.VIT.REL_POS", "False"), path)

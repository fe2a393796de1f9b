"""TransferTrainer from weights to results on disk, on one CPU process and two, and what it refuses before it starts."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances, register_pascal_voc
from small_detector import COCO_C4, COCO_FPN, QUARTER, SHORT, VOC_C4, small_cfg

from moco_d2.config import load_cfg, roles
from moco_d2.convert import convert_checkpoint
from moco_d2.detection.hooks import RepeatablePreciseBN
from moco_d2.detection.metrics.coco import ExactCOCOEvaluator
from moco_d2.detection.metrics.evaluators import build_evaluator
from moco_d2.detection.metrics.voc import VOCEvaluator
from moco_d2.detection.preflight import check_run, fit_to_machine
from moco_d2.detection.trainer import TransferTrainer, evaluate
from moco_d2.io.provenance import sha256
from moco_d2.layers.resnet import build_resnet, describe

# Detectron2's own: meshgrid in the old way, masks handed to numpy 2 in the old way, classes without any box in VOC.
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in divide:RuntimeWarning"),
]

ROOT = Path(__file__).parents[2]
VOC_SETS = ["DATASETS.TRAIN", "('tiny_voc',)", "DATASETS.TEST", "('tiny_voc',)"]
COCO_SETS = ["DATASETS.TRAIN", "('tiny_coco',)", "DATASETS.TEST", "('tiny_coco',)"]


@pytest.fixture(autouse=True)
def tiny_datasets(dataset_root):
    register_pascal_voc("tiny_voc", str(dataset_root / "VOC2007"), "trainval", 2007)
    MetadataCatalog.get("tiny_voc").evaluator_type = "pascal_voc"
    coco = dataset_root / "coco"
    register_coco_instances("tiny_coco", {}, str(coco / "annotations/instances_val2017.json"), str(coco / "val2017"))
    yield
    for name in ("tiny_voc", "tiny_coco"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def detections(folder, dataset):
    """Return the saved COCO detections in an order that does not depend on the process that found them."""
    found = json.loads((folder / "inference" / dataset / "coco_instances_results.json").read_text())
    return sorted((d["image_id"], d["category_id"], d["score"], d["bbox"]) for d in found)


def test_voc_training_evaluation_resuming_and_evaluation_only(converted_file, tmp_path):
    opts = [*SHORT, *VOC_SETS, "MODEL.WEIGHTS", converted_file, "OUTPUT_DIR", tmp_path]
    trainer = TransferTrainer(small_cfg(VOC_C4, *opts, "TEST.EVAL_PERIOD", 1))
    trainer.resume_or_load(resume=False)
    before = trainer.model.backbone.stem.conv1.weight.clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.backbone.stem.conv1.weight)

    assert len(trainer.storage.history("bbox/AP").values()) == 2, "after each of the two steps"

    result = json.loads((tmp_path / "results.json").read_text())
    assert result["protocol"] == "voc0712_faster_rcnn_R_50_C4_24k"
    assert result["weights"]["path"] == str(converted_file)
    assert result["weights"]["facts"]["recipe"] == "moco_test"
    scores = result["metrics"]["tiny_voc"]["bbox"]
    by_class = [ap for name, ap in scores.items() if name.startswith("AP-")]
    assert {"AP", "AP50", "AP75", "AP-dog"} <= set(scores) and len(by_class) == 20
    assert scores["AP"] == pytest.approx(sum(by_class) / 20)
    assert (result["iterations"], result["schedule"]["IMS_PER_BATCH"], result["seed"]) == (2, 2, 1)
    assert "bbox/AP50" in json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])

    longer = TransferTrainer(small_cfg(VOC_C4, *opts, "SOLVER.MAX_ITER", 3))
    longer.resume_or_load(resume=True)
    assert longer.start_iter == 2
    assert longer.weights.facts.origin == "a test"
    assert longer.optimizer.state
    longer.train()

    evaluate(small_cfg(VOC_C4, *opts, "MODEL.WEIGHTS", tmp_path / "model_final.pth"))
    again = json.loads((tmp_path / "results_eval_only.json").read_text())
    assert again["metrics"] == json.loads((tmp_path / "results.json").read_text())["metrics"]


def test_no_checkpoint_follows_a_detectors_loss_that_is_not_finite(tmp_path):
    opts = [*SHORT, *VOC_SETS, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 4]
    trainer = TransferTrainer(small_cfg(VOC_C4, *opts, "SOLVER.CHECKPOINT_PERIOD", 1, "TEST.PRECISE_BN.ENABLED", False))
    assert not trainer.data_loader.pin_memory, "there is no GPU to copy to"

    def with_nan(_, __, losses):
        return {name: loss * (math.nan if trainer.iter == 1 else 1) for name, loss in losses.items()}

    trainer.model.register_forward_hook(with_nan)
    with pytest.raises(FloatingPointError, match="NaN at iteration=1!"):
        trainer.train()
    assert [path.name for path in tmp_path.glob("model_*")] == ["model_0000000.pth"]


def test_a_narrow_resnet18_trains_and_is_evaluated_in_both_detectors_as_the_converter_says(tmp_path):
    torch.manual_seed(0)
    network = build_resnet("resnet18", width=0.25)
    torch.save({"state_dict": network.state_dict(), "facts": describe(network).as_dict()}, tmp_path / "backbone.pth")
    _, differences = convert_checkpoint(tmp_path / "backbone.pth", tmp_path / "out.pth")
    assert len(differences) == 4, "proven"
    (tmp_path / "leaf.yaml").write_text(f"_BASE_: [{VOC_C4}, out.yaml]")  # the config beside the weights is enough
    fpn = "quick_schedules/mask_rcnn_R_18_FPN_quick"
    for config, sets, stem in ((tmp_path / "leaf.yaml", VOC_SETS, "backbone"), (fpn, COCO_SETS, "backbone.bottom_up")):
        folder = tmp_path / stem
        options = [*SHORT, *sets, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", tmp_path / "out.pth", "OUTPUT_DIR", folder]
        cfg = load_cfg(config, list(map(str, options)))
        check_run(cfg, 1)
        trainer = TransferTrainer(cfg)
        trainer.resume_or_load(resume=False)
        state = trainer.model.state_dict()
        torch.testing.assert_close(state[f"{stem}.stem.conv1.weight"], network.conv1.weight, rtol=0, atol=0)
        conv5 = f"{stem}.res5" if stem.endswith("up") else "roi_heads.res5"
        torch.testing.assert_close(state[f"{conv5}.1.conv2.weight"], network.layer4[1].conv2.weight, rtol=0, atol=0)
        trainer.train()
        result = json.loads((folder / "results.json").read_text())
        assert (result["iterations"], result["weights"]["facts"]["res2_channels"]) == (2, 16)
        assert {"AP", "AP50"} <= set(result["metrics"][cfg.DATASETS.TEST[0]]["bbox"])


def test_a_resume_with_another_lr_says_that_the_checkpoints_goes_on(converted_file, tmp_path, caplog):
    opts = [*SHORT, *VOC_SETS, "MODEL.WEIGHTS", converted_file, "OUTPUT_DIR", tmp_path]
    TransferTrainer(small_cfg(VOC_C4, *opts)).checkpointer.save("model_0000000", iteration=0)
    again = TransferTrainer(small_cfg(VOC_C4, *opts, "SOLVER.BASE_LR", 0.01, "SOLVER.GAMMA", 0.5))
    again.resume_or_load(resume=True)
    warnings = [record.getMessage() for record in caplog.records if " was " in record.getMessage()]
    assert len(warnings) == 2
    assert warnings[0].endswith("resumed with other settings than before: SOLVER.GAMMA was 0.1 and is 0.5")
    assert (
        "keeps the checkpoint's optimizer settings, not the config's: SOLVER.BASE_LR was 0.001 and is 0.01."
        in (warnings[1])
    )
    assert {group["initial_lr"] for group in again.optimizer.param_groups} == {0.001}
    again.train()
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["schedule"]["BASE_LR"] == 0.001
    assert "SOLVER.BASE_LR=0.001 (kept on resuming)" in result["config_changes"]


def test_resuming_compares_the_keys_that_the_table_of_roles_says(tmp_path, caplog, monkeypatch):
    opts = [*SHORT, *VOC_SETS, "DATASETS.TEST", "()", "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path]
    # What the version before the table recorded, and Detectron2's own trainer, which records no settings.
    before = {
        "SOLVER.BASE_LR", "SOLVER.BIAS_LR_FACTOR", "SOLVER.MOMENTUM", "SOLVER.NESTEROV", "SOLVER.WEIGHT_DECAY",
        "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS", "SOLVER.LR_SCHEDULER_NAME", "SOLVER.MAX_ITER",
        "SOLVER.STEPS", "SOLVER.GAMMA", "SOLVER.NUM_DECAYS", "SOLVER.BASE_LR_END", "SOLVER.RESCALE_INTERVAL",
        "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_METHOD", "SEED", "SOLVER.IMS_PER_BATCH",
        "SOLVER.ACCUMULATE", "number of images", "number of processes",
    }  # fmt: skip
    monkeypatch.setitem(roles.ROLES, "INPUT.MAX_SIZE_TRAIN", roles.ROLES["SOLVER.GAMMA"])
    trainer = TransferTrainer(small_cfg(VOC_C4, *opts))
    state = trainer.state_dict()
    assert state["run"].keys() >= before and state["run"]["INPUT.MAX_SIZE_TRAIN"] == 1333
    other = TransferTrainer(
        small_cfg(VOC_C4, *opts, "INPUT.MAX_SIZE_TRAIN", 999, "SOLVER.CLIP_GRADIENTS.ENABLED", True)
    )
    for run, said in (
        (
            state["run"],
            ["INPUT.MAX_SIZE_TRAIN was 1333 and is 999", "SOLVER.CLIP_GRADIENTS.ENABLED was False and is True"],
        ),
        ({key: state["run"][key] for key in before}, []),
        ({}, []),
    ):
        caplog.clear()
        other.load_state_dict(
            {**state, "run": run} if run else {k: state[k] for k in state.keys() - {"run", "weights"}}
        )
        (warned,) = [r.getMessage() for r in caplog.records if " was " in r.getMessage()] or [""]
        assert sorted(warned.rpartition(": ")[2].split("; ")) == (said or [""])


def test_a_resumed_run_names_the_weights_that_it_began_with(converted_file, tmp_path):
    opts = [*SHORT, *VOC_SETS, "DATASETS.TEST", "()", "OUTPUT_DIR", tmp_path]
    weights = shutil.copy(converted_file, tmp_path / "mine.pth")
    first = TransferTrainer(small_cfg(VOC_C4, *opts, "MODEL.WEIGHTS", weights))
    first.resume_or_load(resume=False)
    first.checkpointer.save("model_0000000", iteration=0)
    weights.write_bytes(b"another file by now")
    for name, words in ((VOC_C4, ["MODEL.WEIGHTS", weights]), (VOC_C4, []), (VOC_C4 + "_random", [])):
        again = TransferTrainer(small_cfg(name, *opts, *words))
        again.resume_or_load(resume=True)
        assert (again.weights, again.weights.sha256) == (first.weights, sha256(converted_file))


def test_a_resume_with_another_batch_is_refused(tmp_path):
    # As on one GPU instead of eight: the config's lr would be an eighth, the checkpoint's is the whole.
    opts = [*SHORT, *VOC_SETS, "DATASETS.TEST", "()", "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path]
    opts += ["SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8]
    TransferTrainer(small_cfg(VOC_C4, *opts, "SOLVER.ACCUMULATE", 8)).checkpointer.save("model_0000000", iteration=0)
    with pytest.raises(
        ValueError, match=r"16 images a step \(1 .*ACCUMULATE 8\) cannot be resumed with 2 images a step \(1 "
    ):
        TransferTrainer(small_cfg(VOC_C4, *opts)).resume_or_load(resume=True)


def test_batches_are_parts_of_the_chosen_pictures_by_their_shape_and_precise_bn_has_its_own(tmp_path):
    opts = [*SHORT, *VOC_SETS, "DATASETS.TEST", "()", "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path]
    loader = TransferTrainer.build_train_loader(small_cfg(VOC_C4, *opts, "SOLVER.IMS_PER_BATCH", 4))
    sizes = [(record["width"], record["height"]) for record in loader.dataset.records]
    assert loader.batch_sampler.groups.tolist() == [width > height for width, height in sizes] == [True, False] * 2

    opts += ["SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2, "DATASETS.FRACTION", 50.0]
    trainer = TransferTrainer(small_cfg(VOC_C4, *opts))
    (precise,) = (hook for hook in trainer._hooks if isinstance(hook, RepeatablePreciseBN))
    drawn = []
    for loader in (trainer.data_loader, precise._data_loader):
        assert len(loader.dataset) == 2
        drawn.append(list(itertools.islice(loader.batch_sampler, 20)))
        assert {len(batch) for batch in drawn[-1]} == {2}
    assert drawn[0] != drawn[1] and trainer.data_loader.dataset.seed != precise._data_loader.dataset.seed


def test_two_cpu_processes_train_and_give_what_the_saved_detector_gives(dataset_root, tmp_path):
    sync = small_cfg(COCO_FPN).MODEL
    assert (sync.RESNETS.NORM, sync.FPN.NORM) == ("SyncBN", "SyncBN")
    command = [
        sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", COCO_FPN + "_random", "--num-gpus", "2",
        *QUARTER, *SHORT, "OUTPUT_DIR", str(tmp_path),
    ]  # fmt: skip
    environment = os.environ | {
        "DETECTRON2_DATASETS": str(dataset_root), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "SyncBN does not work in CPU processes: MODEL.FPN.NORM is naiveSyncBN" in done.stdout
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["processes"] == 2
    assert result["scaled"]["MODEL.FPN.NORM"] == ["SyncBN", "naiveSyncBN"], "what the machine changed"
    changed = {change.partition("=")[0] for change in result["config_changes"]}
    assert "SOLVER.MAX_ITER" in changed and "MODEL.FPN.NORM" not in changed, "what the user changed"
    assert set(result["metrics"]["coco_2017_val"]) == {"bbox", "segm"}

    # Processes end precise-BN with statistics of their own; the evaluation must be of the detector that was saved.
    alone = tmp_path / "alone"
    final = tmp_path / "model_final.pth"
    evaluate(small_cfg(COCO_FPN, *SHORT, *COCO_SETS, "MODEL.WEIGHTS", final, "OUTPUT_DIR", alone))
    together, apart = detections(tmp_path, "coco_2017_val"), detections(alone, "tiny_coco")
    assert [d[:2] for d in together] == [d[:2] for d in apart]
    torch.testing.assert_close(torch.tensor([d[2] for d in together]), torch.tensor([d[2] for d in apart]))


def test_the_tool_ends_a_users_mistake_in_one_message(tmp_path):
    command = [sys.executable, str(ROOT / "tools/train_net.py"), "--config-file", VOC_C4, "OUTPUT_DIR", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "error: this config starts from weights of your choice" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reference_world_size_is_applied_and_recorded(tmp_path):
    opts = [*SHORT, *VOC_SETS, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path]
    trainer = TransferTrainer(small_cfg(VOC_C4, *opts, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE", 8))
    assert trainer.scaled["SOLVER.IMS_PER_BATCH"] == (16, 2)
    assert trainer.scaled["SOLVER.MAX_ITER"] == (2, 16)
    assert trainer.max_iter == 16


@pytest.mark.parametrize(("name", "dataset", "kind"), [
    (VOC_C4, "tiny_voc", VOCEvaluator), (COCO_C4, "tiny_coco", ExactCOCOEvaluator),
])  # fmt: skip
def test_the_evaluator_follows_the_metadata(name, dataset, kind, tmp_path):
    assert type(build_evaluator(small_cfg(name, "OUTPUT_DIR", tmp_path), dataset)) is kind


def test_an_unknown_evaluator_is_refused_before_training():
    meta = MetadataCatalog.get("tiny_coco")
    del meta.__dict__["evaluator_type"]
    meta.evaluator_type = "panoptic"
    cfg = small_cfg(COCO_FPN, *SHORT, *COCO_SETS)
    with pytest.raises(ValueError, match=r"'tiny_coco' has evaluator_type 'panoptic'.*must be one of.* coco"):
        TransferTrainer(cfg)


def test_missing_data_are_refused_with_the_expected_files():
    sets = ["DATASETS.TRAIN", "('lost_voc',)", "DATASETS.TEST", "('lost_coco', 'tiny_cocoo')"]
    register_pascal_voc("lost_voc", "nowhere/VOC2007", "trainval", 2007)
    register_coco_instances("lost_coco", {}, "nowhere/coco/annotations/x.json", "nowhere/coco/val2017")
    try:
        with pytest.raises(ValueError) as caught:
            check_run(small_cfg(VOC_C4, *SHORT, *sets), world_size=1)
    finally:
        for name in ("lost_voc", "lost_coco"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
    message = str(caught.value)
    assert "nowhere/VOC2007/ImageSets/Main/trainval.txt" in message
    assert "nowhere/coco/annotations/x.json" in message
    assert "DETECTRON2_DATASETS" in message
    assert "datasets/README.md" in message
    assert "no data set 'tiny_cocoo' is registered; did you mean 'tiny_coco" in message


def test_a_batch_that_processes_cannot_share_is_refused():
    cfg = small_cfg(VOC_C4, *VOC_SETS)
    with pytest.raises(ValueError, match="IMS_PER_BATCH is 16; it must be a multiple of 3 "):
        check_run(cfg, world_size=3)


def test_the_number_of_classes_is_checked():
    with pytest.raises(ValueError, match=r"'tiny_voc' has 20 classes: pass MODEL\.ROI_HEADS\.NUM_CLASSES 20"):
        check_run(small_cfg(COCO_FPN, *VOC_SETS), world_size=1)


def test_sync_bn_is_replaced_only_in_several_cpu_processes():
    cfg = small_cfg(COCO_FPN, "MODEL.ROI_MASK_HEAD.NORM", "SyncBN")
    assert fit_to_machine(cfg, 1).dump() == cfg.dump()
    two = fit_to_machine(cfg, 2).MODEL
    norms = (two.RESNETS.NORM, two.FPN.NORM, two.ROI_MASK_HEAD.NORM, two.ROI_BOX_HEAD.NORM)
    assert norms == ("naiveSyncBN", "naiveSyncBN", "naiveSyncBN_N", "")


def test_evaluation_needs_weights():
    with pytest.raises(ValueError, match="needs a trained detector"):
        evaluate(small_cfg(VOC_C4 + "_random", *SHORT, *VOC_SETS))

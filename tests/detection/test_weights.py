"""The guard: whole backbones pass, everything else is refused with the keys or facts and the remedy."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import time
from collections import Counter

import numpy as np
import pytest
import safetensors.torch
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_pascal_voc
from detectron2.modeling import build_model
from small_detector import COCO_C4, COCO_FPN, SHORT, VOC_C4, small_cfg

from moco_d2.convert import Choice, convert_checkpoint
from moco_d2.detection.preflight import check_resume, check_weights, starting_point
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.detection.weights import WeightsRecord, all_names, facts_of, load_weights, pretrained_names
from moco_d2.io import checkpoints, version
from moco_d2.io.checkpoints import read_checkpoint
from moco_d2.running.checkpoints import recorded_seed

COCO_FPN_4CONV = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_4conv1fc_1x"


def load(cfg, path, names=pretrained_names):
    """Load through the guard; return (model, record)."""
    torch.manual_seed(0)
    model = build_model(cfg)
    return model, load_weights(DetectionCheckpointer(model), cfg, str(path), names)


def refusal(cfg, path, names=pretrained_names):
    """Return the guard's message."""
    with pytest.raises(ValueError) as caught:
        load(cfg, path, names)
    return str(caught.value)


@pytest.mark.parametrize(("name", "prefix"), [(VOC_C4, "backbone."), (COCO_C4, "backbone."), (COCO_FPN, "bottom_up.")])
def test_a_converted_file_fills_all_265_tensors(name, prefix, converted_file):
    cfg = small_cfg(name)
    model, record = load(cfg, converted_file)
    assert len(pretrained_names(model)) == 265
    source = torch.load(converted_file)["model"]
    state = model.state_dict()
    for key in pretrained_names(model):
        held = key.removeprefix("roi_heads.").removeprefix("backbone.").removeprefix("bottom_up.")
        assert torch.equal(state[key], source[held]), key
    assert record.path == str(converted_file)
    assert record.facts.recipe == "moco_test"


def test_pickled_numpy_form_passes(converted_file, tmp_path):
    content = torch.load(converted_file)
    content["model"] = {name: tensor.numpy() for name, tensor in content["model"].items()}
    path = tmp_path / "converted.pkl"
    path.write_bytes(pickle.dumps(content))
    load(small_cfg(COCO_FPN), path)


def test_missing_counters_are_fine(altered):
    path = altered(lambda c: [c["model"].pop(k) for k in list(c["model"]) if k.endswith("num_batches_tracked")])
    load(small_cfg(VOC_C4), path)


@pytest.fixture(scope="module")
def with_parts(backbone_file, tmp_path_factory):
    """Convert a SoCo file whose FPN, and perhaps box head, are kept: ``with_parts("fpn", ...)``."""
    folder = tmp_path_factory.mktemp("parts")
    state = {f"module.encoder.{k}": v for k, v in torch.load(backbone_file)["state_dict"].items()}
    norm = {"weight": torch.rand, "bias": torch.randn, "running_mean": torch.randn, "running_var": torch.rand}
    layers = [(f"neck.lateral_convs.{i}.conv", f"neck.lateral_convs.{i}.bn", (256, 64 * 2**i, 1, 1)) for i in range(4)]
    layers += [(f"neck.fpn_convs.{i}.conv", f"neck.fpn_convs.{i}.bn", (256, 256, 3, 3)) for i in range(4)]
    layers += [(f"head.conv{i}", f"head.bn{i}", (256, 256, 3, 3)) for i in range(1, 5)]
    for conv, bn, shape in layers:
        state[f"module.{conv}.weight"] = torch.randn(shape)
        state |= {f"module.{bn}.{tensor}": make(256) for tensor, make in norm.items()}
    state |= {"module.head.fc1.weight": torch.randn(1024, 12544), "module.head.fc1.bias": torch.randn(1024)}
    torch.save({"model": state}, folder / "soco.pth")

    def convert(*parts):
        path = folder / f"{'_'.join(parts)}.pth"
        convert_checkpoint(folder / "soco.pth", path, proof=False, choice=Choice(parts=parts))
        return path

    return convert


@pytest.mark.parametrize(
    ("name", "parts", "count"), [(COCO_FPN, ("fpn",), 40), (COCO_FPN_4CONV, ("fpn", "box_head"), 62)]
)
def test_a_detector_holds_the_parts_that_a_file_carries(name, parts, count, with_parts, caplog):
    path = with_parts(*parts)
    with caplog.at_level("INFO", logger="moco_d2"):
        model, record = load(small_cfg(name), path)
    assert record.facts.parts == parts and "another protocol than with a backbone alone" in caplog.text
    source, state = torch.load(path)["model"], model.state_dict()
    held = [key for key in source if key.startswith(("backbone.fpn_", "roi_heads.box_head."))]
    assert len(held) == count and all(torch.equal(state[key], source[key]) for key in held)
    # It is saved with the detector, whose further fine-tuning is another protocol too.
    again = WeightsRecord("", facts_of(small_cfg(name)))
    again.load_state_dict(record.state_dict())
    assert again.facts.parts == parts


@pytest.mark.parametrize(
    ("name", "opts", "parts", "words"),
    [
        (VOC_C4, (), ("fpn",), ["fpn_lateral2.weight is not in the detector", "without --with, or use a detector"]),
        (COCO_FPN, ("MODEL.FPN.NORM", ""), ("fpn",), ["lateral2.norm.weight is not", 'pass MODEL.FPN.NORM "SyncBN"']),
        (COCO_FPN, (), ("fpn", "box_head"), ["roi_heads.box_head.conv1.weight is not", 'ROI_BOX_HEAD.NUM_CONV "4"',
                                             'ROI_BOX_HEAD.NUM_FC "1"', 'ROI_BOX_HEAD.NORM "SyncBN"']),
        (COCO_FPN, ("MODEL.FPN.OUT_CHANNELS", 128), ("fpn",),
         ["lateral2.weight is (128, 64, 1, 1) in the detector, (256, 64, 1, 1) in", 'MODEL.FPN.OUT_CHANNELS "256"']),
    ],
)  # fmt: skip
def test_a_detector_without_a_place_for_them_is_refused_with_the_remedy(name, opts, parts, words, with_parts):
    message = refusal(small_cfg(name, *opts), with_parts(*parts))
    assert all(word in message for word in words), message


@pytest.mark.parametrize("norm", ["SyncBN", ""])
def test_biases_have_a_place_where_a_batch_norm_subtracts_them(norm, altered, caplog):
    """As ReSim's: no norm in pretraining, SyncBN in its authors' fine-tuning."""
    layers = {f"backbone.fpn_lateral{level}": (256, 16 * 2**level, 1, 1) for level in (3, 4, 5)}
    tensors = {f"{name}.weight": torch.randn(shape) for name, shape in layers.items()}
    tensors |= {f"{name}.bias": torch.randn(256) for name in layers}
    path = altered(lambda c: (c["model"].update(tensors), c["facts"].update(parts=["fpn"])))
    with caplog.at_level("INFO", logger="moco_d2"):
        model, record = load(small_cfg(COCO_FPN, "MODEL.FPN.NORM", norm), path)
    state = model.state_dict()
    assert record.facts.parts == ("fpn",) and ("3 biases of" in caplog.text) is bool(norm)
    assert all(torch.equal(state[key], tensors[key]) for key in tensors if key in state)
    if norm:
        assert 'pass MODEL.FPN.NORM ""' in refusal(small_cfg(COCO_FPN, "MODEL.FPN.NORM", "GN"), path)


def test_parts_are_known_by_what_was_filled(converted_file, tmp_path):
    """A trained detector's file says nothing of parts, and fills them all."""
    cfg = small_cfg(COCO_FPN)
    model, record = load(cfg, converted_file)
    assert record.facts.parts == ()
    DetectionCheckpointer(model, str(tmp_path), facts=record).save("model_final")
    _, record = load(cfg, tmp_path / "model_final.pth")
    assert set(record.facts.parts) == {"fpn", "proposal_generator", "box_head", "box_predictor", "mask_head"}
    _, record = load(cfg, tmp_path / "model_final.pth", all_names)  # evaluated, not started from
    assert record.facts.parts == ()


def test_a_partial_file_is_refused_with_the_keys(altered):
    path = altered(lambda c: [c["model"].pop(k) for k in list(c["model"]) if k.startswith("res5.2.")])
    message = refusal(small_cfg(VOC_C4), path)
    assert "fills 250 of 265 tensors; 15 would stay random" in message
    assert re.search(r"not in the file: roi_heads\.res5\.2\.conv1\.weight, .* and 12 more\.$", message, re.MULTILINE)
    assert message.count("\n") == 1
    assert "moco-d2 convert" in message


@pytest.mark.parametrize("norm", ["naiveSyncBN", "FrozenBN"])
def test_missing_statistics_are_refused_even_where_detectron2_makes_them_up(norm, altered):
    path = altered(lambda c: c["model"].pop("res3.1.conv2.norm.running_var"))
    message = refusal(small_cfg(VOC_C4, "MODEL.RESNETS.NORM", norm), path)
    assert "1 would stay random" in message
    assert "backbone.res3.1.conv2.norm.running_var" in message


def test_wrong_shapes_are_refused_with_both_shapes(altered):
    path = altered(lambda c: c["model"].update({"res2.0.conv1.weight": torch.zeros(8, 16, 1, 1)}))
    message = refusal(small_cfg(COCO_FPN), path)
    assert "bottom_up.res2.0.conv1.weight is (16, 16, 1, 1) in the detector, (8, 16, 1, 1) in the file" in message
    assert "MODEL.RESNETS" in message


def test_weights_that_are_not_finite_are_refused(altered):
    path = altered(lambda c: c["model"]["res4.0.conv1.weight"].fill_(float("nan")))
    assert "1 tensors hold NaN or infinity" in (message := refusal(small_cfg(VOC_C4), path))
    assert "backbone.res4.0.conv1.weight" in message


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_weights_that_would_be_cast_are_refused(altered, dtype):
    path = altered(lambda c: c["model"].update({k: c["model"][k].to(dtype) for k in ["res4.0.conv1.weight"]}))
    message = refusal(small_cfg(VOC_C4), path)
    assert f"1 tensors hold {dtype}, not floating-point numbers (backbone.res4.0.conv1.weight)" in message


def test_contradicting_facts_are_refused_with_the_remedy(converted_file):
    message = refusal(small_cfg(VOC_C4 + "_supervised"), converted_file)
    assert "INPUT.FORMAT is BGR in the config, but the weights need RGB" in message
    assert 'MODEL.PIXEL_MEAN "[123.675, 116.28, 103.53]"' in message
    assert 'MODEL.RESNETS.STRIDE_IN_1X1 "False"' in message
    assert 'INPUT.FORMAT "RGB"' in message


def test_the_remedy_works_when_passed(converted_file):
    message = refusal(small_cfg(VOC_C4 + "_supervised"), converted_file)
    words = message.rpartition("Pass ")[2].rpartition(", or other")[0].split('"')
    keys, values = words[0:-1:2], words[1::2]
    opts = [word.strip() for pair in zip(keys, values, strict=True) for word in pair]
    load(small_cfg(VOC_C4 + "_supervised", *opts), converted_file)


def test_another_width_is_told_by_the_facts(converted_file):
    message = refusal(small_cfg(VOC_C4, "MODEL.RESNETS.STEM_OUT_CHANNELS", 64), converted_file)
    assert "MODEL.RESNETS.STEM_OUT_CHANNELS is 64 in the config, but the weights need 16" in message


def test_msra_weights_need_bgr_wherever_they_lie(altered, monkeypatch):
    path = altered(lambda c: c.pop("facts"))
    monkeypatch.setattr("moco_d2.detection.weight_file.local_path", lambda _: str(path))
    message = refusal(small_cfg(VOC_C4), "detectron2://ImageNetPretrained/MSRA/R-50.pkl")
    assert "INPUT.FORMAT is RGB in the config, but the weights need BGR" in message
    caffe = path.with_suffix(".pkl")
    monkeypatch.undo()
    tensors = {name: np.zeros(2) for name in ("conv1_b", "res2_0_branch2a_w")}
    for content in (tensors, {"blobs": tensors}):
        caffe.write_bytes(pickle.dumps(content))
        assert "MODEL.RESNETS.STRIDE_IN_1X1 is False" in refusal(small_cfg(COCO_FPN), caffe)


def test_caffe2_names_as_of_the_msra_file_fill_everything(converted_file, tmp_path):
    blocks = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
    statistics = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    content = {"conv1_b": np.zeros(16, np.float32), "fc1000_w": np.zeros((10, 512), np.float32)}
    for name, tensor in torch.load(converted_file)["model"].items():
        stage, *block, conv = name.partition(".norm")[0].removesuffix(".weight").split(".")
        layer = "conv1" if stage == "stem" else f"{stage}_{block[0]}_{blocks[conv]}"
        norm = ("res_conv1" if stage == "stem" else layer) + "_bn_"
        kind = name.rpartition(".norm.")[2]
        content[norm + statistics[kind] if ".norm." in name else layer + "_w"] = tensor.numpy()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(content))
    for name in (VOC_C4, COCO_FPN):
        _, record = load(small_cfg(name + "_supervised"), path)
        assert record.facts.origin == "ImageNet-supervised, MSRA (Caffe)"
        assert "INPUT.FORMAT is RGB" in refusal(small_cfg(name), path)


def test_a_file_without_facts_loads_and_the_assumption_is_logged(altered, caplog):
    path = altered(lambda c: c.pop("facts"))
    with caplog.at_level("INFO", logger="moco_d2"):
        load(small_cfg(VOC_C4), path)
    assert "carries no facts, so the config's are assumed (RGB" in caplog.text


def test_an_unconverted_backbone_is_refused(backbone_file):
    message = refusal(small_cfg(VOC_C4), backbone_file)
    assert f"Convert it first: moco-d2 convert {backbone_file}" in message


@pytest.mark.parametrize(("prefix", "source"), [("online_encoder.", "model_0000009.pth"), (None, "backbone.pth")])
def test_a_training_checkpoint_of_any_method_is_refused_with_the_command(prefix, source, backbone_file, tmp_path):
    backbone = torch.load(backbone_file)
    content = {
        "model": {f"{prefix}{name}": tensor for name, tensor in backbone["state_dict"].items()},
        "facts": backbone["facts"], "backbone": {"method": "Invented", "prefix": prefix}, "trainer": {"iteration": 9},
    }  # fmt: skip
    path = tmp_path / "model_0000009.pth"
    torch.save(content, path)
    message = f"{path} is a training checkpoint of Invented; a detector starts from its converted backbone.\n"
    command = f"  Convert it first: moco-d2 convert {tmp_path / source} converted.pth"
    assert refusal(small_cfg(VOC_C4), path) == message + command
    del content["backbone"]  # as of earlier versions
    torch.save(content, path)
    assert f"Convert it first: moco-d2 convert {path} " in refusal(small_cfg(VOC_C4), path)


def test_an_official_training_checkpoint_is_refused(backbone_file, tmp_path):
    state = {f"module.encoder_q.{k}": v for k, v in torch.load(backbone_file)["state_dict"].items()}
    path = tmp_path / "checkpoint_0199.pth.tar"
    torch.save({"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": {}}, path)
    message = refusal(small_cfg(COCO_FPN), path)
    assert "not in Detectron2's form" in message
    assert "epoch, arch, state_dict and 1 more are not tensors" in message
    assert "Convert it first" in message


def test_torchvision_names_are_refused_with_a_look_at_them(backbone_file, tmp_path):
    path = tmp_path / "resnet50.pth"
    torch.save(torch.load(backbone_file)["state_dict"], path)
    message = refusal(small_cfg(VOC_C4), path)
    assert "fills 0 of 265" in message
    assert "has names such as conv1.weight" in message
    assert "Convert it first" in message


def test_detectron2_names_without_its_matching_flag_are_refused(altered):
    assert "fills 0 of 265" in refusal(small_cfg(COCO_FPN), altered(lambda c: c.pop("matching_heuristics")))


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"model": {}, "matching_heuristics": True}])
def test_an_empty_file_is_refused(content, tmp_path):
    path = tmp_path / "empty.pth"
    torch.save(content, path)
    assert "holds no weights" in refusal(small_cfg(VOC_C4), path)


def test_a_file_that_is_not_there_is_refused_with_its_neighbours(converted_file):
    wrong = converted_file.with_name("convertd.pth")
    assert f"does not exist; nearest in {wrong.parent}: converted.pth" in refusal(small_cfg(VOC_C4), wrong)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "cut.pth"
    path.write_bytes(b"PK\x03\x04 and nothing more")
    assert "cut.pth" in refusal(small_cfg(VOC_C4), path)


def test_the_shipped_placeholder_is_refused_and_random_must_be_asked_for():
    cfg = small_cfg(VOC_C4)
    assert "Pass MODEL.WEIGHTS PATH" in (message := refusal(cfg, cfg.MODEL.WEIGHTS))
    assert "_random" in message
    _, record = load(cfg, "")
    assert (record.path, record.facts.origin) == ("", "random initialisation")


def test_a_whole_detector_is_needed_to_evaluate(converted_file, tmp_path):
    cfg = small_cfg(VOC_C4)
    model, record = load(cfg, converted_file)
    message = refusal(cfg, converted_file, all_names)
    assert "not in the file: proposal_generator.rpn_head.conv.weight, " in message
    keeper = DetectionCheckpointer(model, str(tmp_path), facts=record)
    keeper.save("model_final")
    path = tmp_path / "model_final.pth"
    again, _ = load(cfg, path, all_names)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    load(cfg, path)  # fine-tuning it further
    # A detector says how it wants to be fed, as a backbone does.
    assert read_checkpoint(path)["facts"]["pixels"]["order"] == "RGB"
    assert "INPUT.FORMAT is BGR" in refusal(small_cfg(VOC_C4, "INPUT.FORMAT", "BGR"), path, all_names)


def test_facts_of_a_config_contradict_nothing_in_it():
    for name in (VOC_C4, VOC_C4 + "_supervised", COCO_FPN):
        cfg = small_cfg(name)
        assert facts_of(cfg).contradictions(cfg) == []


def test_check_weights_leaves_the_random_state_alone(converted_file, tmp_path):
    cfg = small_cfg(VOC_C4, "MODEL.WEIGHTS", converted_file, "OUTPUT_DIR", tmp_path)
    before = torch.get_rng_state()
    check_weights(cfg)
    assert torch.equal(before, torch.get_rng_state())


def test_a_fresh_start_does_not_overwrite_a_run(tmp_path):
    cfg = small_cfg(VOC_C4, "MODEL.WEIGHTS", "", "OUTPUT_DIR", tmp_path)
    assert starting_point(cfg, resume=True) == ("", False)
    torch.save({"model": {}, "trainer": {}}, tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000001.pth")
    assert starting_point(cfg, resume=True) == (str(tmp_path / "model_0000001.pth"), True)
    with pytest.raises(ValueError, match="contains a run already"):
        starting_point(cfg, resume=False)
    torch.save({"model": {}}, tmp_path / "model_0000001.pth")
    with pytest.raises(ValueError, match="not a checkpoint that a run can resume from: it has no trainer; start"):
        check_weights(cfg, resume=True)
    with pytest.raises(ValueError, match="it has no trainer"):
        check_resume(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.RESNETS.DEPTH", 19, "detectron2 cannot build this detector: KeyError: 19"),
        ("MODEL.RESNETS.NORM", "XX", "detectron2 cannot build this detector: KeyError: 'XX'"),
        ("MODEL.RESNETS.RES2_OUT_CHANNELS", -1, "torch cannot build this detector: RuntimeError: Trying to create"),
        ("MODEL.RPN.IOU_THRESHOLDS", [0.9, 0.1], "detectron2 cannot build this detector: AssertionError: "),
    ],
)
def test_what_no_detector_can_be_built_of_is_told_in_one_line(key, value, message):
    cfg = small_cfg(VOC_C4, "MODEL.WEIGHTS", "", key, value)
    for build in (check_weights, TransferTrainer.build_model):
        with pytest.raises(ValueError, match=rf"^{message}[^\n]*; correct the keys of MODEL that cause it$"):
            build(cfg)


def test_a_missing_output_of_the_backbone_is_named_with_the_keys_to_correct():
    cfg = small_cfg(VOC_C4, "MODEL.WEIGHTS", "", "MODEL.RPN.IN_FEATURES", ["res6"])
    with pytest.raises(ValueError, match=r"; the backbone has no output res6: correct the IN_FEATURES of MODEL, or"):
        check_weights(cfg)


@pytest.fixture(scope="module")
def detector(converted_file, tmp_path_factory):
    """A trained detector's tensors by name."""
    model, _ = load(small_cfg(VOC_C4), converted_file)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def empty_detector():
    return build_model(small_cfg(VOC_C4))


WRAPPED = {
    "torch.compile": lambda c: {"model": {f"_orig_mod.{k}": v for k, v in c.items()}},
    "DataParallel, flat": lambda c: {f"module.{k}": v for k, v in c.items()},
    "FSDP of a part": lambda c: {
        "model": {
            k.replace("backbone.", "backbone._fsdp_wrapped_module._checkpoint_wrapped_module."): v for k, v in c.items()
        }
    },
    "state_dict": lambda c: {"epoch": 3, "state_dict": c, "optimizer": {"state": {}}},
    "Lightning": lambda c: {"state_dict": {f"detector.{k}": v for k, v in c.items()}, "loops": {"fit": {}}},
    "model_state": lambda c: {"model_state": c, "epoch": 1},
    "deeper": lambda c: {"checkpoint": {"network": {"weights": c}}},
    "moving average beside it": lambda c: {"state_dict": c, "model_ema": {k: v * 0 for k, v in c.items()}},
    "arrays": lambda c: {"model": {k: v.numpy() for k, v in c.items()}},
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_a_trained_detector_is_read_out_of_its_wrapper(wrapper, detector, empty_detector, tmp_path):
    content = WRAPPED[wrapper](detector)
    path = tmp_path / "x.pth"
    path.write_bytes(pickle.dumps(content)) if wrapper == "arrays" else torch.save(content, path)
    for tensor in empty_detector.state_dict().values():
        tensor.zero_()
    load_weights(DetectionCheckpointer(empty_detector), small_cfg(VOC_C4), str(path), all_names)
    assert all(torch.equal(tensor, detector[name]) for name, tensor in empty_detector.state_dict().items())


def test_safetensors_of_a_detector_and_of_a_converted_backbone(detector, converted_file, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(detector, path)
    model, record = load(small_cfg(VOC_C4), path, all_names)
    assert torch.equal(model.backbone.stem.conv1.weight, detector["backbone.stem.conv1.weight"])
    content = torch.load(converted_file)
    safetensors.torch.save_file(content["model"], path, metadata={"facts": json.dumps(content["facts"])})
    _, record = load(small_cfg(COCO_FPN), path)
    assert record.facts.recipe == "moco_test"
    assert "INPUT.FORMAT is BGR" in refusal(small_cfg(VOC_C4 + "_supervised"), path)
    safetensors.torch.save_file({f"layer1.{n}.weight": torch.zeros(2) for n in range(3)}, path)
    assert "Convert it first" in refusal(small_cfg(VOC_C4), path)


def test_detectron2s_query_for_its_heuristics(altered):
    path = altered(lambda c: c.pop("matching_heuristics"))
    load(small_cfg(COCO_FPN), f"{path}?matching_heuristics=True")
    assert "the only option after '?' is matching_heuristics=True" in refusal(small_cfg(COCO_FPN), f"{path}?other=1")


def test_a_pickle_of_facebooks_pycls_is_matched_as_detectron2_does(converted_file, tmp_path):
    path = tmp_path / "x.pyth"
    torch.save({"model_state": torch.load(converted_file)["model"], "epoch": 1}, path)
    load(small_cfg(COCO_FPN), path)


def follow(message):
    """Run the Python call between a message's backticks."""
    (call,) = re.findall("`python -c ('.*')`", message)
    exec(shlex.split(call)[0], {})


@pytest.mark.parametrize("apart", [True, False])
def test_several_detectors_are_told_with_the_call_for_one(apart, detector, tmp_path):
    other = {k: v + 1 for k, v in detector.items()}
    both = {f"{name}.{k}": v for name, state in (("first", detector), ("second", other)) for k, v in state.items()}
    torch.save({"first": detector, "second": other} if apart else {"state_dict": both}, tmp_path / "x.pth")
    message = refusal(small_cfg(VOC_C4), tmp_path / "x.pth", all_names)
    told = "first; second" if apart else "state_dict under `first.`; state_dict under `second.`"
    assert f"holds 2 detectors ({told})" in message
    follow(message)
    model, _ = load(small_cfg(VOC_C4), tmp_path / "x_weights.pth", all_names)
    assert torch.equal(model.backbone.stem.conv1.weight, detector["backbone.stem.conv1.weight"])


class Settings:
    """An object that a training script stores beside its weights."""


@pytest.mark.parametrize("place", ["model", "state_dict", ""])
def test_a_file_that_names_code_is_refused_with_a_call_that_writes_the_weights_alone(place, detector, tmp_path):
    beside = {"settings": Settings()}
    path = tmp_path / "my file.pth"
    torch.save({place: detector, **beside} if place else {**detector, "x.settings": Settings()}, path)
    message = refusal(small_cfg(VOC_C4), path, all_names)
    if place:
        assert "refers to Python code (test_weights.Settings)" in message and "\n" not in message
        follow(message)
        model, _ = load(small_cfg(VOC_C4), tmp_path / "my file_weights.pth", all_names)
        assert torch.equal(model.backbone.stem.conv1.weight, detector["backbone.stem.conv1.weight"])
    else:
        assert "x.settings is not a tensor" in message


def test_a_runs_folder_is_told_its_checkpoint(detector, tmp_path):
    torch.save({"model": detector}, tmp_path / "model_final.pth")
    message = refusal(small_cfg(VOC_C4), tmp_path, all_names)
    assert (
        message
        == f"MODEL.WEIGHTS {tmp_path}: a folder, not a file; give the checkpoint in it: {tmp_path}/model_final.pth"
    )


def aged(path):
    """Let a file's last change be so long ago that another one would show in its time."""
    os.utime(path, (time.time() - 60,) * 2)


@pytest.fixture
def counted(dataset_root, monkeypatch):
    """Register a data set, and count how often each file is parsed."""
    register_pascal_voc("counted", str(dataset_root / "VOC2007"), "trainval", 2007)
    read, reader = Counter(), checkpoints._reader
    monkeypatch.setattr(checkpoints, "_reader", lambda path: read.update([path.name]) or reader(path))
    yield read
    DatasetCatalog.remove("counted")
    MetadataCatalog.remove("counted")


def test_a_run_reads_its_file_once_and_what_it_resumes_from_once(counted, converted_file, tmp_path):
    path, run = tmp_path / "weights.pth", tmp_path / "run"
    path.write_bytes(converted_file.read_bytes())
    aged(path)
    cfg = small_cfg(VOC_C4, *SHORT, "DATASETS.TRAIN", "('counted',)", "DATASETS.TEST", "()", "MODEL.WEIGHTS", path,
                    "OUTPUT_DIR", run)  # fmt: skip
    hashed = version._sha256.cache_info().misses
    check_weights(cfg)
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume=False)
    assert counted == {"weights.pth": 1} and version._sha256.cache_info().misses == hashed + 1
    assert checkpoints._last is None, "training needs its memory"
    trainer.checkpointer.save("model_0000000", iteration=0)
    aged(run / "model_0000000.pth")
    counted.clear()
    assert recorded_seed(run) == 1
    check_weights(cfg, resume=True)
    again = TransferTrainer(cfg)
    again.resume_or_load(resume=True)
    assert counted == {"model_0000000.pth": 1}
    assert again.weights.sha256 == trainer.weights.sha256 != ""
    # The optimizer must not change the mapped file's tensors, which others may read again.
    held = [state["momentum_buffer"] for state in again.optimizer.state.values() if "momentum_buffer" in state]
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in held)


def test_a_file_that_changes_under_a_run_is_noticed(converted_file, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(converted_file.read_bytes())
    aged(path)
    _, record = load(small_cfg(VOC_C4), path)
    path.write_bytes(converted_file.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=f"{path}: changed while it was in use"):
        _ = record.sha256

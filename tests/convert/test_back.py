from __future__ import annotations

import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS, facts, network, other, trunk, under
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from torch import nn
from torchvision.models import resnet18, resnet50

from moco_d2.config import load_cfg
from moco_d2.convert import CheckpointError, convert_checkpoint, convert_state, read_checkpoint, read_facts
from moco_d2.convert.back import restore, take_back
from moco_d2.detection.weights import load_weights
from moco_d2.facts import IMAGENET_RGB, ResNetFacts
from moco_d2.layers.resnet import build_resnet

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
QUARTER = {"STEM_OUT_CHANNELS": 16, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 16}
DETECTORS = {
    "C4": "PascalVOC-Detection/faster_rcnn_R_50_C4_24k",
    "FPN": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
    "dilated C5": "PascalVOC-Detection/faster_rcnn_R_50_dilated_C5_24k",
    "FCN": "SemanticSegmentation/fcn16s_R_50_VOC_30k",
    "RetinaNet": "COCO-Detection/retinanet_R_50_FPN_1x",
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    built = network()
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d) and module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(7)
    return built


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with backbone.pth, its conversions, and a pretraining checkpoint."""
    folder = tmp_path_factory.mktemp("files")
    torch.save(LAYOUTS["own-backbone"].build(net), folder / "backbone.pth")
    torch.save(LAYOUTS["own-training"].build(net), folder / "model.pth")
    for suffix in (".pth", ".pkl"):
        convert_checkpoint(folder / "backbone.pth", folder / f"converted{suffix}", proof=False)
    return folder


def values(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if "num_batches" not in name}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("layout", ["torchvision", "moco"])
@pytest.mark.parametrize("name", ["backbone.pth", "converted.pth", "converted.pkl", "model.pth"])
def test_round_trips_are_exact_and_carry_the_facts(
    name: str, layout: str, net: nn.Module, files: Path, tmp_path: Path
) -> None:
    restore(files / name, tmp_path / "out.pth", layout)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    prefix = {"torchvision": "", "moco": "module.encoder_q."}[layout]
    state = {key.removeprefix(prefix): tensor for key, tensor in written["state_dict"].items()}
    assert all(key.startswith(prefix) for key in written["state_dict"])
    if name.startswith("converted"):  # a converted file has no counters; they come back as zeros
        assert list(state) == list(trunk(net)) and same(values(state), values(trunk(net)))
        assert all(state[key] == 0 for key in state.keys() - values(state).keys())
    else:
        assert list(state) == list(trunk(net)) and same(state, trunk(net))
    assert read_facts(tmp_path / "out.pth") == facts(net)
    # And there again: bit for bit the file that the backbone gives.
    convert_checkpoint(tmp_path / "out.pth", tmp_path / "again.pth", proof=False)
    again, first = (read_checkpoint(f) for f in (tmp_path / "again.pth", files / "converted.pth"))
    assert same(again["model"], first["model"]) and again["facts"] == first["facts"]


def trained_detector(kind: str, files: Path, folder: Path) -> dict[str, Any]:
    """Save a detector as training does, every backbone tensor changed since the start; return its state dict."""
    opts = [str(w) for key, value in QUARTER.items() for w in (f"MODEL.RESNETS.{key}", value)]
    start = str(files / "converted.pth")
    cfg = load_cfg(DETECTORS[kind], [*opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", start])
    model = build_model(cfg)
    record = load_weights(DetectionCheckpointer(model), cfg, start)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(tensor.abs().mean() / 8 if tensor.is_floating_point() else 3)
    DetectionCheckpointer(model, str(folder), facts=record).save("model_final", iteration=9)
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "prefix", "conv5", "note"),
    [
        ("C4", "backbone.", "roi_heads.", "the norm that the C4 box head adds"),
        ("FPN", "backbone.bottom_up.", "backbone.bottom_up.", ""),
        ("dilated C5", "backbone.bottom_up.", "backbone.bottom_up.", "conv5 is dilated by 2"),
        ("FCN", "backbone.", "backbone.", "conv5 may be dilated"),
        ("RetinaNet", "backbone.bottom_up.", "backbone.bottom_up.", ""),
    ],
)
def test_a_fine_tuned_detector_gives_its_backbone(
    kind: str, prefix: str, conv5: str, note: str, net: nn.Module, files: Path, tmp_path: Path
) -> None:
    state = trained_detector(kind, files, tmp_path)
    backbone = restore(tmp_path / "model_final.pth", tmp_path / "out.pth", "torchvision")
    back = torch.load(tmp_path / "out.pth", weights_only=True)["state_dict"]
    assert list(back) == list(trunk(net)) and not same(values(back), values(trunk(net)))
    assert torch.equal(back["conv1.weight"], state[f"{prefix}stem.conv1.weight"])
    assert torch.equal(back["layer3.5.bn2.running_var"], state[f"{prefix}res4.5.conv2.norm.running_var"])
    assert torch.equal(back["layer4.0.downsample.1.bias"], state[f"{conv5}res5.0.shortcut.norm.bias"])
    assert back["layer4.2.bn3.num_batches_tracked"] == state[f"{conv5}res5.2.conv3.norm.num_batches_tracked"] == 3
    # The recipe's name belongs to the weights that the recipe gave.
    said = read_facts(tmp_path / "out.pth")
    assert said is not None and said == backbone.facts and said.recipe == ""
    assert said.origin == "a run of the tests (moco_v2_R50_200ep), fine-tuned in a detector"
    assert any("fc.weight and fc.bias are missing" in n for n in backbone.notes)
    about_detector = [n for n in backbone.notes if "conv5" in n]
    assert (note in about_detector[0]) if note else not about_detector


def test_other_tools_load_it(tmp_path: Path) -> None:
    source = network(width=1)
    torch.save(LAYOUTS["own-backbone"].build(source), tmp_path / "backbone.pth")
    restore(tmp_path / "backbone.pth", tmp_path / "tv.pth", "torchvision")
    restore(tmp_path / "backbone.pth", tmp_path / "moco.pth", "moco")
    image = torch.randn(1, 3, 64, 64)

    plain = resnet50()
    plain.fc = source.fc = nn.Identity()
    plain.load_state_dict(torch.load(tmp_path / "tv.pth")["state_dict"])  # strict
    # What the linear classification script of MoCo does: rename, load, and look every tensor up once more at the end.
    probe = resnet50()
    checkpoint = torch.load(tmp_path / "moco.pth", map_location="cpu")
    query = "module.encoder_q."
    renamed = {k[len(query) :]: v for k, v in checkpoint["state_dict"].items() if k.startswith(query)}
    assert set(probe.load_state_dict(renamed, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
    for name, tensor in probe.state_dict().items():
        assert name.startswith("fc.") or torch.equal(tensor, checkpoint["state_dict"][query + name])
    probe.fc = nn.Identity()
    with torch.no_grad():
        wanted = source.eval()(image)
        assert torch.equal(plain.eval()(image), wanted) and torch.equal(probe.eval()(image), wanted)
    assert checkpoint["arch"] == "resnet50"


def test_detectron2s_input_is_refolded_for_torchvisions(net: nn.Module, files: Path, tmp_path: Path) -> None:
    convert_checkpoint(files / "backbone.pth", tmp_path / "baked.pth", proof=False, bake=True)
    backbone = take_back(read_checkpoint(tmp_path / "baked.pth"), "baked.pth")
    assert backbone.facts == facts(net) and backbone.facts.pixels == IMAGENET_RGB
    torch.testing.assert_close(backbone.tensors["conv1.weight"], net.conv1.weight.detach(), rtol=3e-7, atol=0)
    assert any("conv1 was refolded" in note for note in backbone.notes)


def stated(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**content, "facts": {**content["facts"], **changes}}


def test_what_other_tools_would_get_wrong_is_said(files: Path) -> None:
    content = read_checkpoint(files / "backbone.pth")
    caffe = take_back(stated(content, stride_in_1x1=True), "x.pth")
    assert any("stride in their 1x1" in note for note in caffe.notes)
    simclr = {"order": "RGB", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]}
    unit = take_back(stated(content, pixels=simclr), "x.pth")
    assert unit.facts.pixels.mean == (0, 0, 0) and any("mean [0.0, 0.0, 0.0]" in note for note in unit.notes)


def without(content: dict[str, Any], place: str, part: str) -> dict[str, Any]:
    return {**content, place: {k: v for k, v in content[place].items() if part not in k}}


def test_what_is_missing_is_named(files: Path) -> None:
    converted, backbone = (read_checkpoint(files / name) for name in ("converted.pth", "backbone.pth"))
    c4 = {f"backbone.{k}": v for k, v in converted["model"].items()}
    for content, words in (
        (without(converted, "model", "res5."), ["50 of the 265", "all of conv5 (layer4, res5): res5.0.conv1.weight"]),
        (without({**converted, "model": c4}, "model", "res5."), ["incomplete Detectron2 detector", "all of conv5"]),
        (without(backbone, "state_dict", "layer2.1.bn1"), ["incomplete", "layer2.1.bn1.weight"]),
        (
            without(converted, "model", "running_"),
            ["are GroupNorm", "no running_mean", "convert it without --to first"],
        ),
        ({k: v for k, v in converted.items() if k != "facts"}, ["has no facts", "moco-d2 train"]),
        ({"facts": ResNetFacts().as_dict(), "epoch": 3}, ["no known ResNet", "facts, epoch"]),
        (stated(converted, depth=51), ["no ResNet that can be built", "depth is 51"]),
        (stated(converted, stem_channels=64), ["contradict", "stem_channels is 16 by the tensors, 64 by the facts"]),
    ):
        with pytest.raises(CheckpointError) as refusal:
            take_back(content, "some.pth")
        assert str(refusal.value).startswith("some.pth: ") and "\n" not in str(refusal.value)
        assert all(word in str(refusal.value) for word in words), str(refusal.value)
    converted["model"]["res3.0.conv1.weight"] = converted["model"]["res3.0.conv1.weight"] / 0
    with pytest.raises(CheckpointError, match=r"hold NaN or infinity: res3\.0\.conv1\.weight"):
        take_back(converted, "some.pth")


def test_a_wrong_layout_or_output_writes_nothing(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'torchvision'"):
        restore(files / "converted.pth", tmp_path / "out.pth", "torchvison")
    before = (files / "converted.pth").read_bytes()
    with pytest.raises(ValueError, match="the output is the input"):
        restore(files / "converted.pth", files / "converted.pth", "moco")
    assert (files / "converted.pth").read_bytes() == before and not list(tmp_path.iterdir())


def test_the_moco_layout_is_read_as_what_it_is(files: Path, tmp_path: Path) -> None:
    restore(files / "converted.pth", tmp_path / "moco.pth", "moco")
    conversion = convert_state(read_checkpoint(tmp_path / "moco.pth"), "moco.pth")
    assert len(conversion.mapped) == 265 and conversion.facts == read_facts(files / "backbone.pth")
    assert conversion.arxiv == ""  # MoCo's layout, but the facts name another origin


def test_the_tools_other_work(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, words)])
        code = runpy.run_path(str(TOOL))["main"]()
        return (code, *capsys.readouterr())

    code, shown, _ = run(files / "backbone.pth", tmp_path / "baked.pth", "--bake")
    assert code == 0 and "STRIDE_IN_1X1 False must still be set" in shown and "INPUT.FORMAT BGR" in shown
    code, shown, _ = run(tmp_path / "baked.pth", tmp_path / "moco.pth", "--to", "moco")
    assert code == 0 and "conv1 was refolded" in shown and "fc.weight and fc.bias are missing" in shown
    assert read_facts(tmp_path / "moco.pth") == read_facts(files / "backbone.pth")
    code, shown, error = run(tmp_path / "nothing.pth", tmp_path / "x.pth", "--to", "moco")
    assert code == 2 and not shown and error.startswith("error: ") and "no such file" in error
    code, shown, _ = run("--list")
    assert code == 0 and "moco_v2_800ep" in shown and "md5:a04e12f8" in shown
    with pytest.raises(SystemExit):
        run(files / "backbone.pth")


def test_group_norm_comes_back(tmp_path: Path) -> None:
    source = build_resnet("resnet18", norm="GN")
    content = {"model": under("online.", source.state_dict()) | under("slow.", other(source.state_dict()))}
    entry = {"facts": facts(source).as_dict(), "backbone": {"method": "Twins", "prefix": "online."}}
    torch.save(content | entry, tmp_path / "model_final.pth")
    convert_checkpoint(tmp_path / "model_final.pth", tmp_path / "converted.pth", proof=False)
    for name, layout in (("model_final.pth", "torchvision"), ("converted.pth", "moco")):
        restored = restore(tmp_path / name, tmp_path / "out.pth", layout)
        assert restored.facts == facts(source) and any("torch.nn.GroupNorm, 32" in note for note in restored.notes)
        plain = resnet18(norm_layer=partial(nn.GroupNorm, 32))  # as the note says
        assert set(plain.load_state_dict(restored.tensors, strict=False).missing_keys) == {"fc.weight", "fc.bias"}
        assert same(restored.tensors, trunk(source))
        again, _ = convert_checkpoint(tmp_path / "out.pth", tmp_path / "again.pth", proof=False)
        assert again.facts == facts(source)


def test_the_way_back_takes_a_narrow_resnet18(tmp_path: Path) -> None:
    narrow = network("resnet18", 0.25)
    torch.save(LAYOUTS["own-training"].build(narrow), tmp_path / "model_final.pth")
    assert same(restore(tmp_path / "model_final.pth", tmp_path / "out.pth", "moco").tensors, trunk(narrow))


def test_the_way_back_leaves_out_no_layer_of_the_backbone(net: nn.Module) -> None:
    content = LAYOUTS["own-training"].build(net)
    content["model"] |= {"encoder_q.layer1.0.se.fc.weight": torch.ones(3), "encoder_k.se.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match="channel attention"):
        take_back(content, "model_final.pth")

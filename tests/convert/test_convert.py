from __future__ import annotations

import pickle
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import FACTS, LAYOUTS, State, facts, network, trunk, under
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from moco_d2.convert import SOURCES, CheckpointError, convert_checkpoint, convert_state, read_facts
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.facts import CAFFE_BGR, BackboneFacts
from moco_d2.layers.resnet import DEPTHS, network_for

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    return runpy.run_path(str(TOOL))["main"]()


def test_every_source_has_a_layout() -> None:
    assert {source.name for source in SOURCES} == {layout.source for layout in LAYOUTS.values()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_converts_whole_and_proves_itself(name: str, net: nn.Module, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    checkpoint = layout.build(net)
    torch.save(checkpoint, tmp_path / "in.pth.tar")
    conversion, differences = convert_checkpoint(tmp_path / "in.pth.tar", tmp_path / "new" / "out.pth")

    assert conversion.source.name == layout.source
    assert conversion.facts.origin.startswith(layout.origin)
    assert len(conversion.mapped) == 265
    assert len(conversion.dropped) == 53 + layout.dropped
    assert len(conversion.foreign) == layout.foreign
    assert set(differences) == {"res2", "res3", "res4", "res5"} and max(differences.values()) < 1e-5

    written = torch.load(tmp_path / "new" / "out.pth", weights_only=True)
    assert written["__author__"] == "moco_d2" and written["matching_heuristics"] is True
    assert BackboneFacts.from_dict(written["facts"]) == conversion.facts == read_facts(tmp_path / "new" / "out.pth")
    back = rename_table(DETECTRON2, TORCHVISION, 50)
    assert {back[key] for key in written["model"]} == {key for key in trunk(net) if "num_batches" not in key}
    assert all(torch.equal(tensor, net.state_dict()[back[key]]) for key, tensor in written["model"].items())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out.pth"]  # no temporary file stays


def test_official_resnet50_through_the_tool(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(LAYOUTS["moco-v2-released"].build(network(width=1)), tmp_path / "moco.pth.tar")
    assert run_tool(monkeypatch, tmp_path / "moco.pth.tar", tmp_path / "out.pth") == 0
    shown = capsys.readouterr().out
    for words in ("MoCo v2", "ResNet-50", "265 mapped", "dropped 53: batch counter", "dropped 4: contrastive head"):
        assert words in shown
    assert "res2 " in shown and "MODEL.RESNETS.STRIDE_IN_1X1 False" in shown and "INPUT.FORMAT RGB" in shown


@pytest.mark.parametrize("depth", DEPTHS)
def test_names_are_the_networks_own_and_invert(depth: int) -> None:
    with torch.device("meta"):
        own = network_for(BackboneFacts(depth=depth)).state_dict()
    assert TORCHVISION.names(depth) == [key for key in own if "num_batches" not in key]
    there, back = rename_table(TORCHVISION, DETECTRON2, depth), rename_table(DETECTRON2, TORCHVISION, depth)
    assert {back[there[key]]: key for key in there} == {key: key for key in there}
    assert len(back) == len(there) and TORCHVISION.depth_of(there) == DETECTRON2.depth_of(back) == depth


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 1), ("resnet101", 0.25), ("resnext50_32x4d", 0.5), ("wide_resnet50_2", 0.25), ("resnet50", 0.5)],
)
def test_other_shapes_are_told_from_the_tensors_and_proven(name: str, width: float, tmp_path: Path) -> None:
    torch.save(network(name, width).state_dict(), tmp_path / "in.pth")
    _, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    assert len(differences) == 4


def test_stated_stride_and_pixels_are_kept(net: nn.Module, tmp_path: Path) -> None:
    stated = {
        **facts(net).as_dict(),
        "stride_in_1x1": True,
        "pixels": BackboneFacts(pixels=CAFFE_BGR).as_dict()["pixels"],
    }
    torch.save({"state_dict": trunk(net), "facts": stated}, tmp_path / "in.pth")
    conversion, _ = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pkl")
    assert conversion.facts.as_dict() == read_facts(tmp_path / "out.pkl").as_dict() == stated
    assert conversion.facts.config()["INPUT.FORMAT"] == "BGR" and conversion.facts.protocol == FACTS["protocol"]


def detector(kind: str, backbone: BackboneFacts) -> nn.Module:
    """Detectron2's C4 (its defaults) or FPN detector, its own parts small."""
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in backbone.config().items() for item in pair])
    cfg.MODEL.DEVICE = "cpu"
    if kind == "FPN":
        cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
        cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
        cfg.MODEL.FPN.OUT_CHANNELS = 8
        cfg.MODEL.RPN.IN_FEATURES = cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
        cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32], [64], [128], [256]]
        cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
        cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
        cfg.MODEL.ROI_BOX_HEAD.NUM_FC, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 1, 8
    return build_model(cfg)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize(("kind", "homes"), [("C4", ("backbone.", "roi_heads.")), ("FPN", ("backbone.bottom_up.",))])
def test_detectron2_loads_the_file_whole(
    kind: str, homes: tuple[str, ...], suffix: str, net: nn.Module, tmp_path: Path
) -> None:
    torch.save(LAYOUTS["own-backbone"].build(net), tmp_path / "in.pth")
    conversion, _ = convert_checkpoint(tmp_path / "in.pth", tmp_path / f"out{suffix}")
    model = detector(kind, conversion.facts)
    DetectionCheckpointer(model).load(str(tmp_path / f"out{suffix}"))

    loaded = model.state_dict()
    for name, tensor in conversion.tensors.items():
        places = [home + name for home in homes if home + name in loaded]
        assert len(places) == 1 and torch.equal(loaded[places[0]], tensor), name


def without(state: State, *parts: str) -> State:
    return {key: value for key, value in state.items() if not any(part in key for part in parts)}


def with_value(state: State, key: str, value: Any) -> State:
    return {**state, key: value(state[key]) if callable(value) else value}


def cifar(state: State) -> State:
    return with_value(state, "conv1.weight", torch.randn(16, 3, 3, 3))


# what the checkpoint is, and the words its refusal must hold
REFUSALS: dict[str, tuple[Callable[[State], dict[str, Any]], list[str]]] = {
    "empty": (lambda s: {}, ["no ResNet", "nothing"]),
    "empty-state-dict": (lambda s: {"state_dict": {}, "epoch": 3}, ["state_dict, epoch", "encoder_q.*"]),
    "key-encoder-only": (
        lambda s: {"state_dict": under("module.encoder_k.", s)},
        ["module.encoder_k.* (", "looked for", "encoder_q.*"],
    ),
    "optimizer-only": (lambda s: {"optimizer": {"state": {}}}, ["top-level keys: optimizer", "tensors: none"]),
    "partial": (
        lambda s: {"state_dict": under("module.encoder_q.", without(s, "layer3.4.conv2", "layer4.0.bn1.bias"))},
        ["incomplete MoCo", "2 of the 265", "encoder_q.layer3.4.conv2.weight", "encoder_q.layer4.0.bn1.bias"],
    ),
    "group-norm": (lambda s: without(s, "running_"), ["106 of the 265", "bn1.running_mean"]),
    "unknown-keys": (lambda s: {**s, "layer4.0.se.weight": torch.ones(3)}, ["1 keys", "layer4.0.se.weight"]),
    "both-wrapped-and-not": (lambda s: {**s, **under("module.", s)}, ["same tensor's name"]),
    "cifar-stem": (cifar, ["CIFAR stem", "(16, 3, 3, 3)"]),
    "two-channels": (lambda s: with_value(s, "conv1.weight", torch.randn(16, 2, 7, 7)), ["3-channel", "(16, 2, 7, 7)"]),
    "wrong-shape": (
        lambda s: with_value(s, "layer3.1.conv1.weight", torch.randn(8, 8, 1, 1)),
        ["wrong shape", "layer3.1.conv1.weight is (8, 8, 1, 1) instead of (64, 256, 1, 1)"],
    ),
    "not-finite": (
        lambda s: with_value(s, "layer2.0.bn1.bias", lambda t: t / 0),
        ["NaN or infinity", "layer2.0.bn1.bias"],
    ),
    "zero": (lambda s: with_value(s, "layer1.2.conv3.weight", torch.zeros_like), ["all zero", "layer1.2.conv3.weight"]),
    "integers": (lambda s: with_value(s, "bn1.bias", lambda t: t.int()), ["not floating point", "bn1.bias"]),
    "vit": (
        lambda s: {"state_dict": {"module.patch_embed.proj.weight": torch.ones(8, 3, 16, 16)}},
        ["vision transformer", "only ResNets"],
    ),
    "detectron2": (
        lambda s: {"model": {n: torch.ones(1) for n in DETECTRON2.names(50)}, "__author__": "x"},
        ["already converted", "MODEL.WEIGHTS"],
    ),
    "deep-stem": (lambda s: {**without(s, "conv1"), "conv1.0.weight": torch.ones(8, 3, 3, 3)}, ["three 3x3"]),
    "simsiam": (lambda s: {"state_dict": under("module.encoder.", s)}, ["SimSiam", "module.encoder.conv1.weight"]),
    "moco-v3": (lambda s: {"state_dict": under("module.base_encoder.", s)}, ["MoCo v3"]),
    "facts-of-another-run": (
        lambda s: {"state_dict": s, "facts": BackboneFacts().as_dict()},
        ["contradict", "stem_channels is 16 by the tensors, 64 by the facts"],
    ),
    "facts-unknown": (lambda s: {"state_dict": s, "facts": {"colour": "red"}}, ["facts", "colour"]),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_was_found(name: str, net: nn.Module) -> None:
    build, words = REFUSALS[name]
    with pytest.raises(CheckpointError) as refusal:
        convert_state(build(trunk(net)), "some/file.pth")
    message = str(refusal.value)
    assert message.startswith("some/file.pth: ") and "\n" not in message
    for word in words:
        assert word in message


def test_narrow_resnet18_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"ResNet-18 with 16 channels.*64 only"):
        convert_state(network("resnet18", 0.25).state_dict(), "x.pth")


def test_half_precision_becomes_float32(net: nn.Module) -> None:
    conversion = convert_state({key: value.half() for key, value in trunk(net).items()}, "x.pth")
    assert {tensor.dtype for tensor in conversion.tensors.values()} == {torch.float32}


def test_pkl_holds_arrays_and_names_no_private_module(net: nn.Module, tmp_path: Path) -> None:
    torch.save(trunk(net), tmp_path / "in.pth")
    conversion, _ = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pkl", proof=False)
    raw = (tmp_path / "out.pkl").read_bytes()
    assert b"numpy._core" not in raw and b"numpy.core" not in raw and b"torch" not in raw[:200]
    content = pickle.loads(raw)
    assert content["__author__"] == "moco_d2"
    assert all((content["model"][key] == tensor.numpy()).all() for key, tensor in conversion.tensors.items())


@pytest.mark.parametrize(
    ("output", "words"),
    [("in.pth", "the output is the input"), ("link.pth", "the output is the input"), ("out.bin", ".pth or .pkl")],
)
def test_unusable_outputs_leave_everything_as_it_was(
    output: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.pth").write_bytes(b"the only copy")
    (tmp_path / "link.pth").symlink_to(tmp_path / "in.pth")
    assert run_tool(monkeypatch, tmp_path / "in.pth", tmp_path / output) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and words in shown.err and shown.err.count("\n") == 1 and not shown.out
    assert (tmp_path / "in.pth").read_bytes() == b"the only copy"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", "link.pth"]


def test_without_detectron2_conversion_works_and_says_it_is_unproven(net: nn.Module, tmp_path: Path) -> None:
    torch.save(trunk(net), tmp_path / "in.pth")
    program = f"""
import runpy, sys
sys.modules["detectron2"] = None  # as if it were not installed
main = runpy.run_path({str(TOOL)!r})["main"]
sys.argv = ["convert_checkpoint.py", "in.pth", "out.pth"]
assert main() == 2
sys.argv.append("--no-proof")
assert main() == 0
assert not any(name.startswith("detectron2.") for name in sys.modules)
"""
    environment = {"PYTHONPATH": str(TOOL.parents[1]), "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "the proof was not made" in run.stderr and "detectron2 is missing" in run.stderr
    assert "proof    not made" in run.stdout and (tmp_path / "out.pth").is_file()

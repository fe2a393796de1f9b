from __future__ import annotations

import json
import pickle
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from checkpoint_layouts import (
    ASKED,
    FACTS,
    LAYOUTS,
    State,
    caffe,
    caffe2,
    detectron2,
    facts,
    hugging_face,
    network,
    trunk,
    under,
)
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from moco_d2.convert import SOURCES, CheckpointError, Choice, convert_checkpoint, convert_state, prove, read_facts
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB, BackboneFacts, ResNetFacts
from moco_d2.io.provenance import sha256
from moco_d2.layers.resnet import DEPTHS, network_for

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    return runpy.run_path(str(TOOL))["main"]()


# Nothing beside the network tells these from a record that comes before them, or they are for --source only.
WITHOUT_LAYOUT = {
    "pcl",
    "pycontrast-ema",
    "simclr-ema",
    "byol-lucidrains-net",
    "backbone",
    "encoder",
    "resnet",
    "model",
}


def own_tensors(state: State) -> State:
    return {key: tensor for key, tensor in state.items() if "num_batches" not in key}


def test_every_source_has_a_layout() -> None:
    keys = {source.key for source in SOURCES if not source.key.startswith("detectron2")}
    tested = {layout.source for layout in LAYOUTS.values() if not layout.source.startswith("detectron2")}
    assert keys - tested == WITHOUT_LAYOUT | {"caffe2-affine"} and tested <= keys
    assert len({source.key for source in SOURCES}) == len(SOURCES)
    documented = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    assert {key for key in keys - WITHOUT_LAYOUT if f"`{key}`" not in documented} == set()


@pytest.fixture(scope="module")
def full() -> nn.Module:
    return network(width=1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_converts_whole(name: str, full: nn.Module) -> None:
    layout = LAYOUTS[name]
    net = full if layout.width == 1 else network(width=layout.width)
    conversion = convert_state(layout.build(net), "x.pth")
    assert conversion.source.key == layout.source
    assert conversion.facts.origin.startswith(layout.origin)
    assert len(conversion.mapped) == 265
    assert layout.dropped is None or len(conversion.dropped) == 53 + layout.dropped
    assert layout.foreign is None or len(conversion.foreign) == layout.foreign
    wanted = own_tensors(layout.weights(net))
    assert set(conversion.source_tensors) == set(wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in conversion.source_tensors.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_files_of_every_layout_are_converted_and_proven(name: str, net: nn.Module, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    checkpoint = layout.build(net)
    torch.save(checkpoint, tmp_path / "in.pth.tar", _use_new_zipfile_serialization=name != "instdisc")
    conversion, differences = convert_checkpoint(tmp_path / "in.pth.tar", tmp_path / "new" / "out.pth")
    assert conversion.source.key == layout.source
    assert set(differences) == {"res2", "res3", "res4", "res5"} and max(differences.values()) < 1e-5

    written = torch.load(tmp_path / "new" / "out.pth", weights_only=True)
    assert written["__author__"] == "moco_d2" and written["matching_heuristics"] is True
    assert written["source_sha256"] == sha256(tmp_path / "in.pth.tar")
    assert BackboneFacts.from_dict(written["facts"]) == conversion.facts == read_facts(tmp_path / "new" / "out.pth")
    back, wanted = rename_table(DETECTRON2, TORCHVISION, 50), own_tensors(layout.weights(net))
    assert {back[key] for key in written["model"]} == set(wanted)
    assert all(torch.equal(tensor, wanted[back[key]]) for key, tensor in written["model"].items())
    # no temporary file stays
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out.pth", "out.yaml"]


@pytest.mark.parametrize("name", ASKED)
def test_what_a_file_does_not_show_is_asked_for(name: str, net: nn.Module) -> None:
    build, flag, answer = ASKED[name]
    with pytest.raises(CheckpointError, match=re.escape(flag)):
        convert_state(build(net), "x.pth")
    assert len(convert_state(build(net), "x.pth", Choice(**answer)).mapped) == 265


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match=r"the source is 'moko'.*did you mean 'moco'"):
        Choice(source="moko")
    with pytest.raises(ValueError, match="norm is 'LN'"):
        Choice(norm="LN")


def test_on_request_the_moving_average_is_taken(net: nn.Module) -> None:
    conversion = convert_state(LAYOUTS["pycontrast"].build(net), "x.pth", Choice(source="pycontrast-ema"))
    assert torch.equal(conversion.source_tensors["conv1.weight"], net.conv1.weight + 1)


def test_the_weights_show_that_the_input_was_not_divided(net: nn.Module) -> None:
    """As in MSRA's ResNet-50 with its statistics: only their size tells Caffe's input."""
    state = {key: t * 4000 if key == "bn1.running_var" else t for key, t in own_tensors(net.state_dict()).items()}
    conversion = convert_state(state, "x.pth")
    assert conversion.source.key == "caffe" and conversion.facts.pixels == CAFFE_BGR and conversion.facts.stride_in_1x1
    with pytest.raises(CheckpointError, match=r"not divided.*--source caffe.*--source moco"):
        convert_state(under("encoder_q.", state), "x.pth")
    assert convert_state(under("encoder_q.", state), "x.pth", Choice(source="moco")).facts.pixels == IMAGENET_RGB
    conversion = convert_state({"model": detectron2(without(state, "fc."))}, "x.pth")
    assert conversion.source.key == "detectron2-caffe" and conversion.facts.stride_in_1x1


def test_a_bias_of_conv1_moves_into_the_norm(net: nn.Module) -> None:
    bias = torch.randn(16)
    state = {**trunk(net), "bn1.running_mean": torch.zeros(16), "bn1.running_var": torch.ones(16), "conv1.bias": bias}
    conversion = convert_state(state, "x.pth")
    assert conversion.source.key == "caffe" and "subtracted" in conversion.dropped["conv1.bias"]
    x = torch.randn(2, 3, 32, 32)
    new = conversion.source_tensors
    wanted = torch.conv2d(x, state["conv1.weight"], bias, 2, 3) / (1 + 1e-5) ** 0.5
    got = (torch.conv2d(x, new["conv1.weight"], None, 2, 3) - new["bn1.running_mean"].view(-1, 1, 1)) / (
        1 + 1e-5
    ) ** 0.5
    assert torch.allclose(wanted, got, atol=1e-6)


def test_split_norms_are_averaged(net: nn.Module) -> None:
    state = trunk(net)
    split = {k: torch.cat([t - 0.1, t + 0.1]) if "running_" in k else t for k, t in state.items()}
    conversion = convert_state(split, "x.pth")
    assert all(torch.allclose(conversion.source_tensors[k], t) for k, t in own_tensors(state).items())
    assert any("split norms" in note for note in conversion.notes)


def test_what_a_file_repeats_is_counted_once(net: nn.Module) -> None:
    """Else this file, of less than a megabyte, would take hours."""
    joke: Any = [torch.ones(1)]
    for _ in range(2):
        joke = [joke] * 200_000
    conversion = convert_state({"state_dict": trunk(net), "joke": joke, "epoch": 3}, "x.pth")
    assert conversion.elsewhere == {"joke": 1, "epoch": 0}


def test_affine_layers_get_their_statistics_back(net: nn.Module) -> None:
    state = {
        key: value
        for key, value in caffe2(caffe(net), ("s", "b", "rm", "riv")).items()
        if key[-3:] not in ("_rm", "riv")
    }
    conversion = convert_state(state, "x.pkl")
    x, tensors = torch.randn(1, 16, 4, 4), conversion.source_tensors
    names = ("running_mean", "running_var", "weight", "bias")
    got = torch.nn.functional.batch_norm(x, *(tensors[f"bn1.{name}"] for name in names))
    wanted = x * torch.tensor(state["res_conv1_bn_s"]).view(-1, 1, 1) + torch.tensor(state["res_conv1_bn_b"]).view(
        -1, 1, 1
    )
    assert conversion.source.key == "caffe2-affine" and torch.allclose(got, wanted, atol=1e-6)
    # Every tensor of the network is written, those that the converter adds too; the report lists the file's keys.
    assert set(conversion.tensors) == set(DETECTRON2.names(50)) and set(conversion.mapped) == set(state)
    assert len(conversion.mapped) == 159 and max(prove(conversion.facts, tensors, conversion.tensors).values()) < 1e-9


def test_group_norm_if_asked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = torchvision.models.resnet18(norm_layer=lambda channels: nn.GroupNorm(32, channels)).state_dict()
    torch.save(state, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=r"GroupNorm.*--norm GN"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    conversion, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", choice=Choice(norm="GN"))
    assert conversion.config()["MODEL.RESNETS.NORM"] == "GN" and max(differences.values()) < 1e-5
    assert any("GroupNorm is your word" in note for note in conversion.notes)

    torch.save({"state_dict": state, "facts": conversion.facts.as_dict()}, tmp_path / "ours.pth")
    stated, differences = convert_checkpoint(tmp_path / "ours.pth", tmp_path / "stated.pth")
    assert stated.config() == conversion.config() and max(differences.values()) < 1e-5
    assert not any("your word" in note for note in stated.notes)
    earlier = {key: value for key, value in conversion.facts.as_dict().items() if key != "norm"}
    torch.save({"state_dict": state, "facts": earlier}, tmp_path / "earlier.pth")
    again, _ = convert_checkpoint(tmp_path / "earlier.pth", tmp_path / "again.pth", choice=Choice(norm="GN"))
    assert again.facts == stated.facts


@pytest.mark.parametrize("name", ["resnetaa50.pth", "resnet50.pth"])
def test_names_that_tell_antialiased_twins(name: str, net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": trunk(net), "arch": name[:-4].replace("50", "blur50")[:12]}, tmp_path / name)
    with pytest.raises(CheckpointError, match="anti-aliased"):
        convert_checkpoint(tmp_path / name, tmp_path / "out.pth")


def test_config_json_beside_the_file_is_heeded(net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"downsample_in_bottleneck": True}))
    assert convert_state(hugging_face(trunk(net)), path).facts.stride_in_1x1
    half = {"pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}
    (tmp_path / "config.json").write_text(json.dumps(half))
    assert convert_state(trunk(net), path).facts.pixels.mean == (127.5, 127.5, 127.5)


def renamings(keys: list[str], random: random.Random) -> dict[str, str]:
    """A renaming that no project uses: words replaced, numbers moved, parts added, removed or changed in order."""
    words = sorted({part for key in keys for part in key.split(".") if not part.isdigit()} - {"weight", "bias"})
    kind = random.randrange(5)
    word = random.choice(words)
    new = "".join(random.choices("abcdefgh", k=5))
    changes: list[Callable[[str], str]] = [
        lambda key: ".".join(new if part == word else part for part in key.split(".")),
        lambda key: re.sub(r"layer(\d)\.(\d+)", lambda m: f"layer{m[1]}.{int(m[2]) + 1}", key),
        lambda key: f"{new}.{key}",
        lambda key: key.replace(".", "_"),
        lambda key: ".".join(reversed(key.split("."))),
    ]
    return {key: changes[kind](key) for key in keys}


def test_random_renamings_never_convert_silently(net: nn.Module) -> None:
    chance = random.Random(0)
    state = own_tensors(net.state_dict())
    for _ in range(150):
        table = renamings(list(state), chance)
        if chance.random() < 0.3:  # or a few tensors only
            some = set(chance.sample(list(state), chance.randrange(1, 4)))
            table = {key: new if key in some and not key.startswith("fc") else key for key, new in table.items()}
        if table == dict.fromkeys(state) or all(key == new for key, new in table.items() if not key.startswith("fc.")):
            continue
        with pytest.raises(CheckpointError):
            convert_state({table[key]: tensor for key, tensor in state.items()}, "x.pth")


def _with_renamed(content: Any, place: list[str], table: dict[str, str]) -> Any:
    if not place:
        return {table.get(str(key), key): value for key, value in content.items()}
    return {**content, place[0]: _with_renamed(content[place[0]], place[1:], table)}


def test_a_damaged_moving_average_is_not_passed_over(net: nn.Module) -> None:
    content = LAYOUTS["timm-training"].build(net)
    del content["state_dict_ema"]["layer3.0.conv2.weight"]
    with pytest.raises(CheckpointError, match=r"--prefix ''"):
        convert_state(content, "x.pth")
    assert len(convert_state(content, "x.pth", Choice(source="torchvision")).mapped) == 265
    assert convert_state({**content, "state_dict_ema": None}, "x.pth").source.key == "torchvision"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in ("byol-deepmind", "simclr-tensorflow")])
def test_no_sources_file_converts_wrongly_once_keys_are_renamed(name: str, net: nn.Module) -> None:
    """An error, or the very same network: some files hold it a second time, and any prefix will do for Lightning."""
    chance, content = random.Random(name), LAYOUTS[name].build(net)
    whole = convert_state(content, "x.pth")
    keys, refused = list(whole.mapped), 0
    for some in (1, 2, 9, len(keys), len(keys)):
        table = {key: new for key, new in renamings(keys, chance).items() if new not in keys}
        table = {key: table[key] for key in chance.sample(list(table), min(some, len(table)))}
        try:
            other = convert_state(_with_renamed(content, whole.place.split(".") if whole.place else [], table), "x.pth")
        except CheckpointError:
            refused += 1
            continue
        assert not table or set(other.mapped) != set(keys)
        assert all(torch.equal(tensor, whole.tensors[key]) for key, tensor in other.tensors.items())
    assert refused or name in ("densecl", "openselfsup", "openselfsup-byol", "byol-lucidrains", "lightning-any")


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
        own = network_for(ResNetFacts(depth=depth)).state_dict()
    assert TORCHVISION.names(depth) == [key for key in own if "num_batches" not in key]
    there, back = rename_table(TORCHVISION, DETECTRON2, depth), rename_table(DETECTRON2, TORCHVISION, depth)
    assert {back[there[key]]: key for key in there} == {key: key for key in there}
    assert len(back) == len(there) and TORCHVISION.depth_of(there) == DETECTRON2.depth_of(back) == depth


@pytest.mark.parametrize(
    ("name", "width"),
    [("resnet18", 1), ("resnet18", 0.25), ("resnet34", 0.5), ("resnet101", 0.25), ("resnext50_32x4d", 0.5),
     ("wide_resnet50_2", 0.25), ("resnet50", 0.5)],
)  # fmt: skip
def test_other_shapes_are_told_from_the_tensors_and_proven(name: str, width: float, tmp_path: Path) -> None:
    torch.save(network(name, width).state_dict(), tmp_path / "in.pth")
    _, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    assert len(differences) == 4


def test_stated_stride_and_pixels_are_kept(net: nn.Module, tmp_path: Path) -> None:
    stated = {
        **facts(net).as_dict(),
        "stride_in_1x1": True,
        "pixels": ResNetFacts(pixels=CAFFE_BGR).as_dict()["pixels"],
    }
    torch.save({"state_dict": trunk(net), "facts": stated}, tmp_path / "in.pth")
    conversion, _ = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pkl")
    assert conversion.facts.as_dict() == read_facts(tmp_path / "out.pkl").as_dict() == stated
    assert conversion.facts.config()["INPUT.FORMAT"] == "BGR" and conversion.facts.recipe == FACTS["recipe"]


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
    "empty": (lambda s: {}, ["no known ResNet", "nothing"]),
    "empty-state-dict": (lambda s: {"state_dict": {}, "epoch": 3}, ["state_dict, epoch", "save the state_dict()"]),
    "key-encoder-only": (
        lambda s: {"state_dict": under("module.encoder_k.", s)},
        ["a complete ResNet-50 under `encoder_k.`", "moving average", "--prefix encoder_k."],
    ),
    "optimizer-only": (
        lambda s: {"optimizer": {"state": {}}},
        ["only the state of an optimizer", "top-level keys: optimizer", "tensors: none"],
    ),
    "head-only": (lambda s: {"state_dict": {"module.fc.0.weight": torch.ones(3)}}, ["only a head", "whole network"]),
    "keys-that-are-tuples": (
        lambda s: {tuple(key.split(".")): t for key, t in s.items()},
        ["named by tuple, not by text"],
    ),
    "half-of-a-network": (
        lambda s: {key: t for key, t in s.items() if "layer3" in key},
        ["no known ResNet", "layer3.0.*"],
    ),
    "partial": (
        lambda s: {"state_dict": under("module.encoder_q.", without(s, "layer3.4.conv2", "layer4.0.bn1.bias"))},
        ["incomplete MoCo", "2 of the 265", "encoder_q.layer3.4.conv2.weight", "encoder_q.layer4.0.bn1.bias"],
    ),
    "names-of-a-shallower-network": (  # all of ResNet-34's
        lambda s: without(s, "layer4.2.bn3.running_var"),
        ["an incomplete ResNet: 1 of the 265 tensors of a ResNet-50 are missing: layer4.2.bn3.running_var"],
    ),
    "keys-that-are-bytes": (
        lambda s: {"state_dict": {key.encode(): t for key, t in s.items()}},
        ["named by bytes, not by text"],
    ),
    "group-norm": (lambda s: without(s, "running_"), ["GroupNorm", "--norm GN"]),
    "group-norm-or-parameters-alone": (lambda s: without(s, "running_"), ["statistics were not saved", "state_dict()"]),
    "convnext": (
        lambda s: {"features.1.0.layer_scale": torch.ones(3, 1, 1), "features.1.0.block.0.weight": torch.ones(3)},
        ["a ConvNeXt", "layer_scale"],
    ),
    "mobilenet-v3": (lambda s: {"features.1.block.0.0.weight": torch.ones(3)}, ["a MobileNet", "block.0.0"]),
    "googlenet": (lambda s: {"inception3a.branch1.conv.weight": torch.ones(3)}, ["Inception", "inception3a"]),
    "video": (
        lambda s: {"stem.0.weight": torch.ones(3), "layer1.0.conv1.0.weight": torch.ones(3, 3, 3, 3, 3)},
        ["a network for video", "layer1.0.conv1.0.weight"],
    ),
    "name-of-several-lines": (
        lambda s: {**s, "layer1.0.a\nb": torch.ones(3)},
        ["inside the backbone: 'layer1.0.a\\nb'"],
    ),
    "name-without-end": (lambda s: {**s, f"layer1.0.{'x' * 9999}": torch.ones(3)}, ["inside the backbone: ", "xx..."]),
    "unknown-keys": (lambda s: {**s, "layer4.0.se.weight": torch.ones(3)}, ["channel attention", "layer4.0.se.weight"]),
    "unknown-keys-2": (
        lambda s: {**s, "layer4.0.x.weight": torch.ones(3)},
        ["inside the backbone", "layer4.0.x.weight"],
    ),
    "both-wrapped-and-not": (lambda s: {**s, **under("module.", s)}, ["name the same tensor"]),
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
    "sparse": (lambda s: with_value(s, "conv1.weight", torch.Tensor.to_sparse), ["sparse: conv1.weight", "to_dense()"]),
    "emptied": (lambda s: {key: torch.empty(0) for key in s}, ["are empty", "zero_to_fp32.py"]),
    "without-values": (lambda s: {key: t.to("meta") for key, t in s.items()}, ["have no values"]),
    "quantised-stem": (
        lambda s: with_value(s, "conv1.weight", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        ["quantised: conv1.weight"],
    ),
    "adapters": (
        lambda s: under("base_model.model.", s) | {"base_model.model.layer1.0.conv1.lora_A.weight": torch.ones(3)},
        ["LoRA", "merge_and_unload()"],
    ),
    "weight-norm": (
        lambda s: {key.replace("conv1.weight", "conv1.weight_v"): t for key, t in s.items()},
        ["reparametrised", "remove_weight_norm", "conv1.weight_v"],
    ),
    "vit": (
        lambda s: {"state_dict": {"module.patch_embed.proj.weight": torch.ones(8, 3, 16, 16)}},
        ["vision transformer of another form", "only plain ViTs"],
    ),
    "no-trunk-in-detectron2": (
        lambda s: {"model": {n: torch.ones(1) for n in DETECTRON2.names(50) if "res4" not in n}},
        ["incomplete Detectron2", "res4.0.conv1.weight"],
    ),
    "deep-stem": (
        lambda s: {
            **without(s, "conv1", "downsample"),
            **{f"conv1.{n}.weight": torch.ones(32, 3, 3, 3) for n in (0, 3, 6)},
            **{f"conv1.{n}.weight": torch.ones(32) for n in (1, 4)},
            **{f"layer{n}.0.downsample.1.weight": torch.ones(8, 8, 1, 1) for n in (1, 2, 3, 4)},
            "layer1.0.downsample.2.weight": torch.ones(256),
        },
        ["three 3x3", "conv1.0.weight"],
    ),
    "pooled-shortcut": (
        lambda s: {**without(s, "layer2.0.downsample"), "layer2.0.downsample.2.weight": torch.ones(3)},
        ["pools in its shortcuts", "layer2.0.downsample.2.weight"],
    ),
    "clip": (lambda s: {"visual.attnpool.positional_embedding": torch.ones(3, 3)}, ["CLIP"]),
    "cmc": (
        lambda s: {
            "model": {
                f"encoder.module.{half}.{key}": tensor
                for half, channels in (("l_to_ab", 1), ("ab_to_l", 2))
                for key, tensor in with_value(s, "conv1.weight", lambda t, n=channels: t[:, :n]).items()
            }
        },
        ["CMC's two half-width", "l_to_ab"],
    ),
    "cmc-pycontrast": (
        lambda s: {
            "model": {
                f"module.encoder{n}.{key}": tensor
                for n in (1, 2)
                for key, tensor in with_value(s, "conv1.weight", lambda t, n=n: t[:, :n]).items()
            }
            | {"module.head1.0.weight": torch.ones(128, 1024)}
        },
        ["CMC's two half-width", "encoder1"],
    ),
    "selective-kernels": (
        lambda s: {
            "resnet": {
                "net.0.0.weight": torch.ones(32, 3, 3, 3),
                "net.0.1.0.weight": torch.ones(32),
                "net.0.2.weight": torch.ones(32, 32, 3, 3),
                "net.0.4.weight": torch.ones(64, 32, 3, 3),
                "net.0.5.0.weight": torch.ones(64),
                "net.1.blocks.0.projection.shortcut.2.weight": torch.ones(256, 64, 1, 1),
                "net.1.blocks.0.net.2.main_conv.0.weight": torch.ones(128, 64, 3, 3),
                "net.1.blocks.0.net.2.mixing_conv.0.weight": torch.ones(32, 64, 1, 1),
            }
        },
        ["selective kernels", "sk0"],
    ),
    "bit": (lambda s: {"block1.unit01.gn1.weight": torch.ones(3)}, ["BiT"]),
    "quantised": (lambda s: {"conv1.weight": torch.ones(3), "conv1.zero_point": torch.ones(1)}, ["quantised"]),
    "lightly-cli": (
        lambda s: {
            "state_dict": {
                "model.backbone.0.weight": torch.ones(3),
                "model.backbone.0.running_mean": torch.ones(3),
                "model.backbone.1.weight": torch.ones(64, 3, 3, 3),
                "model.backbone.2.weight": torch.ones(64),
                "model.backbone.3.0.conv1.weight": torch.ones(64, 64, 3, 3),
                "model.backbone.4.0.shortcut.0.weight": torch.ones(128, 64, 1, 1),
                "model.backbone.7.weight": torch.ones(32, 512, 1, 1),
                "model.projection_head.layers.0.weight": torch.ones(32, 32),
            }
        },
        ["CIFAR stem", "shortcut.0"],
    ),
    "solo-cifar": (lambda s: {"state_dict": under("backbone.", cifar(s))}, ["CIFAR stem", "(16, 3, 3, 3)"]),
    "facts-of-another-run": (
        lambda s: {"state_dict": s, "facts": ResNetFacts().as_dict()},
        ["contradict", "stem_channels is 16 by the tensors, 64 by the facts"],
    ),
    "facts-that-are-no-mapping": (lambda s: {"state_dict": s, "facts": []}, ["`facts` are not valid", "are a list"]),
    "facts-of-a-wrong-type": (
        lambda s: {"state_dict": s, "facts": {"depth": [50]}},
        ["`facts` are not valid", "depth is [50]; it must be a positive whole number"],
    ),
    "facts-of-group-norm": (
        lambda s: {"state_dict": s, "facts": {"norm": "GN"}},
        ["not a ResNet with GroupNorm", "its facts", "have a running_mean"],
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (torch.Tensor.to_sparse, ["1 tensors are of a kind that cannot be read (sparse_tensor)", "to_dense()"]),
        (lambda t: torch.nested.nested_tensor([t[0], t[1]]), ["(nested_tensor)", "save plain tensors"]),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_a_tensor_of_a_kind_that_is_not_read_is_not_called_missing(
    change: Callable[[torch.Tensor], torch.Tensor], words: list[str], net: nn.Module, tmp_path: Path
) -> None:
    state = {**trunk(net), "layer3.1.conv2.weight": change(trunk(net)["layer3.1.conv2.weight"])}
    torch.save({"state_dict": under("module.", state)}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError) as refusal:
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", proof=False)
    for word in [*words, "module.layer3.1.conv2.weight"]:
        assert word in str(refusal.value)


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
    environment = {"PYTHONPATH": f"{TOOL.parents[1]}:{TOOL.parent}", "PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert "cannot be proved" in run.stderr and "detectron2 is missing" in run.stderr
    assert "proof    not made" in run.stdout and (tmp_path / "out.pth").is_file()

"""A feature pyramid and a box head that SoCo and ReSim pretrain beside the ResNet.

Both are built by torchvision and spelled here a second time, by regular expressions, after the projects' own code.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import head, nested, network, other, tensors, trunk, under
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.ops import FeaturePyramidNetwork

from moco_d2.convert import CheckpointError, Choice, convert_checkpoint, convert_state, read_facts
from moco_d2.convert.back import take_back
from moco_d2.convert.prove import ProofError, prove_parts
from moco_d2.facts import CAFFE_BGR
from moco_d2.io.checkpoints import read_checkpoint

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
BOTH = Choice(parts=("fpn", "box_head"))
FPN = Choice(parts=("fpn",))
State = dict[str, torch.Tensor]


def trained(module: nn.Module) -> nn.Module:
    """Normalisations that do something, and biases that are not zero."""
    torch.manual_seed(3)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, std=0.2)
            nn.init.normal_(part.running_mean, std=0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
        elif isinstance(part, nn.Conv2d | nn.Linear) and part.bias is not None:
            nn.init.normal_(part.bias, std=0.2)
    return module.eval()


def pyramid(width: float, channels: int, norm: Any = nn.BatchNorm2d) -> nn.Module:
    return trained(FeaturePyramidNetwork([int(width * c) for c in (256, 512, 1024, 2048)], channels, norm_layer=norm))


def box_head(channels: int, side: int, outputs: int) -> nn.Module:
    return trained(FastRCNNConvFCHead((channels, side, side), [channels] * 4, [outputs], norm_layer=nn.BatchNorm2d))


def soco_neck(fpn: nn.Module) -> State:
    def new(key: str) -> str:
        kind, level, layer, tensor = re.fullmatch(r"(inner|layer)_blocks\.(\d)\.([01])\.(\w+)", key).groups()  # type: ignore[union-attr]
        return f"neck.{'lateral' if kind == 'inner' else 'fpn'}_convs.{level}.{('conv', 'bn')[int(layer)]}.{tensor}"

    return {new(key): value for key, value in fpn.state_dict().items()}


def soco_head(module: nn.Module) -> State:
    def new(key: str) -> str:
        if key.startswith("5."):
            return key.replace("5.", "head.fc1.")
        conv, layer, tensor = key.split(".")
        return f"head.{('conv', 'bn')[int(layer)]}{int(conv) + 1}.{tensor}"

    return {new(key): value for key, value in module.state_dict().items()}


def soco(net: nn.Module, fpn: nn.Module, roi: nn.Module) -> dict[str, Any]:
    """SoCo's training file: the key encoder has a neck and a head of its own."""
    query = under("encoder.", trunk(net)) | soco_neck(fpn) | soco_head(roi)
    key = {re.sub(r"^(encoder|neck|head)", r"\1_k", name): value for name, value in other(query).items()}
    rest = tensors(projector__linear1__weight=(8, 8), projector_k__linear1__weight=(8, 8), predictor__bn1__bias=(8,))
    return {"model": under("module.", query | key | rest), "opt": argparse.Namespace(lr=1.0), "optimizer": {}}


def resim(net: nn.Module, fpn: nn.Module) -> dict[str, Any]:
    """ReSim's training file: no output on conv5, nothing on conv2; with --fpn-bn layers are numbered."""
    normed = "inner_blocks.0.1.weight" in fpn.state_dict()
    state = trunk(net) | head(2)
    for key, value in fpn.state_dict().items():
        kind, level, layer, tensor = key.replace("_blocks", "").split(".")
        name = f"fpn_{'lateral' if kind == 'inner' else 'output'}{int(level) + 2}"
        if name not in ("fpn_lateral2", "fpn_output2", "fpn_output5"):
            state[f"{name}.{layer}.{tensor}" if normed else f"{name}.{tensor}"] = value
    both = under("module.encoder_q.", state) | under("module.encoder_k.", other(state))
    return {"epoch": 200, "arch": "resnet50", "state_dict": both | tensors(module__queue=(8, 8)), "optimizer": {}}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network()


@pytest.fixture(scope="module")
def file(net: nn.Module) -> dict[str, Any]:
    return soco(net, pyramid(0.25, 16), box_head(16, 7, 24))


def test_a_full_size_soco_file_fills_detectron2_and_computes_the_same(tmp_path: Path) -> None:
    """Published widths, compared with torchvision's modules without the converter's own tables."""
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec
    from detectron2.modeling import build_backbone
    from detectron2.modeling.roi_heads.box_head import build_box_head

    net, fpn, roi = network(width=1), pyramid(1, 256), box_head(256, 7, 1024)
    torch.save(soco(net, fpn, roi), tmp_path / "ckpt_epoch_400.pth")
    conversion, differences = convert_checkpoint(tmp_path / "ckpt_epoch_400.pth", tmp_path / "out.pth", choice=BOTH)
    assert list(differences) == ["res2", "res3", "res4", "res5", "p2", "p3", "p4", "p5", "box_head"]
    assert max(differences.values()) < 1e-5
    assert len(conversion.mapped) == 265 + 8 * 5 + 4 * 5 + 2
    assert conversion.facts.parts == ("fpn", "box_head") and read_facts(tmp_path / "out.pth") == conversion.facts

    cfg = get_cfg()
    cfg.merge_from_file(str(tmp_path / "out.yaml"))
    head_keys = cfg.MODEL.ROI_BOX_HEAD
    head_keys.NAME = "FastRCNNConvFCHead"
    assert (head_keys.NUM_CONV, head_keys.NUM_FC, head_keys.FC_DIM, head_keys.CONV_DIM) == (4, 1, 1024, 256)
    assert head_keys.NORM == cfg.MODEL.FPN.NORM == "SyncBN" and head_keys.POOLER_RESOLUTION == 7
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.FPN.IN_FEATURES = cfg.MODEL.RESNETS.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.NORM = head_keys.NORM = cfg.MODEL.RESNETS.NORM = "BN"
    state = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    copy = build_backbone(cfg, ShapeSpec(channels=3)).eval()
    own = {
        n.removeprefix("backbone.") if n.startswith("backbone.") else f"bottom_up.{n}": t
        for n, t in state.items()
        if "box_head" not in n
    }
    assert all("num_batches" in key for key in copy.load_state_dict(own, strict=False).missing_keys)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        net.eval()
        x, features = net.maxpool(net.relu(net.bn1(net.conv1(image)))), {}
        for stage in range(1, 5):
            features[f"p{stage + 1}"] = x = getattr(net, f"layer{stage}")(x)
        got = copy(image)
        for level, wanted in fpn(features).items():
            assert (got[level] - wanted).abs().max() < 1e-4 * wanted.abs().max(), level
        regions = torch.randn(3, 256, 7, 7)
        head2 = build_box_head(cfg, ShapeSpec(channels=256, height=7, width=7)).eval()
        prefix = "roi_heads.box_head."
        head2.load_state_dict({n.removeprefix(prefix): t for n, t in state.items() if prefix in n}, strict=False)
        assert (head2(regions) - roi(regions)).abs().max() < 1e-5


def test_without_the_option_only_the_backbone_is_taken_and_the_report_says_how(file: dict[str, Any]) -> None:
    conversion = convert_state(file, "x.pth")
    assert len(conversion.mapped) == 265 and conversion.facts.parts == () and conversion.content() == conversion.tensors
    reasons = set(conversion.dropped.values())
    assert {"SoCo's FPN (--with fpn keeps it)", "SoCo's box head (--with box_head keeps it)"} <= reasons


@pytest.mark.parametrize("parts", [("fpn",), ("box_head",), ("fpn", "box_head")])
def test_every_key_is_accounted_for(parts: tuple[str, ...], file: dict[str, Any]) -> None:
    conversion = convert_state(file, "x.pth", Choice(parts=parts))
    assert {*conversion.mapped, *conversion.dropped, *conversion.foreign} == set(file["model"])
    assert set(conversion.mapped.values()) == set(conversion.content())
    for key, name in conversion.mapped.items():
        assert torch.equal(conversion.content()[name], file["model"][key]), key
    assert not any("_k." in key for key in conversion.mapped)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d])
def test_resims_fpn_has_the_levels_that_it_was_trained_on(norm: Any, net: nn.Module, tmp_path: Path) -> None:
    torch.save(resim(net, pyramid(0.25, 16, norm)), tmp_path / "in.pth.tar")
    conversion, differences = convert_checkpoint(tmp_path / "in.pth.tar", tmp_path / "out.pkl", choice=FPN)
    # p5 has no output layer: what would be compared is random.
    assert list(differences)[4:] == ["p3", "p4"] and max(differences.values()) < 1e-5
    assert len(conversion.content()) == 265 + 5 * (5 if norm else 2)
    assert any("MODEL.FPN.NORM SyncBN" in note for note in conversion.notes) is (norm is None)
    assert set(read_checkpoint(tmp_path / "out.pkl")["model"]) == set(conversion.content())


def as_its_authors_convert(model: State, *, resim: bool) -> dict[str, Any]:
    """The query encoder as the projects' own converters leave it: arrays, with the counters and ReSim's head."""
    converted: dict[str, Any] = {}
    for key, tensor in model.items():
        if not key.startswith("module.encoder_q." if resim else ("module.encoder.", "module.neck.", "module.head.")):
            continue
        name = re.sub(r"^module\.(encoder_q|encoder|neck)\.", "", key).replace("module.head.", "box_head.")
        if resim and "fpn" in name:
            name = f"backbone.{name}"
        elif key.startswith("module.encoder") and "layer" not in name:
            name = f"stem.{name}"
        name = re.sub(r"layer(\d)", lambda m: f"res{int(m[1]) + 1}", name)
        name = re.sub(r"(lateral|fpn)_convs\.(\d)\.(conv|bn)", _level, name)
        name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
        converted[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor.numpy()
    return {"model": converted, "__author__": "MOCO" if resim else "Yue", "matching_heuristics": True}


def _level(found: re.Match[str]) -> str:
    kind, norm = "lateral" if found[1] == "lateral" else "output", ".norm" if found[3] == "bn" else ""
    return f"fpn_{kind}{int(found[2]) + 2}{norm}"


@pytest.mark.parametrize("key", ["soco-detectron2", "resim-detectron2"])
def test_what_the_authors_converted_is_the_same(key: str, net: nn.Module, file: dict[str, Any]) -> None:
    resims = resim(net, pyramid(0.25, 16, None))
    is_resim = key == "resim-detectron2"
    original, choice = (resims, FPN) if is_resim else (file, BOTH)
    theirs = as_its_authors_convert(original["state_dict" if is_resim else "model"], resim=is_resim)
    one, two = convert_state(original, "x.pth", choice), convert_state(theirs, "x.pkl", choice)
    assert two.source.key == key and two.facts == one.facts and two.foreign == []
    assert set(one.content()) == set(two.content())
    assert all(torch.equal(tensor, two.content()[name]) for name, tensor in one.content().items())
    assert len(convert_state(theirs, "x.pkl").mapped) == 265


def test_the_proof_sees_swapped_levels_and_layers(file: dict[str, Any]) -> None:
    conversion = convert_state(file, "x.pth", BOTH)
    arguments = conversion.facts, conversion.source_tensors, conversion.parts
    for one, two, words in (
        ("backbone.fpn_output2.weight", "backbone.fpn_output3.weight", "differ at p2 by .*p3 by"),
        ("backbone.fpn_lateral5.norm.bias", "backbone.fpn_lateral4.norm.bias", "p5 by"),
        ("roi_heads.box_head.conv2.weight", "roi_heads.box_head.conv3.weight", "box_head by"),
        ("roi_heads.box_head.conv4.norm.running_var", "roi_heads.box_head.conv4.norm.weight", "box_head by"),
    ):
        written = conversion.content()
        written[one], written[two] = written[two], written[one]
        with pytest.raises(ProofError, match=words):
            prove_parts(*arguments, written)
    assert max(prove_parts(*arguments, conversion.content()).values()) < 1e-9


def test_baked_and_taken_back(file: dict[str, Any], tmp_path: Path) -> None:
    torch.save(file, tmp_path / "in.pth")
    baked, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", choice=BOTH, bake=True)
    assert baked.facts.pixels == CAFFE_BGR and baked.facts.parts == BOTH.parts and "box_head" in differences
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert torch.equal(
        written["model"]["backbone.fpn_lateral3.weight"], file["model"]["module.neck.lateral_convs.1.conv.weight"]
    )
    again = convert_state(written, "out.pth")
    assert again.facts.parts == () and set(again.content()) == set(baked.tensors)
    back = take_back(written, "out.pth")
    assert back.facts.parts == () and "fpn, box_head is no part of a ResNet" in back.notes[0]


def without(part: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if part not in key}


REFUSALS: dict[str, tuple[Callable[[State], State], tuple[str, ...], str]] = {
    "level": (without("neck.lateral_convs.3"), ("fpn",), r"not the published one: 5 of its 40 tensors are missing"),
    "one level more": (
        lambda s: s | {"module.neck.fpn_convs.4.conv.weight": torch.ones(16, 16, 3, 3)},
        ("fpn",),
        r"1 keys belong to no known layer of it: neck\.fpn_convs\.4\.conv\.weight",
    ),
    "no neck": (without(".neck."), ("fpn",), "holds no fpn: none of its keys looks like neck.lateral_convs.0"),
    "another network's": (
        lambda s: s | {"module.neck.lateral_convs.0.conv.weight": torch.randn(16, 128, 1, 1)},
        ("fpn",),
        r"backbone\.fpn_lateral2\.weight is \(16, 128, 1, 1\) instead of \(16, 64, 1, 1\)",
    ),
    "another pooling": (
        lambda s: s | {"module.head.fc1.weight": torch.randn(24, 16 * 50)},
        ("box_head",),
        r"fc1\.weight is \(24, 800\) instead of \(24, 784\)",
    ),
    "not finite": (
        lambda s: s | {"module.head.fc1.bias": torch.full((24,), torch.nan)},
        ("box_head",),
        r"NaN or infinity: module\.head\.fc1\.bias",
    ),
    "zero": (
        lambda s: s | {"module.neck.fpn_convs.0.conv.weight": torch.zeros(16, 16, 3, 3)},
        ("fpn",),
        r"all zero: module\.neck\.fpn_convs\.0\.conv\.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_whole_is_refused(name: str, file: dict[str, Any]) -> None:
    change, parts, words = REFUSALS[name]
    with pytest.raises(CheckpointError, match=words):
        convert_state({"model": change(file["model"])}, "x.pth", Choice(parts=parts))


def test_sources_without_parts_say_which_have_them(net: nn.Module) -> None:
    with pytest.raises(CheckpointError, match=r"recognised as MoCo; .* no fpn .*ReSim: fpn; SoCo: fpn, box_head"):
        convert_state(nested("state_dict", "module.encoder_q.")(net), "x.pth", FPN)
    with pytest.raises(CheckpointError, match=r"recognised as ReSim; its source pretrains fpn, no box_head"):
        convert_state(resim(net, pyramid(0.25, 16, None)), "x.pth", Choice(parts=("box_head",)))


def test_the_tool(
    file: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(file, tmp_path / "in.pth")

    def run(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        return int(runpy.run_path(str(TOOL))["main"]())

    assert run(tmp_path / "in.pth", tmp_path / "out.pth", "--with", "fpn,box-head") == 2
    assert "a part is 'box-head'; it must be one of fpn, box_head; did you mean 'box_head'?" in capsys.readouterr().err
    assert run(tmp_path / "in.pth", tmp_path / "out.pth", "--with", "fpn,box_head") == 0
    shown = capsys.readouterr().out
    for words in ("parts    fpn (40 tensors), box_head (22 tensors)", "another protocol", "p5 ", "box_head ",
                  "327 mapped", "MODEL.ROI_BOX_HEAD.NUM_CONV 4", "MODEL.FPN.NORM SyncBN"):  # fmt: skip
        assert words in shown, words
    with pytest.raises(SystemExit):
        run(tmp_path / "out.pth", tmp_path / "tv.pth", "--with", "fpn", "--to", "torchvision")

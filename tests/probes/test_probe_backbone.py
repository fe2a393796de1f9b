"""Every kind of file of which a probe takes the backbone, and the files that it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled_pictures import config
from torch import nn

from moco_d2.convert import CheckpointError, convert_state
from moco_d2.facts import CAFFE_BGR, BackboneFacts
from moco_d2.io.provenance import sha256
from moco_d2.layers.heads import without_head
from moco_d2.layers.resnet import build_resnet, describe
from moco_d2.probes.backbone import load_backbone

Write = Callable[[dict[str, Any]], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def save(content: dict[str, Any]) -> str:
        torch.save(content, tmp_path / "weights.pth")
        return str(tmp_path / "weights.pth")

    return save


def lived_in(network: nn.Module) -> nn.Module:
    """Give the norms the statistics of a few pictures."""
    torch.manual_seed(1)
    with torch.no_grad():
        network.train()(torch.rand(8, 3, 64, 64) * 2 - 1)
    return network.eval()


def check_features(weights: str, network: nn.Module, tmp_path: Path) -> BackboneFacts:
    """Check that a file gives a network's own features; return the facts."""
    found = load_backbone(weights, config(tmp_path))
    images = torch.randn(2, 3, 64, 64)
    expected = without_head(network)(images)
    torch.testing.assert_close(found.network(images), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-3 and not found.network.training
    assert not any(parameter.requires_grad for parameter in found.network.parameters())
    assert found.sha256 == sha256(weights) and found.record()["facts"] == found.facts.as_dict()
    return found.facts


@pytest.mark.parametrize(("name", "stem", "norm"), [
    ("resnet18", "cifar", "BN"), ("resnet18", "imagenet", "BN"), ("resnet50", "imagenet", "GN"),
])  # fmt: skip
def test_our_backbones_and_checkpoints_of_any_stem_width_and_norm(
    name: str, stem: str, norm: str, write: Write, tmp_path: Path
) -> None:
    network = lived_in(build_resnet(name, width=0.5 if norm == "GN" else 0.125, stem=stem, norm=norm))
    facts = describe(network, CAFFE_BGR, origin="a test")
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    found = check_features(write({"state_dict": state, "facts": facts.as_dict()}), network, tmp_path)
    assert found.pixels == CAFFE_BGR
    run = {
        "model": {"encoder_k.fc.weight": torch.ones(3)} | {f"net.q.{k}": v for k, v in network.state_dict().items()},
        "facts": facts.as_dict(), "backbone": {"method": "Toy", "prefix": "net.q."},
    }  # fmt: skip
    check_features(write(run), network, tmp_path)


def test_other_peoples_files_converted_files_and_detectors(write: Write, tmp_path: Path) -> None:
    network = lived_in(build_resnet("resnet50", width=0.25))
    torchvision = write(network.state_dict())
    check_features(torchvision, network, tmp_path)
    moco = {f"module.encoder_q.{k}": v for k, v in network.state_dict().items() if not k.startswith("fc.")}
    head = {f"module.encoder_q.fc.{k}": torch.ones(2) for k in ("0.weight", "2.weight")}
    check_features(write({"state_dict": moco | head, "arch": "resnet50"}), network, tmp_path)
    conversion = convert_state(network.state_dict(), "memory")
    facts = conversion.facts.as_dict()
    check_features(write({"model": conversion.tensors, "facts": facts}), network, tmp_path)
    detector = {f"backbone.bottom_up.{key}": value for key, value in conversion.tensors.items()}
    detector |= {"roi_heads.box_head.fc1.weight": torch.ones(2, 2), "proposal_generator.rpn_head.conv.bias": head_of()}
    found = load_backbone(write({"model": detector, "facts": facts}), config(tmp_path))
    assert found.read_as.startswith("Detectron2 detector with FPN")
    check_features(write({"model": detector, "facts": facts}), network, tmp_path)


def head_of() -> torch.Tensor:
    return torch.ones(2)


def test_files_that_cannot_be_probed(write: Write, tmp_path: Path) -> None:
    network = build_resnet("resnet18", width=0.125, stem="cifar")
    facts = describe(network).as_dict()
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("fc.")}
    for content, words in (
        ({"model": {"x": torch.ones(1)}, "facts": facts, "backbone": {"method": "Toy", "prefix": None}},
         "the backbone of Toy is no part of its checkpoint; give the backbone.pth"),
        ({"state_dict": {k: v for k, v in state.items() if "layer4" not in k}, "facts": facts},
         "tensors are missing or do not fit its facts .a ResNet-18.: layer4"),
        ({"state_dict": state | {"bn1.weight": torch.full((8,), torch.nan)}, "facts": facts}, "hold NaN or infinity"),
        ({"state_dict": {"head.weight": torch.ones(2, 2)}}, "it holds no ResNet, only a head"),
    ):  # fmt: skip
        with pytest.raises(CheckpointError, match=words):
            load_backbone(write(content), config(tmp_path))
    with pytest.raises(CheckpointError, match=r"missing\.pth"):
        load_backbone(str(tmp_path / "missing.pth"), config(tmp_path))


def test_random_weights_follow_from_config_and_seed(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    one, same, other = (load_backbone("random", config(tmp_path, "SEED", seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), before)
    first, second, third = (found.network.state_dict()["conv1.weight"] for found in (one, same, other))
    assert torch.equal(first, second) and not torch.equal(first, third)
    assert one.facts.stem_channels == 8 and one.sha256 == "" and "seed 3" in one.facts.origin
    with pytest.raises(ValueError, match=r"SSL\.ENCODER.NAME"):
        load_backbone("random", config(tmp_path, "SSL.ENCODER.NAME", "resnet20"))

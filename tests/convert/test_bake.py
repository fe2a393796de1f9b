from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from checkpoint_layouts import LAYOUTS, network
from torch import nn

from moco_d2.convert import (
    CheckpointError,
    Conversion,
    ProofError,
    convert_checkpoint,
    convert_state,
    prove,
    read_checkpoint,
    read_facts,
)
from moco_d2.convert.bake import bake, baked
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB, Pixels, ResNetFacts
from moco_d2.layers.resnet import network_for

SWAV = Pixels(std=(58.14, 57.12, 57.375))
IMAGENET_BGR = Pixels("BGR", IMAGENET_RGB.mean[::-1], IMAGENET_RGB.std[::-1])


@pytest.fixture(scope="module")
def conversion() -> Conversion:
    return convert_state(network().state_dict(), "x.pth")


def fed(conversion: Conversion, pixels: Pixels, **changes: bool) -> Conversion:
    return replace(conversion, facts=replace(conversion.facts, pixels=pixels, **changes))


def prepare(picture: torch.Tensor, pixels: Pixels) -> torch.Tensor:
    """The input of a network that wants ``pixels``, from a picture (N, 3, H, W), RGB, 0..255."""
    picture = picture if pixels.order == "RGB" else picture.flip(1)
    mean, std = (torch.tensor(v, dtype=picture.dtype).view(1, 3, 1, 1) for v in (pixels.mean, pixels.std))
    return ((picture - mean) / std).float()


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("pixels", [IMAGENET_RGB, SWAV, IMAGENET_BGR, CAFFE_BGR], ids=["rgb", "swav", "bgr", "baked"])
def test_baked_weights_agree_under_detectron2s_default_input(
    conversion: Conversion, pixels: Pixels, stride_in_1x1: bool
) -> None:
    source = fed(conversion, pixels, stride_in_1x1=stride_in_1x1)
    made = baked(source, "x.pth")
    # Nothing else changes, neither among the tensors nor among the facts: the stride's config key stays what it was.
    assert made.facts == replace(source.facts, pixels=CAFFE_BGR)
    changed = {n for n, t in made.tensors.items() if not torch.equal(t, conversion.tensors[n])}
    assert changed == ({"stem.conv1.weight"} if pixels != CAFFE_BGR else set())
    assert made.tensors.keys() == conversion.tensors.keys()
    assert max(prove(made.facts, source.source_tensors, made.tensors, source_pixels=pixels).values()) < 2e-6


def test_the_first_convolution_agrees_to_float32_at_full_width() -> None:
    net = network(width=1)
    tensors, facts = bake(net.state_dict(), ResNetFacts())
    baked = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
    baked.load_state_dict({"weight": tensors["conv1.weight"]})
    picture = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        wanted, got = net.conv1(prepare(picture, IMAGENET_RGB)), baked(prepare(picture, facts.pixels))
    assert (wanted - got).abs().max() / wanted.abs().max() < 6e-7


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (Pixels(mean=(0, 0, 0), std=(255, 255, 255)), "no mean (pixels from 0 to 1)"),
        (Pixels(mean=(127.5, 127.5, 127.5)), "the mean [127.5, 127.5, 127.5]"),
        # Detectron2's mean, but not mirrored: for RGB these are the wrong channels.
        (Pixels("RGB", CAFFE_BGR.mean, (1.0, 1.0, 1.0)), "the mean [123.675, 116.28, 103.53] (as BGR)"),
    ],
)
def test_another_mean_is_refused(conversion: Conversion, pixels: Pixels, words: str) -> None:
    with pytest.raises(CheckpointError) as refusal:
        baked(fed(conversion, pixels), "some.pth")
    assert str(refusal.value).startswith("some.pth: it cannot be baked exactly") and words in str(refusal.value)


def test_another_mean_would_show_at_the_border() -> None:
    # What the refusal says: moving the mean into the following bias is exact inside and wrong at the border.
    facts = ResNetFacts(stem_channels=16, res2_channels=64, width_per_group=16, pixels=Pixels("RGB", (0, 0, 0)))
    net = network_for(facts).eval()
    picture = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 255
    shift = torch.tensor(IMAGENET_RGB.mean).div(torch.tensor(IMAGENET_RGB.std)).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = net.conv1(prepare(picture, facts.pixels))
        moved = net.conv1(prepare(picture, IMAGENET_RGB)) + (net.conv1.weight * shift).sum((1, 2, 3)).view(1, -1, 1, 1)
    difference = (wanted - moved).abs().amax((0, 1))
    assert difference[2:-2, 2:-2].max() < 1e-4 < difference[0].max()


def test_a_wrong_fold_fails_the_proof(conversion: Conversion) -> None:
    tensors, facts = bake(conversion.tensors, conversion.facts)
    unflipped = {**tensors, "stem.conv1.weight": tensors["stem.conv1.weight"].flip(1)}
    with pytest.raises(ProofError, match="res2"):
        prove(facts, conversion.source_tensors, unflipped, source_pixels=conversion.facts.pixels)


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
def test_a_baked_file_says_what_it_wants(suffix: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS["moco-v2-released"].build(network()), tmp_path / "in.pth")
    made, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / f"out{suffix}", bake=True)
    assert max(differences.values()) < 2e-6
    assert read_facts(tmp_path / f"out{suffix}") == made.facts and made.facts.pixels == CAFFE_BGR
    config = yaml.safe_load((tmp_path / "out.yaml").read_text())
    assert config["INPUT"]["FORMAT"] == "BGR" and config["MODEL"]["PIXEL_STD"] == [1.0, 1.0, 1.0]
    assert config["MODEL"]["RESNETS"]["STRIDE_IN_1X1"] is False and config["MODEL"]["WEIGHTS"].endswith(f"out{suffix}")
    written = torch.as_tensor(read_checkpoint(tmp_path / f"out{suffix}")["model"]["stem.conv1.weight"])
    assert torch.equal(written, made.tensors["stem.conv1.weight"])
    assert any("it was RGB" in note for note in made.notes) and any("STRIDE_IN_1X1 False" in n for n in made.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pth", f"out{suffix}", "out.yaml"]


def test_a_refusal_leaves_what_was_there(tmp_path: Path) -> None:
    unit = {"order": "RGB", "mean": [0.0, 0.0, 0.0], "std": [255.0, 255.0, 255.0]}
    content = LAYOUTS["own-backbone"].build(network())
    content["facts"]["pixels"] = unit
    torch.save(content, tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", proof=False)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="no mean"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", bake=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier
    with pytest.raises(ValueError, match="the output is the input"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "in.pth", bake=True)


def test_unbaking_restores_the_weights(conversion: Conversion) -> None:
    tensors, facts = bake(*bake(conversion.tensors, conversion.facts), conversion.facts.pixels)
    assert facts == conversion.facts
    assert all(torch.allclose(t, conversion.tensors[n], rtol=3e-7, atol=0) for n, t in tensors.items())

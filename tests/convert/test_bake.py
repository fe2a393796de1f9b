from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoint_layouts import network
from torch import nn

from moco_d2.convert import CheckpointError, Conversion, ProofError, convert_state
from moco_d2.convert.bake import bake, bake_content, prepare, prove_baked
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB, BackboneFacts, Pixels
from moco_d2.layers.resnet import network_for

SWAV = Pixels(std=(58.14, 57.12, 57.375))
IMAGENET_BGR = Pixels("BGR", IMAGENET_RGB.mean[::-1], IMAGENET_RGB.std[::-1])


@pytest.fixture(scope="module")
def conversion() -> Conversion:
    return convert_state(network().state_dict(), "x.pth")


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("pixels", [IMAGENET_RGB, SWAV, IMAGENET_BGR, CAFFE_BGR], ids=["rgb", "swav", "bgr", "baked"])
def test_baked_weights_agree_under_detectron2s_default_input(
    conversion: Conversion, pixels: Pixels, stride_in_1x1: bool
) -> None:
    facts = replace(conversion.facts, pixels=pixels, stride_in_1x1=stride_in_1x1)
    tensors, baked = bake(conversion.tensors, facts)
    # Nothing else changes, neither among the tensors nor among the facts: the stride's config key stays what it was.
    assert baked == replace(facts, pixels=CAFFE_BGR)
    changed = {n for n, t in tensors.items() if not torch.equal(t, conversion.tensors[n])}
    assert changed <= {"stem.conv1.weight"} and tensors.keys() == conversion.tensors.keys()
    assert max(prove_baked(facts, conversion.tensors, baked, tensors).values()) < 2e-6


def test_the_first_convolution_agrees_to_float32_at_full_width() -> None:
    net = network(width=1)
    tensors, facts = bake(net.state_dict(), BackboneFacts())
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
    facts = replace(conversion.facts, pixels=pixels)
    with pytest.raises(CheckpointError) as refusal:
        bake_content({"model": conversion.tensors, "facts": facts.as_dict()}, "some.pth")
    assert str(refusal.value).startswith("some.pth: it cannot be baked exactly") and words in str(refusal.value)


def test_another_mean_would_show_at_the_border() -> None:
    # What the refusal says: moving the mean into the following bias is exact inside and wrong at the border.
    facts = BackboneFacts(stem_channels=16, res2_channels=64, width_per_group=16, pixels=Pixels("RGB", (0, 0, 0)))
    net = network_for(facts).eval()
    picture = torch.rand(1, 3, 64, 64, dtype=torch.float64) * 255
    shift = torch.tensor(IMAGENET_RGB.mean).div(torch.tensor(IMAGENET_RGB.std)).view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = net.conv1(prepare(picture, facts.pixels))
        moved = net.conv1(prepare(picture, IMAGENET_RGB)) + (net.conv1.weight * shift).sum((1, 2, 3)).view(1, -1, 1, 1)
    difference = (wanted - moved).abs().amax((0, 1))
    assert difference[2:-2, 2:-2].max() < 1e-4 < difference[0].max()


def test_a_wrong_fold_fails_the_proof(conversion: Conversion) -> None:
    tensors, baked = bake(conversion.tensors, conversion.facts)
    unflipped = {**tensors, "stem.conv1.weight": tensors["stem.conv1.weight"].flip(1)}
    with pytest.raises(ProofError, match="res2"):
        prove_baked(conversion.facts, conversion.tensors, baked, unflipped)


def test_unbaking_restores_the_weights(conversion: Conversion) -> None:
    tensors, facts = bake(*bake(conversion.tensors, conversion.facts), conversion.facts.pixels)
    assert facts == conversion.facts
    assert all(torch.allclose(t, conversion.tensors[n], rtol=3e-7, atol=0) for n, t in tensors.items())

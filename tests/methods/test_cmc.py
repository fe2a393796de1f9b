"""CMC: the fold of its two networks into one, losses against loops, published names, and the conversion of the fold."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moco_d2.convert import convert_checkpoint
from moco_d2.facts import IMAGENET_RGB
from moco_d2.layers.resnet import build_resnet, describe
from moco_d2.methods import CMC
from moco_d2.methods.cmc import HALF_RANGES, YDBDR
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses

RESNETS = [("resnet18", 0.125, "imagenet"), ("resnet50", 0.125, "imagenet"), ("resnet18", 0.25, "cifar")]


def make(depth: str, width: float, stem: str = "imagenet") -> CMC:
    torch.manual_seed(0)
    return CMC(functools.partial(build_resnet, depth, width=width, stem=stem), images=9, dim=8, negatives=4).double()


def colours(x: torch.Tensor) -> torch.Tensor:
    """Return YDbDr of pixels with ImageNet's mean and std, by way of pixels in [0, 1]."""
    mean, std = (
        torch.tensor(values, dtype=x.dtype).view(3, 1, 1) / 255 for values in (IMAGENET_RGB.mean, IMAGENET_RGB.std)
    )
    space = torch.tensor(YDBDR, dtype=x.dtype)

    def convert(pixels: torch.Tensor) -> torch.Tensor:
        return torch.einsum("dc,nchw->ndhw", space, pixels)

    scale = torch.tensor(HALF_RANGES, dtype=x.dtype).view(3, 1, 1)
    return (convert(x * std + mean) - convert(mean[None])) / scale


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("resnet", RESNETS)
def test_the_folded_backbone_computes_what_both_halves_compute(resnet: tuple, training: bool) -> None:
    method = make(*resnet).train(training)
    with torch.no_grad():  # batch norms that are not the identity
        for name, value in [*method.named_parameters(), *method.named_buffers()]:
            if "bn" in name or "downsample.1" in name:
                value.copy_(torch.rand_like(value.double()) + 0.5)
    x = torch.randn(4, 3, 48, 48, dtype=torch.float64)
    backbone = method.backbone()
    names = build_resnet(*resnet[:1], width=resnet[1], stem=resnet[2]).state_dict()
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in names.items() if not key.startswith("fc.")
    }
    y = torch.einsum("dc,nchw->ndhw", method.colours, x)
    method.encoder_l.fc, method.encoder_ab.fc = torch.nn.Identity(), torch.nn.Identity()
    expected = torch.cat([method.encoder_l(y[:, :1]), method.encoder_ab(y[:, 1:])], dim=1)
    torch.testing.assert_close(backbone(x), expected)


def test_the_published_constants_of_the_colour_space() -> None:
    method = make("resnet18", 0.125)
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    torch.testing.assert_close(torch.einsum("dc,nchw->ndhw", method.colours, x), colours(x), rtol=1e-5, atol=1e-6)
    assert torch.linalg.matrix_rank(method.colours) == 3
    # PyContrast's means of Y, Db and Dr, which are nearly those of ImageNet's mean colour.
    mean = np.array(YDBDR) @ (np.array(IMAGENET_RGB.mean) / 255)
    assert np.abs((mean - (0.457, -0.082, -0.052)) / HALF_RANGES).max() < 0.005


def test_making_the_fold_draws_no_random_numbers() -> None:
    method = make("resnet18", 0.125)
    before = torch.get_rng_state()
    first, second = method.backbone().state_dict(), method.backbone().state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_backbone_pth_converts(tmp_path: Path) -> None:
    backbone = make("resnet50", 0.125).float().backbone()
    facts = describe(backbone, origin="a test").as_dict()
    torch.save({"state_dict": backbone.state_dict(), "facts": facts}, tmp_path / "backbone.pth")
    convert_checkpoint(tmp_path / "backbone.pth", tmp_path / "converted.pth")
    converted = torch.load(tmp_path / "converted.pth", weights_only=False)["model"]
    assert np.array_equal(converted["stem.conv1.weight"], backbone.conv1.weight.detach())
    assert np.array_equal(converted["res5.2.conv3.weight"], backbone.layer4[2].conv3.weight.detach())


@pytest.mark.parametrize("loss", ["nce", "info_nce"])
def test_the_losses_are_those_of_loops(loss: str) -> None:
    method, views = build("CMC", loss=loss), make_views("CMC", 0)
    y = colours(views.images[0])
    f = [F.normalize(net(x), dim=1) for net, x in ((method.encoder_l, y[:, :1]), (method.encoder_ab, y[:, 1:]))]
    banks = [method.bank_l.features.clone(), method.bank_ab.features.clone()]
    n, k, t = len(f[0]), 12, 0.07
    torch.manual_seed(3)
    drawn = torch.randint(32, (n, k) if loss == "nce" else (k,)).expand(n, k)
    torch.manual_seed(3)
    found = method(views)
    for part, name in enumerate(("loss_l", "loss_ab")):
        bank = banks[1 - part]  # each part against the other's bank
        scores = [[float(f[part][i].detach() @ bank[j]) / t for j in (views.index[i], *drawn[i])] for i in range(n)]
        expected = 0.0
        if loss == "info_nce":
            expected = sum(math.log(sum(map(math.exp, row))) - row[0] for row in scores) / n
        else:
            z = 32 * sum(math.exp(s) for row in scores for s in row) / (n * (k + 1))
            for row in scores:
                p, c, eps = [math.exp(s) / z for s in row], k / 32, 1e-7
                expected -= math.log(p[0] / (p[0] + c + eps)) / n
                expected -= sum(math.log(c / (q + c + eps)) for q in p[1:]) / n
        assert float(found[name].detach()) == pytest.approx(expected, rel=1e-5)
    for bank, old, features in zip((method.bank_l, method.bank_ab), banks, f, strict=True):
        moved = F.normalize(0.5 * old[views.index] + 0.5 * features.detach(), dim=1)
        torch.testing.assert_close(bank.features[views.index], moved, rtol=1e-5, atol=1e-6)


def test_z_is_estimated_once() -> None:
    method = build("CMC")
    method(make_views("CMC", 0))
    first = method.normalisers.clone()
    method(make_views("CMC", 1))
    assert (first > 0).all() and torch.equal(method.normalisers, first)


def test_six_steps_have_the_recorded_losses() -> None:
    expected = [
        13.283892742131052, 12.570493947650816, 19.198152356576863, 14.047655980158922, 13.272866218711219,
        13.072632936962385,
    ]  # fmt: skip
    assert six_losses("CMC") == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("code", ["CMC", "PyContrast"])
def test_a_published_checkpoints_encoders_continue(code: str) -> None:
    source, target = make("resnet50", 0.125), make("resnet50", 0.125)
    prefixes = {"encoder_l.": "encoder.module.l_to_ab.", "encoder_ab.": "encoder.module.ab_to_l."}
    if code == "PyContrast":
        prefixes = {
            "encoder_l.fc.": "module.head1.0.", "encoder_ab.fc.": "module.head2.0.",
            "encoder_l.": "module.encoder1.", "encoder_ab.": "module.encoder2.",
        }  # fmt: skip
    official, own = {}, {}
    for key, value in source.state_dict().items():
        prefix = next((ours for ours in prefixes if key.startswith(ours)), "")
        (official if prefix else own)[prefixes.get(prefix, "") + key.removeprefix(prefix)] = value
    assert set(own) == {"bank_l.features", "bank_ab.features", "normalisers"}
    assert all(key.startswith(CMC.memories) for key in own)
    target.load_state_dict(own | CMC.adapt_state_dict(official))
    assert all(torch.equal(value, target.state_dict()[key]) for key, value in source.state_dict().items())
    stem = next(key for key in official if key.endswith("conv1.weight") and "layer" not in key)
    with pytest.raises(ValueError, match=r"stems of 64 channels before blocks of 4;.*width 2"):
        CMC.adapt_state_dict({**official, stem: torch.zeros(64, 1, 7, 7)})


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        ({"norm": "GN", "width": 1.0}, r"set SSL\.ENCODER\.ARGS\.norm to BN or SyncBN"),
        ({"width": 1 / 64}, r"SSL\.ENCODER\.ARGS\.width is 0\.0156\d*; .* multiple of 1/32"),
        ({"name": "resnext50_32x4d"}, "ResNet without groups"),
    ],
)
def test_encoders_that_have_no_halves_are_refused(encoder: dict, message: str) -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        CMC(functools.partial(build_resnet, **{"name": "resnet18", **encoder}), images=4)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.negatives is 0(?s:.*)SSL\.ARGS\.temperature is 0"):
        build("CMC", negatives=0, temperature=0.0)
    with pytest.raises(ValueError, match="loss is 'softmax'; it must be one of nce, info_nce"):
        build("CMC", loss="softmax")

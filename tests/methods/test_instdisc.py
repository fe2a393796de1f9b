"""InstDisc and MoCo's memory bank: losses against loops and closed forms, the bank, and the published layout."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from moco_d2.engine.checkpoint import load_method
from moco_d2.layers import losses
from moco_d2.layers.losses import info_nce, nce, nce_normaliser
from tests.methods.small_methods import IMAGES, ROUNDING, build, make_views
from tests.methods.test_contract import optimizer, train

T = 0.07


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def plain_nce(f: torch.Tensor, bank: torch.Tensor, index: torch.Tensor, z: float, t: float = T) -> torch.Tensor:
    noise, eps, found = (index.shape[1] - 1) / len(bank), 1e-7, []
    for feature, rows in zip(f, index.tolist(), strict=True):
        p = [torch.exp(feature @ bank[row] / t) / z for row in rows]
        found.append(-torch.log(p[0] / (p[0] + noise + eps)))
        found += [-torch.log(noise / (other + noise + eps)) for other in p[1:]]
    return torch.stack(found).sum() / len(f)


def test_nce_is_the_equation_in_value_and_gradient_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    f, bank, index = unit(5, 8).requires_grad_(), unit(30, 8), torch.randint(30, (5, 7))
    index[0, 1] = index[0, 2]  # with replacement
    z = nce_normaliser(f, bank, index, T)
    mean = (
        sum(math.exp(feature @ bank[j] / T) for feature, row in zip(f.detach(), index, strict=True) for j in row) / 35
    )
    assert z.item() == pytest.approx(30 * mean)
    expected = plain_nce(f, bank, index, z.item())
    (slope,) = torch.autograd.grad(expected, f)
    for whole, rows in itertools.product((0, 32), (16384, 14, 1)):
        monkeypatch.setattr(losses, "WHOLE", whole)
        monkeypatch.setattr(losses, "ROWS", rows)
        monkeypatch.setattr(losses, "CPU_ROWS", rows)
        loss = nce(f, bank, index, z, T)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(3 * loss, f)[0], 3 * slope)
        torch.testing.assert_close(nce_normaliser(f, bank, index, T), z)


def test_nce_of_rows_that_are_all_alike_has_its_closed_form() -> None:
    bank, index = torch.zeros(10000, 8, dtype=torch.float64), torch.randint(10000, (4, 65))
    z = nce_normaliser(unit(4, 8), bank, index, T)
    assert z == 10000, "p is 1 / n"
    assert nce(unit(4, 8), bank, index, z, T).item() == pytest.approx(5.1677, abs=5e-5)
    assert math.log(65) + 64 * math.log(1 + 1 / 64) == pytest.approx(5.1667, abs=5e-5)


def test_the_softmax_over_all_images_counts_each_once() -> None:
    torch.manual_seed(0)
    f, bank, index = unit(5, 8).requires_grad_(), unit(30, 8), torch.randperm(30)[:5]
    expected = F.cross_entropy(f @ bank.T / T, index)
    loss = info_nce(f, bank[index], bank, T, among=True)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, f), torch.autograd.grad(expected, f))
    same = bank[:1].expand(30, 8)
    assert info_nce(f, same[:5], same, T, among=True).item() == pytest.approx(math.log(30))
    assert info_nce(f, same[:5], same, T).item() == pytest.approx(math.log(31))


@pytest.mark.parametrize(
    "args", [{"negatives": 12}, {"loss": "info_nce", "negatives": 20}, {"loss": "info_nce", "negatives": 0}]
)
def test_steps_follow_the_algorithm(args: dict) -> None:
    """Two SGD steps beside the equations, written with nothing of ours but the network and the draw."""
    ours, k = build("InstDisc", temperature=0.2, **{"proximal": 0.0, **args}), args["negatives"]
    net, bank, z = copy.deepcopy(ours.encoder), ours.bank.features.clone(), 0.0
    steps = [torch.optim.SGD(network.parameters(), lr=0.1) for network in (ours.encoder, net)]
    for step in range(2):
        views, each = make_views("InstDisc", step), args.get("loss", "nce") == "nce"
        torch.manual_seed(step)
        loss = ours(views)["loss_contrast"]
        torch.manual_seed(step)
        drawn = torch.randint(IMAGES, (8, k) if each else (k,))

        f = F.normalize(net(views.images[0]), dim=1)
        if each:
            index = torch.cat([views.index[:, None], drawn], dim=1)
            z = z or IMAGES * (torch.einsum("nc,nkc->nk", f, bank[index]) / 0.2).exp().mean().item()
            expected = plain_nce(f, bank, index, z, 0.2)
            assert ours.normaliser.item() == pytest.approx(z), "that of the first batch"
        elif k:
            logits = torch.cat([(f * bank[views.index]).sum(1, keepdim=True), f @ bank[drawn].T], dim=1)
            expected = F.cross_entropy(logits / 0.2, torch.zeros(8).long())
        else:
            expected = F.cross_entropy(f @ bank.T / 0.2, views.index)
        torch.testing.assert_close(loss, expected)
        for value, sgd in zip((loss, expected), steps, strict=True):
            sgd.zero_grad(), value.backward(), sgd.step()
        for i, feature in zip(views.index.tolist(), f.detach(), strict=True):
            bank[i] = F.normalize(0.5 * bank[i] + 0.5 * feature, dim=0)
        torch.testing.assert_close(ours.bank.features, bank)
    for key, value in net.state_dict().items():
        torch.testing.assert_close(ours.encoder.state_dict()[key], value, msg=key)


def test_the_proximal_term_holds_a_feature_near_its_row() -> None:
    method, views = build("InstDisc", proximal=3.0), make_views("InstDisc", 0)
    rows = method.bank.features[views.index]
    f = F.normalize(copy.deepcopy(method.encoder)(views.images[0]), dim=1)
    torch.testing.assert_close(method(views)["loss_proximal"], 3 * (f - rows).square().sum(1).mean())
    assert set(build("InstDisc", proximal=0.0)(views)) == {"loss_contrast"}


def test_a_checkpoint_of_the_published_code_continues_with_a_bank_of_its_own(tmp_path: Path) -> None:
    source, target = build("InstDisc", seed=1), build("InstDisc", seed=2)
    names = {"module.conv1.weight", "module.layer4.1.bn2.running_var", "module.fc.weight", "module.fc.bias"}
    state = {f"module.{key}": value for key, value in source.encoder.state_dict().items()}
    assert names <= set(state)
    torch.save({"epoch": 200, "arch": "resnet18", "state_dict": state}, tmp_path / "official.pth")
    bank = target.bank.features.clone()
    load_method(target, str(tmp_path / "official.pth"))
    assert torch.equal(target.bank.features, bank) and target.normaliser == 0
    x = make_views("InstDisc", 0).images[0]
    assert torch.equal(source.eval().encoder(x), target.eval().encoder(x))
    assert target.adapt_state_dict(target.state_dict()).keys() == target.state_dict().keys(), "ours passes unchanged"


def test_six_steps_give_the_recorded_losses() -> None:
    recorded = [6.68692744193, 8.50495947415, 13.4130038638, 15.3188967948, 16.0705433118, 22.0941466587]
    method = build("InstDisc")
    assert train(method, optimizer(method), range(6), "InstDisc") == pytest.approx(recorded, rel=ROUNDING)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"loss": "infonce"}, r"SSL\.ARGS\.loss is 'infonce'; it must be one of nce, info_nce"),
        ({"negatives": 0}, "negatives is 0; all images need SSL.ARGS.loss info_nce"),
        ({"negatives": -1, "dim": 0}, r"dim is 0(?s:.*)negatives is -1"),
        ({"momentum": 1.5}, r"momentum is 1.5; it must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature is 0.0; it must be positive"),
        ({"proximal": -1.0}, "proximal is -1.0"),
    ],
)
def test_values_out_of_range_are_refused(args: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("InstDisc", **args)


def test_runs_that_will_not_learn_much_are_warned_of() -> None:
    method = build("InstDisc", negatives=64)
    short, many = method.advice(32, 8, 4)
    assert "sees 1.0 epochs of your 32 images" in short and "negatives 64 rows are drawn from a bank of 32" in many
    assert method.advice(1000, 8, 1000) == []

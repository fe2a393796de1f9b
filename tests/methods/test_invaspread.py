"""InvaSpread: the loss against its equation, closed forms and lightly, and the published layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss

from moco_d2.engine.checkpoint import load_method
from moco_d2.io.errors import CheckpointError
from moco_d2.methods.invaspread import instance_loss
from tests.methods.small_methods import ROUNDING, build, make_views
from tests.methods.test_contract import optimizer, train

NAME = "InvaSpread"


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def plain(a: torch.Tensor, b: torch.Tensor, t: float, spread: bool = True) -> torch.Tensor:
    x, n, found = torch.cat([a, b]), len(a), []
    y = x.detach()
    for i in range(2 * n):
        partner = (i + n) % (2 * n)
        scores = {j: torch.exp(x[i] @ y[j] / t) for j in range(2 * n) if j != i}
        p = {j: score / sum(scores.values()) for j, score in scores.items()}
        found.append(-torch.log(p[partner]))
        found += [-torch.log(1 - p[j]) for j in p if j != partner and spread]
    return torch.stack(found).sum() / (2 * n)


def test_the_loss_is_the_equation_in_value_and_gradient_and_begins_with_lightlys() -> None:
    torch.manual_seed(0)
    a, b = unit(6, 8).requires_grad_(), unit(6, 8).requires_grad_()
    loss, expected = instance_loss(a, b, 0.3), plain(a, b, 0.3)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(torch.autograd.grad(loss, (a, b)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(ours, theirs)
    # lightly has the first term alone; its gradient goes through both features of a pair.
    torch.testing.assert_close(plain(a, b, 0.3, spread=False), NTXentLoss(temperature=0.3)(a, b), rtol=1e-9, atol=0)
    torch.testing.assert_close(instance_loss(b, a, 0.3), loss)
    order = torch.randperm(6)
    torch.testing.assert_close(instance_loss(a[order], b[order], 0.3), loss)


def test_closed_form_and_certainty() -> None:
    same = unit(1, 8).expand(16, 8)
    assert instance_loss(same, same, 0.1).item() == pytest.approx(4.41768, abs=5e-6)
    assert math.log(31) - 30 * math.log(1 - 1 / 31) == pytest.approx(4.41768, abs=5e-6)
    # The wrong image with certainty: the loss and its gradient are large, but finite, also in float32.
    wrong = torch.tensor([[1.0, 0], [1, 0]], requires_grad=True)
    loss = instance_loss(wrong, -wrong.detach(), 0.01)
    loss.backward()
    assert loss.isfinite() and wrong.grad.isfinite().all() and loss > 100


class Object:
    """What the published files hold beside the state dict: a module, pickled whole."""


def test_a_checkpoint_of_the_published_code_continues(tmp_path: Path) -> None:
    source, target = build(NAME, seed=1), build(NAME, seed=2)
    state = {
        f"module.{key}".replace(".downsample.", ".shortcut.").replace(".fc.", ".linear."): value
        for key, value in source.encoder.state_dict().items()
    }
    names = {"module.conv1.weight", "module.layer2.0.shortcut.0.weight", "module.layer2.0.shortcut.1.running_mean"}
    assert names | {"module.linear.weight", "module.linear.bias"} <= set(state)
    torch.save({"net": state, "lemniscate": Object(), "acc": 0.8, "epoch": 300}, tmp_path / "official.t")
    with pytest.raises(CheckpointError, match=r'refers to Python code(?s:.*)c\["net"\]'):
        load_method(target, str(tmp_path / "official.t"))
    torch.save({"net": state, "acc": 0.8, "epoch": 300}, tmp_path / "official.t")
    load_method(target, str(tmp_path / "official.t"))
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    assert torch.equal(source(make_views(NAME, 0))["loss_instance"], target(make_views(NAME, 0))["loss_instance"])
    assert target.adapt_state_dict(target.state_dict()).keys() == target.state_dict().keys(), "ours passes unchanged"


def test_six_steps_give_the_recorded_losses() -> None:
    recorded = [4.79905659616, 4.5461220697, 4.57782833464, 4.24782370039, 3.41032249815, 3.67932680372]
    method = build(NAME)
    assert train(method, optimizer(method), range(6), NAME) == pytest.approx(recorded, rel=ROUNDING)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim is 0(?s:.*)temperature is 0"):
        build(NAME, dim=0, temperature=0)

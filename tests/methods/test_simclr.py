"""SimCLR: NT-Xent against the equation, closed forms and lightly; the heads of v1 and v2."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from torch import nn

from moco_d2.methods.simclr import nt_xent, projection_head
from tests.methods.small_methods import ROUNDING, build, make_views
from tests.methods.test_contract import optimizer, train

NAME = "SimCLR"


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def plain(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    z, n, found = [*a, *b], len(a), []
    for i in range(2 * n):
        others = torch.stack([z[i] @ z[j] / t for j in range(2 * n) if j != i])
        found.append(others.logsumexp(0) - z[i] @ z[(i + n) % (2 * n)] / t)
    return torch.stack(found[:n]).mean() + torch.stack(found[n:]).mean()


def test_the_loss_is_the_equation_and_twice_lightlys_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    a, b = unit(16, 32).requires_grad_(), unit(16, 32).requires_grad_()
    loss = nt_xent(a, b, 0.3)
    slopes = torch.autograd.grad(loss, (a, b))
    # lightly's is the mean over both views, and it normalises its input.
    for other in (plain(a, b, 0.3), 2 * NTXentLoss(temperature=0.3)(a, b)):
        torch.testing.assert_close(loss, other, rtol=1e-9, atol=0)
        for ours, theirs, z in zip(slopes, torch.autograd.grad(other, (a, b)), (a, b), strict=True):
            on_sphere = [g - (g * z).sum(1, keepdim=True) * z for g in (ours, theirs)]
            torch.testing.assert_close(*on_sphere, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(nt_xent(b, a, 0.3), loss)
    order = torch.randperm(16)
    torch.testing.assert_close(nt_xent(a[order], b[order], 0.3), loss)


def test_closed_forms() -> None:
    same, axes = unit(1, 32).expand(16, 32), torch.eye(16, dtype=torch.float64)
    assert nt_xent(same, same, 0.1).item() == pytest.approx(6.86797, abs=5e-6)
    assert nt_xent(axes, axes, 0.5).item() == pytest.approx(2 * math.log(1 + 30 * math.exp(-2)), rel=1e-12)


def test_both_views_share_a_pass_and_its_batch_statistics() -> None:
    method, views = build(NAME), make_views(NAME, 0)
    features = F.normalize(copy.deepcopy(method.encoder)(torch.cat(views.images)), dim=1)
    torch.testing.assert_close(method(views)["loss_contrast"], plain(features[:8], features[8:], 0.1))
    assert method.encoder.bn1.num_batches_tracked == 1


@pytest.mark.parametrize("layers", [2, 3])
def test_the_head_is_the_published_one_and_only_the_encoder_is_transferred(layers: int) -> None:
    torch.manual_seed(0)
    head = projection_head(512, 128, layers)
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * (layers - 1) + ["Linear", "BatchNorm1d"]
    linears = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linears] == [(512, 512)] * (layers - 1) + [(128, 512)]
    assert all(layer.bias is None and abs(layer.weight.std() - 0.01) < 1e-4 for layer in linears)
    assert [norm.bias.requires_grad for norm in head if isinstance(norm, nn.BatchNorm1d)] == [True] * (layers - 1) + [
        False
    ]
    method = build(NAME, head_layers=layers)
    assert {"encoder.fc.0.weight", "encoder.fc.1.running_mean"} <= set(method.state_dict()), "what v2 fine-tunes from"
    assert not [key for key in method.backbone().state_dict() if key.startswith("fc.")]


def test_six_steps_give_the_recorded_losses() -> None:
    recorded = [16.3069952102, 13.6927261903, 16.9228000051, 17.1765358265, 12.941070298, 15.1036775937]
    method = build(NAME)
    assert train(method, optimizer(method), range(6), NAME) == pytest.approx(recorded, rel=ROUNDING)
    assert torch.equal(method.encoder.fc[-1].bias, torch.zeros(16).double()), "the last norm has no beta"


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim is 0(?s:.*)head_layers is 0(?s:.*)temperature is -1"):
        build(NAME, dim=0, head_layers=0, temperature=-1)

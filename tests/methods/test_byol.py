"""BYOL against its equations, lightly's loss, and what the paper says keeps it from collapsing."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from torch import nn

from moco_d2.methods import BYOL
from moco_d2.methods.byol import prediction_loss
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses
from tests.methods.toy_set import TinyEncoder, train_on_toy_set


def random(*shape: int) -> torch.Tensor:
    torch.manual_seed(3)
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_the_loss_is_the_distance_of_unit_vectors() -> None:
    """Equation 2, image by image, and its ends: 0, 2 and 4 for one direction."""
    p, z = random(2, 16, 32)
    distances = [((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(p, z, strict=True)]
    torch.testing.assert_close(prediction_loss(p, z), torch.stack(distances).mean())
    torch.testing.assert_close(prediction_loss(3 * p, 0.2 * z), prediction_loss(p, z))
    orthogonal = torch.eye(4, dtype=torch.float64)
    for target, value in ((p, 0.0), (-p, 4.0)):
        assert prediction_loss(p, target).item() == pytest.approx(value, abs=1e-12)
    assert prediction_loss(orthogonal, orthogonal.roll(1, 0)).item() == 2


def test_loss_and_gradient_are_lightlys_up_to_its_scale() -> None:
    """lightly has -cos; the paper's 2 - 2 cos is twice that, plus 2."""
    p, z = random(2, 16, 32).detach()
    ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
    a, b = prediction_loss(ours, z), 2 + 2 * NegativeCosineSimilarity()(theirs, z)
    a.backward(), b.backward()
    torch.testing.assert_close((a, ours.grad), (b, theirs.grad))


def test_steps_follow_the_paper() -> None:
    """Three SGD steps next to equations 1 to 3, written with nothing of ours but the networks."""
    method, length = build("BYOL"), 4
    online, predictor, target = (copy.deepcopy(net) for net in (method.online, method.predictor, method.target))
    assert not torch.equal(target.conv1.weight, online.conv1.weight), "the target has random weights of its own"
    trained = [p for p in method.parameters() if p.requires_grad]
    theirs = [*online.parameters(), *predictor.parameters()]
    sgd, reference = (torch.optim.SGD(parameters, lr=0.05, momentum=0.9) for parameters in (trained, theirs))
    for step in range(3):
        x1, x2 = make_views("BYOL", step).images
        method.before_step(step / length, 0.0)
        loss = method(make_views("BYOL", step))["loss_prediction"]
        sgd.zero_grad(), loss.backward(), sgd.step(), method.after_step()

        q1, q2 = predictor(online(x1)), predictor(online(x2))
        with torch.no_grad():
            t1, t2 = target(x1), target(x2)
        unit = functools.partial(F.normalize, dim=1)
        expected = ((unit(q1) - unit(t2)) ** 2).sum(1).mean() + ((unit(q2) - unit(t1)) ** 2).sum(1).mean()
        reference.zero_grad(), expected.backward(), reference.step()
        tau = 1 - (1 - 0.9) * (torch.cos(torch.tensor(torch.pi * step / length).double()) + 1) / 2
        with torch.no_grad():
            for xi, theta in zip(target.parameters(), online.parameters(), strict=True):
                xi.copy_(tau * xi + (1 - tau) * theta)
        torch.testing.assert_close(loss, expected)
    for mine, other in ((method.online, online), (method.predictor, predictor), (method.target, target)):
        for key, value in other.state_dict().items():
            torch.testing.assert_close(mine.state_dict()[key], value, msg=key)
    assert all(p.grad is None for p in method.target.parameters())


def test_the_target_keeps_its_weights_at_1_and_is_the_online_network_at_0() -> None:
    for momentum, which in ((1.0, "target"), (0.0, "online")):
        method = build("BYOL", momentum=momentum)
        before = [p.clone() for p in getattr(method, which).parameters()]
        method.before_step(0.0, 0.0)
        method.after_step()
        assert all(torch.equal(p, old) for p, old in zip(method.target.parameters(), before, strict=True))


def test_six_steps_are_the_recorded_ones() -> None:
    assert six_losses("BYOL") == pytest.approx(RECORDED, rel=ROUNDING)


def test_heads_have_the_authors_layers() -> None:
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in BYOL(TinyEncoder).state_dict().items() if "num" not in key}
    expected = {"0.weight": (4096, 256), "0.bias": (4096,), "3.weight": (256, 4096)}
    assert {key: shape for key, shape in shapes.items() if key.startswith("predictor.") and ".1." not in key} == {
        f"predictor.{key}": shape for key, shape in expected.items()
    }
    assert shapes["online.fc.3.weight"] == shapes["target.fc.3.weight"] == (256, 4096)
    assert "online.fc.3.bias" not in shapes and "online.fc.0.bias" in shapes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": -0.1}, r"SSL\.ARGS\.momentum is -0\.1; it must be in \[0, 1\]"),
        ({"dim": 0, "hidden_dim": 0}, r"dim is 0(?s:.*)hidden_dim is 0; it must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BYOL(TinyEncoder, **arguments)


def test_a_run_too_short_for_the_target_is_warned_of() -> None:
    method = BYOL(TinyEncoder, dim=4, hidden_dim=4, momentum=0.996)
    (said,) = method.advice(1000, 10, 200)
    assert said.startswith("after all 200 steps, 67% of the target network is still its initial weights: train longer")
    assert method.advice(1000, 10, 2000) == []


class WithoutStopGradient(BYOL):
    """The online network is its own target, and receives the target's gradient."""

    def _targets(self, x1: torch.Tensor, x2: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.online(x1), self.online(x2)


@pytest.mark.parametrize("without", ["", "predictor", "stop-gradient"])
def test_it_collapses_without_predictor_or_stop_gradient_and_the_diagnostics_show_it(without: str) -> None:
    torch.manual_seed(0)
    kind = WithoutStopGradient if without == "stop-gradient" else BYOL
    method = kind(TinyEncoder, dim=16, hidden_dim=32, momentum=0.5)
    if without == "predictor":
        method.predictor = nn.Identity()
    spread = train_on_toy_set(method, lr=1.0, steps=120)
    (diagnostic,) = (one for one in method.diagnostics() if one.key == "feature_std")
    assert diagnostic.collapsed_below is not None and diagnostic.reference is not None
    if without:
        assert spread < diagnostic.collapsed_below
    else:
        assert spread > diagnostic.reference / 2


RECORDED = [
    3.916281775113072,
    3.7065533260079295,
    2.6232875731249106,
    2.2793580814905483,
    2.2820430739382367,
    1.760283189361811,
]

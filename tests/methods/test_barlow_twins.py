"""Barlow Twins against Algorithm 1 in the authors' network, closed forms, and lightly's loss."""

import functools

import pytest
import torch
from lightly.loss import BarlowTwinsLoss
from torch import nn

from moco_d2.layers.losses import squared_correlations
from moco_d2.layers.resnet import build_resnet
from moco_d2.methods import BarlowTwins
from moco_d2.methods.barlow_twins import correlation_losses
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses
from tests.methods.toy_set import TinyEncoder

DIM, HIDDEN, WIDTH = 16, 32, 64


class Official(nn.Module):
    """The authors' network under their names, which DDP puts ``module.`` before."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_resnet("resnet18", width=0.125)
        self.backbone.fc = nn.Identity()
        first, second = (
            (nn.Linear(size, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU()) for size in (WIDTH, HIDDEN)
        )
        self.projector = nn.Sequential(*first, *second, nn.Linear(HIDDEN, DIM, bias=False))
        self.bn = nn.BatchNorm1d(DIM, affine=False)

    def loss(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        a, b = (self.bn(self.projector(self.backbone(x))) for x in (x1, x2))
        total = torch.zeros((), dtype=a.dtype)
        for i in range(DIM):
            for j in range(DIM):
                c = (a[:, i] * b[:, j]).sum() / len(a)
                total = total + ((1 - c) ** 2 if i == j else 0.0051 * c**2)
        return total


def test_an_official_checkpoint_continues_as_algorithm_1_says() -> None:
    """The names and shapes of the authors' file, then three SGD steps of their network beside ours."""
    torch.manual_seed(1)
    theirs, ours = Official().double(), build("BarlowTwins")
    ours.load_state_dict(ours.adapt_state_dict({f"module.{key}": v for key, v in theirs.state_dict().items()}))
    sgd, reference = (torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (ours, theirs))
    for step in range(3):
        views = make_views("BarlowTwins", step)
        loss, expected = sum(ours(views).values()), theirs.loss(*views.images)
        for optimizer, value in ((sgd, loss), (reference, expected)):
            optimizer.zero_grad(), value.backward(), optimizer.step()
        torch.testing.assert_close(loss, expected)
    for key, value in BarlowTwins.adapt_state_dict(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
    assert BarlowTwins.adapt_state_dict(ours.state_dict()).keys() == ours.state_dict().keys(), "ours pass unchanged"


def test_a_published_file_has_these_shapes() -> None:
    with torch.device("meta"):
        method = BarlowTwins(functools.partial(build_resnet, "resnet50"))
    published = {
        "module.backbone.layer4.2.conv3.weight": (2048, 512, 1, 1), "module.projector.0.weight": (8192, 2048),
        "module.projector.1.weight": (8192,), "module.projector.6.weight": (8192, 8192),
        "module.bn.running_mean": (8192,),
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in method.state_dict().items()}
    assert BarlowTwins.adapt_state_dict(published).items() <= shapes.items()
    assert not any(key.endswith(("fc.0.bias", "fc.6.bias")) or key == "bn.weight" for key in shapes)


def hadamard(order: int) -> torch.Tensor:
    """Return (order, order) of +1 and -1 with orthogonal columns, of which the first is constant."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.cat([torch.cat([matrix, matrix]), torch.cat([matrix, -matrix])], dim=1)
    return matrix


@pytest.mark.parametrize("images", [4, 32])
def test_its_ends_are_the_closed_forms(images: int) -> None:
    """Uncorrelated features that are equal in both views: 0. Opposite ones: 4 C, with the redundancy still 0."""
    z = hadamard(images)[:, 1:4]
    for other, same in ((z, 0.0), (-z, 12.0)):
        assert [loss.item() for loss in correlation_losses(z, other)] == pytest.approx([same, 0.0], abs=1e-12)
    order = torch.randperm(images)
    torch.testing.assert_close(correlation_losses(z[order], z.roll(1, 1)[order]), correlation_losses(z, z.roll(1, 1)))


@pytest.mark.parametrize("images", [8, 64])
def test_both_forms_of_the_squared_correlations_are_one_number(images: int) -> None:
    """More images than features, and fewer; in value and gradient."""
    torch.manual_seed(2)
    a, b = torch.randn(2, images, 24, dtype=torch.float64)
    for other in (b, None):
        x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
        value = squared_correlations(x, x if other is None else other)
        expected = (y.T @ (y if other is None else other)).square().sum()
        value.backward(), expected.backward()
        torch.testing.assert_close((value, x.grad), (expected, y.grad))


@pytest.mark.parametrize("images", [16, 64])
def test_loss_and_gradient_are_lightlys(images: int) -> None:
    """The whole loss, norm included."""
    torch.manual_seed(2)
    z1, z2 = torch.randn(2, images, 32, dtype=torch.float64)
    ours, theirs = z1.clone().requires_grad_(), z1.clone().requires_grad_()
    bn = nn.BatchNorm1d(32, affine=False).double()
    same, different = correlation_losses(bn(ours), bn(z2))
    a, b = same + 0.005 * different, BarlowTwinsLoss(lambda_param=0.005)(theirs, z2)
    a.backward(), b.backward()
    torch.testing.assert_close((a, ours.grad), (b, theirs.grad), rtol=1e-5, atol=1e-7)


def test_six_steps_are_the_recorded_ones() -> None:
    assert six_losses("BarlowTwins") == pytest.approx(RECORDED, rel=ROUNDING)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.redundancy is 0; it must be positive"):
        BarlowTwins(TinyEncoder, redundancy=0)
    with pytest.raises(ValueError, match=r"dim is 1; it must be at least 2(?s:.*)layers is 1"):
        BarlowTwins(TinyEncoder, dim=1, layers=1)


RECORDED = [
    20.974085645677622,
    10.611594355285455,
    31.81534517925496,
    10.024508035688138,
    19.834781136282047,
    14.867870242492048,
]

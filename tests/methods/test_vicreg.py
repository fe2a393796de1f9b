"""VICReg against Algorithm 1 in the authors' network, closed forms, and lightly's loss."""

import functools

import pytest
import torch
from lightly.loss import VICRegLoss
from torch import nn

from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.views import Views
from moco_d2.methods import VICReg
from moco_d2.methods.vicreg import covariances, missing_std
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses
from tests.methods.toy_set import TinyEncoder

DIM, HIDDEN, WIDTH = 16, 32, 64


class Official(nn.Module):
    """The authors' network under their names, which DDP puts ``module.`` before."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = build_resnet("resnet18", width=0.125)
        self.backbone.fc = nn.Identity()
        first, second = ((nn.Linear(size, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()) for size in (WIDTH, HIDDEN))
        self.projector = nn.Sequential(*first, *second, nn.Linear(HIDDEN, DIM, bias=False))

    def loss(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        z = [self.projector(self.backbone(x)) for x in (x1, x2)]
        invariance = sum(((a - b) ** 2).mean() for a, b in zip(*z, strict=True)) / len(x1)
        variance, covariance = 0.0, 0.0
        for one in z:
            centred = one - one.mean(0)
            for i in range(DIM):
                for j in range(DIM):
                    c = (centred[:, i] * centred[:, j]).sum() / (len(one) - 1)
                    if i == j:
                        variance = variance + torch.relu(1 - torch.sqrt(c + 1e-4)) / DIM / 2
                    else:
                        covariance = covariance + c**2 / DIM
        return 25 * invariance + 25 * variance + covariance


def test_an_official_checkpoint_continues_as_algorithm_1_says() -> None:
    """The names and shapes of the authors' file, then three SGD steps of their network beside ours."""
    torch.manual_seed(1)
    theirs, ours = Official().double(), build("VICReg")
    ours.load_state_dict(ours.adapt_state_dict({f"module.{key}": v for key, v in theirs.state_dict().items()}))
    sgd, reference = (torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9) for net in (ours, theirs))
    for step in range(3):
        views = make_views("VICReg", step)
        loss, expected = sum(ours(views).values()), theirs.loss(*views.images)
        for optimizer, value in ((sgd, loss), (reference, expected)):
            optimizer.zero_grad(), value.backward(), optimizer.step()
        torch.testing.assert_close(loss, expected)
    for key, value in VICReg.adapt_state_dict(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_a_full_size_file_has_these_shapes() -> None:
    with torch.device("meta"):
        method = VICReg(functools.partial(build_resnet, "resnet50"))
    published = {
        "module.backbone.layer4.2.conv3.weight": (2048, 512, 1, 1), "module.projector.0.weight": (8192, 2048),
        "module.projector.0.bias": (8192,), "module.projector.4.running_var": (8192,),
        "module.projector.6.weight": (8192, 8192),
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in method.state_dict().items()}
    assert VICReg.adapt_state_dict(published).items() <= shapes.items()
    assert "encoder.fc.6.bias" not in shapes


def test_its_ends_are_the_closed_forms() -> None:
    """A point has std 0.01 because of eps; orthogonal features of std 1 or more cost nothing."""
    point = torch.ones(8, 4, dtype=torch.float64, requires_grad=True)
    value = missing_std(point)
    assert 25 * value.item() == pytest.approx(24.75) and covariances(point).item() == pytest.approx(0, abs=1e-20)
    value.backward()
    assert not point.grad.any(), "a collapsed point is stationary"
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]]).double().requires_grad_()
    assert missing_std(signs).item() == 0 and covariances(signs).item() == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize("images", [16, 64])
def test_loss_and_gradient_are_lightlys(images: int) -> None:
    torch.manual_seed(2)
    z1, z2 = 0.8 * torch.randn(2, images, 32, dtype=torch.float64)
    method = build("VICReg", dim=32)
    method.encoder = nn.Identity()
    ours, theirs = z1.clone().requires_grad_(), z1.clone().requires_grad_()
    a = sum(method(Views([ours, z2], torch.arange(images), torch.zeros(2, images, 4))).values())
    b = VICRegLoss()(theirs, z2)
    a.backward(), b.backward()
    torch.testing.assert_close((a, ours.grad), (b, theirs.grad))


def test_six_steps_are_the_recorded_ones() -> None:
    assert six_losses("VICReg") == pytest.approx(RECORDED, rel=ROUNDING)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.invariance is -1; it must be 0 or more"):
        VICReg(TinyEncoder, invariance=-1)
    with pytest.raises(ValueError, match=r"dim is 1(?s:.*)variance is -1(?s:.*)covariance is -1"):
        VICReg(TinyEncoder, dim=1, variance=-1, covariance=-1)


RECORDED = [
    21.32696526210808,
    21.27848630391377,
    25.089099213963163,
    29.66681500508849,
    20.900728724938848,
    22.455931301143778,
]

"""SimSiam against Algorithm 1 in the authors' network, lightly's loss, and what keeps it from collapsing."""

import functools

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import NegativeCosineSimilarity
from torch import nn

from moco_d2.layers.losses import cosine
from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.spread import feature_std
from moco_d2.layers.views import Views
from moco_d2.methods import SimSiam
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses
from tests.methods.toy_set import TinyEncoder, train_on_toy_set

DIM, WIDTH = 16, 64  # of the small network's projections, and of its features


class Official(nn.Module):
    """The authors' network under their names, which DDP puts ``module.`` before."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_resnet("resnet18", DIM, width=0.125)
        hidden = [(nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH), nn.ReLU()) for _ in range(2)]
        self.encoder.fc = nn.Sequential(*hidden[0], *hidden[1], self.encoder.fc, nn.BatchNorm1d(DIM, affine=False))
        self.encoder.fc[6].bias.requires_grad_(False)
        self.predictor = nn.Sequential(
            nn.Linear(DIM, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, DIM)
        )  # fmt: skip

    def loss(self, x1: torch.Tensor, x2: torch.Tensor) -> torch.Tensor:
        def distance(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return -(F.normalize(p, dim=1) * F.normalize(z.detach(), dim=1)).sum(dim=1).mean()

        z1, z2 = self.encoder(x1), self.encoder(x2)
        return distance(self.predictor(z1), z2) / 2 + distance(self.predictor(z2), z1) / 2


def official() -> tuple[Official, SimSiam]:
    """Return the authors' network, and ours with its weights."""
    torch.manual_seed(1)
    theirs, ours = Official().double(), build("SimSiam", hidden_dim=WIDTH)
    ours.load_state_dict(ours.adapt_state_dict({f"module.{key}": v for key, v in theirs.state_dict().items()}))
    return theirs, ours


def test_an_official_checkpoint_continues_as_algorithm_1_says() -> None:
    """The names and shapes of the authors' file, then three SGD steps of their network beside ours."""
    theirs, ours = official()
    assert all("module" not in key for key in ours.state_dict())
    groups = ours.param_groups()
    assert [group.get("constant_lr", False) for group in groups] == [False, True]
    sgd = torch.optim.SGD([{"params": list(group["params"])} for group in groups], lr=0.05, momentum=0.9)
    reference = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    for step in range(3):
        views = make_views("SimSiam", step)
        loss, expected = ours(views)["loss_similarity"], theirs.loss(*views.images)
        for optimizer, value in ((sgd, loss), (reference, expected)):
            optimizer.zero_grad(), value.backward(), optimizer.step()
        torch.testing.assert_close(loss, expected)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_a_published_file_has_these_shapes() -> None:
    with torch.device("meta"):
        method = SimSiam(functools.partial(build_resnet, "resnet50"))
    published = {
        "module.encoder.layer4.2.conv3.weight": (2048, 512, 1, 1), "module.encoder.fc.0.weight": (2048, 2048),
        "module.encoder.fc.1.running_mean": (2048,), "module.encoder.fc.6.bias": (2048,),
        "module.encoder.fc.7.running_mean": (2048,), "module.predictor.0.weight": (512, 2048),
        "module.predictor.3.bias": (2048,),
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in method.state_dict().items()}
    assert SimSiam.adapt_state_dict(published).items() <= shapes.items()
    assert {"encoder.fc.0.bias", "encoder.fc.7.weight", "predictor.0.bias"} & set(shapes) == set()


def test_cosine_and_gradient_are_lightlys_and_orthogonal_to_the_prediction() -> None:
    torch.manual_seed(3)
    p, z = torch.randn(2, 16, 32, dtype=torch.float64)
    ours, theirs = p.clone().requires_grad_(), p.clone().requires_grad_()
    a, b = -cosine(ours, z), NegativeCosineSimilarity()(theirs, z)
    a.backward(), b.backward()
    torch.testing.assert_close((a, ours.grad), (b, theirs.grad))
    assert (ours.grad * p).sum(dim=1).abs().max() < 1e-15
    assert cosine(p, p).item() == pytest.approx(1) and cosine(p, -2 * p).item() == pytest.approx(-1)


def test_no_gradient_reaches_the_encoder_by_way_of_the_targets() -> None:
    """If the predictor passes nothing back, the encoder gets nothing."""
    method = build("SimSiam")
    for parameter in method.predictor.parameters():
        parameter.data.zero_()
    method(make_views("SimSiam", 0))["loss_similarity"].backward()
    gradients = [p.grad for p in method.encoder.parameters() if p.requires_grad]
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_six_steps_are_the_recorded_ones() -> None:
    assert six_losses("SimSiam") == pytest.approx(RECORDED, rel=ROUNDING)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.layers is 1; it must be at least 2"):
        SimSiam(TinyEncoder, layers=1)
    with pytest.raises(ValueError, match=r"dim is 0(?s:.*)hidden_dim is 0(?s:.*)predictor_dim is 0"):
        SimSiam(TinyEncoder, dim=0, hidden_dim=0, predictor_dim=0)


class WithoutStopGradient(SimSiam):
    """Both sides of the loss receive its gradient."""

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        z1, z2 = (self.encoder(x) for x in views.images)
        self.recorded = {"feature_std": feature_std(z1)}
        return {"loss_similarity": -(cosine(self.predictor(z1), z2) + cosine(self.predictor(z2), z1)) / 2}


@pytest.mark.parametrize("without", ["", "predictor", "stop-gradient"])
def test_it_collapses_without_predictor_or_stop_gradient_and_the_diagnostics_show_it(without: str) -> None:
    """The output norm is left out, as in table 3 of the paper: with it, features of this small set become a line."""
    torch.manual_seed(0)
    kind = WithoutStopGradient if without == "stop-gradient" else SimSiam
    method = kind(TinyEncoder, dim=16, hidden_dim=32, predictor_dim=8)
    method.encoder.fc[-1] = nn.Identity()
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
    0.03833836155007943,
    -0.0007927423862863128,
    -0.02427577522577322,
    -0.14210122094840477,
    0.015132549593993024,
    -0.0008303074540360264,
]

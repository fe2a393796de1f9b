"""PixPro: its loss and pairs against plain loops, the closed forms, the target network, the published names."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models import resnet50

from moco_d2.layers.ema import cosine_momentum
from moco_d2.methods import PixPro
from moco_d2.methods.pixpro import consistency, positive_pairs, propagate
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses

WHOLE = torch.tensor([[0.1, 0.2, 0.7, 0.8]], dtype=torch.float64)
MIRRORED = WHOLE[:, [2, 1, 0, 3]]
FAR = torch.tensor([[0.75, 0.2, 0.95, 0.4]], dtype=torch.float64)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, dtype=torch.float64, generator=generator), dim=-1)


def test_pairs_and_loss_are_those_of_loops_over_pixels() -> None:
    boxes = make_views("PixPro", 3, 4).boxes.double()
    (h, w), distance = (3, 4), 0.9
    y, z = unit(4, h * w, 5), unit(4, h * w, 5, seed=1)
    total, pairs = 0.0, 0
    for image in range(4):
        places, diagonals = [], []
        for x0, y0, x1, y1 in boxes[:, image].tolist():
            dx, dy = (x1 - x0) / w, (y1 - y0) / h
            places.append([(x0 + (c + 0.5) * dx, y0 + (r + 0.5) * dy) for r in range(h) for c in range(w)])
            diagonals.append(math.hypot(dx, dy))
        close = [
            y[image, i] @ z[image, j]
            for i, a in enumerate(places[0])
            for j, b in enumerate(places[1])
            if math.dist(a, b) / max(diagonals) < distance
        ]
        pairs += len(close)
        total += -2 * sum(close) / (len(close) + 1e-6) / 4
    positive = positive_pairs(boxes[0], boxes[1], (h, w), distance)
    assert positive.sum() == pairs > 20
    torch.testing.assert_close(consistency(y, z, positive), torch.as_tensor(total))


def test_propagation_is_the_sum_of_the_equation() -> None:
    x, values = unit(2, 6, 5), unit(2, 6, 5, seed=1)
    expected = torch.zeros_like(x)
    for n in range(2):
        for i in range(6):
            for j in range(6):
                expected[n, i] += max(float(x[n, i] @ x[n, j]), 0.0) ** 2 * values[n, j]
    torch.testing.assert_close(propagate(x, values, 2), expected)


def test_closed_forms_of_the_pairs() -> None:
    same = torch.eye(49, dtype=torch.bool)[None]
    assert torch.equal(positive_pairs(WHOLE, WHOLE, (7, 7), 0.7), same)
    columns_reversed = torch.arange(49).view(7, 7).flip(1).flatten()
    assert torch.equal(positive_pairs(WHOLE, MIRRORED, (7, 7), 0.7), same[:, columns_reversed])
    assert not positive_pairs(WHOLE, FAR, (7, 7), 0.7).any()
    # Above 1 / sqrt(2), the four neighbours of a pixel of an equal square box are positives too.
    assert positive_pairs(WHOLE, WHOLE, (7, 7), 0.708).sum() == 49 + 4 * 6 * 7


def test_closed_forms_of_the_loss_and_the_propagation() -> None:
    x = unit(1, 49, 64)
    same = positive_pairs(WHOLE, WHOLE, (7, 7), 0.7)
    torch.testing.assert_close(2 * consistency(x, x, same), torch.tensor(-4.0, dtype=torch.float64))
    y = x.clone().requires_grad_()
    none = consistency(y, x, positive_pairs(WHOLE, FAR, (7, 7), 0.7))
    none.backward()
    assert none == 0 and not y.grad.any(), "images whose views do not overlap do not train"
    constant = unit(1, 1, 64).expand(1, 49, 64)
    torch.testing.assert_close(F.normalize(propagate(constant, constant, 2), dim=2), constant)
    orthogonal = torch.eye(49, dtype=torch.float64)[None]
    torch.testing.assert_close(propagate(orthogonal, orthogonal, 2), orthogonal)


def test_six_steps_have_the_recorded_losses() -> None:
    expected = [
        -0.19257177234772188, -1.2350008570748678, -1.8169535523129088, -2.26656881650699, -2.4229933896248683,
        -2.2736036307019933,
    ]  # fmt: skip
    assert six_losses("PixPro") == pytest.approx(expected, rel=ROUNDING)


def test_the_target_follows_the_online_network_before_its_step_with_a_rising_momentum() -> None:
    method = build("PixPro")
    with torch.no_grad():
        for parameter in method.online.parameters():
            parameter.add_(0.1)
    method.before_step(0.5, 0.0)
    m = cosine_momentum(0.9, 0.5)
    assert m == pytest.approx(0.95)
    before, online = copy.deepcopy(method.target), copy.deepcopy(method.online)
    method(make_views("PixPro", 0))["loss_pixel"].backward()
    parameters = zip(method.target.parameters(), before.parameters(), online.parameters(), strict=True)
    for new, old, followed in parameters:
        torch.testing.assert_close(new, m * old + (1 - m) * followed)
        assert new.grad is None
    method.eval()
    state = copy.deepcopy(method.target.state_dict())
    method(make_views("PixPro", 0))
    assert all(torch.equal(value, state[key]) for key, value in method.target.state_dict().items())


def test_a_published_checkpoint_continues() -> None:
    source, target = build("PixPro"), build("PixPro", seed=1)
    source(make_views("PixPro", 0))
    official = {}
    for key, value in source.state_dict().items():
        for ours, theirs in (("online.network", "encoder"), ("target.network", "encoder_k")):
            if key.startswith(f"{ours}.fc."):
                _, layer, kind = key.removeprefix(f"{ours}.").split(".")
                name = {"0": "linear1", "1": "bn1", "3": "linear2"}[layer]
                key = f"{theirs.replace('encoder', 'projector')}.{name}.{kind}"
            key = key.replace(f"{ours}.", f"{theirs}.")
        official[f"module.{key}"] = value
    assert {
        "module.encoder.conv1.weight", "module.encoder_k.bn1.running_mean", "module.projector.bn1.num_batches_tracked",
        "module.projector.linear1.weight", "module.projector_k.linear2.bias", "module.value_transform.weight",
    } <= set(official)  # fmt: skip
    assert official["module.projector.linear1.weight"].shape == (32, 64, 1, 1)
    target.load_state_dict(PixPro.adapt_state_dict(official))
    views = make_views("PixPro", 1)
    assert torch.equal(target(views)["loss_pixel"], source(views)["loss_pixel"])
    assert PixPro.adapt_state_dict(source.state_dict()).keys() == source.state_dict().keys(), "ours passes unchanged"


def test_the_published_configuration_has_the_published_shapes() -> None:
    with torch.device("meta"):
        state = PixPro(resnet50).state_dict()
    shapes = {key: tuple(state[f"online.network.fc.{key}"].shape) for key in ("0.weight", "1.weight", "3.weight")}
    assert shapes == {"0.weight": (4096, 2048, 1, 1), "1.weight": (4096,), "3.weight": (256, 4096, 1, 1)}
    assert state["value_transform.weight"].shape == (256, 256, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.5}, r"SSL\.ARGS\.momentum is 1.5; it must be in \[0, 1\]"),
        ({"distance": 0.0}, "distance is 0.0; it must be positive"),
        ({"dim": 0, "power": -1.0}, "dim is 0(?s:.*)power is -1"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("PixPro", **arguments)

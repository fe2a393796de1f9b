"""CPC: its loss against a loop, what the context sees, the closed forms, the directions, the recorded losses."""

import functools
import math

import pytest
import torch

from moco_d2.layers.resnet import build_resnet
from moco_d2.methods import CPC
from moco_d2.methods.cpc import context_network, predictive_loss
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses


def grids(n: int = 3, d: int = 6, h: int = 5, w: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, n, d, h, w, dtype=torch.float64, generator=generator)
    return first, second


@pytest.mark.parametrize("negatives", [7, 0])
def test_the_loss_is_that_of_a_loop_over_places(negatives: int) -> None:
    (predicted, z), below = grids(), 2
    n, _, h, w = z.shape
    predicted, z = predicted.requires_grad_(), z.requires_grad_()
    torch.manual_seed(1)
    drawn = torch.randint(n * (h - below) * w, (n * (h - below) * w, max(1, negatives)))
    torch.manual_seed(1)
    loss, _ = predictive_loss(predicted, z, below, negatives)
    lower = [z[i, :, u, v] for i in range(n) for u in range(below, h) for v in range(w)]
    everyone = [z[i, :, u, v] for i in range(n) for u in range(h) for v in range(w)]
    terms = []
    for place, (i, u, v) in enumerate((i, u, v) for i in range(n) for u in range(h - below) for v in range(w)):
        query = predicted[i, :, u, v]
        positive = query @ z[i, :, u + below, v]
        others = [query @ lower[j] for j in drawn[place]] if negatives else [query @ one for one in everyone]
        scores = torch.stack([positive, *others] if negatives else others)
        terms.append(scores.logsumexp(0) - positive)
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected)
    found, wanted = (torch.autograd.grad(one, (predicted, z)) for one in (loss, expected))
    torch.testing.assert_close(found, wanted)


def test_equal_scores_have_the_loss_of_chance() -> None:
    predicted, z = grids()
    loss, _ = predictive_loss(torch.zeros_like(predicted), z, 1, 0)
    assert float(loss) == pytest.approx(math.log(3 * 5 * 4))
    loss, _ = predictive_loss(torch.zeros_like(predicted), z, 1, 16)
    assert float(loss) == pytest.approx(math.log(17))


def test_the_context_of_a_place_sees_its_row_and_those_above_only() -> None:
    torch.manual_seed(0)
    network = context_network(6, 8).double()
    z = torch.randn(1, 6, 5, 4, dtype=torch.float64, requires_grad=True)
    for u in range(5):
        (gradient,) = torch.autograd.grad(network(z)[0, :, u].sum(), z)
        assert not gradient[0, :, u + 1 :].any() and gradient[0, :, u].any()
    # Five blocks, each of which sees a row above and a column on both sides.
    (gradient,) = torch.autograd.grad(network(z)[0, :, 4, 0].sum(), z)
    assert gradient[0, :, 0].any() and gradient[0, :, :, 3].any()


def overlapping(**args: object) -> tuple[CPC, torch.Tensor]:
    """Return a method with patches that overlap by half, and images of 3 x 3 of them."""
    method = build("CPC", patch=16, stride=8, skip=1, drop_colours=False, **args)
    generator = torch.Generator().manual_seed(0)
    return method, torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=generator)


def test_each_patch_is_encoded_alone_and_lies_at_its_place() -> None:
    method, x = overlapping(directions=1)
    z = method._grid(x)
    assert z.shape == (2, 256, 3, 3)
    torch.testing.assert_close(z[1, :, 1, 2], method.encoder(x[1:, :, 8:24, 16:32])[0])
    with torch.device("meta"):
        whole = CPC(functools.partial(build_resnet, "resnet18", norm="GN"))
        assert whole._grid(torch.empty(1, 3, 256, 256)).shape == (1, 512, 7, 7), "v1's grid"


def test_a_turned_image_has_the_same_four_losses_in_another_order() -> None:
    method, x = overlapping(negatives=0)
    for ours in (*method.context[1:], *method.predict[1:]):
        source = method.context[0] if ours in list(method.context) else method.predict[0]
        ours.load_state_dict(source.state_dict())
    z = method._grid(x).detach()

    @torch.no_grad()
    def losses(grid: torch.Tensor) -> list[float]:
        turned = [torch.rot90(grid, turn, (2, 3)) for turn in range(4)]
        return [float(predictive_loss(method.predict[0](method.context[0](one)), one, 2, 0)[0]) for one in turned]

    found, other = losses(z), losses(torch.rot90(z, 1, (2, 3)))
    assert other == pytest.approx(found[1:] + found[:1]) and len(set(found)) == 4
    total = method(make_views("CPC", 0)._replace(images=[x]))["loss_patches"].detach()
    assert float(total) == pytest.approx(sum(found) / 4)


def test_dropping_colours_leaves_each_patch_one_of_them() -> None:
    method, seen = build("CPC"), []
    x = torch.ones(8, 3, 16, 16, dtype=torch.float64)
    method.encoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    method._grid(x), method.eval()._grid(x)
    kept = seen[0].amax((2, 3))  # (patches, 3)
    assert (kept.sum(dim=1) == 1).all() and (kept.sum(dim=0) > 5).all()
    assert (seen[1] == 1).all(), "only in training"


def test_six_steps_have_the_recorded_losses() -> None:
    expected = [
        6.6122705104992905, 1.8346818260096975, 1.7924362251824904, 1.8079705551033496, 1.7897670661582252,
        1.791430563410943,
    ]  # fmt: skip
    assert six_losses("CPC") == pytest.approx(expected, rel=ROUNDING)


def test_mistakes_are_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"must have no batch norm.* set SSL\.ENCODER\.ARGS\.norm to GN"):
        CPC(functools.partial(build_resnet, "resnet18", width=0.125))
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.steps is 0(?s:.*)SSL\.ARGS\.directions is 2"):
        build("CPC", steps=0, directions=2)
    with pytest.raises(ValueError, match=r"grid of 2 x 2 patches .* need 6 rows: raise DATA\.CROP_SIZE"):
        build("CPC", steps=5)(make_views("CPC", 0))

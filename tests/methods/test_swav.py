"""SwAV against its equations, lightly's loss, and the authors' checkpoint layout."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import SwaVLoss
from lightly.models.modules import SwaVProjectionHead
from torch import nn

from moco_d2.layers.encode import embed
from moco_d2.layers.losses import cross_view_entropy
from moco_d2.layers.prototypes import sinkhorn
from moco_d2.layers.resnet import build_resnet
from moco_d2.methods import SwAV, build_method, swav
from tests.methods.small_methods import ROUNDING, Tiny, build, make_views, train_tiny
from tests.methods.test_contract import optimizer, train


def random_scores(views: int, n: int = 16, k: int = 24) -> torch.Tensor:
    """Return cosines (V, N, K) of features and prototypes."""
    torch.manual_seed(0)
    z, c = (F.normalize(torch.randn(*shape, 8, dtype=torch.float64), dim=-1) for shape in ((views, n), (k,)))
    return z @ c.T


def test_the_loss_is_the_sum_over_pairs_of_different_views_and_lightlys() -> None:
    scores = random_scores(5).requires_grad_()
    codes = torch.stack([sinkhorn(one) for one in scores[:2]])
    pairs = []
    for i in range(2):
        for v in range(5):
            if v != i:
                p = (scores[v] / 0.1).exp() / (scores[v] / 0.1).exp().sum(1, keepdim=True)
                pairs.append(-(codes[i] * p.log()).sum(1).mean())
    loss = cross_view_entropy(codes, scores, 0.1)
    torch.testing.assert_close(loss, torch.stack(pairs).mean(), rtol=1e-12, atol=0)
    theirs = SwaVLoss(temperature=0.1, sinkhorn_epsilon=0.05)(list(scores[:2]), list(scores[2:]))  # shape (1,)
    torch.testing.assert_close(loss[None], theirs, rtol=1e-9, atol=0)
    for got, expected in zip(torch.autograd.grad(loss, scores), torch.autograd.grad(theirs, scores), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_closed_forms() -> None:
    equal, codes = torch.zeros(3, 4, 3000), torch.full((2, 4, 3000), 1 / 3000)
    assert cross_view_entropy(codes, equal, 0.1).item() == pytest.approx(8.00637, abs=1e-5)
    for size in (65_536, 3_001):  # DINO's, and a prime number; terms that are all equal round in one direction
        loss = cross_view_entropy(torch.full((2, 8, size), 1 / size), torch.zeros(4, 8, size), 0.1)
        assert loss.item() == pytest.approx(math.log(size), rel=2e-5)
    torch.testing.assert_close(sinkhorn(equal[0]), codes[0])
    scores = random_scores(1, n=12, k=12)[0]
    balanced = sinkhorn(scores, iterations=200)
    torch.testing.assert_close(balanced.sum(0), torch.ones(12).double(), rtol=1e-6, atol=0)
    order = torch.randperm(12)
    torch.testing.assert_close(sinkhorn(scores[order] + 7), sinkhorn(scores)[order], rtol=1e-9, atol=1e-15)
    same = random_scores(1).expand(3, -1, -1)
    hard = F.one_hot(same[:2].argmax(2), 24).double()
    assert cross_view_entropy(hard, same, 1e-4).item() < 1e-3
    with pytest.raises(ValueError, match=r"compares views of an image, and there is 1: .*DATA\.AUGMENTATION"):
        cross_view_entropy(codes, equal[:1], 0.1)


def test_a_step_follows_algorithm_1_and_the_queue_serves_once_it_is_full() -> None:
    model = build("SwAV", freeze=0.0)  # queue of 16, 8 images a step
    queues: list[list[torch.Tensor]] = [[], []]
    for step in range(4):
        views = make_views("SwAV", step)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            c = F.normalize(twin.prototypes.weight, dim=1)
            features = [twin.encoder(torch.cat(list(pair))) for pair in (views.images[:2], views.images[2:])]
            z = F.normalize(twin.projection_head(torch.cat(features)), dim=1).view(4, 8, 16)
            expected = []
            for i in range(2):
                past = torch.cat(queues[i][-2:]) @ c.T if len(queues[i]) >= 2 else torch.empty(0, 12).double()
                q = sinkhorn(torch.cat([past, z[i] @ c.T]))[-8:]
                expected += [-(q * (z[v] @ c.T / 0.1).log_softmax(1)).sum(1).mean() for v in range(4) if v != i]
                queues[i].append(z[i])
        (loss,) = model(views).values()
        torch.testing.assert_close(loss.detach(), torch.stack(expected).mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(model.prototypes.weight.detach(), c, rtol=0, atol=0)
    for queue, past in zip(model.queues, queues, strict=True):
        torch.testing.assert_close(queue.features, torch.cat(past[-2:]), rtol=1e-10, atol=1e-12)
    model.queue_start, model.epoch = 5.0, 4.5
    before = copy.deepcopy(model.queues.state_dict())
    model(make_views("SwAV", 9))
    assert all(torch.equal(value, before[key]) for key, value in model.queues.state_dict().items()), "not yet"


def test_prototypes_are_frozen_at_first() -> None:
    model = build("SwAV")
    for epoch, frozen in ((0.0, True), (0.49, True), (0.5, False)):
        model.zero_grad()
        model.before_step(0.0, epoch)
        sum(model(make_views("SwAV", 0)).values()).backward()
        model.after_backward()
        assert (model.prototypes.weight.grad is None) == frozen
        assert model.encoder.conv1.weight.grad is not None


def test_six_steps_end_where_they_did() -> None:
    model = build("SwAV")
    losses = train(model, optimizer(model), range(6), "SwAV")
    expected = [
        4.697290663246825,
        4.365077474476198,
        4.008745942659984,
        3.3118825041661784,
        3.298424757411698,
        3.165475652034166,
    ]
    assert losses == pytest.approx(expected, rel=ROUNDING)


def test_the_authors_checkpoint_continues_here_with_an_empty_queue() -> None:
    """Names and shapes of main_swav.py's ResNet, at an eighth of the width."""
    torch.manual_seed(3)
    resnet = build_resnet("resnet50", width=0.125)
    resnet.fc = nn.Identity()
    resnet.projection_head = nn.Sequential(
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(inplace=True), nn.Linear(256, 128)
    )
    resnet.prototypes = nn.Linear(128, 30, bias=False)
    official = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    assert {"module.projection_head.3.weight", "module.prototypes.weight", "module.conv1.weight"} <= set(official)
    encoder = functools.partial(build_resnet, "resnet50", width=0.125)
    model = build_method("SwAV", encoder, {"hidden": 256, "prototypes": 30, "queue_size": 8})
    own = {key: value for key, value in model.state_dict().items() if key.startswith(model.memories)}
    model.load_state_dict(own | model.adapt_state_dict(official))
    assert all(float(queue.features.abs().sum()) == 0 for queue in model.queues)
    x = torch.rand(4, 3, 32, 32)
    head = nn.Sequential(resnet, resnet.projection_head).eval()
    z = F.normalize(head(x), dim=1)
    ours = embed(model.eval().encoder, model.projection_head, [x])
    torch.testing.assert_close(model.prototypes(ours), resnet.prototypes(z))
    assert swav.from_official(model.state_dict()).keys() == model.state_dict().keys(), "ours passes unchanged"


def test_the_head_is_the_papers_and_lightlys_but_for_a_bias_in_front_of_a_norm() -> None:
    ours = SwAV(functools.partial(build_resnet, "resnet18", width=0.125), dim=16, hidden=16).projection_head
    theirs = SwaVProjectionHead(64, 16, 16).layers
    assert [type(layer) for layer in ours] == [type(layer) for layer in theirs]
    theirs.load_state_dict({key: value for key, value in ours.state_dict().items() if key != "0.bias"})
    x = torch.randn(8, 64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("prototypes", 0, "prototypes is 0; it must be at least 1"), ("iterations", 0, "at least 1"),
        ("epsilon", 0.0, "epsilon is 0.0; it must be positive"), ("temperature", -1.0, "positive"),
        ("queue_size", -1, "queue_size is -1; it must be 0 or more"), ("freeze", -1.0, "0 or more"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(argument: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"SSL\.ARGS\.{argument}.*{words.split('; ')[-1]}"):
        build("SwAV", **{argument: value})


def test_too_few_features_for_the_prototypes_and_a_queue_that_cannot_be_divided_are_told(monkeypatch) -> None:
    model = build("SwAV", prototypes=40)
    (advice,) = model.advice(1000, 8, 100)
    assert "balances 24 features" in advice and "SSL.ARGS.queue_size to 32 or more" in advice
    assert build("SwAV").advice(1000, 8, 100) == []
    monkeypatch.setattr(swav, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.queue_size is 16; it must be a multiple of .* 3"):
        model.check_batch(8)


def test_without_sinkhorn_it_collapses_and_the_diagnostics_show_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    healthy = SwAV(Tiny, dim=16, hidden=32, prototypes=16)
    collapsing = copy.deepcopy(healthy)
    low = {one.key: one.collapsed_below for one in healthy.diagnostics()}["prototypes_used"]
    train_tiny(healthy, 50)
    monkeypatch.setattr(swav, "sinkhorn", lambda scores, epsilon, iterations: (scores / epsilon).softmax(dim=1))
    train_tiny(collapsing, 50)
    assert healthy.recorded["prototypes_used"] > 12 and collapsing.recorded["prototypes_used"] < 1.1 < low
    assert healthy.recorded["feature_std"] > 5 * collapsing.recorded["feature_std"]

"""kNN against the plain loop of the MoCo authors' CIFAR-10 notebook, and the spread of features in closed form."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from moco_d2.layers import knn
from moco_d2.layers.features import extract
from moco_d2.layers.knn import accuracy, hits, knn_scores, nearest
from moco_d2.layers.spread import alignment, effective_rank, uniformity


def plain_knn(
    queries: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor, classes: int, k: int, temperature: float
) -> torch.Tensor:
    """Rank all classes for each query, the most likely first, one query after the other."""
    ranked = []
    for query in F.normalize(queries, dim=1):
        weight, place = (F.normalize(bank, dim=1) @ query).topk(k)
        one_hot = torch.zeros(k, classes).scatter(1, labels[place][:, None], 1.0)
        ranked.append((one_hot * (weight / temperature).exp()[:, None]).sum(dim=0).argsort(descending=True))
    return torch.stack(ranked)


@pytest.mark.parametrize(("temperature", "ks"), [(0.1, (200,)), (0.07, (1, 20, 200))])
def test_predictions_are_the_notebooks(
    temperature: float, ks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    centres = torch.randn(10, 16)
    labels, wanted = torch.randint(10, (500,)), torch.randint(10, (100,))
    bank, queries = centres[labels] + torch.randn(500, 16), 3 * (centres[wanted] + torch.randn(100, 16))
    whole = knn_scores(queries, bank, labels, 10, ks, temperature)
    monkeypatch.setattr(knn, "_QUERIES", 7)
    monkeypatch.setattr(knn, "_FEATURES", 11)  # fewer than k
    for k, scores, blocks in zip(ks, whole, knn_scores(queries, bank, labels, 10, ks, temperature), strict=True):
        ranked = plain_knn(queries, bank, labels, 10, k, temperature)
        assert torch.equal(scores.argmax(dim=1), ranked[:, 0])
        assert hits(scores, wanted) == int((ranked[:, 0] == wanted).sum())
        torch.testing.assert_close(blocks, scores, rtol=1e-5, atol=0)  # the rounding of a similarity, over T
        if k == max(ks):  # with few neighbours most classes tie at 0
            assert hits(scores, wanted, 5) == int((ranked[:, :5] == wanted[:, None]).any(dim=1).sum())
    half = knn_scores(queries.half(), bank.half(), labels, 10, ks, temperature)
    for scores, rounded in zip(whole, half, strict=True):
        assert rounded.dtype == torch.float32
        assert (scores.argmax(dim=1) == rounded.argmax(dim=1)).float().mean() > 0.97


def test_closed_forms_of_the_vote() -> None:
    bank, labels = torch.eye(4), torch.tensor([0, 1, 1, 2])
    similar, places = nearest(bank, bank, 1)
    assert torch.equal(places[:, 0], torch.arange(4)) and torch.equal(similar, torch.ones(4, 1))  # itself first
    (plain,) = knn_scores(bank[:1], bank, labels, 3, [4], 1e9)
    torch.testing.assert_close(plain, torch.tensor([[1.0, 2.0, 1.0]]))  # T -> inf: a plain vote
    (alone,) = knn_scores(bank[:1], bank, labels, 3, [1], 0.5)
    torch.testing.assert_close(alone, torch.tensor([[math.exp(2), 0.0, 0.0]]))
    (more,) = knn_scores(bank[:1], bank, labels, 3, [200], 1e9)
    assert torch.equal(more, plain), "a smaller bank votes as a whole"
    assert accuracy(plain, torch.tensor([1])) == 100 and accuracy(plain, torch.tensor([0]), 9) == 100


@pytest.mark.parametrize(("change", "words"), [
    ({"ks": [0]}, "must be positive"), ({"ks": []}, "must be positive"), ({"temperature": 0.0}, "must be positive"),
    ({"labels": torch.tensor([0, 3])}, "with 3 classes they end at 2"),
    ({"labels": torch.tensor([0])}, "2 features and 1 labels"),
])  # fmt: skip
def test_what_cannot_be_classified(change: dict[str, object], words: str) -> None:
    given = {"labels": torch.tensor([0, 1]), "classes": 3, "ks": [1], "temperature": 0.1} | change
    with pytest.raises(ValueError, match=words):
        knn_scores(torch.eye(2), torch.eye(2), **given)  # type: ignore[arg-type]


def test_no_pictures_have_no_accuracy() -> None:
    with pytest.raises(ValueError, match="validation set is empty"):
        accuracy(torch.empty(0, 3), torch.empty(0, dtype=torch.int64))


def test_spread_in_closed_form() -> None:
    assert effective_rank(torch.eye(16)) == pytest.approx(16, rel=1e-4)
    assert effective_rank(torch.randn(50, 1) * torch.ones(1, 16)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(7 * torch.eye(16)) == pytest.approx(effective_rank(torch.eye(16)))
    x = torch.randn(20, 8)
    assert alignment(x, 5 * x) == pytest.approx(0, abs=1e-12) and alignment(x, -x) == pytest.approx(4)
    assert alignment(torch.eye(2), torch.eye(2).flip(0)) == pytest.approx(2)  # orthogonal
    assert uniformity(torch.tensor([[1.0, 0.0], [-3.0, 0.0]])) == pytest.approx(-8)  # antipodal: |d|^2 = 4, t = 2
    assert uniformity(torch.ones(5, 3)) == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6)) == pytest.approx(-4)  # orthogonal: |d|^2 = 2


def test_features_are_those_of_evaluation_mode_and_the_network_is_as_before() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.AdaptiveAvgPool2d(1))
    network[1].eval()  # frozen, inside a network that trains
    modes, images = [m.training for m in network.modules()], torch.randn(5, 3, 6, 6)
    counts: list[int] = []
    batches = [(images[:3], torch.tensor([1, 2, 0])), (images[3:], torch.tensor([1, 1]))]
    features, labels = extract(network, batches, 9, counts.append, torch.float16)
    assert [m.training for m in network.modules()] == modes and network[1].num_batches_tracked == 0
    expected = network.eval()(images).flatten(1)
    torch.testing.assert_close(features, expected.half())
    assert labels.tolist() == [1, 2, 0, 1, 1] and counts == [3, 5] and not features.requires_grad
    with pytest.raises(ValueError, match="no readable pictures"):
        extract(network, [], 9)

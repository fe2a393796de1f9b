"""Losses against the equation and closed forms; queue, EMA and group BN against plain models of themselves."""

import collections
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.measure import peak_bytes
from moco_d2.layers.batch_norm import GroupBatchNorm2d, use_group_batch_norm
from moco_d2.layers.ema import ema_update_
from moco_d2.layers.heads import mlp_head, without_head
from moco_d2.layers.losses import BLOCK, contrast_rank, info_nce
from moco_d2.layers.queue import FeatureQueue
from moco_d2.layers.resnet import ARCHITECTURES, build_resnet, describe, network_for


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.mark.parametrize("temperature", [0.07, 0.2, 1.0])
def test_info_nce_is_equation_1(temperature: float) -> None:
    torch.manual_seed(0)
    q, k, negatives = unit(5, 16), unit(5, 16), unit(11, 16)
    losses = []
    for i in range(5):
        positive = math.exp(sum(a * b for a, b in zip(q[i].tolist(), k[i].tolist(), strict=True)) / temperature)
        others = [
            math.exp(sum(a * b for a, b in zip(q[i].tolist(), n.tolist(), strict=True)) / temperature)
            for n in negatives
        ]
        losses.append(-math.log(positive / (positive + sum(others))))
    loss = info_nce(q, k, negatives, temperature)
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-12)


def test_info_nce_closed_forms() -> None:
    one = F.normalize(torch.ones(4, 8, dtype=torch.float64), dim=1)
    same = info_nce(one, one, one[:1].expand(100, 8), 0.07)
    assert same.item() == pytest.approx(math.log(101), rel=1e-12), "equal similarities: log(1 + K)"
    axes = torch.eye(8, dtype=torch.float64)
    orthogonal = info_nce(axes[:1], axes[:1], axes[1:], 0.2)
    assert orthogonal.item() == pytest.approx(math.log(1 + 7 * math.exp(-5)), rel=1e-12)


def textbook(q: torch.Tensor, k: torch.Tensor, negatives: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long))


@pytest.mark.parametrize("count", [1, 6, BLOCK, 2 * BLOCK + 3])
def test_info_nce_and_its_gradient_are_the_textbooks_at_any_number_of_negatives(count: int) -> None:
    torch.manual_seed(0)
    q, k, negatives = unit(3, 8).requires_grad_(), unit(3, 8), unit(count, 8)
    losses = [function(q, k, negatives, 0.01) for function in (info_nce, textbook)]  # logits of +-100
    gradients = [torch.autograd.grad(3 * loss, q)[0] for loss in losses]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)
    single = info_nce(q.float(), k.float(), negatives.float(), 0.07)
    torch.testing.assert_close(single.double(), textbook(q, k, negatives, 0.07), rtol=1e-6, atol=1e-6)


def test_the_gradient_of_info_nce_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    q, k, negatives = unit(3, 5).requires_grad_(), unit(3, 5), unit(7, 5)
    assert torch.autograd.gradcheck(lambda q: info_nce(q, k, negatives, 0.2), q, rtol=1e-6, atol=1e-8)


def test_info_nce_is_computed_in_float32_under_autocast_and_lets_the_queue_change() -> None:
    torch.manual_seed(0)
    q, k, negatives = (unit(n, 16).float() for n in (4, 4, 50))
    q.requires_grad_()
    expected = info_nce(q, k, negatives, 0.07)
    (wanted,) = torch.autograd.grad(expected, q)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(q, k, negatives, 0.07)
    negatives.zero_()  # as the next keys would overwrite it before the backward pass
    assert torch.equal(loss, expected) and torch.equal(torch.autograd.grad(loss, q)[0], wanted)


def test_info_nce_holds_a_fraction_of_the_logits_where_the_textbook_holds_several_copies() -> None:
    """The peak of what is alive in forward and backward, in copies of the N x (1 + K) logits."""
    torch.manual_seed(0)
    q, k, negatives = (unit(n, 4).float() for n in (16, 16, 16 * BLOCK))
    q.requires_grad_()
    peaks = {
        loss.__name__: peak_bytes(lambda loss=loss: loss(q, k, negatives, 0.2).backward()) / (4 * 16 * (1 + 16 * BLOCK))
        for loss in (info_nce, textbook)
    }
    assert peaks["textbook"] > 2.5, "the measure sees what it should"
    assert peaks["info_nce"] < 0.25


def test_contrast_rank_counts_negatives_and_holds_ties_against_the_positive() -> None:
    torch.manual_seed(0)
    q, k, negatives = unit(6, 3), unit(6, 3), unit(2 * BLOCK + 5, 3)
    k[0] = q[0]  # nothing is nearer
    expected = [sum((q[i] @ negatives.T >= q[i] @ k[i]).tolist()) for i in range(6)]
    assert contrast_rank(q, k, negatives).tolist() == expected and expected[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_collapsed_encoder_ranks_last_however_its_similarities_are_rounded(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        collapsed = unit(1, 128).float()
        queue = FeatureQueue(9, 128, dtype)
        queue.enqueue(collapsed.expand(9, 128))
        assert contrast_rank(collapsed.expand(2, 128), collapsed.expand(2, 128), queue.features).tolist() == [9, 9]


def test_queue_is_a_ring_at_any_batch_size(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    queue = FeatureQueue(7, 4)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(7))
    ring, pointer = collections.deque(queue.features.clone(), maxlen=7), 0
    with caplog.at_level(logging.WARNING):
        for n in (3, 3, 3, 7, 1, 10, 20, 5):
            keys = unit(n, 4).float()
            queue.enqueue(keys)
            ring.extend(keys)
            pointer = (pointer + min(n, 7)) % 7
            assert queue.pointer.item() == pointer
            oldest_first = queue.features.roll(-pointer, 0)
            assert torch.equal(oldest_first, torch.stack(list(ring)))
    assert len(caplog.records) == 1 and "a step has 10 keys, but the queue holds 7" in caplog.text


def test_a_queue_holds_keys_in_the_type_it_was_given_and_the_loss_takes_them() -> None:
    torch.manual_seed(0)
    queue, keys = FeatureQueue(20, 16, torch.bfloat16), unit(20, 16).float()
    queue.enqueue(keys)
    assert queue.features.dtype == torch.bfloat16 and torch.equal(queue.features, keys.bfloat16())
    q, k = unit(4, 16).float(), unit(4, 16).float()
    assert torch.equal(info_nce(q, k, queue.features, 0.07), info_nce(q, k, queue.features.float(), 0.07))


def test_ema_follows_its_closed_form_and_leaves_batch_statistics_alone() -> None:
    torch.manual_seed(0)
    online = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double()
    with torch.no_grad():
        target[1].running_mean.fill_(5)
    start = [p.clone() for p in target.parameters()]
    for _ in range(10):
        ema_update_(target, online, 0.9)
    for p, p0, q in zip(target.parameters(), start, online.parameters(), strict=True):
        torch.testing.assert_close(p, 0.9**10 * p0 + (1 - 0.9**10) * q)
    assert target[1].running_mean.eq(5).all() and online[1].running_mean.eq(0).all()


def test_group_batch_norm_normalises_each_group_by_itself() -> None:
    torch.manual_seed(0)
    x = torch.randn(12, 5, 3, 2, dtype=torch.float64) * torch.arange(1, 13).view(-1, 1, 1, 1)
    plain, grouped = nn.BatchNorm2d(5).double(), GroupBatchNorm2d(5, groups=3).double()
    with torch.no_grad():
        plain.weight.uniform_()
        grouped.load_state_dict(plain.state_dict())
    y = grouped(x)
    means = []
    for part, got in zip(x.chunk(3), y.chunk(3), strict=True):
        expected = F.batch_norm(part, None, None, plain.weight, plain.bias, training=True)
        torch.testing.assert_close(got, expected)
        means.append(0.1 * part.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(grouped.running_mean, torch.stack(means).mean(0))
    assert grouped.num_batches_tracked.item() == 1
    grouped.eval(), plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(x), plain.eval()(x)), "evaluation is plain BN"
    for wrong in (10, 2):  # chunks of 3, 3, 3 and 1 would be groups of other sizes than was asked for
        with pytest.raises(ValueError, match=f"a batch of {wrong} cannot be split into 3 BN groups"):
            grouped.train()(x[:wrong])


def test_group_batch_norm_without_momentum_keeps_the_mean_of_all_batches() -> None:
    torch.manual_seed(0)
    plain, grouped = nn.BatchNorm2d(2, momentum=None), GroupBatchNorm2d(2, groups=2, momentum=None)
    for _ in range(3):
        x = torch.randn(8, 2, 4, 4)
        plain(x), grouped(x)
    torch.testing.assert_close(grouped.running_mean, plain.running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_group_batch_norm_is_right_in_every_type_at_a_large_mean(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(12, 3, 6, 6) * 20 + 3000).to(dtype)
    grouped = GroupBatchNorm2d(3, groups=3)
    y = grouped(x)
    expected = torch.cat([F.batch_norm(part.double(), None, None, training=True) for part in x.chunk(3)])
    assert y.dtype == dtype and (y.double() - expected).abs().max() < {torch.float32: 1e-4}.get(dtype, 2e-2)
    variances = torch.stack([part.double().var((0, 2, 3)) for part in x.chunk(3)]).mean(0)
    torch.testing.assert_close(grouped.running_var.double(), 0.9 + 0.1 * variances, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("width", [0.5, 1, 2])
def test_resnets_have_torchvisions_names_and_their_facts_rebuild_them(name: str, width: float) -> None:
    import torchvision

    with torch.device("meta"):
        network = build_resnet(name, num_classes=10, width=width)
        rebuilt = network_for(describe(network))
        reference = getattr(torchvision.models, name)(num_classes=10)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    assert list(shapes) == list(reference.state_dict())
    if width == 1:
        assert shapes == {k: v.shape for k, v in reference.state_dict().items()}
    assert {k: v.shape for k, v in rebuilt.state_dict().items()} == {
        k: s for k, s in shapes.items() if not k.startswith("fc.")
    }


def test_unit_width_computes_what_torchvision_does() -> None:
    import torchvision

    torch.manual_seed(0)
    network, reference = build_resnet("resnet18", 10), torchvision.models.resnet18(num_classes=10)
    reference.load_state_dict(network.state_dict())
    x = torch.rand(2, 3, 40, 40)
    assert torch.equal(network.eval()(x), reference.eval()(x))


def test_the_cifar_stem_begins_as_the_authors_demo_and_the_rest_as_torchvision() -> None:
    """The demo replaces conv1 after torchvision's initialisation: uniform in +-1/sqrt(fan in), PyTorch's default."""
    torch.manual_seed(0)
    network = build_resnet("resnet18", width=4, stem="cifar")
    bound = 1 / math.sqrt(3 * 3 * 3)
    drawn = (network.conv1.weight.detach().double().flatten() / bound + 1) / 2  # uniform in [0, 1]
    assert len(drawn) == 256 * 27 and drawn.min() >= 0 and drawn.max() <= 1
    steps = torch.arange(1, len(drawn) + 1, dtype=torch.float64) / len(drawn)
    distance = (drawn.sort().values - steps).abs().max().item()  # Kolmogorov's: above 1.95 / sqrt(n) once in 1000
    assert distance < 1.95 / math.sqrt(len(drawn))
    other = network.layer1[0].conv1.weight
    assert other.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.01), "kaiming normal by fan out"
    assert other.abs().max() > 3 * other.std(), "no uniform distribution reaches so far"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5"}, "did you mean 'resnet50'"),
        ({"width": 0.3}, "for resnet50 it must be a positive multiple of 1/64"),
        ({"width": 0.25, "norm": "GN"}, "must be a multiple of 0.5"),
        ({"norm": "SynchBN"}, "did you mean 'SyncBN'"),
        ({"stem": "deep"}, "stem is 'deep'; it must be one of imagenet, cifar"),
    ],
)
def test_impossible_encoders_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_resnet(**arguments)


def test_heads() -> None:
    network = build_resnet("resnet18", 10, width=0.25)
    network.fc = mlp_head(network.fc)
    assert [key for key in network.state_dict() if key.startswith("fc")] == [
        "fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias",
    ]  # fmt: skip
    use_group_batch_norm(network, 2).eval()
    trunk = without_head(network)
    assert trunk(torch.rand(2, 3, 32, 32)).shape == (2, 128)
    assert network(torch.rand(2, 3, 32, 32)).shape == (2, 10), "the original keeps its head"
    assert trunk.conv1.weight is network.conv1.weight

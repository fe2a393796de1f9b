"""Losses against the equation and closed forms; queue, EMA and group BN against plain models of themselves."""

import collections
import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.batch_norm import GroupBatchNorm2d, deinterleave, interleave, use_group_batch_norm
from moco_d2.layers.ema import ema_update_
from moco_d2.layers.heads import mlp_head, without_head
from moco_d2.layers.losses import contrast_accuracy, info_nce, info_nce_logits
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
    loss = info_nce(info_nce_logits(q, k, negatives, temperature))
    assert loss.item() == pytest.approx(sum(losses) / 5, rel=1e-12)


def test_info_nce_closed_forms() -> None:
    one = F.normalize(torch.ones(4, 8, dtype=torch.float64), dim=1)
    same = info_nce(info_nce_logits(one, one, one[:1].expand(100, 8), 0.07))
    assert same.item() == pytest.approx(math.log(101), rel=1e-12), "equal logits: log(1 + K)"
    axes = torch.eye(8, dtype=torch.float64)
    orthogonal = info_nce(info_nce_logits(axes[:1], axes[:1], axes[1:], 0.2))
    assert orthogonal.item() == pytest.approx(math.log(1 + 7 * math.exp(-5)), rel=1e-12)


def test_info_nce_gradient_flows_to_the_query_only_through_the_softmax() -> None:
    torch.manual_seed(0)
    q, k, negatives = unit(3, 8).requires_grad_(), unit(3, 8), unit(6, 8)
    info_nce(info_nce_logits(q, k, negatives, 0.2)).backward()
    probabilities = torch.cat([(q * k).sum(1, keepdim=True), q @ negatives.T], 1).div(0.2).softmax(1).detach()
    expected = ((probabilities[:, :1] - 1) * k + probabilities[:, 1:] @ negatives) / 0.2 / 3
    torch.testing.assert_close(q.grad, expected)


def test_contrast_accuracy_counts_ranks_and_holds_ties_against_the_positive() -> None:
    logits = torch.tensor([[3.0, 1, 2], [2, 3, 1], [1, 2, 3], [5, 5, 5]])
    assert contrast_accuracy(logits, 1).item() == pytest.approx(1 / 4)
    assert contrast_accuracy(logits, 2).item() == pytest.approx(2 / 4)


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
    assert len(caplog.records) == 1 and "10 keys but the queue holds 7" in caplog.text


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
    y = deinterleave(grouped(interleave(x, 3)), 3)
    means = []
    for part, got in zip(x.chunk(3), y.chunk(3), strict=True):
        expected = F.batch_norm(part, None, None, plain.weight, plain.bias, training=True)
        torch.testing.assert_close(got, expected)
        means.append(0.1 * part.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(grouped.running_mean, torch.stack(means).mean(0))
    assert grouped.num_batches_tracked.item() == 1
    grouped.eval(), plain.load_state_dict(grouped.state_dict())
    assert torch.equal(grouped(x), plain.eval()(x)), "evaluation is plain BN"


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet5"}, "did you mean 'resnet50'"),
        ({"width": 0.3}, "64 \\* width must be"),
        ({"stem": "deep"}, "'imagenet' or 'cifar'"),
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

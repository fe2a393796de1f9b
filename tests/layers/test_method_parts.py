"""Parts for methods: closed forms, written-out references, and two gloo processes that equal one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.batch_norm import SyncBatchNorm2d
from moco_d2.layers.distributed import gather, sum_over_processes, wrap_ddp
from moco_d2.layers.ema import cosine_momentum
from moco_d2.layers.encode import by_resolution, feature_map
from moco_d2.layers.heads import mlp
from moco_d2.layers.kmeans import spherical_kmeans
from moco_d2.layers.memory_bank import MemoryBank
from moco_d2.layers.prototypes import Prototypes, sinkhorn
from moco_d2.layers.resnet import build_resnet


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_momentum_rises_from_its_start_to_one_along_a_cosine() -> None:
    assert cosine_momentum(0.996, 0) == pytest.approx(0.996, abs=1e-15)
    assert cosine_momentum(0.996, 0.5) == pytest.approx(0.998, abs=1e-15)
    assert cosine_momentum(0.996, 1) == 1


def test_a_bank_row_moves_as_the_paper_says_and_the_last_of_equal_images_counts() -> None:
    torch.manual_seed(0)
    bank = MemoryBank(10, 8).double()
    start, features = bank.features.clone(), unit(3, 8)
    assert start.abs().max() <= (8 / 3) ** -0.5
    bank.update(features, torch.tensor([4, 7, 4]))
    expected = start.clone()
    expected[7] = F.normalize(0.5 * start[7] + 0.5 * features[1], dim=0)
    expected[4] = F.normalize(0.5 * start[4] + 0.5 * features[2], dim=0)
    torch.testing.assert_close(bank.features, expected, rtol=1e-14, atol=1e-14)
    for _ in range(60):
        bank.update(features[:1], torch.tensor([2]))
    torch.testing.assert_close(bank.rows(torch.tensor([2])), features[:1], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="momentum 2"):
        MemoryBank(10, 8, 2)


def test_codes_of_equal_scores_are_uniform_and_scaling_makes_them_balanced() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(sinkhorn(torch.full((6, 4), 0.3).double()), torch.full((6, 4), 0.25).double())
    scores = torch.randn(12, 5, dtype=torch.float64) * 0.1
    codes = sinkhorn(scores, iterations=3)
    torch.testing.assert_close(codes.sum(1), torch.ones(12).double(), rtol=1e-12, atol=0)
    settled = sinkhorn(scores, iterations=500)
    torch.testing.assert_close(settled.sum(0), torch.full((5,), 12 / 5).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(sinkhorn(scores + 7), codes)
    order = torch.randperm(12)
    torch.testing.assert_close(sinkhorn(scores[order]), codes[order])
    assert sinkhorn(torch.tensor([[60.0, -60.0], [60.0, -60.0]])).isfinite().all()


def test_three_scalings_are_those_of_the_published_pseudo_code() -> None:
    torch.manual_seed(0)
    scores, eps = torch.randn(7, 4, dtype=torch.float64) * 0.2, 0.05
    q = torch.exp(scores / eps).T
    q /= q.sum()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True) / 4
        q = q / q.sum(0, keepdim=True) / 7
    torch.testing.assert_close(sinkhorn(scores), (q * 7).T, rtol=1e-12, atol=1e-15)


def test_prototypes_are_unit_directions_and_scores_are_cosines() -> None:
    torch.manual_seed(0)
    prototypes = Prototypes(8, 5)
    torch.testing.assert_close(prototypes.weight.norm(dim=1), torch.ones(5))
    with torch.no_grad():
        prototypes.weight.mul_(3)
    prototypes.normalise_()
    features = F.normalize(torch.randn(4, 8), dim=1)
    torch.testing.assert_close(prototypes(features), F.cosine_similarity(features[:, None], prototypes.weight, dim=2))


def test_k_means_finds_separated_directions_and_keeps_empty_clusters() -> None:
    torch.manual_seed(0)
    axes = torch.eye(4, dtype=torch.float64)
    features = F.normalize(axes.repeat_interleave(20, 0) + 0.01 * torch.randn(80, 4, dtype=torch.float64), dim=1)
    centroids, labels = spherical_kmeans(features, features[[3, 25, 48, 71]], 1)  # one of each group
    assert (centroids @ axes).amax(0).min() > 0.999
    assert all(len(set(group)) == 1 for group in labels.view(4, 20).tolist()) and len(set(labels.tolist())) == 4
    same = axes[:1].repeat(6, 1)
    centroids, labels = spherical_kmeans(same, same[:3])
    assert torch.equal(centroids, same[:3]) and torch.equal(labels, torch.zeros(6).long())


def test_views_of_one_size_share_a_pass_and_their_batch_statistics() -> None:
    torch.manual_seed(0)
    sizes: list[torch.Size] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        sizes.append(x.shape)
        return x.mean(dim=(2, 3))

    views = [torch.rand(2, 3, size, size) for size in (8, 8, 4, 4, 4)]
    encoded = by_resolution(network, views)
    assert [tuple(size) for size in sizes] == [(4, 3, 8, 8), (6, 3, 4, 4)]
    assert torch.equal(encoded, torch.cat([view.mean(dim=(2, 3)) for view in views]))


def test_the_feature_map_is_what_a_resnet_pools() -> None:
    network = build_resnet("resnet18", num_classes=5, width=0.125).eval()
    x = torch.rand(2, 3, 64, 64)
    features = feature_map(network, x)
    assert features.shape == (2, 64, 2, 2)
    torch.testing.assert_close(network.fc(features.mean(dim=(2, 3))), network(x))


def test_a_head_has_the_layers_that_it_is_asked_for() -> None:
    simsiam = mlp((8, 6, 6, 4), bias=False, last_bias=False, last_norm="plain")
    kinds = [type(layer).__name__ for layer in simsiam]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d"]
    assert sum(p.numel() for p in simsiam.parameters()) == 8 * 6 + 12 + 6 * 6 + 12 + 6 * 4
    simclr = mlp((8, 6, 4), bias=False, last_bias=False, last_norm="gamma")
    assert [p.requires_grad for p in simclr[-1].parameters()] == [True, False]
    dino = mlp((8, 6, 4), norm=False, activation=nn.GELU)
    assert [type(layer).__name__ for layer in dino] == ["Linear", "GELU", "Linear"]
    with pytest.raises(ValueError, match="last_norm is 'beta'"):
        mlp((8, 4), last_norm="beta")


def nt_xent(a: torch.Tensor, b: torch.Tensor, temperature: float = 0.5) -> torch.Tensor:
    """SimCLR's loss of this process's anchors against everyone's features."""
    mine, everyone = torch.cat([a, b]), torch.cat([gather(a), gather(b)])
    n, total, rank = len(a), len(everyone) // 2, dist.get_rank() if dist.is_initialized() else 0
    logits = mine @ everyone.T / temperature
    row = torch.arange(n) + rank * n
    own, partner = torch.cat([row, row + total]), torch.cat([row + total, row])
    return F.cross_entropy(logits.scatter(1, own[:, None], -torch.inf), partner)


def correlation_loss(x: torch.Tensor, n: int) -> torch.Tensor:
    """A loss that every process computes alike from a matrix summed over processes."""
    return (sum_over_processes(x.T @ x) / n - torch.eye(x.shape[1]).to(x)).square().sum()


def shared_work(process: int, processes: int) -> dict[str, Any]:
    """Return everything that must not depend on how the batch of 8 is split."""
    torch.manual_seed(0)
    net, x = wrap_ddp(nn.Linear(6, 5).double()), torch.randn(8, 2, 6, dtype=torch.float64)
    scores, features = torch.randn(8, 4, dtype=torch.float64) * 0.1, unit(8, 5)
    bank, index = MemoryBank(9, 5).double(), torch.tensor([0, 3, 3, 5, 6, 7, 8, 0])
    mine = slice(process * 8 // processes, (process + 1) * 8 // processes)
    results: dict[str, Any] = {}
    for name, loss in (("nt_xent", nt_xent), ("correlation", lambda a, b: correlation_loss(torch.cat([a, b]), 16))):
        net.zero_grad()
        a, b = net(x[mine]).unbind(1)
        value = loss(F.normalize(a, dim=1), F.normalize(b, dim=1))
        value.backward()
        mean = value.detach().clone()
        if processes > 1:
            dist.all_reduce(mean)
            mean /= processes
        results[name] = [mean, *(p.grad.clone() for p in net.parameters())]
    bank.update(features[mine], index[mine])
    results["bank"] = [bank.features]
    results["codes"] = [(mine, sinkhorn(scores[mine]))]
    results["synchronised encoder"] = synchronised_step(mine)
    return results


def synchronised_step(mine: slice) -> list[torch.Tensor]:
    """Return gradients and running statistics of a ResNet with SyncBN, after a step on a part of 8 images."""
    torch.manual_seed(2)
    encoder = wrap_ddp(build_resnet("resnet18", num_classes=5, width=0.125, norm="SyncBN").double())
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    encoder(x[mine]).square().sum(1).mean().backward()
    statistics = [value for name, value in encoder.state_dict().items() if "running" in name]
    return [*(p.grad for p in encoder.parameters()), *statistics]


def uneven_norm(norm: nn.Module, part: slice) -> list[torch.Tensor]:
    """Return what a norm and its backward pass make of a part of 7 images: per image, per channel, statistics."""
    generator = torch.Generator().manual_seed(3)
    x, grad = (torch.randn(7, 3, 5, 4, dtype=torch.float64, generator=generator) * 2 + 9 for _ in range(2))
    x = x[part].requires_grad_()
    for _ in range(2):
        y = norm(x)
    y.backward(grad[part])
    return [y.detach(), x.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def run_rank(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=2)
    results = shared_work(process, 2)
    torch.manual_seed(1)
    features = unit(30, 4)
    part = features[:20] if process == 0 else features[20:]  # uneven parts
    results["kmeans"] = spherical_kmeans(part, features[[4, 11, 25]], 5)
    norms = (SyncBatchNorm2d(3).double(), SyncBatchNorm2d(3, momentum=None).double())
    results["uneven"] = [uneven_norm(norm, slice(0, 2) if process == 0 else slice(2, 7)) for norm in norms]
    torch.save(results, f"{folder}/{process}.pth")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth", weights_only=False) for rank in (0, 1))
    alone = shared_work(0, 1)
    for i, norm in enumerate((nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3, momentum=None).double())):
        expected = uneven_norm(norm, slice(7))
        one, other = first["uneven"][i], second["uneven"][i]
        joined = [torch.cat([one[0], other[0]]), torch.cat([one[1], other[1]]), one[2] + other[2], one[3] + other[3]]
        for got, wanted in zip([*joined, *one[4:], *other[4:]], [*expected, *expected[4:]], strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)
    for name in ("nt_xent", "correlation", "bank", "synchronised encoder"):
        for results in (first, second):
            for got, expected in zip(results[name], alone[name], strict=True):
                tolerance = 1e-9 if name == "synchronised encoder" else 1e-12  # 18 layers of sums in another order
                torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance / 100, msg=name)
    for results in (first, second):
        ((rows, codes),) = results["codes"]
        torch.testing.assert_close(codes, alone["codes"][0][1][rows], rtol=1e-12, atol=1e-15)
    torch.manual_seed(1)
    features = unit(30, 4)
    centroids = features[[4, 11, 25]]
    for _ in range(5):  # the algorithm, written out
        labels = (features @ centroids.T).argmax(1)
        groups = [features[labels == c] for c in range(3)]
        centroids = torch.stack(
            [F.normalize(g.sum(0), dim=0) if len(g) else c for g, c in zip(groups, centroids, strict=True)]
        )
    labels = (features @ centroids.T).argmax(1)
    for results, part in ((first, slice(20)), (second, slice(20, None))):
        torch.testing.assert_close(results["kmeans"][0], centroids, rtol=1e-12, atol=1e-14)
        assert torch.equal(results["kmeans"][1], labels[part])

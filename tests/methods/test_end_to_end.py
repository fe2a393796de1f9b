"""End-to-end contrast: value and both gradients against the equation, shuffling in one process and in two."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from moco_d2.layers.distributed import wrap_ddp
from moco_d2.layers.losses import in_batch_nce
from moco_d2.layers.resnet import build_resnet
from moco_d2.methods import EndToEnd
from tests.methods.small_methods import ROUNDING, build, make_views, part
from tests.methods.test_contract import optimizer, train

NAME = "EndToEnd"


def test_the_gradient_is_that_of_the_queries_plus_that_of_the_keys() -> None:
    method, views = build(NAME, temperature=0.2), make_views(NAME, 0)
    parameters = list(method.encoder.parameters())

    def encode(x: torch.Tensor) -> torch.Tensor:
        return F.normalize(method.encoder(x), dim=1)

    def equation(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.stack([(q[i] @ k.T / 0.2).logsumexp(0) - q[i] @ k[i] / 0.2 for i in range(len(q))]).mean()

    q, k = (encode(x) for x in views.images)
    to_q = torch.autograd.grad(equation(q, k.detach()), parameters, retain_graph=True)
    to_k = torch.autograd.grad(equation(q.detach(), k), parameters)
    loss = method(views)["loss_contrast"]
    torch.testing.assert_close(loss, equation(q, k))
    for ours, first, second in zip(torch.autograd.grad(loss, parameters), to_q, to_k, strict=True):
        torch.testing.assert_close(ours, first + second)
    assert any(gradient.norm() > 1e-3 for gradient in to_k)


def test_equal_features_give_the_log_of_the_batch() -> None:
    same = F.normalize(torch.ones(16, 8, dtype=torch.float64), dim=1)
    assert in_batch_nce(same, same, 0.07).item() == pytest.approx(math.log(16), rel=1e-12)


def run_rank(process: int, processes: int, folder: str) -> None:
    """Take a step with two BN groups in all and shuffled keys, and write what came out."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes)
    torch.manual_seed(process)
    method = EndToEnd(functools.partial(build_resnet, "resnet18", width=0.125), dim=16, bn_groups=2 // processes)
    network = wrap_ddp(method.double())
    torch.manual_seed(5)
    loss = network(part(make_views(NAME, 0), process, processes))["loss_contrast"]
    loss.backward()
    mean = loss.detach() / processes
    if processes > 1:
        dist.all_reduce(mean)
    if process == 0:
        torch.save([mean, *(p.grad for p in method.parameters())], f"{folder}/{processes}.pth")
    if processes > 1:
        dist.barrier()  # gloo aborts a process whose peer goes before it
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_equal_one_with_two_groups_and_shuffled_keys(tmp_path: Path) -> None:
    run_rank(0, 1, str(tmp_path))
    torch.multiprocessing.start_processes(run_rank, (2, str(tmp_path)), nprocs=2, start_method="fork")
    one, two = (torch.load(tmp_path / f"{processes}.pth") for processes in (1, 2))
    for alone, shared in zip(one, two, strict=True):
        torch.testing.assert_close(shared, alone, rtol=1e-7, atol=1e-9)


def test_shuffling_changes_the_keys_companions_and_nothing_else() -> None:
    def loss(bn_groups: int, shuffle: bool) -> float:
        torch.manual_seed(0)
        encoder = functools.partial(build_resnet, "resnet18", width=0.125)
        method = EndToEnd(encoder, dim=16, bn_groups=bn_groups, shuffle=shuffle).double()
        torch.manual_seed(1)
        return method(make_views(NAME, 0))["loss_contrast"].item()

    # With one group the statistics do not depend on the order, so any difference would be a key out of place.
    assert loss(1, shuffle=True) == pytest.approx(loss(1, shuffle=False), rel=1e-9)
    assert loss(2, shuffle=True) != pytest.approx(loss(2, shuffle=False), rel=1e-4)


def test_six_steps_give_the_recorded_losses() -> None:
    recorded = [5.42507599256, 2.44184306644, 2.26941078265, 2.32243832124, 2.11908767486, 2.21656708145]
    method = build(NAME)
    assert train(method, optimizer(method), range(6), NAME) == pytest.approx(recorded, rel=ROUNDING)


def test_values_out_of_range_are_refused_and_groups_are_mocos() -> None:
    with pytest.raises(ValueError, match=r"dim is 0(?s:.*)temperature is 0(?s:.*)bn_groups is -1"):
        build(NAME, dim=0, temperature=0, bn_groups=-1)
    with torch.device("meta"):
        method = EndToEnd(functools.partial(build_resnet, "resnet18", width=0.125))
    assert method.settings() == {"number of BN groups in all processes": 8} and method.departures() == []
    with pytest.raises(ValueError, match="12 images per process cannot be split into 8 BN groups"):
        method.check_batch(12)
    assert "each of the 8 BN groups has a single image" in method.advice(1000, 8, 1000)[0]

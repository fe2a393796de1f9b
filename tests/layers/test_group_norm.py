"""Grouped batch norm against a loop over groups, in both of its forms, and what a step of it costs."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.traffic import Traffic
from moco_d2.layers.batch_norm import GroupBatchNorm2d, _NormaliseGroups, use_group_batch_norm
from moco_d2.layers.resnet import build_resnet

GROUPS = 4
forms = pytest.mark.parametrize("reduction", [False, True], ids=["group by group", "one reduction"])


def form(reduction: bool) -> Any:
    """Choose the form that a compiler gets, or the other."""
    return mock.patch("torch.compiler.is_compiling", return_value=reduction)


def looped(norm: GroupBatchNorm2d, x: torch.Tensor) -> torch.Tensor:
    """Normalise group by group with torch's function, and update the running statistics with the groups' mean."""
    rows = [(norm.running_mean.clone(), norm.running_var.clone()) for _ in range(norm.groups)]
    y = [
        F.batch_norm(part, *row, norm.weight, norm.bias, True, norm.momentum, norm.eps)
        for part, row in zip(x.chunk(norm.groups), rows, strict=True)
    ]
    with torch.no_grad():
        for running, groups in zip((norm.running_mean, norm.running_var), zip(*rows, strict=True), strict=True):
            running.copy_(torch.stack(groups).mean(0))
    return torch.cat(y)


def all_of(work: Callable[..., torch.Tensor], x: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return the output, the three gradients and the running statistics of two steps."""
    torch.manual_seed(1)
    norm = GroupBatchNorm2d(x.shape[1], GROUPS).to(dtype)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    x = x.clone().requires_grad_()
    work(norm, x)
    y = work(norm, x)
    gradients = torch.autograd.grad(y, (x, norm.weight, norm.bias), torch.randn(y.shape).to(y.dtype))
    return [y.detach(), *gradients, norm.running_mean, norm.running_var]


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.to(memory_format=torch.channels_last)


def transposed(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).contiguous().transpose(2, 3)


@forms
@pytest.mark.parametrize("order", [torch.Tensor.contiguous, channels_last, transposed])
@pytest.mark.parametrize("shape", [(12, 5, 4, 3), (16, 3, 1, 1), (8, 1, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_it_computes_what_a_loop_over_groups_does(
    reduction: bool, order: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    x, wide = order((torch.randn(shape) * 3 + 2).to(dtype)), torch.promote_types(dtype, torch.float32)
    expected = all_of(looped, x, wide)
    with form(reduction):
        got = all_of(lambda norm, x: norm(x), x, wide)
    apart = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=apart, atol=apart * float(b.abs().max()))
    if order is not transposed:
        assert got[0].stride() == expected[0].stride() or 1 in shape
        assert reduction or all(map(torch.equal, got[:2], expected[:2])), "the same kernels"


@forms
def test_its_gradient_is_that_of_finite_differences(reduction: bool) -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((6, 2, 3, 2), (2,), (2,)))
    with form(reduction):
        assert torch.autograd.gradcheck(lambda *args: _NormaliseGroups.apply(*args, 3, 1e-5)[0], (x, weight, bias))


def test_a_second_derivative_and_groups_without_variance_are_refused() -> None:
    norm, x = GroupBatchNorm2d(3, groups=2), torch.randn(4, 3, 2, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    for empty in (torch.randn(2, 3, 1, 1), torch.randn(0, 3, 4, 4)):
        with pytest.raises(ValueError, match=r"2 BN groups .* at most one value per channel"):
            norm(empty)


class Block(nn.Module):
    """A convolution with a norm and a shortcut."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        use_group_batch_norm(self, groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + F.relu(self.norm(self.conv(x)), inplace=True)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning")  # torch.compile does so
def test_a_compiler_gets_one_graph_whose_size_does_not_depend_on_the_groups() -> None:
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    operations: list[int] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        operations.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    counts = []
    for groups in (2, 8):
        torch.manual_seed(0)
        torch._dynamo.reset()
        network, x = Block(groups).double(), torch.randn(16, 3, 4, 4, dtype=torch.float64)
        expected = network(x)
        expected_gradients = torch.autograd.grad(expected.square().sum(), [*network.parameters()])
        compiled = torch.compile(network, backend=aot_autograd(fw_compiler=count), fullgraph=True)
        got = compiled(x)
        gradients = torch.autograd.grad(got.square().sum(), [*network.parameters()])
        torch.testing.assert_close([got, *gradients], [expected, *expected_gradients], rtol=1e-10, atol=1e-10)
        counts.append(tuple(operations))
        operations.clear()
    assert len(counts[0]) == 2 and counts[0] == counts[1], "forward and backward pass"


def test_groups_move_little_more_memory_and_make_no_more_operations_than_their_kernels_need() -> None:
    """A loop with a concatenation makes 50 more operations a layer than one group, and moves a fifth more memory."""
    counted = []
    for groups in (1, 8):
        network = use_group_batch_norm(build_resnet("resnet18", 4, width=0.125), groups)
        norms = sum(isinstance(module, nn.BatchNorm2d) for module in network.modules())
        x = torch.randn(16, 3, 64, 64)
        with Traffic() as traffic:
            with torch.no_grad():
                network(x)
            network(x).sum().backward()
        counted.append((traffic.operations / norms, traffic.bytes))
    (one, plainly), (eight, grouped) = counted
    assert eight - one < 40
    assert grouped < 1.1 * plainly

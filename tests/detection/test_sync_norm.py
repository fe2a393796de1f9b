"""naiveSyncBN in two processes against BatchNorm in one, on the joined batch and in every floating type."""

import itertools
from pathlib import Path

import torch
import torch.distributed as dist
from detectron2.layers import NaiveSyncBatchNorm, get_norm
from torch import nn

from moco_d2.detection.sync_norm import StableSyncBatchNorm, stabilise_sync_norms
from moco_d2.detection.trainer import TransferTrainer
from tests.detection.small_detector import VOC_C4, small_cfg

CHANNELS = 3
# Largest error of output and gradient in each type: some of its own steps, in float32 of those at a mean of 3000.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}
# Norm, number of images in each process, mean, memory order. With a mean of 100 and more, E[x^2] - E[x]^2 has no digit
# left in bfloat16, and from 3000 on few in float32.
CASES = list(
    itertools.product(
        TOLERANCE,
        [("naiveSyncBN", (4, 4)), ("naiveSyncBN_N", (2, 6)), ("naiveSyncBN_N", (0, 5)), ("naiveSyncBN", (5, 0))],
        [0.0, 100.0, 3000.0],
        [torch.contiguous_format, torch.channels_last],
    )
)


def batch(case: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All processes' input, whose channels have variances about 1, 4 and 9, and the gradient of its output."""
    dtype, (_, counts), mean, order = CASES[case]
    generator = torch.Generator().manual_seed(case)
    spread = torch.arange(1, CHANNELS + 1).view(1, -1, 1, 1)
    # bfloat16 has steps of 16 at 3000: there the variance is larger, so that it is one at all.
    spread = spread * (20 if mean and dtype in (torch.bfloat16, torch.float16) else 1)
    x, grad = (torch.randn(sum(counts), CHANNELS, 5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    x = (x * spread + mean).to(dtype).contiguous(memory_format=order)
    return x, grad.to(dtype).contiguous(memory_format=order)


def normalise(norm: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.detach().requires_grad_()
    y = norm(x)
    assert y.dtype == x.dtype and y.stride() == x.stride()
    y.backward(grad)
    gradients = {"gradient": x.grad, "weight's": norm.weight.grad, "bias's": norm.bias.grad}
    return {"output": y.detach(), "mean": norm.running_mean, "variance": norm.running_var, **gradients}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = []
    for case, (dtype, (name, counts), _, _) in enumerate(CASES):
        norm = get_norm(name, CHANNELS)
        stabilise_sync_norms(norm)
        norm.double() if dtype == torch.float64 else norm.float()  # under autocast parameters are float32
        x, grad = (whole.split(counts)[rank] for whole in batch(case))
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            found.append(normalise(norm, x, grad))
    torch.save(found, f"{folder}/{rank}.pth")
    dist.barrier()  # gloo aborts a process whose peer goes before it
    dist.destroy_process_group()


def test_two_processes_equal_batch_norm_of_the_joined_batch_in_every_type(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(run_rank, (str(tmp_path),), nprocs=2, start_method="fork")
    first, second = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    for case, (dtype, norm, mean, order) in enumerate(CASES):
        said = f"{dtype}, {norm}, mean {mean}, {order}"
        x, grad = batch(case)
        wide = torch.promote_types(dtype, torch.float32)
        expected = normalise(nn.BatchNorm2d(CHANNELS).to(torch.float64), x.double(), grad.double())
        values = x.numel() // CHANNELS
        # Detectron2's running variance is without Bessel's correction.
        expected["variance"] = 0.9 + (expected["variance"] - 0.9) * (values - 1) / values
        for key in ("mean", "variance"):
            assert torch.equal(first[case][key], second[case][key]) and first[case][key].dtype == wide, said
            torch.testing.assert_close(first[case][key].double(), expected[key], rtol=1e-5, atol=1e-5, msg=said)
        for key in ("output", "gradient"):
            joined = torch.cat([first[case][key], second[case][key]]).double()
            scale = max(1.0, expected[key].abs().max().item())
            error = (joined - expected[key]).abs().max().item() / scale
            assert error < TOLERANCE[dtype], f"{key} of {said}: {error:g}"
        for key in ("weight's", "bias's"):
            summed = (first[case][key] + second[case][key]).double()
            scale = max(1.0, expected[key].abs().max().item())
            assert (summed - expected[key]).abs().max().item() / scale < TOLERANCE[dtype], f"{key} of {said}"


def test_detectors_are_built_with_it_and_keep_their_names() -> None:
    model = TransferTrainer.build_model(small_cfg(VOC_C4 + "_random"))
    norms = [module for module in model.modules() if isinstance(module, NaiveSyncBatchNorm)]
    assert len(norms) == 54 and {type(norm) for norm in norms} == {StableSyncBatchNorm}
    alone, plain = norms[0].train(), nn.BatchNorm2d(norms[0].num_features)
    x = torch.randn(2, alone.num_features, 4, 4)
    assert torch.equal(alone(x), plain(x)), "in one process it is BatchNorm"

"""Operations of a MoCo step, the memory that they move, and a compiler's kernels: ``python -m benchmarks kernels``."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
import torch._inductor.config
import torch._inductor.metrics
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch._subclasses import FakeTensorMode

from benchmarks.step import Ours, made_up_views, wait
from benchmarks.traffic import Traffic
from moco_d2.engine.step import chosen_autocast
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.methods import MoCo

GROUPS = (1, 8)


def with_groups(cfg: CfgNode, groups: int) -> CfgNode:
    """Return the config with another number of BN groups."""
    cfg = cfg.clone()
    cfg.SSL.ARGS.bn_groups = groups
    return cfg


def traffic_of_a_step(cfg: CfgNode) -> Traffic:
    """Count an uncompiled step on tensors without values, which take neither arithmetic nor memory."""
    cfg = cfg.clone()
    cfg.ENGINE.COMPILE = None
    ours = Ours(cfg, made_up_views(cfg))
    with FakeTensorMode(allow_non_fake_inputs=True), EventStorage():
        ours.step._data_loader_iter_obj = itertools.repeat(made_up_views(cfg))
        ours.run()  # which makes the optimizer's state
        traffic = Traffic()
        with traffic:
            ours.run()
    return traffic


def step_rows(cfg: CfgNode) -> list[dict[str, Any]]:
    """Count a step for each number of BN groups."""
    counted = [(groups, traffic_of_a_step(with_groups(cfg, groups))) for groups in GROUPS]
    return [{"BN groups": groups, "operations": t.operations, "GB": t.bytes / 1e9} for groups, t in counted]


def roofline(cfg: CfgNode, rate: float) -> str:
    """Say how near a step is to what moving its memory takes at the speed of a copy.

    Args:
        cfg: of the step.
        rate: images/s that were measured.
    """
    moved = traffic_of_a_step(cfg).bytes
    speed = copy_speed(cfg.MODEL.DEVICE)
    share = moved * rate / cfg.SOLVER.IMS_PER_BATCH / speed
    return (
        f"{moved / 1e9:.3g} GB a step, operation by operation; a copy moves {speed / 1e9:.3g} GB/s; the step runs at "
        f"{share:.0%} of the memory's speed (a compiler fuses operations, and may exceed 100 %)"
    )


def copy_speed(device: str, size: int = 2**28) -> float:
    """Return the bytes a second that a copy of ``size`` bytes reads and writes, the best of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(10):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / min(seconds)


def compiled_rows(cfg: CfgNode) -> list[dict[str, Any]]:
    """Compile the forward and backward pass of the query encoder for each number of BN groups; count the kernels."""
    rows = []
    for groups in GROUPS:
        method = PretrainTrainer.build_model(with_groups(cfg, groups))
        assert isinstance(method, MoCo)
        images = made_up_views(cfg).images[0]
        autocast = chosen_autocast(cfg)
        torch._dynamo.reset()
        torch._inductor.metrics.reset()
        start = time.perf_counter()
        with torch._inductor.config.patch(force_disable_caches=True):
            method.encoder_q.compile()
            with torch.autocast(images.device.type, getattr(torch, autocast or "bfloat16"), enabled=bool(autocast)):
                features = method.encoder_q(images)
            features.float().sum().backward()
        kernels = torch._inductor.metrics.generated_kernel_count
        rows.append({"BN groups": groups, "kernels": kernels, "seconds to compile": time.perf_counter() - start})
    return rows

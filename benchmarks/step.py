"""Cost of a MoCo step, ours and others', beyond that of its encoders: ``python -m benchmarks step``."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from torch.nn.parallel import DistributedDataParallel

from benchmarks.measure import alternate, compare, cpu_seconds, peak_bytes
from benchmarks.rivals import Authors, Lightly, textbook
from moco_d2.engine.optim import build_optimizer
from moco_d2.engine.step import PretrainStep, chosen_autocast
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.layers.ema import ema_update_
from moco_d2.layers.losses import info_nce
from moco_d2.layers.views import Views
from moco_d2.methods import MoCo, SSLMethod

WARM_UP = 2  # steps that are not timed: buffers, algorithms, compilation


class Ours:
    """The step of ``moco-d2 pretrain``, on views that exist already."""

    name = "ours"

    def __init__(self, cfg: CfgNode, views: Views) -> None:
        method = PretrainTrainer.build_model(cfg)
        assert isinstance(method, MoCo)
        self.method, self.views = method, views
        self.method.recording = False  # as in 19 of 20 steps
        optimizer = build_optimizer(cfg, method)
        self.step: SimpleTrainer = PretrainStep(
            self.wrapped(), itertools.repeat(views), optimizer, chosen_autocast(cfg), period=20, max_iter=0
        )
        self.step.iter = 0

    def wrapped(self) -> torch.nn.Module:
        """Return the module that maps views to losses, in DDP if there are several processes."""
        return wrap_ddp(self.method)

    def run(self) -> None:
        """Take a step."""
        self.step.run_step()
        self.step.iter += 1


class Networks(torch.nn.Module):
    """A method's two encoders with their norm layers; the sum of the queries stands for the loss."""

    recording = False

    def __init__(self, method: MoCo) -> None:
        super().__init__()
        self.encoder_q, self.key_encoder = method.encoder_q, [method.encoder_k]

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Encode both views."""
        with torch.no_grad():
            self.key_encoder[0](views.images[1])
        return {"sum": self.encoder_q(views.images[0]).float().sum()}

    after_backward = SSLMethod.after_backward


class Encoders(Ours):
    """The encoders alone: forward and backward of the query encoder, forward of the key encoder, no optimizer."""

    name = "its encoders alone"

    def __init__(self, cfg: CfgNode, views: Views) -> None:
        super().__init__(cfg, views)
        self.step.optimizer.step = lambda *_, **__: None

    def wrapped(self) -> torch.nn.Module:
        """Return the encoders."""
        return Networks(self.method)


class PlainDDP(Ours):
    """The query encoder in plain DDP with its optimizer, and the forward pass of the key encoder."""

    name = "encoders, plain DDP"

    def wrapped(self) -> torch.nn.Module:
        """Return the encoders in DDP, which averages the gradients of the query encoder."""
        return DistributedDataParallel(Networks(self.method), broadcast_buffers=False)


def take_turns(works: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Time each work in turns: on the CPU in CPU seconds, which other programs hardly change."""
    return alternate(works, repeats, WARM_UP, cpu_seconds if device == "cpu" else _gpu_seconds)


def _gpu_seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def made_up_views(cfg: CfgNode, world_size: int = 1) -> Views:
    """Return two views (N, 3, H, W) of noise on the device."""
    torch.manual_seed(0)
    batch, size = cfg.SOLVER.IMS_PER_BATCH // world_size, cfg.DATA.CROP_SIZE
    images = [torch.randn(batch, 3, size, size).to(cfg.MODEL.DEVICE) for _ in range(2)]
    return Views(images, torch.arange(batch), torch.zeros(2, batch, 4))


class OneGroup(Ours):
    """Our step with one BN group, which is what lightly's has."""

    name = "ours, one BN group"

    def __init__(self, cfg: CfgNode, views: Views) -> None:
        one = cfg.clone()
        one.SSL.ARGS.bn_groups = 1
        super().__init__(one, views)


def step_rows(cfg: CfgNode, repeats: int) -> list[dict[str, Any]]:
    """Time our step against its encoders alone, the authors' form of it and lightly's, in one process."""
    views = made_up_views(cfg)
    steps = [kind(cfg, views) for kind in (Encoders, Ours, Authors, OneGroup, Lightly)]
    with EventStorage():
        times = take_turns({step.name: step.run for step in steps}, repeats, cfg.MODEL.DEVICE)
        rates = {step.name: rate(step.run, repeats, cfg) for step in steps}
    return [{**row, "images/s in a row": rates[row["what"]]} for row in compare(times)]


def rate(run: Callable[[], object], steps: int, cfg: CfgNode, warm_up: int = 0) -> float:
    """Return images/s of steps that follow one another as in training: a GPU is waited for after the last one only.

    Args:
        run: takes a step.
        steps: that are timed.
        cfg: its batch and device.
        warm_up: steps before these.
    """
    for _ in range(warm_up):
        run()
    wait(cfg.MODEL.DEVICE)
    start = time.perf_counter()
    for _ in range(steps):
        run()
    wait(cfg.MODEL.DEVICE)
    return float(steps * cfg.SOLVER.IMS_PER_BATCH / (time.perf_counter() - start))


def wait(device: str) -> None:
    """Wait for a GPU's work."""
    if device != "cpu":
        torch.cuda.synchronize()


def part_rows(cfg: CfgNode, repeats: int) -> list[dict[str, Any]]:
    """Time each part of a step other than its encoders, alone."""
    ours = Ours(cfg, made_up_views(cfg))
    method, optimizer = ours.method, ours.step.optimizer
    for parameter in method.encoder_q.parameters():
        parameter.grad = torch.zeros_like(parameter)
    queue = method.queue
    q, k = (F.normalize(torch.randn(len(ours.views.images[0]), queue.features.shape[1]), dim=1) for _ in range(2))
    q, k = q.to(cfg.MODEL.DEVICE).requires_grad_(), k.to(cfg.MODEL.DEVICE)
    parts: dict[str, Callable[[], object]] = {
        "loss and its gradient": lambda: info_nce(q, k, queue.features, method.temperature).backward(),
        "average of the weights": lambda: ema_update_(method.encoder_k, method.encoder_q, method.momentum),
        "optimizer": optimizer.step,
        "queue": lambda: queue.enqueue(k),
        "diagnostics (1 step in 20)": lambda: method._record(q, k),
    }
    times = take_turns(parts, repeats, cfg.MODEL.DEVICE)
    return compare(times)


def memory_rows(cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the peak memory of loss and gradient, in copies of the N x (1 + K) logits in float32."""
    batch, device = cfg.SOLVER.IMS_PER_BATCH, cfg.MODEL.DEVICE
    size, dim, temperature = cfg.SSL.ARGS.queue_size, cfg.SSL.ARGS.dim, cfg.SSL.ARGS.temperature
    q, k, keys = (F.normalize(torch.randn(n, dim), dim=1).to(device) for n in (batch, batch, size))
    q.requires_grad_()
    transposed = keys.T.contiguous()

    def ours() -> None:
        info_nce(q, k, keys, temperature).backward()

    def authors() -> None:
        textbook(q, k, transposed, temperature)[0].backward()

    made = []
    for name, work in (("the textbook's loss", authors), ("ours", ours)):
        q.grad = None
        held = peak_bytes(work) if device == "cpu" else _peak_on_gpu(work)
        made.append({"what": name, "bytes": held, "copies": held / (4 * batch * (1 + size))})
    return made


def _peak_on_gpu(work: Callable[[], object]) -> int:
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    return torch.cuda.max_memory_allocated() - before


def ddp_rows(cfg: CfgNode, repeats: int) -> list[dict[str, Any]]:
    """Time our step against plain DDP of its encoder in two CPU processes on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_ddp_process, (cfg, repeats, folder), nprocs=2)
        results: list[dict[str, list[float]]] = [torch.load(Path(folder) / f"{rank}.pth") for rank in range(2)]
    together = {name: [a + b for a, b in zip(*(r[name] for r in results), strict=True)] for name in results[0]}
    return compare(together)


def _ddp_process(rank: int, cfg: CfgNode, repeats: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    views = made_up_views(cfg, world_size=2)
    with EventStorage():
        steps = [kind(cfg, views) for kind in (PlainDDP, Ours)]
        times = take_turns({step.name: step.run for step in steps}, repeats, cfg.MODEL.DEVICE)
    torch.save(times, Path(folder) / f"{rank}.pth")
    dist.barrier()  # gloo aborts a process whose peer goes before it
    dist.destroy_process_group()

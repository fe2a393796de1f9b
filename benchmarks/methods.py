"""Cost of a step of each method, beyond that of its networks and beside MoCo v2's: ``python -m benchmarks methods``."""

from __future__ import annotations

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from benchmarks.measure import peak_bytes
from benchmarks.step import _peak_on_gpu, take_turns
from moco_d2.config import list_configs, load_cfg
from moco_d2.data import build_augmentation
from moco_d2.engine.build import configured_method
from moco_d2.engine.optim import build_optimizer
from moco_d2.engine.step import PretrainStep, apply_performance_options, chosen_autocast
from moco_d2.layers.views import Views
from moco_d2.methods import METHODS, SSLMethod, default_args

REFERENCE, LABEL = "Pretrain/moco_v2_R50_200ep", "MoCo v2"
IMAGES = 65_536  # of the data set, for memory banks

Call = tuple[nn.Module, tuple[Any, ...], bool]


def recipes(names: Sequence[str]) -> dict[str, str]:
    """Return ``{method: its shortest ResNet-50 recipe}``, of methods without one the shortest of any encoder.

    Of equal ones it is not MoCo's Figure 3, which has recipes of several methods.
    """
    found: dict[str, list[tuple[bool, int, bool, str]]] = {name: [] for name in names}
    for config in list_configs():
        if config.startswith("Pretrain/") and (cfg := load_cfg(config)).SSL.METHOD in found:
            other = cfg.SSL.ENCODER.NAME != "resnet50"
            found[cfg.SSL.METHOD].append((other, cfg.SOLVER.EPOCHS, "fig3" in config, config))
    chosen = {name: min(configs)[-1] for name, configs in found.items() if configs}
    return chosen | ({"MoCo": REFERENCE} if "MoCo" in chosen else {})


def made_up_views(cfg: CfgNode) -> Views:
    """Return noise in the sizes of the recipe's views (N, 3, H_v, W_v), with crops of three quarters of the image."""
    torch.manual_seed(0)
    batch = cfg.SOLVER.IMS_PER_BATCH
    sizes = [view.crop.size for view in build_augmentation(cfg.DATA.AUGMENTATION, cfg.DATA.CROP_SIZE).views]
    images = [torch.randn(batch, 3, size, size).to(cfg.MODEL.DEVICE) for size in sizes]
    corner = torch.rand(len(sizes), batch, 2) / 4
    return Views(images, torch.arange(batch), torch.cat([corner, corner + 0.75], dim=2))


class Step:
    """A step of ``moco-d2 pretrain`` half-way through the recipe, on views that exist already."""

    def __init__(self, cfg: CfgNode) -> None:
        self.views, self.epoch = made_up_views(cfg), cfg.SOLVER.EPOCHS / 2
        torch.manual_seed(0)
        # To cluster, the method needs the features of as many images as there are clusters: here, of one batch.
        images = cfg.SOLVER.IMS_PER_BATCH if "clusters" in cfg.SSL.ARGS else IMAGES
        self.method = apply_performance_options(configured_method(cfg, images).to(cfg.MODEL.DEVICE), cfg)
        self.method.recording = False  # as in 19 of 20 steps
        self.method.before_epoch(0, lambda: iter([self.views]))
        optimizer = build_optimizer(cfg, self.method)
        batches = itertools.repeat(self.views)
        self.step = PretrainStep(self.method, batches, optimizer, chosen_autocast(cfg), period=20, max_iter=0)
        self.step.iter = 0

    def run(self) -> None:
        """Take a step, with the method's hooks."""
        self.method.before_step(0.5, self.epoch)
        self.step.run_step()
        self.method.after_step()
        self.step.iter += 1


class Networks:
    """The forward and backward passes of a method's networks, as often and with such inputs as in its own step."""

    def __init__(self, step: Step) -> None:
        self.autocast = step.step.device, step.step.autocast
        step.method.before_step(0.5, step.epoch)
        with recorded(step.method) as self.calls, self._precision():
            step.method(step.views)

    def _precision(self) -> torch.autocast:
        device, dtype = self.autocast
        return torch.autocast(device, dtype, enabled=dtype is not None)

    def run(self) -> None:
        """Call every module as it was called; the sum of what they return stands for the loss."""
        total = []
        with self._precision():
            for module, inputs, trained in self.calls:
                with torch.set_grad_enabled(trained):
                    # Copied, because a module may change its input in place.
                    fresh = [x.detach().requires_grad_().clone() if _needs_gradient(x) else x for x in inputs]
                    output = module(*fresh)
                total += [x.float().sum() for x in _tensors(output) if x.requires_grad]
        for parameter in {p for module, _, _ in self.calls for p in module.parameters()}:
            parameter.grad = None
        torch.stack(total).sum().backward()


@contextmanager
def recorded(method: SSLMethod) -> Iterator[list[Call]]:
    """Record the outermost calls of modules in a method's forward pass: module, inputs, whether it is trained."""
    calls: list[Call] = []
    depth = 0

    def enter(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal depth
        if module is not method:
            if depth == 0:
                calls.append((module, inputs, torch.is_grad_enabled()))
            depth += 1

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal depth
        depth -= module is not method

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _needs_gradient(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _tensors(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else [x for x in output if isinstance(x, torch.Tensor)]


def rows(names: Sequence[str], opts: Sequence[str], repeats: int) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure methods one after the other, each in turns with MoCo v2 and with its own networks.

    Args:
        names: of registered methods that have a recipe.
        opts: ``KEY VALUE ...`` for all recipes: device, batch, size, encoder.
        repeats: turns.

    Returns:
        A row a method: its recipe, median seconds of a step, its ratios to its networks alone and to MoCo v2's step,
        and the peak memory of a step and of the networks in MiB; then what could not be measured, with the reason.
    """
    found, left_out = [], []
    cfg = load_cfg(REFERENCE, opts)
    reference = Step(cfg)
    chosen = recipes(names)
    for number, (name, config) in enumerate(chosen.items(), start=1):
        print(f"[{number}/{len(chosen)}] {name}: {config}", file=sys.stderr, flush=True)
        try:
            found.append(row(name, config, opts, reference, repeats))
        except (ValueError, RuntimeError) as error:
            left_out.append(f"{name} ({config}): {' '.join(str(error).split())}")
    return found, left_out


def row(name: str, config: str, opts: Sequence[str], reference: Step, repeats: int) -> dict[str, Any]:
    """Measure one method; see :func:`rows`."""
    cfg = load_cfg(config, [*opts, *fitting(load_cfg(config), load_cfg(config, opts))])
    step, device = Step(cfg), cfg.MODEL.DEVICE
    networks = Networks(step)
    works: dict[str, Callable[[], object]] = {LABEL: reference.run, "networks": networks.run, "step": step.run}
    peak = peak_bytes if device == "cpu" else _peak_on_gpu
    with EventStorage():
        times = take_turns(works, repeats, device)
        memory = {what: peak(works[what]) / 2**20 for what in ("networks", "step")}

    def ratio(to: str) -> float:
        return statistics.median(a / b for a, b in zip(times["step"], times[to], strict=True))

    return {
        "method": name, "recipe": config.removeprefix("Pretrain/"), "seconds": statistics.median(times["step"]),
        "step / its networks": ratio("networks"), f"step / {LABEL}": ratio(LABEL),
        "peak MiB": memory["step"], "networks' peak MiB": memory["networks"],
    }  # fmt: skip


def fitting(recipe: CfgNode, small: CfgNode) -> list[Any]:
    """Return the arguments that fit a recipe's method to the benchmark's batch and size, as ``KEY VALUE ...``.

    There are as many clusters as images in a batch, and patches take the same part of an image as in the recipe.
    """
    found: list[Any] = []
    args = {**default_args(recipe.SSL.METHOD), **recipe.SSL.ARGS}
    if "clusters" in args:
        found += ["SSL.ARGS.clusters", small.SOLVER.IMS_PER_BATCH]
    for name in sorted(args.keys() & {"patch", "stride"}):
        found += [f"SSL.ARGS.{name}", args[name] * small.DATA.CROP_SIZE // recipe.DATA.CROP_SIZE]
    return found


def registered(names: Sequence[str]) -> list[str]:
    """Return the methods to measure: those that are named, or all.

    Raises:
        ValueError: a method does not exist.
    """
    if unknown := [name for name in names if name not in METHODS]:
        raise ValueError(f"--methods {' '.join(unknown)}: the methods are {', '.join(METHODS)}")
    return list(names or METHODS)

"""``ENGINE.COMPILE``: the mode in which torch.compile makes the networks' kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn

from moco_d2.config.values import canonical
from moco_d2.messages import unknown_name

# torch.compile's modes. A CUDA graph launches all kernels of a network at once.
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
MODES = ("default", "max-autotune-no-cudagraphs", *CUDA_GRAPHS)


def compile_mode(cfg: CfgNode) -> str:
    """Return torch.compile's mode, or an empty string if networks are not compiled."""
    return str(canonical("ENGINE.COMPILE", cfg.ENGINE.COMPILE) or "")


def compile_problem(cfg: CfgNode, sizes_vary: bool = False) -> str:
    """Return what is wrong with ``ENGINE.COMPILE``, or an empty string.

    Args:
        cfg: config of the run.
        sizes_vary: as in :func:`compile_networks`.
    """
    mode = compile_mode(cfg)
    if mode not in ("", *MODES):
        return unknown_name("ENGINE.COMPILE", mode, ("", *MODES))
    if sizes_vary and mode in CUDA_GRAPHS:
        return (
            f"ENGINE.COMPILE is {mode!r}, which records a CUDA graph for each size of a picture, and a detector sees "
            "many sizes: set it to default or max-autotune-no-cudagraphs"
        )
    return ""


def uses_cuda_graphs(cfg: CfgNode) -> bool:
    """Tell whether compiled networks run as CUDA graphs."""
    return compile_mode(cfg) in CUDA_GRAPHS and cfg.MODEL.DEVICE != "cpu"


def compile_networks(networks: Iterable[nn.Module], cfg: CfgNode, sizes_vary: bool = False) -> None:
    """Compile networks in place, if ``ENGINE.COMPILE`` asks for it; the names of their tensors do not change.

    Args:
        networks: what forward passes call.
        cfg: config of the run.
        sizes_vary: the sizes of their inputs differ from step to step. They are then variables of the kernels:
            otherwise torch compiles anew for new sizes, and stops compiling after 8 times.
    """
    if mode := compile_mode(cfg):
        for network in networks:
            # The compiler skips what is called from torch's own Sequential (conv5, heads), unless it is told not to.
            with torch._dynamo.config.patch(wrap_top_frame=isinstance(network, nn.Sequential)):
                network.compile(mode=mode, dynamic=True if sizes_vary else None)


@contextlib.contextmanager
def uncompiled(cfg: CfgNode) -> Iterator[None]:
    """Run networks uncompiled within the block.

    So detectors are evaluated: for single pictures of many sizes torch would compile again and again.
    """
    with torch.compiler.set_stance("force_eager") if compile_mode(cfg) else contextlib.nullcontext():
        yield


class CudaGraphSteps(HookBase):
    """Tells CUDA graphs where a step begins: then a network's output lives until the next step.

    Without this, torch guesses that the next forward pass begins a step unless a backward pass is due, and the output
    of a network without gradient, such as a key encoder, could be overwritten within its step.
    """

    def before_step(self) -> None:
        """Mark the beginning."""
        torch.compiler.cudagraph_mark_step_begin()

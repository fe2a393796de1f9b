"""The training step of pretraining: autocast, loss scaling, clipping, and losses that are read in batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import get_event_storage
from torch import nn

from moco_d2.engine.idle import IdleTime
from moco_d2.methods import Diagnostic, SSLMethod
from moco_d2.running.compilation import compile_mode, compile_networks
from moco_d2.running.losses import Unread, record_losses
from moco_d2.running.precision import use_tf32

# MoCo v3's Figure 4: when a ViT's training becomes unstable, its first layer's gradient spikes first.
FIRST_LAYER = Diagnostic("first_layer_gradient", "gradient of the first layer", "-largest norm", ".3g")

AUTOCAST = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class PretrainStep(SimpleTrainer):
    """Detectron2's ``SimpleTrainer`` with autocast; it keeps losses on the device until they are logged.

    :meth:`flush` reads those of ``period`` steps at once.
    """

    def __init__(
        self,
        model: nn.Module,
        data_loader: Any,
        optimizer: torch.optim.Optimizer,
        autocast: str,
        period: int,
        max_iter: int,
        clip: Callable[[nn.Parameter], Any] | None = None,
    ) -> None:
        """Set up.

        Args:
            model: the method, or its DDP wrapper.
            data_loader: yields the views.
            optimizer: optimizer of the model.
            autocast: ``bfloat16``, ``float16`` (with loss scaling), or empty for none.
            period: number of steps between two readings of the losses.
            max_iter: total number of steps; the losses are also read after the last one.
            clip: clips a parameter's gradient, in place, before the optimizer's step.
        """
        super().__init__(model, data_loader, optimizer)
        self.device = next(model.parameters()).device.type
        self.autocast, self.period, self.max_iter = AUTOCAST.get(autocast), period, max_iter
        self.grad_scaler = torch.amp.GradScaler(self.device, enabled=self.autocast is torch.float16)
        self.method = cast(SSLMethod, getattr(model, "module", model))
        # Only if something reads the gradients before the optimizer; else its fused kernel unscales them in passing.
        self.clip = clip
        self.unscale = clip is not None or type(self.method).after_backward is not SSLMethod.after_backward
        self._losses: Unread = []
        self.idle = IdleTime() if self.device == "cuda" else None
        self.first_layer = first_layer(self.method)
        self._largest: torch.Tensor | None = None  # norm of its gradient since the last recorded step

    def run_step(self) -> None:
        """Run a step. Every ``period`` steps, and after the last one, read and record the losses."""
        assert self.model.training
        start = time.perf_counter()
        views = next(self._data_loader_iter)
        waited = time.perf_counter() - start
        get_event_storage().put_scalar("data_time", waited)
        if self.idle:
            self.idle.images_arrived(self.iter, waited)
        with torch.autocast(self.device, self.autocast, enabled=self.autocast is not None):
            losses = self.model(views)
        self.optimizer.zero_grad()
        self.grad_scaler.scale(sum(losses.values())).backward()
        if self.unscale:
            self.grad_scaler.unscale_(self.optimizer)
        self.method.after_backward()
        self._watch_first_layer()
        if self.clip:
            for parameter in (p for p in self.method.parameters() if p.grad is not None):
                self.clip(parameter)
        self._losses.append((self.iter, {name: loss.detach() for name, loss in losses.items()}))
        self.grad_scaler.step(self.optimizer)
        self.grad_scaler.update()
        if self.idle:
            self.idle.step_ends()
        if (self.iter + 1) % self.period == 0 or self.iter + 1 == self.max_iter:
            self.flush()

    @torch.no_grad()
    def _watch_first_layer(self) -> None:
        """Add :data:`FIRST_LAYER` to what the method recorded: the largest of the steps since it last was, unclipped.

        A spike lasts a few steps, so the norm of the recorded steps alone would miss most of them.
        """
        if self.first_layer is None or (gradient := self.first_layer.grad) is None:
            return
        norm = gradient.norm()
        if not self.unscale:
            norm = norm / self.grad_scaler.scale(torch.ones_like(norm))
        norm = norm.nan_to_num(0.0, 0.0, 0.0)  # loss scaling skips a step whose gradient is not finite
        self._largest = norm if self._largest is None else torch.maximum(self._largest, norm)
        if self.method.recording:
            self.method.recorded[FIRST_LAYER.key], self._largest = self._largest, None

    def flush(self) -> None:
        """Record the losses since the last call (:func:`~moco_d2.running.losses.record_losses`, in every process)."""
        record_losses(self._losses)
        for iteration, seconds in self.idle.read() if self.idle else ():  # the losses' reading has waited for the steps
            get_event_storage().put_scalar("device_idle", seconds, cur_iter=iteration)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the optimizer and of the loss scaler."""
        return {**super().state_dict(), "grad_scaler": self.grad_scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""
        super().load_state_dict(state)
        scaler = state.get("grad_scaler")  # empty or missing if the run had no loss scaling
        if scaler and self.grad_scaler.is_enabled():
            self.grad_scaler.load_state_dict(scaler)


def first_layer(method: SSLMethod) -> torch.Tensor | None:
    """Return the weights of a method's first trainable Linear or convolution, in the order of its modules.

    It is the stem of a ResNet and the patch projection of a ViT; if that is frozen, the first block's ``attn.qkv``.
    None if there is no such layer.
    """
    for module in method.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and module.weight.requires_grad:
            return module.weight
    return None


def chosen_autocast(cfg: CfgNode) -> str:
    """Return the autocast dtype for this device; ``auto`` is bfloat16, or float16 on GPUs without bfloat16."""
    if cfg.ENGINE.AUTOCAST != "auto":
        return str(cfg.ENGINE.AUTOCAST)
    if cfg.MODEL.DEVICE == "cpu":
        return ""
    return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"


def apply_performance_options(method: SSLMethod, cfg: CfgNode) -> SSLMethod:
    """Apply ENGINE.TF32, and in place CHANNELS_LAST and COMPILE; state-dict keys do not change."""
    use_tf32(cfg.ENGINE.TF32)
    if cfg.ENGINE.CHANNELS_LAST:
        method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    compile_networks(method.networks(), cfg)
    return method


def performance_advice(cfg: CfgNode) -> Iterator[str]:
    """Yield what makes a run slower on this machine than it has to be."""
    on_cpu = cfg.MODEL.DEVICE == "cpu"
    if on_cpu and chosen_autocast(cfg) == "bfloat16" and torch.backends.cpu.get_cpu_capability() == "AVX2":
        yield (
            "ENGINE.AUTOCAST bfloat16: this CPU has no instructions for bfloat16 (AVX2 is its newest set), so a step "
            "takes longer than in float32; ENGINE.AUTOCAST auto leaves it out on a CPU"
        )


def describe_performance_options(cfg: CfgNode) -> str:
    """Return, in words, the performance options that are on; empty if there are none."""
    engine = cfg.ENGINE
    words = [f"{autocast} autocast"] if (autocast := chosen_autocast(cfg)) else []
    words += ["channels_last"] * engine.CHANNELS_LAST
    if mode := compile_mode(cfg):
        words.append("compiled" if mode == "default" else f"compiled ({mode})")
    words += [f"TF32 {engine.TF32}"] * bool(engine.TF32)
    return ", ".join(words)

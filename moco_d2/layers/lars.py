"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), in the forms of the papers on pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from moco_d2.messages import unknown_name

FORMS = ("lars", "lars_classic", "larc")


class Lars(Optimizer):
    """SGD with momentum that scales each tensor's step by ``trust ‖p‖ / ‖update‖``.

    With g the gradient, p the weights, u = g + weight_decay p and q the scale (1 if a norm is 0):

    * ``lars`` (MoCo v3, BYOL, Barlow Twins, VICReg, DINO): q = trust ‖p‖ / ‖u‖; v <- m v + q u; p <- p - lr v.
    * ``lars_classic`` (SimCLR): the same q, with the lr inside the momentum: v <- m v + lr q u; p <- p - v. It differs
      from ``lars`` once the lr changes.
    * ``larc`` (SwAV): q = trust ‖p‖ / (‖g‖ + weight_decay ‖p‖ + 1e-8); v <- m v + q u; p <- p - lr v. If a norm is 0,
      there is no weight decay either.

    A group with ``adapt`` False has q = 1. The papers do this for biases and norms, without weight decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
        form: str = "lars",
        fused: bool | None = None,
    ) -> None:
        """Make an optimizer.

        Args:
            params: parameters, or groups of them; a group may set ``adapt``.
            lr: learning rate.
            momentum: m in [0, 1).
            weight_decay: default for groups that do not set their own.
            trust: trust coefficient, > 0.
            form: one of ``FORMS``.
            fused: whether a kernel of torch's SGD does the last part of a step in one pass; ``None``: torch chooses.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            raise ValueError(unknown_name("the form of LARS", form, FORMS))
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True,
            "fused": fused,
        }  # fmt: skip
        self.form = form
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient, which becomes ``q u`` of the last step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(group, parameters)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        # In place: a copy of all gradients would be as large as the network.
        gradients: list[torch.Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        self._scale(group, parameters, gradients)
        classic = self.form == "lars_classic"
        if classic:
            torch._foreach_mul_(gradients, group["lr"])
        sgd(
            parameters, gradients, [self._velocity(p) for p in parameters], fused=group["fused"],
            lr=1.0 if classic else group["lr"], momentum=group["momentum"],
            weight_decay=0.0, dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip

    def _scale(self, group: dict[str, Any], parameters: list[torch.Tensor], gradients: list[torch.Tensor]) -> None:
        """Turn every gradient g into q u."""
        decay, larc = group["weight_decay"], self.form == "larc"
        slopes = torch._foreach_norm(gradients) if group["adapt"] and larc else ()
        if decay:
            torch._foreach_add_(gradients, parameters, alpha=decay)
        if not group["adapt"]:
            return
        size = torch.stack(torch._foreach_norm(parameters))
        slope = torch.stack(slopes or torch._foreach_norm(gradients))
        usable, unscaled = (size > 0) & (slope > 0), torch.ones_like(size)
        if larc:  # Without a gradient there is no weight decay either.
            unscaled, slope = (slope > 0).to(size.dtype), slope + decay * size + 1e-8
        torch._foreach_mul_(gradients, list(torch.where(usable, group["trust"] * size / slope, unscaled).unbind()))

    def _velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["momentum_buffer"]
        return velocity

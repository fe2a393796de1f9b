"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), in the forms of the papers on pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

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
    ) -> None:
        """Make an optimizer.

        Args:
            params: parameters, or groups of them; a group may set ``adapt``.
            lr: learning rate.
            momentum: m in [0, 1).
            weight_decay: default for groups that do not set their own.
            trust: trust coefficient, > 0.
            form: one of ``FORMS``.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            raise ValueError(unknown_name("the form of LARS", form, FORMS))
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        self.form = form
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters that have a gradient."""
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
        gradients: list[torch.Tensor] = [p.grad for p in parameters]  # type: ignore[misc]
        decay = group["weight_decay"]
        updates = list(torch._foreach_add(gradients, parameters, alpha=decay))
        if group["adapt"]:
            sizes = torch.stack(torch._foreach_norm(parameters))
            slopes = torch.stack(torch._foreach_norm(gradients if self.form == "larc" else updates))
            usable = (sizes > 0) & (slopes > 0)
            if self.form == "larc":
                # Without a scale there is no weight decay either.
                updates = [torch.where(ok, u, g) for ok, u, g in zip(usable, updates, gradients, strict=True)]
                slopes = slopes + decay * sizes + 1e-8
            scales = torch.where(usable, group["trust"] * sizes / slopes, 1.0)
            torch._foreach_mul_(updates, list(scales.unbind()))
        if self.form == "lars_classic":
            torch._foreach_mul_(updates, group["lr"])
        velocities = [self._velocity(p) for p in parameters]
        torch._foreach_mul_(velocities, group["momentum"])
        torch._foreach_add_(velocities, updates)
        torch._foreach_add_(parameters, velocities, alpha=-1 if self.form == "lars_classic" else -group["lr"])

    def _velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["momentum_buffer"]
        return velocity

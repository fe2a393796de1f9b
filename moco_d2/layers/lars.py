"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), in the forms that papers on pretraining published."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

FORMS = ("lars", "lars_classic", "larc")


class Lars(Optimizer):
    """SGD with momentum whose step is scaled, for each tensor, by ``trust |p| / |update|``.

    With g the gradient, p the weights, u = g + weight_decay p and q the scale (1 where a norm is 0):

    * ``lars`` (MoCo v3, BYOL, Barlow Twins, VICReg, DINO): q = trust |p| / |u|; v <- m v + q u; p <- p - lr v.
    * ``lars_classic`` (SimCLR): the same q, but the lr is inside: v <- m v + lr q u; p <- p - v. The two differ once
      the lr changes.
    * ``larc`` (SwAV): q = trust |p| / (|g| + weight_decay |p| + 1e-8); v <- m v + q u; p <- p - lr v. Where a norm
      is 0 there is no weight decay either.

    A group with ``adapt`` False takes q = 1; the papers exclude biases and norms so, and give them no weight decay.
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
        """Set up.

        Args:
            params: parameters, or groups of them; a group may set ``adapt``.
            lr: learning rate.
            momentum: m in [0, 1).
            weight_decay: of groups that do not set their own.
            trust: trust coefficient, > 0.
            form: one of ``FORMS``.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            raise ValueError(f"the form of LARS is {form!r}; it must be one of {', '.join(FORMS)}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True}
        self.form = form
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the weights that have a gradient."""
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
                # Without a scale there is no weight decay either: the plain gradient.
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

"""LARS, layer-wise adaptive rates (You et al., arXiv 1708.03888), in the forms of the papers on pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.sgd import sgd

from moco_d2.messages import unknown_name

FORMS = ("lars", "lars_classic", "larc")
BLOCK = 65_536  # elements of which norms are taken at a time, so that they stay in a CPU's cache


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
        foreach: bool | None = None,
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
            foreach: whether to update all tensors together, or each by itself; ``None``: together unless on a CPU.
                Together needs few kernels and no number from the GPU, but it overwrites the gradients and moves more
                memory. The results differ in rounding.

        Raises:
            ValueError: an unknown form.
        """
        if form not in FORMS:
            raise ValueError(unknown_name("the form of LARS", form, FORMS))
        defaults = {
            "lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust, "adapt": True,
            "fused": fused,
        }  # fmt: skip
        self.form, self.foreach = form, foreach
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
            if not parameters:
                continue
            if not group["adapt"]:
                self._move(group, parameters)
            elif self.foreach or (self.foreach is None and not parameters[0].is_cpu):
                self._together(group, parameters)
            else:
                self._one_by_one(group, parameters)
        return loss

    def _one_by_one(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        decay = 0.0 if self.form == "larc" else group["weight_decay"]
        norms = torch.stack([_norms(p, g, decay) for p, g in zip(parameters, _gradients(parameters), strict=True)])
        for parameter, q in zip(parameters, self._factors(group, norms[:, 0], norms[:, 1]).tolist(), strict=True):
            self._move(group, [parameter], q)

    def _together(self, group: dict[str, Any], parameters: list[torch.Tensor]) -> None:
        # In place: a copy of all gradients would be as large as the network.
        gradients, decay = _gradients(parameters), group["weight_decay"]
        slopes = torch._foreach_norm(gradients) if self.form == "larc" else ()
        if decay:
            torch._foreach_add_(gradients, parameters, alpha=decay)
        slope = torch.stack(slopes or torch._foreach_norm(gradients))
        factors = self._factors(group, torch.stack(torch._foreach_norm(parameters)), slope)
        torch._foreach_mul_(gradients, list(factors.unbind()))
        self._move({**group, "weight_decay": 0.0}, parameters)

    def _factors(self, group: dict[str, Any], size: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
        """Return q of n tensors (n,) from the norms of weights and updates, or gradients for ``larc``, both (n,)."""
        usable, unscaled = (size > 0) & (slope > 0), torch.ones_like(size)
        if self.form == "larc":  # Without a gradient there is no weight decay either.
            unscaled, slope = (slope > 0).to(size.dtype), slope + group["weight_decay"] * size + 1e-8
        return torch.where(usable, group["trust"] * size / slope, unscaled)

    def _move(self, group: dict[str, Any], parameters: list[torch.Tensor], q: float = 1.0) -> None:
        """Take v <- m v + q (g + weight_decay p); p <- p - lr v as a step of SGD, which multiplies by 1 - dampening."""
        lr, momentum = group["lr"], group["momentum"]
        enters, moves = (lr * q, 1.0) if self.form == "lars_classic" else (q, lr)
        if not momentum:  # SGD then has no dampening.
            enters, moves = 1.0, enters * moves
        sgd(
            parameters, _gradients(parameters), [self._velocity(p) for p in parameters], fused=group["fused"], lr=moves,
            momentum=momentum, weight_decay=group["weight_decay"], dampening=1.0 - enters, nesterov=False,
            maximize=False,
        )  # fmt: skip

    def _velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        velocity: torch.Tensor = state["momentum_buffer"]
        return velocity


def _gradients(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [p.grad for p in parameters if p.grad is not None]


def _norms(parameter: torch.Tensor, gradient: torch.Tensor, decay: float) -> torch.Tensor:
    """Return ‖p‖ and ‖g + decay p‖ (2,); each block is read once for both."""
    pair = parameter, gradient
    if parameter.ndim > 2 and not (parameter.is_contiguous() and gradient.is_contiguous()):
        pair = parameter.movedim(1, -1), gradient.movedim(1, -1)  # channels_last: then nothing is copied
    p, g = (x.reshape(-1) for x in pair)
    spare, products = torch.empty_like(p[:BLOCK]), []
    for weights, slopes in zip(p.split(BLOCK), g.split(BLOCK), strict=True):
        u = torch.add(slopes, weights, alpha=decay, out=spare[: len(weights)]) if decay else slopes
        products += [torch.dot(weights, weights), torch.dot(u, u)]
    return torch.stack(products).view(-1, 2).sum(dim=0).sqrt()

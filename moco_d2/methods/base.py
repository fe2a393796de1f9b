"""The contract of a self-supervised method, and the registry of methods."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moco_d2.nearest import did_you_mean, unknown_name

METHODS: dict[str, type[SSLMethod]] = {}


class SSLMethod(nn.Module, ABC):
    """A method maps a batch of views to named losses; everything that trains it (loop, data, lr) is elsewhere.

    The constructor takes ``encoder``, a callable ``num_classes -> nn.Module`` whose head is called ``fc``, and the
    method's own keyword arguments (``SSL.ARGS``).

    Attributes:
        metrics: diagnostics of the last recorded step, detached scalars by name; never part of the loss.
        recording: whether forward fills ``metrics``: the engine turns it off for steps that nobody looks at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.metrics: dict[str, torch.Tensor] = {}
        self.recording = True

    @abstractmethod
    def forward(self, views: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            views: V tensors of shape (N, 3, H_v, W_v), normalised.

        Returns:
            Named scalar losses; training minimises their sum.
        """

    @abstractmethod
    def backbone(self) -> nn.Module:
        """Return the network that is transferred, under torchvision's names, without head; it shares the weights."""

    def check_batch(self, size: int) -> None:
        """Raise ValueError if the method cannot take ``size`` images per process in training (default: any)."""

    def networks(self) -> list[nn.Module]:
        """Return the networks that forward calls, for compilation (default: the children that have parameters)."""
        return [child for child in self.children() if next(child.parameters(), None) is not None]

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups, each with what sets it apart.

        A group is ``{"params": parameters}`` and may have ``constant_lr: True`` (the schedule leaves its lr alone, as
        SimSiam's predictor wants), ``lr_factor`` (multiplies the lr) and ``no_weight_decay: True``. The default is one
        group of all parameters. Every trainable parameter stands in one group.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_step(self, progress: float) -> None:
        """Run before a step's forward, with the fraction of training done in [0, 1) (schedules)."""

    def after_backward(self) -> None:
        """Run between the backward pass and the optimizer's step, when gradients are unscaled (frozen layers)."""

    def after_step(self) -> None:
        """Run after the optimizer's step (centres, target networks)."""

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate the state dict of the method's published code to this one's names (default: unchanged)."""
        return state


def register(method: type[SSLMethod]) -> type[SSLMethod]:
    """Class decorator: make a method available as ``SSL.METHOD``."""
    METHODS[method.__name__] = method
    return method


def method_class(name: str) -> type[SSLMethod]:
    """Return a registered method.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(unknown_name("SSL.METHOD", name, METHODS))
    return METHODS[name]


def default_args(name: str) -> dict[str, Any]:
    """Return the keyword arguments of a method with their defaults, as ``SSL.ARGS`` takes them."""
    parameters = inspect.signature(method_class(name)).parameters
    return {key: p.default for key, p in parameters.items() if p.default is not inspect.Parameter.empty}


def build_method(name: str, encoder: Callable[[int], nn.Module], args: dict[str, Any]) -> SSLMethod:
    """Construct a method.

    Args:
        name: a key of ``METHODS``.
        encoder: builds a network with the given number of outputs in its ``fc``.
        args: the method's keyword arguments.

    Raises:
        ValueError: an argument the method does not have; the message lists the accepted ones.
    """
    accepted = default_args(name)
    for key in args:
        if key not in accepted:
            raise ValueError(f"SSL.ARGS has {key!r}; {name} accepts {', '.join(accepted)}{did_you_mean(key, accepted)}")
    constructor: Callable[..., SSLMethod] = method_class(name)
    return constructor(encoder, **args)

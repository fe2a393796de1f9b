"""The contract of a self-supervised method, and the registry of methods."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from moco_d2.layers.views import Views
from moco_d2.messages import did_you_mean, unknown_name

METHODS: dict[str, type[SSLMethod]] = {}

# Arguments of a constructor that the engine gives; all others are SSL.ARGS.
_GIVEN = ("encoder", "images")


class Diagnostic(NamedTuple):
    """One number by which a person sees how pretraining goes.

    Attributes:
        key: name in ``SSLMethod.recorded`` and in ``metrics.json``; ``total_loss`` is the sum of the losses.
        panel: title of the picture in which its curve is drawn; those of one title share it.
        label: what the legend and the progress line call it; a label that begins with ``-`` is for the legend only.
        form: format specification for the progress line.
        reference: a value that is drawn as a dashed line, such as chance; None for none.
        reference_label: what that line is.
        collapsed_below: a value below which the log warns that the network maps all images to one point.
    """

    key: str
    panel: str
    label: str
    form: str = ".3f"
    reference: float | None = None
    reference_label: str = ""
    collapsed_below: float | None = None


class SSLMethod(nn.Module, ABC):
    """A method maps a batch of views to named losses; everything that trains it (loop, data, lr) is elsewhere.

    The constructor takes ``encoder``, a callable ``num_classes -> nn.Module`` whose networks keep the contract of
    :class:`~moco_d2.layers.encoders.Encoder`, and the method's own keyword arguments (``SSL.ARGS``). If its signature
    has ``images``, it is also given the number of images of the set (for a memory bank); that is not part of
    ``SSL.ARGS``.

    Attributes:
        recorded: values of the diagnostics of the last recorded step, detached scalars by name; never part of the loss.
        recording: whether forward fills ``recorded``: the engine turns it off for steps that nobody looks at.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, torch.Tensor] = {}
        self.recording = True

    @abstractmethod
    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            views: the images' views, their numbers and the places of the crops.

        Returns:
            Named scalar losses; training minimises their sum.
        """

    @abstractmethod
    def backbone(self) -> nn.Module:
        """Return the network that is transferred, under torchvision's names, without head; it shares the weights."""

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe what logs and pictures show of the method, the loss first (default: the loss alone)."""
        return (Diagnostic("total_loss", "loss", "loss", ".4f"),)

    def check_batch(self, size: int) -> None:
        """Raise ValueError if the method cannot take ``size`` images per process in training (default: any)."""

    def settings(self) -> dict[str, Any]:
        """Return, by name, what is computed that follows from the number of processes (default: nothing does).

        It is logged, and a resumed run must have the same.
        """
        return {}

    def departures(self) -> list[str]:
        """Return, in words, where :meth:`settings` are not what the arguments stand for (default: nowhere)."""
        return []

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Return warnings, with remedies, on a run that can be made and will not learn much (default: none).

        Args:
            images: size of the data set.
            batch: images of a step, in all processes.
            steps: length of the run.
        """
        return []

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

    def before_epoch(self, epoch: int, replay: Callable[[], Iterator[Views]]) -> None:
        """Run before the first step of an epoch, unless the run was resumed inside it (clusterings).

        Args:
            epoch: its number, from 0.
            replay: returns this process's batches of the epoch, as training will see them, read beforehand.
        """

    def before_step(self, progress: float, epoch: float) -> None:
        """Run before a step's forward (schedules).

        Args:
            progress: part of training that is done, in [0, 1).
            epoch: number of epochs that are done, with the part of the present one.
        """

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
    own = {key: p.default for key, p in parameters.items() if key not in _GIVEN}
    return {key: default for key, default in own.items() if default is not inspect.Parameter.empty}


def build_method(name: str, encoder: Callable[[int], nn.Module], args: dict[str, Any], images: int = 1) -> SSLMethod:
    """Construct a method.

    Args:
        name: a key of ``METHODS``.
        encoder: builds a network with the given number of outputs.
        args: the method's keyword arguments.
        images: number of images of the set, for methods that ask for it.

    Raises:
        ValueError: an argument the method does not have; the message lists the accepted ones.
    """
    accepted = default_args(name)
    for key in args:
        if key not in accepted:
            raise ValueError(f"SSL.ARGS has {key!r}; {name} accepts {', '.join(accepted)}{did_you_mean(key, accepted)}")
    constructor: Callable[..., SSLMethod] = method_class(name)
    if "images" in inspect.signature(constructor).parameters:
        args = {**args, "images": images}
    return constructor(encoder, **args)

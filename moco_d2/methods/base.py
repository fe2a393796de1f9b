"""The contract of a self-supervised method, and the registry of methods."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from moco_d2.layers.batch_norm import SyncBatchNorm2d, use_sync_batch_norm
from moco_d2.layers.ema import initial_share
from moco_d2.layers.shuffle import BNGroups
from moco_d2.layers.views import Views
from moco_d2.messages import unknown_name
from moco_d2.signature import defaults, refuse_unknown

METHODS: dict[str, type[SSLMethod]] = {}

# Arguments of a constructor that the engine fills in; all others are SSL.ARGS.
_GIVEN = ("encoder", "images")


class Diagnostic(NamedTuple):
    """A number that shows how pretraining goes.

    Attributes:
        key: name in ``SSLMethod.recorded`` and in ``metrics.json``; ``total_loss`` is the sum of the losses.
        panel: title of the plot in which its curve is drawn; diagnostics with the same title share a plot.
        label: its name in the legend and the progress line; a label that begins with ``-`` is for the legend only.
        form: format specification for the progress line.
        reference: a value to draw as a dashed line, for instance chance level.
        reference_label: the line's label in the legend.
        collapsed_below: below this value, the log warns that the network maps all images to one point.
    """

    key: str
    panel: str
    label: str
    form: str = ".3f"
    reference: float | None = None
    reference_label: str = ""
    collapsed_below: float | None = None


def feature_spread(dim: int) -> Diagnostic:
    """Describe ``feature_std``, the std of unit vectors' components, mean over the ``dim`` components.

    It is 1/sqrt(dim) if the vectors are spread evenly over the sphere, and 0 if all are one point.
    """
    even = 1 / math.sqrt(dim)
    return Diagnostic("feature_std", "feature std", "std", ".4f", even, "spread evenly, 1/sqrt(C)", even / 10)


class SSLMethod(nn.Module, ABC):
    """A self-supervised method, which maps a batch of views to named losses; the engine trains it.

    The constructor takes ``encoder``, a callable ``num_classes -> nn.Module`` whose networks keep the contract of
    :class:`~moco_d2.layers.encoders.Encoder`, and the method's own keyword arguments (``SSL.ARGS``), each with a
    default; it checks their ranges. If its signature has ``images``, it also receives the number of images in the data
    set (for a memory bank); that is not part of ``SSL.ARGS``.

    Attributes:
        recorded: diagnostics of the last recorded step, detached scalars by name; never part of the loss.
        recording: whether forward fills ``recorded``; the engine sets it on the steps that are logged.
        memories: prefixes of the state that checkpoints of the published code lack (queues, memories of features). A
            run that starts from such a file begins with empty ones.
    """

    memories: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self.recorded: dict[str, torch.Tensor] = {}
        self.recording = True

    @abstractmethod
    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            views: the views of the images, the images' numbers, and the boxes of the crops.

        Returns:
            Named scalar losses; training minimises their sum.
        """

    @abstractmethod
    def backbone(self) -> nn.Module:
        """Return the network to transfer: torchvision's names, no head, the method's own weights (not a copy)."""

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the numbers that logs and plots show, the loss first (default: the loss alone)."""
        return (Diagnostic("total_loss", "loss", "loss", ".4f"),)

    def check_batch(self, size: int) -> None:
        """Raise ValueError if the method cannot take ``size`` images per process in training (default: any)."""

    def settings(self) -> dict[str, Any]:
        """Return, by name, the settings that depend on the number of processes (default: none).

        They are logged and saved in checkpoints, and a resumed run must have the same.
        """
        return {}

    def departures(self) -> list[str]:
        """Return, in words, how :meth:`settings` differ from what the arguments ask for (default: not at all).

        Each difference makes the recipe a modified one.
        """
        return []

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Return warnings, with remedies, about a run that would work but learn little (default: none).

        Args:
            images: number of images in the data set.
            batch: images per step, in all processes.
            steps: length of the run.
        """
        return []

    def remedies_for_divergence(self) -> list[str]:
        """Return changes to ``SSL.ARGS`` that can help when the loss becomes infinite or NaN (default: none)."""
        return []

    def networks(self) -> list[nn.Module]:
        """Return the networks that forward calls, to be compiled (default: all children with parameters)."""
        return [child for child in self.children() if next(child.parameters(), None) is not None]

    def param_groups(self) -> list[dict[str, Any]]:
        """Return the trainable parameters in groups; every trainable parameter belongs to one group.

        A group is ``{"params": parameters}`` and may have ``constant_lr: True`` (the schedule does not change its lr,
        as for SimSiam's predictor), ``lr_factor`` (multiplies the lr) and ``no_weight_decay: True``. The default is
        one group of all parameters.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad]}]

    def before_epoch(self, epoch: int, replay: Callable[[], Iterator[Views]]) -> None:
        """Run before the first step of an epoch, but not after resuming inside one (clustering).

        Args:
            epoch: number of the epoch, from 0.
            replay: loads this process's batches of the epoch in advance, exactly as training will see them.
        """

    def before_step(self, progress: float, epoch: float) -> None:
        """Run before the forward pass of each step (schedules).

        Args:
            progress: fraction of training that is done, in [0, 1).
            epoch: number of epochs that are done, including the fraction of the current one.
        """

    def after_backward(self) -> None:
        """Run between the backward pass and the optimizer's step, on unscaled gradients (frozen layers)."""

    def after_step(self) -> None:
        """Run after the optimizer's step (target networks, centring)."""

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate a state dict of the method's published code to the names used here (default: unchanged)."""
        return state


class ShuffledMethod(SSLMethod):
    """A contrastive method with shuffling BN: what follows from its BN groups.

    Attributes:
        groups: the groups, set by the constructor.
    """

    groups: BNGroups

    def check_batch(self, size: int) -> None:
        """Raise ValueError if ``size`` images per process cannot be split into the BN groups."""
        self.groups.check_batch(size)

    def settings(self) -> dict[str, Any]:
        """Return the total number of BN groups."""
        return self.groups.settings()

    def departures(self) -> list[str]:
        """Return the total number of BN groups if it is neither the paper's nor the argument's."""
        return self.groups.departures()

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about BN groups of one image."""
        return self.groups.advice(batch)

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]


def register(method: type[SSLMethod]) -> type[SSLMethod]:
    """Register a method under its class name, which is its name in ``SSL.METHOD``; a class decorator."""
    METHODS[method.__name__] = method
    return method


def method_class(name: str) -> type[SSLMethod]:
    """Return a registered method.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    if name not in METHODS:
        raise ValueError(unknown_name("SSL.METHOD", name, METHODS))
    return METHODS[name]


def default_args(name: str) -> dict[str, Any]:
    """Return a method's keyword arguments with their defaults: the default ``SSL.ARGS``.

    Raises:
        ValueError: the name is unknown, or an argument has no default.
    """
    return defaults(f"the method {name}", method_class(name), _GIVEN)


def build_method(name: str, encoder: Callable[[int], nn.Module], args: dict[str, Any], images: int = 1) -> SSLMethod:
    """Construct a method. If its encoder has synchronised batch norm, or is a ViT, its heads have it, too.

    A ViT has layer norm, so it does not say how the heads' batch norm treats several processes. That of the published
    code is synchronised.

    Args:
        name: a key of ``METHODS``.
        encoder: builds a network with the given number of outputs.
        args: the method's keyword arguments.
        images: number of images in the data set, for methods whose constructor asks for it.

    Raises:
        ValueError: the method has no such argument; the message lists those it has.
    """
    refuse_unknown("SSL.ARGS", name, args, default_args(name))
    constructor: Callable[..., SSLMethod] = method_class(name)
    if "images" in inspect.signature(constructor).parameters:
        args = {**args, "images": images}
    method = constructor(encoder, **args)
    if any(isinstance(module, (SyncBatchNorm2d, nn.LayerNorm)) for module in method.modules()):
        use_sync_batch_norm(method)  # the heads, too
    return method


def check_ranges(rules: Iterable[tuple[bool, str]]) -> None:
    """Raise ValueError if arguments of a constructor are out of range; the message names all of them.

    Args:
        rules: for each argument whether it is in its range, and what to say if not: ``dim is 0; it must be ...``.
    """
    if problems := [f"SSL.ARGS.{message}" for holds, message in rules if not holds]:
        raise ValueError("\n".join(problems))


def slow_target(momentum: float, steps: int) -> list[str]:
    """Return a warning if a target, whose decay rises from ``momentum`` to 1 along a cosine, hardly moves in a run."""
    left = initial_share(momentum, steps)
    if left <= 0.5:
        return []
    return [
        f"after all {steps} steps, {left:.0%} of the target network is still its initial weights: train longer "
        f"(SOLVER.EPOCHS, a smaller SOLVER.IMS_PER_BATCH), or lower SSL.ARGS.momentum, which is {momentum:g}"
    ]


def renamed(state: dict[str, torch.Tensor], prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    """Return a state dict without DDP's ``module.``, and with each prefix of a name replaced as ``prefixes`` says."""
    found = {}
    for key, value in state.items():
        name = key.removeprefix("module.")
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        found[prefixes.get(old, "") + name.removeprefix(old)] = value
    return found

"""The registry of encoders: the networks that methods pretrain.

A new encoder is a module beside this one and an entry of :data:`ENCODERS`. A program may add its own entries before it
reads a config.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import ARCHITECTURES, build_resnet, describe
from moco_d2.messages import did_you_mean, unknown_name


@dataclass(frozen=True)
class Encoder:
    """The contract of an encoder.

    Attributes:
        build: ``build(num_classes, **args) -> network``. Its other arguments are ``SSL.ENCODER.ARGS``: the signature
            states their names, types and defaults, and the docstring their meaning. A value out of range is a
            ValueError that names the key. The network maps (N, 3, H, W) to (N, num_classes). Its last layer, the head,
            is a Linear called ``fc``, or as the network's attribute ``head_name`` says, so that a method can replace it
            (:func:`~moco_d2.layers.heads.replace_head`) or leave it out (:func:`~moco_d2.layers.heads.without_head`).
        describe: ``describe(network, pixels, origin=, recipe=) -> facts``, by the shapes of the network's tensors; the
            network has no head.
    """

    build: Callable[..., nn.Module]
    describe: Callable[..., BackboneFacts]


# By SSL.ENCODER.NAME.
ENCODERS: dict[str, Encoder] = {
    name: Encoder(functools.partial(build_resnet, name), describe) for name in ARCHITECTURES
}


def encoder_args(name: str) -> dict[str, Any]:
    """Return the arguments of an encoder with their defaults, as ``SSL.ENCODER.ARGS`` takes them.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if name not in ENCODERS:
        raise ValueError(unknown_name("SSL.ENCODER.NAME", name, ENCODERS))
    parameters = inspect.signature(ENCODERS[name].build).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key != "num_classes"}


def encoder_builder(name: str, args: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Return ``num_classes -> network``, which is what a method's constructor takes.

    Args:
        name: a key of ``ENCODERS``.
        args: the encoder's arguments; those left out have their defaults.

    Raises:
        ValueError: an unknown name or argument; the message lists the known ones.
    """
    accepted = encoder_args(name)
    for key in args:
        if key not in accepted:
            raise ValueError(
                f"SSL.ENCODER.ARGS has {key!r}; {name} accepts {', '.join(accepted)}{did_you_mean(key, accepted)}"
            )
    return functools.partial(ENCODERS[name].build, **args)

"""The registry of encoders: the networks that methods pretrain.

A new encoder is a module beside this one and an entry of :data:`ENCODERS`. A program may add its own entries before it
reads a config.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from moco_d2.facts import BackboneFacts, ResNetFacts, ViTFacts
from moco_d2.layers import resnet, vit
from moco_d2.messages import unknown_name
from moco_d2.signature import defaults, refuse_unknown


@dataclass(frozen=True)
class Encoder:
    """The contract of an encoder.

    Attributes:
        build: ``build(num_classes, **args) -> network``. Its other arguments are ``SSL.ENCODER.ARGS``: the signature
            states their names, types and defaults (each needs one), and the docstring their meaning. A value out of
            range is a ValueError that names the key. The network maps (N, 3, H, W) to (N, num_classes). Its last layer,
            the head, is a Linear called ``fc`` (or by the network's attribute ``head_name``), so that a method can
            replace it (:func:`~moco_d2.layers.heads.replace_head`) or leave it out
            (:func:`~moco_d2.layers.heads.without_head`).
        describe: ``describe(network, pixels, origin=, recipe=) -> facts``, by the shapes of the network's tensors; the
            network has no head. The facts are of a kind in :data:`moco_d2.facts.KINDS`.
    """

    build: Callable[..., nn.Module]
    describe: Callable[..., BackboneFacts]


# Size of a token, heads.
VITS = {"vit_tiny": (192, 3), "vit_small": (384, 6), "vit_base": (768, 12)}

# By SSL.ENCODER.NAME.
ENCODERS: dict[str, Encoder] = {
    name: Encoder(functools.partial(resnet.build_resnet, name), resnet.describe) for name in resnet.ARCHITECTURES
}
ENCODERS |= {
    name: Encoder(functools.partial(vit.build_vit, dim=dim, heads=heads), vit.describe)
    for name, (dim, heads) in VITS.items()
}


def network_for(facts: BackboneFacts) -> nn.Module:
    """Build the network that a backbone's facts describe, without head: (N, 3, H, W) to (N, D).

    Raises:
        ValueError: the facts describe no known network, or it is a ViT, and timm is missing.
    """
    if isinstance(facts, ResNetFacts):
        convolutional: nn.Module = resnet.network_for(facts)
        return convolutional
    if isinstance(facts, ViTFacts):
        transformer: nn.Module = vit.network_for(facts)
        return transformer
    raise ValueError(f"no network is known for facts of kind {facts.kind}")


def encoder_args(name: str) -> dict[str, Any]:
    """Return the arguments of an encoder with their defaults, as ``SSL.ENCODER.ARGS`` takes them.

    Raises:
        ValueError: an unknown name, with the known ones in the message; or an argument of it has no default.
    """
    if name not in ENCODERS:
        raise ValueError(unknown_name("SSL.ENCODER.NAME", name, ENCODERS))
    return defaults(f"the encoder {name}", ENCODERS[name].build, ("num_classes",))


def encoder_builder(name: str, args: Mapping[str, Any]) -> Callable[..., nn.Module]:
    """Return ``num_classes -> network``, which is what a method's constructor takes.

    Args:
        name: a key of ``ENCODERS``.
        args: the encoder's arguments; those left out have their defaults.

    Raises:
        ValueError: an unknown name or argument; the message lists the known ones.
    """
    refuse_unknown("SSL.ENCODER.ARGS", name, args, encoder_args(name))
    return functools.partial(ENCODERS[name].build, **args)

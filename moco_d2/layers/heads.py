"""Projection heads, and the replacement of an encoder's head."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn


def mlp_head(fc: nn.Linear) -> nn.Sequential:
    """Build MoCo v2's head: Linear(in, in) - ReLU - the given Linear(in, dim), both with bias, no BN.

    The given layer stays the last one, so that the names are the authors' (``fc.0``, ``fc.2``).
    """
    return nn.Sequential(nn.Linear(fc.in_features, fc.in_features), nn.ReLU(), fc)


def mlp(
    sizes: Sequence[int],
    *,
    bias: bool = True,
    norm: bool = True,
    last_bias: bool = True,
    last_norm: str = "",
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """Build a projection head or predictor: Linear - [BN] - activation, repeated, then Linear - [BN].

    Args:
        sizes: number of input features, of each hidden layer's features, and of output features.
        bias: whether the hidden Linears have a bias. The papers differ here, and so do copies of their heads.
        norm: whether a BatchNorm1d follows every hidden Linear.
        last_bias: whether the last Linear has a bias.
        last_norm: BatchNorm1d after the last Linear: ``""`` none, ``"affine"``, ``"plain"`` without gamma and beta
            (SimSiam, MoCo v3), ``"gamma"`` with gamma alone, beta being fixed at 0 (SimCLR).
        activation: builds the module between the layers.

    Raises:
        ValueError: fewer than two sizes, or an unknown ``last_norm``.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes is {tuple(sizes)}; a head needs at least its numbers of input and output features")
    if last_norm not in ("", "affine", "plain", "gamma"):
        raise ValueError(f"last_norm is {last_norm!r}; it must be '', 'affine', 'plain' or 'gamma'")
    layers: list[nn.Module] = []
    for features, hidden in itertools.pairwise(sizes[:-1]):
        layers.append(nn.Linear(features, hidden, bias=bias))
        layers += [nn.BatchNorm1d(hidden)] * norm
        layers.append(activation())
    layers.append(nn.Linear(sizes[-2], sizes[-1], bias=last_bias))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=last_norm != "plain"))
        if last_norm == "gamma":
            layers[-1].bias.requires_grad_(False)
    return nn.Sequential(*layers)


def head_name(network: nn.Module) -> str:
    """Return the name of an encoder's head: its attribute ``head_name``, else ``fc``."""
    return str(getattr(network, "head_name", "fc"))


def replace_head(network: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    """Replace an encoder's head, a Linear, by what ``make`` builds from it.

    Raises:
        ValueError: the head is not a Linear.
    """
    name = head_name(network)
    head = getattr(network, name, None)
    if not isinstance(head, nn.Linear):
        raise ValueError(f"the encoder's head, {name}, must be a Linear layer; it is {type(head).__name__}")
    setattr(network, name, make(head))


def cut_head(network: nn.Module) -> int:
    """Replace an encoder's head by an identity, for methods whose head is a module of its own.

    Returns:
        The number of features that the encoder then gives.
    """
    features: int = getattr(network, head_name(network)).in_features
    replace_head(network, lambda head: nn.Identity())
    return features


def without_head(network: nn.Module) -> nn.Module:
    """Return a network that shares all modules and weights with ``network`` except its head, an identity here."""
    backbone = network.__class__.__new__(network.__class__)
    backbone.__dict__.update(network.__dict__)
    backbone._modules = {**network._modules, head_name(network): nn.Identity()}
    backbone._compiled_call_impl = None  # it would call the compiled network, with its head
    return backbone

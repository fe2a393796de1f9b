"""Projection heads."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from torch import nn


def mlp_head(fc: nn.Linear) -> nn.Sequential:
    """MoCo v2's head: Linear(in, in) - ReLU - the given Linear(in, dim), both with bias, no BN.

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
    """Build a projection head or predictor: Linear - [BN] - activation, repeated, and a last Linear - [BN].

    Args:
        sizes: features in, of each hidden layer, and out; two sizes make a single Linear.
        bias: whether the hidden Linears have one. The papers differ here, and so do copies of their heads.
        norm: whether a BatchNorm1d follows every hidden Linear.
        last_bias: whether the last Linear has a bias.
        last_norm: BatchNorm1d behind the last Linear: ``""`` none, ``"affine"``, ``"plain"`` without gamma and beta
            (SimSiam, MoCo v3), ``"gamma"`` with gamma alone, beta being fixed at 0 (SimCLR).
        activation: builds the module between the layers.

    Raises:
        ValueError: fewer than two sizes, or an unknown ``last_norm``.
    """
    if len(sizes) < 2:
        raise ValueError(f"sizes is {tuple(sizes)}; a head needs at least the number of features in and out")
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


def without_head(network: nn.Module) -> nn.Module:
    """Return a view of ``network`` whose ``fc`` is an identity; all other modules and weights are shared."""
    trunk = network.__class__.__new__(network.__class__)
    trunk.__dict__.update(network.__dict__)
    trunk._modules = {**network._modules, "fc": nn.Identity()}
    trunk._compiled_call_impl = None  # it would call the compiled network, with its head
    return trunk

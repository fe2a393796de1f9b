"""Projection heads."""

from __future__ import annotations

from torch import nn


def mlp_head(fc: nn.Linear) -> nn.Sequential:
    """MoCo v2's head: Linear(in, in) - ReLU - the given Linear(in, dim), both with bias, no BN.

    The given layer stays the last one, so that the names are the authors' (``fc.0``, ``fc.2``).
    """
    return nn.Sequential(nn.Linear(fc.in_features, fc.in_features), nn.ReLU(), fc)


def without_head(network: nn.Module) -> nn.Module:
    """Return a view of ``network`` whose ``fc`` is an identity; all other modules and weights are shared."""
    trunk = network.__class__.__new__(network.__class__)
    trunk.__dict__.update(network.__dict__)
    trunk._modules = {**network._modules, "fc": nn.Identity()}
    trunk._compiled_call_impl = None  # it would call the compiled network, with its head
    return trunk

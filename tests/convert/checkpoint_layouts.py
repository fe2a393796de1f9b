"""One checkpoint per known layout, built around a given network; new sources are tested by having an entry here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import build_resnet, describe

State = dict[str, torch.Tensor]
FACTS = {"origin": "a run of the tests", "protocol": "moco_v2_R50_200ep"}


def network(name: str = "resnet50", width: float = 0.25, seed: int = 0) -> nn.Module:
    """A network whose normalisations do something, as after training: with fresh ones many mistakes do not show."""
    torch.manual_seed(seed)
    built = build_resnet(name, width=width)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return built


def trunk(net: nn.Module) -> State:
    return {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def head(layers: int) -> State:
    shapes = {"fc.weight": (16, 64), "fc.bias": (16,)}
    if layers == 2:
        shapes = {"fc.0.weight": (64, 64), "fc.0.bias": (64,), "fc.2.weight": (16, 64), "fc.2.bias": (16,)}
    return {key: torch.randn(shape) for key, shape in shapes.items()}


def facts(net: nn.Module) -> BackboneFacts:
    return describe(net, **FACTS)


def _own_backbone(net: nn.Module) -> dict[str, Any]:
    return {"state_dict": trunk(net), "facts": facts(net).as_dict()}


def _own_training(net: nn.Module) -> dict[str, Any]:
    query, key = trunk(net) | head(2), trunk(network(seed=1)) | head(2)
    queue = {"queue.features": torch.randn(32, 16), "queue.pointer": torch.zeros(1, dtype=torch.long)}
    model = under("encoder_q.", query) | under("encoder_k.", key) | queue
    return {"model": model, "trainer": {"iteration": 7}, "iteration": 7, "facts": facts(net).as_dict()}


def _moco_training(net: nn.Module, head_layers: int, wrapper: str = "module.") -> dict[str, Any]:
    query, key = trunk(net) | head(head_layers), trunk(network(seed=1)) | head(head_layers)
    state = under(f"{wrapper}encoder_q.", query) | under(f"{wrapper}encoder_k.", key)
    state |= {f"{wrapper}queue": torch.randn(16, 32), f"{wrapper}queue_ptr": torch.zeros(1, dtype=torch.long)}
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def _moco_released(net: nn.Module) -> dict[str, Any]:
    return {"epoch": 200, "arch": "resnet50", "state_dict": under("module.encoder_q.", trunk(net) | head(2))}


def _with_arguments(net: nn.Module) -> dict[str, Any]:
    # Forks store their command line, for which torch refuses weights_only.
    return {**_moco_training(net, 2), "args": argparse.Namespace(lr=0.03)}


def _no_counters(net: nn.Module) -> State:
    return {key: value for key, value in net.state_dict().items() if "num_batches_tracked" not in key}


@dataclass(frozen=True)
class Layout:
    """A form in which a source's files come, and what the conversion must say of it."""

    source: str
    build: Callable[[nn.Module], dict[str, Any]]
    origin: str
    dropped: int  # beside the 53 batch counters
    foreign: int = 0


LAYOUTS = {
    "own-backbone": Layout("moco_d2 backbone", _own_backbone, FACTS["origin"], 0),
    "own-training": Layout("moco_d2 training checkpoint", _own_training, FACTS["origin"], 6, 322),
    "moco-v1-training": Layout("MoCo", lambda net: _moco_training(net, 1), "MoCo v1", 4, 320),
    "moco-v2-training": Layout("MoCo", lambda net: _moco_training(net, 2), "MoCo v2", 6, 322),
    "moco-v2-no-module": Layout("MoCo", lambda net: _moco_training(net, 2, wrapper=""), "MoCo v2", 6, 322),
    "moco-v2-arguments": Layout("MoCo", _with_arguments, "MoCo v2", 6, 322),
    "moco-v2-released": Layout("MoCo", _moco_released, "MoCo v2", 4),
    "moco-cleaned": Layout("MoCo", lambda n: {"state_dict": under("module.encoder_q.", trunk(n))}, "MoCo v1 or v2", 0),
    "torchvision": Layout("torchvision ResNet", lambda net: dict(net.state_dict()), "torchvision", 2),
    "torchvision-nested": Layout(
        "torchvision ResNet",
        lambda net: {"epoch": 90, "state_dict": under("module.", net.state_dict())},
        "torchvision",
        2,
    ),
    "torchvision-old": Layout("torchvision ResNet", _no_counters, "torchvision", 2 - 53),
}

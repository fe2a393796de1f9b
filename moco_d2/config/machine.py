"""Keys whose values depend on the machine: paths with ``~`` and ``$VARIABLES``, and the device."""

from __future__ import annotations

import functools
import logging
import operator
import re
from collections.abc import Container, Mapping
from typing import Any

import torch
from detectron2.config import CfgNode

from moco_d2.config import roles
from moco_d2.io import paths

logger = logging.getLogger(__name__)

_PATHS_OF_A_DATA_SET = ("root", "json", "images", "split")  # keys of an entry of DATASETS.CUSTOM


def expand_paths(cfg: CfgNode) -> list[str]:
    """Expand the keys of ``roles.PATHS`` in place; return complaints about them and about environment variables."""
    problems = []
    for name in paths.VARIABLES:
        try:
            paths.expand_variable(name, "")
        except ValueError as error:
            problems.append(str(error))
    own = [entry.get("name") for entry in cfg.DATASETS.CUSTOM if isinstance(entry, Mapping)]
    for key in roles.PATHS:
        *groups, name = key.split(".")
        node = functools.reduce(operator.getitem, groups, cfg)
        try:
            node[name] = _expanded(node[name], own)
        except ValueError as error:
            problems.append(f"{key} is {node[name]!r}: {error}")
    return problems


def _expanded(value: Any, names: Container[Any]) -> Any:
    """Return a path, a list of paths or an entry of ``DATASETS.CUSTOM`` expanded; names of data sets are kept."""
    if isinstance(value, str):
        return value if value in names else paths.expand(value)
    if isinstance(value, Mapping):
        return {k: _expanded(v, ()) if k in _PATHS_OF_A_DATA_SET else v for k, v in value.items()}
    return type(value)(_expanded(item, names) for item in value) if isinstance(value, (list, tuple)) else value


def use_available_device(cfg: CfgNode) -> None:
    """Normalise ``MODEL.DEVICE`` in place to ``cpu``, ``cuda``, or ``cuda:N`` (one GPU of several).

    Upper case is accepted. On a machine without a GPU, every cuda device becomes the CPU, and the log says so.

    Raises:
        ValueError: it is another kind of device, or a GPU that this machine does not have.
    """
    asked = cfg.MODEL.DEVICE
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]+))?", str(asked).strip().lower())
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise ValueError(
            f"MODEL.DEVICE is {asked!r}; only NVIDIA GPUs and the CPU are supported: write cuda, cuda:N (one GPU of "
            "several) or cpu"
        )
    device, number = found[1], found[2]
    if device == "cuda" and not torch.cuda.is_available():
        logger.info("this machine has no GPU: MODEL.DEVICE is cpu")
        device = "cpu"
    if device == "cuda" and number is not None:
        if int(number) >= (count := torch.cuda.device_count()):
            last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
            raise ValueError(f"MODEL.DEVICE is {asked!r}, but this machine has {count} GPU(s): {last}")
        device = f"cuda:{int(number)}"
    cfg.MODEL.DEVICE = device

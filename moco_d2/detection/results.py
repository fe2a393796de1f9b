"""Results on disk: ``results.json``, which records what was measured and everything needed to compare it."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

import detectron2
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

import moco_d2
from moco_d2.config import flat
from moco_d2.config.roles import DETECTION, role
from moco_d2.detection.weights import WeightsRecord
from moco_d2.io.files import atomic_write
from moco_d2.io.provenance import provenance

logger = logging.getLogger(__name__)


def describe_result(
    cfg: CfgNode, metrics: Mapping[str, Any], libraries: Mapping[str, str], weights: WeightsRecord
) -> dict[str, Any]:
    """Return metrics with everything needed to compare them: protocol, weights, schedule, seed, machine, versions.

    Args:
        cfg: config that ran.
        metrics: ``{test set: {task: {metric: value}}}``.
        libraries: ``{test set: library that computed its metrics}``.
        weights: the weights that the detector started from.
    """
    solver = cfg.SOLVER
    engine = [key.removeprefix("ENGINE.") for key in flat(cfg) if key.startswith("ENGINE.") and role(key, DETECTION)]
    return {
        "protocol": cfg.PROTOCOL,
        "weights": {**weights.files(), "facts": weights.facts.as_dict()},
        "metrics": metrics,
        "schedule": {key: solver[key] for key in ("IMS_PER_BATCH", "BASE_LR", "STEPS", "MAX_ITER", "WARMUP_ITERS")},
        "evaluators": libraries,
        "engine": {key: cfg.ENGINE[key] for key in engine}
        | {"AMP": solver.AMP.ENABLED, "ACCUMULATE": solver.ACCUMULATE},
        "seed": cfg.SEED,
        "processes": comm.get_world_size(),
        "device": torch.cuda.get_device_name() if cfg.MODEL.DEVICE != "cpu" else "cpu",
        "versions": {m.__name__: m.__version__ for m in (moco_d2, detectron2, torch)},
        **provenance(),
    }


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically; see :func:`to_json`."""
    with atomic_write(path) as file:
        file.write(to_json(content))
    logger.info("wrote %s", path)


def to_json(content: Mapping[str, Any]) -> bytes:
    """Return content as JSON. NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_plain(content), indent=2, allow_nan=False).encode() + b"\n"


def _plain(value: Any) -> Any:
    """Convert numpy numbers, tuples and mappings to types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, int, str)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None

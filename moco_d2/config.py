"""The configuration: Detectron2's keys plus ours, the shipped files by name, and errors that name the nearest key.

One tree serves both stages. Pretraining reads ``SSL``, ``DATA``, ``SOLVER``, ``DATASETS.TRAIN`` and ``DATALOADER``;
detection is Detectron2's own.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as detectron2_get_cfg

from moco_d2.methods import default_args

# configs/ lies beside the package in a checkout, inside it once installed.
_CONFIG_ROOTS = (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")


def get_cfg() -> CN:
    """Return Detectron2's default config extended with this project's keys."""
    cfg = detectron2_get_cfg()

    # Name of the recipe (pretraining) or protocol (detector + data + schedule). It travels with the weights and into
    # every result; it says nothing about the initial weights.
    cfg.PROTOCOL = ""

    cfg.SSL = CN()
    # Name of the method, a key of moco_d2.methods.METHODS.
    cfg.SSL.METHOD = "MoCo"
    # Keyword arguments of the method's constructor. Its signature is the one place for names, defaults and meaning;
    # load_cfg() writes the defaults in, so that a dumped config states the whole recipe.
    cfg.SSL.ARGS = CN(new_allowed=True)
    cfg.SSL.ENCODER = CN()
    # A key of moco_d2.layers.resnet.ARCHITECTURES (torchvision's names).
    cfg.SSL.ENCODER.NAME = "resnet50"
    # Multiplier of every channel count: 1 is the paper's, 2 and 4 its wide networks, 0.25 is for quick runs.
    cfg.SSL.ENCODER.WIDTH = 1.0
    # "imagenet": 7x7 stride 2 and max-pool; "cifar": 3x3 stride 1, no pool (cannot be converted for detection).
    cfg.SSL.ENCODER.STEM = "imagenet"

    cfg.DATA = CN()
    # Augmentation recipe, a key of moco_d2.data.RECIPES. It also fixes the pixel mean and std.
    cfg.DATA.RECIPE = "moco_v2"
    # Side of a view in pixels.
    cfg.DATA.CROP_SIZE = 224

    # Pretraining length in epochs; 0 means SOLVER.MAX_ITER iterations. With epochs, SOLVER.STEPS counts epochs too and
    # the lr changes once an epoch, as the MoCo authors do; with iterations both count iterations.
    cfg.SOLVER.EPOCHS = 0
    # Pretraining lr schedule: "step" (times SOLVER.GAMMA at each of SOLVER.STEPS) or "cosine" (to 0). Detection uses
    # Detectron2's SOLVER.LR_SCHEDULER_NAME.
    cfg.SOLVER.SCHEDULE = "cosine"
    # Number of the first epoch in the cosine formula: 0 in MoCo's ImageNet code, 1 in the authors' CIFAR demo.
    cfg.SOLVER.FIRST_EPOCH = 0
    # Batch at which SOLVER.BASE_LR is meant. When SOLVER.IMS_PER_BATCH differs, pretraining uses
    # BASE_LR * IMS_PER_BATCH / REFERENCE_BATCH (the linear rule) and says so; 0 turns the rule off.
    cfg.SOLVER.REFERENCE_BATCH = 256
    # Pretraining keeps this many periodic checkpoints, the newest; 0 keeps all (330 MB each for MoCo's ResNet-50).
    cfg.SOLVER.CHECKPOINT_KEEP = 5
    return cfg


def load_cfg(config_file: str | os.PathLike[str] = "", opts: Sequence[str] = ()) -> CN:
    """Read a config file and command-line overrides into a complete config.

    Args:
        config_file: a path, or the name of a shipped config (see :func:`list_configs`); empty for the defaults.
        opts: ``KEY VALUE KEY VALUE ...``.

    Raises:
        ValueError: no such file, a key that does not exist, or a value of another type; each names the nearest choice.
    """
    cfg = get_cfg()
    if config_file:
        _merge(cfg, lambda: cfg.merge_from_file(str(config_path(config_file))), str(config_file))
    ssl_args = CN(default_args(cfg.SSL.METHOD))
    ssl_args.update(cfg.SSL.ARGS)
    cfg.SSL.ARGS = ssl_args
    if len(opts) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, but {len(opts)} words were given: {' '.join(opts)}")
    _merge(cfg, lambda: cfg.merge_from_list(list(opts)), "the command line")
    return cfg


def list_configs() -> list[str]:
    """Return the names of the shipped configs (``Pretrain/moco_v2_R50_200ep``), without those that are only parts."""
    root = _config_root()
    names = (str(path.relative_to(root).with_suffix("")) for path in sorted(root.rglob("*.yaml")))
    return [name for name in names if not name.startswith("Base/")]


def config_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a config given its path or its shipped name, with or without ``configs/`` and ``.yaml``.

    Raises:
        ValueError: there is none; the message lists the nearest shipped names.
    """
    if Path(name).is_file():
        return Path(name)
    short = str(name).removeprefix("configs/").removesuffix(".yaml")
    shipped = _config_root() / f"{short}.yaml"
    if shipped.is_file():
        return shipped
    names = list_configs()
    near = difflib.get_close_matches(short, names, n=3, cutoff=0.4) or names
    raise ValueError(f"no config file {str(name)!r}, neither as a path nor by name; nearest: {', '.join(near)}")


def _config_root() -> Path:
    for root in _CONFIG_ROOTS:
        if (root / "Base").is_dir():
            return root
    raise FileNotFoundError(f"the shipped configs are missing; looked in {', '.join(map(str, _CONFIG_ROOTS))}")


def _merge(cfg: CN, merge: Any, source: str) -> None:
    """Run a yacs merge; turn its errors into ones that name the key, the rule and the nearest key."""
    try:
        merge()
    except (KeyError, AssertionError) as error:
        message = str(error.args[0]) if error.args else str(error)
        if "Non-existent" not in message:
            raise ValueError(f"{source}: {message}") from error
        key = message.split(":")[-1].strip()
        near = difflib.get_close_matches(key, list(_keys(cfg)), n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"{source}: no config key {key}{hint}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _keys(cfg: CN, prefix: str = "") -> Iterator[str]:
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")

"""Shipped configs: their names, their files, and the suffix of a name that chooses how a detector is initialised."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from moco_d2.io import paths

# configs/ lies beside the package in a checkout, inside it once installed.
_ROOTS = (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs")

# What a detector is initialised from, and the suffix of a config's name for it.
INITS = {"moco": "", "supervised": "_supervised", "random": "_random"}

_YAML = (".yaml", ".yml")


def list_configs() -> list[str]:
    """Return the names of the shipped configs (``Pretrain/moco_v2_R50_200ep``), without the parts in ``Base/``."""
    root = _root()
    names = (str(path.relative_to(root).with_suffix("")) for path in sorted(root.rglob("*.yaml")))
    return [name for name in names if not name.startswith(("Base/", "Sweeps/"))]


def sweep_file(name: str) -> Path:
    """Return the file of a sweep.

    Args:
        name: a path, or the name of a file in ``configs/Sweeps``.

    Raises:
        ValueError: there is no such file or name; the message lists the names.
    """
    shipped = {path.stem: path for path in sorted((_root() / "Sweeps").glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name not in shipped:
        raise ValueError(f"no sweep {name!r}, neither as a path nor by name; the names are {', '.join(shipped)}")
    return shipped[name]


def config_files(name: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a config, in the order in which they are merged.

    Args:
        name: a path, or a shipped name (see :func:`shipped_files`); either may have the suffix of an init.

    Raises:
        ValueError: there is no such file or name; the message lists the nearest shipped names.
    """
    try:
        name = paths.expand(os.fspath(name))
    except ValueError as error:
        raise ValueError(f"the config file {str(name)!r}: {error}") from error
    if Path(name).is_file():
        return [Path(name)]
    if files := shipped_files(name) or own_files(name):
        return files
    near = difflib.get_close_matches(_short(name), list_configs(), n=3, cutoff=0.4)
    names = f"nearest: {', '.join(near)}" if near else "configs/README.md lists the names"
    raise ValueError(f"no config file {name!r}, neither as a path nor by name; {names}")


def shipped_files(name: str) -> list[Path]:
    """Return the files of a shipped config, or an empty list if the name is not one.

    Args:
        name: with or without ``configs/`` and ``.yaml``. A detector's name may end in ``_supervised`` or ``_random``:
            then the files are the config and the init of that suffix.
    """
    root, short = _root(), _short(name)
    if (root / f"{short}.yaml").is_file():
        return [root / f"{short}.yaml"]
    stem, _, init = short.rpartition("_")
    if init in INITS and (root / f"{stem}.yaml").is_file() and not stem.startswith(("Base/", "Pretrain/")):
        return [root / f"{stem}.yaml", root / "Base" / f"init-{init}.yaml"]
    return []


def own_files(name: str) -> list[Path]:
    """Return the files of a path with the suffix of an init: ``mine_random.yaml`` is ``mine.yaml`` with random weights.

    The list is empty if there is no ``mine.yaml``.
    """
    path = Path(name) if name.endswith(_YAML) else Path(f"{name}.yaml")
    stem, _, init = path.stem.rpartition("_")
    if not stem or init not in INITS:
        return []
    own = path.with_name(f"{stem}{path.suffix}")
    return [own, _root() / "Base" / f"init-{init}.yaml"] if own.is_file() else []


def with_init(name: str, init: str) -> str:
    """Return the name of a config, or the path of a file, with the suffix that chooses an init."""
    end = next((end for end in _YAML if name.endswith(end)), "")
    return f"{name.removesuffix(end)}{INITS[init]}{end}"


def _short(name: str) -> str:
    return name.removeprefix("configs/").removesuffix(".yaml")


def _root() -> Path:
    for root in _ROOTS:
        if (root / "Base").is_dir():
            return root
    raise FileNotFoundError(f"the shipped configs are missing; looked in {', '.join(map(str, _ROOTS))}")

"""Paths with ``~`` and ``$VARIABLES``, expanded alike in config keys, arguments and environment variables."""

from __future__ import annotations

import os
import re
from pathlib import Path

# Environment variables whose value is a path of ours, or of Detectron2's.
VARIABLES = ("DETECTRON2_DATASETS", "MOCO_D2_CACHE", "MOCO_D2_CATALOG")

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})", re.ASCII)


def expand(path: str) -> str:
    """Return a path with ``~`` and ``$VARIABLES`` expanded as in a shell.

    Addresses (``https://...``, ``moco-d2://...``) are returned unchanged, and so is the path of an existing file with a
    ``$`` in its name.

    Raises:
        ValueError: a variable is not set, or a user does not exist; the message names it.
    """
    if "://" in path:
        return path
    expanded = os.path.expanduser(path)
    if path.startswith("~") and expanded == path:
        raise ValueError(f"there is no home folder for {path.partition('/')[0]!r}; write the full path")
    if os.path.lexists(expanded):
        return expanded
    for plain, braced in _VARIABLE.findall(expanded):
        if (plain or braced) not in os.environ:
            raise ValueError(f"the environment variable {plain or braced} is not set")
    return _VARIABLE.sub(lambda found: os.environ[found[1] or found[2]], expanded)


def expand_variable(name: str, default: str) -> str:
    """Return the path in an environment variable, or the default if it is empty or not set.

    Raises:
        ValueError: see :func:`expand`; the message names the variable.
    """
    path = os.environ.get(name) or default
    try:
        return expand(path)
    except ValueError as error:
        raise ValueError(f"{name} is {path!r}: {error}") from error


def expand_datasets_root() -> None:
    """Expand ``$DETECTRON2_DATASETS`` in place. Detectron2 reads it when its data sets are imported, so call it before.

    If it cannot be expanded, it stays as it is, and :func:`moco_d2.config.load_cfg` reports why.
    """
    root = os.environ.get(VARIABLES[0])
    if root:
        try:
            os.environ[VARIABLES[0]] = expand(root)
        except ValueError:
            return


def cache_folder(variable: str = "XDG_CACHE_HOME", default: str = "~/.cache") -> Path:
    """Return this project's cache folder: ``MOCO_D2_CACHE``, else ``moco_d2`` in the folder that ``variable`` names.

    Listings and remote shards are in the user's cache folder, converted weights in Detectron2's.

    Raises:
        ValueError: see :func:`expand_variable`.
    """
    if own := expand_variable("MOCO_D2_CACHE", ""):
        return Path(own)
    if not os.environ.get(variable) and os.path.expanduser(default) == default:
        return Path(os.devnull, "moco_d2")  # a user without a home folder: writing there gives an error with its remedy
    return Path(expand_variable(variable, default), "moco_d2")

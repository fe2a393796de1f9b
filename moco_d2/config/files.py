"""A config file and its ``_BASE_`` files: plain values only, each key once."""

from __future__ import annotations

import ast
import contextlib
import io
import os
from collections.abc import Hashable
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2.config import CfgNode

from moco_d2.config.keys import RENAMED
from moco_d2.config.shipped import list_configs, own_files, shipped_files
from moco_d2.config.values import canonical
from moco_d2.io import paths
from moco_d2.messages import did_you_mean


def read_config_file(path: str, source: str) -> dict[str, Any]:
    """Return the keys of a config file and of its ``_BASE_`` files. Reading them runs no code.

    Detectron2's own reader does run code: a YAML tag can name any function, and configs come with strangers' weights.
    A ``_BASE_`` may be a path, with ``~`` and ``$VARIABLES``, or the name of a shipped config.

    Args:
        path: the file.
        source: how the user named it, for messages.

    Raises:
        ValueError: the file is not a YAML mapping, asks for code or has a key twice, or a ``_BASE_`` is missing or
            leads back to the file.
    """
    try:
        keys = _Reader.load_yaml_with_base(path)
    except _FileError as error:
        raise ValueError(f"{source}: {error}") from error
    except yaml.constructor.ConstructorError as error:
        place = _line(error.problem_mark) if error.problem_mark else "a line"
        what = f"{place} asks for code, but a config may contain plain values only: write the value itself"
        raise ValueError(f"{source}: {what} ({error.problem})") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source}: the file, or one of its _BASE_ files, is empty or has no keys") from error
    except RecursionError as error:
        raise ValueError(f"{source}: a _BASE_ leads back to the file itself") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: cannot be read: {error}; save it as text in UTF-8") from error
    except (yaml.YAMLError, OSError, AssertionError) as error:
        raise ValueError(f"{source}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(keys, dict):
        raise ValueError(f"{source}: contains a {type(keys).__name__}; it must contain keys with values")
    for group, parts in keys.items():
        if group in ("DATASETS", "ENGINE") and isinstance(parts, dict):
            keys[group] = {name: as_read(f"{group}.{name}", value) for name, value in parts.items()}
    return keys


def as_read(key: str, value: Any) -> Any:
    """Return the value that a key gets from what a file or the command line says.

    ``DATASETS.TRAIN`` and ``TEST`` may be one name instead of a list of names, ``ENGINE.COMPILE`` True or False.
    """
    value = canonical(key, value)
    if key not in ("DATASETS.TRAIN", "DATASETS.TEST") or not isinstance(value, str) or not value:
        return value
    with contextlib.suppress(ValueError, SyntaxError):  # as yacs reads it
        literal = ast.literal_eval(value)
        return literal if isinstance(literal, list | tuple) else (literal if isinstance(literal, str) else value,)
    return (value,)


def with_present_names(tree: Any) -> Any:
    """Return a file's keys, those that had another name in earlier versions under their present name.

    Raises:
        ValueError: a key is there under both names.
    """
    for old, new in RENAMED.items() if isinstance(tree, dict) else ():
        *groups, name = old.split(".")
        group: Any = tree
        for key in groups:
            group = group.get(key) if isinstance(group, dict) else None
        if not isinstance(group, dict) or name not in group:
            continue
        value, target = group.pop(name), tree
        *groups, name = new.split(".")
        for key in groups:
            target = target.setdefault(key, {})
        if name in target:
            raise _FileError(f"{old} is the earlier name of {new}, and both are set: keep {new} only")
        target[name] = value
    return tree


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1} of {mark.name}"


class _FileError(ValueError):
    """A mapping has a key twice, or a ``_BASE_`` cannot be found."""


class _Loader(yaml.SafeLoader):
    """Reads plain values, and refuses a key that appears twice: YAML would silently keep the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    where = _line(key_node.start_mark)
                    raise _FileError(f"the key {key} appears twice, again in {where}: merge the two, or YAML drops one")
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


class _Reader(CfgNode):
    """Detectron2's merging of ``_BASE_`` files, on files that are opened and checked here."""

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        with super()._open_cfg(filename) as file:
            content = with_present_names(_Loader(file).get_single_data())
        if isinstance(content, dict) and "_BASE_" in content:
            bases = content["_BASE_"] if isinstance(content["_BASE_"], list) else [content["_BASE_"]]
            content["_BASE_"] = [path for base in bases for path in _base_files(base, filename)]
        return io.StringIO(yaml.safe_dump(content, sort_keys=False))


def _base_files(base: Any, filename: str) -> list[str]:
    """Return the files that an entry of ``_BASE_`` names."""
    if not isinstance(base, str):
        raise _FileError(f"_BASE_ is {base!r}; it must be a path, the name of a shipped config, or a list of these")
    try:
        path = paths.expand(base)
    except ValueError as error:
        raise _FileError(f"_BASE_ is {base!r}: {error}") from error
    beside = Path(filename).parent / path
    if "://" in path or beside.is_file():
        return [path]
    if not (files := shipped_files(path) or own_files(os.path.abspath(beside))):
        raise _FileError(
            f"_BASE_ is {base!r}: there is no such file relative to the config, and no shipped config of this name"
            + did_you_mean(path.removesuffix(".yaml"), list_configs(), most=3)
        )
    return [str(file) for file in files]

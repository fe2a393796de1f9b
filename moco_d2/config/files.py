"""Reading a config file and its ``_BASE_`` files: plain values only, each key once."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import IO, Any

import yaml
from detectron2.config import CfgNode

from moco_d2.config.keys import RENAMED
from moco_d2.io import paths


def read_config_file(path: str, source: str, shipped: Callable[[str], Path | None]) -> dict[str, Any]:
    """Return the keys of a config file and of its ``_BASE_`` files, which may not run anything.

    Detectron2's own reading would: a YAML tag can name any function. Configs come beside weights from strangers.

    Args:
        path: the file.
        source: how the user named it, for messages.
        shipped: returns the file of a shipped config by its name: a ``_BASE_`` may be one, as ``--config-file`` may.

    Raises:
        ValueError: it is no YAML mapping, asks for code or has a key twice, or a ``_BASE_`` is missing or its own.
    """

    class Reader(_Reader):
        known = staticmethod(shipped)

    try:
        given = Reader.load_yaml_with_base(path)
    except _FileError as error:
        raise ValueError(f"{source}: {error}") from error
    except yaml.constructor.ConstructorError as error:
        what = f"only plain values are read, and {_place(error)} asks for code: write there what it stands for"
        raise ValueError(f"{source}: {what} ({error.problem})") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{source}: it, or a _BASE_ of it, is empty or no mapping, or _BASE_ is no path") from error
    except RecursionError as error:
        raise ValueError(f"{source}: a _BASE_ leads back to the file itself") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: cannot be read: {error}; save it as text in UTF-8") from error
    except (yaml.YAMLError, OSError, AssertionError) as error:
        raise ValueError(f"{source}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(given, dict):
        raise ValueError(f"{source}: holds a {type(given).__name__}, not keys with values")
    return given


def with_present_names(tree: Any) -> Any:
    """Return a file's keys with those that had another name in earlier versions under their present one.

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
            raise _FileError(f"{old} is the earlier name of {new}, which is there, too: keep one of them")
        target[name] = value
    return tree


def _place(error: yaml.MarkedYAMLError) -> str:
    return _line(error.problem_mark) if error.problem_mark else "a line"


def _line(mark: yaml.Mark) -> str:
    return f"line {mark.line + 1} of {mark.name}"


class _FileError(ValueError):
    """A mapping has a key twice, or a ``_BASE_`` cannot be found."""


class _Loader(yaml.SafeLoader):
    """Reads plain values. Of two equal keys YAML keeps the last, and nobody would hear of the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key_node.tag != "tag:yaml.org,2002:merge":
                if key in seen:
                    where = _line(key_node.start_mark)
                    raise _FileError(
                        f"the key {key} is there twice, again in {where}; the first would be lost: join the two"
                    )
                seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return mapping


class _Reader(CfgNode):
    """Reads config files whose ``_BASE_`` may hold ``~`` and ``$VARIABLES``, or be the name of a shipped config."""

    known: Callable[[str], Path | None]

    @classmethod
    def _open_cfg(cls, filename: str) -> IO[str]:
        with super()._open_cfg(filename) as file:
            content = with_present_names(_Loader(file).get_single_data())
        base = content.get("_BASE_") if isinstance(content, dict) else None
        if isinstance(base, str):
            content["_BASE_"] = cls._found(base, filename)
        elif isinstance(base, list):
            content["_BASE_"] = [cls._found(one, filename) if isinstance(one, str) else one for one in base]
        return io.StringIO(yaml.safe_dump(content, sort_keys=False))

    @classmethod
    def _found(cls, base: str, filename: str) -> str:
        try:
            path = paths.expand(base)
        except ValueError as error:
            raise _FileError(f"_BASE_ is {base!r}: {error}") from error
        if "://" in path or Path(filename).parent.joinpath(path).is_file():
            return path
        known = cls.known(path)
        if known is None:
            raise _FileError(
                f"_BASE_ is {base!r}: No such file or directory from where the config is, and no shipped config's name"
            )
        return str(known)

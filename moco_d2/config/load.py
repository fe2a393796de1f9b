"""Reading a config: shipped files by name, overrides, and errors that name the nearest key."""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import itertools
import logging
import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config.compat import guess_version

from moco_d2.config import roles
from moco_d2.config.files import read_config_file, with_present_names
from moco_d2.config.keys import RENAMED, get_cfg
from moco_d2.config.values import mistyped, wrong_type
from moco_d2.io import paths
from moco_d2.layers.encoders import ENCODERS, encoder_args
from moco_d2.messages import did_you_mean
from moco_d2.methods import METHODS, default_args

logger = logging.getLogger(__name__)

# configs/ lies beside the package in a checkout, inside it once installed.
_CONFIG_ROOTS = (Path(__file__).parents[2] / "configs", Path(__file__).parents[1] / "configs")

# Where a detector starts, and the suffix that says so in a config's name.
INITS = {"moco": "", "supervised": "_supervised", "random": "_random"}


def load_cfg(
    config_file: str | os.PathLike[str] = "",
    opts: Sequence[str] = (),
    check: Callable[[CN], Iterable[str]] | None = None,
    stage: str = "",
) -> CN:
    """Read a config file and command-line overrides into a complete config.

    ``~`` and ``$VARIABLES`` are expanded in every key that is a path (:data:`moco_d2.config.roles.PATHS`).

    Args:
        config_file: a path, or the name of a shipped config (see :func:`list_configs`), of a detector's with the suffix
            ``_supervised`` or ``_random`` for another init; empty for the defaults.
        opts: ``KEY VALUE KEY VALUE ...``.
        check: names what else is wrong with a config; asked where something is, so that a user hears all at once.
        stage: ``roles.PRETRAINING`` or ``roles.DETECTION`` where a run is to follow: keys that it would ignore are
            refused. Empty where a config is only looked at.

    Raises:
        ValueError: no such file, or keys that do not exist and values of another type: all of a file, or all of the
            overrides, each with the rule and the nearest key; or keys that differ from their default and do nothing.
    """
    cfg = get_cfg()
    opts = [RENAMED.get(word, word) if place % 2 == 0 else word for place, word in enumerate(opts)]
    stated: set[str] = set()
    for path in config_files(config_file) if config_file else ():
        stated |= _merge_file(cfg, str(path), str(config_file))
    if len(opts) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, but {len(opts)} words were given: {' '.join(opts)}")
    _set_arguments(cfg, dict(zip(opts[::2], opts[1::2], strict=True)))
    # A file may be completed by the command line, and what it turns on be turned off there: its own keys do nothing if
    # they do nothing in the file, and still nothing in the end.
    asked = {key for key in stated if stage and roles.turned_off(key, stage, flat(cfg), _defaults(cfg))}
    problems = _merge_words(cfg, opts)
    problems += _expand_paths(cfg)
    if stage:
        problems += [*mistyped_keys(cfg, stage).values(), *unread_keys(cfg, stage, asked | set(opts[::2]))]
    if problems:
        raise ValueError("\n".join(dict.fromkeys([*problems, *(check(cfg) if check else ())])))
    return cfg


def unread_keys(cfg: CN, stage: str, asked: Container[str] = ()) -> list[str]:
    """Return complaints about keys that differ from their default and that a stage ignores; see ``roles.unread``."""
    return list(roles.unread(stage, flat(cfg), _defaults(cfg), asked))


def mistyped_keys(cfg: CN, stage: str) -> dict[str, str]:
    """Return complaints about the keys that a stage reads and whose values cannot be; see ``settings.mistyped``."""
    return dict(mistyped(stage, flat(cfg), flat(get_cfg())))


def _set_arguments(cfg: CN, overrides: Mapping[str, Any]) -> None:
    """Set method and encoder as the overrides name them, and fill their arguments with defaults."""
    method = str(overrides.get("SSL.METHOD", cfg.SSL.METHOD))
    if method != cfg.SSL.METHOD:  # the file's arguments are those of its own method
        cfg.SSL.METHOD, cfg.SSL.ARGS = method, CN(new_allowed=True)
    defaults = default_args(method) if method in METHODS else {}
    cfg.SSL.ARGS = CN({**defaults, **cfg.SSL.ARGS})

    encoder = cfg.SSL.ENCODER
    name, before = str(overrides.get("SSL.ENCODER.NAME", encoder.NAME)), _encoder_defaults(encoder.NAME)
    if name not in ENCODERS:  # nobody knows its arguments: preflight refuses the name
        encoder.NAME = name
        return
    defaults = _encoder_defaults(name)
    # Encoders share arguments; of the file's, those that only its own encoder has are left out.
    stated = {key: value for key, value in encoder.ARGS.items() if key in defaults or key not in before}
    encoder.NAME, encoder.ARGS = name, CN({**defaults, **stated})


def _encoder_defaults(name: str) -> dict[str, Any]:
    return encoder_args(name) if name in ENCODERS else {}


def _defaults(cfg: CN) -> dict[str, Any]:
    """Return the default of every key, arguments of the config's method and encoder included."""
    default = get_cfg()
    method = cfg.SSL.METHOD if cfg.SSL.METHOD in METHODS else default.SSL.METHOD
    default.SSL.ARGS = CN(default_args(method))
    default.SSL.ENCODER.ARGS = CN(_encoder_defaults(cfg.SSL.ENCODER.NAME))
    return flat(default)


def _expand_paths(cfg: CN) -> list[str]:
    """Expand the keys that are paths, and return what is wrong with them and with the environment's paths."""
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
    """Return a path, list of paths or data set with paths expanded; names of data sets are none."""
    if isinstance(value, str):
        return value if value in names else paths.expand(value)
    if isinstance(value, Mapping):  # an entry of DATASETS.CUSTOM
        parts = ("root", "json", "images", "split")
        return {k: _expanded(v, ()) if k in parts else v for k, v in value.items()}
    return type(value)(_expanded(item, names) for item in value) if isinstance(value, (list, tuple)) else value


def use_device_there_is(cfg: CN) -> None:
    """Write ``MODEL.DEVICE`` as the rest of the project reads it: ``cpu``, ``cuda``, or ``cuda:N``, one GPU of several.

    Letters may be of either case. Where there is no GPU, every cuda device becomes the CPU, and the log says so.

    Raises:
        ValueError: it is another device, or a GPU that is not there.
    """
    asked = cfg.MODEL.DEVICE
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]+))?", str(asked).strip().lower())
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise ValueError(
            f"MODEL.DEVICE is {asked!r}; this project computes on a GPU of NVIDIA's or on the CPU: write cuda, cuda:N "
            "for one GPU of several, or cpu"
        )
    device, number = found[1], found[2]
    if device == "cuda" and not torch.cuda.is_available():
        logger.info("no GPU here: MODEL.DEVICE is cpu")
        device = "cpu"
    if device == "cuda" and number is not None:
        if int(number) >= (count := torch.cuda.device_count()):
            last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
            raise ValueError(f"MODEL.DEVICE is {asked!r}, but this machine has {count} GPU(s): {last}")
        device = f"cuda:{int(number)}"
    cfg.MODEL.DEVICE = device


def list_configs() -> list[str]:
    """Return the names of the shipped configs (``Pretrain/moco_v2_R50_200ep``), without those that are only parts."""
    root = _config_root()
    names = (str(path.relative_to(root).with_suffix("")) for path in sorted(root.rglob("*.yaml")))
    return [name for name in names if not name.startswith("Base/")]


def config_files(name: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a config, to be merged in this order.

    Args:
        name: a path, or a shipped name with or without ``configs/`` and ``.yaml``. A detector's may end in the suffix
            of an init (``_supervised``, ``_random``) for which there is no file: then it is config and init, two files.

    Raises:
        ValueError: there is none; the message lists the nearest shipped names.
    """
    try:
        name = paths.expand(os.fspath(name))
    except ValueError as error:
        raise ValueError(f"the config file {str(name)!r}: {error}") from error
    if Path(name).is_file():
        return [Path(name)]
    root = _config_root()
    short = str(name).removeprefix("configs/").removesuffix(".yaml")
    if (root / f"{short}.yaml").is_file():
        return [root / f"{short}.yaml"]
    stem, _, init = short.rpartition("_")
    if init in INITS and (root / f"{stem}.yaml").is_file() and not stem.startswith(("Base/", "Pretrain/")):
        return [root / f"{stem}.yaml", root / "Base" / f"init-{init}.yaml"]
    near = difflib.get_close_matches(short, list_configs(), n=3, cutoff=0.4)
    names = f"nearest: {', '.join(near)}" if near else "configs/README.md lists the names"
    raise ValueError(f"no config file {str(name)!r}, neither as a path nor by name; {names}")


def _shipped(name: str) -> Path | None:
    """Return the one file of a shipped config, by its name, if it is one."""
    short = name.removeprefix("configs/").removesuffix(".yaml")
    path = _config_root() / f"{short}.yaml"
    return path if path.is_file() else None


def _config_root() -> Path:
    for root in _CONFIG_ROOTS:
        if (root / "Base").is_dir():
            return root
    raise FileNotFoundError(f"the shipped configs are missing; looked in {', '.join(map(str, _CONFIG_ROOTS))}")


def _merge_file(cfg: CN, path: str, source: str) -> set[str]:
    """Merge a config file, and return the keys that it states itself, beside those of its ``_BASE_`` files.

    A file that states most keys is a run's ``config.yaml``, which nobody wrote: of that, none.
    """
    given = read_config_file(path, source, _shipped)
    keys = flat(given)
    try:
        new = CN(given)
        if (new.get("VERSION") or guess_version(new, path)) == cfg.VERSION:
            cfg.merge_from_other_cfg(new)
        else:  # Detectron2 converts files of its first version.
            cfg.merge_from_file(path, allow_unsafe=False)
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        problems = [*itertools.chain.from_iterable(_merge_one(cfg, key, value) for key, value in keys.items())]
        problems = list(dict.fromkeys(problems)) or [str(error)]
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems)) from error
    own = flat(with_present_names(yaml.safe_load(Path(path).read_text())))
    return set(own) if len(own) < len(flat(cfg)) / 2 else set()


def _merge_words(cfg: CN, opts: Sequence[str]) -> list[str]:
    """Set overrides, and return what is wrong with those that cannot be."""
    words = _whole_floats(cfg, opts)
    pairs = zip(words[::2], words[1::2], strict=True)
    problems = itertools.chain.from_iterable(_merge_one(cfg, key, value) for key, value in pairs)
    return [f"the command line: {problem}" for problem in problems]


def _merge_one(cfg: CN, key: str, value: Any) -> Iterator[str]:
    """Set a key, or yield what is wrong with it or its value, in plainer words than yacs'."""
    keys = dict(_keys(cfg))
    group = keys.get(key.rpartition(".")[0])
    if isinstance(group, CN) and group.is_new_allowed():
        return
    if isinstance(group, list):
        yield f"{key.rpartition('.')[0]} is a mapping; it must be a list, as {group!r} is"
        return
    if key not in keys:
        yield f"no config key {key}{did_you_mean(key, keys, most=3)}"
        return
    try:
        cfg.merge_from_list([key, value])
    except (AssertionError, ValueError):
        with contextlib.suppress(ValueError, SyntaxError):  # as yacs reads it
            value = ast.literal_eval(value) if isinstance(value, str) else value
        yield wrong_type(key, value, keys[key])


def _whole_floats(cfg: CN, opts: Sequence[str]) -> list[str]:
    """Return overrides in which a whole number for a key of type float (``WEIGHT_DECAY 0``) is one, too."""
    values = flat(cfg)
    words = list(opts)
    for i in range(0, len(words), 2):
        if isinstance(values.get(words[i]), float) and str(words[i + 1]).removeprefix("-").isdecimal():
            words[i + 1] = f"{words[i + 1]}.0"
    return words


def _keys(cfg: CN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        yield prefix + key, value
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the leaves of a config, or of any tree of mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves

"""Reading a config: files, command-line overrides, and errors that name the nearest key."""

from __future__ import annotations

import ast
import contextlib
import itertools
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode as CN
from detectron2.config.compat import guess_version

from moco_d2.config import roles
from moco_d2.config.files import as_read, read_config_file, with_present_names
from moco_d2.config.keys import RENAMED, get_cfg
from moco_d2.config.machine import expand_paths
from moco_d2.config.shipped import config_files
from moco_d2.config.values import mistyped, wrong_type
from moco_d2.layers.encoders import ENCODERS, encoder_args
from moco_d2.messages import did_you_mean
from moco_d2.methods import METHODS, default_args


def load_cfg(
    config_file: str | os.PathLike[str] = "",
    opts: Sequence[str] = (),
    check: Callable[[CN], Iterable[str]] | None = None,
    stage: str = "",
) -> CN:
    """Read a config file and command-line overrides into a complete config.

    ``~`` and ``$VARIABLES`` are expanded in every key that is a path (:data:`moco_d2.config.roles.PATHS`).

    Args:
        config_file: a path, or the name of a shipped config (see :func:`list_configs`); a detector's with the suffix
            ``_supervised`` or ``_random`` (``mine_random.yaml``) for another init; empty for the defaults.
        opts: ``KEY VALUE KEY VALUE ...``.
        check: returns further complaints about a config. It is called only if there is a complaint already, so that a
            user sees all of them at once.
        stage: ``roles.PRETRAINING`` or ``roles.DETECTION`` if a run follows: keys that it would ignore are refused.
            Empty to look at a config only.

    Raises:
        ValueError: there is no such file; or keys do not exist, have a value of another type, or differ from their
            default and have no effect. The message has a line for each of them, with the rule and the nearest key.
    """
    cfg = get_cfg()
    opts = [RENAMED.get(word, word) if place % 2 == 0 else word for place, word in enumerate(opts)]
    stated: set[str] = set()
    for path in config_files(config_file) if config_file else ():
        stated |= _merge_file(cfg, str(path), str(config_file))
    if len(opts) % 2:
        late = next((word for word in opts if word.startswith("--")), "")
        advice = f"put the option {late} before the first of them" if late else f"there are {len(opts)} words"
        raise ValueError(f"overrides come in pairs KEY VALUE, but {advice}: {' '.join(opts)}")
    _set_arguments(cfg, dict(zip(opts[::2], opts[1::2], strict=True)))
    # A key of the file is refused only if it has no effect both before and after the overrides: the command line may
    # turn on what a key belongs to, or turn it off.
    asked = {key for key in stated if stage and roles.turned_off(key, stage, flat(cfg), _defaults(cfg))}
    problems = _merge_words(cfg, opts)
    problems += expand_paths(cfg)
    if stage:
        problems += [*mistyped_keys(cfg, stage).values(), *unread_keys(cfg, stage, asked | set(opts[::2]))]
    if problems:
        raise ValueError("\n".join(dict.fromkeys([*problems, *(check(cfg) if check else ())])))
    return cfg


def unread_keys(cfg: CN, stage: str, asked: Container[str] = ()) -> list[str]:
    """Return complaints about set keys that a stage ignores; see ``roles.unread``."""
    return list(roles.unread(stage, flat(cfg), _defaults(cfg), asked))


def mistyped_keys(cfg: CN, stage: str) -> dict[str, str]:
    """Return ``{key: complaint}`` for the keys that a stage reads and whose value has a wrong type or is not finite."""
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
    if name not in ENCODERS:  # its arguments are unknown: preflight refuses the name
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


def settings(cfg: CN, stage: str, role: str) -> dict[str, Any]:
    """Return ``{key: value}`` of the keys that have a role in a stage and are not turned off by another key.

    ``settings(cfg, PRETRAINING, RECIPE)`` is what a pretraining's weights follow from, besides the seed.
    """
    values, defaults = flat(cfg), _defaults(cfg)
    return {
        key: value
        for key, value in values.items()
        if key in defaults and roles.role(key, stage) == role
        if not roles.turned_off(key, stage, values, defaults)
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the leaves of a config, or of any tree of mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


def _merge_file(cfg: CN, path: str, source: str) -> set[str]:
    """Merge a config file, and return the keys that the file itself sets, without those of its ``_BASE_`` files.

    The set is empty for a file that sets most keys: it is a run's ``config.yaml``, in which a user chose no key.
    """
    content = read_config_file(path, source)
    keys = flat(content)
    try:
        new = CN(content)
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
    """Set overrides, and return complaints about those that cannot be set."""
    words = _as_floats(cfg, opts)
    pairs = [(key, as_read(key, value)) for key, value in zip(words[::2], words[1::2], strict=True)]
    problems = itertools.chain.from_iterable(_merge_one(cfg, key, value) for key, value in pairs)
    return [f"the command line: {problem}" for problem in problems]


def _merge_one(cfg: CN, key: str, value: Any) -> Iterator[str]:
    """Set a key, or yield a complaint about it or its value, in plainer words than those of yacs."""
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


def _as_floats(cfg: CN, opts: Sequence[str]) -> list[str]:
    """Return overrides with whole numbers written as floats (``WEIGHT_DECAY 0``) for keys whose type is float."""
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

"""Downstream protocols by name: config, paper row, evidence, published figures; and the pretraining recipes.

``python -m moco_d2.model_zoo`` prints the protocols as the Markdown tables of ``docs/configs.md``, then the recipes.
The data are in ``model_zoo.yaml``, the only place for published detection figures, and in the configs.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from moco_d2.config import INITS, flat, list_configs, load_cfg, roles
from moco_d2.exits import guard


@dataclass(frozen=True)
class Published:
    """One published result of a protocol.

    Attributes:
        init: ``random``, ``supervised``, or the name of a pretraining recipe, as in the facts of converted weights.
        label: the init in words.
        metrics: ``{"bbox/AP": 55.9, ...}`` in percent.
        std: published standard deviation over trials of some metrics, in points.
        trials: number of trials that the figures are a mean of.
        source: of the figures.
    """

    init: str
    label: str
    metrics: Mapping[str, float]
    std: Mapping[str, float]
    trials: int
    source: str


@dataclass(frozen=True)
class Protocol:
    """A downstream evaluation: detector, data and schedule. The initial weights are not part of it.

    Attributes:
        name: recorded in every result.
        config: the shipped config.
        paper: the published row that it reproduces, or ``none``.
        evidence: the source of its values.
        published: the row's figures.
    """

    name: str
    config: str
    paper: str
    evidence: str
    published: tuple[Published, ...]


def list_protocols() -> list[str]:
    """Return the names of the published protocols, followed by those of the quick schedules."""
    return list(_protocols())


def get_protocol(name: str) -> Protocol:
    """Return a protocol by name.

    Raises:
        ValueError: it does not exist; the message lists at most three similar names.
    """
    protocols = _protocols()
    if name not in protocols:
        near = difflib.get_close_matches(name, protocols, n=3, cutoff=0.4)
        names = f"nearest: {', '.join(near)}" if near else "docs/configs.md lists the names"
        raise ValueError(f"no protocol {name!r}; {names}")
    return protocols[name]


def get_config(name: str, init: str = "moco", opts: Sequence[str] = ()) -> CfgNode:
    """Return the config of a protocol.

    Args:
        name: of the protocol.
        init: the initialisation: ``moco`` (torchvision's input conventions; set ``MODEL.WEIGHTS`` in addition),
            ``supervised`` or ``random``.
        opts: ``KEY VALUE KEY VALUE ...``.

    Raises:
        ValueError: no such protocol or init, or see :func:`moco_d2.config.load_cfg`.
    """
    if init not in INITS:
        raise ValueError(f"init is {init!r}; it must be one of {', '.join(INITS)}")
    return load_cfg(get_protocol(name).config + INITS[init], opts, stage=roles.DETECTION)


def config_changes(cfg: CfgNode) -> list[str] | None:
    """Return, as ``KEY=value``, the keys in which a config departs from the shipped config of its protocol.

    The keys of a protocol are those with this role in :mod:`moco_d2.config.roles`. None if the config names no shipped
    protocol.
    """
    if cfg.PROTOCOL not in _protocols():
        return None
    return _changes(get_config(cfg.PROTOCOL), cfg, roles.DETECTION, roles.PROTOCOL)


def pretraining_changes(cfg: CfgNode) -> list[str] | None:
    """Return, as ``KEY=value``, the keys in which a config departs from the shipped recipe of its name.

    None if the config names no shipped recipe.
    """
    if cfg.PROTOCOL not in _recipes():
        return None
    return _changes(load_cfg(_recipes()[cfg.PROTOCOL]), cfg, roles.PRETRAINING, roles.RECIPE)


def _changes(shipped: CfgNode, used: CfgNode, stage: str, role: str) -> list[str]:
    """Return, as ``KEY=value``, the keys of a role in which two configs differ."""
    values = flat(shipped)
    return [
        f"{key}={value}"
        for key, value in flat(used).items()
        if key in values and roles.plain(value) != roles.plain(values[key]) and roles.role(key, stage) == role
    ]


@functools.cache
def _protocols() -> dict[str, Protocol]:
    protocols = _entries("protocols")
    for config in list_configs():
        if config.startswith("quick_schedules/") and (cfg := load_cfg(config)).DATASETS.TEST:
            protocols[cfg.PROTOCOL] = Protocol(
                cfg.PROTOCOL, config, "none", "the shipped config with smaller numbers", ()
            )
    return protocols


def _entries(section: str) -> dict[str, Protocol]:
    """Return the entries of a section of ``model_zoo.yaml``; those of ``elsewhere`` have no config."""
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    words = content["sources"], content["inits"]
    return {name: _protocol(name, entry, *words) for name, entry in content[section].items()}


@functools.cache
def _recipes() -> dict[str, str]:
    """Return ``{name of a pretraining recipe: its config}``; a recipe has no test set."""
    names = (name for name in list_configs() if name.startswith(("Pretrain/", "quick_schedules/")))
    return {cfg.PROTOCOL: name for name in names if not (cfg := load_cfg(name)).DATASETS.TEST}


def _protocol(name: str, entry: Mapping[str, Any], sources: Mapping[str, str], labels: Mapping[str, str]) -> Protocol:
    columns, std = entry.get("columns", ()), entry.get("std", ())
    rows = tuple(
        Published(
            init=row["init"],
            label=labels[row["init"]],
            metrics={c: value for c, value in zip(columns, row["values"], strict=True) if value is not None},
            std=dict(zip(columns, std, strict=True)) if std else {},
            trials=entry.get("trials", 1),
            source=sources[row["source"]],
        )
        for row in entry.get("rows", ())
    )
    return Protocol(name, entry.get("config", ""), entry["paper"], entry.get("evidence", ""), rows)


def protocol_table() -> str:
    """Return a Markdown table of the protocols: config, paper row, and evidence."""
    rows = [f"| `{p.name}` | `{p.config}` | {p.paper} | {p.evidence} |" for p in _published()]
    return "\n".join(["| protocol | config | paper row | evidence |", "|---|---|---|---|", *rows]) + "\n"


def recipe_table() -> str:
    """Return a Markdown table of the pretraining recipes: config, method, encoder, length, batch, optimizer, lr."""
    head = "| recipe | config | method | encoder | epochs | batch | optimizer | lr | augmentation |"
    lines = [head, "|---" * 9 + "|"]
    for name, config in _recipes().items():
        if not config.startswith("quick_"):
            cfg = load_cfg(config)
            solver, encoder = cfg.SOLVER, cfg.SSL.ENCODER
            rule = f" at {solver.REFERENCE_BATCH}" * (solver.REFERENCE_BATCH not in (0, solver.IMS_PER_BATCH))
            lines.append(
                f"| `{name}` | `{config}` | `{cfg.SSL.METHOD}` | {encoder.NAME} | {solver.EPOCHS} | "
                f"{solver.IMS_PER_BATCH} | {solver.OPTIMIZER} | {solver.BASE_LR:g}{rule} | `{cfg.DATA.AUGMENTATION}` |"
            )
    return "\n".join(lines) + "\n"


def published_tables() -> str:
    """Return a Markdown table of published figures for each protocol that has them, and for detectors elsewhere."""
    return "\n".join(_figures(p) for p in (*_published(), *_entries("elsewhere").values()) if p.published)


def _published() -> list[Protocol]:
    return [protocol for protocol in _protocols().values() if not protocol.config.startswith("quick_")]


def _figures(protocol: Protocol) -> str:
    first = protocol.published[0]
    columns = list(dict.fromkeys(column for row in protocol.published for column in row.metrics))
    notes = [protocol.paper, *["no config here builds it"] * (not protocol.config)]
    notes += [f"mean of {first.trials} trials"] if first.trials > 1 else []
    notes += ["std " + " / ".join(str(first.std[column]) for column in columns)] if first.std else []
    lines = [f"**`{protocol.name}`** ({', '.join(notes)})", ""]
    lines += ["| pre-train | " + " | ".join(columns) + " | source |", "|---" * (len(columns) + 2) + "|"]
    for row in protocol.published:
        values = (str(row.metrics.get(column, "-")) for column in columns)
        lines.append(f"| {row.label} | {' | '.join(values)} | {row.source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    guard(lambda: print(protocol_table(), published_tables(), recipe_table(), sep="\n", end=""))

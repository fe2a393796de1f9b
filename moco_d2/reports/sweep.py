"""Sweeps: pretrainings that differ in named keys, at equal budget; their folders, and which of them are done.

A sweep is a YAML file (``configs/Sweeps``) of lines, each a config and the keys that change along it, or a list of
methods. Each point of a line is a run of ``moco-d2 pretrain`` in a folder of its own, with ``request.json``, the
recipe that was asked for. If the recipe in a folder differs from the present one, the folder is refused.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from detectron2.config import CfgNode

from moco_d2.config import flat, get_cfg, list_configs, load_cfg, roles, settings, shipped_files, sweep_file
from moco_d2.config import use_available_device as fit_device
from moco_d2.engine.preflight import check_config
from moco_d2.io import files
from moco_d2.io.checkpoints import read_facts
from moco_d2.io.paths import expand
from moco_d2.messages import did_you_mean
from moco_d2.reports.over_run import REQUEST
from moco_d2.reports.pretraining import BACKBONE
from moco_d2.reports.records import read_json
from moco_d2.running.launch import check_processes

LOG = "sweep.log"

_SWEEP, _LINE = ("title", "axis", "paper", "lines"), ("config", "set", "keys", "values", "script")
_COMPLETE = re.compile(r", (\d+) of \1 iterations")  # in the origin of the backbone of a finished run
_PARTS = 10  # probes, and checkpoints, of a run
# What --views sets. The monitor's sets and rule are compared, because kNN depends on them.
_LENGTH = ("SOLVER.EPOCHS", "SOLVER.MAX_ITER")
_MONITOR = tuple(f"SSL.MONITOR.{key}" for key in ("DATASET", "VAL", "K", "TEMPERATURE", "PICTURES"))


@dataclass(frozen=True)
class Line:
    """A line of a sweep: one config, and perhaps keys that change along it.

    Attributes:
        name: of the line, in tables, pictures and folders.
        config: of the pretraining.
        set: ``{key: value}`` for all its runs.
        keys: that take each of the values.
        values: ``{value: the paper's figure}``; None for the figure if there is none. Without keys: one run.
        script: that registers a method of the user's own and runs ``moco-d2 pretrain``; empty for that command.
    """

    name: str
    config: str
    set: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    values: Mapping[Any, Any] = field(default_factory=lambda: {None: None})
    script: str = ""


@dataclass(frozen=True)
class Sweep:
    """A list of pretrainings to compare.

    Attributes:
        title: in words.
        lines: at least one.
        axis: what changes along the lines; empty if nothing does.
        paper: what the paper's figures are, with their source; empty if there are none.
    """

    title: str
    lines: tuple[Line, ...]
    axis: str = ""
    paper: str = ""


@dataclass(frozen=True)
class SweepRun:
    """One pretraining of a sweep.

    Attributes:
        name: of its folder.
        line: that it belongs to.
        value: of the line's keys; None if there are none.
        folder: its ``OUTPUT_DIR``.
        opts: ``KEY VALUE ...`` overrides, ``OUTPUT_DIR`` included.
        cfg: the config with the overrides.
    """

    name: str
    line: Line
    value: Any
    folder: Path
    opts: tuple[str, ...]
    cfg: CfgNode

    @property
    def length(self) -> str:
        """Length and batch, in words."""
        solver = self.cfg.SOLVER
        steps = f"{solver.EPOCHS} epochs" if solver.EPOCHS else f"{solver.MAX_ITER} iterations"
        return f"{steps}, batch {solver.IMS_PER_BATCH}"

    def request(self) -> dict[str, Any]:
        """Return the content of ``request.json``: the recipe, the seed, and the sets of the monitor."""
        values = flat(self.cfg)
        kept = {key: values[key] for key in ("SEED", *_MONITOR)}
        recipe = settings(self.cfg, roles.PRETRAINING, roles.RECIPE)
        # A method of the user's own is not known here, so its arguments are those of the config.
        arguments = {key: value for key, value in values.items() if key.startswith("SSL.ARGS.")}
        content: dict[str, Any] = json.loads(json.dumps({**kept, **recipe, **arguments}))
        return content


def read_sweep(name: str, recipes: str) -> Sweep:
    """Read a sweep's file.

    Args:
        name: a path, or the name of a file in ``configs/Sweeps``.
        recipes: see :func:`find_config`.

    Raises:
        ValueError: there is no such file, or it is not a sweep.
    """
    path = sweep_file(name)
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    lines = content.get("lines") if isinstance(content, dict) else None
    if not isinstance(lines, dict) or not lines:
        raise ValueError(f"{path} is not a sweep: it must have `lines`, as configs/Sweeps/momentum.yaml has")
    _refuse_others(str(path), content, _SWEEP)
    made = tuple(_line(f"{path}: the line {key}", str(key), line, recipes) for key, line in lines.items())
    words = {key: str(content.get(key, "")) for key in ("title", "axis", "paper")}
    return Sweep(words["title"] or path.stem, made, words["axis"], words["paper"])


def _line(where: str, name: str, content: Any, recipes: str) -> Line:
    if not isinstance(content, dict) or not isinstance(content.get("config"), str):
        raise ValueError(
            f"{where} has no config: write `config:` with a config's name or path, or a recipe as in fig3_queue"
        )
    _refuse_others(where, content, _LINE)
    fixed, keys, values = content.get("set", {}), content.get("keys", []), content.get("values")
    if bool(keys) != bool(values):
        raise ValueError(f"{where}: `keys` and `values` belong together; it has one of them only")
    if not isinstance(fixed, dict) or not isinstance(keys, list) or not isinstance(values, dict | list | None):
        raise ValueError(f"{where}: `set` is a mapping, `keys` a list, `values` a list, or a mapping to figures")
    points = values if isinstance(values, dict) else dict.fromkeys(values or [None])
    script = expand(str(content.get("script", "")))
    if script and not Path(script).is_file():
        raise ValueError(f"{where}: there is no script {script}")
    try:
        config = find_config(content["config"], recipes)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Line(name, config, fixed, tuple(map(str, keys)), points, script)


def _refuse_others(where: str, content: Mapping[Any, Any], known: Sequence[str]) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where} has no entry {key!r}: it takes {', '.join(known)}{did_you_mean(key, known)}")


def of_methods(names: Sequence[str], recipes: str) -> Sweep:
    """Return the sweep over methods; the arguments are those of :func:`find_config`.

    Raises:
        ValueError: a method has no such recipe, or is named twice.
    """
    lines = tuple(Line(Path(name).stem, find_config(name, recipes)) for name in names)
    if twice := [name for name, count in Counter(line.name for line in lines).items() if count > 1]:
        raise ValueError(f"--methods names {', '.join(twice)} twice")
    return Sweep("Methods at equal budget", lines)


def find_config(name: str, recipes: str) -> str:
    """Return the config of a recipe.

    Args:
        name: a shipped name or a path; or a method as its recipes call it: ``byol`` stands for the shortest recipe
            ``Pretrain/byol_<recipes>_*ep``.
        recipes: which of a method's recipes: ``R50`` or ``cifar10_R18``.

    Raises:
        ValueError: there is none.
    """
    if Path(name).is_file() or shipped_files(name):
        return name
    form = re.compile(rf"Pretrain/(.+)_{re.escape(recipes)}_(\d+)ep")
    found = [match for config in list_configs() if (match := form.fullmatch(config))]
    own = [match for match in found if match[1] == name]
    if not own:
        known = sorted({match[1] for match in found})
        raise ValueError(
            f"there is no recipe Pretrain/{name}_{recipes}_*ep; --recipes {recipes} has {', '.join(known) or 'none'}"
            + did_you_mean(name, known)
        )
    return min(own, key=lambda match: int(match[2])).string


def plan(
    sweep: Sweep,
    output: Path,
    opts: Sequence[str] = (),
    views: int | None = None,
    data: str = "",
    only: Sequence[str] = (),
    processes: int = 1,
) -> list[SweepRun]:
    """Return the runs of a sweep, after checking everything that can be checked before the first one starts.

    Args:
        sweep: the sweep.
        output: the folder of all runs.
        opts: ``KEY VALUE ...`` for all runs; the keys of a line take the line's values.
        views: number of pictures that each run is shown; None: the length in its config.
        data: labelled pictures for ``SSL.MONITOR.DATASET``; empty: as the config says.
        only: shell patterns of the names of the runs; empty: all.
        processes: of each run.

    Raises:
        ValueError: an option or a config is wrong, or a folder contains another run than the requested one.
    """
    if views is not None and views < 1:
        raise ValueError(f"--views is {views}; it must be at least 1")
    for key in opts[::2]:
        if key == "OUTPUT_DIR" or (key in _LENGTH and views):
            option = "--views" if key in _LENGTH else "--output"
            raise ValueError(f"{key} is set by {option}; leave it out of the KEY VALUE pairs")
    files.check_folder(output, "--output")
    monitor = ["SSL.MONITOR.DATASET", data] if data else []
    values = dict.fromkeys(value for line in sweep.lines for value in line.values)
    points = [(line, value) for value in values for line in sweep.lines if value in line.values]
    chosen = [one for one in points if not only or any(fnmatch.fnmatchcase(_name(*one), text) for text in only)]
    if not chosen:
        raise ValueError(f"--only {' '.join(only)}: the runs are {', '.join(_name(*one) for one in points)}")
    runs = [_run(line, value, output, [*monitor, *opts], views) for line, value in chosen]
    for run in runs:
        if state(run) != "done":
            _check(run, processes)
    return runs


def _name(line: Line, value: Any) -> str:
    name = line.name if value is None else f"{line.name}_{value}"
    if problem := files.name_problem(name):
        raise ValueError(f"the sweep's run {name!r} cannot be a folder's name: it {problem}")
    return name


def _run(line: Line, value: Any, output: Path, opts: Sequence[str], views: int | None) -> SweepRun:
    name = _name(line, value)
    before, after = _words(line.set), [*opts, *_words(dict.fromkeys(line.keys, value))]
    try:
        cfg = load_cfg(line.config, [*before, *after])
        if views:
            start, end = _budget(cfg, views)
            before, after = [*before, *start], [*after, *end]
        after += ["SEED", "0"] if cfg.SEED < 0 else []  # so that all runs have the same, and a repeated one as well
        folder = output.absolute() / name
        words = (*before, *after, "OUTPUT_DIR", str(folder))
        return SweepRun(name, line, value, folder, words, load_cfg(line.config, words, stage=roles.PRETRAINING))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _words(values: Mapping[str, Any]) -> list[str]:
    return [str(word) for pair in values.items() for word in pair]


def _budget(cfg: CfgNode, views: int) -> tuple[list[str], list[str]]:
    """Return the overrides for a number of pictures: those that a user may override, and the others.

    The recipe's schedule is shortened as a whole: steps and warm-up keep their parts of the length.
    """
    solver = cfg.SOLVER
    steps = max(1, round(views / solver.IMS_PER_BATCH))
    scale = steps / (solver.EPOCHS or solver.MAX_ITER)
    length: dict[str, Any] = {"SOLVER.EPOCHS": 0, "SOLVER.MAX_ITER": steps}
    if solver.SCHEDULE == "step":
        length["SOLVER.STEPS"] = tuple(round(step * scale) for step in solver.STEPS)
    if solver.WARMUP:
        length["SOLVER.WARMUP"] = float(solver.WARMUP * scale)
    part = max(1, steps // _PARTS)
    periods = {"SOLVER.CHECKPOINT_PERIOD": part, "SOLVER.CHECKPOINT_KEEP": 2}
    if cfg.SSL.MONITOR.DATASET:
        periods["SSL.MONITOR.PERIOD"] = part
    return _words(periods), _words(length)


def _check(run: SweepRun, processes: int) -> None:
    cfg = run.cfg.clone()
    fit_device(cfg)
    check_processes(processes, cfg.MODEL.DEVICE, processes)
    if run.line.script:  # its method is known to the script only
        return
    try:
        check_config(cfg, processes)
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error


def state(run: SweepRun) -> str:
    """Return ``done``, ``begun`` (there is a checkpoint to continue from) or ``new``.

    Raises:
        ValueError: the folder contains another run.
    """
    request, backbone = read_json(run.folder / REQUEST), run.folder / BACKBONE
    begun = (run.folder / "last_checkpoint").is_file()
    if not request:
        if begun or backbone.exists():
            raise ValueError(f"{run.folder} contains a run that moco-d2 sweep did not start; choose another --output")
        return "new"
    now, defaults = run.request(), flat(get_cfg())
    # A key that is missing from the request is of a later version: the run had its default.
    differences = [
        f"    {key}: {request.get(key, defaults.get(key))} in the folder, {now.get(key, defaults.get(key))} requested"
        for key in sorted(request.keys() | now.keys())
        if roles.plain(request.get(key, defaults.get(key))) != roles.plain(now.get(key, defaults.get(key)))
    ]
    if differences:
        raise ValueError(
            f"{run.folder} contains another run than the requested one:\n"
            + "\n".join(differences)
            + "\n  Request that run, or choose another --output"
        )
    facts = read_facts(backbone) if backbone.is_file() else None
    if facts and _COMPLETE.search(facts.origin):
        return "done"
    return "begun" if begun else "new"


def prepare(run: SweepRun) -> None:
    """Write the request into a run's folder.

    Raises:
        ValueError: the folder contains a file of its name, or a log, that no sweep wrote.
    """
    files.claim(run.folder, [REQUEST, LOG], "--output", trusted=bool(read_json(run.folder / REQUEST)))
    with files.one_line(run.folder, "--output"), files.atomic_write(run.folder / REQUEST) as file:
        file.write(json.dumps(run.request(), indent=1).encode() + b"\n")


def command(run: SweepRun, processes: int) -> list[str]:
    """Return Python's arguments for a run's pretraining, which continues what is in its folder."""
    program = [run.line.script] if run.line.script else ["-m", "moco_d2", "pretrain"]
    return [*program, "--config-file", run.line.config, "--num-gpus", str(processes), "--resume", *run.opts]


def probe_command(run: SweepRun, output: Path, processes: int) -> list[str]:
    """Return Python's arguments for the linear probe of a run, on the sets of its monitor."""
    monitor = run.cfg.SSL.MONITOR
    return [
        "-m", "moco_d2", "probe", "linear", "--protocol", "moco_cached", "--weights", str(run.folder / BACKBONE),
        "--train", monitor.DATASET, "--val", monitor.VAL or monitor.DATASET, "--size", str(run.cfg.DATA.CROP_SIZE),
        "--num-gpus", str(processes), "--config-file", str(run.folder / "config.yaml"), "--resume",
        "OUTPUT_DIR", str(probe_folder(run.name, output)),
    ]  # fmt: skip


def probe_folder(name: str, output: Path) -> Path:
    """Return the folder of a run's linear probe."""
    return output.absolute() / "linear" / name


def finished(runs: Iterable[SweepRun]) -> list[SweepRun]:
    """Return the runs that are done."""
    return [run for run in runs if state(run) == "done"]

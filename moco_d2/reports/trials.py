"""Trials: the fine-tuning runs of a comparison, their folders, and which of them are done.

A trial is one training of one protocol from one initialisation with one seed (and, on request, a part of the labels).
Its folder contains ``trial.json``, the request, written before the training starts, and the files of the training
(docs/pipeline.md). A trial is done once ``results.json`` exists. If the ``trial.json`` in a folder differs from the
present request, the folder is refused, so that no mean is taken over different experiments.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import log_first_n

from moco_d2.config import config_files, flat, get_cfg, load_cfg, roles, settings, with_init
from moco_d2.config.keys import RENAMED
from moco_d2.detection.datasets import register_custom
from moco_d2.detection.preflight import check_run, check_weights, fit_to_machine, scale_to_processes
from moco_d2.detection.subsets import check_percent
from moco_d2.detection.weights import check_source
from moco_d2.facts import BackboneFacts
from moco_d2.io import files, locks
from moco_d2.io.checkpoints import facts_in, open_checkpoint
from moco_d2.io.paths import expand
from moco_d2.model_zoo import config_changes, get_protocol, list_protocols
from moco_d2.reports.records import RECORD, RESULTS, read_result, read_trial
from moco_d2.reports.run import BASELINES
from moco_d2.running.launch import check_processes
from moco_d2.running.weights import local_path, refuse_stubs

ENVIRONMENT = "environment.txt"
LOG = "trial.log"
LOCK = ".lock"


@dataclass(frozen=True)
class Init:
    """An initialisation of a detector.

    Attributes:
        label: its name in folders and tables.
        kind: the input that it expects, a key of :data:`moco_d2.config.INITS`.
        path: ``MODEL.WEIGHTS``; empty for random initialisation.
        sha256: of the file; empty for random initialisation.
        facts: the facts in the file, if there are any.
    """

    label: str
    kind: str
    path: str = ""
    sha256: str = ""
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Trial:
    """One requested training.

    Attributes:
        protocol: name of the protocol.
        base: the config, a file or a shipped name.
        config: the same with the init's suffix, for ``--config-file``.
        init: its initialisation.
        seed: of the training.
        percent: percentage of the training labels that it uses.
        folder: its ``OUTPUT_DIR``.
        opts: ``KEY VALUE ...`` overrides, ``OUTPUT_DIR`` included.
        cfg: the config with the overrides.
    """

    protocol: str
    base: str
    config: str
    init: Init
    seed: int
    percent: float
    folder: Path
    opts: tuple[str, ...]
    cfg: CfgNode

    @property
    def name(self) -> str:
        """The trial in words: label, seed, and the part of the labels if that is not all."""
        return f"{self.init.label} seed {self.seed}" + (f", {self.percent:g}% of the labels" * (self.percent != 100))

    def record(self) -> dict[str, Any]:
        """Return the content of ``trial.json``."""
        return {
            "protocol": self.protocol,
            "config_file": self.base,
            "init": {"label": self.init.label, "kind": self.init.kind},
            "weights": {"path": self.init.path, "sha256": self.init.sha256, "facts": self.init.facts},
            "seed": self.seed,
            "percent": self.percent,
            "config": _settings(self.cfg),
        }


def plan(
    protocol: str,
    weights: Sequence[str],
    seeds: Iterable[int],
    output: str | os.PathLike[str],
    percents: Sequence[float] = (100.0,),
    opts: Sequence[str] = (),
    processes: int = 1,
    config_file: str = "",
) -> list[Trial]:
    """Return the trials of a comparison, after checking everything that can be checked before the first one starts.

    Args:
        protocol: a name of :func:`moco_d2.model_zoo.list_protocols`; empty if ``config_file`` is given.
        weights: files (``PATH`` or ``LABEL=PATH``), ``supervised`` (or ``supervised=PATH``), ``random``.
        seeds: of the trainings, >= 0.
        output: folder of all trials; a trial's is ``output/protocol/label/seedN``, for a part of the labels
            ``output/protocol/label/seedN/fractionP``.
        percents: percentages of the training labels.
        opts: ``KEY VALUE ...`` for all trials.
        processes: of each training.
        config_file: a config, shipped or your own, instead of a protocol. See :func:`protocol_of` for its name.

    Returns:
        All trials, done or not, seed by seed: a comparison that is cut short then has complete seeds.

    Raises:
        ValueError: an argument is wrong, or a folder contains another run than the requested one.
    """
    for key in opts[::2]:
        if option := roles.trial_option(key):
            raise ValueError(f"{key} is set by {option}; leave it out of the KEY VALUE pairs")
    for percent in percents:
        check_percent(percent)
    protocol, base = (
        (protocol_of(config_file), config_file) if config_file else (protocol, get_protocol(protocol).config)
    )
    inits = _inits(weights, base)
    trials = [
        _trial(protocol, base, init, seed, percent, Path(output), opts)
        for seed in sorted(set(seeds)) for percent in sorted(set(percents)) for init in inits
    ]  # fmt: skip
    files.check_folder(output, "--output")
    if not trials or min(trial.seed for trial in trials) < 0:
        raise ValueError("--seeds must name at least one seed, 0 or above, such as 0-4 or 0,2,7")
    _check_same_protocol(trials)
    states = {trial.folder: state(trial) for trial in trials}
    waiting = [trial for trial in trials if states[trial.folder] != "done"]
    for trial in waiting[:1]:
        _check(trial.cfg, processes)
    for trial in {trial.init.label: trial for trial in waiting if states[trial.folder] == "new"}.values():
        check_weights(trial.cfg, resume=True)  # an attempt that left no checkpoint may be overwritten
    return trials


def protocol_of(config_file: str) -> str:
    """Return the name under which trials and reports know a config: its ``PROTOCOL``, or its file's name.

    A config that departs from the shipped protocol whose ``PROTOCOL`` it has, because it is based on it, is called by
    the name of its file: a protocol's name means one thing.

    Raises:
        ValueError: there is no such config, or the name is taken by a shipped protocol or cannot be a folder's.
    """
    if len(config_files(config_file)) > 1:
        raise ValueError(
            f"--config-file {config_file}: leave out the suffix; --weights chooses what a trial starts from"
        )
    cfg = load_cfg(config_file, stage=roles.DETECTION)
    departs = config_changes(cfg) != []
    inherited = cfg.PROTOCOL in list_protocols() and departs
    name = Path(config_file).stem if inherited or not cfg.PROTOCOL else cfg.PROTOCOL
    if departs and name in list_protocols():
        raise ValueError(f"{config_file} departs from the shipped protocol {name}: set PROTOCOL to a name of your own")
    if problem := files.name_problem(name):
        raise ValueError(f"PROTOCOL is {name!r} in {config_file}; it names a folder, but it {problem}")
    return str(name)


def state(trial: Trial) -> str:
    """Return ``done``, ``begun`` (there is a checkpoint to continue from) or ``new``.

    Raises:
        ValueError: the folder contains another run.
    """
    folder = trial.folder
    begun, done = ((folder / name).is_file() for name in ("last_checkpoint", RESULTS))
    recorded = read_trial(folder, complete=True)
    if not recorded:
        if begun or done:
            raise ValueError(f"{folder} contains a run that moco-d2 trials did not start; choose another --output")
        return "new"
    differences = list(_differences(recorded, trial))
    result = read_result(folder) if done else {}
    used, asked = (result.get("weights") or {}).get("sha256"), trial.init.sha256
    if used and used != asked:
        differences.append(f"weights: SHA-256 {used[:12]} in {RESULTS}, {asked[:12] or 'none'} requested")
    if differences:
        raise ValueError(
            f"{folder} contains another run than the requested one:\n"
            + "\n".join(f"    {line}" for line in differences)
            + "\n  Request that run, or choose another --output (or another name for weights: LABEL=PATH)"
        )
    return "done" if done else "begun" if begun else "new"


@contextmanager
def locked(folder: Path) -> Iterator[int | None]:
    """Lock the folder of a run until the block ends and every child that got the descriptor has ended.

    Yields:
        The lock's file descriptor, to be passed on to the child; None if another process has locked the folder.
    """
    path = files.make_folder(folder, "--output") / LOCK
    with files.one_line(path, "--output"):
        file = locks.lock(path)
    try:
        yield file
    finally:
        if file is not None:
            locks.unlock(path)


def prepare(trial: Trial) -> None:
    """Write the request and the machine's libraries into a trial's folder: ``trial.json`` and ``environment.txt``.

    Raises:
        ValueError: the folder contains files of these names, or a log, that no trial wrote.
    """
    files.claim(trial.folder, [RECORD, ENVIRONMENT, LOG], "--output", trusted=bool(read_trial(trial.folder)))
    for name, text in ((RECORD, json.dumps(trial.record(), indent=1)), (ENVIRONMENT, collect_env_info())):
        with files.one_line(trial.folder, "--output"), files.atomic_write(trial.folder / name) as file:
            file.write(text.encode() + b"\n")


def _inits(words: Sequence[str], base: str) -> list[Init]:
    inits = [_init(word, base) for word in words]
    if not inits:
        raise ValueError(f"--weights is empty; give files, or {' or '.join(BASELINES)}")
    for label, count in Counter(init.label for init in inits).items():
        if count > 1:
            same = ", ".join(word for word, init in zip(words, inits, strict=True) if init.label == label)
            raise ValueError(
                f"{count} --weights have the name {label!r} ({same}); give each once, or rename files: LABEL=PATH"
            )
    return inits


def _init(word: str, base: str) -> Init:
    label, equals, path = word.partition("=")
    if not equals or os.path.exists(word):
        label, path = (word, "") if word in BASELINES else (Path(word).stem, word)
    if label == "random":
        if path:
            raise ValueError(f"--weights {word}: 'random' means no file; choose another label")
        return Init("random", "random")
    if problem := files.name_problem(label):
        raise ValueError(f"--weights {word}: the label {label!r} cannot be a folder's name: it {problem}")
    kind = "supervised" if label == "supervised" else "moco"
    path = expand(path) or load_cfg(with_init(base, kind), stage=roles.DETECTION).MODEL.WEIGHTS
    try:
        check_source(path)
    except ValueError as error:
        raise ValueError(f"{error}\n  With moco-d2 trials: --weights {label}=PATH") from error
    local = local_path(path)
    checkpoint = open_checkpoint(local)
    refuse_stubs(checkpoint, "model" if "model" in checkpoint.content else "")
    facts = facts_in(checkpoint.content, local)
    shown = path if "://" in path else os.path.abspath(path)
    return Init(label, kind, shown, checkpoint.version.sha256(), facts.as_dict() if facts else None)


def _trial(protocol: str, base: str, init: Init, seed: int, percent: float, output: Path, opts: Sequence[str]) -> Trial:
    folder = output.absolute() / protocol / init.label / f"seed{seed}"
    own = ["MODEL.WEIGHTS", init.path, "SEED", str(seed)]
    if percent != 100:
        folder /= f"fraction{percent:g}"
        own += ["DATASETS.FRACTION", str(float(percent))]
    config = with_init(base, init.kind)
    words = (*opts, *own, "OUTPUT_DIR", str(folder))
    cfg = load_cfg(config, words, stage=roles.DETECTION)
    if needed := _as_pretrained(init, cfg, opts):
        words = (*words, *needed)
        cfg = load_cfg(config, words, stage=roles.DETECTION)
    if protocol != cfg.PROTOCOL:
        cfg.PROTOCOL, words = protocol, (*words, "PROTOCOL", protocol)
    return Trial(protocol, base, config, init, seed, percent, folder, words, cfg)


def _as_pretrained(init: Init, cfg: CfgNode, opts: Sequence[str]) -> tuple[str, ...]:
    """Return ``KEY VALUE ...`` that feed weights as in pretraining, by their facts, where the config does otherwise.

    Such keys (mean and std of the pixels, their order, strides) belong to what a trial starts from and not to its
    protocol, so that weights which need different ones can be compared. What the user has set stays.
    """
    if init.facts is None:
        return ()
    words: list[str] = []
    for key, (_, wanted) in BackboneFacts.from_dict(init.facts).disagreements(cfg).items():
        if roles.role(key, roles.DETECTION) == roles.START and key not in opts[::2]:
            text = f"{init.label}: {key} {wanted}, by the facts of the weights"
            log_first_n(logging.INFO, text, name=__name__, key="message")
            words += [key, str(wanted)]
    return tuple(words)


def _check_same_protocol(trials: Sequence[Trial]) -> None:
    """Refuse inits whose configs differ in more than the init: a ``mine_random.yaml`` beside ``mine.yaml``."""
    first, *others = {trial.config: trial for trial in trials}.values()
    wanted = settings(first.cfg, roles.DETECTION, roles.PROTOCOL)
    for trial in others:
        found = settings(trial.cfg, roles.DETECTION, roles.PROTOCOL)
        if other := [k for k in wanted.keys() & found if wanted[k] != found[k] and not roles.trial_option(k)]:
            raise ValueError(
                f"{trial.config} is another protocol than {first.config}: they differ in {', '.join(sorted(other))}; "
                "rename one of the files"
            )


def _check(cfg: CfgNode, processes: int) -> None:
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: there would be nothing to compare")
    cfg = fit_to_machine(cfg, processes)
    check_processes(processes, cfg.MODEL.DEVICE, processes)
    with tempfile.TemporaryDirectory() as folder:  # for the copies of users' labels in OUTPUT_DIR
        cfg.defrost()
        cfg.OUTPUT_DIR = folder
        register_custom(cfg)
        check_run(scale_to_processes(cfg, processes), processes)


def _differences(recorded: Mapping[str, Any], trial: Trial) -> Iterator[str]:
    asked = trial.record()
    if recorded["weights"]["sha256"] != asked["weights"]["sha256"]:
        there, wanted = (f"{r['path'] or 'none'} (SHA-256 {r['sha256'][:12] or 'none'})" for r in
                         (recorded["weights"], asked["weights"]))  # fmt: skip
        yield f"weights: {there} in the folder, {wanted} requested"
    # A key that is missing from the record is of a later version: the run had its default.
    defaults, present = _settings(get_cfg()), asked["config"]
    earlier = {RENAMED.get(key, key): value for key, value in recorded["config"].items()}
    for key in filter(roles.identifies_trial, sorted(earlier.keys() | present.keys())):
        old, new = (values.get(key, defaults.get(key)) for values in (earlier, present))
        if old != new:
            yield f"{key}: {old} in the folder, {new} requested"


def _settings(cfg: CfgNode) -> dict[str, Any]:
    """Return ``{dotted key: value}`` as read back from JSON (lists for tuples)."""
    settings: dict[str, Any] = json.loads(json.dumps(flat(cfg)))
    return settings

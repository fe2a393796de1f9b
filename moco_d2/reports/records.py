"""Reader of the files that runs leave for reports: results of trainings and probes, requests, scalars over iterations.

A file in a folder of runs may belong to another program, or be cut short. If its content does not have the form that
this project writes, it is refused by name, so that no report shows a figure of another program. Fields that an earlier
version did not write count as empty; fields that a later version adds are ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

RESULTS = "results.json"  # of a finished training
EVALUATION = "results_eval_only.json"  # of an evaluation alone (--eval-only)
RECORD = "trial.json"  # the request of a trial
SCALARS = "metrics.json"  # figures during training, a line each time
PROBES = "probe*.json"  # results of probes
FRACTION = "DATASETS.FRACTION="

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Tell whether a value from JSON is a number; ``true`` is not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is(*kinds: type) -> Check:
    return lambda value: isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _or_null(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, value))


def _mapping_of(check: Check) -> Check:
    return lambda value: isinstance(value, dict) and all(map(check, value.values()))


def _fields(**checks: Check) -> Check:
    """Return a check of an object, any field of which may be missing."""
    return lambda value: isinstance(value, dict) and not list(_wrong(value, checks))


def _wrong(content: Mapping[str, Any], checks: Mapping[str, Check]) -> Iterator[str]:
    return (key for key, check in checks.items() if key in content and not check(content[key]))


def _change(value: Any) -> bool:
    """Check a ``KEY=value``; the value of ``DATASETS.FRACTION`` must be a number, because reports read it."""
    if not isinstance(value, str) or not value.startswith(FRACTION):
        return isinstance(value, str)
    try:
        return math.isfinite(float(value.removeprefix(FRACTION)))
    except ValueError:
        return False


def _figures(value: Any) -> bool:
    """Check a row of a probe's accuracies."""
    if not isinstance(value, dict) or not is_number(value.get("top1")):
        return False
    return "k" not in value or (is_number(value["k"]) and is_number(value.get("temperature")))


def _set(value: Any) -> bool:
    """Check what a probe's result says about a set."""
    return isinstance(value, dict) and _is(str)(value.get("name")) and _is(int)(value.get("pictures"))


_TEXT, _WHOLE = _is(str), _is(int)
_FACTS = _fields(origin=_TEXT, recipe=_TEXT, protocol=_TEXT, parts=_list_of(_TEXT))
_WEIGHTS = _fields(path=_or_null(_TEXT), sha256=_or_null(_TEXT), source_sha256=_or_null(_TEXT), facts=_or_null(_FACTS))

# Test set -> task -> metric -> figure, null if the evaluator has none.
_METRICS = _mapping_of(_or_null(_mapping_of(_mapping_of(_or_null(is_number)))))
_RESULT: dict[str, Check] = {
    "protocol": _or_null(_TEXT),
    "metrics": _METRICS,
    "weights": _or_null(_WEIGHTS),
    "config_changes": _or_null(_list_of(_change)),
    "scaled": _or_null(_mapping_of(lambda value: isinstance(value, list) and len(value) == 2)),
    "engine": _or_null(_fields(ACCUMULATE=_WHOLE)),
    "versions": _or_null(_mapping_of(_or_null(_TEXT))),
    "seed": _WHOLE,
    "iterations": _WHOLE,
    "pictures": _or_null(_fields(train=_WHOLE, test=_mapping_of(_WHOLE))),
    "commit": _or_null(_TEXT),
}
_TRIAL: dict[str, Check] = {
    "init": _fields(label=_TEXT, kind=_TEXT),
    "config_file": _TEXT,
    "weights": _WEIGHTS,
    "config": _mapping_of(lambda value: True),
}

_PROBE: dict[str, Check] = {
    "probe": _TEXT,
    "weights": _WEIGHTS,
    "protocol": _or_null(_TEXT),
    "changes": _or_null(_list_of(_TEXT)),
    "train": _set,
    "val": _set,
    "results": lambda value: bool(value) and _list_of(_figures)(value),
    "size": _WHOLE,
    "seed": _WHOLE,
}


def read_result(folder: Path, name: str = RESULTS) -> dict[str, Any]:
    """Return the result of a finished training (or, by its name, of an evaluation).

    Raises:
        ValueError: the file is missing, damaged, or another program's.
    """
    path = folder / name
    if not path.exists():
        raise ValueError(f"{path} is missing: the run has not finished, or is not a fine-tuning run")
    content = read_json(path)
    if missing := [key for key in ("protocol", "metrics") if key not in content]:
        raise ValueError(f"{path} is not a result of moco-d2 train: it has no {' and no '.join(missing)}")
    return _checked(path, content, _RESULT, "moco-d2 train")


def read_trial(folder: Path, complete: bool = False) -> dict[str, Any]:
    """Return a trial's ``trial.json``; an empty object if the file is missing.

    Args:
        folder: of the trial.
        complete: whether the fields with weights and config must be there, for a comparison.

    Raises:
        ValueError: the file is damaged, incomplete, or another program's.
    """
    path = folder / RECORD
    content = _checked(path, read_json(path), _TRIAL, "moco-d2 trials")
    if content and complete:
        found = {*content, *(f"weights.{key}" for key in content.get("weights", ()))}
        if missing := {"config", "weights.path", "weights.sha256"} - found:
            raise ValueError(f"{path} was not written by moco-d2 trials: it lacks {', '.join(sorted(missing))}")
    return content


def read_probe(path: Path) -> dict[str, Any]:
    """Return the result of a probe.

    Raises:
        ValueError: the file is damaged, or another program's.
    """
    content = read_json(path)
    if missing := [key for key in ("probe", "weights", "train", "val", "results") if key not in content]:
        raise ValueError(f"{path} is not a result of moco-d2 probe: it has no {' and no '.join(missing)}")
    return _checked(path, content, _PROBE, "moco-d2 probe")


def read_scalars(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a run's ``metrics.json`` that have an iteration; nothing if there is no such file.

    Other lines are skipped: an unfinished line of a killed run, or lines of another program.
    """
    path = folder / SCALARS
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and _WHOLE(record.get("iteration")):
            yield {key: value for key, value in record.items() if is_number(value) and math.isfinite(value)}


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no file.

    Raises:
        ValueError: the file cannot be read, or does not contain an object.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must contain an object, not a {type(content).__name__}")
    return content


def _checked(path: Path, content: dict[str, Any], checks: Mapping[str, Check], writer: str) -> dict[str, Any]:
    if wrong := list(_wrong(content, checks)):
        raise ValueError(f"{path} was not written by {writer}: wrong {', '.join(wrong)}")
    return content

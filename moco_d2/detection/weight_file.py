"""A file of weights in Detectron2's form: what its checkpointer wants, out of whatever wraps it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlparse

import torch

from moco_d2.convert.choice import Choice
from moco_d2.convert.find import as_tensor, find_places, is_tensor, unwrapped
from moco_d2.convert.sources import TARGET_NETWORKS
from moco_d2.io.checkpoints import open_checkpoint, some
from moco_d2.io.version import FileVersion
from moco_d2.running.weights import command_for_weights_alone, local_path, refuse_stubs

logger = logging.getLogger(__name__)

_MOST = 0.5  # of a detector's names in a file: it is a trained detector, whatever stands around it
_COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class WeightFile:
    """What ``MODEL.WEIGHTS`` holds.

    Attributes:
        content: ``model`` (name -> tensor), perhaps ``matching_heuristics`` and ``__author__``, which tell Detectron2
            how to match the names, and what else the file holds.
        version: of the file that was read.
    """

    content: dict[str, Any]
    version: FileVersion


@dataclass(frozen=True)
class _Place:
    """A mapping of the file that may be the weights.

    Attributes:
        where: its dotted path, empty for the top level.
        prefix: what stands before a detector's names.
        names: key in the file -> name, without wrappers and prefix.
    """

    where: str
    prefix: str
    names: Mapping[Any, str]


def read_weight_file(path: str, names: Collection[str]) -> WeightFile:
    """Read a file for a detector.

    Args:
        path: ``MODEL.WEIGHTS``: a path, or an address that Detectron2 knows.
        names: of the detector's tensors, by which a trained detector is known.

    Raises:
        ValueError: there is no such file, it cannot be read, or it is not in Detectron2's form.
    """
    queries = parse_qs(urlparse(path).query)
    heuristics = queries.pop("matching_heuristics", ["False"]) == ["True"]
    if queries:
        raise ValueError(f"MODEL.WEIGHTS {path}: of what may follow a '?', only matching_heuristics=True is known")
    local = local_path(path)
    checkpoint = open_checkpoint(local)
    content = checkpoint.content
    place = _find_weights(content, names, path, local)
    state: Any = find_places(content).get(place.where) if place.where else _top(content)
    _check_tensors(state, path)
    refuse_stubs(checkpoint, place.where)
    model = {place.names.get(key, key): as_tensor(value) for key, value in state.items()}
    form = {"facts": content["facts"]} if "facts" in content else {}
    if place.where:
        form = {key: value for key, value in content.items() if key != place.where.partition(".")[0]}
    elif form:  # safetensors, whose header holds the facts: a converted file
        heuristics = True
    return WeightFile({**form, **_marks(place, model, local, heuristics)}, checkpoint.version)


def convert_hint(path: str) -> str:
    """Return the remedy for a file of another project."""
    return f"\n  Convert it first: python tools/convert_checkpoint.py {path} converted.pth"


def _top(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "facts"}


def _marks(place: _Place, model: dict[str, torch.Tensor], local: str, heuristics: bool) -> dict[str, Any]:
    """Return the model and the marks by which Detectron2 knows how to match its names; by its own rules."""
    caffe = place.where == "blobs" or (place.where == "" and not any("." in name for name in model))
    if caffe:
        model = {name: tensor for name, tensor in model.items() if not name.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    if place.where == "model_state" and local.endswith(".pyth"):
        model = {name: tensor for name, tensor in model.items() if not name.endswith(_COUNTER)}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if heuristics or (place.where == "" and local.endswith(".pkl")):
        return {"model": model, "matching_heuristics": True}
    return {"model": model}


def _find_weights(content: Mapping[str, Any], names: Collection[str], path: str, local: str) -> _Place:
    """Return where the weights are: where Detectron2 looks, or where a trained detector is, whatever wraps it.

    Raises:
        ValueError: there are several detectors.
    """
    places = {where: state for where, state in find_places(content).items() if all(isinstance(k, str) for k in state)}
    found = [place for where, state in places.items() for place in _detectors(where, state, names, path)]
    found = [place for place in found if not TARGET_NETWORKS.search(f"{place.where}.{place.prefix}")] or found
    found = [place for place in found if place.where == "model"] or found
    if len(found) == 1:
        if found[0].where != "model" or found[0].prefix:
            logger.info("%s: the detector's tensors are in %s", path, " under ".join(_described(found[0])))
        return found[0]
    if found:
        listed = "; ".join(" under ".join(_described(place)) for place in found)
        raise ValueError(
            f"{path} holds {len(found)} detectors ({listed}); write the one that is meant into a file of its own: "
            f"{command_for_weights_alone(local, content, found[0].where, found[0].prefix)}"
        )
    own = next((key for key in ("model", "blobs", "model_state") if key in content), "")
    plain = unwrapped(places.get(own, {}), path, Choice())
    return _Place(own, "", {key: name for name, key in plain.items()})


def _detectors(where: str, state: Mapping[str, Any], names: Collection[str], path: str) -> list[_Place]:
    """Return the detectors in one mapping: those prefixes behind which are most of the names."""
    plain = {key: key for key in state}
    if sum(key in names for key in plain) < _MOST * len(names):
        plain = {key: name for name, key in unwrapped(state, path, Choice()).items()}
    ends = ((key, name[start:]) for key, name in plain.items() for start in _starts(name) if name[start:] in names)
    counts = Counter(plain[key].removesuffix(end) for key, end in ends)
    prefixes = [prefix for prefix, count in counts.items() if count >= _MOST * len(names)]
    return [_Place(where, p, {key: name.removeprefix(p) for key, name in plain.items()}) for p in prefixes]


def _starts(name: str) -> list[int]:
    """Return where the parts of a dotted name begin."""
    return [0, *(at + 1 for at, character in enumerate(name) if character == ".")]


def _described(place: _Place) -> list[str]:
    return [place.where or "the top level", *([f"`{place.prefix}`"] if place.prefix else [])]


def _check_tensors(state: Any, path: str) -> None:
    """Refuse weights that are none, or something else than tensors by name."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights: its model is empty{convert_hint(path)}")
    foreign = [str(key) for key, value in state.items() if not isinstance(key, str) or not is_tensor(value)]
    if foreign:
        raise ValueError(
            f"{path} is not in Detectron2's form: {some(foreign, 3)} {'is' if len(foreign) == 1 else 'are'} no tensor"
            + ("s" if len(foreign) > 1 else "") + convert_hint(path)
        )  # fmt: skip

"""Weight files for detectors: the tensors in Detectron2's form, whatever wraps them."""

from __future__ import annotations

import logging
import os
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

_MOST = 0.5  # a file with this share of a detector's names holds a trained detector
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class WeightFile:
    """The content of ``MODEL.WEIGHTS``.

    Attributes:
        content: ``model`` (name -> tensor), perhaps ``matching_heuristics`` and ``__author__``, which tell Detectron2
            how to match the names, and everything else in the file.
        version: version of the file that was read.
    """

    content: dict[str, Any]
    version: FileVersion


@dataclass(frozen=True)
class _Place:
    """A mapping in the file that may be the weights.

    Attributes:
        where: its dotted path, empty for the top level.
        prefix: the prefix of a detector's names in it.
        names: key in the file -> name without wrappers and prefix.
    """

    where: str
    prefix: str
    names: Mapping[Any, str]


def read_weight_file(path: str, names: Collection[str]) -> WeightFile:
    """Read a file for a detector.

    Args:
        path: ``MODEL.WEIGHTS``: a path, or an address that Detectron2 knows.
        names: names of the detector's tensors, by which a trained detector is recognised.

    Raises:
        ValueError: the file does not exist, cannot be read, or is not in Detectron2's form.
    """
    queries = parse_qs(urlparse(path).query)
    heuristics = queries.pop("matching_heuristics", ["False"]) == ["True"]
    if queries:
        raise ValueError(f"MODEL.WEIGHTS {path}: the only option after '?' is matching_heuristics=True")
    local = local_path(path)
    checkpoint = open_checkpoint(local)
    content = checkpoint.content
    _refuse_pretraining(content, path)
    place = _find_weights(content, names, path, local)
    state: Any = find_places(content).get(place.where) if place.where else _top(content)
    _check_tensors(state, path)
    refuse_stubs(checkpoint, place.where)
    model = {place.names.get(key, key): as_tensor(value) for key, value in state.items()}
    form = {"facts": content["facts"]} if "facts" in content else {}
    if place.where:
        form = {key: value for key, value in content.items() if key != place.where.partition(".")[0]}
    elif form:  # safetensors with facts in the header: a converted file
        heuristics = True
    return WeightFile({**form, **_for_detectron2(place, model, local, heuristics)}, checkpoint.version)


def convert_hint(path: str) -> str:
    """Return the remedy for a file that must be converted."""
    return f"\n  Convert it first: moco-d2 convert {path} converted.pth"


def _refuse_pretraining(content: Mapping[str, Any], path: str) -> None:
    """Refuse this project's own files of pretraining, which must be converted."""
    backbone = content.get("backbone")
    if isinstance(backbone, Mapping) and {"method", "prefix"} <= set(backbone):
        # Without a prefix, the file beside it holds the backbone.
        source = path if backbone["prefix"] is not None else os.path.join(os.path.dirname(path), "backbone.pth")
        raise ValueError(
            f"{path} is a training checkpoint of {backbone['method']}; a detector starts from its converted backbone."
            + convert_hint(source)
        )
    if set(content) == {"state_dict", "facts"}:
        raise ValueError(f"{path} is a pretrained backbone that has not been converted.{convert_hint(path)}")


def _top(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "facts"}


def _for_detectron2(place: _Place, model: dict[str, torch.Tensor], local: str, heuristics: bool) -> dict[str, Any]:
    """Return the model with the keys that tell Detectron2 how to match its names, by Detectron2's own rules."""
    caffe = place.where == "blobs" or (place.where == "" and not any("." in name for name in model))
    if caffe:
        model = {name: tensor for name, tensor in model.items() if not name.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}
    if place.where == "model_state" and local.endswith(".pyth"):
        model = {name: tensor for name, tensor in model.items() if not name.endswith(COUNTER)}
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}
    if heuristics or (place.where == "" and local.endswith(".pkl")):
        return {"model": model, "matching_heuristics": True}
    return {"model": model}


def _find_weights(content: Mapping[str, Any], names: Collection[str], path: str, local: str) -> _Place:
    """Return where the weights are: at a trained detector, or else where Detectron2 looks.

    Raises:
        ValueError: the file holds several detectors.
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
            f"{path} holds {len(found)} detectors ({listed}); write the one you want into its own file: "
            f"{command_for_weights_alone(local, content, found[0].where, found[0].prefix)}"
        )
    own = next((key for key in ("model", "blobs", "model_state") if key in content), "")
    plain = unwrapped(places.get(own, {}), path, Choice())
    return _Place(own, "", {key: name for name, key in plain.items()})


def _detectors(where: str, state: Mapping[str, Any], names: Collection[str], path: str) -> list[_Place]:
    """Return the detectors in one mapping: each prefix that most of a detector's names follow."""
    plain = {key: key for key in state}
    if sum(key in names for key in plain) < _MOST * len(names):
        plain = {key: name for name, key in unwrapped(state, path, Choice()).items()}
    ends = ((key, name[start:]) for key, name in plain.items() for start in _starts(name) if name[start:] in names)
    counts = Counter(plain[key].removesuffix(end) for key, end in ends)
    prefixes = [prefix for prefix, count in counts.items() if count >= _MOST * len(names)]
    return [_Place(where, p, {key: name.removeprefix(p) for key, name in plain.items()}) for p in prefixes]


def _starts(name: str) -> list[int]:
    """Return the positions at which the parts of a dotted name begin."""
    return [0, *(at + 1 for at, character in enumerate(name) if character == ".")]


def _described(place: _Place) -> list[str]:
    return [place.where or "the top level", *([f"`{place.prefix}`"] if place.prefix else [])]


def _check_tensors(state: Any, path: str) -> None:
    """Refuse an empty model, and entries that are not named tensors."""
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{path} holds no weights: its `model` is empty or missing.{convert_hint(path)}")
    foreign = [str(key) for key, value in state.items() if not isinstance(key, str) or not is_tensor(value)]
    if foreign:
        raise ValueError(
            f"{path} is not in Detectron2's form (named tensors, or a `model` of them): {some(foreign, 3)} "
            f"{'is not a tensor' if len(foreign) == 1 else 'are not tensors'}.{convert_hint(path)}"
        )

"""The file ``probe.json``: weights, sets, protocol and accuracies of a probe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moco_d2.data.labelled import LabelledSet
from moco_d2.io.files import check_named_file, has_keys, named_file
from moco_d2.io.provenance import provenance
from moco_d2.probes.backbone import Backbone

FILE = "probe.json"
_ours = has_keys("probe", "weights", "train", "val", "command")


def check_output(path: Path | None) -> None:
    """Check, before long work, that a result may be written to a file that the user names.

    Raises:
        ValueError: see :func:`moco_d2.io.files.check_named_file`.
    """
    if path:
        check_named_file(path, _ours)


def describe(pictures: LabelledSet, unreadable: int) -> dict[str, Any]:
    """Return what a result says about a set."""
    return {
        "name": pictures.name,
        "pictures": len(pictures) - unreadable,
        "unreadable": unreadable,
        "classes without pictures": pictures.without_pictures(),
    }


def result(kind: str, backbone: Backbone, seed: int, device: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of ``probe.json``."""
    return {
        "probe": kind, "weights": backbone.record(), **found, "seed": seed, "device": device, **provenance(),
    }  # fmt: skip


def as_json(content: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``probe.json``."""
    return json.dumps(content, indent=1).encode() + b"\n"


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a result to a file that the user names."""
    with named_file(path, _ours) as file:
        file.write(as_json(content))

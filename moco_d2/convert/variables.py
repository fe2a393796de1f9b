"""Checkpoints that are not state dicts: where the variables of other frameworks sit, as flat mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moco_d2.io.unpickle import Stub

# The fields of the named tuple that DeepMind's BYOL pickles, whose class is a stub here.
_BYOL_FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")


def byol_variables(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the online and the target network of DeepMind's BYOL, each as `module|tensor` -> array.

    Whatever stands before `initial_conv` in the names of a network's modules (`res_net50/~/`) is removed.
    """
    state: Any = checkpoint.get("experiment_state")
    if isinstance(state, Stub) and not state:
        state = state.arguments
    if isinstance(state, tuple):
        state = dict(zip(_BYOL_FIELDS, state, strict=False))
    if not isinstance(state, Mapping):
        return {}
    networks: dict[str, Mapping[str, Any]] = {}
    for which in ("online", "target"):
        variables = {**_flat(state.get(f"{which}_params")), **_flat(state.get(f"{which}_state"))}
        first = next((name for name in variables if name.endswith("initial_conv|w")), "")
        prefix = first.removesuffix("initial_conv|w")
        if variables:
            networks[f"experiment_state.{which}"] = {name.removeprefix(prefix): v for name, v in variables.items()}
    return networks


def _flat(modules: Any) -> dict[str, Any]:
    modules = _mapping(modules)
    return {
        f"{module}|{name}": value
        for module, tensors in modules.items()
        if isinstance(module, str)
        for name, value in _mapping(tensors).items()
    }


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Return the mapping that a mapping of haiku's own class was pickled from."""
    if isinstance(value, Stub) and not value:
        inside = [*value.arguments, *(value.state.values() if isinstance(value.state, Mapping) else [value.state])]
        value = next((item for item in inside if isinstance(item, Mapping)), {})
    return value if isinstance(value, Mapping) else {}

"""DeepMind's BYOL, whose pickles hold haiku's variables instead of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moco_d2.convert.names import HAIKU
from moco_d2.convert.sources.record import ONLINE, CheckpointSource
from moco_d2.io.unpickle import Stub

# The fields of the named tuple that is pickled; its class is a stub here.
_FIELDS = ("online_params", "target_params", "online_state", "target_state", "opt_state")


def read_variables(checkpoint: Mapping[Any, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the online and the target network, each as a flat mapping `module|tensor` -> array.

    Whatever comes before `initial_conv` in the names of a network's modules (`res_net50/~/`) is removed.
    """
    state: Any = checkpoint.get("experiment_state")
    if isinstance(state, Stub) and not state:
        state = state.arguments
    if isinstance(state, tuple):
        state = dict(zip(_FIELDS, state, strict=False))
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
    return {
        f"{module}|{name}": value
        for module, tensors in _mapping(modules).items()
        if isinstance(module, str)
        for name, value in _mapping(tensors).items()
    }


def _mapping(value: Any) -> Mapping[Any, Any]:
    """Return the mapping that a mapping of haiku's own class was pickled from."""
    if isinstance(value, Stub) and not value:
        inside = [*value.arguments, *(value.state.values() if isinstance(value.state, Mapping) else [value.state])]
        value = next((item for item in inside if isinstance(item, Mapping)), {})
    return value if isinstance(value, Mapping) else {}


BYOL = CheckpointSource(
    name="DeepMind's BYOL",
    key="byol",
    origin="BYOL",
    arxiv="2006.07733",
    containers=("experiment_state.online",),
    naming=HAIKU,
    read=read_variables,
    dropped=(
        (r"^(projector|predictor|classifier)\b", "head"),
        (r"_ema\|(hidden|counter)$", "state of the moving averages in norms"),
    ),
    padding="all",
    encoder=ONLINE,
    notes=(
        "the source pads the stem, the max-pooling and the strided 3x3 convolutions more on the right and below "
        "(JAX's SAME); Detectron2 pads evenly, so its features are shifted by up to a pixel",
    ),
)

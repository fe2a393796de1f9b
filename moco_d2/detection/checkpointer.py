"""Detectron2's checkpointer, which opens no file: it loads what the one reader has read, and writes atomically."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from moco_d2.detection.weight_file import convert_hint, read_weight_file
from moco_d2.running.checkpoints import point_to, save_run


class TransferCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, reading safely and writing files that are complete or not there.

    Detectron2's own opens ``.pkl`` files with plain pickle, and others with ``torch.load``: both may run code.
    """

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth``, then the pointer to it."""
        if self.save_dir and self.save_to_disk:
            save_run(self, name, **kwargs)
            point_to(self, name)

    def load(self, path: str, checkpointables: Sequence[str] | None = None) -> dict[str, Any]:
        """Load a file (see :func:`load_content`); an empty path loads nothing.

        Raises:
            ValueError: the file cannot be read, or does not fit.
        """
        if not path:
            return {}
        file = read_weight_file(path, self.model.state_dict().keys())
        return load_content(self, file.content, path, checkpointables)


def load_content(
    checkpointer: DetectionCheckpointer, content: Mapping[str, Any], path: str, checkpointables: Sequence[str] | None
) -> dict[str, Any]:
    """Load what a file holds as Detectron2 does: with its heuristics for names, and what is registered beside a model.

    Args:
        checkpointer: of the model.
        content: of :func:`~moco_d2.detection.weight_file.read_weight_file`; it stays as it is.
        path: for messages.
        checkpointables: names of what is loaded beside the model; ``None`` for everything that is registered.

    Returns:
        What was not loaded.

    Raises:
        ValueError: it does not fit.
    """
    rest = {**content, "model": dict(content["model"])}
    try:
        checkpointer._log_incompatible_keys(checkpointer._load_model(rest))
    except Exception as error:  # the heuristics assert, index and concatenate what they expect of a name
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: Detectron2 cannot load it ({reason}){convert_hint(path)}") from error
    for key in checkpointer.checkpointables if checkpointables is None else checkpointables:
        if key not in rest:
            continue
        # A copy: optimizers keep what they are given and change it in place, and these tensors are the mapped file.
        state = copy.deepcopy(rest.pop(key))
        try:
            checkpointer.checkpointables[key].load_state_dict(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path}: its `{key}` is not of a run like this one ({type(error).__name__}: {error}); start a new run "
                f"in another OUTPUT_DIR with MODEL.WEIGHTS {path}"
            ) from error
    return rest

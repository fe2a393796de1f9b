"""Detectron2's checkpointer with the project's safe reader and atomic writes."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer

from moco_d2.detection.weight_file import convert_hint, read_weight_file
from moco_d2.running.checkpoints import point_to, save_run


class TransferCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, with safe reading and atomic writing.

    Detectron2's own opens ``.pkl`` files with plain pickle and others with ``torch.load``; both may run code.
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
    """Load a file's content as Detectron2 does: the model by its heuristics for names, then the checkpointables.

    Args:
        checkpointer: the model's.
        content: from :func:`~moco_d2.detection.weight_file.read_weight_file`; it is not changed.
        path: path of the file, for messages.
        checkpointables: names of what is loaded besides the model; ``None`` for everything that is registered.

    Returns:
        The content that was not loaded.

    Raises:
        ValueError: the content does not fit.
    """
    rest = {**content, "model": dict(content["model"])}
    try:
        checkpointer._log_incompatible_keys(checkpointer._load_model(rest))
    except Exception as error:  # the heuristics raise anything at names that they do not expect
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: Detectron2 cannot load it ({reason}).{convert_hint(path)}") from error
    for key in checkpointer.checkpointables if checkpointables is None else checkpointables:
        if key not in rest:
            continue
        # A copy, because optimizers keep the tensors and change them in place, and these are views of the mapped file.
        state = copy.deepcopy(rest.pop(key))
        try:
            checkpointer.checkpointables[key].load_state_dict(state)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path}: its `{key}` belongs to a run with another config ({type(error).__name__}: {error}). Start a "
                f"new run in another OUTPUT_DIR with MODEL.WEIGHTS {path}"
            ) from error
    return rest

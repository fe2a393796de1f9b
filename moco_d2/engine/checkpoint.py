"""Checkpoints of pretraining: the whole run for resuming, and the backbone for everyone else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

from detectron2.utils import comm
from fvcore.common.checkpoint import Checkpointer
from torch import nn

from moco_d2.convert.catalog import PREFIX
from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import open_checkpoint, some
from moco_d2.methods import SSLMethod
from moco_d2.running.checkpoints import point_to, read_run, save_run, write_tensors
from moco_d2.running.weights import local_path, refuse_stubs

logger = logging.getLogger(__name__)


class PretrainCheckpointer(Checkpointer):
    """fvcore's checkpointer, writing atomically and a ``backbone.pth`` beside every checkpoint.

    ``backbone.pth`` holds ``state_dict`` (the transferred network under torchvision's names, without head) and
    ``facts`` (:class:`~moco_d2.facts.BackboneFacts`); it has tensors and plain values only.
    """

    def __init__(
        self, model: nn.Module, save_dir: str, facts: Callable[[], BackboneFacts], **checkpointables: Any
    ) -> None:
        """Set up; ``facts`` is asked at each checkpoint."""
        super().__init__(model, save_dir, save_to_disk=comm.is_main_process(), **checkpointables)
        self.facts = facts

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` with everything that resuming needs, then ``backbone.pth``, then the pointer to it."""
        if not self.save_dir or not self.save_to_disk:
            return
        facts = self.facts().as_dict()
        save_run(self, name, facts=facts, **kwargs)
        backbone = {"state_dict": self.model.backbone().state_dict(), "facts": facts}
        write_tensors(backbone, os.path.join(self.save_dir, "backbone.pth"))
        point_to(self, name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a run's checkpoint; fvcore's own reading may run code from it."""
        return read_run(filename)

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        """Load strictly: fvcore's own only warns of what does not fit."""
        try:
            self.model.load_state_dict(checkpoint.pop("model"))
        except RuntimeError as error:
            raise ValueError(f"the checkpoint is of another model (was SSL changed?): {error}") from error


def load_method(method: SSLMethod, path: str) -> None:
    """Start a method from a checkpoint of the whole method: ours (``model_*.pth``) or the published code's.

    Raises:
        ValueError: the file holds something else, or a method of other sizes; the message says what differs.
    """
    if path.startswith(PREFIX):
        raise ValueError(
            f"MODEL.WEIGHTS {path}: the published weights of the catalogue are converted backbones, for detectors; "
            "pretraining starts from a checkpoint of the whole method: a run's model_*.pth, or the training checkpoint "
            "that the authors' code writes"
        )
    checkpoint = open_checkpoint(local_path(path))
    place = next((key for key in ("model", "state_dict") if isinstance(checkpoint.content.get(key), dict)), "")
    state = checkpoint.content.get(place)
    if not state:
        raise ValueError(
            f"{path} holds {some(map(str, checkpoint.content), 5)}, but a checkpoint of the whole method was expected: "
            "`model` or `state_dict`, with its encoders by name"
        )
    refuse_stubs(checkpoint, place)
    try:
        method.load_state_dict(method.adapt_state_dict(state))
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # entries that are no tensors, too
        raise ValueError(
            f"MODEL.WEIGHTS {path} is not a checkpoint of this {type(method).__name__} (check SSL.ENCODER, SSL.ARGS; "
            f"a backbone alone is not enough, all encoders and the queue are needed): "
            + " ".join(str(error).split())[:600]
        ) from error
    logger.info("started from %s", path)

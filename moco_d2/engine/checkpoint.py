"""Checkpoints of pretraining: the whole run for resuming, and the backbone for everyone else."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
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
    """fvcore's checkpointer with atomic writes and a ``backbone.pth`` beside every checkpoint.

    ``backbone.pth`` holds ``state_dict`` (the network to transfer: torchvision's names, no head) and ``facts``
    (:class:`~moco_d2.facts.BackboneFacts`): tensors and plain values only. A checkpoint also records under ``backbone``
    its method, and where in ``model`` that network is (:func:`backbone_prefix`).
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        facts: Callable[[], BackboneFacts],
        check: Callable[[Mapping[str, Any]], None] = lambda trainer: None,
        **checkpointables: Any,
    ) -> None:
        """Set up.

        Args:
            model: the method.
            save_dir: folder of the run.
            facts: called for each checkpoint that is written.
            check: called with a checkpoint's ``trainer`` before anything is loaded; raises ValueError if the settings
                differ.
            checkpointables: what is saved and loaded besides the method.
        """
        super().__init__(model, save_dir, save_to_disk=comm.is_main_process(), **checkpointables)
        self.facts, self.check = facts, check

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<name>.pth`` with all that resuming needs, then ``backbone.pth``, then ``last_checkpoint``."""
        if not self.save_dir or not self.save_to_disk:
            return
        facts = self.facts().as_dict()
        place = {"method": type(self.model).__name__, "prefix": backbone_prefix(self.model)}
        save_run(self, name, facts=facts, backbone=place, **kwargs)
        backbone = {"state_dict": self.model.backbone().state_dict(), "facts": facts}
        write_tensors(backbone, os.path.join(self.save_dir, "backbone.pth"))
        point_to(self, name)

    def _load_file(self, filename: str) -> dict[str, Any]:
        """Read a run's checkpoint safely; fvcore's own reader can run code from the file."""
        return read_run(filename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Load a run's checkpoint.

        Raises:
            ValueError: the file cannot be read, or belongs to another run.
        """
        try:
            return dict(super().load(path, checkpointables))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"{path} is a checkpoint of another model or run (was SSL changed?): {type(error).__name__}: "
                + _one_line(error)
            ) from error

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        """Load strictly; fvcore's own method only warns about keys that do not match."""
        _refuse_another_method(self.model, checkpoint)
        self.check(checkpoint.get("trainer", {}))  # a changed setting explains tensors that do not fit
        self.model.load_state_dict(checkpoint.pop("model"))


def backbone_prefix(method: SSLMethod) -> str | None:
    """Return the prefix of the backbone's names in the method's ``state_dict``, with the dot at its end.

    None if no prefix gives all of them, as when ``backbone()`` computes new weights. Such a checkpoint cannot be
    converted; the ``backbone.pth`` beside it can.
    """
    names, backbone = method.state_dict(keep_vars=True), method.backbone().state_dict(keep_vars=True)
    first = next(iter(backbone))
    # keep_vars returns the parameters and buffers themselves, so that a network is found by identity, not by name.
    prefixes = [name.removesuffix(first) for name, value in names.items() if value is backbone[first]]
    for prefix in prefixes:
        if all(names.get(prefix + name) is value for name, value in backbone.items()):
            return prefix
    return None


def _refuse_another_method(method: SSLMethod, content: Mapping[str, Any]) -> None:
    """Raise ValueError if a checkpoint names another method; those of earlier versions and other code name none."""
    backbone, mine = content.get("backbone"), type(method).__name__
    saved = backbone.get("method", mine) if isinstance(backbone, Mapping) else mine
    if saved != mine:
        raise ValueError(
            f"the checkpoint is of a {saved} run, but SSL.METHOD is {mine}: pretraining starts from, or resumes, only "
            "a checkpoint of the same method"
        )


def _parts(content: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the tensors of a file without ``model`` and ``state_dict``, and those of its parts as ``part.name``.

    Such are SwAV's released files, which are state dicts, and DINO's, with ``student``, ``teacher`` and ``dino_loss``.
    """
    parts = {"": content, **{f"{name}.": part for name, part in content.items() if isinstance(part, Mapping)}}
    return {
        f"{prefix}{key}": value
        for prefix, part in parts.items()
        for key, value in part.items()
        if isinstance(value, torch.Tensor)
    }


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]


def load_method(method: SSLMethod, path: str) -> None:
    """Initialise a method from a checkpoint of the whole method: a run's ``model_*.pth``, or the published code's.

    Raises:
        ValueError: the file holds something else, another method, or one of other sizes; the message says what differs.
    """
    if path.startswith(PREFIX):
        raise ValueError(
            f"MODEL.WEIGHTS {path}: the catalogue holds converted backbones, for detectors. Pretraining starts from a "
            "checkpoint of the whole method: a run's model_*.pth, or a training checkpoint of the authors' code"
        )
    checkpoint = open_checkpoint(local_path(path))
    place = next((key for key in ("model", "state_dict", "net") if isinstance(checkpoint.content.get(key), dict)), "")
    state = checkpoint.content.get(place) or _parts(checkpoint.content)
    if not state:
        raise ValueError(
            f"MODEL.WEIGHTS {path} holds {some(map(str, checkpoint.content), 5)}. Pretraining starts from a checkpoint "
            "of the whole method, with its state dict under `model` or `state_dict`"
        )
    refuse_stubs(checkpoint, place)
    try:
        _refuse_another_method(method, checkpoint.content)
        own = {key: value for key, value in method.state_dict().items() if key.startswith(method.memories)}
        method.load_state_dict(own | method.adapt_state_dict(state))
    except ValueError as error:
        raise ValueError(f"MODEL.WEIGHTS {path}: {error}") from error
    except (AttributeError, KeyError, RuntimeError, TypeError) as error:  # also entries that are not tensors
        raise ValueError(
            f"MODEL.WEIGHTS {path} is not a checkpoint of this {type(method).__name__} (check SSL.ENCODER and "
            f"SSL.ARGS; a backbone is not enough, the whole method is needed): {_one_line(error)}"
        ) from error
    logger.info("started from %s", path)

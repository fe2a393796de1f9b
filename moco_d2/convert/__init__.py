"""Conversion of any ResNet or plain ViT checkpoint to a file that Detectron2 loads completely, with facts and a proof.

:func:`convert_checkpoint` does all of it; the proof needs Detectron2. :func:`read_checkpoint` and :func:`read_facts`
read any file of weights.
"""

from moco_d2.convert.choice import Choice
from moco_d2.convert.conversion import Conversion, write
from moco_d2.convert.convert import convert_checkpoint, convert_state
from moco_d2.convert.prove import ProofError, can_prove, prove
from moco_d2.convert.sources import SOURCES, UNSUPPORTED, CheckpointSource, Unsupported
from moco_d2.io.checkpoints import CheckpointError, read_checkpoint, read_facts

__all__ = [
    "SOURCES",
    "UNSUPPORTED",
    "CheckpointError",
    "CheckpointSource",
    "Choice",
    "Conversion",
    "ProofError",
    "Unsupported",
    "can_prove",
    "convert_checkpoint",
    "convert_state",
    "prove",
    "read_checkpoint",
    "read_facts",
    "write",
]

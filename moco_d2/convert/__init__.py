"""Anyone's ResNet checkpoint -> a file that Detectron2 loads whole, with facts and a proof (which needs Detectron2).

``convert_checkpoint`` does it all; ``read_checkpoint`` and ``read_facts`` are for every stage that opens a weight file.
"""

from moco_d2.convert.choice import Choice
from moco_d2.convert.conversion import Conversion, write
from moco_d2.convert.convert import convert_checkpoint, convert_state
from moco_d2.convert.prove import ProofError, can_prove, prove
from moco_d2.convert.sources import LOOKALIKES, SOURCES, CheckpointSource, Lookalike
from moco_d2.io.checkpoints import CheckpointError, read_checkpoint, read_facts

__all__ = [
    "LOOKALIKES",
    "SOURCES",
    "CheckpointError",
    "CheckpointSource",
    "Choice",
    "Conversion",
    "Lookalike",
    "ProofError",
    "can_prove",
    "convert_checkpoint",
    "convert_state",
    "prove",
    "read_checkpoint",
    "read_facts",
    "write",
]

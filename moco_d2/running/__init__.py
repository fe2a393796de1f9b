"""What the loops of both stages share so that nothing is lost: checkpoints, seeds, and stopping when asked to."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)

"""Parts that the training loops of both stages share: launcher, checkpoints, seeds, preemption, the run's folder."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)

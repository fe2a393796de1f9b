"""The pretraining engine: method and data to checkpoints."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)

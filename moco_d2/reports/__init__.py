"""From finished runs to numbers and pictures."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)

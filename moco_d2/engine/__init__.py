"""The pretraining engine: it trains a method on data and writes checkpoints."""

from moco_d2 import host  # noqa: F401  (first: it checks that Detectron2 is installed)

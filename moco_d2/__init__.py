"""Pretrain without labels, convert, and measure it in detection: MoCo and its line of methods for Detectron2.

Importing the package loads nothing. :func:`moco_d2.config.get_cfg` returns Detectron2's config with this project's keys
and registers the names that its YAML files use. ``moco_d2.layers``, ``moco_d2.methods`` and ``moco_d2.convert`` need
torch only.
"""

__version__ = "0.1.0"

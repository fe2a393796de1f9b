"""The configuration: this project's keys beside Detectron2's, the shipped files by name, and the roles of keys."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)
from moco_d2.config.keys import add_config, get_cfg
from moco_d2.config.load import flat, load_cfg, mistyped_keys, settings, unread_keys
from moco_d2.config.machine import use_available_device
from moco_d2.config.shipped import INITS, config_files, list_configs, shipped_files, sweep_file, with_init

__all__ = [
    "INITS",
    "add_config",
    "config_files",
    "flat",
    "get_cfg",
    "list_configs",
    "load_cfg",
    "mistyped_keys",
    "settings",
    "shipped_files",
    "sweep_file",
    "unread_keys",
    "use_available_device",
    "with_init",
]

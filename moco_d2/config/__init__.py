"""The configuration: Detectron2's keys beside ours, the shipped files by name, and what each key is for."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)
from moco_d2.config.keys import add_config, get_cfg
from moco_d2.config.load import (
    INITS,
    config_files,
    flat,
    list_configs,
    load_cfg,
    mistyped_keys,
    unread_keys,
    use_device_there_is,
)

__all__ = [
    "INITS",
    "add_config",
    "config_files",
    "flat",
    "get_cfg",
    "list_configs",
    "load_cfg",
    "mistyped_keys",
    "unread_keys",
    "use_device_there_is",
]

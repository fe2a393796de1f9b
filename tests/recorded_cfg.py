"""A config that notes which of its keys are read."""

from __future__ import annotations

from typing import Any, ClassVar

from detectron2.config import CfgNode


class RecordedCfg(CfgNode):
    """A config whose clones, too, note every key that is read in ``RecordedCfg.read``.

    Looking through all of it (``items``, ``dump``, ``flat``) is no reading.
    """

    read: ClassVar[set[str]] = set()

    def __init__(self, init_dict: Any = None, key_list: Any = None, new_allowed: bool = False) -> None:
        super().__init__(init_dict, key_list, new_allowed)
        self.__dict__["group"] = "".join(f"{name}." for name in key_list or ())

    def __getitem__(self, name: str) -> Any:
        value = super().__getitem__(name)
        if not isinstance(value, CfgNode):
            self.read.add(self.__dict__["group"] + name)
        return value

"""Pretrain without labels, convert, and measure it in detection: MoCo for Detectron2.

Importing the package registers every name its YAML files use (methods, heads, datasets), which needs Detectron2.
``moco_d2.layers``, ``moco_d2.methods`` and ``moco_d2.convert`` need torch only, and import without it.
"""

from __future__ import annotations

import importlib.util
import sys

__version__ = "0.1.0"

INSTALL_DETECTRON2 = "python -m moco_d2.install_detectron2"

_TORCH_ONLY = ("moco_d2.layers", "moco_d2.methods", "moco_d2.convert", "moco_d2.facts")
_NEEDS_NOTHING = ("moco_d2.doctor", "moco_d2.install_detectron2")


def _wanted_module() -> str:
    """Return the full name in the import statement that is running (``moco_d2.layers.queue``, or ``moco_d2``).

    Python imports a package before its parts and does not tell the package why; the import machinery's own frames do.
    """
    frame, wanted = sys._getframe(), __name__
    while frame := frame.f_back:  # type: ignore[assignment]
        name = frame.f_locals.get("name") or frame.f_locals.get("mod_name")  # importlib / runpy (python -m)
        if "importlib" in frame.f_code.co_filename or "runpy" in frame.f_code.co_filename:
            if isinstance(name, str) and name.startswith(__name__ + "."):
                wanted = name
    return wanted


if importlib.util.find_spec("detectron2") is not None:
    pass
elif not _wanted_module().startswith(_TORCH_ONLY + _NEEDS_NOTHING):
    raise ImportError(
        f"moco_d2 needs detectron2, which is not installed. Install it with\n    {INSTALL_DETECTRON2}\n"
        "(moco_d2.layers, moco_d2.methods and moco_d2.convert work without it: import them by their full name)"
    )

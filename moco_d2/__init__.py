"""Pretrain without labels, convert, and measure it in detection: MoCo for Detectron2.

Importing the package registers every name its YAML files use (methods, heads, datasets), and their keys, with
Detectron2, which it therefore needs.
``moco_d2.layers``, ``moco_d2.methods`` and ``moco_d2.convert`` need torch only, and import without it.
"""

from __future__ import annotations

import importlib.util
import sys

__version__ = "0.1.0"

INSTALL_DETECTRON2 = "python -m moco_d2.install_detectron2"

_TORCH_ONLY = ("moco_d2.layers", "moco_d2.methods", "moco_d2.convert", "moco_d2.facts", "moco_d2.io")
# moco_d2.exits is imported first only by a command that has failed before it could import anything else.
_NEEDS_NOTHING = ("moco_d2.doctor", "moco_d2.exits", "moco_d2.install_detectron2")


def _wanted_module() -> str:
    """Return the full name in the import statement that is running (``moco_d2.layers.queue``, or ``moco_d2``).

    Python imports a package before its parts and does not tell the package why; the import machinery's own frames do.
    """
    wanted = __name__
    frame = sys._getframe().f_back
    while frame is not None:
        if "importlib" in frame.f_code.co_filename or "runpy" in frame.f_code.co_filename:  # runpy: python -m
            name = frame.f_locals.get("name") or frame.f_locals.get("mod_name")
            if isinstance(name, str) and name.startswith(__name__ + "."):
                wanted = name
        frame = frame.f_back
    return wanted


_wanted = _wanted_module()
_spec = importlib.util.find_spec("detectron2")
# A folder that merely has the name (a git clone in the working directory) is a namespace package: it has no origin.
if _spec is None or _spec.origin is None:
    if not _wanted.startswith(_TORCH_ONLY + _NEEDS_NOTHING):
        raise ImportError(
            f"moco_d2 needs detectron2, which is not installed. Install it with\n    {INSTALL_DETECTRON2}\n"
            "(moco_d2.layers, moco_d2.methods and moco_d2.convert work without it: import them by their full name)",
            name="detectron2",
        )
elif not _wanted.startswith(_NEEDS_NOTHING):  # The doctor must come through when Detectron2 is broken.
    from moco_d2.io.paths import expand_datasets_root

    expand_datasets_root()  # Detectron2 reads the variable when its data sets are imported, which comes next.
    from moco_d2 import config, data, detection, methods  # noqa: F401  (registers)

    config.extend_detectron2()

"""Check for Detectron2, which this package extends; the path of its data sets; warnings that are not for users.

Every package that needs Detectron2 imports this module first. ``moco_d2.layers``, ``moco_d2.methods`` and
``moco_d2.convert`` do not need it.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings

from moco_d2.install_detectron2 import COMMAND
from moco_d2.io.paths import expand_datasets_root

_spec = importlib.util.find_spec("detectron2")
# A mere folder of this name (a git clone in the working directory) is a namespace package, which has no origin.
if _spec is None or _spec.origin is None:
    raise ImportError(
        f"moco_d2 needs detectron2, which is not installed. Install it with\n    {COMMAND}\n"
        "(moco_d2.layers, moco_d2.methods and moco_d2.convert work without it)",
        name="detectron2",
    )

expand_datasets_root()  # Detectron2 reads the variable once, when its data sets are imported

# What torch tells Detectron2's authors (of torch.fx, of meshgrid, of a missing GPU) is no news for a user.
for _name in ("torch.fx._symbolic_trace", "torch.utils.cpp_extension"):
    logging.getLogger(_name).setLevel(logging.ERROR)
warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release", UserWarning)

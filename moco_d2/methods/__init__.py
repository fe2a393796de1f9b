"""Self-supervised methods, one per file. Importing the package registers all of them."""

from moco_d2.methods.base import METHODS, Diagnostic, SSLMethod, build_method, default_args, method_class
from moco_d2.methods.cmc import CMC
from moco_d2.methods.cpc import CPC
from moco_d2.methods.densecl import DenseCL
from moco_d2.methods.moco import MoCo
from moco_d2.methods.pixpro import PixPro

__all__ = [
    "CMC",
    "CPC",
    "METHODS",
    "DenseCL",
    "Diagnostic",
    "MoCo",
    "PixPro",
    "SSLMethod",
    "build_method",
    "default_args",
    "method_class",
]

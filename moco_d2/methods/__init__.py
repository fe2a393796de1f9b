"""Self-supervised methods, one per file. Importing the package registers all of them."""

from moco_d2.methods.barlow_twins import BarlowTwins
from moco_d2.methods.base import METHODS, Diagnostic, SSLMethod, build_method, default_args, method_class
from moco_d2.methods.byol import BYOL
from moco_d2.methods.moco import MoCo
from moco_d2.methods.moco_v3 import MoCoV3
from moco_d2.methods.simsiam import SimSiam
from moco_d2.methods.vicreg import VICReg

__all__ = [
    "BYOL",
    "METHODS",
    "BarlowTwins",
    "Diagnostic",
    "MoCo",
    "MoCoV3",
    "SSLMethod",
    "SimSiam",
    "VICReg",
    "build_method",
    "default_args",
    "method_class",
]

"""Self-supervised methods, one per file. Importing the package registers all of them."""

from moco_d2.methods.barlow_twins import BarlowTwins
from moco_d2.methods.base import METHODS, Diagnostic, SSLMethod, build_method, default_args, method_class
from moco_d2.methods.byol import BYOL
from moco_d2.methods.cmc import CMC
from moco_d2.methods.cpc import CPC
from moco_d2.methods.deepcluster import DeepClusterV2
from moco_d2.methods.densecl import DenseCL
from moco_d2.methods.dino import DINO
from moco_d2.methods.end_to_end import EndToEnd
from moco_d2.methods.instdisc import InstDisc
from moco_d2.methods.invaspread import InvaSpread
from moco_d2.methods.moco import MoCo
from moco_d2.methods.moco_v3 import MoCoV3
from moco_d2.methods.pixpro import PixPro
from moco_d2.methods.simclr import SimCLR
from moco_d2.methods.simsiam import SimSiam
from moco_d2.methods.swav import SwAV
from moco_d2.methods.vicreg import VICReg

__all__ = [
    "BYOL",
    "CMC",
    "CPC",
    "DINO",
    "METHODS",
    "BarlowTwins",
    "DeepClusterV2",
    "DenseCL",
    "Diagnostic",
    "EndToEnd",
    "InstDisc",
    "InvaSpread",
    "MoCo",
    "MoCoV3",
    "PixPro",
    "SSLMethod",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "VICReg",
    "build_method",
    "default_args",
    "method_class",
]

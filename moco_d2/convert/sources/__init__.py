"""Known checkpoints: one record per project and form of file, in the order of precedence.

To add a source, add its record to one file of this folder. The first record whose network is complete decides which
network is taken; the number of matching keys never does, because many files hold the same network twice. Of the records
that keep it in the same place, those whose signature is in the file come before those without a signature. If those
that remain disagree about pixels or strides, the user is asked.
"""

from __future__ import annotations

from moco_d2.convert.names import Naming
from moco_d2.convert.sources.backbone import BACKBONE
from moco_d2.convert.sources.bare import BARE
from moco_d2.convert.sources.detection import DETECTORS
from moco_d2.convert.sources.encoder import ENCODER
from moco_d2.convert.sources.frameworks import FACEBOOK, OTHER_NAMES
from moco_d2.convert.sources.momentum import MOMENTUM
from moco_d2.convert.sources.online import ONLINE_NETWORKS
from moco_d2.convert.sources.record import (
    ANY,
    COUNTERS,
    DETECTOR_HEADS,
    INSIDE_HEADS,
    TARGET_NETWORKS,
    WRAPPERS,
    CheckpointSource,
    unwrap,
)
from moco_d2.convert.sources.unsupported import UNSUPPORTED, Unsupported
from moco_d2.convert.sources.vits import INVISIBLE_IN_VITS, VIT_SOURCES, VIT_UNSUPPORTED, VitSource

__all__ = [
    "ANY",
    "COUNTERS",
    "DETECTOR_HEADS",
    "INSIDE_HEADS",
    "INVISIBLE",
    "INVISIBLE_IN_VITS",
    "NAMINGS",
    "SOURCES",
    "TARGET_NETWORKS",
    "UNSUPPORTED",
    "VIT_SOURCES",
    "VIT_UNSUPPORTED",
    "WRAPPERS",
    "CheckpointSource",
    "Unsupported",
    "VitSource",
    "unwrap",
]

# The order is the precedence, here and in each file.
SOURCES: tuple[CheckpointSource, ...] = (
    *MOMENTUM,
    *BACKBONE,
    *ONLINE_NETWORKS,
    *FACEBOOK,
    *ENCODER,
    *OTHER_NAMES,
    *DETECTORS,
    *BARE,
)

# Every spelling of a ResNet's tensors that a record uses.
NAMINGS: tuple[Naming, ...] = tuple(dict.fromkeys(source.naming for source in SOURCES))

# Stated in every report.
INVISIBLE = (
    "weights do not show anti-aliasing (timm's resnetaa50, resnetblur50), dilation, other strides or other padding: "
    "the same names and shapes fit them; none of these is assumed"
)

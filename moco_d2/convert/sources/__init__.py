"""Which checkpoints are understood: one record per project and form of file, in the order of precedence.

To add a source, add a record to the file of its place. The first whose network is complete decides which network is
taken: how many keys match never does, because many files hold the same network twice. Of the sources that keep it in
the same place, those whose marks show are taken before those without marks; if they disagree about pixels or strides,
the user is asked.
"""

from __future__ import annotations

from moco_d2.convert.sources.backbone import BACKBONE
from moco_d2.convert.sources.bare import BARE
from moco_d2.convert.sources.detection import DETECTORS
from moco_d2.convert.sources.encoder import ENCODER
from moco_d2.convert.sources.frameworks import FACEBOOK, OTHER_NAMES
from moco_d2.convert.sources.lookalikes import LOOKALIKES, Lookalike
from moco_d2.convert.sources.momentum import MOMENTUM
from moco_d2.convert.sources.online import ONLINE_NETWORKS
from moco_d2.convert.sources.record import (
    ANY,
    COMPANIONS,
    COUNTERS,
    DETECTOR_HEADS,
    INSIDE_HEADS,
    WRAPPERS,
    CheckpointSource,
)

__all__ = [
    "ANY",
    "COMPANIONS",
    "COUNTERS",
    "DETECTOR_HEADS",
    "INSIDE_HEADS",
    "LOOKALIKES",
    "SOURCES",
    "UNSEEN",
    "WRAPPERS",
    "CheckpointSource",
    "Lookalike",
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

# What nobody can see in a ResNet's weights; said in every report.
UNSEEN = (
    "the same names and shapes fit anti-aliased twins (timm's resnetaa50, resnetblur50), dilated networks and other "
    "strides or paddings; none of these is assumed"
)

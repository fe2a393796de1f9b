"""Backbones to be probed: any file that the converter reads, a name of the catalogue, or random weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import nn

from moco_d2.facts import BackboneFacts
from moco_d2.io.checkpoints import read_checkpoint

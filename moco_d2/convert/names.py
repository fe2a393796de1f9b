"""Who calls which tensor what: one :class:`Naming` per family, and the rename tables between two of them.

A ResNet's tensors are enumerated in one fixed order from its depth, and a naming spells that list. Two spellings zip
into a table, so every renaming can be inverted exactly, and the list itself says when a network is complete.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torchvision.models.resnet import Bottleneck

from moco_d2.layers.resnet import DEPTHS

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Naming:
    """How one family of code spells the modules of a ResNet.

    The templates may use ``s`` (stage 1..4), ``s0`` (from 0), ``r`` (2..5), ``b`` (block from 0), ``c`` (convolution
    1..3) and ``c0`` (from 0).

    Attributes:
        stem: the first convolution.
        stem_norm: its normalisation.
        conv: convolution ``c`` of block ``b`` of stage ``s``.
        norm: the normalisation after that convolution.
        shortcut: the convolution in the shortcut of a stage's first block.
        shortcut_norm: its normalisation.
    """

    stem: str
    stem_norm: str
    conv: str
    norm: str
    shortcut: str
    shortcut_norm: str

    def names(self, depth: int) -> list[str]:
        """Spell every tensor of a ResNet, in the order that all namings share (265 for depth 50)."""
        names = [f"{self.stem}.weight", *(f"{self.stem_norm}.{t}" for t in NORM_TENSORS)]
        for stage, block, conv in _convolutions(depth):
            place = {"s": stage, "s0": stage - 1, "r": stage + 1, "b": block, "c": conv, "c0": conv - 1}
            module, norm = (self.conv, self.norm) if conv else (self.shortcut, self.shortcut_norm)
            names.append(f"{module.format(**place)}.weight")
            names.extend(f"{norm.format(**place)}.{t}" for t in NORM_TENSORS)
        return names

    def depth_of(self, names: Collection[str]) -> int | None:
        """Return the depth of the deepest ResNet that ``names`` complete, or None (more names may be there)."""
        present = set(names)
        # The shallow ones are subsets of the deep ones: 34 of 50 by name, 50 of 101, 101 of 152.
        return next((d for d in sorted(DEPTHS, reverse=True) if present.issuperset(self.names(d))), None)

    def nearest(self, names: Collection[str]) -> tuple[int, list[str]]:
        """Return the depth that misses least of ``names``, and what it misses; of equals, the deepest."""
        present = set(names)
        missing = {d: [n for n in self.names(d) if n not in present] for d in DEPTHS}
        depth = min(missing, key=lambda d: (len(missing[d]) / len(self.names(d)), -d))
        return depth, missing[depth]


def _convolutions(depth: int) -> Iterator[tuple[int, int, int]]:
    """Yield (stage, block, convolution) of all residual convolutions; convolution 0 is the shortcut's."""
    kind, blocks = DEPTHS[depth]
    bottleneck = kind is Bottleneck
    for stage, count in enumerate(blocks, start=1):
        for block in range(count):
            for conv in range(1, 4 if bottleneck else 3):
                yield stage, block, conv
            # A bottleneck's first stage widens, a basic block's does not.
            if block == 0 and (bottleneck or stage > 1):
                yield stage, block, 0


def rename_table(source: Naming, target: Naming, depth: int) -> dict[str, str]:
    """Return source name -> target name for every tensor of a ResNet; swapping the namings inverts the table.

    Raises:
        KeyError: an unknown depth.
    """
    return dict(zip(source.names(depth), target.names(depth), strict=True))


TORCHVISION = Naming(
    stem="conv1",
    stem_norm="bn1",
    conv="layer{s}.{b}.conv{c}",
    norm="layer{s}.{b}.bn{c}",
    shortcut="layer{s}.{b}.downsample.0",
    shortcut_norm="layer{s}.{b}.downsample.1",
)

DETECTRON2 = Naming(
    stem="stem.conv1",
    stem_norm="stem.conv1.norm",
    conv="res{r}.{b}.conv{c}",
    norm="res{r}.{b}.conv{c}.norm",
    shortcut="res{r}.{b}.shortcut",
    shortcut_norm="res{r}.{b}.shortcut.norm",
)

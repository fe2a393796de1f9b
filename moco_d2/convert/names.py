"""Names of a ResNet's tensors: one :class:`Naming` per family of code.

A ResNet's tensors are enumerated in one fixed order from its depth, and a naming spells that list. The lists of two
namings zip into a rename table, which can be inverted exactly. The list also tells whether a network is complete.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from torchvision.models.resnet import Bottleneck

from moco_d2.layers.resnet import DEPTHS

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True)
class Naming:
    """How one family of code spells the tensors of a ResNet.

    The templates may use ``s`` (stage 1..4), ``s0`` (stage from 0), ``s3`` (stage as a position in ``nn.Sequential``,
    4..7), ``r`` (stage 2..5), ``b`` (block from 0), ``c`` (convolution 1..3), ``c0`` (convolution from 0), ``even`` and
    ``odd`` (positions among convolutions and their norms), ``conv3`` and ``norm3`` (positions if an activation follows
    each norm), ``letter`` (Caffe's a, b, c), ``n`` (TensorFlow's counter) and ``part`` (the part of a C4 detector).

    Attributes:
        stem: the first convolution.
        stem_norm: its normalisation.
        conv: convolution ``c`` of block ``b`` of stage ``s``.
        norm: the normalisation after that convolution.
        shortcut: the convolution in the shortcut of a stage's first block.
        shortcut_norm: its normalisation.
        last_norm: the normalisation after a block's last convolution, if it is spelled otherwise.
        kernel: what follows a convolution's name.
        norm_tensors: what follows a normalisation's name: weight, bias and, if it has them, mean and variance.
        height_first: kernels are (height, width, in, out) and vectors may have axes of length 1, as in JAX and
            TensorFlow.
    """

    stem: str
    stem_norm: str
    conv: str
    norm: str
    shortcut: str
    shortcut_norm: str
    last_norm: str = ""
    kernel: str = ".weight"
    norm_tensors: tuple[str, ...] = tuple(f".{tensor}" for tensor in NORM_TENSORS)
    height_first: bool = False

    @property
    def statistics(self) -> bool:
        """Whether normalisations have a running mean and variance."""
        return len(self.norm_tensors) == len(NORM_TENSORS)

    def with_statistics(self, has: bool) -> Naming:
        """Return this naming, or that of a network whose normalisations have no statistics (GroupNorm)."""
        return self if has else replace(self, norm_tensors=self.norm_tensors[:2])

    def names(self, depth: int) -> list[str]:
        """Spell every tensor of a ResNet, in the order that all namings share (265 for depth 50)."""
        return list(_names(self, depth))

    def depth_of(self, names: Collection[str]) -> int | None:
        """Return the depth of the deepest ResNet whose names are all among ``names``, or None."""
        present = names if isinstance(names, (set, frozenset)) else set(names)
        # The shallow ones are subsets of the deep ones: 34 of 50 by name, 50 of 101, 101 of 152.
        return next((d for d in sorted(DEPTHS, reverse=True) if present.issuperset(_names(self, d))), None)

    def nearest(self, names: Collection[str]) -> tuple[int, list[str]]:
        """Return the depth of which least is missing in ``names``, and what is missing; of equals, the deepest."""
        present = set(names)
        missing = {d: [n for n in _names(self, d) if n not in present] for d in DEPTHS}
        depth = min(missing, key=lambda d: (len(missing[d]) / len(_names(self, d)), -d))
        return depth, missing[depth]


@functools.cache
def _names(naming: Naming, depth: int) -> tuple[str, ...]:
    last = 3 if DEPTHS[depth][0] is Bottleneck else 2
    convolutions = list(_convolutions(depth))
    # TensorFlow counts in the order of creation, in which a block's shortcut comes first.
    created = {place: n for n, place in enumerate(sorted(convolutions), start=1)}
    spelled = [(naming.stem.format(n="", part="backbone."), naming.stem_norm.format(n="", part="backbone."))]
    for stage, block, conv in convolutions:
        letters = {
            "s": stage,
            "s0": stage - 1,
            "s3": stage + 3,
            "r": stage + 1,
            "b": block,
            "c": conv,
            "c0": conv - 1,
            "even": 2 * (conv - 1),
            "odd": 2 * conv - 1,
            "conv3": 3 * (conv - 1),
            "norm3": 3 * conv - 2,
            "letter": "_abc"[conv],
            "n": f"_{created[stage, block, conv]}",
            "part": "roi_heads." if stage == 4 else "backbone.",
        }
        norm = naming.last_norm if naming.last_norm and conv == last else naming.norm
        module, norm = (naming.conv, norm) if conv else (naming.shortcut, naming.shortcut_norm)
        spelled.append((module.format(**letters), norm.format(**letters)))
    return tuple(name for m, n in spelled for name in (m + naming.kernel, *(n + t for t in naming.norm_tensors)))


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
    """Return source name -> target name for every tensor of a ResNet; swapped namings give the inverse.

    Raises:
        KeyError: an unknown depth.
    """
    return dict(zip(source.names(depth), target.names(depth), strict=True))


class Row(NamedTuple):
    """The names of one tensor: the conversion moves it by this row, and the report shows the row.

    Attributes:
        key: its key in the file; empty: the converter adds it (statistics of affine layers).
        torchvision: its name in torchvision's network, with which the converter computes.
        detectron2: its name in Detectron2's network, under which it is written.
    """

    key: str
    torchvision: str
    detectron2: str


TORCHVISION = Naming(
    stem="conv1",
    stem_norm="bn1",
    conv="layer{s}.{b}.conv{c}",
    norm="layer{s}.{b}.bn{c}",
    shortcut="layer{s}.{b}.downsample.0",
    shortcut_norm="layer{s}.{b}.downsample.1",
)

# nn.Sequential(*resnet.children()): convolution, norm, ReLU and pooling are 0 to 3, the stages 4 to 7.
SEQUENTIAL = Naming(
    stem="0",
    stem_norm="1",
    conv="{s3}.{b}.conv{c}",
    norm="{s3}.{b}.bn{c}",
    shortcut="{s3}.{b}.downsample.0",
    shortcut_norm="{s3}.{b}.downsample.1",
)

DETECTRON2 = Naming(
    stem="stem.conv1",
    stem_norm="stem.conv1.norm",
    conv="res{r}.{b}.conv{c}",
    norm="res{r}.{b}.conv{c}.norm",
    shortcut="res{r}.{b}.shortcut",
    shortcut_norm="res{r}.{b}.shortcut.norm",
)

# A detector whose last stage is its box head.
DETECTRON2_C4 = Naming(
    stem="{part}stem.conv1",
    stem_norm="{part}stem.conv1.norm",
    conv="{part}res{r}.{b}.conv{c}",
    norm="{part}res{r}.{b}.conv{c}.norm",
    shortcut="{part}res{r}.{b}.shortcut",
    shortcut_norm="{part}res{r}.{b}.shortcut.norm",
)

CAFFE2 = Naming(
    stem="conv1",
    stem_norm="res_conv1_bn",
    conv="res{r}_{b}_branch2{letter}",
    norm="res{r}_{b}_branch2{letter}_bn",
    shortcut="res{r}_{b}_branch1",
    shortcut_norm="res{r}_{b}_branch1_bn",
    kernel="_w",
    norm_tensors=("_gamma", "_beta", "_running_mean", "_running_var"),
)
CAFFE2_SHORT = replace(CAFFE2, norm_tensors=("_s", "_b", "_rm", "_riv"))
CAFFE2_AFFINE = replace(CAFFE2, norm_tensors=("_s", "_b"))  # the statistics are folded into weight and bias

HUGGING_FACE = Naming(
    stem="embedder.embedder.convolution",
    stem_norm="embedder.embedder.normalization",
    conv="encoder.stages.{s0}.layers.{b}.layer.{c0}.convolution",
    norm="encoder.stages.{s0}.layers.{b}.layer.{c0}.normalization",
    shortcut="encoder.stages.{s0}.layers.{b}.shortcut.convolution",
    shortcut_norm="encoder.stages.{s0}.layers.{b}.shortcut.normalization",
)

SEPARIUS = Naming(
    stem="net.0.0",
    stem_norm="net.0.1.0",
    conv="net.{s}.blocks.{b}.net.{even}",
    norm="net.{s}.blocks.{b}.net.{odd}.0",
    shortcut="net.{s}.blocks.{b}.projection.shortcut",
    shortcut_norm="net.{s}.blocks.{b}.projection.bn.0",
)

CLASSY_VISION = Naming(
    stem="initial_block._module.0",
    stem_norm="initial_block._module.1",
    conv="blocks.{s0}.block{s0}-{b}.convolutional_block.{conv3}",
    norm="blocks.{s0}.block{s0}-{b}.convolutional_block.{norm3}",
    last_norm="blocks.{s0}.block{s0}-{b}.bn",
    shortcut="blocks.{s0}.block{s0}-{b}.downsample.0",
    shortcut_norm="blocks.{s0}.block{s0}-{b}.downsample.1",
)

# DeepMind's BYOL: a module's tensors are spelled `module|tensor`, see moco_d2.convert.sources.byol.
HAIKU = Naming(
    stem="initial_conv",
    stem_norm="initial_batchnorm",
    conv="block_group_{s0}/~/block_{b}/~/conv_{c0}",
    norm="block_group_{s0}/~/block_{b}/~/batchnorm_{c0}",
    shortcut="block_group_{s0}/~/block_{b}/~/shortcut_conv",
    shortcut_norm="block_group_{s0}/~/block_{b}/~/shortcut_batchnorm",
    kernel="|w",
    norm_tensors=("|scale", "|offset", "/~/mean_ema|average", "/~/var_ema|average"),
    height_first=True,
)

# Google's SimCLR.
TENSORFLOW = Naming(
    stem="conv2d{n}",
    stem_norm="batch_normalization{n}",
    conv="conv2d{n}",
    norm="batch_normalization{n}",
    shortcut="conv2d{n}",
    shortcut_norm="batch_normalization{n}",
    kernel="/kernel",
    norm_tensors=("/gamma", "/beta", "/moving_mean", "/moving_variance"),
    height_first=True,
)

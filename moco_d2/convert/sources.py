"""Which checkpoints are understood: one record per project, and the look-alikes that are refused by name.

To add a source, add a record to ``SOURCES``. The first whose network is complete is taken, so the more particular
records come first; how many keys match never decides, because some files hold the same network twice.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from moco_d2.convert.names import TORCHVISION, Naming
from moco_d2.facts import IMAGENET_RGB, Pixels

# Parts of a key that wrappers insert anywhere (DataParallel and DDP, torch.compile, FSDP); removed before matching.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})

COUNTERS = (r"(^|\.)num_batches_tracked$", "batch counter, which Detectron2 does not use")


@dataclass(frozen=True)
class CheckpointSource:
    """Where one project keeps the network that is transferred, and what else lies beside it.

    All patterns are regular expressions searched in a key from which the wrappers were removed.

    Attributes:
        name: shown to the user.
        origin: the words for ``BackboneFacts.origin``, unless a variant says more.
        nest: where the state dict may sit, as dotted paths of top-level keys; "" is the top level itself.
        prefix: what the wanted keys start with; keys that start otherwise are foreign, or dropped.
        naming: how the network is spelled behind the prefix.
        beside: top-level keys that must be there too.
        dropped: (pattern, reason) of keys left out on purpose.
        variants: (pattern, origin); the first pattern that some key shows gives the origin.
        pixels: the input it was trained with.
        stride_in_1x1: where its bottlenecks stride.
    """

    name: str
    origin: str
    nest: tuple[str, ...]
    prefix: str = ""
    naming: Naming = TORCHVISION
    beside: tuple[str, ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[str, str], ...] = ()
    pixels: Pixels = field(default=IMAGENET_RGB)
    stride_in_1x1: bool = False

    def describe(self) -> str:
        """Return one phrase that says what is looked for, and where."""
        places = " or ".join(f"`{n}`" if n else "the top level" for n in self.nest)
        beside = f" beside {', '.join(f'`{b}`' for b in self.beside)}" if self.beside else ""
        what = f"`{self.prefix}*`" if self.prefix else f"`{self.naming.stem}.weight` and so on"
        return f"{self.name} ({what} in {places}{beside})"


SOURCES: tuple[CheckpointSource, ...] = (
    CheckpointSource(
        name="moco_d2 backbone",
        origin="moco_d2",
        nest=("state_dict",),
        beside=("facts",),
    ),
    CheckpointSource(
        name="moco_d2 training checkpoint",
        origin="moco_d2",
        nest=("model",),
        prefix="encoder_q.",
        dropped=((r"^encoder_q\.fc\.", "contrastive head"), (r"^queue\.", "queue of keys")),
    ),
    CheckpointSource(
        name="MoCo",
        origin="MoCo v1 or v2 (no head in the file to tell)",
        nest=("state_dict", ""),
        prefix="encoder_q.",
        dropped=((r"^encoder_q\.fc\.", "contrastive head"), (r"^queue(_ptr)?$", "queue of keys")),
        variants=(
            (r"^encoder_q\.fc\.weight$", "MoCo v1 (one linear layer as head)"),
            (r"^encoder_q\.fc\.0\.weight$", "MoCo v2 (two layers as head)"),
        ),
    ),
    CheckpointSource(
        name="torchvision ResNet",
        origin="torchvision names, no method's mark",
        nest=("", "state_dict", "model"),
        dropped=((r"^fc\.", "classifier"),),
        variants=((r"^fc\.weight$", "torchvision ResNet with a classifier"),),
    ),
)


@dataclass(frozen=True)
class Lookalike:
    """Something that is met in the field and cannot be converted, by a pattern in its keys.

    Attributes:
        pattern: regular expression searched in every key, wrappers removed.
        found: what the file is.
        advice: what the user can do.
    """

    pattern: str
    found: str
    advice: str


_CUT_OUT = "if this is the network to transfer, save it alone under torchvision's names as {'state_dict': ...}"

LOOKALIKES: tuple[Lookalike, ...] = (
    Lookalike(
        r"(^|\.)(stem\.conv1\.norm|res[2-5]\.\d+\.conv1\.norm)\.",
        "already converted: it has Detectron2's names",
        "use it as MODEL.WEIGHTS as it is",
    ),
    Lookalike(
        r"(^|\.)(patch_embed\.|blocks\.\d+\.(attn|norm1|mlp)\.)",
        "a vision transformer (patch_embed, blocks)",
        "only ResNets can be converted",
    ),
    Lookalike(r"(^|\.)res(_)?(conv1|2_0_branch2a)_", "a Caffe2 ResNet", "Detectron2 reads it as it is"),
    Lookalike(
        r"(^|\.)conv1\.0\.weight$",
        "a ResNet with a stem of three 3x3 convolutions (ResNet-C, -D, -S)",
        "Detectron2's ResNet has one 7x7 convolution there; it cannot hold these weights",
    ),
    Lookalike(
        r"(^|\.)downsample\.2\.",
        "a ResNet that pools in its shortcuts (ResNet-D)",
        "Detectron2's ResNet strides in the shortcut convolution; it cannot hold these weights",
    ),
    Lookalike(r"(^|\.)(base|momentum)_encoder\.", "MoCo v3 (base_encoder, momentum_encoder)", _CUT_OUT),
    Lookalike(r"^online_(network|encoder|net)\.", "BYOL (an online and a target network)", _CUT_OUT),
    Lookalike(
        r"^encoder\.(conv1|layer\d)",
        "a network under `encoder.`, as SimSiam, PixPro or PyContrast save it",
        _CUT_OUT,
    ),
    Lookalike(
        r"^backbone\.(conv1|layer\d)",
        "a network under `backbone.`, as Barlow Twins, DINO or mmselfsup save it",
        _CUT_OUT,
    ),
)

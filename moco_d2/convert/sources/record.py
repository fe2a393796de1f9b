"""What is said of a source of checkpoints, and the words and patterns that several share."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moco_d2.convert.names import TORCHVISION, Naming
from moco_d2.convert.parts import Part
from moco_d2.facts import IMAGENET_RGB, Pixels

# Parts of a key that wrappers insert anywhere (DataParallel and DDP, torch.compile, FSDP); removed before matching.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

COUNTERS = (r"(^|\.)num_batches_tracked$", "batch counter, which Detectron2 does not use")

# The other network of a pair: a moving average, a target, a student. Never taken by itself.
COMPANIONS = re.compile(
    r"(^|\.)(encoder_k|momentum_\w+|\w+_momentum|target|target_\w+|teacher_\w+|student_\w+|model_ema|state_dict_ema|student|ema)"
    r"(\.|$)|^(loss\.)?moco_encoder\.|(^|\.)ema_model/"
)

UNIT_RGB = Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))  # 0..1, no mean and std

ANY = "*"  # a prefix that only the file knows


@dataclass(frozen=True)
class CheckpointSource:
    """Where one project keeps the network that is transferred, and what else lies beside it.

    Patterns are regular expressions. Those on keys are searched in a key from which the wrappers were removed.

    Attributes:
        name: shown to the user.
        key: for ``--source``.
        origin: the words for ``BackboneFacts.origin``, unless a variant says more.
        nest: where the state dict may sit, as dotted paths of top-level keys; "" is the top level itself.
        arxiv: the paper's number, or several.
        prefix: what the wanted keys start with; keys that start otherwise are foreign, or dropped. ``ANY``: whatever
            the file has, if it has one network only.
        naming: how the network is spelled behind the prefix.
        beside: patterns of top-level keys that must be there too.
        without: a pattern of top-level keys; none may be there with content.
        marks: patterns of keys; each must show.
        never: a pattern of keys; none may show.
        trait: a property of the tensors that must show: ``caffe`` (the input was not divided by a std) or
            ``shortcut first`` (order of the keys).
        dropped: (pattern, reason) of keys left out on purpose.
        parts: what of a detector it pretrains beside the ResNet, left out unless asked for; two of one name are two
            spellings.
        variants: (pattern, origin, arXiv number); the first pattern that some key shows gives both.
        pixels: the input it was trained with.
        stride_in_1x1: where its bottlenecks stride.
        padding: where the source pads unlike Detectron2: ``pool`` (TensorFlow's SAME in the max-pooling) or ``all``.
        encoder: which of the file's networks this is, and why, where there is more than one.
        notes: what cannot be seen in the weights, and what is assumed.
        on_request: taken for ``--source`` only.
        knows: a pattern of place and prefix of another network that such a file holds too.
    """

    name: str
    key: str
    origin: str
    nest: tuple[str, ...]
    arxiv: str = ""
    prefix: str = ""
    naming: Naming = TORCHVISION
    beside: tuple[str, ...] = ()
    without: str = ""
    marks: tuple[str, ...] = ()
    never: str = ""
    trait: str = ""
    dropped: tuple[tuple[str, str], ...] = ()
    parts: tuple[Part, ...] = ()
    variants: tuple[tuple[str, str, str], ...] = ()
    pixels: Pixels = field(default=IMAGENET_RGB)
    stride_in_1x1: bool = False
    padding: str = ""
    encoder: str = ""
    notes: tuple[str, ...] = ()
    on_request: bool = False
    knows: str = ""

    @property
    def marked(self) -> bool:
        """Whether something beside the network itself tells this source."""
        return self.prefix != ANY and bool(self.beside or self.marks or self.trait)

    def describe(self) -> str:
        """Return one phrase that says what is looked for, and where."""
        places = " or ".join(f"`{n}`" if n else "the top level" for n in self.nest)
        beside = f" beside {', '.join(f'`{b}`' for b in self.beside)}" if self.beside else ""
        what = f"`{self.prefix}*`" if self.prefix else f"`{self.naming.stem.format(n='', home='backbone.')}*`"
        return f"{self.name} ({what} in {places}{beside})"


def without_fc(prefix: str, reason: str = "contrastive head") -> tuple[str, str]:
    """Return the pattern and the reason that drop the ``fc`` of the network under a prefix."""
    return rf"^{re.escape(prefix)}fc\.", reason


QUEUE = (r"^(queue|queue2|val_queue|queue\d*)(_ptr)?$", "queue of keys")
HEADS = (
    r"^(projector|projection|projection_head|prediction_head|predictor|projetion|prototypes|head|head_jig|neck|"
    r"classifier|online_classifier|online_predictor|value_transform|bn|swav_prototypes|dino_head)\b",
    "head of pretraining",
)
DETECTOR = (r"^(?!.*\bres\d\.\d)(backbone|roi_heads|proposal_generator|sem_seg_head|head|pixel_)", "detector's parts")
CLASSIFIER = (r"^fc\.", "classifier")
LIGHTNING = r"pytorch-lightning_version|hyper_parameters|callbacks|loops|optimizer_states"

QUERY = "the query encoder (encoder_q) is what MoCo transfers; encoder_k is its moving average"
ONLINE = "the online network is what BYOL transfers; the target network is its moving average"
CAFFE_ASSUMED = (
    "the order BGR and the stride in the 1x1 convolution are taken from the lineage; weights do not show them"
)
RESIM_BIASES = (
    "ReSim's FPN has biases and no norm. Its authors fine-tuned with MODEL.FPN.NORM SyncBN, which subtracts what a "
    'bias adds: there the biases are left out. With MODEL.FPN.NORM "" the pyramid is the pretrained one'
)

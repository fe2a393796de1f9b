"""The record of a source of checkpoints, and the words and patterns that several records share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moco_d2.convert.names import TORCHVISION, Naming
from moco_d2.convert.parts import Part
from moco_d2.convert.sidecars import Sidecars, read_timm
from moco_d2.facts import IMAGENET_RGB, Pixels

# Parts of a key that wrappers insert anywhere (DataParallel and DDP, torch.compile, FSDP, activation checkpoints);
# removed before matching.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

COUNTERS = (r"(^|\.)num_batches_tracked$", "batch counter, which Detectron2 does not use")

# The other network of a pair: a moving average, a target, a student. Taken only if the user asks for it.
TARGET_NETWORKS = re.compile(
    r"(^|\.)(encoder_k|momentum_\w+|\w+_momentum|target|target_\w+|teacher_\w+|student_\w+|model_ema|state_dict_ema|student|ema)"
    r"(\.|$)|^(loss\.)?moco_encoder\.|(^|\.)ema_model/"
)

UNIT_RGB = Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))  # 0..1, no mean and std

ANY = "*"  # any prefix


@dataclass(frozen=True)
class CheckpointSource:
    """Where one project keeps the network that is transferred, and what else its files hold.

    Patterns are regular expressions. Patterns of keys are searched in the key without its wrappers.

    Attributes:
        name: shown to the user.
        key: for ``--source``.
        origin: the words for ``BackboneFacts.origin``, unless a variant has better ones.
        containers: where the state dict may be, as dotted paths of top-level keys; "" is the top level itself.
        arxiv: the paper's number, or several.
        prefix: what the wanted keys start with. Keys with another start are foreign, or dropped. ``ANY``: whatever the
            file has, if it holds one network only.
        naming: how the network's tensors are spelled after the prefix.
        top_level: patterns of top-level keys that the file must have too.
        without: a pattern of top-level keys that the file must not have, unless they are empty.
        signature: patterns of keys; each must match a key.
        never: a pattern of keys; it must match none.
        fingerprint: a property of the tensors that the file must have, a key of
            :data:`moco_d2.convert.fingerprints.FINGERPRINTS`.
        dropped: (pattern, reason) of keys left out on purpose.
        rest: the reason to drop every other key that is not the network's; empty: unknown keys are asked about.
        parts: what of a detector the project pretrains besides the ResNet, left out unless asked for. Two of one name
            are two spellings.
        variants: (pattern, origin, arXiv number); the first pattern that matches a key gives both.
        pixels: the input the network was trained with.
        stride_in_1x1: where its bottlenecks stride.
        padding: where the source pads unlike Detectron2: ``pool`` (TensorFlow's SAME in the max-pooling) or ``all``.
        encoder: which of the file's networks is taken, and why, if it holds several.
        notes: what weights do not show, and what is assumed.
        on_request: taken only if the user names it (``--source``, or the prefix of another network).
        average: key of the record that takes the moving average of the network, on request.
        others: a pattern of container and prefix of other networks that such a file holds; they raise no question.
        read: returns the state dicts of a file in which they are not plain mappings, as dotted path -> state dict.
        sidecars: reads the declarations of the files in the same folder.
        adapt: returns this record, changed by what a file declares (``declared``).
        declared: what the file declares, in words; no other record is then tried.
    """

    name: str
    key: str
    origin: str
    containers: tuple[str, ...]
    arxiv: str = ""
    prefix: str = ""
    naming: Naming = TORCHVISION
    top_level: tuple[str, ...] = ()
    without: str = ""
    signature: tuple[str, ...] = ()
    never: str = ""
    fingerprint: str = ""
    dropped: tuple[tuple[str, str], ...] = ()
    rest: str = ""
    parts: tuple[Part, ...] = ()
    variants: tuple[tuple[str, str, str], ...] = ()
    pixels: Pixels = field(default=IMAGENET_RGB)
    stride_in_1x1: bool = False
    padding: str = ""
    encoder: str = ""
    notes: tuple[str, ...] = ()
    on_request: bool = False
    average: str = ""
    others: str = ""
    read: Callable[[Mapping[Any, Any]], dict[str, Mapping[str, Any]]] | None = None
    sidecars: Callable[[Any], Sidecars] = read_timm
    adapt: Callable[[Any, Mapping[Any, Any], Any], Any] | None = None
    declared: str = ""

    @property
    def has_signature(self) -> bool:
        """Whether something besides the network itself shows this source."""
        return self.prefix != ANY and bool(self.top_level or self.signature or self.fingerprint)


def unwrap(key: str) -> str:
    """Remove what wrappers (DataParallel, torch.compile, FSDP) insert into a key."""
    return ".".join(part for part in key.split(".") if part not in WRAPPERS)


def without_fc(prefix: str, reason: str = "contrastive head") -> tuple[str, str]:
    """Return the pattern and the reason that drop the ``fc`` of the network under a prefix."""
    return rf"^{re.escape(prefix)}fc\.", reason


QUEUE = (r"^(queue|queue2|val_queue|queue\d*)(_ptr)?$", "queue of keys")
HEADS = (
    r"^(projector|projection|projection_head|prediction_head|predictor|projetion|prototypes|head|head_jig|neck|"
    r"classifier|online_classifier|online_predictor|value_transform|bn|swav_prototypes|dino_head)\b",
    "head of pretraining",
)
# Modules of these names, directly after a network's prefix, are heads on top of the network in every project.
INSIDE_HEADS = (
    r"^(fc|projector|projection|projection_head|prediction_head|predictor|prototypes|mlp|head|heads|neck|classifier)\b"
)
DETECTOR = (r"^(?!.*\bres\d\.\d)(backbone|roi_heads|proposal_generator|sem_seg_head|head|pixel_)", "detector's parts")
# Keys of a whole detector or segmenter (Detectron2, torchvision, mmdetection, mmsegmentation).
DETECTOR_HEADS = r"^(rpn|roi_heads|proposal_generator|sem_seg_head|(rpn|roi|bbox|mask|decode)_head)\.(?!res5)"
CLASSIFIER = (r"^fc\.", "classifier")
LIGHTNING = r"pytorch-lightning_version|hyper_parameters|callbacks|loops|optimizer_states"

QUERY = "the query encoder (encoder_q) is what MoCo transfers; encoder_k is its moving average"
ONLINE = "the online network is what BYOL transfers; the target network is its moving average"
CAFFE_ASSUMED = (
    "the order BGR and the stride in the 1x1 convolution are assumed, as in all Caffe weights; these do not show them"
)
RESIM_BIASES = (
    "ReSim's FPN has biases and no norm. Its authors fine-tuned with MODEL.FPN.NORM SyncBN, which subtracts what a "
    'bias adds: there the biases are left out. With MODEL.FPN.NORM "" the pyramid is the pretrained one'
)

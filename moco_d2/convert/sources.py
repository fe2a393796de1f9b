"""Which checkpoints are understood: one record per project and form of file, in the order of precedence.

To add a source, add a record to ``SOURCES``. The first whose network is complete decides which network is taken: how
many keys match never does, because many files hold the same network twice. Of the sources that keep it in the same
place, those whose marks show are taken before those without marks; if they disagree about pixels or strides, the user
is asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from moco_d2.convert.names import (
    CAFFE2,
    CAFFE2_AFFINE,
    CAFFE2_SHORT,
    CLASSY_VISION,
    DETECTRON2,
    DETECTRON2_C4,
    HAIKU,
    HUGGING_FACE,
    SEPARIUS,
    SEQUENTIAL,
    TENSORFLOW,
    TORCHVISION,
    Naming,
)
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB, Pixels

# Parts of a key that wrappers insert anywhere (DataParallel and DDP, torch.compile, FSDP); removed before matching.
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module"})

COUNTERS = (r"(^|\.)num_batches_tracked$", "batch counter, which Detectron2 does not use")

# The other network of a pair: a moving average, a target, a student. Never taken by itself.
COMPANIONS = re.compile(
    r"(^|\.)(encoder_k|momentum_\w+|\w+_momentum|target|target_\w+|teacher_\w+|student_\w+|model_ema|state_dict_ema|student|ema)"
    r"(\.|$)|^(loss\.)?moco_encoder\.|(^|\.)ema_model/"
)

UNIT_RGB = Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0))  # 0..1, no mean and std

ANY = "*"  # a prefix that only the file knows

_SAME_POOLING = (
    "the source pads its max-pooling on the right and below only (TensorFlow's SAME); Detectron2 pads on all sides, so "
    "its features lie half a stem pixel beside the source's"
)
_SAME_PADDING = (
    "the source pads the stem, the max-pooling and the strided 3x3 convolutions more on the right and below "
    "(JAX's SAME); Detectron2 pads evenly, so its features lie up to a pixel beside the source's"
)


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
        marks: patterns of keys; each must show.
        never: a pattern of keys; none may show.
        trait: a property of the tensors that must show: ``caffe`` (the input was not divided by a std) or
            ``shortcut first`` (order of the keys).
        dropped: (pattern, reason) of keys left out on purpose.
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
    marks: tuple[str, ...] = ()
    never: str = ""
    trait: str = ""
    dropped: tuple[tuple[str, str], ...] = ()
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


def _fc(prefix: str, reason: str = "contrastive head") -> tuple[str, str]:
    return rf"^{re.escape(prefix)}fc\.", reason


_QUEUE = (r"^(queue|queue2|val_queue|queue\d*)(_ptr)?$", "queue of keys")
_HEADS = (
    r"^(projector|projection|projection_head|prediction_head|predictor|projetion|prototypes|head|head_jig|neck|"
    r"classifier|online_classifier|online_predictor|value_transform|bn|swav_prototypes|dino_head)\b",
    "head of pretraining",
)
_DETECTOR = (r"^(?!.*\bres\d\.\d)(backbone|roi_heads|proposal_generator|sem_seg_head|head|pixel_)", "detector's parts")
_CLASSIFIER = (r"^fc\.", "classifier")
_LIGHTNING = r"pytorch-lightning_version|hyper_parameters|callbacks|loops|optimizer_states"

_QUERY = "the query encoder (encoder_q) is what MoCo transfers; encoder_k is its moving average"
_ONLINE = "the online network is what BYOL transfers; the target network is its moving average"
_SPLIT_CAFFE = (
    "the order BGR and the stride in the 1x1 convolution are taken from the lineage; weights do not show them"
)


_MOMENTUM = (
    CheckpointSource(
        name="moco_d2 backbone",
        key="moco_d2",
        origin="moco_d2",
        nest=("state_dict",),
        beside=("facts",),
        marks=(r"^conv1\.weight$",),
    ),
    CheckpointSource(
        name="moco_d2 training checkpoint",
        key="moco_d2-training",
        origin="moco_d2",
        nest=("model",),
        prefix="encoder_q.",
        dropped=(_fc("encoder_q."), (r"^queue\.", "queue of keys")),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="ReSim",
        key="resim",
        origin="ReSim",
        arxiv="2103.12902",
        nest=("state_dict", ""),
        prefix="encoder_q.",
        marks=(r"^(encoder_q\.)?fpn_(lateral|output)\d",),
        dropped=(_fc("encoder_q."), _QUEUE, (r"^encoder_q\.fpn_(lateral|output)\d", "ReSim's FPN")),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="lightning-bolts MoCo",
        key="bolts-moco",
        origin="MoCo v2 of lightning-bolts",
        arxiv="2003.04297",
        nest=("state_dict",),
        prefix="encoder_q.",
        beside=(_LIGHTNING,),
        dropped=(_fc("encoder_q."), _QUEUE),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="MoCo",
        key="moco",
        origin="MoCo v1 or v2 (no head in the file to tell)",
        arxiv="1911.05722, 2003.04297",
        nest=("state_dict", ""),
        prefix="encoder_q.",
        dropped=(_fc("encoder_q."), _QUEUE),
        variants=(
            (r"^encoder_q\.fc\.weight$", "MoCo v1 (one linear layer as head)", "1911.05722"),
            (r"^encoder_q\.fc\.0\.weight$", "MoCo v2 (two layers as head)", "2003.04297"),
        ),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="PCL",
        key="pcl",
        origin="PCL v1 or v2",
        arxiv="2005.04966",
        nest=("state_dict",),
        prefix="encoder_q.",
        dropped=(_fc("encoder_q."), _QUEUE),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="MoCo v3",
        key="moco_v3",
        origin="MoCo v3",
        arxiv="2104.02057",
        nest=("state_dict",),
        prefix="base_encoder.",
        dropped=(_fc("base_encoder.", "projector"), (r"^predictor\.", "predictor")),
        encoder="base_encoder is what MoCo v3 transfers; momentum_encoder is its moving average",
    ),
)

_BACKBONE = (
    CheckpointSource(
        name="Barlow Twins training checkpoint",
        key="barlow_twins",
        origin="Barlow Twins",
        arxiv="2103.03230",
        nest=("model",),
        prefix="backbone.",
        marks=(r"^projector\.", r"^bn\.running_mean$"),
        dropped=((r"^(projector|bn)\.", "projector"),),
    ),
    CheckpointSource(
        name="VICReg training checkpoint",
        key="vicreg",
        origin="VICReg",
        arxiv="2105.04906",
        nest=("model",),
        prefix="backbone.",
        marks=(r"^projector\.",),
        never=r"^bn\.",
        dropped=((r"^projector\.", "projector"),),
    ),
    CheckpointSource(
        name="DINO training checkpoint",
        key="dino",
        origin="DINO",
        arxiv="2104.14294",
        nest=("teacher",),
        prefix="backbone.",
        dropped=((r"^head\.", "DINO head"), _fc("backbone.", "classifier")),
        encoder="the teacher is what DINO's own evaluations take; the student is the network behind it",
    ),
    CheckpointSource(
        name="DenseCL training checkpoint",
        key="densecl",
        origin="DenseCL",
        arxiv="2011.09157",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^encoder_q\.1\.mlp2\.",),
        dropped=(_QUEUE, (r"^encoder_q\.1\.", "neck")),
        encoder="backbone is the query encoder (the file's encoder_q.0); encoder_k is its moving average",
    ),
    CheckpointSource(
        name="OpenSelfSup",
        key="openselfsup",
        origin="OpenSelfSup",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^(encoder_q|online_net)\.\d+\.",),
        dropped=(_QUEUE, (r"^(encoder_q|online_net)\.1\.", "neck"), _HEADS),
        variants=(
            (r"^encoder_q\.", "MoCo of OpenSelfSup", "1911.05722, 2003.04297"),
            (r"^online_net\.", "BYOL of OpenSelfSup", "2006.07733"),
        ),
        encoder="backbone is the query or online encoder; the file holds it a second time, and its moving average",
    ),
    CheckpointSource(
        name="lightly DINO",
        key="lightly-dino",
        origin="DINO of lightly",
        arxiv="2104.14294",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^student_backbone\.",),
        dropped=(_HEADS, (r"^student_projection_head\.", "head of pretraining")),
        encoder="backbone is the teacher here, which DINO transfers; student_backbone is the student",
    ),
    CheckpointSource(
        name="lightly",
        key="lightly",
        origin="lightly's benchmarks",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^(projection_head|prediction_head|online_classifier)\.",),
        never=r"^student_backbone\.",
        dropped=(_HEADS,),
        encoder="backbone is the online network; the other backbone is its moving average",
    ),
    CheckpointSource(
        name="solo-learn",
        key="solo",
        origin="solo-learn",
        arxiv="2108.01775",
        nest=("state_dict",),
        prefix="backbone.",
        beside=(_LIGHTNING,),
        never=r"^(projection_head|student_backbone)\.",
        dropped=(
            _HEADS,
            _QUEUE,
            _fc("backbone.", "classifier"),
            (r"^momentum_(projector|classifier)\.", "head of pretraining"),
        ),
        encoder="backbone is the online network; momentum_backbone is its moving average",
    ),
    CheckpointSource(
        name="sthalles' SimCLR",
        key="simclr-sthalles",
        origin="SimCLR of sthalles",
        arxiv="2002.05709",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^backbone\.fc\.(0|2)\.",),
        dropped=(_fc("backbone.", "projection head"),),
        pixels=UNIT_RGB,
    ),
    CheckpointSource(
        name="mmselfsup or mmpretrain",
        key="mmpretrain",
        origin="mmselfsup 1.x or mmpretrain",
        nest=("state_dict",),
        prefix="backbone.",
        marks=(r"^(neck|head|encoder_k|target_net|momentum_encoder)\.",),
        never=r"^(encoder_q|online_net)\.\d+\.|^student_backbone\.",
        dropped=(_HEADS, _QUEUE, (r"\bsteps$", "step counter")),
        encoder="backbone is the online network; the other encoder is its moving average",
    ),
    CheckpointSource(
        name="backbone under `backbone.`",
        key="backbone",
        origin="a file with `backbone.*`, no method's mark",
        nest=("state_dict", "model", ""),
        prefix="backbone.",
        dropped=(_HEADS, _QUEUE, _fc("backbone.", "classifier")),
    ),
    CheckpointSource(
        name="lightly's examples",
        key="lightly-examples",
        origin="lightly's examples",
        nest=("state_dict",),
        prefix="backbone.",
        naming=SEQUENTIAL,
        dropped=(_HEADS,),
        encoder="backbone is the online network; backbone_momentum is its moving average",
    ),
)

_ONLINE_NETWORKS = (
    CheckpointSource(
        name="lightning-bolts BYOL or SimSiam",
        key="bolts-byol",
        origin="BYOL or SimSiam of lightning-bolts",
        arxiv="2006.07733, 2011.10566",
        nest=("state_dict",),
        prefix="online_network.encoder.",
        dropped=(
            (r"^(online_network\.)?(projector|predictor)\.", "head of pretraining"),
            _fc("online_network.encoder."),
        ),
        encoder=_ONLINE,
    ),
    CheckpointSource(
        name="lucidrains' BYOL",
        key="byol-lucidrains",
        origin="BYOL of lucidrains",
        arxiv="2006.07733",
        nest=("", "state_dict"),
        prefix="online_encoder.net.",
        dropped=(
            _fc("online_encoder.net.", "classifier, which was not trained"),
            _fc("net.", "classifier, which was not trained"),
            (r"^(online_encoder\.projector|online_predictor)\.", "head of pretraining"),
        ),
        encoder=_ONLINE,
        notes=("mean and std of the pixels are the user's choice in this code: ImageNet's are assumed",),
    ),
    CheckpointSource(
        name="lucidrains' BYOL, network alone",
        key="byol-lucidrains-net",
        origin="BYOL of lucidrains",
        arxiv="2006.07733",
        nest=("", "state_dict"),
        prefix="net.",
        marks=(r"^(online_encoder|online_predictor|target_encoder)\.",),
        dropped=(_fc("net.", "classifier, which was not trained"), (r"^online_predictor\.", "head of pretraining")),
        encoder=_ONLINE,
        notes=("mean and std of the pixels are the user's choice in this code: ImageNet's are assumed",),
    ),
    CheckpointSource(
        name="OpenSelfSup BYOL, backbone cut off",
        key="openselfsup-byol",
        origin="BYOL of OpenSelfSup",
        arxiv="2006.07733",
        nest=("state_dict",),
        prefix="online_net.0.",
        dropped=((r"^online_net\.1\.", "neck"), _HEADS),
        encoder=_ONLINE,
    ),
    CheckpointSource(
        name="OpenSelfSup MoCo, backbone cut off",
        key="openselfsup-moco",
        origin="MoCo of OpenSelfSup",
        arxiv="1911.05722, 2003.04297",
        nest=("state_dict",),
        prefix="encoder_q.0.",
        dropped=((r"^encoder_q\.1\.", "neck"), _QUEUE),
        encoder=_QUERY,
    ),
    CheckpointSource(
        name="sthalles' BYOL",
        key="byol-sthalles",
        origin="BYOL of sthalles",
        arxiv="2006.07733",
        nest=("online_network_state_dict",),
        prefix="encoder.",
        naming=SEQUENTIAL,
        dropped=((r"^proje(c)?tion\.", "projection head"),),
        pixels=UNIT_RGB,
        encoder=_ONLINE,
    ),
)

_FACEBOOK = (
    CheckpointSource(
        name="VISSL",
        key="vissl",
        origin="VISSL",
        nest=("classy_state_dict.base_model.model.trunk", "model_state_dict"),
        prefix="_feature_blocks.",
        dropped=(_fc("_feature_blocks.", "classifier"),),
        encoder="the trunk; a momentum encoder, if any, lies in the file's `loss`",
    ),
    CheckpointSource(
        name="VISSL, trunk in a base model",
        key="vissl-base",
        origin="VISSL",
        nest=("classy_state_dict.base_model.model.trunk", "model_state_dict", ""),
        prefix="base_model._feature_blocks.",
        dropped=(_fc("base_model._feature_blocks.", "classifier"),),
        encoder="the trunk; a momentum encoder, if any, lies in the file's `loss`",
    ),
    CheckpointSource(
        name="Classy Vision",
        key="classy_vision",
        origin="Classy Vision",
        nest=("classy_state_dict.base_model.model.trunk", "model_state_dict", ""),
        naming=CLASSY_VISION,
        dropped=((r"^(_heads|heads|head)\.", "head"),),
    ),
)

_ENCODER = (
    CheckpointSource(
        name="Hugging Face ResNet",
        key="transformers",
        origin="transformers' ResNet",
        arxiv="1512.03385",
        nest=("",),
        naming=HUGGING_FACE,
        dropped=((r"^classifier\.", "classifier"),),
        notes=(
            "`downsample_in_bottleneck` (stride in the 1x1 convolution) is read from the config.json beside the file; "
            "without one, strides in the 3x3 convolution are assumed",
        ),
    ),
    CheckpointSource(
        name="Hugging Face ResNet with a head",
        key="transformers-head",
        origin="transformers' ResNet with a classifier",
        arxiv="1512.03385",
        nest=("",),
        prefix="resnet.",
        naming=HUGGING_FACE,
        dropped=((r"^classifier\.", "classifier"),),
        notes=(
            "`downsample_in_bottleneck` (stride in the 1x1 convolution) is read from the config.json beside the file; "
            "without one, strides in the 3x3 convolution are assumed",
        ),
    ),
    CheckpointSource(
        name="SimSiam",
        key="simsiam",
        origin="SimSiam",
        arxiv="2011.10566",
        nest=("state_dict",),
        prefix="encoder.",
        marks=(r"^predictor\.|^encoder\.fc\.[1-7]\.",),
        dropped=(_fc("encoder.", "projector"), (r"^predictor\.", "predictor")),
    ),
    CheckpointSource(
        name="PixPro",
        key="pixpro",
        origin="PixPro",
        arxiv="2011.10043",
        nest=("model",),
        prefix="encoder.",
        marks=(r"^(value_transform|projector_instance)\.|^projector\.linear1\.weight$",),
        never=r"^(neck|head)\.",
        dropped=(_HEADS, (r"^(projector|predictor)(_\w+)?\.", "head of pretraining")),
        encoder="encoder is what PixPro transfers; encoder_k is its moving average",
    ),
    CheckpointSource(
        name="SoCo",
        key="soco",
        origin="SoCo",
        arxiv="2106.02637",
        nest=("model",),
        prefix="encoder.",
        marks=(r"^(neck\.(lateral|fpn)_convs|head\.(conv|fc)\d|projector\.linear1)",),
        never=r"^value_transform\.",
        dropped=(
            (r"^neck\.", "SoCo's FPN"),
            (r"^head\.", "SoCo's box head"),
            (r"^(projector|predictor)\.", "head of pretraining"),
            _QUEUE,
        ),
        encoder="encoder is what SoCo transfers; encoder_k is its moving average",
    ),
    CheckpointSource(
        name="PyContrast",
        key="pycontrast",
        origin="PyContrast (InfoMin, PIRL, InsDis or MoCo)",
        arxiv="2005.10243, 1912.01991, 1805.01978",
        nest=("model",),
        prefix="encoder.",
        marks=(r"^head(_jig)?\.",),
        never=r"^neck\.",
        dropped=((r"^head(_jig)?\.", "contrastive head"),),
        variants=((r"^head_jig\.", "PIRL or InfoMin of PyContrast", "1912.01991, 2005.10243"),),
        encoder="model is what PyContrast transfers; for its moving average, model_ema, use --source pycontrast-ema",
    ),
    CheckpointSource(
        name="PyContrast's moving average",
        key="pycontrast-ema",
        origin="PyContrast, moving average",
        arxiv="2005.10243, 1912.01991, 1805.01978",
        nest=("model_ema",),
        prefix="encoder.",
        dropped=((r"^head(_jig)?\.", "contrastive head"),),
        on_request=True,
    ),
    CheckpointSource(
        name="CMC's single encoder",
        key="cmc",
        origin="InsDis or MoCo of the CMC repository",
        arxiv="1906.05849",
        nest=("model",),
        prefix="encoder.",
        beside=("contrast|opt",),
        marks=(r"^encoder\.fc\.",),
        dropped=(_fc("encoder."),),
        encoder="model is what is transferred; model_ema is its moving average",
    ),
    CheckpointSource(
        name="Spijkervet's SimCLR",
        key="simclr-spijkervet",
        origin="SimCLR of Spijkervet",
        arxiv="2002.05709",
        nest=("",),
        prefix="encoder.",
        marks=(r"^projector\.",),
        dropped=((r"^projector\.", "projection head"), _fc("encoder.", "classifier")),
        pixels=UNIT_RGB,
        notes=("this code can stride in the 1x1 convolution (resnet_hacks.py); strides in the 3x3 are assumed",),
    ),
    CheckpointSource(
        name="solo-learn until 1.0.2",
        key="solo-old",
        origin="solo-learn",
        arxiv="2108.01775",
        nest=("state_dict",),
        prefix="encoder.",
        beside=(_LIGHTNING,),
        marks=(r"^(momentum_encoder|projector|classifier)\.",),
        dropped=(
            _HEADS,
            _QUEUE,
            _fc("encoder.", "classifier"),
            (r"^momentum_(projector|classifier)\.", "head of pretraining"),
        ),
        encoder="encoder is the online network; momentum_encoder is its moving average",
    ),
    CheckpointSource(
        name="lightning-bolts SimCLR",
        key="bolts-simclr",
        origin="SimCLR of lightning-bolts",
        arxiv="2002.05709",
        nest=("state_dict",),
        prefix="encoder.",
        marks=(r"^projection\.",),
        dropped=(_fc("encoder.", "classifier, which was not trained"), (r"^projection\.", "projection head")),
    ),
    CheckpointSource(
        name="network under `encoder.`",
        key="encoder",
        origin="a file with `encoder.*`, no method's mark",
        nest=("state_dict", "model"),
        prefix="encoder.",
        dropped=(_HEADS, _QUEUE, _fc("encoder.", "head")),
    ),
    CheckpointSource(
        name="lightning-bolts SwAV",
        key="bolts-swav",
        origin="SwAV of lightning-bolts",
        arxiv="2006.09882",
        nest=("state_dict",),
        prefix="model.",
        marks=(r"^model\.prototypes\.",),
        dropped=((r"^model\.(projection_head|prototypes)\.", "head of pretraining"), _QUEUE),
    ),
)

_OTHER_NAMES = (
    CheckpointSource(
        name="Separius' SimCLRv2",
        key="simclr-separius",
        origin="SimCLR v2 of Separius",
        arxiv="2006.10029",
        nest=("resnet",),
        naming=SEPARIUS,
        dropped=(_CLASSIFIER,),
        pixels=UNIT_RGB,
    ),
    CheckpointSource(
        name="Google's SimCLR",
        key="simclr",
        origin="SimCLR v1 or v2",
        arxiv="2002.05709, 2006.10029",
        nest=("",),
        prefix="base_model/",
        naming=TENSORFLOW,
        dropped=(
            (r"/(Momentum|Adam|Adam_1)$", "optimizer"),
            (r"^head_(contrastive|supervised)", "head"),
            (r"^global_step$", "step counter"),
        ),
        pixels=UNIT_RGB,
        padding="pool",
        encoder="base_model; for the moving average, ema_model/base_model, use --source simclr-ema",
        notes=(_SAME_POOLING,),
    ),
    CheckpointSource(
        name="Google's SimCLR, moving average",
        key="simclr-ema",
        origin="SimCLR v2, moving average",
        arxiv="2006.10029",
        nest=("",),
        prefix="ema_model/base_model/",
        naming=TENSORFLOW,
        pixels=UNIT_RGB,
        padding="pool",
        notes=(_SAME_POOLING,),
        on_request=True,
    ),
    CheckpointSource(
        name="DeepMind's BYOL",
        key="byol",
        origin="BYOL",
        arxiv="2006.07733",
        nest=("experiment_state.online",),
        naming=HAIKU,
        dropped=(
            (r"^(projector|predictor|classifier)\b", "head"),
            (r"_ema\|(hidden|counter)$", "state of the moving averages in norms"),
        ),
        padding="all",
        encoder=_ONLINE,
        notes=(_SAME_PADDING,),
    ),
    *(
        CheckpointSource(
            name="Caffe2 ResNet (MSRA)",
            key=key,
            origin="Caffe2 names (MSRA)",
            arxiv="1512.03385",
            nest=("", "blobs"),
            naming=naming,
            dropped=(
                (r"^(fc1000|pred|cls_score)_[wb]$", "classifier"),
                (r"^conv1_b$", "bias of conv1, which Caffe2's ResNet and Detectron2 do not apply"),
                (r"_momentum$", "optimizer"),
                (r"^(lr|weight_order)$", "solver"),
                (
                    r"^(fpn|rpn|conv_rpn|bbox_pred|fc6|fc7|mask|conv_fcn|kps|head_conv|retnet|conv5_mask|_\[)",
                    "detector's parts",
                ),
            ),
            pixels=CAFFE_BGR,
            stride_in_1x1=True,
            notes=("order, mean and stride are those of every published Caffe2 ResNet; weights do not show them",),
        )
        for key, naming in (("caffe2", CAFFE2), ("caffe2-short", CAFFE2_SHORT), ("caffe2-affine", CAFFE2_AFFINE))
    ),
)

_DETECTRON2 = tuple(
    CheckpointSource(
        name=f"Detectron2 {what}, {words}",
        key=f"detectron2{place}-{key}",
        origin=f"Detectron2 {what}",
        nest=("model", ""),
        prefix=prefix,
        naming=naming,
        trait=trait,
        marks=marks,
        dropped=(_DETECTOR, (r"^stem\.fc\.", "classifier"), (r"^fc1000\.", "classifier")),
        pixels=pixels,
        stride_in_1x1=stride,
        notes=(_SPLIT_CAFFE,) if stride else ("strides in the 3x3 convolution are assumed, as torchvision's",),
    )
    for place, what, prefix, naming in (
        ("", "weights", "", DETECTRON2),
        ("-fpn", "detector with FPN", "backbone.bottom_up.", DETECTRON2),
        ("-backbone", "detector", "backbone.", DETECTRON2),
        ("-c4", "C4 detector", "", DETECTRON2_C4),
    )
    for key, words, trait, marks, pixels, stride in (
        ("caffe", "Caffe's input", "caffe", (), CAFFE_BGR, True),
        ("caffe-unseen", "Caffe's input (not shown by the weights)", "", (), CAFFE_BGR, True),
        ("torchvision", "torchvision's input", "", (), IMAGENET_RGB, False),
    )
)

_TORCHVISION = (
    CheckpointSource(
        name="Caffe's ResNet under torchvision's names",
        key="caffe",
        origin="Caffe's ResNet (MSRA) under torchvision's names",
        arxiv="1512.03385",
        nest=("", "state_dict"),
        trait="caffe",
        dropped=(_CLASSIFIER,),
        pixels=CAFFE_BGR,
        stride_in_1x1=True,
        notes=(_SPLIT_CAFFE,),
    ),
    CheckpointSource(
        name="tonylins' SimCLR",
        key="simclr-tonylins",
        origin="SimCLR v1, converted by tonylins",
        arxiv="2002.05709",
        nest=("state_dict",),
        trait="shortcut first",
        dropped=(_CLASSIFIER,),
        pixels=UNIT_RGB,
        notes=(
            "the source was trained with TensorFlow's SAME padding in the max-pooling; its converter's network and "
            "Detectron2 pad evenly",
        ),
    ),
    CheckpointSource(
        name="SwAV",
        key="swav",
        origin="SwAV",
        arxiv="2006.09882",
        nest=("", "state_dict"),
        marks=(r"^prototypes\.weight$|^projection_head\.",),
        never=r"^prototypes\.prototypes\d",
        dropped=((r"^(projection_head|prototypes)\.", "head of pretraining"),),
    ),
    CheckpointSource(
        name="DeepCluster-v2 or SeLa-v2",
        key="deepcluster_v2",
        origin="DeepCluster-v2 or SeLa-v2 of SwAV's repository",
        arxiv="2006.09882",
        nest=("", "state_dict"),
        marks=(r"^prototypes\.prototypes\d",),
        dropped=((r"^(projection_head|prototypes)\.", "head of pretraining"),),
    ),
    CheckpointSource(
        name="InstDisc",
        key="instdisc",
        origin="InstDisc",
        arxiv="1805.01978",
        nest=("state_dict",),
        beside=("lemniscate",),
        dropped=(_fc("", "contrastive head"),),
    ),
    CheckpointSource(
        name="DenseCL",
        key="densecl-extracted",
        origin="DenseCL",
        arxiv="2011.09157",
        nest=("state_dict",),
        beside=("author",),
        dropped=(_CLASSIFIER,),
    ),
    CheckpointSource(
        name="training checkpoint of timm",
        key="timm-ema",
        origin="timm's training, moving average",
        arxiv="2110.00476",
        nest=("state_dict_ema",),
        knows=r"^state_dict\.$",
        dropped=(_CLASSIFIER,),
        encoder="the moving average is what timm evaluates and releases",
    ),
    CheckpointSource(
        name="training checkpoint with a moving average",
        key="model-ema",
        origin="torchvision's references, moving average",
        nest=("model_ema",),
        knows=r"^model\.$",
        dropped=(_CLASSIFIER, (r"^n_averaged$", "count of the average")),
        encoder="the moving average is what torchvision's references evaluate",
    ),
    CheckpointSource(
        name="torchvision ResNet",
        key="torchvision",
        origin="torchvision names, no method's mark",
        arxiv="1512.03385",
        nest=("", "state_dict", "model"),
        dropped=(_CLASSIFIER,),
        variants=((r"^fc\.weight$", "torchvision ResNet with a classifier", "1512.03385"),),
        notes=(
            "Barlow Twins, VICReg, DINO, DetCo and a linear evaluation of MoCo come in the same form and with the same "
            "input",
        ),
    ),
    CheckpointSource(
        name="network under `resnet.`",
        key="resnet",
        origin="a file with `resnet.*`, no method's mark",
        nest=("state_dict", ""),
        prefix="resnet.",
        dropped=(_HEADS, _QUEUE, _fc("resnet.", "head")),
    ),
    CheckpointSource(
        name="network under `model.`",
        key="model",
        origin="a file with `model.*`, no method's mark",
        nest=("state_dict",),
        prefix="model.",
        dropped=(_HEADS, _QUEUE, _fc("model.", "head")),
    ),
    CheckpointSource(
        name="Lightning checkpoint",
        key="lightning",
        origin="a Lightning module",
        nest=("state_dict",),
        prefix=ANY,
        beside=(_LIGHTNING,),
        dropped=(_HEADS, _QUEUE, (r"\.fc\.", "head")),
        notes=("mean and std of the pixels are the training script's choice: ImageNet's are assumed",),
    ),
)

SOURCES: tuple[CheckpointSource, ...] = (
    *_MOMENTUM,
    *_BACKBONE,
    *_ONLINE_NETWORKS,
    *_FACEBOOK,
    *_ENCODER,
    *_OTHER_NAMES,
    *_DETECTRON2,
    *_TORCHVISION,
)

# What nobody can see in a ResNet's weights; said in every report.
UNSEEN = (
    "the same names and shapes fit anti-aliased twins (timm's resnetaa50, resnetblur50), dilated networks and other "
    "strides or paddings; none of these is assumed"
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


_ONLY = "only ResNets as torchvision and Detectron2 build them can be converted"
_STEM = "Detectron2's ResNet has one 7x7 convolution there; it cannot hold these weights"

LOOKALIKES: tuple[Lookalike, ...] = (
    Lookalike(
        r"(^|\.)(patch_embed\.|cls_token$|blocks\.\d+\.(attn|norm1|mlp)\.)",
        "a vision transformer (patch_embed, blocks)",
        "only ResNets can be converted",
    ),
    Lookalike(r"(^|\.)attnpool\.", "CLIP's ResNet (attention pooling, three stem convolutions)", _ONLY),
    Lookalike(
        r"(^|\.)(l_to_ab|ab_to_l)\.|(^|\.)encoder[12]\.conv1\.",
        "CMC's two half-width encoders for luminance and colour",
        "neither sees RGB pictures; only CMC's single-encoder files can be converted",
    ),
    Lookalike(
        r"(^|\.)(main_conv|mixing_conv|conv2\.paths|conv2\.attn)\.",
        "a ResNet with selective kernels (SK, as in SimCLR v2's sk1)",
        "use the file without selective kernels (sk0)",
    ),
    Lookalike(
        r"(^|\.)layer\d\.\d+\.(se|se_module|conv2\.fc1|conv2\.se)\.",
        "a ResNet with channel attention (SE, ResNeSt)",
        _ONLY,
    ),
    Lookalike(
        r"(^|\.)(block\d\.unit\d+\.|stages\.\d\.blocks\.\d+\.(conv1|norm1)\.weight$)",
        "BiT (pre-activation, weight-standardised convolutions)",
        _ONLY,
    ),
    Lookalike(
        r"(_packed_params|\.zero_point$|\.weight_fake_quant\.|activation_post_process|\.SCB$)",
        "a quantised network",
        "convert the float checkpoint that it was made from",
    ),
    Lookalike(
        r"(^|\.)conv1\.0\.weight$|(^|\.)stem\.[012]\.conv\.|(^|\.)net\.0\.2\.weight$",
        "a ResNet with a stem of three 3x3 convolutions (ResNet-C, -D, -S)",
        _STEM,
    ),
    Lookalike(
        r"(^|\.)downsample\.2\.",
        "a ResNet that pools in its shortcuts (ResNet-D)",
        "Detectron2's ResNet strides in the shortcut convolution; it cannot hold these weights",
    ),
    Lookalike(
        r"(^|\.)(layer)?\d\.0\.shortcut\.0\.weight$",
        "lightly's own ResNet (a CIFAR stem: 3x3 without pooling)",
        "pretrain with torchvision's ResNet",
    ),
)

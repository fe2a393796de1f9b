"""Networks under ``encoder.``, and those of Hugging Face."""

from __future__ import annotations

from moco_d2.convert.names import HUGGING_FACE
from moco_d2.convert.parts import LEVELS, Layer, Part
from moco_d2.convert.sidecars import read_transformers
from moco_d2.convert.sources.record import HEADS, LIGHTNING, QUEUE, UNIT_RGB, CheckpointSource, without_fc

# hologerry/SoCo contrast/models/fpn.py with the options of tools/SoCo_FPN_*.sh: four levels from conv2 to conv5, and
# mmcv's ConvModule, whose convolution has no bias if a norm follows. Same epsilon as Detectron2's BN.
_SOCO_FPN = Part(
    name="fpn",
    what="SoCo's FPN",
    keys=r"^neck\.",
    layers=tuple(
        Layer(f"{role}{level}", f"neck.{module}.{index}.conv", f"neck.{module}.{index}.bn")
        for role, module in (("lateral", "lateral_convs"), ("output", "fpn_convs"))
        for index, level in enumerate(LEVELS)
    ),
)
# contrast/models/fast_rcnn_conv_fc_head.py: four convolutions with norm and one linear layer on 7x7, as in Detectron2.
_SOCO_BOX_HEAD = Part(
    name="box_head",
    what="SoCo's box head",
    keys=r"^head\.",
    layers=(*(Layer(f"conv{n}", f"head.conv{n}", f"head.bn{n}") for n in range(1, 5)), Layer("fc1", "head.fc1")),
)

_SIDECARS = (
    "`downsample_in_bottleneck` (stride in the 1x1 convolution) is read from the config.json in the file's folder, "
    "mean and std from the preprocessor_config.json; without them, strides in the 3x3 convolution and ImageNet's mean "
    "and std are assumed"
)

ENCODER = (
    CheckpointSource(
        name="Hugging Face ResNet",
        key="transformers",
        origin="transformers' ResNet",
        arxiv="1512.03385",
        containers=("",),
        naming=HUGGING_FACE,
        dropped=((r"^classifier\.", "classifier"),),
        sidecars=read_transformers,
        notes=(_SIDECARS,),
    ),
    CheckpointSource(
        name="Hugging Face ResNet with a head",
        key="transformers-head",
        origin="transformers' ResNet with a classifier",
        arxiv="1512.03385",
        containers=("",),
        prefix="resnet.",
        naming=HUGGING_FACE,
        dropped=((r"^classifier\.", "classifier"),),
        sidecars=read_transformers,
        notes=(_SIDECARS,),
    ),
    CheckpointSource(
        name="SimSiam",
        key="simsiam",
        origin="SimSiam",
        arxiv="2011.10566",
        containers=("state_dict",),
        prefix="encoder.",
        signature=(r"^predictor\.|^encoder\.fc\.[1-7]\.",),
        dropped=(without_fc("encoder.", "projector"), (r"^predictor\.", "predictor")),
    ),
    CheckpointSource(
        name="PixPro",
        key="pixpro",
        origin="PixPro",
        arxiv="2011.10043",
        containers=("model",),
        prefix="encoder.",
        signature=(r"^(value_transform|projector_instance)\.|^projector\.linear1\.weight$",),
        never=r"^(neck|head)\.",
        dropped=(HEADS, (r"^(projector|predictor)(_\w+)?\.", "head of pretraining")),
        encoder="encoder is what PixPro transfers; encoder_k is its moving average",
    ),
    CheckpointSource(
        name="SoCo",
        key="soco",
        origin="SoCo",
        arxiv="2106.02637",
        containers=("model",),
        prefix="encoder.",
        signature=(r"^(neck\.(lateral|fpn)_convs|head\.(conv|fc)\d|projector\.linear1)",),
        never=r"^value_transform\.",
        dropped=((r"^(projector|predictor)\.", "head of pretraining"), QUEUE),
        parts=(_SOCO_FPN, _SOCO_BOX_HEAD),
        encoder="encoder is what SoCo transfers; encoder_k is its moving average",
    ),
    CheckpointSource(
        name="PyContrast",
        key="pycontrast",
        origin="PyContrast (InfoMin, PIRL, InsDis or MoCo)",
        arxiv="2005.10243, 1912.01991, 1805.01978",
        containers=("model",),
        prefix="encoder.",
        signature=(r"^head(_jig)?\.",),
        never=r"^neck\.",
        dropped=((r"^head(_jig)?\.", "contrastive head"),),
        variants=((r"^head_jig\.", "PIRL or InfoMin of PyContrast", "1912.01991, 2005.10243"),),
        average="pycontrast-ema",
        encoder="model is what PyContrast transfers; model_ema is its moving average",
    ),
    CheckpointSource(
        name="PyContrast's moving average",
        key="pycontrast-ema",
        origin="PyContrast, moving average",
        arxiv="2005.10243, 1912.01991, 1805.01978",
        containers=("model_ema",),
        prefix="encoder.",
        dropped=((r"^head(_jig)?\.", "contrastive head"),),
        on_request=True,
    ),
    CheckpointSource(
        name="CMC's single encoder",
        key="cmc",
        origin="InsDis or MoCo of the CMC repository",
        arxiv="1906.05849",
        containers=("model",),
        prefix="encoder.",
        top_level=("contrast|opt",),
        signature=(r"^encoder\.fc\.",),
        dropped=(without_fc("encoder."),),
        encoder="model is what is transferred; model_ema is its moving average",
    ),
    CheckpointSource(
        name="Spijkervet's SimCLR",
        key="simclr-spijkervet",
        origin="SimCLR of Spijkervet",
        arxiv="2002.05709",
        containers=("",),
        prefix="encoder.",
        # Many networks have an encoder and a projector; only this code's linear layers have no biases.
        signature=(r"^projector\.0\.weight$", r"^projector\.2\.weight$"),
        never=r"^projector\.([02]\.bias|1\.|3\.)",
        dropped=((r"^projector\.", "projection head"), without_fc("encoder.", "classifier")),
        pixels=UNIT_RGB,
        notes=("this code can stride in the 1x1 convolution (resnet_hacks.py); strides in the 3x3 are assumed",),
    ),
    CheckpointSource(
        name="solo-learn until 1.0.2",
        key="solo-old",
        origin="solo-learn",
        arxiv="2108.01775",
        containers=("state_dict",),
        prefix="encoder.",
        top_level=(LIGHTNING,),
        signature=(r"^(momentum_encoder|projector|classifier)\.",),
        dropped=(
            HEADS,
            QUEUE,
            without_fc("encoder.", "classifier"),
            (r"^momentum_(projector|classifier)\.", "head of pretraining"),
        ),
        encoder="encoder is the online network; momentum_encoder is its moving average",
    ),
    CheckpointSource(
        name="lightning-bolts SimCLR",
        key="bolts-simclr",
        origin="SimCLR of lightning-bolts",
        arxiv="2002.05709",
        containers=("state_dict",),
        prefix="encoder.",
        signature=(r"^projection\.",),
        dropped=(without_fc("encoder.", "classifier, which was not trained"), (r"^projection\.", "projection head")),
    ),
    CheckpointSource(
        name="network under `encoder.`",
        key="encoder",
        origin="a file with `encoder.*`, no method's mark",
        containers=("state_dict", "model"),
        prefix="encoder.",
        dropped=(HEADS, QUEUE, without_fc("encoder.", "head")),
    ),
    CheckpointSource(
        name="lightning-bolts SwAV",
        key="bolts-swav",
        origin="SwAV of lightning-bolts",
        arxiv="2006.09882",
        containers=("state_dict",),
        prefix="model.",
        signature=(r"^model\.prototypes\.",),
        dropped=((r"^model\.(projection_head|prototypes)\.", "head of pretraining"), QUEUE),
    ),
)

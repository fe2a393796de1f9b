"""Detectron2's own files: backbones and detectors."""

from __future__ import annotations

from moco_d2.convert.names import DETECTRON2, DETECTRON2_C4
from moco_d2.convert.parts import LEVELS, Layer, Part
from moco_d2.convert.sources.record import CAFFE_ASSUMED, DETECTOR, RESIM_BIASES, CheckpointSource
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB

# Files that the authors of SoCo and ReSim converted themselves; their training files are in encoder.py and momentum.py.
_PUBLISHED = (
    CheckpointSource(
        name="SoCo, converted by its authors",
        key="soco-detectron2",
        origin="SoCo",
        arxiv="2106.02637",
        containers=("model",),
        naming=DETECTRON2,
        signature=(r"^fpn_lateral\d\.norm\.", r"^box_head\.conv\d\.norm\."),
        parts=(
            Part(
                name="fpn",
                what="SoCo's FPN",
                keys=r"^fpn_",
                layers=tuple(
                    Layer(f"{role}{level}", f"fpn_{role}{level}", f"fpn_{role}{level}.norm")
                    for role in ("lateral", "output")
                    for level in LEVELS
                ),
            ),
            Part(
                name="box_head",
                what="SoCo's box head",
                keys=r"^box_head\.",
                layers=(
                    *(Layer(f"conv{n}", f"box_head.conv{n}", f"box_head.conv{n}.norm") for n in range(1, 5)),
                    Layer("fc1", "box_head.fc1"),
                ),
            ),
        ),
    ),
    CheckpointSource(
        name="ReSim, converted by its authors",
        key="resim-detectron2",
        origin="ReSim",
        arxiv="2103.12902",
        containers=("model",),
        naming=DETECTRON2,
        signature=(r"^backbone\.fpn_lateral3\.weight$", r"^stem\.fc\."),
        dropped=((r"^stem\.fc\.", "contrastive head"),),
        parts=(
            Part(
                name="fpn",
                what="ReSim's FPN",
                keys=r"^backbone\.fpn_",
                layers=tuple(
                    Layer(role, f"backbone.fpn_{role}")
                    for role in ("lateral3", "lateral4", "lateral5", "output3", "output4")
                ),
                note=RESIM_BIASES,
            ),
        ),
    ),
)

DETECTORS = _PUBLISHED + tuple(
    CheckpointSource(
        name=f"Detectron2 {what}, {words}",
        key=f"detectron2{place}-{key}",
        origin=f"Detectron2 {what}",
        containers=("model", ""),
        prefix=prefix,
        naming=naming,
        fingerprint=fingerprint,
        signature=signature,
        dropped=(DETECTOR, (r"^stem\.fc\.", "classifier"), (r"^fc1000\.", "classifier")),
        pixels=pixels,
        stride_in_1x1=stride,
        notes=(CAFFE_ASSUMED,) if stride else ("strides in the 3x3 convolution are assumed, as torchvision's",),
    )
    for place, what, prefix, naming in (
        ("", "weights", "", DETECTRON2),
        ("-fpn", "detector with FPN", "backbone.bottom_up.", DETECTRON2),
        ("-backbone", "detector", "backbone.", DETECTRON2),
        ("-c4", "C4 detector", "", DETECTRON2_C4),
    )
    for key, words, fingerprint, signature, pixels, stride in (
        ("caffe", "Caffe's input", "caffe", (), CAFFE_BGR, True),
        ("caffe-unseen", "Caffe's input (not shown by the weights)", "", (), CAFFE_BGR, True),
        ("torchvision", "torchvision's input", "", (), IMAGENET_RGB, False),
    )
)

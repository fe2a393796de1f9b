"""Detectron2's own files: weights, and detectors that hold a backbone."""

from __future__ import annotations

from moco_d2.convert.names import DETECTRON2, DETECTRON2_C4
from moco_d2.convert.sources.record import CAFFE_ASSUMED, DETECTOR, CheckpointSource
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB

DETECTORS = tuple(
    CheckpointSource(
        name=f"Detectron2 {what}, {words}",
        key=f"detectron2{place}-{key}",
        origin=f"Detectron2 {what}",
        nest=("model", ""),
        prefix=prefix,
        naming=naming,
        trait=trait,
        marks=marks,
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
    for key, words, trait, marks, pixels, stride in (
        ("caffe", "Caffe's input", "caffe", (), CAFFE_BGR, True),
        ("caffe-unseen", "Caffe's input (not shown by the weights)", "", (), CAFFE_BGR, True),
        ("torchvision", "torchvision's input", "", (), IMAGENET_RGB, False),
    )
)

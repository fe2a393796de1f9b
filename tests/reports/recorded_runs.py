"""Folders as finished runs leave them, with figures of one's choice."""

from __future__ import annotations

import json

VOC_C4 = "voc0712_faster_rcnn_R_50_C4_24k"
WEIGHTS = {
    "moco_v2": {"path": "/w/moco_v2.pth", "sha256": "ab" * 32, "facts": {"recipe": "moco_v2_R50_200ep"}},
    "supervised": {"path": "detectron2://ImageNetPretrained/MSRA/R-50.pkl", "sha256": "cd" * 32,
                   "facts": {"recipe": "", "origin": "ImageNet-supervised, MSRA (Caffe)"}},
    "random": {"path": "", "sha256": None, "facts": {"recipe": "", "origin": "random initialisation"}},
}  # fmt: skip


def record(folder, init, seed, bbox, protocol=VOC_C4, changes=(), curve=(), test_set="voc_2007_test", **more):
    """Write results.json and metrics.json of one run, and return its folder."""
    folder.mkdir(parents=True)
    result = {
        "protocol": protocol, "weights": WEIGHTS[init], "metrics": {test_set: {"bbox": bbox}}, "seed": seed,
        "processes": 8, "device": "NVIDIA V100", "versions": {"moco_d2": "0.1.0", "torch": "2.11.0"},
        "commit": "c0ffee", "command": f"tools/train_net.py SEED {seed}", "date": "2026-11-22T07:26:46+00:00",
        "iterations": 24000, "scaled": {}, "config_changes": list(changes), **more,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(result))
    lines = [{"iteration": iteration, **scalars} for iteration, scalars in curve]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

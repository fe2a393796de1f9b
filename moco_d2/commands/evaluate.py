r"""Evaluate detections in a file: saved by an evaluation, or anyone's in COCO's form.

    moco-d2 evaluate --predictions output/run/inference/voc_2007_test/voc_instances_results.json \
        --config-file output/run/config.yaml
    moco-d2 evaluate --predictions detections.json --dataset coco_2017_val
    moco-d2 evaluate --predictions detections.json --dataset coco_2017_val TEST.COCO_BACKEND pycocotools

The numbers are those of the evaluation that saved the file. COCO and LVIS sets take coco_instances_results.json and
lvis_instances_results.json, a list of objects with image_id, category_id, score, bbox and, for masks and keypoints,
segmentation and keypoints; VOC sets take voc_instances_results.json. A record of another form, or of an image or
category that the data set does not have, is an error that names the record. A config is needed for data sets of your
own (DATASETS.CUSTOM) and for TEST.KEYPOINT_OKS_SIGMAS.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line and evaluate."""
    parser = cli.new_parser("evaluate", __doc__)
    parser.add_argument("--predictions", required=True, type=cli.path, metavar="FILE", help="detections")
    parser.add_argument("--dataset", metavar="NAME", help="a registered data set (default: the config's test set)")
    parser.add_argument("--config-file", default="", metavar="FILE", help="path or shipped name of a config")
    parser.add_argument("--output", type=cli.path, metavar="FILE", help="write the numbers as JSON")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Evaluate, print a table, and write the numbers if a file is named."""
    from detectron2.data import DatasetCatalog
    from tabulate import tabulate

    from moco_d2.config import load_cfg
    from moco_d2.detection.datasets import register_custom
    from moco_d2.detection.metrics.evaluators import evaluate_file
    from moco_d2.detection.results import to_json
    from moco_d2.io.files import check_named_file, has_keys, named_file
    from moco_d2.io.provenance import provenance

    ours = has_keys("dataset", "metrics", "evaluated_with", "command")
    if args.output:
        check_named_file(args.output, ours)
    cfg = load_cfg(args.config_file, args.opts)
    if args.dataset:
        cfg.DATASETS.TEST = (args.dataset,)
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            f"the config has {len(cfg.DATASETS.TEST)} test sets, and a file holds the detections of one: name it with "
            "--dataset"
        )
    register_custom(cfg, train=False)
    (name,) = cfg.DATASETS.TEST
    if name not in DatasetCatalog:
        raise ValueError(f"no data set {name!r} is registered")
    metrics, library = evaluate_file(cfg, name, args.predictions)
    for task, scores in metrics.items():
        print(f"{name}, {task}, by {library}")
        print(tabulate([scores.values()], scores.keys(), tablefmt="pipe", floatfmt=".3f"))
    if args.output:
        content = {"dataset": name, "metrics": metrics, "evaluated_with": {name: library}, **provenance()}
        with named_file(args.output, ours) as file:
            file.write(to_json(content))

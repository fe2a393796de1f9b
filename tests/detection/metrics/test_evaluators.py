"""Metrics equal the reference libraries' to the last bit, or the last but one, on cases made to tell them apart."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets.lvis import register_lvis_instances
from detectron2.evaluation import COCOEvaluator, coco_evaluation, pascal_voc_evaluation
from detectron2.structures import Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from moco_d2.config import load_cfg
from moco_d2.detection.labels.masks import unpacked
from moco_d2.detection.metrics import coco as ours
from moco_d2.detection.metrics.evaluators import build_evaluator, evaluate_file, evaluator_type
from moco_d2.detection.metrics.lvis import METRICS, ExactLVISEvaluator
from moco_d2.detection.metrics.voc import THRESHOLDS, VOCEvaluator, _rounded
from tests.two_processes import in_two_processes

ROOT = Path(__file__).parents[3]
WIDTH, HEIGHT = 200, 150
FAST = [backend for backend in ours.BACKENDS if backend.installed and backend is not ours.REFERENCE]

# Means of nothing: cases in which a class, or everything, is empty. The others are Detectron2's and lvis's own, and
# hotcoco's reminder that other sigmas make another metric.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'warn' method is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:hotcoco. kpt_oks_sigmas differ:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Mean of empty slice:RuntimeWarning"),
]


@pytest.fixture
def registered():
    """Register metadata, or data sets by a function of Detectron2's, for the length of a test."""
    names = []

    def register(**metadata):
        names.append(f"test_evaluators_{len(names)}")
        MetadataCatalog.get(names[-1]).set(**metadata)
        return names[-1]

    yield register
    for name in names:
        MetadataCatalog.remove(name)
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)


# COCO. Few pictures and classes, so that each case hits many rules: ties, crowds, objects without area, of all three
# sizes, pictures and classes without objects or detections, more detections than count.


def box(random):
    sides = random.choice([0, 1, 5, 20, 32, 50, 96, 120], 2) if random.random() < 0.5 else random.uniform(0, 120, 2)
    return [*random.uniform(-5, [WIDTH - 10, HEIGHT - 10]).tolist(), *map(float, sides)]


def near(random, there):
    moved = np.add(there, 0 if random.random() < 0.3 else random.normal(size=4) * random.choice([0.5, 4]))
    return [*moved[:2].tolist(), *np.maximum(moved[2:], 0).tolist()]


def rle(random, there):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    x, y, w, h = (int(max(0, value)) for value in there)
    mask[y : y + h, x : x + w] = 1
    mask[random.integers(0, HEIGHT, 8), random.integers(0, WIDTH, 8)] ^= 1
    encoded = mask_api.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


def keypoints(random, there, labelled):
    x, y, w, h = there
    points = np.column_stack([x + random.random(17) * w, y + random.random(17) * h, np.full(17, 2.0)])
    if labelled:
        points[:, 2] = random.integers(0, 3, 17) * (random.random() < 0.9)
    return points.ravel().tolist()


def score(random):
    return (
        float(random.choice([0, 0.1, 0.5, 0.5, 0.9, 1]))
        if random.random() < 0.5
        else float(np.float32(random.random()))
    )


def coco_case(seed, task="bbox"):
    """Return labels and detections in COCO's form."""
    random = np.random.default_rng(seed)
    images = random.choice(1000, random.integers(1, 8), replace=False).tolist()
    categories = sorted(random.choice(90, 1 if task == "keypoints" else random.integers(1, 5), replace=False) + 1)
    labels, found = [], []
    for image, category in itertools.product(images, map(int, categories)):
        mine = []
        for _ in range(random.integers(0, 5) * (random.random() < 0.8)):
            there, crowd = box(random), int(random.random() < 0.2)
            x, y, w, h = there
            label = {
                "id": len(labels) + 1, "image_id": image, "category_id": category, "bbox": there, "iscrowd": crowd,
                "area": w * h * random.choice([1, 0.7]),
                "segmentation": rle(random, there) if crowd else [[x, y, x + w, y, x + w, y + h, x + w / 3, y + h]],
            }  # fmt: skip
            if task == "keypoints":
                label["keypoints"] = keypoints(random, there, True)
                label["num_keypoints"] = int(np.count_nonzero(label["keypoints"][2::3]))
            labels.append(label)
            mine.append(label)
        count = 130 if random.random() < 0.05 else random.integers(0, 12) * (random.random() < 0.8)
        for _ in range(count):
            like = mine[random.integers(len(mine))] if mine and random.random() < 0.7 else None
            there = near(random, like["bbox"]) if like else box(random)
            detection = {"image_id": image, "category_id": category, "bbox": there, "score": score(random)}
            if task == "segm":
                detection["segmentation"] = rle(random, there)
            if task == "keypoints":
                points = like["keypoints"] if like else keypoints(random, there, False)
                detection["keypoints"] = (np.array(points) + 2 * random.normal(size=51)).tolist()
            found.append(detection)
    random.shuffle(labels)
    random.shuffle(found)
    content = {
        "info": {},
        "images": [{"id": image, "width": WIDTH, "height": HEIGHT, "file_name": f"{image}.jpg"} for image in images],
        "annotations": labels,
        "categories": [{"id": int(category), "name": f"class{category}"} for category in categories],
    }
    return content, found


def written(content, path):
    path.write_text(json.dumps(content))
    return str(path)


def by_pycocotools(path, found, task, sigmas=()):
    """Evaluate as Detectron2 does with pycocotools alone."""
    with contextlib.redirect_stdout(io.StringIO()):
        return coco_evaluation._evaluate_predictions_on_coco(COCO(path), found, task, sigmas, COCOeval)


@pytest.mark.parametrize("task", ["bbox", "segm", "keypoints"])
def test_every_coco_backend_gives_pycocotools_precision(task, tmp_path):
    assert {backend.name for backend in FAST} >= {"hotcoco", "faster"}, "install the eval extra"
    compared = 0
    for seed in range(25):
        labels, found = coco_case(seed, task)
        if not found or not labels["annotations"]:
            continue
        sigmas = [0.05] * 17 if task == "keypoints" and seed % 2 else []
        path = written(labels, tmp_path / "labels.json")
        expected = by_pycocotools(path, found, task, sigmas)
        for backend in FAST:
            got = ours.evaluate_coco(backend, path, found, task, kpt_oks_sigmas=sigmas)
            # hotcoco adds in pycocotools' order; the others do not, which can cost the last bit.
            tolerance = 0 if backend.name == "hotcoco" else 4e-16
            for key in ("precision", "recall"):
                np.testing.assert_allclose(got.eval[key], expected.eval[key], rtol=0, atol=tolerance, err_msg=str(seed))
            np.testing.assert_allclose(got.stats[: len(expected.stats)], expected.stats, rtol=0, atol=tolerance)
            compared += (expected.eval["precision"] > 0).any()
    assert compared > 20  # most cases find something


@pytest.mark.parametrize("backend", [backend.name for backend in ours.BACKENDS if backend.installed])
def test_a_set_with_more_objects_than_count_gets_its_own_ap_beside_the_standard_one(backend, tmp_path, registered):
    labels = {"images": [{"id": i, "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
              "categories": [{"id": 1, "name": "nucleus"}, {"id": 2, "name": "cell"}], "annotations": []}  # fmt: skip
    for number in range(133):
        x, y, category = 10 * (number % 15), 10 * (number // 15), 2 if number >= 130 else 1
        mask = mask_api.frPyObjects([[x, y, x + 9, y, x + 9, y + 9, x, y + 9]], HEIGHT, WIDTH)[0]
        labels["annotations"].append({
            "id": number + 1, "image_id": category, "category_id": category, "bbox": [x, y, 9, 9], "area": 81,
            "iscrowd": 0, "segmentation": {"size": mask["size"], "counts": mask["counts"].decode()},
        })  # fmt: skip
    found = [label | {"score": 1 - label["id"] / 1000} for label in labels["annotations"]]
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "MODEL.MASK_ON", "True", "TEST.COCO_BACKEND", backend])
    result, _ = evaluate_file(cfg, name, written(found, tmp_path / "found.json"))
    for task in ("bbox", "segm"):
        scores = result[task]
        assert 85 < scores["AP"] < 90, "100 of 130 nuclei, and all cells"
        assert [scores[f"{key}@130"] for key in ("AP", "AP50", "AP75")] == pytest.approx([100] * 3)
        found = found[:65] + found[130:]
    worse, _ = evaluate_file(cfg, name, written(found, tmp_path / "found.json"))
    assert worse["bbox"]["AP@130"] == pytest.approx(worse["bbox"]["AP"]), "the same if fewer than 100 are found"
    labels["annotations"] = labels["annotations"][31:]
    name = registered(json_file=written(labels, tmp_path / "fewer.json"), evaluator_type="coco")
    result, _ = evaluate_file(cfg, name, written([], tmp_path / "none.json"))
    assert not [key for key in result["bbox"] if "@" in key]


def spoil(labels, how):
    first, *_, last = labels["annotations"]
    if how == "id 0":
        for label in labels["annotations"]:
            label["id"] -= 1
    elif how == "ids twice":
        last["id"] = first["id"]
    elif how == "area not finite":
        last["area"] = float("nan")
    elif how == "category twice":
        labels["categories"].append(labels["categories"][0])


def evaluated(evaluator, found):
    """Evaluate what a detector found, which is not checked as a file is: after days of training figures count."""
    evaluator._results = {}
    evaluator._eval_predictions([{"instances": copy.deepcopy(found)}])
    return evaluator._results


@pytest.mark.parametrize("how", ["id 0", "ids twice", "area not finite", "category twice", "detection not finite"])
def test_where_backends_might_differ_pycocotools_evaluates_and_the_log_says_so(how, tmp_path, registered, caplog):
    labels, found = coco_case(3)
    spoil(labels, how)
    if how == "detection not finite":
        found[0]["bbox"] = [float("nan")] * 4
    path = written(labels, tmp_path / "labels.json")
    name = registered(json_file=path, evaluator_type="coco")
    expected = by_pycocotools(path, copy.deepcopy(found), "bbox").stats[:3] * 100
    for backend in ("auto", "hotcoco"):  # also one that was named: the error would come after the training
        caplog.clear()
        evaluator = ours.ExactCOCOEvaluator(name, backend)
        with caplog.at_level(logging.WARNING):
            got = evaluated(evaluator, found)["bbox"]
        assert [got["AP"], got["AP50"], got["AP75"]] == expected.tolist()
        chosen = ours.choose_backend(backend).name
        assert f"pycocotools {version('pycocotools')} evaluates instead of {chosen}" in caplog.text
        assert evaluator.library.startswith("pycocotools ")


def test_a_library_that_fails_is_replaced_by_the_reference(tmp_path, registered, caplog, monkeypatch):
    def fail(*args):
        raise RuntimeError("out of luck")

    monkeypatch.setattr("hotcoco.COCO", fail)
    labels, found = lvis_case(3, "bbox")
    path, saved = written(labels, tmp_path / "labels.json"), written(found, tmp_path / "found.json")
    with caplog.at_level(logging.WARNING):
        got = ExactLVISEvaluator(registered(json_file=path, evaluator_type="lvis")).evaluate_file(saved)["bbox"]
    assert f"hotcoco {version('hotcoco')} failed (RuntimeError: out of luck): lvis" in caplog.text
    assert got == by_lvis(path, found, "bbox", 300, monkeypatch)


def test_what_no_library_can_read_is_an_error(tmp_path, registered, caplog):
    # A polygon of two points: each library has its own opinion, and hotcoco's is an error for a mask of another size.
    labels, found = coco_case(3, "segm")
    found[0]["segmentation"] = {"size": [HEIGHT, WIDTH], "counts": 7}
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    with pytest.raises((TypeError, ValueError, AttributeError)), caplog.at_level(logging.WARNING):
        evaluated(ours.ExactCOCOEvaluator(name), found)
    assert caplog.text.count(f"hotcoco {version('hotcoco')} failed") == 1


def coco_instances(labels, found, image, masks):
    mine = [one for one in found if one["image_id"] == image]
    instances = Instances((HEIGHT, WIDTH))
    boxes = torch.tensor([one["bbox"] for one in mine]).reshape(-1, 4)
    instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
    instances.scores = torch.tensor([one["score"] for one in mine])
    ids = [category["id"] for category in labels["categories"]]
    instances.pred_classes = torch.tensor([ids.index(one["category_id"]) for one in mine], dtype=torch.int64)
    if masks:
        pixels = [torch.from_numpy(mask_api.decode(one["segmentation"])) for one in mine]
        instances.pred_masks = torch.stack(pixels).bool() if pixels else torch.zeros(0, HEIGHT, WIDTH)
    return instances


def test_the_coco_evaluator_gives_detectron2s_metrics_and_its_file_gives_them_again(tmp_path, registered):
    labels, found = coco_case(3, "segm")
    ids = [category["id"] for category in labels["categories"]]
    name = registered(
        json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco",
        thing_classes=[category["name"] for category in labels["categories"]],
        thing_dataset_id_to_contiguous_id={category: index for index, category in enumerate(ids)},
    )  # fmt: skip
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "MODEL.MASK_ON", "True", "DATASETS.TEST", f"('{name}',)"])
    results = []
    for evaluator in (COCOEvaluator(name, ("bbox", "segm"), use_fast_impl=False), build_evaluator(cfg, name)):
        evaluator.reset()
        for image in labels["images"]:
            instances = coco_instances(labels, found, image["id"], masks=True)
            evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
        with contextlib.redirect_stdout(io.StringIO()):
            results.append(evaluator.evaluate())
    assert len(results[0]["segm"]) == 6 + len(ids)
    # As text, because nan is not nan.
    assert repr(dict(results[1])) == repr(dict(results[0]))
    again, library = evaluate_file(cfg, name, tmp_path / "inference" / name / "coco_instances_results.json")
    assert repr(again) == repr(dict(results[0]))
    assert library == f"hotcoco {version('hotcoco')}"


def test_a_detector_that_finds_nothing_keeps_its_columns(tmp_path, registered):
    labels, _ = coco_case(3, "keypoints")
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "MODEL.KEYPOINT_ON", "True"])
    result, _ = evaluate_file(cfg, name, written([], tmp_path / "found.json"))
    assert set(result) == {"bbox", "keypoints"}
    for scores in result.values():
        assert (scores["AP"], scores["AP50"]) == (0, 0)


@pytest.mark.parametrize("backend", [backend.name for backend in ours.BACKENDS if backend.installed])
def test_the_ap_of_no_detection_is_zero_where_there_are_objects(backend, tmp_path, registered):
    labels, _ = coco_case(3, "segm")
    labels["categories"].append({"id": 99, "name": "absent"})
    for label in labels["annotations"]:
        label["area"], label["iscrowd"] = 5000.0, 0  # of the middle size
    name = registered(
        json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco",
        thing_classes=[category["name"] for category in labels["categories"]],
    )  # fmt: skip
    for scores in evaluated(ours.ExactCOCOEvaluator(name, backend, tasks=("bbox", "segm")), []).values():
        zero = {key for key, value in scores.items() if value == 0}
        assert zero == {"AP", "AP50", "AP75", "APm", *(f"AP-{c['name']}" for c in labels["categories"][:-1])}
        assert all(np.isnan(value) for key, value in scores.items() if key not in zero)


def test_the_lvis_ap_of_no_detection_is_zero_by_both_libraries(tmp_path, registered):
    labels, _ = lvis_case(3, "segm")
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="lvis")
    saved = written([], tmp_path / "found.json")
    for backend in ("hotcoco", "pycocotools"):
        scores = ExactLVISEvaluator(name, backend, tasks=("bbox", "segm")).evaluate_file(saved)
        assert all(values["AP"] == values["AP50"] == 0 for values in scores.values()), scores


def test_the_sigmas_of_keypoints_are_the_configs(tmp_path, registered):
    labels, found = coco_case(3, "keypoints")
    path, saved = written(labels, tmp_path / "labels.json"), written(found, tmp_path / "found.json")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "MODEL.KEYPOINT_ON", "True"])
    name, aps = registered(json_file=path, evaluator_type="coco"), []
    for sigmas in ([], [0.02] * 17):
        cfg.TEST.KEYPOINT_OKS_SIGMAS = sigmas
        aps.append(evaluate_file(cfg, name, saved)[0]["keypoints"]["AP"])
        assert aps[-1] == by_pycocotools(path, found, "keypoints", sigmas).stats[0] * 100
    assert aps[0] != aps[1]


def test_mistakes_in_files_and_keys_are_named(tmp_path, registered):
    labels, found = coco_case(3)
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    found[0]["image_id"] = 99999
    with pytest.raises(ValueError, match=f"has image_id 99999, which is not in '{name}'"):
        evaluate_file(cfg, name, written(found, tmp_path / "found.json"))
    with pytest.raises(ValueError, match="not hold detections in COCO's format"):
        evaluate_file(cfg, name, written(labels, tmp_path / "found.json"))
    cfg.TEST.COCO_BACKEND = "hotcocoa"
    with pytest.raises(ValueError, match="did you mean 'hotcoco'"):
        evaluator_type(name, cfg)
    with pytest.raises(ValueError, match=r"lack dirname, split, year, thing_classes"):
        build_evaluator(cfg, registered(evaluator_type="pascal_voc"))


HUGE = 10**400
WRONG_DETECTIONS = {
    "no category": ({"category_id": 999}, r"id 999, which is not in .*; its ids are 15 \(class15\), "),
    "a fraction": ({"category_id": 15.5}, "has category_id 15.5; it must be one of the data set's ids"),
    "a flag": ({"image_id": True}, "has image_id True; it must be one"),
    "no image": ({"image_id": "elsewhere"}, "image_id 'elsewhere', which is not in 'test_evaluators_0'; its ids are 8"),
    "no score": ({"score": None}, "has no score"),
    "text": ({"score": "0.9"}, "has score '0.9'; it must be a finite number"),
    "nan": ({"score": float("nan")}, "has score nan"),
    "huge": ({"score": HUGE}, "has score 1000.* ...; it must be a finite number"),
    "no box": ({"bbox": None}, "has no bbox, but other records have"),
    "three": ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\]; it must be a list of 4 finite numbers"),
    "not finite": ({"bbox": [1, 2, float("inf"), 4]}, "4 finite numbers"),
    "negative": ({"bbox": [9, 9, -3, 4]}, "with width and height of 0 or more"),
    "polygon": ({"segmentation": [[1, 1, 5, 1, 5, 5]]}, "it must be a run-length mask with size and counts"),
    "no mask": ({"segmentation": None}, "has no segmentation, but other records have"),
    "too long": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": [10, 10**6]}}, "mask of 1000010 pixels"),
    "cut short": ({"segmentation": {"size": [HEIGHT, WIDTH], "counts": "PP"}}, "neither whole numbers nor"),
    "another size": ({"segmentation": {"size": [9, 9], "counts": [81]}}, r"must be \[150, 200\], the image's"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG_DETECTIONS)
def test_a_detection_that_is_none_is_named(kind, tmp_path, registered):
    labels, found = coco_case(3, "segm")
    change, message = WRONG_DETECTIONS[kind]
    found[2] |= change
    path = tmp_path / "found.json"
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ValueError, match=rf"found\.json: record 2 .*{message}") as caught:
        evaluate_file(cfg, name, written(found, path))
    assert "\n" not in str(caught.value)


def test_class_indices_in_place_of_category_ids_are_recognised(tmp_path, registered):
    labels, found = coco_case(3)
    ids = [category["id"] for category in labels["categories"]]
    for detection in found:
        detection["category_id"] = ids.index(detection["category_id"])
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    remedy = rf"so they may be class numbers: write the data set's ids .*, 15 \(class15\) for 0 .*\({len(found)} of "
    with pytest.raises(ValueError, match=remedy):
        evaluate_file(load_cfg("", ["OUTPUT_DIR", str(tmp_path)]), name, written(found, tmp_path / "found.json"))


def test_detections_in_other_spellings_give_the_same_numbers(tmp_path, registered):
    labels, found = coco_case(3, "segm")
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    expected = evaluate_file(cfg, name, written(found, tmp_path / "found.json"))
    for detection in found:  # ids as text, counts as numbers, scores of another scale
        detection["image_id"] = str(detection["image_id"])
        counts = unpacked(detection["segmentation"]["counts"]).tolist()
        detection["segmentation"] = {**detection["segmentation"], "counts": counts}
        detection["score"] *= 100
    (tmp_path / "found.json").write_text("\ufeff" + json.dumps(found))
    assert repr(evaluate_file(cfg, name, tmp_path / "found.json")) == repr(expected)


def test_what_labels_lack_is_left_out_of_the_comparison(tmp_path, registered, caplog):
    labels, found = coco_case(3, "segm")
    boxes = written([{k: v for k, v in one.items() if k != "segmentation"} for one in found], tmp_path / "boxes.json")
    for label in labels["annotations"]:
        del label["segmentation"]
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    both = evaluate_file(cfg, name, written(found, tmp_path / "found.json"))
    assert f"{len(labels['annotations'])} objects have no segmentation, so segm is not evaluated" in caplog.text
    assert repr(both) == repr(evaluate_file(cfg, name, boxes))


def test_numbers_of_keypoints_must_agree(tmp_path, registered):
    labels, found = coco_case(3, "keypoints")
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "TEST.KEYPOINT_OKS_SIGMAS", "[0.1, 0.1]"])
    with pytest.raises(ValueError, match=r"is for 2 keypoints, the labels of .* have 17, the detections 17"):
        evaluate_file(cfg, name, written(found, tmp_path / "found.json"))


@pytest.mark.parametrize(("text", "message"), [
    ("[{", r"found.json:1: not valid JSON: .*column 3"), ("[" * 10**5, "nested too deeply"),
    ("7", "not hold detections in COCO's format"), ("[7]", "not hold detections in COCO's format"),
])  # fmt: skip
def test_files_that_hold_no_detections_are_named(text, message, tmp_path, registered):
    labels, _ = coco_case(3)
    (tmp_path / "found.json").write_text(text)
    name = registered(json_file=written(labels, tmp_path / "labels.json"), evaluator_type="coco")
    with pytest.raises(ValueError, match=message):
        evaluate_file(load_cfg("", ["OUTPUT_DIR", str(tmp_path)]), name, tmp_path / "found.json")


# LVIS.


def lvis_case(seed, task):
    """Turn a COCO case into a federated one."""
    labels, found = coco_case(seed, task)
    random = np.random.default_rng(seed)
    for category in labels["categories"]:
        category["frequency"] = str(random.choice(list("rcf")))
    for label in labels["annotations"]:
        del label["iscrowd"]
        x, y, w, h = label["bbox"]
        label["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    for image in labels["images"]:
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [category["id"] for category in labels["categories"] if random.random() < 0.3]
        image["coco_url"] = f"http://images/val2017/{image['id']}.jpg"
    return labels, found


def by_lvis(path, found, task, limit, monkeypatch):
    """Evaluate with the package itself, which needs a name of NumPy 1."""
    import lvis

    monkeypatch.setattr(np, "float", float, raising=False)
    found = copy.deepcopy(found)
    if task == "segm":  # as Detectron2 does, so that areas are those of the masks
        for one in found:
            del one["bbox"]
    labels = lvis.LVIS(path)
    evaluation = lvis.LVISEval(labels, lvis.LVISResults(labels, found, max_dets=limit), task)
    evaluation.run()
    monkeypatch.undo()
    return {metric: float(evaluation.get_results()[metric] * 100) for metric in METRICS}


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_lvis_metrics_are_those_of_its_package(task, tmp_path, registered, monkeypatch):
    seen = set()
    for seed in range(20):
        labels, found = lvis_case(seed, task)
        if not found or not labels["annotations"]:
            continue
        path, saved = written(labels, tmp_path / "labels.json"), written(found, tmp_path / "found.json")
        name = registered(json_file=path, evaluator_type="lvis")
        limit = 300 if seed % 2 else 20
        expected = by_lvis(path, found, task, limit, monkeypatch)
        for backend in ("hotcoco", "pycocotools"):
            evaluator = ExactLVISEvaluator(name, backend, max_dets_per_image=limit)
            assert evaluator.evaluate_file(saved)[task] == expected, (seed, backend)
            assert evaluator.library.startswith("hotcoco" if backend == "hotcoco" else "lvis")
        seen |= {metric for metric, value in expected.items() if 0 < value < 100}
    assert seen == set(METRICS)


@pytest.mark.parametrize("version", ["lvis_v0.5", "lvis_v1"])
def test_lvis_sets_load_and_evaluate_through_the_config(version, tmp_path):
    labels, _ = lvis_case(3, "bbox")
    for label in labels["annotations"]:  # Detectron2's names of the classes are those of the real files
        label["category_id"] = 1 + labels["categories"].index(
            {c["id"]: c for c in labels["categories"]}[label["category_id"]]
        )
    for image in labels["images"]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [1], [2]
    labels["categories"] = [{**category, "id": i} for i, category in enumerate(labels["categories"], 1)]
    name = f"{version}_test_evaluators"
    register_lvis_instances(name, {}, written(labels, tmp_path / "labels.json"), str(tmp_path) + "/")
    try:
        records = DatasetCatalog.get(name)
        assert len(records) == len(labels["images"])
        cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path), "DATASETS.TEST", f"('{name}',)"])
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        for record in records:  # the labels themselves
            instances = Instances((HEIGHT, WIDTH))
            boxes = torch.tensor([one["bbox"] for one in record["annotations"]]).reshape(-1, 4)
            instances.pred_boxes = Boxes(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1))
            instances.scores = torch.ones(len(boxes))
            instances.pred_classes = torch.tensor([one["category_id"] for one in record["annotations"]])
            evaluator.process([record], [{"instances": instances}])
        result = evaluator.evaluate()
        assert result["bbox"]["AP"] == pytest.approx(100)
        again, library = evaluate_file(cfg, name, tmp_path / "inference" / name / "lvis_instances_results.json")
        assert again == dict(result) and library.startswith("hotcoco ")
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# VOC.

CLASSES = ["a", "b", "c", "d"]


def voc_case(seed, folder):
    """Write labels, and return (image, instances) pairs.

    Among them: difficult objects, classes with difficult objects only, without objects or without detections, the same
    object twice, pictures without either, a picture listed twice, tied scores, and objects of no class.
    """
    random = np.random.default_rng(seed)
    names = [f"{index:06d}" for index in range(random.integers(1, 30))]
    objects = {}
    for name in names:
        kinds = [k for k in random.choice(CLASSES, random.integers(0, 5)) if not (k == "c" and seed % 5 == 0)]
        corners = random.integers(1, 80, (len(kinds), 2))
        boxes = np.column_stack([corners, corners + random.integers(0, 60, (len(kinds), 2))]).tolist()
        difficult = [int(random.random() < 0.3 or (k == "b" and seed % 3 == 0)) for k in kinds]
        objects[name] = list(zip(kinds, difficult, boxes, strict=True))
        objects[name] += objects[name][: random.random() < 0.1]
    for place in ("Annotations", "ImageSets/Main"):
        (folder / place).mkdir(parents=True)
    listed = names + names[: random.random() < 0.3]
    (folder / "ImageSets/Main/test.txt").write_text("\n".join(listed) + "\n")
    for name, there in objects.items():
        text = "".join(
            f"<object><name>{kind}</name><pose>Left</pose><truncated>0</truncated><difficult>{hard}</difficult><bndbox>"
            + "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True))
            + "</bndbox></object>"
            for kind, hard, corners in [*there, ("none of these", 0, [1, 1, 9, 9])]
        )
        (folder / f"Annotations/{name}.xml").write_text(f"<annotation>{text}</annotation>")
    return [(name, voc_instances(random, there, seed)) for name, there in objects.items() if random.random() < 0.8]


def voc_instances(random, there, seed):
    boxes, scores, classes = [], [], []
    for _ in range(random.integers(0, 30)):
        if there and random.random() < 0.7:
            kind, _, corners = there[random.integers(len(there))]
            boxes.append(np.subtract(corners, [1, 1, 0, 0]) + random.normal(size=4) * random.choice([0, 0.5, 3]))
            classes.append(CLASSES.index(kind))
        else:
            corner = random.uniform(-3, 80, 2)
            boxes.append(np.concatenate([corner, corner + random.uniform(0, 60, 2)]))
            classes.append(random.integers(0, 3 if seed % 7 == 0 else 4))
        scores.append(random.choice([0, 0.05, 0.5, 0.5005, 0.4995, 1]) if random.random() < 0.5 else random.random())
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32))
    instances.scores = torch.tensor(scores, dtype=torch.float64 if seed % 4 == 0 else torch.float32)
    instances.pred_classes = torch.tensor(np.array(classes, int))
    return instances


def process(evaluator, found):
    evaluator.reset()
    for name, instances in found:
        evaluator.process([{"image_id": name}], [{"instances": instances}])


@pytest.mark.parametrize("year", [2007, 2012])
def test_voc_ap_of_every_class_is_detectron2s_to_the_bit(year, tmp_path, registered, monkeypatch):
    values = []
    original = pascal_voc_evaluation.voc_eval

    def recorded(*args, **kwargs):
        values.append(original(*args, **kwargs))
        return values[-1]

    monkeypatch.setattr(pascal_voc_evaluation, "voc_eval", recorded)
    between = 0
    for seed in range(16):
        folder = tmp_path / str(seed)
        found = voc_case(seed, folder)
        name = registered(
            dirname=str(folder), split="test", year=year, thing_classes=CLASSES, evaluator_type="pascal_voc"
        )
        theirs, mine = pascal_voc_evaluation.PascalVOCDetectionEvaluator(name), VOCEvaluator(name, str(folder))
        process(theirs, found)
        process(mine, found)
        values.clear()
        expected, got = theirs.evaluate(), mine.evaluate()
        by_class = np.array([ap for _, _, ap in values]).reshape(len(CLASSES), len(THRESHOLDS)).T * 100
        np.testing.assert_array_equal(mine.aps, by_class, err_msg=str(seed))
        means = {metric: got["bbox"][metric] for metric in expected["bbox"]}
        np.testing.assert_array_equal(list(means.values()), list(expected["bbox"].values()))
        own = [got["bbox"][f"AP-{name}"] for name in CLASSES]
        np.testing.assert_allclose(own, by_class.mean(0), rtol=1e-12)
        again = VOCEvaluator(name).evaluate_file(folder / "voc_instances_results.json")
        np.testing.assert_array_equal(list(again["bbox"].values()), list(got["bbox"].values()))
        between += ((by_class > 0) & (by_class < 100)).any()
    assert between > 12


def test_numbers_are_rounded_as_they_are_written():
    random = np.random.default_rng(0)
    values = np.concatenate([random.random(5000), random.uniform(-5, 2000, 5000), np.arange(0, 100, 0.0625)])
    for dtype, digits in itertools.product((np.float32, np.float64), (1, 3)):
        numbers = values.astype(dtype)
        assert _rounded(numbers, digits).tolist() == [float(f"{number:.{digits}f}") for number in numbers]


def test_voc_labels_and_detections_that_do_not_fit_are_named(tmp_path, registered):
    found = voc_case(1, tmp_path)
    meta = {"dirname": str(tmp_path), "split": "test", "thing_classes": CLASSES, "evaluator_type": "pascal_voc"}
    with pytest.raises(ValueError, match="have year 2010; it must be 2007"):
        VOCEvaluator(registered(year=2010, **meta))
    evaluator = VOCEvaluator(registered(year=2007, **meta))
    process(evaluator, [("elsewhere", found[0][1])])
    with pytest.raises(ValueError, match="image 'elsewhere', which is not in the test set"):
        evaluator.evaluate()
    rows = {name: [] for name in CLASSES}
    for content, message in (
        ({"dog": []}, "its keys must be the classes a, b, c, d"),
        ([], "its keys must be the classes"),
        (rows | {"b": [["000000", 0.5, 1, 2, 3]]}, r"row 0 of 'b' is \['000000', 0.5, 1, 2, 3\]; it must be \[image"),
        (rows | {"b": [["000000", "0.5", 1, 2, 3, 4]]}, "row 0 of 'b' is .*must be finite numbers"),
        (rows | {"c": [["000000", 0.5, 1, 2, float("nan"), 4]]}, "row 0 of 'c' is .*must be finite numbers"),
        (
            rows | {"d": [["elsewhere", 0.5, 1, 2, 3, 4]]},
            "row 0 of 'd' is of image 'elsewhere', which is not",
        ),
        (rows | {"d": 7}, "row 0 of 'd' is 7; it must be"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluator.evaluate_file(written(content, tmp_path / "found.json"))
    assert evaluator.evaluate_file(written(rows, tmp_path / "found.json"))["bbox"]["AP"] == 0


def voc_in_two_processes(folder):
    """Evaluate half of the pictures in each process; the main one writes the metrics."""
    from detectron2.utils import comm

    metadata = {"dirname": str(folder), "split": "test", "year": 2012, "thing_classes": CLASSES}
    MetadataCatalog.get("halves").set(**metadata)
    found = torch.load(folder / "found.pth", weights_only=False)
    half = len(found) // 2
    evaluator = VOCEvaluator("halves")
    process(evaluator, found[half:] if comm.get_rank() else found[:half])
    result = evaluator.evaluate()
    assert (result is None) == (comm.get_rank() == 1)
    if result:
        (folder / "together.json").write_text(json.dumps(result))


def test_voc_detections_of_two_processes_are_one_set(tmp_path, registered):
    found = voc_case(2, tmp_path)
    torch.save(found, tmp_path / "found.pth")
    name = registered(dirname=str(tmp_path), split="test", year=2012, thing_classes=CLASSES)
    alone = VOCEvaluator(name)
    process(alone, found)
    in_two_processes(voc_in_two_processes, tmp_path)
    assert json.loads((tmp_path / "together.json").read_text()) == alone.evaluate()


def test_the_tool_gives_the_evaluators_numbers(dataset_root, tmp_path, registered):
    name = registered(
        dirname=str(dataset_root / "VOC2007"), split="test", year=2007,
        thing_classes=MetadataCatalog.get("voc_2007_test").thing_classes,
    )  # fmt: skip
    evaluator = VOCEvaluator(name, str(tmp_path))
    instances = Instances((90, 120))
    instances.pred_boxes, instances.scores = Boxes(torch.tensor([[22.0, 20, 75, 61]])), torch.tensor([0.7])
    instances.pred_classes = torch.tensor([MetadataCatalog.get(name).thing_classes.index("dog")])
    process(evaluator, [(f"{index:06d}", instances) for index in range(3)])
    expected = evaluator.evaluate()
    assert 0 < expected["bbox"]["AP"] < 100
    command = [
        str(ROOT / "tools/evaluate_json.py"), "--predictions", str(tmp_path / "voc_instances_results.json"),
        "--dataset", "voc_2007_test", "--output", str(tmp_path / "metrics.json"),
    ]  # fmt: skip
    environment = os.environ | {"DETECTRON2_DATASETS": str(dataset_root), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == expected
    assert f"{expected['bbox']['AP']:.3f}" in done.stdout


# Segmentation.


def test_sem_seg_is_the_mean_iou_over_classes(tmp_path, registered):
    truth = np.zeros((10, 10), np.uint8)
    truth[:, 5:], truth[0] = 1, 255
    Image.fromarray(truth).save(tmp_path / "truth.png")
    record = {"file_name": "image.jpg", "image_id": 1, "sem_seg_file_name": str(tmp_path / "truth.png")}
    name = registered(stuff_classes=["back", "front"], ignore_label=255, evaluator_type="sem_seg")
    DatasetCatalog.register(name, lambda: [record])
    evaluator = build_evaluator(load_cfg("", ["OUTPUT_DIR", str(tmp_path)]), name)
    evaluator.reset()
    scores = torch.zeros(2, 10, 10)
    scores[1, :, 7:] = 1
    evaluator.process([record], [{"sem_seg": scores}])
    # 9 rows count: of class 0 45 of 63 predicted pixels are right, of class 1 27 of 45 are found.
    assert evaluator.evaluate()["sem_seg"]["mIoU"] == pytest.approx(100 * (45 / 63 + 27 / 45) / 2)


def cityscapes(folder, registered, kind):
    """Write the labels of a street with two cars, and return the data set's name, the car pixels and the labels."""
    from cityscapesscripts.helpers.labels import name2label, trainId2label

    (folder / "gt" / "town").mkdir(parents=True)
    pixels = np.full((64, 128), name2label["road"].id, np.int32)
    cars = [np.zeros((64, 128), bool) for _ in range(2)]
    cars[0][5:40, 5:60], cars[1][20:60, 70:120] = True, True
    instances = pixels.copy()
    for number, car in enumerate(cars):
        pixels[car] = name2label["car"].id
        instances[car] = name2label["car"].id * 1000 + number
    base = folder / "gt" / "town" / "town_000000_000019_gtFine"
    Image.fromarray(pixels.astype(np.uint8)).save(f"{base}_labelIds.png")
    Image.fromarray(instances.astype(np.uint16)).save(f"{base}_instanceIds.png")
    classes = [trainId2label[index].name for index in range(11, 19)]
    return registered(gt_dir=str(folder / "gt"), thing_classes=classes, evaluator_type=kind), cars, name2label


@pytest.mark.filterwarnings("ignore::DeprecationWarning:cityscapesscripts")
def test_cityscapes_instances_are_evaluated_by_its_scripts(tmp_path, registered, capsys):
    name, cars, _ = cityscapes(tmp_path, registered, "cityscapes_instance")
    cfg = load_cfg("", ["OUTPUT_DIR", str(tmp_path)])
    with pytest.raises(ValueError, match=r"pass MODEL\.MASK_ON True"):
        build_evaluator(cfg, name)
    cfg.MODEL.MASK_ON = True
    for found, expected in ((cars, 100), (cars[:1], 50)):
        evaluator = build_evaluator(cfg, name)
        evaluator.reset()
        instances = Instances((64, 128))
        instances.pred_masks = torch.from_numpy(np.stack(found))
        instances.scores = torch.linspace(0.9, 0.8, len(found))
        instances.pred_classes = torch.full((len(found),), MetadataCatalog.get(name).thing_classes.index("car"))
        image = {"file_name": "town_000000_000019_leftImg8bit.png", "image_id": 0}
        evaluator.process([image], [{"instances": instances}])
        assert evaluator.evaluate()["segm"]["AP50"] == pytest.approx(expected, abs=1)


def test_cityscapes_semantics_are_evaluated_by_its_scripts(tmp_path, registered, capsys):
    name, cars, labels = cityscapes(tmp_path, registered, "cityscapes_sem_seg")
    evaluator = build_evaluator(load_cfg("", ["OUTPUT_DIR", str(tmp_path)]), name)
    evaluator.reset()
    scores = torch.zeros(19, 64, 128)
    scores[labels["road"].trainId] = 0.5
    scores[labels["car"].trainId, torch.from_numpy(cars[0])] = 1  # the other car is taken for road
    image = {"file_name": "town_000000_000019_leftImg8bit.png", "image_id": 0}
    evaluator.process([image], [{"sem_seg": scores}])
    first, second = (car.sum() for car in cars)
    road = 64 * 128 - first - second
    expected = 100 * (road / (road + second) + first / (first + second)) / 2
    assert evaluator.evaluate()["sem_seg"]["IoU"] == pytest.approx(expected)

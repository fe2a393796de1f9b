"""Labelled sets in every form, what is wrong with one, and the test transform."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image
from torchvision import transforms

from moco_d2.data import ViewDataset, build_backend
from moco_d2.data.labelled import open_labelled, open_pair
from moco_d2.data.labelled_loader import LabelledLoader, LabelledSource, crop_and_flip
from moco_d2.facts import CAFFE_BGR, IMAGENET_RGB
from moco_d2.io.pictures import PictureError

Pictures = np.ndarray


def noise(*shape: int, seed: int = 0) -> Pictures:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def grow(root: Path, counts: dict[str, int]) -> Path:
    """A folder per class; the pictures are lossless."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(noise(30, 40, seed=i)).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    grow(tmp_path / "train", {"cat": 3, "dog": 2})
    grow(tmp_path / "val", {"cat": 1, "dog": 2})
    return tmp_path


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Callable[[str, list[dict[str, Any]]], str]]:
    """Register detection sets of one picture of 40 x 30 pixels."""
    names, path = [], tmp_path / "scene.png"
    Image.fromarray(noise(30, 40)).save(path)

    def register(name: str, things: list[dict[str, Any]]) -> str:
        record = {"file_name": str(path), "width": 40, "height": 30, "annotations": things}
        DatasetCatalog.register(name, lambda: [record])
        MetadataCatalog.get(name).thing_classes = ["bird", "boat"]
        names.append(name)
        return name

    yield register
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def thing(*box: float, category: int = 1, **more: Any) -> dict[str, Any]:
    return {"bbox": list(box), "bbox_mode": BoxMode.XYXY_ABS, "category_id": category, **more}


def test_a_folder_per_class_with_or_without_halves(halves: Path) -> None:
    train, val = open_pair(str(halves), str(halves))
    assert train.classes == val.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1] and val.labels.tolist() == [0, 1, 1]
    assert open_labelled(str(halves / "train"), "train").files == train.files
    (halves / "val").rename(halves / "test")
    assert len(open_labelled(str(halves), "val")) == 3


def test_imagenet_is_found_where_detectron2_keeps_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    grow(tmp_path / "imagenet/val", {"n01440764": 1, "n01443537": 2})
    assert open_labelled("imagenet_val", "val").labels.tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match=r"there is no folder .*imagenet/train"):
        open_labelled("imagenet_train", "train")


def test_cifar_as_torchvision_keeps_it_and_as_an_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    pixels = noise(2, 32, 32)
    rows = pixels.transpose(0, 3, 1, 2).reshape(2, -1)
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        (folder / name).write_bytes(pickle.dumps({"data": rows, "labels": [3, 0]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    for place in (tmp_path, folder):
        train, val = open_pair(str(place), str(place))
        assert (len(train), val.labels.tolist(), len(val.classes)) == (10, [3, 0], 10)
        assert np.array_equal(np.asarray(val.picture(1)), pixels[1])

    files = [io.BytesIO(), io.BytesIO()]
    for file, picture in zip(files, pixels, strict=True):
        Image.fromarray(picture).save(file, "jpeg", quality=95)
    one, two = (file.getvalue() for file in files)
    head = next(n for n in range(len(one)) if one[n] != two[n])
    parts = [one[head:], two[head:]]
    stored = {
        "classes": np.array(["a", "b"]), "head": np.frombuffer(one[:head], np.uint8), "test_label": np.array([1, 0]),
        "test_length": np.array([len(part) for part in parts]), "test_data": np.frombuffer(b"".join(parts), np.uint8),
    }  # fmt: skip
    np.savez(tmp_path / "jpeg.npz", **stored)
    archive = open_labelled(str(tmp_path / "jpeg.npz"), "val")
    assert archive.labels.tolist() == [1, 0] and archive.classes == ("a", "b")
    assert np.array_equal(np.asarray(archive.picture(1)), np.asarray(Image.open(files[1])))
    with pytest.raises(ValueError, match="has no train_label, train_data, train_length, only classes, head"):
        open_labelled(str(tmp_path / "jpeg.npz"), "train")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "jpeg.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.npz cannot be read .*; make or download it anew"):
        open_labelled(str(tmp_path / "cut.npz"), "val")


def test_objects_are_cut_out_with_context_inside_the_picture(objects: Callable[..., str]) -> None:
    small, crowd = thing(0, 0, 15, 30), thing(0, 0, 20, 20, iscrowd=1)
    found = open_labelled(objects("probe_boxes", [small, crowd, thing(10, 5, 30, 30), thing(0, 0, 20, 20)]), "val")
    assert found.classes == ("bird", "boat") and found.labels.tolist() == [1, 1]
    assert found.boxes is not None and found.boxes.tolist() == [[8, 2.5, 32, 30], [0, 0, 22, 22]]
    assert found.picture(0).size == (24, 28)  # PIL rounds half to even, as numpy does
    assert found.without_pictures() == ["bird"]


def test_sets_that_are_no_labelled_sets(tmp_path: Path, objects: Callable[..., str]) -> None:
    grow(tmp_path / "loose", {"cat": 1})
    Image.fromarray(noise(9, 9)).save(tmp_path / "loose/stray.png")
    (tmp_path / "empty/cat").mkdir(parents=True)
    grow(tmp_path / "half/train", {"cat": 1})
    for name, split, words in (
        (str(tmp_path / "loose"), "val", "1 pictures lie in none of them, such as .*stray.png"),
        (str(tmp_path / "empty"), "val", "must hold a folder of pictures per class, but no picture was found"),
        (str(tmp_path / "half"), "val", "has no folder val or test, only train"),
        (objects("probe_none", []), "val", "it has no labels of objects with a box of at least 16 x 16"),
        (objects("probe_small", [thing(0, 0, 9, 9)]), "val", "none of its 1 objects has a box of at least 16"),
        ("probe_smal", "val", "is no labelled set: it must be .*; did you mean 'probe_small'"),
    ):
        with pytest.raises(ValueError, match=words):
            open_labelled(name, split)


def test_sets_that_do_not_belong_together(
    halves: Path, objects: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    grow(halves / "other", {"cat": 1, "horse": 1, "zebra": 1})
    with pytest.raises(ValueError, match=r"has 2 classes and .* has 3, other classes: only the first has dog; only the "
                       "second has horse, zebra"):  # fmt: skip
        open_pair(str(halves / "train"), str(halves / "other"))
    with pytest.raises(ValueError, match=r"0\.png is in both .* must be held out"):
        open_pair(str(halves / "train"), str(halves / "train"))
    with pytest.raises(ValueError, match="is in both"):
        open_pair(*[objects("probe_same", [thing(0, 0, 20, 20)])] * 2)
    (halves / "train/horse").mkdir()
    (halves / "val/horse").mkdir()
    with caplog.at_level(logging.WARNING):
        train, val = open_pair(str(halves), str(halves))
    assert train.classes == val.classes == ("cat", "dog", "horse")
    assert caplog.text.count("has no pictures of 1 of its 3 classes: horse") == 2


def test_the_test_transform_is_torchvisions(halves: Path) -> None:
    train = open_labelled(str(halves), "train")
    for bicubic, mode in (
        (False, transforms.InterpolationMode.BILINEAR),
        (True, transforms.InterpolationMode.BICUBIC),
    ):
        mean, std = ([v / 255 for v in values] for values in (IMAGENET_RGB.mean, IMAGENET_RGB.std))
        published = transforms.Compose([
            transforms.Resize(32, mode), transforms.CenterCrop(28), transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ])  # fmt: skip
        expected = torch.stack([published(Image.open(file).convert("RGB")) for file in train.files])
        loaded = list(LabelledLoader(train, IMAGENET_RGB, 28, bicubic=bicubic, batch=2))
        torch.testing.assert_close(torch.cat([images for images, _ in loaded]), expected, atol=1e-5, rtol=1e-5)
        assert torch.cat([labels for _, labels in loaded]).equal(train.labels)
    ((bgr, labels),) = LabelledLoader(train.part(range(1, 5, 2)), CAFFE_BGR, 28)
    ((rgb, _),) = LabelledLoader(train.part(range(1, 5, 2)), IMAGENET_RGB, 28)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_RGB.mean, IMAGENET_RGB.std))
    caffe = torch.tensor(CAFFE_BGR.mean).view(3, 1, 1)
    torch.testing.assert_close(bgr, (rgb * std + mean).flip(1) - caffe, atol=1e-3, rtol=0)
    assert labels.tolist() == [0, 1]


def test_workers_give_the_same_pictures_and_unreadable_ones_are_left_out(
    halves: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (halves / "train/cat/1.png").write_bytes(b"broken")
    train = open_labelled(str(halves), "train")
    found = []
    for workers in (0, 2):
        loader = LabelledLoader(train, IMAGENET_RGB, 28, batch=2, workers=workers, max_skipped=0.2)
        found.append([torch.cat(part) for part in zip(*loader, strict=True)])
        assert loader.unreadable == 1
    assert all(map(torch.equal, *found)) and found[0][1].tolist() == [0, 0, 1, 1]
    assert caplog.text.count("cat/1.png") == 2
    with pytest.raises(PictureError, match=r"1 of the 5 pictures of .* cannot be read, more than DATA.MAX_SKIPPED 0.1"):
        list(LabelledLoader(train, IMAGENET_RGB, 28, max_skipped=0.1))


def test_random_crops_of_objects_and_arrays_go_through_the_loader_of_training(objects: Callable[..., str]) -> None:
    found = open_labelled(objects("probe_crops", [thing(10, 5, 30, 30), thing(0, 0, 20, 20, category=0)]), "train")
    source = LabelledSource(found)
    for index in range(2):
        decoded = Image.open(io.BytesIO(source.read(index)))
        assert np.array_equal(np.asarray(decoded), np.asarray(found.picture(index)))
    dataset = ViewDataset(source, crop_and_flip(16, CAFFE_BGR), 0, build_backend("pil", torch.device("cpu")))
    sample = dataset[0, 1]
    assert sample.views[0].shape == (16, 16, 3) and sample.position == 1
    assert dataset.augmentation.pixels.mean == CAFFE_BGR.mean[::-1], "the views are RGB"

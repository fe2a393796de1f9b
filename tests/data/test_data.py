"""Listing and loading image files, and a data order that can be resumed anywhere."""

import itertools
import weakref
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.data import (
    EpochSampler,
    FileSource,
    ViewDataset,
    ViewLoader,
    build_augmentation,
    build_backend,
    list_images,
)
from moco_d2.data.augment import Plan
from moco_d2.data.backends import DeviceBackend
from moco_d2.data.decode import EncodedImage

RNG = np.random.default_rng(0)


def picture(height: int = 40, width: int = 60) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        picture().save(tmp_path / f"class{i % 2}" / f"{i}.JPEG")
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def test_folders_trees_and_registered_names(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tree, flat = list_images([str(folder)]), list_images([str(folder / "class0")])
    assert len(tree) == 10 and len(flat) == 5 and tree == sorted(tree)
    assert list_images([str(folder), str(folder / "class0")]) == tree, "a picture named twice is there once"
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "train").symlink_to(folder / "class1")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    assert len(list_images(["imagenet_train"])) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("imagenet_trian", "nearest names: imagenet_train"),
        ("voc_2007_trainval", "the files of the data set 'voc_that_is_missing' are missing.*datasets/README.md"),
        ("EMPTY", "no images in .* searched for .jpg .* found 1 other"),
    ],
)
def test_missing_data_is_an_error_that_says_what_was_looked_for(
    source: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    if source == "voc_2007_trainval":  # Detectron2 fixes its folders on import, so name one that cannot be there.
        from detectron2.data import DatasetCatalog
        from detectron2.data.datasets import register_pascal_voc

        source = "voc_that_is_missing"
        if source not in DatasetCatalog:
            register_pascal_voc(source, str(tmp_path / "VOC2007"), "trainval", 2007)
    if source == "EMPTY":
        (tmp_path / "readme.md").touch()
        source = str(tmp_path)
    with pytest.raises(ValueError, match=message):
        list_images([source])
    with pytest.raises(ValueError, match=r"DATASETS.TRAIN is empty"):
        list_images([])


class Watched(DeviceBackend):
    """Notes how many of the images that it was given are still in memory."""

    def __init__(self) -> None:
        self.given: list[weakref.ref[EncodedImage]] = []
        self.held: list[int] = []

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[np.ndarray]:
        self.given.append(weakref.ref(image))
        self.held.append(sum(one() is not None for one in self.given))
        return super().prepare(image, plans)


def test_a_worker_holds_one_decoded_picture_at_a_time(folder: Path) -> None:
    watched = Watched()
    dataset = ViewDataset(FileSource(list_images([str(folder)])), build_augmentation("moco_v2", 16), 0, watched)
    together = dataset.__getitems__([(0, index) for index in (3, 1, 4)])
    assert watched.held == [1, 1, 1]
    alone = [dataset[0, index] for index in (3, 1, 4)]
    for a, b in zip(together, alone, strict=True):
        assert all(np.array_equal(x, y) for x, y in zip(a.views, b.views, strict=True)), "in the order asked for"


def test_a_sample_depends_on_seed_epoch_and_index_only(folder: Path) -> None:
    files = list_images([str(folder)])
    augmentation = build_augmentation("moco_v2", 16)

    def batches(workers: int, start: int, count: int, seed: int = 3) -> list[torch.Tensor]:
        sampler = EpochSampler(len(files), 4, seed=seed, start=start)
        dataset = ViewDataset(FileSource(files), augmentation, seed, build_backend("cv2", torch.device("cpu")))
        stream = iter(ViewLoader(dataset, sampler, workers, torch.device("cpu")))
        return [torch.stack(next(stream).images) for _ in range(count)]

    torch.manual_seed(0)
    whole = batches(0, 0, 5)
    drawn = torch.rand(1)
    assert torch.manual_seed(0) and torch.equal(drawn, torch.rand(1)), "loading leaves the global generator alone"
    for resumed in (batches(0, 3, 2), batches(2, 3, 2)):
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not torch.equal(whole[0], batches(0, 0, 1, seed=4)[0])
    assert not torch.equal(whole[0][0], whole[0][1]), "two views of an image differ"


def test_images_that_do_not_fill_a_batch_are_dropped() -> None:
    batches = list(itertools.islice(EpochSampler(18, 8, seed=1), 6))
    assert [{epoch for epoch, _ in batch} for batch in batches] == [{0}, {0}, {1}, {1}, {2}, {2}]

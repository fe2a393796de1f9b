"""Reading any image file, the published augmentations, and a data order that can be resumed anywhere."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from moco_d2.data import (
    RECIPES,
    EpochSampler,
    FileSource,
    ViewDataset,
    ViewLoader,
    build_recipe,
    list_images,
    read_image,
)

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
        ("voc_2007_trainval", "registered but its files are not there.*datasets/README.md"),
        ("EMPTY", "no images in .* looked for .jpg .* found 1 other"),
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


def save(kind: str, path: Path) -> Image.Image:
    """Save a picture in a way that naive loaders get wrong; return the 8-bit RGB picture it shows."""
    rgb = picture()
    if kind == "exif":
        exif = Image.Exif()
        exif[0x0112] = 6  # stored rotated by 90 degrees counter-clockwise
        rgb.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
        return rgb
    if kind == "grey16":
        grey = np.asarray(rgb.convert("L"))
        Image.fromarray(grey.astype(np.uint16) * 256 + 7).save(path)
        return Image.fromarray(grey).convert("RGB")
    if kind == "palette":
        palette = rgb.quantize(32)
        palette.save(path, transparency=3)
        return palette.convert("RGB")
    image = rgb.convert({"grey": "L", "cmyk": "CMYK", "alpha": "RGBA"}[kind])
    image.save(path)
    return image.convert("RGB")


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [("exif", "png"), ("grey16", "png"), ("palette", "png"), ("grey", "png"), ("cmyk", "tif"), ("alpha", "png")],
)
def test_every_kind_of_file_reads_as_upright_rgb(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"picture.{suffix}"
    expected = save(kind, path)
    image = read_image(str(path))
    assert image.mode == "RGB" and image.size == expected.size
    np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))


def test_unreadable_images_are_replaced_logged_once_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = folder / "class0" / "0.JPEG"
    broken.write_bytes(broken.read_bytes()[:200])
    dataset = ViewDataset(FileSource(list_images([str(folder)])), build_recipe("moco_v2", 16), seed=0)
    loader = ViewLoader(dataset, EpochSampler(10, 5, seed=0), workers=0, device=torch.device("cpu"))
    batches = iter(loader)
    with caplog.at_level(logging.WARNING):
        views = [next(batches) for _ in range(6)]
    assert all(view.shape == (5, 3, 16, 16) for batch in views for view in batch)
    assert list(loader.unreadable) == [str(broken)]
    assert caplog.text.count(str(broken)) == 1


def test_a_sample_depends_on_seed_epoch_and_index_only(folder: Path) -> None:
    files = list_images([str(folder)])
    recipe = build_recipe("moco_v2", 16)

    def batches(workers: int, start: int, count: int, seed: int = 3) -> list[torch.Tensor]:
        sampler = EpochSampler(len(files), 4, seed=seed, start=start)
        stream = iter(ViewLoader(ViewDataset(FileSource(files), recipe, seed), sampler, workers, torch.device("cpu")))
        return [torch.stack(next(stream)) for _ in range(count)]

    torch.manual_seed(0)
    whole = batches(0, 0, 5)
    drawn = torch.rand(1)
    assert torch.manual_seed(0) and torch.equal(drawn, torch.rand(1)), "loading leaves the global generator alone"
    for resumed in (batches(0, 3, 2), batches(2, 3, 2)):
        assert all(torch.equal(a, b) for a, b in zip(whole[3:], resumed, strict=True))
    assert not torch.equal(whole[0], batches(0, 0, 1, seed=4)[0])
    assert not torch.equal(whole[0][0], whole[0][1]), "two views of an image differ"


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_epochs_are_permutations_shared_out_among_processes(processes: int) -> None:
    streams = [iter(EpochSampler(18, 8, seed=1, rank=r, world_size=processes)) for r in range(processes)]
    alone = iter(EpochSampler(18, 8, seed=1))
    epochs: dict[int, list[int]] = {}
    for _ in range(6):
        batch = [key for stream in streams for key in next(stream)]
        assert batch == next(alone), "the same batch, whatever the number of processes"
        epochs.setdefault(batch[0][0], []).extend(index for _, index in batch)
    assert sorted(epochs) == [0, 1, 2], "two whole batches an epoch; the rest is dropped"
    assert all(len(set(indices)) == 16 for indices in epochs.values()) and epochs[0] != epochs[1]


def ops(recipe: str) -> list[str]:
    return [repr(op).replace("\n", "").replace(" ", "") for op in build_recipe(recipe, 224).views[0].transforms]


IMAGENET = "Normalize(mean=[0.485,0.456,0.406],std=[0.229,0.224,0.225])"
CIFAR = "Normalize(mean=[0.4914,0.4822,0.4465],std=[0.2023,0.1994,0.201])"


def crop(low: float) -> str:
    return repr(T.RandomResizedCrop(224, scale=(low, 1.0))).replace(" ", "")


def jitter(hue: float) -> str:
    return repr(T.ColorJitter(0.4, 0.4, 0.4, hue)).replace(" ", "")


def maybe(op: str, p: float) -> str:
    return f"RandomApply(p={p}{op})"


PUBLISHED = {  # The order and magnitudes of the authors' code.
    "moco_v1": [
        crop(0.2), "RandomGrayscale(p=0.2)", jitter(0.4), "RandomHorizontalFlip(p=0.5)", "ToTensor()", IMAGENET,
    ],
    "moco_v2": [
        crop(0.2), maybe(jitter(0.1), 0.8), "RandomGrayscale(p=0.2)", maybe("GaussianBlur(radius=U(0.1,2.0))", 0.5),
        "RandomHorizontalFlip(p=0.5)", "ToTensor()", IMAGENET,
    ],
    "moco_cifar": [
        crop(0.08), "RandomHorizontalFlip(p=0.5)", maybe(jitter(0.1), 0.8), "RandomGrayscale(p=0.2)", "ToTensor()",
        CIFAR,
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones_op_for_op(name: str) -> None:
    assert ops(name) == PUBLISHED[name]
    recipe = build_recipe(name, 32)
    views = recipe(picture())
    assert len(views) == 2 and all(view.shape == (3, 32, 32) and view.dtype == torch.float32 for view in views)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.pixels.mean, recipe.pixels.std))
    levels = views[0] * std + mean
    assert levels.min() > -0.01 and levels.max() < 255.01, "the facts undo the normalisation"


def test_blur_is_pils_with_a_radius_spread_over_its_range() -> None:
    from PIL import ImageFilter

    from moco_d2.data.augment import GaussianBlur

    image = picture()
    torch.manual_seed(0)
    radii = [torch.empty(1).uniform_(0.1, 2.0).item() for _ in range(50)]
    torch.manual_seed(0)
    for radius in radii:
        blurred = GaussianBlur(0.1, 2.0)(image)
        assert blurred.tobytes() == image.filter(ImageFilter.GaussianBlur(radius)).tobytes()


@pytest.mark.parametrize(
    ("name", "size", "message"), [("moco_v9", 224, "moco_v1, moco_v2"), ("moco_v2", 0, "at least one")]
)
def test_unknown_recipes_and_sizes_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(name, size)

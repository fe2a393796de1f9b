"""Augmentations as data: published values, torchvision's distributions, and three backends that make the same views."""

import dataclasses
import io
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch._inductor import metrics
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as T
from torchvision.transforms import functional as F

from benchmarks.data import authors_transforms, draw_photo
from moco_d2.config import load_cfg
from moco_d2.data import AUGMENTATIONS, BACKENDS, EpochSampler, FileSource, ViewDataset, ViewLoader, build_backend
from moco_d2.data.augment import (
    Apply,
    Augmentation,
    Box,
    Crop,
    Jitter,
    Plan,
    View,
    build_augmentation,
    register_augmentation,
)
from moco_d2.data.backends import finish, pack, run, run_masked, to_float
from moco_d2.data.decode import EncodedImage
from moco_d2.data.loader import collate
from moco_d2.data.operations import OPERATIONS, SKIP, AugmentationError, Op, Operation
from moco_d2.facts import Pixels

CPU = torch.device("cpu")
SIZE = 224


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [draw_photo(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def files(photos: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("photos")
    for number, data in enumerate(photos):
        (folder / f"{number}.jpg").write_bytes(data)
    return [str(path) for path in sorted(folder.iterdir())]


@pytest.fixture(scope="module")
def views(photos: list[bytes]) -> np.ndarray:
    """Return (N, H, W, 3) crops."""
    return np.stack([EncodedImage(data).crops([Plan(Box(20, 30, 300, 320), (), SIZE)])[0] for data in photos])


SIMCLR = (Apply("flip", 0.5), Jitter(0.8, 0.8, 0.8, 0.2, 0.8), Apply("grey", 0.2), Apply("blur", 0.5, (0.1, 2.0)))
PUBLISHED = {  # The order and magnitudes of the authors' code.
    "moco_v1": (0.2, (Apply("grey", 0.2), Jitter(0.4, 0.4, 0.4, 0.4, 1.0), Apply("flip", 0.5))),
    "moco_v2": (
        0.2,
        (Jitter(0.4, 0.4, 0.4, 0.1, 0.8), Apply("grey", 0.2), Apply("blur", 0.5, (0.1, 2.0)), Apply("flip", 0.5)),
    ),
    "instdisc": (0.2, (Apply("grey", 0.2), Jitter(0.4, 0.4, 0.4, 0.4, 1.0), Apply("flip", 0.5))),
    "invaspread": (0.2, (Jitter(0.4, 0.4, 0.4, 0.4, 1.0), Apply("grey", 0.2), Apply("flip", 0.5))),
    "simclr": (0.08, SIMCLR),
    "moco_cifar_single": (0.08, (Apply("flip", 0.5), Jitter(0.4, 0.4, 0.4, 0.1, 0.8), Apply("grey", 0.2))),
    "moco_cifar": (0.08, (Apply("flip", 0.5), Jitter(0.4, 0.4, 0.4, 0.1, 0.8), Apply("grey", 0.2))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_augmentations_are_the_published_ones_op_for_op(name: str) -> None:
    low, ops = PUBLISHED[name]
    for view in build_augmentation(name, SIZE).views:
        assert view == View(Crop(SIZE, (low, 1.0), (3 / 4, 4 / 3), bicubic=name == "simclr"), ops)


def test_simclrs_pixels_are_in_0_to_1_and_a_bank_sees_one_view() -> None:
    made = build_augmentation("simclr", SIZE)
    assert made.pixels == Pixels("RGB", (0.0, 0.0, 0.0), (255.0, 255.0, 255.0)) and len(made.views) == 2
    assert [len(build_augmentation(name, SIZE).views) for name in ("instdisc", "moco_cifar_single")] == [1, 1]


FLIP, GREY = Apply("flip", 0.5), Apply("grey", 0.2)
STRONG, WEAK = Jitter(0.8, 0.8, 0.8, 0.2, 0.8), Jitter(0.4, 0.4, 0.2, 0.1, 0.8)
# Multi-crop: for each kind of view its number, size, least and largest area, jitter, and probabilities of blur and
# solarising.
MULTI_CROP = {
    "swav_2x6": [(2, 224, 0.14, 1.0, STRONG, 0.5, None), (6, 96, 0.05, 0.14, STRONG, 0.5, None)],
    "swav_2": [(2, 224, 0.08, 1.0, STRONG, 0.5, None)],
    "swav_cifar": [(2, 224, 0.14, 1.0, Jitter(0.4, 0.4, 0.4, 0.1, 0.8), 0.0, None)],
    "dino_2x8": [
        (1, 224, 0.4, 1.0, WEAK, 1.0, 0.0), (1, 224, 0.4, 1.0, WEAK, 0.1, 0.2), (8, 96, 0.05, 0.4, WEAK, 0.5, 0.0)
    ],
    "dino_2x6_r50": [
        (1, 224, 0.14, 1.0, WEAK, 1.0, 0.0), (1, 224, 0.14, 1.0, WEAK, 0.1, 0.2), (6, 96, 0.05, 0.14, WEAK, 0.5, 0.0)
    ],
    "dino_cifar": [(1, 224, 0.4, 1.0, WEAK, 0.0, 0.0), (1, 224, 0.4, 1.0, WEAK, 0.0, 0.2)],
}  # fmt: skip


@pytest.mark.parametrize("name", MULTI_CROP)
def test_multi_crops_are_the_published_ones_op_for_op(name: str) -> None:
    made = build_augmentation(name, SIZE)
    expected = []
    for count, size, low, high, jitter, blur, solarise in MULTI_CROP[name]:
        ops = (FLIP, jitter, GREY, Apply("blur", blur, (0.1, 2.0)))
        ops += () if solarise is None else (Apply("solarise", solarise, 128),)
        expected += count * [View(Crop(size, (low, high), bicubic=name.startswith("dino")), ops)]
    assert list(made.views) == expected
    if name in ("swav_2x6", "swav_2"):
        assert [round(std / 255, 4) for std in made.pixels.std] == [0.228, 0.224, 0.225]
    assert [view.crop.size for view in build_augmentation(name, 64).views[2:]] == [27] * (len(expected) - 2)


def test_byols_two_views_differ_as_published() -> None:
    colours, flip = (Jitter(0.4, 0.4, 0.2, 0.1, 0.8), Apply("grey", 0.2)), Apply("flip", 0.5)
    own = (Apply("blur", 1.0, (0.1, 2.0)),), (Apply("blur", 0.1, (0.1, 2.0)), Apply("solarise", 0.2, 128))
    bicubic = Crop(SIZE, (0.08, 1.0), (3 / 4, 4 / 3), bicubic=True)
    assert build_augmentation("byol", SIZE).views == tuple(View(bicubic, (flip, *colours, *ops)) for ops in own)
    for name, low in (("moco_v3", 0.2), ("moco_v3_vit", 0.08)):
        bilinear = Crop(SIZE, (low, 1.0), (3 / 4, 4 / 3), bicubic=False)
        assert build_augmentation(name, SIZE).views == tuple(View(bilinear, (*colours, *ops, flip)) for ops in own)


def test_pixpros_two_views_are_blurred_and_solarised_unequally_and_mirrored_first() -> None:
    first, second = build_augmentation("pixpro", SIZE).views
    same = (Apply("flip", 0.5), Jitter(0.4, 0.4, 0.2, 0.1, 0.8), Apply("grey", 0.2))
    assert first == View(Crop(SIZE), (*same, Apply("blur", 1.0, (0.1, 2.0))))
    assert second == View(Crop(SIZE), (*same, Apply("blur", 0.1, (0.1, 2.0)), Apply("solarise", 0.2, 128.0)))
    assert first.crop.scale == (0.08, 1.0) and not first.crop.bicubic


def test_cmc_and_cpc_have_one_view_without_changes_of_colour() -> None:
    (cmc,), (cpc,) = build_augmentation("cmc", SIZE).views, build_augmentation("cpc", 256).views
    assert cmc == View(Crop(SIZE, (0.08, 1.0), (3 / 4, 4 / 3)), (Apply("flip", 0.5),))
    assert cpc.ops == cmc.ops
    boxes = {cpc.plan(300, 300, torch.Generator().manual_seed(seed)).box for seed in range(9)}
    assert {(box.height, box.width) for box in boxes} == {(256, 256)} and len(boxes) == 9


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("moco_v9", 224, r"moco_v1, moco_v2, .*; did you mean 'moco_v\d'\?"), ("moco_v2", 0, "at least one")],
)
def test_unknown_augmentations_and_sizes_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_augmentation(name, size)


def test_the_earlier_name_of_the_config_key_is_read(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("VERSION: 2\nDATA: {RECIPE: moco_v1}\n")
    assert load_cfg(str(file)).DATA.AUGMENTATION == "moco_v1"
    assert load_cfg(str(file), ["DATA.RECIPE", "moco_cifar"]).DATA.AUGMENTATION == "moco_cifar"


def test_auto_is_the_device_where_there_is_a_gpu_and_opencv_elsewhere() -> None:
    assert isinstance(build_backend("auto", CPU), BACKENDS["cv2"])
    assert isinstance(build_backend("auto", torch.device("cuda")), BACKENDS["device"])
    with pytest.raises(
        ValueError, match=r"DATA\.BACKEND is 'vice'; it must be one of auto, .*; did you mean 'device'\?"
    ):
        build_backend("vice", CPU)


@pytest.mark.parametrize(("low", "high"), [(0.1, 2.5), (2.0, 1.0), (-0.1, 1.0)])
def test_values_that_the_executors_do_not_take_are_refused(low: float, high: float) -> None:
    with pytest.raises(
        ValueError, match=rf"values of blur are {low:g} to {high:g}; they must rise and lie within \[0, 2\.4\]"
    ):
        Apply("blur", 0.5, (low, high))
    with pytest.raises(ValueError, match=r"hue are -0\.6 to 0\.6; they must rise and lie within \[-0\.5, 0\.5\]"):
        Jitter(0.4, 0.4, 0.4, 0.6)
    with pytest.raises(ValueError, match=r"operation is 'gray'; it must be one of brightness, .* mean 'grey'"):
        Apply("gray", 0.2)
    with pytest.raises(ValueError, match=r"probability of grey is 20; it must be in \[0, 1\]"):
        Apply("grey", 20)
    with pytest.raises(ValueError, match="size of a view is 0; it must be at least 1"):
        Crop(0)
    with pytest.raises(ValueError, match=r"scale \(1\.0, 0\.2\) and ratio .*; each must be positive and rise"):
        Crop(SIZE, (1.0, 0.2))


@pytest.mark.parametrize("executor", ["cv2", "device"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_executors_of_each_operation_agree_up_to_its_stated_rounding(
    name: str, executor: str, views: np.ndarray
) -> None:
    known = OPERATIONS[name]
    changed = False
    for value in np.unique(np.linspace(known.low, known.high, 13)).tolist():
        expected = np.stack([np.asarray(known.pil(Image.fromarray(view), value)) for view in views]).astype(int)
        if executor == "cv2":
            got = np.stack([known.cv2(view, value) for view in views]).astype(int)
        else:
            values = torch.full((len(views), 1, 1, 1), value, dtype=torch.float64)
            got = known.device(to_float(torch.from_numpy(views)), values).permute(0, 2, 3, 1).numpy()
        difference = np.abs(got - expected)
        assert difference.max() <= known.largest, value
        assert difference.mean((1, 2, 3)).max() <= known.mean, value
        changed = changed or bool((expected != views).any())
    assert changed, "the operation does something"


def test_pil_executors_are_the_transforms_of_the_authors_code(views: np.ndarray) -> None:
    image = Image.fromarray(views[0])
    always = {
        "brightness": T.ColorJitter(brightness=(0.7, 0.7)),
        "contrast": T.ColorJitter(contrast=(0.7, 0.7)),
        "saturation": T.ColorJitter(saturation=(0.7, 0.7)),
        "hue": T.ColorJitter(hue=(-0.07, -0.07)),
        "grey": T.RandomGrayscale(p=1),
        "flip": T.RandomHorizontalFlip(p=1),
        "solarise": T.RandomSolarize(128, p=1),
        "blur": lambda view: view.filter(ImageFilter.GaussianBlur(radius=1.3)),
    }
    values = {"hue": -0.07, "solarise": 128, "blur": 1.3}
    for name, transform in always.items():
        np.testing.assert_array_equal(OPERATIONS[name].pil(image, values.get(name, 0.7)), transform(image), name)


def test_crops_agree_with_pils(photos: list[bytes]) -> None:
    augmentation = build_augmentation("moco_cifar", SIZE)
    for seed in range(20):
        picture = EncodedImage(photos[seed % len(photos)])
        whole = Image.fromarray(picture.decode().permute(1, 2, 0).numpy())
        for bicubic in (False, True):
            plans = augmentation.plan(picture.height, picture.width, seed)
            plans = [dataclasses.replace(plan, bicubic=bicubic, size=SIZE // (n + 1)) for n, plan in enumerate(plans)]
            mode = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR
            for plan, crop in zip(plans, picture.crops(plans), strict=True):
                wanted = F.resized_crop(whole, *plan.box, [plan.size, plan.size], mode)
                difference = np.abs(np.asarray(wanted).astype(int) - crop)
                assert difference.max() <= 1 + bicubic, plan
                assert difference.mean() < 0.3, plan


def batches(
    files: list[str], name: str, backend: str, count: int = 3, workers: int = 0, views: slice = slice(None)
) -> torch.Tensor:
    """Return (count, V, N, 3, H, W) pixel values of views of one size."""
    made = build_augmentation(name, SIZE)
    dataset = ViewDataset(FileSource(files), made, 5, build_backend(backend, CPU))
    loader = iter(ViewLoader(dataset, EpochSampler(len(files), len(files), seed=5), workers, CPU))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.pixels.mean, made.pixels.std))
    return torch.stack([torch.stack(next(loader).images[views]) for _ in range(count)]) * std + mean


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_three_backends_make_the_same_views(name: str, files: list[str]) -> None:
    made = build_augmentation(name, SIZE).views
    large = sum(view.crop.size == SIZE for view in made)
    for views in (slice(large), slice(large, None))[: 1 + (large < len(made))]:
        compare_backends(files, name, views)


def compare_backends(files: list[str], name: str, views: slice) -> None:
    pil = batches(files, name, "pil", views=views)
    jitters = (op for view in build_augmentation(name, SIZE).views for op in view.ops if isinstance(op, Jitter))
    strength = max((jitter.brightness for jitter in jitters), default=0.4)
    for backend in ("cv2", "device"):
        difference = (batches(files, name, backend, views=views) - pil).abs()
        assert difference.mean((3, 4, 5)).max() < 1.25 * strength, "the worst view: rounding, enlarged by jitter"
        assert difference.mean() < 0.1
        assert (difference > 2.5).float().mean() < 0.005, "PIL's 8-bit hue enlarges a crop's rounding"
    assert pil.shape[1] == 1 or not torch.equal(pil[:, 0], pil[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_worker_processes_change_nothing(backend: str, files: list[str]) -> None:
    alone = batches(files, "moco_v2", backend, count=2)
    assert torch.equal(alone, batches(files, "moco_v2", backend, count=2, workers=2))


def test_normalised_as_by_torchvision(files: list[str]) -> None:
    augmentation = build_augmentation("moco_v2", SIZE)
    dataset = ViewDataset(FileSource(files), augmentation, 5, build_backend("pil", CPU))
    loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=5), 0, CPU)
    key = next(iter(loader.sampler))[0]
    expected = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(F.to_tensor(dataset[key].views[0]))
    torch.testing.assert_close(next(iter(loader)).images[0][0], expected, atol=1e-5, rtol=0)


def random_ops(count: int) -> torch.Tensor:
    """Return packed operations of which each occurs in every slot, so that batches differ in size only."""
    every = [Op(name, known.low + 0.6 * (known.high - known.low)) for name, known in OPERATIONS.items()]
    slots = range(len(every))
    return pack([[every[(i + slot) % len(every)] for slot in slots] for i in range(count)])


class CountKernels(TorchDispatchMode):
    """Counts the operations that run, and those that send something to a device and wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += 1
        options = kwargs or {}
        sends = function is torch.ops.aten._to_copy.default and options.get("device") is not None
        self.waits += sends and not options.get("non_blocking")
        return function(*args, **(kwargs or {}))


def test_batched_operations_follow_each_samples_own_order_whatever_the_batch(views: np.ndarray) -> None:
    pixels, ops = to_float(torch.from_numpy(views)), random_ops(len(views))
    together = run(pixels.clone(), ops)
    for i in range(len(views)):
        assert torch.equal(together[i : i + 1], run(pixels[i : i + 1].clone(), ops[i : i + 1]))
    by_hand = pixels[1:2]
    for number, value in ops[1].tolist():
        by_hand = [*OPERATIONS.values()][int(number)].device(by_hand, torch.tensor(value).view(1, 1, 1, 1).double())
    assert torch.equal(together[1:2], by_hand)


def test_batched_operations_launch_a_fixed_number_of_kernels_and_read_nothing_back() -> None:
    counts = []
    for size in (len(OPERATIONS), 8 * len(OPERATIONS)):  # each operation occurs in every slot
        with CountKernels() as kernels:
            run(torch.zeros(size, 3, 16, 16), random_ops(size))
        counts.append(kernels.count)
        meta = torch.zeros(size, 3, 16, 16, device="meta")  # it has no values: reading one is an error
        with CountKernels() as kernels:
            assert run(meta, random_ops(size)).shape == meta.shape
        assert kernels.waits == 0
    assert counts[0] == counts[1]


def prepared(name: str, count: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor, Augmentation, list[int]]:
    """Return pixel values of large views, one view after another, their drawn operations, and the views' numbers."""
    made = build_augmentation(name, size)
    numbers = [number for number, view in enumerate(made.views) if view.crop.size == size]
    plans = [made.plan(48, 64, seed) for seed in range(count)]
    ops = pack([plan[number].ops for number in numbers for plan in plans])
    shape = (count * len(numbers), size, size, 3)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return pixels, ops, made, numbers


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_masks_give_what_index_lists_give_to_the_bit(name: str) -> None:
    pixels, ops, made, numbers = prepared(name, 24)
    by_masks = run_masked(to_float(pixels), ops, made.names(numbers))
    assert torch.equal(by_masks, finish(pixels, ops)) and not torch.equal(by_masks, to_float(pixels))


def test_masks_launch_the_same_operations_whatever_was_drawn_and_read_nothing_back() -> None:
    counts = []
    for count, odds in ((3, 1), (40, 1), (3, 0)):
        pixels, ops, made, numbers = prepared("byol", count)
        views = torch.zeros(pixels.shape[0], 3, 24, 24, device="meta")
        ops = (ops if odds else torch.full_like(ops, -1)).to("meta")
        with CountKernels() as kernels:
            run_masked(views, ops, made.names(numbers))
        counts.append(kernels.count)
    assert len(set(counts)) == 1 and counts[0] < 650


def test_views_of_one_size_are_augmented_in_one_call(files: list[str]) -> None:
    """Half of the launches of a call for each view: 1286 with MoCo v2's two, 5154 with SwAV's eight."""
    for name, most in (("moco_v2", 680), ("swav_2x6", 1360)):
        dataset = ViewDataset(FileSource(files), build_augmentation(name, 64), 5, build_backend("device", CPU))
        batch = collate(dataset.__getitems__([(epoch, i) for epoch in range(8) for i in range(len(files))]))
        loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=5), 0, CPU)
        with CountKernels() as kernels:
            views = loader.finish(batch).images
        assert len(views) == len(dataset.augmentation.views) and kernels.count < most


def finished(files: list[str], name: str, size: int, compiled: bool) -> list[torch.Tensor]:
    """Return a batch's views as a loader finishes them for the device."""
    dataset = ViewDataset(FileSource(files), build_augmentation(name, size), 5, build_backend("device", CPU))
    loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=5), 0, CPU, compiled=compiled)
    return loader.finish(
        collate(dataset.__getitems__([(epoch, i) for epoch in range(8) for i in range(len(files))]))
    ).images


@pytest.mark.parametrize("name", ["byol", "dino_2x8"])
def test_what_is_given_to_the_compiler_makes_the_same_views(
    name: str, files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    for one, other in zip(finished(files, name, 32, True), finished(files, name, 32, False), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_compiler_makes_few_kernels_of_masks(files: list[str]) -> None:
    metrics.reset()
    made = finished(files, "moco_v2", 40, True)
    assert 0 < metrics.generated_kernel_count < 40
    for view, expected in zip(made, finished(files, "moco_v2", 40, False), strict=True):
        difference = 255 * 0.229 * (view - expected).abs()
        assert difference.max() < 1.05 and (difference > 0.5).float().mean() < 1e-4, "the blur's sum in another order"


def same_distribution(a: Sequence[float], b: Sequence[float]) -> bool:
    """Tell whether a two-sample Kolmogorov-Smirnov test passes at p = 0.0001."""
    both = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(x), both, side="right") / len(x) for x in (a, b)]
    limit = math.sqrt(-math.log(0.0001 / 2) / 2 * (1 / len(a) + 1 / len(b)))
    return bool(np.abs(below[0] - below[1]).max() < limit)


def test_the_test_of_distributions_can_fail() -> None:
    draw = np.random.default_rng(0).uniform
    assert same_distribution(draw(0, 1, 5000), draw(0, 1, 5000))
    assert not same_distribution(draw(0, 1, 5000), draw(0.05, 1, 5000))


def plans(view: View, count: int, height: int = 375, width: int = 500) -> list[Plan]:
    generator = torch.Generator().manual_seed(1)
    return [view.plan(height, width, generator) for _ in range(count)]


@pytest.mark.parametrize(("height", "width"), [(375, 500), (60, 400), (300, 50)])
@pytest.mark.parametrize("low", [0.08, 0.2])
def test_crops_are_distributed_as_torchvisions(height: int, width: int, low: float) -> None:
    image, count = Image.new("L", (width, height)), 4000
    torch.manual_seed(2)
    theirs = np.array(
        [T.RandomResizedCrop.get_params(image, [low, 1.0], [3 / 4, 4 / 3]) for _ in range(count)], float
    )  # top, left, height, width
    view = View(Crop(SIZE, (low, 1.0)), ())
    ours = np.array([plan.box for plan in plans(view, count, height, width)], float)
    assert (ours[:, :2] >= 0).all() and (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for statistic in (
        lambda box: box[:, 2] * box[:, 3],  # area
        lambda box: np.log(box[:, 3] / box[:, 2]),  # aspect
        lambda box: box[:, 0] / np.maximum(1, height - box[:, 2]),  # place
        lambda box: box[:, 1] / np.maximum(1, width - box[:, 3]),
    ):
        assert same_distribution(statistic(ours), statistic(theirs))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (375, 1), (10, 41)])
def test_where_no_try_fits_the_crop_is_torchvisions_central_one(height: int, width: int) -> None:
    never = Crop(SIZE, scale=(4.0, 5.0))
    expected = T.RandomResizedCrop.get_params(Image.new("L", (width, height)), [4.0, 5.0], [3 / 4, 4 / 3])
    assert never.box([0.5] * never.draws, height, width) == expected


def test_jitter_is_distributed_as_torchvisions() -> None:
    count = 12000
    drawn = [plan.ops for plan in plans(View(Crop(SIZE), (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8),)), count)]
    applied = [ops for ops in drawn if ops[0] != SKIP]
    assert all(len({op.name for op in ops}) == (4 if ops in applied else 1) for ops in drawn[:200])
    assert abs(len(applied) / count - 0.8) < 4 * math.sqrt(0.16 / count)
    orders = Counter(tuple(op.name for op in ops) for ops in applied)
    expected = len(applied) / 24
    assert len(orders) == 24
    assert sum((n - expected) ** 2 / expected for n in orders.values()) < 58, "chi square, 23 degrees, p 0.0001"
    torch.manual_seed(3)
    theirs = [T.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])[1:] for _ in range(count)]
    for position, name in enumerate(("brightness", "contrast", "saturation", "hue")):
        ours = [op.value for ops in applied for op in ops if op.name == name]
        assert same_distribution(ours, [values[position] for values in theirs])


def test_a_strength_of_zero_leaves_an_op_out_and_factors_stay_positive() -> None:
    ops = [op for plan in plans(View(Crop(SIZE), (Jitter(1.5, 0, 0.4, 0),)), 500) for op in plan.ops]
    assert {op.name for op in ops} == {"brightness", "saturation", "skip"}
    bright = [op.value for op in ops if op.name == "brightness"]
    assert 0 <= min(bright) < 0.02 and 2.45 < max(bright) <= 2.5


@pytest.mark.parametrize(
    "record", [Apply("grey", 0.2), Apply("blur", 0.5, (0.1, 2.0)), Apply("solarise", 0.2, 128)], ids=lambda r: r.name
)
def test_probabilities_and_values_hold(record: Apply) -> None:
    ops = [plan.ops[0] for plan in plans(View(Crop(SIZE), (record,)), 5000)]
    values = [op.value for op in ops if op != SKIP]
    assert {op.name for op in ops} == {record.name, "skip"}
    assert abs(len(values) / 5000 - record.p) < 4 * math.sqrt(record.p * (1 - record.p) / 5000)
    if isinstance(record.value, tuple):
        assert same_distribution(values, np.random.default_rng(0).uniform(*record.value, 5000).tolist())
    else:
        assert set(values) == {record.value}


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_distributed_as_by_the_authors_transforms(backend: str, photos: list[bytes]) -> None:
    count, size = 1500, 32
    authors = T.Compose(authors_transforms(size))
    augmentation, made = build_augmentation("moco_v2", size), build_backend(backend, CPU)
    whole = Image.open(io.BytesIO(photos[0])).resize((125, 94))  # small, to be quick
    file = io.BytesIO()
    whole.save(file, "PNG")
    picture = EncodedImage(file.getvalue())
    torch.manual_seed(4)
    random.seed(4)
    theirs = np.stack([np.asarray(authors(whole)) for _ in range(count)]).astype(float)
    drawn = [augmentation.plan(picture.height, picture.width, seed)[0] for seed in range(count)]
    prepared = np.stack(made.prepare(picture, drawn))
    ours = finish(torch.from_numpy(prepared), pack([plan.ops if made.on_device else () for plan in drawn]))
    ours = ours.permute(0, 2, 3, 1).numpy().astype(float)
    for statistic in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: (x.max(3) - x.min(3)).mean((1, 2)),  # colourfulness
        lambda x: np.abs(np.diff(x, axis=2)).mean((1, 2, 3)),  # sharpness
        lambda x: x[:, :, :16].mean((1, 2, 3)) - x[:, :, 16:].mean((1, 2, 3)),  # left and right
        *(lambda x, c=c: x[..., c].mean((1, 2)) for c in range(3)),
    ):
        assert same_distribution(statistic(ours), statistic(theirs))


@pytest.fixture
def own() -> Iterator[str]:
    """Register an operation and an augmentation, as a user does in a file of their own."""
    OPERATIONS["invert"] = Operation(
        lambda view, _: ImageOps.invert(view), lambda view, _: 255 - view, lambda x, _: 255 - x
    )

    @register_augmentation
    def inverted(size: int) -> Augmentation:
        large = View(Crop(size, bicubic=True), (Apply("invert", 0.5), Jitter(0.4, 0.4, 0.4, 0.1)))
        return Augmentation((large, large, View(Crop(size // 2), (Apply("solarise", 1.0, 128),)), View(Crop(9), ())))

    yield "inverted"
    del OPERATIONS["invert"], AUGMENTATIONS["inverted"]


def test_an_operation_and_an_augmentation_of_ones_own_run_on_every_backend(own: str, files: list[str]) -> None:
    made, sizes = {}, [SIZE, SIZE, SIZE // 2, 9]
    for name in BACKENDS:
        dataset = ViewDataset(FileSource(files), build_augmentation(own, SIZE), 0, build_backend(name, CPU))
        loader = ViewLoader(dataset, EpochSampler(len(files), len(files), seed=0), 0, CPU)
        made[name] = next(iter(loader)).images
        assert [view.shape for view in made[name]] == [(len(files), 3, size, size) for size in sizes]
    for name in ("cv2", "device"):
        for view, expected in zip(made[name], made["pil"], strict=True):
            difference = 255 * 0.225 * (view - expected).abs()  # about pixel values
            assert difference.median() < 0.01 and difference.mean() < 0.5


@pytest.mark.parametrize("backend", ["pil", "cv2"])
def test_a_fault_of_an_operation_is_not_blamed_on_the_pictures(own: str, backend: str, files: list[str]) -> None:
    def broken(view: Any, value: float) -> Any:
        raise NameError("name 'np' is not defined")

    OPERATIONS["invert"] = Operation(broken, broken, lambda x, _: x)
    dataset = ViewDataset(FileSource(files), build_augmentation(own, SIZE), 0, build_backend(backend, CPU))
    loader = ViewLoader(dataset, EpochSampler(len(files), len(files), seed=0), 0, CPU)
    with pytest.raises(AugmentationError, match="operation invert failed for the value 0: NameError: name 'np'"):
        next(iter(loader))
    assert loader.skips.paths == set()

"""Recipes as data: published values, torchvision's distributions, and three backends that make the same views."""

import dataclasses
import io
import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision import transforms as T
from torchvision.transforms import functional as F

from benchmarks.data import authors_transforms, draw_photo
from moco_d2.data import BACKENDS, RECIPES, EpochSampler, FileSource, ViewDataset, ViewLoader, build_backend
from moco_d2.data.augment import Blur, Box, Crop, Flip, Grey, Jitter, Plan, Solarise, Step, View, build_recipe
from moco_d2.data.backends import CV2_STEPS, PIL_STEPS, to_levels
from moco_d2.data.batched import DEVICE_STEPS, pack_steps, run_steps
from moco_d2.data.decode import Picture

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
    return np.stack([Picture(data).crops([Plan(Box(20, 30, 300, 320), (), SIZE)])[0] for data in photos])


PUBLISHED = {  # The order and magnitudes of the authors' code.
    "moco_v1": (0.2, (Grey(0.2), Jitter(0.4, 0.4, 0.4, 0.4, 1.0), Flip(0.5))),
    "moco_v2": (0.2, (Jitter(0.4, 0.4, 0.4, 0.1, 0.8), Grey(0.2), Blur(0.1, 2.0, 0.5), Flip(0.5))),
    "moco_cifar": (0.08, (Flip(0.5), Jitter(0.4, 0.4, 0.4, 0.1, 0.8), Grey(0.2))),
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones_op_for_op(name: str) -> None:
    low, ops = PUBLISHED[name]
    for view in build_recipe(name, SIZE).views:
        assert view == View(Crop(SIZE, (low, 1.0), (3 / 4, 4 / 3)), ops)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("moco_v9", 224, r"moco_v1, moco_v2, .*; did you mean 'moco_v\d'\?"), ("moco_v2", 0, "at least one")],
)
def test_unknown_recipes_and_sizes_are_refused(name: str, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_recipe(name, size)


def test_auto_is_the_device_where_there_is_a_gpu_and_opencv_elsewhere() -> None:
    assert isinstance(build_backend("auto", CPU), BACKENDS["cv2"])
    assert isinstance(build_backend("auto", torch.device("cuda")), BACKENDS["device"])
    with pytest.raises(
        ValueError, match=r"DATA\.BACKEND is 'vice'; it must be one of auto, .*; did you mean 'device'\?"
    ):
        build_backend("vice", CPU)


@pytest.mark.parametrize(("low", "high"), [(0.1, 2.5), (2.0, 1.0), (-0.1, 1.0)])
def test_a_blur_beyond_what_backends_can_do_is_refused(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=rf"radii are {low} to {high}; they must rise, within \[0, 2\.4\]"):
        Blur(low, high, 0.5)


# Every kind with values over more than its range; in levels, the largest difference and a view's mean.
PARITY = [
    ("brightness", (0.0, 0.6, 0.83, 1.2, 1.4), 1, 0.02),
    ("contrast", (0.0, 0.6, 0.83, 1.2, 1.4), 1, 0.02),
    ("saturation", (0.0, 0.6, 0.83, 1.2, 1.4), 1, 0.02),
    ("hue", (-0.4, -0.1, -0.033, 0.0, 0.05, 0.1, 0.4), 6, 0.005),
    ("grey", (0.0,), 1, 0.005),
    ("blur", (0.1, 0.3, 0.5, 0.7, 1.0, 1.2, 1.23, 1.5, 1.9, 2.0, 2.4), 2, 0.1),
    ("flip", (0.0,), 0, 0),
    ("solarise", (0, 128, 200), 0, 0),
]


@pytest.mark.parametrize("backend", ["cv2", "device"])
@pytest.mark.parametrize(("kind", "values", "largest", "mean"), PARITY, ids=[row[0] for row in PARITY])
def test_each_step_agrees_with_pils(
    kind: str, values: Sequence[float], largest: float, mean: float, backend: str, views: np.ndarray
) -> None:
    for value in values:
        expected = np.stack([np.asarray(PIL_STEPS[kind](Image.fromarray(view), value)) for view in views]).astype(int)
        if backend == "cv2":
            got = np.stack([CV2_STEPS[kind](view, value) for view in views]).astype(int)
        else:
            levels = to_levels(torch.from_numpy(views))
            done = DEVICE_STEPS[kind](levels, torch.full((len(views), 1, 1, 1), value, dtype=torch.float64))
            got = done.permute(0, 2, 3, 1).numpy()
        difference = np.abs(got - expected)
        assert difference.max() <= largest, value
        assert difference.mean((1, 2, 3)).max() <= mean, value


def test_pil_steps_are_the_transforms_of_the_authors_code(views: np.ndarray) -> None:
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
        "skip": lambda view: view,
    }
    values = {"hue": -0.07, "solarise": 128, "blur": 1.3}
    assert always.keys() == PIL_STEPS.keys() == CV2_STEPS.keys() == {*DEVICE_STEPS, "skip"}
    for kind, transform in always.items():
        np.testing.assert_array_equal(PIL_STEPS[kind](image, values.get(kind, 0.7)), transform(image), kind)


def test_crops_agree_with_pils(photos: list[bytes]) -> None:
    recipe = build_recipe("moco_cifar", SIZE)
    for seed in range(20):
        picture = Picture(photos[seed % len(photos)])
        whole = Image.fromarray(picture.decode().permute(1, 2, 0).numpy())
        for bicubic in (False, True):
            plans = recipe.plan(picture.height, picture.width, seed)
            plans = [dataclasses.replace(plan, bicubic=bicubic, size=SIZE // (n + 1)) for n, plan in enumerate(plans)]
            mode = F.InterpolationMode.BICUBIC if bicubic else F.InterpolationMode.BILINEAR
            for plan, crop in zip(plans, picture.crops(plans), strict=True):
                wanted = F.resized_crop(whole, *plan.box, [plan.size, plan.size], mode)
                difference = np.abs(np.asarray(wanted).astype(int) - crop)
                assert difference.max() <= 1 + bicubic, plan
                assert difference.mean() < 0.3, plan


def batches(files: list[str], recipe: str, backend: str, count: int = 3, workers: int = 0) -> torch.Tensor:
    """Return (count, V, N, 3, H, W) levels."""
    made = build_recipe(recipe, SIZE)  # so large that nothing is decoded at a reduced size
    dataset = ViewDataset(FileSource(files), made, 5, build_backend(backend, CPU))
    loader = iter(ViewLoader(dataset, EpochSampler(len(files), len(files), seed=5), workers, CPU))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (made.pixels.mean, made.pixels.std))
    return torch.stack([torch.stack(next(loader).images) for _ in range(count)]) * std + mean


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_backends_make_the_same_views(recipe: str, files: list[str]) -> None:
    pil = batches(files, recipe, "pil")
    for backend in ("cv2", "device"):
        difference = (batches(files, recipe, backend) - pil).abs()
        assert difference.mean((3, 4, 5)).max() < 0.5, "the worst view: a crop's rounding, made larger by jitter"
        assert difference.mean() < 0.1
        assert (difference > 2.5).float().mean() < 0.005, "PIL's 8-bit hue enlarges a crop's rounding"
    assert not torch.equal(pil[:, 0], pil[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_worker_processes_change_nothing(backend: str, files: list[str]) -> None:
    alone = batches(files, "moco_v2", backend, count=2)
    assert torch.equal(alone, batches(files, "moco_v2", backend, count=2, workers=2))


def test_normalised_as_by_torchvision(files: list[str]) -> None:
    recipe = build_recipe("moco_v2", SIZE)
    dataset = ViewDataset(FileSource(files), recipe, 5, build_backend("pil", CPU))
    loader = ViewLoader(dataset, EpochSampler(len(files), 1, seed=5), 0, CPU)
    key = next(iter(loader.sampler))[0]
    expected = T.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])(F.to_tensor(dataset[key].views[0]))
    torch.testing.assert_close(next(iter(loader)).images[0][0], expected, atol=1e-5, rtol=0)


def random_steps(count: int) -> torch.Tensor:
    """Return packed steps in which every kind occurs in every slot, so that batches differ in size only."""
    value = {"hue": 0.05, "solarise": 128, "blur": 1.5}
    kinds = [*DEVICE_STEPS]
    return pack_steps(
        [[Step(k := kinds[(i + slot) % 8], value.get(k, 0.8)) for slot in range(8)] for i in range(count)]
    )


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


def test_batched_steps_follow_each_samples_own_order_whatever_the_batch(views: np.ndarray) -> None:
    levels, steps = to_levels(torch.from_numpy(views)), random_steps(len(views))
    together = run_steps(levels.clone(), steps)
    for i in range(len(views)):
        assert torch.equal(together[i : i + 1], run_steps(levels[i : i + 1].clone(), steps[i : i + 1]))
    by_hand = levels[1:2]
    for number, value in steps[1].tolist():
        by_hand = [*DEVICE_STEPS.values()][int(number)](by_hand, torch.tensor(value).view(1, 1, 1, 1).double())
    assert torch.equal(together[1:2], by_hand)


def test_batched_steps_launch_a_fixed_number_of_kernels_and_read_nothing_back() -> None:
    counts = []
    for size in (8, 64):
        with CountKernels() as kernels:
            run_steps(torch.zeros(size, 3, 16, 16), random_steps(size))
        counts.append(kernels.count)
        meta = torch.zeros(size, 3, 16, 16, device="meta")  # it has no values: reading one is an error
        with CountKernels() as kernels:
            assert run_steps(meta, random_steps(size)).shape == meta.shape
        assert kernels.waits == 0
    assert counts[0] == counts[1]


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
    drawn = [plan.steps for plan in plans(View(Crop(SIZE), (Jitter(0.4, 0.4, 0.4, 0.1, p=0.8),)), count)]
    applied = [steps for steps in drawn if steps[0].kind != "skip"]
    assert all(len({step.kind for step in steps}) == (4 if steps in applied else 1) for steps in drawn[:200])
    assert abs(len(applied) / count - 0.8) < 4 * math.sqrt(0.16 / count)
    orders = Counter(tuple(step.kind for step in steps) for steps in applied)
    expected = len(applied) / 24
    assert len(orders) == 24
    assert sum((n - expected) ** 2 / expected for n in orders.values()) < 58, "chi square, 23 degrees, p 0.0001"
    torch.manual_seed(3)
    theirs = [T.ColorJitter.get_params([0.6, 1.4], [0.6, 1.4], [0.6, 1.4], [-0.1, 0.1])[1:] for _ in range(count)]
    for position, kind in enumerate(("brightness", "contrast", "saturation", "hue")):
        ours = [step.value for steps in applied for step in steps if step.kind == kind]
        assert same_distribution(ours, [values[position] for values in theirs])


def test_a_strength_of_zero_leaves_an_op_out_and_factors_stay_positive() -> None:
    steps = [step for plan in plans(View(Crop(SIZE), (Jitter(1.5, 0, 0.4, 0),)), 500) for step in plan.steps]
    assert {step.kind for step in steps} == {"brightness", "saturation", "skip"}
    bright = [step.value for step in steps if step.kind == "brightness"]
    assert 0 <= min(bright) < 0.02 and 2.45 < max(bright) <= 2.5


@pytest.mark.parametrize(
    ("op", "kind"),
    [(Grey(0.2), "grey"), (Blur(0.1, 2.0, 0.5), "blur"), (Flip(), "flip"), (Solarise(128, 0.2), "solarise")],
)
def test_probabilities_hold(op: Grey | Blur | Flip | Solarise, kind: str) -> None:
    steps = [plan.steps[0] for plan in plans(View(Crop(SIZE), (op,)), 5000)]
    done = [step.value for step in steps if step.kind == kind]
    assert abs(len(done) / 5000 - op.p) < 4 * math.sqrt(op.p * (1 - op.p) / 5000)
    if kind == "blur":
        assert same_distribution(done, np.random.default_rng(0).uniform(0.1, 2.0, 5000).tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pixels_are_distributed_as_by_the_authors_transforms(backend: str, photos: list[bytes]) -> None:
    count, size = 1500, 32
    authors = T.Compose(authors_transforms(size))
    recipe, made = build_recipe("moco_v2", size), build_backend(backend, CPU)
    whole = Image.open(io.BytesIO(photos[0])).resize((125, 94))  # small, to be quick
    file = io.BytesIO()
    whole.save(file, "PNG")
    picture = Picture(file.getvalue())
    torch.manual_seed(4)
    random.seed(4)
    theirs = np.stack([np.asarray(authors(whole)) for _ in range(count)]).astype(float)
    drawn = [recipe.plan(picture.height, picture.width, seed)[0] for seed in range(count)]
    prepared = np.stack(made.prepare(picture, drawn))
    ours = made.finish(torch.from_numpy(prepared), pack_steps([plan.steps for plan in drawn]))
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


def test_a_recipe_of_ones_own_runs_on_every_backend(files: list[str]) -> None:
    recipe = build_recipe("moco_v2", SIZE)
    solarised = replace(recipe.views[0], ops=(*recipe.views[0].ops, Solarise(128, 1.0)))
    made = {}
    for name in BACKENDS:
        backend = build_backend(name, CPU)
        dataset = ViewDataset(FileSource(files), replace(recipe, views=(solarised, recipe.views[1])), 0, backend)
        samples = [dataset[0, i] for i in range(len(files))]
        for number in range(2):
            view = torch.from_numpy(np.stack([sample.views[number] for sample in samples]))
            steps = pack_steps([sample.plans[number].steps for sample in samples])
            made[name, number] = backend.finish(view, steps)
    for name, number in made:
        difference = (made[name, number] - made["pil", number]).abs()
        assert difference.median() == 0 and difference.mean() < 0.5

"""Files that are not images, damaged or removed: logged once, replaced; too many of them end the run."""

import io
import itertools
import json
import os
import resource
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.data import EpochSampler, FileSource, SkipLog, ViewDataset, ViewLoader, build_augmentation, list_images
from moco_d2.data.backends import BACKENDS, build_backend
from moco_d2.data.loader import replacements
from moco_d2.engine.loader import build_loader

RNG = np.random.default_rng(0)
CPU = torch.device("cpu")
# PIL warns of what it can put up with (EXIF beyond repair, say); it is the loader's business to go on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def encoded(form: str = "JPEG", size: tuple[int, int] = (60, 40), mode: str = "RGB", **options: object) -> bytes:
    pixels = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)
    buffer = io.BytesIO()
    pixels.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few kilobytes that unfolds into side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def jpeg_bomb() -> bytes:
    """A JPEG whose header claims 65500 x 65500 pixels."""
    data = bytearray(encoded())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    return bytes(data)


def animated() -> bytes:
    frames = [Image.fromarray(RNG.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(4)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def grey16() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RNG.integers(0, 65536, (30, 40), dtype=np.uint16)).save(buffer, "PNG")
    return buffer.getvalue()


WHOLE = encoded()
STRANGE = {  # odd, but images
    "png named jpg": encoded("PNG"),
    "webp named jpg": encoded("WEBP"),
    "animated": animated(),
    "16 bit": grey16(),
    "cmyk": encoded(mode="CMYK"),
    "grey": encoded(mode="L"),
    "rotated": rotated(),
    "one pixel": encoded(size=(1, 1)),
    "one row": encoded(size=(300, 1)),
    "one column": encoded(size=(1, 300)),
    "progressive": encoded(progressive=True),
    "trailing bytes": WHOLE + b"\0" * 1000,
}
BROKEN = {
    "truncated": WHOLE[: len(WHOLE) // 2],
    "header only": WHOLE[:200],
    "zero bytes": b"",
    "text": b"<html>404</html>",
    "zeros": bytes(5000),
    "truncated png": encoded("PNG")[:-500],
    "png bomb": bomb(30_000),
    "jpeg bomb": jpeg_bomb(),
}


def fill(folder: Path, files: dict[str, bytes], good: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in {**files, **{f"~{i:04d}": WHOLE for i in range(good)}}.items():
        (folder / f"{name}.jpg").write_bytes(data)
    return list_images([str(folder)])


def dataset(files: list[str], backend: str = "cv2", size: int = 16) -> ViewDataset:
    return ViewDataset(FileSource(files), build_augmentation("moco_v2", size), 0, build_backend(backend, CPU))


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_images_give_views_and_broken_ones_a_reason(backend: str, tmp_path: Path) -> None:
    odd = dataset(fill(tmp_path / "odd", STRANGE), backend)
    for index in range(len(odd)):
        sample = odd[0, index]
        assert sample.skipped == (), "an image, if an odd one"
        assert [view.shape for view in sample.views] == [(16, 16, 3)] * 2
    files = fill(tmp_path / "bad", BROKEN, good=1)
    bad = dataset(files, backend)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in range(len(BROKEN)):
        sample = bad[0, index]
        assert sample.skipped[0].path == files[index] and sample.skipped[0].error and sample.views
        assert all("bomb" not in skip.path or "DATA.MAX_PIXELS" in skip.error
                   for skip in sample.skipped)  # fmt: skip
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 100, f"{grown:.0f} MiB: a bomb of 900 million pixels was decoded"


def test_a_replacement_is_near_always_the_same_and_found_in_few_steps(tmp_path: Path) -> None:
    for index, size in itertools.product((0, 3, 999), (1, 2, 7, 100, 1000, 10**9)):
        tried = list(itertools.islice(replacements(index % size, size), 200))
        assert tried[0] == index % size and len(set(tried)) == len(tried)
        assert size > 100 or set(tried) == set(range(size)), "a small set is tried out"
    lost = set(range(5000, 15_000))
    assert sum(1 for _ in itertools.takewhile(lost.__contains__, replacements(5000, 10**6))) <= 14
    files = fill(tmp_path, {"a": b"", "b": b""}, good=5)
    first, again = (dataset(files)[0, 0] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first.views, again.views, strict=True))
    assert [Path(skip.path).name for skip in first.skipped] == ["a.jpg", "b.jpg"]


def load(files: list[str], folder: Path, limit: float, workers: int = 0, rank: int = 0, start: int = 0) -> ViewLoader:
    sampler = EpochSampler(len(files), 10, 0, start=start)
    return ViewLoader(dataset(files), sampler, workers, CPU, SkipLog(folder, limit, rank))


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 2])
def test_each_is_named_once_by_each_process_also_after_a_resume(workers: int, tmp_path: Path) -> None:
    files = fill(tmp_path / "images", BROKEN, good=32)
    out = tmp_path / "out"
    loader = load(files, out, 1.0, workers)
    batches = iter(loader)
    for _ in range(12):  # three epochs
        assert [view.shape for view in next(batches).images] == [(10, 3, 16, 16)] * 2
    del batches
    logged = lines(out)
    assert sorted(str(line["path"]) for line in logged) == sorted(f for f in files if "~" not in f)
    assert all(line["rank"] == 0 and line["error"] for line in logged)
    assert all(line["epoch"] == int(str(line["iteration"])) // 4 for line in logged)
    assert loader.skips.seen == 120 and loader.skips.replaced == 24
    with (out / "skipped.jsonl").open("a") as file:
        file.write('{"path": "/killed/while/wri')
    resumed = iter(load([*files, str(tmp_path / "vanished.jpg")], out, 1.0, start=12))
    for _ in range(8):
        next(resumed)
    assert (out / "skipped.jsonl").read_text().splitlines()[-1].startswith(f'{{"path": "{tmp_path}/vanished.jpg"')
    assert len((out / "skipped.jsonl").read_text().splitlines()) == len(logged) + 2, "the broken line and the new one"


def test_files_that_vanish_while_training_are_skipped(tmp_path: Path) -> None:
    files = fill(tmp_path / "images", {}, good=40)
    loader = load(files, tmp_path, 1.0)
    batches = iter(loader)
    next(batches)
    for file in files[::2]:
        os.remove(file)
    for _ in range(3):
        next(batches)
    assert loader.skips.replaced > 5 and "FileNotFoundError" in str(lines(tmp_path)[0]["error"])


def test_too_many_end_the_run_and_few_never_do(tmp_path: Path) -> None:
    bad = fill(tmp_path / "images", {f"bad{i}": b"" for i in range(20)}, good=80)
    few = iter(load(bad, tmp_path / "few", 0.25))
    for _ in range(150):
        next(few)
    many = load(bad, tmp_path / "many", 0.1)
    with pytest.raises(ValueError, match=r"(\d+) of the (\d+) images that process 0 saw .*MAX_SKIPPED 0.1 .*many/skip"):
        for _ in many:
            pass
    # 20 % of them are bad: the allowance of the first thousand images is used up after five hundred.
    assert 101 <= many.skips.replaced <= 110 and len(lines(tmp_path / "many")) == 20
    none = load(fill(tmp_path / "none", {f"bad{i}": b"" for i in range(300)}), tmp_path / "none", 1.0)
    with pytest.raises(
        ValueError,
        match=r"nor any of those near it .*; .*none/skipped.jsonl has \d+ paths .*--resume",
    ):
        next(iter(none))
    assert len(lines(tmp_path / "none")) > 100, "what was tried is written down before the stop"


@pytest.mark.slow
def test_the_stop_ends_all_processes_of_a_run(tmp_path: Path) -> None:
    """Whichever counts too many first: the other must not wait for it for ever."""
    import subprocess
    import sys

    fill(tmp_path / "images", {f"bad{i}": b"" for i in range(20)}, good=20)
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "tools" / "pretrain_net.py"), "--config-file", "Pretrain/moco_v2_R50_200ep",
               "--num-gpus", "2", "DATASETS.TRAIN", f"('{tmp_path / 'images'}',)", "OUTPUT_DIR", str(tmp_path / "out"),
               "MODEL.DEVICE", "cpu", "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", "0.125",
               "DATA.CROP_SIZE", "16", "SOLVER.IMS_PER_BATCH", "8", "SSL.ARGS.queue_size", "64", "SSL.ARGS.dim", "16",
               "SSL.ARGS.bn_groups", "2",
               "DATA.MAX_SKIPPED", "0.01", "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root, check=False)
    assert ended.returncode != 0, ended.stderr
    assert "could not be read, more than DATA.MAX_SKIPPED 0.01" in ended.stdout + ended.stderr
    assert len(lines(tmp_path / "out")) >= 10


def test_unreadable_folders_and_limits_come_from_the_config(tmp_path: Path) -> None:
    fill(tmp_path / "images", {"large": encoded(size=(200, 100))}, good=9)
    options = ["DATASETS.TRAIN", f"('{tmp_path / 'images'}',)", "SOLVER.IMS_PER_BATCH", "10", "OUTPUT_DIR",
               str(tmp_path / "out"), "SEED", "1", "MODEL.DEVICE", "cpu", "DATA.CROP_SIZE", "16",
               "DATALOADER.NUM_WORKERS", "0", "DATA.MAX_PIXELS", "15000"]  # fmt: skip
    folder = os.open(tmp_path / "images", os.O_RDONLY)
    for _ in range(20):  # deeper than a path can be long, which not even root can read
        os.mkdir("d" * 250, dir_fd=folder)
        folder, above = os.open("d" * 250, os.O_RDONLY, dir_fd=folder), folder
        os.close(above)
    os.close(folder)
    loader = build_loader(load_cfg("", options))
    next(iter(loader))
    deep, line = lines(tmp_path / "out")
    assert str(deep["path"]).endswith("/" + "d" * 250) and "too long" in str(deep["error"]) and deep["epoch"] == -1
    assert str(line["error"]).startswith("RefusedError: 200 x 100 pixels are more than DATA.MAX_PIXELS 15000; raise it")
    assert line["iteration"] == 0


def mutants(seed: int) -> Iterator[bytes]:
    """JPEGs, PNGs and others with bytes changed, cut out, doubled and swapped; headers more often than the rest."""
    rng = np.random.default_rng(seed)
    parents = [encoded(size=(90, 70)), encoded(size=(64, 64), progressive=True), *STRANGE.values()]
    while True:
        data = bytearray(parents[rng.integers(len(parents))])
        for _ in range(rng.integers(1, 6)):
            end = max(2, min(len(data), 700) if rng.random() < 0.5 else len(data))
            place, length = int(rng.integers(0, end)), int(rng.integers(1, 60))
            match rng.integers(0, 5):
                case 0:
                    data[place : place + 1] = rng.bytes(1)
                case 1:
                    data[place : place + length] = rng.bytes(length)
                case 2:
                    del data[place : place + length]
                case 3:
                    data[place:place] = data[place : place + length]
                case _:
                    del data[max(20, place) :]
        yield bytes(data)


class Mutants:
    """A source of mutated images, one in four of them whole so that there are replacements."""

    def __init__(self, count: int, seed: int) -> None:
        self.made = list(itertools.islice(mutants(seed), count))

    def __len__(self) -> int:
        return len(self.made)

    def name(self, index: int) -> str:
        return str(index)

    def read(self, index: int) -> bytes:
        return self.made[index] if index % 4 else WHOLE


def resident() -> float:
    """MiB of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def fuzz(count: int, backend: str, workers: int = 0) -> tuple[int, float]:
    """Return how many were refused, and by how many MiB the process grew after the first tenth."""
    made = ViewDataset(Mutants(2000, 1), build_augmentation("moco_v2", 16), 0, build_backend(backend, CPU))  # type: ignore[arg-type]
    loader, first = ViewLoader(made, EpochSampler(2000, 50, 0), workers, CPU), 0.0
    for number, views in enumerate(itertools.islice(loader, count // 50)):
        if number == count // 500:
            first = resident()
        assert [(view.shape, bool(view.isfinite().all())) for view in views.images] == [((50, 3, 16, 16), True)] * 2
    assert loader.skips.seen == count
    return loader.skips.replaced, resident() - first


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_mutated_images_neither_crash_nor_hang(backend: str, workers: int) -> None:
    refused, _ = fuzz(500, backend, workers)
    assert 100 < refused < 400, "the mutations tell"


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_twenty_thousand_mutated_images_leak_nothing(backend: str) -> None:
    refused, grown = fuzz(20_000, backend)
    assert refused > 4000 and grown < 20, f"grown by {grown:.1f} MiB"

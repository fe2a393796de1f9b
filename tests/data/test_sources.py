"""Folders that are listed once and then cached, and an order of shards that any process can start anywhere."""

import itertools
import json
import os
import pwd
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.multiprocessing import ProcessRaisedException

from moco_d2.data import EpochSampler, list_folder, listing, open_source
from moco_d2.data.listing import Listing, Paths
from moco_d2.detection.labels.voc import walk
from moco_d2.seeding import stream_seed
from tests.two_processes import in_two_processes


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOCO_D2_CACHE", str(folder))
    return folder


def grow(root: Path, folders: int = 40, files: int = 60) -> Path:
    """A tree of a few thousand images whose folders have settled: their time stamps are in the past."""
    for i in range(folders):
        folder = root / f"n{i:04d}"
        folder.mkdir(parents=True)
        for j in range(files):
            (folder / f"{j:04d}.JPEG").touch()
    return root


def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let time pass, as far as the listing can tell."""
    _clock(monkeypatch, 60)


def _clock(monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    now = time.time() + ahead
    monkeypatch.setattr(listing.time, "time", lambda: now)


def walked(root: Path) -> list[str]:
    found = []
    for parent, folders, names in os.walk(root, followlinks=True):
        folders.sort()
        found += [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(listing.EXTENSIONS)]
    return found


def test_every_change_of_a_remembered_folder_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow(tmp_path / "set")
    settled(monkeypatch)
    reads: list[str] = []
    scan = os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda folder: reads.append(str(folder)) or scan(folder))

    def read_anew() -> list[str]:
        reads.clear()
        assert Listing(root).files == walked(root)
        return [os.path.relpath(folder, root) for folder in reads]

    monkeypatch.setattr(os, "walk", _walk_without_scandir)
    assert len(read_anew()) == 41
    assert read_anew() == [], "remembered"
    (root / "n0003" / "new.jpg").touch()
    (root / "n0005" / "0001.JPEG").unlink()
    (root / "n0007" / "0002.JPEG").rename(root / "n0007" / "renamed.JPEG")
    stamp = (root / "n0009").stat()
    (root / "n0009" / "hidden.jpg").touch()
    os.utime(root / "n0009", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))  # as rsync does; the ctime tells
    assert read_anew() == ["n0003", "n0005", "n0007", "n0009"]
    grow(root / "n0011" / "below", 1, 2)
    (root / "n0012").rename(root / "n0013x")
    assert set(read_anew()) == {".", "n0011", "n0011/below", "n0011/below/n0000"} | {"n0013x"}
    (root / "n0013" / "more.jpg").touch()
    monkeypatch.setattr(listing, "EXTENSIONS", (*listing.EXTENSIONS, ".touch"))
    assert len(read_anew()) == 43, "another rule, another listing"


def _walk_without_scandir(top: Path, followlinks: bool) -> Iterator[tuple[str, list[str], list[str]]]:
    """os.walk, by listdir, so that it is not counted."""
    entries = os.listdir(top)
    folders = [name for name in entries if os.path.isdir(os.path.join(top, name))]
    yield str(top), folders, [name for name in entries if name not in set(folders)]
    for name in folders:
        yield from _walk_without_scandir(os.path.join(top, name), followlinks)


def test_a_folder_that_may_still_change_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Within the same tick of a coarse clock a change would leave no trace in the folder's times.
    root = grow(tmp_path / "set", 20, 60)
    for folder in (root, *root.iterdir()):
        os.utime(folder)
    _clock(monkeypatch, 0)  # however long the listing takes here
    assert len(Listing(root).files) == 1200
    settled(monkeypatch)
    reads: list[object] = []
    scan = os.scandir
    monkeypatch.setattr(listing.os, "scandir", lambda folder: reads.append(folder) or scan(folder))
    assert len(Listing(root).files) == 1200 and len(reads) == 21
    assert len(Listing(root).files) == 1200 and len(reads) == 21, "now they are settled"


def test_a_damaged_or_forbidden_cache_costs_time_only(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = grow(tmp_path / "set", 20, 60)
    settled(monkeypatch)
    files = Listing(root).files
    (kept,) = (cache / "listings").iterdir()
    for damage in (b"", b"{", b'{"extensions": [], "folders": {}}', kept.read_bytes()[:500]):
        kept.write_bytes(damage)
        assert Listing(root).files == files
    monkeypatch.setenv("MOCO_D2_CACHE", "/dev/null/nowhere")
    assert Listing(root).files == files
    assert "set MOCO_D2_CACHE to another folder" in caplog.text
    for name in ("MOCO_D2_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)  # as in a container under a number without a name
    assert Listing(root).files == files


def test_links_in_circles_end_and_unreadable_folders_are_told() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's folders are closed to other users
        root = grow(Path(name) / "set", 3, 2)
        (root / "n0000" / "round").symlink_to(root)
        (root / "dangling").symlink_to("nowhere")
        os.chmod(name, 0o755)
        (root / "n0001").chmod(0)
        if root_user := os.geteuid() == 0:  # to whom nothing is closed
            os.seteuid(65534)
        try:
            seen = Listing(root)
            problems: list[tuple[str, str]] = []
            with pytest.raises(ValueError, match=r"cannot read .*n0001: .*Permission denied"):
                list_folder(root / "n0001", problems)
        finally:
            if root_user:
                os.seteuid(0)
            (root / "n0001").chmod(0o755)
        assert [Path(file).parent.name for file in seen.files] == ["n0000", "n0000", "n0002", "n0002"]
        assert [folder for folder, _ in seen.unreadable] == [str(root / "n0001")]
        assert "Permission denied" in seen.unreadable[0][1] and problems == seen.unreadable


def test_paths_are_kept_whatever_their_bytes() -> None:
    names = ["a", "", "ö/ü", os.fsdecode(b"\xff\xfe"), "x" * 5000]
    paths = Paths(names)
    assert len(paths) == 5 and [paths[i] for i in range(5)] == names


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A hidden folder that a user may name, with three pictures, their copies, and other files."""
    root = tmp_path / ".data" / "pictures"
    (root / "sub").mkdir(parents=True)
    for name in ("a.jpg", "b.JFIF", "sub/c.jpe"):
        (root / name).touch()
    for name in ("d.heic", "e.HEIC", "f.txt", "g", "h.JPG_large"):
        (root / name).touch()
    for name in (".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/._a.jpg", "sub/@eaDir/c.jpg", "._a.jpg", "Thumbs.db"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    return root


def test_hidden_copies_are_left_out_in_both_stages_and_all_that_is_left_out_is_said(
    messy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        assert list_folder(messy) == [str(messy / name) for name in ("a.jpg", "b.JFIF", "sub/c.jpe")]
    (said,) = caplog.records
    assert said.levelname == "WARNING", "five files beside three pictures are many"
    kinds = "5 hidden, 2 .heic, 1 .jpg_large, 1 .txt, 1 without extension"
    assert said.getMessage().endswith(f"extension: {kinds}") and str(messy) in said.getMessage()
    assert {str(path) for _, path in walk(messy, set()) if path.suffix.lower() in listing.EXTENSIONS} == set(
        list_folder(messy)
    ), "as fine-tuning finds them"
    caplog.clear()
    for number in range(60):
        (messy / f"{number}.png").touch()
    with caplog.at_level("INFO"):
        list_folder(messy)
    assert [record.levelname for record in caplog.records] == ["INFO"]


def test_a_folder_without_pictures_says_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no images in .* and found nothing; if it holds tar"):
        list_folder(tmp_path)
    for name in ("a.heic", "b.heic", ".c.jpg"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"found 3 other file\(s\) \(2 .heic, 1 hidden\)"):
        list_folder(tmp_path)


def test_a_listing_that_an_older_rule_made_is_not_taken_over(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grow(tmp_path / "set", 20, 60)
    settled(monkeypatch)
    files = Listing(root).files
    (kept,) = (cache / "listings").iterdir()
    older = json.loads(kept.read_text())
    older["folders"]["n0000"][3].append("._copy.jpg")
    for content in ({**older, "format": 1}, {name: older[name] for name in ("extensions", "folders")}):
        kept.write_text(json.dumps(content))
        assert Listing(root).files == files
    kept.write_text(json.dumps(older))
    assert len(Listing(root).files) == len(files) + 1, "this one would be"


def list_in_two_processes(folders: tuple[Path, Path]) -> None:
    """Each process lists its own folder under the same name."""
    from detectron2.utils import comm

    from moco_d2.config import load_cfg
    from moco_d2.engine.loader import build_loader

    folder = folders[comm.get_rank()]
    build_loader(load_cfg("", ["DATASETS.TRAIN", f"('{folder}',)", "OUTPUT_DIR", str(folder.parent),
                               "MODEL.DEVICE", "cpu", "SOLVER.IMS_PER_BATCH", "2", "SEED", "1"]))  # fmt: skip


def test_processes_that_list_other_images_do_not_begin(tmp_path: Path) -> None:
    first, second = grow(tmp_path / "first", 1, 3), grow(tmp_path / "second", 1, 3)
    in_two_processes(list_in_two_processes, (first, second))
    (second / "n0000" / "0001.JPEG").rename(second / "n0000" / "other.JPEG")
    with pytest.raises(
        ProcessRaisedException,
        match="process 0 lists 3 images and process 1 lists 3, or the same number of",
    ):
        in_two_processes(list_in_two_processes, (first, second))


def test_a_set_is_known_by_its_names_and_order_wherever_it_lies(tmp_path: Path) -> None:
    def known(*folders: Path) -> int:
        return open_source([str(folder) for folder in folders]).fingerprint

    first, moved = grow(tmp_path / "first", 3, 3), grow(tmp_path / "further" / "away", 3, 3)
    names = known(first)
    assert known(moved) == names != known(moved, first) != known(first, moved)
    (moved / "n0001" / "0002.JPEG").rename(moved / "n0001" / "0003.JPEG")
    assert known(moved) != names and len(list_folder(moved)) == 9
    shuffled = EpochSampler([3, 3], 2, 1, window=1, fingerprint=names)
    assert shuffled.settings() != EpochSampler([3, 3], 2, 1, window=1, fingerprint=names + 1).settings()


def flat(lists: Iterable[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


SHARDS = [5, 0, 7, 20, 3, 11, 30, 2, 2]


@pytest.mark.parametrize(("window", "streams"), [(0, 1), (2, 1), (2, 2), (3, 4), (1, 8)])
def test_the_order_of_shards_is_a_function_of_seed_epoch_and_step(window: int, streams: int) -> None:
    def stream(start: int = 0, rank: int = 0, world: int = 1) -> Iterator[list[tuple[int, int]]]:
        return iter(EpochSampler(SHARDS, 8, 3, rank, world, start, window, streams))

    whole = stream()
    batches = [next(whole) for _ in range(30)]  # three epochs of ten steps
    for start in (1, 4, 9, 10, 17, 25):
        resumed = stream(start)
        assert [next(resumed) for _ in range(5)] == batches[start : start + 5]
    for world in (2, 4, 8):
        ranks = [stream(7, rank, world) for rank in range(world)]
        for step in range(7, 17):
            assert [key for rank in ranks for key in next(rank)] == batches[step], f"{world} processes"
    epochs = [[index for epoch, index in flat(batches[e * 10 : e * 10 + 10]) if epoch == e] for e in range(3)]
    assert all(len(set(epoch)) == 80 and set(epoch) <= set(range(80)) for epoch in epochs), "each image once"
    assert epochs[0] != epochs[1] != epochs[2]


def test_one_shard_is_a_plain_permutation() -> None:
    drawn = np.random.default_rng(stream_seed(5, 2)).permutation(100)
    assert [index for _, index in next(iter(EpochSampler(100, 10, 5, start=27)))] == drawn[70:80].tolist()


def test_a_window_holds_the_images_of_its_shards_only() -> None:
    shards = [10] * 20
    firsts = np.arange(20) * 10
    heard: list[tuple[list[int], list[int]]] = []
    sampler = EpochSampler(shards, 10, 1, window=4, prepare=lambda now, ahead: heard.append((now, ahead)))
    batches = iter(sampler)
    for step in range(40):
        met = {int(np.searchsorted(firsts, index, side="right")) - 1 for _, index in next(batches)}
        now = heard[-1][0]
        assert met <= set(now) and len(met) > 1, f"step {step}"
    assert len(heard) == 10 and all(len(now) == 4 for now, _ in heard)
    assert [ahead for _, ahead in heard[:-1]] == [now for now, _ in heard[1:]], "also from epoch to epoch"
    assert sorted(flat(now for now, _ in heard[:5])) == list(range(20))


def test_a_process_needs_the_shards_of_its_own_streams() -> None:
    needed: list[set[int]] = []
    for rank in range(4):
        shards: set[int] = set()
        batches = iter(
            EpochSampler(
                [50] * 64, 32, 1, rank, 4, window=2, streams=8, prepare=lambda now, _, met=shards: met.update(now)
            )
        )
        for _ in range(100):
            next(batches)
        needed.append(shards)
    # 64 shards for 8 streams: 16 for each process, and the cuts between streams fall between shards.
    assert [len(shards) for shards in needed] == [16] * 4 and len(set.union(*needed)) == 64


def test_a_billion_images_are_sampled_from_little_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    try:
        batches = iter(EpochSampler(np.full(100_000, 10_000), 4096, 1, 5, 64, start=123_456, window=16, streams=64))
        keys = [next(batches) for _ in range(50)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(len(batch) == 64 for batch in keys) and len({index for _, index in flat(keys)}) == 3200
    assert peak < 64e6

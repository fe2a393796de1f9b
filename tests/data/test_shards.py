"""Shards: made, read, fetched, resumed and damaged, with real tars and a real HTTP server."""

import contextlib
import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.data import (
    EpochSampler,
    FileSource,
    ShardCache,
    ViewDataset,
    ViewLoader,
    build_augmentation,
    list_folder,
    open_source,
    packing,
    shard_index,
)
from moco_d2.data.backends import build_backend
from moco_d2.data.packing import Packed, pack
from moco_d2.data.shard_cache import Shard, base_name
from moco_d2.data.shard_index import members
from moco_d2.data.shards import MANIFEST, ShardSource, expand, open_shards

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MOCO_D2_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """47 pictures in three folders, some with names that a tar or WebDataset might take amiss."""
    root = tmp_path_factory.mktemp("images")
    for i in range(47):
        folder = root / f"class{i % 3}"
        folder.mkdir(exist_ok=True)
        name = {5: "dotted.v1.jpg", 8: "dotted.v2.jpg", 11: "dotted_v2.jpg", 14: "ümläut.jpg", 17: "x" * 120 + ".jpg"}
        pixels = RNG.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name.get(i, f"{i:03d}.jpg"), quality=50)
    return root


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    command = [sys.executable, str(ROOT / "tools" / "make_shards.py"), str(images), str(out), "--shard-size", "6"]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "47 of 47 images" in shown and "eta 0:00:00" in shown and "47 images in 8 shards" in shown
    return out


def contents(source: object) -> list[bytes]:
    return sorted(source.read(i) for i in range(len(source)))  # type: ignore[attr-defined, arg-type]


def test_shards_hold_the_folder_and_any_tar_reader_agrees(images: Path, shards: Path) -> None:
    files = sorted(path.read_bytes() for path in images.rglob("*.jpg"))
    for name in (f"{shards}", f"{shards}/{MANIFEST}", f"{shards}/*.tar", f"{shards}/{{000000..000007}}.tar"):
        source = open_source([name])
        assert contents(source) == files and source.lengths.tolist() == [6] * 7 + [5]
    names = subprocess.run(["tar", "-tf", shards / "000000.tar"], check=True, capture_output=True).stdout.splitlines()
    assert len(names) == 6
    source = open_source([str(shards)])
    assert source.name(0).startswith(f"{shards}/000000.tar/class") and source.name(0).endswith(".jpg")
    keys = [source.name(i).partition(".tar/")[2].rpartition(".")[0] for i in range(47)]
    assert len(set(keys)) == 47 and not any("." in key for key in keys), "keys differ and end at the first dot"
    assert keys != sorted(keys), "shuffled"


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_webdataset_library_reads_ours(images: Path, shards: Path) -> None:
    import webdataset

    urls = [str(path) for path in sorted(shards.glob("*.tar"))]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert sorted(sample["jpg"] for sample in samples) == sorted(path.read_bytes() for path in images.rglob("*.jpg"))
    gc.collect()  # it leaves its files open


def test_foreign_tars_are_read(tmp_path: Path, cache: Path, images: Path) -> None:
    subprocess.run(["tar", "-cf", tmp_path / "gnu.tar", "-C", images, "."], check=True)
    # `dotted.v1.jpg` and `dotted.v2.jpg` are fields of one sample by WebDataset's rule, and no images.
    assert len(open_source([f"{tmp_path}/gnu.tar"])) == 45
    jpeg = next(images.rglob("*.jpg")).read_bytes()
    fields = [("a.JPG", jpeg), ("a.cls", b"3"), ("a.json", b"{}"), ("b.seg.png", b"x"), ("b.png", b"first"),
              ("b.jpg", jpeg), ("c.txt", b"x"), ("sub/a.jpeg", jpeg), (".jpg", jpeg)]  # fmt: skip
    with tarfile.open(tmp_path / "web.tar", "w") as tar:
        for name, data in fields:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        folder = tarfile.TarInfo("folder.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    assert [name for name, *_ in members(tmp_path / "web.tar")] == ["a.JPG", "b.png", "sub/a.jpeg"]
    source = open_source([f"{tmp_path}/{{gnu,web}}.tar"])
    assert source.lengths.tolist()[0] == 45 and source.read(46) == b"first"
    assert len(list((cache / "indexes").iterdir())) == 2, "read once, and remembered"
    assert packing.index(tmp_path) == len(source) == len(open_source([str(tmp_path)]))


def write_tar(path: Path, names: list[str], data: bytes) -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_image_files_that_the_rule_leaves_out_are_said_at_every_start(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jpeg = next(images.rglob("*.jpg")).read_bytes()
    lost = ["x.0.jpg", "x.1.jpg", "x.json", "IMG.2021.05.JPG"]  # no key of theirs has an image
    masks = ["a.mask.png", "a.jpg", "a.png", "./sub/b.jfif", "./sub/b.seg.png"]
    hidden = ["._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "__MACOSX/c.jpg"]
    (tmp_path / "set").mkdir()
    write_tar(tmp_path / "set/0.tar", [*lost, *masks, *hidden], jpeg)
    with serve(tmp_path / "set") as (url, _), caplog.at_level("INFO"):
        shards_cache = ShardCache(tmp_path / "cache", 1e9)
        for name in 2 * [str(tmp_path / "set/0.tar"), f"{url}/0.tar"]:  # read, then remembered
            caplog.clear()
            source = open_shards(name, shards_cache)
            assert [source.name(i).rpartition("/")[2] for i in range(len(source))] == ["a.jpg", "b.jfif"]
            said = [(r.levelname, r.getMessage()) for r in caplog.records if "left out" in r.getMessage()]
            assert [level for level, _ in said] == ["WARNING", "INFO"]
            assert said[0][1].startswith(f"{name}: 3 image file(s) are left out") and "moco-d2 shards" in said[0][1]
            assert said[1][1].startswith(f"{name}: 3 image file(s) are left out because their sample has a picture")
    caplog.clear()
    assert packing.index(tmp_path / "set") == 2 and "3 image file(s)" in caplog.text


def test_an_index_that_an_older_rule_made_is_not_taken_over(tmp_path: Path, cache: Path, images: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", ["a.jpg", "b.jpg"], next(images.rglob("*.jpg")).read_bytes())
    assert len(open_source([str(tar)])) == 2
    (kept,) = (cache / "indexes").iterdir()
    rows = np.load(kept)
    for older in (rows[2:3], rows[3:], np.concatenate([[[1 - shard_index.RULE, 0], [0, 0]], rows[2:3]])):
        np.save(kept, older)
        assert len(open_source([str(tar)])) == 2
    with serve(tmp_path) as (url, _):
        shards_cache = ShardCache(tmp_path / "cache", 1e9)
        assert len(open_shards(f"{url}/a.tar", shards_cache)) == 2
        note = shards_cache.sidecar(f"{url}/a.tar")
        note.write_text(json.dumps({"bytes": tar.stat().st_size, "samples": 1, "problem": ""}))  # as it was kept
        assert len(open_shards(f"{url}/a.tar", shards_cache)) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.tar.gz", "a compressed tar.*unpack it \\(tar -xf x.tar.gz -C FOLDER\\)"),
        ("sets/{0..3}.tgz", "a compressed tar"),
        ("https://host/x.tar.zst?token=1", "a compressed tar.*tar -xf x.tar.zst "),
        ("x.tar.bz2", "a compressed tar"),
        ("x.ZIP", "an archive: unpack it and name the folder"),
        ("x.rar", "an archive"),
        ("clip.mp4", "a video.*ffmpeg -i clip.mp4 FOLDER"),
        ("train.csv", "a list or table: name the folder of its pictures"),
        ("list.txt", "a list or table"),
        ("x.parquet", "a list or table"),
        ("labels.json", "a file of labels.*DATASETS.CUSTOM"),
        ("pictures/*.jpg", "one picture, or a pattern of pictures: name the folder"),
        ("notes", "a file that is not a tar"),
    ],
)
def test_what_people_name_instead_is_told_with_its_remedy(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for there in (False, True):
        if there and "/" not in name:
            Path(name).touch()
        if there or name != "notes":
            with pytest.raises(ValueError, match=message):
                open_source([name])


@pytest.mark.parametrize(("mode", "form"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_under_a_plain_name_is_told(mode: str, form: str, tmp_path: Path, images: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", mode) as tar:  # type: ignore[call-overload]
        tar.add(next(images.rglob("*.jpg")), "a.jpg")
    with pytest.raises(ValueError, match=f"no images in the 1 shard.*a {form} file, not a plain tar.*unpack it"):
        open_source([str(tmp_path / "a.tar")])


def test_shards_and_folders_mix(images: Path, shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moco_d2.data.sources.FILES_IN_A_SHARD", 10)
    source = open_source([str(shards), str(images)])
    assert len(source) == 94 and source.lengths.tolist() == [10] * 4 + [7] + [6] * 7 + [5]
    every = [source.read(i) for i in range(94)]
    assert sorted(every[:47]) == sorted(every[47:]) and source.name(46).startswith(str(images))
    assert source.name(47).startswith(f"{shards}/000000.tar/")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SHARDS/00000.tar", r"nearest: .*/00000\d.tar, "),
        ("SHARDS/00000x*.tar", "which matches no file; nearest: .*/00000"),
        ("SHARDZ/{000000..000007}.tar", "there is no folder .*z; nearest: .*[0-9]$"),
        ("EMPTIER", "neither a folder, nor shards, nor a registered data set; nearest: .*/empty$"),
        ("SHARDS/{000009..000000}.tar", "counts down; write the smaller number first"),
        ("SHARDS/000099.tar", "000099.tar', which does not exist"),
        ("SHARDS/none*.tar", "matches no file"),
        ("pipe:curl http://x/y.tar", "paths or http"),
        ("s3://bucket/x.tar", "paths or http"),
        ("EMPTY", r"found 1 other file\(s\) \(1 .tar\); if it holds tar shards, name them as FOLDER/\*.tar"),
        ("EMPTY/text.tar", "no images in the 1 shard"),
        ("BROKEN", "shards.json is damaged: its format is 'other'"),
    ],
)
def test_mistakes_are_named(name: str, message: str, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "e").mkdir()
    subprocess.run(["tar", "-cf", tmp_path / "e" / "text.tar", "-C", ROOT, "README.md"], check=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / MANIFEST).write_text('{"format": "other"}')
    (tmp_path / "empty").mkdir()
    folders = {"SHARDZ": f"{shards}z", "SHARDS": shards, "EMPTIER": tmp_path / "emptier", "EMPTY": tmp_path / "e",
               "BROKEN": tmp_path / "b"}  # fmt: skip
    for word, folder in folders.items():
        name = name.replace(word, str(folder))
    with pytest.raises(ValueError, match=message):
        open_source([name])


def test_braces_expand_as_in_a_shell() -> None:
    assert expand("a{08..11}b{x,y}.tar") == [f"a{n}b{c}.tar" for n in ("08", "09", "10", "11") for c in "xy"]
    assert expand("plain") == ["plain"] and expand("{}{x}") == ["{}{x}"]


@pytest.mark.parametrize("end", ["", "?signature=a/b", "#a/b", "?a=#/?/b", "#?x/y"])
def test_an_address_has_the_name_that_urllib_reads(end: str) -> None:
    for address in ("https://host/a/000000.tar", "http://host:80/x?y/z.tar"):
        assert base_name(address + end) == os.path.basename(urllib.parse.urlsplit(address + end).path)
    assert base_name(f"/data/a.tar{end}") == os.path.basename(f"/data/a.tar{end}")


def make(images: Path, out: Path, size: int = 6) -> list[Packed]:
    return list(pack(list_folder(images), images, out, size, seed=0))


def make_two_and_die(images: Path, out: Path) -> None:
    for number, _ in enumerate(pack(list_folder(images), images, out, 1, seed=0)):
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def test_making_is_deterministic_resumes_and_refuses(images: Path, shards: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    make(images, whole, 1)
    process = multiprocessing.get_context("fork").Process(target=make_two_and_die, args=(images, killed))
    process.start()
    process.join()
    (killed / ".000002.tar.x1_y2z3a.partial").write_bytes(b"what a killed process leaves of a file that it writes")
    begun = {path: path.stat().st_mtime_ns for path in killed.glob("0*.tar")}
    with pytest.raises(ValueError, match=r"is unfinished: run moco-d2 shards again"):
        open_source([f"{killed}/*.tar"])
    with pytest.raises(ValueError, match="is unfinished"):
        packing.index(killed)
    packed = make(images, killed, 1)
    assert sum(shard.kept for shard in packed) == len(begun) == 2
    assert all(path.stat().st_mtime_ns == written for path, written in begun.items()), "what is done is kept"
    assert sorted(os.listdir(killed)) == sorted(os.listdir(whole)), "nothing is left lying about"
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in os.listdir(whole))
    again = tmp_path / "again"
    make(images, again)
    assert packing.index(again) == 47 and all(shard.kept for shard in make(images, again)), "still what it was made of"
    assert all((again / name).read_bytes() == (shards / name).read_bytes() for name in os.listdir(shards))
    for folder, out, size in ((images, shards, 7), (images / "class0", shards, 6), (images, images, 6)):
        with pytest.raises(ValueError, match="name another folder"):
            make(folder, out, size)


def test_files_that_vanish_while_packing_are_left_out(images: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    files = [*list_folder(images), str(images / "gone.jpg"), str(tmp_path / "pipe.jpg")]
    packed = list(pack(files, images, tmp_path / "out", 6, seed=0))
    assert sum(shard.unreadable for shard in packed) == 2 and len(open_source([str(tmp_path / "out")])) == 47


def test_files_of_one_key_are_kept_apart(images: Path, tmp_path: Path) -> None:
    data = next(images.rglob("*.jpg")).read_bytes()
    for name in ("x.2.jpg", "x.jpg", "x.png", "x_2.png"):
        (tmp_path / name).write_bytes(data)
    (packed,) = pack(list_folder(tmp_path), tmp_path, tmp_path / "out", 6, seed=-1)
    keys = [name.partition(".")[0] for name, _, _ in members(tmp_path / "out" / packed.shard.location)]
    assert len(set(keys)) == len(keys) == packed.shard.samples == 4


@pytest.mark.parametrize("damage", ["checksum", "zeros", "cut"])
def test_a_damaged_header_is_not_the_end(damage: str, shards: Path, tmp_path: Path) -> None:
    data = bytearray((shards / "000000.tar").read_bytes())
    begin = list(members(shards / "000000.tar"))[3][1] - 512
    if damage == "cut":
        data = data[: begin + 100]
    else:
        data[begin : begin + 512] = bytes(512) if damage == "zeros" else data[begin : begin + 511] + b"x"
    tar = tmp_path / "foreign.tar"
    tar.write_bytes(data)
    for _ in range(2):  # at each start
        source = open_source([str(tar)])
        ((location, problem),) = source.unreadable
        assert len(source) == 3 and location == str(tar) and "its first 3 images are used" in problem
    with pytest.raises(OSError, match=r"foreign.tar: damaged or cut short"):
        packing.index(tmp_path)
    with serve(tmp_path) as (url, _):
        for _ in range(2):
            stream = open_shards(f"{url}/foreign.tar", ShardCache(tmp_path / "c", 1e9))
            assert stream.unreadable[0][0] == f"{url}/foreign.tar" and len(stream) == 3


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder with ranges, breaks off where it is told to, and notes what was asked for."""

    asked: list[str]
    broken: dict[str, int]  # name: after how many bytes the next answer ends
    hidden, refusal = "", 404
    gate: threading.Event | None = None  # waited for in the middle of a shard

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        self.asked.append(name)
        path = Path(self.directory) / name
        if not path.is_file() or name == self.hidden:
            self.send_error(self.refusal, "not here")
            return
        data, start = path.read_bytes(), 0
        if range_ := self.headers.get("Range"):
            start = int(range_.removeprefix("bytes=").rstrip("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data) - start))
        self.send_header("ETag", f'"{len(data)}-{path.stat().st_mtime_ns}"')
        self.end_headers()
        data = data[start : start + self.broken.pop(name, len(data))]
        self.wfile.write(data[:100])
        if self.gate and name != MANIFEST:
            self.gate.wait(60)
        self.wfile.write(data[100:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(shards: Path) -> Iterator[tuple[str, type[Handler]]]:
    with serve(shards) as served:
        yield served


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[tuple[str, type[Handler]]]:
    handler = type("Own", (Handler,), {"asked": [], "broken": {}})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", handler
        http.shutdown()
        thread.join()


def test_streams_give_what_disks_give_and_stay_within_their_cache(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path, cache: Path
) -> None:
    url, handler = server
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    handler.broken = {"000002.tar": 700, "000005.tar": 3000}
    local = open_shards(str(shards), ShardCache(tmp_path, 1e9))
    streamed = open_shards(f"{url}/", ShardCache(tmp_path / "c", 4.5 * size))
    assert handler.asked == [MANIFEST], "nothing is fetched before it is needed"
    for index in np.random.default_rng(0).permutation(47).tolist():
        assert streamed.read(index) == local.read(index)
        kept = sum(path.stat().st_size for path in (tmp_path / "c").glob("*.tar"))
        assert kept <= 4.5 * size and not list((tmp_path / "c").glob("*.part"))
        assert index_names(tmp_path / "c") <= {path.stem for path in (tmp_path / "c").glob("*.tar")}
    assert len(list((cache / "indexes").iterdir())) == 8, "of the disk's shards; the others go with their shards"
    opened = subprocess.run(["ls", "-l", f"/proc/{os.getpid()}/fd"], capture_output=True, text=True).stdout
    assert "000000.tar" in opened and f"{tmp_path}/c/" not in opened, "what made room is not kept on the disk"
    assert handler.asked.count("000002.tar") >= 2, "broken off and continued"
    assert streamed.name(0) == local.name(0).replace(str(shards), url)


def index_names(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.npy")}


def wait_for(done: Callable[[], bool]) -> None:
    for _ in range(3000):
        if done():
            return
        time.sleep(0.01)
    raise AssertionError("waited for 30 s")


def test_only_what_was_fetched_makes_room(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    for name in ("mine.tar", "mine.npy", "film.part"):
        (folder / name).write_bytes(b"the user's" * 1000)
        os.utime(folder / name, (0, 0))
    source = open_shards(f"{server[0]}/", ShardCache(folder, 1))
    for index in (0, 6, 12):
        source.read(index)
    assert len(list(folder.glob("*-*.tar"))) == 1, "two made room"
    for name in ("mine.tar", "mine.npy", "film.part"):
        assert (folder / name).read_bytes() == b"the user's" * 1000


def test_a_manifest_of_another_kind_is_kept(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "000000.tar").write_bytes((shards / "000000.tar").read_bytes())
    (tmp_path / "shards.json").write_text('{"my": "notes"}')
    with pytest.raises(ValueError, match=r"shards\.json: this file exists, and this command did not write it"):
        packing.index(tmp_path)
    with pytest.raises(ValueError, match="holds shards of other files"):
        list(pack([], tmp_path, tmp_path, 6, seed=-1))
    assert (tmp_path / "shards.json").read_text() == '{"my": "notes"}'


def test_what_is_being_fetched_counts_as_if_it_were_there(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path
) -> None:
    url, handler = server
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    source = open_shards(f"{url}/", ShardCache(tmp_path / "c", sum(sizes[:4]) - sizes[0] + 500))
    (tmp_path / "c" / "0123456789abcdef-vanished.5.part").symlink_to(
        "nowhere"
    )  # as one that is renamed when it is looked at
    for index in (0, 6):
        source.read(index)
    handler.gate = threading.Event()
    source.prepare([2, 3], [])
    wait_for(lambda: {"000002.tar", "000003.tar"} <= set(handler.asked))
    there = [path.name.partition("-")[2] for path in (tmp_path / "c").glob("*.tar")]
    handler.gate.set()
    assert there == ["000001.tar"]
    wait_for(lambda: len(list((tmp_path / "c").glob("*.tar"))) == 3)


def test_workers_behind_the_sampler_find_their_shards(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    from moco_d2.config import load_cfg
    from moco_d2.engine.loader import check_cache

    url, handler = server
    source = open_shards(f"{url}/{{000000..000003}}.tar", ShardCache(tmp_path, 0))
    assert len(set(source.remote_sizes)) == 1
    cfg = load_cfg("", ["DATA.SHUFFLE_SHARDS", "1", "SOLVER.IMS_PER_BATCH", "1", "DATALOADER.NUM_WORKERS", "1"])
    for shards_held in (1, 2, 3, 4):  # the smallest cache that is accepted
        cfg.DATA.CACHE_GB = (shards_held * max(source.remote_sizes) + 1) / 1e9
        with contextlib.suppress(ValueError):
            check_cache(source, cfg, lanes=1)
            break
    source.cache.limit = cfg.DATA.CACHE_GB * 1e9
    behind: list[list[tuple[int, int]]] = []
    stream = iter(EpochSampler(source.lengths, 1, 1, window=1, prepare=source.prepare))
    for _ in range(17):  # until the next epoch begins to be fetched
        behind.append(next(stream))
        time.sleep(0.01)
        if len(behind) > 2:
            for _, index in behind.pop(0):
                source.read(index)
    asked = [name for name in handler.asked if name != MANIFEST]
    assert sorted(asked) == sorted(set(asked)) and shards_held == 3


def test_the_window_ahead_is_fetched_in_time_and_only_by_whom_it_concerns(
    server: tuple[str, type[Handler]], tmp_path: Path
) -> None:
    url, handler = server
    source = open_shards(f"{url}/{{000000..000007}}.tar", ShardCache(tmp_path, 1e9))
    sampler = EpochSampler(source.lengths, 4, 1, rank=0, world_size=2, window=2, streams=2, prepare=source.prepare)
    stream = iter(sampler)
    plan = [shard for window in sampler.plan(0, 0) for shard, *_ in window]
    next(stream)
    wait_for(lambda: len(list(tmp_path.glob("*.tar"))) >= 4)
    assert set(handler.asked) - {MANIFEST} == {f"{shard:06d}.tar" for shard in plan[:4]}, "this window and the next"


def batches(source: object, start: int, count: int, workers: int, world: int, streams: int) -> list[torch.Tensor]:
    """What all processes see, step by step."""
    loaders = []
    for rank in range(world):
        sampler = EpochSampler(
            source.lengths, 8, 3, rank, world, start, window=2, streams=streams, prepare=source.prepare  # type: ignore[attr-defined]
        )  # fmt: skip
        dataset = ViewDataset(source, build_augmentation("moco_v2", 16), 3, build_backend("cv2", CPU))  # type: ignore[arg-type]
        loaders.append(iter(ViewLoader(dataset, sampler, workers, CPU)))
    return [torch.cat([torch.stack(next(loader).images) for loader in loaders], 1) for _ in range(count)]


def test_a_resumed_stream_is_the_uninterrupted_one_whoever_reads_it(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path
) -> None:
    disk = open_shards(str(shards), ShardCache(tmp_path, 1e9))
    whole = batches(disk, 0, 12, 0, 1, streams=2)  # two epochs and two steps
    for cache, (start, workers, world) in enumerate([(3, 2, 1), (7, 0, 2), (5, 1, 2), (9, 0, 4)]):
        stream = open_shards(f"{server[0]}/", ShardCache(tmp_path / str(cache), 1e9))
        resumed = batches(stream, start, 3, workers, world, streams=2)
        assert all(torch.equal(a, b) for a, b in zip(whole[start : start + 3], resumed, strict=True))


def test_lost_and_short_shards_cost_their_own_images(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in shards.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = list(members(tmp_path / "000003.tar"))
    os.truncate(tmp_path / "000003.tar", table[2][1] + 100)
    with caplog.at_level(logging.WARNING):
        source = open_source([str(tmp_path)])
    assert "000003.tar has" in caplog.text and "count as unreadable" in caplog.text
    os.remove(tmp_path / "000005.tar")
    lost = []
    for index in range(47):
        try:
            source.read(index)
        except OSError as error:
            lost.append((source.name(index).removeprefix(f"{tmp_path}/"), str(error)))
    names = [name for name, _ in lost]
    assert len(lost) == 4 + 6 and names[0] == f"000003.tar/{table[2][0]}" and names[1:4] == [
        f"000003.tar[{n}]" for n in (3, 4, 5)
    ]  # fmt: skip
    assert names[4:] == [f"000005.tar[{n}]" for n in range(6)] and "is cut short" in lost[0][1]
    far = open_shards(f"{server[0]}/", ShardCache(tmp_path / "c", 1e9))
    far.shards[1] = Shard(f"{server[0]}/gone.tar", 10, 6)
    with pytest.raises(OSError, match=r"gone.tar: the server answers 404: not here"):
        far.read(6)
    begun = len(server[1].asked)
    with pytest.raises(OSError, match="404"):
        far.read(7)
    worker = pickle.loads(pickle.dumps(far))
    with pytest.raises(OSError, match="404"):
        worker.read(8)
    assert len(server[1].asked) == begun, "what is not there is not asked for again and again, by no process"
    far.cache = ShardCache(tmp_path / "c", 1e9)
    with pytest.raises(OSError, match="404"):
        far.read(7)
    assert len(server[1].asked) == begun + 1, "but by the next run"


def test_a_stream_without_manifest_is_looked_into_once(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path
) -> None:
    url, handler = server
    handler.hidden = MANIFEST
    size = max(path.stat().st_size for path in shards.glob("*.tar"))
    first = open_shards(f"{url}/{{000000..000007}}.tar", ShardCache(tmp_path / "c", 2 * size))
    assert contents(first) == contents(open_source([str(shards)]))
    handler.asked.clear()
    again = open_shards(f"{url}/{{000000..000007}}.tar", ShardCache(tmp_path / "c", 2 * size))
    assert handler.asked == [MANIFEST] and again.lengths.tolist() == [6] * 7 + [5]
    with pytest.raises(ValueError, match=r"cannot be fetched: .*000009.tar: the server answers 404"):
        open_shards(f"{url}/000009.tar", ShardCache(tmp_path / "c", 2 * size))


def test_a_stream_wants_a_folder(server: tuple[str, type[Handler]]) -> None:
    with pytest.raises(ValueError, match=r"cannot be cached \(.*/dev/null/x.*set DATA.CACHE_FOLDER"):
        open_shards(f"{server[0]}/", ShardCache(Path("/dev/null/x"), 1e9))


def test_only_a_manifest_that_is_not_there_is_none(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    url, handler = server
    handler.hidden = MANIFEST
    cache = ShardCache(tmp_path, 1e9)
    for handler.refusal in (401, 429):
        for name in (f"{url}/", f"{url}/000001.tar"):
            with pytest.raises(
                ValueError, match=rf"shards.json cannot be fetched: the server answers {handler.refusal}"
            ):
                open_shards(name, cache)
    handler.refusal = 403  # as an object store that does not let list
    with pytest.raises(ValueError, match=r"shards.json cannot be fetched: the server answers 403"):
        open_shards(f"{url}/", cache)
    assert len(open_shards(f"{url}/000001.tar", cache)) == 6
    handler.asked.clear()
    signed = open_shards(f"{url}/000000.tar?signature=a/b", cache)
    assert handler.asked == ["000000.tar"] and len(signed) == 6, "a signature is for one file"


def test_a_shard_that_was_replaced_is_looked_into_again(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.tar").write_bytes((shards / "000000.tar").read_bytes())
    with serve(tmp_path) as (url, _):
        open_shards(f"{url}/a.tar", ShardCache(tmp_path / "c", 1e9))
        (tmp_path / "a.tar").write_bytes((shards / "000007.tar").read_bytes() + bytes(10240))
        (kept,) = (tmp_path / "c").glob("*.tar")
        kept.unlink()
        open_shards(f"{url}/a.tar", ShardCache(tmp_path / "c", 1e9)).read(0)
        assert "replaced since it was first read" in caplog.text
        assert len(open_shards(f"{url}/a.tar", ShardCache(tmp_path / "c", 1e9))) == 5


def test_a_shard_source_travels_to_another_process(shards: Path) -> None:
    source = open_shards(str(shards), ShardCache(shards, 1e9))
    source.read(3)
    assert contents(pickle.loads(pickle.dumps(source))) == contents(source)


def test_the_cache_of_a_stream_must_hold_its_windows(
    server: tuple[str, type[Handler]], shards: Path, tmp_path: Path
) -> None:
    from moco_d2.config import load_cfg
    from moco_d2.engine.loader import build_loader

    options = ["DATASETS.TRAIN", f"('{server[0]}/',)", "SOLVER.IMS_PER_BATCH", "4", "OUTPUT_DIR", str(tmp_path),
               "SEED", "1", "MODEL.DEVICE", "cpu", "DATA.CROP_SIZE", "16", "DATA.SHUFFLE_SHARDS", "3",
               "DATALOADER.NUM_WORKERS", "0"]  # fmt: skip
    size = max(json.loads((shards / MANIFEST).read_bytes())["shards"], key=lambda shard: shard["bytes"])["bytes"]
    with pytest.raises(ValueError, match=r"DATA.CACHE_GB is .* raise DATA.CACHE_GB, or set DATA.SHUFFLE_SHARDS 1"):
        build_loader(load_cfg("", [*options, "DATA.CACHE_GB", str(4 * size / 1e9)]))
    loader = build_loader(load_cfg("", [*options, "DATA.CACHE_GB", str(8 * size / 1e9)]))
    images = open_source([str(shards)]).fingerprint  # the same on a disk
    assert next(iter(loader)).images[0].shape == (4, 3, 16, 16)
    assert loader.sampler.settings() == {
        "fingerprint of the images' names": images, "DATA.LANES": 1, "DATA.SHUFFLE_SHARDS": 3
    }  # fmt: skip
    rows = [Shard("a/0.tar", 10240, 6), Shard("a/1.tar", 10240, 6)]
    changed = [Shard("a/2.tar", 10240, 6), Shard("a/1.tar", 20480, 6), Shard("a/1.tar", 10240, 5)]
    sets = [[rows[0], last] for last in (rows[1], *changed)] + [rows[::-1]]
    assert len({ShardSource(some, ShardCache(tmp_path, 1)).fingerprint for some in sets}) == 5


def test_what_only_has_the_name_of_an_image_neither_blocks_nor_fills_the_memory(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "disk.jpg").touch()
    os.truncate(tmp_path / "disk.jpg", 1 << 40)
    for name, message in (("pipe", "mode p"), ("disk", "1099511627776 bytes")):
        with pytest.raises(OSError, match=f"not an image file: .*{message}"):
            FileSource([str(tmp_path / f"{name}.jpg")]).read(0)


def test_a_list_of_files_is_checked_before_they_are_packed(tmp_path: Path) -> None:
    from moco_d2.commands.shards import read_list

    names = tmp_path / "list.txt"
    (tmp_path / "a.jpg").touch()
    for content, message in (
        (b"\xff\xfe", "is not text"),
        (b"\n", "names no file"),
        (
            b"a.jpg\nb.jpg\n",
            r"names 1 files that do not exist \(\S*b\.jpg, \.\.\.\); relative paths start at the folder",
        ),
    ):
        names.write_bytes(content)
        with pytest.raises(ValueError, match=rf"^--list \S*list\.txt {message}[^\n]*$"):
            read_list(names)
    names.write_text("a.jpg\n")
    assert read_list(names) == [str(tmp_path / "a.jpg")]

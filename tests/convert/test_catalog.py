"""Published weights by name, from a real HTTP server on this machine."""

from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_layouts import LAYOUTS, network, trunk
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager

from moco_d2.config import load_cfg
from moco_d2.convert import SOURCES, read_facts
from moco_d2.convert.catalog import CatalogError, cache_folder, fetch, get_entry, list_entries, listing
from moco_d2.detection.weights import load_weights
from moco_d2.io.provenance import sha256
from moco_d2.model_zoo import get_protocol

ROOT = Path(__file__).parents[2]


class Server(ThreadingHTTPServer):
    """Serves one file under any path, and misbehaves as its attributes say.

    Attributes:
        content: the file.
        version: its ETag.
        ranges: whether it knows range requests.
        breaks: after how many bytes each of the next connections ends.
        code: an error to answer with.
        seen: the Range header of every request so far, None where there was none.
        asked: set by the first request.
        free: answers wait for it.
    """

    daemon_threads = True

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.content, self.version, self.ranges, self.code = content, '"1"', True, 0
        self.breaks: list[int] = []
        self.seen: list[str | None] = []
        self.asked, self.free = threading.Event(), threading.Event()
        self.free.set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/weights.pth.tar"


class Answer(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.seen.append(asked)
        server.asked.set()
        server.free.wait(60)
        if server.code:
            return self.send_error(server.code)
        start, size = 0, len(server.content)
        if asked and server.ranges and self.headers.get("If-Range", server.version) == server.version:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= size:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{size}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.send_header("ETag", server.version)
        self.end_headers()
        end = start + server.breaks.pop(0) if server.breaks else size
        self.wfile.write(server.content[start:end])

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture(scope="module")
def published() -> bytes:
    """A MoCo checkpoint as its authors publish it, at quarter width."""
    torch.save(LAYOUTS["moco-v2-released"].build(network()), buffer := io.BytesIO())
    return buffer.getvalue()


@pytest.fixture
def server(published: bytes) -> Iterator[Server]:
    with Server(published) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield running
        running.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOCO_D2_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def entry(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Write a catalogue of one entry, ``quarter``, whose fields can be changed; return the function that does it."""

    def write(**changes: str) -> None:
        values = {
            "url": server.address,
            "checksum": "md5:" + hashlib.md5(server.content).hexdigest()[:8],
            "title": "a quarter of MoCo v2",
            "source": "moco",
            "recipe": "moco_v2_R50_800ep",
        }
        (tmp_path / "own.yaml").write_text(yaml.safe_dump({"quarter": {**values, **changes}}))

    monkeypatch.setenv("MOCO_D2_CATALOG", str(tmp_path / "own.yaml"))
    write()
    return write


def test_fetched_checked_converted_once_and_kept(server: Server, entry: Any, cache: Path) -> None:
    path = fetch("moco-d2://quarter")
    assert path == cache / "quarter.pth" and server.seen == [None]
    written, source = torch.load(path, weights_only=True), trunk(network())
    assert torch.equal(written["model"]["stem.conv1.weight"], source["conv1.weight"]) and len(written["model"]) == 265
    facts = read_facts(path)
    assert facts is not None and facts.recipe == "moco_v2_R50_800ep" and facts.stem_channels == 16
    assert facts.origin == f"a quarter of MoCo v2, from {server.address}"
    record = json.loads((cache / "quarter.json").read_text())
    assert record["sha256"] == hashlib.sha256(server.content).hexdigest() and record["bytes"] == len(server.content)
    # The second time nothing is asked, not even whether the server is there.
    server.code = 500
    assert fetch("quarter") == path and len(server.seen) == 1
    assert {p.name for p in cache.iterdir()} - {".quarter.lock"} == {"quarter.pth", "quarter.json"}


@pytest.mark.parametrize("change", ["url", "checksum", "title", "converter", "old record", "no record"])
def test_what_is_kept_is_made_anew_when_it_would_be_made_otherwise(
    change: str, server: Server, entry: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("quarter")
    record = cache / "quarter.json"
    if change == "url":
        entry(url=server.address + "?mirror")
    elif change == "checksum":
        entry(checksum="sha256:" + hashlib.sha256(server.content).hexdigest()[:12])
    elif change == "title":
        entry(title="another name")
    elif change == "converter":
        monkeypatch.setattr("moco_d2.convert.catalog.CONVERTER", 1000)
    elif change == "old record":  # of a release that did not note how it converted
        record.write_text(json.dumps({"url": server.address, "bytes": 1, "sha256": "", "fetched": ""}))
    else:
        record.unlink()
    assert "outdated" in listing()
    server.code = 404
    with pytest.raises(
        CatalogError,
        match=r"answers 404 .*has an older file, which would be made differently now \(.*MODEL.WEIGHTS .*quarter\.pth",
    ) as told:
        fetch("quarter")
    assert str(told.value).endswith(f"MODEL.WEIGHTS {cache / 'quarter.pth'}") and "\n" not in str(told.value)
    assert change in str(told.value) or change.endswith("record")
    server.code = 0
    fetch("quarter")
    fetch("quarter")
    assert len(server.seen) == 3 and "outdated" not in listing()
    facts = read_facts(cache / "quarter.pth")
    assert facts is not None and ("another name" in facts.origin) is (change == "title")


def test_a_broken_transfer_is_continued(server: Server, entry: Any) -> None:
    server.breaks = [100_000, 200_000]
    fetch("quarter")
    assert server.seen == [None, "bytes=100000-", "bytes=300000-"]


def test_what_an_interrupted_process_left_is_continued(server: Server, entry: Any, cache: Path) -> None:
    server.breaks = [400_000, 0, 0, 0]
    with pytest.raises(CatalogError, match=r"cannot be downloaded .*0 MB are kept, and the next attempt cont"):
        fetch("quarter")
    assert (cache / "quarter.download.part").stat().st_size == 400_000 and not (cache / "quarter.pth").exists()
    server.seen.clear()
    fetch("quarter")
    assert server.seen == ["bytes=400000-"]


def test_a_file_that_was_only_not_renamed_is_not_fetched_again(server: Server, entry: Any, cache: Path) -> None:
    cache.mkdir()
    (cache / "quarter.download.part").write_bytes(server.content)
    fetch("quarter")
    assert server.seen == [f"bytes={len(server.content)}-"]


@pytest.mark.parametrize("what", ["no ranges", "another version", "longer than the file"])
def test_a_rest_that_does_not_fit_is_fetched_anew(what: str, server: Server, entry: Any, cache: Path) -> None:
    cache.mkdir()
    part = cache / "quarter.download.part"
    part.write_bytes(b"x" * (len(server.content) + 9 if what == "longer than the file" else 5000))
    part.with_name(part.name + ".version").write_text('"0"' if what == "another version" else '"1"')
    server.ranges = what != "no ranges"
    fetch("quarter")  # its checksum is right
    assert server.seen[0] is not None


def test_without_checksum_and_version_nothing_is_continued(server: Server, entry: Any, cache: Path) -> None:
    entry(checksum="")
    cache.mkdir()
    (cache / "quarter.download.part").write_bytes(b"x" * 5000)
    fetch("quarter")
    assert server.seen == [None]


def test_a_wrong_checksum_leaves_nothing(server: Server, entry: Any, cache: Path) -> None:
    entry(checksum="sha256:0123456789")
    with pytest.raises(CatalogError, match="but 0123456789 was published; the download was damaged, or the file was"):
        fetch("quarter")
    assert [p.name for p in cache.iterdir() if not p.name.startswith(".")] == []
    entry()
    fetch("quarter")
    assert server.seen == [None, None]


@pytest.mark.parametrize(("code", "words"), [(404, "answers 404"), (403, "answers 403"), (503, "HTTP Error 503")])
def test_an_answer_that_is_no_file_is_told(code: int, words: str, server: Server, entry: Any) -> None:
    server.code = code
    with pytest.raises(CatalogError) as refusal:
        fetch("quarter")
    assert words in str(refusal.value) or "Service Unavailable" in str(refusal.value)
    assert server.address in str(refusal.value) and "moco-d2 convert FILE" in str(refusal.value)
    assert len(server.seen) == 1


def test_without_a_network_the_way_out_is_told(server: Server, entry: Any) -> None:
    entry(url="http://127.0.0.1:9/weights.pth")  # nobody listens there
    with pytest.raises(CatalogError, match=r"cannot be downloaded \(.*refused\).*Without a network, download the file"):
        fetch("quarter")
    entry(url="http://nowhere.invalid/weights.pth")
    with pytest.raises(CatalogError, match=r"nowhere\.invalid.*cannot be downloaded.*Without a network"):
        fetch("quarter")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"<!DOCTYPE html><html>Sign in</html>", "a web page"), (b"PK\x03\x04" + b"x" * 99, "truncated torch file")],
)
def test_a_file_that_is_no_checkpoint_is_told_and_not_kept(
    content: bytes, words: str, server: Server, entry: Any, cache: Path
) -> None:
    entry(checksum="")
    good, server.content = server.content, content
    with pytest.raises(CatalogError, match=f"downloaded but cannot be converted: .*{words}"):
        fetch("quarter")
    server.content = good
    fetch("quarter")


def test_the_catalogue_says_whose_file_it_is(server: Server, entry: Any) -> None:
    entry(source="simsiam")
    with pytest.raises(CatalogError, match=r"downloaded but cannot be converted: .*not look like --source simsiam"):
        fetch("quarter")
    entry(source="")
    fetch("quarter")


def test_while_another_process_fetches_this_one_waits(
    server: Server, entry: Any, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    # The other one has no Detectron2: it needs none, but for the proof.
    hidden = "import sys; sys.modules['detectron2'] = None"
    code = f"{hidden}; from moco_d2.convert.catalog import fetch; print(fetch('quarter'))"
    server.free.clear()
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other, ThreadPoolExecutor() as pool:
        try:
            assert server.asked.wait(60)  # the other one holds the lock
            with caplog.at_level("INFO"):
                ours = [pool.submit(fetch, "quarter") for _ in range(3)]
                deadline = time.monotonic() + 20
                while (waiting := caplog.text.count("is being downloaded by another process")) < 3:
                    assert time.monotonic() < deadline, f"{waiting} of 3 wait"
                    time.sleep(0.01)
        finally:
            server.free.set()
        assert other.communicate()[0].strip() == str(cache / "quarter.pth")
        assert [future.result() for future in ours] == [cache / "quarter.pth"] * 3
    assert server.seen == [None]


def test_a_detector_starts_from_a_name(server: Server, entry: Any, cache: Path) -> None:
    width = {"STEM_OUT_CHANNELS": 16, "RES2_OUT_CHANNELS": 64, "WIDTH_PER_GROUP": 16}
    opts = [str(word) for key, value in width.items() for word in (f"MODEL.RESNETS.{key}", value)]
    cfg = load_cfg("PascalVOC-Detection/faster_rcnn_R_50_C4_24k", [*opts, "MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    record = load_weights(DetectionCheckpointer(model), cfg, "moco-d2://quarter")
    assert torch.equal(model.backbone.stem.conv1.weight, trunk(network())["conv1.weight"])
    assert record.path == "moco-d2://quarter" and record.sha256 == sha256(cache / "quarter.pth")
    assert record.facts.recipe == "moco_v2_R50_800ep" and server.seen == [None]
    with PathManager.open("moco-d2://quarter", "rb") as file:
        assert hashlib.sha256(file.read()).hexdigest() == record.sha256
    with pytest.raises(ValueError, match=r"moco-d2://quarte could not be downloaded .*similar names: quarter"):
        load_weights(DetectionCheckpointer(model), cfg, "moco-d2://quarte")


def test_the_file_is_the_same_wherever_it_is_made(
    server: Server, entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sha256(fetch("quarter"))
    monkeypatch.setenv("MOCO_D2_CACHE", str(tmp_path / "other"))
    assert sha256(fetch("quarter")) == first


@pytest.mark.parametrize("name", ["quarter.pth", "quarter.json"])
def test_the_user_s_files_in_a_cache_are_kept(name: str, server: Server, entry: Any, cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    (cache / name).write_text("the user's")
    with pytest.raises(
        CatalogError, match=rf"{name}: this file exists, and this command did not write it; .*; set MOCO_D2_CACHE to"
    ):
        fetch("quarter")
    assert (cache / name).read_text() == "the user's" and not server.seen, "nothing was fetched"


def test_a_cache_that_cannot_be_written_is_named(entry: Any, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(CatalogError, match="set MOCO_D2_CACHE to another folder"):
        fetch("quarter")


def test_detectron2s_cache_is_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOCO_D2_CACHE")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "moco_d2"
    monkeypatch.delenv("FVCORE_CACHE")
    assert cache_folder() == Path.home() / ".torch/iopath_cache/moco_d2"


def test_the_shipped_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    entries = list_entries()
    assert entries["moco_v1_200ep"].checksum == "md5:b251726a"
    assert entries["moco_v2_200ep"].checksum == "md5:59fd9945"
    assert entries["moco_v2_800ep"].checksum == "md5:a04e12f8"
    # Reports put results beside published rows by the recipe's name.
    rows = {row.init for row in get_protocol("voc0712_faster_rcnn_R_50_C4_24k").published}
    assert {entries[name].recipe for name in ("moco_v1_200ep", "moco_v2_200ep", "moco_v2_800ep")} <= rows
    assert len({e.url for e in entries.values()}) == len({e.recipe for e in entries.values()}) == len(entries)
    for e in entries.values():
        assert e.url.startswith("package:" if e.name == "sample" else "https://") and e.stated_in, e.name
        assert e.source in {"", *(source.key for source in SOURCES)}, e.name
        # Where a file's name holds a checksum, that is the published one.
        held = re.search(r"[-_]([0-9a-f]{8})\.pth$", e.url)
        assert not held or e.checksum.endswith(held[1]), e.name
    shown = listing()
    assert all(e.name in shown and e.url in shown for e in entries.values()) and "none was opened" in shown


@pytest.mark.parametrize("config", ["faster_rcnn_R_18_C4_quick", "mask_rcnn_R_18_FPN_quick"])
def test_the_backbone_of_the_package_needs_no_network_and_starts_the_small_detectors(
    config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOCO_D2_CACHE", str(tmp_path))
    cfg = load_cfg(f"quick_schedules/{config}", ["MODEL.DEVICE", "cpu"])
    model = build_model(cfg)
    record = load_weights(DetectionCheckpointer(model), cfg, "moco-d2://sample")
    pretrained = torch.load(fetch("sample"))["model"]
    body = getattr(model.backbone, "bottom_up", model.backbone)
    assert torch.equal(body.res4[1].conv2.weight, torch.as_tensor(pretrained["res4.1.conv2.weight"]))
    assert record.facts.recipe == load_cfg("quick_schedules/moco_v2_R18_sample").PROTOCOL


def test_unknown_names_and_broken_lists_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CatalogError, match=r"no published weights 'moco_v2_80ep'; similar names: moco_v2_800ep"):
        get_entry("moco-d2://moco_v2_80ep")
    own = tmp_path / "own.yaml"
    monkeypatch.setenv("MOCO_D2_CATALOG", str(own))
    for text, words in (
        ("{", "not a list of weights"),
        ("- a", "not a list of weights"),
        ("x: {url: u, colour: red}", "unknown ['colour']"),
        ("x: {url: u}", "missing ['recipe', 'title']"),
        ("x: {url: u, title: t, source: s, recipe: r, checksum: 'crc:12'}", "must look like md5:a04e12f8"),
        ("../x: {url: u, title: t, source: s, recipe: r}", "may have letters"),
    ):
        own.write_text(text)
        with pytest.raises(CatalogError) as refusal:
            list_entries()
        assert words in str(refusal.value)
    monkeypatch.setenv("MOCO_D2_CATALOG", str(tmp_path / "nothing.yaml"))
    with pytest.raises(CatalogError, match=r"nothing\.yaml"):
        list_entries()

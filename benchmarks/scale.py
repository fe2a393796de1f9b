"""Benchmark of sets of millions of images: listing, opening, sampling, packing and reading."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import shutil
import statistics
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import alternate, compare, cpu_seconds, in_new_process, memory
from moco_d2.data import EpochSampler, ImageSource, ShardCache, list_folder, open_source
from moco_d2.data.listing import EXTENSIONS, Listing
from moco_d2.data.packing import pack
from moco_d2.data.shard_cache import Shard
from moco_d2.data.shards import MANIFEST, open_shards, write_manifest
from moco_d2.io.paths import cache_folder

# MoCo's largest published run: 64 processes, each with a stream of its own, and docs/scale.md's windows.
BATCH, RANKS, STREAMS, WINDOW = 1024, 64, 64, 2
FAR, COMPARED = 1_000_003, range(500_000, 500_005)  # steps
IMAGE = 110_000  # bytes, as ImageNet's
PACKED = 1000  # images in a shard, the default of moco-d2 shards


@dataclass(frozen=True)
class Sizes:
    """How large the sets are.

    Attributes:
        files: images listed in folders.
        folders: of them.
        shards: of the remote set.
        samples: images in each of those.
        images: packed, and read from files and from shards.
    """

    files: int
    folders: int
    shards: int
    samples: int
    images: int


def measure(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Measure everything, in a temporary folder below $TMPDIR."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["MOCO_D2_CACHE"] = f"{folder}/cache"
        found = listing(folder / "tree", sizes, repeats)
        with served(folder / "remote", sizes) as url:
            found |= opening(url, folder / "fetched", repeats)
            lengths = open_shards(url, ShardCache(folder / "fetched", float("inf"))).lengths
        found |= sampling(lengths, repeats)
        found |= packing(folder / "images", folder / "packed", sizes.images, repeats)
        return found | reading(folder / "images", folder / "packed", repeats)


def rows(works: Mapping[str, Callable[[], object]], repeats: int, unit: str, per: int = 1) -> list[dict[str, Any]]:
    """Time works in turns, in s, ms or us of CPU time, divided by ``per``; the first one is the reference."""
    factor = {"s": 1, "ms": 1e3, "us": 1e6}[unit] / per
    times = {name: [factor * one for one in taken] for name, taken in alternate(works, repeats, warm_up=1).items()}
    return as_cpu(compare(times), unit)


def as_cpu(compared: list[dict[str, Any]], unit: str) -> list[dict[str, Any]]:
    """Rename the column of times to CPU times with their unit."""
    return [{f"CPU {unit}" if key == "seconds" else key: value for key, value in row.items()} for row in compared]


def listing(root: Path, sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Walk folders of (empty) files, list them for the first time, and from the cached listing."""
    for number in range(sizes.folders):
        (root / f"n{number:06d}").mkdir(parents=True)
    for number in range(sizes.files):
        folder = root / f"n{number % sizes.folders:06d}"
        os.close(os.open(folder / f"{folder.name}_{number:08d}.JPEG", os.O_CREAT))
    time.sleep(2.1)  # a folder that changed within two seconds is read again

    def anew() -> None:
        shutil.rmtree(cache_folder() / "listings", ignore_errors=True)
        assert Listing(root).files == expected

    def cached() -> None:
        assert Listing(root).files == expected

    expected = walk(root)
    works = {
        "os.walk, sorted": lambda: walk(root),
        "first listing": anew,
        "cached listing": cached,
        "the whole source, from the cached listing": lambda: open_source([str(root)]),
    }
    held = len(pickle.dumps(open_source([str(root)]))) / 2**20
    return {
        f"listing {sizes.files} files in {sizes.folders} folders": rows(works, repeats, "s"),
        "memory of that source": f"{held:.1f} MiB",
    }


def walk(root: Path) -> list[str]:
    """Return the images below a folder, found by ``os.walk``."""
    found = []
    for parent, folders, names in os.walk(root):
        folders.sort()
        found += [os.path.join(parent, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    return found


class Quiet(SimpleHTTPRequestHandler):
    """Serves a folder without a log."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def served(folder: Path, sizes: Sizes) -> Iterator[str]:
    """Write a ``shards.json`` without its shards, and yield its address while it is served."""
    shards = [Shard(f"{n:06d}.tar", sizes.samples * IMAGE, sizes.samples) for n in range(sizes.shards)]
    write_manifest(folder, shards, "made up")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/"
        finally:
            http.shutdown()
            thread.join()


def opening(url: str, fetched: Path, repeats: int) -> dict[str, Any]:
    """Open the remote set, each time in a new process; parsing its ``shards.json`` is the reference."""
    open_shards(url, ShardCache(fetched, float("inf")))
    (manifest,) = fetched.glob(f"*-{MANIFEST}")
    works = {
        "json.loads of its shards.json": partial(_parse, manifest),
        "opened over HTTP": partial(_open, url, fetched),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    held: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            cpu, size = in_new_process(["moco_d2.data"], work)
            times[name].append(cpu)
            held[name].append(size / 2**20)
    found = [{**row, "MiB it holds": statistics.median(held[row["what"]])} for row in as_cpu(compare(times), "s")]
    return {f"a remote set, its shards.json of {manifest.stat().st_size / 1e6:.1f} MB": found}


def _parse(manifest: Path) -> tuple[float, float]:
    return _costs(lambda: json.loads(manifest.read_bytes()))


def _open(url: str, fetched: Path) -> tuple[float, float]:
    return _costs(lambda: open_shards(url, ShardCache(fetched, float("inf"))))


def _costs(work: Callable[[], object]) -> tuple[float, float]:
    """Return the CPU seconds of work, and the resident memory in bytes that its result takes."""
    before, kept = memory("VmRSS"), []
    seconds = cpu_seconds(lambda: kept.append(work()))
    return seconds, memory("VmRSS") - before


def sampling(lengths: Any, repeats: int) -> dict[str, Any]:
    """Time a rank's first batch at step 0 and far on, and count the shards that ranks read."""

    def first(start: int) -> None:
        next(iter(sampler(lengths, RANKS - 1, RANKS, start)))

    def batches(world: int) -> list[list[tuple[int, int]]]:
        ranks = [iter(sampler(lengths, rank, world, COMPARED.start)) for rank in range(world)]
        return [[*itertools.chain.from_iterable(map(next, ranks))] for _ in COMPARED]

    plans = [sampler(lengths).plan(0, stream) for stream in range(STREAMS)]
    read = [{shard for window in plan for shard, *_ in window} for plan in plans]
    alone, found = batches(1), []
    for world in (1, 8, 32, RANKS):
        theirs = [
            set[int]().union(*read[rank * STREAMS // world : (rank + 1) * STREAMS // world]) for rank in range(world)
        ]
        readers = Counter(itertools.chain.from_iterable(theirs))
        found.append(
            {
                "processes": world,
                "each reads at least": min(map(len, theirs)),
                "at most": max(map(len, theirs)),
                "read by several": sum(count > 1 for count in readers.values()),
                "read by none": len(lengths) - len(readers),
                "batches as of one process": batches(world) == alone,
            }
        )
    works = {f"at step {start}": partial(first, start) for start in (0, FAR)}
    shape = f"{len(lengths)} shards, {lengths.sum()} images; batch {BATCH}, {STREAMS} streams, windows of {WINDOW}"
    return {
        f"a rank's first batch ({shape})": rows(works, repeats, "ms"),
        f"shards of an epoch, and batches {COMPARED.start} to {COMPARED.stop - 1}": found,
    }


def sampler(lengths: Any, rank: int = 0, world: int = 1, start: int = 0) -> EpochSampler:
    """Return the order of the large set in a process."""
    return EpochSampler(lengths, BATCH, 0, rank, world, start, WINDOW, STREAMS)


def packing(images: Path, packed: Path, count: int, repeats: int) -> dict[str, Any]:
    """Pack files into shards; Python's tarfile alone is the reference."""
    images.mkdir()
    for number in range(count):
        (images / f"{number:06d}.jpg").write_bytes(os.urandom(IMAGE))
    files = list_folder(images)

    def plain() -> None:
        with tarfile.open(images.with_name("plain.tar"), "w") as tar:
            for file in files:
                tar.add(file, os.path.basename(file))

    def ours() -> None:
        shutil.rmtree(packed, ignore_errors=True)
        assert sum(one.shard.samples for one in pack(files, images, packed, PACKED, 0)) == count

    works = {"tarfile alone": plain, "shards: shuffled, on the disk, counted": ours}
    return {f"making shards of {count} images of {IMAGE} bytes, an image": rows(works, repeats, "ms", count)}


def reading(images: Path, packed: Path, repeats: int) -> dict[str, Any]:
    """Read images from files and from shards, and the first images of unopened shards."""
    files, shards = open_source([str(images)]), open_source([str(packed)])
    order = np.random.default_rng(0).permutation(len(files)).tolist()
    unopened, firsts = pickle.dumps(shards), (np.cumsum(shards.lengths) - shards.lengths).tolist()

    def read(source: ImageSource, chosen: list[int]) -> list[bytes]:
        return [source.read(index) for index in chosen]

    def read_firsts() -> None:
        read(pickle.loads(unopened), firsts)

    def read_firsts_anew() -> None:
        shutil.rmtree(cache_folder() / "indexes", ignore_errors=True)
        read_firsts()

    assert sorted(read(files, order)) == sorted(read(shards, order))
    all_of_them = {"from a file": partial(read, files, order), "from a shard": partial(read, shards, order)}
    first_ones = {"opened in an earlier run": read_firsts, "never opened": read_firsts_anew}
    return {
        "reading an image": rows(all_of_them, repeats, "us", len(order)),
        f"reading the first image of a shard of {shards.lengths[0]}": rows(first_ones, repeats, "ms", len(firsts)),
    }

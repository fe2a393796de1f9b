"""Where images come from: folders of any shape, names in Detectron2's DatasetCatalog, and tar shards."""

from __future__ import annotations

import difflib
import logging
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from detectron2.data import DatasetCatalog, MetadataCatalog

from moco_d2.builtin_sets import DATASETS
from moco_d2.data.listing import EXTENSIONS, Listing, Paths, cache_folder, counted, fingerprint
from moco_d2.data.mistaken import mistaken
from moco_d2.data.shard_cache import ShardCache
from moco_d2.data.shards import is_shards, neighbours, open_shards
from moco_d2.io.paths import expand_variable

logger = logging.getLogger(__name__)

# Part of the number of images from which files that are left out are warned of.
MANY_LEFT_OUT = 0.1
# Bytes from which a file is taken for something else, rather than read into memory.
LARGEST_FILE = 1 << 30
# Beside shards, files are shuffled as if so many lay in one.
FILES_IN_A_SPAN = 1000


class Source(Protocol):
    """Encoded image files by number.

    Attributes:
        spans: number of images in each part that lies together (a shard); a set of files is one part.
        stream_sizes: bytes of each part that comes over a network; empty for what lies on a disk.
        unreadable: (path, error) of what was found unreadable when the images were listed.
        fingerprint: of what number means which image, wherever the set lies.
    """

    spans: npt.NDArray[np.int64]
    stream_sizes: list[int]
    unreadable: list[tuple[str, str]]
    fingerprint: int

    def __len__(self) -> int:
        """Return how many there are."""

    def name(self, index: int) -> str:
        """Return what a person calls the image: its path."""

    def read(self, index: int) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: it cannot be read.
        """

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Hear which spans are read from now on, and which after those."""


class FileSource:
    """Image files, by their paths."""

    def __init__(self, files: Sequence[str], unreadable: Sequence[tuple[str, str]] = ()) -> None:
        self.files, self.unreadable = Paths(files), list(unreadable)
        self.spans, self.stream_sizes = np.array([len(files)], np.int64), list[int]()
        self.fingerprint = self.files.fingerprint

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path."""
        return self.files[index]

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        # Opening a pipe that somebody named a.jpg would wait for ever.
        with open(self.files[index], "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                raise OSError(f"not an image file: mode {stat.filemode(status.st_mode)}, {status.st_size} bytes")
            return file.read()

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Do nothing: files are there."""


class JoinedSource:
    """Several sources as one, in their order."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.parts = list(parts)
        spans = [_in_spans(part) if isinstance(part, FileSource) else part.spans for part in parts]
        self.spans = np.concatenate(spans)
        self.stream_sizes = [size for part in parts for size in part.stream_sizes]
        self.unreadable = [problem for part in parts for problem in part.unreadable]
        self.fingerprint = fingerprint(repr([part.fingerprint for part in parts]).encode())
        self._ends = np.cumsum([len(part) for part in parts])
        self._span_ends = np.cumsum([len(part) for part in spans])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _where(self, index: int) -> tuple[Source, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - int(self._ends[number]) + len(self.parts[number])

    def name(self, index: int) -> str:
        """Return the part's name of the image."""
        part, position = self._where(index)
        return part.name(position)

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        part, position = self._where(index)
        return part.read(position)

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Tell the streamed parts."""
        begin = 0
        for part, end in zip(self.parts, self._span_ends.tolist(), strict=True):
            if part.stream_sizes:
                part.prepare(*([span - begin for span in spans if begin <= span < end] for spans in (now, ahead)))
            begin = end


def _in_spans(source: FileSource) -> npt.NDArray[np.int64]:
    return np.diff(np.append(np.arange(0, len(source), FILES_IN_A_SPAN), len(source)))


def open_source(names: Sequence[str], cache: ShardCache | None = None) -> Source:
    """Open the images of data sets.

    Args:
        names: each a folder or a registered name (see :func:`list_images`), or shards (see
            :func:`~moco_d2.data.shards.open_shards`).
        cache: where streamed shards are kept.

    Raises:
        ValueError: a name that is none of these, or has no images; the message says what was looked for.
    """
    cache = cache or ShardCache(cache_folder() / "shards", float("inf"))
    files = [name for name in names if name in DatasetCatalog or not is_shards(name)]
    parts: list[Source] = [open_shards(name, cache) for name in dict.fromkeys(names) if name not in files]
    if files or not parts:
        unreadable: list[tuple[str, str]] = []
        parts.insert(0, FileSource(list_images(files, unreadable), unreadable))
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def list_images(sources: Sequence[str], unreadable: list[tuple[str, str]] | None = None) -> list[str]:
    """List the image files of datasets, without duplicates, in a fixed order.

    Args:
        sources: each a folder (flat, or an ImageFolder tree: subfolders are searched, labels ignored) or a name
            registered in DatasetCatalog (``imagenet_train``, ``coco_2017_train``, ``voc_2007_trainval``, ...).
        unreadable: takes (folder, error) of subfolders that cannot be read.

    Raises:
        ValueError: no source, a name that is neither, or a source without images; the message says what was looked for.
    """
    if not sources:
        raise ValueError("DATASETS.TRAIN is empty; name a folder of images or a registered dataset")
    files: dict[str, None] = {}
    for source in sources:
        files.update(dict.fromkeys(_list_one(source, unreadable)))
    return list(files)


def _list_one(source: str, unreadable: list[tuple[str, str]] | None) -> list[str]:
    if source in DatasetCatalog:
        return _list_registered(source)
    if os.path.isdir(source):
        return list_folder(source, unreadable)
    what = mistaken(source) or ("a file that is no tar: name a folder of pictures" if os.path.isfile(source) else "")
    if what:
        raise ValueError(f"DATASETS.TRAIN names {source!r}, {what}")
    near = difflib.get_close_matches(source, DatasetCatalog.list(), n=3)
    hint = f"; nearest names: {', '.join(near)}" if near else neighbours(source)
    raise ValueError(
        f"DATASETS.TRAIN names {source!r}, which is neither a folder, shards, nor a registered dataset{hint}"
    )


def _list_registered(name: str) -> list[str]:
    # A user's own data set lists its pictures without its labels, which pretraining does not need.
    list_pictures = MetadataCatalog.get(name).get("list_pictures")
    try:
        if list_pictures:
            return list(list_pictures())
        records = DatasetCatalog.get(name)
    except (OSError, AssertionError) as error:
        root = os.environ.get("DETECTRON2_DATASETS", "datasets")
        raise ValueError(
            f"dataset {name!r} is registered but its files are not there: {error}. "
            f"Datasets are looked for under $DETECTRON2_DATASETS ({root}); datasets/README.md shows the layout"
        ) from error
    if not records:
        raise ValueError(f"dataset {name!r} has no images")
    return [record["file_name"] for record in records]


def list_folder(folder: str | os.PathLike[str], unreadable: list[tuple[str, str]] | None = None) -> list[str]:
    """List the images in a folder and its subfolders, sorted, and log what else is there.

    Raises:
        ValueError: there are none.
    """
    listing = Listing(folder)
    if unreadable is not None:
        unreadable += listing.unreadable
    left_out = sum(listing.others.values())
    if not listing.files:
        refused = "".join(f"; cannot read {path}: {error}" for path, error in listing.unreadable[:1])
        there = f"found {left_out} other file(s) ({counted(listing.others)})" if left_out else "found nothing"
        raise ValueError(
            f"no images in {os.fspath(folder)} or its subfolders: looked for {' '.join(EXTENSIONS)} and "
            f"{there}{refused}; tar shards are named as FOLDER/*.tar"
        )
    if left_out:
        many = left_out - listing.others["hidden"] > MANY_LEFT_OUT * len(listing.files)
        logger.log(
            logging.WARNING if many else logging.INFO,
            "left out of %s, as they have no picture's extension or are hidden: %s", folder, counted(listing.others),
        )  # fmt: skip
    return listing.files


def _imagenet_train() -> list[dict[str, str]]:
    root = Path(expand_variable("DETECTRON2_DATASETS", "datasets"), *DATASETS["imagenet_train"].needed)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}")
    return [{"file_name": name} for name in list_folder(root)]


if "imagenet_train" not in DatasetCatalog:
    DatasetCatalog.register("imagenet_train", _imagenet_train)
    MetadataCatalog.get("imagenet_train").set(evaluator_type="none")

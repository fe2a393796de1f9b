"""Image sources: folders of any shape, names in Detectron2's DatasetCatalog, and tar shards."""

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
from moco_d2.data.listing import EXTENSIONS, Listing, Paths, counted, fingerprint
from moco_d2.data.mistaken import mistaken
from moco_d2.data.shard_cache import ShardCache
from moco_d2.data.shards import is_shards, nearest_paths, open_shards
from moco_d2.io.paths import cache_folder, expand_variable

logger = logging.getLogger(__name__)

# If more files than this part of the images are left out of a folder, it is a warning.
MANY_LEFT_OUT = 0.1
# Larger files (in bytes) are not read into memory: they are not images.
LARGEST_FILE = 1 << 30
# In a set that also has shards, so many files are shuffled as one shard.
FILES_IN_A_SHARD = 1000


class ImageSource(Protocol):
    """Encoded image files by number.

    Attributes:
        lengths: number of images in each shard; a set of files is one shard.
        remote_sizes: bytes of each shard that comes over the network (0: unknown); empty for a set on a disk.
        unreadable: (path, error) of the folders and shards that could not be read when the images were listed.
        fingerprint: of the images' names in their order; it stays when the set is moved.
    """

    lengths: npt.NDArray[np.int64]
    remote_sizes: list[int]
    unreadable: list[tuple[str, str]]
    fingerprint: int

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, index: int) -> str:
        """Return the image's path, for messages."""

    def read(self, index: int) -> bytes:
        """Return the file's bytes.

        Raises:
            OSError: it cannot be read.
        """

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Take the numbers of the shards that are read from now on, and of those that come next."""


class FileSource:
    """Image files, by their paths."""

    def __init__(self, files: Sequence[str], unreadable: Sequence[tuple[str, str]] = ()) -> None:
        self.files, self.unreadable = Paths(files), list(unreadable)
        self.lengths, self.remote_sizes = np.array([len(files)], np.int64), list[int]()
        self.fingerprint = self.files.fingerprint

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        """Return the path."""
        return self.files[index]

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        # Without O_NONBLOCK, opening a pipe that is named a.jpg would wait for ever.
        with open(self.files[index], "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
                raise OSError(f"not an image file: mode {stat.filemode(status.st_mode)}, {status.st_size} bytes")
            return file.read()

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Do nothing: files need no preparation."""


class JoinedSource:
    """Several sources as one, in their order."""

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        self.parts = list(parts)
        lengths = [_as_shards(part) if isinstance(part, FileSource) else part.lengths for part in parts]
        self.lengths = np.concatenate(lengths)
        self.remote_sizes = [size for part in parts for size in part.remote_sizes]
        self.unreadable = [problem for part in parts for problem in part.unreadable]
        self.fingerprint = fingerprint(repr([part.fingerprint for part in parts]).encode())
        self._ends = np.cumsum([len(part) for part in parts])
        self._shard_ends = np.cumsum([len(part) for part in lengths])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _where(self, index: int) -> tuple[ImageSource, int]:
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.parts[number], index - int(self._ends[number]) + len(self.parts[number])

    def name(self, index: int) -> str:
        """Return the image's name in its source."""
        part, position = self._where(index)
        return part.name(position)

    def read(self, index: int) -> bytes:
        """Return the file's bytes."""
        part, position = self._where(index)
        return part.read(position)

    def prepare(self, now: list[int], ahead: list[int]) -> None:
        """Pass the numbers on to the sources with remote shards."""
        begin = 0
        for part, end in zip(self.parts, self._shard_ends.tolist(), strict=True):
            if part.remote_sizes:
                part.prepare(*([n - begin for n in numbers if begin <= n < end] for numbers in (now, ahead)))
            begin = end


def _as_shards(source: FileSource) -> npt.NDArray[np.int64]:
    return np.diff(np.append(np.arange(0, len(source), FILES_IN_A_SHARD), len(source)))


def open_source(names: Sequence[str], cache: ShardCache | None = None) -> ImageSource:
    """Open the images of data sets.

    Args:
        names: each a folder or a registered name (see :func:`list_images`), or shards (see
            :func:`~moco_d2.data.shards.open_shards`).
        cache: for remote shards.

    Raises:
        ValueError: a name that is none of these, or has no images; the message says what was searched for.
    """
    cache = cache or ShardCache(cache_folder() / "shards", float("inf"))
    files = [name for name in names if name in DatasetCatalog or not is_shards(name)]
    parts: list[ImageSource] = [open_shards(name, cache) for name in dict.fromkeys(names) if name not in files]
    if files or not parts:
        unreadable: list[tuple[str, str]] = []
        parts.insert(0, FileSource(list_images(files, unreadable), unreadable))
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def list_images(sources: Sequence[str], unreadable: list[tuple[str, str]] | None = None) -> list[str]:
    """List the image files of data sets, without duplicates, in a fixed order.

    Args:
        sources: each a folder (flat, or an ImageFolder tree: subfolders are searched, labels ignored) or a name
            registered in DatasetCatalog (``imagenet_train``, ``coco_2017_train``, ``voc_2007_trainval``, ...).
        unreadable: a list to which (folder, error) of unreadable subfolders is added.

    Raises:
        ValueError: no source, a name that is neither, or a source without images; the message says what was searched
            for.
    """
    if not sources:
        raise ValueError("DATASETS.TRAIN is empty; name a folder of images or a registered data set")
    files: dict[str, None] = {}
    for source in sources:
        files.update(dict.fromkeys(_list_one(source, unreadable)))
    return list(files)


def _list_one(source: str, unreadable: list[tuple[str, str]] | None) -> list[str]:
    if source in DatasetCatalog:
        return _list_registered(source)
    if os.path.isdir(source):
        return list_folder(source, unreadable)
    what = mistaken(source) or ("a file that is not a tar: name a folder of pictures" if os.path.isfile(source) else "")
    if what:
        raise ValueError(f"DATASETS.TRAIN names {source!r}, which is {what}")
    near = difflib.get_close_matches(source, DatasetCatalog.list(), n=3)
    hint = f"; nearest names: {', '.join(near)}" if near else nearest_paths(source)
    raise ValueError(
        f"DATASETS.TRAIN names {source!r}, which is neither a folder, nor shards, nor a registered data set{hint}"
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
            f"the files of the data set {name!r} are missing: {error}. Data sets are expected under "
            f"$DETECTRON2_DATASETS ({root}); datasets/README.md shows the layout"
        ) from error
    if not records:
        raise ValueError(f"the data set {name!r} has no images")
    return [record["file_name"] for record in records]


def list_folder(folder: str | os.PathLike[str], unreadable: list[tuple[str, str]] | None = None) -> list[str]:
    """List the images in a folder and its subfolders, sorted, and log which other files there are.

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
            f"no images in {os.fspath(folder)} or its subfolders: searched for {' '.join(EXTENSIONS)} and "
            f"{there}{refused}; if it holds tar shards, name them as FOLDER/*.tar"
        )
    if left_out:
        many = left_out - listing.others["hidden"] > MANY_LEFT_OUT * len(listing.files)
        logger.log(
            logging.WARNING if many else logging.INFO,
            "left out of %s, because hidden or without an image's extension: %s", folder, counted(listing.others),
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

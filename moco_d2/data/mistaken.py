"""Advice on names in DATASETS.TRAIN that are not data sets, recognised by their extension."""

from __future__ import annotations

import os

from moco_d2.data.listing import EXTENSIONS

_COMPRESSED_TAR = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tbz", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4")
_ARCHIVE = (".zip", ".rar", ".7z", ".gz", ".bz2", ".xz", ".zst")
_VIDEO = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".mpg", ".mpeg", ".m4v", ".wmv", ".flv", ".mts")
_LABELS = (".json", ".xml", ".jsonl")
_TABLE = (
    ".txt", ".csv", ".tsv", ".lst", ".list", ".parquet", ".arrow", ".npy", ".npz", ".pkl", ".pickle", ".mat", ".h5",
    ".hdf5", ".lmdb", ".mdb", ".tfrecord", ".tfrecords", ".rec", ".beton", ".db", ".sqlite", ".xlsx",
)  # fmt: skip
_ADVICE = (
    (
        _COMPRESSED_TAR,
        "a compressed tar, from which single pictures cannot be read: unpack it (tar -xf {base} -C FOLDER) and name "
        "FOLDER, or decompress it to a plain .tar (gunzip, bunzip2, unxz or unzstd) and name that",
    ),
    (_ARCHIVE, "an archive: unpack it and name the folder"),
    (_VIDEO, "a video: write its frames as pictures (ffmpeg -i {base} FOLDER/%06d.png) and name FOLDER"),
    (_LABELS, "a file of labels: name the folder of its pictures, or a data set of DATASETS.CUSTOM"),
    (_TABLE, "a list or table: name the folder of its pictures; several folders are given one after the other"),
    (EXTENSIONS, "one picture, or a pattern of pictures: name the folder that they are in"),
)


def mistaken(name: str) -> str:
    """Return what a path or address is, if by its extension it cannot be a data set, with the remedy; else nothing."""
    path = name.partition("?")[0].partition("#")[0] if "://" in name else name
    base = os.path.basename(path)
    return next((advice.format(base=base) for ends, advice in _ADVICE if base.lower().endswith(ends)), "")

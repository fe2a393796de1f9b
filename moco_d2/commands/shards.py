"""Pack a folder of images into tar shards in WebDataset's format.

    moco-d2 shards datasets/imagenet/train shards/imagenet
    moco-d2 shards datasets/imagenet/train shards/imagenet --shard-size 10000
    moco-d2 shards --index shards/of/another/program        # only shards.json: sizes and numbers of images

Disks and networks read few large files faster than many small ones. After an interruption the same command continues.
DATASETS.TRAIN then names the folder of the shards, or its address: docs/scale.md.
"""

from __future__ import annotations

import argparse
import datetime
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, and pack or index."""
    parser = cli.new_parser("shards", __doc__)
    parser.add_argument("folder", type=cli.path, nargs="?", help="images, in any number of subfolders")
    parser.add_argument("out", type=cli.path, nargs="?", help="folder for the shards")
    parser.add_argument(
        "--list", type=cli.path, metavar="FILE",
        help="instead of FOLDER: a file with one path a line, relative to the file's own folder",
    )  # fmt: skip
    parser.add_argument("--shard-size", type=int, default=1000, help="images in a shard (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle; -1 keeps the order (default: %(default)s)")
    parser.add_argument("--index", type=cli.path, metavar="DIR", help="write shards.json for the shards in a folder")
    args = parser.parse_args(argv)
    if args.list and args.out is None:
        args.folder, args.out = None, args.folder
    if (args.index is None) == (args.out is None) or (args.index is None and not (args.folder or args.list)):
        parser.error("name FOLDER and OUT, or --list FILE and OUT, or --index DIR")
    logging.basicConfig(format="%(message)s")
    if args.index:
        from moco_d2.data.packing import index

        print(f"{args.index}: {index(args.index)} images")
    else:
        pack_images(args)


def pack_images(args: argparse.Namespace) -> None:
    """Pack the images, with progress."""
    if args.shard_size < 1:
        raise ValueError(f"--shard-size is {args.shard_size}; it must be at least 1")

    from moco_d2.data import list_folder
    from moco_d2.data.packing import pack

    root = args.list.parent if args.list else args.folder
    files = read_list(args.list) if args.list else list_folder(root)
    began = reported = time.monotonic()
    done = written = lost = size = 0
    for packed in pack(files, root, args.out, args.shard_size, args.seed):
        images = packed.shard.samples + packed.unreadable
        done, lost, size = done + images, lost + packed.unreadable, size + packed.shard.bytes
        written += 0 if packed.kept else images
        if time.monotonic() - reported > 2 or done == len(files):
            reported = time.monotonic()
            rate = written / (reported - began)
            eta = datetime.timedelta(seconds=round((len(files) - done) / rate)) if rate else "unknown"
            print(f"{done} of {len(files)} images, {size / 1e9:.2f} GB, {rate:.0f} images/s, eta {eta}", flush=True)
    print(
        f"{args.out}: {done - lost} images in {-(-len(files) // args.shard_size)} shards"
        + f", {lost} unreadable" * (lost > 0)
    )


def read_list(path: Path) -> list[str]:
    """Return the files that a list names, one a line; relative paths start at the list's own folder.

    Raises:
        ValueError: the list is not text, is empty, or names files that do not exist.
    """
    try:
        files = [str(path.parent / line) for line in path.read_text().splitlines() if line]
    except UnicodeDecodeError as error:
        raise ValueError(f"--list {path} is not text ({error}); it must name one file a line") from error
    missing = [file for file in files if not os.path.isfile(file)]
    if missing or not files:
        found = f"names {len(missing)} files that do not exist ({missing[0]}, ...)" if missing else "names no file"
        raise ValueError(f"--list {path} {found}; relative paths start at the folder of the list")
    return files

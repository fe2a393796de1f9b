#!/usr/bin/env python3
"""Pack a folder of images into tar shards; the same as ``moco-d2 shards``.

    tools/make_shards.py datasets/imagenet/train shards/imagenet

``--help`` says more.
"""

from moco_d2.commands import cli
from moco_d2.commands.shards import main

if __name__ == "__main__":
    cli.guard(main)

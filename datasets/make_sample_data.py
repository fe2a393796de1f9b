#!/usr/bin/env python3
"""Draw a small $DETECTRON2_DATASETS root for every shipped config: ``datasets/make_sample_data.py OUT``."""

from moco_d2.exits import guard
from moco_d2.samples.make import main

if __name__ == "__main__":
    guard(main)

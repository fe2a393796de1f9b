"""Images to views: sources, augmentation recipes, the loader. Importing it registers ``imagenet_train``."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)
from moco_d2.data.augment import RECIPES, Recipe, build_recipe
from moco_d2.data.backends import BACKENDS, Backend, build_backend
from moco_d2.data.loader import ViewDataset, ViewLoader
from moco_d2.data.sampler import EpochSampler, stream_seed
from moco_d2.data.shard_cache import ShardCache
from moco_d2.data.skipped import Skip, SkipLog
from moco_d2.data.sources import FileSource, Source, list_folder, list_images, open_source
from moco_d2.io.pictures import read_image

__all__ = [
    "BACKENDS",
    "RECIPES",
    "Backend",
    "EpochSampler",
    "FileSource",
    "Recipe",
    "ShardCache",
    "Skip",
    "SkipLog",
    "Source",
    "ViewDataset",
    "ViewLoader",
    "build_backend",
    "build_recipe",
    "list_folder",
    "list_images",
    "open_source",
    "read_image",
    "stream_seed",
]

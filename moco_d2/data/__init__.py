"""Images to views: sources, augmentations, backends, the loader. Importing it registers ``imagenet_train``."""

from moco_d2 import host  # noqa: F401  (first: Detectron2 must be there)
from moco_d2.data import recipes  # noqa: F401  (registers the augmentations)
from moco_d2.data.augment import AUGMENTATIONS, Augmentation, build_augmentation, register_augmentation
from moco_d2.data.backends import BACKENDS, Backend, build_backend
from moco_d2.data.loader import ViewDataset, ViewLoader
from moco_d2.data.operations import OPERATIONS, Operation
from moco_d2.data.sampler import EpochSampler
from moco_d2.data.shard_cache import ShardCache
from moco_d2.data.skipped import Skip, SkipLog
from moco_d2.data.sources import FileSource, ImageSource, list_folder, list_images, open_source
from moco_d2.io.pictures import read_image

__all__ = [
    "AUGMENTATIONS",
    "BACKENDS",
    "OPERATIONS",
    "Augmentation",
    "Backend",
    "EpochSampler",
    "FileSource",
    "ImageSource",
    "Operation",
    "ShardCache",
    "Skip",
    "SkipLog",
    "ViewDataset",
    "ViewLoader",
    "build_augmentation",
    "build_backend",
    "list_folder",
    "list_images",
    "open_source",
    "read_image",
    "register_augmentation",
]

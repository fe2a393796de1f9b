"""Training batches that depend only on the seed and the place in the run, so that a run resumes at any batch.

Detectron2's own loader cannot resume: it does not save the state of its random generators or its half-filled batches,
and the pictures of a batch depend on the number of workers. Here the main process draws indices from Detectron2's
samplers and groups them by shape. Workers only read and augment, each picture with a seed of its own.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, build_detection_train_loader
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from moco_d2.detection.mapper import PictureMapper
from moco_d2.detection.missing import missing_files
from moco_d2.detection.subsets import training_records
from moco_d2.io import timeouts
from moco_d2.io.pictures import naming, picture_size
from moco_d2.running.seeds import seeded
from moco_d2.seeding import stream_seed

Record = dict[str, Any]


class SeededPictures(Dataset[Record]):
    """Pictures as the model takes them. A picture's augmentation depends only on (seed, number of the draw)."""

    def __init__(self, records: Sequence[Record], mapper: Callable[[Record], Record], seed: int) -> None:
        self.records = DatasetFromList(records, copy=False)
        self.mapper, self.seed = mapper, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int]) -> Record:
        """Read and augment the picture of a key (number of the draw, index)."""
        draw, index = key
        with seeded(stream_seed(self.seed, draw)):
            return self.mapper(self.records[index])


class BatchStream(Sampler[list[tuple[int, int]]]):
    """Endless batches of keys (number of the draw, index) for one process; all pictures of a batch are of one group.

    Batches are filled as in Detectron2's ``AspectRatioGroupedDataset``: each group collects pictures until they fill a
    batch. To start later, earlier batches are drawn and dropped, which takes a second for a million pictures.

    Attributes:
        start: number of the first batch.
    """

    def __init__(
        self, draws: Iterable[int], batch: int, groups: Sequence[int] | np.ndarray, rank: int = 0, world_size: int = 1
    ) -> None:
        """Set up.

        Args:
            draws: this process's indices, every ``world_size``-th of a common stream; each iteration starts again.
            batch: number of pictures in a batch.
            groups: the group of each picture.
            rank: number of this process.
            world_size: number of processes.
        """
        self.draws, self.batch, self.groups = draws, batch, groups
        self.rank, self.world_size, self.start = rank, world_size, 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return itertools.islice(self._batches(), self.start, None)

    def _batches(self) -> Iterator[list[tuple[int, int]]]:
        waiting: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for draw, index in zip(itertools.count(self.rank, self.world_size), self.draws, strict=False):
            batch = waiting[self.groups[index]]
            batch.append((draw, index))
            if len(batch) == self.batch:
                yield list(batch)
                batch.clear()


def build_loader(cfg: CfgNode, seed: int, records: Sequence[Record] | None = None, mapper: Any = None) -> DataLoader:
    """Build the loader of a config's training pictures, with Detectron2's sampler, mapper and grouping.

    Args:
        cfg: config of the detector.
        seed: seed of order and augmentation.
        records: the pictures; default: all of ``DATASETS.TRAIN``.
        mapper: reads and augments a record; default: :class:`PictureMapper`.

    Returns:
        A loader with a ``batch_sampler`` that is a :class:`BatchStream`.

    Raises:
        ValueError: pictures are missing, or none has an object.
    """
    records = training_records(cfg, cfg.DATASETS.TRAIN) if records is None else records
    with seeded(seed):  # Samplers draw their seeds from numpy's generator.
        mapper = mapper or PictureMapper(cfg, is_train=True)
        parts = build_detection_train_loader.from_config(cfg, mapper=mapper, dataset=records)
    if problem := missing_files(", ".join(cfg.DATASETS.TRAIN), (record["file_name"] for record in parts["dataset"])):
        raise ValueError(problem)
    groups = np.zeros(len(parts["dataset"]), bool)
    if parts["aspect_ratio_grouping"]:
        groups[:] = [_is_wide(record) for record in parts["dataset"]]
    world_size = comm.get_world_size()
    stream = BatchStream(parts["sampler"], parts["total_batch_size"] // world_size, groups, comm.get_rank(), world_size)
    return DataLoader(
        SeededPictures(parts["dataset"], parts["mapper"], seed),
        batch_sampler=stream,
        num_workers=parts["num_workers"],
        timeout=timeouts.limit() if parts["num_workers"] else 0,
        collate_fn=list,
        pin_memory=cfg.MODEL.DEVICE != "cpu",  # pictures; labels stay as they are
        # Its own generator: a loader draws a seed when it starts, which would change the random numbers of the step.
        generator=torch.Generator(),
    )


def _is_wide(record: Record) -> bool:
    if {"width", "height"} <= set(record):
        return bool(record["width"] > record["height"])
    with naming(record["file_name"]):  # Records of some segmentation sets do not give the size.
        width, height = picture_size(record["file_name"])
    return width > height

"""Fine-tuning resumes exactly: batches depend on seed and place, and a killed run ends like an uninterrupted one."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.data.datasets import register_pascal_voc
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from small_detector import QUARTER, SHORT, VOC_C4, small_cfg

from moco_d2.detection.loader import BatchStream, build_loader

SAMPLERS = {
    "TrainingSampler": lambda: TrainingSampler(50, seed=3),
    "RepeatFactorTrainingSampler": lambda: RepeatFactorTrainingSampler(torch.linspace(1, 3, 50), seed=3),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_batches_are_those_of_detectron2s_grouping_and_begin_anywhere(sampler: str) -> None:
    sizes = np.random.default_rng(0).integers(1, 9, (50, 2))
    records = [{"width": width, "height": height, "index": i} for i, (width, height) in enumerate(sizes)]
    draws = SAMPLERS[sampler]()
    grouped = AspectRatioGroupedDataset((records[i] for i in draws), 4)
    expected = [[record["index"] for record in batch] for batch in itertools.islice(grouped, 100)]
    groups = [int(width > height) for width, height in sizes]
    stream = BatchStream(draws, 4, groups)
    whole = list(itertools.islice(stream, 100))
    assert [[index for _, index in batch] for batch in whole] == expected
    order = [index for _, index in sorted(itertools.chain(*whole))]
    assert len(set(order[:50])) > 25, "the sampler's shuffle, not one picture again and again"
    for start in (1, 17, 63):
        stream.start = start
        assert list(itertools.islice(stream, 20)) == whole[start : start + 20]
    common = list(itertools.islice(draws, 200))
    for rank in (0, 1):  # a draw has one number, and so one augmentation, whoever makes it
        keys = list(itertools.chain(*BatchStream(common[rank::2], 4, groups, rank, 2)))
        assert len(keys) > 90 and all(draw % 2 == rank and common[draw] == index for draw, index in keys)


def flattened(batch):
    return [(d["file_name"], d["image"], d["instances"].gt_boxes.tensor) for d in batch]


@pytest.fixture
def tiny(dataset_root):
    register_pascal_voc("tiny", str(dataset_root / "VOC2007"), "trainval", 2007)
    yield
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


@pytest.mark.usefixtures("tiny")
def test_pictures_do_not_depend_on_the_workers_nor_on_where_the_run_began() -> None:
    options = ["DATASETS.TRAIN", "('tiny',)", "SOLVER.IMS_PER_BATCH", 2, "INPUT.MIN_SIZE_TRAIN", "(64,80,96)"]
    loaders = [build_loader(small_cfg(VOC_C4, *options, "DATALOADER.NUM_WORKERS", w), seed=5) for w in (0, 2)]
    loaders[1].batch_sampler.start = 3
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = [
        list(map(flattened, itertools.islice(loader, *part)))
        for loader, part in zip(loaders, [(3, 9), (6,)], strict=True)
    ]
    assert torch.equal(torch.get_rng_state(), before), "loading takes nothing from the step's own randomness"
    shapes = set()
    for one, other in zip(*map(itertools.chain.from_iterable, batches), strict=True):
        assert one[0] == other[0] and torch.equal(one[1], other[1]) and torch.equal(one[2], other[2])
        shapes.add(one[1].shape)
    assert len(shapes) > 4, "augmented, each in its own way"


def options(iterations: int) -> list[Any]:
    return [
        *QUARTER, *SHORT, "MODEL.WEIGHTS", "", "DATASETS.TRAIN", "('voc_2007_trainval',)", "DATASETS.TEST", "()",
        "SOLVER.MAX_ITER", iterations, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_KEEP", 3,
        "INPUT.MIN_SIZE_TRAIN", "(64,80,96)", "TEST.EVAL_PERIOD", 3,
    ]  # fmt: skip


def test_two_kills_and_a_request_to_stop(kill_and_resume, dataset_root) -> None:
    words = [*options(5), "SOLVER.ACCUMULATE", 2]
    kill_and_resume("transfer", VOC_C4, words, cuts=3, DETECTRON2_DATASETS=str(dataset_root))


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_twenty_kills_and_ten_requests(kill_and_resume, dataset_root, processes: int) -> None:
    found = kill_and_resume(
        "transfer", VOC_C4, options(36), cuts=30, processes=processes, DETECTRON2_DATASETS=str(dataset_root)
    )
    assert found["killed while writing"] >= 4

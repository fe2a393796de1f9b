"""The number of loader processes that a machine has room for."""

import logging
from pathlib import Path

import pytest

from moco_d2 import resources
from moco_d2.config import load_cfg
from moco_d2.resources import cores, loader_processes, memory
from moco_d2.running import workers
from moco_d2.running.workers import worker_count

GB = 1e9


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """16 cores and 64 GB, without limits; returns the folder of the control group."""
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(16))
    (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {64 * 10**9 // 1024} kB\n")
    monkeypatch.setattr(resources, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(resources, "_GROUPS", tmp_path)
    monkeypatch.setattr(resources, "_SHARED", tmp_path / "none")
    return tmp_path


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "350000 100000"}, 3),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "6400000 100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4),
    ],
)
def test_cores_are_those_that_the_process_may_use(machine: Path, files: dict[str, str], expected: int) -> None:
    (machine / "cpu").mkdir()
    for name, text in files.items():
        (machine / name).write_text(text + "\n")
    assert cores() == expected


def test_all_cores_but_two_feed_the_gpus_and_few_a_cpu(machine: Path) -> None:
    batch = 77e6
    assert [loader_processes(n, True, batch) for n in (1, 2, 4, 8, 32)] == [14, 6, 2, 1, 1]
    assert [loader_processes(n, False, batch) for n in (1, 2, 8)] == [2, 1, 1]


def test_batches_prepared_in_advance_fit_into_memory(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory() == pytest.approx(64 * GB)
    assert loader_processes(1, True, 3.05 * GB) == 5, "of the 32 GB, each takes two batches and 0.3 GB"
    assert loader_processes(2, True, 1 * GB) == 6 and loader_processes(8, True, 99 * GB) == 1
    (machine / "memory.max").write_text("6400000000\n")
    assert memory() == pytest.approx(6.4 * GB) and loader_processes(1, True, 0.17 * GB) == 5
    (machine / "memory.max").write_text("max\n")
    monkeypatch.setattr(resources, "_SHARED", machine)
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1e9}))
    assert loader_processes(1, True, 77e6) == 6


def test_a_config_asks_for_them_and_the_log_says_how_many(
    machine: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = load_cfg("Pretrain/moco_v2_R50_200ep")
    assert recipe.DATALOADER.NUM_WORKERS == workers.AUTO
    with caplog.at_level(logging.INFO, logger=workers.__name__):
        assert [worker_count(recipe) for _ in range(3)] == [
            14
        ] * 3  # its MODEL.DEVICE is cuda until the device is known
    (said,) = [record.getMessage() for record in caplog.records]
    assert said == "DATALOADER.NUM_WORKERS -1: 14 loader process(es), as 1 process(es) share 16 core(s)"
    monkeypatch.setattr(workers, "loader_processes", lambda *of: of)
    assert worker_count(load_cfg("Pretrain/swav_R50_800ep", ["MODEL.DEVICE", "cpu"])) == (
        1, False, 4096 * 3 * (2 * 224**2 + 6 * 96**2),
    )  # fmt: skip
    assert worker_count(load_cfg("", ["DATALOADER.NUM_WORKERS", "0"])) == 0

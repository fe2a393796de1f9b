"""Clusters stop jobs and start them again: the tools' exit code, and torchrun with two agents of which one is lost."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/pretrain_net.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/cluster.md says why
}  # fmt: skip

pytestmark = pytest.mark.slow  # tools that start several processes, several times


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder)


def options(images: str, output: Path, iterations: int, *more: object) -> list[str]:
    opts = [
        "DATASETS.TRAIN", f'("{images}",)', "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 8, "DATA.CROP_SIZE", 32,
        "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.WIDTH", 0.125, "SSL.ARGS.queue_size", 64, "SSL.ARGS.bn_groups", 1,
        "SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", iterations, "DATALOADER.NUM_WORKERS", 1, "MODEL.DEVICE", "cpu",
        "SEED", 7, *more,
    ]  # fmt: skip
    return ["--config-file", "Pretrain/moco_v2_R50_200ep", "--resume", *map(str, opts)]


def begin(log: Path, *words: str) -> subprocess.Popen:
    """Start a command in a process group of its own, with its output in a file."""
    with log.open("a") as output:
        return subprocess.Popen(
            [sys.executable, *words], env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True
        )


def wait_for(path: Path, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def same_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(folder / "model_final.pth")["model"] for folder in (a, b))
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(("signum", "to_all"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_the_tool_saves_says_so_and_goes_on(images: str, tmp_path: Path, signum: int, to_all: bool) -> None:
    """SLURM signals the launcher, or every process of the job, loaders' workers among them."""
    log = tmp_path / "log"
    command = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "run", 400, "SOLVER.CHECKPOINT_PERIOD", 10)]
    process = begin(log, *command)
    wait_for(tmp_path / "run/last_checkpoint", process, log)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    assert process.wait(120) == 75, log.read_text()[-3000:]
    saved = int((tmp_path / "run/last_checkpoint").read_text()[6:13])
    assert 9 <= saved < 399
    text = log.read_text()
    assert text.count(f"asked to stop: iteration {saved} is saved; continue with --resume (exit code 75)") == 1
    assert "Traceback" not in text
    assert begin(log, *command).wait(300) == 0, log.read_text()[-3000:]
    assert f"resuming at iteration {saved + 1} of 400" in log.read_text()
    whole = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "whole", 400, "SOLVER.CHECKPOINT_PERIOD", 1000)]
    assert begin(log, *whole).wait(300) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def agent(log: Path, port: int, host: bool, words: list[str]) -> subprocess.Popen:
    return begin(
        log, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one",
        "--rdzv-conf", f"is_host={host:d}", TOOL, *words,
    )  # fmt: skip


def test_torchrun_goes_on_when_a_lost_agent_comes_back(images: str, tmp_path: Path) -> None:
    """The commands of docs/cluster.md: two agents, the second machine fails and is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / name for name in ("log0", "log1")]
    words = options(images, tmp_path / "run", 600, "SOLVER.CHECKPOINT_PERIOD", 20)
    first = agent(logs[0], port, True, words)
    second = agent(logs[1], port, False, words)
    try:
        wait_for(tmp_path / "run/last_checkpoint", first, logs[0])
        second.kill()  # the agent alone: its process must not stay behind
        second.wait()
        second = agent(logs[1], port, False, words)
        codes = first.wait(500), second.wait(100)
        assert codes == (0, 0), logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
        assert any("resuming at iteration" in log.read_text() for log in logs)
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    whole = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "whole", 600, "SOLVER.CHECKPOINT_PERIOD", 1000)]
    assert begin(tmp_path / "log", *whole).wait(300) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")

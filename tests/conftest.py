"""Fixtures of several folders: a training that is killed and resumed, and an unpacked wheel."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest test first: at the end, one worker would wait for another that runs it."""
    items.sort(key=lambda item: "test_pipeline" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def forks_can_train() -> None:
    """Run a backward pass before any test, so that tests may fork processes that train, in whatever order they run.

    At its first backward pass, autograd starts a thread for each kind of device but the CPU, and processes forked after
    that cannot train. FakeTensorMode (torch.compile, torch.export) pretends that there is a GPU, and stays pretending.

    Nor may a fork collect the garbage of earlier tests: it has none of their threads, for whose end a session of
    onnxruntime, for instance, would wait forever.
    """
    import torch

    os.register_at_fork(before=gc.freeze, after_in_parent=gc.unfreeze)
    torch.ones(1, requires_grad=True).sum().backward()


@pytest.fixture
def kill_and_resume(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Cut a training off ``cuts`` times, two of three by a kill, half of those in a write; it must end the same."""

    def run(
        stage: str, config: str, opts: list[Any], cuts: int, processes: int = 1, **variables: str
    ) -> dict[str, Any]:
        words = ["tests/running/kill_and_resume.py", stage, config, tmp_path, cuts, processes, *opts]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *map(str, words)], env=environment | variables, cwd=ROOT, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"{found}\n")
        assert found["differences"] == []
        assert (found["killed"], found.get("asked", 0)) == (cuts - cuts // 3, cuts // 3)
        return found

    return run


@pytest.fixture(scope="session")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, unpacked as pip would."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("moco_d2", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(source / "dist"), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target

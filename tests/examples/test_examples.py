"""The examples run as their pages say, and compute what they say."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from moco_d2.commands import samples
from moco_d2.config import load_cfg
from moco_d2.convert import convert_checkpoint, read_facts
from moco_d2.methods import METHODS
from moco_d2.samples import make

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The method's module; other tests walk the registry and do not find it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import align_uniform

    METHODS["AlignUniform"] = align_uniform.AlignUniform
    yield align_uniform
    del METHODS["AlignUniform"]


def test_a_method_of_ones_own_trains_in_two_processes_and_is_converted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / "images" / f"{i}.png")
    python(
        EXAMPLES / "align_uniform.py", "--config-file", EXAMPLES / "align_uniform.yaml", "--num-gpus", 2,
        "DATASETS.TRAIN", '("images",)', "OUTPUT_DIR", "run", "MODEL.DEVICE", "cpu", "SSL.ENCODER.NAME", "resnet18",
        "DATA.CROP_SIZE", 32, "DATALOADER.NUM_WORKERS", 0, "SOLVER.IMS_PER_BATCH", 8, "SOLVER.EPOCHS", 0,
        "SOLVER.MAX_ITER", 2, cwd=tmp_path,
    )  # fmt: skip
    convert_checkpoint(tmp_path / "run" / "backbone.pth", tmp_path / "converted.pth", proof=False)
    facts = read_facts(tmp_path / "converted.pth")
    assert facts is not None and facts.depth == 18 and "AlignUniform" in facts.origin


def test_the_methods_losses_are_the_papers(example: ModuleType) -> None:
    torch.manual_seed(0)
    x, y = (F.normalize(torch.randn(5, 3, dtype=torch.float64), dim=1) for _ in range(2))
    distances = [math.dist(a, b) for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    assert example.alignment(x, y, 3.0).item() == pytest.approx(sum(d**3 for d in distances) / 5)
    pairs = [math.dist(x[i].tolist(), x[j].tolist()) for i in range(5) for j in range(5) if i != j]
    assert example.uniformity(x, 2.0).item() == pytest.approx(math.log(sum(math.exp(-2 * d * d) for d in pairs) / 20))
    assert dict(load_cfg(EXAMPLES / "align_uniform.yaml").SSL.ARGS) == {"dim": 128, "alpha": 2, "t": 2, "weight": 1}
    with pytest.raises(ValueError, match="t is 0"):
        example.AlignUniform(lambda num_classes: torch.nn.Linear(3, num_classes), t=0)


def test_the_library_is_used_without_detectron2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import plain_torch

    assert not [line for line in (EXAMPLES / "plain_torch.py").read_text().splitlines() if "import detectron2" in line]
    plain_torch.main()
    convert_checkpoint(tmp_path / "output/plain_torch.pth", tmp_path / "converted.pth")  # with its proof


def test_data_of_ones_own_pass_the_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make, "SPLITS", dict.fromkeys(make.SPLITS, 3) | {"VOC2007/trainval": 20, "VOC2007/test": 20})
    monkeypatch.chdir(tmp_path)
    samples.main(["output/samples"])
    out = python("-m", "moco_d2", "train", "--config-file", EXAMPLES / "own_data.yaml", "--dry-run", cwd=tmp_path)
    assert "mine_train" in out and out.splitlines()[-1].endswith("passed")


def python(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, words)], env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=cwd, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout

"""Files that an earlier version wrote still load: a run is resumed, its checkpoint converted, its config read.

``earlier_version.tar.xz`` was written by version 0.1.0 before encoders, recipes and augmentations had their present
keys: four iterations of MoCo, of which the checkpoint after two was kept, and what that one was converted to.
"""

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moco_d2.config import load_cfg
from moco_d2.convert import convert_checkpoint, read_facts

ARCHIVE = Path(__file__).parent / "earlier_version.tar.xz"


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_a_run_is_resumed_to_where_it_would_have_come(earlier: Path) -> None:
    command = [sys.executable, "-m", "moco_d2", "pretrain", "--config-file", "pretrain.yaml", "--resume"]
    done = subprocess.run(command, cwd=earlier, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    state = torch.load(earlier / "run" / "model_final.pth", weights_only=True)["model"]
    expected = json.loads((earlier / "expected.json").read_text())
    assert state.keys() == expected.keys()
    for name, sums in expected.items():
        tensor = state[name].double()
        found = torch.tensor([tensor.sum(), tensor.abs().sum()])
        torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64), rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("name", ["model_0000001.pth", "backbone.pth"])
def test_weights_convert_as_before(earlier: Path, name: str) -> None:
    convert_checkpoint(earlier / "run" / name, earlier / "now.pth")
    before, now = (torch.load(earlier / f, weights_only=True) for f in ("converted.pth", "now.pth"))
    then, facts = read_facts(earlier / "converted.pth"), read_facts(earlier / "now.pth")
    assert then is not None and facts is not None
    assert replace(then, origin=facts.origin, recipe=facts.recipe) == facts  # both say which checkpoint it was
    assert facts.recipe == ("tiny (unfinished)" if name.startswith("model") else "tiny")
    assert before["model"].keys() == now["model"].keys()
    if name.startswith("model"):
        for key, tensor in before["model"].items():
            assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(now["model"][key])), key


def test_a_runs_config_is_read_under_the_present_names(earlier: Path) -> None:
    cfg = load_cfg(str(earlier / "run" / "config.yaml"))
    assert cfg.SSL.ENCODER.ARGS.width == 1 / 32 and cfg.DATA.AUGMENTATION == "moco_v2"

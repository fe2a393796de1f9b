"""DensePose: what is said without Detectron2's project, and the pickle that its evaluation reads."""

from __future__ import annotations

import os
import pickle
import sys
from types import ModuleType

import numpy as np
import pytest
import yaml
from detectron2.evaluation import DatasetEvaluator

from moco_d2.config import config_files, flat, get_cfg
from moco_d2.detection import densepose
from moco_d2.io.checkpoints import CheckpointError

ARRAYS = {"Pdist_matrix": np.arange(6, dtype=np.float32).reshape(2, 3)}


class Runs:
    def __reduce__(self):
        return os.system, ("touch ran",)


class Evaluator(DatasetEvaluator):
    """An evaluator that opens a pickle through its module's name for the library, as the project's does."""

    path, module = "", None

    def evaluate(self):
        with open(self.path, "rb") as file:
            return self.module.pickle.load(file, encoding="latin1")


@pytest.fixture
def evaluator(monkeypatch, tmp_path):
    """Return an evaluator of a stand-in for the project's module."""
    name = "densepose.evaluation.densepose_coco_evaluation"
    module = ModuleType(name)
    module.pickle = pickle
    for part in ("densepose", "densepose.evaluation"):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)
    found = Evaluator()
    found.path, found.module = str(tmp_path / "Pdist_matrix.pkl"), module
    return found


@pytest.mark.parametrize("call", [densepose.get_config, densepose.trainer_class])
def test_without_the_project_the_command_that_installs_it_is_told(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "densepose", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"is not installed: pip install --no-deps git\+https.*projects/DensePose"):
        call()


def test_keys_of_the_config_are_detectron2s_ours_and_the_projects():
    files = config_files(densepose.CONFIG)
    keys = set(flat(yaml.safe_load(files[0].read_text())))
    own = {key for key in keys if "DENSEPOSE" in key}
    assert len(own) == 3 and keys - own - {"_BASE_"} <= set(flat(get_cfg()))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_the_pickled_arrays_are_read_without_the_librarys_pickle(protocol, evaluator):
    with open(evaluator.path, "wb") as file:
        pickle.dump(ARRAYS, file, protocol=protocol)
    found = densepose.SafeEvaluator(evaluator).evaluate()
    assert found.keys() == ARRAYS.keys() and type(found["Pdist_matrix"]) is np.ndarray
    np.testing.assert_array_equal(found["Pdist_matrix"], ARRAYS["Pdist_matrix"])
    assert evaluator.module.pickle is pickle, "put back"


@pytest.mark.parametrize(
    ("content", "said"), [({"a": Runs()}, "refused: opening it would run"), ({"a": 1}, "a is none")]
)
def test_a_pickle_that_asks_for_code_or_holds_other_things_is_refused(content, said, evaluator, tmp_path):
    with open(evaluator.path, "wb") as file:
        pickle.dump(content, file)
    with pytest.raises(CheckpointError, match=said):
        densepose.SafeEvaluator(evaluator).evaluate()
    assert not (tmp_path / "ran").exists()

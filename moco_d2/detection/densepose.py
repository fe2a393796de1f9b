"""Fine-tuning of DensePose with Detectron2's project of this name, which users install themselves.

The project brings data sets, heads, trainer and evaluator. From here come the detector's config, checked weights, and a
safe evaluation: the project's own opens a downloaded pickle, the distances on the body's surface, and a pickle may run
code. docs/configs.md shows the use.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, BinaryIO
from unittest import mock

import numpy as np
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator

from moco_d2.config import config_files, get_cfg
from moco_d2.detection.weights import load_weights
from moco_d2.io.checkpoints import CheckpointError, read_checkpoint

CONFIG = "Base/densepose-R50-FPN-s1x"
INSTALL = (
    "pip install --no-deps git+https://github.com/facebookresearch/detectron2.git#subdirectory=projects/DensePose, and "
    "pip install av scipy"
)
_READS_PICKLE = "densepose.evaluation.densepose_coco_evaluation"


def check_installed() -> None:
    """Check that the project is there.

    Raises:
        ValueError: it is not; the message has the command that installs it.
    """
    if importlib.util.find_spec("densepose") is None:
        raise ValueError(f"Detectron2's DensePose project is not installed: {INSTALL}")


def get_config(opts: Sequence[str] = ()) -> CfgNode:
    """Return the config of DensePose R-CNN on R50-FPN, schedule s1x.

    Args:
        opts: ``KEY VALUE KEY VALUE ...``: at least ``MODEL.WEIGHTS`` and a file that ``moco-d2 convert`` wrote.

    Raises:
        ValueError: the project is not installed.
    """
    check_installed()
    cfg = get_cfg()
    import_module("densepose").add_densepose_config(cfg)
    for file in config_files(CONFIG):
        cfg.merge_from_file(str(file), allow_unsafe=False)
    cfg.merge_from_list(list(opts))
    return cfg


def trainer_class() -> Any:
    """Return the project's trainer, with checked weights and safe evaluation.

    Raises:
        ValueError: the project is not installed.
    """
    check_installed()
    base: Any = import_module("densepose.engine").Trainer

    class DensePoseTrainer(base):
        """Its arguments and methods are those of Detectron2's ``DefaultTrainer``."""

        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str, *args: Any, **kwargs: Any) -> DatasetEvaluator:
            """Build the project's evaluators; they read no pickle themselves."""
            return SafeEvaluator(super().build_evaluator(cfg, dataset_name, *args, **kwargs))

        def resume_or_load(self, resume: bool = True) -> None:
            """Continue a run as Detectron2 does, or load weights that fill the whole backbone."""
            if resume and self.checkpointer.has_checkpoint():
                super().resume_or_load(resume)
            else:
                load_weights(self.checkpointer, self.cfg, self.cfg.MODEL.WEIGHTS)

    return DensePoseTrainer


class SafeEvaluator(DatasetEvaluator):
    """An evaluator of the project's, for which this project's reader opens pickles."""

    def __init__(self, evaluator: DatasetEvaluator) -> None:
        self.reset, self.process, self._evaluate = evaluator.reset, evaluator.process, evaluator.evaluate

    def evaluate(self) -> Any:
        """Evaluate.

        Raises:
            CheckpointError: the pickle asks for code, or is damaged.
        """
        with mock.patch.object(import_module(_READS_PICKLE), "pickle", _SafePickle):
            return self._evaluate()


class _SafePickle:
    """What the project's evaluation uses of the module ``pickle``."""

    @staticmethod
    def load(file: BinaryIO, **_: Any) -> dict[str, np.ndarray]:
        return read_arrays(file.name)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a pickled mapping, without running code of it.

    Raises:
        CheckpointError: the file asks for code, is damaged, or holds anything but named arrays.
    """
    content: Mapping[str, Any] = read_checkpoint(path)
    foreign = [name for name, value in content.items() if not isinstance(value, np.ndarray)]
    if foreign or not content:
        raise CheckpointError(f"{path}: it must hold named arrays; {', '.join(map(str, foreign)) or 'nothing'} is none")
    return {name: np.array(value) for name, value in content.items()}

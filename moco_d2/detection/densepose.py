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
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger

from moco_d2.config import config_files, flat, get_cfg, use_available_device
from moco_d2.detection.weights import load_weights
from moco_d2.io.checkpoints import CheckpointError, forget_checkpoint, read_checkpoint

CONFIG = "Base/densepose-R50-FPN-s1x"
# Its setup.py imports torch, which pip's isolated builds do not have.
INSTALL = (
    "pip install setuptools wheel av scipy, and pip install --no-deps --no-build-isolation "
    '"git+https://github.com/facebookresearch/detectron2.git#subdirectory=projects/DensePose"'
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
    """Return the config of DensePose R-CNN on R50-FPN, schedule s1x; without a GPU its device is the CPU.

    Args:
        opts: ``KEY VALUE KEY VALUE ...``: at least ``MODEL.WEIGHTS`` and a file that ``moco-d2 convert`` wrote.

    Raises:
        ValueError: the project is not installed, or a key is set that its trainer does not read.
    """
    check_installed()
    cfg = get_cfg()
    import_module("densepose").add_densepose_config(cfg)
    for file in config_files(CONFIG):
        cfg.merge_from_file(str(file), allow_unsafe=False)
    cfg.merge_from_list(list(opts))
    _refuse_unread(cfg)
    use_available_device(cfg)
    return cfg


def _refuse_unread(cfg: CfgNode) -> None:
    theirs, defaults, values = flat(detectron2_get_cfg()), flat(get_cfg()), flat(cfg)
    own = [key for key in defaults if key not in theirs and key != "PROTOCOL"]  # a name only
    unread = [f"{key} {values[key]}" for key in own if values[key] != defaults[key]]
    if unread:
        raise ValueError(
            f"DensePose's trainer does not read {', '.join(unread)}: moco_d2's own trainers do; leave them out"
        )


def trainer_class() -> Any:
    """Return the project's trainer, with checked weights and safe evaluation.

    Raises:
        ValueError: the project is not installed.
    """
    check_installed()
    base: Any = import_module("densepose.engine").Trainer

    class DensePoseTrainer(base):
        """Its arguments and methods are those of Detectron2's ``DefaultTrainer``."""

        def __init__(self, cfg: CfgNode) -> None:
            """Build the trainer; the project's messages, with the tables of results, reach the screen and the log."""
            for name in ("densepose", "moco_d2"):
                setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name=name)
            super().__init__(cfg)

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
                forget_checkpoint()

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
        # As the project's own program does: the evaluation gives the download a timeout, which Detectron2's handler of
        # addresses refuses as an unknown argument.
        PathManager.set_strict_kwargs_checking(False)
        try:
            with mock.patch.object(import_module(_READS_PICKLE), "pickle", _SafePickle):
                return self._evaluate()
        finally:
            forget_checkpoint()  # the distances are 1.5 GB; it is kept until here because each metric reads them again


class _SafePickle:
    """What the project's evaluation uses of the module ``pickle``."""

    @staticmethod
    def load(file: BinaryIO, **_: Any) -> dict[str, np.ndarray]:
        return read_arrays(file.name)


def read_arrays(path: str) -> dict[str, np.ndarray]:
    """Return the arrays of a pickled mapping, without running code of it and without a copy.

    Raises:
        CheckpointError: the file asks for code, is damaged, or holds no array.
    """
    content: Mapping[str, Any] = read_checkpoint(path)
    arrays = {name: value.view(np.ndarray) for name, value in content.items() if isinstance(value, np.ndarray)}
    if not arrays:
        raise CheckpointError(f"{path}: it must hold named arrays, and holds none")
    return arrays

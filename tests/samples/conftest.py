"""The makers of the sample data, which are scripts, and a small sample."""

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from moco_d2.samples import make

FEW = 40  # two pictures a kind: the object of one may be hidden
FEW_STREETS = 6


@pytest.fixture(scope="session")
def maker() -> Iterator[ModuleType]:
    """The script as a module, with few pictures in each split."""
    with pytest.MonkeyPatch.context() as patch:
        module = make
        few = {split: FEW_STREETS if split.startswith("cityscapes") else FEW for split in module.SPLITS}
        patch.setattr(module, "SPLITS", few)
        yield module


@pytest.fixture(scope="session")
def sample(maker: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sample") / "root"
    maker.make_all(root, seed=0)
    return root

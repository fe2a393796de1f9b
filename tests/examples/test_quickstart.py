"""The notebook runs from the first cell to the last, with small numbers, and shows what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode, read

from moco_d2.convert import read_facts
from moco_d2.samples import make

NOTEBOOK = Path(__file__).parents[2] / "examples" / "quickstart.ipynb"
SMALL: dict[str, Any] = {
    "PRETRAIN_OPTIONS": [
        "SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 2, "SOLVER.IMS_PER_BATCH", 8, "DATA.CROP_SIZE", 32,
        "SSL.ARGS.queue_size", 16, "SSL.ARGS.bn_groups", 2, "DATALOADER.NUM_WORKERS", 0,
    ],
    "DETECT_OPTIONS": [
        "SOLVER.MAX_ITER", 1, "SOLVER.STEPS", (), "SOLVER.IMS_PER_BATCH", 1, "DATALOADER.NUM_WORKERS", 0,
        "TEST.PRECISE_BN.NUM_ITER", 1,
    ],
}  # fmt: skip


def test_the_notebook_pretrains_converts_and_detects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = dict.fromkeys(make.SPLITS, 3) | {"imagenet/train": 20, "imagenet/val": 20, "VOC2007/test": 6}
    monkeypatch.setattr(make, "SPLITS", few | {"VOC2007/trainval": 20})
    make.make_all(tmp_path / "output" / "quickstart" / "samples", seed=0)
    notebook = read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs], "the committed notebook has no outputs"
    assert code[0].metadata.tags == ["parameters"]
    code[0].source += "".join(f"\n{name} = {value!r}" for name, value in SMALL.items())
    NotebookClient(
        notebook, timeout=900, startup_timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in code for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert "proof    largest relative difference" in _text(shown)
    run = tmp_path / "output" / "quickstart"
    facts = read_facts(run / "moco.pth")
    assert facts is not None and "2 of 2 iterations" in facts.origin
    assert "monitor/knn_top1" in (run / "pretrain" / "metrics.json").read_text()
    results = [json.loads((run / f"detector_{init}" / "results.json").read_text()) for init in ("MoCo", "random")]
    assert [result["weights"]["path"] for result in results] == [str(run / "moco.pth"), ""]


def _text(outputs: list[NotebookNode]) -> str:
    return "".join(output.get("text", "") for output in outputs)

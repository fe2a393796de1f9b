"""ENGINE.COMPILE: its values, old and new, and that sizes which vary do not compile a network again and again."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn
from torch._dynamo.testing import CompileCounter

from moco_d2.config import get_cfg, load_cfg
from moco_d2.config.roles import DETECTION, PRETRAINING
from moco_d2.engine.step import describe_performance_options
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.running.compilation import (
    CudaGraphSteps,
    compile_mode,
    compile_networks,
    compile_problem,
    uncompiled,
    uses_cuda_graphs,
)  # fmt: skip
from tests.two_processes import in_two_processes

# torch.compile's own.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


def with_value(value: Any, folder: Path, way: str) -> CfgNode:
    """Return a config with ENGINE.COMPILE set on the command line, in a file, or by Detectron2's own merging."""
    if way == "command line":
        return load_cfg("", ["ENGINE.COMPILE", str(value)], stage=PRETRAINING)
    (folder / "mine.yaml").write_text(CfgNode({"ENGINE": {"COMPILE": value}}).dump())
    if way == "file":
        return load_cfg(folder / "mine.yaml")
    cfg = get_cfg()
    cfg.merge_from_file(str(folder / "mine.yaml"))
    return cfg


@pytest.mark.parametrize(
    ("way", "value", "mode"),
    [
        ("command line", False, ""), ("command line", True, "default"), ("command line", "", ""),
        ("command line", "reduce-overhead", "reduce-overhead"), ("file", True, "default"), ("file", False, ""),
        ("file", "default", "default"), ("Detectron2", True, "default"), ("Detectron2", False, ""),
    ],
)  # fmt: skip
def test_the_switch_of_earlier_versions_and_the_modes_are_read_alike(
    way: str, value: object, mode: str, tmp_path: Path
) -> None:
    cfg = with_value(value, tmp_path, way)
    assert compile_mode(cfg) == mode and not compile_problem(cfg)
    said = {"": "", "default": "compiled"}.get(mode, f"compiled ({mode})")
    assert describe_performance_options(cfg) == said
    assert cfg.ENGINE.COMPILE in (mode, value)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = load_cfg(tmp_path / "config.yaml", ["ENGINE.COMPILE", "True" if mode == "reduce-overhead" else mode])
    assert compile_mode(again) == ("default" if mode == "reduce-overhead" else mode), "a run's own file can be used"


def test_unknown_modes_and_cuda_graphs_of_many_sizes_are_refused() -> None:
    assert compile_mode(get_cfg()) == ""
    cfg = load_cfg("", ["ENGINE.COMPILE", "reduce_overhead"])
    assert "'reduce_overhead'; it must be one of" in compile_problem(cfg)
    assert "did you mean 'reduce-overhead'?" in compile_problem(cfg)
    cfg = load_cfg("", ["ENGINE.COMPILE", "reduce-overhead"], stage=DETECTION)
    assert "a detector sees many sizes: set it to default or" in compile_problem(cfg, sizes_vary=True)
    assert not compile_problem(load_cfg("", ["ENGINE.COMPILE", "max-autotune-no-cudagraphs"]), sizes_vary=True)


def test_cuda_graphs_are_told_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    marks: list[int] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: marks.append(1))
    CudaGraphSteps().before_step()
    assert marks == [1]
    found = {}
    for mode in ("", "default", "reduce-overhead", "max-autotune"):
        cfg = load_cfg("", ["ENGINE.COMPILE", mode])
        cfg.MODEL.DEVICE = "cuda"
        found[mode] = uses_cuda_graphs(cfg)
        cfg.MODEL.DEVICE = "cpu"
        assert not uses_cuda_graphs(cfg)
    assert found == {"": False, "default": False, "reduce-overhead": True, "max-autotune": True}


def count_graphs(patch: pytest.MonkeyPatch) -> tuple[CompileCounter, list[tuple[str, bool | None]]]:
    """Let networks be compiled by a backend that counts graphs; return it, and the list of the modes asked for."""
    counter, compile_, asked = CompileCounter(), nn.Module.compile, list[tuple[str, bool | None]]()

    def counted(module: nn.Module, mode: str, dynamic: bool | None) -> None:
        asked.append((mode, dynamic))
        compile_(module, backend=counter, dynamic=dynamic)

    patch.setattr(nn.Module, "compile", counted)
    return counter, asked


class Pyramid(nn.Module):
    """Levels of half the size each, and their sum at the size of the largest, as backbones of detectors have them."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(3, 3, 3, stride=2, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.levels[0](x).relu()
        second = self.levels[1](first)
        return first + nn.functional.interpolate(second, size=first.shape[2:])


def test_many_sizes_make_few_graphs_and_evaluation_none(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, asked = count_graphs(monkeypatch)
    cfg = load_cfg("", ["ENGINE.COMPILE", "max-autotune-no-cudagraphs"])
    network, plain = Pyramid(), Pyramid()
    plain.load_state_dict(network.state_dict())
    compile_networks([network], cfg, sizes_vary=True)
    compile_networks([Pyramid()], load_cfg("", []), sizes_vary=True)
    compile_networks([Pyramid()], cfg)
    assert asked == [("max-autotune-no-cudagraphs", True), ("max-autotune-no-cudagraphs", None)]
    sizes = [(height, width) for height in (64, 80, 96, 101) for width in (64, 96, 133)]
    for block, expected in ((uncompiled(cfg), 0), (contextlib.nullcontext(), 1)):
        with block:
            for height, width in sizes:
                x = torch.randn(2, 3, height, width)
                torch.testing.assert_close(network(x), plain(x))
        assert counter.frame_count <= 2 * expected and bool(counter.frame_count) == bool(expected)


def graphs_of_a_backward_pass() -> None:
    network, x = nn.Sequential(*(nn.Linear(2000, 2000) for _ in range(4))), torch.randn(2, 2000)  # 61 MiB
    with pytest.MonkeyPatch.context() as patch:
        counter, _ = count_graphs(patch)
        compile_networks([network], load_cfg("", ["ENGINE.COMPILE", "True"]))
    network(x)
    assert (counter.frame_count, counter.op_count) == (1, 4), "alone, a Sequential is one graph"
    torch.compiler.reset()
    wrap_ddp(nn.Sequential(network))(x).sum().backward()
    assert counter.frame_count >= 1 + 2


def test_a_compiled_network_in_ddp_runs_in_parts_whose_gradients_are_summed_as_they_come() -> None:
    in_two_processes(graphs_of_a_backward_pass)

"""Exit codes and the one line of an error, wherever it was raised: a loader's worker, another rank."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch.utils.data import DataLoader, Dataset

from moco_d2 import exits
from moco_d2.commands import cli
from moco_d2.config import get_cfg, use_available_device
from moco_d2.io import files
from moco_d2.io.checkpoints import CheckpointError
from moco_d2.running import launch
from moco_d2.running.checkpoints import NotWrittenError

ROOT = Path(__file__).parents[1]


def raises(error: BaseException) -> Callable[[], None]:
    def work() -> None:
        raise error

    return work


MISTAKES = [
    (raises(CheckpointError("x.pth: a web page")), "x.pth: a web page"),
    (lambda: json.loads("{"), "Expecting property name"),
    (lambda: b"\xff".decode(), "'utf-8' codec can't decode byte 0xff"),
    (raises(FloatingPointError("the loss is nan")), "the loss is nan"),
    (raises(ValueError()), "ValueError"),
    (raises(OSError("half.tar: cut short")), "half.tar: cut short"),  # as PIL and our own readers say it
    (lambda: Path("nowhere/x.json").read_text(), "nowhere/x.json: No such file or directory"),
    (lambda: os.listdir("/dev/null"), "/dev/null: Not a directory"),
    (lambda: Path("/").read_text(), "/: Is a directory"),
    (lambda: Path("/dev/null/" + "x" * 300).read_text(), "/dev/null/"),
    (lambda: DatasetCatalog.get("nonesuch"), "Dataset 'nonesuch' is not registered!"),
    (lambda: META_ARCH_REGISTRY.get("GeneralRCNN"), "No object named 'GeneralRCNN' found"),
]
FAULTS = [
    raises(TypeError("ours")), raises(AssertionError()), raises(RuntimeError("ours")), lambda: {}["a mistake of ours"],
    raises(OSError(errno.EIO, "Input/output error", "x")), raises(ConnectionResetError(errno.ECONNRESET, "reset")),
    raises(BrokenPipeError(errno.EPIPE, "a process of ours is gone")), raises(ModuleNotFoundError("x", name="x")),
]  # fmt: skip
OTHERS = [
    (
        raises(OSError(errno.ENOSPC, "No space left on device", "log.txt")),
        74,
        "log.txt: No space left on device",
    ),
    (raises(NotWrittenError("model_final.pth is not written")), 74, "model_final.pth is not written"),
    (raises(KeyboardInterrupt()), 130, "interrupted"),
]


@pytest.mark.parametrize("guard", [exits.guard, cli.guard], ids=["package", "tools"])
@pytest.mark.parametrize(("work", "code", "line"), [*((work, 2, line) for work, line in MISTAKES), *OTHERS])
def test_a_users_mistake_is_one_line(guard: Any, work: Any, code: int, line: str, capfd: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        guard(work)
    said = capfd.readouterr().err
    assert ended.value.code == code and said.startswith(f"error: {line}") and said.count("\n") == 1, said


@pytest.mark.parametrize("work", FAULTS)
def test_a_fault_of_ours_keeps_its_traceback(work: Any, capfd: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.guard(work)
    assert ended.value.code == 1 and "Traceback (most recent call last)" in capfd.readouterr().err


def test_work_may_return_a_code() -> None:
    for work, code in ((lambda: None, 0), (lambda: 75, 75)):
        with pytest.raises(SystemExit) as ended:
            cli.guard(work)
        assert ended.value.code == code


class Failing(Dataset[int]):
    """Raises in a loader's worker."""

    def __init__(self, work: Callable[[], object]) -> None:
        self.work = work

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        self.work()
        return index


def test_an_error_of_a_loaders_worker_is_sorted_as_what_it_was_there() -> None:
    found = {}
    for name, work in {
        "ours": raises(CheckpointError("x.pth: a web page\nand more")),
        "rebuilt": lambda: b"\xff".decode(),  # torch cannot make it again from one string
        "path": lambda: Path("gone.jpg").read_bytes(),
        "disk": raises(OSError(errno.EIO, "Input/output error", "x.jpg")),
        "fault": raises(TypeError("x")),
    }.items():
        with pytest.raises(Exception) as caught:
            next(iter(DataLoader(Failing(work), num_workers=1)))
        end = exits.ending(caught.value)
        found[name] = (end.code, end.line)
    assert found == {
        "ours": (2, "x.pth: a web page\nand more"),
        "rebuilt": (2, "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        "path": (2, "gone.jpg: No such file or directory"),
        "disk": (1, ""),
        "fault": (1, ""),
    }


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A run's log, as Detectron2 sets it up."""
    path = tmp_path / "log.txt"
    with path.open("w") as file:
        handler = logging.StreamHandler(file)
        logging.getLogger("moco_d2").addHandler(handler)
        yield path
        logging.getLogger("moco_d2").removeHandler(handler)


def test_every_traceback_is_in_the_log_and_words_that_are_not_ours_say_so(
    log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.preemption, "handle_signals", lambda **_: None)
    with pytest.raises(ValueError) as ours:
        launch.launch(print, 0)
    line = "--num-gpus is 0; it must be at least 1 (without a GPU: processes on the CPU)"
    assert exits.conclude(ours.value).line == line
    assert "in check_processes" in log.read_text()
    with pytest.raises(ValueError) as theirs:
        launch.launch(json.loads, 1, args="{")
    assert re.fullmatch(
        rf"Expecting property name .* \(raised below moco_d2/running/launch\.py:\d+; the traceback is in {log}\)",
        exits.conclude(theirs.value).line,
    )
    assert "json/decoder.py" in log.read_text()


def test_a_mistake_found_in_a_rank_is_a_mistake_of_the_command() -> None:
    with pytest.raises(launch.RankFailedError, match=r"rank \d failed:\n(.*\n)+.*JSONDecodeError") as caught:
        launch.launch(json.loads, 2, args="{", device="cpu")
    end = exits.conclude(caught.value)
    assert end.code == 2 and end.line.startswith("Expecting property name enclosed in double quotes: line 1 column 2")


@pytest.mark.parametrize(("how", "said"), [
    ({"num_gpus": 0}, "--num-gpus is 0; it must be at least 1"),
    ({"num_gpus": -2}, "--num-gpus is -2"),
    ({"num_machines": 0}, "--num-machines is 0 and --machine-rank is 0: there must be at least one machine"),
    ({"num_machines": 2, "machine_rank": 2, "dist_url": "tcp://localhost:1"}, "--machine-rank is 2"),
    ({"num_machines": 2, "machine_rank": -1, "dist_url": "tcp://localhost:1"}, "--machine-rank is -1"),
    ({"num_machines": 2}, "--dist-url is missing: with several machines"),
    ({"dist_url": "localhost:1234"}, "--dist-url is 'localhost:1234'; it must be tcp://HOST:PORT"),
    ({"dist_url": "tcp://localhost"}, "--dist-url"),
    ({"dist_url": "tcp://localhost:70000"}, "--dist-url"),
    ({"dist_url": "http://localhost:80"}, "--dist-url"),
    ({"dist_url": f"tcp://{'x' * 70}:80"}, "but this machine cannot resolve that host"),
    ({"timeout": 0.0}, "--timeout is 0; it must be from 1 to 100,000,000 seconds"),
    ({"timeout": float("nan")}, "--timeout is nan"),
    ({"timeout": float("inf")}, "--timeout is inf"),
])  # fmt: skip
def test_processes_that_cannot_be_are_refused_before_any_starts(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        launch.launch(print, **{"num_gpus": 1, "device": "cpu", **how})


GPUS = 2


@pytest.mark.parametrize(("asked", "with_gpus", "without"), [
    ("cpu", "cpu", "cpu"), ("CPU", "cpu", "cpu"), ("cpu:0", "cpu", "cpu"), ("cpu:1", None, None),
    ("cuda", "cuda", "cpu"), ("Cuda", "cuda", "cpu"), ("cuda:0", "cuda:0", "cpu"), (" cuda:1 ", "cuda:1", "cpu"),
    ("cuda:2", None, "cpu"), ("cuda:9", None, "cpu"), ("cuda:-1", None, None), ("cuda:", None, None),
    ("cuda:x", None, None), ("cuda,0", None, None), ("gpu", None, None), ("mps", None, None), ("xpu:0", None, None),
    ("meta", None, None), ("0", None, None), ("", None, None),
])  # fmt: skip
def test_devices(asked: str, with_gpus: str | None, without: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for count, expected in ((GPUS, with_gpus), (0, without)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda count=count: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        cfg = get_cfg()
        cfg.MODEL.DEVICE = asked
        if expected is None:
            with pytest.raises(ValueError, match=rf"^MODEL\.DEVICE is {asked!r}[,;].*cuda"):
                use_available_device(cfg)
        else:
            use_available_device(cfg)
            assert expected == cfg.MODEL.DEVICE


def test_one_gpu_by_its_number_is_for_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(launch.preemption, "handle_signals", lambda **_: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: GPUS)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with pytest.raises(
        ValueError, match=r"MODEL\.DEVICE is cuda:1, but each of the 2 processes takes a GPU of its own"
    ):
        launch.launch(print, 2, device="cuda:1")
    launch.launch(str, 1, device="cuda:1")
    assert chosen == ["cuda:1"]
    for word in ("TORCHELASTIC_RUN_ID x", "WORLD_SIZE 3", "RANK 0", "LOCAL_RANK 0", "LOCAL_WORLD_SIZE 3"):
        monkeypatch.setenv(*word.split())
    with pytest.raises(ValueError, match="torchrun's --nproc-per-node is 3, but this machine has 2"):
        launch.launch(print, 1)


@pytest.mark.parametrize("folder", [
    "", "/dev/null", "/dev/null/x", "/proc/x/y", "{tmp}/file", "{tmp}/file/x", "{tmp}/loop/x", "{tmp}/" + "x" * 300,
    "a\0b",
])  # fmt: skip
def test_a_folder_that_cannot_be_made_is_one_line(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="OUTPUT_DIR") as caught:
        files.make_folder(folder.replace("{tmp}", str(tmp_path)), "OUTPUT_DIR")
    assert "\n" not in str(caught.value)


def test_nobody_reads_the_rest() -> None:
    command = [sys.executable, "-m", "moco_d2.install_detectron2"]  # which says that there is one
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() == exits.PIPE_CLOSED and not said


def test_the_documented_codes_are_these() -> None:
    text = (ROOT / "docs/reliability.md").read_text()
    codes = (0, exits.FAULT, exits.MISTAKE, exits.DISK_FULL, os.EX_TEMPFAIL, exits.INTERRUPTED, exits.PIPE_CLOSED)
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == list(codes)


def test_every_command_ends_by_the_guard() -> None:
    folders = ("tools", "datasets", "benchmarks", "examples", "moco_d2")
    texts = {path: path.read_text() for folder in folders for path in (ROOT / folder).rglob("*.py")}
    scripts = {path: text for path, text in texts.items() if '\nif __name__ == "__main__":' in text}
    names = {str(path.relative_to(ROOT)) for path in scripts}
    assert {"tools/report.py", "moco_d2/__main__.py", "datasets/make_sample_data.py", "benchmarks/__main__.py"} <= names
    for path, text in scripts.items():
        assert "guard(" in text, path

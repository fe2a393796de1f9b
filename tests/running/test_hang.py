"""A lost process ends the run: everything is gone within the stated time, and the message names the rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moco_d2.data import EpochSampler, FileSource, ViewDataset, ViewLoader, build_augmentation
from moco_d2.data.augment import Plan
from moco_d2.data.backends import PilBackend
from moco_d2.data.decode import EncodedImage
from moco_d2.io import timeouts
from moco_d2.running import launch

ROOT = Path(__file__).parents[2]
# Seconds after which all processes are gone, as docs/reliability.md says: after --timeout where ranks wait in vain.
SAID = 60
TIMEOUT = 8
MESSAGES = {
    "kill": r"rank 1 was killed by SIGKILL",
    "raise": r"rank 1 failed:\n.*in main\n.*KeyError: 'a mistake in rank one'",
    "worker": r"rank 1 failed:\n.*DataLoader worker \(pid\(?s?\)? .*(killed|exited)",
    "stop": r"rank 0 failed:\n.*(Timed out|timeout).*\nRank 1 did not end within 5 s",
    # Rank 0 waits in the group of StopWhenAsked. A process that is not stopped says where it is.
    "sleep": r"Aborted\n.*ranks\.py\", line \d+ in main\n.*rank 0 failed:\n.*in after_step.*(Timed out|timeout).*\n"
    r"Rank 1 did not end within 5 s",
    "launcher": "",
}
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def lives(pid: int) -> bool:
    """Tell whether a process is there; one that has ended and was not collected by its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def begin(log: Path, how: str, timeout: int = 600) -> subprocess.Popen:
    """Launch two ranks, in a process group of their own."""
    command = [sys.executable, str(ROOT / "tests/running/ranks.py"), str(timeout), how]
    with log.open("w") as out:
        return subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=ENVIRONMENT, start_new_session=True)


def wait_for(count: int, pids: Callable[[], Sequence[str]], launcher: subprocess.Popen, log: Path) -> list[int]:
    while len(found := pids()) < count:
        assert launcher.poll() is None, log.read_text()
        time.sleep(0.02)
    return [int(pid) for pid in found]


def seconds_until_gone(pids: list[int], launcher: subprocess.Popen) -> float:
    begun = time.monotonic()
    try:
        launcher.wait(300)
        while any(map(lives, pids)) and time.monotonic() < begun + 120:
            time.sleep(0.05)
        assert not [pid for pid in pids if lives(pid)]
        return time.monotonic() - begun
    finally:
        for pid in filter(lives, [launcher.pid, *pids]):
            os.kill(pid, signal.SIGKILL)
        launcher.wait()


@pytest.mark.parametrize("how", ["kill", *(pytest.param(h, marks=pytest.mark.slow) for h in list(MESSAGES)[1:])])
def test_no_process_is_left(how: str, tmp_path: Path) -> None:
    waits, log = how in ("stop", "sleep"), tmp_path / "out"
    launcher = begin(log, how, TIMEOUT if waits else 600)
    pids = wait_for(  # two ranks, each with two workers
        6, lambda: " ".join(re.findall(r"rank \d ([\d ]+)\n", log.read_text())).split(), launcher, log
    )
    if how == "launcher":
        launcher.send_signal(signal.SIGKILL)
    seconds = seconds_until_gone(pids, launcher)
    sys.stdout.write(f"{how}: {seconds:.1f} s\n")
    assert launcher.returncode != 0
    assert re.search(MESSAGES[how], log.read_text(), re.DOTALL), log.read_text()
    assert seconds < SAID + TIMEOUT * waits


def test_the_documented_figures_are_those_tested() -> None:
    text = " ".join((ROOT / "docs/reliability.md").read_text().split())
    assert f"all processes are gone within {SAID} s" in text and f"`--timeout` ({timeouts.DEFAULT:g} s)" in text


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "to_all", "code"), [(signal.SIGKILL, False, -9), (signal.SIGTERM, True, 75)])
def test_a_signal_while_the_ranks_import(signum: int, to_all: bool, code: int, tmp_path: Path) -> None:
    """A launcher that is gone is missed, and a request to stop is obeyed, before the ranks have read their code."""
    log = tmp_path / "out"
    launcher = begin(log, "ask")
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    pids = wait_for(3, lambda: children.read_text().split(), launcher, log)  # the first is Python's resource tracker
    time.sleep(0 if to_all else 0.2)  # a rank that has been sent nothing yet ends by itself
    (os.killpg if to_all else os.kill)(launcher.pid, signum)
    assert seconds_until_gone(pids, launcher) < SAID
    assert launcher.returncode == code, log.read_text()


class HangingBackend(PilBackend):
    """Never comes back, for what is never here."""

    def prepare(self, image: EncodedImage, plans: Sequence[Plan]) -> list[np.ndarray]:
        time.sleep(1.5)
        raise AssertionError("nobody waits for this")


def test_a_worker_that_hangs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    source = FileSource([str(tmp_path / "a.png")])
    dataset = ViewDataset(source, build_augmentation("moco_v2", 16), 0, HangingBackend())
    monkeypatch.setattr(timeouts, "_limit", 0.5)
    with pytest.raises(RuntimeError, match=r"timed out after 0\.5 s"):
        next(iter(ViewLoader(dataset, EpochSampler(1, 1, seed=0), 1, torch.device("cpu"))))


def test_a_bad_timeout_is_refused_under_torchrun_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    with pytest.raises(ValueError, match="--timeout is -1"):
        launch.launch(print, 1, timeout=-1)


def test_the_device_decides_not_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "_start_all", lambda main, args, groups: started.extend(groups))
    with pytest.raises(ValueError, match="--num-gpus is 2, but this machine has 1"):
        launch.launch(print, 2)
    launch.launch(print, 2, device="cpu")
    assert [group.cuda for group in started] == [False, False]

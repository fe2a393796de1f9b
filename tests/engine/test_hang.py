"""A lost process ends the run: everything is gone within the stated time, and the message names the rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moco_d2.engine.launch import GRACE

ROOT = Path(__file__).parents[2]
# Seconds that a machine with nothing else to do needs at most: the launcher grants the other ranks 5, and workers of
# loaders look for their parent every 5.
SAID = {"kill": GRACE + 10, "raise": GRACE + 10, "worker": GRACE + 10, "stop": 8 + GRACE + 10, "launcher": 10}
MESSAGES = {
    "kill": r"rank 1 was killed by SIGKILL",
    "raise": r"rank 1 failed:\n.*in main\n.*KeyError: 'a mistake in rank one'",
    "worker": r"rank 1 failed:\n.*DataLoader worker \(pid\(?s?\)? .*(killed|exited)",
    "stop": r"rank 0 failed:\n.*(Timed out|timeout).*\nRank 1 did not end within 5 s",
    "launcher": "",
}


def lives(pid: int) -> bool:
    """Tell whether a process is there; one that has ended and was not collected by its parent is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("how", ["kill", *(pytest.param(h, marks=pytest.mark.slow) for h in list(SAID)[1:])])
def test_no_process_is_left(how: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "tests/running/ranks.py"), "8" if how == "stop" else "600", how]
    with (tmp_path / "out").open("w+") as out:
        launcher = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        pids: list[int] = []
        while len(pids) < 6:  # two ranks, each with two workers
            assert launcher.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.05)
            pids = [
                int(p)
                for line in re.findall(r"rank \d ([\d ]+)\n", (tmp_path / "out").read_text())
                for p in line.split()
            ]
        begun = time.monotonic()
        if how == "launcher":
            launcher.send_signal(signal.SIGKILL)
        launcher.wait(300)
        while any(map(lives, pids)) and time.monotonic() < begun + 120:
            time.sleep(0.05)
        seconds = time.monotonic() - begun
    assert not [pid for pid in pids if lives(pid)]
    said = (tmp_path / "out").read_text()
    sys.stdout.write(f"{how}: {seconds:.1f} s, said {SAID[how]} s\n")
    assert launcher.returncode != 0
    assert re.search(MESSAGES[how], said, re.DOTALL), said
    assert seconds < SAID[how] + 40, "not a stall; a machine that does other work is slow to do what is due"

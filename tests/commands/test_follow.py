"""A command that runs another one, interrupted from the keyboard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLLOWED = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
print("begun", flush=True)
time.sleep(60)
"""
# SIGINT has its own handler again, which a test run in the background ignores and hands down.
FOLLOWING = """
import pathlib, re, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from moco_d2.commands import cli
with cli.stop_on_signals("how to go on"):
    cli.guard(lambda: cli.follow(["-c", sys.argv[1]], pathlib.Path("log"), re.compile(".+")))
"""
NEVER_ENDING = FOLLOWED.replace('print("saved", flush=True)', "time.sleep(60)")


@pytest.mark.parametrize(("followed", "presses", "code", "left"), [
    (FOLLOWED, 1, 75, "begun\nsaved\n"), (NEVER_ENDING, 2, 130, "begun\n"),
])  # fmt: skip
def test_the_first_interruption_lets_the_followed_training_save_and_the_second_ends_it(
    followed: str, presses: int, code: int, left: str, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWING, followed], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "log"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    for press in range(presses):
        os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts all of its processes
        time.sleep(0.5 * (press + 1 < presses))
    out, err = process.communicate(timeout=30)
    assert process.returncode == code, out + err
    said = "\nstopping: a running training saves first; press Ctrl-C again to end at once\n"
    assert err == said + "error: interrupted\n" * (code == 130)
    assert out.endswith("stopped: how to go on\n" * (code == 75)) and log.read_text() == left

"""A command that runs another one, interrupted from the keyboard."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
cli.guard(lambda: cli.follow(["-c", sys.argv[1]], pathlib.Path("log"), re.compile(".+")))
"""


def test_an_interruption_from_the_keyboard_lets_the_followed_training_save(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FOLLOWING, FOLLOWED], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    log = tmp_path / "log"
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal interrupts all of its processes
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "error: interrupted\n"), out
    assert log.read_text() == "begun\nsaved\n"

"""A command's --help answers at once: it loads neither torch nor Detectron2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
COMMANDS = [path for path in sorted(TOOLS.glob("*.py")) if "\nif __name__" in path.read_text()]

# Runs a command as Python would, and prints at the end which modules it loaded.
WATCHED = """
import atexit, json, runpy, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules))))
sys.argv = sys.argv[1:]
sys.path.insert(0, {folder!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", COMMANDS, ids=lambda path: path.stem)
def test_help_loads_nothing_heavy(command: Path) -> None:
    watched = WATCHED.format(folder=str(TOOLS))
    done = subprocess.run(
        [sys.executable, "-c", watched, str(command), "--help"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "argparse" in loaded
    assert not loaded & {"torch", "torchvision", "detectron2", "numpy", "moco_d2"}

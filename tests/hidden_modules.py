"""Run Python as it would be on a machine where some packages are missing."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# Python imports sitecustomize at start-up; every finder is wrapped, so that importlib.util.find_spec is fooled as well.
_SITECUSTOMIZE = """
import sys

class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {hidden!r} else self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""


def run_without(hidden: tuple[str, ...], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python *arguments`` from the repository's root with packages hidden.

    Args:
        hidden: names of top-level packages.
        folder: an empty folder of the test's.
        arguments: Python's command line.
    """
    (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(hidden=hidden))
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    environment.pop("DETECTRON2_DATASETS", None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

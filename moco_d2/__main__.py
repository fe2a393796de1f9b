"""The command ``moco-d2``; ``python -m moco_d2`` is the same.

Each command is a module of :mod:`moco_d2.commands` that has the command's name and a ``main(argv)``. Only the module
of the requested command is imported, so that ``moco-d2 doctor`` runs even if torch or Detectron2 cannot be imported.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from moco_d2 import __version__
from moco_d2.commands import cli
from moco_d2.messages import did_you_mean

# In the order in which a newcomer needs them.
COMMANDS = (
    "demo", "doctor", "samples", "pretrain", "probe", "convert", "train", "trials", "sweep", "report", "visualize",
    "predict", "evaluate", "shards",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command that the first word names with the words after it, and end the process with its exit code."""
    cli.guard(lambda: run(sys.argv[1:] if argv is None else argv))


def run(argv: Sequence[str]) -> int:
    """Run a command line, without ``moco-d2`` itself; return the exit code."""
    name, *words = argv or ["--help"]
    if name in COMMANDS:
        return module(name).main(words) or 0
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(f"moco-d2 {__version__}")
    else:
        raise ValueError(f"moco-d2 has no command {name!r}{did_you_mean(name, COMMANDS)} (moco-d2 --help lists them)")
    return 0


def overview() -> str:
    """Return the list of commands; what each does is the first line of its module."""
    lines = (f"  {name:<10} {(module(name).__doc__ or '').splitlines()[0]}" for name in COMMANDS)
    return "\n".join(
        ("usage: moco-d2 COMMAND ...", "", *lines, "", "moco-d2 COMMAND --help explains one; moco-d2 --version.")
    )


def module(name: str) -> ModuleType:
    """Return a command's module."""
    return importlib.import_module(f"moco_d2.commands.{name}")


if __name__ == "__main__":
    main()

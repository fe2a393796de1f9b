"""The command moco-d2: its list of commands, unknown names, and a --help that loads neither torch nor Detectron2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moco_d2.__main__ import COMMANDS, main, module, overview

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted((ROOT / "tools").glob("*.py"))

# Runs Python's arguments as Python would, and prints at the end which modules were loaded.
WATCHED = """
import atexit, json, runpy, sys
atexit.register(lambda: print("\\n" + json.dumps(sorted(sys.modules))))
sys.argv = sys.argv[1:]
if sys.argv[0] == "-m":
    sys.argv[:2] = ["moco-d2"]
    runpy.run_module("moco_d2", run_name="__main__", alter_sys=True)
else:
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "command", [["-m", "moco_d2"], *(["-m", "moco_d2", name] for name in COMMANDS), *([str(tool)] for tool in TOOLS)],
    ids=lambda command: Path(command[-1]).stem,
)  # fmt: skip
def test_help_loads_nothing_heavy(command: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *command, "--help"], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith("usage: moco-d2"), done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert "argparse" in loaded
    assert not loaded & {"torch", "torchvision", "detectron2", "numpy", "PIL", "yaml"}


def test_every_module_of_a_command_is_a_command_and_every_tool_runs_one() -> None:
    modules = {path.stem for path in (ROOT / "moco_d2/commands").glob("*.py")} - {"__init__", "cli"}
    assert modules == set(COMMANDS)
    for tool in TOOLS:
        assert f"the same as ``moco-d2 {tool_command(tool)}``" in tool.read_text().split('"""')[1]


def tool_command(tool: Path) -> str:
    (line,) = (line for line in tool.read_text().splitlines() if line.startswith("from moco_d2.commands."))
    return line.split()[1].rpartition(".")[2]


def test_the_list_of_commands_has_a_line_for_each() -> None:
    lines = [line for line in overview().splitlines() if line.startswith("  ")]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    assert all(line.endswith(".") and len(line) <= 100 for line in lines), lines
    assert all(module(name).main.__doc__ for name in COMMANDS)


@pytest.mark.parametrize(("words", "code", "said"), [
    (["--version"], 0, "moco-d2 0."),
    ([], 0, "usage: moco-d2 COMMAND"),
    (["trian"], 2, "error: moco-d2 has no command 'trian'; did you mean 'train'?"),
    (["--num-gpus"], 2, "error: moco-d2 has no command '--num-gpus' (moco-d2 --help lists them)"),
    (["train", "--no-such-option"], 2, "usage: moco-d2 train"),
])  # fmt: skip
def test_a_command_line_without_a_command(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    out, err = capsys.readouterr()
    assert ended.value.code == code and (err if code else out).startswith(said)

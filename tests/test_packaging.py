"""The first things that a stranger meets: the wheel, the pins, import errors, and the commands of the documents."""

import argparse
import ast
import functools
import itertools
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path

import pytest
from hidden_modules import ROOT, run_without
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moco_d2.__main__
from moco_d2.config import flat, load_cfg
from moco_d2.layers.encoders import ENCODERS, encoder_args
from moco_d2.methods import METHODS, default_args

# torch asks for exactly these itself.
PINNED_BY_TORCH = ("nvidia-", "triton")


def pins(constraints: Path) -> dict[str, str]:
    """Return the distribution names and versions of a constraints file that apply to this Python."""
    lines = constraints.read_text().splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    here = [r for r in requirements if r.marker is None or r.marker.evaluate()]
    versions = {canonicalize_name(r.name): str(r.specifier).removeprefix("==") for r in here}
    assert all(re.fullmatch(r"[\w.]+", version) for version in versions.values()), "only exact versions"
    assert len(versions) == len(here), "a package is pinned twice"
    return versions


def requirements_of(unpacked_wheel: Path) -> list[Requirement]:
    (distribution,) = metadata.distributions(path=[str(unpacked_wheel)])
    return [Requirement(line) for line in distribution.requires or []]


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(unpacked_wheel: Path) -> None:
    assert {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")} == {"moco_d2"}
    shipped = files_below(ROOT / "moco_d2") | {f"configs/{name}" for name in files_below(ROOT / "configs")}
    assert files_below(unpacked_wheel / "moco_d2") == shipped - {"configs/README.md"}
    (distribution,) = metadata.distributions(path=[str(unpacked_wheel)])
    assert f'__version__ = "{distribution.version}"' in (ROOT / "moco_d2" / "__init__.py").read_text()
    assert distribution.metadata["Requires-Python"] == ">=3.10"
    assert f"\nversion: {distribution.version}\n" in (ROOT / "CITATION.cff").read_text()


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.parent.name != "__pycache__"}


def test_the_long_description_needs_no_file_beside_it(unpacked_wheel: Path) -> None:
    (distribution,) = metadata.distributions(path=[str(unpacked_wheel)])
    text = distribution.metadata.get_payload() or distribution.metadata["Description"]
    assert text.startswith("# moco_d2\n\n![License: MIT](https://img.shields.io/")
    assert "make demo" in text and not re.findall(r"\]\((?!https?://)", text)


def test_the_wheel_installs_the_command(unpacked_wheel: Path) -> None:
    (distribution,) = metadata.distributions(path=[str(unpacked_wheel)])
    (script,) = distribution.entry_points
    assert (script.group, script.name) == ("console_scripts", "moco-d2")
    assert script.load() is moco_d2.__main__.main


def test_constraints_pin_every_requirement_within_its_range(unpacked_wheel: Path) -> None:
    pinned = pins(ROOT / "constraints.txt")
    for requirement in requirements_of(unpacked_wheel):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_constraints_pin_what_the_requirements_require(unpacked_wheel: Path) -> None:
    waiting = [r for r in requirements_of(unpacked_wheel) if _applies(r, {"", "dev"})]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        requirement = waiting.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen and not key[0].startswith(PINNED_BY_TORCH):
            seen.add(key)
            needed = (Requirement(line) for line in metadata.requires(key[0]) or [])
            waiting += [r for r in needed if _applies(r, {"", *requirement.extras})]
    assert {name for name, _ in seen} <= set(pins(ROOT / "constraints.txt"))


def _applies(requirement: Requirement, extras: set[str]) -> bool:
    return requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)


def test_what_is_installed_is_what_is_pinned() -> None:
    # `make test CONSTRAINTS=...` says which pins the environment was made with; /dev/null has none to differ from.
    pinned = pins(Path(os.environ.get("CONSTRAINTS") or ROOT / "constraints.txt"))
    installed = {name: _installed_version(name) for name in pinned}
    other = {name: (pin, installed[name]) for name, pin in pinned.items() if installed[name] not in (None, pin)}
    assert not other, "name: (pinned, installed); `make install` brings them together"


def _installed_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def test_import_without_detectron2_names_the_command(tmp_path: Path) -> None:
    done = run_without(("detectron2",), tmp_path, "-c", "import moco_d2.config")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-3:]
    assert last[0].startswith("ImportError: moco_d2 needs detectron2, which is not installed")
    assert last[1].strip() == "python -m moco_d2.install_detectron2"
    assert "During handling" not in done.stderr


@pytest.mark.parametrize(
    "statement",
    [
        "from moco_d2.facts import BackboneFacts",
        "import moco_d2.layers.resnet",
        "from moco_d2.methods import METHODS; assert METHODS",
        "import importlib; importlib.import_module('moco_d2.convert')",
    ],
)
def test_the_torch_only_parts_import_without_detectron2(statement: str, tmp_path: Path) -> None:
    done = run_without(("detectron2", "fvcore"), tmp_path, "-c", statement)
    assert done.returncode == 0, done.stderr


def _documents() -> list[Path]:
    folders = (ROOT, ROOT / "docs", ROOT / "configs", ROOT / "datasets", ROOT / "examples")
    return [path for folder in folders for path in sorted(folder.glob("*.md")) if path.name != "CHANGELOG.md"]


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every command line in the code blocks of a document."""
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line.removeprefix("$ "), comments=True)
            except ValueError:  # a listing or a log, not a command
                continue
            if words:
                yield words


def test_commands_are_found_in_code_blocks() -> None:
    text = "x\n```bash\n$ make demo   # minutes\npython tools/a.py \\\n    --b c\n```\n`make other`\n"
    assert list(commands(text)) == [["make", "demo"], ["python", "tools/a.py", "--b", "c"]]


class Stop(BaseException):
    """Leaves a command where its command line has been read. No Exception: the commands catch those."""


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[str]], None]:
    """Run a command line, ``moco-d2 ...`` or a script of ours, until its parser has read it."""
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser, args: Sequence[str] | None = None, *_: object) -> None:
        parse_args(self, args)
        raise Stop

    def run(command: Sequence[str]) -> None:
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
        monkeypatch.setattr(sys, "argv", list(command))
        ours = functools.partial(moco_d2.__main__.run, command[1:])
        script = functools.partial(runpy.run_path, command[0], run_name="__main__")
        with pytest.raises(Stop):
            (ours if command[0] == "moco-d2" else script)()

    return run


def _command(words: list[str]) -> list[str]:
    """Return the part of a command line from ``moco-d2`` or a script with arguments on; empty if there is none."""
    for index, word in enumerate(words):
        if word == "moco-d2" and words[index + 1 : index + 2] != ["--help"]:
            return words[index:]
        if words[index : index + 2] in (["-m", "moco_d2"], ["-m", "benchmarks"]):
            script = ["moco-d2"] if words[index + 1] == "moco_d2" else [str(ROOT / "benchmarks/__main__.py")]
            return [*script, *words[index + 2 :]]
        if re.fullmatch(r"(\./)?(tools|datasets|examples)/\w+\.py", word) and words[index + 1 :]:
            return [str(ROOT / word), *words[index + 1 :]]
    return []


def _command_lines() -> Iterator[tuple[str, list[str]]]:
    """Yield the place and the words of every command line in documents, and in the help of commands and scripts."""
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in _documents()}
    for folder in ("tools", "datasets", "moco_d2/commands", "benchmarks", "examples"):
        for path in (ROOT / folder).glob("*.py"):
            lines = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
            examples = "\n".join(line for line in lines if line.startswith("    "))
            texts[f"{folder}/{path.name}"] = f"```\n{examples}\n```\n"
    for name, text in texts.items():
        for words in commands(text):
            if command := _command(words):
                yield f"{name}: {shlex.join(words)}", command


def test_every_documented_command_line_is_read_and_its_config_and_keys_exist(
    read: Callable[[Sequence[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    seen, problems = set(), []
    for where, command in _command_lines():
        seen.add(command[1] if command[0] == "moco-d2" else Path(command[0]).name)
        try:
            read(command)
            if "benchmarks" not in command[0]:
                load_cfg(*_config_and_pairs(command))
        except SystemExit:
            problems.append(f"{where}: {capsys.readouterr().err.splitlines()[-1]}")
        except ValueError as error:
            problems.append(f"{where}: {error}")
    assert not problems
    assert seen >= set(moco_d2.__main__.COMMANDS)


def _config_and_pairs(words: list[str]) -> tuple[str, list[str]]:
    """Return a command line's config (of a run: that of a detector) and its KEY VALUE pairs, without placeholders."""
    config = next((after for before, after in itertools.pairwise(words) if before == "--config-file"), "")
    config = "" if config.endswith("...") else config
    config = "PascalVOC-Detection/faster_rcnn_R_50_C4_24k" if config.startswith("output/") else config
    first = next(
        (i for i, word in enumerate(words) if re.fullmatch(r"[A-Z_]+\.[A-Z]\S*|OUTPUT_DIR|SEED", word)), len(words)
    )
    pairs = zip(words[first::2], words[first + 1 :: 2], strict=True)
    return config, [word for pair in pairs if "..." not in pair[1] for word in pair]


def test_every_config_key_in_the_documents_exists() -> None:
    cfg = load_cfg()
    keys = {*flat(cfg)} | {f"SSL.ARGS.{key}" for name in METHODS for key in default_args(name)}
    keys |= {f"SSL.ENCODER.ARGS.{key}" for name in ENCODERS for key in encoder_args(name)}
    groups = {key[: place.start()] for key in keys for place in re.finditer(r"\.", key)}
    found = {
        key
        for path in _documents()
        for key in re.findall(r"\b[A-Z][A-Z0-9_]*(?:\.\w+)+", path.read_text())
        if key.partition(".")[0] in cfg
    }
    assert len(found) > 40 and not found - keys - groups


def test_scripts_documented_without_python_in_front_can_be_run_so() -> None:
    for document in _documents():
        for words in commands(document.read_text()):
            if re.fullmatch(r"(\./)?(tools|datasets|examples)/\w+\.py", words[0]):
                assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is not executable: git update-index --chmod=+x"
                assert (ROOT / words[0]).read_text().startswith("#!/usr/bin/env python3\n")


def test_links_between_documents_lead_somewhere_and_the_index_has_every_page() -> None:
    broken = []
    for document in _documents():
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text()):
            broken += [f"{document.name}: {link}"] * (not (document.parent / link).exists())
    assert not broken
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages <= set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "README.md").read_text()))


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    documented = {
        word
        for document in _documents()
        for words in commands(document.read_text())
        if "make" in words
        for word in words[words.index("make") + 1 :]
        if re.fullmatch(r"[a-z-]+", word)
    }
    assert {"demo", "test"} <= documented <= targets


def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.20 && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"moco_d2 needs Python 3.10 or later; {old} is: Python 3.8.20" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", script], check=True)
    assert {"make lint", "make docs", "make test", "make demo"} <= set(script.read_text().splitlines())

"""What a stranger meets first: the wheel, the pins, the import errors, and the commands that the documents give."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hidden_modules import ROOT, run_without
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moco_d2.config import config_files, list_configs

# torch asks for exactly these itself.
PINNED_BY_TORCH = ("nvidia-", "triton")


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the working tree, unpacked as pip would."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in ("moco_d2", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    done = subprocess.run(
        [*pip, "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(source / "dist"), str(source)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


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


def test_an_installed_wheel_finds_its_configs(unpacked_wheel: Path) -> None:
    code = "import moco_d2.config as c; print(c.__file__, *c.list_configs()); c.load_cfg(c.list_configs()[0])"
    environment = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=unpacked_wheel, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    module, *names = done.stdout.split()
    assert Path(module).is_relative_to(unpacked_wheel)
    assert names == list_configs()


def test_the_wheel_holds_the_package_and_nothing_else(unpacked_wheel: Path) -> None:
    assert {path.name for path in unpacked_wheel.iterdir() if not path.name.endswith(".dist-info")} == {"moco_d2"}
    (distribution,) = metadata.distributions(path=[str(unpacked_wheel)])
    assert f'__version__ = "{distribution.version}"' in (ROOT / "moco_d2" / "__init__.py").read_text()
    assert distribution.metadata["Requires-Python"] == ">=3.10"


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
    done = run_without(("detectron2",), tmp_path, "-c", "import moco_d2")
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
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


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


def _scripts() -> dict[tuple[str, ...], set[str]]:
    """Return the scripts that the documents run, with their subcommand if any, and the options that they give it."""
    scripts: dict[tuple[str, ...], set[str]] = {}
    for document in _documents():
        for words in commands(document.read_text()):
            for index, word in enumerate(words):
                if re.fullmatch(r"(\./)?(tools|datasets)/\w+\.py", word):
                    options = {w.partition("=")[0] for w in words[index + 1 :] if re.match(r"--?[a-z]", w)}
                    subcommand = [w for w in words[index + 1 : index + 2] if re.fullmatch("[a-z]+", w)]
                    scripts.setdefault((word.removeprefix("./"), *subcommand), set()).update(options)
    return scripts


def test_documented_scripts_exist_and_take_the_documented_options() -> None:
    scripts = _scripts()
    assert scripts, "the README shows how to run the tools"
    running = {
        script: subprocess.Popen(
            [sys.executable, *script, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for script in scripts
    }
    for script, process in running.items():
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, f"{script} --help: {output}"
        unknown = {option for option in scripts[script] if not re.search(rf"{option}\b", output)}
        assert not unknown, f"{script} has no {unknown}"


def test_scripts_documented_without_python_in_front_can_be_run_so() -> None:
    for document in _documents():
        for words in commands(document.read_text()):
            if re.fullmatch(r"(\./)?(tools|datasets)/\w+\.py", words[0]):
                assert os.access(ROOT / words[0], os.X_OK), f"{words[0]} is not executable: git update-index --chmod=+x"
                assert (ROOT / words[0]).read_text().startswith("#!/usr/bin/env python3\n")


def test_documented_configs_exist() -> None:
    named = {
        word
        for document in _documents()
        for words in commands(document.read_text())
        for before, word in itertools.pairwise(words)
        if before in ("--config-file", "--config") and "..." not in word and "<" not in word
    }
    assert named, "the README names the configs of its commands"
    for name in named:
        assert config_files(ROOT / name if name.endswith(".yaml") else name)


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
    assert {"make lint", "make test", "make demo"} <= set(script.read_text().splitlines())

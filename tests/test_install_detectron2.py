"""Detectron2's installer: what it unpacks, what it refuses, and that pip can take it away again."""

import hashlib
import importlib.util
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from moco_d2 import install_detectron2 as installer

INFO = "sal_detectron2-0.7.2.dist-info"
METADATA = """Metadata-Version: 2.1
Name: sal-detectron2
Version: 0.7.2
Requires-Dist: Pillow>=7.1
Requires-Dist: numpy<2
Requires-Dist: black
Requires-Dist: black==23.3.0; extra == "dev"
"""
WHEEL_FILES = {
    "detectron2/__init__.py": "__version__ = '0.6'\n",
    "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "not loadable",
    "detectron2/model_zoo/configs/Base.yaml": "VERSION: 2\n",
    "tools/__init__.py": "",
    "tools/train_net.py": "print('stray')\n",
    f"{INFO}/METADATA": METADATA,
    f"{INFO}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: cp310-cp310-linux_x86_64\n",
    f"{INFO}/top_level.txt": "detectron2\ntools\n",
    f"{INFO}/RECORD": "tools/train_net.py,sha256=x,1\n",
}


def make_wheel(folder: Path, files: dict[str, str]) -> Path:
    wheel = folder / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    return make_wheel(tmp_path, WHEEL_FILES)


def test_unpacks_the_python_part_only(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"

    left_out = installer.unpack(wheel, site)

    assert left_out == ["detectron2/_C.cpython-310-x86_64-linux-gnu.so", "tools/__init__.py", "tools/train_net.py"]
    files = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert files == {
        "detectron2/__init__.py",
        "detectron2/model_zoo/configs/Base.yaml",
        *(f"{INFO}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "INSTALLER", "top_level.txt")),
    }


def test_record_lists_every_file_with_its_hash(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    installer.unpack(wheel, site)

    (distribution,) = metadata.distributions(path=[str(site)])
    recorded = {str(file): file for file in distribution.files or []}

    assert set(recorded) == {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    init = recorded["detectron2/__init__.py"]
    assert init.hash is not None
    assert init.hash.mode == "sha256"
    assert init.size == len(WHEEL_FILES["detectron2/__init__.py"])


def test_requirements_that_are_no_conflict_are_dropped(wheel: Path, tmp_path: Path) -> None:
    installer.unpack(wheel, tmp_path / "site")

    (distribution,) = metadata.distributions(path=[str(tmp_path / "site")])

    assert distribution.requires == ["Pillow>=7.1", "numpy", 'black==23.3.0; extra == "dev"']
    assert "requirements" in (distribution.read_text("METADATA") or "")  # the note that says so


def test_pip_uninstalls_all_of_it(wheel: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    purelib = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", purelib], check=True, capture_output=True, text=True).stdout.strip())
    installer.unpack(wheel, site)
    subprocess.run([python, "-c", "import detectron2"], check=True)  # leaves a __pycache__ behind

    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    done = subprocess.run([*pip, "uninstall", "--yes", "sal-detectron2"], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert not [path.name for path in site.iterdir() if "detectron2" in path.name]


def test_another_file_is_refused_by_its_hash(wheel: Path) -> None:
    with pytest.raises(ValueError, match=r"SHA-256 [0-9a-f]{64}, but 491af0c7.* nothing was installed"):
        installer.check_hash(wheel)
    installer.check_hash(wheel, hashlib.sha256(wheel.read_bytes()).hexdigest())


def test_a_wheel_of_something_else_leaves_nothing(tmp_path: Path) -> None:
    files = {name: text for name, text in WHEEL_FILES.items() if name != "detectron2/__init__.py"}
    site = tmp_path / "site"
    with pytest.raises(ValueError, match="has no detectron2 package"):
        installer.unpack(make_wheel(tmp_path, files), site)
    assert list(site.iterdir()) == []


def test_a_failure_in_the_middle_leaves_nothing(wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def full_disk(self: Path, target: Path) -> Path:
        if self.name == "detectron2":
            raise OSError("No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(OSError, match="No space left"):
        installer.unpack(wheel, tmp_path / "site")
    assert list((tmp_path / "site").iterdir()) == []


def test_a_folder_in_the_way_is_named_and_kept(wheel: Path, tmp_path: Path) -> None:
    mine = tmp_path / "site" / "detectron2" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(ValueError, match="exists although it cannot be imported"):
        installer.unpack(wheel, tmp_path / "site")
    assert mine.exists()


def test_an_importable_detectron2_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(installer, "_pip", lambda *arguments: pytest.fail(f"pip was called: {arguments}"))
    monkeypatch.setenv("DETECTRON2", "git+https://example.org/detectron2.git")

    assert installer.main() == 0

    said = capsys.readouterr().out
    assert "installed already" in said
    assert str(installer.find()) in said
    assert "is not used" in said


def test_detectron2_names_another_source(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(installer, "_pip", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(installer, "find", lambda: Path("/somewhere/detectron2") if calls else None)
    monkeypatch.setenv("DETECTRON2", installer.OFFICIAL)

    assert installer.main() == 0

    assert calls == [("install", "--no-build-isolation", "--no-deps", installer.OFFICIAL)]
    assert "/somewhere/detectron2" in capsys.readouterr().out


def test_the_pinned_wheel_is_downloaded_by_hash(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    site = tmp_path / "site"
    asked: list[str] = []

    def download(*arguments: str) -> None:
        destination = Path(arguments[arguments.index("--dest") + 1])
        asked.append(Path(arguments[-1]).read_text())
        (destination / wheel.name).write_bytes(wheel.read_bytes())

    def find() -> Path | None:
        return site / "detectron2" if (site / "detectron2").exists() else None

    monkeypatch.setattr(installer, "_pip", download)
    monkeypatch.setattr(installer, "find", find)
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: str(site))
    monkeypatch.delenv("DETECTRON2", raising=False)

    # The file is not the published one: it must be refused even if the download had let it through.
    assert installer.main() == 1
    assert asked == [f"{installer.REQUIREMENT} --hash=sha256:{installer.SHA256}\n"]
    assert "SHA-256" in capsys.readouterr().err
    assert not site.exists()

    monkeypatch.setattr(installer, "check_hash", lambda wheel: None)
    assert installer.main() == 0
    assert "installed" in capsys.readouterr().out
    assert (site / "detectron2" / "__init__.py").exists()


def test_a_folder_that_only_has_the_name_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "detectron2").mkdir()  # a git clone in the working directory looks like this
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert importlib.util.find_spec("detectron2") is not None
    assert installer.find() is None

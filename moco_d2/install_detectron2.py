"""Install Detectron2, which is not on PyPI under its own name (``python -m moco_d2.install_detectron2``).

In this order:

1. If Python can already import a Detectron2, nothing is installed.
2. If the environment variable ``DETECTRON2`` is set, pip installs its value, for example
   ``git+https://github.com/facebookresearch/detectron2.git`` (compiles for some minutes, needs a C++ compiler).
3. Otherwise: PyPI's ``sal-detectron2`` 0.7.2, upstream's tree of August 2024, repackaged. It has a single wheel, tagged
   for CPython 3.10, whose Python part runs on any later Python; this script checks its hash and unpacks that part.

Standard library only, so that it runs before anything else is installed.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path, PurePosixPath

from moco_d2.exits import guard

COMMAND = "python -m moco_d2.install_detectron2"

REQUIREMENT = "sal-detectron2==0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
OFFICIAL = "git+https://github.com/facebookresearch/detectron2.git"

# pip downloads a wheel tagged cp310 on another Python only if it is told that this is Python 3.10.
_DOWNLOAD = ("download", "--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", "--python-version", "3.10")

# Requirements without need, about which `pip check` would complain: the code runs with numpy 2 (tested with 2.4), and
# black only formats dumps of LazyConfig, where it is imported on use.
_RELAXED = {"Requires-Dist: numpy<2": "Requires-Dist: numpy", "Requires-Dist: black": None}
_NOTE = (
    "Unpacked by moco_d2.install_detectron2: the compiled extension (built for CPython 3.10 and an old torch) and the "
    'top-level package "tools" are left out; the requirements "numpy<2" and "black" are dropped.'
)


def find() -> Path | None:
    """Return the folder of the Detectron2 that ``import detectron2`` would take, without importing it."""
    spec = importlib.util.find_spec("detectron2")
    # A mere folder of this name (a git clone in the working directory) is a namespace package, which has no origin.
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def distribution(folder: Path) -> str:
    """Return the name and version of the installed distribution that contains a Detectron2 folder."""
    names = metadata.packages_distributions().get("detectron2", [])
    return ", ".join(f"{name} {metadata.version(name)}" for name in sorted(set(names))) or f"a checkout at {folder}"


def check_hash(wheel: Path, sha256: str = SHA256) -> None:
    """Refuse a file that is not the expected one.

    Raises:
        ValueError: the SHA-256 differs.
    """
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{wheel.name} has SHA-256 {found}, but {sha256} was expected; nothing was installed")


def unpack(wheel: Path, site_packages: Path) -> list[str]:
    """Unpack the Python part of a ``sal-detectron2`` wheel, ``detectron2/`` and its metadata, or nothing on failure.

    Args:
        wheel: the wheel file, already checked.
        site_packages: the target folder.

    Returns:
        The wheel's files that were left out.

    Raises:
        ValueError: the wheel has no ``detectron2`` package or no metadata, or the folder exists already.
    """
    site_packages.mkdir(parents=True, exist_ok=True)
    # On the same file system as the target, so that the last step is a rename: an earlier failure leaves nothing.
    with tempfile.TemporaryDirectory(dir=site_packages, prefix=".detectron2-") as temporary:
        stage = Path(temporary)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
            kept = [name for name in names if _wanted(name)]
            info = next((name.split("/")[0] for name in kept if name.endswith(".dist-info/METADATA")), None)
            if info is None or "detectron2/__init__.py" not in kept:
                raise ValueError(f"{wheel.name} has no detectron2 package or no metadata; nothing was installed")
            archive.extractall(stage, kept)
        _rewrite_metadata(stage / info)
        _write_record(stage, info)
        _move_in(stage, site_packages, info)
    return sorted(name for name in set(names) - set(kept) if not name.endswith("/RECORD"))


def _wanted(name: str) -> bool:
    path = PurePosixPath(name)
    if path.parts[0].endswith(".dist-info"):
        return path.name != "RECORD"  # written again for the files that are kept
    # The extension is built for the C++ interface of an old torch: no supported version loads it, even on Python 3.10.
    return path.parts[0] == "detectron2" and path.suffix != ".so" and ".." not in path.parts


def _rewrite_metadata(info: Path) -> None:
    lines = (info / "METADATA").read_text(encoding="utf-8").rstrip("\n").split("\n")
    relaxed = [new for line in lines if (new := _RELAXED.get(line, line)) is not None]
    headers_end = relaxed.index("") if "" in relaxed else len(relaxed)
    body = ["", _NOTE, *relaxed[headers_end:]]
    (info / "METADATA").write_text("\n".join(relaxed[:headers_end] + body) + "\n", encoding="utf-8")
    (info / "top_level.txt").write_text("detectron2\n", encoding="utf-8")
    (info / "INSTALLER").write_text("moco_d2\n", encoding="utf-8")


def _write_record(stage: Path, info: str) -> None:
    """List every file with its hash, so that ``pip uninstall`` removes exactly these files."""
    rows = []
    for path in sorted(p for p in stage.rglob("*") if p.is_file()):
        data = path.read_bytes()
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.append(f"{path.relative_to(stage).as_posix()},sha256={digest},{len(data)}")
    rows.append(f"{info}/RECORD,,")
    (stage / info / "RECORD").write_text("\n".join(rows) + "\n", encoding="utf-8")


def _move_in(stage: Path, site_packages: Path, info: str) -> None:
    package = site_packages / "detectron2"
    if package.exists():
        raise ValueError(f"{package} exists although it cannot be imported; remove it and try again")
    # The package comes last: after an earlier failure nothing can be imported, and the next run replaces the record.
    shutil.rmtree(site_packages / info, ignore_errors=True)
    (stage / info).rename(site_packages / info)
    try:
        (stage / "detectron2").rename(package)
    except BaseException:
        shutil.rmtree(site_packages / info, ignore_errors=True)
        raise


def _pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True)


def _install_spec(spec: str) -> None:
    # --no-build-isolation: Detectron2's setup.py imports the torch that it is built for.
    # --no-deps: our setup.py has its requirements, and its pins (iopath<0.1.10) would replace tested versions.
    _pip("install", "--no-build-isolation", "--no-deps", spec)


def _install_sal() -> list[str]:
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary, "requirements.txt")
        requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n")
        _pip(*_DOWNLOAD, "--dest", temporary, "-r", str(requirements))
        wheel = next(Path(temporary).glob("*.whl"))
        check_hash(wheel)
        return unpack(wheel, Path(sysconfig.get_path("purelib")))


def main() -> int:
    """Install Detectron2 unless it is installed already, and print what was done."""
    present = find()
    spec = os.environ.get("DETECTRON2", "").strip()
    if present is not None:
        print(f"detectron2 is installed already: {distribution(present)}, in {present}")
        if spec:
            print(f"  DETECTRON2={spec} is not used: to install that one, pip uninstall this one first")
        return 0
    try:
        if spec:
            print(f"installing detectron2 from DETECTRON2={spec}")
            _install_spec(spec)
        else:
            left_out = _install_sal()
    except (subprocess.CalledProcessError, OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"detectron2 could not be installed: {error}", file=sys.stderr)
        command = f"DETECTRON2={OFFICIAL} {sys.executable} -m moco_d2.install_detectron2"
        print(f"another way, if GitHub can be reached:\n    {command}", file=sys.stderr)
        return 1
    importlib.invalidate_caches()
    present = find()
    print(f"installed {distribution(present) if present else spec} in {present}")
    if not spec:
        print(f"  the Python part of PyPI's {REQUIREMENT}, SHA-256 checked ({len(left_out)} files left out)")
        print("  without its compiled part, which only rotated boxes, deformable convolution and fast COCO AP need")
    return 0


if __name__ == "__main__":
    guard(main)

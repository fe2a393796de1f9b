"""Destinations: what the user has is neither overwritten nor removed, whatever it is called and wherever it lies."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moco_d2.io import files, locks


def tree(folder: Path) -> dict[str, bytes]:
    """Content of all files, links by where they lead."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() or path.is_symlink()
    }


GOOD = ("parts", "my parts", "é", "零件", "con", "a.b", "v1.0-rc_2", "~", "$HOME", "[ab]*", "x" * 200)
BAD = ("", ".", "..", "/", "/abs", "a/b", "a/", "../a", "a\\b", ".hidden", files.MARKER, "a\nb", "a\0b", "\x1b[2J",
       "\udcff", "x" * 201, "é" * 101)  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_a_plain_name_is_a_file_s_name(name: str, tmp_path: Path) -> None:
    assert files.name_problem(name) is None
    assert files.file_name(name) == name
    with files.atomic_write(tmp_path / f"{name}.json") as file:
        file.write(b"x")
    assert tree(tmp_path) == {f"{name}.json": b"x"}


@pytest.mark.parametrize("name", BAD)
def test_another_name_is_refused_or_made_one_that_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    assert files.name_problem(name)
    made = files.file_name(name)
    assert files.name_problem(made) is None
    assert (tmp_path / made).parent == tmp_path
    assert files.file_name(f"{name}x") != made


def ours(path: Path) -> bool:
    return path.read_bytes().startswith(b"ours")


def test_a_named_file_replaces_only_what_such_a_command_wrote(tmp_path: Path) -> None:
    path = tmp_path / "new" / "out"
    for text in (b"ours 1", b"ours 2"):
        with files.named_file(path, ours) as file:
            file.write(text)
    assert tree(tmp_path) == {"new/out": b"ours 2"}
    path.write_bytes(b"the user's")
    with (
        pytest.raises(ValueError, match="this file exists, and this command did not write it"),
        files.named_file(path, ours) as file,
    ):
        file.write(b"ours 3")
    assert tree(tmp_path) == {"new/out": b"the user's"}


def test_links_do_not_lead_into_the_user_s_files(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(b"the user's")
    (tmp_path / "soft").symlink_to(mine)
    (tmp_path / "hard").hardlink_to(mine)
    for name in ("soft", "hard"):
        with (
            pytest.raises(ValueError, match="command did not write it"),
            files.named_file(tmp_path / name, ours) as file,
        ):
            file.write(b"ours")
        with files.atomic_write(tmp_path / name) as file:  # a name of ours, which somebody made a link
            file.write(b"ours")
    assert tree(tmp_path) == {"mine": b"the user's", "soft": b"ours", "hard": b"ours"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "file")  # where the user wants it
    with files.named_file(tmp_path / "link", ours) as file:
        file.write(b"ours")
    assert (tmp_path / "link").is_symlink() and tree(tmp_path)["elsewhere/file"] == b"ours"


@pytest.mark.parametrize(
    "path", ["file/below", "file/below/deeper", "/dev/null", "/dev/null/x", "/proc/x/y", "folder", "x" * 256]
)
def test_what_cannot_be_written_is_told_in_one_line_before_the_work(path: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("the user's")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError) as caught, files.named_file(tmp_path / path, ours):
        raise AssertionError("the work began")
    assert str(tmp_path / path) in str(caught.value) and "\n" not in str(caught.value)
    if path not in ("/dev/null", "folder"):
        with pytest.raises(ValueError, match=r"OUTPUT_DIR .*: cannot be written to"):
            files.claim(tmp_path / path, ["a"], "OUTPUT_DIR")
    assert tree(tmp_path) == {"file": b"the user's"} and Path("/dev/null").is_char_device()


def test_only_noted_entries_are_overwritten(tmp_path: Path) -> None:
    (tmp_path / "theirs.json").write_text("the user's")
    with pytest.raises(ValueError, match=r"contains theirs\.json"):
        files.claim(tmp_path, [files.exactly("theirs.json")], "--output")
    assert tree(tmp_path) == {"theirs.json": b"the user's"}, "a refusal leaves no note"
    files.claim(tmp_path, [files.exactly("[ab].json"), "log.*"], "--output")
    (tmp_path / "[ab].json").write_text("ours")
    (tmp_path / "a.json").write_text("the user's")
    files.claim(tmp_path, [files.exactly("[ab].json"), "log.*"], "--output")
    with pytest.raises(ValueError, match=r"contains a\.json"):
        files.claim(tmp_path, [files.exactly("a.json")], "--output")


def test_only_a_folder_of_ours_is_replaced_or_emptied(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "parts"
    for text in ("1", "2"):
        with files.replaced_folder(folder, "OUTPUT_DIR") as new:
            files.write_text(new, "Annotations/a/b.xml", text)
    assert (
        tree(folder).keys() == {files.MARKER, "Annotations/a/b.xml"}
        and (folder / "Annotations/a/b.xml").read_text() == "2"
    )
    (folder / "JPEGImages").mkdir()  # the user makes a data set of it
    before = tree(tmp_path)
    for use in (
        lambda: files.replaced_folder(folder, "OUT").__enter__(),
        lambda: files.fresh_folder(folder, ["x"], "OUT"),
    ):
        with pytest.raises(ValueError, match="contains JPEGImages, which this command did not write"):
            use()
    (folder / "JPEGImages").rmdir()
    (folder / "Annotations/a/mine.xml").write_text("the user's")
    with pytest.raises(ValueError, match=r"contains Annotations/a/mine\.xml, which this command did not write"):
        files.replaced_folder(folder, "OUT").__enter__()
    (folder / "Annotations/a/mine.xml").unlink()
    (folder / "JPEGImages").mkdir()
    (tmp_path / "link").symlink_to(folder)
    with pytest.raises(ValueError, match="is a link"), files.replaced_folder(tmp_path / "link", "OUT"):
        pass
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before and (folder / "JPEGImages").is_dir()


def test_a_folder_that_is_emptied_is_looked_through(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    files.fresh_folder(out, ["datasets"], "--output")
    with pytest.raises(ValueError, match="another command writes to --output"):
        files.fresh_folder(out, ["datasets"], "--output")
    locks.unlock(out / locks.LOCK)
    with files.replaced_folder(out / "datasets", "OUT") as new:
        files.write_text(new, "a.txt", "ours")
    (out / "datasets" / "mine").mkdir()
    with pytest.raises(ValueError, match="contains mine, which"):
        files.fresh_folder(out, ["datasets"], "--output")
    (out / "datasets" / "mine").rmdir()
    files.fresh_folder(out, ["datasets"], "--output")
    assert tree(out).keys() == {files.MARKER, locks.LOCK}
    locks.unlock(out / locks.LOCK)


@pytest.mark.parametrize("name", ["../x.xml", "/etc/x.xml", "a/../../x.xml"])
def test_a_file_of_a_new_folder_stays_in_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leads out"), files.replaced_folder(tmp_path / "f", "OUT") as new:
        files.write_text(new, name, "x")
    assert not list(tmp_path.iterdir())


OUR_NAMES = ("model_0000019.pth", ".config.yaml.abc123_z.partial", ".making.json", "0123456789abcdef-000.tar",
             "moco.download.part.version", "0123456789abcdef.json", "moco.download", "moco.download.part",
             "0123456789abcdef-000.77.part")  # fmt: skip
THEIR_NAMES = (
    "model_final.pth",
    "model_best.pth",
    "000.tar",
    "film.part",
    ".bashrc",
    "notes.partial",
    "a.json",
    "x.jpg",
)


@pytest.mark.parametrize("name", OUR_NAMES + THEIR_NAMES)
def test_only_names_of_ours_are_removed_or_moved_over(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("old")
    (tmp_path / "new").write_text("new")
    if name in OUR_NAMES:
        files.move(tmp_path / "new", tmp_path / name)
        files.remove(tmp_path / name)
        assert not list(tmp_path.iterdir())
        return
    for act in (lambda: files.remove(tmp_path / name), lambda: files.move(tmp_path / "new", tmp_path / name)):
        with pytest.raises(ValueError, match=r"is not removed|did not write it"):
            act()
    files.remove_leftovers(tmp_path)
    assert tree(tmp_path) == {name: b"old", "new": b"new"}


HOLD = """
import importlib.util, os, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("locks", sys.argv[2])  # without the package: quick
locks = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locks)
print(locks.lock(Path(sys.argv[1])) is not None, flush=True)
if os.fork() == 0:  # as a data loader's worker, which outlives its parent
    print("forked", flush=True)
time.sleep(60)
"""


def test_a_lock_keeps_others_out_until_its_process_dies(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLD, str(path), locks.__file__]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        try:
            assert [process.stdout.readline(), process.stdout.readline()] == ["True\n", "forked\n"]
            assert locks.lock(path) is None
            assert locks.holder(path).endswith(f"process {process.pid}")
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            assert locks.lock(path) is not None, "the fork has it no more"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
    locks.unlock(path)


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    assert locks.lock(tmp_path / "lock") is not None
    assert "cannot be locked (No locks available)" in caplog.text
    locks.unlock(tmp_path / "lock")


def test_results_are_known_by_their_keys(tmp_path: Path) -> None:
    path, test = tmp_path / "x.json", files.has_keys("metrics", "command")
    for text in ("", "[]", "1", "[" * 100_000, "{", json.dumps({"metrics": 1}), "\udcff"):
        path.write_text(text, errors="surrogateescape")
        assert not test(path)
    path.write_text(json.dumps({"metrics": 1, "command": "x", "more": 2}))
    assert test(path)

"""Checkpoints: any damage shows, the last whole one is used, a full disk harms nothing, old ones go."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from moco_d2.detection.trainer import TransferCheckpointer
from moco_d2.io.checkpoints import read_checkpoint
from moco_d2.io.files import atomic_write
from moco_d2.running.checkpoints import (
    NotWrittenError,
    PeriodicCheckpoint,
    damage,
    last_intact,
    recorded_seed,
    write_tensors,
)

ROOT = Path(__file__).parents[2]


def run_of(folder: Path, steps: int, keep: int = 0, keep_every: int = 0, period: int = 1) -> nn.Module:
    """Save a run's checkpoints, each with other weights, as the trainers do."""
    model = nn.Linear(8, 8)
    hook = PeriodicCheckpoint(TransferCheckpointer(model, str(folder)), period, keep, keep_every)
    for step in range(steps):
        nn.init.constant_(model.weight, step)
        hook.trainer = SimpleNamespace(iter=step, max_iter=steps + 1)
        hook.after_step()
    return model


def test_damage_anywhere_in_a_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    content = {"model": {"w": torch.randn(300), "b": torch.arange(40)}, "iteration": 3, "facts": {"origin": "a test"}}
    write_tensors(content, path)
    assert damage(path) == ""
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for length in rng.integers(0, len(good), 50):
        path.write_bytes(good[:length])
        assert damage(path), length
    missed = 0
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(bad)
        if not damage(path):  # padding, times and the like, which nobody reads
            missed += 1
            read = read_checkpoint(path)
            assert all(torch.equal(read["model"][key], value) for key, value in content["model"].items())
            assert (read["iteration"], read["facts"]) == (3, {"origin": "a test"})
    assert missed < len(good) / 6


@pytest.mark.parametrize("harm", ["cut", "altered", "emptied", "gone"])
def test_a_damaged_last_checkpoint_gives_way_to_the_one_before(tmp_path: Path, caplog, harm: str) -> None:
    run_of(tmp_path, 3)
    last = tmp_path / "model_0000002.pth"
    assert last_intact(tmp_path) == str(last)
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    contents = {"cut": bytes(data[: len(data) // 2]), "altered": bytes(data), "emptied": b""}
    last.unlink() if harm == "gone" else last.write_bytes(contents[harm])
    with caplog.at_level(logging.WARNING):
        chosen = last_intact(tmp_path)
    assert chosen == str(tmp_path / "model_0000001.pth")
    assert f"{last} is damaged" in caplog.text
    model = nn.Linear(8, 8)
    assert DetectionCheckpointer(model).load(chosen)["iteration"] == 1
    assert model.weight.eq(1).all()
    for path in tmp_path.glob("model_*"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"all . checkpoints in .* are damaged"):
        last_intact(tmp_path)


def test_the_seed_is_found_without_reading_the_tensors(tmp_path: Path) -> None:
    """A run that draws its seed asks for it before it resumes, which reads the checkpoint through."""
    assert recorded_seed(tmp_path) is None
    for seed in (5, 7):
        write_tensors({"model": {"w": torch.zeros(9999)}, "trainer": {"run": {"SEED": seed}}}, tmp_path / f"{seed}.pth")
    (tmp_path / "5.pth").rename(tmp_path / "model_0000001.pth")
    (tmp_path / "last_checkpoint").write_text("7.pth")
    good = (tmp_path / "7.pth").read_bytes()
    bad = bytearray(good)
    bad[len(bad) // 2] ^= 1
    (tmp_path / "7.pth").write_bytes(bad)
    assert damage(tmp_path / "7.pth") and recorded_seed(tmp_path) == 7
    place = good.index(b"SEED") + good[good.index(b"SEED") :].index(b"K\x07") + 1  # the number in the pickle
    (tmp_path / "7.pth").write_bytes(good[:place] + b"\x08" + good[place + 1 :])
    assert recorded_seed(tmp_path) == 5


def test_a_folder_that_is_gone_is_said(tmp_path: Path) -> None:
    (tmp_path / "gone").touch()  # a file where the folder was, which cannot be made again
    with pytest.raises(NotWrittenError, match=r"cannot write .*/gone/a\.pth: [\w ]+\. The last checkpoint is"):
        write_tensors({}, tmp_path / "gone/a.pth")


def test_a_pointer_that_was_not_written_in_time_does_not_matter(tmp_path: Path) -> None:
    assert last_intact(tmp_path) == ""
    run_of(tmp_path, 2)
    for text in ("", "model_00000", "\0\0\0"):
        (tmp_path / "last_checkpoint").write_text(text)
        assert last_intact(tmp_path) == str(tmp_path / "model_0000001.pth")


def test_the_newest_and_every_mth_are_kept_over_restarts(tmp_path: Path) -> None:
    run_of(tmp_path, 7, keep=2, keep_every=4, period=2)
    run_of(tmp_path, 14, keep=2, keep_every=4, period=2)  # another process, which made none of those
    kept = [int(path.stem[-7:]) + 1 for path in sorted(tmp_path.glob("model_0*"))]
    assert kept == [4, 8, 12, 14]


def test_what_is_later_than_the_place_of_a_resume_neither_displaces_new_checkpoints_nor_goes_before_old_ones(
    tmp_path: Path,
) -> None:
    run_of(tmp_path, 6)
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")  # 3 to 5 were written, and the pointer not moved
    hook = PeriodicCheckpoint(TransferCheckpointer(nn.Linear(8, 8), str(tmp_path)), period=4, keep=1)
    hook.trainer = SimpleNamespace(iter=3, max_iter=9)
    hook.after_step()
    last = tmp_path / "model_0000003.pth"
    assert last_intact(tmp_path) == str(last)
    assert [path.name[-5] for path in sorted(tmp_path.glob("model_*"))] == ["3", "4", "5"]
    run_of(tmp_path / "again", 6)
    last = tmp_path / "again/model_0000003.pth"
    (tmp_path / "again/last_checkpoint").write_text(last.name)
    last.write_bytes(b"")
    assert last_intact(tmp_path / "again") == str(tmp_path / "again/model_0000002.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(TypeError), atomic_write(path) as file:
        file.write("not bytes")
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and path.read_text() == "old"


DISK_FULL = """
    import sys, torch
    from torch import nn
    from moco_d2.detection.trainer import TransferCheckpointer
    from moco_d2.running.checkpoints import NotWrittenError, damage, last_intact
    folder, size = sys.argv[1], int(sys.argv[2])
    TransferCheckpointer(nn.Linear(size // 8, 1), folder).save("model_0000000")
    try:
        TransferCheckpointer(nn.Linear(size, 1), folder).save("model_0000001")
    except NotWrittenError as error:
        print(error)
    print(last_intact(folder), repr(damage(last_intact(folder))))
"""


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path: Path) -> None:
    """On a real file system of 1 MiB where one can be mounted, else under a limit of the size of files."""
    (tmp_path / "script.py").write_text(textwrap.dedent(DISK_FULL))
    disk = tmp_path / "disk"
    disk.mkdir()
    python = f"{sys.executable} {tmp_path}/script.py {disk} 1000000 && ls -A {disk}"  # 4 MB of weights
    mounted = f"mount -t tmpfs -o size=1m none {disk} && {python}"
    limited = f"trap '' XFSZ; ulimit -f 1024; {python}"
    may_mount = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"mount -t tmpfs -o size=1m none {disk}"], capture_output=True, check=False
    )
    command = ["unshare", "-rm", "sh", "-c", mounted] if may_mount.returncode == 0 else ["bash", "-c", limited]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    message, kept, *files = done.stdout.splitlines()
    reason = "No space left on device" if may_mount.returncode == 0 else "File too large"
    assert message.startswith(f"cannot write {disk}/model_0000001.pth: {reason} (")
    assert f"The last checkpoint is untouched: {disk}/model_0000000.pth. Make room and continue" in message
    assert kept == f"{disk}/model_0000000.pth ''"
    assert files == ["last_checkpoint", "model_0000000.pth"]

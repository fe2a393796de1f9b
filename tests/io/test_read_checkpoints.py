from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import pickle
import random
import resource
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from moco_d2.convert import CheckpointError, read_checkpoint, read_facts
from moco_d2.facts import CAFFE_BGR, ResNetFacts
from moco_d2.io.unpickle import Stub

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Attack:
    """What a hostile file holds: unpickling it runs ``function``."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def to_zip(content: Any, path: Path) -> None:
    torch.save(content, path)


def to_legacy(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def to_pickle(content: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


def to_safetensors(content: Any, path: Path) -> None:
    safetensors.torch.save_file(content, path)


@pytest.mark.parametrize("name", ["x.pth", "x.pth.tar", "x.pkl", "noname"])
@pytest.mark.parametrize("write", [to_zip, to_legacy, to_pickle, to_safetensors])
def test_the_content_tells_the_format(write: Callable[[Any, Path], None], name: str, tmp_path: Path) -> None:
    write({"a": WEIGHT, "b": WEIGHT.half()}, tmp_path / name)
    read = read_checkpoint(str(tmp_path / name))
    assert torch.equal(read["a"], WEIGHT) and read["b"].dtype == torch.float16


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "posix.system": lambda mark: Attack(os.system, f"touch {mark}"),
    "io.open": lambda mark: Attack(open, str(mark), "w"),
    "eval": lambda mark: Attack(eval, f"open({str(mark)!r}, 'w')"),
    "__import__": lambda mark: Attack(getattr, Attack(__import__, "os"), "system"),
    "torch.serialization.load": lambda mark: Attack(torch.load, str(mark)),
    "subprocess.Popen": lambda mark: Attack(subprocess.Popen, ["touch", str(mark)]),
    "shutil.rmtree": lambda mark: Attack(shutil.rmtree, str(mark.parent)),
    "runpy._run_code": lambda mark: Attack(runpy._run_code, "", {}),
    "importlib.import_module": lambda mark: Attack(importlib.import_module, "os"),
    "numpy.memmap": lambda mark: Attack(np.memmap, str(mark), "b", "w+", 0, (9,)),
}


@pytest.mark.parametrize("write", [to_zip, to_legacy, to_pickle])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name_and_run_nothing(
    name: str, write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    write({"state_dict": {"weight": WEIGHT}, "attack": HOSTILE[name](mark)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=f"refused: opening it would run .*{name.rpartition('.')[2]}"):
        read_checkpoint(tmp_path / "x.pth")
    assert not mark.exists()


def test_other_names_become_stubs_and_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    to_zip(
        {"state_dict": {"weight": WEIGHT}, "handler": Attack(logging.FileHandler, str(tmp_path / "mark"))},
        tmp_path / "x.pth",
    )
    with caplog.at_level(logging.WARNING):
        read = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(read["state_dict"]["weight"], WEIGHT) and isinstance(read["handler"], Stub)
    assert "logging.FileHandler" in caplog.text and not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    "bomb",
    [
        pickle.dumps({"w": Attack(bytearray, 1 << 40)}),
        pickle.dumps({"w": Attack(np.ndarray, (1 << 20, 1 << 20))}),
        pickle.dumps({"w": Attack(np.ndarray, (1 << 20, 1 << 20), "f4", b"")}),
        b"\x80\x04\x8e" + (1 << 40).to_bytes(8, "little") + b"abc",  # BINBYTES8 of a terabyte
        b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.\x80\x04\x8e" + (1 << 40).to_bytes(8, "little"),
    ],
)
def test_what_asks_for_a_terabyte_gets_none(bomb: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(bomb)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "x.pth")


class Changed:
    """An object that is rebuilt and then changed: a state is set (``state``), or items are (``items``)."""

    def __init__(self, function: Callable[..., Any], arguments: Any, state: Any = None, items: Any = None) -> None:
        self.parts = function, arguments, state, None, items

    def __reduce__(self) -> Any:
        *parts, items = self.parts
        return *parts, items and iter(items)


def laughs() -> list[Any]:
    joke: list[Any] = ["ha"]
    for _ in range(30):
        joke = [joke] * 9
    return joke


megabyte, many = bytes(range(256)) * 4096, [None] * 200_000
scalar = np.float64(1).__reduce__()[0]
reconstruct = np.zeros(1).__reduce__()[0]
vast = torch.zeros(1).expand(1 << 40)
parameter = torch._utils._rebuild_parameter

BOMBS: dict[str, tuple[Any, str]] = {
    "expanded tensor": (vast, "a tensor of size"),
    "list of a tensor": (Attack(list, WEIGHT), "list of a Tensor"),
    "bytes of a tensor": (Attack(bytes, torch.tensor(1 << 40)), "bytes of a Tensor"),
    "bytes of a numpy number": (Attack(bytearray, np.int64(1 << 40)), "bytearray of a int64"),
    "copies": ([Attack(bytearray, megabyte) for _ in range(9)], "copies of copies"),
    "copied lists": ([Attack(list, many) for _ in range(9)], "copies of copies"),
    "text of nested lists": (Attack(str, laughs()), "str of a list"),
    "wide number": (Attack(scalar, np.dtype("V2000000000"), b""), "buffer is smaller"),
    "array of objects": (
        Changed(reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 31,), np.dtype("O"), False, [])),
        "an array of shape",
    ),
    "array without its data": (
        Changed(reconstruct, (np.ndarray, (0,), b"b"), (1, (1 << 31,), np.dtype("f4"), False, b"")),
        "an array of shape",
    ),
    "array with strides": (Attack(np.ndarray, (1 << 33,), "f4", bytes(4), 0, (0,)), "buffer is too small"),
    "item of a tensor": (Changed(parameter, (WEIGHT, False, {}), None, [((0, 0), 1.0)]), "load_setitem on a Tensor"),
}


@pytest.mark.parametrize("write", [to_zip, to_legacy, to_pickle])
@pytest.mark.parametrize("name", BOMBS)
def test_memory_bombs_are_refused_before_they_take_any(
    name: str, write: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    bomb, words = BOMBS[name]
    write({"w": bomb}, tmp_path / "x.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "x.pth")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # KiB


def test_storages_end_where_they_end(tmp_path: Path) -> None:
    lie = {b"K\x06tq": b"M\x00\x03tq", b"K\x06\x85": b"M\x00\x03\x85"}  # 6 values -> 768
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes({"w": torch.arange(6, dtype=torch.uint8)}))) as honest,
        zipfile.ZipFile(tmp_path / "x.pth", "w") as archive,
    ):
        for name in honest.namelist():
            data = honest.read(name)
            for old, new in lie.items():
                data = data.replace(old, new) if name.endswith("data.pkl") else data
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="data/0 has 6 bytes of 768"):
        read_checkpoint(tmp_path / "x.pth")


def test_keys_that_would_overflow_the_stack_are_refused(tmp_path: Path) -> None:
    # {((((...)))): None}: the hash of a tuple follows those within, and Python does not count.
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02}" + b")" + b"\x85" * 1_000_000 + b"Ns.")
    with pytest.raises(CheckpointError, match="tuples within tuples"):
        read_checkpoint(tmp_path / "x.pkl")
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({(1, (2, (3,))): ((4,), 5)}))
    assert read_checkpoint(tmp_path / "x.pkl") == {(1, (2, (3,))): ((4,), 5)}


def test_files_of_big_endian_machines_and_tensors_with_attributes(tmp_path: Path) -> None:
    tensor = WEIGHT.clone()
    tensor.tag = "x"  # type: ignore[attr-defined]
    with (
        zipfile.ZipFile(io.BytesIO(torch_bytes({"w": tensor, "p": torch.nn.Parameter(WEIGHT)}))) as little,
        zipfile.ZipFile(tmp_path / "x.pth", "w") as archive,
    ):
        for name in little.namelist():
            data = little.read(name)
            data = np.frombuffer(data, "<f4").astype(">f4").tobytes() if "/data/" in name else data
            archive.writestr(name, b"big" if name.endswith("/byteorder") else data)
    read = read_checkpoint(tmp_path / "x.pth")
    assert torch.equal(read["w"], WEIGHT) and torch.equal(read["p"], WEIGHT)


def test_compressed_torch_files_are_not_inflated(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(1 << 20))
    with pytest.raises(CheckpointError, match="compressed"):
        read_checkpoint(tmp_path / "x.pth")
    np.savez_compressed(tmp_path / "x.npz", w=np.zeros(1 << 20))
    with pytest.raises(CheckpointError, match="decompress to"):
        read_checkpoint(tmp_path / "x.npz")


def test_archives_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **{"base_model/conv2d/kernel": WEIGHT.numpy()})
    assert read_checkpoint(tmp_path / "x.npz")["base_model/conv2d/kernel"].tolist() == WEIGHT.tolist()


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """A file with some bytes changed, cut out, doubled or moved."""
    data = bytearray(raw)
    for _ in range(chance.randrange(1, 6)):
        at, size = chance.randrange(len(data)), chance.randrange(1, 40)
        kind = chance.randrange(5)
        if kind == 0:
            data[at] = chance.randrange(256)
        elif kind == 1:
            del data[at : at + size]
        elif kind == 2:
            data[at:at] = data[at : at + size]
        elif kind == 3:
            data[at : at + size] = chance.randbytes(size)
        else:
            data = data[: max(at, 2)]
        data = data or bytearray(b"x")
    return bytes(data)


def test_thousands_of_damaged_files_raise_clear_errors_and_touch_nothing(tmp_path: Path) -> None:
    content = {"state_dict": {"a": WEIGHT, "b": WEIGHT.half()}, "args": argparse.Namespace(lr=0.1), "lr": np.float64(1)}
    arrays = {"a": np.arange(6, dtype=np.float32), "attack": Attack(os.system, f"touch {tmp_path / 'mark'}")}
    seeds = [
        torch_bytes(content),
        torch_bytes(content, legacy=True),
        pickle.dumps(arrays),
        pickle.dumps({"a": arrays["a"]}, protocol=2),
        safetensors.torch.save({"a": WEIGHT}),
    ]
    chance, outcomes = random.Random(0), Counter[str]()
    actions: list[str] = []
    sys.addaudithook(lambda event, _: actions.append(event) if watching and event in ACTIONS else None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "x.pth"
    watching = True
    for index in range(2000):
        path.write_bytes(mutated(seeds[index % len(seeds)], chance))
        try:
            read_checkpoint(path)
            outcomes["read"] += 1
        except CheckpointError as error:
            clear = str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes["refused" if clear else str(error)] += 1
    watching = False
    assert set(outcomes) == {"read", "refused"} and outcomes["refused"] > 1000 and outcomes["read"] > 20
    assert not actions and [file.name for file in tmp_path.iterdir()] == ["x.pth"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 1024  # KiB


# Not "exec", which every import raises.
ACTIONS = {
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.remove",
    "os.rename",
    "socket.connect",
}


def test_pickles_within_pickles_run_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    inner = Attack(os.system, f"touch {mark}")
    for raw in (pickle.dumps(inner), torch_bytes(inner), torch_bytes(inner, legacy=True)):
        to_pickle({"w": Attack(torch.storage._load_from_bytes, raw)}, tmp_path / "x.pkl")
        with contextlib.suppress(CheckpointError):  # the plain pickle is no storage
            read_checkpoint(tmp_path / "x.pkl")
        assert not mark.exists()


def test_files_cannot_alter_what_they_name(tmp_path: Path) -> None:
    before = torch._utils._rebuild_tensor_v2.__defaults__
    # GLOBAL _rebuild_tensor_v2, then BUILD with the slot state {"__defaults__": (1,)}
    raw = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__K\x01\x85s\x86b."
    (tmp_path / "x.pkl").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "x.pkl")
    assert torch._utils._rebuild_tensor_v2.__defaults__ == before


class Handmade(dict[Any, Any]):
    """A class that the reader does not have."""


@pytest.mark.parametrize("write", [to_zip, to_legacy, to_pickle])
def test_what_training_scripts_store_beside_the_weights(write: Callable[[Any, Path], None], tmp_path: Path) -> None:
    content = {
        "state_dict": {"weight": WEIGHT, "parameter": torch.nn.Parameter(WEIGHT), "bf16": WEIGHT.bfloat16()},
        "args": argparse.Namespace(out=Path("runs"), lr=0.03),
        "lr": np.float64(0.03),
        "array": np.arange(4, dtype=np.float32),
        "callbacks": {argparse.ArgumentParser: 1},
        "handmade": Handmade(a=1),
        "seen": {1, 2},
    }
    write(content, tmp_path / "x.pth")
    read = read_checkpoint(tmp_path / "x.pth")
    for key, tensor in content["state_dict"].items():
        assert torch.equal(read["state_dict"][key], tensor)
    assert read["lr"] == 0.03 and read["array"].tolist() == [0, 1, 2, 3] and read["seen"] == {1, 2}
    assert read["args"].state["lr"] == 0.03 and read["handmade"] == {"a": 1}


def test_python2_and_old_numpy_pickles(tmp_path: Path) -> None:
    array = np.arange(3, dtype="<f4")
    for old, protocol in ((b"numpy.core.multiarray", 2), (b"numpy._core.multiarray", 2), (b"numpy.core.multiarray", 0)):
        raw = pickle.dumps({"w": array}, protocol=protocol).replace(b"numpy._core.multiarray", old)
        (tmp_path / "x.pkl").write_bytes(raw)
        assert read_checkpoint(tmp_path / "x.pkl")["w"].tolist() == [0, 1, 2]


def test_facts_round_trip(tmp_path: Path) -> None:
    facts = ResNetFacts(depth=101, pixels=CAFFE_BGR, stride_in_1x1=True, origin="here", recipe="p")
    torch.save({"model": {"w": WEIGHT}, "facts": facts.as_dict()}, tmp_path / "a.pth")
    assert read_facts(tmp_path / "a.pth") == facts
    torch.save({"model": {"w": WEIGHT}}, tmp_path / "b.pth")
    assert read_facts(tmp_path / "b.pth") is None
    torch.save({"facts": {"pixels": 3}}, tmp_path / "c.pth")
    with pytest.raises(CheckpointError, match="facts"):
        read_facts(tmp_path / "c.pth")


def zipped(name: str) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        archive.writestr(name, b"x")
    return buffer.getvalue()


def torch_bytes(content: Any, legacy: bool = False) -> bytes:
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


BIG = {"w": torch.ones(5000)}
UNREADABLE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file is empty"),
    "html": (b"\n<!DOCTYPE html><html>Sign in</html>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "text": (b"hello, this is not a checkpoint", "not a checkpoint"),
    "gzip": (b"\x1f\x8b\x08\x00", "a gzip archive"),
    "other-zip": (zipped("weights/readme.txt"), "a zip archive"),
    "script": (zipped("x/constants.pkl"), "TorchScript"),
    "encrypted": (b"Salted__abcdefgh12345", "an encrypted file"),
    "encrypted-zip": (
        zipped("x/data.pkl").replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        "encrypted",
    ),
    "cut-zip": (torch_bytes(BIG)[:9000], "truncated torch file"),
    "cut-legacy": (torch_bytes(BIG, legacy=True)[:9000], "damaged or truncated"),
    "cut-pickle": (pickle.dumps({"w": np.ones(5000)})[:9000], "damaged or truncated"),
    "cut-safetensors": (safetensors.torch.save(BIG)[:9000], "damaged or truncated"),
    "cut-safetensors-header": (safetensors.torch.save(BIG)[:20], "truncated safetensors"),
    "list": (torch_bytes([WEIGHT]), "holds a list"),
    "tensor": (torch_bytes(WEIGHT), "holds a Tensor"),
    "module": (torch_bytes(torch.nn.Linear(2, 2)), "a pickled torch.nn.modules.linear.Linear object"),
    "legacy-module": (torch_bytes(torch.nn.Linear(2, 2), legacy=True), "a pickled torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_files_are_named_in_one_line(name: str, tmp_path: Path) -> None:
    raw, words = UNREADABLE[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and words in message and ";" in message and "\n" not in message


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_checkpoint(tmp_path / "nothing.pth")
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(CheckpointError, match=r"a folder.*model_final\.pth"):
        read_checkpoint(tmp_path)

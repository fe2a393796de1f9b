"""Files that were made to do harm, by the thousand: whole containers around broken, shuffled and composed pickles.

Bytes changed at random mostly break the container, and the reader's harder parts are never reached. Here a file's
container is whole, and its pickle is damaged opcode by opcode, or composed of opcodes that an attacker would use.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import pickle
import pickletools
import random
import resource
import struct
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from moco_d2.convert import CheckpointError, convert_state, read_checkpoint

CONTENT = {
    "state_dict": {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2).half()},
    "args": argparse.Namespace(lr=0.1, names=("a", "b")),
    "lr": np.float64(0.1),
    "array": np.arange(4, dtype=np.float32),
}
# What acts, as a pickle names it; `torch` and `numpy` have doors to it too.
DOORS = (
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "exec"),
    ("builtins", "open"),
    ("builtins", "getattr"),
    ("builtins", "__import__"),
    ("subprocess", "Popen"),
    ("shutil", "rmtree"),
    ("socket", "socket"),
    ("importlib", "import_module"),
    ("torch", "load"),
    ("torch.serialization", "os.system"),
    ("torch.hub", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("numpy", "memmap"),
    ("numpy", "load"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("collections", "OrderedDict"),
    ("_codecs", "encode"),
    ("ctypes", "CDLL"),
    ("argparse", "Namespace"),
    ("operator", "attrgetter"),
    ("functools", "partial"),
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def programs(chance: random.Random, mark: Path) -> Iterator[bytes]:
    """Pickles composed of calls to what acts, containers, memos and nonsense, without end."""
    words = [str(mark), f"touch {mark}", f"open({str(mark)!r}, 'w')", "w", "system", "__defaults__", "__globals__"]

    def value() -> bytes:
        return chance.choice(
            [
                text(chance.choice(words)),
                b"K" + bytes([chance.randrange(256)]),
                b"\x8a\x08" + struct.pack("<q", chance.choice([-1, 1 << 40, 1 << 62])),
                b"N",
                b"}",
                b"]",
                b")",
                b"\x88",
                b"h" + bytes([chance.randrange(4)]),
            ]
        )

    def call() -> bytes:
        module, name = chance.choice(DOORS)
        named = chance.choice([f"c{module}\n{name}\n".encode(), text(module) + text(name) + b"\x93"])
        arguments = b"(" + b"".join(value() for _ in range(chance.randrange(4))) + b"t"
        end = chance.choice([b"R", b"R", b"\x81", b"Rq" + bytes([chance.randrange(4)]), b"RN}b", b"0Q"])
        return named + arguments + end

    while True:
        items = b"".join(
            text(f"k{n}") + chance.choice([call, call, value])() + b"s" for n in range(chance.randrange(1, 5))
        )
        yield b"\x80\x04}" + items + chance.choice([b".", b".", b"b.", b"u.", b"", b"(lp0\n."])


def reordered(raw: bytes, chance: random.Random) -> bytes:
    """A pickle with some opcodes left out, doubled, exchanged, or given another's argument."""
    cuts = [at for _, _, at in pickletools.genops(raw) if at is not None]
    parts = [raw[a:b] for a, b in zip(cuts, [*cuts[1:], len(raw)], strict=True)]
    for _ in range(chance.randrange(1, 4)):
        one, other = chance.randrange(1, len(parts)), chance.randrange(1, len(parts))
        kind = chance.randrange(4)
        if kind == 0 and len(parts) > 3:
            del parts[one]
        elif kind == 1:
            parts.insert(one, parts[other])
        elif kind == 2:
            parts[one], parts[other] = parts[other], parts[one]
        else:
            part = bytearray(parts[one])
            part[chance.randrange(len(part))] = chance.randrange(256)
            parts[one] = bytes(part)
    return b"".join(parts)


def zipped(members: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for name, raw in members.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


def torch_file() -> dict[str, bytes]:
    torch.save(CONTENT, buffer := io.BytesIO())
    with zipfile.ZipFile(buffer) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def torch_variants(chance: random.Random, mark: Path) -> Iterator[bytes]:
    """torch's zip with another pickle, or with storages missing, short or under another's name."""
    members, made = torch_file(), programs(chance, mark)
    main = next(name for name in members if name.endswith("data.pkl"))
    while True:
        changed = dict(members)
        kind = chance.randrange(3)
        if kind == 0:
            changed[main] = next(made)
        elif kind == 1:
            changed[main] = reordered(members[main], chance)
        else:
            name = chance.choice([name for name in members if "/data/" in name])
            changed[name] = members[name][: chance.randrange(len(members[name]))]
            if chance.random() < 0.5:
                del changed[name]
        yield zipped(changed)


def legacy_variants(chance: random.Random, mark: Path) -> Iterator[bytes]:
    """torch's old file: five pickles one after another, the third of them the content."""
    torch.save(CONTENT, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    stream = io.BytesIO(raw := buffer.getvalue())
    cuts = [0]
    for _ in range(5):
        cuts.append(1 + max(at for _, _, at in pickletools.genops(stream) if at is not None))
        stream.seek(cuts[-1])
    parts = [raw[a:b] for a, b in itertools.pairwise(cuts)]
    made = programs(chance, mark)
    while True:
        changed = list(parts)
        at = chance.choice([2, 3, 3, 3, 4])
        changed[at] = next(made) if chance.random() < 0.5 else reordered(parts[at], chance)
        yield b"".join(changed) + raw[cuts[-1] :]


def pickle_variants(chance: random.Random, mark: Path) -> Iterator[bytes]:
    made = programs(chance, mark)
    raw = pickle.dumps({"a": CONTENT["array"], "lr": CONTENT["lr"], "args": CONTENT["args"]}, protocol=2)
    while True:
        yield next(made) if chance.random() < 0.6 else reordered(raw, chance)


def safetensors_variants(chance: random.Random, mark: Path) -> Iterator[bytes]:
    """safetensors with another header: sizes, types and places that do not fit, or take a terabyte."""
    raw = safetensors.torch.save(CONTENT["state_dict"])
    size = int.from_bytes(raw[:8], "little")
    while True:
        header = json.loads(raw[8 : 8 + size])
        entry = header[chance.choice([key for key in header if key != "__metadata__"])]
        number = chance.choice([-1, 0, 3, 1 << 40, 1 << 63])
        field = chance.choice(["shape", "data_offsets", "dtype", "gone"])
        entry[field] = chance.choice(["F64", "X9"]) if field == "dtype" else [number, chance.choice([1, number])]
        new = json.dumps(header).encode()
        yield (
            chance.choice([len(new), len(new), size, number % (1 << 64)]).to_bytes(8, "little") + new + raw[8 + size :]
        )


VARIANTS: dict[str, tuple[Callable[[random.Random, Path], Iterator[bytes]], int]] = {
    "torch": (torch_variants, 1500),
    "legacy": (legacy_variants, 1000),
    "pickle": (pickle_variants, 1500),
    "safetensors": (safetensors_variants, 500),
}

# Whatever starts a process, loads a library, opens a connection or changes a file. Reading and importing are allowed.
_ACTIONS = ("os.", "subprocess.", "shutil.", "socket.", "ctypes.dlopen", "pty.", "urllib.", "webbrowser.", "tempfile.")
_HARMLESS = {"os.listdir", "os.scandir", "os.walk", "os.fwalk"}
_seen: list[str] = []
_watched: list[Path] = []


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event in _HARMLESS:
        return
    if event == "open":
        flags = arguments[2] or 0
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            _seen.append(f"open {arguments[0]}")
    elif event.startswith(_ACTIONS):
        _seen.append(f"{event} {arguments}")


sys.addaudithook(_watch)  # there is no way to take one off: it idles while nothing is watched


@pytest.mark.parametrize("name", VARIANTS)
def test_hostile_files_end_in_an_error_or_in_data(name: str, tmp_path: Path) -> None:
    make, count = VARIANTS[name]
    mark, path = tmp_path / "mark", tmp_path / "x.pth"
    files = make(random.Random(name), mark)
    outcomes: Counter[str] = Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(count):
        path.write_bytes(next(files))
        _watched.append(path)
        try:
            content = read_checkpoint(path)
            outcomes["read"] += 1
            with pytest.raises(CheckpointError):  # no file here holds a network
                convert_state(content, path)
        except CheckpointError as error:
            clear = str(error).startswith(f"{path}: ") and "\n" not in str(error)
            outcomes[("named" if "refused" in str(error) else "refused") if clear else str(error)] += 1
        finally:
            _watched.clear()
    assert not _seen and set(outcomes) <= {"read", "named", "refused"}
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
    # The containers hold: each kind of outcome is met, else the test would look at one branch only.
    assert outcomes["refused"] > 50 and (name == "safetensors" or min(outcomes["read"], outcomes["named"]) > 20), (
        outcomes
    )


def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    _watched.append(tmp_path)
    try:
        (tmp_path / "x").write_text("")
        os.remove(tmp_path / "x")
    finally:
        _watched.clear()
    assert [event.partition(" ")[0] for event in _seen] == ["open", "os.remove"]
    _seen.clear()

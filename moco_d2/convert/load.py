"""Reading anyone's checkpoint without running code from it.

A pickle is a program: it may name any function and call it. Files are therefore read by an unpickler of our own, which
knows a short list of harmless names and replaces every other one (training scripts store their command line, whole
objects) by an inert :class:`Stub`. ``torch.load(weights_only=True)`` refuses such files, runs code from some before
torch 2.6, and lets others ask for any amount of memory.

Tensors are views of the mapped file: what nobody looks at is never read.
"""

from __future__ import annotations

import _codecs
import collections
import io
import logging
import math
import mmap
import os
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch

from moco_d2.facts import BackboneFacts

logger = logging.getLogger(__name__)

_INFLATION = 20  # weights are noise, and compress by a tenth
_EXPANDED = 1 << 20  # values of a tensor that has fewer in the file; bytes that may be copied beside the file's own
_NESTED = 1 << 14  # tuples within tuples
_HEAD_BYTES = 512  # enough for every signature below
_TORCH_LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # torch.save before 1.6: its magic number
_DOWNLOAD_AGAIN = "download it again and compare its size or checksum"


# Modules and names that no checkpoint needs, and by which a pickle acts on the machine. A file that names one is
# refused; every other name that is not allowed is harmless, because it becomes a stub.
_HOSTILE_MODULES = frozenset(
    [
        "_io",
        "_pickle",
        "_posixsubprocess",
        "_socket",
        "_thread",
        "_winapi",
        "aiohttp",
        "asyncio",
        "bdb",
        "cffi",
        "code",
        "codeop",
        "commands",
        "cProfile",
        "ctypes",
        "ftplib",
        "http",
        "httpx",
        "importlib",
        "io",
        "linecache",
        "marshal",
        "mmap",
        "msvcrt",
        "multiprocessing",
        "nt",
        "ntpath",
        "os",
        "pdb",
        "pickle",
        "pip",
        "pkgutil",
        "popen2",
        "posix",
        "posixpath",
        "profile",
        "pty",
        "pydoc",
        "requests",
        "runpy",
        "setuptools",
        "shelve",
        "shlex",
        "shutil",
        "signal",
        "smtplib",
        "socket",
        "socketserver",
        "sqlite3",
        "ssl",
        "subprocess",
        "sys",
        "tempfile",
        "threading",
        "timeit",
        "trace",
        "urllib",
        "uuid",
        "venv",
        "webbrowser",
        "zipimport",
    ]
)
_HOSTILE_BUILTINS = frozenset(
    [
        "__import__",
        "breakpoint",
        "compile",
        "delattr",
        "eval",
        "exec",
        "execfile",
        "exit",
        "globals",
        "input",
        "locals",
        "open",
        "quit",
        "setattr",
        "vars",
    ]
)
_HOSTILE_NAMES = frozenset(
    (module, name)
    for module, names in {
        "torch": "load hub ops classes compile",
        "torch.serialization": "load _load",
        "torch.hub": "load load_state_dict_from_url download_url_to_file",
        "torch.jit": "load script",
        "numpy": "load save fromfile memmap loadtxt genfromtxt",
        "operator": "attrgetter methodcaller",
        "_operator": "attrgetter methodcaller",
        "types": "CodeType FunctionType",
        "functools": "reduce",
    }.items()
    for name in names.split()
)


class CheckpointError(ValueError):
    """A file cannot be used; the message is one line: the path, what was found, what to do."""


class _HostileError(CheckpointError):
    """A file names what would act on the machine."""


class Stub(dict[Any, Any]):
    """Stands for an object whose class is not on the allow-list; it keeps what was stored and does nothing.

    A dictionary, because many of the objects met in checkpoints are dictionaries of another name; hashable by
    identity, because some files use such objects as keys.

    Attributes:
        arguments: what the file would have called the class with.
        state: what the file would have set the object's state to.
    """

    arguments: tuple[Any, ...]
    state: Any
    dump_patches = False  # torch's legacy reader asks every container class for it

    def __new__(cls, *arguments: Any, **named: Any) -> Stub:  # noqa: D102 (a magic method)
        stub = super().__new__(cls)
        stub.arguments, stub.state = arguments, None
        return stub

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__()

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *arguments: Any, **named: Any) -> Stub:  # noqa: D102
        return Stub(*arguments)

    def append(self, item: Any) -> None:
        """Ignore an item of what was a list."""

    def extend(self, items: Any) -> None:
        """Ignore the items of what was a list."""

    def add(self, item: Any) -> None:
        """Ignore an item of what was a set."""


class _DType:
    """Stands for ``numpy.dtype``: a pickle may set the state of a real one, which all arrays of the process share."""

    def __init__(self, kind: Any, *_: Any) -> None:
        self.kind, self.order = np.dtype(kind), "="

    def __setstate__(self, state: Any) -> None:
        _, self.order, subarray, names, *_ = state
        if subarray is not None or names is not None:
            raise pickle.UnpicklingError("arrays of records")

    @property
    def real(self) -> np.dtype[Any]:
        real: np.dtype[Any] = self.kind if self.order == "|" else self.kind.newbyteorder(self.order)
        return real


class _Array(np.ndarray[Any, Any]):
    """An array that a pickle fills; numpy's own takes the memory that the file states before it looks for the data."""

    def __setstate__(self, state: Any) -> None:
        *version, shape, dtype, fortran, raw = state
        held = len(raw) if dtype.real.hasobject else len(raw) // max(dtype.real.itemsize, 1)
        if math.prod(shape) > held:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {held} values")
        super().__setstate__((*version, shape, dtype.real, fortran, raw))


def _empty_array(*_: Any) -> Any:
    # What numpy's pickles start from; the file's own shape here would take memory.
    return np.ndarray((0,), "b").view(_Array)


def _array(shape: Any, dtype: Any, buffer: Any, *_: Any) -> Any:
    # Without a buffer, or with strides, it would be as large as the file says.
    return np.ndarray(shape, dtype.real if isinstance(dtype, _DType) else np.dtype(dtype), _raw(buffer))


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
    return np.frombuffer(_raw(buffer), dtype.real).reshape(shape, order="F" if order == "F" else "C")


def _raw(buffer: Any) -> Any:
    if not isinstance(buffer, bytes | bytearray):
        raise pickle.UnpicklingError(f"a {type(buffer).__name__} in place of an array's data")
    return buffer


def _scalar(dtype: Any, raw: Any) -> Any:
    # By numpy's own, a dtype of a gigabyte would take one. As text: Python 2's pickles.
    if dtype.real.hasobject:
        return raw
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else _raw(raw), dtype.real, 1)[0]


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file, and what they are; torch's own typed storage is deprecated."""

    raw: torch.UntypedStorage
    dtype: torch.dtype


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    # An expanded tensor is as large as the file says, once something is computed from it.
    held = storage.raw.nbytes() // storage.dtype.itemsize
    if math.prod(size) > max(held, _EXPANDED):
        raise pickle.UnpicklingError(f"a tensor of size {tuple(size)} with {held} values")
    empty = torch.empty(0, dtype=storage.dtype, device=storage.raw.device)
    return empty.set_(storage.raw, offset, tuple(size), tuple(stride))


def _tensor_of_dtype(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *_: Any
) -> Any:
    return _tensor(_Storage(storage.raw, dtype), offset, size, stride)


def _parameter(data: Any, *_: Any) -> Any:
    return data


def _of_type(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    return function(*arguments)  # a tensor with attributes, which nobody needs


def _quantised(*_: Any) -> torch.Tensor:
    return torch._empty_affine_quantized([0], scale=1.0, zero_point=0, dtype=torch.quint8)  # to be refused by its name


class _Copies:
    """Calls that copy what they are given, within a budget: a file can ask for copies of copies."""

    def __init__(self, size: int) -> None:
        self.left = size + _EXPANDED

    def spend(self, argument: Any) -> None:
        self.left -= len(argument)
        if self.left < 0:
            raise pickle.UnpicklingError("copies of copies ask for memory")

    def container(self, kind: Any) -> Callable[..., Any]:
        def make(*arguments: Any) -> Any:
            for argument in arguments:
                if isinstance(argument, bytes | bytearray | list | tuple | dict | set | frozenset):
                    self.spend(argument)
                    if kind is tuple and any(isinstance(item, tuple) for item in argument):
                        raise pickle.UnpicklingError("a tuple of tuples by another way than theirs")
                elif kind is not collections.defaultdict or argument is not arguments[0]:
                    raise pickle.UnpicklingError(f"{kind.__name__} of a {type(argument).__name__}")
            return kind(*arguments)

        return make

    def plain(self, kind: Any) -> Callable[..., Any]:
        """Bytes, text and numbers; of a number, bytes would ask for that much memory."""

        def make(*arguments: Any) -> Any:
            numbers = () if kind in (bytes, bytearray) else (int, float, complex, np.generic)
            for argument in arguments[:1]:
                if not isinstance(argument, (str, bytes, bytearray, *numbers)):
                    raise pickle.UnpicklingError(f"{kind.__name__} of a {type(argument).__name__}")
                if not isinstance(argument, numbers):
                    self.spend(argument)
            return kind(*arguments)

        return make

    def encode(self, text: str, encoding: str = "latin1") -> bytes:
        # numpy pickles its bytes as text for Python 2's sake. Only its own encoding: codecs are looked up by import.
        self.spend(text)
        return _codecs.encode(text, "utf-8" if encoding.replace("_", "-").lower() == "utf-8" else "latin1")

    def storage(self, raw: bytes) -> Any:
        # torch's own function of this purpose unpickles without restriction.
        self.spend(raw)
        whole = torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()
        return _legacy_content(io.BytesIO(raw), whole, set())


def _allowed(size: int) -> dict[tuple[str, str], Any]:
    """Return the names that are resolved: containers, tensor and array rebuilders, nothing that acts.

    Args:
        size: of the file; what is copied from it stays below that.
    """
    copies = _Copies(size)
    names: dict[tuple[str, str], Any] = {}
    for module in ("builtins", "__builtin__"):
        names |= {(module, kind.__name__): copies.container(kind) for kind in (set, frozenset, list, dict, tuple)}
        names |= {
            (module, kind.__name__): copies.plain(kind) for kind in (int, float, complex, bool, str, bytes, bytearray)
        }
        names |= {(module, "unicode"): names[module, "str"], (module, "long"): names[module, "int"]}  # Python 2's
    for kind in (collections.OrderedDict, collections.defaultdict, collections.Counter):
        names["collections", kind.__name__] = copies.container(kind)
    names |= {
        ("torch", "Size"): copies.container(torch.Size),
        ("torch", "device"): copies.plain(str),
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor_v3"): _tensor_of_dtype,
        ("torch._utils", "_rebuild_qtensor"): _quantised,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
        ("torch._tensor", "_rebuild_from_type_v2"): _of_type,
        ("torch.storage", "_load_from_bytes"): copies.storage,
        ("numpy", "ndarray"): _array,
        ("numpy", "dtype"): _DType,
        ("_codecs", "encode"): copies.encode,
    }
    names |= {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        names[f"{core}.multiarray", "_reconstruct"] = _empty_array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return names


# Whose dtype the name of a storage's class tells.
_STORAGES = {f"{name}Storage": dtype for name, dtype in {
    "Double": torch.double, "Float": torch.float, "Half": torch.half, "BFloat16": torch.bfloat16,
    "Long": torch.long, "Int": torch.int, "Short": torch.short, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.cdouble, "ComplexFloat": torch.cfloat, "Untyped": torch.uint8,
    "QUInt8": torch.uint8, "QInt8": torch.int8, "QInt32": torch.int32,
}.items()}  # fmt: skip


def _is_hostile(module: str, name: str) -> bool:
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return name.partition(".")[0] in _HOSTILE_BUILTINS
    # A dotted name reaches through a module's attributes: torch.serialization's os.system.
    inside = set(name.split(".")[:-1]) & _HOSTILE_MODULES if "." in name else set()
    return top in _HOSTILE_MODULES or bool(inside) or (module, name) in _HOSTILE_NAMES


_SET_STATE = (Stub, _DType, _Array)
# Opcodes that change an object -> where it lies on the stack (None: before the last mark), and what it may be.
_CHANGES: dict[str, tuple[int | None, tuple[type, ...]]] = {
    "load_setitem": (-3, (dict,)),
    "load_setitems": (None, (dict,)),
    "load_append": (-2, (list, Stub)),
    "load_appends": (None, (list, Stub)),
    "load_additems": (None, (set, Stub)),
}


# Python's own unpickler, not C's: that one takes as much memory as the number of a memo's entry says.
class _Unpickler(pickle._Unpickler):
    """Resolves only :func:`_allowed` names and notes the others in ``stubbed``.

    Args:
        file: what is read.
        allowed: of :func:`_allowed`.
        stubbed: the names that became stubs, added to.
        storage: how an entry's data are found, by its key, dtype and number of values.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(
        self,
        file: Any,
        allowed: dict[tuple[str, str], Any],
        stubbed: set[str],
        storage: Callable[[str, torch.dtype, int], Any] | None = None,
    ) -> None:
        super().__init__(file, encoding="latin1")  # as numpy asks for Python 2's pickles
        self.allowed, self.stubbed, self.storage = allowed, stubbed, storage
        self.stubs: dict[tuple[str, str], type[Stub]] = {}
        self.storages: dict[str, Any] = {}
        self.sizes: dict[int, tuple[int, Any]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module.partition(".")[0] == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if _is_hostile(module, name):
            raise _HostileError(f"{module}.{name}")
        self.stubbed.add(f"{module}.{name}")
        if (module, name) not in self.stubs:
            self.stubs[module, name] = type(name.rpartition(".")[2], (Stub,), {"__module__": module})
        return self.stubs[module, name]

    def persistent_load(self, pid: Any) -> Any:
        kind, *rest = pid
        if kind == "module":  # torch.save before 1.6 kept the source of pickled modules
            return rest[0]
        dtype, key, _, count, *view = rest
        if self.storage is None or kind != "storage" or any(part is not None for part in view):
            raise pickle.UnpicklingError(f"unknown reference {str(pid)[:80]}")
        if key not in self.storages:
            self.storages[key] = _Storage(self.storage(key, dtype, count), dtype)
        return self.storages[key]

    def load_build(self) -> None:
        # Nothing else has a state that matters, and what a file names may be shared with the whole process.
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(self.stack[-1], _SET_STATE):  # type: ignore[attr-defined]
            self.stack[-1].__setstate__(state)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def tuple_made(self) -> None:
        """Refuse a tuple of tuples that is too large to be hashed: that follows each of them, on the C stack."""
        made = self.stack[-1]  # type: ignore[attr-defined]
        size = sum(self.sizes.get(id(item), (1, None))[0] for item in made if isinstance(item, tuple))
        if size >= _NESTED:
            raise pickle.UnpicklingError(f"tuples within tuples, {size} of them")
        if size:
            self.sizes[id(made)] = size + 1, made  # kept, so that no other gets its id


def _guarded(change: str, place: int | None, kinds: tuple[type, ...]) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        target = self.metastack[-1][-1] if place is None else self.stack[place]
        if not isinstance(target, kinds):  # a tensor's item or sum can take any memory
            raise pickle.UnpicklingError(f"{change} on a {type(target).__name__}")
        getattr(pickle._Unpickler, change)(self)

    return load


def _counted(opcode: str) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        getattr(pickle._Unpickler, f"load_{opcode}")(self)
        self.tuple_made()

    return load


for _name in ("tuple", "tuple1", "tuple2", "tuple3"):
    _Unpickler.dispatch[getattr(pickle, _name.upper())[0]] = _counted(_name)
for _change, _target in _CHANGES.items():
    _opcode = getattr(pickle, _change.removeprefix("load_").upper())
    _Unpickler.dispatch[_opcode[0]] = _guarded(_change, *_target)


def _part(whole: Any, start: int, size: int) -> Any:
    if start < 0 or size < 0 or start + size > whole.nbytes():
        raise pickle.UnpicklingError(f"{size} bytes at {start} are asked for, of {whole.nbytes()}")
    return whole[start : start + size]


def _mapped(path: Path) -> Any:
    return torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)


def _load_zip(path: Path) -> tuple[Any, set[str]]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: a truncated torch file (its end is missing); {_DOWNLOAD_AGAIN}")
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    members = {entry.filename.rpartition("/")[2] for entry in entries}
    if any(entry.flag_bits & 1 for entry in entries):
        raise CheckpointError(f"{path}: an encrypted zip archive; decrypt it first")
    if entries and all(entry.filename.endswith(".npy") for entry in entries):
        return _load_arrays(path, sum(entry.file_size for entry in entries))
    if "constants.pkl" in members:  # reading one would run its program
        raise CheckpointError(
            f"{path}: a TorchScript program, not a checkpoint; save the module's state_dict() instead"
        )
    if "data.pkl" not in members:
        raise CheckpointError(f"{path}: a zip archive, not a checkpoint ({_listing(members)}); unpack it first")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(
            f"{path}: a compressed torch file, which torch.save does not write; unpack and save it again"
        )
    return _load_archive(path)


def _load_archive(path: Path) -> tuple[Any, set[str]]:
    """Read what ``torch.save`` writes since 1.6: a pickle, and each storage in a file of its own."""
    whole, stubbed = _mapped(path), set[str]()
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        root = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl").removesuffix(
            "data.pkl"
        )
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in archive.namelist() else b"little"

        def storage(key: str, dtype: torch.dtype, count: int) -> Any:
            entry = archive.getinfo(f"{root}data/{key}")
            file.seek(entry.header_offset + 26)
            name, extra = struct.unpack("<HH", file.read(4))
            size = count * dtype.itemsize
            if size > entry.file_size:
                raise pickle.UnpicklingError(f"data/{key} has {entry.file_size} bytes of {size}")
            part = _part(whole, entry.header_offset + 30 + name + extra, size)
            if order.decode() != sys.byteorder and dtype.itemsize > 1:
                part.byteswap(dtype)
            return part

        data = archive.read(f"{root}data.pkl")
        return _Unpickler(io.BytesIO(data), _allowed(len(data)), stubbed, storage).load(), stubbed


def _load_arrays(path: Path, size: int) -> tuple[Any, set[str]]:
    """Read numpy's archive of arrays; a name may hold slashes, as TensorFlow's variables do."""
    if size > _INFLATION * path.stat().st_size:
        raise CheckpointError(f"{path}: its arrays inflate to {size} bytes, which weights do not")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}, set()


def _load_legacy(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return _legacy_content(stream, _mapped(path), stubbed), stubbed


def _legacy_content(stream: Any, whole: torch.UntypedStorage, stubbed: set[str]) -> Any:
    """Read what ``torch.save`` wrote before 1.6: pickles, and behind them the storages one after the other.

    The pickle has to be read twice: where a storage lies depends on the dtypes of those before it.
    """
    allowed = _allowed(whole.nbytes())
    for _ in range(3):  # magic number, version, sizes of the machine's numbers
        _Unpickler(stream, allowed, stubbed).load()
    start, dtypes = stream.tell(), dict[str, torch.dtype]()

    def unread(key: str, dtype: torch.dtype, count: int) -> Any:
        dtypes[key] = dtype
        return torch.UntypedStorage(count * dtype.itemsize, device="meta")

    _Unpickler(stream, allowed, stubbed, unread).load()
    found = {}
    for key in _Unpickler(stream, allowed, stubbed).load():
        (count,) = struct.unpack("<q", stream.read(8))
        found[key] = _part(whole, stream.tell(), count * dtypes[key].itemsize)
        stream.seek(found[key].nbytes(), os.SEEK_CUR)

    def storage(key: str, dtype: torch.dtype, count: int) -> Any:
        return _part(found[key], 0, count * dtype.itemsize)

    stream.seek(start)
    return _Unpickler(stream, allowed, stubbed, storage).load()


def _bytes_of(path: Path) -> mmap.mmap:
    # Mapped: a read beyond the end then asks for no more memory than the file has.
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load_pickle(path: Path) -> tuple[Any, set[str]]:
    stubbed = set[str]()
    with _bytes_of(path) as stream:
        return _Unpickler(stream, _allowed(path.stat().st_size), stubbed).load(), stubbed


def _load_safetensors(path: Path) -> tuple[Any, set[str]]:
    return safetensors.torch.load_file(path), set()


def _reader(path: Path) -> Callable[[Path], tuple[Any, set[str]]]:
    """Choose the reader by the first bytes: names lie (``.pkl`` is often a torch file, ``.pth`` sometimes a pickle)."""
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    size = path.stat().st_size
    text = head.lstrip().lower()
    if not head:
        raise CheckpointError(f"{path}: the file is empty; {_DOWNLOAD_AGAIN}")
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{path}: a web page, not a checkpoint; {_DOWNLOAD_AGAIN}, from the direct link to the file"
        )
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path}: a Git LFS pointer of {size} bytes, not the file itself; run `git lfs pull`")
    if head.startswith(b"PK\x03\x04"):
        return _load_zip
    if head.startswith(_TORCH_LEGACY):
        return _load_legacy
    if head[:1] == b"\x80" and head[1:2] <= b"\x05":
        return _load_pickle
    if head[8:9] == b"{":
        if int.from_bytes(head[:8], "little") + 8 > size:
            raise CheckpointError(f"{path}: a truncated safetensors file; {_DOWNLOAD_AGAIN}")
        return _load_safetensors
    if path.suffix == ".pkl" and head[:1] in (b"(", b"}", b"c"):  # Python 2's text form
        return _load_pickle
    for signature, name in (
        (b"\x1f\x8b", "gzip"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"Rar!", "rar"),
    ):
        if head.startswith(signature):
            raise CheckpointError(f"{path}: a {name} archive, not a checkpoint; unpack it first")
    if head.startswith(
        (b"Salted__", b"age-encryption.org", b"-----BEGIN PGP", b"-----BEGIN AGE", b"LUKS", b"\x85\x02")
    ):
        raise CheckpointError(f"{path}: an encrypted file; decrypt it first")
    if head.startswith(b"\x89HDF"):
        raise CheckpointError(f"{path}: an HDF5 file (Keras); save its weights as an .npz of TensorFlow's variables")
    raise CheckpointError(
        f"{path}: not a checkpoint (it starts with {head[:12]!r}); expected a file of torch.save, safetensors or pickle"
    )


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a ``.pth``, ``.pth.tar``, ``.pt``, ``.safetensors`` or ``.pkl`` file without running code from it.

    The format is told from the content. Tensors come to the CPU, mapped from the file: they cost memory only when
    read. Objects of classes that are not on the allow-list become :class:`Stub`, and a
    warning names them.

    Args:
        path: the file.

    Returns:
        The top-level mapping of the file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds something else than a mapping.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a file; name the checkpoint in it ({_listing(os.listdir(path))})")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; check the path (the current folder is {Path.cwd()})")
    reader = _reader(path)
    try:
        content, stubbed = reader(path)
    except _HostileError as error:
        raise CheckpointError(
            f"{path}: refused: reading it would run {error}, which no checkpoint needs; do not open it with torch.load"
        ) from None
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path}: asks for more memory than there is; it is damaged, or hostile") from error
    except Exception as error:  # a damaged or hostile stream can make the unpicklers raise anything
        reason = " ".join(str(error).split())[:200] or "the data ends early"
        raise CheckpointError(
            f"{path}: damaged or truncated ({type(error).__name__}: {reason}); {_DOWNLOAD_AGAIN}"
        ) from error
    if stubbed:
        logger.warning("%s: not read, because it would need code from the file: %s", path, _listing(stubbed))
    if isinstance(content, Stub):
        name = f"{type(content).__module__}.{type(content).__qualname__}"
        raise CheckpointError(f"{path}: a pickled {name} object; load it where it was made and save its state_dict()")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: holds a {type(content).__name__}, not a mapping of names to tensors; save a state_dict()"
        )
    return dict(content)


def read_facts(path: str | os.PathLike[str]) -> BackboneFacts | None:
    """Return the facts that a weight file carries, or None where it carries none.

    Raises:
        CheckpointError: the file cannot be read (see :func:`read_checkpoint`), or its facts are not valid.
    """
    return facts_in(read_checkpoint(path), path)


def facts_in(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> BackboneFacts | None:
    """Return the facts in an already read checkpoint (see :func:`read_facts`); ``path`` is for the message."""
    facts = checkpoint.get("facts")
    if facts is None:
        return None
    try:
        return BackboneFacts.from_dict(facts)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(
            f"{path}: its `facts` are not valid ({type(error).__name__}: {error}); it was written by another version"
        ) from error


def _listing(names: Any, limit: int = 8) -> str:
    """Join names for a message, the first few in order."""
    names = sorted(map(str, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more

"""Unpickler that runs no code from the file.

A pickle is a program: it may name any function and call it. Here only a short list of harmless names is resolved
(:func:`allowed_names`). A name that acts on the machine is refused. Every other name becomes an inert :class:`Stub`,
because training scripts store their command line and whole objects. The allowed calls take no more memory than the file
has, change no object of the process, and cannot overflow the stack. ``torch.load(weights_only=True)`` refuses files
with other names, before torch 2.6 runs code from some, and lets a file ask for any amount of memory.
"""

from __future__ import annotations

import _codecs
import collections
import io
import math
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from moco_d2.io.hostile import is_hostile

_EXPANDED = 1 << 20  # values of an expanded tensor; bytes that may be copied in addition to the file's size
_NESTED = 1 << 14  # tuples within tuples


class HostileError(pickle.UnpicklingError):
    """A file names something that acts on the machine; the message is that name."""


class Stub(dict[Any, Any]):
    """Stands for an object whose class is not on the allow-list: it keeps the stored values and does nothing.

    It is a dictionary, because many objects in checkpoints are dictionaries of another name. It is hashable by
    identity, because some files use such objects as keys.

    Attributes:
        arguments: those with which the file calls the class.
        state: the state that the file sets.
    """

    arguments: tuple[Any, ...]
    state: Any

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
    """Stands for ``numpy.dtype``, because a pickle can set the state of a real one, which is shared by all arrays."""

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
    """An array that a pickle fills; numpy's own allocates the size that the file states before it reads the data."""

    def __setstate__(self, state: Any) -> None:
        *version, shape, dtype, fortran, raw = state
        held = len(raw) if dtype.real.hasobject else len(raw) // max(dtype.real.itemsize, 1)
        if math.prod(shape) > held:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {held} values")
        super().__setstate__((*version, shape, dtype.real, fortran, raw))


def _empty_array(*_: Any) -> Any:
    # The start of numpy's pickles; the shape that the file gives here would take memory.
    return np.ndarray((0,), "b").view(_Array)


def _array(shape: Any, dtype: Any, buffer: Any, *_: Any) -> Any:
    # Without a buffer, or with strides, the array would be as large as the file says.
    return np.ndarray(shape, dtype.real if isinstance(dtype, _DType) else np.dtype(dtype), _raw(buffer))


def _from_buffer(buffer: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> Any:
    return np.frombuffer(_raw(buffer), dtype.real).reshape(shape, order="F" if order == "F" else "C")


def _raw(buffer: Any) -> Any:
    if not isinstance(buffer, bytes | bytearray):
        raise pickle.UnpicklingError(f"a {type(buffer).__name__} as an array's data")
    return buffer


def _scalar(dtype: Any, raw: Any) -> Any:
    # In numpy's own function, a dtype of a gigabyte would allocate one. Python 2's pickles hold text.
    if dtype.real.hasobject:
        return raw
    return np.frombuffer(raw.encode("latin1") if isinstance(raw, str) else _raw(raw), dtype.real, 1)[0]


@dataclass(frozen=True)
class _Storage:
    """Bytes of the file and their dtype; torch's own typed storage is deprecated."""

    raw: torch.UntypedStorage
    dtype: torch.dtype


def _tensor(storage: _Storage, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
    # An expanded tensor (stride 0) becomes as large as the file says once something is computed from it.
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
    return function(*arguments)  # a tensor with attributes; they are not needed


def _quantised(*_: Any) -> torch.Tensor:
    return torch._empty_affine_quantized(
        [0], scale=1.0, zero_point=0, dtype=torch.quint8
    )  # refused later, with its key


class _Copies:
    """Calls that copy their argument, within a budget, because a file can ask for copies of copies."""

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
                        raise pickle.UnpicklingError("a tuple of tuples that is made by a call")
                elif kind is not collections.defaultdict or argument is not arguments[0]:
                    raise pickle.UnpicklingError(f"{kind.__name__} of a {type(argument).__name__}")
            return kind(*arguments)

        return make

    def plain(self, kind: Any) -> Callable[..., Any]:
        """Return a safe constructor of bytes, text or numbers; bytes of a number would allocate that many."""

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
        # numpy pickles its bytes as text, for Python 2. Other encodings are not allowed: codecs are found by import.
        self.spend(text)
        return _codecs.encode(text, "utf-8" if encoding.replace("_", "-").lower() == "utf-8" else "latin1")

    def storage(self, raw: bytes) -> Any:
        # torch's own function for this unpickles without restriction.
        self.spend(raw)
        whole = torch.frombuffer(bytearray(raw), dtype=torch.uint8).untyped_storage()
        return read_legacy(io.BytesIO(raw), whole, set())


def allowed_names(size: int) -> dict[tuple[str, str], Any]:
    """Return the names that are resolved: containers and the functions that rebuild tensors and arrays.

    Args:
        size: of the file; it limits how much may be copied.
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


# Storage classes of torch, by their names, and their dtypes.
_STORAGES = {f"{name}Storage": dtype for name, dtype in {
    "Double": torch.double, "Float": torch.float, "Half": torch.half, "BFloat16": torch.bfloat16,
    "Long": torch.long, "Int": torch.int, "Short": torch.short, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexDouble": torch.cdouble, "ComplexFloat": torch.cfloat, "Untyped": torch.uint8,
    "QUInt8": torch.uint8, "QInt8": torch.int8, "QInt32": torch.int32,
}.items()}  # fmt: skip


_SET_STATE = (Stub, _DType, _Array)
# Opcodes that change an object -> its place on the stack (None: before the last mark), and its allowed types.
_CHANGES: dict[str, tuple[int | None, tuple[type, ...]]] = {
    "load_setitem": (-3, (dict,)),
    "load_setitems": (None, (dict,)),
    "load_append": (-2, (list, Stub)),
    "load_appends": (None, (list, Stub)),
    "load_additems": (None, (set, Stub)),
}


# Python's unpickler, because C's allocates as many memo entries as the number in the file says.
class Unpickler(pickle._Unpickler):
    """Resolves the names of :func:`allowed_names` and no others.

    Args:
        file: the stream to read.
        allowed: of :func:`allowed_names`.
        stubbed: a set; the names that become stubs are added.
        storage: returns the data of a storage by its key, dtype and number of values.
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
        """Return the allowed object of a name, or a class of stubs; refuse a hostile name."""
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if module.partition(".")[0] == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if is_hostile(module, name):
            raise HostileError(f"{module}.{name}")
        self.stubbed.add(f"{module}.{name}")
        if (module, name) not in self.stubs:
            self.stubs[module, name] = type(name.rpartition(".")[2], (Stub,), {"__module__": module})
        return self.stubs[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Return a storage that torch's pickles refer to; each is looked up once."""
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
        """Set the state of a stub, a dtype or an array.

        No other object is changed, because an object that a file names may be shared by the whole process.
        """
        state = self.stack.pop()  # type: ignore[attr-defined]
        if isinstance(self.stack[-1], _SET_STATE):  # type: ignore[attr-defined]
            self.stack[-1].__setstate__(state)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build

    def tuple_made(self) -> None:
        """Refuse a tuple of tuples that is too deep to be hashed, which recurses on the C stack."""
        made = self.stack[-1]  # type: ignore[attr-defined]
        size = sum(self.sizes.get(id(item), (1, None))[0] for item in made if isinstance(item, tuple))
        if size >= _NESTED:
            raise pickle.UnpicklingError(f"tuples within tuples, {size} of them")
        if size:
            self.sizes[id(made)] = size + 1, made  # kept, so that no other object gets its id


def _guarded(change: str, place: int | None, kinds: tuple[type, ...]) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        target = self.metastack[-1][-1] if place is None else self.stack[place]
        if not isinstance(target, kinds):  # an item or a sum of a tensor can take any amount of memory
            raise pickle.UnpicklingError(f"{change} on a {type(target).__name__}")
        getattr(pickle._Unpickler, change)(self)

    return load


def _counted(opcode: str) -> Callable[[Any], None]:
    def load(self: Any) -> None:
        getattr(pickle._Unpickler, f"load_{opcode}")(self)
        self.tuple_made()

    return load


for _name in ("tuple", "tuple1", "tuple2", "tuple3"):
    Unpickler.dispatch[getattr(pickle, _name.upper())[0]] = _counted(_name)
for _change, _target in _CHANGES.items():
    _opcode = getattr(pickle, _change.removeprefix("load_").upper())
    Unpickler.dispatch[_opcode[0]] = _guarded(_change, *_target)


def read_legacy(stream: Any, whole: torch.UntypedStorage, stubbed: set[str]) -> Any:
    """Read a file that ``torch.save`` wrote before 1.6: pickles, and after them the storages one after the other.

    The pickle has to be read twice, because the place of a storage depends on the dtypes of those before it. This
    function is in this module because a pickle may contain such a file (``torch.storage._load_from_bytes``).

    Args:
        stream: the file, at its beginning.
        whole: its bytes.
        stubbed: as in :class:`Unpickler`.
    """
    allowed = allowed_names(whole.nbytes())
    for _ in range(3):  # magic number, version, sizes of the machine's numbers
        Unpickler(stream, allowed, stubbed).load()
    start, dtypes = stream.tell(), dict[str, torch.dtype]()

    def unread(key: str, dtype: torch.dtype, count: int) -> Any:
        dtypes[key] = dtype
        return torch.UntypedStorage(count * dtype.itemsize, device="meta")

    Unpickler(stream, allowed, stubbed, unread).load()
    found = {}
    for key in Unpickler(stream, allowed, stubbed).load():
        (count,) = struct.unpack("<q", stream.read(8))
        found[key] = section(whole, stream.tell(), count * dtypes[key].itemsize)
        stream.seek(found[key].nbytes(), os.SEEK_CUR)

    def storage(key: str, dtype: torch.dtype, count: int) -> Any:
        return section(found[key], 0, count * dtype.itemsize)

    stream.seek(start)
    return Unpickler(stream, allowed, stubbed, storage).load()


def section(whole: torch.UntypedStorage, start: int, size: int) -> Any:
    """Return a view of a file's bytes.

    Raises:
        UnpicklingError: the file ends before.
    """
    if start < 0 or size < 0 or start + size > whole.nbytes():
        raise pickle.UnpicklingError(f"it refers to {size} bytes at {start}, but has {whole.nbytes()}")
    return whole[start : start + size]

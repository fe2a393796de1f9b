"""Reading anyone's checkpoint without running code from it.

A pickle is a program: it may name any function and call it. Files are therefore read with ``weights_only=True``, and
where that refuses (training scripts store their command line, numpy numbers, whole objects), by an unpickler that
knows a short list of harmless names and replaces every other one by an inert :class:`Stub`.
"""

from __future__ import annotations

import _codecs
import builtins
import collections
import functools
import io
import logging
import os
import pickle
import tarfile
import types
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch._utils

from moco_d2.facts import BackboneFacts

logger = logging.getLogger(__name__)

_INFLATION = 20  # weights are noise, and compress by a tenth
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


def _encode(text: str, encoding: str = "latin1") -> bytes:
    # numpy pickles its bytes as text for Python 2's sake. Only its own encoding: codecs are looked up by import.
    return _codecs.encode(text, "utf-8" if encoding.replace("_", "-").lower() == "utf-8" else "latin1")


def _storage_from_bytes(raw: bytes) -> Any:
    # torch's own function of this purpose unpickles without restriction.
    return _restricted_torch_load(io.BytesIO(raw), mmap=False)[0]


def _bytes(kind: Any, *arguments: Any) -> Any:
    # A number would ask for that much memory.
    if any(isinstance(argument, int) for argument in arguments[:1]):
        raise pickle.UnpicklingError(f"{kind.__name__}({arguments[0]}) asks for memory")
    return kind(*arguments)


def _array(shape: Any, dtype: Any, buffer: Any, *rest: Any) -> Any:
    # Without a buffer it would take as much memory as the file says.
    return np.ndarray(shape, dtype, buffer, *rest)


def _empty_array(*_: Any) -> Any:
    # What numpy's pickles start from; the file's own shape here would take memory.
    return np.ndarray((0,), "b")


def _allowed() -> dict[tuple[str, str], Any]:
    """Return the names that the fallback resolves: containers, tensor and array rebuilders, nothing that acts."""
    plain = (
        "set",
        "frozenset",
        "list",
        "dict",
        "tuple",
        "int",
        "float",
        "complex",
        "bool",
        "str",
    )
    names: dict[tuple[str, str], Any] = {
        (module, name): getattr(builtins, name) for module in ("builtins", "__builtin__") for name in plain
    }
    for module in ("builtins", "__builtin__"):
        for kind in (bytes, bytearray):
            names[module, kind.__name__] = functools.partial(_bytes, kind)
    for name in ("OrderedDict", "defaultdict"):
        names["collections", name] = getattr(collections, name)
    for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter"):
        names["torch._utils", name] = getattr(torch._utils, name)
    names["torch.storage", "_load_from_bytes"] = _storage_from_bytes
    names.update({("torch", name): getattr(torch, name) for name in ("Size", "device")})
    names.update({("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)})
    names.update({("numpy", "ndarray"): _array, ("numpy", "dtype"): np.dtype})
    for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
        multiarray = np._core.multiarray  # type: ignore[attr-defined]
        names[f"{core}.multiarray", "_reconstruct"] = _empty_array
        names[f"{core}.multiarray", "scalar"] = multiarray.scalar
        names[f"{core}.numeric", "_frombuffer"] = np._core.numeric._frombuffer  # type: ignore[attr-defined]
    for name in dir(np.dtypes):
        if name.endswith("DType"):
            names["numpy.dtypes", name] = getattr(np.dtypes, name)
    names["_codecs", "encode"] = _encode
    # A pickle may set attributes of what it names; of Python's functions, those would last beyond this file.
    return {key: functools.partial(v) if isinstance(v, types.FunctionType) else v for key, v in names.items()}


def _is_hostile(module: str, name: str) -> bool:
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return name.partition(".")[0] in _HOSTILE_BUILTINS
    # A dotted name reaches through a module's attributes: torch.serialization's os.system.
    inside = set(name.split(".")[:-1]) & _HOSTILE_MODULES if "." in name else set()
    return top in _HOSTILE_MODULES or bool(inside) or (module, name) in _HOSTILE_NAMES


def _restricted_unpickler() -> Any:
    """Return an ``Unpickler`` class that resolves only :func:`_allowed` names and counts the others in ``stubbed``."""
    allowed = _allowed()

    # Python's own unpickler, not C's: that one takes as much memory as the number of a memo's entry says.
    class Restricted(pickle._Unpickler):
        stubbed: ClassVar[collections.Counter[str]] = collections.Counter()

        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in allowed:
                return allowed[module, name]
            if _is_hostile(module, name):
                raise _HostileError(f"{module}.{name}")
            self.stubbed[f"{module}.{name}"] += 1
            return type(name.rpartition(".")[2], (Stub,), {"__module__": module})

    return Restricted


def _restricted_torch_load(file: str | io.BytesIO, mmap: bool) -> tuple[Any, list[str]]:
    """Read a ``torch.save`` file through the restricted unpickler; also return the names that were stubbed."""
    unpickler = _restricted_unpickler()

    def load(stream: Any, **options: Any) -> Any:
        return unpickler(stream, **options).load()

    module = types.SimpleNamespace(Unpickler=unpickler, load=load, __name__="restricted_pickle")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about source code of pickled modules, which are stubs here
        content = torch.load(
            file, map_location="cpu", pickle_module=module, weights_only=False, mmap=mmap, encoding="latin1"
        )
    return content, sorted(unpickler.stubbed)


def _load_torch(path: Path, mmap: bool) -> tuple[Any, list[str]]:
    try:
        return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap), []
    except pickle.UnpicklingError:  # a name that torch does not allow, or a damaged file; the fallback tells which
        return _restricted_torch_load(str(path), mmap)


def _load_zip(path: Path) -> tuple[Any, list[str]]:
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
    return _load_torch(path, mmap=True)


def _load_arrays(path: Path, size: int) -> tuple[Any, list[str]]:
    """Read numpy's archive of arrays; a name may hold slashes, as TensorFlow's variables do."""
    if size > _INFLATION * path.stat().st_size:
        raise CheckpointError(f"{path}: its arrays inflate to {size} bytes, which weights do not")
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}, []


def _load_legacy(path: Path) -> tuple[Any, list[str]]:
    if tarfile.is_tarfile(path):  # torch would look into it as its oldest format
        raise CheckpointError(f"{path}: a tar archive, not a checkpoint; unpack it first")
    return _load_torch(path, mmap=False)


def _load_pickle(path: Path) -> tuple[Any, list[str]]:
    unpickler = _restricted_unpickler()
    with io.BytesIO(path.read_bytes()) as file:  # in memory, where a read beyond the end asks for no more of it
        content = unpickler(file, encoding="latin1").load()  # latin1: as numpy asks for Python 2's pickles
    return content, sorted(unpickler.stubbed)


def _load_safetensors(path: Path) -> tuple[Any, list[str]]:
    return safetensors.torch.load_file(path), []


def _reader(path: Path) -> Callable[[Path], tuple[Any, list[str]]]:
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

    The format is told from the content. Tensors come to the CPU; those of present-day torch files are mapped from the
    file and cost memory only when read. Objects of classes that are not on the allow-list become :class:`Stub`, and a
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

"""Names with which a pickle acts on the machine; a file that has one of them is refused as a whole.

This list gives a clear message; it is not the guard. A name that is neither here nor on the list of allowed names
becomes an inert stub (:mod:`moco_d2.io.unpickle`).
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MODULES = _words("""
    _io _pickle _posixsubprocess _socket _thread _winapi aiohttp asyncio bdb cffi code codeop commands cProfile ctypes
    distutils doctest ftplib http httpx idlelib importlib io linecache marshal mmap msvcrt multiprocessing nt ntpath os
    pdb pickle pip pkgutil popen2 posix posixpath profile pty pydoc requests runpy setuptools shelve shlex shutil signal
    smtplib socket socketserver sqlite3 ssl subprocess sys tempfile threading timeit trace urllib uuid venv webbrowser
    zipimport
""")
# Parts of packages that are otherwise harmless; each can run text or open files.
_PARTS = ("numpy.distutils", "numpy.f2py", "numpy.testing", "torch.hub", "torch.package", "torch.utils.cpp_extension")
_BUILTINS = _words(
    "__import__ breakpoint compile delattr eval exec execfile exit globals input locals open quit setattr vars"
)
_NAMES = frozenset(
    (module, name)
    for module, names in {
        "torch": "load hub ops classes compile",
        "torch.serialization": "load _load",
        "torch.jit": "load script",
        "numpy": "load save fromfile memmap loadtxt genfromtxt",
        "operator": "attrgetter methodcaller",
        "_operator": "attrgetter methodcaller",
        "types": "CodeType FunctionType",
        "functools": "reduce",
    }.items()
    for name in _words(names)
)


def is_hostile(module: str, name: str) -> bool:
    """Return whether a name, as a pickle spells it, acts on the machine."""
    top = module.partition(".")[0]
    if top in ("builtins", "__builtin__"):
        return name.partition(".")[0] in _BUILTINS
    # A dotted name reaches through a module's attributes, as in torch.serialization's os.system.
    inside = set(name.split(".")[:-1]) & _MODULES if "." in name else set()
    part = any(f"{module}.".startswith(f"{hostile}.") for hostile in _PARTS)
    return top in _MODULES or part or bool(inside) or (module, name) in _NAMES

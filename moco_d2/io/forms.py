"""Formats of weights that are not read: each is named, with the call that makes a readable file.

Only names and first bytes are used. Every call is between backticks and writes a new file beside the old one.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moco_d2.io.errors import some
from moco_d2.io.unpickle import Stub

DOWNLOAD_AGAIN = "download it again and compare its size or checksum"

_TRUSTED = "this runs code from the file, so do it only if you trust its author"
_ARCHIVES = (  # first bytes, name, command that unpacks
    (b"\x1f\x8b", "gzip", "gzip -dc {path} > {unpacked}"),
    (b"BZh", "bzip2", "bzip2 -dc {path} > {unpacked}"),
    (b"\xfd7zXZ", "xz", "xz -dc {path} > {unpacked}"),
    (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc {path} > {unpacked}"),
    (b"7z\xbc\xaf\x27\x1c", "7z", "7z x {path}"),
    (b"Rar!", "rar", "unrar x {path}"),
)
_ENCRYPTED = (b"Salted__", b"age-encryption.org", b"-----BEGIN PGP", b"-----BEGIN AGE", b"LUKS", b"\x85\x02")
_ZERO = re.compile(r"(bf16_)?zero_pp_rank_\d+_.*\.pt$")  # part of an optimizer that DeepSpeed distributes
_ZERO_SCRIPT = "zero_to_fp32.py"  # DeepSpeed writes it beside its checkpoints


def beside(path: Path, suffix: str = ".pth") -> Path:
    """Return the name of the file that a call writes: in the folder of ``path``, but not its name."""
    return path.with_name(f"{path.name.split('.')[0]}_weights{suffix}")


def python(code: str) -> str:
    """Return the command that runs Python code; texts in the code must be in double quotes."""
    return f"`python -c {shlex.quote(code)}`"


def text(path: Path) -> str:
    """Return a path as Python code, in double quotes."""
    return json.dumps(str(path), ensure_ascii=False)


def of_name(path: Path) -> str:
    """Say what a file is if its name alone shows it, because its content looks like a checkpoint."""
    if path.suffix == ".distcp":
        return f"one part of a distributed checkpoint (FSDP); {_distributed(path.parent)}"
    if _ZERO.match(path.name):
        return f"one part of a DeepSpeed optimizer; {_join_zero(path.parent)}"
    return ""


def of_head(path: Path, head: bytes) -> str:
    """Say what a file is instead of a checkpoint, and what to do, by its name and first bytes."""
    start = head.lstrip().lower()
    if not head:
        return f"the file is empty; {DOWNLOAD_AGAIN}"
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return f"a web page, not a checkpoint; {DOWNLOAD_AGAIN}, from the direct link to the file"
    if start.startswith(b"version https://git-lfs"):
        return f"a Git LFS pointer of {path.stat().st_size} bytes, not the file itself; run `git lfs pull`"
    quoted, unpacked = shlex.quote(str(path)), shlex.quote(str(beside(path)))
    for signature, name, command in _ARCHIVES:
        if head.startswith(signature):
            call = command.format(path=quoted, unpacked=unpacked)
            return f"a {name} archive, not a checkpoint; unpack it first: `{call}`"
    if head[257:262] == b"ustar":
        return (
            f"a tar archive, not a checkpoint; unpack it first: `tar -xf {quoted} -C {shlex.quote(str(path.parent))}`"
        )
    if head.startswith(_ENCRYPTED):
        return "an encrypted file; decrypt it first"
    if head.startswith(b"\x89HDF"):
        return f"an HDF5 file (Keras); write its arrays as .npz: {_hdf5(path)}"
    if head.startswith(b"\x93NUMPY"):
        return "a single numpy array, not a checkpoint; save all arrays by name with numpy.savez"
    if path.suffix == ".onnx" or (head[:1] == b"\x08" and (b"pytorch" in head or b"onnx" in start)):
        return (
            "an ONNX program, in which norms are usually folded into convolutions; save the network that it was "
            f"exported from: `torch.save(network.state_dict(), {text(beside(path))})`"
        )
    if path.name.endswith(".index") or re.search(r"\.data-\d{5}-of-\d{5}$", path.name):
        return tensorflow(path.with_name(re.sub(r"\.(index|data-\d{5}-of-\d{5})$", "", path.name)))
    if start[:1] in (b"{", b"["):
        return "a JSON file, not a checkpoint; give the file of weights that belongs to it"
    return f"not a checkpoint (it starts with {head[:12]!r}); give a file of torch.save, safetensors or pickle"


def of_zip(path: Path, members: Collection[str]) -> str:
    """Say what a zip archive is if ``torch.save`` did not write it; empty: it may have written it.

    Args:
        path: the archive.
        members: the names in it, without folders.
    """
    out = text(beside(path))
    if "constants.pkl" in members:  # opening it would run its program
        code = f"import torch; torch.save(torch.jit.load({text(path)}).state_dict(), {out})"
        return f"a TorchScript program, not a checkpoint; save its state_dict() ({_TRUSTED}): {python(code)}"
    if {"archive_format", "serialized_exported_program.json"} & set(members):
        code = f"import torch; torch.save(dict(torch.export.load({text(path)}).state_dict), {out})"
        return f"a program of torch.export, not a checkpoint; save its state_dict ({_TRUSTED}): {python(code)}"
    if "model.weights.h5" in members:
        return f"a Keras archive, not a checkpoint; unpack model.weights.h5 first: `unzip {shlex.quote(str(path))}`"
    if "data.pkl" not in members:
        folder = shlex.quote(str(beside(path, "")))
        return (
            f"a zip archive, not a checkpoint ({some(sorted(members))}); unpack it first: "
            f"`python -m zipfile -e {shlex.quote(str(path))} {folder}`"
        )
    return ""


def of_folder(path: Path) -> str:
    """Say what a folder is, and which file in it to give, or how to make one of it."""
    names = sorted(os.listdir(path))
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return f"a folder of a distributed checkpoint (FSDP); {_distributed(path)}"
    if any(_ZERO.match(name) for name in names) or {_ZERO_SCRIPT, "latest"} & set(names):
        return f"a DeepSpeed folder with the weights in parts; {_join_zero(path)}"
    index = next((name for name in names if name.endswith(".index")), "")
    if index and any(".data-0" in name for name in names):
        return tensorflow(path / index.removesuffix(".index"))
    if "saved_model.pb" in names:
        return tensorflow(path / "variables" / "variables")
    weights = [name for name in names if re.search(r"\.(pth|pt|pkl|safetensors|bin|ckpt|tar|npz|pyth)$", name)]
    pointer = path / "last_checkpoint"
    last = pointer.read_text(errors="replace").strip() if pointer.is_file() else ""
    best = next((name for name in ("model_final.pth", last) if name in weights), "")
    if best:
        return f"a folder, not a file; give the checkpoint in it: {path / best}"
    return f"a folder, not a file; give a checkpoint in it ({some(weights or names) or 'it is empty'})"


def of_missing(path: Path) -> str:
    """Say why there may be no such file."""
    if path.with_name(f"{path.name}.index").is_file():
        return tensorflow(path)
    return f"no such file; check the path (the current folder is {Path.cwd()})"


def of_content(path: Path, content: Any, stubbed: Collection[str]) -> str:
    """Say why the content of a file is no mapping of names to tensors; empty: it may be one."""
    if isinstance(content, Stub):
        return _object(path, content, "")
    if not isinstance(content, Mapping):
        return (
            f"holds a {type(content).__name__}, not a mapping of names to tensors; "
            f"save a state_dict(): `torch.save(network.state_dict(), {text(beside(path))})`"
        )
    inside = content.get("module")
    if "ds_config" in content and isinstance(inside, Mapping):
        sizes = [value.numel() for value in inside.values() if isinstance(value, torch.Tensor)]
        if 0 in sizes:
            return f"a DeepSpeed file (ZeRO 3) whose weights are in other files; {_join_zero(path.parent)}"
    parts = [name for name in stubbed if name.startswith("torch.distributed.") and name.endswith("Tensor")]
    if parts:
        return (
            f"holds one process's parts of the tensors ({some(sorted(parts))}); gather them in the code that wrote it: "
            "`from torch.distributed.checkpoint.state_dict import *; torch.save(get_model_state_dict(network, "
            f"options=StateDictOptions(full_state_dict=True)), {text(beside(path))})`"
        )
    modules = {key: value for key, value in content.items() if isinstance(value, Stub) and _is_module(value)}
    if modules and not any(_has_tensors(value) for value in (content, *content.values())):
        key, module = next(iter(modules.items()))
        return _object(path, module, f"[{json.dumps(key)}]")
    return ""


def tensorflow(path: Path) -> str:
    """Say that a path is a TensorFlow checkpoint, and how to write its variables as an archive of arrays."""
    code = (
        f"import numpy, tensorflow; r = tensorflow.train.load_checkpoint({text(path)}); "
        f"numpy.savez({text(beside(path, '.npz'))}, "
        '**{n: r.get_tensor(n) for n in r.get_variable_to_shape_map() if r.get_tensor(n).dtype.kind == "f"})'
    )
    return f"a TensorFlow checkpoint; write its variables as .npz: {python(code)}"


def _hdf5(path: Path) -> str:
    return python(
        f"import h5py, numpy; f = h5py.File({text(path)}); a = {{}}; f.visititems(lambda n, d: a.update({{n: d[()]}}) "
        f"if isinstance(d, h5py.Dataset) else None); numpy.savez({text(beside(path, '.npz'))}, **a)"
    )


def _distributed(folder: Path) -> str:
    code = (
        "from torch.distributed.checkpoint.format_utils import dcp_to_torch_save; "
        f"dcp_to_torch_save({text(folder)}, {text(beside(folder))})"
    )
    return f"join its parts ({_TRUSTED}): {python(code)}"


def _join_zero(folder: Path) -> str:
    """Return the call that joins the parts of DeepSpeed's processes, by the script in the folder or above it."""
    root = next((place for place in (folder, folder.parent) if (place / _ZERO_SCRIPT).is_file()), folder)
    script = root / _ZERO_SCRIPT
    call = f"python {shlex.quote(str(script))}" if script.is_file() else "python -m deepspeed.utils.zero_to_fp32"
    return f"join them: `{call} {shlex.quote(str(root))} {shlex.quote(str(beside(root, '')))}`"


def _object(path: Path, stub: Stub, place: str) -> str:
    name = f"{type(stub).__module__}.{type(stub).__qualname__}"
    if not _is_module(stub):
        return (
            f"a pickled {name} object, not a mapping of names to tensors; save a state_dict() in the code that made it"
        )
    load = f"torch.load({text(path)}, weights_only=False){place}"
    code = python(f"import torch; torch.save({load}.state_dict(), {text(beside(path))})")
    return f"a pickled {name} object, a whole module; with its code at hand, save its state_dict() ({_TRUSTED}): {code}"


def _is_module(stub: Stub) -> bool:
    return isinstance(stub.state, Mapping) and "_parameters" in stub.state and "_modules" in stub.state


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, torch.Tensor | np.ndarray) for item in value.values())

"""Forms of files: those in several parts are read, the others are named with a call that makes a readable file."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from moco_d2.convert import CheckpointError, read_checkpoint

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2), "b.weight": torch.zeros(4)}
SAVERS: dict[str, Callable[[Any, Path], None]] = {"safetensors": safetensors.torch.save_file, "bin": torch.save}


def sharded(folder: Path, kind: str = "safetensors", **changes: Any) -> Path:
    """Write a checkpoint in two parts as Hugging Face does; ``changes`` replace parts or entries of the index."""
    folder.mkdir()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    names = [f"{stem}-{n:05d}-of-00002.{kind}" for n in (1, 2)]
    parts = [{k: v for k, v in STATE.items() if k.startswith("a")}, {"b.weight": STATE["b.weight"]}]
    for name, part in zip(names, parts, strict=True):
        SAVERS[kind](changes.pop(name, part), folder / name)
    index = folder / f"{stem}.{kind}.index.json"
    places = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    index.write_text(changes.pop("text", json.dumps({"metadata": {}, "weight_map": {**places, **changes}})))
    return index


@pytest.mark.parametrize("kind", SAVERS)
def test_parts_are_read_by_folder_and_index(kind: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "net", kind)
    for path in (tmp_path / "net", index):
        read = read_checkpoint(path)
        assert read.keys() == STATE.keys() and all(torch.equal(read[key], STATE[key]) for key in STATE)
    part = index.with_name(index.name.split(".")[0] + f"-00001-of-00002.{kind}")
    with pytest.raises(CheckpointError, match=f"part 1 of 2 of a checkpoint; give the index: {index}"):
        read_checkpoint(part)
    index.unlink()
    with pytest.raises(CheckpointError, match="part 1 of 2 of a checkpoint; download the whole folder"):
        read_checkpoint(part)
    part.rename(single := tmp_path / f"model-00001-of-00001.{kind}")  # a small checkpoint has one part, which is whole
    assert read_checkpoint(single).keys() == {"a.weight", "a.bias"}


FIRST, SECOND = (f"model-{n:05d}-of-00002.safetensors" for n in (1, 2))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"c": "../../etc/passwd"}, "names the part '../../etc/passwd'; it must be the name of a file in the folder"),
        ({"c": "/etc/passwd"}, "must be the name of a file in the folder of the index"),
        ({"c": ".."}, "must be the name of a file in the folder of the index"),
        ({"c": "x\\y"}, "must be the name of a file in the folder of the index"),
        ({"c": "gone.safetensors"}, r"1 of 3 parts are missing \(gone.safetensors\); download them"),
        ({"c": 3}, "must name a part for each tensor"),
        ({"c": FIRST}, rf"{FIRST} lacks tensors that the index says it holds \(c\)"),
        (
            {SECOND: {"b.weight": STATE["b.weight"], "a.bias": STATE["a.bias"]}},
            r"holds tensors that another part holds too \(a.bias",
        ),
        ({"text": "{"}, "not an index of parts"),
        ({"text": "[]"}, "not an index of parts"),
        ({"text": "[" * 100_000}, "not an index of parts"),
        ({"text": '{"weight_map": {}}'}, "must name a part for each tensor"),
        ({"text": f'{{"weight_map": {{"a.bias": "{FIRST}", "a.bias": "{SECOND}"}}}}'}, "it has a name twice"),
    ],
)
def test_an_index_that_cannot_be_followed_is_told(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    index = sharded(tmp_path / "net", **changes)
    with pytest.raises(CheckpointError, match=words) as refusal:
        read_checkpoint(index)
    assert str(refusal.value).startswith(f"{index}: ") and "\n" not in str(refusal.value)


def test_a_part_that_is_hostile_or_cut_is_named(tmp_path: Path) -> None:
    index = sharded(tmp_path / "net")
    part = index.with_name(SECOND)
    raw = part.read_bytes()
    part.write_bytes(raw[:-4])
    with pytest.raises(CheckpointError, match=f"{part}: damaged or truncated"):
        read_checkpoint(index)
    part.write_bytes(pickle.dumps({"x": eval}))
    with pytest.raises(CheckpointError, match=f"{part}: refused: opening it would run builtins.eval"):
        read_checkpoint(tmp_path / "net")


def test_facts_in_the_header_of_safetensors(tmp_path: Path) -> None:
    for text, expected in (('{"depth": 50}', {"depth": 50}), ("notes of a stranger", None), ("[1]", None)):
        safetensors.torch.save_file(STATE, tmp_path / "x.safetensors", metadata={"facts": text})
        read = read_checkpoint(tmp_path / "x.safetensors")
        assert read.get("facts") == expected and read.keys() - {"facts"} == STATE.keys()


def test_a_header_of_safetensors_that_begins_as_a_pickle_does(tmp_path: Path) -> None:
    for size in (128, 384, 640, 896, 1152):  # whose lowest byte is a pickle's first, and the next a protocol's number
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(size)
        (tmp_path / "x.safetensors").write_bytes(size.to_bytes(8, "little") + header + bytes(4))
        assert read_checkpoint(tmp_path / "x.safetensors")["w"].tolist() == [0]


def test_a_file_that_changes_is_read_again_and_copies_are_independent(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    for value in range(3):  # within one tick of the clock, and of one size
        torch.save({"model": {"w": torch.full((3,), value)}}, path)
        read = read_checkpoint(path)
        assert read["model"].pop("w").tolist() == [value] * 3
        assert read_checkpoint(path)["model"]["w"].tolist() == [value] * 3


# Files that are not read -> the words that name them. Each writes itself, and returns what is given to the reader.


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def whole_module(folder: Path) -> Path:
    torch.save(nn.Sequential(nn.Linear(2, 2)), folder / "net work.pt")
    return folder / "net work.pt"


def module_within(folder: Path) -> Path:
    torch.save({"epoch": 3, "model": nn.Sequential(nn.Linear(2, 2))}, folder / "net.pt")
    return folder / "net.pt"


def script(folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(Network(), torch.zeros(1, 2)), folder / "net.pt")
    return folder / "net.pt"


def exported(folder: Path) -> Path:
    torch.export.save(torch.export.export(Network(), (torch.zeros(1, 2),)), folder / "net.pt2")
    return folder / "net.pt2"


def distributed(folder: Path) -> Path:
    from torch.distributed import checkpoint

    checkpoint.save({"model": STATE}, checkpoint_id=folder / "step 1", no_dist=True)
    return folder / "step 1"


def distributed_part(folder: Path) -> Path:
    return next(distributed(folder).glob("*.distcp"))


def deepspeed(folder: Path) -> Path:
    (folder / "run/global_step5").mkdir(parents=True)
    (folder / "run/latest").write_text("global_step5")
    (folder / "run/global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"")
    # What DeepSpeed writes beside a checkpoint joins its parts; this one makes as much.
    (folder / "run/zero_to_fp32.py").write_text(
        "import sys, os, torch\nos.makedirs(sys.argv[2])\n"
        "torch.save({'w': torch.ones(2)}, os.path.join(sys.argv[2], 'pytorch_model.bin'))\n"
    )
    return folder / "run"


def deepspeed_step(folder: Path) -> Path:
    return deepspeed(folder) / "global_step5"


def deepspeed_part(folder: Path) -> Path:
    return deepspeed_step(folder) / "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def deepspeed_empty(folder: Path) -> Path:
    path = deepspeed_step(folder) / "mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.empty(0)}, "ds_config": {}}, path)
    return path


def tensorflow(folder: Path) -> Path:
    (folder / "model.ckpt-7.index").write_bytes(b"\x00\x00\x10\x08\x01")
    (folder / "model.ckpt-7.data-00000-of-00001").write_bytes(bytes(range(64)))
    return folder / "model.ckpt-7"


def tensorflow_index(folder: Path) -> Path:
    return tensorflow(folder).with_name("model.ckpt-7.index")


def tensorflow_data(folder: Path) -> Path:
    return tensorflow(folder).with_name("model.ckpt-7.data-00000-of-00001")


def tensorflow_folder(folder: Path) -> Path:
    return tensorflow(folder).parent


def keras(folder: Path) -> Path:
    (folder / "net.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    return folder / "net.h5"


def gzipped(folder: Path) -> Path:
    torch.save(STATE, buffer := io.BytesIO())
    (folder / "net.pth").write_bytes(gzip.compress(buffer.getvalue()))
    return folder / "net.pth"


def tarred(folder: Path) -> Path:
    torch.save(STATE, folder / "inner.pth")
    with tarfile.open(folder / "net.pth.tar", "w") as archive:
        archive.add(folder / "inner.pth", "inner.pth")
    (folder / "inner.pth").unlink()
    return folder / "net.pth.tar"


def in_a_zip(folder: Path) -> Path:
    torch.save(STATE, buffer := io.BytesIO())
    with zipfile.ZipFile(folder / "net.zip", "w") as archive:
        archive.writestr("inner.pth", buffer.getvalue())
    return folder / "net.zip"


def a_list(folder: Path) -> Path:
    torch.save([STATE["a.bias"]], folder / "net.pth")
    return folder / "net.pth"


def onnx(folder: Path) -> Path:
    (folder / "net.onnx").write_bytes(b"\x08\x07\x12\x07pytorch\x1a\x052.1.0")
    return folder / "net.onnx"


FORMS: dict[Callable[[Path], Path], str] = {
    whole_module: "a whole module",
    module_within: "a whole module",
    script: "a TorchScript program",
    exported: "a program of torch.export",
    distributed: "a distributed checkpoint",
    distributed_part: "one part of a distributed checkpoint",
    deepspeed: "DeepSpeed",
    deepspeed_step: "DeepSpeed",
    deepspeed_part: "DeepSpeed",
    deepspeed_empty: "DeepSpeed",
    tensorflow: "a TensorFlow checkpoint",
    tensorflow_index: "a TensorFlow checkpoint",
    tensorflow_data: "a TensorFlow checkpoint",
    tensorflow_folder: "a TensorFlow checkpoint",
    keras: "an HDF5 file",
    gzipped: "a gzip archive",
    tarred: "a tar archive",
    in_a_zip: "a zip archive",
    a_list: "holds a list",
    onnx: "an ONNX program",
}


class Dataset:
    """Stands for h5py's."""

    def __getitem__(self, _: tuple[()]) -> Any:
        return np.ones(2, np.float32)


class Library:
    """Stands for TensorFlow and h5py, which are not installed here: as much of them as the calls use."""

    def load_checkpoint(self, path: str) -> Library:
        assert Path(f"{path}.index").is_file()
        return self

    def get_variable_to_shape_map(self) -> dict[str, list[int]]:
        return {"net/kernel": [2], "step": []}

    def get_tensor(self, name: str) -> Any:
        return np.ones(2, np.float32) if name == "net/kernel" else np.int64(7)

    def visititems(self, function: Callable[[str, Any], Any]) -> None:
        assert function("net/kernel", Dataset()) is None


def follow(call: str) -> None:
    """Run the call of a message; Python in this process, where its libraries are loaded."""
    words = shlex.split(call)
    if words[:2] == ["python", "-c"]:
        exec(words[2], {})
    elif words[0] == "python" and words[1].endswith(".py"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words[1:])
            runpy.run_path(words[1])
    elif call.startswith("torch.save"):
        exec(f"import torch\n{call}", {"network": Network()})
    else:
        subprocess.run(call.replace("python ", f"{sys.executable} ", 1), shell=True, check=True, capture_output=True)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_the_call_of_a_message_makes_a_readable_file(
    form: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = form(tmp_path)
    with pytest.raises(CheckpointError) as refusal:
        read_checkpoint(path)
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and FORMS[form] in message and "\n" not in message, message
    monkeypatch.setitem(sys.modules, "tensorflow", types.SimpleNamespace(train=Library()))
    monkeypatch.setitem(sys.modules, "h5py", types.SimpleNamespace(File=lambda _: Library(), Dataset=Dataset))
    before = set(tmp_path.rglob("*"))
    (call,) = re.findall("`(.*)`", message)
    follow(call)
    (made, *_) = sorted(file for file in set(tmp_path.rglob("*")) - before if file.is_file())
    assert any(isinstance(value, torch.Tensor | np.ndarray) for value in _all(read_checkpoint(made)))
    assert before <= set(tmp_path.rglob("*"))


def _all(content: Any) -> list[Any]:
    return [item for value in content.values() for item in (_all(value) if isinstance(value, dict) else [value])]


def test_one_processes_parts_of_tensors_are_named(tmp_path: Path) -> None:
    class ShardedTensor(dict[str, Any]):
        pass

    ShardedTensor.__module__, ShardedTensor.__qualname__ = (
        "torch.distributed._shard.sharded_tensor.api",
        "ShardedTensor",
    )
    module = types.ModuleType(ShardedTensor.__module__)
    module.ShardedTensor = ShardedTensor  # type: ignore[attr-defined]
    sys.modules[ShardedTensor.__module__], real = module, sys.modules.get(ShardedTensor.__module__)
    try:
        torch.save({"model": {"w": ShardedTensor()}}, tmp_path / "x.pth")
    finally:
        del sys.modules[ShardedTensor.__module__]
        if real is not None:
            sys.modules[ShardedTensor.__module__] = real
    with pytest.raises(CheckpointError, match="one process's parts of the tensors") as refusal:
        read_checkpoint(tmp_path / "x.pth")
    (call,) = re.findall("`(.*)`", str(refusal.value))
    exec(f"import torch\n{call}", {"network": Network()})
    assert read_checkpoint(tmp_path / "x_weights.pth").keys() == Network().state_dict().keys()


def test_a_runs_folder_names_its_checkpoint(tmp_path: Path) -> None:
    for names, given in ((["model_0000004.pth"], "model_0000004.pth"), (["model_final.pth"], "model_final.pth")):
        for name in names:
            torch.save({"model": STATE}, tmp_path / name)
        (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
        with pytest.raises(
            CheckpointError, match=f"a folder, not a file; give the checkpoint in it: .*/{given}$"
        ) as told:
            read_checkpoint(tmp_path)
        assert read_checkpoint(str(told.value).rpartition(": ")[2]).keys() == {"model"}
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    with pytest.raises(CheckpointError, match="it is empty"):
        read_checkpoint(tmp_path)

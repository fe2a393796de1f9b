"""Nothing but moco_d2/io opens a file of weights, or anything else that may run code when it is opened."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Calls that run code of what they open, or may: under some versions, or by their default.
OPENERS = {
    "torch.load", "torch.jit.load", "torch.hub.load", "torch.hub.load_state_dict_from_url",
    "torch.package.PackageImporter", "pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._Unpickler",
    "dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads",
    "joblib.load", "shelve.open", "marshal.load", "marshal.loads", "pandas.read_pickle",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.UnsafeLoader",
    "safe_open", "load_file",
    "DetectionCheckpointer", "Checkpointer", "DefaultPredictor", "model_zoo.get",
}  # fmt: skip
# Place -> call -> why it may stand there.
ALLOWED = {
    "moco_d2/io/checkpoints.py": {"safe_open": "the one reader"},
    "moco_d2/io/unpickle.py": {"pickle._Unpickler": "its class, with every name that it resolves on a list"},
    "moco_d2/detection/predictor.py": {"DefaultPredictor": "with MODEL.WEIGHTS empty: load_weights fills it"},
    "benchmarks/conversion.py": {"torch.load": "compared with the reader, on files that it wrote itself"},
    "benchmarks/step.py": {"torch.load": "results that its own processes wrote a moment before"},
    "benchmarks/scale.py": {"pickle.loads": "what it pickled itself, to weigh it"},
}


def calls(root: Path = ROOT) -> Iterator[tuple[str, str, ast.AST]]:
    """Yield (file, dotted name, node) of every name that is used, imported names by their full ones."""
    folders = ("moco_d2", "tools", "benchmarks", "datasets", "examples")
    for path in sorted(path for folder in folders for path in (root / folder).rglob("*.py")):
        name, tree = str(path.relative_to(root)), ast.parse(path.read_text())
        full: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                full |= {alias.asname: alias.name for alias in node.names if alias.asname}
            elif isinstance(node, ast.ImportFrom):
                full |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                first, _, rest = ast.unparse(node.func).partition(".")
                yield name, ".".join(filter(None, (full.get(first, first), rest))), node
            elif isinstance(node, ast.Attribute):
                yield name, ast.unparse(node), node


def opener(dotted: str) -> str:
    """Return the opener that a dotted name ends with, or nothing."""
    return next((name for name in OPENERS if dotted == name or dotted.endswith(f".{name}")), "")


def test_only_the_reader_opens_what_may_run_code() -> None:
    found = {(file, opener(dotted)) for file, dotted, _ in calls() if opener(dotted)}
    allowed = {(file, name) for file, names in ALLOWED.items() for name in names}
    assert found == allowed, "use moco_d2.io.checkpoints; what is in ALLOWED and no longer there goes"


def test_arrays_and_configs_are_read_without_objects() -> None:
    seen = 0
    for file, dotted, node in calls():
        options = {k.arg: ast.unparse(k.value) for k in node.keywords} if isinstance(node, ast.Call) else {}
        assert options.get("allow_pickle", "False") == "False", file
        assert options.get("weights_only", "True") == "True", file
        if isinstance(node, ast.Call) and dotted.endswith(".merge_from_file"):
            seen += 1
            assert options.get("allow_unsafe") == "False", f"{file}: Detectron2's default runs code of a YAML file"
    assert seen


def test_the_walk_finds_what_it_looks_for(tmp_path: Path) -> None:
    spelled = {
        "import torch as t\nt.load(x)": "torch.load",
        "import torch\nopen_it = torch.load\nopen_it(x)": "torch.load",
        "from pickle import loads as read\nread(x)": "pickle.loads",
        "import safetensors.torch\nsafetensors.torch.load_file(x)": "load_file",
        "from detectron2.checkpoint import DetectionCheckpointer as C\nC(m).load(x)": "DetectionCheckpointer",
    }
    (tmp_path / "tools").mkdir()
    for source, name in spelled.items():
        (tmp_path / "tools/x.py").write_text(source)
        assert name in {opener(dotted) for _, dotted, _ in calls(tmp_path)}, source

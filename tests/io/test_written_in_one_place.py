"""Whatever removes, replaces or writes files is in ``moco_d2/io/files.py``, which looks at what is there first."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ONE_PLACE = "moco_d2/io/files.py"
# Functions and methods that change files, whatever they belong to.
CHANGING = {
    "rmtree", "unlink", "rmdir", "removedirs", "rename", "renames", "write_text", "write_bytes", "touch", "symlink_to",
    "hardlink_to", "symlink", "link", "truncate", "ftruncate", "mkdtemp", "mkstemp", "copyfile", "copytree", "copy2",
    "savefig", "save", "savez", "savez_compressed", "savetxt", "tofile", "dump_all",
}  # fmt: skip
# Those whose names are other things elsewhere (str.replace, Path.open).
OF_MODULES = {("os", "replace"), ("os", "remove"), ("shutil", "move"), ("shutil", "copy"), ("json", "dump")}

# Where it is done elsewhere, and why nothing has to be asked there: files, or functions of a file.
CHECKPOINTER = "a checkpointer, which writes by atomic_write()"
ALLOWED = {
    "moco_d2/samples/make.py": "below the new folder of replaced_folder()",
    "moco_d2/install_detectron2.py": "Detectron2 in site-packages, as pip does; it must run without the rest",
    "benchmarks/conversion.py": "a temporary folder of its own",
    "benchmarks/data.py": "a temporary folder of its own",
    "benchmarks/evaluation.py": "a temporary folder of its own",
    "benchmarks/feed.py": "a temporary folder of its own",
    "benchmarks/proof.py _write": "below the new folder of replaced_folder()",
    "benchmarks/proof.py draw": "a figure into memory",
    "benchmarks/proof.py pictures": "io.files.write_text()",
    "benchmarks/scale.py": "a temporary folder of its own, the cache in it too",
    "benchmarks/step.py": "a temporary folder of its own",
    "moco_d2/convert/back.py restore": "torch.save() into a file of named_file()",
    "moco_d2/convert/conversion.py save": "a part in a temporary folder; write() moves it by move()",
    "moco_d2/convert/conversion.py write": "save() above",
    "moco_d2/data/labelled_loader.py read": "a picture into memory",
    "moco_d2/data/shard_cache.py _make_room": "an empty part in the cache, under a name of ours",
    "moco_d2/data/shard_index.py cached_index": "np.save() into a file of atomic_write()",
    "moco_d2/data/shards.py prepare": "ShardCache.touch(), which sets a time",
    "moco_d2/data/skipped.py _append": "all processes of a run append to one file of its claimed folder",
    "moco_d2/detection/label_images.py _open": "a picture into memory",
    "moco_d2/detection/datasets.py _write_voc": "io.files.write_text()",
    "moco_d2/data/view_pairs.py __getitem__": "a picture into memory",
    "moco_d2/running/launch.py _rank_main": "a temporary folder of the launcher",
    "moco_d2/exits.py leave": "os.devnull",
    "moco_d2/reports/curves.py _draw": "a figure into memory",
    "moco_d2/reports/pictures.py save_figure": "a figure into memory",
    "moco_d2/reports/predictions.py _write_image": "a picture into memory",
    "moco_d2/reports/page.py figure": "a picture into memory",
    "moco_d2/io/download.py _attempt": "a partial download, under a name of ours, goes on growing",
    "moco_d2/io/locks.py lock": "the lock's own file",
    "moco_d2/running/dry_run.py quiet": "os.devnull",
    "moco_d2/running/checkpoints.py _write": CHECKPOINTER,
    "moco_d2/running/checkpoints.py after_step": CHECKPOINTER,
    "moco_d2/running/checkpoints.py write_tensors": "torch.save() into a file of atomic_write()",
    "moco_d2/running/preemption.py after_step": CHECKPOINTER,
    "moco_d2/commands/cli.py dry_run": "a temporary folder of its own",
    "moco_d2/commands/cli.py follow_all": "the log of a command that we start, in a folder that is claimed",
}


def changes(tree: ast.AST, function: str = "") -> Iterator[tuple[str, str]]:
    """Yield (function, call) of all calls that change files."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else function
        if isinstance(node, ast.Call) and (found := change(node)):
            yield inside, found
        yield from changes(node, inside)


def change(call: ast.Call) -> str | None:
    """Return what a call changes, or None."""
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    of = getattr(getattr(call.func, "value", None), "id", "")
    if (
        name in CHANGING
        or (of, name) in OF_MODULES
        or (name == "replace" and len(call.args) == 1 and not call.keywords)
    ):
        return name
    parts = [node for argument in (*call.args, *(k.value for k in call.keywords)) for node in ast.walk(argument)]
    words = [node.value for node in parts if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    modes = [w for w in words if len(w) <= 4 and set(w) <= set("rwaxbt+") and set(w) & set("wax+")]
    if name in ("open", "fdopen") and of != "tarfile" and modes:
        return f"{name} {modes[0]!r}"
    if (of, name) == ("os", "open") and any(f in ast.dump(call) for f in ("O_WRONLY", "O_RDWR", "O_CREAT", "O_TRUNC")):
        return "os.open"
    return None


def test_nothing_else_removes_or_overwrites() -> None:
    files = [
        path for folder in ("moco_d2", "tools", "benchmarks", "datasets") for path in (ROOT / folder).rglob("*.py")
    ]
    unknown, used = [], set()
    for path in sorted(files):
        name = str(path.relative_to(ROOT))
        if name == ONE_PLACE:
            continue
        for function, call in changes(ast.parse(path.read_text())):
            place = name if name in ALLOWED else f"{name} {function}"
            used.add(place)
            unknown += [f"{place}: {call}"] * (place not in ALLOWED)
    assert not unknown, "go through moco_d2/io/files.py, or say in ALLOWED why this need not"
    assert set(ALLOWED) == used, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "line",
    [
        "shutil.rmtree(x)", "path.unlink()", "os.remove(x)", "a.rename(b)", "os.replace(a, b)", "a.replace(b)",
        "path.write_text('x')", "open(x, 'w')", "open(x, mode='ab')", "path.open('r+')", "open(x, 'ab' if y else 'wb')",
        "os.open(x, os.O_RDWR | os.O_CREAT)", "torch.save(x, path)", "image.save(path)", "tempfile.mkdtemp()",
    ],
)  # fmt: skip
def test_the_reader_knows_what_changes_files(line: str) -> None:
    assert len(list(changes(ast.parse(line)))) == 1


@pytest.mark.parametrize(
    "line",
    ["'a'.replace('b', 'c')", "open(x)", "open(x, 'rb')", "dataclasses.replace(a, b=1)", "os.open(x, os.O_RDONLY)"],
)
def test_the_reader_lets_pass_what_does_not(line: str) -> None:
    assert not list(changes(ast.parse(line)))

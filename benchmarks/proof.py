"""The MoCo authors' CIFAR-10 demo, run by ``moco-d2 pretrain`` and drawn over the curve that they published."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import machine
from moco_d2.commands import cli
from moco_d2.io import files, paths
from moco_d2.io.provenance import provenance
from moco_d2.resources import cores

if TYPE_CHECKING:
    from moco_d2.data.labelled import LabelledSet

CONFIG = "Pretrain/moco_cifar10_R18_200ep"
PUBLISHED = Path(__file__).with_name("moco_cifar10_demo.csv")
# What the output folder gets. A run in it is continued, and its pictures are written once.
CONTENT = ("pictures", "run", "pretrain.log", "proof.png", "proof.md", "proof.json")
Rows = list[dict[str, float | None]]
_ITERATIONS = 97  # of an epoch: 50,000 pictures in batches of 512
_SHOWN = re.compile(rf"{cli.PROGRESS.pattern}|monitor, .*?%")


def run(args: argparse.Namespace) -> None:
    """Pretrain, or continue, in a process of its own; then draw.

    Raises:
        ValueError: settings or pictures are not as they must be, or the folder has files that this command did not
            write.
    """
    from moco_d2.config import load_cfg

    if not args.width > 0:
        raise ValueError(f"--width is {args.width}; it must be positive: 1 is the authors' network, 0.25 a quarter")
    output = args.output.resolve()
    if not args.draw:
        load_cfg(CONFIG, args.opts)  # a misspelt key is found before the download
        files.claim(output, CONTENT, "--output")
        train, labelled = pictures(args.pictures, output / "pictures")
        pretrain(output, [*settings(args.epochs, args.width, train, labelled), *args.opts])
    print(report(output))


def pretrain(output: Path, pairs: Sequence[str]) -> None:
    """Pretrain in a process of its own, or continue its run; end with its exit code if it fails.

    Args:
        output: the folder; the run's is ``run`` in it.
        pairs: ``KEY VALUE`` pairs.
    """
    import torch

    words = ["pretrain", "--config-file", CONFIG, "--resume", *pairs, "OUTPUT_DIR", str(output / "run")]
    print(f"  $ moco-d2 {shlex.join(words)}", flush=True)
    where = machine("cuda" if torch.cuda.is_available() else "cpu")
    started = {"machine": where, "pretraining": f"moco-d2 {shlex.join(words)}", **provenance()}
    with files.atomic_write(output / "proof.json") as file:
        file.write(json.dumps(started).encode())
    log = output / "pretrain.log"
    with cli.stop_on_signals():
        code = cli.follow(["-m", "moco_d2", *words], log, _SHOWN)
    if code:
        cli.fail(f"the pretraining ended with code {code}; its log is {log}", max(code, 1))


def settings(epochs: int, width: float, train: str, labelled: str) -> list[str]:
    """Return the ``KEY VALUE`` pairs of the run, beside those of the shipped recipe.

    Args:
        epochs: length of the schedule.
        width: of the ResNet-18.
        train: folder of the training pictures.
        labelled: name of the labelled set, with both halves.
    """
    # On a CPU, a probe of 60,000 pictures takes a quarter of an epoch's time.
    period = max(2, epochs // 40)
    pairs = {
        "DATASETS.TRAIN": f"({train!r},)", "SSL.ENCODER.ARGS.width": width, "SOLVER.EPOCHS": epochs,
        "SSL.MONITOR.DATASET": labelled, "SSL.MONITOR.PERIOD": period, "SSL.MONITOR.TEMPERATURE": 0.1,
        "SOLVER.CHECKPOINT_PERIOD": period * _ITERATIONS, "DATALOADER.NUM_WORKERS": min(8, max(1, cores() - 1)),
    }  # fmt: skip
    return [str(word) for pair in pairs.items() for word in pair]


def pictures(source: str, folder: Path) -> tuple[str, str]:
    """Return the folder of the training pictures, and the name of the labelled set with both halves.

    A folder of class folders is used as it is. Of the other forms, every picture is written as a PNG file, once.

    Args:
        source: CIFAR-10 in one of the forms of docs/probes.md; empty for torchvision's download.
        folder: for the files.

    Raises:
        ValueError: there is no such set, it is not CIFAR-10, it cannot be downloaded, or ``folder`` has other pictures.
    """
    from moco_d2.data.labelled import open_pair

    about = folder / "source.json"
    content = {"source": os.path.realpath(source) if source else "torchvision"}
    if files.has_keys("source")(about):
        if json.loads(about.read_bytes()) != content:
            raise ValueError(f"{folder} has other pictures than those of {content['source']}; choose another --output")
        return str(folder / "train"), str(folder)
    if source and not os.path.exists(source):
        raise ValueError(f"--pictures {source}: there is no such file or folder; leave it out to download CIFAR-10")
    halves = open_pair(*2 * (source or _downloaded(),))
    if (count := len(halves[0].classes)) != 10:
        raise ValueError(
            f"--pictures {source}: it has {count} classes; the authors' curve is of CIFAR-10, which has 10"
        )
    if halves[0].arrays is None:
        return os.path.commonpath(halves[0].files), source
    with files.replaced_folder(folder, "--output") as new:
        for half, name in zip(halves, ("train", "test"), strict=True):
            _write(half, new / name)
        files.write_text(new, about.name, json.dumps(content))
    return str(folder / "train"), str(folder)


def _downloaded() -> str:
    from torchvision.datasets import CIFAR10

    folder = files.make_folder(paths.cache_folder() / "cifar10", "the cache folder")
    try:
        CIFAR10(str(folder), download=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"CIFAR-10 cannot be downloaded into {folder} ({error}); name a copy of it by --pictures "
            "(make proof CIFAR=...)"
        ) from error
    return str(folder)


def _write(half: LabelledSet, folder: Path) -> None:
    folders = [folder / files.file_name(name) for name in half.classes]
    for one in folders:
        one.mkdir(parents=True, exist_ok=True)
    for number, label in enumerate(half.labels.tolist()):
        half.picture(number).save(folders[label] / f"{number:05d}.png")


def report(output: Path) -> str:
    """Draw what the run has recorded so far, write it as a page and as JSON, and return the page.

    Args:
        output: the folder of :func:`run`.

    Raises:
        ValueError: there is no run, or it has recorded nothing yet.
    """
    from moco_d2.config import load_cfg
    from moco_d2.engine.build import outline
    from moco_d2.reports.records import read_json, read_scalars

    records = list(read_scalars(output / "run"))
    if not records:
        raise ValueError(f"{output / 'run'} has no figures yet: wait for the first ones, or name the run's --output")
    files.claim(output, CONTENT[-3:], "--output")
    cfg = load_cfg(output / "run" / "config.yaml")
    found, published = curves(records), {int(row["epoch"]): row for row in _published()}
    probes = sum(record.get("monitor/seconds", 0) for record in records)
    content = {
        **read_json(output / "proof.json"),
        "epochs": cfg.SOLVER.EPOCHS, "width": cfg.SSL.ENCODER.ARGS.width, "rows": rows(found, published),
        "minutes": {"training": _training_seconds(records) / 60, "probes": probes / 60},
    }  # fmt: skip
    text = page(content)
    references = {
        d.key: [(d.reference_label, d.reference)] for d in outline(cfg).diagnostics() if d.reference is not None
    }
    label = f"ours, width {content['width']:g}, {content['epochs']} epochs"
    draw(found, published, references, label, output / "proof.png")
    for name, words in (("proof.json", json.dumps(content, indent=2)), ("proof.md", text)):
        with files.atomic_write(output / name) as file:
            file.write(words.encode() + b"\n")
    return text


def curves(records: list[dict[str, Any]]) -> dict[str, dict[float, float]]:
    """Return ``{figure: {epoch: value}}``; of what a resumed run recorded twice, the later value."""
    per_epoch = next(((r["iteration"] + 1) / r["epoch"] for r in reversed(records) if r.get("epoch")), float("inf"))
    found: dict[str, dict[float, float]] = {"monitor/knn_top1": {}, "total_loss": {}, "feature_std": {}}
    for record in records:
        # The monitor records its measurement before the first step as iteration 0.
        before = record["iteration"] == 0 and "monitor/knn_top1" in record
        epoch = 0.0 if before else (record["iteration"] + 1) / per_epoch
        for key in found.keys() & record.keys():
            found[key][epoch] = record[key]
    return found


def rows(found: Mapping[str, Mapping[float, float]], published: Mapping[int, Mapping[str, float]]) -> Rows:
    """Return a row for each probe, with the authors' figures; loss and std are means over the epoch that it ends."""
    made: Rows = []
    for epoch, value in sorted(found["monitor/knn_top1"].items()):
        theirs = published.get(round(epoch), {})
        made.append({
            "epoch": round(epoch, 2), "kNN, %": value, "authors' kNN, %": theirs.get("knn_acc1"),
            "loss": _mean(found["total_loss"], epoch), "authors' loss": theirs.get("train_loss"),
            "feature std": _mean(found["feature_std"], epoch),
        })  # fmt: skip
    return made


def _mean(values: Mapping[float, float], end: float) -> float | None:
    """Return the mean over the epoch before ``end``."""
    within = [value for epoch, value in values.items() if end - 1 < epoch <= end + 1e-6]
    return statistics.fmean(within) if within else None


def _training_seconds(records: list[dict[str, Any]]) -> float:
    """Return seconds of training alone, interruptions left out, from the recorded times of an iteration."""
    times = [record["time"] for record in records if "time" in record]
    return statistics.fmean(times) * (max(record["iteration"] for record in records) + 1) if times else 0.0


def page(content: Mapping[str, Any]) -> str:
    """Return the result as a Markdown page."""
    from tabulate import tabulate

    pairs = {key: content[key] for key in ("machine", "pretraining", "commit", "date") if content.get(key)}
    minutes = content["minutes"]
    return "\n".join([
        f"# CIFAR-10: {content['epochs']} epochs at width {content['width']:g}, beside the authors' 200 at width 1",
        "",
        "![curves](proof.png)",
        "",
        tabulate(content["rows"], "keys", tablefmt="pipe", floatfmt=("g", ".1f", ".1f", ".2f", ".2f", ".3f")),
        "",
        f"* time: {minutes['training']:.0f} min of training, {minutes['probes']:.0f} min of probes",
        *(f"* {key}: {value}" for key, value in pairs.items()),
    ])  # fmt: skip


def draw(
    found: Mapping[str, Mapping[float, float]],
    published: Mapping[int, Mapping[str, float]],
    references: Mapping[str, Sequence[tuple[str, float]]],
    label: str,
    path: Path,
) -> None:
    """Draw kNN accuracy, loss and feature std over epochs, the first two over the authors' curves, as a PNG.

    Args:
        found: of :func:`curves`.
        published: the authors' figures by epoch.
        references: labels and values of a figure's dashed lines.
        label: of the run's lines.
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from moco_d2.reports.curves import plot_lines

    end = max([1.0, *(epoch for values in found.values() for epoch in values)])
    panels = (
        ("kNN top-1 of the test pictures, %", "monitor/knn_top1", "knn_acc1"), ("loss", "total_loss", "train_loss"),
        ("feature std", "feature_std", ""),
    )  # fmt: skip
    figure = Figure(figsize=(13, 3.8), layout="constrained")
    for axis, (title, key, theirs) in zip(figure.subplots(1, 3), panels, strict=True):
        lines = {label: [sorted(found[key].items())]}
        if theirs:
            lines["authors, width 1, 200 epochs"] = [[(e, row[theirs]) for e, row in published.items() if e <= end]]
        plot_lines(axis, title, lines, references.get(key, ()))
        axis.set(xlabel="epoch", xlim=(0, 1.02 * end))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with files.atomic_write(path) as file:
        file.write(buffer.getvalue())


def _published() -> Iterator[dict[str, float]]:
    lines = PUBLISHED.read_text().splitlines()
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        yield {key: float(value) for key, value in row.items()}

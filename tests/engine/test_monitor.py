"""The monitor: what it measures, what it leaves alone, in one process and in two, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image

from moco_d2.config import load_cfg
from moco_d2.data.view_pairs import view_pairs
from moco_d2.detection.datasets import register_custom
from moco_d2.engine.dry_run import rehearse
from moco_d2.engine.monitor import DIAGNOSTICS, Monitor, labelled_sets, probe_count
from moco_d2.engine.preflight import config_problems
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.layers.spread import effective_rank
from moco_d2.model_zoo import pretraining_changes
from moco_d2.reports import pictures
from tests.two_processes import in_two_processes

CONFIG = "Pretrain/moco_v2_R50_200ep"
COLOURS = ((200, 40, 40), (40, 200, 40), (40, 40, 200))
KNOWN, HELD_OUT = 6, 3  # pictures of each class


def draw(folder: Path, count: int, seed: int) -> None:
    """Draw a folder of noisy pictures for each colour."""
    rng = np.random.default_rng(seed)
    for number, colour in enumerate(COLOURS):
        (folder / f"c{number}").mkdir(parents=True)
        for i in range(count):
            noise = rng.integers(-40, 40, (40, 50, 3))
            Image.fromarray((noise + colour).clip(0, 255).astype(np.uint8)).save(folder / f"c{number}" / f"{i}.png")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("labelled")
    draw(folder / "train", KNOWN, 0)
    draw(folder / "val", HELD_OUT, 1)
    return folder


def options(labelled: Path, output: Path, *more: object) -> list[str]:
    words = [
        "DATASETS.TRAIN", f"('{labelled}/train',)", "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 8,
        "DATA.CROP_SIZE", 32, "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size",
        24, "SSL.ARGS.dim", 16, "SSL.ARGS.bn_groups", 2, "SOLVER.EPOCHS", 3, "SOLVER.CHECKPOINT_PERIOD", 2,
        "SOLVER.CHECKPOINT_KEEP", 0, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    return [str(word) for word in words]


def config(labelled: Path, output: Path, *more: object) -> CfgNode:
    output.mkdir(exist_ok=True, parents=True)
    return load_cfg(CONFIG, options(labelled, output, *more), stage="pretraining")


def monitored(labelled: Path, *more: object) -> list[object]:
    return ["SSL.MONITOR.DATASET", labelled, "SSL.MONITOR.PERIOD", 1, "SSL.MONITOR.K", 5, *more]


class Watch(HookBase):
    """Keeps each step's view of the generators, the images and the buffers; ends the run after a step."""

    def __init__(self, stop: int = -1) -> None:
        self.stop = stop
        self.seen: list[list[torch.Tensor]] = []

    def after_step(self) -> None:
        numpy = torch.from_numpy(np.random.get_state()[1].astype(np.int64))  # noqa: NPY002, what is global
        buffers = [buffer.clone() for buffer in self.trainer.method.buffers()]
        self.seen.append([torch.random.get_rng_state(), numpy, *buffers])
        if self.trainer.iter == self.stop:
            raise KeyboardInterrupt


def train(cfg: CfgNode, watch: Watch, resume: bool = False) -> PretrainTrainer:
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks([watch])
    trainer.train()
    return trainer


def final(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "model_final.pth")
    return content


def same(first: Any, second: Any) -> bool:
    """Compare nested containers, tensors to the bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


def measured(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {line["iteration"]: line["monitor/knn_top1"] for line in lines if "monitor/knn_top1" in line}


def test_training_is_the_same_to_the_bit_with_a_resume_in_between(labelled: Path, tmp_path: Path) -> None:
    without, watched, cut = Watch(), Watch(), Watch(stop=4)
    train(config(labelled, tmp_path / "without"), without)
    extra = monitored(labelled, "DATALOADER.NUM_WORKERS", 1)
    trainer = train(config(labelled, tmp_path / "with", *extra), watched)
    assert all(same(a, b) for a, b in zip(without.seen, watched.seen, strict=True)), "generators, buffers, queue"
    assert trainer.method.training and trainer.method.encoder_q.layer1[0].bn1.training
    with pytest.raises(KeyboardInterrupt):
        train(config(labelled, tmp_path / "cut", *extra), cut)
    train(config(labelled, tmp_path / "cut", "SSL.MONITOR.DATASET", labelled, "SSL.MONITOR.PERIOD", 2), Watch(), True)
    assert same(final(tmp_path / "without"), final(tmp_path / "with")), "optimizer, facts and all"
    assert same(final(tmp_path / "without"), final(tmp_path / "cut")), "MONITOR's keys are not compared on resume"
    # Two steps an epoch: before the first, and after each epoch, though other scalars are written every 20 steps.
    assert list(measured(tmp_path / "with")) == [0, 1, 3, 5]
    assert list(measured(tmp_path / "cut")) == [0, 1, 3, 5]
    assert probe_count(trainer.cfg, 2, 6) == 4
    assert list((tmp_path / "with").glob("events.out.*"))
    draw_and_look(tmp_path / "with", trainer.cfg)


def draw_and_look(run: Path, cfg: CfgNode) -> None:
    (run / "config.yaml").write_text(cfg.dump())
    titles: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "plot_lines", lambda axis, title, *_: titles.append(title))
        pictures.draw_pretraining_curve(run, run / "curve.png")
    assert titles[-3:] == list(dict.fromkeys(one.panel for one in DIAGNOSTICS))


def test_a_probe_is_what_plain_code_finds(labelled: Path, tmp_path: Path) -> None:
    cfg = config(labelled, tmp_path, *monitored(labelled))
    method = PretrainTrainer.build_model(cfg)
    monitor = Monitor(cfg, method)
    values = monitor.probe()
    network = copy.deepcopy(method).backbone().eval()

    def features(half: str) -> torch.Tensor:
        found = []
        for file in sorted((labelled / half).rglob("*.png")):
            image = Image.open(file).resize((46, 37), Image.Resampling.BILINEAR)  # the shorter side to 32 * 256 / 224
            array = np.asarray(image.crop((7, 2, 39, 34)), np.float32)
            x = (array - [123.675, 116.28, 103.53]) / [58.395, 57.12, 57.375]
            with torch.no_grad():
                found.append(network(torch.from_numpy(x).float().permute(2, 0, 1)[None])[0])
        return torch.stack(found)

    bank, queries = features("train"), features("val")
    right = 0
    for number, q in enumerate(queries):
        votes = [0.0] * len(COLOURS)
        similar = torch.cosine_similarity(q[None], bank)
        for place in similar.argsort(descending=True)[:5].tolist():
            votes[place // KNOWN] += float((similar[place] / 0.07).exp())
        right += int(np.argmax(votes)) == number // HELD_OUT
    assert values["monitor/knn_top1"] == pytest.approx(100 * right / len(queries))
    assert values["monitor/effective_rank"] == pytest.approx(effective_rank(queries), rel=1e-4)
    assert monitor.describe(values).startswith(f"kNN {100 * right / 9:.1f} % (k 5, 18 known pictures, 9 held-out ones)")
    part = Monitor(config(labelled, tmp_path, *monitored(labelled, "SSL.MONITOR.PICTURES", 6)), method)
    assert (len(part.bank), part.bank.labels.tolist(), len(part.held_out)) == (6, [0, 0, 1, 1, 2, 2], 6)
    with torch.no_grad():
        method.encoder_q.bn1.bias[0] = torch.nan
    with pytest.raises(ValueError, match="features are not finite"):
        part.probe()


def test_a_pictures_views_depend_on_its_number_only(labelled: Path, tmp_path: Path) -> None:
    monitor = Monitor(config(labelled, tmp_path, *monitored(labelled)), PretrainTrainer.build_model(
        config(labelled, tmp_path)))  # fmt: skip
    (views,) = view_pairs(monitor.held_out, [2, 5, 7], monitor.augmentation)
    (again,) = view_pairs(monitor.held_out, [7, 5], monitor.augmentation)
    assert views.shape == (6, 3, 32, 32) and torch.equal(views[[4, 5, 2, 3]], again)
    assert not torch.equal(views[0], views[1])


def probe_in_two_processes(args: tuple[list[str], Path]) -> None:
    """Probe with batch statistics that differ, then with a process that cannot read; a failure ends the launch."""
    words, output = args
    cfg = load_cfg(CONFIG, words)
    method = PretrainTrainer.build_model(cfg)
    if comm.get_rank():
        for buffer in method.backbone().buffers():
            buffer.mul_(3).add_(1)
    before = [buffer.clone() for buffer in method.buffers()]
    monitor = Monitor(cfg, method)
    values = monitor.probe()
    assert all(map(torch.equal, before, method.buffers())), "each process has its own statistics again"
    if comm.get_rank():
        monitor.held_out = replace(monitor.held_out, files=["gone.png"] * len(monitor.held_out))
    with pytest.raises(ValueError, match=r"^the monitor \(SSL.MONITOR\): .*gone.png") as refused:
        monitor.probe()
    (output / f"{comm.get_rank()}.json").write_text(json.dumps([values, str(refused.value)]))


def test_two_processes_measure_what_one_does_and_fail_together(labelled: Path, tmp_path: Path) -> None:
    words = options(labelled, tmp_path, *monitored(labelled, "SSL.MONITOR.PICTURES", 7))  # no multiple of two
    cfg = load_cfg(CONFIG, words)
    alone = Monitor(cfg, PretrainTrainer.build_model(cfg)).probe()
    in_two_processes(probe_in_two_processes, (words, tmp_path))
    (first, error), (second, same_error) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert second == {} and error == same_error
    del alone["monitor/seconds"], first["monitor/seconds"]
    assert first == pytest.approx(alone, rel=1e-4)


def complaints(labelled: Path, *more: object) -> list[str]:
    return config_problems(load_cfg(CONFIG, options(labelled, Path("out"), *monitored(labelled), *more)), 1)


def test_mistakes_are_named_before_the_run(labelled: Path, tmp_path: Path) -> None:
    ranges = ("SSL.MONITOR.PERIOD", 0, "SSL.MONITOR.K", 0, "SSL.MONITOR.TEMPERATURE", 0.0, "SSL.MONITOR.PICTURES", -1)
    found = complaints(labelled, *ranges, "SSL.MONITOR.DATASET", tmp_path / "none")
    assert [text.split(" is ")[0].split(":")[0] for text in found] == [
        "SSL.MONITOR.PERIOD", "SSL.MONITOR.K", "SSL.MONITOR.TEMPERATURE", "SSL.MONITOR.PICTURES", "SSL.MONITOR",
    ]  # fmt: skip
    assert "is no labelled set" in found[-1]
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "loose" / "a.png")
    draw(tmp_path / "fewer", 1, 2)
    (tmp_path / "fewer" / "c1").rename(tmp_path / "fewer" / "dog")
    (tmp_path / "one" / "c0").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "c0" / "a.png")
    for words, said in (
        (["SSL.MONITOR.DATASET", tmp_path / "loose"], "must hold a folder of pictures per class"),
        (["SSL.MONITOR.DATASET", labelled / "val"], "the second set must be held out"),
        (["SSL.MONITOR.VAL", tmp_path / "fewer"], "only the first has c1; only the second has dog"),
        (["SSL.MONITOR.DATASET", tmp_path / "one", "SSL.MONITOR.VAL", labelled], "only the second has c1, c2"),
    ):
        found = complaints(labelled, *words)
        assert found and said in found[-1], found
    with pytest.raises(ValueError, match=r"K is 5, but nothing uses it with SSL\.MONITOR\.DATASET empty"):
        config(labelled, tmp_path, "SSL.MONITOR.K", 5)
    cfg = load_cfg(CONFIG, options(labelled, tmp_path, *monitored(labelled)))
    plain = load_cfg(CONFIG, options(labelled, tmp_path))
    assert pretraining_changes(cfg) == pretraining_changes(plain), "the recipe is not modified"


def test_the_first_probe_must_succeed_and_a_later_one_only_warns(
    labelled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Path(shutil.copytree(labelled, tmp_path / "broken"))
    (broken / "val" / "c1" / "0.png").write_bytes(b"no picture")
    cfg = config(labelled, tmp_path / "run", *monitored(broken), "SOLVER.EPOCHS", 1)
    trainer = PretrainTrainer(cfg)
    with pytest.raises(ValueError, match=r"c1/0\.png: PIL cannot identify"):
        trainer.train()
    trainer = PretrainTrainer(cfg)
    trainer.start_iter = 1  # as if it were resumed
    trainer.train()
    assert trainer.iter == 2 and "no probe after 2 iterations: the monitor (SSL.MONITOR)" in caplog.text


def coco(labelled: Path, half: str, output: Path) -> dict[str, str]:
    """Write labels, an object and one that is too small on each picture; return the entry of DATASETS.CUSTOM."""
    images, things = [], []
    for number, file in enumerate(sorted((labelled / half).rglob("*.png")), 1):
        images.append({"id": number, "file_name": str(file.relative_to(labelled)), "width": 50, "height": 40})
        for box in ([5, 5, 20, 20], [0, 0, 3, 3]):
            kind = int(file.parent.name[1]) + 1
            area = box[2] * box[3]
            thing = {"image_id": number, "category_id": kind, "bbox": box, "area": area, "iscrowd": 0}
            things.append({"id": len(things) + 1, **thing})
    categories = [{"id": 1 + number, "name": f"c{number}"} for number in range(len(COLOURS))]
    content = {"images": images, "annotations": things, "categories": categories}
    (output / f"{half}.json").write_text(json.dumps(content))
    return {"name": f"my_{half}", "format": "coco", "json": str(output / f"{half}.json"), "images": str(labelled)}


def test_objects_of_ones_own_detection_sets_are_pictures(labelled: Path, tmp_path: Path) -> None:
    entries = [coco(labelled, half, tmp_path) for half in ("train", "val")]
    words = ["SSL.MONITOR.DATASET", "my_train", "SSL.MONITOR.VAL", "my_val", "DATASETS.CUSTOM", entries]
    cfg = config(labelled, tmp_path, *words)
    assert config_problems(cfg, 1) == [], "before they are registered"
    try:
        register_custom(cfg, labels=False)
        assert config_problems(cfg, 1) == []
        assert Monitor(cfg, PretrainTrainer.build_model(cfg)).probe()["monitor/knn_top1"] > 0
        bank, _ = labelled_sets("my_train", "my_val")
        assert len(bank) == KNOWN * len(COLOURS) and bank.picture(0).size == (24, 24)
        register_custom(config(labelled, tmp_path, *words[-2:]), labels=False)
        assert "annotations" not in DatasetCatalog.get("my_train")[0], "labels are read for the monitor only"
    finally:
        for name in ("my_train", "my_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_the_dry_run_says_what_probes_cost(labelled: Path, tmp_path: Path) -> None:
    found = dict(rehearse(config(labelled, tmp_path, *monitored(labelled))))
    assert found["monitor"].startswith("kNN ") and " a probe, 4 probes: 0:00:" in found["monitor"]
    assert found["checkpoint"].endswith("bit for bit")

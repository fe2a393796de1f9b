"""The pretraining command as a user runs it: exact resume, files, schedules, messages."""

import json
import math
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image

from moco_d2.config import flat, get_cfg, load_cfg
from moco_d2.engine.optim import scaled_lr
from moco_d2.engine.schedules import lr_factor
from moco_d2.engine.trainer import PretrainTrainer, recipe_changes
from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import network_for
from moco_d2.methods.moco import MoCo, to_official
from moco_d2.model_zoo import pretraining_changes
from moco_d2.running.seeds import StepSeed
from moco_d2.seeding import stream_seed

TOOL = Path(__file__).parents[2] / "tools" / "pretrain_net.py"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder)


def options(images: str, output: Path, *more: object) -> list[str]:
    small = [
        "DATASETS.TRAIN", f'("{images}",)', "OUTPUT_DIR", str(output), "SOLVER.IMS_PER_BATCH", 8, "DATA.CROP_SIZE", 32,
        "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size", 24, "SSL.ARGS.dim", 16,
        "SSL.ARGS.bn_groups", 2, "SOLVER.EPOCHS", 3, "SOLVER.CHECKPOINT_PERIOD", 3, "DATALOADER.NUM_WORKERS", 0,
        "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    return [str(word) for word in small]


class Killed(Exception):
    """What the test's hook raises."""


class Killer(HookBase):
    """Ends a run after a step."""

    def __init__(self, after: int) -> None:
        self.after = after

    def after_step(self) -> None:
        if self.trainer.iter == self.after:
            raise Killed


def train(cfg_options: list[str], resume: bool = False, stop_at: int | None = None) -> PretrainTrainer:
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", cfg_options)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume)
    if stop_at is not None:
        trainer.register_hooks([Killer(stop_at)])
    trainer.train()
    return trainer


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(images: str, tmp_path: Path) -> None:
    whole = train(options(images, tmp_path / "whole"))
    with pytest.raises(Killed):  # two steps beyond its last checkpoint
        train(options(images, tmp_path / "cut"), stop_at=4)
    # With another number of workers, on purpose.
    resumed = train(options(images, tmp_path / "cut", "DATALOADER.NUM_WORKERS", 2), resume=True)
    assert (whole.start_iter, resumed.start_iter, resumed.iter) == (0, 3, 6)
    states = [torch.load(tmp_path / run / "model_final.pth") for run in ("whole", "cut")]
    for key, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][key]), key
    first, second = (state["trainer"]["_trainer"]["optimizer"] for state in states)
    assert first["param_groups"] == second["param_groups"]
    for i, buffers in first["state"].items():
        assert torch.equal(buffers["momentum_buffer"], second["state"][i]["momentum_buffer"])
    assert states[0]["trainer"]["hooks"] == states[1]["trainer"]["hooks"], "the schedule"


def test_only_the_whole_recipe_bears_its_name(images: str, tmp_path: Path) -> None:
    train(options(images, tmp_path, "PROTOCOL", "moco_v2_R50_200ep"))
    names = [torch.load(tmp_path / f"model_{n}.pth")["facts"]["recipe"] for n in ("0000002", "final")]
    assert names == ["moco_v2_R50_200ep (unfinished, modified)", "moco_v2_R50_200ep (modified)"]
    recipe = load_cfg("Pretrain/moco_v2_R50_200ep", ["OUTPUT_DIR", "x", "SEED", "1", "DATALOADER.NUM_WORKERS", "9"])
    assert pretraining_changes(recipe) == []
    changed = load_cfg("Pretrain/moco_v2_R50_200ep", ["SOLVER.EPOCHS", "199", "DATA.REDUCED_DECODING", "True"])
    assert sorted(pretraining_changes(changed) or ()) == ["DATA.REDUCED_DECODING=True", "SOLVER.EPOCHS=199"]


def test_a_run_of_reduced_pictures_is_not_continued_with_whole_ones(images: str, tmp_path: Path) -> None:
    def trainer(*words: object) -> PretrainTrainer:
        return PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", options(images, tmp_path, *words)))

    state = trainer().state_dict()
    del state["run"]["DATA.REDUCED_DECODING"]  # as checkpoints were when everything was decoded so
    with pytest.raises(ValueError, match=r"DATA\.REDUCED_DECODING was True and is False"):
        trainer().load_state_dict(state)
    trainer("DATA.REDUCED_DECODING", "True").load_state_dict(state)
    state["run"]["DATA.RECIPE"] = state["run"].pop("DATA.AUGMENTATION")  # the key's name in earlier checkpoints
    trainer("DATA.REDUCED_DECODING", "True").load_state_dict(state)
    with pytest.raises(ValueError, match=r"exactly: DATA\.AUGMENTATION was moco_v2 and is moco_v1\."):
        trainer("DATA.REDUCED_DECODING", "True", "DATA.RECIPE", "moco_v1").load_state_dict(state)


def test_a_run_goes_on_with_its_encoder_and_so_does_one_of_an_earlier_version(images: str, tmp_path: Path) -> None:
    def trainer(*words: object) -> PretrainTrainer:
        return PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", options(images, tmp_path, *words)))

    state = trainer().state_dict()
    synchronised = trainer("SSL.ENCODER.ARGS.norm", "SyncBN", "SSL.ARGS.bn_groups", 0)
    for run in (state["run"], {key: value for key, value in state["run"].items() if "SSL.ENCODER" not in key}):
        with pytest.raises(ValueError, match=r"SSL\.ENCODER\.ARGS\.norm was BN and is SyncBN"):
            synchronised.load_state_dict({**state, "run": run})
        trainer().load_state_dict({**state, "run": run})


def test_what_the_processes_make_of_the_method_is_recorded_and_must_be_the_same_to_resume(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    more = ("SSL.ARGS.bn_groups", 0, "SOLVER.IMS_PER_BATCH", 16, "SOLVER.EPOCHS", 4, "SOLVER.CHECKPOINT_PERIOD", 2)
    words = options(images, tmp_path, *more)
    with caplog.at_level("INFO"), pytest.raises(Killed):
        train(words, stop_at=1)
    assert "number of BN groups in all processes: 8" in caplog.text
    assert "holds the keys of 1.2 epochs of your 20 images" in caplog.text and "100% of the key encoder" in caplog.text
    caplog.clear()

    # Three processes would make six groups. Nothing else here needs the other two.
    with monkeypatch.context() as patch:
        patch.setattr("moco_d2.layers.shuffle.world_size", lambda: 3)
        patch.setattr(MoCo, "check_batch", lambda *_: None)
        recipe = load_cfg("Pretrain/moco_v2_R50_200ep")
        trainer = PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", words))
        assert recipe_changes(recipe, trainer.method) == ["6 BN groups in 3 process(es) instead of 8"]
        assert "6 BN groups in 3 process(es) instead of 8: the weights will be marked" in caplog.text
        trainer.cfg = recipe
        assert trainer.facts().recipe == "moco_v2_R50_200ep (unfinished, modified)"
        with pytest.raises(ValueError, match=r"number of BN groups in all processes was 8 and is 6\. Restore"):
            PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", words)).resume_or_load(True)

    # A checkpoint that an older version wrote does not say.
    state = torch.load(tmp_path / "model_0000001.pth")
    assert state["trainer"]["run"].pop("number of BN groups in all processes") == 8
    torch.save(state, tmp_path / "model_0000001.pth")
    assert train(words, resume=True).start_iter == 2


def test_processes_draw_apart_and_rank_0_as_ever() -> None:
    def drawn(*seed: int, step: int, **stream: int) -> float:
        hook = StepSeed(*seed, **stream)
        hook.trainer = SimpleNamespace(iter=step)
        hook.before_step()
        return torch.rand(()).item()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(7, 5))
        before = torch.rand(()).item()
        assert drawn(7, step=5, stream=0) == drawn(7, step=5) == before
        values = [drawn(7, step=step, stream=rank) for step in range(4) for rank in range(4)]
    assert len(set(values)) == 16


def test_every_checkpoint_comes_with_a_backbone_that_any_torchvision_user_can_load(images: str, tmp_path: Path) -> None:
    trainer = train(options(images, tmp_path, "PROTOCOL", "mine"))
    saved = torch.load(tmp_path / "backbone.pth", weights_only=True)
    facts = BackboneFacts.from_dict(saved["facts"])
    assert (facts.depth, facts.stem_channels, facts.recipe, facts.pixels.order) == (18, 8, "mine", "RGB")
    assert "6 of 6 iterations" in facts.origin and "/" not in facts.origin, "no path of this machine"
    network_for(facts).load_state_dict(saved["state_dict"])
    for key, value in saved["state_dict"].items():
        assert torch.equal(value, trainer.method.encoder_q.state_dict()[key])
    assert sorted(p.name for p in tmp_path.glob("model_*")) == [
        "model_0000002.pth", "model_0000005.pth", "model_final.pth",
    ]  # fmt: skip
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith(".")], "no temporary files"
    last = json.loads((tmp_path / "metrics.json").read_text().splitlines()[-1])
    wanted = {
        "total_loss", "contrast_acc1", "contrast_acc5", "lr", "data_time", "images_per_second", "positive_similarity",
        "negative_similarity", "feature_std", "epoch", "unreadable_images", "eta_seconds",
        "peak_memory_gib",
    }  # fmt: skip
    assert wanted <= set(last) and last["epoch"] == 3
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_official_training_checkpoints_are_continued(images: str, tmp_path: Path) -> None:
    source = train(options(images, tmp_path / "a", "SOLVER.EPOCHS", 1)).method
    official = {"epoch": 1, "arch": "resnet18", "state_dict": to_official(source.state_dict()), "optimizer": {}}
    torch.save(official, tmp_path / "checkpoint.pth.tar")
    (tmp_path / "b").mkdir()
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", options(images, tmp_path / "b", "SEED", 8))
    cfg.MODEL.WEIGHTS = str(tmp_path / "checkpoint.pth.tar")
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=False)
    for key, value in source.state_dict().items():
        assert torch.equal(value, trainer.method.state_dict()[key]), key
    cfg.MODEL.WEIGHTS = str(tmp_path / "a" / "backbone.pth")
    trainer = PretrainTrainer(cfg)
    for weights, words in {
        tmp_path / "a/backbone.pth": "not a checkpoint of this MoCo",
        tmp_path / "a": f"give the checkpoint in it: {tmp_path}/a/model_final.pth",
        tmp_path / "nothing.pth": "does not exist",
        "moco-d2://moco_v2_800ep": "converted backbones, for detectors. Pretraining starts from a checkpoint of",
        "catalog://nothing": "could not be downloaded",
    }.items():
        trainer.cfg.MODEL.WEIGHTS = str(weights)
        with pytest.raises(ValueError, match=words):
            trainer.resume_or_load(resume=False)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(images: str, tmp_path: Path) -> None:
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", options(images, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1))
    cfg.SOLVER.BASE_LR = 1e30
    trainer = PretrainTrainer(cfg)
    with pytest.raises(FloatingPointError, match=r"kept: .*_0000000.pth.*SOLVER.BASE_LR or a higher SSL.ARGS.temp"):
        trainer.train()
    kept = torch.load(tmp_path / "model_0000000.pth")["model"]
    assert all(value.isfinite().all() for key, value in kept.items() if "encoder_k" in key)


def spoil(folder: str, what: str) -> PretrainTrainer:
    """Build a run that saves at every step, and spoils one tensor in its last process's third step."""
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", json.loads(Path(folder, "options").read_text()))
    trainer = PretrainTrainer(cfg)
    method, last = trainer.method, comm.get_rank() == comm.get_world_size() - 1

    def nan_if_due(tensor: torch.Tensor) -> torch.Tensor:
        return tensor * math.nan if last and trainer.iter == 2 else tensor

    if what == "loss":
        contrast = method._contrast
        method._contrast = lambda *views: (nan_if_due((found := contrast(*views))[0]), found[1])
    else:
        method.encoder_q.conv1.weight.register_hook(nan_if_due)
    return trainer


def run_rank_with_nan(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    comm.create_local_process_group(2)
    trainer = spoil(folder, "loss")
    (seeds,) = (hook for hook in trainer._hooks if isinstance(hook, StepSeed))
    assert seeds.stream == [1] * rank, "each process's own"
    with pytest.raises(FloatingPointError) as caught:
        trainer.train()
    Path(folder, f"said{rank}").write_text(str(caught.value))
    comm.synchronize()
    dist.destroy_process_group()


def test_no_checkpoint_follows_a_loss_that_is_not_finite_in_another_process(images: str, tmp_path: Path) -> None:
    """At a step whose losses are not due yet: all weights are NaN by then, but only one process's loss shows it."""
    more = ("SOLVER.CHECKPOINT_PERIOD", 1, "SSL.ARGS.bn_groups", 1)
    (tmp_path / "options").write_text(json.dumps(options(images, tmp_path, *more)))
    torch.multiprocessing.start_processes(run_rank_with_nan, (str(tmp_path),), nprocs=2, start_method="fork")
    for rank in range(2):
        said = (tmp_path / f"said{rank}").read_text()
        assert "NaN at iteration=2!" in said and "model_0000001.pth" in said
    assert sorted(path.name for path in tmp_path.glob("model_*")) == ["model_0000000.pth", "model_0000001.pth"]


def test_no_checkpoint_follows_a_gradient_that_is_not_finite(images: str, tmp_path: Path) -> None:
    (tmp_path / "options").write_text(json.dumps(options(images, tmp_path, "SOLVER.CHECKPOINT_PERIOD", 1)))
    with pytest.raises(FloatingPointError, match=r"model_0000002.pth is not written.*conv1[\s\S]*model_0000001.pth"):
        spoil(str(tmp_path), "gradient").train()
    assert sorted(path.name for path in tmp_path.glob("model_*")) == ["model_0000000.pth", "model_0000001.pth"]


def test_resuming_with_another_recipe_is_refused(images: str, tmp_path: Path) -> None:
    train(options(images, tmp_path, "SOLVER.EPOCHS", 1))
    with pytest.raises(ValueError, match=r"SOLVER\.IMS_PER_BATCH was 8 and is 4"):
        train(options(images, tmp_path, "SOLVER.EPOCHS", 1, "SOLVER.IMS_PER_BATCH", 4), resume=True)
    recipe = ("SSL.ARGS.temperature", 0.1, "DATA.AUGMENTATION", "moco_v1")
    with pytest.raises(
        ValueError, match=r"temperature was 0\.2 and is 0\.1; DATA\.AUGMENTATION was moco_v2 and is moco_v1"
    ):
        train(options(images, tmp_path, "SOLVER.EPOCHS", 1, *recipe), resume=True)
    other = ("SOLVER.BASE_LR", 0.01, "SOLVER.MOMENTUM", 0.8, "SOLVER.SCHEDULE", "step", "SOLVER.STEPS", ())
    with pytest.raises(ValueError, match=r"MODEL\.WEIGHTS") as refused:
        train(options(images, tmp_path, "SOLVER.EPOCHS", 1, *other), resume=True)
    for words in ("BASE_LR was 0.03 and is 0.01", "MOMENTUM was 0.9 and is 0.8", "SCHEDULE was cosine and is step"):
        assert f"SOLVER.{words}" in str(refused.value)
    way_out = ("MODEL.WEIGHTS", tmp_path / "model_final.pth", "SOLVER.EPOCHS", 1, *other)
    (group,) = train(options(images, tmp_path / "new", *way_out)).optimizer.param_groups
    assert (group["initial_lr"], group["momentum"]) == (pytest.approx(0.01 * 8 / 256), 0.8)
    # Other tensors, too, are explained by the setting.
    with pytest.raises(ValueError, match=r"^cannot resume exactly: SSL\.ARGS\.queue_size was \d+ and is 48\. [^\n]+$"):
        train(options(images, tmp_path, "SOLVER.EPOCHS", 1, "SSL.ARGS.queue_size", 48), resume=True)


def test_weights_alone_are_not_resumed(images: str, tmp_path: Path) -> None:
    """The run would begin anew, and nobody would hear of it."""
    train(options(images, tmp_path, "SOLVER.EPOCHS", 1))
    run = torch.load(tmp_path / "model_final.pth", weights_only=True)
    for content, message in (
        ({"model": run["model"]}, "it has no trainer"),
        ({"state_dict": run["model"]}, "it has no model and no trainer"),
        ({**run, "trainer": {"_trainer": 1, "iteration": "x"}}, "cannot resume exactly"),
        ({**run, "trainer": {**run["trainer"], "_trainer": 1}}, "a checkpoint of another model or run"),
    ):
        for path in tmp_path.glob("model_*.pth"):
            path.unlink()
        torch.save(content, tmp_path / "model_final.pth")
        with pytest.raises(ValueError, match=rf"^[^\n]*{message}[^\n]*$"):
            train(options(images, tmp_path, "SOLVER.EPOCHS", 1), resume=True)


def test_fewer_images_than_a_batch_are_refused(images: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 20 images, fewer than a batch of 64"):
        train(options(images, tmp_path, "SOLVER.IMS_PER_BATCH", 64))


def test_schedules_are_the_published_ones() -> None:
    """The lr of each epoch against the formulas of the authors' code."""
    steps = 5004
    v1, v2, cifar = (
        load_cfg(f"Pretrain/{name}") for name in ("moco_v1_R50_200ep", "moco_v2_R50_200ep", "moco_cifar10_R18_200ep")
    )
    for epoch in (0, 1, 119, 120, 159, 160, 199):
        for iteration in (epoch * steps, epoch * steps + steps - 1):
            assert lr_factor(v1, iteration, steps) == pytest.approx(0.1 ** ((epoch >= 120) + (epoch >= 160)))
            assert lr_factor(v2, iteration, steps) == 0.5 * (1 + math.cos(math.pi * epoch / 200))
    assert 0.06 * lr_factor(cifar, 0, 97) == pytest.approx(0.059996, abs=1e-6)
    assert lr_factor(cifar, 199 * 97, 97) == pytest.approx(0, abs=1e-12)


def test_the_lr_scales_linearly_with_the_batch_unless_told_not_to() -> None:
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", ["SOLVER.IMS_PER_BATCH", "128"])
    assert scaled_lr(cfg) == pytest.approx(0.015), "the authors' own example for 4 GPUs"
    cfg.SOLVER.REFERENCE_BATCH = 0
    assert scaled_lr(cfg) == 0.03


def test_pretraining_configs_state_the_published_recipes() -> None:
    published = {
        "moco_v1_R50_200ep": (200, 0.07, False, "moco_v1", "step"),
        "moco_v2_R50_200ep": (200, 0.2, True, "moco_v2", "cosine"),
        "moco_v2_R50_800ep": (800, 0.2, True, "moco_v2", "cosine"),
    }
    for name, recipe in published.items():
        cfg = load_cfg(f"Pretrain/{name}")
        args, solver = cfg.SSL.ARGS, cfg.SOLVER
        assert (solver.EPOCHS, args.temperature, args.mlp, cfg.DATA.AUGMENTATION, solver.SCHEDULE) == recipe
        assert (args.dim, args.queue_size, args.momentum, args.shuffle, args.symmetric) == (
            128,
            65536,
            0.999,
            True,
            False,
        )
        optimization = (solver.BASE_LR, solver.IMS_PER_BATCH, solver.MOMENTUM, solver.WEIGHT_DECAY)
        assert optimization == (0.03, 256, 0.9, 1e-4)
        rest = (solver.NESTEROV, cfg.DATA.CROP_SIZE, cfg.SSL.ENCODER.NAME)
        assert rest == (False, 224, "resnet50")
        assert name == cfg.PROTOCOL and cfg.DATASETS.TRAIN == ("imagenet_train",)
    cifar = load_cfg("Pretrain/moco_cifar10_R18_200ep")
    assert dict(cifar.SSL.ARGS) == {
        "dim": 128, "queue_size": 4096, "momentum": 0.99, "temperature": 0.1, "mlp": False, "symmetric": False,
        "shuffle": True, "bn_groups": 8, "queue_dtype": "float32",
    }  # fmt: skip
    assert (cifar.SOLVER.BASE_LR, cifar.SOLVER.WEIGHT_DECAY, cifar.SOLVER.IMS_PER_BATCH) == (0.06, 5e-4, 512)


def test_weight_decay_reaches_every_parameter(images: str, tmp_path: Path) -> None:
    trainer = PretrainTrainer(load_cfg("Pretrain/moco_v2_R50_200ep", options(images, tmp_path)))
    (group,) = trainer.optimizer.param_groups
    assert group["weight_decay"] == 1e-4 and group["lr"] == pytest.approx(0.03 * 8 / 256)
    assert {id(p) for p in group["params"]} == {id(p) for p in trainer.method.encoder_q.parameters()}


def run_tool(*words: str, module: str | None = None) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", module, "--standalone", "--nproc-per-node", "2"] if module else []
    command = [sys.executable, *launcher, str(TOOL), "--config-file", "Pretrain/moco_v2_R50_200ep", *words]
    # Sums are split among threads, so their last bits depend on how many there are; torchrun sets one.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def test_two_processes_by_our_launcher_and_by_torchrun_end_alike(images: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "launch", tmp_path / "torchrun"
    more = ("SSL.ARGS.bn_groups", 1, "SOLVER.EPOCHS", 1)
    results = [
        run_tool("--num-gpus", "2", *options(images, ours, *more)),
        run_tool(*options(images, theirs, *more), module="torch.distributed.run"),
    ]
    assert [r.returncode for r in results] == [0, 0], results[0].stderr[-2000:] + results[1].stderr[-2000:]
    first, second = (torch.load(folder / "model_final.pth")["model"] for folder in (ours, theirs))
    assert all(torch.equal(first[key], second[key]) for key in first)
    train(options(images, tmp_path / "one", "SOLVER.EPOCHS", 1))
    alone = torch.load(tmp_path / "one" / "model_final.pth")["model"]
    for key in alone:  # The same images, in the same groups: equal up to the order of sums.
        if "running" not in key:
            torch.testing.assert_close(first[key], alone[key], rtol=1e-3, atol=1e-5, msg=key)


def test_the_tool_reports_mistakes_in_one_line_and_refuses_to_overwrite(images: str, tmp_path: Path) -> None:
    wrong = run_tool("SOLVER.BASE_LRR", "3")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith(
        "error: the command line: no config key SOLVER.BASE_LRR; did you mean"
    )
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    again = run_tool(*options(images, tmp_path))
    assert again.returncode == 2 and "contains a run already (model_0000009.pth)" in again.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint"], "nothing was written over it"


def test_default_keys_are_detectron2s() -> None:
    from detectron2.config import get_cfg as detectron2_cfg

    ours, theirs = get_cfg(), detectron2_cfg()
    before, after = flat(theirs), flat(ours)
    assert {key: after.get(key) for key in before} == before

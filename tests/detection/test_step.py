"""Fewer processes than the recipe's: scaling, accumulation; and the switches that leave the mathematics alone."""

from __future__ import annotations

import copy
import itertools
import json
import math

import pytest
import torch
from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer, hooks
from detectron2.modeling.backbone.resnet import BottleneckBlock
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, JSONWriter
from small_detector import COCO_FPN, VOC_C4, small_cfg
from torch import nn

from moco_d2.detection.preflight import changes, check_run, scale_to_processes
from moco_d2.detection.step import AccumulatingTrainer, HalfStep, PlainStep, build_step
from moco_d2.detection.sync_norm import stabilise_sync_norms
from moco_d2.detection.trainer import TransferTrainer, networks
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.model_zoo import config_changes, get_config, list_protocols
from moco_d2.running.checkpoints import PeriodicCheckpoint
from moco_d2.running.compilation import compile_networks
from tests.two_processes import in_two_processes

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
PROTOCOLS = [name for name in list_protocols() if not name.startswith("quick_")]


@pytest.mark.parametrize("name", PROTOCOLS)
def test_scaling_changes_nothing_at_the_protocols_processes(name):
    cfg = get_config(name)
    reference = 64 if "ViT" in name else 8
    assert reference == cfg.SOLVER.REFERENCE_WORLD_SIZE
    assert changes(cfg, scale_to_processes(cfg, reference)) == {}


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_scaling_keeps_images_lr_an_image_and_images_a_process(name, world_size):
    cfg = get_config(name)
    scaled = scale_to_processes(cfg, world_size)
    before, after = cfg.SOLVER, scaled.SOLVER
    assert after.IMS_PER_BATCH / world_size == before.IMS_PER_BATCH / before.REFERENCE_WORLD_SIZE
    lr_an_image = [s.BASE_LR / s.IMS_PER_BATCH for s in (before, after)]
    assert lr_an_image[1] == pytest.approx(lr_an_image[0])
    images = [(s.MAX_ITER * s.IMS_PER_BATCH, *(step * s.IMS_PER_BATCH for step in s.STEPS)) for s in (before, after)]
    assert images[0] == images[1]
    precise = [c.TEST.PRECISE_BN.NUM_ITER * c.SOLVER.IMS_PER_BATCH for c in (cfg, scaled)]
    assert precise[0] == precise[1]


def test_accumulation_stands_in_for_processes():
    cfg = small_cfg(VOC_C4, "SOLVER.ACCUMULATE", 8)
    scaled = scale_to_processes(cfg, 1)
    # Batch, lr and schedule stay; precise-BN's batches are an eighth, so it takes eight times as many.
    assert changes(cfg, scaled) == {"TEST.PRECISE_BN.NUM_ITER": (200, 1600)}
    half = scale_to_processes(small_cfg(VOC_C4, "SOLVER.ACCUMULATE", 4), 1).SOLVER
    assert (half.IMS_PER_BATCH, half.BASE_LR, half.MAX_ITER) == (8, 0.01, 48000)
    # No more a departure than another number of processes is.
    assert config_changes(get_config("voc0712_faster_rcnn_R_50_C4_24k", opts=["SOLVER.ACCUMULATE", "8"])) == []


def test_checkpoints_to_keep_stay_multiples_of_the_scaled_period():
    opts = ["SOLVER.CHECKPOINT_PERIOD", 5000, "SOLVER.CHECKPOINT_KEEP_EVERY", 20000]
    for processes, period in ((1, 40000), (8, 5000), (12, 3333)):
        solver = scale_to_processes(small_cfg(VOC_C4, *opts), processes).SOLVER
        assert (solver["CHECKPOINT_PERIOD"], solver["CHECKPOINT_KEEP_EVERY"]) == (period, 4 * period)


def test_what_cannot_be_scaled_or_shared_is_refused():
    with pytest.raises(
        ValueError, match=r"IMS_PER_BATCH is 4; it must be a multiple of the 8 .* pass SOLVER\.REFERENCE_WORLD_SIZE 0"
    ):
        scale_to_processes(small_cfg(VOC_C4, "SOLVER.IMS_PER_BATCH", 4), 1)
    opts = ["SOLVER.REFERENCE_WORLD_SIZE", 0, "SOLVER.ACCUMULATE", 3, "ENGINE.AUTOCAST", "float16"]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 0]
    with pytest.raises(ValueError) as caught:
        check_run(small_cfg(VOC_C4, *opts), world_size=2)
    assert "must be a multiple of 2 (the number of processes) times 3 (SOLVER.ACCUMULATE)" in str(caught.value)
    assert "SOLVER.CHECKPOINT_PERIOD is 0; it must be at least 1" in str(caught.value)
    assert "ENGINE.AUTOCAST is 'float16'; it must be bfloat16" in str(caught.value)


class Squares(nn.Module):
    """A model without BN whose losses are means over images, as Detectron2's are."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2).double()

    def forward(self, data):
        out = self.linear(torch.stack(data))
        return {"loss_a": out[:, 0].square().mean(), "loss_b": out[:, 1].abs().mean()}


def two_steps(trainer_class, batches, *args):
    torch.manual_seed(0)
    model = Squares()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    trainer = trainer_class(wrap_ddp(model), batches, optimizer, *args)
    with EventStorage() as storage:
        trainer.iter, trainer.max_iter = 0, 1  # each is the last, whose losses are read
        trainer.run_step()
        trainer.run_step()
        logged = {name: value for name, (value, _) in storage.latest().items() if name.startswith(("loss", "total"))}
    return model.linear.weight.detach().clone(), logged


IMAGES = list(torch.randn(16, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))


def test_four_small_batches_are_one_large_batch():
    weight, logged = two_steps(SimpleTrainer, [IMAGES[:8], IMAGES[8:]])
    small = [IMAGES[i : i + 2] for i in range(0, 16, 2)]
    accumulated, logged_small = two_steps(AccumulatingTrainer, small, 4, "")
    torch.testing.assert_close(accumulated, weight, rtol=1e-12, atol=0)
    assert logged_small == pytest.approx(logged)


def two_batches_in_each_process(folder):
    """Save what this process's weights are after steps of two batches of two pictures, each process its own ones."""
    small = [IMAGES[i : i + 2] for i in range(2 * comm.get_rank(), 16, 4)]
    torch.save(two_steps(AccumulatingTrainer, small, 2, "")[0], folder / f"{comm.get_rank()}.pth")


def test_small_batches_of_two_processes_are_one_large_batch_too(tmp_path):
    in_two_processes(two_batches_in_each_process, tmp_path)
    weight, _ = two_steps(SimpleTrainer, [IMAGES[:8], IMAGES[8:]])
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pth"), weight, rtol=1e-12, atol=0)


def test_without_switches_the_step_is_detectron2s_own():
    model, optimizer = Squares(), None
    step = build_step(small_cfg(VOC_C4, "SOLVER.MAX_ITER", 7), model, [], optimizer)
    assert type(step).run_step is SimpleTrainer.run_step and step.max_iter == 7
    assert HalfStep.run_step is AMPTrainer.run_step and HalfStep._write_metrics is PlainStep._write_metrics
    assert (
        type(build_step(small_cfg(VOC_C4, "ENGINE.AUTOCAST", "bfloat16"), model, [], optimizer)) is AccumulatingTrainer
    )


class CountReads(HookBase):
    """Counts what each step reads from tensors: each time the host would wait for the device."""

    def __init__(self):
        self.steps = []

    def before_step(self):
        self.steps.append(0)

    def counting(self, read):
        def counted(tensor):
            self.steps[-1] += 1
            return read(tensor)

        return counted


def metrics_of(step, folder):
    """Train for 45 steps, each process on pictures of its own; return the lines of metrics.json without the times."""
    torch.manual_seed(0)
    network = Squares()
    own = IMAGES[comm.get_rank() :: comm.get_world_size()]
    batches = itertools.cycle([own[i : i + 2] for i in range(0, len(own), 2)])
    trainer = step(wrap_ddp(network), batches, torch.optim.SGD(network.parameters(), lr=0.01))
    writer = hooks.PeriodicWriter([JSONWriter(str(folder / f"{step.__name__}.json"))], 20)
    trainer.register_hooks([writer] if comm.is_main_process() else [])
    trainer.register_hooks([reads := CountReads()])
    with pytest.MonkeyPatch.context() as patch:
        for name in ("item", "tolist", "cpu"):
            patch.setattr(torch.Tensor, name, reads.counting(getattr(torch.Tensor, name)))
        trainer.train(0, 45)
    read = [number for number, count in enumerate(reads.steps) if count]
    assert read == (list(range(45)) if step is SimpleTrainer else [19, 39, 44]), "Detectron2 reads in every step"
    if comm.get_world_size() == 1 and step is not SimpleTrainer:
        assert sum(reads.steps) == 3, "all losses of the steps at once"
    if not comm.is_main_process():
        return []
    lines = [json.loads(line) for line in (folder / f"{step.__name__}.json").read_text().splitlines()]
    assert all(min(line.pop("data_time"), line.pop("rank_data_time")) >= 0 for line in lines)
    return lines


def compare_metrics(folder):
    plain = metrics_of(PlainStep, folder)
    assert plain == metrics_of(SimpleTrainer, folder)
    assert plain == metrics_of(OneBatch, folder)
    assert [line["iteration"] for line in plain] == [19, 39, 44] * comm.is_main_process()
    assert all(set(line) == {"iteration", "loss_a", "loss_b", "total_loss"} for line in plain)


class OneBatch(AccumulatingTrainer):
    def __init__(self, model, batches, optimizer):
        super().__init__(model, batches, optimizer, 1, "")


@pytest.mark.parametrize("processes", [1, 2])
def test_losses_that_are_read_together_give_detectron2s_metrics(processes, tmp_path):
    if processes == 1:
        compare_metrics(tmp_path)
    else:
        in_two_processes(compare_metrics, tmp_path)


class Written:
    """A checkpointer that only notes what it is asked to write."""

    save_dir = "."

    def __init__(self):
        self.names = []

    def save(self, name, **_):
        self.names.append(name)


def run_with_nan():
    """Train with a loss that is not finite in the last process at step 12, and a checkpoint every 7 steps."""
    last = comm.get_rank() == comm.get_world_size() - 1
    for step in (PlainStep, OneBatch):
        network = Squares()
        trainer = step(wrap_ddp(network), itertools.repeat(IMAGES[:2]), torch.optim.SGD(network.parameters(), lr=0.0))

        def with_nan(_, __, losses, now=trainer):
            return {name: loss * (math.nan if last and now.iter == 12 else 1) for name, loss in losses.items()}

        network.register_forward_hook(with_nan)
        trainer.register_hooks([PeriodicCheckpoint(written := Written(), 7, check=trainer.flush)])
        with pytest.raises(FloatingPointError, match="NaN at iteration=12!"):
            trainer.train(0, 40)
        assert written.names == ["model_0000006"] and trainer.iter == 13, "found before the second checkpoint"


def test_no_checkpoint_follows_a_loss_that_is_not_finite_in_any_process():
    run_with_nan()
    in_two_processes(run_with_nan)


def outputs(cfg, state, *inputs):
    """Return the outputs of a detector's large networks, its tensors, and the networks."""
    torch.manual_seed(0)
    model = TransferTrainer.build_model(cfg).eval()
    if state:
        model.load_state_dict(state)
    compile_networks(networks(model), cfg, sizes_vary=True)
    with torch.no_grad():
        made = [network(x) for network, x in zip(networks(model), inputs, strict=True)]
    return made, copy.deepcopy(model.state_dict()), networks(model)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("switch", ["CHANNELS_LAST", "COMPILE"])
@pytest.mark.parametrize(("config", "regions"), [(COCO_FPN, 0), (VOC_C4, 3)])
def test_channels_last_and_compile_reach_the_large_networks_and_leave_features_and_names(config, regions, switch):
    inputs = [torch.randn(1, 3, 64, 96), *([torch.randn(regions, 256, 14, 14)] if regions else [])]  # C4: conv5's
    plain, state, _ = outputs(small_cfg(config), None, *inputs)
    with torch.compiler.set_stance("force_eager"):  # the switch is ours, the compiler is torch's, and takes a minute
        switched, names, parts = outputs(small_cfg(config, f"ENGINE.{switch}", True), state, *inputs)
    assert list(names) == list(state) and len(parts) == 1 + bool(regions)
    for part in parts:
        kernels = [p for p in part.parameters() if p.ndim == 4 and p.shape[2] > 1 and p.shape[1] > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels) == (switch == "CHANNELS_LAST")
        assert (part._compiled_call_impl is not None) == (switch == "COMPILE")
    for one, other in zip(plain, switched, strict=True):
        for level, feature in one.items() if isinstance(one, dict) else [(..., one)]:
            found = other[level]
            assert (found - feature).abs().max() < 1e-4 * feature.abs().max()


NORMS = ["BN", "SyncBN", "nnSyncBN", "naiveSyncBN", "GN", "LN", "FrozenBN", ""]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("dtype", "output", "gradient"), [(torch.bfloat16, 0.01, 0.25), (torch.float16, 0.002, 0.12)])
def test_blocks_with_every_norm_train_in_half_precision(norm, dtype, output, gradient):
    """conv5's kind of block, under autocast against float64: outputs, and the gradients of input and weights."""
    torch.manual_seed(0)
    block = BottleneckBlock(64, 64, bottleneck_channels=32, norm=norm, stride=1).train()
    exact = copy.deepcopy(block).double()
    stabilise_sync_norms(block)
    x = torch.randn(2, 64, 7, 7) + 3  # not centred: variances of half precision would show
    wide, half = (x.to(t).requires_grad_() for t in (torch.float64, torch.float32))
    weights = torch.randn(2, 64, 7, 7)
    expected = exact(wide)
    (expected * weights).mean().backward()
    with torch.autocast("cpu", dtype):
        found = block(half)
        scaled = 1024 * (found.float() * weights).mean()
    scaled.backward()

    def apart(a, b):
        return ((a - b).norm() / b.norm()).item()

    assert apart(found.double(), expected) < output
    assert apart(half.grad.double() / 1024, wide.grad) < gradient
    pairs = zip(block.parameters(), exact.parameters(), strict=True)
    pairs = [(p.grad.double() / 1024, q.grad) for p, q in pairs if p.requires_grad]
    assert pairs and max(apart(a, b) for a, b in pairs if b.norm() > 0) < gradient


def test_bfloat16_autocast_changes_losses_a_little():
    from test_detectors import batch

    losses = {}
    for autocast in ("", "bfloat16"):
        cfg = small_cfg(COCO_FPN, "INPUT.MASK_FORMAT", "bitmask")
        torch.manual_seed(0)
        model = TransferTrainer.build_model(cfg).train()
        trainer = AccumulatingTrainer(model, [], torch.optim.SGD(model.parameters(), 0.1), 1, autocast)
        torch.manual_seed(1)
        with EventStorage():
            losses[autocast] = {name: loss.item() for name, loss in trainer._losses(batch(cfg)).items()}
    assert losses["bfloat16"] != losses[""]
    # Rounding, which processors do differently, moves proposals, and with them the regions that the heads learn from.
    assert losses["bfloat16"] == pytest.approx(losses[""], rel=0.05, abs=0.05)
    assert sum(losses["bfloat16"].values()) == pytest.approx(sum(losses[""].values()), rel=0.02)

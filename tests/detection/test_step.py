"""Fewer processes than the recipe's: scaling, accumulation; and the switches that leave the mathematics alone."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from small_detector import COCO_FPN, VOC_C4, small_cfg
from torch import nn

from moco_d2.detection.preflight import changes, check_run, scale_to_processes
from moco_d2.detection.step import AccumulatingTrainer, build_step
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.model_zoo import config_changes, get_config, list_protocols
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
        trainer.iter = trainer.max_iter = 0
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
    cfg = small_cfg(VOC_C4)
    assert type(build_step(cfg, model, [], optimizer)) is SimpleTrainer
    assert (
        type(build_step(small_cfg(VOC_C4, "ENGINE.AUTOCAST", "bfloat16"), model, [], optimizer)) is AccumulatingTrainer
    )


def features(cfg, state, image):
    torch.manual_seed(0)
    model = TransferTrainer.build_model(cfg).eval()
    if state:
        model.load_state_dict(state)
    with torch.no_grad():
        return model.backbone(image), copy.deepcopy(model.state_dict()), model.backbone


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize("switch", ["CHANNELS_LAST", "COMPILE"])
def test_channels_last_and_compile_leave_features_and_names(switch):
    image = torch.randn(1, 3, 64, 96)
    plain, state, _ = features(small_cfg(COCO_FPN), None, image)
    with torch.compiler.set_stance("force_eager"):  # the switch is ours, the compiler is torch's, and takes a minute
        switched, names, backbone = features(small_cfg(COCO_FPN, f"ENGINE.{switch}", True), state, image)
    assert list(names) == list(state)
    last = backbone.bottom_up.stem.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert (last, backbone._compiled_call_impl is not None) == (switch == "CHANNELS_LAST", switch == "COMPILE")
    for level, feature in plain.items():
        assert (switched[level] - feature).abs().max() < 1e-4 * feature.abs().max()


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

"""Bad settings fail before the first step, all at once, and each message names the value, the rule and the nearest."""

import math

import pytest

from moco_d2.config import list_configs, load_cfg
from moco_d2.engine.preflight import check_config

PRETRAINING = [name for name in list_configs() if name.startswith("Pretrain/") or "quick_schedules/moco" in name]


def complaints(*settings: object, config: str = "Pretrain/moco_v2_R50_200ep", world_size: int = 1) -> list[str]:
    cfg = load_cfg(config, ["SEED", "1", "SSL.ENCODER.NAME", "resnet18"])  # quicker to build
    for key, value in zip(settings[::2], settings[1::2], strict=True):  # as Python would: yacs checks some types itself
        *nodes, last = str(key).split(".")
        node = cfg
        for name in nodes:
            node = node[name]
        node[last] = value
    try:
        check_config(cfg, world_size)
    except ValueError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize("config", PRETRAINING)
@pytest.mark.parametrize("world_size", [1, 8])
def test_every_shipped_recipe_passes(config: str, world_size: int) -> None:
    # A monitor's pictures are there once the sample is drawn.
    assert complaints("SSL.MONITOR.DATASET", "", config=config, world_size=world_size) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["SSL.METHOD", "MoCo2"], "; did you mean 'MoCo'?"),
        (["SSL.ENCODER.NAME", "resnet5"], "did you mean 'resnet50'?"),
        (["SSL.ENCODER.ARGS.stem", "cfar"], "did you mean 'cifar'?"),
        (["SSL.ENCODER.ARGS.width", -1.0], "width is -1.0; for resnet18 it must be a positive multiple of 1/64"),
        (
            ["SSL.ENCODER.NAME", "resnext50_32x4d", "SSL.ENCODER.ARGS.width", 0.125],
            "width is 0.125; for resnext50_32x4d it must be a positive multiple of 1/4",
        ),
        (["SSL.ENCODER.ARGS.widths", 2.0], "an argument in SSL.ENCODER.ARGS is 'widths'; it must be one of width"),
        (["SSL.ENCODER.ARGS.norm", "SynchBN"], "did you mean 'SyncBN'?"),
        (["SSL.ENCODER.ARGS.zero_init_residual", 1], "it must be a bool, as False is"),
        (["SSL.ARGS.temprature", 0.1], "did you mean 'temperature'?"),
        (["SSL.ARGS.mlp", "yes"], "SSL.ARGS.mlp is 'yes'; it must be a bool, as False is"),
        (["SSL.ARGS.queue_size", 65536.5], "it must be an int, as 65536 is"),
        (["SSL.ARGS.dim", True], "SSL.ARGS.dim is True; it must be an int"),
        (["SSL.ARGS.momentum", 1.5], "SSL.ARGS.momentum is 1.5; it must be in [0, 1]"),
        (["SSL.ARGS.bn_groups", 7], "256 images per process cannot be split into 7 BN groups"),
        (["DATA.AUGMENTATION", "moco_v22"], "did you mean 'moco_v2'?"),
        (["DATA.CROP_SIZE", 0], "DATA.CROP_SIZE is 0"),
        (["DATA.CROP_SIZE", "224"], "DATA.CROP_SIZE is '224'; it must be an int, as 224 is"),
        (["DATA.CROP_SIZE", 2.5], "DATA.CROP_SIZE is 2.5; it must be an int"),
        (["DATA.BACKEND", "cv3"], "did you mean 'cv2'?"),
        (["DATA.MAX_SKIPPED", "x"], "DATA.MAX_SKIPPED is 'x'; it must be a float"),
        (["DATA.MAX_SKIPPED", 5.0], "DATA.MAX_SKIPPED is 5.0; it must be a fraction of the images, in [0, 1]"),
        (["DATA.MAX_PIXELS", True], "DATA.MAX_PIXELS is True; it must be an int"),
        (["DATA.MAX_PIXELS", 0], "DATA.MAX_PIXELS is 0; it must be positive"),
        (["DATA.DRY_RUN_PICTURES", -1], "DATA.DRY_RUN_PICTURES is -1; it must be positive, or 0 for all"),
        (["DATA.SHUFFLE_SHARDS", -1], "DATA.SHUFFLE_SHARDS is -1"),
        (["DATA.LANES", 7], "DATA.LANES is 7; it must be 0 or a divisor of SOLVER.IMS_PER_BATCH, 256"),
        (["DATA.LANES", -2], "DATA.LANES is -2"),
        (["DATA.CACHE_GB", 0.0], "DATA.CACHE_GB is 0.0; it must be positive"),
        (["DATA.CACHE_FOLDER", f"{__file__}/cache"], "it must be a writable folder"),
        (["DATASETS.TRAIN", "imagenet_train"], "DATASETS.TRAIN is 'imagenet_train'; it must be a list or tuple"),
        (["DATALOADER.NUM_WORKERS", -2], "DATALOADER.NUM_WORKERS is -2; it must be -1 (as many as the cores allow), 0"),
        (["SOLVER.SCHEDULE", "cosin"], "did you mean 'cosine'?"),
        (["SOLVER.IMS_PER_BATCH", 0], "SOLVER.IMS_PER_BATCH is 0; it must be a positive multiple of the number of"),
        (["SOLVER.BASE_LR", 0.0], "SOLVER.BASE_LR is 0.0; it must be positive"),
        (["SOLVER.BASE_LR", math.inf], "SOLVER.BASE_LR is inf; it must be finite"),
        (["SOLVER.REFERENCE_BATCH", -1], "SOLVER.REFERENCE_BATCH is -1"),
        (["SOLVER.FIRST_EPOCH", 2], "SOLVER.FIRST_EPOCH is 2; it must be 0"),
        (["SOLVER.CHECKPOINT_KEEP_EVERY", 7], "it must be 0 or a multiple of SOLVER.CHECKPOINT_PERIOD"),
        (["SOLVER.IMS_PER_BATCH", "256"], "SOLVER.IMS_PER_BATCH is '256'; it must be an int"),
        (["SOLVER.SCHEDULE", "step", "SOLVER.STEPS", ("120", 160)], "its items must be of the same kind as"),
        (["SOLVER.MOMENTUM", 1.0], "it must be in [0, 1)"),
        (["SOLVER.MOMENTUM", 0.0, "SOLVER.NESTEROV", True], "it must be False if SOLVER.MOMENTUM is 0"),
        (["SOLVER.WEIGHT_DECAY", -1e-4], "SOLVER.WEIGHT_DECAY is -0.0001"),
        (["SOLVER.GAMMA", 10.0], "SOLVER.GAMMA is 10.0"),
        (["SOLVER.CHECKPOINT_PERIOD", 0], "SOLVER.CHECKPOINT_PERIOD is 0"),
        (["SOLVER.CHECKPOINT_KEEP", -1], "SOLVER.CHECKPOINT_KEEP is -1"),
        (["SSL.ARGS.queue_dtype", "half"], "SSL.ARGS.queue_dtype is 'half'; it must be one of float32, bfloat16"),
        (["ENGINE.AUTOCAST", "bfloat"], "did you mean 'bfloat16'?"),
        (["ENGINE.TF32", "al"], "did you mean 'all'?"),
        (["SOLVER.AMP.ENABLED", True], "set ENGINE.AUTOCAST float16 instead"),
        (["SOLVER.EPOCHS", -5], "SOLVER.EPOCHS is -5"),
        (["SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 0], "is 0 and SOLVER.MAX_ITER 0; one of them must be positive"),
        (["SOLVER.MAX_ITER", 100], "only one of them can set the length: to train for MAX_ITER"),
        (["SOLVER.SCHEDULE", "step", "SOLVER.STEPS", (120, 250)], "within the 200 epochs"),
        (["SOLVER.SCHEDULE", "step", "SOLVER.STEPS", (160, 120)], "the steps must increase"),
        (["SOLVER.WARMUP_ITERS", 500], "SOLVER.WARMUP_ITERS is 500, but pretraining does not use it"),
        (["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all"], "CLIP_TYPE is 'all'"),
        (["SEED", -1], "SEED is -1"),
        (["SEED", 2**64], "SEED is 18446744073709551616; it must be in [0, 2**64)"),
    ],
)  # fmt: skip
def test_each_mistake_is_named(settings: list, message: str) -> None:
    found = complaints(*settings)
    assert len(found) == 1 and message in found[0], found


def test_all_mistakes_show_at_once() -> None:
    settings = [
        "SSL.METHOD", "Moco", "DATA.AUGMENTATION", "moco_v4", "DATA.CROP_SIZE", -3, "SOLVER.BASE_LR", -1.0,
        "SOLVER.SCHEDULE", "stop", "SSL.ENCODER.NAME", "resnet", "DATA.MAX_SKIPPED", "x", "SOLVER.IMS_PER_BATCH", 2.5,
    ]  # fmt: skip
    assert len(complaints(*settings)) == 8
    assert len(complaints("SSL.ARGS.momentum", 2.0, "SSL.ARGS.temperature", -1.0, "SSL.ARGS.dim", 0)) == 3


def test_batch_and_processes_must_agree() -> None:
    (complaint,) = complaints(world_size=7)
    assert "a positive multiple of the number of processes, 7" in complaint


def test_a_whole_number_is_a_float_on_the_command_line() -> None:
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", ["SOLVER.WEIGHT_DECAY", "0", "SSL.ARGS.temperature", "1"])
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SSL.ARGS.temperature) == (0.0, 1.0)
    assert all(isinstance(value, float) for value in (cfg.SOLVER.WEIGHT_DECAY, cfg.SSL.ARGS.temperature))


def test_an_option_after_the_overrides_is_named() -> None:
    with pytest.raises(ValueError, match="put the option --resume before the first of them"):
        load_cfg("", ["SEED", "1", "--resume"])

"""ENGINE's performance options: what each may change, that a resume keeps them, and that the loop never waits."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from PIL import Image
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moco_d2.config import load_cfg
from moco_d2.engine.step import describe_performance_options, performance_advice
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.facts import BackboneFacts
from moco_d2.model_zoo import pretraining_changes
from moco_d2.running.precision import TF32

STEPS = 20
# torch.compile's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(64):
        blobs = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        blobs.resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return str(folder)


def config(images: str, output: Path, *more: object) -> CfgNode:
    # The last feature maps have 4 x 4 places: batch statistics over few values magnify rounding from step to step.
    small = [
        "DATASETS.TRAIN", f'("{images}",)', "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 32, "DATA.CROP_SIZE", 32,
        "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ENCODER.ARGS.stem", "cifar",
        "SSL.ARGS.queue_size", 256, "SSL.ARGS.dim", 16, "SSL.ARGS.bn_groups", 2, "SOLVER.REFERENCE_BATCH", 0,
        "SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", STEPS, "SOLVER.CHECKPOINT_PERIOD", STEPS // 2,
        "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    output.mkdir(exist_ok=True)
    return load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in small])


def train(cfg: CfgNode, *hooks: HookBase, resume: bool = False) -> PretrainTrainer:
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume)
    trainer.register_hooks(hooks)
    trainer.train()
    return trainer


def losses(trainer: PretrainTrainer) -> list[float]:
    return [value for value, _ in trainer.storage.history("total_loss").values()]


def weights(folder: Path, name: str = "model_final") -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = torch.load(folder / f"{name}.pth")["model"]
    return state


def begin_again_in_the_middle(folder: Path, steps: int) -> None:
    (folder / "last_checkpoint").write_text(f"model_{steps // 2 - 1:07d}.pth")


@pytest.fixture(scope="module")
def plain(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """A run in float32 with every switch off: its folder and its losses."""
    folder = tmp_path_factory.mktemp("plain")
    values = losses(train(config(images, folder, "ENGINE.FUSED_SGD", False)))
    assert len(values) == STEPS and all(map(math.isfinite, values)), "each step's, though they are read in bundles"
    assert min(values[5:]) > 4
    return folder, values


# Switch; largest difference of the first step's loss from float32's, and of any step's (docs/performance.md); what the
# weights say of it.
SWITCHES = [
    (["ENGINE.FUSED_SGD", True], 0, 0.05, ""),
    (["ENGINE.CHANNELS_LAST", True], 1e-5, 0.05, "channels_last"),
    (["ENGINE.COMPILE", True], 1e-5, 0.05, "compiled"),
    (["SSL.ARGS.queue_dtype", "bfloat16"], 1e-3, 0.1, ""),
    (["ENGINE.AUTOCAST", "bfloat16"], 1e-2, 0.1, "bfloat16 autocast"),
    # The CPU's float16 convolutions take a hundred times as long.
    pytest.param(["ENGINE.AUTOCAST", "float16"], 2e-3, 0.1, "float16 autocast", marks=pytest.mark.slow),
    (["ENGINE.AUTOCAST", "auto"], 0, 0.05, ""),
]


@pytest.mark.parametrize(("switch", "first", "any_step", "said"), SWITCHES, ids=lambda value: str(value))
def test_a_switch_leaves_the_losses_within_its_tolerance(
    plain: tuple[Path, list[float]], images: str, tmp_path: Path, switch: list[Any], first: float, any_step: float,
    said: str,
) -> None:  # fmt: skip
    cfg = config(images, tmp_path, *switch)
    # The switch is ours, the compiler is torch's and takes minutes.
    with torch.compiler.set_stance("force_eager") if cfg.ENGINE.COMPILE else contextlib.nullcontext():
        trainer = train(cfg)
    differences = [abs(a - b) for a, b in zip(losses(trainer), plain[1], strict=True)]
    assert differences[0] <= first and max(differences) <= any_step, differences
    assert list(weights(tmp_path)) == list(weights(plain[0])), "names stay"
    compiled = [network._compiled_call_impl is not None for network in trainer.method.networks()]
    assert compiled == [bool(cfg.ENGINE.COMPILE)] * 2 and trainer.method.backbone()._compiled_call_impl is None
    saved = torch.load(tmp_path / "backbone.pth", weights_only=True)
    facts = BackboneFacts.from_dict(saved["facts"])
    assert facts.origin.endswith(f"{STEPS} of {STEPS} iterations" + (f" ({said})" if said else ""))
    changes = {change.split("=")[0] for change in pretraining_changes(cfg) or ()}
    assert ("SSL.ARGS.queue_dtype" in changes) == (switch[0] in changes), "ENGINE is free, SSL.ARGS is the recipe"


@pytest.mark.slow
def test_compiled_networks_compute_the_same(plain: tuple[Path, list[float]], images: str, tmp_path: Path) -> None:
    trainer = train(config(images, tmp_path, "ENGINE.COMPILE", True))
    differences = [abs(a - b) for a, b in zip(losses(trainer), plain[1], strict=True)]
    assert differences[0] <= 1e-5 and max(differences) <= 0.05


def test_momentum_follows_the_weights_into_another_memory_order(
    plain: tuple[Path, list[float]], images: str, tmp_path: Path
) -> None:
    """Elements are paired by their place in memory by the fused kernel: misplaced momentum would go unnoticed."""
    train(config(images, tmp_path))
    begin_again_in_the_middle(tmp_path, STEPS)
    trainer = train(config(images, tmp_path, "ENGINE.CHANNELS_LAST", True), resume=True)
    assert trainer.start_iter == STEPS // 2
    parameter = trainer.method.encoder_q.layer1[0].conv1.weight
    momentum = trainer.optimizer.state[parameter]["momentum_buffer"]
    assert momentum.stride() == parameter.stride() != parameter.contiguous().stride()
    rest = plain[1][STEPS // 2 :]
    assert max(abs(a - b) for a, b in zip(losses(trainer), rest, strict=True)) <= 0.05


@pytest.fixture
def tf32() -> Iterator[Callable[[], tuple[bool, bool]]]:
    """Return what reads torch's settings, which are first set to no value of ENGINE.TF32 and restored at the end."""
    convolutions, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, products.allow_tf32
    convolutions.allow_tf32, products.allow_tf32 = False, True
    yield lambda: (convolutions.allow_tf32, products.allow_tf32)
    convolutions.allow_tf32, products.allow_tf32 = before


@pytest.mark.parametrize("where", ["", *TF32])
def test_tf32_is_as_asked_or_as_torch_has_it(
    images: str, tmp_path: Path, tf32: Callable[[], tuple[bool, bool]], where: str
) -> None:
    cfg = config(images, tmp_path, "ENGINE.TF32", where)
    PretrainTrainer.build_model(cfg)
    assert tf32() == TF32.get(where, (False, True))
    assert describe_performance_options(cfg) == (f"TF32 {where}" if where else "")
    assert cfg.CUDNN_BENCHMARK and not load_cfg("PascalVOC-Detection/faster_rcnn_R_50_C4_24k").CUDNN_BENCHMARK


def test_the_loss_scale_is_resumed(images: str, tmp_path: Path) -> None:
    short = (
        "ENGINE.AUTOCAST", "float16", "SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 2,
        "SSL.ENCODER.ARGS.stem", "imagenet", "SOLVER.IMS_PER_BATCH", 4,
    )  # fmt: skip
    whole = train(config(images, tmp_path, *short))._trainer.grad_scaler.state_dict()
    expected = weights(tmp_path)
    begin_again_in_the_middle(tmp_path, 4)
    resumed = train(config(images, tmp_path, *short), resume=True)
    assert resumed._trainer.grad_scaler.state_dict() == whole and whole["scale"] > 0
    got = weights(tmp_path)
    assert all(torch.equal(got[key], value) for key, value in expected.items())


def test_a_first_step_that_loss_scaling_skips_leaves_no_trace(images: str, tmp_path: Path) -> None:
    trainer = PretrainTrainer(config(images, tmp_path, "ENGINE.AUTOCAST", "float16"))
    optimizer, scaler = trainer.optimizer, trainer._trainer.grad_scaler
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.full_like(p, math.inf)
    scaler.scale(torch.zeros(()))  # which makes the scale
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, optimizer.param_groups[0]["params"]))
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "equal", "masked_select")
        return func(*args, **(kwargs or {}))


class Lists(TorchFunctionMode):
    """Counts the tensors that become lists: on the CPU, torch does not dispatch that."""

    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.Tensor.tolist
        return func(*args, **(kwargs or {}))


class CountWaits(HookBase):
    """Notes the waits of each step; as the last hook it sees those of all others."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def before_step(self) -> None:
        self.modes = Waits(), Lists()
        for mode in self.modes:
            mode.__enter__()

    def after_step(self) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(None, None, None)
        self.counts.append(sum(mode.count for mode in self.modes))


@pytest.mark.parametrize(
    ("autocast", "device", "instructions", "slow"),
    [
        ("bfloat16", "cpu", "AVX2", True), ("bfloat16", "cpu", "AVX512", False), ("bfloat16", "cuda", "AVX2", False),
        ("auto", "cpu", "AVX2", False), ("", "cpu", "AVX2", False),
    ],
)  # fmt: skip
def test_a_cpu_without_bfloat16_is_told(
    autocast: str, device: str, instructions: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    cfg = load_cfg("Pretrain/moco_v2_R50_200ep", ["ENGINE.AUTOCAST", autocast, "MODEL.DEVICE", device])
    assert ["ENGINE.AUTOCAST auto" in advice for advice in performance_advice(cfg)] == [True] * slow


@pytest.mark.parametrize("autocast", ["", "float16"])
def test_the_host_waits_for_the_device_only_where_numbers_are_written(
    images: str, tmp_path: Path, autocast: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moco_d2.engine.trainer.LOG_PERIOD", 3)
    short = ("SOLVER.MAX_ITER", 4, "SOLVER.CHECKPOINT_PERIOD", 100, "SSL.ENCODER.ARGS.stem", "imagenet")
    trainer = PretrainTrainer(config(images, tmp_path, *short, "ENGINE.AUTOCAST", autocast, "SOLVER.IMS_PER_BATCH", 4))
    views = next(iter(trainer.data_loader))  # which is made on the CPU
    trainer._trainer._data_loader_iter_obj = itertools.repeat(views)
    trainer.register_hooks([waits := CountWaits()])
    trainer.train()
    assert waits.counts[:3] == [0, 0, 2], "the losses at once, and the diagnostics at once"
    assert waits.counts[3] > 2, "the checkpoint"

"""What every method must keep: one test over the registry for each part of the contract.

A new method needs an entry in ``small_methods.py``; everything here then applies to it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import moco_d2
from moco_d2.convert import convert_checkpoint
from moco_d2.engine.checkpoint import backbone_prefix
from moco_d2.layers.distributed import wrap_ddp
from moco_d2.layers.encoders import network_for
from moco_d2.layers.resnet import build_resnet, describe
from moco_d2.layers.views import Views
from moco_d2.layers.vit import describe as describe_vit
from moco_d2.methods import METHODS, SSLMethod, default_args, method_class
from tests.methods.small_methods import BATCH, IMAGES, SMALL, build, encoder_of, make_views, part

STEPS, STEPS_PER_EPOCH = 4, 2


def optimizer(method: SSLMethod) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        [{"params": list(group["params"])} for group in method.param_groups()], lr=0.05, momentum=0.9
    )


def train(
    method: SSLMethod, sgd: torch.optim.Optimizer, steps: range, name: str, rank: int = 0, processes: int = 1
) -> list[float]:
    """Train as the engine does: the hooks in its order, a seed for each step, this process's part of the batch."""
    network, losses = wrap_ddp(method), []
    for step in steps:
        epoch, first = step // STEPS_PER_EPOCH, step % STEPS_PER_EPOCH == 0

        def replay(epoch: int = epoch) -> Iterator[Views]:
            for ahead in range(epoch * STEPS_PER_EPOCH, (epoch + 1) * STEPS_PER_EPOCH):
                yield part(make_views(name, ahead), rank, processes)

        torch.manual_seed(step)
        if first:
            method.before_epoch(epoch, replay)
        method.before_step(step / STEPS, step / STEPS_PER_EPOCH)
        loss = sum(network(part(make_views(name, step), rank, processes)).values())
        sgd.zero_grad(), loss.backward(), method.after_backward(), sgd.step(), method.after_step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def test_every_method_has_small_arguments() -> None:
    assert set(SMALL) >= set(METHODS) - {"Toy"}


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_named_scalars_and_recording_changes_nothing(name: str) -> None:
    quiet, loud = build(name), build(name)
    quiet.recording = False
    results = []
    for method in (quiet, loud):
        torch.manual_seed(1)
        method.before_epoch(0, lambda: iter([make_views(name, 0)]))
        method.before_step(0.0, 0.0)
        losses = method(make_views(name, 0))
        assert losses and all(key.startswith("loss_") and loss.ndim == 0 for key, loss in losses.items())
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
        results.append(losses)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])
    assert set(loud.recorded) == {one.key for one in loud.diagnostics()} - {"total_loss"}
    assert all(value.ndim == 0 and not value.requires_grad for value in loud.recorded.values())
    for (key, value), (_, other) in zip(quiet.state_dict().items(), loud.state_dict().items(), strict=True):
        assert torch.equal(value, other), key


@pytest.mark.parametrize("name", SMALL)
def test_what_is_trained_gets_a_gradient_and_what_is_not_has_none(name: str) -> None:
    method = build(name)
    given = [id(p) for group in method.param_groups() for p in group["params"]]
    trainable = {key: p for key, p in method.named_parameters() if p.requires_grad}
    assert sorted(given) == sorted(map(id, trainable.values())), "each trainable parameter in one group"
    method.before_epoch(0, lambda: iter([make_views(name, 0)]))
    method.before_step(0.0, 0.0)
    sum(method(make_views(name, 0)).values()).backward()
    without = [key for key, p in trainable.items() if p.grad is None]
    assert without == [], "DDP waits for a gradient of every trainable parameter"
    assert all(p.grad is None for p in method.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", SMALL)
def test_resuming_inside_an_epoch_is_bit_identical(name: str) -> None:
    whole = build(name)
    sgd = optimizer(whole)
    train(whole, sgd, range(3), name)
    cut = build(name, seed=9)
    cut.load_state_dict(copy.deepcopy(whole.state_dict()))
    resumed = optimizer(cut)
    resumed.load_state_dict(copy.deepcopy(sgd.state_dict()))
    assert train(whole, sgd, range(3, STEPS), name) == train(cut, resumed, range(3, STEPS), name)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, cut.state_dict()[key]), key


def run_rank(process: int, processes: int, folder: str, names: tuple[str, ...]) -> None:
    """Train every method on this process's part of each batch, and write what came out."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes)
    found = {}
    for name in names:
        # Another seed in each process: wrap_ddp must make them start equal.
        method = build(name, seed=process)
        losses = train(method, optimizer(method), range(STEPS), name, process, processes)
        found[name] = (losses, method.state_dict())
    torch.save(found, f"{folder}/{processes}-{process}.pth")
    if processes > 1:
        dist.barrier()  # gloo aborts a process whose peer goes before it
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    names = tuple(name for name, small in SMALL.items() if small.norm != "BN")
    run_rank(0, 1, str(tmp_path), names)
    torch.multiprocessing.start_processes(run_rank, (2, str(tmp_path), names), nprocs=2, start_method="fork")
    one, first, second = (torch.load(tmp_path / f"{name}.pth") for name in ("1-0", "2-0", "2-1"))
    for name in names:
        (losses, state), (losses_2, state_2), (_, state_3) = one[name], first[name], second[name]
        torch.testing.assert_close(losses, losses_2, rtol=1e-7, atol=1e-9, msg=name)
        for key, value in state.items():
            torch.testing.assert_close(state_2[key], value, rtol=1e-6, atol=1e-8, msg=f"{name} {key}")
            assert torch.equal(state_2[key], state_3[key]), f"{name} {key} differs between processes"


@pytest.mark.parametrize("name", [name for name in SMALL if not SMALL[name].vit])
def test_its_backbone_has_torchvisions_names_and_converts(name: str, tmp_path: Path) -> None:
    method = build(name).float()
    backbone = method.backbone()
    small = SMALL[name]
    expected = build_resnet(small.depth, width=small.width, norm=small.norm, num_classes=2).state_dict()
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in expected.items() if not key.startswith("fc.")
    }
    assert backbone.eval()(torch.rand(1, 3, 64, 64)).ndim == 2, "pooled features, no head"
    prefix = backbone_prefix(method)
    facts = describe(backbone, origin="a test").as_dict()
    content = {"model": method.state_dict(), "facts": facts, "backbone": {"method": name, "prefix": prefix}}
    if prefix is None:  # it is computed: backbone.pth holds it
        content = {"state_dict": backbone.state_dict(), "facts": facts}
    torch.save(content, tmp_path / "model_final.pth")
    convert_checkpoint(tmp_path / "model_final.pth", tmp_path / "converted.pth", proof=False)
    converted = torch.load(tmp_path / "converted.pth", weights_only=False)["model"]
    assert np.array_equal(converted["stem.conv1.weight"], backbone.state_dict()["conv1.weight"])


@pytest.mark.parametrize("name", [name for name in SMALL if SMALL[name].vit])
def test_the_backbone_of_a_vit_has_timms_names_in_its_checkpoint_too(name: str) -> None:
    method = build(name)
    backbone, expected = method.backbone(), encoder_of(SMALL[name])(num_classes=2)
    assert {key: value.shape for key, value in backbone.state_dict().items()} == {
        key: value.shape for key, value in expected.state_dict().items() if not key.startswith("head.")
    }
    assert backbone.eval()(torch.rand(1, 3, 40, 24).double()).shape == (1, 24), "the class token, no head"
    assert backbone_prefix(method) == {"MoCoV3 ViT": "base_encoder.", "DINO ViT": "teacher.backbone."}[name]
    facts = describe_vit(backbone, origin="a test", recipe="r")
    with torch.device("meta"):
        assert network_for(facts).state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.parametrize("name", METHODS)
def test_what_is_a_methods_own_is_named_in_its_file_alone(name: str) -> None:
    """A stage that reads one method's arguments, diagnostics or networks fails with every other method."""
    with torch.device("meta"):
        method = build(name)
    words = {re.escape(f"SSL.ARGS.{key}") for key in default_args(name)}
    words |= {one.key for one in method.diagnostics()} - {"total_loss", "feature_std"}
    words |= {rf"{child}\." for child, _ in method.named_children() if "_" in child}
    found = {}
    for room in ("engine", "reports", "running"):
        for path in Path(moco_d2.__file__).parent.joinpath(room).rglob("*.py"):
            if words and (hits := re.findall(rf"\b(?:{'|'.join(words)})", path.read_text())):
                found[path.name] = hits
    assert found == {}
    assert name != "MoCo" or len(words) >= 10


@pytest.mark.parametrize("name", METHODS)
def test_its_docstrings_explain_every_argument(name: str) -> None:
    text = method_class(name).__init__.__doc__ or ""
    assert [key for key in default_args(name) if f"{key}:" not in text] == []


def test_the_views_of_these_tests_are_what_the_loader_gives() -> None:
    views = make_views("MoCo", 0)
    assert views.index.max() < IMAGES and views.boxes.shape == (2, BATCH, 4)
    assert views.boxes.min() >= 0 and views.boxes.max() <= 1 and (views.boxes[..., 0] > views.boxes[..., 2]).any()

"""MoCo against the paper's algorithm, one process against several, and the authors' checkpoint layout."""

import copy
import functools
import logging
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import rank, world_size, wrap_ddp
from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.views import Views
from moco_d2.methods import MoCo, build_method
from moco_d2.methods.moco import from_official, to_official

small = functools.partial(build_resnet, "resnet18", width=0.125)


def make(seed: int = 0, **kwargs: object) -> MoCo:
    torch.manual_seed(seed)
    kwargs = {"dim": 16, "queue_size": 24, "bn_groups": 1, "temperature": 0.2, "momentum": 0.9, **kwargs}
    return MoCo(small, **kwargs).double()


def make_views(step: int, n: int = 8) -> Views:
    generator = torch.Generator().manual_seed(100 + step)
    return as_views([torch.rand(n, 3, 32, 32, dtype=torch.float64, generator=generator) for _ in range(2)])


def as_views(images: list[torch.Tensor]) -> Views:
    return Views(images, torch.arange(len(images[0])), torch.zeros(len(images), len(images[0]), 4))


@pytest.mark.parametrize("mlp", [False, True])
def test_steps_follow_algorithm_1(mlp: bool) -> None:
    """Three SGD steps next to the paper's pseudo-code, written with nothing of ours but the networks."""
    model = make(mlp=mlp, shuffle=False)
    f_q, f_k = copy.deepcopy(model.encoder_q), copy.deepcopy(model.encoder_k)
    queue, m, t = [row.clone() for row in model.queue.features], 0.9, 0.2
    ours, theirs = (torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model.encoder_q, f_q))
    for step in range(3):
        views = make_views(step)
        loss = model(views)["loss_contrast"]
        ours.zero_grad(), loss.backward(), ours.step()

        with torch.no_grad():
            for p_k, p_q in zip(f_k.parameters(), f_q.parameters(), strict=True):
                p_k.copy_(m * p_k + (1 - m) * p_q)
            k = F.normalize(f_k(views.images[1]), dim=1)
        q = F.normalize(f_q(views.images[0]), dim=1)
        losses = []
        for i in range(len(q)):
            similarities = torch.stack([q[i] @ k[i], *(q[i] @ negative for negative in queue)]) / t
            losses.append(similarities.logsumexp(0) - similarities[0])
        expected = torch.stack(losses).mean()
        theirs.zero_grad(), expected.backward(), theirs.step()
        queue = (queue + list(k))[-24:]

        torch.testing.assert_close(loss, expected)
        newest_last = model.queue.features.roll(-model.queue.pointer.item(), 0)
        torch.testing.assert_close(newest_last, torch.stack(queue))
    for ours_, theirs_ in ((model.encoder_q, f_q), (model.encoder_k, f_k)):
        for key, value in theirs_.state_dict().items():
            torch.testing.assert_close(ours_.state_dict()[key], value, msg=key)


def test_the_key_encoder_gets_no_gradient_and_the_query_encoder_does() -> None:
    model = make()
    model(make_views(0))["loss_contrast"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder_k.parameters())
    assert all(p.grad is not None for p in model.encoder_q.parameters())


def test_shuffling_keeps_the_order_of_keys_and_changes_their_batch_statistics() -> None:
    x = make_views(0).images[1]

    def keys(groups: int, shuffle: bool) -> torch.Tensor:
        torch.manual_seed(5)
        return make(bn_groups=groups, shuffle=shuffle)._shuffled_keys(x)

    # With one group the statistics do not depend on the order, so any difference would be a key out of place.
    torch.testing.assert_close(keys(1, shuffle=True), keys(1, shuffle=False))
    assert not torch.allclose(keys(2, shuffle=True), keys(2, shuffle=False)), "other companions, other statistics"


def test_symmetric_loss_is_the_sum_of_both_directions_with_one_ema_step() -> None:
    views = make_views(0)
    both = make(symmetric=True, shuffle=False)
    before = both.queue.features.clone()
    loss = both(views)["loss_contrast"]
    one, other = make(shuffle=False), make(shuffle=False)
    parts = one(views)["loss_contrast"] + other(as_views(views.images[::-1]))["loss_contrast"]
    torch.testing.assert_close(loss, parts)
    torch.testing.assert_close(both.queue.features[:8], other.queue.features[:8])
    torch.testing.assert_close(both.queue.features[8:16], one.queue.features[:8])
    assert torch.equal(both.queue.features[16:], before[16:])
    assert both.queue.pointer.item() == 16


def test_diagnostics_are_kept_out_of_the_loss() -> None:
    model = make()
    assert set(model(make_views(0))) == {"loss_contrast"}
    assert set(model.recorded) == {
        "contrast_acc1", "contrast_acc5", "positive_similarity", "negative_similarity", "feature_std",
    }  # fmt: skip
    assert all(not value.requires_grad for value in model.recorded.values())


def run_rank(process: int, processes: int, folder: str, shuffle: bool) -> None:
    """Train three steps on this process's part of each batch; rank 0 writes what came out."""
    torch.set_num_threads(1)
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=process, world_size=processes)
    # Another seed in each process: wrap_ddp must make them start equal, the queue included.
    model = make(seed=process, bn_groups=2 // processes, shuffle=shuffle, mlp=True)
    ddp = wrap_ddp(model)
    optimizer = torch.optim.SGD(model.encoder_q.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        views = as_views([view.chunk(world_size())[rank()] for view in make_views(step).images])
        loss = ddp(views)["loss_contrast"]
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        mean = loss.detach() / processes
        if processes > 1:
            dist.all_reduce(mean)
        losses.append(mean.item())
    gradients = {key: p.grad for key, p in model.encoder_q.named_parameters()}
    state = {k: v for k, v in model.state_dict().items() if "running" not in k}
    torch.save({"losses": losses, "gradients": gradients, "state": state}, f"{folder}/{processes}-{process}.pth")
    if processes > 1:
        dist.barrier()  # gloo aborts a process whose peer goes before it
        dist.destroy_process_group()


@pytest.mark.parametrize("shuffle", [True, False])
def test_two_processes_equal_one_with_two_groups(tmp_path: Path, shuffle: bool) -> None:
    run_rank(0, 1, str(tmp_path), shuffle)
    torch.multiprocessing.start_processes(run_rank, (2, str(tmp_path), shuffle), nprocs=2, start_method="fork")
    one, first, second = (torch.load(tmp_path / f"{name}.pth") for name in ("1-0", "2-0", "2-1"))
    for key in ("queue.features", "queue.pointer"):
        assert torch.equal(first["state"][key], second["state"][key]), "the queue is the same in every process"
    torch.testing.assert_close(one["losses"], first["losses"], rtol=1e-9, atol=0)
    for part in ("gradients", "state"):
        for key, value in one[part].items():
            torch.testing.assert_close(first[part][key], value, rtol=1e-7, atol=1e-9, msg=f"{part} {key}")


@pytest.mark.parametrize("mlp", [False, True])
def test_official_layout_round_trip(mlp: bool) -> None:
    """A training checkpoint of the authors' code continues here, and ours reads like theirs."""
    source, target = make(seed=1, mlp=mlp), make(seed=2, mlp=mlp)
    source(make_views(0))
    official = to_official(source.state_dict())
    heads = {"fc.0.weight", "fc.0.bias", "fc.2.weight", "fc.2.bias"} if mlp else {"fc.weight", "fc.bias"}
    names = {f"module.encoder_{x}.{key}" for x in "qk" for key in {*small(10).state_dict()} - {"fc.weight", "fc.bias"}}
    names |= {f"module.encoder_{x}.{key}" for x in "qk" for key in heads} | {"module.queue", "module.queue_ptr"}
    assert set(official) == names
    assert official["module.queue"].shape == (16, 24) and official["module.queue_ptr"].tolist() == [8]
    target.load_state_dict(target.adapt_state_dict(official))
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key
    views = make_views(1)
    torch.manual_seed(0)
    expected = source(views)["loss_contrast"]
    torch.manual_seed(0)
    assert torch.equal(target(views)["loss_contrast"], expected)
    assert from_official(source.state_dict()).keys() == source.state_dict().keys(), "ours passes unchanged"


def test_an_official_checkpoint_without_the_pointer_fills_its_queue_from_the_beginning(caplog) -> None:
    source, target = make(seed=1), make(seed=2)
    source(make_views(0))
    official = to_official(source.state_dict())
    del official["module.queue_ptr"]
    target.load_state_dict(target.adapt_state_dict(official))
    assert target.queue.pointer.tolist() == [0] and torch.equal(target.queue.features, source.queue.features)
    assert "a queue but no queue_ptr" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.5}, "momentum is 1.5; it must be in \\[0, 1\\]"),
        ({"temperature": 0}, "temperature is 0; it must be positive"),
        ({"bn_groups": -1}, "bn_groups is -1"),
        ({"queue_size": 0, "dim": 0}, "dim is 0(?s:.*)queue_size is 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**arguments)


def test_other_mistakes_are_explained(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="8 images per process cannot be split into 3 BN groups"):
        make(bn_groups=3)(make_views(0))
    with pytest.raises(ValueError, match="fc, must be a Linear layer; it is Identity"):
        MoCo(_headless, dim=4)
    with pytest.raises(ValueError, match="did you mean 'temperature'"):
        build_method("MoCo", small, {"temprature": 0.1})
    with pytest.raises(ValueError, match=r"SSL\.METHOD is 'MoCoo'; it must be one of .*; did you mean 'MoCo'"):
        build_method("MoCoo", small, {})
    with caplog.at_level(logging.WARNING):
        make(bn_groups=1)
    assert "shuffling BN has no effect" in caplog.text


@pytest.mark.parametrize("norm", ["SyncBN", "GN"])
def test_an_encoder_without_batch_norm_of_each_process_has_no_groups(
    norm: str, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = functools.partial(build_resnet, "resnet18", width=0.5, norm=norm)
    with pytest.raises(ValueError, match=r"bn_groups is 8; it must be 0 with SSL\.ENCODER\.ARGS\.norm SyncBN or GN"):
        MoCo(encoder, bn_groups=8)
    with caplog.at_level(logging.WARNING):
        model = MoCo(encoder, dim=8, queue_size=16)
    assert "shuffling BN has no effect with" in caplog.text and "set SSL.ARGS.shuffle False" in caplog.text
    assert model.groups.total == 1 and model.departures() == []
    model(as_views([torch.rand(3, 3, 32, 32) for _ in range(2)]))["loss_contrast"].backward()  # 3: any batch


@pytest.mark.parametrize(
    ("processes", "bn_groups", "in_all", "departs"),
    [(1, 0, 8, False), (2, 0, 8, False), (8, 0, 8, False), (3, 0, 6, True), (16, 0, 16, True), (1, 8, 8, False),
     (2, 8, 16, True), (8, 1, 8, False), (1, 2, 2, False), (1, 1, 1, False), (2, 1, 2, True)],
)  # fmt: skip
def test_the_total_of_bn_groups_is_a_setting_and_departs_from_the_recipe_if_it_is_not_the_papers(
    processes: int, bn_groups: int, in_all: int, departs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moco_d2.layers.shuffle.world_size", lambda: processes)
    model = make(bn_groups=bn_groups)
    assert model.settings() == {"number of BN groups in all processes": in_all}
    assert [text.startswith(f"{in_all} BN groups in {processes} ") for text in model.departures()] == [True] * departs


@pytest.mark.parametrize(
    ("arguments", "images", "batch", "steps", "said"),
    [
        ({"queue_size": 64}, 64, 16, 10**4, []),  # an epoch's keys, no more
        ({"queue_size": 4096}, 2000, 32, 10**4, ["holds the keys of 2.0 epochs of your 2000 images.*queue_size 256$"]),
        ({"queue_size": 4096, "symmetric": True}, 2048, 32, 10**4, []),  # both views' keys are queued
        ({"queue_size": 4096}, 500, 256, 10**4, ["8.2 epochs.*queue_size 64 and SOLVER.IMS_PER_BATCH 64 or less$"]),
        ({"queue_size": 4096}, 3, 2, 10**4, ["1,365.3 epochs.*these are too few images$"]),
        ({"momentum": 0.999, "queue_size": 8}, 5000, 256, 200, ["82% of the key encoder.* train for 4603 steps or"]),
        ({"momentum": 1.0, "queue_size": 8}, 5000, 256, 10**6, ["100% of.*: lower SSL.ARGS.momentum, which is 1$"]),
        ({"momentum": 0.0, "queue_size": 8}, 5000, 256, 1, []),
        ({"bn_groups": 8, "queue_size": 8}, 5000, 8, 10**5, ["each of the 8 BN groups has a single image"]),
    ],
)  # fmt: skip
def test_runs_that_will_not_learn_much_are_warned_of_with_a_remedy(
    arguments: dict, images: int, batch: int, steps: int, said: list[str]
) -> None:
    with torch.device("meta"):
        model = MoCo(small, **arguments)
    found = model.advice(images, batch, steps)
    assert len(found) == len(said) and all(re.search(*pair) for pair in zip(said, found, strict=True)), found


def test_the_advised_settings_are_not_warned_of() -> None:
    for images in (70, 500, 3000, 50_000, 10**6):
        with torch.device("meta"):
            model = MoCo(small, queue_size=2**21)
        advised = dict(re.findall(r"([\w.]+) (\d+)", model.advice(images, 2**14, 10**5)[0].rpartition(": ")[2]))
        with torch.device("meta"):
            model = MoCo(small, queue_size=int(advised["SSL.ARGS.queue_size"]))
        assert model.advice(images, int(advised.get("SOLVER.IMS_PER_BATCH", 2**14)), 10**5) == []


def _headless(num_classes: int) -> nn.Module:
    network = small(num_classes=num_classes)
    network.fc = nn.Identity()
    return network

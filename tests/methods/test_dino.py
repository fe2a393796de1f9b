"""DINO against its equations, lightly's loss and head, and the authors' checkpoint layout."""

import argparse
import copy
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from lightly.loss import DINOLoss
from lightly.models.modules import DINOProjectionHead
from torch import nn

from moco_d2.engine.checkpoint import load_method
from moco_d2.layers.ema import cosine_momentum
from moco_d2.layers.losses import cross_view_entropy
from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.vit import build_vit
from moco_d2.methods import DINO, build_method
from moco_d2.methods.dino import Head
from tests.methods.small_methods import ROUNDING, VIT, Tiny, build, make_views, train_tiny
from tests.methods.test_contract import optimizer, train


def test_steps_follow_algorithm_1() -> None:
    model = build("DINO")
    centre = torch.zeros(24).double()
    for step in range(3):
        views = make_views("DINO", step)
        model.before_step(step / 4, step / 2)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            t = twin.teacher.head(twin.teacher.backbone(torch.cat(views.images[:2]))).view(2, 8, 24)
            maps = [twin.student.backbone(torch.cat(list(pair))) for pair in (views.images[:2], views.images[2:])]
            s = twin.student.head(torch.cat(maps)).view(4, 8, 24)
            tau, pairs = 0.04 + 0.03 * (step // 2) / 2, []
            for i in range(2):
                for v in range(4):
                    if v != i:
                        q, p = ((t[i] - centre) / tau).softmax(1), (s[v] / 0.1).softmax(1)
                        pairs.append(-(q * p.log()).sum(1).mean())
            centre = 0.9 * centre + 0.1 * t.mean((0, 1))
        (loss,) = model(views).values()
        torch.testing.assert_close(loss.detach(), torch.stack(pairs).mean(), rtol=1e-10, atol=0)
        torch.testing.assert_close(model.centre, centre, rtol=1e-10, atol=1e-14)
        loss.backward()
        with torch.no_grad():
            for p in model.student.parameters():
                p.add_(0.01 * torch.randn_like(p))
        old = [p.clone() for p in model.teacher.parameters()]
        model.after_step()
        m = cosine_momentum(0.9, step / 4)
        for new, was, student in zip(model.teacher.parameters(), old, model.student.parameters(), strict=True):
            torch.testing.assert_close(new, m * was + (1 - m) * student, rtol=1e-12, atol=1e-14)
            assert new.grad is None


def test_the_loss_its_gradient_and_the_centre_are_lightlys() -> None:
    torch.manual_seed(0)
    model = build("DINO", teacher_temperature=0.04)
    theirs = DINOLoss(output_dim=24, warmup_teacher_temp_epochs=3).double()
    for _ in range(3):
        teacher = torch.randn(2, 16, 24).double()
        student = torch.randn(5, 16, 24).double().requires_grad_()
        loss = cross_view_entropy(((teacher - model.centre) / 0.04).softmax(2), student, 0.1)
        expected = theirs(list(teacher), list(student), epoch=0)
        torch.testing.assert_close(loss, expected, rtol=1e-7, atol=0)  # their temperature is float32
        ((got,), (wanted,)) = (torch.autograd.grad(one, student) for one in (loss, expected))
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-10)
        model._move_centre(teacher)
        torch.testing.assert_close(model.centre, theirs.center.flatten(), rtol=1e-12, atol=1e-15)


def test_closed_forms() -> None:
    for outputs, expected in ((65536, 11.09035), (60000, 11.00210)):
        equal = torch.zeros(3, 2, outputs, dtype=torch.float64)
        assert cross_view_entropy(equal[:2].softmax(2), equal, 0.1).item() == pytest.approx(expected, abs=1e-5)
    model, t = build("DINO"), torch.randn(24).double()
    for s in range(1, 4):
        model._move_centre(t.expand(2, 8, 24))
        torch.testing.assert_close(model.centre, (1 - 0.9**s) * t)


def test_the_teachers_temperature_rises_per_epoch_along_a_line() -> None:
    model = build("DINO", temperature_epochs=5)
    for epoch, expected in enumerate([*torch.linspace(0.04, 0.07, 5).tolist(), 0.07, 0.07]):
        for part in (0.0, 0.9):
            model.before_step(0.0, epoch + part)
            assert model.temperature() == pytest.approx(expected, rel=1e-6)
    model = build("DINO", temperature_epochs=0)
    assert model.temperature() == 0.07


def test_the_last_layer_is_frozen_at_first_and_its_rows_keep_norm_one() -> None:
    model = build("DINO")
    for epoch, frozen in ((0.0, True), (0.5, False)):
        model.zero_grad()
        model.before_step(0.0, epoch)
        sum(model(make_views("DINO", 0)).values()).backward()
        model.after_backward()
        assert (model.student.head.last_layer.weight_v.grad is None) == frozen
        assert model.student.head.mlp[0].weight.grad is not None
    assert not model.student.head.last_layer.weight_g.requires_grad
    assert build("DINO", norm_last_layer=False).student.head.last_layer.weight_g.requires_grad


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_head_is_lightlys() -> None:
    torch.manual_seed(0)
    ours, theirs = Head((12, 10, 10, 6), 20, norm=False, unit=True), DINOProjectionHead(12, 10, 6, 20)
    state = {key.replace("mlp.", "layers."): value for key, value in ours.state_dict().items()}
    theirs.load_state_dict(state)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.2) and ours.mlp[0].bias.abs().sum() == 0
    assert [type(layer).__name__ for layer in Head((12, 10, 10, 6), 20, norm=True, unit=True).mlp] == [
        "Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear",
    ]  # fmt: skip


def test_six_steps_end_where_they_did() -> None:
    model = build("DINO")
    losses = train(model, optimizer(model), range(6), "DINO")
    expected = [
        5.719181533975591,
        0.7034407132685675,
        0.20350997807764334,
        0.4318576528322072,
        0.7407560241418566,
        0.9300415212939214,
    ]
    assert losses == pytest.approx(expected, rel=ROUNDING)


def official(norm: bool, hidden: int) -> dict[str, torch.Tensor]:
    """Return a network's state under the names of main_dino.py, at an eighth of the width."""
    backbone = build_resnet("resnet50", width=0.125)
    backbone.fc = nn.Identity()
    sizes = (256, hidden, hidden, 16) if norm else (256, hidden, 16)
    head = {f"mlp.{key}": value for key, value in Head(sizes, 40, norm, True).mlp.state_dict().items()}
    last = torch.randn(40, 16)
    head |= (
        {"last_layer.weight_v": last, "last_layer.weight_g": torch.ones(40, 1)} if norm else {"last_layer.weight": last}
    )
    parts = {"backbone": backbone.state_dict(), "head": head}
    return {f"module.{name}.{key}": value for name, part in parts.items() for key, value in part.items()}


@pytest.mark.parametrize("norm", [True, False], ids=["code", "released"])
def test_the_authors_training_checkpoint_continues_here(norm: bool, tmp_path: Path) -> None:
    """The released ResNet-50 has a head of two layers without norms, another one than the code's."""
    torch.manual_seed(3)
    teacher, student = official(norm, 24), official(norm, 24)
    centre = torch.randn(1, 40)
    content = {
        "student": student, "teacher": teacher, "dino_loss": {"center": centre}, "epoch": 5,
        "optimizer": {"state": {0: {"mu": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        "fp16_scaler": {"scale": 2.0},
    }  # fmt: skip
    torch.save(content, tmp_path / "checkpoint.pth")
    encoder = functools.partial(build_resnet, "resnet50", width=0.125)
    args = {"outputs": 40, "hidden": 24, "bottleneck": 16, "layers": 3 if norm else 2, "head_norm": norm}
    model = build_method("DINO", encoder, args)
    load_method(model, str(tmp_path / "checkpoint.pth"))
    assert torch.equal(model.centre, centre[0])
    for network, state in ((model.student, student), (model.teacher, teacher)):
        assert torch.equal(network.backbone.conv1.weight, state["module.backbone.conv1.weight"])
        z = F.normalize(torch.randn(3, 16), dim=1)
        rows = state[f"module.head.last_layer.weight{'_v' * norm}"]
        rows = F.normalize(rows, dim=1) if norm else rows
        torch.testing.assert_close(network.head.last_layer(z), z @ rows.T)
    assert model.adapt_state_dict(model.state_dict()).keys() == model.state_dict().keys(), "ours passes unchanged"


def test_a_vits_training_checkpoint_continues_here_and_only_the_student_drops_paths(tmp_path: Path) -> None:
    """Without batch norm the authors' teacher is not wrapped, so that its names lack ``module.``."""
    encoder = functools.partial(build_vit, **VIT, init="dino", drop_path=0.2)
    args = {"outputs": 40, "hidden": 24, "bottleneck": 16, "head_norm": False}
    source, model = (build_method("DINO", encoder, args) for _ in range(2))
    student = {f"module.{key}": value for key, value in source.student.state_dict().items()}
    teacher = {key: value + 1 for key, value in source.teacher.state_dict().items()}
    names = {f"module.head.{key}" for key in ("mlp.4.bias", "last_layer.weight_g", "last_layer.weight_v")}
    names |= {"module.backbone.cls_token", "module.backbone.blocks.1.attn.qkv.bias", "module.backbone.norm.weight"}
    assert names < set(student) and "backbone.pos_embed" in teacher
    content = {"student": student, "teacher": teacher, "dino_loss": {"center": torch.ones(1, 40)}, "epoch": 5}
    torch.save(content, tmp_path / "checkpoint.pth")
    load_method(model, str(tmp_path / "checkpoint.pth"))
    for network, state in ((model.student, source.student.state_dict()), (model.teacher, teacher)):
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    rates = [
        [getattr(block.drop_path1, "drop_prob", 0.0) for block in network.backbone.blocks]
        for network in (model.student, model.teacher)
    ]
    assert rates == [pytest.approx([0.0, 0.2]), [0.0, 0.0]]
    x = [torch.randn(8, 3, 32, 32)] * 2
    with torch.no_grad():
        (s1, s2), (t1, t2) = ([network(x) for _ in range(2)] for network in (model.student, model.teacher))
    assert torch.equal(t1, t2) and not torch.equal(s1, s2)


def test_a_checkpoint_with_the_authors_arguments_is_refused_with_a_command_that_extracts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("DINO").float()
    parts = {"student": model.student.state_dict(), "teacher": model.teacher.state_dict()}
    content = {**parts, "dino_loss": {"center": model.centre[None] + 1}, "args": argparse.Namespace(lr=0.1)}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(ValueError, match="refers to Python code") as refused:
        load_method(model, str(path))
    words = shlex.split(re.search(r"`(python -c .*?)`", str(refused.value), re.DOTALL).group(1))
    exec(words[2], {})
    (extracted,) = set(tmp_path.iterdir()) - {path}
    load_method(model, str(extracted))
    assert torch.equal(model.centre, torch.ones(24))


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("layers", 0, "at least 1"), ("first_temperature", 0.0, "positive"), ("freeze", -1.0, "0 or more"),
        ("momentum", 1.5, r"in \[0, 1\]"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_named(argument: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"SSL\.ARGS\.{argument} is {value}; it must be {words}"):
        build("DINO", **{argument: value})


def test_a_run_too_short_for_the_teacher_is_told() -> None:
    (advice,) = build("DINO", momentum=0.996).advice(1000, 8, 100)
    assert "after 100 steps 82% of the teacher" in advice
    assert build("DINO", momentum=0.996).advice(1000, 8, 1000) == []


def test_without_centring_it_collapses_and_the_diagnostics_show_it() -> None:
    found = {}
    for momentum in (0.9, 1.0):  # with 1 the centre stays 0
        torch.manual_seed(0)
        args = {"layers": 2, "head_norm": False, "teacher_temperature": 0.04, "temperature_epochs": 0, "momentum": 0.9}
        model = DINO(Tiny, outputs=16, hidden=32, bottleneck=16, centre_momentum=momentum, **args)
        train_tiny(model, 120)
        found[momentum] = {key: value.item() for key, value in model.recorded.items()}
    low = {one.key: one.collapsed_below for one in model.diagnostics()}["teacher_information"]
    assert found[0.9]["teacher_information"] > 20 * low and found[0.9]["teacher_entropy"] > 1
    assert found[1.0]["teacher_information"] < low and found[1.0]["teacher_entropy"] < 0.01, "one output for all"

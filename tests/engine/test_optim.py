"""Optimizers against written-out references, schedules against closed forms, and groups of parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.solver.build import maybe_add_gradient_clipping
from torch import nn

from moco_d2.config import load_cfg
from moco_d2.engine.optim import (
    IMPLIED,
    OPTIMIZERS,
    OptimizerKind,
    ScheduledOptimizer,
    build_clipper,
    build_optimizer,
    scaled_lr,
    trajectory,
)
from moco_d2.engine.preflight import config_problems
from moco_d2.engine.schedules import SCHEDULES, lr_factor, weight_decay
from moco_d2.layers.lars import FORMS, Lars
from moco_d2.layers.views import Views
from moco_d2.methods import SSLMethod
from moco_d2.running.checkpoints import changed_settings

Update = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], tuple[torch.Tensor, torch.Tensor]]
DECAY, MOMENTUM, TRUST = 0.01, 0.9, 0.001


def lars(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """MoCo v3's and Barlow Twins' form: the scaled update enters the momentum, the lr is applied afterwards."""
    u = g + DECAY * p
    q = TRUST * p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
    v = MOMENTUM * v + q * u
    return p - lr * v, v


def lars_classic(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SimCLR's form: the lr of each step enters the momentum."""
    u = g + DECAY * p
    q = TRUST * p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1.0
    v = MOMENTUM * v + lr * q * u
    return p - v, v


def larc(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """SwAV's form: the norms are summed, and the changed gradient goes through plain SGD."""
    if p.norm() > 0 and g.norm() > 0:
        g = (g + DECAY * p) * TRUST * p.norm() / (g.norm() + DECAY * p.norm() + 1e-8)
    v = MOMENTUM * v + g
    return p - lr * v, v


def sgd(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    v = MOMENTUM * v + g + DECAY * p
    return p - lr * v, v


def nesterov(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    v = MOMENTUM * v + g + DECAY * p
    return p - lr * (g + DECAY * p + MOMENTUM * v), v


def adamw(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, lr: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Its state is the first moment, the second, and the number of steps, stacked."""
    first, second, steps = 0.9 * v[0] + 0.1 * g, 0.999 * v[1] + 0.001 * g * g, v[2] + 1
    p = p - lr * DECAY * p  # decoupled from the gradient
    p = p - lr * (first / (1 - 0.9**steps)) / ((second / (1 - 0.999**steps)).sqrt() + 1e-8)
    return p, torch.stack([first, second, steps])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("update", [sgd, nesterov, adamw])
def test_sgd_and_adamw_are_their_equations_with_a_kernel_or_without(update: Update, fused: bool) -> None:
    name = "adamw" if update is adamw else "sgd"
    cfg = config("SOLVER.OPTIMIZER", name, "SOLVER.NESTEROV", update is nesterov, "SOLVER.WEIGHT_DECAY", DECAY,
                 "SOLVER.BASE_LR", 0.05, "ENGINE.FUSED_SGD", fused)  # fmt: skip
    torch.manual_seed(0)
    optimizer = build_optimizer(cfg, Net().double())
    assert all(group["fused"] == (fused or None) for group in optimizer.param_groups)
    groups = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    weights = [p.detach().clone() for p, _ in groups]
    states = [torch.zeros(3, *w.shape).double() if update is adamw else torch.zeros_like(w) for w in weights]
    for step in range(4):
        for i, (parameter, group) in enumerate(groups):
            group["lr"] = 0.05 / (1 + step)
            parameter.grad = torch.randn_like(weights[i])
            weights[i], states[i] = update(weights[i], parameter.grad, states[i], group["lr"])
        optimizer.step()
        for (parameter, _), expected in zip(groups, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("foreach", [True, False])  # as on a GPU, as on a CPU
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("update", [lars, lars_classic, larc])
def test_each_form_of_lars_is_its_published_update(
    update: Update, fused: bool, foreach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moco_d2.layers.lars.BLOCK", 20)  # the fourth: 20, 20 and 2 numbers
    torch.manual_seed(0)
    weights = [torch.randn(3, 4), torch.zeros(5), torch.tensor(2.0), torch.randn(7, 6), torch.randn(5, 3, 2, 2)]
    weights = [w.double() for w in weights]
    weights[-1] = weights[-1].to(memory_format=torch.channels_last)
    parameters = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Lars(parameters, 0.5, MOMENTUM, DECAY, TRUST, update.__name__, fused, foreach)
    velocities = [torch.zeros_like(w) for w in weights]
    for step in range(6):
        lr = 0.5 if step < 3 else 0.05  # the forms differ once it changes
        optimizer.param_groups[0]["lr"] = lr
        for i, parameter in enumerate(parameters):
            gradient = torch.randn_like(weights[i]) * (step != 1)  # a gradient of zero, too
            parameter.grad = gradient.clone()
            weights[i], velocities[i] = update(weights[i], gradient, velocities[i], lr)
        optimizer.step()
        for parameter, expected in zip(parameters, weights, strict=True):
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_without_momentum_lars_takes_the_first_step_of_any_momentum(form: str, foreach: bool) -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(2, 4, 5).double()
    found = []
    for momentum in (0.0, 0.9):
        found.append(nn.Parameter(start.clone()))
        found[-1].grad = gradient.clone()
        Lars([found[-1]], 0.3, momentum, DECAY, form=form, foreach=foreach).step()
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    assert not torch.equal(found[0], start)


def test_the_first_step_of_lars_moves_a_weight_by_lr_times_trust_times_its_norm() -> None:
    torch.manual_seed(0)
    for scale in (1.0, 100.0):  # whatever the size of the gradient
        parameter = nn.Parameter(torch.randn(4, 5).double())
        before = parameter.detach().clone()
        parameter.grad = scale * torch.randn(4, 5).double()
        Lars([parameter], 0.3, 0.9, 0.0).step()
        moved = (parameter.detach() - before).norm()
        assert moved.item() == pytest.approx(0.3 * 0.001 * before.norm().item(), rel=1e-12)


class Net(SSLMethod):
    """A method with a layer, a norm, and a predictor of constant lr."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 3, bias=False), nn.BatchNorm1d(3))
        self.predictor = nn.Linear(3, 2)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        return {"loss": self.predictor(self.body(views.images[0])).square().mean()}

    def backbone(self) -> nn.Module:
        return self.body

    def param_groups(self) -> list[dict[str, object]]:
        return [
            {"params": self.body.parameters()},
            {"params": self.predictor.parameters(), "constant_lr": True, "lr_factor": 10.0},
        ]


def config(*opts: object) -> CfgNode:
    words = ["SOLVER.EPOCHS", 10, "SOLVER.BASE_LR", 0.4, "SOLVER.WEIGHT_DECAY", 0.1, "SEED", 0, *opts]
    return load_cfg("Pretrain/moco_v2_R50_200ep", [str(word) for word in words])


def test_groups_have_the_rates_and_decays_that_method_and_config_ask_for() -> None:
    cfg = config("SOLVER.OPTIMIZER", "lars", "SOLVER.EXCLUDE_1D", True, "SOLVER.LR_FACTOR_1D", 0.5)
    method = Net()
    optimizer = build_optimizer(cfg, method)
    shown = [
        (len(group["params"]), group["lr"], group["weight_decay"], group["adapt"], group.get("constant_lr", False))
        for group in optimizer.param_groups
    ]
    assert shown == [
        (1, 0.4, 0.1, True, False),
        (2, 0.2, 0.0, False, False),
        (1, 4.0, 0.1, True, True),
        (1, 2.0, 0.0, False, True),
    ]
    scheduler = ScheduledOptimizer(cfg, optimizer, steps_per_epoch=5)
    for _ in range(25):
        optimizer.step()
        scheduler.step()
    half = [group["lr"] for group in optimizer.param_groups]
    assert half == pytest.approx([0.2, 0.1, 4.0, 2.0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_learn_and_resume(name: str) -> None:
    cfg = config("SOLVER.OPTIMIZER", name, "SOLVER.TRUST", 0.1, "SOLVER.BASE_LR", 0.002)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))

    def run(steps: int, method: Net, optimizer: torch.optim.Optimizer) -> float:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = method(Views([x], torch.arange(16), torch.zeros(1, 16, 4)))["loss"]
            loss.backward()
            optimizer.step()
        return loss.item()

    torch.manual_seed(0)
    first = Net()
    optimizer = build_optimizer(cfg, first)
    start = run(1, first, optimizer)
    run(4, first, optimizer)
    torch.manual_seed(1)
    second = Net()
    second.load_state_dict(first.state_dict())
    resumed = build_optimizer(cfg, second)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["fused"]  # LARS had none
    resumed.load_state_dict(saved)
    assert run(5, first, optimizer) == run(5, second, resumed) < start


def test_a_third_party_adds_an_optimizer_and_a_schedule_from_its_own_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(groups: list[dict[str, object]], cfg: CfgNode) -> torch.optim.Optimizer:
        return torch.optim.RMSprop(groups, lr=scaled_lr(cfg), momentum=cfg.SOLVER.MOMENTUM)

    monkeypatch.setitem(OPTIMIZERS, "rmsprop", OptimizerKind(build, ("MOMENTUM",)))
    monkeypatch.setitem(SCHEDULES, "linear", (lambda t, length, solver: 1 - t / length, ()))
    cfg = config("SOLVER.OPTIMIZER", "rmsprop", "SOLVER.SCHEDULE", "linear", "SOLVER.WARMUP", 2)
    assert config_problems(cfg, 1) == []
    optimizer = build_optimizer(cfg, Net())
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.4, 0.1), (4.0, 0.1)]
    assert [lr_factor(cfg, 4 * epoch, 4) for epoch in (1, 2, 6)] == [0.5, 1, 0.5], "behind the warm-up"
    assert changed_settings(trajectory(cfg), trajectory(config())).keys() >= {"SOLVER.OPTIMIZER", "SOLVER.SCHEDULE"}


@pytest.mark.parametrize(("kind", "expected"), [("norm", 0.5), ("value", None)])
def test_gradients_are_clipped_as_by_detectron2(kind: str, expected: float | None) -> None:
    keys = {"ENABLED": True, "CLIP_TYPE": kind, "CLIP_VALUE": 0.5}
    cfg = config(*(word for key, value in keys.items() for word in (f"SOLVER.CLIP_GRADIENTS.{key}", value)))
    ours, theirs = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.zeros(3, 4))
    gradient = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)) * 3
    ours.grad, theirs.grad = gradient.clone(), gradient.clone()
    clip = build_clipper(cfg)
    assert clip is not None
    clip(ours)
    maybe_add_gradient_clipping(cfg, torch.optim.SGD([theirs], 0.1)).step()
    assert torch.equal(ours.grad, theirs.grad) and not torch.equal(ours.grad, gradient)
    assert expected is None or ours.grad.norm().item() == pytest.approx(expected, rel=1e-4)


def test_schedules_follow_their_closed_forms() -> None:
    cfg = config(
        "SOLVER.WARMUP", 2, "SOLVER.WARMUP_FROM", 0.25, "SOLVER.LR_EVERY", "iteration", "SOLVER.END_FACTOR", 0.1
    )
    factors = [lr_factor(cfg, iteration, 4) for iteration in range(40)]
    assert factors[:8] == pytest.approx([0.25 + 0.75 * i / 8 for i in range(8)])
    assert factors[8] == 1 and factors[8:] == sorted(factors[8:], reverse=True)
    assert factors[24] == pytest.approx(0.55), "the middle of what follows the warm-up"
    assert factors[39] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 31 / 32)))
    cfg.SOLVER.SCHEDULE, cfg.SOLVER.STEPS, cfg.SOLVER.LR_EVERY = "step", (3, 6), "epoch"
    assert [lr_factor(cfg, 4 * epoch, 4) for epoch in range(2, 10)] == pytest.approx([1, 0.1, 0.1, 0.1] + [0.01] * 4)
    cfg.SOLVER.SCHEDULE = "constant"
    assert {lr_factor(cfg, iteration, 4) for iteration in range(8, 40)} == {1}
    cfg = config("SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", 40)
    assert [lr_factor(cfg, iteration, 4) for iteration in (0, 20)] == pytest.approx([1, 0.5]), "without epochs"


def test_weight_decay_follows_its_cosine_and_excluded_groups_keep_none() -> None:
    cfg = config("SOLVER.WEIGHT_DECAY", 0.04, "SOLVER.WEIGHT_DECAY_END", 0.4, "SOLVER.EXCLUDE_1D", True)
    assert [weight_decay(cfg, p) for p in (0, 0.5, 1)] == pytest.approx([0.04, 0.22, 0.4])
    optimizer = build_optimizer(cfg, Net())
    scheduler = ScheduledOptimizer(cfg, optimizer, steps_per_epoch=2)
    for _ in range(10):
        optimizer.step()
        scheduler.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == pytest.approx([0.22, 0, 0.22, 0])


def test_the_square_root_rule() -> None:
    cfg = config("SOLVER.REFERENCE_BATCH", 1, "SOLVER.LR_RULE", "sqrt", "SOLVER.BASE_LR", 0.075)
    assert scaled_lr(cfg) == pytest.approx(0.075 * 16)


def test_settings_out_of_range_are_named() -> None:
    cfg = config("SOLVER.OPTIMIZER", "larz", "SOLVER.WARMUP", 10, "SOLVER.LR_FACTOR_1D", 0.5, "SOLVER.WARMUP_FROM", 2,
                 "SOLVER.END_FACTOR", -1, "SOLVER.LR_EVERY", "week", "SOLVER.TRUST", 0)  # fmt: skip
    text = "\n".join(config_problems(cfg, 1))
    for part in ("'larz'", "WARMUP is 10", "LR_FACTOR_1D is 0.5", "WARMUP_FROM is 2", "END_FACTOR", "'week'", "TRUST"):
        assert part in text


def test_a_run_of_an_earlier_version_resumes_and_another_optimizer_is_noticed() -> None:
    cfg = config()
    recorded = (
        "BASE_LR",
        "REFERENCE_BATCH",
        "MOMENTUM",
        "NESTEROV",
        "WEIGHT_DECAY",
        "EPOCHS",
        "SCHEDULE",
        "FIRST_EPOCH",
    )
    then = IMPLIED | {key: value for key, value in trajectory(cfg).items() if key.removeprefix("SOLVER.") in recorded}
    assert not changed_settings(then, trajectory(cfg))
    assert changed_settings(then, trajectory(config("SOLVER.OPTIMIZER", "lars")))
    assert changed_settings(then, trajectory(config("SOLVER.WARMUP", 1)))

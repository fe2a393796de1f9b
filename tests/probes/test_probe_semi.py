"""Fine-tuning on few labels: published protocols, a plain loop, a kill, two processes, and the command."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from labelled_pictures import WORDS, config, grow
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from moco_d2.commands import probe
from moco_d2.data import EpochSampler, SkipLog, ViewDataset, ViewLoader, build_backend
from moco_d2.data.labelled import open_pair
from moco_d2.data.labelled_loader import LabelledLoader, LabelledSource, crop_and_flip
from moco_d2.layers.features import extract
from moco_d2.probes.backbone import load_backbone
from moco_d2.probes.linear import LinearTrainer, probe_linear
from moco_d2.probes.protocols import PROTOCOLS, SEMI_PROTOCOLS, LinearProtocol, changed
from tests.two_processes import in_two_processes

# name: percent, lrs of classifier and backbone, those of epoch 10 and of epoch 16 / the first ones
PUBLISHED = {
    "swav_1": (1, 5.0, 0.02, 1.0, 0.04),
    "swav_10": (10, 0.2, 0.01, 1.0, 0.04),
    "barlow_twins_1": (1, 0.5, 0.002, 1.0, 0.04),
    "barlow_twins_10": (10, 0.5, 0.002, 1.0, 0.04),
    "vicreg_1": (1, 0.08, 0.03, 0.5, 0.0954915),
    "vicreg_10": (10, 0.1, 0.01, 0.5, 0.0954915),
}


def test_protocols_are_as_published() -> None:
    assert tuple(SEMI_PROTOCOLS) == tuple(PUBLISHED) == probe._SEMI_PROTOCOLS and not {*PUBLISHED} & {*PROTOCOLS}
    for name, (percent, lr, backbone_lr, middle, late) in PUBLISHED.items():
        one = SEMI_PROTOCOLS[name]
        assert (one.optimizer, one.batch, one.epochs, one.weight_decay, one.size) == ("sgd", 256, 20, 0, 224)
        assert (one.percent, one.default_init, one.bicubic) == (percent, name.startswith("swav"), False)
        for epoch, part in ((0, 1.0), (10, middle), (16, late)):
            assert one.lrs_at(epoch) == pytest.approx((part * lr, part * backbone_lr))
    protocol, name, changes = changed("swav_1", batch=128, backbone_lr=0.1, percent=12.5)
    assert name == "swav_1 (modified)" and protocol.lrs_at(12) == pytest.approx((0.5, 0.01))
    assert changes == [
        "batch 128 instead of 256", "backbone_lr 0.1 instead of 0.02", "percent 12.5 instead of 1"
    ]  # fmt: skip
    with pytest.raises(ValueError, match="--backbone-lr is 0; it must be positive"):
        changed("swav_1", backbone_lr=0)


SHORT = LinearProtocol(1.0, 16, 3, (1, 2), decay=0.2, backbone_lr=0.2, size=24, default_init=True)


def run(data: Path, output: Path, resume: bool = False) -> dict[str, Any]:
    """Fine-tune a random backbone, as the command does after its set-up."""
    output.mkdir(exist_ok=True)
    cfg = config(output)
    return probe_linear(
        load_backbone("random", cfg), *open_pair(str(data), str(data)), cfg, SHORT, "test", resume=resume
    )


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(output / "model_final.pth")["model"]
    return found


def test_a_plain_loop_ends_with_the_same_weights(tmp_path: Path) -> None:
    data, cfg = grow(tmp_path / "pictures", noise=200), config(tmp_path)
    content = run(data, tmp_path / "out")
    backbone, (train, val) = load_backbone("random", cfg), open_pair(str(data), str(data))
    torch.manual_seed(cfg.SEED)
    network = nn.Sequential(backbone.network.requires_grad_(True), nn.Linear(64, 3)).train()
    optimizer = torch.optim.SGD([
        {"params": network[0].parameters(), "lr": 0.2 / 16}, {"params": network[1].parameters(), "lr": 1 / 16}
    ], momentum=0.9)  # fmt: skip
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.2)
    source = LabelledSource(train)
    backend = build_backend(cfg.DATA.BACKEND, torch.device("cpu"))
    dataset = ViewDataset(source, crop_and_flip(24, backbone.facts.pixels), cfg.SEED, backend)
    loader = ViewLoader(dataset, EpochSampler(48, 16, cfg.SEED), 0, torch.device("cpu"), SkipLog())
    for step, views in zip(range(9), loader, strict=False):
        optimizer.zero_grad()
        F.cross_entropy(network(views.images[0]), train.labels[views.index]).backward()
        optimizer.step()
        if step % 3 == 2:
            schedule.step()
            tested, wanted = extract(network, LabelledLoader(val, backbone.facts.pixels, 24), 99)
            top1 = (tested.argmax(dim=1) == wanted).double().mean().item() * 100
            assert content["by_epoch"][step // 3]["top1"] == pytest.approx(top1)
    found = weights(tmp_path / "out")
    assert content["probe"] == "semi" and content["backbone_lr"] == pytest.approx(0.2 / 16)
    for name, value in network.state_dict().items():
        ours = found[name.replace("0.", "backbone.", 1) if name.startswith("0.") else name.replace("1.", "classifier.")]
        torch.testing.assert_close(ours, value, rtol=1e-4, atol=1e-5)
    first = load_backbone("random", cfg).network.state_dict()
    assert not torch.allclose(found["backbone.conv1.weight"], first["conv1.weight"], atol=1e-4), "it was trained"


def killed(data: Path, output: Path) -> None:
    step = LinearTrainer.run_step

    def run_step(self: LinearTrainer) -> None:
        if self.iter == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        step(self)

    LinearTrainer.run_step = run_step  # type: ignore[method-assign]
    run(data, output)


def test_a_killed_probe_ends_as_one_that_was_not(tmp_path: Path) -> None:
    data = grow(tmp_path / "pictures", noise=200)
    whole = run(data, tmp_path / "whole")
    process = multiprocessing.get_context("fork").Process(target=killed, args=(data, tmp_path / "cut"))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and (tmp_path / "cut/model_0000002.pth").is_file()
    again = run(data, tmp_path / "cut", resume=True)
    assert again["by_epoch"] == whole["by_epoch"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)


def run_in_double(data: Path, output: Path) -> None:
    """Fine-tune in float64: batch norms of few values amplify the rounding of float32 from step to step."""
    torch.set_default_dtype(torch.float64)
    hook = register_module_forward_pre_hook(lambda module, inputs: tuple(x.double() for x in inputs))
    try:
        run(data, output)
    finally:
        hook.remove()
        torch.set_default_dtype(torch.float32)


def both(folder: Path) -> None:
    run_in_double(folder / "pictures", folder / "two")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_are_one(tmp_path: Path) -> None:
    run_in_double(grow(tmp_path / "pictures", noise=200), tmp_path / "one")
    in_two_processes(both, tmp_path)
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=1e-7, atol=1e-9)


def command(data: Path, output: Path, *words: str) -> dict[str, Any]:
    with pytest.raises(SystemExit) as ended:
        probe.main(["semi", "--protocol", "swav_10", "--weights", "random", "--data", str(data), "--size", "24",
                    "--batch", "6", "--epochs", "1", *words, *WORDS, "OUTPUT_DIR", str(output)])  # fmt: skip
    assert not ended.value.code
    found: dict[str, Any] = json.loads((output / "probe.json").read_text())
    return found


def test_a_draw_and_its_list_are_the_same_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, names = grow(tmp_path / "pictures", train=21), tmp_path / "names.txt"
    drawn = command(data, tmp_path / "drawn", "--percent", "10", "--write-list", str(names))
    assert drawn["labels"] == {"drawn percent": 10.0, "seed": 3, "pictures": 6} and drawn["train"]["pictures"] == 6
    assert [line.split("/")[0] for line in names.read_text().split()] == ["blue"] * 2 + ["green"] * 2 + ["red"] * 2
    listed = command(data, tmp_path / "listed", "--list", str(names))
    assert listed["by_epoch"] == drawn["by_epoch"] and len(listed["labels"]["sha256"]) == 64
    assert listed["protocol"] == "swav_10 (modified)" and listed["lr"] == pytest.approx(0.2 * 6 / 256)
    assert not any("percent" in change for change in listed["changes"]), "9.5 % are the protocol's 10"
    half = command(data, tmp_path / "half", "--percent", "50")
    assert "percent 47.62 instead of 10" in half["changes"]
    capsys.readouterr()
    names.write_text("red/99.png\n")
    with pytest.raises(SystemExit) as ended:
        probe.main(["semi", "--protocol", "swav_10", "--weights", "random", "--data", str(data), "--list", str(names),
                    *WORDS, "OUTPUT_DIR", str(tmp_path / "refused")])  # fmt: skip
    assert ended.value.code == 2 and "names 1 pictures that are not in" in capsys.readouterr().err

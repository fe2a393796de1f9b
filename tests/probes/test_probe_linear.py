"""Linear classifiers: published protocols, a plain loop, resuming, two processes, and an unchanged backbone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.utils import comm
from labelled_pictures import WORDS, config, grow
from torch import nn

from moco_d2.commands import probe
from moco_d2.data.labelled import open_pair
from moco_d2.data.labelled_loader import LabelledLoader
from moco_d2.layers.features import extract
from moco_d2.probes.backbone import load_backbone
from moco_d2.probes.linear import LinearTrainer, probe_linear
from moco_d2.probes.protocols import PROTOCOLS, LinearProtocol, changed
from moco_d2.running import preemption
from moco_d2.seeding import stream_seed
from tests.two_processes import in_two_processes

# name: optimizer, first lr, batch, epochs, weight decay, lr of the middle epoch / first lr
PUBLISHED = {
    "moco": ("sgd", 30.0, 256, 100, 0.0, 1.0),
    "moco_v3": ("sgd", 0.4, 1024, 90, 0.0, 0.5),
    "moco_v3_vit": ("sgd", 12.0, 1024, 90, 0.0, 0.5),
    "simsiam": ("larc", 1.6, 4096, 90, 0.0, 0.5),
    "swav": ("sgd", 0.3, 256, 100, 1e-6, 0.5),
    "barlow_twins": ("sgd", 0.3, 256, 100, 1e-6, 0.5),
    "dino": ("sgd", 0.004, 1024, 100, 0.0, 0.5),
    "dino_vit_s": ("sgd", 0.004, 1024, 100, 0.0, 0.5),
    "moco_cached": ("sgd", 30.0, 256, 100, 0.0, 1.0),
}


def test_protocols_are_as_published() -> None:
    assert tuple(PROTOCOLS) == tuple(PUBLISHED) == probe._PROTOCOLS
    for name, (optimizer, lr, batch, epochs, decay, middle) in PUBLISHED.items():
        one = PROTOCOLS[name]
        assert (one.optimizer, one.batch, one.epochs, one.weight_decay) == (optimizer, batch, epochs, decay)
        assert one.lrs_at(0) == pytest.approx((lr, 0)) and one.lrs_at(epochs // 2)[0] == pytest.approx(middle * lr)
        assert (one.size, one.bicubic, one.cached) == (224, name.startswith("dino"), name == "moco_cached")
        assert one.blocks == (4 if name == "dino_vit_s" else 0)
    moco = PROTOCOLS["moco"]
    assert [moco.lrs_at(epoch)[0] for epoch in (59, 60, 79, 80, 99)] == pytest.approx([30, 3, 3, 0.3, 0.3])


def test_a_changed_protocol_is_called_modified() -> None:
    assert changed("moco", batch=256, epochs=None) == (PROTOCOLS["moco"], "moco", [])
    protocol, name, changes = changed("moco", batch=64, epochs=10)
    assert (name, protocol.scaled_lr, protocol.milestones) == ("moco (modified)", 7.5, (6, 8))
    assert changes == ["batch 64 instead of 256", "epochs 10 instead of 100", "milestones (6, 8) instead of (60, 80)"]
    with pytest.raises(ValueError, match="--epochs is 0; it must be positive"):
        changed("moco", epochs=0)


SHORT = LinearProtocol(30.0, 16, 4, (2, 3), size=24)
CACHED = LinearProtocol(30.0, 16, 4, (2, 3), size=24, cached=True)


def run(
    data: Path, output: Path, protocol: LinearProtocol = SHORT, resume: bool = False, **more: Any
) -> dict[str, Any]:
    """Probe a random backbone, as the command does after its set-up."""
    output.mkdir(exist_ok=True)
    cfg = config(output)
    train, val = open_pair(str(data), str(data))
    return probe_linear(load_backbone("random", cfg), train, val, cfg, protocol, "test", resume=resume, **more)


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(output / "model_final.pth")["model"]
    return found


def test_cached_features_and_a_plain_loop_end_with_the_same_weights(tmp_path: Path) -> None:
    data = grow(tmp_path / "pictures")
    content = run(data, tmp_path / "out", CACHED)
    cfg = config(tmp_path)
    backbone, (train, val) = load_backbone("random", cfg), open_pair(str(data), str(data))
    features, labels = extract(backbone.network, LabelledLoader(train, backbone.facts.pixels, 24), 99)
    tested, wanted = extract(backbone.network, LabelledLoader(val, backbone.facts.pixels, 24), 99)
    torch.manual_seed(cfg.SEED)
    linear = nn.Linear(64, 3)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    optimizer = torch.optim.SGD(linear.parameters(), lr=1.0, momentum=0.9)
    import numpy as np

    for epoch, lr in enumerate((30 / 16, 30 / 16, 3 / 16, 0.3 / 16)):
        order = np.random.default_rng(stream_seed(cfg.SEED, epoch, 0, 0)).permutation(48)
        optimizer.param_groups[0]["lr"] = lr
        for step in range(3):
            rows = torch.from_numpy(order[16 * step : 16 * step + 16])
            optimizer.zero_grad()
            F.cross_entropy(linear(features[rows]), labels[rows]).backward()
            optimizer.step()
        top1 = (linear(tested).argmax(dim=1) == wanted).double().mean().item() * 100
        assert content["by_epoch"][epoch]["top1"] == pytest.approx(top1)
    for name, value in linear.state_dict().items():
        torch.testing.assert_close(weights(tmp_path / "out")[name], value, rtol=1e-4, atol=1e-5)


def test_an_interrupted_probe_ends_as_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = grow(tmp_path / "pictures")
    (data / "train/red/3.png").write_bytes(b"broken")
    whole = run(data, tmp_path / "whole")
    assert whole["results"][1]["top1"] > 50, "it learns"
    assert whole["train"]["unreadable"] == 1 and len((tmp_path / "whole/skipped.jsonl").read_text().splitlines()) == 1
    assert [row["epoch"] for row in whole["by_epoch"]] == [1, 2, 3, 4]
    metrics = [json.loads(line) for line in (tmp_path / "whole/metrics.json").read_text().splitlines()]
    assert "top1" in metrics[-1] and "total_loss" in metrics[-1]
    assert json.loads((tmp_path / "whole/probe.json").read_text()) == whole

    step = LinearTrainer.run_step

    def stopped(self: LinearTrainer) -> None:
        step(self)
        if self.iter == 6:
            monkeypatch.setattr(preemption, "requested", lambda: True)

    monkeypatch.setattr(LinearTrainer, "run_step", stopped)
    with pytest.raises(preemption.Preempted):
        run(data, tmp_path / "cut", resume=True)
    monkeypatch.undo()
    assert not (tmp_path / "cut/model_final.pth").exists()
    assert run(data, tmp_path / "cut", resume=True)["by_epoch"] == whole["by_epoch"]
    first, second = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert run(data, tmp_path / "cut", resume=True)["by_epoch"] == whole["by_epoch"], "a finished run, again"
    with pytest.raises(ValueError, match=r"cannot resume exactly: changes was .* and is"):
        run(data, tmp_path / "cut", resume=True, changes=["lr 3 instead of 30"])


@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 30.0), ("larc", 800.0)])
def test_separable_features_are_separated(optimizer: str, lr: float, tmp_path: Path) -> None:
    protocol = LinearProtocol(lr, 16, 40, optimizer=optimizer, size=24, cached=True)
    assert run(grow(tmp_path / "pictures"), tmp_path / "out", protocol)["results"][1]["top1"] == 100


def test_a_backbone_that_changes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, step = grow(tmp_path / "pictures"), LinearTrainer.run_step
    cfg = config(tmp_path)
    backbone, sets = load_backbone("random", cfg), open_pair(str(data), str(data))

    def trained(self: LinearTrainer) -> None:
        step(self)
        backbone.network.train()  # its norms now learn the statistics of each batch

    monkeypatch.setattr(LinearTrainer, "run_step", trained)
    with pytest.raises(RuntimeError, match=r"the backbone was changed, though it is frozen: bn1\.running_mean"):
        probe_linear(backbone, *sets, cfg, SHORT, "test")


def test_batches_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="48 pictures, fewer than a batch of 256: give a smaller --batch"):
        run(grow(tmp_path / "pictures"), tmp_path / "out", PROTOCOLS["moco"])


def both(folder: Path) -> None:
    content = run(folder / "pictures", folder / "two")
    run(folder / "pictures", folder / "two_cached", CACHED)
    if comm.get_rank() == 1:
        (folder / "rank1.json").write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_are_one(tmp_path: Path) -> None:
    grow(tmp_path / "pictures", val=8)
    (tmp_path / "pictures/val/red/3.png").write_bytes(b"broken")
    one = run(tmp_path / "pictures", tmp_path / "one")
    run(tmp_path / "pictures", tmp_path / "one_cached", CACHED)
    in_two_processes(both, tmp_path)
    two = json.loads((tmp_path / "two/probe.json").read_text())
    assert two["by_epoch"] == one["by_epoch"] == json.loads((tmp_path / "rank1.json").read_text())["by_epoch"]
    assert two["val"]["unreadable"] == one["val"]["unreadable"] == 1
    for kind in ("", "_cached"):
        for name, value in weights(tmp_path / f"one{kind}").items():
            torch.testing.assert_close(weights(tmp_path / f"two{kind}")[name], value, rtol=1e-4, atol=1e-5)


def test_the_command_leaves_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = grow(tmp_path / "pictures"), tmp_path / "out"
    words = ["linear", "--protocol", "moco", "--weights", "random", "--data", str(data), "--size", "24",
             "--batch", "16", "--epochs", "2", "--output", str(tmp_path / "mine.json"), *WORDS,
             "OUTPUT_DIR", str(output)]  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        probe.main(words)
    assert not ended.value.code
    found = json.loads((output / "probe.json").read_text())
    assert found == json.loads((tmp_path / "mine.json").read_text())
    assert found["protocol"] == "moco (modified)" and found["changes"][0] == "batch 16 instead of 256"
    assert "| best epoch |" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        probe.main(words)
    assert ended.value.code == 2 and "contains a run already" in capsys.readouterr().err

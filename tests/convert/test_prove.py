from __future__ import annotations

import contextlib
import hashlib
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS, network
from PIL import Image

from moco_d2.convert import Conversion, ProofError, convert_checkpoint, convert_state, prove
from moco_d2.convert import conversion as outcome
from moco_d2.convert.prove import drawn_scene, read_picture


@pytest.fixture(scope="module")
def conversion() -> Conversion:
    return convert_state(network().state_dict(), "x.pth")


def run_tool(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    tool = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    monkeypatch.setattr(sys, "argv", [str(tool), *arguments])
    return runpy.run_path(str(tool))["main"]()


def swapped(tensors: dict[str, torch.Tensor], one: str, other: str) -> dict[str, torch.Tensor]:
    return {**tensors, one: tensors[other], other: tensors[one]}


@pytest.mark.parametrize(
    ("one", "other", "first_stage"),
    [
        ("stem.conv1.norm.bias", "stem.conv1.norm.running_mean", "res2"),
        ("res3.1.conv1.weight", "res3.2.conv1.weight", "res3"),
        ("res5.0.shortcut.norm.running_var", "res5.0.conv3.norm.running_var", "res5"),
    ],
)
def test_two_swapped_tensors_of_one_shape_fail(conversion: Conversion, one: str, other: str, first_stage: str) -> None:
    with pytest.raises(ProofError, match=f"differ at {first_stage} by"):
        prove(conversion.facts, conversion.source_tensors, swapped(conversion.tensors, one, other))


def test_a_network_that_magnifies_rounding_is_still_proved(conversion: Conversion) -> None:
    """Small variances, as of a network that hardly trained, multiply the last bits of float32 stage by stage."""
    small = {name: t * 0.1 if name.endswith("running_var") else t for name, t in network().state_dict().items()}
    shaky = convert_state(small, "x.pth")
    assert max(prove(shaky.facts, shaky.source_tensors, shaky.tensors).values()) < 1e-9


def test_a_slightly_wrong_tensor_fails(conversion: Conversion) -> None:
    wrong = {**conversion.tensors, "res4.3.conv2.weight": conversion.tensors["res4.3.conv2.weight"] * 1.01}
    with pytest.raises(ProofError, match=r"differ at res4 by .*res5 by"):
        prove(conversion.facts, conversion.source_tensors, wrong)


def test_not_a_number_fails(conversion: Conversion) -> None:
    wrong = {**conversion.tensors, "res5.0.conv1.norm.bias": conversion.tensors["res5.0.conv1.norm.bias"] / 0}
    with pytest.raises(ProofError, match="differ at res5 by nan"):
        prove(conversion.facts, conversion.source_tensors, wrong)


def test_missing_and_misshapen_tensors_fail(conversion: Conversion) -> None:
    fewer = {key: tensor for key, tensor in conversion.tensors.items() if key != "res2.0.conv1.weight"}
    with pytest.raises(ProofError, match=r"lacks \['res2.0.conv1.weight'\]"):
        prove(conversion.facts, conversion.source_tensors, fewer)
    other = {**conversion.tensors, "stem.conv1.weight": torch.ones(16, 3, 3, 3)}
    with pytest.raises(ProofError, match="cannot hold"):
        prove(conversion.facts, conversion.source_tensors, other)


def test_the_written_file_is_what_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(network().state_dict(), tmp_path / "in.pth")
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", proof=False)
    earlier = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save = outcome.save

    def damaging_save(conversion: Conversion, output: Any) -> None:
        tensors = swapped(conversion.tensors, "res2.1.conv1.weight", "res2.2.conv1.weight")
        save(Conversion(**{**vars(conversion), "tensors": tensors}), output)

    monkeypatch.setattr(outcome, "save", damaging_save)
    with pytest.raises(ProofError, match="differ at res2"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == earlier


@pytest.mark.parametrize("bake", [(), ("--bake",)])
def test_the_report_names_the_users_picture(
    bake: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(LAYOUTS["moco-v2-released"].build(network()), tmp_path / "in.pth")
    Image.effect_mandelbrot((900, 300), (-2, -1, 1, 1), 60).save(tmp_path / "mine.png")
    reports = {}
    for name in ("drawn", "mine"):
        chosen = ("--picture", str(tmp_path / "mine.png")) if name == "mine" else ()
        report = tmp_path / f"{name}.json"
        files = [str(tmp_path / "in.pth"), str(tmp_path / f"{name}.pth")]
        assert run_tool(monkeypatch, *files, "--report", str(report), *chosen, *bake) == 0
        reports[name] = json.loads(report.read_text())["proof"]
    digest = hashlib.sha256((tmp_path / "mine.png").read_bytes()).hexdigest()
    assert (
        reports["mine"]["picture"] == {"path": str(tmp_path / "mine.png"), "sha256": digest}
        and digest in capsys.readouterr().out
    )
    assert "picture" not in reports["drawn"]
    assert 0 < max(reports["mine"]["differences"].values()) < 1e-5


@pytest.mark.parametrize("bake", [False, True])
def test_the_proof_is_made_on_the_users_picture(bake: bool, tmp_path: Path) -> None:
    torch.save(LAYOUTS["moco-v2-released"].build(network()), tmp_path / "in.pth")
    for picture, refusal in ((drawn_scene(), None), (drawn_scene() / 0, "the proof cannot be made")):
        context = pytest.raises(ProofError, match=refusal) if refusal else contextlib.nullcontext()
        with context:
            convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", picture=picture, bake=bake)


def test_a_picture_that_is_none_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (400, 20)).save(tmp_path / "low.png")
    for name, words in (("text.jpg", "cannot be read as a picture"), ("none.jpg", "cannot be read"), ("low.png", "32")):
        with pytest.raises(ValueError, match=words) as refusal:
            read_picture(tmp_path / name)
        assert str(refusal.value).startswith(f"{tmp_path / name}: ")
    files = [str(tmp_path / "no.pth"), str(tmp_path / "out.pth")]
    assert run_tool(monkeypatch, *files, "--picture", str(tmp_path / "text.jpg")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'text.jpg'}: cannot be read")

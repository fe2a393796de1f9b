"""What a conversion writes: again over its own files, never over another's."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
import yaml

from moco_d2.convert import convert_checkpoint, read_checkpoint, read_facts
from moco_d2.convert.back import restore
from moco_d2.convert.report import convert_and_report, write_report
from moco_d2.facts import ResNetFacts


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "in.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def convert(source: Path, output: Path) -> None:
    convert_checkpoint(source, output, proof=False)


def test_the_same_conversion_may_be_repeated(source: Path, tmp_path: Path) -> None:
    for name in ("mine.pth", "mine.pth", "mine.pkl", "mine.pth"):  # they share mine.yaml
        convert(source, tmp_path / name)
        assert f"WEIGHTS: {tmp_path / name}" in (tmp_path / "mine.yaml").read_text()
    for layout in ("torchvision", "moco"):
        restore(tmp_path / "mine.pth", tmp_path / "back.pth", layout)
    write_report(convert_and_report(source, tmp_path / "mine.pth", proof=False), tmp_path / "report.json")
    write_report(convert_and_report(source, tmp_path / "mine.pth", proof=False), tmp_path / "report.json")
    assert {path.name for path in tmp_path.iterdir()} == {
        "mine.pth",
        "mine.pkl",
        "mine.yaml",
        "back.pth",
        "report.json",
    }


@pytest.mark.parametrize(
    "text",
    [
        b"# my own config of two weeks\nSOLVER: {BASE_LR: 0.02}\n",
        b"",
        b"# What mine.pth needs: of an editor's making\n",
        b"\xff\x00",
    ],
)
def test_a_config_of_the_user_s_is_kept(text: bytes, source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(text)
    with pytest.raises(ValueError, match=r"mine\.yaml: this file exists, and this command did not write it"):
        convert(source, tmp_path / "mine.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"] and (tmp_path / "mine.yaml").read_bytes() == text


@pytest.mark.parametrize(
    "origin", ["here\nSOLVER: {BASE_LR: 9}", "here\u2028SOLVER: {BASE_LR: 9}", "here\0", "x" * 999]
)
def test_an_origin_cannot_leave_the_config_s_comment(origin: str, source: Path, tmp_path: Path) -> None:
    """The origin is any text of a stranger's file, and Detectron2 reads a config's YAML with its code."""
    facts = ResNetFacts(depth=18, res2_channels=64, origin=origin)
    torch.save({"state_dict": read_checkpoint(source), "facts": facts.as_dict()}, tmp_path / "in.pth")
    for _ in range(2):  # the second conversion recognises the first one's files
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", proof=False)
    assert yaml.safe_load((tmp_path / "out.yaml").read_bytes()).keys() == {"MODEL", "INPUT", "VERSION"}
    assert read_facts(tmp_path / "out.pth") == facts


def test_a_config_that_was_edited_is_kept(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "mine.pth")
    config = tmp_path / "mine.yaml"
    config.write_text(edited := config.read_text() + "SOLVER: {BASE_LR: 0.02}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: this file exists"):
        convert(source, tmp_path / "mine.pth")
    assert config.read_text() == edited


@pytest.mark.parametrize("content", [{"model": {}}, {"state_dict": {}, "facts": {"kind": "resnet"}}, [1]])
def test_weights_that_no_conversion_wrote_are_kept(content: object, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "model_final.pth"
    torch.save(content, output)
    before = output.read_bytes()
    convert(source, tmp_path / "converted.pth")
    for act in (lambda: convert(source, output), lambda: restore(tmp_path / "converted.pth", output, "torchvision")):
        with pytest.raises(ValueError, match=r"model_final\.pth: this file exists, and this command did not write it"):
            act()
    assert output.read_bytes() == before and not (tmp_path / "model_final.yaml").exists()


@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to])
def test_the_input_is_kept_under_each_of_its_names(
    link: Callable[[Path, Path], None], source: Path, tmp_path: Path
) -> None:
    (tmp_path / "in.pth").write_bytes(source.read_bytes())
    link(tmp_path / "out.pth", tmp_path / "in.pth")
    with pytest.raises(ValueError, match="the output is the input"):
        convert(tmp_path / "in.pth", tmp_path / "out.pth")
    assert (tmp_path / "in.pth").read_bytes() == source.read_bytes()


def test_a_report_is_refused_before_the_conversion(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from moco_d2.commands import convert as tool

    theirs = tmp_path / "labels.json"
    theirs.write_text(json.dumps({"images": [], "annotations": []}))
    words = [str(source), str(tmp_path / "out.pth"), "--no-proof", "--report", str(theirs)]
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *words])
    assert tool.main() == 2
    assert capsys.readouterr().err.startswith(f"error: {theirs}: this file exists, and this command did not write it")
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]
    for name in ("out.pth", "./out.yaml"):
        monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], str(tmp_path / name)])
        assert tool.main() == 2
        assert "another file of this conversion has this name" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["labels.json"]

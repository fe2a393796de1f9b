"""The account of a conversion, computed a second time from the files; and its config, below real detectors."""

from __future__ import annotations

import hashlib
import json
import runpy
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from checkpoint_layouts import LAYOUTS, network, trunk
from safetensors.torch import save_file

from moco_d2.config import config_files, load_cfg
from moco_d2.convert import prove, read_checkpoint, read_facts
from moco_d2.convert.names import DETECTRON2, TORCHVISION, rename_table
from moco_d2.convert.report import convert_and_report, summary
from moco_d2.facts import BackboneFacts

TOOL = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
DETECTORS = (
    "PascalVOC-Detection/faster_rcnn_R_50_C4_24k",
    "PascalVOC-Detection/faster_rcnn_R_50_dilated_C5_24k_supervised",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
)

# layout: arXiv number, keys that are dropped beside the batch counters, foreign keys, channels' order, mean of the
# first channel, its std, stride in the 1x1 convolution
ACCOUNTS: dict[str, tuple[str, int, int, str, float, float, bool]] = {
    "moco-v2-arguments": ("2003.04297", 6, 322, "RGB", 123.675, 58.395, False),
    "dino": ("2104.14294", 3, 0, "RGB", 123.675, 58.395, False),
    "byol-sthalles": ("2006.07733", 1, 0, "RGB", 0, 255, False),
    "simclr-tensorflow": ("2002.05709, 2006.10029", 56 - 53, 0, "RGB", 0, 255, False),
    "mmdet-caffe": ("1512.03385", 0, 0, "BGR", 103.53, 1, True),
    "msra-blobs": ("1512.03385", -53, 0, "BGR", 103.53, 1, True),
}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return network()


def convert(monkeypatch: pytest.MonkeyPatch, folder: Path, *options: str) -> dict[str, Any]:
    """Run the tool on ``in.pth``; return its report."""
    files = [str(folder / name) for name in ("in.pth", "out.pth")]
    arguments = [str(TOOL), *files, "--report", str(folder / "report.json"), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    assert runpy.run_path(str(TOOL))["main"]() == 0
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


def keys_at(content: Mapping[Any, Any], place: str) -> set[str]:
    for part in place.split(".") if place else ():
        content = content[part]
    return {str(key) for key in content}


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out


@pytest.mark.parametrize("name", ACCOUNTS)
def test_a_report_agrees_with_the_files(
    name: str,
    net: torch.nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arxiv, dropped, foreign, order, mean, std, stride = ACCOUNTS[name]
    layout = LAYOUTS[name]
    torch.save(layout.build(net), tmp_path / "in.pth")
    report = convert(monkeypatch, tmp_path)
    shown = capsys.readouterr().out

    # whose it is
    assert (report["source"]["key"], report["source"]["arxiv"]) == (layout.source, arxiv)
    assert report["facts"]["origin"].startswith(layout.origin) and f"arXiv {arxiv}" in shown
    # every key of the file, once
    groups = [set(report["mapped"]), set(report["dropped"]), set(report["foreign"])]
    assert report["counts"] == dict(zip(("mapped", "dropped", "foreign"), map(len, groups), strict=True))
    assert report["counts"] == {"mapped": 265, "dropped": 53 + dropped, "foreign": foreign}
    content = read_checkpoint(tmp_path / "in.pth")
    assert set.union(*groups) == keys_at(content, report["source"]["place"])
    beside = set(content) - {report["source"]["place"].partition(".")[0]} if report["source"]["place"] else set()
    assert set(report["elsewhere"]) == beside
    assert all(report["dropped"].values())
    # the files
    for end in ("input", "output"):
        path = Path(report[end]["path"])
        assert hashlib.sha256(path.read_bytes()).hexdigest() == report[end]["sha256"] and report[end]["sha256"] in shown
    written = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert set(report["mapped"].values()) == set(written)
    # the facts, and what they ask of a config
    facts = read_facts(tmp_path / "out.pth")
    assert facts is not None and BackboneFacts.from_dict(report["facts"]) == facts
    lines = yaml.safe_load(Path(report["output"]["config"]).read_text())
    wanted = {"MODEL.WEIGHTS": str(tmp_path / "out.pth"), "VERSION": 2, **report["config"]}
    assert flat(lines) == wanted
    pixels = report["config"]
    assert (pixels["INPUT.FORMAT"], pixels["MODEL.PIXEL_MEAN"][0], pixels["MODEL.PIXEL_STD"][0]) == (order, mean, std)
    assert pixels["MODEL.RESNETS.STRIDE_IN_1X1"] == stride and pixels["MODEL.RESNETS.STEM_OUT_CHANNELS"] == 16
    for key, value in report["config"].items():
        assert f"    {key} " + (f'"{value}"' if isinstance(value, list) else str(value)) in shown.splitlines()
    # the proof
    back = rename_table(DETECTRON2, TORCHVISION, 50)
    source = {back[key]: tensor for key, tensor in written.items()}
    assert report["proof"] == {"made": True, "tolerance": 1e-5, "differences": prove(facts, source, written)}
    assert list(report["proof"]["differences"]) == ["res2", "res3", "res4", "res5"]
    assert summary(report) == shown.splitlines()


def test_a_report_says_that_no_proof_was_made(
    net: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(LAYOUTS["swav"].build(net), tmp_path / "in.pth")
    report = convert(monkeypatch, tmp_path, "--no-proof")
    assert report["proof"]["made"] is False and report["proof"]["differences"] == {}
    assert "proof    not made" in capsys.readouterr().out


def test_a_refusal_writes_no_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"state_dict": {}}, tmp_path / "in.pth")
    monkeypatch.setattr(
        sys, "argv", [str(TOOL), *(str(tmp_path / n) for n in ("in.pth", "o.pth")), "--report", "r.json"]
    )
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(TOOL))["main"]() == 2
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("name", ["msra", "byol-sthalles"])
def test_the_config_goes_below_a_detectors(
    name: str, detector: str, net: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(LAYOUTS[name].build(net), tmp_path / "in.pth")
    report = convert(monkeypatch, tmp_path, "--no-proof")
    (tmp_path / "leaf.yaml").write_text(
        yaml.safe_dump({"_BASE_": [*map(str, config_files(detector)), "out.yaml"], "SEED": 7})
    )
    cfg, plain = load_cfg(tmp_path / "leaf.yaml"), load_cfg(detector)
    facts = read_facts(tmp_path / "out.pth")
    assert facts is not None and facts.contradictions(cfg) == [] and facts.contradictions(plain)
    caffe = name == "msra"
    expected = {
        "SEED": 7,
        "MODEL.WEIGHTS": str(tmp_path / "out.pth"),
        "INPUT.FORMAT": "BGR" if caffe else "RGB",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675] if caffe else [0.0] * 3,
        "MODEL.PIXEL_STD": [1.0 if caffe else 255.0] * 3,
        "MODEL.RESNETS.STRIDE_IN_1X1": caffe,
        "MODEL.RESNETS.DEPTH": 50,
        "MODEL.RESNETS.NUM_GROUPS": 1,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": 16,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 16,
    }
    got, before = flat(cfg), flat(plain)
    assert {key: got[key] for key in expected} == expected
    assert {key for key in got if got[key] != before[key]} <= set(expected)  # nothing else has changed
    assert set(report["config"]) <= set(expected)


def test_a_checkpoint_in_parts_has_one_account_by_folder_and_by_index(tmp_path: Path) -> None:
    """As Hugging Face keeps them; what lies beside the parts says how the network is fed."""
    folder, state = tmp_path / "net", {key: tensor.contiguous() for key, tensor in trunk(network()).items()}
    folder.mkdir()
    parts = {f"model-0000{n}-of-00002.safetensors": sorted(state)[n - 1 :: 2] for n in (1, 2)}
    for name, keys in parts.items():
        save_file({key: state[key] for key in keys}, folder / name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in parts.items() for key in keys}}))
    (folder / "config.json").write_text(json.dumps({"pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}))
    accounts = [convert_and_report(path, tmp_path / "out.pth", proof=False) for path in (folder, index)]
    assert all(
        len(account["mapped"]) == 265 and account["facts"]["pixels"]["std"] == [127.5] * 3 for account in accounts
    )
    whole = hashlib.sha256(b"".join((folder / name).read_bytes() for name in (index.name, *parts))).hexdigest()
    assert [account["input"]["sha256"] for account in accounts] == [whole] * 2

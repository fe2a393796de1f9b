"""Probes of a ViT by its class token, and the pages about what a backbone sees."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from labelled_pictures import WORDS, config, grow
from PIL import Image

from moco_d2.commands import probe, visualize
from moco_d2.data.labelled import open_pair, open_pictures
from moco_d2.facts import ViTFacts
from moco_d2.io.checkpoints import CheckpointError
from moco_d2.layers.heads import without_head
from moco_d2.layers.vit import build_vit, class_attention, describe
from moco_d2.probes.backbone import load_backbone
from moco_d2.probes.linear import probe_linear
from moco_d2.probes.protocols import changed

VIT: dict[str, Any] = {"dim": 24, "depth": 4, "heads": 2, "patch": 8, "image": 32}


@pytest.fixture
def network() -> Any:
    torch.manual_seed(0)
    found = without_head(build_vit(2, **VIT, init="moco_v3", position="sincos"))
    torch.nn.init.normal_(found.cls_token)
    return found.eval()


@pytest.fixture
def weights(network: Any, tmp_path: Path) -> str:
    content = {"state_dict": network.state_dict(), "facts": describe(network, origin="a test").as_dict()}
    torch.save(content, tmp_path / "backbone.pth")
    return str(tmp_path / "backbone.pth")


def test_both_files_of_a_run_are_read_and_an_incomplete_one_is_not(network: Any, weights: str, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 40, 32)
    state, facts = network.state_dict(), describe(network).as_dict()
    run = {
        "model": {"head.x": torch.ones(1)} | {f"teacher.backbone.{key}": value for key, value in state.items()},
        "facts": facts, "backbone": {"method": "DINO", "prefix": "teacher.backbone."},
    }  # fmt: skip
    torch.save(run, tmp_path / "model_0000001.pth")
    for path in (weights, str(tmp_path / "model_0000001.pth")):
        found = load_backbone(path, config(tmp_path))
        assert torch.equal(found.network(images), network(images)) and isinstance(found.facts, ViTFacts)
    torch.save({"state_dict": state | {"norm.weight": torch.ones(3)}, "facts": facts}, weights)
    with pytest.raises(CheckpointError, match=r"do not fit its facts \(a ViT of 4 blocks, 24 features.*norm.weight"):
        load_backbone(weights, config(tmp_path))


def test_knn_and_dinos_classifier_on_the_class_tokens_of_four_blocks(weights: str, tmp_path: Path) -> None:
    data, output = grow(tmp_path / "pictures"), tmp_path / "probe.json"
    command = ["knn", "--weights", weights, "--data", str(data), "--output", str(output), "--k", "1"]
    with pytest.raises(SystemExit) as ended:
        probe.main([*command, *WORDS])
    assert not ended.value.code
    found = json.loads(output.read_text())
    assert found["results"][0]["top1"] > 90 and found["features"]["dimension"] == 24
    assert found["weights"]["facts"]["kind"] == "vit" and found["size"] == 32, "that of its pretraining"

    protocol = changed("dino_vit_s", batch=16, epochs=1, size=24, lr=1.0)
    (tmp_path / "linear").mkdir()
    cfg, sets = config(tmp_path / "linear"), open_pair(str(data), str(data))
    content = probe_linear(load_backbone(weights, cfg), *sets, cfg, *protocol)
    assert content["protocol"] == "dino_vit_s (modified)" and content["results"][0]["top1"] > 90
    saved = torch.load(tmp_path / "linear" / "model_final.pth", weights_only=False)
    assert saved["model"]["weight"].shape == (3, 4 * 24)
    with pytest.raises(ValueError, match="last 4 blocks need a ViT of as many blocks; this network is none"):
        probe_linear(load_backbone("random", cfg), *sets, cfg, *protocol)


def test_attention_maps_are_drawn_as_the_network_sees_the_picture(network: Any, weights: str, tmp_path: Path) -> None:
    folder, page = grow(tmp_path / "pictures", 2, 1), tmp_path / "page"
    command = ["attention", "--weights", weights, "--pictures", str(folder), "--output", str(page), "--size", "40"]
    visualize.main([*command, "--count", "4", *WORDS])
    text = (page / "index.html").read_text()
    names = re.findall(r'<img src="(pictures/\d+\.png)"', text)
    assert len(names) == 4 and "red/0.png: the picture, the mean of 2 heads, then each head" in text
    picture = Image.open(folder / "train/blue/0.png")  # 48 x 40 pixels: 6 x 5 patches
    values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ViTFacts().pixels.mean, ViTFacts().pixels.std))
    maps = class_attention(network, ((values - mean) / std)[None])[0]
    sheet = np.asarray(Image.open(page / names[0]))
    scale = 4  # small pictures are enlarged
    assert sheet.shape == (40 * scale, 4 * 48 * scale + 3 * 6, 3)
    assert np.array_equal(sheet[::scale][:, : 48 * scale : scale], np.asarray(picture))
    for cell, one in enumerate((maps.mean(0), *maps), 1):
        left = cell * (48 * scale + 6)
        drawn = sheet[4 * scale :: 8 * scale, left + 4 * scale : left + 48 * scale : 8 * scale]
        expected = matplotlib.colormaps["viridis"]((one / one.max()).numpy())[..., :3] * 255
        assert np.abs(drawn.astype(float) - expected).max() <= 1.01
    for words, problem in (
        (["--weights", "random"], "random is a ResNet-18, which has no class token: attention maps need a ViT"),
        (["--size", "7"], "--size is 7; it must be at least 8 pixels"),
    ):
        with pytest.raises(ValueError, match=problem):
            visualize.main([*command, *words, "--output", str(tmp_path / "other"), *WORDS])


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_neighbours_are_the_most_similar_others(kind: str, weights: str, tmp_path: Path) -> None:
    folder, page = grow(tmp_path / "pictures", 5, 1), tmp_path / "page"
    (folder / "train/blue/0.png").write_bytes(b"broken")  # it shifts no number
    command = ["neighbours", "--weights", weights if kind == "vit" else "random", "--pictures", str(folder / "train")]
    visualize.main([*command, "--output", str(page), "--k", "3", "--size", "24", *WORDS, "DATA.MAX_SKIPPED", "0.2"])
    rows = (page / "index.html").read_text().split('<div class="row">')[1:]
    assert len(rows) in (11, 12), "12 of the 15 pictures are asked for, without the unreadable one"
    for row in rows:
        (query, *near), values = re.findall(r"<figcaption>\S+ (\w+/\d.png)<", row), re.findall(r">(0\.\d+|1\.0+):", row)
        assert len(near) == 3 and query not in near
        assert {name.split("/")[0] for name in near} == {query.split("/")[0]}, "the colours are told apart"
        assert [float(v) for v in values] == sorted(map(float, values), reverse=True)
    queries = ["--queries", str(folder / "val"), "--output", str(tmp_path / "second"), "--k", "2", "--size", "24"]
    visualize.main([*command, *queries, *WORDS, "DATA.MAX_SKIPPED", "0.2"])
    assert len(list((tmp_path / "second/pictures").glob("*.png"))) == 3 * 3
    with pytest.raises(ValueError, match="has 15 pictures; 15 neighbours need more than 15"):
        visualize.main([*command, "--output", str(tmp_path / "third"), "--k", "15", *WORDS])


def test_pictures_to_look_at_may_have_any_shape_of_folder(tmp_path: Path) -> None:
    grow(tmp_path / "pictures", 2, 1)
    assert len(open_pictures(str(tmp_path / "pictures"))) == 9
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        open_pictures(str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="no labelled set"):
        open_pictures("nowhere")

"""The command ``moco-d2 probe knn``, from pictures to ``probe.json``."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from labelled_pictures import WORDS, config, grow
from PIL import Image

from moco_d2.commands import probe
from moco_d2.data.labelled import open_pair
from moco_d2.layers.resnet import build_resnet, describe
from moco_d2.probes.backbone import load_backbone
from moco_d2.probes.knn import probe_knn
from tests.two_processes import in_two_processes


@pytest.fixture
def backbone(tmp_path: Path) -> str:
    torch.manual_seed(0)
    network = build_resnet("resnet18", width=0.125, stem="cifar")
    network.fc = torch.nn.Identity()
    torch.save({"state_dict": network.state_dict(), "facts": describe(network).as_dict()}, tmp_path / "backbone.pth")
    return str(tmp_path / "backbone.pth")


def main(words: list[str]) -> None:
    """Run the command in this process."""
    with pytest.raises(SystemExit) as ended:
        probe.main(words)
    assert not ended.value.code


def test_a_table_and_a_file(backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, output = grow(tmp_path / "pictures"), tmp_path / "probe.json"
    (data / "train/red/0.png").write_bytes(b"broken")
    command = ["knn", "--weights", backbone, "--data", str(data), "--size", "24", "--output", str(output)]
    main([*command, "--k", "1", "200", *WORDS])
    found = json.loads(output.read_text())
    assert [row["k"] for row in found["results"]] == [1, 200]
    assert all(row["top1"] == row["top5"] == 100 for row in found["results"])
    assert found["train"]["pictures"] == 47 and found["train"]["unreadable"] == 1 and found["val"]["pictures"] == 12
    assert found["weights"]["sha256"] and found["weights"]["facts"]["depth"] == 18
    assert found["features"]["dimension"] == 64 and 1 <= found["features"]["effective_rank"] <= 12
    assert (found["size"], found["classes"], found["seed"]) == (24, 3, 3) and "command" in found
    screen = capsys.readouterr().out
    assert "|   1 |          0.07 | 100.00 |" in screen and "cannot read" in screen

    main([*command, "--k", "3", "--temperature", "0.1", *WORDS])  # its own file is replaced
    assert json.loads(output.read_text())["results"][0]["k"] == 3
    output.write_text("{}")
    for words, problem in (
        ([*command, *WORDS], "this command did not write it"),
        ([*command[:-2], *WORDS, "DATA.MAX_SKIPPED", "0"], "1 of the 48 pictures"),
    ):
        with pytest.raises(SystemExit) as ended:
            probe.main(words)
        assert ended.value.code == 2 and problem in capsys.readouterr().err


def test_numbers_are_those_of_a_plain_loop(backbone: str, tmp_path: Path) -> None:
    data, output = grow(tmp_path / "pictures", noise=250), tmp_path / "probe.json"
    main(["knn", "--weights", backbone, "--train", str(data / "train"), "--val", str(data / "val"), "--size", "24",
          "--k", "5", "--temperature", "0.1", "--output", str(output), *WORDS])  # fmt: skip
    network = build_resnet("resnet18", width=0.125, stem="cifar")
    network.fc = torch.nn.Identity()
    network.load_state_dict(torch.load(backbone)["state_dict"])
    found = {}
    for half in ("train", "val"):
        files = sorted((data / half).rglob("*.png"))
        features = []
        for file in files:
            image = Image.open(file).resize((round(48 * 27 / 40), 27), Image.Resampling.BILINEAR)
            left, top = round((image.width - 24) / 2), round((27 - 24) / 2)
            pixels = torch.from_numpy(np.array(image.crop((left, top, left + 24, top + 24))))
            x = (pixels.permute(2, 0, 1) / 255 - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor(
                [0.229, 0.224, 0.225]
            ).view(3, 1, 1)
            with torch.no_grad():
                features.append(F.normalize(network.eval()(x[None]), dim=1)[0])
        found[half] = torch.stack(features), [("blue", "green", "red").index(file.parent.name) for file in files]
    (bank, labels), (queries, wanted) = found["train"], found["val"]
    right = 0
    for query, label in zip(queries, wanted, strict=True):
        votes = [0.0, 0.0, 0.0]
        similar = (bank @ query).tolist()
        for place in sorted(range(len(bank)), key=similar.__getitem__)[-5:]:
            votes[labels[place]] += float(torch.tensor(similar[place] / 0.1).exp())
        right += votes.index(max(votes)) == label
    (row,) = json.loads(output.read_text())["results"]
    assert 0 < right < len(wanted), "a task with mistakes"
    assert row["top1"] == pytest.approx(100 * right / len(wanted))


def alone_or_together(folder: Path) -> None:
    cfg = config(folder)
    sets = open_pair(str(folder / "pictures"), str(folder / "pictures"))
    content = probe_knn(load_backbone("random", cfg), *sets, cfg, 24, (1, 5))
    name = f"{torch.distributed.get_rank()}.json" if torch.distributed.is_initialized() else "alone.json"
    (folder / name).write_text(json.dumps(content))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_two_processes_are_one_with_pictures_that_only_one_cannot_read(tmp_path: Path) -> None:
    data = grow(tmp_path / "pictures", train=9, val=8, noise=250)
    for broken in ("train/blue/4.png", "val/red/1.png"):  # in the first share and in the second
        (data / broken).write_bytes(b"broken")
    alone_or_together(tmp_path)
    in_two_processes(alone_or_together, tmp_path)
    alone, *both = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("alone", "0", "1"))
    assert 0 < alone["results"][1]["top1"] < 100 and alone["val"]["pictures"] == 23, "a task with mistakes"
    for found in both:
        assert [found[key] for key in ("results", "train", "val")] == [
            alone[key] for key in ("results", "train", "val")
        ]
        assert found["features"] == pytest.approx(alone["features"], rel=1e-3)


def test_objects_of_a_data_set_of_ones_own(backbone: str, tmp_path: Path) -> None:
    content = {"categories": [{"id": 7, "name": "bird"}, {"id": 9, "name": "boat"}], "images": [], "annotations": []}
    (tmp_path / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (80, 40), "red").save(tmp_path / f"images/{number}.png")
        content["images"].append({"id": number, "file_name": f"{number}.png", "width": 80, "height": 40})
        for side, category in enumerate((7, 9)):
            content["annotations"].append({
                "id": 2 * number + side + 1, "image_id": number, "category_id": category, "iscrowd": 0,
                "bbox": [40 * side, 0, 30, 30], "area": 900,
            })  # fmt: skip
    for number, half in enumerate(("train", "val")):
        things = content["annotations"][2 * number : 2 * number + 2]
        mine = content | {"images": [content["images"][number]], "annotations": things}
        (tmp_path / f"{half}.json").write_text(json.dumps(mine))
    sets = [{"name": f"probe_mine_{half}", "format": "coco", "json": str(tmp_path / f"{half}.json"),
             "images": str(tmp_path / "images")} for half in ("train", "val")]  # fmt: skip
    (tmp_path / "mine.yaml").write_text(f"DATASETS: {json.dumps({'CUSTOM': sets})}\n")
    main(["knn", "--weights", backbone, "--config-file", str(tmp_path / "mine.yaml"), "--train", "probe_mine_train",
          "--val", "probe_mine_val", "--size", "24", "--k", "1", "--output", str(tmp_path / "probe.json"), *WORDS,
          "OUTPUT_DIR", str(tmp_path / "out")])  # fmt: skip
    found = json.loads((tmp_path / "probe.json").read_text())
    assert (found["train"]["pictures"], found["val"]["pictures"], found["classes"]) == (2, 2, 2)


@pytest.mark.parametrize(("words", "problem"), [
    ([], "give --train and --val, or --data"),
    (["--data", "nowhere"], "'nowhere' is no labelled set"),
    (["--data", "nowhere", "--size", "0"], "--size is 0; it must be at least 1 pixel"),
    (["--data", "nowhere", "--k", "0"], "k is 0 and the temperature 0.07; both must be positive"),
])  # fmt: skip
def test_command_lines_that_cannot_be_run(words: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as ended:  # a command's guard is around main
        probe.main(["knn", "--weights", "random", *words])
    assert problem in f"{ended.value}{capsys.readouterr().err}"

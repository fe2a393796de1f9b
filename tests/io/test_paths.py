"""``~`` and ``$VARIABLES`` mean the same in every config key, argument and environment variable that is a path."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moco_d2.config import flat, get_cfg, load_cfg, roles
from moco_d2.convert import catalog
from moco_d2.io.paths import cache_folder, expand, expand_datasets_root
from moco_d2.model_zoo import get_config

ENTRY = {"name": "$mine", "format": "coco"}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ROOT", f"{tmp_path}/disk")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_is_expanded_and_what_is_not(home: Path) -> None:
    assert expand("~") == str(home) and expand("~/a b") == f"{home}/a b"
    assert expand("$ROOT/x") == expand("${ROOT}/x") == f"{home}/disk/x" and expand("$ROOT.d") == f"{home}/disk.d"
    for same in ("", "a/~/b", "./~", "a$", "a$5", "https://h/~u/$X", "moco-d2://$X", "detectron2://$X"):
        assert expand(same) == same
    Path("cash$NOWHERE").touch()
    assert expand("cash$NOWHERE") == "cash$NOWHERE", "a file that is there"
    for wrong, said in (("$NOWHERE/x", "variable NOWHERE is not set"), ("~nobody-at-all/x", "'~nobody-at-all'")):
        with pytest.raises(ValueError, match=said):
            expand(wrong)


def test_every_key_that_is_a_path_is_expanded_and_the_config_records_it(home: Path) -> None:
    for key in roles.PATHS:
        default = flat(get_cfg())[key]
        for path in ("~/x/*.tar", "$ROOT/x/*.tar", "$NOWHERE/x"):
            value = [{**ENTRY, "root": path, "json": path, "images": path, "split": path}]
            if key != "DATASETS.CUSTOM":
                value = path if isinstance(default, str) else [path, "https://host/$X", "voc_2007_test"]
            if "NOWHERE" in path:
                with pytest.raises(ValueError, match=rf"^{key} is .*the environment variable NOWHERE is not set$"):
                    load_cfg("", [key, repr(value)])
                continue
            cfg = load_cfg("", [key, repr(value)])
            expected = f"{home}/x/*.tar" if path.startswith("~") else f"{home}/disk/x/*.tar"
            assert repr(flat(cfg)[key]).count(repr(expected)) == (4 if key == "DATASETS.CUSTOM" else 1)
            (home / "config.yaml").write_text(cfg.dump())
            assert flat(load_cfg(home / "config.yaml"))[key] == flat(cfg)[key]


def test_names_of_data_sets_are_no_paths(home: Path) -> None:
    cfg = load_cfg("", ["DATASETS.CUSTOM", repr([{**ENTRY, "images": "$ROOT"}]), "DATASETS.TRAIN", "('$mine', '~/x')"])
    assert ("$mine", f"{home}/x") == cfg.DATASETS.TRAIN and cfg.DATASETS.CUSTOM[0]["name"] == "$mine"


def test_config_files_and_their_bases_may_lie_under_a_variable(home: Path) -> None:
    Path("disk").mkdir()
    Path("disk/base.yaml").write_text("SEED: 3\nOUTPUT_DIR: ~/runs\nVERSION: 2\n")
    for base in ("$ROOT/base.yaml", ["~/disk/base.yaml"], "../disk/base.yaml"):
        Path("disk/own.yaml").write_text(yaml.safe_dump({"_BASE_": base, "VERSION": 2}))
        for name in ("$ROOT/own.yaml", "~/disk/own.yaml"):
            cfg = load_cfg(name)
            assert (3, f"{home}/runs") == (cfg.SEED, cfg.OUTPUT_DIR)
    Path("disk/own.yaml").write_text("_BASE_: $NOWHERE/base.yaml\nVERSION: 2\n")
    for name in ("disk/own.yaml", "$NOWHERE/own.yaml"):
        with pytest.raises(ValueError, match="the environment variable NOWHERE is not set"):
            load_cfg(name)


def test_environment_variables_are_expanded_or_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOCO_D2_CACHE", "$ROOT/cache")
    assert cache_folder() == catalog.cache_folder() == home / "disk/cache"
    for name in ("MOCO_D2_CACHE", "MOCO_D2_CATALOG", "DETECTRON2_DATASETS"):
        monkeypatch.setenv(name, "$NOWHERE/x")
        with pytest.raises(
            ValueError, match=rf"^{name} is '\$NOWHERE/x': the environment variable NOWHERE is not set$"
        ):
            get_config("voc0712_faster_rcnn_R_50_C4_24k")
        monkeypatch.delenv(name)
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/sets")
    expand_datasets_root()
    assert os.environ["DETECTRON2_DATASETS"] == f"{home}/sets"


def test_detectron2s_data_sets_lie_under_a_variable_too(home: Path) -> None:
    code = "from moco_d2.config import get_cfg; get_cfg(); from detectron2.data import MetadataCatalog as M"
    code += "; print(M.get('voc_2007_test').dirname)"
    code += "; print(M.get('voc_2012_val_sem_seg').image_root)"
    environment = {**os.environ, "DETECTRON2_DATASETS": "$ROOT", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == [f"{home}/disk/VOC2007", f"{home}/disk/VOC2012/JPEGImages"], done.stderr


def test_arguments_of_tools_are_expanded_or_refused_with_the_reason(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from moco_d2.commands import cli

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=cli.path)
    assert parser.parse_args(["--output=~/x"]).output == home / "x"
    assert parser.parse_args(["--output", "$ROOT"]).output == home / "disk"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--output=$NOWHERE/x"])
    assert ended.value.code == 2 and "variable NOWHERE is not set" in capsys.readouterr().err

"""The table of roles: every key is in it, and what a stage ignores is refused, by whichever way it comes."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from detectron2 import model_zoo

from moco_d2.config import get_cfg, list_configs, load_cfg, mistyped_keys, roles, settings, unread_keys
from moco_d2.config.load import _defaults
from moco_d2.config.roles import DETECTION, PRETRAINING, UNREAD
from moco_d2.engine.optim import trajectory
from moco_d2.engine.preflight import config_problems
from moco_d2.model_zoo import get_config
from moco_d2.reports import trials

TOOLS = Path(__file__).parents[2] / "tools"
STAGES = (PRETRAINING, DETECTION)
DEFAULTS = _defaults(get_cfg())
VOC_FPN = "PascalVOC-Detection/faster_rcnn_R_50_FPN_24k"
COCO_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"
MOCO = "Pretrain/moco_v2_R50_200ep"
LAST = "MODEL.ROI_MASK_HEAD.NUM_CONV is 2, but nothing uses it with MODEL.MASK_ON False"


def stage_of(config: str) -> str:
    return PRETRAINING if config.startswith("Pretrain/") or "/moco" in config else DETECTION


def refusal(config: str | Path, *opts: str, stage: str = DETECTION) -> list[str]:
    try:
        load_cfg(config, opts, stage=stage)
    except ValueError as error:
        return str(error).splitlines()
    return []


def another(value: Any) -> Any:
    """Return another value of a key's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (list, tuple)):
        return type(value)([*value, 1])
    return f"{value}x" if isinstance(value, str) else 0.5 if value is None else value + 1


def test_every_key_has_a_role_and_every_entry_is_of_a_key():
    keys = {*DEFAULTS, *(key.rpartition(".")[0] for key in DEFAULTS), "SSL", "MODEL", "SOLVER", "TEST"}
    for stage in STAGES:
        assert {roles.role(key, stage) for key in DEFAULTS} >= {UNREAD, roles.MACHINE, roles.BOOKKEEPING}
        for off in roles._OFF[stage]:
            assert keys >= {off.switch, *off.keys} and roles.role(off.switch, stage) != UNREAD
        for key, remedy in roles._INSTEAD[stage].items():
            assert key in keys and roles.role(key, stage) == UNREAD
            for named in re.findall(r"[A-Z]+(?:\.[A-Z_]+)+", remedy):
                assert named in keys and roles.role(named, stage) != UNREAD
    assert keys >= {*roles.ROLES, *roles.PATHS}


@pytest.mark.parametrize("stage", STAGES)
def test_of_all_keys_exactly_those_are_refused_that_nothing_reads(stage: str) -> None:
    for key, value in DEFAULTS.items():
        complaints = list(roles.unread(stage, DEFAULTS | {key: another(value)}, DEFAULTS))
        if roles.role(key, stage) == UNREAD:
            (complaint,) = complaints
            assert complaint.startswith(f"{key} is ") and f"but {stage} does not use it: " in complaint
        else:
            assert complaints == [], key


@pytest.mark.parametrize("stage", STAGES)
def test_a_key_is_refused_beside_a_switch_that_turns_it_off_if_the_user_wrote_it(stage: str) -> None:
    for off in roles._OFF[stage]:
        for switched in off.values or (another(DEFAULTS[off.switch]),):
            for key in (key for key in DEFAULTS if any(f"{key}.".startswith(f"{name}.") for name in off.keys)):
                values = DEFAULTS | {off.switch: switched, key: another(DEFAULTS[key])}
                complaints = list(roles.unread(stage, values, DEFAULTS, asked={key}))
                assert (
                    len(complaints) == 1 and f"{key} is " in complaints[0] and "nothing uses it with" in complaints[0]
                )
                assert list(roles.unread(stage, values, DEFAULTS)) == [], "it may come from a base file"
                assert list(roles.unread(stage, values | {key: DEFAULTS[key]}, DEFAULTS, asked={key})) == []


@pytest.mark.parametrize("config", list_configs())
def test_shipped_configs_and_their_dumps_pass(config: str, tmp_path: Path) -> None:
    stage, dumped = stage_of(config), tmp_path / "config.yaml"
    opts = [] if stage == PRETRAINING else ["MODEL.MASK_ON", "False"]
    dumped.write_text(load_cfg(config, opts, stage=stage).dump())
    cfg = load_cfg(dumped, ["OUTPUT_DIR", "again"], stage=stage)
    assert not mistyped_keys(cfg, stage)


@pytest.mark.parametrize(
    "name",
    [
        "PascalVOC-Detection/faster_rcnn_R_50_FPN", "COCO-Detection/fast_rcnn_R_50_FPN_1x",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x",
        "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x", "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x",
    ],
)  # fmt: skip
def test_detectron2s_own_files_serve_as_base(name: str, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {model_zoo.get_config_file(f'{name}.yaml')}\nMODEL: {{MASK_ON: False}}\n")
    assert refusal(own) == []


def test_a_key_does_nothing_by_where_it_stands(tmp_path: Path) -> None:
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text("MODEL: {MASK_ON: True, ROI_MASK_HEAD: {NUM_CONV: 2}}\nVERSION: 2\n")
    assert refusal(base) == refusal(base, "MODEL.MASK_ON", "False") == []
    own.write_text("_BASE_: base.yaml\nMODEL: {MASK_ON: False}\n")
    assert refusal(own) == [], "the base serves others, too"
    own.write_text("_BASE_: base.yaml\nMODEL: {MASK_ON: False, ROI_MASK_HEAD: {NUM_CONV: 2}}\n")
    assert [line[: len(LAST)] for line in refusal(own)] == [LAST]
    assert refusal(own, "MODEL.MASK_ON", "True") == [], "the command line turns it on"
    on_top = ("MODEL.ROI_MASK_HEAD.NUM_CONV", "2")
    assert [line[: len(LAST)] for line in refusal(VOC_FPN, *on_top)] == [LAST]
    assert refusal(COCO_FPN, *on_top) == refusal(VOC_FPN, *on_top, "MODEL.MASK_ON", "True") == []
    assert load_cfg(VOC_FPN, on_top).MODEL.ROI_MASK_HEAD.NUM_CONV == 2, "looked at only, nothing is refused"


def test_the_namesake_of_the_detectors_own_head_is_named() -> None:
    (complaint,) = refusal("COCO-Detection/retinanet_R_50_FPN_1x", "MODEL.ROI_HEADS.NUM_CLASSES", "2")
    assert complaint.endswith(
        "with MODEL.META_ARCHITECTURE RetinaNet: leave it out, or set MODEL.RETINANET.NUM_CLASSES"
    )


def test_all_ignored_keys_are_told_at_once_with_what_else_is_wrong() -> None:
    words = [
        "SSL.ENCODER.ARGS.width",
        "0.5",
        "SOLVER.EPOCHS",
        "5",
        "MODEL.RETINANET.NUM_CONVS",
        "2",
        "SOLVER.STEPS",
        "('x',)",
    ]
    found = refusal(VOC_FPN, *words, "TEST.PRECISE_BN.NUM_ITERS", "3")
    assert len(found) == 5 and "did you mean 'TEST.PRECISE_BN.NUM_ITER'" in found[0]
    assert "SOLVER.STEPS is ('x',); it must be a list or tuple, as (30000,) is" in found
    assert (
        "SOLVER.EPOCHS is 5, but fine-tuning does not use it: fine-tuning counts iterations, SOLVER.MAX_ITER" in found
    )


@pytest.mark.parametrize("flag", [[], ["--dry-run"], ["--eval-only"], ["--resume"]])
@pytest.mark.parametrize(
    ("tool", "config", "words"),
    [
        ("train_net", VOC_FPN, ["DATA.CROP_SIZE", "96", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", "5"]),
        ("pretrain_net", MOCO, ["MODEL.RESNETS.DEPTH", "18", "SOLVER.GAMMA", "0.5"]),
    ],
)
def test_commands_end_in_a_line_for_each_key_before_anything_is_made(
    tool: str, config: str, words: list[str], flag: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if (tool, flag) == ("pretrain_net", ["--eval-only"]):
        flag = []
    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", [tool, "--config-file", config, *flag, *words, "OUTPUT_DIR", str(out)])
    monkeypatch.syspath_prepend(str(TOOLS))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(TOOLS / f"{tool}.py"), run_name="__main__")
    assert ended.value.code == 2 and not out.exists()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and len(said.splitlines()) == 2
    assert all(f"{key} is " in said for key in words[::2])


def test_trials_and_programs_are_told_the_same(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"DATA\.CROP_SIZE is 96, but fine-tuning does not use it"):
        trials.plan("voc0712_faster_rcnn_R_50_C4_24k", ["random"], [0], tmp_path, opts=["DATA.CROP_SIZE", "96"])
    cfg = load_cfg(MOCO, ["SEED", "1", "DATASETS.FRACTION", "10.0"])
    (problem,) = config_problems(cfg, world_size=1)
    assert problem.startswith("DATASETS.FRACTION is 10.0, but pretraining does not use it: it is a key of fine-tuning")
    extended = get_config("voc0712_faster_rcnn_R_50_C4_24k")
    extended.MINE = type(extended)({"KEY": 1})  # of a program that brings its own detector
    assert unread_keys(extended, DETECTION) == []


@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_a_resumed_pretraining_compares_what_the_table_calls_its_recipe(schedule: str) -> None:
    cfg = load_cfg(MOCO, ["SOLVER.SCHEDULE", schedule])
    apart = {"SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER"}  # the trainer compares batch and length itself
    recipe = settings(cfg, PRETRAINING, roles.RECIPE)
    assert trajectory(cfg) == {k: v for k, v in recipe.items() if k.startswith("SOLVER.") and k not in apart}
    assert {"SSL.ARGS.temperature", "DATASETS.TRAIN"} <= recipe.keys()


def test_what_identifies_a_trial_is_no_place_and_no_machine() -> None:
    free = {key for key in DEFAULTS if roles.role(key, DETECTION) != UNREAD and not roles.identifies_trial(key)}
    assert free == {
        "MODEL.WEIGHTS", "MODEL.DEVICE", "OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "TEST.COCO_BACKEND", "DATA.MAX_PIXELS",
        "DATA.DRY_RUN_PICTURES",
    }  # fmt: skip
    assert roles.identifies_trial("MINE.KEY"), "of a user's program"


def test_keys_that_have_an_option_of_run_trials(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["run_trials.py", "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(TOOLS / "run_trials.py"), run_name="__main__")
    options = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
    taken = {key: roles.trial_option(key) for key in DEFAULTS if roles.trial_option(key)}
    assert len(taken) == 5 and taken["SEED"] == "--seeds" and set(taken.values()) <= options

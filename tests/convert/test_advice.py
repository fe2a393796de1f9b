"""Every option that a message of the converter advises is typed in, on the file that led to the message."""

from __future__ import annotations

import ast
import json
import re
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_vit_convert
import torch
from checkpoint_layouts import (
    LAYOUTS,
    LIGHTNING,
    State,
    array,
    caffe,
    detectron2,
    facts,
    network,
    other,
    sequential,
    tensors,
    trunk,
    under,
)
from torch import nn

from moco_d2.commands import convert
from moco_d2.convert import SOURCES, CheckpointError, Choice, Conversion, convert_state

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "convert_checkpoint.py"
PARSER = convert.parser()

# "with OPTIONS (words)" or "without OPTIONS (words)"; "with A and without B" names all that is to be typed in A.
_WAY = re.compile(r"(?<!and )\b(with|without) ((?:--[a-z]+ (?:'[^']*'|\"[^\"]*\"|[^\s()'\"])+ ?)+)(?=\(|and without)")


def asked(options: str) -> Choice:
    args = PARSER.parse_args(["in.pth", "out.pth", *shlex.split(options)])
    parts = tuple(filter(None, args.parts.split(",")))
    return Choice(args.source, args.prefix, args.norm, parts, tuple(args.drop))


def convert(content: dict[str, Any], options: str = "") -> Conversion:
    return convert_state(content, "some/file.pth", asked(options))


def refusal(content: dict[str, Any], options: str = "") -> str:
    with pytest.raises(CheckpointError) as error:
        convert(content, options)
    message = str(error.value)
    assert message.startswith("some/file.pth: ") and "\n" not in message
    return message


def advised(message: str) -> list[str]:
    return [options.strip() if word == "with" else "" for word, options in _WAY.findall(message)]


def without(state: State, part: str) -> State:
    return {key: value for key, value in state.items() if part not in key}


def damaged(state: State) -> State:
    return {key: value for key, value in state.items() if key != "layer3.0.conv2.weight"}


def head(*names: str) -> State:
    return {name: torch.ones(4, 4) for name in names}


def group_norm(state: State) -> State:
    return without(without(state, "running_"), "num_batches")


def soco_without_a_level(net: nn.Module) -> dict[str, Any]:
    return {
        "model": under("module.encoder.", trunk(net))
        | tensors(module__neck__lateral_convs__0__conv__weight=(8, 8, 1, 1))
    }


Build = Callable[[nn.Module], dict[str, Any]]
# name -> the file, the options that are given, and all ways that the message must advise ("": no option at all)
ADVICE: dict[str, tuple[Build, str, list[str]]] = {
    "unknown place, with a classifier": (
        lambda net: under("encoder.", net.state_dict()),
        "",
        ["--prefix encoder."],
    ),
    "unknown place, with a head of two layers": (
        lambda net: under("encoder.", trunk(net) | head("fc.0.weight", "fc.2.weight")),
        "",
        ["--prefix encoder."],
    ),
    "unknown place and a head of one's own": (
        lambda net: under("encoder.", trunk(net) | head("my_head.0.weight")),
        "",
        [r"--prefix encoder. --drop '^encoder\.my_head\.'"],
    ),
    "beside a transformer": (
        lambda net: under("visual.", trunk(net)) | head("text.blocks.0.attn.qkv.weight"),
        "",
        ["--prefix visual."],
    ),
    "two networks": (
        lambda net: {"state_dict": under("left.", trunk(net)) | under("right.", other(trunk(net)))},
        "",
        ["--prefix left.", "--prefix right."],
    ),
    "two networks of one prefix": (
        lambda net: {"one": trunk(net), "two": other(trunk(net))},
        "",
        ["--prefix one.", "--prefix two."],
    ),
    "two networks of one prefix, which is given": (
        lambda net: {"one": trunk(net), "two": other(trunk(net))},
        "--prefix ''",
        ["--prefix one.", "--prefix two."],
    ),
    "networks in a list": (
        lambda net: {"nets": [trunk(net), other(trunk(net))]},
        "",
        ["--prefix nets.0.", "--prefix nets.1."],
    ),
    "mistyped prefix": (
        lambda net: under("backbone.", net.state_dict()) | under("teacher.", other(trunk(net))),
        "--prefix backbon.",
        ["--prefix backbone.", "--prefix teacher."],
    ),
    "mistyped prefix, another head": (
        lambda net: {"state_dict": under("module.net.", trunk(net) | head("mine.weight"))},
        "--prefix encoder",
        [r"--prefix net. --drop '^module\.net\.mine\.'"],
    ),
    "no network without a prefix": (
        lambda net: {"state_dict": under("net.", trunk(net))},
        "--prefix ''",
        ["--prefix net."],
    ),
    "prefix of what is above the network": (
        lambda net: {"state_dict": under("model.backbone.", trunk(net))},
        "--prefix model.",
        ["--prefix model.backbone."],
    ),
    "prefix of a damaged network": (
        lambda net: under("net.", trunk(net)) | under("ema.", damaged(trunk(net))),
        "--prefix ema.",
        ["--prefix net."],
    ),
    "source of another project": (
        lambda net: {"state_dict": under("backbone.", trunk(net))},
        "--source moco",
        [""],
    ),
    "source of another project, unknown place": (
        lambda net: {"state_dict": under("mine.", trunk(net))},
        "--source moco",
        ["--prefix mine."],
    ),
    "GroupNorm": (lambda net: group_norm(trunk(net)), "", ["--norm GN"]),
    "GroupNorm at an unknown place": (
        lambda net: under("net.", group_norm(trunk(net))),
        "--prefix nte.",
        ["--prefix net. --norm GN"],
    ),
    "not GroupNorm": (lambda net: dict(trunk(net)), "--norm GN", [""]),
    "encoder and projector of no known project": (
        lambda net: (
            under("encoder.", trunk(net)) | head("projector.0.weight", "projector.0.bias", "projector.2.weight")
        ),
        "",
        ["--prefix encoder."],
    ),
    "head with a line break in its name": (
        lambda net: trunk(net) | head("mine\n.weight", "\x1b[0m.bias"),
        "",
        [r"--drop '^(mine\W|\W\[0m)\.'"],
    ),
    "heads at the top": (
        lambda net: trunk(net) | head("simclr_layer.0.weight", "simclr_layer.2.bias"),
        "",
        [r"--drop '^simclr_layer\.'"],
    ),
    "several at the top": (
        lambda net: trunk(net) | head("simclr.0.weight", "prior") | {"mean": torch.ones(3)},
        "",
        ["--drop '^(simclr|prior|mean)([./|]|$)'"],
    ),
    "many at the top, wrapped": (
        lambda net: under("module.", trunk(net) | head(*(f"bank_{n}.weight" for n in range(300)))),
        "",
        [r"--drop '^module\.(?!(bn1|conv1|layer1|layer2|layer3|layer4)[./|])'"],
    ),
    "in a known source": (
        lambda net: {"state_dict": under("model.net.", trunk(net) | head("mine.0.weight")), **LIGHTNING},
        "",
        [r"--drop '^model\.net\.mine\.'"],
    ),
    "drop that finds nothing": (
        lambda net: trunk(net) | head("simclr.0.weight"),
        "--drop '^simclr_head'",
        [r"--drop '^simclr\.'"],
    ),
    "drop that finds the backbone": (
        lambda net: trunk(net) | head("layer_head.0.weight"),
        "--drop layer",
        [r"--drop '^layer_head\.'"],
    ),
    "drop that is not needed": (lambda net: dict(net.state_dict()), "--drop nothing", [""]),
    "wrapped and not": (
        lambda net: trunk(net) | under("module.", other(trunk(net))),
        "",
        [r"--drop '(^|\.)module\.'", r"--drop '^(?!(.*\.)?module\.)'"],
    ),
    "open input": (
        lambda net: {"model": detectron2(trunk(net))},
        "",
        ["--source detectron2-caffe-unseen", "--source detectron2-torchvision"],
    ),
    "a detector where none is kept": (
        lambda net: {"state_dict": detectron2(trunk(net), "backbone.bottom_up.")},
        "",
        [
            "--source detectron2-caffe-unseen --prefix backbone.bottom_up.",
            "--source detectron2-torchvision --prefix backbone.bottom_up.",
        ],
    ),
    "a row of layers at an unknown place": (
        lambda net: under("features.", sequential(trunk(net))),
        "",
        ["--source lightly-examples --prefix features.", "--source byol-sthalles --prefix features."],
    ),
    "not divided by a std": (
        lambda net: under("backbone.", caffe(net)),
        "",
        ["--source caffe --prefix backbone.", "--source backbone"],
    ),
    "a part that the source has not": (lambda net: dict(trunk(net)), "--with fpn", [""]),
    "a part of which a level is missing": (soco_without_a_level, "--with fpn", [""]),
}


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network("resnet50", 0.125)


@pytest.mark.parametrize("name", ADVICE)
def test_every_advised_option_converts_the_file(name: str, net: nn.Module) -> None:
    build, given, ways = ADVICE[name]
    content = build(net)
    message = refusal(content, given)
    assert advised(message) == ways, message
    for options in ways:
        conversion = convert(content, options)
        assert len(conversion.mapped) in (265, 159)  # BatchNorm's, GroupNorm's
        drops = {reason for reason in conversion.dropped.values() if "--drop" in reason}
        assert drops == {f"as --drop {pattern} says" for pattern in asked(options).drop}


@pytest.mark.parametrize(
    ("build", "given", "words"),
    [
        # What is wrong with the only network is said instead of an option that would be refused.
        (lambda net: under("net.", trunk(net) | {"conv1.weight": torch.ones(8, 3, 3, 3)}), "", "CIFAR stem"),
        (lambda net: under("net.", trunk(net) | head("layer1.0.se.fc1.weight")), "", "channel attention"),
        (lambda net: under("net.", trunk(net) | head("conv2.weight")), "--prefix nt.", "unknown keys inside"),
        (lambda net: under("visual.", trunk(net) | head("attnpool.c_proj.weight", "conv2.weight")), "", "CLIP"),
        # A drop cannot make another network a ResNet.
        (lambda net: trunk(net) | head("layer1.0.se.fc1.weight"), r"--drop '\.se\.'", "channel attention"),
        (lambda net: trunk(net) | head("conv2.weight", "bn2.weight"), "--drop '^(conv|bn)2'", "unknown keys inside"),
        (lambda net: trunk(net) | head("relu.weight"), "--drop relu", "unknown keys inside"),
        (lambda net: damaged(trunk(net)), "--drop layer3", "1 of the 265 tensors"),
        (lambda net: without(trunk(net), "layer2.0.bn1.running_mean"), "", "1 of the 265 tensors"),
    ],
)
def test_nothing_is_advised_where_nothing_helps(build: Build, given: str, words: str, net: nn.Module) -> None:
    message = refusal(build(net), given)
    assert words in message and not advised(message), message


@pytest.mark.parametrize("prefix", ["net", "net.", "module.net.", "'net.'", "net.*", " net. ", "state_dict.net."])
def test_a_prefix_may_be_typed_as_messages_and_files_spell_it(prefix: str, net: nn.Module) -> None:
    content = {"state_dict": under("module.net.", net.state_dict())}
    conversion = convert_state(content, "x.pth", Choice(prefix=prefix))
    assert torch.equal(conversion.source_tensors["conv1.weight"], net.conv1.weight)
    assert conversion.source.name == "network under `net.`"


def test_the_companion_can_be_taken_by_its_prefix(net: nn.Module) -> None:
    conversion = convert(LAYOUTS["moco-v2-training"].build(net), "--prefix encoder_k.")
    assert torch.equal(conversion.source_tensors["conv1.weight"], net.conv1.weight + 1)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "*"])
def test_an_expression_that_is_none_is_told(pattern: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--drop {pattern!r} is not a regular expression")):
        Choice(drop=(pattern,))


@pytest.mark.parametrize("name", ["soco_without_a_level", "pycontrast-released", "simclr-released"])
def test_a_report_offers_only_what_the_file_has(name: str, net: nn.Module) -> None:
    builds: dict[str, Build] = {
        "soco_without_a_level": soco_without_a_level,
        "pycontrast-released": lambda net: {"model": LAYOUTS["pycontrast"].build(net)["model"]},
        "simclr-released": LAYOUTS["simclr-tensorflow"].build,
    }
    conversion = convert(builds[name](net))
    said = " ".join((*conversion.notes, *conversion.dropped.values(), conversion.source.encoder))
    assert "--" not in said


@pytest.mark.parametrize("name", ["pycontrast", "simclr-tensorflow"])
def test_a_moving_average_that_a_report_offers_converts(name: str, net: nn.Module) -> None:
    content = LAYOUTS[name].build(net)
    if name == "simclr-tensorflow":
        content |= {f"ema_model/{key}": value + array(1) for key, value in content.items() if "base_model" in key}
    first = convert(content)
    offers = [note for note in first.notes if "--source" in note]
    assert len(offers) == 1
    second = convert(content, re.findall(r"--source \S+", offers[0])[0])
    assert torch.equal(second.source_tensors["conv1.weight"], first.source_tensors["conv1.weight"] + 1)


def test_no_record_advises_an_option() -> None:
    """A record does not know the file; what depends on the file is offered where the file is known."""
    assert not [s.key for s in SOURCES if "--" in " ".join((s.encoder, *s.notes, *(r for _, r in s.dropped)))]
    assert {s.average for s in SOURCES} - {""} == {s.key for s in SOURCES if s.on_request}


def test_a_detector_and_its_own_preparation_of_pixels_are_noted(net: nn.Module) -> None:
    state = trunk(net) | head("rpn.head.weight") | {"mean": torch.tensor([0.5, 0.4, 0.25])}
    notes = " ".join(convert(state, "--drop '^(rpn|mean)'").notes)
    assert "the backbone alone was converted" in notes and "`mean` holds [0.5, 0.4, 0.25]" in notes


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
    return runpy.run_path(str(TOOL))["main"]()


def test_the_tool_drops_and_says_so(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(trunk(net) | head("simclr_layer.0.weight", "simclr_layer.0.bias", "queue.0"), tmp_path / "in.pth")
    files = tmp_path / "in.pth", tmp_path / "out.pth"
    assert run(monkeypatch, *files) == 2
    words = shlex.split(advised(capsys.readouterr().err)[0])
    assert run(monkeypatch, *files, "--report", tmp_path / "report.json", *words) == 0
    assert "dropped 3: as --drop ^(simclr_layer|queue)\\. says" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["drop"] == {words[1]: 3} and report["dropped"]["queue.0"] == f"as --drop {words[1]} says"
    assert run(monkeypatch, *files, "--drop", "(") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "regular expression" in error


def test_what_bake_and_the_way_back_advise(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(LAYOUTS["simclr-sthalles"].build(net), tmp_path / "in.pth")
    files, quick = (tmp_path / "in.pth", tmp_path / "out.pth"), "--no-proof"
    assert run(monkeypatch, *files, quick, "--bake") == 2 and "convert without --bake" in capsys.readouterr().err
    assert run(monkeypatch, *files, "--to", "torchvision") == 2
    assert "convert this one without --to first, and then give the file that was written" in capsys.readouterr().err
    assert run(monkeypatch, *files, quick) == 0
    assert run(monkeypatch, files[1], tmp_path / "back.pth", "--to", "torchvision") == 0
    assert run(monkeypatch, "--list") == 0  # catalog.py's advice
    torch.save({"model": under("net.", trunk(net)), "facts": facts(net).as_dict()}, files[0])
    assert run(monkeypatch, *files, "--to", "moco") == 2
    assert "convert it without --to first, and then give the file that was written" in capsys.readouterr().err
    assert run(monkeypatch, *files, quick) == 2 and "--prefix net." in capsys.readouterr().err
    assert run(monkeypatch, *files, quick, "--prefix", "net.") == 0
    assert run(monkeypatch, files[1], tmp_path / "back.pth", "--to", "moco") == 0


# Text of a message that names an option -> the row of ADVICE, or the test, that types it in.
COVERED = {
    ("back.py", "or convert this one without --to first"): "test_what_bake_and_the_way_back_advise",
    ("back.py", "; convert it without --to first"): "test_what_bake_and_the_way_back_advise",
    ("back.py", "use --to timm, or --to moco"): "test_the_way_back_is_exact",
    ("bake.py", "convert without --bake"): "test_what_bake_and_the_way_back_advise",
    ("bake.py", "use its config without --bake"): "test_the_report_and_the_command",
    ("catalog.py", "moco-d2 convert --list"): "test_what_bake_and_the_way_back_advise",
    ("choice.py", "--source"): "source of another project",
    ("choice.py", "--prefix"): "mistyped prefix",
    ("choice.py", "--norm"): "GroupNorm",
    ("choice.py", "--with"): "a part that the source has not",
    ("choice.py", "--heads"): "a classifier, and no word on the input",
    ("choice.py", "--drop"): "heads at the top",
    ("choice.py", "--drop "): "test_an_expression_that_is_none_is_told",
    ("convert.py", " (--with "): "test_a_report_offers_only_what_the_file_has",
    ("convert.py", "--source "): "test_a_moving_average_that_a_report_offers_converts",
    ("convert.py", "--heads is for ViTs"): "test_heads_come_from_the_user_the_facts_or_a_sidecar",
    ("keys.py", "as --drop "): "test_the_tool_drops_and_says_so",
    ("keys.py", " and of --with"): "drop that finds the backbone",
    ("keys.py", "--drop "): "drop that finds nothing",
    ("refusals.py", "it does not look like --source "): "source of another project",
    ("refusals.py", " (--prefix "): "mistyped prefix",
    ("prove_vit.py", "--no-proof"): "test_without_timm_the_proof_is_refused_before_anything_is_written",
    ("vit.py", "--with"): "test_options_of_resnets_are_refused",
    ("vit.py", "--norm"): "test_options_of_resnets_are_refused",
    ("vit.py", "give it with --heads N"): "test_heads_come_from_the_user_the_facts_or_a_sidecar",
    ("vit.py", "(--heads N says another number)"): "test_heads_come_from_the_user_the_facts_or_a_sidecar",
    ("vit.py", "--drop "): "an expression that finds the network",
    ("vit_find.py", "--source "): "test_a_source_of_vits_that_the_file_is_not",
    ("vit_find.py", "it does not look like --source "): "a wrong source",
    ("vit_find.py", " (--prefix "): "a mistyped prefix",
}


def test_no_message_names_an_option_that_is_not_tried_here() -> None:
    found = set()
    for path in [*(ROOT / "moco_d2" / "convert").rglob("*.py"), ROOT / "moco_d2" / "io" / "checkpoints.py"]:
        tree = ast.parse(path.read_text())
        bodies = [node.body for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = [body[0].value for body in bodies if body and isinstance(body[0], ast.Expr)]
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.search(r"--[a-z]", text) and node not in docstrings:
                found.add(next((key for key in COVERED if key[0] == path.name and key[1] in text), (path.name, text)))
                found |= {key for key in COVERED if key == (path.name, text)}
    assert found == set(COVERED)
    rows = {*ADVICE, *globals(), *test_vit_convert.ADVICE, *vars(test_vit_convert)}
    assert set(COVERED.values()) <= rows

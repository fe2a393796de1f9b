"""Conversion of ViTs: every layout bit for bit and with proof, the way back, heads, questions and refusals."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import checkpoint_layouts
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import SimpleFeaturePyramid
from torch import nn
from vit_layouts import ASKED, LAYOUTS, facts, fixed, head, hugging_face, network, torchvision, trunk, under

from moco_d2.commands import convert as command
from moco_d2.convert import CheckpointError, Choice, ProofError, convert_checkpoint, convert_state, read_checkpoint
from moco_d2.convert.back import restore, take_back
from moco_d2.convert.prove_vit import detectron2_vit, measure_apart, prove_vit
from moco_d2.convert.report import convert_and_report, summary
from moco_d2.convert.sources import SOURCES, VIT_SOURCES
from moco_d2.facts import IMAGENET_RGB, ResNetFacts, ViTFacts

HEADS = Choice(heads=2)


def choice_of(source: str) -> Choice:
    return replace(HEADS, source=source if source in ASKED else "")


def test_every_record_has_a_layout_and_is_documented() -> None:
    keys = {source.key for source in VIT_SOURCES}
    assert set(LAYOUTS) == keys and not keys & {source.key for source in SOURCES}
    documented = (Path(__file__).parents[2] / "docs/checkpoints.md").read_text()
    assert [key for key in keys if f"`{key}`" not in documented] == []


@pytest.mark.parametrize("source", LAYOUTS)
def test_every_tensor_comes_out_bit_for_bit_and_the_tokens_agree(source: str, tmp_path: Path) -> None:
    checkpoint = LAYOUTS[source]()
    torch.save(checkpoint, tmp_path / "in.pth")
    conversion, differences = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", choice=choice_of(source))
    assert conversion.source.key == source and differences["tokens"] < 1e-12
    wanted = trunk(seed=1) if source == "dino-vit-student" else trunk()
    wanted |= {"pos_embed": fixed(mae=source == "mae")["pos_embed"]} if "moco_v3" in source or source == "mae" else {}

    written = read_checkpoint(tmp_path / "out.pth")
    assert set(written["model"]) == {f"backbone.net.{n}" for n in wanted if not re.match(r"cls_token|norm\.", n)}
    named = {n.removeprefix("backbone.net."): t for n, t in (written["model"] | written.get("beside", {})).items()}
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in named.items())
    lacking = {"mae-finetuned": r"norm\.", "detectron2-vit": r"cls_token|norm\."}.get(source, "$^")
    assert set(wanted) - set(named) == {name for name in wanted if re.match(lacking, name)}

    # Every key is mapped once, dropped or foreign.
    sorted_keys = [*conversion.mapped, *conversion.dropped, *conversion.foreign]
    assert len(sorted_keys) == len(set(sorted_keys))
    place = read_checkpoint(tmp_path / "in.pth")
    for part in filter(None, conversion.place.split(".")):
        place = place[part]
    assert set(sorted_keys) == set(place)
    own = source.startswith("moco_d2")
    assert written["facts"]["heads"] == 2 and written["facts"]["recipe"] == ("a_recipe" if own else "")
    halves = source in ("timm-vit", "transformers-vit")
    assert written["facts"]["pixels"]["mean"] == ([127.5] * 3 if halves else list(IMAGENET_RGB.mean))


@pytest.mark.parametrize("suffix", [".pth", ".pkl"])
@pytest.mark.parametrize("source", ["moco_d2-vit", "moco_d2-training-vit", "transformers-vit-mae"])
def test_the_way_back_is_exact(source: str, suffix: str, tmp_path: Path) -> None:
    torch.save(LAYOUTS[source](), tmp_path / "in.pth")
    out = tmp_path / f"out{suffix}"
    convert_checkpoint(tmp_path / "in.pth", out, proof=False, choice=HEADS)
    restore(out, tmp_path / "back.pth", "timm")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert list(back) == list(trunk())
    assert all(torch.equal(back[name], tensor) for name, tensor in trunk().items())
    assert not network().load_state_dict(back | network().head.state_dict(prefix="head.")).missing_keys
    restore(out, tmp_path / "moco.pth", "moco")
    assert convert_state(read_checkpoint(tmp_path / "moco.pth"), "x", HEADS).source.key == "moco_v3-vit"
    with pytest.raises(CheckpointError, match="--to timm"):
        restore(out, tmp_path / "torchvision.pth", "torchvision")
    # A converted file is a source, and so is what came back.
    again = convert_state(read_checkpoint(out), "x")
    assert again.source.key == "detectron2-vit" and not any(again.elsewhere.values())
    assert all(torch.equal(again.source_tensors[name], tensor) for name, tensor in trunk().items())


class Detector(nn.Module):
    """The part of a detector that holds a ViT: Detectron2's simple feature pyramid on it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        norms: Any = {"scale_factors": (2.0, 1.0), "top_block": None, "norm": "LN"}
        self.backbone = SimpleFeaturePyramid(net, "tokens", out_channels=32, **norms)


def test_detectron2_loads_the_file_and_nothing_of_it_lands_elsewhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(LAYOUTS["moco_d2-vit"](), tmp_path / "in.pth")
    made, _ = convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    other = convert_state({"state_dict": trunk(1), "facts": facts().as_dict()}, "x")
    detector = Detector(detectron2_vit(facts(), other.tensors).float())
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(detector).load(str(tmp_path / "out.pth"))
    assert "not used by the model" not in caplog.text  # the class token and the last norm are beside the model
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, made.tensors[name] if name in made.tensors else before[name]), name
    assert all(not torch.equal(before[name], tensor) for name, tensor in made.tensors.items())

    # A trained detector: what it lacks stays lacking, and the notes say so.
    trained = detector.state_dict() | {"backbone.net.blocks.0.attn.rel_pos_h": torch.zeros(7, 16)}
    content = {"model": dict(trained), "facts": facts().as_dict()}
    with pytest.raises(CheckpointError, match="relative positions"):
        convert_state(content, "model_final.pth")
    back = take_back(content, "model_final.pth")
    assert list(back.tensors) == [name for name in trunk() if not re.match(r"cls_token|norm\.", name)]
    assert all(torch.equal(tensor, trunk()[name]) for name, tensor in back.tensors.items())
    assert back.facts.recipe == "" and "fine-tuned in a detector" in back.facts.origin
    assert all(word in " ".join(back.notes) for word in ("no cls_token", "windows", "1 tables of relative"))


def test_the_proof_finds_a_mistake() -> None:
    made = convert_state(LAYOUTS["moco_d2-vit"](), "x")
    assert isinstance(made.facts, ViTFacts)
    name = "backbone.net.blocks.1.attn.qkv.weight"
    swapped = torch.cat([made.tensors[name][32:64], made.tensors[name][:32], made.tensors[name][64:]])
    for tensors, words in (
        ({**made.tensors, name: swapped}, "tokens by"),
        ({**made.tensors, name: made.tensors[name] * torch.nan}, "tokens by nan"),
        ({k: v for k, v in made.tensors.items() if k != name}, "lacks"),
    ):
        with pytest.raises(ProofError, match=words):
            prove_vit(made.facts, made.source_tensors, tensors)


def test_what_detectron2_computes_otherwise_is_measured() -> None:
    made = convert_state(LAYOUTS["moco_d2-vit"](), "x")
    assert isinstance(made.facts, ViTFacts)
    apart = measure_apart(made.facts, made.source_tensors, made.tensors)
    assert all(1e-4 < apart[name] < 0.3 for name in ("class token", "larger", "smaller"))
    flat = {**made.source_tensors, "pos_embed": torch.ones(1, 17, 32)}  # which no filter changes
    resized = measure_apart(made.facts, flat, {**made.tensors, "backbone.net.pos_embed": flat["pos_embed"]})
    assert max(resized["larger"], resized["smaller"]) < 1e-6 < resized["class token"]
    no_values = {name: torch.zeros_like(t) if "attn.proj" in name else t for name, t in made.source_tensors.items()}
    written = {f"backbone.net.{name}": no_values[name] for name in no_values if not re.match(r"cls_token|norm\.", name)}
    assert measure_apart(made.facts, no_values, written)["class token"] < 1e-12  # attention that adds nothing


def test_the_report_and_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(LAYOUTS["dino-vit"](), tmp_path / "in.pth")
    arguments = [str(tmp_path / "in.pth"), str(tmp_path / "out.pth"), "--heads", "2"]
    assert command.main([*arguments, "--report", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    assert "ViT of 2 blocks, 32 features, 2 heads, patches of 8, pretrained on 32x32 pixels" in text
    assert "proof    largest relative difference: tokens" in text and "class token" in text and "your word" in text
    assert "MODEL.BACKBONE.NAME build_vit_sfp_backbone" in text and "MODEL.VIT.NUM_HEADS 2" in text
    report = json.loads((tmp_path / "report.json").read_text())
    assert set(report["apart"]) == {"class token", "larger", "smaller"}
    assert "NUM_HEADS: 2" in (tmp_path / "out.yaml").read_text()
    assert command.main([str(tmp_path / "out.pth"), str(tmp_path / "back.pth"), "--to", "timm"]) == 0
    assert command.main([*arguments[:2], "--bake", "--heads", "2"]) == 2 and "only ResNets" in capsys.readouterr().err
    picture = torch.zeros(3, 40, 50)
    assert convert_checkpoint(arguments[0], arguments[1], choice=HEADS, picture=picture)[1]["tokens"] < 1e-12
    unproven = convert_and_report(arguments[0], arguments[1], proof=False, choice=HEADS)
    assert unproven["apart"] == {} and "proof    not made" in summary(unproven)


def test_without_timm_the_proof_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(LAYOUTS["moco_d2-vit"](), tmp_path / "in.pth")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "timm" or None)
    with pytest.raises(ProofError, match=r"pip install 'moco_d2\[vit\]'"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "timm"]:
        monkeypatch.setitem(sys.modules, name, None)
    convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", proof=False)


def wide(dim: int) -> dict[str, torch.Tensor]:
    """A ViT of one block, by shapes alone; every value is 1."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, 5, dim), "patch_embed.proj.weight": (dim, 3, 8, 8)}
    layers = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim), "mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    shapes |= {"patch_embed.proj.bias": (dim,)}
    shapes |= {f"blocks.0.{name}.weight": shape for name, shape in layers.items()}
    shapes |= {f"blocks.0.{name}.bias": shape[:1] for name, shape in layers.items()}
    norms = [f"{name}.{kind}" for name in ("norm", "blocks.0.norm1", "blocks.0.norm2") for kind in ("weight", "bias")]
    return {name: torch.ones(shape) for name, shape in (shapes | dict.fromkeys(norms, (dim,))).items()}


@pytest.mark.parametrize(
    ("dim", "source", "heads", "note"),
    [(384, "", 6, "assumed"), (192, "", 3, "assumed"), (1280, "", 16, "assumed"), (384, "moco_v3-vit", 12, "MoCo v3")],
)
def test_heads_come_from_the_record_or_the_usual_rule(dim: int, source: str, heads: int, note: str) -> None:
    file = {"state_dict": under("module.base_encoder.", wide(dim))} if source else wide(dim)
    made = convert_state(file, "x.pth")
    assert isinstance(made.facts, ViTFacts) and made.facts.heads == heads
    assert any(f"{heads} heads" in text and note in text and "--heads N" in text for text in made.notes)


def test_heads_come_from_the_user_the_facts_or_a_sidecar(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="give it with --heads N"):
        convert_state(trunk(), "x.pth")
    with pytest.raises(CheckpointError, match="multiple of heads"):
        convert_state(trunk(), "x.pth", Choice(heads=5))
    with pytest.raises(CheckpointError, match="heads is 4 by the tensors, 2 by the facts"):
        convert_state(LAYOUTS["moco_d2-vit"](), "x.pth", Choice(heads=4))
    with pytest.raises(CheckpointError, match="--heads is for ViTs"):
        convert_state(checkpoint_layouts.network().state_dict(), "x.pth", HEADS)
    with pytest.raises(ValueError, match="positive whole number"):
        Choice(heads=-1)
    config: dict[str, Any] = {"model_args": {"num_heads": 4}, "pretrained_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    made = convert_state(trunk() | head(), tmp_path / "model.pth")
    assert isinstance(made.facts, ViTFacts) and (made.facts.heads, made.facts.pixels.mean) == (4, (127.5,) * 3)


Build = Callable[[], dict[str, Any]]
ADVICE: dict[str, tuple[Build, Choice, list[str]]] = {
    "a classifier, and no word on the input": (
        lambda: dict(trunk() | head()),
        HEADS,
        ["--source deit --heads 2", "--source timm-vit --heads 2"],
    ),
    "transformers without a preprocessor": (
        lambda: dict(hugging_face(trunk())),
        HEADS,
        ["--source transformers-vit --heads 2", "--source transformers-vit-imagenet --heads 2"],
    ),
    "an unknown place": (lambda: {"net": under("trunk.", trunk())}, HEADS, ["--prefix trunk."]),
    "a moving average alone": (
        lambda: {"state_dict": under("momentum_encoder.", trunk())},
        HEADS,
        ["momentum_encoder."],
    ),
    "a mistyped prefix": (lambda: dict(trunk()), replace(HEADS, prefix="net."), ["--prefix '' --heads 2"]),
    "unknown keys": (lambda: dict(trunk() | {"my.layer.weight": torch.ones(3)}), HEADS, [r"--drop '^(my\.)'"]),
    "an expression that finds the network": (trunk, replace(HEADS, drop=("norm",)), ["without --drop norm"]),
    "an expression that finds nothing": (trunk, replace(HEADS, drop=("x{9}",)), ["matches no key"]),
    "a source of ResNets": (LAYOUTS["moco_v3-vit"], replace(HEADS, source="moco_v3"), ["without --source moco_v3"]),
    "a wrong source": (
        lambda: {"teacher": under("backbone.", trunk())},
        replace(HEADS, source="mae"),
        ["without --source"],
    ),
    "two networks": (
        lambda: {"state_dict": under("a.", trunk()) | under("b.", trunk(1))},
        HEADS,
        ["--prefix a.", "--prefix b."],
    ),
}


@pytest.mark.parametrize("name", ADVICE)
def test_questions_name_options_that_work(name: str) -> None:
    build, choice, words = ADVICE[name]
    with pytest.raises(CheckpointError) as question:
        convert_state(build(), "some/file.pth", choice)
    message = str(question.value)
    assert message.startswith("some/file.pth: ") and "\n" not in message
    assert all(word in message for word in words), message
    answers = question.value.answers  # type: ignore[attr-defined]
    assert answers and all(convert_state(build(), "x", answer.choices[0]).tensors for answer in answers)


def changed(**tensors: Any) -> dict[str, Any]:
    """The trunk with other tensors (`__` stands for a dot); a function makes one of the old one."""
    named = {key.replace("__", "."): value for key, value in tensors.items()}
    state = trunk()
    return state | {key: value(state[key]) if callable(value) else value for key, value in named.items()}


REFUSALS: dict[str, tuple[Build, list[str]]] = {
    "registers": (lambda: changed(register_tokens=torch.ones(1, 4, 32)), ["register tokens", "without registers"]),
    "layer scale": (lambda: changed(blocks__0__ls1__gamma=torch.ones(32)), ["LayerScale", "DINOv2"]),
    "layer scale of transformers' DINOv2": (
        lambda: hugging_face(trunk()) | {"encoder.layer.0.layer_scale1.lambda1": torch.ones(32)},
        ["LayerScale"],
    ),
    "distilled": (lambda: changed(dist_token=torch.ones(1, 1, 32)), ["distilled DeiT", "without distillation"]),
    "beit": (lambda: changed(blocks__0__attn__relative_position_bias_table=torch.ones(9, 2)), ["BEiT"]),
    "clip": (lambda: changed(norm_pre__weight=torch.ones(32)), ["CLIP's ViT"]),
    "clip of transformers": (lambda: {"vision_model.pre_layrnorm.weight": torch.ones(3)}, ["CLIP's vision"]),
    "swin": (
        lambda: {
            "patch_embed.proj.weight": torch.ones(8, 3, 4, 4),
            "layers.0.blocks.0.attn.qkv.weight": torch.ones(24, 8),
        },
        ["Swin"],
    ),
    "query norms": (lambda: changed(blocks__0__attn__q_norm__weight=torch.ones(16)), ["normalises queries"]),
    "patches that are not square": (
        lambda: changed(patch_embed__proj__weight=torch.ones(32, 3, 8, 16)),
        ["(32, 3, 8, 16)", "square patches"],
    ),
    "grey pictures": (lambda: changed(patch_embed__proj__weight=torch.ones(32, 1, 8, 8)), ["3-channel"]),
    "a convolutional stem": (lambda: {"patch_embed.0.weight": torch.ones(8, 3, 3, 3)}, ["only plain ViTs"]),
    "no class token's position": (lambda: changed(pos_embed=torch.ones(1, 16, 32)), ["16 rows"]),
    "a narrow mlp": (lambda: changed(blocks__0__mlp__fc1__weight=torch.ones(64, 32)), ["wrong shape", "mlp.fc1"]),
    "a missing block": (
        lambda: {key: value for key, value in trunk().items() if "blocks.0.norm2" not in key},
        ["incomplete ViT of 2 blocks", "2 of its 30", "blocks.0.norm2.weight"],
    ),
    "no biases": (lambda: {k: v for k, v in trunk().items() if "qkv.bias" not in k}, ["incomplete", "biases"]),
    "more in a block": (lambda: changed(blocks__0__adapter__weight=torch.ones(3)), ["unknown keys inside"]),
    "integers": (lambda: changed(cls_token=torch.Tensor.int), ["not floating point"]),
    "not finite": (lambda: changed(blocks__1__mlp__fc2__bias=lambda t: t / 0), ["NaN or infinity"]),
    "zeros": (lambda: changed(patch_embed__proj__weight=torch.zeros_like), ["all zero"]),
    "facts of another network": (
        lambda: {"state_dict": trunk(), "facts": replace(facts(), depth=3).as_dict()},
        ["depth is 2 by the tensors, 3 by the facts"],
    ),
    "facts of a resnet": (lambda: {"state_dict": trunk(), "facts": ResNetFacts().as_dict()}, ["vision transformer"]),
    "facts of a vit beside a resnet": (
        lambda: {"state_dict": {"conv1.weight": torch.ones(3)}, "facts": facts().as_dict()},
        ["its facts are a ViT's", "no network in it begins as one"],
    ),
    "a place that its own file names wrongly": (
        lambda: {**LAYOUTS["moco_d2-training-vit"](), "backbone": {"method": "DINO", "prefix": "other."}},
        ["at a place that no known source uses"],
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_say_what_was_found(name: str) -> None:
    build, words = REFUSALS[name]
    with pytest.raises(CheckpointError) as refusal:
        convert_state(build(), "some/file.pth", HEADS if "facts" not in name else None)
    message = str(refusal.value)
    assert message.startswith("some/file.pth: ") and "\n" not in message
    assert all(word in message for word in words), message


def test_options_of_resnets_are_refused() -> None:
    for choice in (replace(HEADS, norm="GN"), replace(HEADS, parts=("fpn",))):
        with pytest.raises(CheckpointError, match="is for ResNets"):
            convert_state(trunk(), "x.pth", choice)


def test_a_source_of_vits_that_the_file_is_not() -> None:
    with pytest.raises(CheckpointError, match="--source mae means a ViT, but no network in it begins as one"):
        convert_state({"conv1.weight": torch.ones(64, 3, 7, 7)}, "x.pth", Choice(source="mae"))


class Payload:
    """Pickles as the call of a function that acts on the machine."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_hostile_file_runs_nothing(tmp_path: Path) -> None:
    torch.save(LAYOUTS["dino-vit"]() | {"args": Payload(tmp_path / "mark")}, tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match="mkdir"):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", choice=HEADS)
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


@pytest.mark.parametrize("names", [("mlp.0", "mlp.3"), ("mlp.linear_1", "mlp.linear_2")])
def test_torchvision_in_both_spellings(names: tuple[str, str]) -> None:
    made = convert_state(torchvision(trunk(), *names), "x", HEADS)
    assert all(torch.equal(made.source_tensors[name], tensor) for name, tensor in trunk().items())

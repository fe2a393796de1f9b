"""Training checkpoints of this project's methods, which name their method and the place of its backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_layouts import LAYOUTS, facts, head, network, other, tensors, trunk, under
from torch import nn

from moco_d2.convert import CheckpointError, Choice, convert_checkpoint, convert_state, read_facts
from moco_d2.convert.back import restore, take_back
from moco_d2.convert.report import report, summary

REST = "the rest of the method's training checkpoint"


@pytest.fixture(scope="module")
def net() -> nn.Module:
    return network("resnet50", 0.125)


def training(net: nn.Module, entry: Any, prefix: str = "online.net.") -> dict[str, Any]:
    """What a method of nobody's saves: two whole networks and a third that no name marks as a copy, heads, a memory."""
    model = under(prefix, trunk(net) | head(2) | tensors(**{"my_head.0.weight": (8, 8)}))
    model |= under("slow.net.", other(trunk(net))) | under("third.", other(other(trunk(net))))
    model |= tensors("prototypes.", weight=(300, 128)) | {"memory": torch.ones(4, 2), "steps": torch.tensor(3)}
    return {"model": model, "backbone": entry, "facts": facts(net).as_dict(), "trainer": {"iteration": 7}}


@pytest.mark.parametrize("prefix", ["online.net.", "backbone.", "student.", ""])
def test_the_network_that_the_file_names_is_converted(prefix: str, net: nn.Module, tmp_path: Path) -> None:
    content = training(net, {"method": "Twins", "prefix": prefix}, prefix)
    torch.save(content, tmp_path / "model_final.pth")
    conversion, _ = convert_checkpoint(tmp_path / "model_final.pth", tmp_path / "out.pth", proof=False)
    wanted = {key: value for key, value in trunk(net).items() if "num_batches" not in key}
    assert set(conversion.source_tensors) == set(wanted)
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in conversion.source_tensors.items())
    assert conversion.facts == read_facts(tmp_path / "out.pth") == facts(net)
    # The report: every other key is the rest of the checkpoint.
    assert not conversion.foreign and {*conversion.mapped, *conversion.dropped} == set(content["model"])
    counters = [key for key in conversion.dropped if key.startswith(prefix) and key.endswith("num_batches_tracked")]
    rest = {key for key, reason in conversion.dropped.items() if reason == REST}
    assert {f"{prefix}my_head.0.weight", f"{prefix}fc.0.bias", "third.conv1.weight", "memory", "steps"} <= rest
    assert prefix == "" or len(rest) + len(counters) == len(conversion.dropped)
    shown = "\n".join(summary(report(conversion, {}, tmp_path / "model_final.pth", tmp_path / "out.pth")))
    assert f": {REST}" in shown and "the backbone that Twins transfers" in shown
    # And the way back takes the same network.
    restored = restore(tmp_path / "model_final.pth", tmp_path / "back.pth", "torchvision")
    assert all(torch.equal(tensor, trunk(net)[key]) for key, tensor in restored.tensors.items())
    assert list(restored.tensors) == list(trunk(net)) and restored.facts == facts(net)


def test_files_without_the_entry_are_mocos(net: nn.Module) -> None:
    content = LAYOUTS["own-training"].build(net)
    named = {**content, "backbone": {"method": "MoCo", "prefix": "encoder_q."}}
    old, new = (convert_state(file, "model_final.pth") for file in (content, named))
    assert old.mapped == new.mapped and old.dropped == new.dropped and not old.foreign
    assert old.source.key == new.source.key == "moco_d2-training"


def test_another_network_of_the_file_can_be_asked_for(net: nn.Module) -> None:
    content = training(net, {"method": "Twins", "prefix": "online.net."})
    conversion = convert_state(content, "x.pth", Choice(prefix="third."))
    assert torch.equal(conversion.source_tensors["conv1.weight"], net.conv1.weight + 1 + 1)


def without(content: dict[str, Any], part: str) -> dict[str, Any]:
    return {**content, "model": {key: value for key, value in content["model"].items() if part not in key}}


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("online.net.", ["`backbone` is damaged", "a mapping of `method`", "backbone.pth in the same folder"]),
        ({"method": "Twins"}, ["`backbone` is damaged"]),
        ({"method": None, "prefix": "online.net."}, ["`backbone` is damaged"]),
        ({"method": "Twins", "prefix": 3}, ["`backbone` is damaged"]),
        ({"method": "Twins", "prefix": None}, ["of Twins", "no sub-module", "convert the backbone.pth in the same"]),
        ({"method": "Twins", "prefix": "gone."}, ["under `gone.` in `model`, but no key starts with `gone.`;"]),
        ({"method": "Twins", "prefix": "prototypes."}, ["1 keys start with `prototypes.`", "not a complete ResNet"]),
    ],
)
def test_a_damaged_entry_is_refused_in_both_directions(entry: Any, words: list[str], net: nn.Module) -> None:
    content = training(net, entry)
    for act in (convert_state, take_back):
        with pytest.raises(CheckpointError) as refusal:
            act(content, "model_final.pth")
        message = str(refusal.value)
        assert message.startswith("model_final.pth: ") and "\n" not in message and "--" not in message
        assert all(word in message for word in words), message


def test_what_is_missing_under_the_entry_s_prefix_is_named(net: nn.Module) -> None:
    content = without(training(net, {"method": "Twins", "prefix": "online.net."}), "online.net.layer4")
    with pytest.raises(CheckpointError, match=r"Twins's backbone is under .* 50 of the 265 .* all of conv5"):
        convert_state(content, "x.pth")
    transformer = training(net, {"method": "Twins", "prefix": "vit."})
    transformer["model"] |= {"vit.patch_embed.proj.weight": torch.ones(8, 3, 16, 16)}
    with pytest.raises(CheckpointError, match="a vision transformer"):
        convert_state(transformer, "x.pth")


def test_a_stranger_s_key_of_this_name_is_no_entry(net: nn.Module) -> None:
    state = {"state_dict": under("module.encoder_q.", trunk(net)), "backbone": "resnet50"}
    assert convert_state(state, "x.pth").source.key == "moco"
    weights = {"backbone": trunk(net)}
    assert len(convert_state(weights, "x.pth", Choice(prefix="")).mapped) == 265

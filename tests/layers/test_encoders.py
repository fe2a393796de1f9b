"""The contract of every registered encoder, and the ResNets' norms and initialisation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from moco_d2.config.values import fits
from moco_d2.facts import BackboneFacts, ResNetFacts
from moco_d2.layers.encoders import ENCODERS, encoder_args, encoder_builder
from moco_d2.layers.heads import head_name, replace_head, without_head
from moco_d2.layers.resnet import build_resnet, describe, network_for


@pytest.mark.parametrize("name", ENCODERS)
def test_every_encoder_keeps_the_contract(name: str) -> None:
    build, args = ENCODERS[name].build, encoder_args(name)
    signature = inspect.signature(build, eval_str=True)
    for key, default in args.items():
        assert fits(default, signature.parameters[key].annotation), f"{key} has a default of its type"
        assert f"    {key}: " in inspect.getdoc(inspect.unwrap(getattr(build, "func", build))), f"{key} is explained"
    with torch.device("meta"):
        network = encoder_builder(name, args)(num_classes=5)
        head = getattr(network, head_name(network))
        assert isinstance(head, nn.Linear) and head.out_features == 5
        backbone = without_head(network)
        facts = ENCODERS[name].describe(backbone, origin="a test", recipe="r")
    assert (facts.origin, facts.recipe) == ("a test", "r") and BackboneFacts.from_dict(facts.as_dict()) == facts
    left = {key for key in network.state_dict() if not key.startswith(f"{head_name(network)}.")}
    assert set(backbone.state_dict()) == left


def test_unknown_encoders_and_arguments_are_told_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"SSL.ENCODER.NAME is 'resnet5'.*did you mean 'resnet50'"):
        encoder_builder("resnet5", {})
    with pytest.raises(ValueError, match=r"SSL.ENCODER.ARGS has 'widths'; resnet18 accepts width, .*mean 'width'"):
        encoder_builder("resnet18", {"widths": 2.0})


def test_a_head_of_another_name_is_replaced_and_left_out() -> None:
    class Net(nn.Module):
        head_name = "head"

        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Flatten(), nn.Linear(12, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stem(x))  # type: ignore[no-any-return]

    network, x = Net(), torch.rand(2, 3, 2, 2)
    replace_head(network, lambda head: nn.Linear(head.in_features, 7))
    assert network(x).shape == (2, 7) and without_head(network)(x).shape == (2, 12)


def state(width: float, **arguments: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_resnet("resnet50", num_classes=3, width=width, **arguments).state_dict()


def test_norms_share_names_and_draws_and_facts_tell_group_norm() -> None:
    plain, synchronised, grouped = (state(0.5, norm=norm) for norm in ("BN", "SyncBN", "GN"))
    assert list(plain) == list(synchronised) and all(torch.equal(plain[key], synchronised[key]) for key in plain)
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert list(grouped) == [key for key in plain if not key.endswith(statistics)]
    assert all(torch.equal(plain[key], grouped[key]) for key in grouped)

    network = build_resnet("resnet18", width=0.5, norm="GN")
    assert {m.num_groups for m in network.modules() if isinstance(m, nn.GroupNorm)} == {32}
    facts = describe(network)
    assert (facts.norm, describe(build_resnet("resnet18", width=0.5, norm="SyncBN")).norm) == ("GN", "BN")
    x = torch.rand(2, 3, 32, 32)
    rebuilt = network_for(facts)
    rebuilt.load_state_dict(without_head(network).state_dict())
    assert torch.equal(rebuilt(x), without_head(network)(x))


def test_in_one_process_synchronised_batch_norm_is_batch_norm() -> None:
    x = torch.rand(4, 3, 32, 32)
    torch.manual_seed(0)
    networks = [build_resnet("resnet18", width=0.125, norm=norm) for norm in ("BN", "SyncBN")]
    networks[1].load_state_dict(networks[0].state_dict())
    assert torch.equal(networks[0](x), networks[1](x))
    assert torch.equal(networks[0].eval()(x), networks[1].eval()(x)), "and counts the batch in the same way"


def test_zero_init_residual_makes_every_block_the_identity_and_draws_nothing_else() -> None:
    import torchvision

    plain, zero = state(0.125), state(0.125, zero_init_residual=True)
    changed = {key for key in plain if not torch.equal(plain[key], zero[key])}
    assert changed == {key for key in plain if key.endswith("bn3.weight")} and not any(
        zero[key].any() for key in changed
    )
    reference = torchvision.models.resnet50(zero_init_residual=True).state_dict()
    assert changed == {key for key in reference if key.endswith(".weight") and not reference[key].any()}


def test_facts_of_an_earlier_version_are_read_and_another_kind_is_refused() -> None:
    facts = ResNetFacts(depth=101, origin="here", recipe="moco_v2_R50_200ep")
    earlier = facts.as_dict()
    earlier["protocol"] = earlier.pop("recipe")
    del earlier["kind"], earlier["norm"]
    assert BackboneFacts.from_dict(earlier) == facts
    with pytest.raises(ValueError, match=r"of kind 'mixer'.*knows resnet, vit only: install a newer version"):
        BackboneFacts.from_dict({"kind": "mixer", "patch": 16})
    with pytest.raises(ValueError, match="norm is 'LN'"):
        BackboneFacts.from_dict({**facts.as_dict(), "norm": "LN"})


def test_a_config_without_group_norm_contradicts_weights_that_have_it() -> None:
    from detectron2.config import get_cfg

    cfg, facts = get_cfg(), ResNetFacts(norm="GN")
    cfg.MODEL.RESNETS.NORM = "SyncBN"
    assert "MODEL.RESNETS.NORM is SyncBN in the config, but the weights need GN" in facts.contradictions(cfg)
    assert not any("NORM" in line for line in ResNetFacts().contradictions(cfg))

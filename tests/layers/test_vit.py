"""Vision transformers: position embeddings, initialisation, pictures of any size, and what DINO looks at."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.facts import BackboneFacts, Pixels, ViTFacts
from moco_d2.layers.encoders import encoder_builder, network_for
from moco_d2.layers.heads import without_head
from moco_d2.layers.vit import LastBlocks, build_vit, class_attention, describe, sincos_position
from moco_d2.methods import build_method

SMALL: dict[str, Any] = {"dim": 24, "depth": 3, "heads": 2, "patch": 8, "image": 32}


def small(seed: int = 0, **args: Any) -> Any:
    torch.manual_seed(seed)
    return build_vit(5, **SMALL | args).double()


def test_the_fixed_position_embedding_is_moco_v3s() -> None:
    side, dim = 3, 12
    found = sincos_position(side, dim)
    assert found.shape == (1, 10, dim) and not found[0, 0].any(), "the class token has none"
    for row in range(side):
        for column in range(side):
            expected = [
                function(place / 10000 ** (i / (dim // 4)))
                for place in (row, column)  # the flattened grid varies along rows first
                for function in (math.sin, math.cos)
                for i in range(dim // 4)
            ]
            torch.testing.assert_close(found[0, 1 + row * side + column], torch.tensor(expected))
    network = small(position="sincos")
    assert torch.equal(network.pos_embed, sincos_position(4, 24).double()) and not network.pos_embed.requires_grad


def test_initialisations_have_the_published_bounds() -> None:
    network = small(init="moco_v3")
    bounds = {"qkv": 6 / (24 + 24), "attn.proj": 6 / (24 + 24), "fc1": 6 / (24 + 96), "fc2": 6 / (96 + 24)}
    bounds |= {"patch_embed.proj": 6 / (3 * 64 + 24)}
    for name, module in network.named_modules():
        if kind := next((kind for kind in bounds if name.endswith(kind)), ""):
            bound = math.sqrt(bounds[kind])
            assert 0.95 * bound < module.weight.abs().max() <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), "uniform"
            assert not module.bias.any()
    assert 0 < network.cls_token.abs().max() < 1e-5
    normal = small(init="dino", dim=192)
    first = normal.blocks[0]
    for tensor in (normal.cls_token, normal.pos_embed, first.attn.qkv.weight, first.mlp.fc1.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.2)
    assert small(dim=192).cls_token.abs().max() < 1e-5, "timm's"
    assert {m.eps for m in normal.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}


def test_a_frozen_patch_projection_gets_no_gradient_and_the_output_is_the_class_tokens() -> None:
    network = small(position="sincos", init="moco_v3", freeze_patches=True)
    x = torch.randn(2, 3, 32, 32).double()
    out = network(x)
    tokens = network.patch_embed.proj(x).flatten(2).transpose(1, 2)
    tokens = torch.cat([network.cls_token.expand(2, -1, -1), tokens], 1) + network.pos_embed
    for block in network.blocks:
        q, k, v = block.attn.qkv(block.norm1(tokens)).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        mixed = (q @ k.transpose(2, 3) / math.sqrt(12)).softmax(3) @ v
        tokens = tokens + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp.fc2(F.gelu(block.mlp.fc1(block.norm2(tokens))))
    feature = network.norm(tokens)[:, 0]
    torch.testing.assert_close(out, network.head(feature))
    torch.testing.assert_close(without_head(network)(x), feature)
    out.sum().backward()
    fixed = {name for name, p in network.named_parameters() if p.grad is None}
    assert fixed == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def test_pictures_of_any_size_are_seen_by_dinos_rule() -> None:
    network = small()
    found = network.position(3, 2)
    assert network.position(4, 4) is network.pos_embed
    assert found.shape == (1, 7, 24) and torch.equal(found[:, 0], network.pos_embed[:, 0])
    grid = network.pos_embed[:, 1:].view(1, 4, 4, 24)
    for row, column in ((0, 0), (1, 1), (2, 1)):
        expected = 0.0
        for y, wy in cubic((row + 0.5) * 4 / 3.1 - 0.5):
            for x, wx in cubic((column + 0.5) * 4 / 2.1 - 0.5):
                expected = expected + wy * wx * grid[0, y, x]
        torch.testing.assert_close(found[0, 1 + 2 * row + column], expected, rtol=1e-10, atol=1e-12)
    x = torch.randn(1, 3, 29, 21).double()
    torch.testing.assert_close(network(x), network(x[:, :, :24, :16])), "an incomplete patch is not seen"
    assert network(torch.randn(1, 3, 24, 40).double()).shape == (1, 5)


def cubic(place: float) -> list[tuple[int, float]]:
    """Return the 4 cells around a place of 4, and their weights (cubic convolution, a = -.75; the edge repeats)."""
    first, a = math.floor(place), -0.75
    found = []
    for cell in range(first - 1, first + 3):
        d = abs(place - cell)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        found.append((min(max(cell, 0), 3), near if d <= 1 else far))
    return found


def test_facts_rebuild_the_network_and_tell_the_heads() -> None:
    network = small(heads=4)
    facts = describe(network, Pixels("BGR"), origin="a test")
    assert facts == ViTFacts(patch=8, dim=24, depth=3, heads=4, image=32, pixels=Pixels("BGR"), origin="a test")
    assert BackboneFacts.from_dict(facts.as_dict()) == facts
    rebuilt = network_for(facts).double()
    rebuilt.load_state_dict(without_head(network).state_dict())
    x = torch.randn(1, 3, 32, 32).double()
    torch.testing.assert_close(rebuilt(x), without_head(network)(x))
    with pytest.raises(ValueError, match="class token"):
        network_for(ViTFacts(class_token=False))
    with pytest.raises(ValueError, match="not a plain ViT"):
        describe(nn.Linear(2, 2))


@pytest.mark.parametrize(("args", "words"), [
    ({"position": "sin"}, "ARGS.position is 'sin'; it must be one of learned, sincos"),
    ({"init": "mae"}, "ARGS.init is 'mae'"), ({"drop_path": 1.0}, r"drop_path is 1.0; it must be in \[0, 1\)"),
    ({"dim": 90, "heads": 3, "position": "sincos"}, "multiple of 4"), ({"heads": 5}, "multiple of heads"),
    ({"image": 30}, "image is 30; it must be a multiple of patch"),
])  # fmt: skip
def test_impossible_arguments_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        encoder_builder("vit_tiny", {**SMALL, **args})(2)


def test_the_last_blocks_class_tokens_are_those_of_shorter_networks() -> None:
    network, x = small().eval(), torch.randn(2, 3, 32, 32).double()
    found = LastBlocks(network, 2)(x)
    features = without_head(network)
    expected = [features(x)]
    features.blocks = network.blocks[:2]
    expected.insert(0, features(x))
    torch.testing.assert_close(found, torch.cat(expected, 1))
    for other, words in ((network, "as many blocks; this one has 3"), (nn.Linear(2, 2), "this network is none")):
        with pytest.raises(ValueError, match=words):
            LastBlocks(other, 4)


def test_attention_of_the_class_token_is_the_softmax_of_its_query() -> None:
    network, x = small().eval(), torch.randn(2, 3, 32, 24).double()
    found = class_attention(network, x)
    assert found.shape == (2, 2, 4, 3) and (found > 0).all() and (found.flatten(2).sum(2) < 1).all()
    last = network.blocks[-1]
    ((patches, prefix),) = network.get_intermediate_layers(x, n=[1], return_prefix_tokens=True)
    tokens = torch.cat([prefix, patches], 1)
    q, k, _ = last.attn.qkv(last.norm1(tokens)).view(2, 13, 3, 2, 12).unbind(2)
    scores = torch.stack([q[:, 0, head, None] @ k[:, :, head].transpose(1, 2) for head in range(2)], 1)
    weights = (scores[:, :, 0] / math.sqrt(12)).softmax(2)
    torch.testing.assert_close(found.flatten(2), weights[..., 1:])
    assert not last.attn.qkv._forward_hooks


def test_compiled_and_in_channels_last_it_computes_the_same() -> None:
    network = small()
    pictures = [torch.randn(2, 3, size, size).double() for size in (32, 16)]
    expected = [network(x) for x in pictures]
    network.to(memory_format=torch.channels_last)
    network.compile(backend="eager", fullgraph=True)  # the graph alone: no compiler is needed
    for x, value in zip(pictures, expected, strict=True):
        torch.testing.assert_close(network(x), value)
    with torch.autocast("cpu", torch.bfloat16):
        assert build_vit(5, **SMALL)(pictures[0].float()).dtype == torch.bfloat16


@pytest.mark.parametrize("method", ["DenseCL", "PixPro", "CMC"])
def test_methods_that_need_a_resnet_say_so(method: str) -> None:
    with pytest.raises(ValueError, match=r"SSL\.ENCODER\.NAME to a ResNet"):
        build_method(method, encoder_builder("vit_tiny", SMALL), {})

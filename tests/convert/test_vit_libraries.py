"""ViT checkpoints that other libraries' own code made and saved, compared with the libraries' own forward.

What a conversion makes of them is checked with the class token: the tensors under timm's names, which the proof has
compared with Detectron2's network, give in timm's network what the library computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.models import save_for_hf
from timm.utils import CheckpointSaver
from torch import nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from moco_d2.convert import CheckpointError, Choice, convert_checkpoint
from moco_d2.facts import ViTFacts
from moco_d2.layers.encoders import network_for

TIMM: dict[str, Any] = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, "num_classes": 3}
HUGGING_FACE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
PICTURE = torch.randint(256, (1, 3, 32, 32), generator=torch.Generator().manual_seed(1)).double()  # RGB


def shaken(net: Any) -> Any:
    """The network with weights that do something, as after training."""
    torch.manual_seed(0)
    for name, tensor in net.named_parameters():
        nn.init.normal_(tensor, mean=1.0 if "norm" in name.lower() and "weight" in name else 0.0, std=0.2)
    return net.eval()


def converts(
    path: Path,
    tokens: Callable[[torch.Tensor], torch.Tensor],
    mean: Any,
    std: Any,
    limit: float = 1e-6,
    **choice: Any,
) -> Any:
    """Convert a file with proof, and compare all tokens after the last norm with the library's."""
    conversion, differences = convert_checkpoint(path, path.parent / "converted" / "out.pth", choice=Choice(**choice))
    assert differences["tokens"] < 1e-12
    facts = conversion.facts
    assert isinstance(facts, ViTFacts) and facts.heads == 2
    assert facts.pixels.mean == pytest.approx(mean) and facts.pixels.std == pytest.approx(std)
    ours = network_for(facts)
    ours.load_state_dict(conversion.source_tensors)
    image = (PICTURE - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        got, wanted = ours.eval().double().forward_features(image), tokens(image)
    assert wanted.abs().max() > 0.1 and (got - wanted).abs().max() / wanted.abs().max() < limit
    return conversion


IMAGENET = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
HALF = ((127.5,) * 3, (127.5,) * 3)


def of_timm(net: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    net = net.double().eval()
    return lambda image: net.forward_features(image)


def of_transformers(net: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    net = net.double().eval()
    return lambda image: net(image).last_hidden_state


def test_timm_s_hub_files_tell_the_input(tmp_path: Path) -> None:
    net = shaken(timm.create_model("vit_tiny_patch16_224", **TIMM))
    save_for_hf(net, str(tmp_path), safe_serialization=True, model_args={"num_heads": 2})
    made = converts(tmp_path / "model.safetensors", of_timm(net), *HALF)
    assert "config.json" in " ".join(made.notes)


def test_timm_s_training_and_its_average(tmp_path: Path) -> None:
    net, average = (shaken(timm.create_model("deit_tiny_patch16_224", **TIMM)) for _ in range(2))
    with torch.no_grad():
        net.norm.bias.add_(1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    saver = CheckpointSaver(net, optimizer, model_ema=average, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(epoch=1, metric=0.5)
    path = tmp_path / "checkpoint-1.pth.tar"
    with pytest.raises(CheckpointError, match=r"--source deit --heads 2.*--source timm-vit --heads 2"):
        convert_checkpoint(path, tmp_path / "x.pth", choice=Choice(heads=2))
    made = converts(path, of_timm(average), *IMAGENET, source="deit", heads=2)
    assert made.place == "state_dict_ema"


@pytest.mark.parametrize("build", [ViTModel, ViTForImageClassification, ViTMAEModel])
def test_transformers(build: Any, tmp_path: Path) -> None:
    settings = ViTMAEConfig(**HUGGING_FACE, mask_ratio=0.0) if build is ViTMAEModel else ViTConfig(**HUGGING_FACE)
    net = shaken(build(settings))
    net.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]).save_pretrained(tmp_path)
    trunk = net.vit if hasattr(net, "vit") else net
    if build is ViTMAEModel:  # it shuffles the patches even if none is masked
        plain = ViTModel(ViTConfig(**HUGGING_FACE), add_pooling_layer=False)
        plain.load_state_dict(trunk.state_dict())
        trunk = plain
    made = converts(tmp_path / "model.safetensors", of_transformers(trunk), *IMAGENET)
    assert made.source.key.startswith("transformers-vit") and not made.foreign
    torch.save(net.float().state_dict(), tmp_path / "model.pth")  # under other names than save_pretrained's
    again = convert_checkpoint(tmp_path / "model.pth", tmp_path / "again.pth", proof=False)[0]
    assert again.facts == made.facts and list(again.tensors) == list(made.tensors)
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in made.tensors.items())


def test_transformers_declares_what_detectron2_cannot_compute(tmp_path: Path) -> None:
    net = shaken(ViTModel(ViTConfig(**{**HUGGING_FACE, "layer_norm_eps": 1e-12})))
    net.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"transformers-vit .*0\.5.*transformers-vit-imagenet"):
        convert_checkpoint(weights, tmp_path / "out.pth")
    made = converts(weights, of_transformers(net), *HALF, limit=1e-5, source="transformers-vit")
    assert "epsilon of its norms is 1e-12" in " ".join(made.notes)
    config = json.loads((tmp_path / "config.json").read_text()) | {"hidden_act": "gelu_new"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="gelu_new"):
        convert_checkpoint(weights, tmp_path / "out.pth", choice=Choice(source="transformers-vit"))


def test_torchvision(tmp_path: Path) -> None:
    net = shaken(torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 128, num_classes=3))
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    net = net.double()

    def tokens(image: torch.Tensor) -> torch.Tensor:
        patches = net._process_input(image)
        encoded: torch.Tensor = net.encoder(torch.cat([net.class_token, patches], dim=1))
        return encoded

    converts(tmp_path / "vit.pth", tokens, *IMAGENET, heads=2)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "vit_tiny_patch16_224, registers": (
        lambda: timm.create_model("vit_small_patch14_reg4_dinov2", **{**TIMM, "patch_size": 8}), "register tokens",
    ),
    "dinov2": (
        lambda: timm.create_model("vit_small_patch14_dinov2", **{**TIMM, "patch_size": 8}), "LayerScale",
    ),
    "distilled": (lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM), "distilled DeiT"),
    "swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)), "Swin"),
    "beit": (lambda: timm.create_model("beit_base_patch16_224", embed_dim=32, depth=1, num_heads=2), "BEiT"),
    "clip": (lambda: timm.create_model("vit_base_patch32_clip_224", embed_dim=32, depth=1, num_heads=2), "CLIP"),
    "siglip": (lambda: timm.create_model("vit_base_patch16_siglip_224", **TIMM), "with attention"),
    "no class token": (
        lambda: timm.create_model("vit_base_patch16_224", class_token=False, global_pool="avg", **TIMM), "incomplete",
    ),
    "a hybrid": (
        lambda: timm.create_model("vit_tiny_r_s16_p8_224", embed_dim=32, depth=1, num_heads=2), "hybrid",
    ),
    "transformers' dinov2": (lambda: Dinov2Model(Dinov2Config(**HUGGING_FACE)), "LayerScale"),
    "transformers' deit": (lambda: DeiTModel(DeiTConfig(**HUGGING_FACE)), "distilled DeiT"),
    "transformers' beit": (lambda: BeitModel(BeitConfig(**HUGGING_FACE)), "LayerScale"),
    "transformers' clip": (lambda: CLIPVisionModel(CLIPVisionConfig(**HUGGING_FACE)), "CLIP"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_other_transformers_are_refused_by_name(name: str, tmp_path: Path) -> None:
    build, words = REFUSED[name]
    torch.save(build().state_dict(), tmp_path / "in.pth")
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(tmp_path / "in.pth", tmp_path / "out.pth", choice=Choice(heads=2))
    assert not (tmp_path / "out.pth").exists()

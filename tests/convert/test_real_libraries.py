"""Checkpoints that other libraries' own code made and saved, through the converter and compared with their forward."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as lightning
import timm
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from lightly.loss import NegativeCosineSimilarity, NTXentLoss
from lightly.models import ResNetGenerator
from lightly.models.batchnorm import get_norm_layer
from lightly.models.modules.heads import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    DINOProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
)
from lightly.models.utils import deactivate_requires_grad
from lightly.utils.benchmarking import OnlineLinearClassifier
from timm.models import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import nn
from transformers import (
    AutoImageProcessor,
    ConvNextImageProcessor,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from moco_d2.convert import CheckpointError, Choice, Conversion, convert_checkpoint
from moco_d2.facts import IMAGENET_RGB, Pixels

pytestmark = pytest.mark.filterwarnings(
    # lightly's DINO head and Lightning's loaders use what torch deprecates.
    r"ignore:`torch\.nn\.utils\.weight_norm` is deprecated:FutureWarning",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    # One step from memory needs no workers.
    "ignore:.*does not have many workers:UserWarning",
)

IMAGE = (96, 128)  # height, width
STAGES = ("res2", "res3", "res4", "res5")
Features = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


def shaken(net: Any, seed: int = 0) -> Any:
    """The network with norms that do something, as after training."""
    torch.manual_seed(seed)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net


def converts(
    path: Path,
    features: Features,
    source: str,
    pixels: Pixels = IMAGENET_RGB,
    norm: str = "",
    prefix: str | None = None,
) -> Conversion:
    """Convert a file, check what it was taken for, and compare the library's features with Detectron2's.

    Both start at one picture: the library's side by ``pixels``, which its documentation asks for, Detectron2's by the
    config that the conversion wrote.
    """
    output = path.parent / "converted" / "out.pth"
    conversion, differences = convert_checkpoint(path, output, choice=Choice(norm=norm, prefix=prefix))
    assert conversion.source.key == source and max(differences.values()) < 1e-5
    assert not set(conversion.mapped) & set(conversion.dropped) and len(conversion.mapped) == len(conversion.tensors)

    cfg = get_cfg()
    cfg.merge_from_file(str(output.with_suffix(".yaml")))
    cfg.MODEL.RESNETS.OUT_FEATURES = list(STAGES)
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    backbone = build_resnet_backbone(cfg, ShapeSpec(channels=3)).eval()
    DetectionCheckpointer(backbone).load(cfg.MODEL.WEIGHTS)

    picture = torch.randint(256, (3, *IMAGE), generator=torch.Generator().manual_seed(1)).double()  # RGB
    theirs = (picture if pixels.order == "RGB" else picture.flip(0), pixels.mean, pixels.std)
    ours = (picture if cfg.INPUT.FORMAT == "RGB" else picture.flip(0), cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    with torch.no_grad():
        wanted = features(prepared(*theirs))
        got = backbone.double()(prepared(*ours))
    for stage, feature in wanted.items():
        assert feature.abs().max() > 0.1
        assert (feature - got[stage]).abs().max() / feature.abs().max() < 1e-5, stage
    return conversion


def prepared(picture: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    return ((picture - mean) / std)[None]  # (1, 3, H, W)


def of_torchvision(net: nn.Module) -> Features:
    """The features of torchvision's own forward, taken where it makes them."""
    net = copy.deepcopy(net).double().eval()

    def run(image: torch.Tensor) -> dict[str, torch.Tensor]:
        taken: dict[str, torch.Tensor] = {}
        hooks = [
            getattr(net, f"layer{n}").register_forward_hook(lambda _, __, out, s=f"res{n + 1}": taken.update({s: out}))
            for n in (1, 2, 3, 4)
        ]
        net(image)
        for hook in hooks:
            hook.remove()
        return taken

    return run


def of_timm(net: Any) -> Features:
    net = copy.deepcopy(net).double().eval()
    return lambda image: dict(
        zip(STAGES, net.forward_intermediates(image, indices=[1, 2, 3, 4], intermediates_only=True), strict=True)
    )


def of_transformers(net: Any) -> Features:
    """``hidden_states`` starts at the stem."""
    net = copy.deepcopy(net).double().eval()
    return lambda image: dict(zip(STAGES, net(image, output_hidden_states=True).hidden_states[1:], strict=True))


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d", "resnet34"])
def test_torchvision(name: str, tmp_path: Path) -> None:
    net = shaken(torchvision.models.get_model(name))
    torch.save(net.state_dict(), tmp_path / "model.pth")
    conversion = converts(tmp_path / "model.pth", of_torchvision(net), "torchvision")
    assert conversion.facts.depth == (34 if name == "resnet34" else 50)


def test_torchvision_references_with_a_moving_average(tmp_path: Path) -> None:
    net = shaken(torchvision.models.resnet18())
    average = torch.optim.swa_utils.AveragedModel(shaken(torchvision.models.resnet18(), seed=1), use_buffers=True)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    checkpoint = {"model": net.state_dict(), "model_ema": average.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**checkpoint, "epoch": 3, "args": argparse.Namespace(model="resnet18")}, tmp_path / "checkpoint.pth")
    converts(tmp_path / "checkpoint.pth", of_torchvision(average.module), "model-ema")


def test_timm(tmp_path: Path) -> None:
    net = shaken(timm.create_model("resnet50"))
    torch.save(net.state_dict(), tmp_path / "model.pth")
    converts(tmp_path / "model.pth", of_timm(net), "torchvision")


@pytest.mark.parametrize("average", [True, False])
def test_timm_training_checkpoint(average: bool, tmp_path: Path) -> None:
    net = shaken(timm.create_model("resnet18"))
    ema = ModelEmaV3(shaken(timm.create_model("resnet18"), seed=1)) if average else None
    saver = CheckpointSaver(
        net,
        torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
        args=argparse.Namespace(model="resnet18", lr=0.1),
        model_ema=ema,
        checkpoint_dir=str(tmp_path),
        recovery_dir=str(tmp_path),
    )
    saver.save_checkpoint(3, metric=71.0)
    trained = ema.module if ema else net
    converts(tmp_path / "model_best.pth.tar", of_timm(trained), "timm-ema" if average else "torchvision")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_timm_for_the_hub_with_another_mean(file: str, tmp_path: Path) -> None:
    half = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    net = shaken(timm.create_model("resnet18", pretrained_cfg_overlay=half))
    save_for_hf(net, str(tmp_path), safe_serialization="both")
    pixels = Pixels("RGB", (127.5,) * 3, (63.75,) * 3)
    conversion = converts(tmp_path / file, of_timm(net), "torchvision", pixels)
    assert conversion.facts.pixels == pixels


def test_timm_group_norm(tmp_path: Path) -> None:
    net = shaken(timm.create_model("resnet50_gn"))
    torch.save(net.state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"GroupNorm.*--norm GN"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out.pth")
    converts(tmp_path / "model.pth", of_timm(net), "torchvision", norm="GN")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet18d", "three 3x3"),
        ("seresnet50", "channel attention"),
        ("resnetblur18", "anti-aliased"),
        ("resnetaa34d", "anti-aliased|three 3x3"),
        ("resnetv2_50", "pre-activation"),
        ("regnety_002", "RegNet"),
    ],
)
def test_other_networks_of_timm_are_refused(name: str, words: str, tmp_path: Path) -> None:
    save_for_hf(timm.create_model(name), str(tmp_path), safe_serialization=True)
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.pth")


TRANSFORMERS: dict[str, Callable[[ResNetConfig], Any]] = {
    "transformers": ResNetModel,
    "transformers-head": ResNetForImageClassification,
}
SMALL: dict[str, Any] = {"embedding_size": 16, "hidden_sizes": [64, 128, 256, 512]}  # a ResNet-50 at width 1/4


def hugging_face(folder: Path, build: Callable[[ResNetConfig], Any] = ResNetModel, **options: Any) -> Any:
    net = shaken(build(ResNetConfig(**{**SMALL, **options})))
    net.save_pretrained(folder)
    return net


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("source", TRANSFORMERS)
def test_transformers(source: str, stride_in_1x1: bool, tmp_path: Path) -> None:
    net = hugging_face(tmp_path, TRANSFORMERS[source], downsample_in_bottleneck=stride_in_1x1)
    conversion = converts(tmp_path / "model.safetensors", of_transformers(net), source)
    assert conversion.facts.stride_in_1x1 == stride_in_1x1


def test_transformers_full_size_and_the_file_of_older_versions(tmp_path: Path) -> None:
    """Since version 5 only safetensors are written, but ``pytorch_model.bin`` is read: what reads so is that file."""
    net = hugging_face(tmp_path, embedding_size=64, hidden_sizes=[256, 512, 1024, 2048])
    (tmp_path / "model.safetensors").unlink()
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    read = ResNetModel.from_pretrained(tmp_path, use_safetensors=False)
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in read.state_dict().items())
    converts(tmp_path / "pytorch_model.bin", of_transformers(read), "transformers")


def test_transformers_shallow_and_as_a_backbone(tmp_path: Path) -> None:
    shallow = {"layer_type": "basic", "depths": [2, 2, 2, 2], "embedding_size": 64, "hidden_sizes": [64, 128, 256, 512]}
    net = hugging_face(tmp_path, ResNetBackbone, **shallow)
    assert converts(tmp_path / "model.safetensors", of_transformers(net), "transformers").facts.depth == 18


@pytest.mark.parametrize(
    ("option", "words"),
    [({"downsample_in_first_stage": True}, "stride 1 in that stage"), ({"hidden_act": "gelu"}, "hidden_act is 'gelu'")],
)
def test_what_only_config_json_tells_is_refused(option: dict[str, Any], words: str, tmp_path: Path) -> None:
    hugging_face(tmp_path, **option)
    with pytest.raises(CheckpointError, match=words):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.pth")


@pytest.mark.parametrize(
    "options",
    [
        {},  # 0.5 and 0.5
        {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD},
        {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [60.0, 61.0, 62.0]},
        {"do_normalize": False, "rescale_factor": 1 / 127.5},
    ],
    ids=["default", "ImageNet's", "other statistics", "unscaled", "not normalised"],
)
def test_transformers_with_an_image_processor(options: dict[str, Any], tmp_path: Path) -> None:
    """Detectron2's features on its own input are the library's on what its processor makes of the same picture."""
    net = hugging_face(tmp_path)
    ConvNextImageProcessor(**options).save_pretrained(tmp_path)
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    picture = torch.randint(256, (3, *IMAGE), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    theirs = processor(picture, do_resize=False, return_tensors="pt")["pixel_values"].double()
    conversion = converts(tmp_path / "model.safetensors", lambda _: of_transformers(net)(theirs), "transformers")
    ours = conversion.facts.pixels
    torch.testing.assert_close(prepared(picture, ours.mean, ours.std), theirs, rtol=1e-5, atol=1e-5)
    assert (ours == IMAGENET_RGB) == (options.get("image_mean") == IMAGENET_DEFAULT_MEAN)
    assert any("those of the preprocessor_config.json" in note for note in conversion.notes) == (ours != IMAGENET_RGB)


def test_transformers_with_an_image_processor_that_says_nothing(tmp_path: Path) -> None:
    hugging_face(tmp_path)
    beside = tmp_path / "preprocessor_config.json"
    for content in ("{", "[]", '{"size": {"shortest_edge": 224}}'):
        beside.write_text(content)
        conversion, _ = convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.pth", proof=False)
        assert conversion.facts.pixels == IMAGENET_RGB and any(
            "no readable mean and std" in n for n in conversion.notes
        )
    for std, words in ((0.0, "three finite numbers"), (float("nan"), "nan"), ("x", "'x'"), (10**400, "too large")):
        beside.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5, std, 0.5]}))
        with pytest.raises(CheckpointError, match=f"model.safetensors: the preprocessor_config.json.*{words}"):
            convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "out.pth", proof=False)


class Benchmark(lightning.LightningModule):
    """As lightly's benchmarks: a whole torchvision network without its ``fc``, a second one, heads, a classifier."""

    def __init__(self, teacher_is_backbone: bool = False) -> None:
        super().__init__()
        self.save_hyperparameters()
        net = shaken(torchvision.models.resnet18())
        net.fc = nn.Identity()
        self.backbone = net
        second = shaken(copy.deepcopy(net), seed=1)
        if teacher_is_backbone:  # DINO
            self.projection_head = DINOProjectionHead(512, 64, 32, 16)
            self.student_backbone = second
            self.student_projection_head = DINOProjectionHead(512, 64, 32, 16)
        else:
            self.projection_head = BYOLProjectionHead(512, 64, 32)
            self.prediction_head = BYOLPredictionHead(32, 64, 32)
            self.teacher_backbone = second
            self.teacher_projection_head = BYOLProjectionHead(512, 64, 32)
            deactivate_requires_grad(self.teacher_backbone)
        self.online_classifier = OnlineLinearClassifier(feature_dim=512, num_classes=10)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (image,) = batch
        if "student_backbone" in self._modules:
            one, two = (
                self.student_projection_head(self.student_backbone(image)),
                self.projection_head(self.backbone(image)),
            )
        else:
            one = self.prediction_head(self.projection_head(self.backbone(image)))
            two = self.teacher_projection_head(self.teacher_backbone(image))
        return NegativeCosineSimilarity()(one, two.detach())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Example(lightning.LightningModule):
    """As lightly's examples: the children of a torchvision network in an ``nn.Sequential``, and a momentum copy."""

    def __init__(self, momentum: bool) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*list(shaken(torchvision.models.resnet18()).children())[:-1])
        self.projection_head = SimCLRProjectionHead(512, 64, 32)
        if momentum:
            self.projection_head = MoCoProjectionHead(512, 64, 32)
            self.backbone_momentum = shaken(copy.deepcopy(self.backbone), seed=1)
            self.projection_head_momentum = copy.deepcopy(self.projection_head)
            deactivate_requires_grad(self.backbone_momentum)
            deactivate_requires_grad(self.projection_head_momentum)
        self.criterion = NTXentLoss(memory_bank_size=(16, 32) if momentum else 0)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        (image,) = batch
        one, two = (self.projection_head(self.backbone(image).flatten(1)) for _ in range(2))
        return self.criterion(one, two)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def trained(module: lightning.LightningModule, path: Path) -> None:
    """One real step of a real trainer, and its checkpoint."""
    images = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32))
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path.parent,
    )
    trainer.fit(module, torch.utils.data.DataLoader(images, batch_size=4))
    trainer.save_checkpoint(path)


@pytest.mark.parametrize(("dino", "source"), [(False, "lightly"), (True, "lightly-dino")])
def test_lightly_benchmark(dino: bool, source: str, tmp_path: Path) -> None:
    module = Benchmark(teacher_is_backbone=dino)
    trained(module, tmp_path / "last.ckpt")
    conversion = converts(tmp_path / "last.ckpt", of_torchvision(module.backbone), source)
    assert any("projection_head" in key for key in conversion.dropped)


@pytest.mark.parametrize("momentum", [True, False])
def test_lightly_example(momentum: bool, tmp_path: Path) -> None:
    module = Example(momentum)
    trained(module, tmp_path / "last.ckpt")
    backbone = copy.deepcopy(module.backbone).double().eval()
    converts(tmp_path / "last.ckpt", lambda image: {"res5": backbone[:-1](image)}, "lightly-examples")


def test_any_lightning_module(tmp_path: Path) -> None:
    class Mine(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.my_net = shaken(torchvision.models.resnet18())

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return self.my_net(batch[0]).square().mean()

        configure_optimizers = Example.configure_optimizers

    module = Mine()
    trained(module, tmp_path / "last.ckpt")
    converts(tmp_path / "last.ckpt", of_torchvision(module.my_net), "lightning")


def test_lightly_split_norms(tmp_path: Path) -> None:
    net = shaken(torchvision.models.resnet18(norm_layer=lambda channels: get_norm_layer(channels, num_splits=2)))
    net.train()(torch.randn(4, 3, 32, 32))  # so that the splits' statistics differ
    torch.save(net.state_dict(), tmp_path / "model.pth")
    conversion = converts(tmp_path / "model.pth", of_torchvision(net), "torchvision")
    assert any("split norms" in note for note in conversion.notes)


def test_lightlys_own_network_is_refused(tmp_path: Path) -> None:
    torch.save(ResNetGenerator("resnet-18").state_dict(), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="CIFAR stem"):
        convert_checkpoint(tmp_path / "model.pth", tmp_path / "out.pth")

"""MoCo v3 against Algorithm 1 in the authors' network, and closed forms."""

import copy
import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.vit import build_vit
from moco_d2.methods import MoCoV3, build_method
from moco_d2.methods.moco_v3 import contrast
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses
from tests.methods.toy_set import TinyEncoder

DIM, HIDDEN, WIDTH, TAU = 16, 32, 64, 0.5


class Official(nn.Module):
    """The authors' networks under their names, which DDP puts ``module.`` before."""

    def __init__(self) -> None:
        super().__init__()
        self.base_encoder = build_resnet("resnet18", width=0.125)
        head, self.predictor = (
            nn.Sequential(
                nn.Linear(size, HIDDEN, bias=False), nn.BatchNorm1d(HIDDEN), nn.ReLU(),
                nn.Linear(HIDDEN, DIM, bias=False),
            )
            for size in (WIDTH, DIM)
        )  # fmt: skip
        self.base_encoder.fc = nn.Sequential(*head, nn.BatchNorm1d(DIM, affine=False))
        self.momentum_encoder = copy.deepcopy(self.base_encoder).requires_grad_(False)

    def loss(self, x1: torch.Tensor, x2: torch.Tensor, m: float) -> torch.Tensor:
        q1, q2 = (F.normalize(self.predictor(self.base_encoder(x)), dim=1) for x in (x1, x2))
        with torch.no_grad():
            for key, base in zip(self.momentum_encoder.parameters(), self.base_encoder.parameters(), strict=True):
                key.copy_(m * key + (1 - m) * base)
            k1, k2 = (F.normalize(self.momentum_encoder(x), dim=1) for x in (x1, x2))
        total = torch.zeros((), dtype=q1.dtype)
        for q, k in ((q1, k2), (q2, k1)):
            for i, query in enumerate(q):
                similarities = torch.stack([query @ key for key in k]) / TAU
                total = total + 2 * TAU * (similarities.logsumexp(0) - similarities[i]) / len(q)
        return total


def test_an_official_checkpoint_continues_as_algorithm_1_says() -> None:
    """The names and shapes of the authors' file, then three SGD steps of their networks beside ours."""
    torch.manual_seed(1)
    theirs, ours, length = Official().double(), build("MoCoV3"), 4
    ours.load_state_dict(ours.adapt_state_dict({f"module.{key}": v for key, v in theirs.state_dict().items()}))
    sgd, reference = (
        torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
        for net in (ours, theirs)
    )
    for step in range(3):
        views = make_views("MoCoV3", step)
        ours.before_step(step / length, 0.0)
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / length)) * (1 - 0.9)
        loss, expected = ours(views)["loss_contrast"], theirs.loss(*views.images, m)
        for optimizer, value in ((sgd, loss), (reference, expected)):
            optimizer.zero_grad(), value.backward(), optimizer.step()
        torch.testing.assert_close(loss, expected)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)
    assert all(p.grad is None for p in ours.momentum_encoder.parameters())


def test_a_published_file_has_these_shapes() -> None:
    with torch.device("meta"):
        method = MoCoV3(functools.partial(build_resnet, "resnet50"))
    published = {
        "module.base_encoder.layer4.2.conv3.weight": (2048, 512, 1, 1),
        "module.momentum_encoder.conv1.weight": (64, 3, 7, 7), "module.base_encoder.fc.0.weight": (4096, 2048),
        "module.base_encoder.fc.1.weight": (4096,), "module.base_encoder.fc.3.weight": (256, 4096),
        "module.base_encoder.fc.4.running_mean": (256,), "module.predictor.0.weight": (4096, 256),
    }  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in method.state_dict().items()}
    assert MoCoV3.adapt_state_dict(published).items() <= shapes.items()
    assert {"base_encoder.fc.0.bias", "base_encoder.fc.4.weight", "predictor.4.running_mean"} & set(shapes) == set()


def test_a_published_vit_file_has_exactly_these_names_and_shapes() -> None:
    """moco-v3's vit-s-300ep.pth.tar, names by its vits.py (timm's) and builder.py."""
    encoder = functools.partial(build_vit, dim=384, heads=12, position="sincos", init="moco_v3", freeze_patches=True)
    with torch.device("meta"):
        method = build_method("MoCoV3", encoder, {"projector_layers": 3, "predictor_norm": True})
    network = {"cls_token": (1, 1, 384), "pos_embed": (1, 197, 384), "patch_embed.proj.weight": (384, 3, 16, 16)}
    network["patch_embed.proj.bias"] = network["norm.weight"] = network["norm.bias"] = (384,)
    for i in range(12):
        for name, rows, columns in (
            ("norm1", 384, 0), ("attn.qkv", 1152, 384), ("attn.proj", 384, 384), ("norm2", 384, 0),
            ("mlp.fc1", 1536, 384), ("mlp.fc2", 384, 1536),
        ):  # fmt: skip
            network[f"blocks.{i}.{name}.weight"] = (rows, columns) if columns else (rows,)
            network[f"blocks.{i}.{name}.bias"] = (rows,)
    head = linears_and_norms([384, 4096, 4096, 256])
    network |= {f"head.{key}": shape for key, shape in head.items()}
    published = {f"module.{part}_encoder.{key}": s for part in ("base", "momentum") for key, s in network.items()}
    published |= {f"module.predictor.{key}": s for key, s in linears_and_norms([256, 4096, 256]).items()}
    assert MoCoV3.adapt_state_dict(published) == {k: tuple(v.shape) for k, v in method.state_dict().items()}
    heads = [m for m in method.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(heads) == 8 and {type(m).__name__ for m in heads} == {"SyncBatchNorm1d"}


def linears_and_norms(sizes: list[int]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Linear, BN, ReLU, ..., Linear, BN without gamma and beta; no biases."""
    found: dict[str, tuple[int, ...]] = {}
    for layer, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        norm = ["running_mean", "running_var", "num_batches_tracked"]
        norm = ["weight", "bias", *norm] if layer < len(sizes) - 2 else norm
        found[f"{3 * layer}.weight"] = (outputs, inputs)
        found |= {f"{3 * layer + 1}.{key}": () if "tracked" in key else (outputs,) for key in norm}
    return found


def test_equal_features_have_the_loss_of_chance_and_keys_no_gradient() -> None:
    one = torch.full((64, 4), 0.5, dtype=torch.float64)
    assert contrast(one, one, 0.2).item() == pytest.approx(1.6636, abs=5e-5)
    assert contrast(one, one, 1.0).item() == pytest.approx(2 * math.log(64))
    torch.manual_seed(0)
    q, k = F.normalize(torch.randn(2, 16, 32, dtype=torch.float64), dim=2)
    expected = 0.4 * F.cross_entropy(q @ k.T / 0.2, torch.arange(16))
    torch.testing.assert_close(contrast(q, k, 0.2), expected)


def test_the_recorded_accuracy_counts_an_images_own_key_alone() -> None:
    method = build("MoCoV3", momentum=0.0)
    method.predictor = nn.Identity()
    views = make_views("MoCoV3", 0)
    method.before_step(0.0, 0.0)
    method(views._replace(images=[views.images[0]] * 2))
    assert method.recorded["contrast_acc1"] == 1, "the same view twice, in equal networks"
    method.momentum_encoder.fc[3].weight.zero_()  # all keys are one point
    method.eval()(views)
    assert method.recorded["contrast_acc1"] == 0


def test_six_steps_are_the_recorded_ones() -> None:
    assert six_losses("MoCoV3") == pytest.approx(RECORDED, rel=ROUNDING)


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.temperature is 0; it must be positive"):
        MoCoV3(TinyEncoder, temperature=0)
    with pytest.raises(ValueError, match=r"dim is 0(?s:.*)momentum is 2; it must be in \[0, 1\]"):
        MoCoV3(TinyEncoder, dim=0, momentum=2)


RECORDED = [
    4.388434574152495,
    4.672244625790517,
    4.518772570331391,
    4.371359725694896,
    4.663561422527721,
    4.429754335826148,
]

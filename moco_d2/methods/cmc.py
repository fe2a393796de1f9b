"""CMC, contrastive multiview coding (Tian et al., ECCV 2020, arXiv 1906.05849), on a linear colour space.

Letters: n images of the set, N images per process, C feature dimension, K negatives. l is a picture's brightness, ab
its colour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.facts import IMAGENET_RGB
from moco_d2.layers.distributed import own_part, shared_draw, world_size
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import head_name, without_head
from moco_d2.layers.losses import info_nce, nce, nce_normaliser
from moco_d2.layers.memory_bank import MemoryBank
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register

LOSSES = ("nce", "info_nce")
# YDbDr of red, green and blue in [0, 1], and the half ranges by which PyContrast divides it.
YDBDR = ((0.299, 0.587, 0.114), (-0.45, -0.883, 1.333), (-1.333, 1.116, 0.217))
HALF_RANGES = (0.5, 1.331, 1.333)
# The published code's names, and ours: those of CMC, then of PyContrast.
_OFFICIAL = {
    "encoder.l_to_ab.": "encoder_l.",
    "encoder.ab_to_l.": "encoder_ab.",
    "encoder1.": "encoder_l.",
    "encoder2.": "encoder_ab.",
    "head1.0.": "encoder_l.fc.",
    "head2.0.": "encoder_ab.fc.",
}


@register
class CMC(SSLMethod):
    """Brightness and colour of a picture find one another's old feature in a memory bank of all pictures.

    Each has a ResNet of half the width. Because the colour space is linear, the two are exactly one ResNet of RGB
    pixels, with block-diagonal kernels: :meth:`backbone`.
    """

    memories = ("bank_l.", "bank_ab.", "normalisers")
    colours: torch.Tensor
    normalisers: torch.Tensor

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        images: int,
        dim: int = 128,
        loss: str = "nce",
        negatives: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
    ) -> None:
        """Build both half encoders and their banks.

        Args:
            encoder: called as ``encoder(num_classes=dim, width=half the width)``; a ResNet with batch norm.
            images: n, number of images of the data set.
            dim: C, size of a feature.
            loss: ``nce`` (each feature draws K rows of its own) or ``info_nce`` (the published code's ``--softmax``; a
                step draws K rows for all its features).
            negatives: K, number of rows drawn, with replacement.
            temperature: tau > 0.
            momentum: m in [0, 1], the share of the old feature in a row of a bank.

        Raises:
            ValueError: a value is out of range, or the encoder cannot be halved.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
            (loss in LOSSES, f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}"),
            (negatives >= 1, f"negatives is {negatives}; it must be at least 1 (the code's is 16384)"),
            (temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.07)"),
            (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the paper's is 0.5)"),
        ])  # fmt: skip
        self.loss, self.negatives, self.temperature = loss, negatives, temperature
        self._whole = lambda: encoder(num_classes=dim)
        width = _half_width(self._whole)
        self.encoder_l = _with_channels(encoder(num_classes=dim, width=width), 1)
        self.encoder_ab = _with_channels(encoder(num_classes=dim, width=width), 2)
        self.bank_l, self.bank_ab = (MemoryBank(images, dim, momentum) for _ in range(2))
        # From pixel values with ImageNet's mean and std: 0 stays 0, so padding is the same in both spaces.
        std = torch.tensor(IMAGENET_RGB.std) / 255
        self.register_buffer(
            "colours", torch.tensor(YDBDR) * std / torch.tensor(HALF_RANGES)[:, None], persistent=False
        )
        # Z of NCE for l and ab, estimated once, from the first batch; 0 before.
        self.register_buffer("normalisers", torch.zeros(2))
        self._estimated = [False, False]

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute both losses of the first view (N, 3, H, W), and write its features to the banks."""
        x = views.images[0]
        with torch.autocast(x.device.type, enabled=False):
            y = torch.einsum("dc,nchw->ndhw", self.colours.to(x.dtype), x)
        f_l, f_ab = unit_features(self.encoder_l, y[:, :1]), unit_features(self.encoder_ab, y[:, 1:])  # (N, C)
        old_l, old_ab = self.bank_l.rows(views.index), self.bank_ab.rows(views.index)
        each = self.loss == "nce"
        drawn = shared_draw(
            len(self.bank_l.features), (world_size() * len(x), self.negatives) if each else (self.negatives,), x.device
        )
        if each:
            drawn = torch.cat([views.index[:, None], own_part(drawn)], dim=1)  # (N, 1 + K)
        losses = {
            "loss_l": self._contrast(0, f_l, old_ab, self.bank_ab, drawn),
            "loss_ab": self._contrast(1, f_ab, old_l, self.bank_l, drawn),
        }
        if self.recording:
            self._record(f_l.detach(), f_ab.detach(), old_l, old_ab)
        if self.training:  # After the losses: a step's own features are never in its scores.
            self.bank_l.update(f_l, views.index)
            self.bank_ab.update(f_ab, views.index)
        return losses

    def _contrast(
        self, part: int, f: torch.Tensor, old: torch.Tensor, bank: MemoryBank, drawn: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss of features (N, C) against the other part's bank, of which ``old`` are the positive rows."""
        if self.loss == "info_nce":
            return info_nce(f, old, bank.rows(drawn), self.temperature)
        if not self._estimated[part]:
            if self.normalisers[part] == 0:  # asked once: the answer waits for the GPU
                self.normalisers[part] = nce_normaliser(f, bank.features, drawn, self.temperature)
            self._estimated[part] = True
        return nce(f, bank.features, drawn, self.normalisers[part], self.temperature)

    def backbone(self) -> nn.Module:
        """Return both encoders as one ResNet of RGB pixels: its features are those of l, then those of ab.

        Its weights are computed, not shared.
        """
        with torch.device("meta"):
            network = without_head(self._whole())
        network.load_state_dict(fold(self.encoder_l, self.encoder_ab, self.colours), assign=True)
        return network.train(self.training)

    @torch.no_grad()
    def _record(self, f_l: torch.Tensor, f_ab: torch.Tensor, old_l: torch.Tensor, old_ab: torch.Tensor) -> None:
        self.recorded = {
            "positive_similarity": ((f_l * old_ab).sum(dim=1).mean() + (f_ab * old_l).sum(dim=1).mean()) / 2,
            "parts_similarity": (f_l * f_ab).sum(dim=1).mean(),
            "feature_std": torch.minimum(f_l.std(dim=0).mean(), f_ab.std(dim=0).mean()),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the similarities to the other part, and the spread of the less spread part's features."""
        k = self.negatives
        chance = 2 * (math.log(1 + k) + (k * math.log(1 + 1 / k) if self.loss == "nce" else 0))
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", chance, "every row alike"),
            Diagnostic("positive_similarity", "cosine similarity", "-other part's row"),
            Diagnostic("parts_similarity", "cosine similarity", "-other part"),
            feature_spread(self.bank_l.features.shape[1]),
        )

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate the encoders of the code of CMC or PyContrast to the names used here; ours pass unchanged.

        Their banks are other objects of the file and are not read: a run begins with random ones.

        Raises:
            ValueError: the encoders have wider stems than a half ResNet, as most of the published ones have.
        """
        renamed = {}
        for key, value in state.items():
            name = ".".join(part for part in key.split(".") if part != "module")
            for theirs, ours in _OFFICIAL.items():
                if name.startswith(theirs):
                    name = ours + name.removeprefix(theirs)
            renamed[name] = value
        stem, block = renamed.get("encoder_l.conv1.weight"), renamed.get("encoder_l.layer1.0.conv1.weight")
        bottleneck = "encoder_l.layer1.0.conv3.weight" in renamed
        if bottleneck and stem is not None and block is not None and len(stem) != len(block):
            raise ValueError(
                f"its encoders have stems of {len(stem)} channels before blocks of {len(block)}; both must be the same "
                "here, so that the two are one ResNet. Of the published code's, only resnet50v2 (full width; "
                "SSL.ENCODER.ARGS.width 2) is so"
            )
        return renamed


def _half_width(whole: Callable[[], nn.Module]) -> float:
    """Return half of an encoder's width.

    Raises:
        ValueError: two encoders of half its width are not one encoder of its kind.
    """
    with torch.device("meta"):
        network = whole()
    width, convolutions = getattr(network, "width", None), [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    if width is None or any(one.groups > 1 for one in convolutions):
        raise ValueError("CMC folds two half networks into one: set SSL.ENCODER.NAME to a ResNet without groups")
    if any(isinstance(module, nn.GroupNorm) for module in network.modules()):
        raise ValueError("CMC folds two half networks into one: set SSL.ENCODER.ARGS.norm to BN or SyncBN")
    if (32 * width) % 1:
        raise ValueError(f"SSL.ENCODER.ARGS.width is {width}; CMC halves it, so it must be a multiple of 1/32")
    return float(width) / 2


def _with_channels(network: nn.Module, channels: int) -> nn.Module:
    """Give a ResNet a first convolution of so many input channels, with torchvision's initialisation."""
    old = network.conv1
    assert isinstance(old, nn.Conv2d)
    old.in_channels = channels
    old.weight = nn.Parameter(old.weight.new_empty(old.out_channels, channels, *old.kernel_size))
    nn.init.kaiming_normal_(old.weight, mode="fan_out", nonlinearity="relu")
    return network


@torch.no_grad()
def fold(encoder_l: nn.Module, encoder_ab: nn.Module, colours: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the state dict, without head, of the ResNet that computes what two half ResNets compute.

    Every kernel is block-diagonal, every vector the two one after the other, and the first convolution takes the
    colour transform in: conv1_rgb = conv1 · T.

    Args:
        encoder_l: half network of the first channel of the colour space.
        encoder_ab: half network of the others.
        colours: (3, 3), T: from the network's input to the colour space.
    """
    folded, others, head = {}, encoder_ab.state_dict(), head_name(encoder_l)
    for key, a in encoder_l.state_dict().items():
        b = others[key]
        if key.startswith(f"{head}."):
            continue
        if key == "conv1.weight":
            parts = ((a, colours[:1]), (b, colours[1:]))
            folded[key] = torch.cat([torch.einsum("ocij,cd->odij", one, space.to(a.dtype)) for one, space in parts])
        elif a.ndim == 4:
            folded[key] = a.new_zeros(len(a) + len(b), a.shape[1] + b.shape[1], *a.shape[2:])
            folded[key][: len(a), : a.shape[1]] = a
            folded[key][len(a) :, a.shape[1] :] = b
        else:
            folded[key] = torch.cat([a, b]) if a.ndim else a.clone()
    return folded

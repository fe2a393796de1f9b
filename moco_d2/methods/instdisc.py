"""InstDisc (Wu et al., arXiv 1805.01978), and MoCo's memory bank (He et al., arXiv 1911.05722, section 3.2, Figure 2b).

Letters: n images of the set, N images per process, R processes, C feature dimension, K negatives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from moco_d2.layers.distributed import own_part, shared_draw, world_size
from moco_d2.layers.encode import unit_features
from moco_d2.layers.heads import without_head
from moco_d2.layers.losses import info_nce, nce, nce_normaliser
from moco_d2.layers.memory_bank import MemoryBank
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, feature_spread, register

LOSSES = ("nce", "info_nce")


@register
class InstDisc(SSLMethod):
    """Instance discrimination: a view should find the old feature of its image in a memory bank of all images.

    The defaults are InstDisc's. ``loss="info_nce", negatives=65536`` is the "improved memory bank" of MoCo's Figure 3.
    """

    memories = ("bank.", "normaliser")
    normaliser: torch.Tensor

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        images: int,
        dim: int = 128,
        loss: str = "nce",
        negatives: int = 4096,
        temperature: float = 0.07,
        momentum: float = 0.5,
        proximal: float = 0.0,
    ) -> None:
        """Build the encoder and the memory bank.

        Args:
            encoder: called as ``encoder(num_classes=dim)``; see :class:`~moco_d2.layers.encoders.Encoder`.
            images: n, number of images of the data set.
            dim: C, size of a feature.
            loss: ``nce`` (InstDisc, Eq. 7) or ``info_nce`` (MoCo, Eq. 1). With ``nce`` each query draws K rows of its
                own, as in the published code. With ``info_nce`` a step draws K rows for all its queries, because rows
                of their own would be a copy of N x K x C numbers.
            negatives: K, number of rows drawn, with replacement; 0 with ``info_nce``: the softmax over all images
                (InstDisc, Eq. 2), each counted once.
            temperature: tau > 0.
            momentum: m in [0, 1], the share of the old feature in a row of the bank.
            proximal: lambda >= 0, weight of the squared distance between a feature and its image's old one (Eq. 9). The
                published code has no such term.

        Raises:
            ValueError: a value is out of range.
        """
        super().__init__()
        check_ranges([
            (dim >= 1, f"dim is {dim}; it must be at least 1 (the paper's is 128)"),
            (loss in LOSSES, f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}"),
            (negatives >= 0, f"negatives is {negatives}; it must be positive, or 0 for all images"),
            (loss != "nce" or negatives != 0, "negatives is 0; all images need SSL.ARGS.loss info_nce"),
            (temperature > 0, f"temperature is {temperature}; it must be positive (the paper's is 0.07)"),
            (0 <= momentum <= 1, f"momentum is {momentum}; it must be in [0, 1] (the paper's is 0.5)"),
            (proximal >= 0, f"proximal is {proximal}; it must be 0 (no such term) or positive"),
        ])  # fmt: skip
        self.loss, self.negatives, self.temperature, self.proximal = loss, negatives, temperature, proximal
        self.encoder = encoder(num_classes=dim)
        self.bank = MemoryBank(images, dim, momentum)
        # Z of NCE, estimated once, from the first batch; 0 before.
        self.register_buffer("normaliser", torch.zeros(()))
        self._estimated = False

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of the first view (N, 3, H, W), and write its features to the bank."""
        f = unit_features(self.encoder, views.images[0])  # (N, C)
        old = self.bank.rows(views.index)  # (N, C)
        losses = {"loss_contrast": self._contrast(f, old, views.index)}
        if self.proximal:
            losses["loss_proximal"] = self.proximal * (f - old).square().sum(dim=1).mean()
        if self.recording:
            self._record(f.detach(), old)
        if self.training:
            self.bank.update(f, views.index)  # After the loss: a step's own features are never in its scores.
        return losses

    def backbone(self) -> nn.Module:
        """Return the encoder without its head."""
        return without_head(self.encoder)

    def _contrast(self, f: torch.Tensor, old: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Return the loss of features (N, C) of the images ``index`` (N,), whose old features are ``old`` (N, C)."""
        bank, n, k = self.bank.features, len(self.bank.features), self.negatives
        if self.loss == "info_nce":
            rows = self.bank.rows(shared_draw(n, (k,), f.device)) if k else bank
            return info_nce(f, old, rows, self.temperature, among=not k)
        drawn = own_part(shared_draw(n, (world_size() * len(f), k), f.device))  # (N, K)
        chosen = torch.cat([index[:, None], drawn], dim=1)  # (N, 1 + K)
        if not self._estimated:
            if self.normaliser == 0:  # Asked once: the answer waits for the GPU.
                self.normaliser.copy_(nce_normaliser(f, bank, chosen, self.temperature))
            self._estimated = True
        return nce(f, bank, chosen, self.normaliser, self.temperature)

    def _record(self, f: torch.Tensor, old: torch.Tensor) -> None:
        self.recorded = {
            "positive_similarity": (f * old).sum(dim=1).mean(),
            "bank_similarity": (f.mean(dim=0) * self.bank.features.mean(dim=0)).sum(),  # mean over all pairs
            "feature_std": f.std(dim=0).mean(),
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the similarity to the image's row and to all rows, and the spread of the features."""
        n, k = len(self.bank.features), self.negatives
        chance = math.log(1 + k) if k else math.log(n)
        named = "chance, log(1 + K)" if k else "chance, log(n)"
        if self.loss == "nce":
            chance, named = chance + k * math.log(1 + 1 / k), "every row alike"
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", chance, named),
            Diagnostic("positive_similarity", "cosine similarity", "-own row"),
            Diagnostic("bank_similarity", "cosine similarity", "-bank"),
            feature_spread(self.bank.features.shape[1]),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about a run in which the bank stays random, and about more negatives than images."""
        found = []
        if steps * batch < 2 * images:
            found.append(
                f"the run sees {steps * batch / images:.1f} epochs of your {images} images, but the row of an image is "
                "random until the image was seen: train for several epochs (SOLVER.EPOCHS)"
            )
        if self.negatives > images:
            found.append(
                f"SSL.ARGS.negatives {self.negatives} rows are drawn from a bank of {images}, with replacement, so the "
                "negatives of most images include their own row: set SSL.ARGS.loss info_nce and SSL.ARGS.negatives 0, "
                "the softmax over all images"
            )
        return found

    def remedies_for_divergence(self) -> list[str]:
        """Return a higher temperature: the gradient is proportional to its inverse."""
        return ["a higher SSL.ARGS.temperature"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Translate the published code's ``state_dict``, an encoder's, to the names used here.

        Its bank is another object of the file, pickled whole, and is not read: a run begins with a random one.
        """
        return {
            f"encoder.{key.removeprefix('module.')}" if key.startswith("module.") else key: value
            for key, value in state.items()
        }

"""DINO (Caron et al., arXiv 2104.14294): a student predicts the output of its own moving average, the teacher.

Letters: N images per process, R processes, V views, D features of the backbone, K outputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.distributed import total, world_size
from moco_d2.layers.ema import cosine_momentum, ema_update_
from moco_d2.layers.encode import by_resolution
from moco_d2.layers.heads import cut_head, mlp, without_head
from moco_d2.layers.losses import cross_view_entropy
from moco_d2.layers.views import Views
from moco_d2.methods.base import Diagnostic, SSLMethod, check_ranges, register

LARGE = 2  # The teacher sees the first views only, which are the large ones.


class LastLayer(nn.Module):
    """A Linear without bias whose rows have a direction and a length: W = g v / norm(v), under weight_norm's names."""

    def __init__(self, features: int, outputs: int, unit: bool) -> None:
        super().__init__()
        self.weight_v = nn.Parameter(nn.Linear(features, outputs, bias=False).weight.detach())
        self.weight_g = nn.Parameter(torch.ones(outputs, 1), requires_grad=not unit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return (M, K) of (M, C)."""
        return F.linear(x, self.weight_g * F.normalize(self.weight_v, dim=1))


class Head(nn.Module):
    """DINO's head: an MLP with GELU to a bottleneck, whose unit vectors go to the last layer."""

    def __init__(self, sizes: Sequence[int], outputs: int, norm: bool, unit: bool) -> None:
        super().__init__()
        self.mlp = mlp(sizes, norm=norm, activation=nn.GELU)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.last_layer = LastLayer(sizes[-1], outputs, unit)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs (M, K) of features (M, D), in float32 or wider: they are divided by small temperatures."""
        x = self.mlp(x)
        with torch.autocast(x.device.type, enabled=False):
            outputs: torch.Tensor = self.last_layer(F.normalize(x.to(self.last_layer.weight_v.dtype), dim=1))
        return outputs


class Network(nn.Module):
    """Backbone and head."""

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the outputs of V views: (V, N, K)."""
        outputs: torch.Tensor = self.head(by_resolution(self.backbone, images)).unflatten(0, (len(images), -1))
        return outputs


@register
class DINO(SSLMethod):
    """Self-distillation without labels: centring and sharpening of the teacher's output avoid a collapse.

    The defaults are those of the published ResNet-50. With a ViT, only the student has stochastic depth.
    """

    centre: torch.Tensor

    def __init__(
        self,
        encoder: Callable[..., nn.Module],
        outputs: int = 60000,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        head_norm: bool = True,
        norm_last_layer: bool = True,
        freeze: float = 1.0,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.07,
        first_temperature: float = 0.04,
        temperature_epochs: int = 50,
        momentum: float = 0.996,
        centre_momentum: float = 0.9,
    ) -> None:
        """Build student, teacher and centre.

        Args:
            encoder: see :class:`~moco_d2.layers.encoders.Encoder`.
            outputs: K.
            hidden: size of the head's hidden layers.
            bottleneck: size of the head's last hidden features.
            layers: number of Linear layers in front of the last one.
            head_norm: batch norm in the head.
            norm_last_layer: keep the rows of the last layer at norm 1, which is more stable.
            freeze: number of epochs during which the last layer does not learn.
            student_temperature: tau_s > 0.
            teacher_temperature: tau_t > 0 after the warm-up.
            first_temperature: tau_t > 0 in the first epoch.
            temperature_epochs: epochs over which tau_t rises linearly; 0: it is constant.
            momentum: of the teacher, in [0, 1]; it rises to 1 along a cosine.
            centre_momentum: in [0, 1], of the centre (Eq. 4); with 1 there is no centring, and DINO collapses.

        Raises:
            ValueError: a value is out of range, or the encoder's head is not a Linear.
        """
        super().__init__()
        counts = {"outputs": outputs, "hidden": hidden, "bottleneck": bottleneck, "layers": layers}
        temperatures = {
            "student_temperature": student_temperature,
            "teacher_temperature": teacher_temperature,
            "first_temperature": first_temperature,
        }
        lengths = {"freeze": freeze, "temperature_epochs": temperature_epochs}
        shares = {"momentum": momentum, "centre_momentum": centre_momentum}
        check_ranges([(v >= 1, f"{k} is {v}; it must be at least 1") for k, v in counts.items()])
        check_ranges([(v > 0, f"{k} is {v}; it must be positive") for k, v in temperatures.items()])
        check_ranges([(v >= 0, f"{k} is {v}; it must be 0 or more") for k, v in lengths.items()])
        check_ranges([(0 <= v <= 1, f"{k} is {v}; it must be in [0, 1]") for k, v in shares.items()])
        self.student_temperature, self.freeze = student_temperature, freeze
        self.temperatures = (first_temperature, teacher_temperature, temperature_epochs)
        self.momentum, self.centre_momentum = momentum, centre_momentum
        self.progress, self.epoch = 0.0, 0.0
        backbone = encoder(num_classes=bottleneck)
        sizes = (cut_head(backbone), *[hidden] * (layers - 1), bottleneck)
        self.student = Network(backbone, Head(sizes, outputs, head_norm, norm_last_layer))
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        use_all_blocks(self.teacher)  # as the authors' teacher does
        self.register_buffer("centre", torch.zeros(outputs))

    def before_step(self, progress: float, epoch: float) -> None:
        """Remember the time, which sets the teacher's temperature and momentum, and unfreezes the last layer."""
        self.progress, self.epoch = progress, epoch

    def temperature(self) -> float:
        """Return tau_t, which changes once per epoch."""
        first, last, epochs = self.temperatures
        done = int(self.epoch)
        return last if done >= epochs else first + (last - first) * done / max(1, epochs - 1)

    def forward(self, views: Views) -> dict[str, torch.Tensor]:
        """Compute the loss of V views, each (N, 3, H_v, W_v): Algorithm 1 with multi-crop (Eq. 3)."""
        student = self.student(views.images)  # (V, N, K)
        with torch.no_grad():
            teacher = self.teacher(views.images[:LARGE])  # (2, N, K)
            targets = ((teacher - self.centre) / self.temperature()).softmax(dim=2)
        loss = cross_view_entropy(targets, student, self.student_temperature)
        if self.training:  # After the loss: a step's targets are centred by earlier steps.
            self._move_centre(teacher)
        if self.recording:
            self._record(targets)
        return {"loss_distillation": loss}

    @torch.no_grad()
    def _move_centre(self, teacher: torch.Tensor) -> None:
        """Move the centre towards the mean output of all processes: c <- m c + (1 - m) mean (Eq. 4)."""
        count = teacher.shape[0] * teacher.shape[1] * world_size()
        self.centre.lerp_(total(teacher.sum(dim=(0, 1))) / count, 1 - self.centre_momentum)

    def after_backward(self) -> None:
        """Freeze the last layer at the beginning."""
        if self.epoch < self.freeze:
            for parameter in self.student.head.last_layer.parameters():
                parameter.grad = None

    def after_step(self) -> None:
        """Move the teacher, after the student's step."""
        ema_update_(self.teacher, self.student, cosine_momentum(self.momentum, self.progress))

    def backbone(self) -> nn.Module:
        """Return the teacher's backbone: DINO transfers the teacher."""
        return without_head(self.teacher.backbone)

    def networks(self) -> list[nn.Module]:
        """Return the backbones and heads: the networks' own loop over the sizes is not compiled."""
        return [part for network in (self.student, self.teacher) for part in network.children()]

    @torch.no_grad()
    def _record(self, targets: torch.Tensor) -> None:
        outputs = targets.flatten(0, 1)  # (2 N, K)
        entropy = torch.special.entr(outputs).sum(dim=1).mean()
        self.recorded = {
            "teacher_entropy": entropy,
            "teacher_information": torch.special.entr(outputs.mean(dim=0)).sum() - entropy,
        }

    def diagnostics(self) -> Sequence[Diagnostic]:
        """Describe the loss, the entropy of the teacher's output, and how much the output tells about the picture.

        The information is the entropy of the mean output minus the mean entropy. It is 0 in both kinds of collapse
        (section 5.3): all pictures have the same output, be it one-hot or uniform.
        """
        even = math.log(len(self.centre))
        return (
            Diagnostic("total_loss", "loss", "loss", ".4f", even, "equal outputs, log K"),
            Diagnostic("teacher_entropy", "teacher's output", "entropy", ".3f", even, "uniform, log K"),
            Diagnostic("teacher_information", "teacher's output", "information", ".3f", collapsed_below=0.01),
        )

    def advice(self, images: int, batch: int, steps: int) -> list[str]:
        """Warn about a run in which the teacher hardly moves: its mean share of the student is (1 - m) / 2 a step."""
        left = math.exp(-steps * (1 - self.momentum) / 2)
        if left < 0.5:
            return []
        return [
            f"after {steps} steps {100 * left:.0f}% of the teacher would still be its random start: train longer, or "
            "lower SSL.ARGS.momentum"
        ]

    def remedies_for_divergence(self) -> list[str]:
        """Return clipping, the authors' setting for half precision, and a longer freeze."""
        return ["SOLVER.CLIP_GRADIENTS.ENABLED True", "a longer SSL.ARGS.freeze"]

    @staticmethod
    def adapt_state_dict(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Accept the authors' training checkpoints as well (see :func:`from_official`)."""
        return from_official(state)


def use_all_blocks(network: nn.Module) -> None:
    """Switch off a ViT's stochastic depth (timm's DropPath), in place."""
    dropping: list[Any] = [module for module in network.modules() if hasattr(module, "drop_prob")]
    for module in dropping:
        module.drop_prob = 0.0


def from_official(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Translate an official training checkpoint, as ``part.name``, to this class's names.

    ``student`` and ``teacher`` lose their ``module.``, and ``dino_loss.center`` (1, K) becomes ``centre`` (K,). A last
    layer without weight norm, as in the released ResNet-50, gets its rows' norms as ``weight_g``. A state dict that
    already has this class's names is returned unchanged.
    """
    found = {key.replace(".module.", "."): value for key, value in state.items()}
    if "dino_loss.center" in found:
        found["centre"] = found.pop("dino_loss.center").flatten()
    for network in ("student", "teacher"):
        layer = f"{network}.head.last_layer.weight"
        if layer in found:
            found[f"{layer}_v"] = found.pop(layer)
            found[f"{layer}_g"] = found[f"{layer}_v"].norm(dim=1, keepdim=True)
    return {key: value for key, value in found.items() if key.startswith(("student.", "teacher.", "centre"))}

"""MoCo steps that ours is measured against: the authors' form, and lightly's parts put together as its example does."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode

from moco_d2.engine.optim import scaled_lr
from moco_d2.engine.step import chosen_autocast
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.layers.heads import cut_head
from moco_d2.layers.views import Views
from moco_d2.methods import MoCo


class Authors:
    """The paper's Algorithm 1 written literally, in float32 and the default memory format.

    The average runs over one parameter at a time, the logits are concatenated and divided, the queue is copied for the
    backward pass, SGD is a loop, and loss and accuracies are read in every step. Encoders and norm layers are ours.
    """

    name = "the authors' form"

    def __init__(self, cfg: CfgNode, views: Views) -> None:
        plain = cfg.clone()
        plain.ENGINE.CHANNELS_LAST, plain.ENGINE.COMPILE = False, False
        method = PretrainTrainer.build_model(plain)
        assert isinstance(method, MoCo)
        self.method, self.views = method, views
        solver = cfg.SOLVER
        self.optimizer = torch.optim.SGD(
            method.encoder_q.parameters(), scaled_lr(cfg), solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY,
            foreach=False,
        )  # fmt: skip
        self.queue = method.queue.features.T.contiguous()  # (C, K), as theirs
        self.pointer = 0

    def run(self) -> None:
        """Take a step."""
        f_q, f_k, m = self.method.encoder_q, self.method.encoder_k, self.method.momentum
        q = F.normalize(f_q(self.views.images[0]), dim=1)
        with torch.no_grad():
            for p_q, p_k in zip(f_q.parameters(), f_k.parameters(), strict=True):
                p_k.data = p_k.data * m + p_q.data * (1 - m)
            order = torch.randperm(len(q)).to(q.device)
            k = F.normalize(f_k(self.views.images[1][order]), dim=1)[order.argsort()]
        loss, logits = textbook(q, k, self.queue.clone().detach(), self.method.temperature)
        self.queue[:, self.pointer : self.pointer + len(k)] = k.T
        self.pointer = (self.pointer + len(k)) % self.queue.shape[1]
        for top in (1, 5):
            (logits.detach().topk(top).indices == 0).any(dim=1).float().mean().item()
        loss.item()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def textbook(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return InfoNCE and its (N, 1 + K) logits, from a queue (C, K), as in the paper's pseudo-code."""
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
    logits = torch.cat([positive, torch.einsum("nc,ck->nk", q, queue)], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device)), logits


class Lightly:
    """lightly's MoCo v2: its head, memory bank, average and shuffling around an encoder like ours.

    One BN group, as on one GPU there. Batch, sizes, optimizer and lr are those of the config.
    """

    name = "lightly's MoCo, one BN group"

    def __init__(self, cfg: CfgNode, views: Views) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules import MoCoProjectionHead
        from lightly.models.utils import deactivate_requires_grad

        one, wanted, solver = cfg.clone(), cfg.SSL.ARGS, cfg.SOLVER
        one.SSL.ARGS.bn_groups, one.SSL.ARGS.mlp = 1, False  # the head, a Linear, is replaced by lightly's
        method = PretrainTrainer.build_model(one)
        assert isinstance(method, MoCo)
        self.query = method.encoder_q
        size = cut_head(self.query)
        self.query.fc = MoCoProjectionHead(size, size, wanted.dim).to(cfg.MODEL.DEVICE)
        self.key = copy.deepcopy(self.query)
        deactivate_requires_grad(self.key)
        self.loss = NTXentLoss(wanted.temperature, memory_bank_size=(wanted.queue_size, wanted.dim))
        self.loss.to(cfg.MODEL.DEVICE)
        self.optimizer = torch.optim.SGD(
            self.query.parameters(), scaled_lr(cfg), solver.MOMENTUM, weight_decay=solver.WEIGHT_DECAY
        )
        self.views, self.momentum = views, wanted.momentum
        chosen = chosen_autocast(cfg)
        self.autocast = getattr(torch, chosen) if chosen else None

    def run(self) -> None:
        """Take a step."""
        from lightly.models.utils import batch_shuffle, batch_unshuffle, update_momentum

        update_momentum(self.query, self.key, self.momentum)
        with torch.autocast(self.views.images[0].device.type, self.autocast, enabled=self.autocast is not None):
            q = self.query(self.views.images[0])
            with torch.no_grad():
                shuffled, order = batch_shuffle(self.views.images[1])
                k = batch_unshuffle(self.key(shuffled), order)
        loss = self.loss(q.float(), k.float())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

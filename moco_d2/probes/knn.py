"""The kNN probe: held-out pictures take the classes of the most similar training pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from detectron2.config import CfgNode

from moco_d2.data.labelled import LabelledSet
from moco_d2.layers.distributed import share, total
from moco_d2.layers.knn import hits, knn_scores
from moco_d2.layers.spread import effective_rank, uniformity
from moco_d2.probes.backbone import Backbone
from moco_d2.probes.features import features_of
from moco_d2.probes.result import describe, result

KS = (1, 20, 200)
TEMPERATURE = 0.07  # of InstDisc and DINO
_SPREAD = 2048  # features, evenly spaced; their pairs are 2 million


def probe_knn(
    backbone: Backbone,
    train: LabelledSet,
    val: LabelledSet,
    cfg: CfgNode,
    size: int,
    ks: Sequence[int] = KS,
    temperature: float = TEMPERATURE,
) -> dict[str, Any]:
    """Classify a held-out set by the features of a training set, both under the test transform.

    Every process must call this. Each computes the features of a share of the pictures and classifies a share.

    Args:
        backbone: to be probed; moved to ``MODEL.DEVICE``.
        train: the bank.
        val: the queries, of the same classes.
        cfg: see :func:`moco_d2.probes.features.features_of`; SEED is recorded.
        size: side of the crops in pixels.
        ks: numbers of neighbours.
        temperature: T of the weights exp(similarity / T).

    Returns:
        The content of ``probe.json``, with top-1 and top-5 in percent for each k.
    """
    backbone.network.to(cfg.MODEL.DEVICE)
    bank = features_of(backbone, train, cfg, size, dtype=torch.float16).gathered()
    queries = features_of(backbone, val, cfg, size, dtype=torch.float16).gathered()
    labels = share(queries.labels)
    scores = knn_scores(share(queries.values), bank.values, bank.labels, len(train.classes), ks, temperature)
    right = total(torch.tensor([[hits(one, labels, top) for top in (1, 5)] for one in scores], device=labels.device))
    rows = [
        {"k": k, "temperature": temperature, "top1": top1, "top5": top5}
        for k, (top1, top5) in zip(ks, (100 * right.double() / len(queries.labels)).tolist(), strict=True)
    ]
    found = {
        "results": rows,
        "train": describe(train, bank.unreadable),
        "val": describe(val, queries.unreadable),
        "classes": len(train.classes),
        "size": size,
        "features": _spread(queries.values),
    }
    return result("knn", backbone, max(cfg.SEED, 0), cfg.MODEL.DEVICE, found)


def _spread(features: torch.Tensor) -> dict[str, float]:
    """Return how the features of the held-out set spread."""
    some = features[:: -(-len(features) // _SPREAD)].float().cpu()
    found = {"dimension": features.shape[1], "effective_rank": effective_rank(some)}
    return found | ({"uniformity": uniformity(some)} if len(some) > 1 else {})

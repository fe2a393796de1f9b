"""DenseCL against loops over cells, MoCo v2, lightly's matching, and the published names and shapes."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from lightly.models.utils import select_most_similar
from torchvision.models import resnet50

from moco_d2.layers.resnet import build_resnet
from moco_d2.methods import DenseCL, MoCo
from moco_d2.methods.densecl import matched
from tests.methods.small_methods import ROUNDING, build, make_views, six_losses


def test_the_losses_are_those_of_loops_over_images_and_cells() -> None:
    method, t = build("DenseCL", dense_weight=0.3), 0.2
    q, k = copy.deepcopy(method.encoder_q), copy.deepcopy(method.encoder_k)  # equal before the first step
    queue, dense_queue = method.queue.features.clone(), method.dense_queue.features.clone()
    views = make_views("DenseCL", 0)
    losses = method(views)
    b_q, f_q, g_q = q(views.images[0])
    cells_q = b_q.detach()
    b_k, f_k, g_k = (part.detach() for part in k(views.images[1]))

    def cross_entropy(query: torch.Tensor, key: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        query, key = F.normalize(query, dim=0), F.normalize(key, dim=0)
        logits = torch.stack([query @ key, *(query @ negative for negative in negatives)]) / t
        return logits.logsumexp(0) - logits[0]

    n, cells = len(f_q), b_q.shape[2]
    assert cells == 4
    contrast = sum(cross_entropy(f_q[i], f_k[i], queue) for i in range(n)) / n
    dense = 0.0
    for i in range(n):
        for s in range(cells):
            cosines = [float(F.cosine_similarity(cells_q[i, :, s], b_k[i, :, u], dim=0)) for u in range(cells)]
            dense = dense + cross_entropy(g_q[i, :, s], g_k[i, :, cosines.index(max(cosines))], dense_queue)
    expected = 0.7 * contrast + 0.3 * dense / (n * cells)
    torch.testing.assert_close(losses["loss_contrast"] + losses["loss_dense"], expected)
    sum(losses.values()).backward(), expected.backward()
    for ours, theirs in zip(method.encoder_q.parameters(), q.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    torch.testing.assert_close(method.queue.features[:n], F.normalize(f_k, dim=1))
    torch.testing.assert_close(method.dense_queue.features[:n], F.normalize(g_k.mean(2), dim=1))
    assert torch.equal(method.dense_queue.features[n:], dense_queue[n:])


def test_a_cell_takes_the_dense_key_of_its_most_similar_cell_as_lightly_does() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second, dense = (torch.randn(3, c, 9, dtype=torch.float64, generator=generator) for c in (12, 12, 5))
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    found = matched(first, second, dense)
    theirs = select_most_similar(
        first.mT.contiguous(), second.mT.contiguous(), F.pad(dense, (0, 0, 0, 7)).mT.contiguous()
    )
    torch.testing.assert_close(found, theirs.mT[:, :5])  # its values must be as long as its features
    assert torch.equal(matched(first, first, dense), dense), "equal maps: each cell finds itself"
    order = torch.randperm(9, generator=generator)
    assert torch.equal(matched(first, second[..., order], dense[..., order]), found), "the keys' order does not matter"


def test_without_the_dense_part_it_is_moco_v2() -> None:
    method = build("DenseCL", dense_weight=0.0)
    encoder = functools.partial(build_resnet, "resnet18", width=0.125, norm="SyncBN")
    moco = MoCo(encoder, dim=16, queue_size=24, momentum=0.9, temperature=0.2, mlp=True, shuffle=False).double()
    for ours, theirs in ((method.encoder_q, moco.encoder_q), (method.encoder_k, moco.encoder_k)):
        theirs.load_state_dict(ours.network.state_dict())
    moco.queue.load_state_dict(method.queue.state_dict())
    for step in range(2):
        views = make_views("DenseCL", step)
        expected, found = moco(views)["loss_contrast"], method(views)
        torch.testing.assert_close(found["loss_contrast"], expected)
        assert found["loss_dense"] == 0
        moco.zero_grad(), method.zero_grad()
        expected.backward(), sum(found.values()).backward()
        for ours, theirs in zip(method.encoder_q.network.parameters(), moco.encoder_q.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad)


def test_equal_features_have_the_loss_of_chance() -> None:
    method = build("DenseCL").eval()
    with torch.no_grad():
        for parameter in (*method.encoder_q.head[2].parameters(), *method.encoder_q.dense[2].parameters()):
            parameter.zero_()
        for encoder in (method.encoder_q, method.encoder_k):
            encoder.head[2].bias.fill_(1.0), encoder.dense[2].bias.fill_(1.0)
            encoder.head[2].weight.zero_(), encoder.dense[2].weight.zero_()
        for queue in (method.queue, method.dense_queue):
            queue.features.fill_(0.25)
    losses = method(make_views("DenseCL", 0))
    assert [loss.item() for loss in losses.values()] == pytest.approx([math.log(25) / 2] * 2)
    assert method.recorded["contrast_acc1"] == 0 and method.recorded["feature_std"] < 1e-9


def test_shuffled_keys_are_in_batch_order_and_have_other_statistics() -> None:
    views = make_views("DenseCL", 0)

    def keys(groups: int, shuffle: bool) -> tuple[torch.Tensor, ...]:
        torch.manual_seed(0)
        encoder = functools.partial(build_resnet, "resnet18", width=0.125)
        method = DenseCL(encoder, dim=16, queue_size=24, bn_groups=groups, shuffle=shuffle).double()
        return method._keys(views.images[1])

    for one, other, grouped in zip(keys(1, True), keys(1, False), keys(2, True), strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.allclose(one, grouped)


def test_six_steps_have_the_recorded_losses() -> None:
    expected = [
        0.8699014797585443, 2.3811928071495094, 2.886331634814894, 3.2592747227831182, 3.041750575031803,
        2.89479347717265,
    ]  # fmt: skip
    assert six_losses("DenseCL") == pytest.approx(expected, rel=ROUNDING)


def test_the_key_encoder_moves_before_the_keys_and_has_no_gradient() -> None:
    method = build("DenseCL")
    with torch.no_grad():
        for parameter in method.encoder_q.parameters():
            parameter.add_(0.1)
    before = [p.clone() for p in method.encoder_k.parameters()]
    sum(method(make_views("DenseCL", 0)).values()).backward()
    followed = zip(method.encoder_k.parameters(), before, method.encoder_q.parameters(), strict=True)
    for new, old, query in followed:
        torch.testing.assert_close(new, 0.9 * old + 0.1 * query)
        assert new.grad is None


def test_a_published_checkpoint_continues() -> None:
    source, target = build("DenseCL"), build("DenseCL", seed=1)
    source(make_views("DenseCL", 0))
    official = {}
    for key, value in source.state_dict().items():
        if key.endswith("queue.features"):
            value = value.T
        for ours, theirs in (
            (".network.fc.", ".1.mlp."), (".network.", ".0."), (".dense.", ".1.mlp2."),
            ("dense_queue.features", "queue2"), ("queue.features", "queue"),
            ("dense_queue.pointer", "queue2_ptr"), ("queue.pointer", "queue_ptr"),
        ):  # fmt: skip
            key = key.replace(ours, theirs)
        official[key] = value
        if key.startswith("encoder_q.0."):
            official[key.replace("encoder_q.0.", "backbone.")] = value
    assert {
        "queue", "queue_ptr", "queue2", "queue2_ptr", "encoder_q.0.conv1.weight", "encoder_k.0.bn1.running_mean",
        "backbone.layer1.0.conv1.weight", "encoder_q.1.mlp.0.weight", "encoder_q.1.mlp.2.bias",
        "encoder_k.1.mlp2.0.weight", "encoder_q.1.mlp2.2.weight",
    } <= set(official)  # fmt: skip
    assert official["queue2"].shape == (16, 24) and official["encoder_q.1.mlp2.0.weight"].shape == (64, 64, 1, 1)
    target.load_state_dict(DenseCL.adapt_state_dict(official))
    views = make_views("DenseCL", 1)
    assert target(views) == source(views)
    ours = source.state_dict()
    assert all(value is ours[key] for key, value in DenseCL.adapt_state_dict(ours).items()), "ours passes unchanged"


def test_the_published_configuration_has_the_published_shapes() -> None:
    with torch.device("meta"):
        encoder = DenseCL(resnet50).encoder_q
    shapes = [tuple(p.shape) for head in (encoder.head, encoder.dense) for p in head.parameters()]
    cells = [(2048, 2048, 1, 1), (2048,), (128, 2048, 1, 1), (128,)]
    assert shapes == [(2048, 2048), (2048,), (128, 2048), (128,), *cells]


def test_values_out_of_range_are_refused_and_short_runs_are_warned_of() -> None:
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.dense_weight is 1\.5; it must be in \[0, 1\]"):
        build("DenseCL", dense_weight=1.5)
    with pytest.raises(ValueError, match=r"SSL\.ARGS\.queue_size is 0(?s:.*)"):
        build("DenseCL", queue_size=0)
    found = build("DenseCL").advice(images=20, batch=8, steps=2)
    assert len(found) == 2 and "holds the keys of 1.2 epochs" in found[0] and "81% of the key encoder" in found[1]

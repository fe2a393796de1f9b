"""DeepCluster v2: labels of the last epoch's features, and a loss against its equation."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moco_d2.layers.encode import embed
from moco_d2.layers.resnet import build_resnet
from moco_d2.layers.views import Views
from moco_d2.methods import DeepClusterV2, build_method
from moco_d2.methods.deepcluster import UNLABELLED
from tests.methods.small_methods import IMAGES, ROUNDING, Tiny, build, make_views, train_tiny
from tests.methods.test_contract import optimizer, train


def labelled(**args: object) -> DeepClusterV2:
    """Return a method after its first pass, over 16 of the 32 images."""
    model = build("DeepClusterV2", **args)
    model.before_epoch(0, lambda: iter([make_views("DeepClusterV2", step) for step in range(2)]))
    return model


def test_the_loss_is_the_mean_cross_entropy_over_clusterings_views_and_labelled_images() -> None:
    model, views = labelled().eval(), make_views("DeepClusterV2", 5)  # without running statistics
    z = embed(model.encoder, model.projection_head, views.images).view(4, 8, 16)
    terms = []
    for head, labels in zip(model.heads, model.memory.labels, strict=True):
        own = []
        for view in z:
            for feature, image in zip(view, views.index.tolist(), strict=True):
                if labels[image] != UNLABELLED:
                    scores = head.weight @ feature / 0.1
                    own.append(scores.exp().sum().log() - scores[labels[image]])
        assert 0 < len(own) < 32
        terms.append(torch.stack(own).mean())
    (loss,) = model(views).values()
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-10, atol=0)


def test_before_training_a_pass_gives_the_labels_and_each_epoch_the_next_ones() -> None:
    model = labelled()
    views = [make_views("DeepClusterV2", step) for step in range(2)]
    shown = torch.cat([one.index for one in views]).unique()
    for epoch in range(2):
        assert ((model.memory.labels != UNLABELLED).any(0).nonzero()[:, 0]).equal(shown)
        for number, (head, labels) in enumerate(zip(model.heads, model.memory.labels, strict=True)):
            bank = model.memory.banks[number % 2].rows(shown)
            assert (bank @ head.weight.T).argmax(1).equal(labels[shown]), "alternating views"
            torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(5).double())
        assert not torch.equal(model.heads[0].weight, model.heads[2].weight), "another start"
        if epoch == 0:
            views = [make_views("DeepClusterV2", step) for step in (2, 3)]
            shown = torch.cat([one.index for one in views]).unique()
            for one in views:
                model.before_step(0.0, 0.0)
                z = embed(model.encoder, model.projection_head, one.images).view(4, 8, 16)
                model(one)
                torch.testing.assert_close(model.memory.banks[1].rows(one.index), z[1])
            model.before_epoch(1, lambda: iter(()))
    assert not any(p.requires_grad for p in model.heads.parameters())


def test_closed_forms() -> None:
    model = labelled()
    for head in model.heads:
        head.weight.zero_()
    (loss,) = model(make_views("DeepClusterV2", 0)).values()
    assert loss.item() == pytest.approx(math.log(5), rel=1e-12)
    model.memory.labels.fill_(UNLABELLED)
    (loss,) = model(make_views("DeepClusterV2", 0)).values()
    loss.backward()
    assert loss.item() == 0 and model.encoder.conv1.weight.grad.abs().sum() == 0, "not 0 / 0"


def test_v1s_head_learns_and_starts_anew_with_the_clusters() -> None:
    model = labelled(reset_head=True, dim=64, clusters=8)
    for head in model.heads:
        assert head.weight.std().item() == pytest.approx(0.01, rel=0.2) and head.bias.abs().sum() == 0
    before = [head.weight.clone() for head in model.heads]
    train(model, optimizer(model), range(2), "DeepClusterV2")
    moved = [head.weight.clone() for head in model.heads]
    assert all((new - old).abs().max() > 0 for new, old in zip(moved, before, strict=True))
    model.before_epoch(1, lambda: iter(()))
    assert all(head.weight.std().item() == pytest.approx(0.01, rel=0.2) for head in model.heads)
    assert not any(torch.equal(head.weight, old) for head, old in zip(model.heads, moved, strict=True))


def test_six_steps_end_where_they_did() -> None:
    model = build("DeepClusterV2")
    losses = train(model, optimizer(model), range(6), "DeepClusterV2")
    expected = [
        2.777571260992057,
        2.978157275504531,
        3.3579330316525215,
        2.4624886196550833,
        2.4895630795718353,
        1.9957733507417164,
    ]
    assert losses == pytest.approx(expected, rel=ROUNDING)


def test_features_do_not_collapse_and_clusters_become_predictable() -> None:
    torch.manual_seed(0)
    model = DeepClusterV2(Tiny, 32, dim=16, hidden=32, clusters=8, clusterings=2)
    noisy = Views([torch.randn(32, 3, 4, 4) for _ in range(2)], torch.arange(32), torch.zeros(2, 32, 4))
    model.before_epoch(0, lambda: iter([noisy]))
    first = model.diagnostics()[2].reference
    for epoch in range(3):
        train_tiny(model, 40)
        model.before_epoch(epoch + 1, lambda: iter(()))
    assert model.recorded["cluster_accuracy"] > 0.8 > 2 * first
    assert model.recorded["feature_std"] > 5 * model.diagnostics()[1].collapsed_below


def test_the_authors_checkpoint_continues_here_with_an_empty_memory() -> None:
    """Names and shapes of main_deepclusterv2.py's ResNet, at an eighth of the width."""
    torch.manual_seed(3)
    resnet = build_resnet("resnet50", width=0.125)
    resnet.fc = nn.Identity()
    resnet.projection_head = nn.Sequential(nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128))
    resnet.prototypes = nn.Module()
    for number in range(3):
        resnet.prototypes.add_module(f"prototypes{number}", nn.Linear(128, 30, bias=False))
    official = {f"module.{key}": value for key, value in resnet.state_dict().items()}
    assert "module.prototypes.prototypes2.weight" in official
    encoder = functools.partial(build_resnet, "resnet50", width=0.125)
    model = build_method("DeepClusterV2", encoder, {"hidden": 256, "clusters": 30}, images=50)
    own = {key: value for key, value in model.state_dict().items() if key.startswith(model.memories)}
    model.load_state_dict(own | model.adapt_state_dict(official))
    x = torch.rand(4, 3, 32, 32)
    z = F.normalize(nn.Sequential(resnet, resnet.projection_head).eval()(x), dim=1)
    model.eval()
    scores = model.heads[2](embed(model.encoder, model.projection_head, [x]))
    torch.testing.assert_close(scores, resnet.prototypes.prototypes2(z))
    assert model.adapt_state_dict(model.state_dict()).keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [("clusters", 0, "at least 1"), ("temperature", 0.0, "positive"), ("iterations", -1, "0 or more")],
)
def test_values_out_of_range_are_named(argument: str, value: float, words: str) -> None:
    with pytest.raises(ValueError, match=rf"SSL\.ARGS\.{argument} is {value}; it must be {words}"):
        build("DeepClusterV2", **{argument: value})


def test_fewer_images_than_clusters_are_told_and_each_is_a_cluster() -> None:
    model = labelled(clusters=40)
    shown = (model.memory.labels[0] != UNLABELLED).nonzero()[:, 0]
    assert sorted(model.memory.labels[0, shown].tolist()) == list(range(len(shown))) and len(shown) < IMAGES
    (advice,) = model.advice(200, 8, 100)
    assert "40 clusters of 200 images hold 5.0 each" in advice and build("DeepClusterV2").advice(200, 8, 1) == []

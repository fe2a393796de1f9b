"""One checkpoint per known layout, built around a given network; new sources are tested by having an entry here.

Keys, nesting and other contents are those of the projects' own code. The renaming is spelled here a second time, by
regular expressions, so that a mistake in the converter's tables shows.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moco_d2.facts import BackboneFacts
from moco_d2.layers.resnet import build_resnet, describe

State = dict[str, torch.Tensor]
FACTS = {"origin": "a run of the tests", "recipe": "moco_v2_R50_200ep"}


def network(name: str = "resnet50", width: float = 0.25, seed: int = 0) -> nn.Module:
    """A network whose normalisations do something, as after training: with fresh ones many mistakes do not show."""
    torch.manual_seed(seed)
    built = build_resnet(name, width=width)
    for module in built.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return built


def trunk(net: nn.Module) -> State:
    return {key: value for key, value in net.state_dict().items() if not key.startswith("fc.")}


def under(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def tensors(prefix: str = "", /, **shapes: tuple[int, ...]) -> State:
    """Tensors besides the network, of the projects' shapes cut to a few values; `__` stands for their keys' dots."""
    return {prefix + key.replace("__", "."): torch.ones([min(n, 4) for n in shape]) for key, shape in shapes.items()}


def array(*shape: int) -> Any:
    return np.ones([min(n, 4) for n in shape], np.float32)


def head(layers: int) -> State:
    if layers == 1:
        return tensors(fc__weight=(128, 2048), fc__bias=(128,))
    return tensors(fc__0__weight=(2048, 2048), fc__0__bias=(2048,), fc__2__weight=(128, 2048), fc__2__bias=(128,))


def other(state: State) -> State:
    """A second network: a moving average, a target, a student."""
    return {key: value + 1 for key, value in state.items()}


def facts(net: nn.Module) -> BackboneFacts:
    return describe(net, **FACTS)


def _own_backbone(net: nn.Module) -> dict[str, Any]:
    return {"state_dict": trunk(net), "facts": facts(net).as_dict()}


def _own_training(net: nn.Module) -> dict[str, Any]:
    query, key = trunk(net) | head(2), other(trunk(net)) | head(2)
    queue = tensors("queue.", features=(65536, 128), pointer=(1,))
    model = under("encoder_q.", query) | under("encoder_k.", key) | queue
    return {"model": model, "trainer": {"iteration": 7}, "iteration": 7, "facts": facts(net).as_dict()}


def _moco_training(net: nn.Module, head_layers: int, wrapper: str = "module.") -> dict[str, Any]:
    query, key = trunk(net) | head(head_layers), other(trunk(net)) | head(head_layers)
    state = under(f"{wrapper}encoder_q.", query) | under(f"{wrapper}encoder_k.", key)
    state |= tensors(wrapper, queue=(128, 65536), queue_ptr=(1,))
    optimizer = {"state": {0: {"momentum_buffer": torch.randn(3)}}, "param_groups": [{"lr": 0.03, "params": [0]}]}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": optimizer}


def _moco_released(net: nn.Module) -> dict[str, Any]:
    return {"epoch": 200, "arch": "resnet50", "state_dict": under("module.encoder_q.", trunk(net) | head(2))}


def _with_arguments(net: nn.Module) -> dict[str, Any]:
    # Forks store their command line, for which torch refuses weights_only.
    return {**_moco_training(net, 2), "args": argparse.Namespace(lr=0.03)}


def _no_counters(net: nn.Module) -> State:
    return {key: value for key, value in net.state_dict().items() if "num_batches_tracked" not in key}


TRAINING: dict[str, Any] = {"epoch": 3, "arch": "resnet50", "optimizer": {}}
SOLO: dict[str, Any] = {
    "epoch": 3,
    "global_step": 7,
    "pytorch-lightning_version": "1.6.4",
    "loops": {},
    "callbacks": {argparse.ArgumentParser: {"best": 1}},
    "optimizer_states": [],
    "lr_schedulers": [],
}
LIGHTNING = SOLO | {"hyper_parameters": {"lr": 0.1}}


def renamed(state: State, *rules: tuple[str, str]) -> State:
    """Every key by the first rule that matches the whole of it."""
    out = {}
    for key, value in state.items():
        rule = next((pattern, new) for pattern, new in rules if re.fullmatch(pattern, key))
        out[re.sub(rule[0], rule[1], key)] = value
    return out


def shifted(pattern: str, by: int, state: State) -> State:
    """The number that the pattern's group 2 finds, moved."""
    return {re.sub(pattern, lambda m: f"{m[1]}{int(m[2]) + by}{m[3]}", k): v for k, v in state.items()}


def sequential(state: State) -> State:
    state = renamed(state, (r"conv1\.(.*)", r"0.\1"), (r"bn1\.(.*)", r"1.\1"), (r"layer(\d)\.(.*)", r"\1.\2"))
    return {re.sub(r"^(\d)\.(?=\d)", lambda m: f"{int(m[1]) + 3}.", key): value for key, value in state.items()}


def hugging_face(state: State) -> State:
    state = renamed(
        state,
        (r"conv1\.(.*)", r"embedder.embedder.convolution.\1"),
        (r"bn1\.(.*)", r"embedder.embedder.normalization.\1"),
        (r"layer(\d)\.(\d+)\.conv(\d)\.(.*)", r"encoder.stages.\1.layers.\2.layer.\3.convolution.\4"),
        (r"layer(\d)\.(\d+)\.bn(\d)\.(.*)", r"encoder.stages.\1.layers.\2.layer.\3.normalization.\4"),
        (r"layer(\d)\.0\.downsample\.0\.(.*)", r"encoder.stages.\1.layers.0.shortcut.convolution.\2"),
        (r"layer(\d)\.0\.downsample\.1\.(.*)", r"encoder.stages.\1.layers.0.shortcut.normalization.\2"),
    )
    state = shifted(r"^(encoder\.stages\.)(\d)(.*)", -1, state)
    return shifted(r"^(.*\.layer\.)(\d)(.*)", -1, state)


def separius(state: State) -> State:
    state = renamed(
        state,
        (r"conv1\.(.*)", r"net.0.0.\1"),
        (r"bn1\.(.*)", r"net.0.1.0.\1"),
        (r"layer(\d)\.(\d+)\.conv1\.(.*)", r"net.\1.blocks.\2.net.0.\3"),
        (r"layer(\d)\.(\d+)\.bn1\.(.*)", r"net.\1.blocks.\2.net.1.0.\3"),
        (r"layer(\d)\.(\d+)\.conv2\.(.*)", r"net.\1.blocks.\2.net.2.\3"),
        (r"layer(\d)\.(\d+)\.bn2\.(.*)", r"net.\1.blocks.\2.net.3.0.\3"),
        (r"layer(\d)\.(\d+)\.conv3\.(.*)", r"net.\1.blocks.\2.net.4.\3"),
        (r"layer(\d)\.(\d+)\.bn3\.(.*)", r"net.\1.blocks.\2.net.5.0.\3"),
        (r"layer(\d)\.0\.downsample\.0\.(.*)", r"net.\1.blocks.0.projection.shortcut.\2"),
        (r"layer(\d)\.0\.downsample\.1\.(.*)", r"net.\1.blocks.0.projection.bn.0.\2"),
    )
    return state


def classy(state: State) -> State:
    at = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6}

    def new(key: str) -> str:
        key = key.replace("conv1", "initial_block._module.0", 1) if key.startswith("conv1.") else key
        key = key.replace("bn1", "initial_block._module.1", 1) if key.startswith("bn1.") else key
        found = re.fullmatch(r"layer(\d)\.(\d+)\.(\w+)\.(.*)", key)
        if not found:
            return key
        stage, block, module, rest = int(found[1]) - 1, found[2], found[3], found[4]
        inside = f"convolutional_block.{at[module]}" if module in at else module.replace("bn3", "bn")
        return f"blocks.{stage}.block{stage}-{block}.{inside}.{rest}"

    return {new(key): value for key, value in state.items()}


def detectron2(state: State, prefix: str = "", last: str = "") -> State:
    state = {key: value for key, value in state.items() if "num_batches" not in key}
    state = renamed(
        state,
        (r"conv1\.(.*)", r"stem.conv1.\1"),
        (r"bn1\.(.*)", r"stem.conv1.norm.\1"),
        (r"layer(\d)\.(\d+)\.conv(\d)\.(.*)", r"res\1.\2.conv\3.\4"),
        (r"layer(\d)\.(\d+)\.bn(\d)\.(.*)", r"res\1.\2.conv\3.norm.\4"),
        (r"layer(\d)\.0\.downsample\.0\.(.*)", r"res\1.0.shortcut.\2"),
        (r"layer(\d)\.0\.downsample\.1\.(.*)", r"res\1.0.shortcut.norm.\2"),
    )
    state = shifted(r"^(res)(\d)(.*)", 1, state)
    return {(last if last and key.startswith("res5") else prefix) + key: value for key, value in state.items()}


def caffe2(state: State, norm: tuple[str, str, str, str] = ("gamma", "beta", "running_mean", "running_var")) -> Any:
    new = {}
    words = dict(zip(("weight", "bias", "running_mean", "running_var"), norm, strict=True))
    for key, value in detectron2(state).items():
        *parts, tensor = key.split(".")
        if parts[0] == "stem":
            name = "conv1" if parts[-1] == "conv1" else "res_conv1_bn"
        else:
            branch = {"conv1": "2a", "conv2": "2b", "conv3": "2c", "shortcut": "1"}[parts[2]]
            name = f"{parts[0]}_{parts[1]}_branch{branch}" + ("_bn" if parts[-1] == "norm" else "")
        new[f"{name}_{words[tensor] if name.endswith('_bn') else 'w'}"] = value.numpy()
    return new


def modules(net: nn.Module) -> list[tuple[str, str]]:
    """(convolution, norm) in the order in which Google's SimCLR makes them: a block's shortcut first."""
    names = [("conv1", "bn1")]
    for stage in range(1, 5):
        for block in range(len(getattr(net, f"layer{stage}"))):
            here = f"layer{stage}.{block}"
            names += [(f"{here}.downsample.0", f"{here}.downsample.1")] if block == 0 else []
            names += [(f"{here}.conv{c}", f"{here}.bn{c}") for c in (1, 2, 3)]
    return names


def kernel(state: State, name: str) -> Any:
    return np.ascontiguousarray(state[f"{name}.weight"].permute(2, 3, 1, 0).numpy())


def tensorflow(net: nn.Module) -> dict[str, Any]:
    state, new = net.state_dict(), {"global_step": np.zeros((), np.int64)}
    words = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
    for index, (conv, norm) in enumerate(modules(net)):
        n = f"_{index}" if index else ""
        new[f"base_model/conv2d{n}/kernel"] = kernel(state, conv)
        new[f"base_model/conv2d{n}/kernel/Momentum"] = np.ones_like(new[f"base_model/conv2d{n}/kernel"])
        for word, tensor in words.items():
            new[f"base_model/batch_normalization{n}/{word}"] = state[f"{norm}.{tensor}"].numpy()
    return {
        **new,
        "head_contrastive/nl_0/dense/kernel": array(2048, 2048),
        "head_supervised/linear_layer/dense/kernel": array(2048, 1000),
    }


class _ByolExperimentState(tuple[Any, ...]):
    """DeepMind's named tuple; the reader does not have its class."""

    def __reduce__(self) -> Any:
        return _ByolExperimentState, tuple(self)

    def __new__(cls, *fields: Any) -> Any:
        return super().__new__(cls, fields)


def haiku(net: nn.Module) -> dict[str, Any]:
    state = net.state_dict()
    params: dict[str, Any] = {
        "projector/linear": {"w": array(2048, 4096)},
        "predictor/linear_1": {"w": array(4096, 256)},
        "classifier": {"w": array(2048, 1000)},
    }
    statistics: dict[str, Any] = {}
    for conv, norm in modules(net):
        found = re.fullmatch(r"layer(\d)\.(\d+)\.(conv(\d)|downsample\.0)", conv)
        at = f"block_group_{int(found[1]) - 1}/~/block_{found[2]}/~/" if found else ""
        number = f"_{int(found[4]) - 1}" if found and found[4] else ""
        kind = "initial_" if not found else "" if number else "shortcut_"
        params[f"res_net50/~/{at}{kind}conv{number}"] = {"w": kernel(state, conv)}
        name = f"res_net50/~/{at}{kind}batchnorm{number}"
        wide = {
            t: state[f"{norm}.{t}"].view(1, 1, 1, -1).numpy() for t in ("weight", "bias", "running_mean", "running_var")
        }
        params[name] = {"scale": wide["weight"], "offset": wide["bias"]}
        for ema, tensor in (("mean_ema", "running_mean"), ("var_ema", "running_var")):
            statistics[f"{name}/~/{ema}"] = {
                "average": wide[tensor],
                "hidden": wide[tensor],
                "counter": np.zeros((), np.int64),
            }
    target = {module: {key: value + 1 for key, value in tensors.items()} for module, tensors in params.items()}
    return {"step": 1, "rng": np.zeros(2, np.uint32), "experiment_state": (params, target, statistics, statistics, {})}


def _twice(net: nn.Module, query: str, key: str, *heads: State) -> dict[str, Any]:
    """OpenSelfSup's files: `backbone` is the query encoder, which is there under its own name too."""
    state = trunk(net)
    state = under("backbone.", state) | under(query, state) | under(key, other(state))
    return {"meta": {"epoch": "3"}, "state_dict": functools.reduce(dict.__or__, heads, state), "optimizer": {}}


def exclude_bias_and_norm(parameter: Any) -> bool:
    """Barlow Twins' and VICReg's optimizers hold their script's function."""
    return bool(parameter.ndim == 1)


class NCEAverage(nn.Module):
    """InstDisc's files hold a whole module."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.ones(8, 128))


FILTERS = {"weight_decay_filter": exclude_bias_and_norm, "lars_adaptation_filter": exclude_bias_and_norm}
LARS = {"epoch": 3, "optimizer": {"state": {}, "param_groups": [FILTERS]}}


def _vissl(net: nn.Module, prefix: str = "_feature_blocks.") -> dict[str, Any]:
    model = {"trunk": under(prefix, trunk(net)), "heads": tensors("0.clf.0.", weight=(2048, 2048))}
    beside: dict[str, Any] = {"optimizer": {}, "meters": [], "losses": [], "hooks": {}}
    momentum = under("moco_encoder.trunk._feature_blocks.", other(trunk(net)))
    return {
        "classy_state_dict": {"base_model": {"model": model, "meta": {}}, **beside},
        "loss": tensors(queue=(128, 65536)) | momentum,
        "phase_idx": 1,
        "iteration": 7,
        "iteration_num": 7,
        "train_phase_idx": 1,
        "type": "consolidated",
    }


def caffe(net: nn.Module) -> State:
    """The statistics are folded into weight and bias, as in Caffe's affine layers."""
    state = trunk(net)
    for key in [key for key in state if key.endswith("running_var")]:
        norm = key.removesuffix(".running_var")
        scale = state[f"{norm}.weight"] / (state[key] + 1e-5).sqrt()
        state[f"{norm}.bias"] = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        state |= {f"{norm}.weight": scale, f"{norm}.running_mean": torch.zeros_like(scale), key: torch.ones_like(scale)}
    return state


def _shortcut_first(state: State) -> State:
    return dict(sorted(state.items(), key=lambda item: (item[0][:8], "downsample" not in item[0])))


@dataclass(frozen=True)
class Layout:
    """A form in which a source's files come, and what the conversion must say of it.

    `weights`: the tensors under torchvision's names that must come out, where they are not the network's own.
    """

    source: str
    build: Callable[[nn.Module], dict[str, Any]]
    origin: str = ""
    dropped: int | None = None  # beside the 53 batch counters
    foreign: int | None = None
    weights: Callable[[nn.Module], State] = trunk
    width: float = 1


def nested(place: str, prefix: str = "", *heads: State, **top: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """The network under `place` and `prefix`, and small tensors beside it."""

    def build(net: nn.Module) -> dict[str, Any]:
        state = functools.reduce(dict.__or__, heads, under(prefix, trunk(net)))
        for key in reversed(place.split(".") if place else ()):
            state = {key: state}
        return {**top, **state}

    return build


def paired(place: str, prefix: str, companion: str, *heads: State, **top: Any) -> Callable[[nn.Module], dict[str, Any]]:
    """As `nested`, with a second network."""
    return lambda net: nested(place, prefix, under(companion, other(trunk(net))), *heads, **top)(net)


CLASSIFIER = tensors(fc__weight=(1000, 2048), fc__bias=(1000,))
ARGUMENTS = argparse.Namespace(lr=0.1)
EXTRA: dict[str, Any] = {"opt": ARGUMENTS, "optimizer": {}, "scheduler": {}, "epoch": 3, "amp": {}}
SWAV_HEAD = tensors(
    "module.projection_head.", **{"0__weight": (2048, 2048), "1__running_mean": (2048,), "3__weight": (128, 2048)}
)


def _dino(net: nn.Module) -> dict[str, Any]:
    heads = tensors("module.head.", mlp__0__weight=(4096, 2048), mlp__2__weight=(256, 4096))
    heads |= tensors("module.head.last_layer.", weight=(60000, 256))
    return {
        "student": under("module.backbone.", other(trunk(net))) | heads,
        "teacher": under("module.backbone.", trunk(net)) | heads,
        "optimizer": {"param_groups": [{"lr": np.float64(0.1)}]},
        "epoch": 3,
        "args": ARGUMENTS,
        "dino_loss": tensors(center=(1, 60000)),
        "fp16_scaler": {},
    }


LAYOUTS = {
    "own-backbone": Layout("moco_d2", _own_backbone, FACTS["origin"], 0, 0),
    "own-training": Layout("moco_d2-training", _own_training, FACTS["origin"], 328, 0),
    "moco-v1-training": Layout("moco", lambda net: _moco_training(net, 1), "MoCo v1", 4, 320),
    "moco-v2-training": Layout("moco", lambda net: _moco_training(net, 2), "MoCo v2", 6, 322),
    "moco-v2-no-module": Layout("moco", lambda net: _moco_training(net, 2, wrapper=""), "MoCo v2", 6, 322),
    "moco-v2-arguments": Layout("moco", _with_arguments, "MoCo v2", 6, 322),
    "moco-v2-released": Layout("moco", _moco_released, "MoCo v2", 4, 0),
    "moco-cleaned": Layout("moco", nested("state_dict", "module.encoder_q."), "MoCo v1 or v2", 0, 0),
    "moco-linear-evaluation": Layout(
        "torchvision", nested("state_dict", "module.", under("module.", CLASSIFIER), **TRAINING)
    ),
    "moco-v3": Layout(
        "moco_v3",
        paired(
            "state_dict",
            "module.base_encoder.",
            "module.momentum_encoder.",
            tensors(
                "module.base_encoder.fc.",
                **{
                    "0__weight": (4096, 2048),
                    "1__weight": (4096,),
                    "3__weight": (256, 4096),
                    "4__running_mean": (256,),
                },
            ),
            tensors("module.predictor.0.", weight=(4096, 256)),
            scaler={},
            **TRAINING,
        ),
    ),
    "simsiam": Layout(
        "simsiam",
        nested(
            "state_dict",
            "module.encoder.",
            tensors("module.encoder.fc.0.", weight=(2048, 2048)),
            tensors("module.encoder.fc.1.", running_mean=(2048,)),
            tensors("module.encoder.fc.6.", weight=(2048, 2048), bias=(2048,)),
            tensors("module.encoder.fc.7.", running_mean=(2048,)),
            tensors("module.predictor.0.", weight=(512, 2048)),
            **TRAINING,
        ),
    ),
    "swav": Layout(
        "swav", nested("", "module.", SWAV_HEAD, tensors("module.", prototypes__weight=(3000, 128))), "SwAV"
    ),
    "swav-training": Layout(
        "swav",
        nested(
            "state_dict", "module.", SWAV_HEAD, tensors("module.", prototypes__weight=(3000, 128)), lr=np.float64(1)
        ),
    ),
    "swav-w2": Layout(
        "swav", nested("", "module.", SWAV_HEAD, tensors("module.", prototypes__weight=(3000, 128))), "SwAV", width=2
    ),
    "deepcluster-v2": Layout(
        "deepcluster_v2",
        nested(
            "",
            "module.",
            SWAV_HEAD,
            *(tensors(f"module.prototypes.prototypes{n}.", weight=(3000, 128)) for n in range(3)),
        ),
    ),
    # Barlow Twins', VICReg's and DINO's backbones are files of one form.
    "backbone-alone": Layout("torchvision", nested("")),
    "barlow-twins-training": Layout(
        "barlow_twins",
        nested(
            "model",
            "module.backbone.",
            tensors("module.projector.0.", weight=(8192, 2048)),
            tensors("module.projector.1.", weight=(8192,)),
            tensors("module.projector.6.", weight=(8192, 8192)),
            tensors("module.bn.", running_mean=(8192,)),
            **LARS,
        ),
        "Barlow Twins",
    ),
    "vicreg-training": Layout(
        "vicreg",
        nested("model", "module.backbone.", tensors("module.projector.0.", weight=(8192, 2048)), **LARS),
        "VICReg",
    ),
    "dino": Layout("dino", _dino, "DINO"),
    "dino-no-module": Layout("dino", nested("teacher", "backbone.")),
    "byol-lucidrains": Layout(
        "byol-lucidrains",
        lambda net: (
            under("net.", net.state_dict())
            | under("online_encoder.net.", net.state_dict())
            | under("target_encoder.net.", other(trunk(net)))
            | tensors("online_predictor.0.", weight=(4096, 256))
            | tensors("online_encoder.projector.0.0.", weight=(256, 2048))
        ),
    ),
    "byol-sthalles": Layout(
        "byol-sthalles",
        lambda net: (
            {
                f"{name}_network_state_dict": under("encoder.", sequential(state))
                | tensors("projetion.net.0.", weight=(512, 2048))
                for name, state in (("online", trunk(net)), ("target", other(trunk(net))))
            }
            | {"optimizer_state_dict": {}}
        ),
    ),
    "byol-deepmind": Layout("byol", haiku),
    "simclr-tensorflow": Layout("simclr", tensorflow),
    "simclr-tonylins": Layout(
        "simclr-tonylins", lambda net: {"state_dict": _shortcut_first(dict(net.state_dict()))}, "SimCLR v1"
    ),
    "simclr-separius": Layout(
        "simclr-separius",
        lambda net: {
            "resnet": separius(trunk(net)) | CLASSIFIER,
            "head": {f"layers.{n}.weight": torch.ones(8) for n in (0, 1, 3, 4, 6, 7)},
        },
    ),
    "simclr-spijkervet": Layout(
        "simclr-spijkervet",
        nested("", "encoder.", tensors("projector.", **{"0__weight": (2048, 2048), "2__weight": (64, 2048)})),
    ),
    "simclr-sthalles": Layout("simclr-sthalles", nested("state_dict", "backbone.", under("backbone.", head(2)))),
    "pycontrast": Layout(
        "pycontrast",
        lambda net: (
            nested(
                "model",
                "module.encoder.",
                tensors("module.head.", **{"0__weight": (2048, 2048), "2__weight": (128, 2048)}),
                contrast=tensors(memory_1=(8, 128)),
                optimizer={},
                epoch=3,
                amp={},
            )(net)
            | {"model_ema": under("encoder.", other(trunk(net)))}
        ),
    ),
    "cmc-single": Layout(
        "cmc",
        lambda net: (
            nested(
                "model",
                "encoder.module.",
                under("encoder.module.", tensors(fc__weight=(128, 2048))),
                opt=ARGUMENTS,
                contrast=tensors(memory_1=(8, 128)),
                optimizer={},
                epoch=3,
            )(net)
            | {"model_ema": under("encoder.module.", other(trunk(net)))}
        ),
    ),
    # Older than batch counters, and than torch's zip files.
    "instdisc": Layout(
        "instdisc",
        lambda net: {
            "state_dict": under("module.", {k: t for k, t in trunk(net).items() if "num_batches" not in k} | head(1)),
            "lemniscate": NCEAverage(),
            "best_prec1": 54.0,
            **TRAINING,
        },
        dropped=2 - 53,
    ),
    "densecl": Layout(
        "densecl",
        lambda net: _twice(
            net,
            "encoder_q.0.",
            "encoder_k.0.",
            tensors("encoder_q.1.mlp.0.", weight=(2048, 2048)),
            tensors("encoder_q.1.mlp2.", **{"0__weight": (2048, 2048, 1, 1), "2__weight": (128, 2048, 1, 1)}),
            tensors(queue=(128, 65536), queue_ptr=(1,), queue2=(128, 65536), queue2_ptr=(1,)),
        ),
    ),
    "densecl-extracted": Layout("densecl-extracted", nested("state_dict", author="DenseCL")),
    "detco": Layout("torchvision", nested("state_dict")),
    "pixpro": Layout(
        "pixpro",
        paired(
            "model",
            "module.encoder.",
            "module.encoder_k.",
            tensors("module.projector.", linear1__weight=(4096, 2048, 1, 1), bn1__weight=(4096,)),
            tensors("module.projector_k.", linear2__weight=(256, 4096, 1, 1)),
            tensors("module.value_transform.", weight=(256, 256, 1, 1)),
            **EXTRA,
        ),
    ),
    "soco": Layout(
        "soco",
        paired(
            "model",
            "module.encoder.",
            "module.encoder_k.",
            tensors("module.neck.lateral_convs.0.", conv__weight=(256, 256, 1, 1), bn__weight=(256,)),
            tensors("module.neck.fpn_convs.3.", conv__weight=(256, 256, 3, 3)),
            tensors("module.head.", conv1__weight=(256, 256, 3, 3), bn1__weight=(256,), fc1__weight=(1024, 12544)),
            tensors("module.projector.", linear1__weight=(4096, 1024)),
            sampler={},
            **EXTRA,
        ),
    ),
    "resim": Layout(
        "resim",
        paired(
            "state_dict",
            "module.encoder_q.",
            "module.encoder_k.",
            tensors("module.encoder_q.", fpn_lateral3__weight=(256, 512, 1, 1)),
            **TRAINING,
        ),
    ),
    "soco-detectron2": Layout(
        "soco-detectron2",
        lambda net: {
            "model": detectron2(trunk(net))
            | tensors("fpn_lateral2.", weight=(256, 256, 1, 1), norm__weight=(256,))
            | tensors("box_head.conv1.", weight=(256, 256, 3, 3), norm__weight=(256,)),
            "__author__": "Yue",
            "matching_heuristics": True,
        },
        "SoCo",
    ),
    "resim-detectron2": Layout(
        "resim-detectron2",
        lambda net: {
            "model": detectron2(trunk(net))
            | tensors("backbone.fpn_lateral3.", weight=(256, 512, 1, 1), bias=(256,))
            | tensors("stem.fc.0.", weight=(2048, 2048), bias=(2048,)),
            "__author__": "MOCO",
            "matching_heuristics": True,
        },
        "ReSim",
    ),
    "pcl": Layout("moco", nested("state_dict", "module.encoder_q.", under("module.encoder_q.", head(2)), **TRAINING)),
    "openselfsup": Layout(
        "openselfsup",
        lambda net: _twice(
            net,
            "encoder_q.0.",
            "encoder_k.0.",
            tensors("encoder_q.1.mlp.0.", weight=(2048, 2048)),
            tensors(queue=(128, 65536), queue_ptr=(1,)),
        ),
    ),
    "openselfsup-byol": Layout(
        "openselfsup",
        lambda net: _twice(net, "online_net.0.", "target_net.0.", tensors(head__predictor__fc0__weight=(8, 8))),
    ),
    "openselfsup-no-backbone": Layout("openselfsup-moco", paired("state_dict", "encoder_q.0.", "encoder_k.0.")),
    "openselfsup-byol-no-backbone": Layout("openselfsup-byol", paired("state_dict", "online_net.0.", "target_net.0.")),
    "mmselfsup": Layout(
        "mmpretrain",
        paired(
            "state_dict",
            "backbone.",
            "encoder_k.module.0.",
            tensors("neck.mlp.", **{"0__weight": (2048, 2048), "2__weight": (128, 2048)}),
            tensors("encoder_k.", steps=(), module__1__mlp__0__weight=(2048, 2048)),
            tensors(queue=(128, 65536)),
            meta={},
            message_hub={"loss": ARGUMENTS},
            optimizer={},
            param_schedulers=[],
        ),
    ),
    "mmdet-caffe": Layout("caffe", caffe, weights=caffe),
    "vissl": Layout("vissl", _vissl),
    "vissl-converted": Layout("vissl", nested("model_state_dict", "_feature_blocks.")),
    "vissl-base": Layout("vissl-base", lambda net: _vissl(net, "base_model._feature_blocks.")),
    "classy-vision": Layout(
        "classy_vision",
        lambda net: {"classy_state_dict": {"base_model": {"model": {"trunk": classy(trunk(net)), "heads": {}}}}},
    ),
    "solo": Layout(
        "solo",
        paired(
            "state_dict",
            "backbone.",
            "momentum_backbone.",
            tensors(projector__0__weight=(2048, 2048), momentum_projector__0__weight=(2048, 2048)),
            tensors(classifier__weight=(1000, 2048), queue=(2, 256, 65536)),
            **SOLO,
        ),
    ),
    "solo-old": Layout(
        "solo-old",
        paired(
            "state_dict",
            "encoder.",
            "momentum_encoder.",
            tensors(projector__0__weight=(2048, 2048), classifier__weight=(1000, 2048)),
            **SOLO,
        ),
    ),
    "lightly-byol": Layout(
        "lightly",
        paired(
            "state_dict",
            "backbone.",
            "teacher_backbone.",
            tensors("projection_head.layers.0.", weight=(4096, 2048)),
            tensors("prediction_head.layers.0.", weight=(4096, 256)),
            tensors("online_classifier.classification_head.", weight=(1000, 2048)),
            **LIGHTNING,
        ),
    ),
    "lightly-dino": Layout(
        "lightly-dino",
        paired(
            "state_dict",
            "backbone.",
            "student_backbone.",
            tensors("projection_head.layers.0.", weight=(2048, 2048)),
            tensors("student_projection_head.layers.0.", weight=(2048, 2048)),
            **LIGHTNING,
        ),
    ),
    "lightly-example": Layout(
        "lightly-examples",
        lambda net: {
            "state_dict": under("backbone.", sequential(trunk(net)))
            | under("backbone_momentum.", sequential(other(trunk(net))))
            | tensors("projection_head.layers.0.", weight=(2048, 2048)),
            "epoch": 3,
        },
    ),
    "lightly-module": Layout(
        "lightly-examples",
        lambda net: (
            under("backbone.", sequential(trunk(net)))
            | under("backbone_momentum.", sequential(other(trunk(net))))
            | tensors("projection_head.layers.0.", weight=(2048, 2048))
            | tensors("projection_head_momentum.layers.0.", weight=(2048, 2048))
        ),
    ),
    "bolts-moco": Layout(
        "bolts-moco",
        paired(
            "state_dict",
            "encoder_q.",
            "encoder_k.",
            under("encoder_q.", head(1)),
            tensors(queue=(128, 65536), val_queue=(128, 65536)),
            **LIGHTNING,
        ),
    ),
    "bolts-simclr": Layout(
        "bolts-simclr",
        nested(
            "state_dict",
            "encoder.",
            under("encoder.", CLASSIFIER),
            tensors("projection.model.0.", weight=(2048, 2048)),
            **LIGHTNING,
        ),
    ),
    "bolts-byol": Layout(
        "bolts-byol",
        paired(
            "state_dict",
            "online_network.encoder.",
            "target_network.encoder.",
            tensors("online_network.projector.model.0.", weight=(4096, 2048)),
            tensors("predictor.model.0.", weight=(4096, 256)),
            **LIGHTNING,
        ),
    ),
    "bolts-swav": Layout(
        "bolts-swav", nested("state_dict", "model.", tensors("model.", prototypes__weight=(3000, 128)), **LIGHTNING)
    ),
    "lightning-any": Layout(
        "lightning", paired("state_dict", "my_net.", "ema.", tensors(loss__weight=(8,)), **LIGHTNING)
    ),
    # timm's and torchvision's own: the same keys.
    "torchvision": Layout("torchvision", lambda net: dict(net.state_dict()), "torchvision"),
    "timm-training": Layout(
        "timm-ema",
        lambda net: {
            "state_dict_ema": trunk(net) | CLASSIFIER,
            "state_dict": other(trunk(net)) | CLASSIFIER,
            "args": argparse.Namespace(model="resnet50"),
            "version": 2,
            "metric": 76.0,
            **TRAINING,
        },
    ),
    "torchvision-references": Layout(
        "model-ema", lambda net: {"model": trunk(net), "model_ema": under("module.", trunk(net))}
    ),
    "torchvision-compiled": Layout("torchvision", nested("model", "_orig_mod.module.")),
    "torchvision-old": Layout("torchvision", _no_counters, "torchvision", 2 - 53, 0),
    "hugging-face": Layout("transformers", lambda net: hugging_face(trunk(net))),
    "hugging-face-classifier": Layout(
        "transformers-head",
        lambda net: under("resnet.", hugging_face(trunk(net))) | tensors(classifier__1__weight=(1000, 2048)),
    ),
    "detectron2-converted": Layout(
        "detectron2-torchvision",
        lambda net: {
            "model": detectron2(trunk(net)),
            "__author__": "moco_d2",
            "matching_heuristics": True,
            "facts": facts(net).as_dict(),
        },
        FACTS["origin"],
    ),
    "detectron2-fpn": Layout(
        "detectron2-fpn-torchvision",
        lambda net: {
            "model": detectron2(trunk(net), "backbone.bottom_up.")
            | tensors(backbone__fpn_lateral5__weight=(256, 2048, 1, 1), pixel_mean=(3, 1, 1)),
            "facts": facts(net).as_dict(),
            "optimizer": {},
            "scheduler": {},
            "iteration": 3,
        },
        FACTS["origin"],
    ),
    "detectron2-c4": Layout(
        "detectron2-c4-torchvision",
        lambda net: {
            "model": detectron2(trunk(net), "backbone.", "roi_heads.")
            | tensors(roi_heads__box_predictor__cls_score__weight=(21, 2048)),
            "facts": facts(net).as_dict(),
        },
        FACTS["origin"],
    ),
    "msra": Layout(
        "caffe2",
        lambda net: (
            caffe2(trunk(net)) | {"fc1000_w": array(1000, 2048), "fc1000_b": array(1000)} | {"conv1_b": array(64)}
        ),
        "Caffe2",
        3 - 53,
        0,
    ),
    "msra-blobs": Layout("caffe2-short", lambda net: {"blobs": caffe2(trunk(net), ("s", "b", "rm", "riv"))}),
}

# what the user must say, because the file does not show it
ASKED = {
    "detectron2-fpn-no-facts": (
        lambda net: {"model": detectron2(trunk(net), "backbone.bottom_up.")},
        "--source detectron2-fpn-torchvision",
        {"source": "detectron2-fpn-torchvision"},
    ),
    "detectron2-no-facts": (
        lambda net: {"model": detectron2(trunk(net))},
        "--source detectron2-caffe-unseen",
        {"source": "detectron2-caffe-unseen"},
    ),
    "unknown-prefix": (
        nested("", "student_of_mine.net."),
        "--prefix student_of_mine.net.",
        {"prefix": "student_of_mine.net."},
    ),
    "two-networks": (
        lambda net: {"state_dict": under("left.", trunk(net)) | under("right.", other(trunk(net))), **LIGHTNING},
        "--prefix left. (in state_dict) or with --prefix right. (in state_dict)",
        {"prefix": "left."},
    ),
    "moving-average-only": (
        nested("state_dict", "module.encoder_k."),
        "--prefix encoder_k.",
        {"prefix": "module.encoder_k"},
    ),
    "spijkervet-without-head": (nested("", "encoder."), "--prefix encoder.", {"source": "simclr-spijkervet"}),
    "vissl-in-backbone-and-encoder": (
        lambda net: {"state_dict": under("backbone.", trunk(net)) | under("encoder.", other(trunk(net)))},
        "--prefix backbone.",
        {"prefix": "backbone."},
    ),
}

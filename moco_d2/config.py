"""The configuration: Detectron2's keys plus ours, the shipped files by name, and errors that name the nearest key.

One tree serves both stages; :mod:`moco_d2.roles` says which keys each of them reads.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import functools
import itertools
import logging
import operator
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import defaults
from detectron2.config import get_cfg as detectron2_get_cfg
from detectron2.config.compat import guess_version

from moco_d2 import roles
from moco_d2.config_file import read_config_file
from moco_d2.io import paths
from moco_d2.io.pictures import MAX_PIXELS
from moco_d2.methods import METHODS, default_args
from moco_d2.nearest import did_you_mean
from moco_d2.settings import mistyped, wrong_type

logger = logging.getLogger(__name__)

# configs/ lies beside the package in a checkout, inside it once installed.
_CONFIG_ROOTS = (Path(__file__).parents[1] / "configs", Path(__file__).parent / "configs")

# Where a detector starts, and the suffix that says so in a config's name.
INITS = {"moco": "", "supervised": "_supervised", "random": "_random"}


def get_cfg() -> CN:
    """Return Detectron2's default config extended with this project's keys."""
    cfg = detectron2_get_cfg()
    add_config(cfg)
    return cfg


def add_config(cfg: CN) -> None:
    """Add this project's keys, with their defaults, to a config of Detectron2's; keys that it has already stay.

    A program of Detectron2's reads the shipped files, and a run's ``config.yaml``, with such a config.
    """
    ours = CN({group: CN() for group in ("SOLVER", "DATASETS", "INPUT", "TEST")})

    # Name of the recipe (pretraining) or protocol (detector + data + schedule). It travels with the weights and into
    # every result; it says nothing about the initial weights.
    ours.PROTOCOL = ""

    _add_method(ours)
    _add_data(ours)
    _add_training(ours)
    _add_detection(ours)
    _add_missing(cfg, ours)


def extend_detectron2() -> None:
    """Add this project's keys to the defaults that Detectron2's ``get_cfg()`` copies, as ``import moco_d2`` does."""
    add_config(defaults._C)


def _add_missing(cfg: CN, more: CN) -> None:
    for key, value in more.items():
        if key not in cfg:
            cfg[key] = value
        elif isinstance(value, CN):
            _add_missing(cfg[key], value)


def _add_method(cfg: CN) -> None:
    cfg.SSL = CN()
    # Name of the method, a key of moco_d2.methods.METHODS.
    cfg.SSL.METHOD = "MoCo"
    # Keyword arguments of the method's constructor. Its signature is the one place for names, defaults and meaning;
    # load_cfg() writes the defaults in, so that a dumped config states the whole recipe.
    cfg.SSL.ARGS = CN(new_allowed=True)
    cfg.SSL.ENCODER = CN()
    # A key of moco_d2.layers.resnet.ARCHITECTURES (torchvision's names).
    cfg.SSL.ENCODER.NAME = "resnet50"
    # Multiplier of every channel count: 1 is the paper's, 2 and 4 its wide networks, 0.25 is for quick runs.
    cfg.SSL.ENCODER.WIDTH = 1.0
    # "imagenet": 7x7 stride 2 and max-pool; "cifar": 3x3 stride 1, no pool (cannot be converted for detection).
    cfg.SSL.ENCODER.STEM = "imagenet"


def _add_data(cfg: CN) -> None:
    cfg.DATA = CN()
    # Augmentation recipe, a key of moco_d2.data.RECIPES. It also fixes the pixel mean and std.
    cfg.DATA.RECIPE = "moco_v2"
    # Side of a view in pixels.
    cfg.DATA.CROP_SIZE = 224
    # What executes the recipe; the views are the same up to rounding (docs/data_path.md). "pil": the authors'
    # operations; "cv2": the same through OpenCV, the fastest without a GPU; "device": workers decode and crop,
    # MODEL.DEVICE does the rest a batch at a time; "auto": "device" on a GPU, else "cv2".
    cfg.DATA.BACKEND = "auto"
    # Part of the images seen by a process that may be unreadable, in [0, 1]; above it the run stops. Each is replaced
    # by one near it and named in OUTPUT_DIR/skipped.jsonl.
    cfg.DATA.MAX_SKIPPED = 0.05
    # Pixels (width times height, from the header) above which an image is refused before it is decoded, in both stages:
    # pretraining leaves it out, fine-tuning and evaluation end with its name. It takes the place of PIL's own limit.
    cfg.DATA.MAX_PIXELS = MAX_PIXELS
    # Pretraining: decode a JPEG at 1/2, 1/4 or 1/8 of its size where the views are small enough for it. Faster for
    # pictures of many pixels, but the views differ a little (docs/data_path.md), and the run is told as modified.
    cfg.DATA.REDUCED_DECODING = False
    # --dry-run, in both stages: so many pictures of each data set are decoded, evenly spaced; 0: all of them.
    cfg.DATA.DRY_RUN_PICTURES = 0
    # Shards (docs/scale.md): the images of so many are shuffled together, after the order of all shards is; 0: of all.
    cfg.DATA.SHUFFLE_SHARDS = 16
    # Parts of an epoch that run side by side, each batch taking its share of all. The order of the images depends on
    # it, and not on the number of processes. A process fetches the shards of its own parts only. 0: the number of
    # processes for streamed shards, else 1.
    cfg.DATA.LANES = 0
    # Folder for streamed shards, on a disk of each machine; "": shards/ in $MOCO_D2_CACHE or ~/.cache/moco_d2.
    cfg.DATA.CACHE_FOLDER = ""
    # Its size in GB (1e9 bytes), for all processes of a machine.
    cfg.DATA.CACHE_GB = 100.0


def _add_training(cfg: CN) -> None:
    # Pretraining length in epochs; 0 means SOLVER.MAX_ITER iterations. With epochs, SOLVER.STEPS counts epochs too and
    # the lr changes once an epoch, as the MoCo authors do; with iterations both count iterations.
    cfg.SOLVER.EPOCHS = 0
    # Pretraining's optimizer: "sgd", "adamw", "lars" (MoCo v3, BYOL, Barlow Twins, VICReg, DINO), "lars_classic"
    # (SimCLR), "larc" (SwAV); moco_d2/layers/lars.py has the equations. SOLVER.CLIP_GRADIENTS applies to all.
    cfg.SOLVER.OPTIMIZER = "sgd"
    # Trust coefficient of the layer-wise rates (lars, lars_classic, larc).
    cfg.SOLVER.TRUST = 0.001
    # Biases and norms (parameters of one dimension) get no weight decay and no layer-wise rate, and their lr is
    # multiplied by LR_FACTOR_1D.
    cfg.SOLVER.EXCLUDE_1D = False
    cfg.SOLVER.LR_FACTOR_1D = 1.0
    # Pretraining lr schedule: "cosine" (to END_FACTOR times the peak), "step" (times SOLVER.GAMMA at each of
    # SOLVER.STEPS) or "constant". Detection uses Detectron2's SOLVER.LR_SCHEDULER_NAME.
    cfg.SOLVER.SCHEDULE = "cosine"
    cfg.SOLVER.END_FACTOR = 0.0
    # With SOLVER.EPOCHS: how often the lr changes, once per "epoch" (MoCo's code) or per "iteration" (later papers').
    cfg.SOLVER.LR_EVERY = "epoch"
    # Number of the first epoch in the cosine formula: 0 in MoCo's ImageNet code, 1 in the authors' CIFAR demo.
    cfg.SOLVER.FIRST_EPOCH = 0
    # Epochs (without SOLVER.EPOCHS: iterations) in which the lr rises linearly from WARMUP_FROM times the peak to the
    # peak, at every iteration. Detectron2's WARMUP_ITERS is detection's.
    cfg.SOLVER.WARMUP = 0.0
    cfg.SOLVER.WARMUP_FROM = 0.0
    # Weight decay at the end of pretraining, reached along a cosine from WEIGHT_DECAY (DINO); negative: it is constant.
    cfg.SOLVER.WEIGHT_DECAY_END = -1.0
    # Batch at which SOLVER.BASE_LR is meant. When SOLVER.IMS_PER_BATCH differs, pretraining multiplies BASE_LR by
    # IMS_PER_BATCH / REFERENCE_BATCH (LR_RULE "linear") or by its square root ("sqrt"), and says so; 0 turns this off.
    cfg.SOLVER.REFERENCE_BATCH = 256
    cfg.SOLVER.LR_RULE = "linear"

    # This many periodic checkpoints are kept, the newest; 0 keeps all (330 MB each for MoCo's ResNet-50). With 1 there
    # is none to fall back on should the last one be damaged.
    cfg.SOLVER.CHECKPOINT_KEEP = 5
    # Besides, those after every so many iterations, a multiple of SOLVER.CHECKPOINT_PERIOD; 0 for none.
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 0

    # Switches that make training faster and leave a recipe's or protocol's mathematics alone, up to rounding
    # (docs/performance.md); results and weights record them.
    cfg.ENGINE = CN()
    # "" or "bfloat16": the networks of training under autocast (evaluation, and MoCo's loss, stay in float32).
    # Pretraining also takes "float16", with loss scaling, and "auto": bfloat16, on GPUs that lack it float16, on the
    # CPU none. For detectors float16 is Detectron2's SOLVER.AMP.ENABLED.
    cfg.ENGINE.AUTOCAST = ""
    # Keep the networks' tensors (detectors: the backbone's) in channels_last order.
    cfg.ENGINE.CHANNELS_LAST = False
    # torch.compile the networks (detectors: the backbone); the first iterations then take minutes.
    cfg.ENGINE.COMPILE = False
    # Pretraining: SGD (or AdamW) as one operation over all weights instead of several for each.
    cfg.ENGINE.FUSED_SGD = True


def _add_detection(cfg: CN) -> None:
    # Percentage of the training images that a detector is fine-tuned on; a smaller one is a subset of a larger one.
    cfg.DATASETS.FRACTION = 100.0
    # Which images those are: the same for every init and seed of training.
    cfg.DATASETS.FRACTION_SEED = 0

    # Data sets of your own, a list of mappings with these keys; docs/custom_data.md explains.
    # DATASETS.TRAIN and TEST then use the names. Paths start at the working directory; ~ and $VARIABLES are expanded.
    #   name       what DATASETS.TRAIN and TEST call it
    #   format     voc or coco
    #   root       voc: holds Annotations, JPEGImages, ImageSets/Main; coco: where json and images start
    #   json       coco: the labels (default: annotations/instances_<split>.json)
    #   images     folder of the pictures (default: voc JPEGImages; coco <split>, or root)
    #   split      voc: ImageSets/Main/<split>.txt or a path ending in .txt (default: all annotations)
    #   classes    names in the order of the detector's outputs (default: read from the files)
    #   leave_out  names of classes whose objects are left out (default: none)
    #   mirror     coco, keypoints: pairs of names, each the other's mirror image; [] if there are none (default: left
    #              and right are recognised in the names)
    cfg.DATASETS.CUSTOM = []

    # Detection: one optimizer step takes this many batches, each of IMS_PER_BATCH / ACCUMULATE images. They count as so
    # many processes for SOLVER.REFERENCE_WORLD_SIZE: 1 GPU with ACCUMULATE 8 keeps an 8-GPU recipe's lr and schedule.
    # BN sees the small batches.
    cfg.SOLVER.ACCUMULATE = 1

    # Semantic segmentation: training pictures are scaled by a factor drawn from this range before INPUT.CROP; () for
    # Detectron2's resizing to INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.RANDOM_SCALE = ()

    # What computes COCO's and LVIS's metrics: "hotcoco", "faster" (faster-coco-eval), "detectron2" (its compiled code)
    # or "pycocotools"; "auto" takes the fastest that is installed. The numbers are the same (docs/evaluation.md).
    cfg.TEST.COCO_BACKEND = "auto"


def load_cfg(
    config_file: str | os.PathLike[str] = "",
    opts: Sequence[str] = (),
    check: Callable[[CN], Iterable[str]] | None = None,
    stage: str = "",
) -> CN:
    """Read a config file and command-line overrides into a complete config.

    ``~`` and ``$VARIABLES`` are expanded in every key that is a path (:data:`moco_d2.roles.PATHS`).

    Args:
        config_file: a path, or the name of a shipped config (see :func:`list_configs`), of a detector's with the suffix
            ``_supervised`` or ``_random`` for another init; empty for the defaults.
        opts: ``KEY VALUE KEY VALUE ...``.
        check: names what else is wrong with a config; asked where something is, so that a user hears all at once.
        stage: ``roles.PRETRAINING`` or ``roles.DETECTION`` where a run is to follow: keys that it would ignore are
            refused. Empty where a config is only looked at.

    Raises:
        ValueError: no such file, or keys that do not exist and values of another type: all of a file, or all of the
            overrides, each with the rule and the nearest key; or keys that differ from their default and do nothing.
    """
    cfg = get_cfg()
    stated: set[str] = set()
    for path in config_files(config_file) if config_file else ():
        stated |= _merge_file(cfg, str(path), str(config_file))
    if len(opts) % 2:
        raise ValueError(f"overrides come in pairs KEY VALUE, but {len(opts)} words were given: {' '.join(opts)}")
    method = dict(zip(opts[::2], opts[1::2], strict=True)).get("SSL.METHOD", cfg.SSL.METHOD)
    if method != cfg.SSL.METHOD:  # the file's arguments are those of its own method
        cfg.SSL.METHOD, cfg.SSL.ARGS = str(method), CN(new_allowed=True)
    cfg.SSL.ARGS = _method_args(cfg)
    # A file may be completed by the command line, and what it turns on be turned off there: its own keys do nothing if
    # they do nothing in the file, and still nothing in the end.
    asked = {key for key in stated if stage and roles.turned_off(key, stage, flat(cfg), _defaults(cfg))}
    problems = _merge_words(cfg, opts)
    problems += _expand_paths(cfg)
    if stage:
        problems += [*mistyped_keys(cfg, stage).values(), *unread_keys(cfg, stage, asked | set(opts[::2]))]
    if problems:
        raise ValueError("\n".join(dict.fromkeys([*problems, *(check(cfg) if check else ())])))
    return cfg


def unread_keys(cfg: CN, stage: str, asked: Container[str] = ()) -> list[str]:
    """Return complaints about keys that differ from their default and that a stage ignores; see ``roles.unread``."""
    return list(roles.unread(stage, flat(cfg), _defaults(cfg), asked))


def mistyped_keys(cfg: CN, stage: str) -> dict[str, str]:
    """Return complaints about the keys that a stage reads and whose values cannot be; see ``settings.mistyped``."""
    return dict(mistyped(stage, flat(cfg), flat(get_cfg())))


def _method_args(cfg: CN) -> CN:
    """Return ``SSL.ARGS`` with the method's defaults for what is not set; a method that does not exist has none."""
    return CN({**(default_args(cfg.SSL.METHOD) if cfg.SSL.METHOD in METHODS else {}), **cfg.SSL.ARGS})


def _defaults(cfg: CN) -> dict[str, Any]:
    """Return the default of every key, arguments of the config's method included."""
    default = get_cfg()
    method = cfg.SSL.METHOD if cfg.SSL.METHOD in METHODS else default.SSL.METHOD
    default.SSL.ARGS = CN(default_args(method))
    return flat(default)


def _expand_paths(cfg: CN) -> list[str]:
    """Expand the keys that are paths, and return what is wrong with them and with the environment's paths."""
    problems = []
    for name in paths.VARIABLES:
        try:
            paths.expand_variable(name, "")
        except ValueError as error:
            problems.append(str(error))
    own = [entry.get("name") for entry in cfg.DATASETS.CUSTOM if isinstance(entry, Mapping)]
    for key in roles.PATHS:
        *groups, name = key.split(".")
        node = functools.reduce(operator.getitem, groups, cfg)
        try:
            node[name] = _expanded(node[name], own)
        except ValueError as error:
            problems.append(f"{key} is {node[name]!r}: {error}")
    return problems


def _expanded(value: Any, names: Container[Any]) -> Any:
    """Return a path, list of paths or data set with paths expanded; names of data sets are none."""
    if isinstance(value, str):
        return value if value in names else paths.expand(value)
    if isinstance(value, Mapping):  # an entry of DATASETS.CUSTOM
        parts = ("root", "json", "images", "split")
        return {k: _expanded(v, ()) if k in parts else v for k, v in value.items()}
    return type(value)(_expanded(item, names) for item in value) if isinstance(value, (list, tuple)) else value


def use_device_there_is(cfg: CN) -> None:
    """Write ``MODEL.DEVICE`` as the rest of the project reads it: ``cpu``, ``cuda``, or ``cuda:N``, one GPU of several.

    Letters may be of either case. Where there is no GPU, every cuda device becomes the CPU, and the log says so.

    Raises:
        ValueError: it is another device, or a GPU that is not there.
    """
    asked = cfg.MODEL.DEVICE
    found = re.fullmatch(r"(cpu|cuda)(?::([0-9]+))?", str(asked).strip().lower())
    if not found or (found[1] == "cpu" and int(found[2] or 0)):
        raise ValueError(
            f"MODEL.DEVICE is {asked!r}; this project computes on a GPU of NVIDIA's or on the CPU: write cuda, cuda:N "
            "for one GPU of several, or cpu"
        )
    device, number = found[1], found[2]
    if device == "cuda" and not torch.cuda.is_available():
        logger.info("no GPU here: MODEL.DEVICE is cpu")
        device = "cpu"
    if device == "cuda" and number is not None:
        if int(number) >= (count := torch.cuda.device_count()):
            last = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0"
            raise ValueError(f"MODEL.DEVICE is {asked!r}, but this machine has {count} GPU(s): {last}")
        device = f"cuda:{int(number)}"
    cfg.MODEL.DEVICE = device


def list_configs() -> list[str]:
    """Return the names of the shipped configs (``Pretrain/moco_v2_R50_200ep``), without those that are only parts."""
    root = _config_root()
    names = (str(path.relative_to(root).with_suffix("")) for path in sorted(root.rglob("*.yaml")))
    return [name for name in names if not name.startswith("Base/")]


def config_files(name: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a config, to be merged in this order.

    Args:
        name: a path, or a shipped name with or without ``configs/`` and ``.yaml``. A detector's may end in the suffix
            of an init (``_supervised``, ``_random``) for which there is no file: then it is config and init, two files.

    Raises:
        ValueError: there is none; the message lists the nearest shipped names.
    """
    try:
        name = paths.expand(os.fspath(name))
    except ValueError as error:
        raise ValueError(f"the config file {str(name)!r}: {error}") from error
    if Path(name).is_file():
        return [Path(name)]
    root = _config_root()
    short = str(name).removeprefix("configs/").removesuffix(".yaml")
    if (root / f"{short}.yaml").is_file():
        return [root / f"{short}.yaml"]
    stem, _, init = short.rpartition("_")
    if init in INITS and (root / f"{stem}.yaml").is_file() and not stem.startswith(("Base/", "Pretrain/")):
        return [root / f"{stem}.yaml", root / "Base" / f"init-{init}.yaml"]
    near = difflib.get_close_matches(short, list_configs(), n=3, cutoff=0.4)
    names = f"nearest: {', '.join(near)}" if near else "configs/README.md lists the names"
    raise ValueError(f"no config file {str(name)!r}, neither as a path nor by name; {names}")


def _shipped(name: str) -> Path | None:
    """Return the one file of a shipped config, by its name, if it is one."""
    short = name.removeprefix("configs/").removesuffix(".yaml")
    path = _config_root() / f"{short}.yaml"
    return path if path.is_file() else None


def _config_root() -> Path:
    for root in _CONFIG_ROOTS:
        if (root / "Base").is_dir():
            return root
    raise FileNotFoundError(f"the shipped configs are missing; looked in {', '.join(map(str, _CONFIG_ROOTS))}")


def _merge_file(cfg: CN, path: str, source: str) -> set[str]:
    """Merge a config file, and return the keys that it states itself, beside those of its ``_BASE_`` files.

    A file that states most keys is a run's ``config.yaml``, which nobody wrote: of that, none.
    """
    given = read_config_file(path, source, _shipped)
    keys = flat(given)
    try:
        new = CN(given)
        if (new.get("VERSION") or guess_version(new, path)) == cfg.VERSION:
            cfg.merge_from_other_cfg(new)
        else:  # Detectron2 converts files of its first version.
            cfg.merge_from_file(path, allow_unsafe=False)
    except (KeyError, AssertionError, ValueError, TypeError) as error:
        problems = [*itertools.chain.from_iterable(_merge_one(cfg, key, value) for key, value in keys.items())]
        problems = list(dict.fromkeys(problems)) or [str(error)]
        raise ValueError("\n".join(f"{source}: {problem}" for problem in problems)) from error
    own = flat(yaml.safe_load(Path(path).read_text()))
    return set(own) if len(own) < len(flat(cfg)) / 2 else set()


def _merge_words(cfg: CN, opts: Sequence[str]) -> list[str]:
    """Set overrides, and return what is wrong with those that cannot be."""
    words = _whole_floats(cfg, opts)
    pairs = zip(words[::2], words[1::2], strict=True)
    problems = itertools.chain.from_iterable(_merge_one(cfg, key, value) for key, value in pairs)
    return [f"the command line: {problem}" for problem in problems]


def _merge_one(cfg: CN, key: str, value: Any) -> Iterator[str]:
    """Set a key, or yield what is wrong with it or its value, in plainer words than yacs'."""
    keys = dict(_keys(cfg))
    group = keys.get(key.rpartition(".")[0])
    if isinstance(group, CN) and group.is_new_allowed():
        return
    if isinstance(group, list):
        yield f"{key.rpartition('.')[0]} is a mapping; it must be a list, as {group!r} is"
        return
    if key not in keys:
        yield f"no config key {key}{did_you_mean(key, keys, most=3)}"
        return
    try:
        cfg.merge_from_list([key, value])
    except (AssertionError, ValueError):
        with contextlib.suppress(ValueError, SyntaxError):  # as yacs reads it
            value = ast.literal_eval(value) if isinstance(value, str) else value
        yield wrong_type(key, value, keys[key])


def _whole_floats(cfg: CN, opts: Sequence[str]) -> list[str]:
    """Return overrides in which a whole number for a key of type float (``WEIGHT_DECAY 0``) is one, too."""
    values = flat(cfg)
    words = list(opts)
    for i in range(0, len(words), 2):
        if isinstance(values.get(words[i]), float) and str(words[i + 1]).removeprefix("-").isdecimal():
            words[i + 1] = f"{words[i + 1]}.0"
    return words


def _keys(cfg: CN, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in cfg.items():
        yield prefix + key, value
        if isinstance(value, CN):
            yield from _keys(value, f"{prefix}{key}.")


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{dotted key: value}`` of the leaves of a config, or of any tree of mappings."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves

"""The table of config keys: which stage reads a key, in what role, and which other key turns it off.

Everything else about keys is a query of it: the keys that a stage refuses, the changes that make a run depart from its
protocol or recipe, the keys that may differ between two attempts at a trial, the keys whose types are checked. Tests
compare it with the keys that the stages read.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from moco_d2.facts import BASIC_BUILDER, DILATED_BUILDER, FULL_WIDTH_BUILDERS, VIT_BUILDER

PRETRAINING, DETECTION = "pretraining", "fine-tuning"
_COMMANDS = {PRETRAINING: "moco-d2 pretrain", DETECTION: "moco-d2 train"}

# Roles. If a key of the first two changes, it is another recipe or another protocol.
RECIPE, PROTOCOL = "recipe", "protocol"
START = "start"  # the weights that a detector starts from, and the input that they expect
PERFORMANCE = "performance"  # how fast a run computes: the same mathematics up to rounding; results record it
MACHINE = "machine"  # where a run computes and writes, and limits: no result depends on it
BOOKKEEPING = "bookkeeping"  # names, seeds, what is written and when
UNREAD = ""


# Where a resumed fine-tuning takes a key's value from: the optimizer's state in the checkpoint, or the config.
CHECKPOINT, CONFIG = "checkpoint", "config"


class _Roles(NamedTuple):
    pretraining: str
    detection: str
    resumed: str = ""  # CHECKPOINT or CONFIG for the keys of detection that resuming compares
    option: str = ""  # the option of moco-d2 trials that sets the key


# By key or group of keys. The longest entry that matches a key applies.
ROLES = {
    "VERSION": _Roles(BOOKKEEPING, BOOKKEEPING),
    "PROTOCOL": _Roles(BOOKKEEPING, BOOKKEEPING, option="--protocol"),
    "OUTPUT_DIR": _Roles(MACHINE, MACHINE, option="--output"),
    "SEED": _Roles(BOOKKEEPING, BOOKKEEPING, option="--seeds"),
    "CUDNN_BENCHMARK": _Roles(PERFORMANCE, PERFORMANCE),
    "VIS_PERIOD": _Roles(UNREAD, BOOKKEEPING),
    "GLOBAL": _Roles(UNREAD, UNREAD),
    "SSL": _Roles(RECIPE, UNREAD),
    "SSL.MONITOR": _Roles(BOOKKEEPING, UNREAD),
    "DATA": _Roles(RECIPE, UNREAD),
    "DATA.BACKEND": _Roles(PERFORMANCE, UNREAD),
    "DATA.MAX_SKIPPED": _Roles(MACHINE, UNREAD),
    "DATA.MAX_PIXELS": _Roles(MACHINE, MACHINE),
    "DATA.DRY_RUN_PICTURES": _Roles(MACHINE, MACHINE),
    "DATA.SHUFFLE_SHARDS": _Roles(PERFORMANCE, UNREAD),
    "DATA.LANES": _Roles(PERFORMANCE, UNREAD),
    "DATA.CACHE_FOLDER": _Roles(MACHINE, UNREAD),
    "DATA.CACHE_GB": _Roles(MACHINE, UNREAD),
    "DATASETS": _Roles(UNREAD, PROTOCOL),
    "DATASETS.TRAIN": _Roles(RECIPE, PROTOCOL),
    "DATASETS.CUSTOM": _Roles(BOOKKEEPING, PROTOCOL),
    "DATASETS.FRACTION": _Roles(UNREAD, PROTOCOL, option="--fractions"),
    "DATALOADER": _Roles(UNREAD, PROTOCOL),
    "DATALOADER.NUM_WORKERS": _Roles(MACHINE, MACHINE),
    "INPUT": _Roles(UNREAD, PROTOCOL),
    "INPUT.FORMAT": _Roles(UNREAD, START),
    "MODEL": _Roles(UNREAD, PROTOCOL),
    "MODEL.DEVICE": _Roles(MACHINE, MACHINE),
    "MODEL.WEIGHTS": _Roles(RECIPE, START, option="--weights"),
    "MODEL.PIXEL_MEAN": _Roles(UNREAD, START),
    "MODEL.PIXEL_STD": _Roles(UNREAD, START),
    "MODEL.RESNETS.STRIDE_IN_1X1": _Roles(UNREAD, START),
    "SOLVER": _Roles(UNREAD, PROTOCOL, CONFIG),
    "SOLVER.IMS_PER_BATCH": _Roles(RECIPE, PROTOCOL),
    "SOLVER.REFERENCE_WORLD_SIZE": _Roles(UNREAD, PROTOCOL),
    "SOLVER.MAX_ITER": _Roles(RECIPE, PROTOCOL, CONFIG),
    "SOLVER.BASE_LR": _Roles(RECIPE, PROTOCOL, CHECKPOINT),
    "SOLVER.BIAS_LR_FACTOR": _Roles(UNREAD, PROTOCOL, CHECKPOINT),
    "SOLVER.MOMENTUM": _Roles(RECIPE, PROTOCOL, CHECKPOINT),
    "SOLVER.NESTEROV": _Roles(RECIPE, PROTOCOL, CHECKPOINT),
    "SOLVER.WEIGHT_DECAY": _Roles(RECIPE, PROTOCOL, CHECKPOINT),
    "SOLVER.WEIGHT_DECAY_NORM": _Roles(UNREAD, PROTOCOL, CHECKPOINT),
    "SOLVER.WEIGHT_DECAY_BIAS": _Roles(UNREAD, PROTOCOL, CHECKPOINT),
    "SOLVER.GAMMA": _Roles(RECIPE, PROTOCOL, CONFIG),
    "SOLVER.STEPS": _Roles(RECIPE, PROTOCOL, CONFIG),
    "SOLVER.CLIP_GRADIENTS": _Roles(RECIPE, PROTOCOL, CONFIG),
    "SOLVER.EPOCHS": _Roles(RECIPE, UNREAD),
    "SOLVER.OPTIMIZER": _Roles(RECIPE, PROTOCOL, CONFIG),
    "SOLVER.LAYER_DECAY": _Roles(UNREAD, PROTOCOL, CONFIG),
    "SOLVER.TRUST": _Roles(RECIPE, UNREAD),
    "SOLVER.EXCLUDE_1D": _Roles(RECIPE, UNREAD),
    "SOLVER.LR_FACTOR_1D": _Roles(RECIPE, UNREAD),
    "SOLVER.SCHEDULE": _Roles(RECIPE, UNREAD),
    "SOLVER.END_FACTOR": _Roles(RECIPE, UNREAD),
    "SOLVER.LR_EVERY": _Roles(RECIPE, UNREAD),
    "SOLVER.FIRST_EPOCH": _Roles(RECIPE, UNREAD),
    "SOLVER.WARMUP": _Roles(RECIPE, UNREAD),
    "SOLVER.WARMUP_FROM": _Roles(RECIPE, UNREAD),
    "SOLVER.WEIGHT_DECAY_END": _Roles(RECIPE, UNREAD),
    "SOLVER.REFERENCE_BATCH": _Roles(RECIPE, UNREAD),
    "SOLVER.LR_RULE": _Roles(RECIPE, UNREAD),
    "SOLVER.ACCUMULATE": _Roles(UNREAD, PERFORMANCE),  # it replaces processes
    "SOLVER.CHECKPOINT_PERIOD": _Roles(BOOKKEEPING, BOOKKEEPING),
    "SOLVER.CHECKPOINT_KEEP": _Roles(BOOKKEEPING, BOOKKEEPING),
    "SOLVER.CHECKPOINT_KEEP_EVERY": _Roles(BOOKKEEPING, BOOKKEEPING),
    "ENGINE": _Roles(PERFORMANCE, PERFORMANCE),
    "ENGINE.FUSED_SGD": _Roles(PERFORMANCE, UNREAD),
    "TEST": _Roles(UNREAD, PROTOCOL),
    "TEST.EVAL_PERIOD": _Roles(UNREAD, BOOKKEEPING),
    "TEST.COCO_BACKEND": _Roles(UNREAD, MACHINE),
    "TEST.EXPECTED_RESULTS": _Roles(UNREAD, BOOKKEEPING),
}

# Keys whose values are paths, or contain paths.
PATHS = (
    "OUTPUT_DIR", "MODEL.WEIGHTS", "DATA.CACHE_FOLDER", "DATASETS.TRAIN", "DATASETS.TEST", "DATASETS.CUSTOM",
    "DATASETS.PROPOSAL_FILES_TRAIN", "DATASETS.PROPOSAL_FILES_TEST", "SSL.MONITOR.DATASET", "SSL.MONITOR.VAL",
)  # fmt: skip

# Remedies: what a stage uses instead of a key, or group of keys, that it does not read.
_INSTEAD = {
    PRETRAINING: {
        "SOLVER.AMP": "set ENGINE.AUTOCAST float16 instead (with loss scaling)",
        "SOLVER.LR_SCHEDULER_NAME": "set SOLVER.SCHEDULE instead",
        "SOLVER.REFERENCE_WORLD_SIZE": "pretraining scales the lr by SOLVER.REFERENCE_BATCH",
        "MODEL.BACKBONE": "set SSL.ENCODER.NAME instead",
        "MODEL.RESNETS": "set SSL.ENCODER.NAME and SSL.ENCODER.ARGS instead",
        "MODEL.VIT": "set SSL.ENCODER.NAME and SSL.ENCODER.ARGS instead",
        "MODEL.PIXEL_MEAN": "DATA.AUGMENTATION fixes it",
        "MODEL.PIXEL_STD": "DATA.AUGMENTATION fixes it",
        "INPUT": "pretraining has DATA.AUGMENTATION and DATA.CROP_SIZE; its views are RGB",
    },
    DETECTION: {
        "SSL.ENCODER": "set MODEL.RESNETS, or MODEL.VIT, instead",
        "DATA.CROP_SIZE": "fine-tuning has INPUT.MIN_SIZE_TRAIN and INPUT.CROP",
        "SOLVER.EPOCHS": "fine-tuning counts iterations, SOLVER.MAX_ITER",
        "SOLVER.SCHEDULE": "set SOLVER.LR_SCHEDULER_NAME instead",
        "SOLVER.REFERENCE_BATCH": "fine-tuning scales batch and lr by SOLVER.REFERENCE_WORLD_SIZE",
    },
}


class _Off(NamedTuple):
    keys: tuple[str, ...]
    switch: str
    values: tuple[Any, ...] | None


_ARCHITECTURE = "MODEL.META_ARCHITECTURE"
_HEADS = ("ROI_HEADS", "ROI_BOX_HEAD", "ROI_BOX_CASCADE_HEAD", "ROI_MASK_HEAD", "ROI_KEYPOINT_HEAD")
_RES5_HEADS = ("Res5ROIHeads", "Res5ROIHeadsExtraNorm")
_RESNET_BUILDERS = (*FULL_WIDTH_BUILDERS, BASIC_BUILDER, DILATED_BUILDER)


def _group(name: str, *keys: str) -> tuple[str, ...]:
    return tuple(f"{name}.{key}" for key in keys)


# Keys and groups that have no effect if another key, the switch, has one of these values (None: any but its default).
# Only known names stand here: a user's own architecture or head may read anything.
_OFF = {
    PRETRAINING: (
        _Off(("SOLVER.STEPS", "SOLVER.GAMMA"), "SOLVER.SCHEDULE", ("cosine", "constant")),
        _Off(("SOLVER.FIRST_EPOCH", "SOLVER.END_FACTOR"), "SOLVER.SCHEDULE", ("step", "constant")),
        _Off(("SOLVER.FIRST_EPOCH", "SOLVER.LR_EVERY"), "SOLVER.EPOCHS", (0,)),
        _Off(("SOLVER.TRUST",), "SOLVER.OPTIMIZER", ("sgd", "adamw")),
        _Off(("SOLVER.NESTEROV",), "SOLVER.OPTIMIZER", ("adamw", "lars", "lars_classic", "larc")),
        _Off(("SOLVER.MOMENTUM",), "SOLVER.OPTIMIZER", ("adamw",)),
        _Off(("SOLVER.LR_FACTOR_1D",), "SOLVER.EXCLUDE_1D", (False,)),
        _Off(("SOLVER.WARMUP_FROM",), "SOLVER.WARMUP", (0.0,)),
        _Off(_group("SSL.MONITOR", "VAL", "PERIOD", "K", "TEMPERATURE", "PICTURES"), "SSL.MONITOR.DATASET", ("",)),
        _Off(
            _group("SOLVER.CLIP_GRADIENTS", "CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE"),
            "SOLVER.CLIP_GRADIENTS.ENABLED", (False,),
        ),
    ),
    DETECTION: (
        _Off(
            ("MODEL.RETINANET",), _ARCHITECTURE,
            ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork", "SemanticSegmentor"),
        ),
        _Off(("MODEL.ANCHOR_GENERATOR",), _ARCHITECTURE, ("SemanticSegmentor",)),
        _Off(("MODEL.RPN", "MODEL.PROPOSAL_GENERATOR"), _ARCHITECTURE, ("RetinaNet", "SemanticSegmentor")),
        _Off(
            ("MODEL.RPN", "MODEL.ANCHOR_GENERATOR", "MODEL.PROPOSAL_GENERATOR.MIN_SIZE"),
            "MODEL.PROPOSAL_GENERATOR.NAME", ("PrecomputedProposals",),
        ),
        _Off(
            (*_group("MODEL", *_HEADS), "MODEL.MASK_ON", "MODEL.KEYPOINT_ON"),
            _ARCHITECTURE, ("ProposalNetwork", "RetinaNet", "SemanticSegmentor"),
        ),
        _Off(("MODEL.SEM_SEG_HEAD",), _ARCHITECTURE, ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet")),
        _Off(
            ("MODEL.PANOPTIC_FPN",), _ARCHITECTURE,
            ("GeneralizedRCNN", "ProposalNetwork", "RetinaNet", "SemanticSegmentor"),
        ),
        _Off(("TEST.DETECTIONS_PER_IMAGE", "VIS_PERIOD"), _ARCHITECTURE, ("ProposalNetwork", "SemanticSegmentor")),
        _Off(("MODEL.ROI_MASK_HEAD", "INPUT.MASK_FORMAT"), "MODEL.MASK_ON", (False,)),
        _Off(("MODEL.ROI_KEYPOINT_HEAD", "TEST.KEYPOINT_OKS_SIGMAS"), "MODEL.KEYPOINT_ON", (False,)),
        _Off(
            (
                *_group(
                    "MODEL.ROI_BOX_HEAD", "NAME", "NUM_FC", "FC_DIM", "NUM_CONV", "CONV_DIM", "NORM",
                    "TRAIN_ON_PRED_BOXES",
                ),
                *_group("MODEL.ROI_MASK_HEAD", "POOLER_RESOLUTION", "POOLER_SAMPLING_RATIO", "POOLER_TYPE"),
            ),
            "MODEL.ROI_HEADS.NAME", _RES5_HEADS,
        ),
        _Off(("MODEL.ROI_BOX_CASCADE_HEAD",), "MODEL.ROI_HEADS.NAME", (*_RES5_HEADS, "StandardROIHeads")),
        _Off(
            _group("MODEL.ROI_BOX_HEAD", "FED_LOSS_FREQ_WEIGHT_POWER", "FED_LOSS_NUM_CLASSES"),
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS", (False,),
        ),
        _Off(_group("MODEL.SEM_SEG_HEAD", "COMMON_STRIDE", "LOSS_WEIGHT"), "MODEL.SEM_SEG_HEAD.NAME", ("FCN16sHead",)),
        _Off(
            ("MODEL.FPN",), "MODEL.BACKBONE.NAME", ("build_resnet_backbone", "build_resnet_dilated_c5_backbone"),
        ),
        _Off(("MODEL.VIT", "SOLVER.LAYER_DECAY"), "MODEL.BACKBONE.NAME", _RESNET_BUILDERS),
        _Off(
            # Without STRIDE_IN_1X1: every init states it, as part of the convention of its input.
            (
                *_group(
                    "MODEL.RESNETS", "DEPTH", "OUT_FEATURES", "NUM_GROUPS", "NORM", "WIDTH_PER_GROUP", "RES5_DILATION",
                    "RES2_OUT_CHANNELS", "STEM_OUT_CHANNELS", "DEFORM_ON_PER_STAGE", "DEFORM_MODULATED",
                    "DEFORM_NUM_GROUPS",
                ),
                "MODEL.BACKBONE.FREEZE_AT", *_group("MODEL.FPN", "IN_FEATURES", "FUSE_TYPE"),
            ),
            "MODEL.BACKBONE.NAME", (VIT_BUILDER,),
        ),
        _Off(("MODEL.VIT.GLOBAL_BLOCKS",), "MODEL.VIT.WINDOW_SIZE", (0,)),
        _Off(("MODEL.VIT.IMAGE_SIZE",), "MODEL.VIT.REL_POS", (False,)),
        _Off(("MODEL.ANCHOR_GENERATOR.ANGLES",), "MODEL.ANCHOR_GENERATOR.NAME", ("DefaultAnchorGenerator",)),
        _Off(
            _group("MODEL.RESNETS", "DEFORM_MODULATED", "DEFORM_NUM_GROUPS"),
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE", ([False] * 4,),
        ),
        _Off(
            _group(
                "DATASETS", "PROPOSAL_FILES_TRAIN", "PROPOSAL_FILES_TEST", "PRECOMPUTED_PROPOSAL_TOPK_TRAIN",
                "PRECOMPUTED_PROPOSAL_TOPK_TEST",
            ),
            "MODEL.LOAD_PROPOSALS", (False,),
        ),
        _Off(("DATASETS.FRACTION_SEED",), "DATASETS.FRACTION", (100.0,)),
        _Off(_group("DATALOADER", "REPEAT_THRESHOLD", "REPEAT_SQRT"), "DATALOADER.SAMPLER_TRAIN", ("TrainingSampler",)),
        _Off(_group("INPUT.CROP", "TYPE", "SIZE"), "INPUT.CROP.ENABLED", (False,)),
        _Off(
            _group("INPUT", "MIN_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING", "MAX_SIZE_TRAIN", "RANDOM_FLIP", "JITTER"),
            "INPUT.RANDOM_SCALE", None,
        ),
        _Off(
            _group("INPUT", "MIN_SIZE_TRAIN", "MIN_SIZE_TRAIN_SAMPLING", "MAX_SIZE_TRAIN", "CROP"),
            "INPUT.JITTER.SCALE", None,
        ),
        _Off(_group("INPUT.JITTER", "SIZE", "PAD"), "INPUT.JITTER.SCALE", ((),)),
        _Off(_group("SOLVER", "MOMENTUM", "NESTEROV"), "SOLVER.OPTIMIZER", ("adamw",)),
        _Off(("SOLVER.LAYER_DECAY",), "SOLVER.OPTIMIZER", ("sgd",)),
        _Off(("SOLVER.STEPS",), "SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR", "WarmupStepWithFixedGammaLR")),
        _Off(("SOLVER.GAMMA",), "SOLVER.LR_SCHEDULER_NAME", ("WarmupCosineLR",)),
        _Off(("SOLVER.BASE_LR_END",), "SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupStepWithFixedGammaLR")),
        _Off(("SOLVER.NUM_DECAYS",), "SOLVER.LR_SCHEDULER_NAME", ("WarmupMultiStepLR", "WarmupCosineLR")),
        _Off(_group("SOLVER", "WARMUP_FACTOR", "WARMUP_METHOD"), "SOLVER.WARMUP_ITERS", (0,)),
        _Off(
            _group("SOLVER.CLIP_GRADIENTS", "CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE"),
            "SOLVER.CLIP_GRADIENTS.ENABLED", (False,),
        ),
        _Off(("SOLVER.CLIP_GRADIENTS.NORM_TYPE",), "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ("value",)),
        _Off(("TEST.PRECISE_BN.NUM_ITER",), "TEST.PRECISE_BN.ENABLED", (False,)),
        _Off(_group("TEST.AUG", "MIN_SIZES", "MAX_SIZE", "FLIP"), "TEST.AUG.ENABLED", (False,)),
    ),
}  # fmt: skip


def role(key: str, stage: str) -> str:
    """Return the role of a key in a stage, ``UNREAD`` if nothing in the stage reads it.

    Raises:
        KeyError: neither the key nor a group that contains it has an entry.
    """
    for name in _and_groups(key):
        if name in ROLES:
            return ROLES[name].pretraining if stage == PRETRAINING else ROLES[name].detection
    raise KeyError(f"{key} has no entry in moco_d2.config.roles.ROLES")


def resumed(keys: Iterable[str], *sources: str) -> list[str]:
    """Return the keys whose value a resumed fine-tuning takes from these sources (``CHECKPOINT``, ``CONFIG``)."""
    entries = ((key, next((ROLES[name] for name in _and_groups(key) if name in ROLES), None)) for key in keys)
    return [key for key, entry in entries if entry and entry.resumed in sources]


def turned_off(key: str, stage: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the switch that turns a key off, as ``KEY VALUE``; empty if none does.

    Args:
        key: a key that the stage reads.
        stage: pretraining or fine-tuning.
        values: of all keys.
        defaults: of all keys.
    """
    names = set(_and_groups(key))
    for off in _OFF[stage]:
        value, default = plain(values[off.switch]), plain(defaults[off.switch])
        off_now = value != default if off.values is None else value in map(plain, off.values)
        if off_now and not names.isdisjoint(off.keys):
            return f"{off.switch} {'empty' if value == '' else values[off.switch]}"
    return ""


def trial_option(key: str) -> str:
    """Return the option of ``moco-d2 trials`` that sets a key (``--seeds`` for ``SEED``); empty if no option does."""
    return ROLES[key].option if key in ROLES else ""


def identifies_trial(key: str) -> bool:
    """Tell whether a trial with another value of a key is another trial.

    ``MODEL.WEIGHTS`` does not count: the file may be moved, and its content is compared instead.
    """
    known = any(name in ROLES for name in _and_groups(key))  # others come from a user's program or another version
    return key != "MODEL.WEIGHTS" and not (known and role(key, DETECTION) in (UNREAD, MACHINE))


def unread(
    stage: str, values: Mapping[str, Any], defaults: Mapping[str, Any], asked: Container[str] = ()
) -> Iterator[str]:
    """Yield a complaint about each key that differs from its default and has no effect.

    Args:
        stage: pretraining or fine-tuning.
        values: of all keys.
        defaults: of all keys.
        asked: keys that the user set for this run. They may not be turned off by another key either; a key from a base
            file may, because a base file serves several configs.
    """
    for key, value in values.items():
        argument = key.startswith(("SSL.ARGS.", "SSL.ENCODER.ARGS."))
        own = key not in defaults and not argument  # a key of the user's own program
        if own or (key in defaults and plain(value) == plain(defaults[key])):
            continue
        if role(key, stage) == UNREAD:
            yield f"{key} is {value!r}, but {stage} does not use it: {_remedy(key, stage)}"
        elif key in asked and value not in ((), [], "") and (switch := turned_off(key, stage, values, defaults)):
            instead = _namesake(key, stage, values, defaults) if switch.startswith(_ARCHITECTURE) else ""
            remedy = f"set {instead}" if instead else f"change {switch.split()[0]}"
            yield f"{key} is {value!r}, but nothing uses it with {switch}: leave it out, or {remedy}"


def _remedy(key: str, stage: str) -> str:
    for name in _and_groups(key):
        if name in _INSTEAD[stage]:
            return _INSTEAD[stage][name]
    other = DETECTION if stage == PRETRAINING else PRETRAINING
    return f"it is a key of {other} ({_COMMANDS[other]})" if role(key, other) else "nothing does: leave it out"


def _namesake(key: str, stage: str, values: Mapping[str, Any], defaults: Mapping[str, Any]) -> str:
    """Return the key of the same name (``NUM_CLASSES``) of this architecture's head; empty if it has none."""
    heads = (f"MODEL.{group}.{key.rpartition('.')[2]}" for group in ("ROI_HEADS", "RETINANET", "SEM_SEG_HEAD"))
    return next((k for k in heads if k in values and not turned_off(k, stage, values, defaults)), "")


def _and_groups(key: str) -> Iterator[str]:
    """Yield a key and the groups that contain it, innermost first."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def plain(value: Any) -> Any:
    """Return a value for comparisons: tuples become lists."""
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

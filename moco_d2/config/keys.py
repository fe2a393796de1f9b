"""This project's config keys, each with its default and meaning, added to Detectron2's.

One tree serves both stages; :mod:`moco_d2.config.roles` says which keys each of them reads.
"""

from __future__ import annotations

import importlib

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as detectron2_get_cfg

from moco_d2.io.pictures import MAX_PIXELS

# Importing these modules registers the names that configs use: data sets, methods, and components of detectors.
_REGISTERING = ("moco_d2.data", "moco_d2.methods", "moco_d2.detection")

# Keys that had another name in earlier versions: files and command lines may still have that one.
RENAMED: dict[str, str] = {
    "DATA.RECIPE": "DATA.AUGMENTATION",
    "SSL.ENCODER.WIDTH": "SSL.ENCODER.ARGS.width",
    "SSL.ENCODER.STEM": "SSL.ENCODER.ARGS.stem",
}


def get_cfg() -> CN:
    """Return Detectron2's default config extended with this project's keys."""
    cfg = detectron2_get_cfg()
    add_config(cfg)
    return cfg


def add_config(cfg: CN) -> None:
    """Add this project's keys, with their defaults, to a config of Detectron2's; keys that exist keep their values.

    The config can then read the shipped files and a run's ``config.yaml``, and the names in them are registered.
    """
    for module in _REGISTERING:
        importlib.import_module(module)
    ours = CN({group: CN() for group in ("SOLVER", "DATASETS", "INPUT", "TEST", "MODEL")})

    # Name of the recipe (pretraining) or protocol (detector + data + schedule), which weights and results record. The
    # initial weights are no part of it.
    ours.PROTOCOL = ""

    _add_method(ours)
    _add_data(ours)
    _add_training(ours)
    _add_detection(ours)
    _add_missing(cfg, ours)


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
    # Keyword arguments of the method's constructor, which defines their names, defaults and meaning. load_cfg() adds
    # the defaults, so that a dumped config states the whole recipe.
    cfg.SSL.ARGS = CN(new_allowed=True)
    cfg.SSL.ENCODER = CN()
    # Name of the encoder, a key of moco_d2.layers.encoders.ENCODERS: torchvision's, or vit_tiny, vit_small, vit_base.
    cfg.SSL.ENCODER.NAME = "resnet50"
    # Keyword arguments of the encoder's builder, as SSL.ARGS are of the method's constructor. ResNets (build_resnet in
    # moco_d2/layers/resnet.py): width, stem, norm, zero_init_residual. ViTs: build_vit in moco_d2/layers/vit.py.
    cfg.SSL.ENCODER.ARGS = CN(new_allowed=True)
    # A kNN classifier on the backbone's features while it trains, with effective rank, alignment and uniformity
    # (docs/pretraining.md). It uses labels, but training does not change: the weights are the same to the bit.
    cfg.SSL.MONITOR = CN()
    # Labelled pictures that the classifier knows, with those that it classifies in VAL: a folder of one folder per
    # class, or of train/ and val/ of that form; imagenet_train; CIFAR-10 (torchvision's folder, or an .npz); a
    # detection data set, of which each object's box is a picture. "": no monitor.
    cfg.SSL.MONITOR.DATASET = ""
    # Held-out pictures of the same classes; "": the val or test half of DATASET.
    cfg.SSL.MONITOR.VAL = ""
    # Epochs from one probe to the next (without SOLVER.EPOCHS: iterations). One more is made before the first step, and
    # one after the last.
    cfg.SSL.MONITOR.PERIOD = 10
    # Neighbours, and the temperature of their weights exp(similarity / T): 0.07 in InstDisc, 0.1 in MoCo's CIFAR demo.
    cfg.SSL.MONITOR.K = 200
    cfg.SSL.MONITOR.TEMPERATURE = 0.07
    # Most pictures of each set, evenly spaced, to save time (the accuracy is then that of the smaller set); 0: all.
    cfg.SSL.MONITOR.PICTURES = 0


def _add_data(cfg: CN) -> None:
    cfg.DATA = CN()
    # Name of the augmentation, a key of moco_d2.data.AUGMENTATIONS. It also fixes the pixel mean and std.
    cfg.DATA.AUGMENTATION = "moco_v2"
    # Side of a (large) view in pixels; an augmentation sets the sizes of smaller views itself.
    cfg.DATA.CROP_SIZE = 224
    # What executes the augmentation; the views are the same up to rounding (docs/data_path.md). "pil": the authors'
    # operations; "cv2": the same through OpenCV, the fastest without a GPU; "device": workers decode and crop,
    # MODEL.DEVICE does the rest a batch at a time, compiled with ENGINE.COMPILE; "auto": "device" on a GPU, else "cv2".
    cfg.DATA.BACKEND = "auto"
    # Fraction of a process's images that may be unreadable, in [0, 1]; above it the run stops. Each is replaced by one
    # near it and listed in OUTPUT_DIR/skipped.jsonl.
    cfg.DATA.MAX_SKIPPED = 0.05
    # Pixels (width times height, from the header) above which an image is not decoded, in both stages: pretraining
    # skips it, fine-tuning and evaluation end with its name. It replaces PIL's own limit.
    cfg.DATA.MAX_PIXELS = MAX_PIXELS
    # Pretraining: decode a JPEG at 1/2, 1/4 or 1/8 of its size if the views are small enough for it. Faster for large
    # images, but the views differ a little (docs/data_path.md), and the weights are marked "modified".
    cfg.DATA.REDUCED_DECODING = False
    # --dry-run, in both stages: the number of images of each data set that are decoded, evenly spaced; 0: all.
    cfg.DATA.DRY_RUN_PICTURES = 0
    # Shards (docs/scale.md): their order is shuffled, then the images of this many shards together; 0: of all.
    cfg.DATA.SHUFFLE_SHARDS = 16
    # Streams: parts of an epoch that run side by side; each batch takes its share of every one. The order of the images
    # depends on their number, not on that of the processes. A process fetches the shards of its own streams only. 0:
    # the number of processes for remote shards, else 1.
    cfg.DATA.LANES = 0
    # Folder for remote shards, on a disk of each machine; "": shards/ in $MOCO_D2_CACHE or ~/.cache/moco_d2.
    cfg.DATA.CACHE_FOLDER = ""
    # Maximum size of that folder in GB (1e9 bytes), for all processes of a machine together.
    cfg.DATA.CACHE_GB = 100.0


def _add_training(cfg: CN) -> None:
    # Pretraining length in epochs; 0: SOLVER.MAX_ITER iterations. If EPOCHS is set, SOLVER.STEPS is in epochs and the
    # lr is updated once per epoch (SOLVER.LR_EVERY), as in MoCo's code. Otherwise both are in iterations.
    cfg.SOLVER.EPOCHS = 0
    # Optimizer. Fine-tuning has "sgd" and "adamw" (ViTDet). Pretraining has both, "lars" (MoCo v3, BYOL, Barlow Twins,
    # VICReg, DINO), "lars_classic" (SimCLR) and "larc" (SwAV); moco_d2/layers/lars.py has the equations.
    # SOLVER.CLIP_GRADIENTS applies to all.
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
    # Number of the first epoch in the cosine formula: 0 in MoCo's ImageNet code, 1 in its CIFAR demo.
    cfg.SOLVER.FIRST_EPOCH = 0
    # Length of the warm-up in epochs (without SOLVER.EPOCHS: in iterations). The lr rises linearly from WARMUP_FROM
    # times the peak to the peak, at every iteration. Detectron2's WARMUP_ITERS is for detection.
    cfg.SOLVER.WARMUP = 0.0
    cfg.SOLVER.WARMUP_FROM = 0.0
    # Weight decay at the end of pretraining, along a cosine from WEIGHT_DECAY (DINO); negative: it is constant.
    cfg.SOLVER.WEIGHT_DECAY_END = -1.0
    # Batch that SOLVER.BASE_LR belongs to. If SOLVER.IMS_PER_BATCH differs, pretraining multiplies BASE_LR by
    # IMS_PER_BATCH / REFERENCE_BATCH (LR_RULE "linear") or by its square root ("sqrt"), and logs it; 0: never.
    cfg.SOLVER.REFERENCE_BATCH = 256
    cfg.SOLVER.LR_RULE = "linear"

    # Number of periodic checkpoints to keep, the newest; 0: all (330 MB each for MoCo's ResNet-50). With 1, no other
    # checkpoint is left if the last one is damaged.
    cfg.SOLVER.CHECKPOINT_KEEP = 5
    # Checkpoints at multiples of this number are kept as well; a multiple of SOLVER.CHECKPOINT_PERIOD; 0: none.
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 0

    # Performance options: they make training faster and leave the mathematics of a recipe or protocol alone, up to
    # rounding (docs/performance.md). Results and weights record them.
    cfg.ENGINE = CN()
    # "" or "bfloat16": training's forward pass under autocast (evaluation, and MoCo's loss, stay in float32).
    # Pretraining also takes "float16", with loss scaling, and "auto": bfloat16, or float16 on GPUs without bfloat16, or
    # "" on the CPU. For detectors, float16 is Detectron2's SOLVER.AMP.ENABLED.
    cfg.ENGINE.AUTOCAST = ""
    # Keep the networks' tensors in channels_last order (detectors: those of the backbone, and of C4's conv5).
    cfg.ENGINE.CHANNELS_LAST = False
    # torch.compile the same networks for training; the first iterations then take minutes. None, "" or False: no;
    # "default" or True; "max-autotune-no-cudagraphs": measures more kernels. Pretraining also takes "reduce-overhead"
    # and "max-autotune", which launch a network's kernels at once (CUDA graphs), for small batches on a GPU.
    cfg.ENGINE.COMPILE = None
    # What rounds the inputs of float32 products on a GPU to TF32, in training and evaluation (docs/numerics.md):
    # "convolutions", "all" (also matrix products) or "none"; "": torch's own setting, which is "convolutions".
    cfg.ENGINE.TF32 = ""
    # Pretraining: SGD (or AdamW) as one operation over all weights instead of several for each.
    cfg.ENGINE.FUSED_SGD = True


def _add_detection(cfg: CN) -> None:
    # Percentage of the training images that a detector is fine-tuned on; a smaller part is a subset of a larger one.
    cfg.DATASETS.FRACTION = 100.0
    # Seed of that choice, which does not depend on the init or the seed of training.
    cfg.DATASETS.FRACTION_SEED = 0

    # Data sets of your own, a list of mappings with these keys; docs/custom_data.md explains.
    # DATASETS.TRAIN and TEST then use the names. Paths start at the working directory; ~ and $VARIABLES are expanded.
    #   name       what DATASETS.TRAIN and TEST call it
    #   format     voc or coco
    #   root       voc: has Annotations, JPEGImages, ImageSets/Main; coco: where json and images start
    #   json       coco: the labels (default: annotations/instances_<split>.json)
    #   annotations  voc: folder of the XML files (default: Annotations, or root)
    #   images     folder of the pictures (default: voc JPEGImages; coco <split>, or root)
    #   split      voc: ImageSets/Main/<split>.txt or a path ending in .txt (default: all annotations)
    #   classes    names in the order of the detector's outputs (default: read from the files)
    #   leave_out  names of classes whose objects are left out (default: none)
    #   bad_labels  refuse (default), or drop: objects with a wrong box, mask or number are left out, counted and listed
    #   mirror     coco, keypoints: pairs of names, each the other's mirror image; [] if there are none (default: left
    #              and right are recognised in the names)
    cfg.DATASETS.CUSTOM = []

    # Detection: number of batches per optimizer step, each of IMS_PER_BATCH / ACCUMULATE images. They count as
    # processes for SOLVER.REFERENCE_WORLD_SIZE: 1 GPU with ACCUMULATE 8 keeps the lr and schedule of an 8-GPU protocol.
    # BN sees the small batches.
    cfg.SOLVER.ACCUMULATE = 1

    # Detectors on a ViT, with adamw: the lr of each block is that of the next times this factor, in (0, 1]; 1: all
    # layers have the same lr.
    cfg.SOLVER.LAYER_DECAY = 1.0

    _add_vit(cfg)

    # Large-scale jitter: training pictures are flipped (INPUT.RANDOM_FLIP), scaled to fit a square of INPUT.JITTER.SIZE
    # pixels times a factor drawn from this range, and cut at random to at most that square; () for Detectron2's
    # resizing to INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.JITTER = CN()
    cfg.INPUT.JITTER.SCALE = ()
    cfg.INPUT.JITTER.SIZE = 1024
    # Fill pictures that are smaller than the square with grey, at the right and below, as Detectron2's baselines with
    # this augmentation do. ViTDet leaves them as they are: its detector pads (MODEL.VIT.SQUARE_PAD).
    cfg.INPUT.JITTER.PAD = False

    # Semantic segmentation: training pictures are scaled by a factor drawn from this range before INPUT.CROP; () for
    # Detectron2's resizing to INPUT.MIN_SIZE_TRAIN.
    cfg.INPUT.RANDOM_SCALE = ()

    # Library that computes COCO's and LVIS's metrics: "hotcoco", "faster" (faster-coco-eval), "detectron2" (compiled),
    # "pycocotools"; "auto": the fastest that is installed. The numbers are the same (docs/evaluation.md).
    cfg.TEST.COCO_BACKEND = "auto"


def _add_vit(cfg: CN) -> None:
    """Add the keys of ``MODEL.BACKBONE.NAME build_vit_sfp_backbone``; the defaults are ViTDet's ViT-B.

    The pyramid has ``MODEL.FPN.OUT_CHANNELS`` and ``MODEL.FPN.NORM``.
    """
    cfg.MODEL.VIT = CN()
    vit = cfg.MODEL.VIT
    # Side of a patch in pixels, size of a token, blocks, and heads of each block's attention.
    vit.PATCH_SIZE = 16
    vit.EMBED_DIM = 768
    vit.DEPTH = 12
    vit.NUM_HEADS = 12
    # Side of the pictures of pretraining, in pixels, and whether it had a class token: they give the size of the
    # position embedding, which is interpolated for other pictures. The detector's ViT has no class token.
    vit.PRETRAIN_IMAGE_SIZE = 224
    vit.PRETRAIN_CLASS_TOKEN = True
    # Side of the windows that attention is limited to, in patches; 0: attention is global in all blocks.
    vit.WINDOW_SIZE = 14
    # The blocks, counted from 0, whose attention is global.
    vit.GLOBAL_BLOCKS = (2, 5, 8, 11)
    # Add relative positions, which start at 0, to the attention.
    vit.REL_POS = True
    # Side of the pictures that the relative positions of global blocks are for, in pixels; for others they are
    # interpolated.
    vit.IMAGE_SIZE = 1024
    # Rate of stochastic depth of the last block, in [0, 1); the others' rates rise to it linearly.
    vit.DROP_PATH = 0.1
    # Levels of the pyramid: the ViT's features are enlarged or reduced by these factors, among 4, 2, 1 and 0.5. One
    # more level has half the size of the last. The levels' names say their strides: p2 has stride 4.
    vit.SCALES = (4.0, 2.0, 1.0, 0.5)
    # Side of the square that pictures are padded to, in pixels; 0: to a multiple of the coarsest stride only.
    vit.SQUARE_PAD = 1024

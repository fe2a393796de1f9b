r"""Fine-tune or evaluate a detector.

    moco-d2 train --config-file PascalVOC-Detection/faster_rcnn_R_50_C4_24k --num-gpus 8 \
        MODEL.WEIGHTS moco_v2.pth OUTPUT_DIR output/voc_moco_v2
    moco-d2 train --config-file ... --eval-only MODEL.WEIGHTS output/voc_moco_v2/model_final.pth
    moco-d2 train --config-file ... --dry-run MODEL.WEIGHTS moco_v2.pth    # two minutes before two days
    torchrun --standalone --nproc-per-node 8 -m moco_d2 train --config-file ... MODEL.WEIGHTS moco_v2.pth

Configs that end in _supervised and _random need no MODEL.WEIGHTS.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Read the command line and train, or evaluate, in all processes."""
    parser = cli.launch_parser("train", __doc__)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, a trained detector")
    instead.add_argument(
        "--dry-run", action="store_true", help="try the run: data, weights, two steps, evaluation, memory, ETA"
    )
    cli.run(train, parser.parse_args(argv), stage="fine-tuning")


def train(args: argparse.Namespace) -> None:
    """Train, or with ``--eval-only`` evaluate, in this process."""
    from moco_d2.detection.datasets import check_copies, register_custom
    from moco_d2.detection.dry_run import rehearse
    from moco_d2.detection.preflight import check_resume, check_weights
    from moco_d2.detection.trainer import TransferTrainer, evaluate

    def check(cfg: Any) -> None:
        check_copies(cfg)
        if args.resume:
            check_resume(cfg)

    if args.dry_run:
        cli.dry_run(args, rehearse, check)
        return
    cfg = cli.setup(args, check_copies)
    register_custom(cfg, train=not args.eval_only)
    if args.eval_only:
        evaluate(cfg)
        return
    check_weights(cfg, args.resume)
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()

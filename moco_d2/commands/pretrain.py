r"""Pretrain a backbone without labels.

    moco-d2 pretrain --config-file Pretrain/moco_v2_R50_200ep --num-gpus 8 OUTPUT_DIR output/moco_v2
    moco-d2 pretrain --config-file ... DATASETS.TRAIN '("/folder/of/images",)' SOLVER.IMS_PER_BATCH 64
    moco-d2 pretrain --config-file ... --dry-run    # check settings, data, speed and ETA in a minute
    torchrun --standalone --nproc-per-node 8 -m moco_d2 pretrain --config-file ...

docs/pipeline.md describes the files that a run writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from moco_d2.commands import cli


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Read the command line and pretrain in all processes.

    A script that registers a method of its own ends in a call of this function (examples/align_uniform.py).
    """
    parser = cli.launch_parser("pretrain", __doc__)
    parser.add_argument(
        "--dry-run", action="store_true", help="try the run: settings, data, two steps, resuming, memory, ETA"
    )
    cli.run(pretrain, parser.parse_args(argv), problems, stage="pretraining")


def pretrain(args: argparse.Namespace) -> None:
    """Pretrain in this process."""
    from moco_d2.detection.datasets import register_custom
    from moco_d2.engine.dry_run import rehearse
    from moco_d2.engine.trainer import PretrainTrainer

    def rehearsal(cfg: Any) -> Iterator[tuple[str, str]]:
        register_custom(cfg, labels=False)
        yield from rehearse(cfg)

    if args.dry_run:
        cli.dry_run(args, rehearsal)
        return
    cfg = cli.setup(args)
    register_custom(cfg, labels=False)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def problems(cfg: Any) -> list[str]:
    """Return what is wrong with a config, as far as this can be known before the processes are started."""
    from moco_d2.engine.preflight import config_problems

    cfg.SEED = max(cfg.SEED, 0)  # the seed is drawn later, and the batch is divided by the processes later
    return config_problems(cfg, world_size=1)

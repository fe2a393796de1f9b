#!/usr/bin/env python3
r"""Pretrain a backbone without labels.

Examples:
    tools/pretrain_net.py --config-file configs/Pretrain/moco_v2_R50_200ep.yaml --num-gpus 8 OUTPUT_DIR output/moco_v2
    tools/pretrain_net.py --config-file ... DATASETS.TRAIN '("/folder/of/images",)' SOLVER.IMS_PER_BATCH 64
    tools/pretrain_net.py --config-file ... --dry-run    # a minute before a week: settings, data, speed, ETA
    torchrun --standalone --nproc-per-node 8 tools/pretrain_net.py --config-file ...
"""

import argparse
from typing import Any

from moco_d2.commands import cli


def main(args: argparse.Namespace) -> None:
    """Pretrain in this process."""
    from moco_d2.detection.datasets import register_custom
    from moco_d2.engine.dry_run import rehearse
    from moco_d2.engine.trainer import PretrainTrainer

    if args.dry_run:
        cli.dry_run(args, rehearse)
        return
    cfg = cli.setup(args)
    register_custom(cfg, labels=False)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def problems(cfg: Any) -> list[str]:
    """Return what is wrong with a config, before the processes are there that draw its seed and share its batch."""
    from moco_d2.engine.preflight import config_problems

    cfg.SEED = max(cfg.SEED, 0)
    return config_problems(cfg, world_size=1)


if __name__ == "__main__":
    parser = cli.launch_parser(__doc__)
    parser.add_argument("--dry-run", action="store_true", help="rehearse the run: settings, data, 2 steps, resume, ETA")
    cli.run(main, parser.parse_args(), problems, stage="pretraining")

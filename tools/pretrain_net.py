#!/usr/bin/env python3
r"""Pretrain a backbone without labels.

Examples:
    tools/pretrain_net.py --config-file configs/Pretrain/moco_v2_R50_200ep.yaml --num-gpus 8 OUTPUT_DIR output/moco_v2
    tools/pretrain_net.py --config-file ... DATASETS.TRAIN '("/folder/of/images",)' SOLVER.IMS_PER_BATCH 64
    torchrun --nproc-per-node 8 tools/pretrain_net.py --config-file ...
"""

import argparse

import cli


def main(args: argparse.Namespace) -> None:
    """Pretrain in this process."""
    from moco_d2.detection.datasets import register_custom
    from moco_d2.engine.pretrain import PretrainTrainer

    cfg = cli.setup(args)
    register_custom(cfg, labels=False)
    trainer = PretrainTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


if __name__ == "__main__":
    cli.run(main, cli.launch_parser(__doc__).parse_args())

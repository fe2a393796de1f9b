#!/usr/bin/env python3
r"""Fine-tune a detector from converted weights, and evaluate it.

    tools/train_net.py --config-file PascalVOC-Detection/faster_rcnn_R_50_C4_24k --num-gpus 8 \
        MODEL.WEIGHTS moco_v2.pth OUTPUT_DIR output/voc_moco_v2
    tools/train_net.py --config-file ... --eval-only MODEL.WEIGHTS output/voc_moco_v2/model_final.pth
    tools/train_net.py --config-file ... --dry-run MODEL.WEIGHTS moco_v2.pth    # two minutes before two days
    torchrun --nproc-per-node 8 tools/train_net.py --config-file ... MODEL.WEIGHTS moco_v2.pth

Configs that end in _supervised and _random need no MODEL.WEIGHTS.
"""

import argparse

import cli


def main(args: argparse.Namespace) -> None:
    """Train, or with ``--eval-only`` evaluate, in this process."""
    from moco_d2.detection.datasets import register_custom
    from moco_d2.detection.preflight import check_weights
    from moco_d2.detection.trainer import TransferTrainer, evaluate

    if args.dry_run:
        dry_run(args)
        return
    cfg = cli.setup(args)
    register_custom(cfg, train=not args.eval_only)
    if args.eval_only:
        evaluate(cfg)
        return
    check_weights(cfg, args.resume)
    trainer = TransferTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    trainer.train()


def dry_run(args: argparse.Namespace) -> None:
    """Rehearse the run in a folder of its own and print what was found."""
    import tempfile

    from detectron2.utils import comm

    from moco_d2.config import load_cfg
    from moco_d2.detection.dry_run import rehearse

    with tempfile.TemporaryDirectory() as own:
        folder = comm.all_gather(own)[0]  # one for all processes: what the first one writes, the others read
        for subject, finding in rehearse(load_cfg(args.config_file, [*args.opts, "OUTPUT_DIR", folder])):
            if comm.is_main_process():
                print(f"{subject:<11} {finding}", flush=True)
        comm.synchronize()
    if comm.is_main_process():
        print("dry run     passed")


if __name__ == "__main__":
    parser = cli.launch_parser(__doc__)
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, a trained detector")
    parser.add_argument(
        "--dry-run", action="store_true", help="rehearse the run: data, weights, 2 steps, evaluation, ETA"
    )
    cli.run(main, parser.parse_args())

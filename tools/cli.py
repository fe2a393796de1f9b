"""What the command-line tools share: Detectron2's arguments, set-up, and errors a user can read.

Nothing heavy is imported at the top, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

logger = logging.getLogger("moco_d2.tools")


def launch_parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that Detectron2's users know; options go before the KEY VALUE pairs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="path or shipped name of a config")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (without GPUs: on the CPU)")
    parser.add_argument("--num-machines", type=int, default=1, help="total number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of the first machine")
    parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR")
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser


def setup(args: argparse.Namespace) -> Any:
    """Read the config, choose the device and the seed, start the log, and return the frozen config."""
    import torch
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from moco_d2.config import config_files, load_cfg

    cfg = load_cfg(args.config_file, args.opts)
    args.config_file = str(config_files(args.config_file)[0])  # which default_setup writes into the log
    refuse_to_overwrite(cfg.OUTPUT_DIR, args)
    without_gpu = cfg.MODEL.DEVICE == "cuda" and not torch.cuda.is_available()
    if without_gpu:
        cfg.MODEL.DEVICE = "cpu"
    if cfg.SEED < 0:  # Drawn here, so that the run's config.yaml records it.
        cfg.SEED = comm.shared_random_seed() % 2**31
    cfg.freeze()
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="moco_d2", abbrev_name="moco_d2")
    default_setup(cfg, args)
    if without_gpu:
        logger.info("no GPU here: running on the CPU")
    return cfg


def refuse_to_overwrite(output_dir: str, args: argparse.Namespace) -> None:
    """Raise ValueError when a new run would write over a run that is there already."""
    last = os.path.join(output_dir, "last_checkpoint")
    if os.path.isfile(last) and not args.resume and not getattr(args, "eval_only", False):
        with open(last) as file:
            raise ValueError(
                f"{output_dir} holds a run already ({file.read().strip()}): continue it with --resume, or choose "
                "another OUTPUT_DIR"
            )


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Launch ``main(args)`` in every process; a mistake of the user's ends in one clear line and exit code 2."""
    from torch.multiprocessing import ProcessRaisedException

    from moco_d2.engine.launch import launch

    try:
        launch(main, args.num_gpus, args.num_machines, args.machine_rank, args.dist_url, args)
    except (ValueError, FloatingPointError) as error:
        fail(str(error))
    except ProcessRaisedException as error:
        for kind in ("ValueError: ", "FloatingPointError: "):
            if f"\n{kind}" in str(error):
                fail(str(error).rpartition(f"\n{kind}")[2].strip())
        raise


def fail(message: str) -> None:
    """Print an error and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

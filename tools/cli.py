"""What the command-line tools share: Detectron2's arguments, set-up, and errors a user can read.

Nothing heavy is imported at the top, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What of a training's log is worth a line on the screen: progress, and the files it leaves.
PROGRESS = re.compile(r"\beta:? \d.*?(?=  time:|$)|wrote \S+(?:results\.json|backbone\.pth)|error: .*")


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
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from moco_d2.config import config_files, load_cfg, refuse_to_overwrite, use_device_there_is

    cfg = load_cfg(args.config_file, args.opts)
    if not (args.resume or getattr(args, "eval_only", False)):
        refuse_to_overwrite(cfg.OUTPUT_DIR)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="moco_d2", abbrev_name="moco_d2")
    use_device_there_is(cfg)
    if cfg.SEED < 0:  # Drawn here, so that the run's config.yaml records it.
        cfg.SEED = comm.shared_random_seed() % 2**31
    cfg.freeze()
    args.config_file = str(config_files(args.config_file)[0])  # which default_setup writes into the log
    default_setup(cfg, args)
    return cfg


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


def follow(command: Sequence[str], log: Path, shown: re.Pattern[str], **options: Any) -> int:
    """Run a Python script in its own process and return its exit code.

    Its output goes straight into a file, so that the script outlives us if it must; what ``shown`` finds in a line is
    printed as well. When we are interrupted the script is ended too.

    Args:
        command: the script and its arguments.
        log: the file, appended to.
        shown: the part of a line to print.
        options: of :class:`subprocess.Popen`.
    """
    with log.open("ab") as output, log.open(errors="replace", newline="\n") as tail:
        tail.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            [sys.executable, *command], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, **options
        )
        rest = ""
        try:
            running = True
            while running:
                running = process.poll() is None
                *lines, rest = (rest + tail.read()).split("\n")
                for found in filter(None, map(shown.search, lines)):
                    print(f"    {found.group()}", flush=True)
                time.sleep(0.1 * running)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    return process.returncode


def fail(message: str) -> None:
    """Print an error and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)

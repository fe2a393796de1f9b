"""Train once without interruption and once killed again and again, and compare: a script, for processes of its own.

    kill_and_resume.py pretrain|transfer CONFIG FOLDER KILLS PROCESSES KEY VALUE ...

The libraries are imported once; every training is a forked child, so that twenty restarts take seconds, not minutes.
Each is killed with SIGKILL, workers and all: some at a random moment, some as soon as a checkpoint is being written.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.env import seed_all_rng

from moco_d2.config import load_cfg
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.engine.launch import _Group, _run
from moco_d2.engine.pretrain import PretrainTrainer

TRAINERS = {"pretrain": PretrainTrainer, "transfer": TransferTrainer}


def train(words: tuple[str, str, list[str]]) -> None:
    """Train in this process as the tools do, continuing what is in the folder."""
    stage, config, opts = words
    torch.set_num_threads(1)
    cfg = load_cfg(config, opts)
    seed_all_rng(cfg.SEED)
    trainer = TRAINERS[stage](cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def start(words: tuple[str, str, list[str]], folder: Path, processes: int) -> list[int]:
    """Start a training in forked processes of one process group; return their ids."""
    rendezvous = folder / f"rendezvous{time.monotonic_ns()}"
    leader, children = 0, []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setpgid(0, leader)
                log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                if processes == 1:
                    train(words)
                else:
                    _run(train, words, _Group(f"file://{rendezvous}", processes, rank, rank, processes, 120))
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        leader = leader or child
        os.setpgid(child, leader)
        children.append(child)
    return children


def wait(children: list[int]) -> bool:
    """Wait for all; tell whether all ended well."""
    return all([os.waitpid(child, 0)[1] == 0 for child in children])


def ended(children: list[int]) -> bool:
    """Tell whether the first has ended by itself."""
    return os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def kill(children: list[int], run: Path, seconds: float, while_writing: bool, rng: random.Random) -> bool:
    """Kill a training at a random moment within ``seconds``, or when it writes; tell whether it still lived."""
    deadline = time.monotonic() + rng.uniform(0, seconds)
    while time.monotonic() < deadline or while_writing:
        if ended(children):
            return False
        if while_writing and any(run.glob(".model_*.partial")):
            time.sleep(rng.uniform(0, 0.02))
            break
        time.sleep(0.002)
    if ended(children):
        return False
    os.killpg(children[0], signal.SIGKILL)
    return True


def differences(a: Any, b: Any, path: str = "") -> Iterator[str]:
    """Yield where two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        if not torch.equal(a, b):
            yield path
    elif isinstance(a, dict):
        if a.keys() != b.keys():
            yield f"{path}: {sorted(set(a) ^ set(b))}"
        for key in a.keys() & b.keys():
            yield from differences(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        for i, pair in enumerate(zip(a, b, strict=True)):
            yield from differences(*pair, f"{path}[{i}]")
    elif a != b:
        yield f"{path}: {a} {b}"


def main() -> None:
    """Run both, and print what happened as JSON."""
    stage, config, place, kills, processes, *opts = sys.argv[1:]
    folder, left, rng = Path(place), int(kills), random.Random(7)
    whole, cut = folder / "whole", folder / "cut"
    for run in (whole, cut):
        run.mkdir(parents=True)
    begun = time.monotonic()
    if not wait(start((stage, config, [*opts, "OUTPUT_DIR", str(whole)]), folder, int(processes))):
        sys.exit("the uninterrupted run failed:\n" + (folder / "log0.txt").read_text()[-3000:])
    seconds = time.monotonic() - begun
    found = {"seconds": round(seconds, 1), "killed": 0, "while_writing": 0, "starts": 0}
    while True:
        workers = found["starts"] % 3  # another number each time
        words = [*opts, "OUTPUT_DIR", str(cut), "DATALOADER.NUM_WORKERS", str(workers)]
        children = start((stage, config, words), folder, int(processes))
        found["starts"] += 1
        writing = left % 3 == 0
        killed = left > 0 and kill(children, cut, 0.7 * seconds, writing, rng)
        well = wait(children)
        if killed:
            found["killed"] += 1
            found["while_writing"] += any(cut.glob(".*.partial"))
            left -= 1
        elif not well:
            sys.exit("a resumed run failed:\n" + (folder / "log0.txt").read_text()[-3000:])
        elif left <= 0:
            break
        else:  # Done before all kills were made: from an early checkpoint again.
            found["again"] = found.get("again", 0) + 1
            numbered = sorted(cut.glob("model_0*.pth"))
            (cut / "last_checkpoint").write_text(numbered[0].name)
            for path in [*numbered[1:], cut / "model_final.pth"]:
                path.unlink()
    states = [torch.load(run / "model_final.pth") for run in (whole, cut)]
    found["differences"] = list(differences(*states))[:5]
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""Train once without interruption and once cut off again and again, and compare: a script, for processes of its own.

    kill_and_resume.py pretrain|transfer CONFIG FOLDER CUTS PROCESSES KEY VALUE ...

The libraries are imported once; every training is a forked child, so that twenty restarts take seconds, not minutes.
All processes of a training, workers too, are killed with SIGKILL at a random moment, or as soon as a checkpoint is
being written, or are asked with SIGTERM to stop.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from detectron2.utils.env import seed_all_rng

from moco_d2.config import load_cfg
from moco_d2.detection.trainer import TransferTrainer
from moco_d2.engine.trainer import PretrainTrainer
from moco_d2.running import folder, preemption
from moco_d2.running.launch import _Group, _run
from tests import toy_method

TRAINERS = {"pretrain": PretrainTrainer, "transfer": TransferTrainer}


def train(words: tuple[str, str, list[str]]) -> None:
    """Train in this process as the tools do, continuing what is in the folder."""
    stage, config, opts = words
    torch.set_num_threads(1)
    cfg = load_cfg(config, opts)
    seed_all_rng(cfg.SEED)
    folder.claim(cfg.OUTPUT_DIR, resume=True)
    trainer = TRAINERS[stage](cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()


def start(words: tuple[str, str, list[str]], folder: Path, processes: int) -> list[int]:
    """Start a training in forked processes of one process group; return their ids."""
    rendezvous = folder / f"rendezvous{time.monotonic_ns()}"
    leader, children, parent = 0, [], os.getpid()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.setpgid(0, leader)
                log = os.open(folder / f"log{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(log, 1)
                os.dup2(log, 2)
                preemption.handle_signals()
                if processes == 1:
                    train(words)
                else:
                    group = _Group(f"file://{rendezvous}", processes, rank, rank, processes, 120, cuda=False)
                    _run(train, words, group, parent)
                status = 0
            except preemption.Preempted as stop:
                status = stop.code
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


def wait(children: list[int]) -> set[int]:
    """Wait for all; return their exit codes, negative for signals."""
    return {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children}


def ended(children: list[int]) -> bool:
    """Tell whether the first has ended by itself."""
    return os.waitid(os.P_PID, children[0], os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def cut_off(children: list[int], run: Path, seconds: float, how: str, rng: random.Random) -> None:
    """Signal all processes of a training at a random moment within ``seconds``, or when it writes."""
    deadline = time.monotonic() + rng.uniform(0, seconds)
    begun = {path.name for path in run.glob(".*.partial")}  # by those that were killed before
    while (time.monotonic() < deadline or how == "kill while writing") and not ended(children):
        if how == "kill while writing" and any(path.name not in begun for path in run.glob(".model_*.partial")):
            time.sleep(rng.uniform(0, 0.02))
            break
        if how == "ask" and not (run / "metrics.json").exists():
            deadline = time.monotonic() + rng.uniform(0, seconds)  # it cannot listen before it runs
        time.sleep(0.002)
    if not ended(children):
        os.killpg(children[0], signal.SIGTERM if how == "ask" else signal.SIGKILL)


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


def done(run: Path) -> int:
    """Return the number of iterations that are saved."""
    return max((int(path.stem[-7:]) + 1 for path in run.glob("model_0*.pth")), default=0)


def fail(what: str, folder: Path) -> None:
    """End with a log."""
    sys.exit(f"{what} failed:\n" + "".join(path.read_text()[-3000:] for path in sorted(folder.glob("log*.txt"))))


def main() -> None:
    """Run both, and print what happened as JSON."""
    stage, config, place, cuts, processes, *opts = sys.argv[1:]
    toy_method.register()
    folder, left, rng = Path(place), int(cuts), random.Random(7)
    whole, cut = folder / "whole", folder / "cut"
    for run in (whole, cut):
        run.mkdir(parents=True)
    begun = time.monotonic()
    if wait(start((stage, config, [*opts, "OUTPUT_DIR", str(whole)]), folder, int(processes))) != {0}:
        fail("the uninterrupted run", folder)
    seconds = time.monotonic() - begun
    found = Counter({"seconds": round(seconds)})
    total = torch.load(whole / "model_final.pth")["iteration"] + 1
    while True:
        workers = found["starts"] % 3  # another number each time
        words = [*opts, "OUTPUT_DIR", str(cut), "DATALOADER.NUM_WORKERS", str(workers)]
        children = start((stage, config, words), folder, int(processes))
        how = ("kill while writing", "kill", "ask")[(found["killed"] + found["asked"]) % 3]
        found["starts"] += 1
        if left:
            share = (1 - done(cut) / total) / (left + 1)  # so that all cuts are made before the end
            cut_off(children, cut, (2 * share + 0.05) * seconds, how, rng)
        codes = wait(children)
        if codes == {-signal.SIGKILL}:
            found["killed"] += 1
            found["killed while writing"] += any(cut.glob(".model_*.partial"))
            left -= 1
        elif codes == {preemption.EXIT_PREEMPTED}:
            found["asked"] += 1
            left -= 1
        elif codes != {0}:
            fail(f"a resumed run, with codes {codes}", folder)
        elif not left:
            break
        else:  # Done before all cuts were made: from an early checkpoint again.
            found["again"] += 1
            first, *others = sorted(cut.glob("model_0*.pth"))
            (cut / "last_checkpoint").write_text(first.name)
            for path in [*others, cut / "model_final.pth"]:
                path.unlink(missing_ok=True)
    states = [torch.load(run / "model_final.pth") for run in (whole, cut)]
    different = list(differences(*states))[:5]
    sys.stdout.write(json.dumps(found | {"differences": different}) + "\n")


if __name__ == "__main__":
    main()

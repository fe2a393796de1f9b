"""Clusters stop jobs and start them again: the tools' exit code, and torchrun with two agents of which one is lost."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
TOOL = str(ROOT / "tools/pretrain_net.py")
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # docs/cluster.md says why
}  # fmt: skip

slow = pytest.mark.slow  # tools that start several processes, several times


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
    return str(folder)


def options(images: str, output: Path, iterations: int, *more: object) -> list[str]:
    opts = [
        "DATASETS.TRAIN", f'("{images}",)', "OUTPUT_DIR", output, "SOLVER.IMS_PER_BATCH", 8, "DATA.CROP_SIZE", 32,
        "SSL.ENCODER.NAME", "resnet18", "SSL.ENCODER.ARGS.width", 0.125, "SSL.ARGS.queue_size", 64,
        "SSL.ARGS.bn_groups", 1, "SOLVER.EPOCHS", 0, "SOLVER.MAX_ITER", iterations, "DATALOADER.NUM_WORKERS", 1,
        "MODEL.DEVICE", "cpu", "SEED", 7, *more,
    ]  # fmt: skip
    return ["--config-file", "Pretrain/moco_v2_R50_200ep", "--resume", *map(str, opts)]


def begin(log: Path, *words: str) -> Popen:
    """Start a command in a process group of its own, with its output in a file."""
    with log.open("a") as output:
        return Popen([sys.executable, *words], env=ENVIRONMENT, stdout=output, stderr=output, start_new_session=True)


def wait_for(path: Path, process: Popen, log: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.01)


def same_weights(a: Path, b: Path) -> bool:
    first, second = (torch.load(folder / "model_final.pth")["model"] for folder in (a, b))
    return all(torch.equal(first[key], second[key]) for key in first)


@slow
@pytest.mark.parametrize(("signum", "to_all"), [(signal.SIGUSR1, False), (signal.SIGTERM, True)])
def test_the_tool_saves_says_so_and_goes_on(images: str, tmp_path: Path, signum: int, to_all: bool) -> None:
    """SLURM signals the launcher, or every process of the job, loaders' workers among them."""
    log = tmp_path / "log"
    command = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "run", 400, "SOLVER.CHECKPOINT_PERIOD", 10)]
    process = begin(log, *command)
    wait_for(tmp_path / "run/last_checkpoint", process, log)
    (os.killpg if to_all else os.kill)(process.pid, signum)
    assert process.wait(120) == 75, log.read_text()[-3000:]
    saved = int((tmp_path / "run/last_checkpoint").read_text()[6:13])
    assert 9 <= saved < 399
    text = log.read_text()
    assert text.count(f"asked to stop: saved iteration {saved}; continue with --resume (exit code 75)") == 1
    assert "Traceback" not in text
    assert begin(log, *command).wait(300) == 0, log.read_text()[-3000:]
    assert f"resuming at iteration {saved + 1} of 400" in log.read_text()
    whole = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "whole", 400, "SOLVER.CHECKPOINT_PERIOD", 1000)]
    assert begin(log, *whole).wait(300) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")


def test_the_keyboard_stops_a_run_that_has_saved(images: str, tmp_path: Path) -> None:
    """A terminal interrupts every process of the run, loaders' workers among them."""
    log = tmp_path / "log"
    process = begin(log, "-c", INTERRUPTIBLE, *options(images, tmp_path / "run", 10**6, "SOLVER.CHECKPOINT_PERIOD", 3))
    wait_for(tmp_path / "run/last_checkpoint", process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 75, log.read_text()[-3000:]
    saved, text = int((tmp_path / "run/last_checkpoint").read_text()[6:13]), log.read_text()
    assert text.count(f"asked to stop: saved iteration {saved}; continue with --resume (exit code 75)") == 1
    assert text.count("stopping: the run saves at the end of this step; press Ctrl-C again to end at once") == 1
    assert "Traceback" not in text
    assert f"--resume: there is no checkpoint in {tmp_path / 'run'}, so the run starts from the beginning" in text


# SIGINT has its own handler again, which a test run in the background ignores and hands down.
INTERRUPTIBLE = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from moco_d2.commands import pretrain
pretrain.main()
"""
ENDLESS_STEP = """
import signal, sys, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
from moco_d2.commands import cli
from moco_d2.running import launch, preemption
def main(steps):
    if steps:
        preemption.StopWhenAsked(None).before_train()
    print("begun", flush=True)
    while True:
        threading.Event().wait(1)
cli.guard(lambda: launch.launch(main, 1, args=int(sys.argv[1]), device="cpu"))
"""


@pytest.mark.parametrize(("trains", "presses", "code"), [(0, 1, 130), (1, 2, -signal.SIGINT)])
def test_a_second_interruption_ends_at_once_and_so_does_one_before_the_first_step(
    trains: int, presses: int, code: int, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = begin(log, "-c", ENDLESS_STEP, str(trains))
    for press in range(presses):
        deadline = time.monotonic() + 120
        while log.read_text().count("\n") < 1 + 2 * press and process.poll() is None:  # "begun", then what a press says
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
    assert process.wait(20) == code, log.read_text()
    assert "Traceback" not in log.read_text()


@slow
@pytest.mark.parametrize("second", [False, True])
def test_several_processes_obey_the_keyboard(images: str, second: bool, tmp_path: Path) -> None:
    log = tmp_path / "log"
    words = ["--num-gpus", "2", *options(images, tmp_path / "run", 10**6, "SOLVER.CHECKPOINT_PERIOD", 3)]
    process = begin(log, "-c", INTERRUPTIBLE, *words)
    if second:  # while the ranks import: there is nothing to save
        time.sleep(8)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
        assert log.read_text().endswith("error: interrupted\n") and "Traceback" not in log.read_text()
        return
    wait_for(tmp_path / "run/last_checkpoint", process, log)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(120) == 75, log.read_text()[-3000:]
    assert log.read_text().count("press Ctrl-C again") == log.read_text().count("; continue with --resume") == 1


def failing_after_a_request(_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    raise ZeroDivisionError


def test_an_error_after_a_request_is_an_error(tmp_path: Path) -> None:
    """A cluster that starts every job with code 75 again would go on with a mistake for ever."""
    script = f"""
        import sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_preemption; from moco_d2.commands import cli
        args = cli.launch_parser("pretrain", None).parse_args(["--config-file", "Pretrain/moco_v2_R50_200ep"])
        cli.run(test_preemption.failing_after_a_request, args)
    """
    log = tmp_path / "log"
    assert begin(log, "-c", textwrap.dedent(script)).wait(120) == 1, log.read_text()
    assert re.search(r"Traceback.*in failing_after_a_request.*ZeroDivisionError", log.read_text(), re.DOTALL)


def test_a_second_signal_does_not_end_the_wait_for_what_is_saved(tmp_path: Path) -> None:
    """moco-d2 trials: a training that takes its time to save is waited for, however often we are asked."""
    training = tmp_path / "training.py"
    training.write_text(
        "import pathlib, signal, sys, time\n"
        "def save(*_):\n    time.sleep(2)\n    pathlib.Path('saved').touch()\n    sys.exit(75)\n"
        "signal.signal(signal.SIGTERM, save)\npathlib.Path('ready').touch()\nsignal.pause()\n"
    )
    script = f"""
        import pathlib, re
        from moco_d2.commands import cli
        with cli.stop_on_signals():
            cli.follow([{str(training)!r}], pathlib.Path("log"), re.compile("x"), cwd={str(tmp_path)!r})
    """
    log = tmp_path / "log"
    process = begin(log, "-c", textwrap.dedent(script).replace('"log"', repr(str(tmp_path / "training_log"))))
    wait_for(tmp_path / "ready", process, log)
    for signum in (signal.SIGUSR1, signal.SIGTERM):
        process.send_signal(signum)
        time.sleep(0.5)
    assert process.wait(60) == 75, log.read_text()
    assert (tmp_path / "saved").exists()


def test_a_dry_run_ends_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"""
        import pathlib, time
        from moco_d2.commands import cli
        from moco_d2.running import preemption
        def rehearse(cfg):
            pathlib.Path({str(ready)!r}).write_text(cfg.OUTPUT_DIR)
            time.sleep(60)
            yield "not", "reached"
        args = cli.launch_parser("pretrain", None).parse_args(["--config-file", "Pretrain/moco_v2_R50_200ep"])
        preemption.handle_signals()
        cli.dry_run(args, rehearse)
    """
    log = tmp_path / "log"
    process = begin(log, "-c", textwrap.dedent(script))
    wait_for(ready, process, log)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75, log.read_text()
    assert not Path(ready.read_text()).exists()


def mounts() -> bool:
    """Tell whether a file system may be mounted here."""
    command = ["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@slow
@pytest.mark.parametrize("how", ["file system", "limit"] if mounts() else ["limit"])
def test_a_full_disk_ends_the_tool_with_its_code(images: str, tmp_path: Path, how: str) -> None:
    """On a file system of 6 MiB, which holds two checkpoints; and where a limit of files' size comes during the run."""
    disk, log = tmp_path / "disk", tmp_path / "log"
    disk.mkdir()
    words = options(images, disk, 10**6, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_KEEP", 0)
    if how == "file system":
        script = 'mount -t tmpfs -o size=6m none "$1" || exit; disk=$1; shift; "$@"; code=$?; '
        script += f'{sys.executable} -m zipfile -t "$disk/$(cat $disk/last_checkpoint)"; exit $code'
        command = ["unshare", "-rm", "sh", "-c", script, "sh", disk, sys.executable, TOOL, "--num-gpus", "2", *words]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
        code, said, tested, reason = done.returncode, done.stderr, done.stdout, "No space left on device"
    else:
        process = begin(log, TOOL, *words)
        wait_for(disk / "last_checkpoint", process, log)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (2**20, 2**20))  # a checkpoint takes more
        code, said, reason = process.wait(120), log.read_text(), "File too large"
        last = disk / (disk / "last_checkpoint").read_text()
        tested = subprocess.run([sys.executable, "-m", "zipfile", "-t", last], capture_output=True, text=True).stdout
    assert code == 74, said
    assert tested.endswith("Done testing\n"), "the checkpoint before is whole"
    error = said.splitlines()[-1]
    assert error.startswith(f"error: cannot write {disk}/") and reason in error


def agents(images: str, tmp_path: Path, iterations: int, restarts: int) -> tuple[Callable[[int], Popen], list[Path]]:
    """Return what starts the agent of each of two machines, the first with the rendezvous, and their logs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [tmp_path / name for name in ("log0", "log1")]

    def start(number: int) -> Popen:
        return begin(
            logs[number], "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts",
            str(restarts), "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "one",
            "--rdzv-conf", f"is_host={number == 0:d}", TOOL,
            *options(images, tmp_path / "run", iterations, "SOLVER.CHECKPOINT_PERIOD", 20),
        )  # fmt: skip

    return start, logs


def end(*processes: Popen) -> None:
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@slow
def test_torchrun_hands_a_request_on(images: str, tmp_path: Path) -> None:
    """The job over several nodes of docs/cluster.md: SLURM signals the agents, which SIGUSR1 would kill."""
    start, logs = agents(images, tmp_path, 400, restarts=0)
    processes = [start(0), start(1)]
    try:
        wait_for(tmp_path / "run/last_checkpoint", processes[0], logs[0])
        for process in processes:
            process.terminate()
        codes = [process.wait(60) for process in processes]
        said = [log.read_text() for log in logs]
        saved = int((tmp_path / "run/last_checkpoint").read_text()[6:13])
        assert all(codes) and saved < 399, said
        assert f"asked to stop: saved iteration {saved}; continue with --resume (exit code 75)" in said[0]
        assert all("death signal" in text for text in said), "what the script looks for"
        processes = [start(0), start(1)]
        assert [process.wait(300) for process in processes] == [0, 0], logs[0].read_text()[-3000:]
        assert f"resuming at iteration {saved + 1} of 400" in logs[0].read_text()
    finally:
        end(*processes)


@slow
def test_torchrun_goes_on_when_a_lost_agent_comes_back(images: str, tmp_path: Path) -> None:
    """The commands of docs/cluster.md: two agents, the second machine fails and is started again."""
    start, logs = agents(images, tmp_path, 600, restarts=3)
    first, second = start(0), start(1)
    try:
        wait_for(tmp_path / "run/last_checkpoint", first, logs[0])
        second.kill()  # the agent alone: its process must not stay behind
        second.wait()
        second = start(1)
        codes = first.wait(500), second.wait(100)
        assert codes == (0, 0), logs[0].read_text()[-3000:] + logs[1].read_text()[-3000:]
        assert any("resuming at iteration" in log.read_text() for log in logs)
    finally:
        end(first, second)
    whole = [TOOL, "--num-gpus", "2", *options(images, tmp_path / "whole", 600, "SOLVER.CHECKPOINT_PERIOD", 1000)]
    assert begin(tmp_path / "log", *whole).wait(300) == 0
    assert same_weights(tmp_path / "run", tmp_path / "whole")

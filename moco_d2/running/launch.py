"""Launcher: runs a function in every process; if one process is lost, it ends all of them and reports the lost one.

It replaces Detectron2's ``launch``, which passes no signal on to its processes (a job that is asked to stop dies before
it can save), chooses NCCL by the machine and not by ``MODEL.DEVICE``, and never ends a process that hangs. torch's
elastic launcher dies of SIGUSR1 and has exit codes of its own.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing import connection, resource_tracker
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.utils import comm

from moco_d2 import exits
from moco_d2.io import timeouts
from moco_d2.running import preemption

# Seconds that the other processes have to end by themselves after one has failed.
GRACE = 5


class RankFailedError(RuntimeError):
    """A process was lost or raised an error, and all processes were ended.

    Attributes:
        exit_code: of the command (:mod:`moco_d2.exits`).
        line: the message about a user's mistake; empty for a fault of the program or a process that was killed.
    """

    def __init__(self, text: str, exit_code: int, line: str) -> None:
        super().__init__(text)
        self.exit_code, self.line = exit_code, line


@dataclass(frozen=True)
class _Failure:
    """The end of a process, as it reports it to the launcher in a file.

    Attributes:
        signal: name of the signal that killed it, if one did.
        code: exit code of the command.
        line: see :class:`RankFailedError`.
        text: the rank and its traceback.
    """

    rank: int
    time: float
    signal: str
    code: int
    line: str
    text: str

    @property
    def order(self) -> tuple[bool, float]:
        """Sort key, cause before consequences: a killed process raises nothing, but makes the others raise."""
        return self.signal in ("", "SIGABRT"), self.time


@preemption.keyboard_restored()
def launch(
    main: Callable[[Any], None],
    num_gpus: int,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: Any = None,
    timeout: float = timeouts.DEFAULT,
    device: str = "cuda",
) -> None:
    """Run ``main(args)`` in ``num_gpus`` processes per machine, on GPUs (NCCL) or on the CPU (gloo).

    Under ``torchrun`` the processes exist already: the process group and the counts come from its environment. Every
    process handles SIGTERM, SIGUSR1 and Ctrl-C (:mod:`moco_d2.running.preemption`).

    Args:
        main: the function; importable.
        num_gpus: number of processes on this machine.
        num_machines: number of machines.
        machine_rank: number of this machine, from 0.
        dist_url: ``tcp://HOST:PORT`` of the first machine, or ``auto`` if there is only one.
        args: passed to ``main``.
        timeout: seconds that a process waits for another one (:mod:`moco_d2.io.timeouts`).
        device: as in ``MODEL.DEVICE``; the CPU if there is no GPU.

    Raises:
        ValueError: there are fewer GPUs than processes, or the number of machines, address or timeout is wrong.
        RankFailedError: one of several processes on this machine failed; all of them have ended.
        Preempted: the run was asked to stop, and has saved.
        KeyboardInterrupt: it was interrupted from the keyboard before the first step, or twice.
    """
    timeouts.set_limit(_checked(timeout))
    cuda = torch.cuda.is_available() and torch.device(device).type == "cuda"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        preemption.handle_signals(again_ends=False)  # the agent repeats the first, and decides about the second
        world, rank, local, locals_ = (
            int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        )
        check_processes(locals_, device, world, "torchrun's --nproc-per-node")
        _run(main, args, _Group("env://", world, rank, local, locals_, timeout, cuda), os.getppid())
        return
    _check_machines(num_machines, machine_rank, dist_url)
    check_processes(num_gpus, device, num_gpus * num_machines)
    if num_gpus * num_machines == 1:
        preemption.handle_signals()
        if cuda and ":" in device:
            torch.cuda.set_device(device)
        main(args)
        return
    groups = [
        _Group(dist_url, num_gpus * num_machines, machine_rank * num_gpus + local, local, num_gpus, timeout, cuda)
        for local in range(num_gpus)
    ]
    _start_all(main, args, groups)


@dataclass(frozen=True)
class _Group:
    """A process's place in the process group.

    Attributes:
        address: of the rendezvous: a URL, or the port of the launcher's store on this machine.
    """

    address: str | int
    world_size: int
    rank: int
    local_rank: int
    local_world_size: int
    timeout: float
    cuda: bool

    def join(self) -> None:
        """Join the process group, on this process's device."""
        timeouts.set_limit(self.timeout)
        timeout = timedelta(seconds=self.timeout)
        if self.cuda:
            torch.cuda.set_device(self.local_rank)
        meet: dict[str, Any] = {"init_method": self.address}
        if isinstance(self.address, int):
            meet = {"store": dist.TCPStore("127.0.0.1", self.address, is_master=False, timeout=timeout)}
        dist.init_process_group(
            "nccl" if self.cuda else "gloo", **meet, rank=self.rank, world_size=self.world_size, timeout=timeout
        )
        if self.cuda:  # Detectron2 sends objects through its own gloo group, which has torch's default of 30 minutes
            dist.distributed_c10d._set_pg_timeout(timeout, comm._get_global_gloo_group())
        comm.create_local_process_group(self.local_world_size)
        comm.synchronize()


def _checked(timeout: float) -> float:
    if not 1 <= timeout <= 1e8:  # also refuses NaN; torch's counters overflow beyond
        raise ValueError(f"--timeout is {timeout:g}; it must be from 1 to 100,000,000 seconds")
    return timeout


def check_processes(processes: int, device: str, world_size: int, option: str = "--num-gpus") -> None:
    """Check the number of processes on this machine: at least one, and a GPU for each unless they run on the CPU.

    Args:
        processes: on this machine.
        device: as in ``MODEL.DEVICE``.
        world_size: processes on all machines.
        option: of the command line, for the message.

    Raises:
        ValueError: there is no process, there are too few GPUs, or all processes would use the same GPU.
    """
    if processes < 1:
        raise ValueError(f"{option} is {processes}; it must be at least 1 (without a GPU: processes on the CPU)")
    if not torch.cuda.is_available() or torch.device(device).type != "cuda":
        return
    if processes > (available := torch.cuda.device_count()):
        raise ValueError(f"{option} is {processes}, but this machine has {available} GPU(s)")
    if ":" in device and world_size > 1:
        raise ValueError(
            f"MODEL.DEVICE is {device}, but each of the {world_size} processes takes a GPU of its own: write cuda, and "
            "choose the GPUs with the environment variable CUDA_VISIBLE_DEVICES"
        )


def _check_machines(num_machines: int, machine_rank: int, dist_url: str) -> None:
    if num_machines < 1 or not 0 <= machine_rank < num_machines:
        raise ValueError(
            f"--num-machines is {num_machines} and --machine-rank is {machine_rank}: there must be at least one "
            "machine, and ranks are from 0 to num-machines - 1"
        )
    if dist_url == "auto":
        if num_machines > 1:
            raise ValueError("--dist-url is missing: with several machines, give tcp://HOST:PORT of the first one")
        return
    found = re.fullmatch(r"tcp://([^/:\s]+|\[[0-9a-fA-F:]+\]):([0-9]+)|file:///.+", dist_url)
    if not found or (found[2] and not 0 < int(found[2]) < 2**16):
        raise ValueError(f"--dist-url is {dist_url!r}; it must be tcp://HOST:PORT of the first machine")
    if found[1]:
        try:
            socket.getaddrinfo(found[1].strip("[]"), found[2])
        except (OSError, UnicodeError) as error:
            raise ValueError(f"--dist-url is {dist_url!r}, but this machine cannot resolve that host") from error


def _run(main: Callable[[Any], None], args: Any, group: _Group, parent: int) -> None:
    """Run ``main`` in this process as a member of the group, for as long as the parent process lives."""
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    # The launcher sends SIGABRT to processes that hang; they then print where each thread is.
    faulthandler.enable()
    group.join()
    try:
        main(args)
    except preemption.Preempted:
        _leave()
        raise
    _leave()


def _leave() -> None:
    # Together: gloo aborts a process whose peer ends while they are still connected.
    comm.synchronize()
    dist.destroy_process_group()


def _end_with(parent: int) -> None:
    """End this process once its launcher or torchrun's agent is gone; nothing else would end it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _start_all(main: Callable[[Any], None], args: Any, groups: list[_Group]) -> None:
    """Run a process for each group, and wait for all.

    Raises:
        RankFailedError: one failed.
        Preempted: all ended because they were asked to.
        KeyboardInterrupt: they were interrupted before the first step, or twice.
    """
    context, method = multiprocessing.get_context("spawn"), multiprocessing.get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        resource_tracker.ensure_running()  # otherwise the first start() does it, and unblocks SIGTERM
        # Processes and threads inherit blocked signals: a new process is not killed before it handles them, and the
        # store's thread does not take them from the main thread.
        signal.pthread_sigmask(signal.SIG_BLOCK, [*preemption.SIGNALS, signal.SIGINT])
        if groups[0].address == "auto":
            # The launcher keeps the store: a port that it only chose could be taken before rank 0 opens it.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            groups = [replace(group, address=store.port) for group in groups]
        # The launcher's id is passed on: the launcher may be gone before a rank can ask for its parent.
        more = folder, method, os.getpid()
        ranks = {group.rank: context.Process(target=_rank_main, args=(main, args, group, *more)) for group in groups}
        try:
            for process in ranks.values():
                process.start()
            preemption.handle_signals(pass_on=lambda signum: _signal(ranks.values(), signum))
            failures, stuck = _wait(ranks, Path(folder))
        finally:  # after a second interruption from the keyboard, too
            _signal(ranks.values(), signal.SIGKILL)
    if any(process.exitcode == exits.INTERRUPTED for process in ranks.values()):
        raise KeyboardInterrupt
    if failures:
        first, *others = sorted(failures, key=lambda failure: failure.order)
        text = first.text
        if stuck:
            text += f"\nRank {', '.join(map(str, stuck))} did not end within {GRACE} s and was killed"
        if others:
            text += f"\nRank {', '.join(str(failure.rank) for failure in others)} failed after it"
        # A cluster that asks a job to stop may kill processes before they can save: that is a preemption. An exception
        # is an error even then, or a job that always raises it would be requeued for ever.
        asked = first.signal in ("SIGTERM", "SIGUSR1", "SIGKILL") and preemption.requested()
        raise RankFailedError(text, preemption.EXIT_PREEMPTED if asked else first.code, first.line)
    if any(process.exitcode == preemption.EXIT_PREEMPTED for process in ranks.values()):
        raise preemption.Preempted


def _rank_main(main: Callable[[Any], None], args: Any, group: _Group, folder: str, method: str, launcher: int) -> None:
    """Run ``main``; an exception is written to a file for the launcher, and the process ends at once."""
    # Workers of loaders start by the usual method (as a rule fork), not by the one that started this process.
    multiprocessing.set_start_method(method, force=True)
    preemption.handle_signals(again_ends=False)  # at the second interruption the launcher ends all processes
    try:
        _run(main, args, group, launcher)
    except KeyboardInterrupt:
        os._exit(exits.INTERRUPTED)
    except Exception as error:
        end, text = exits.conclude(error), f"rank {group.rank} failed:\n{traceback.format_exc()}"
        report = _Failure(group.rank, time.time(), "", end.code, end.line, text)
        Path(folder, str(group.rank)).write_text(json.dumps(asdict(report)))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)  # the interpreter's regular end may wait for workers or other processes


def _wait(ranks: Mapping[int, BaseProcess], folder: Path) -> tuple[list[_Failure], list[int]]:
    """Wait for all processes, after a failure for :data:`GRACE` seconds.

    Returns:
        The failures, and the ranks that had not ended by then.
    """
    running = {process.sentinel: rank for rank, process in ranks.items()}
    failures: list[_Failure] = []
    deadline = float("inf")
    while running and time.monotonic() < deadline:
        left = deadline - time.monotonic()
        for sentinel in connection.wait(list(running), left if left < float("inf") else None):
            rank = running.pop(sentinel)  # type: ignore[arg-type]
            ranks[rank].join()
            code = ranks[rank].exitcode
            if code not in (0, preemption.EXIT_PREEMPTED):
                failures.append(_failure(rank, code, folder / str(rank)))
                deadline = min(deadline, time.monotonic() + GRACE)
    stuck = sorted(running.values())
    _signal([ranks[rank] for rank in stuck], signal.SIGABRT)
    for rank in stuck:
        ranks[rank].join(1)
    return failures, stuck


def _failure(rank: int, code: int | None, report: Path) -> _Failure:
    if report.is_file():
        return _Failure(**json.loads(report.read_text()))
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (by the kernel, out of memory?)" if name == "SIGKILL" else ""
        return _Failure(rank, time.time(), name, exits.FAULT, "", f"rank {rank} was killed by {name}{hint}")
    return _Failure(rank, time.time(), "", exits.FAULT, "", f"rank {rank} ended with code {code}")


def _signal(processes: Iterable[BaseProcess], signum: int) -> None:
    for process in processes:
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, signum)

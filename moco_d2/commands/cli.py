"""Parts that the commands share: Detectron2's arguments, the set-up of a run, its launch, and exit codes.

The commands and this module import nothing heavy at the top, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # requests to stop
# The parts of a training's log that are shown on the screen: progress, and the files that it leaves.
PROGRESS = re.compile(r"\beta:? \d.*?(?=  time:|$)|wrote \S+(?:results\.json|backbone\.pth)|error: .*")

_NOTHING_TO_RESUME = "--resume: there is no checkpoint in %s, so the run starts from the beginning"


def new_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command ``moco-d2 NAME``; its module's docstring is the description."""
    return argparse.ArgumentParser(
        prog=f"moco-d2 {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def launch_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the arguments that Detectron2's users know; options go before the KEY VALUE pairs."""
    parser = new_parser(name, description)
    add_launch_arguments(parser)
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config overrides")
    return parser


def add_launch_arguments(parser: argparse.ArgumentParser, needs_config: bool = True, resumes: bool = True) -> None:
    """Add the arguments of a run: config, processes, and whether it is resumed, unless it never is."""
    parser.add_argument(
        "--config-file", required=needs_config, default="", metavar="FILE", help="path or shipped name of a config"
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes on this machine (without GPUs: on the CPU)")
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="number of this machine, from 0")
    parser.add_argument("--dist-url", default="auto", help="tcp://HOST:PORT of the first machine")
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS",
        help="longest wait for another process or for a batch (default: see docs/reliability.md)",
    )  # fmt: skip
    if resumes:
        parser.add_argument("--resume", action="store_true", help="continue the run in OUTPUT_DIR, if there is one")


def expanded(text: str) -> str:
    """Return a path or address with ``~`` and ``$VARIABLES`` expanded, which the shell leaves alone inside quotes."""
    if not text.startswith("~") and "$" not in text:
        return text
    from moco_d2.io.paths import expand

    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error


def path(text: str) -> Path:
    """Return an :func:`expanded` path; a ``type`` of arguments."""
    return Path(expanded(text))


def setup(args: argparse.Namespace, check: Callable[[Any], None] = lambda cfg: None) -> Any:
    """Prepare a run in this process: its folder, device, seed and log.

    Args:
        args: the command line.
        check: gets the config before anything is written, and raises ValueError if the run must not begin.

    Returns:
        The frozen config.
    """
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    from moco_d2.config import config_files, load_cfg, use_available_device
    from moco_d2.exits import ending
    from moco_d2.running import folder
    from moco_d2.running.checkpoints import has_run, recorded_seed

    cfg = load_cfg(args.config_file, args.opts)
    evaluates = getattr(args, "eval_only", False)
    check(cfg)
    folder.claim(cfg.OUTPUT_DIR, args.resume, evaluates)
    # An evaluation may use its run's folder, and must not overwrite the config.yaml with which the run was trained.
    notes = os.path.join(cfg.OUTPUT_DIR, "eval_only") if evaluates else cfg.OUTPUT_DIR
    log = setup_logger(notes, distributed_rank=comm.get_rank(), name="moco_d2", abbrev_name="moco_d2")
    if args.resume and not evaluates and not has_run(cfg.OUTPUT_DIR):
        log.warning(_NOTHING_TO_RESUME, cfg.OUTPUT_DIR)
    use_available_device(cfg)
    if cfg.SEED < 0:  # drawn here, so that the run's config.yaml records it
        drawn = recorded_seed(cfg.OUTPUT_DIR) if args.resume else None
        cfg.SEED = comm.shared_random_seed() % 2**31 if drawn is None else drawn
    configs = config_files(args.config_file) if args.config_file else []
    args.config_file = str(configs[0]) if configs else ""  # default_setup copies this file into the log
    noted = cfg.clone()
    noted.OUTPUT_DIR = notes
    default_setup(noted, args)
    for path in configs[1:]:  # the init that the suffix of the name selects
        log.info("Contents of %s, merged after it:\n%s", path, path.read_text())
    # Detectron2's loop prints the traceback of every exception. That of a user's mistake belongs in the log only.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and record.exc_info[1] and ending(record.exc_info[1]).line)
    )
    cfg.freeze()
    return cfg


def dry_run(
    args: argparse.Namespace,
    rehearse: Callable[[Any], Iterator[tuple[str, str]]],
    check: Callable[[Any], None] = lambda cfg: None,
) -> None:
    """Rehearse a run in a temporary folder and print the findings, one a line.

    At SIGTERM and SIGUSR1 it ends at once, because there is nothing to save.

    Args:
        args: the command line.
        rehearse: gets the config with the temporary folder as ``OUTPUT_DIR``; yields ``(subject, finding)``.
        check: gets the config as the user wrote it, and raises ValueError if the run itself would be refused.
    """
    import shutil
    import tempfile

    from detectron2.utils import comm

    from moco_d2.config import load_cfg
    from moco_d2.running import folder
    from moco_d2.running.checkpoints import has_run

    cfg = load_cfg(args.config_file, args.opts)
    folder.check(cfg.OUTPUT_DIR, args.resume)
    check(cfg)
    if comm.is_main_process() and args.resume and not has_run(cfg.OUTPUT_DIR):
        print(f"{'resume':<11} {_NOTHING_TO_RESUME % cfg.OUTPUT_DIR}")
    with tempfile.TemporaryDirectory() as own:
        leave_on_signals(lambda: shutil.rmtree(own, ignore_errors=True))
        scratch = comm.all_gather(own)[0]  # one for all processes, because they read what the first one writes
        for subject, finding in rehearse(load_cfg(args.config_file, [*args.opts, "OUTPUT_DIR", scratch])):
            if comm.is_main_process():
                print(f"{subject:<11} {finding}", flush=True)
        comm.synchronize()
    if comm.is_main_process():
        print("dry run     passed")


def leave_on_signals(clean: Callable[[], None] = lambda: None) -> None:
    """End this process at SIGTERM and SIGUSR1 at once, with the code for "again", because there is nothing to save.

    So does an interruption from the keyboard, as if no training handled it.
    """

    def leave(*_: object) -> NoReturn:
        clean()
        os._exit(os.EX_TEMPFAIL)  # an exception would make the other processes wait for this one

    for number in SIGNALS:
        signal.signal(number, leave)
    _on_keyboard(signal.default_int_handler)


def _on_keyboard(handler: Callable[[int, Any], Any]) -> None:
    """Set the handler of SIGINT, unless this process ignores it, as one in a shell's background does."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, handler)


def run(
    main: Callable[[argparse.Namespace], None],
    args: argparse.Namespace,
    check: Callable[[Any], Iterable[str]] | None = None,
    stage: str = "",
    writes: bool = True,
) -> NoReturn:
    """Launch ``main(args)`` in every process, and end with one of the exit codes of docs/reliability.md.

    The config, device, folder and number of processes are checked first.

    Args:
        main: the function; new processes import it by its name.
        args: the command line.
        check: see :func:`moco_d2.config.load_cfg`.
        stage: see :func:`moco_d2.config.load_cfg`.
        writes: whether ``main`` writes to ``OUTPUT_DIR``.
    """

    def work() -> None:
        from moco_d2.config import load_cfg, use_available_device
        from moco_d2.io import timeouts
        from moco_d2.io.files import check_folder
        from moco_d2.running.launch import launch

        cfg = load_cfg(args.config_file, args.opts, check, stage)
        use_available_device(cfg)
        if writes:
            check_folder(cfg.OUTPUT_DIR, "OUTPUT_DIR")
        timeout = timeouts.DEFAULT if args.timeout is None else args.timeout
        machines = args.num_gpus, args.num_machines, args.machine_rank, args.dist_url
        launch(main, *machines, args, timeout, cfg.MODEL.DEVICE)

    guard(work)


def guard(work: Callable[[], int | None]) -> NoReturn:
    """Do a command's work and end the process with the exit code that it returns, or with that of its error.

    :func:`moco_d2.exits.ending` chooses the code of an error.
    """
    try:
        code = work() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:  # not left to moco_d2.exits, whose import may be what was interrupted
        fail("interrupted", 130)
    except Exception as error:
        from moco_d2.exits import leave

        leave(error)
    sys.exit(code)


class Followed(NamedTuple):
    """A process that :func:`follow_all` runs.

    Attributes:
        command: Python's arguments: a script, or ``-m`` and a module, with the words for it.
        log: the file that gets its output, appended to.
        mark: printed before each of its lines.
    """

    command: Sequence[str]
    log: Path
    mark: str = "    "


def follow(command: Sequence[str], log: Path, shown: re.Pattern[str], **options: Any) -> int:
    """Run Python in a process of its own and return its exit code; see :func:`follow_all`."""
    (code,) = follow_all([Followed(command, log)], shown, **options)
    return code


def follow_all(jobs: Sequence[Followed], shown: re.Pattern[str], **options: Any) -> list[int]:
    """Run Python processes at the same time and return their exit codes.

    The output goes straight into a file, so that a process can outlive this one; parts of it are printed as well. If an
    exception or :func:`stop_on_signals` ends this, the processes get SIGTERM, at which a training saves, and are waited
    for. An interruption from the keyboard during that wait kills them.

    Args:
        jobs: the processes.
        shown: the part of a line to print.
        options: of :class:`subprocess.Popen`.
    """
    processes: list[subprocess.Popen[bytes]] = []
    with contextlib.ExitStack() as files:
        tails = []
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # the new processes inherit it
        try:
            for job in jobs:
                output = files.enter_context(job.log.open("ab"))
                tails.append(files.enter_context(job.log.open(errors="replace", newline="\n")))
                tails[-1].seek(0, os.SEEK_END)
                words = [sys.executable, *job.command]
                streams: dict[str, Any] = {"stdout": output, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
                processes.append(subprocess.Popen(words, **streams, **options))
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            rests, running = [""] * len(jobs), True
            while running:
                running = any(process.poll() is None for process in processes)
                for i, (job, tail) in enumerate(zip(jobs, tails, strict=True)):
                    *lines, rests[i] = (rests[i] + tail.read()).split("\n")
                    for found in filter(None, map(shown.search, lines)):
                        print(f"{job.mark}{found.group()}", flush=True)
                time.sleep(0.1 * running)
        except BaseException:
            for process in processes:
                process.terminate()
            try:
                for process in processes:
                    process.wait()
            except KeyboardInterrupt:
                for process in processes:
                    process.kill()
                raise
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return [process.returncode for process in processes]


def attempt(command: Sequence[str], log: Path, lock: int, done: Callable[[], bool]) -> str:
    """Run a training by :func:`follow`, and return its outcome: ``done`` or ``failed``.

    If it was asked to stop, this process ends as well, with the code for "continue later".

    Args:
        command: see :func:`follow`.
        log: see :func:`follow`.
        lock: of the training's folder. The training inherits it: if this process is killed, the folder stays locked
            while the training lives.
        done: tells whether the training has left its result.
    """
    ours = list(command[:2]) == ["-m", "moco_d2"]
    print(f"  $ {shlex.join(['moco-d2', *command[2:]] if ours else ['python', *command])}", flush=True)
    code = follow(command, log, PROGRESS, pass_fds=[lock])
    if code == 0 and done():
        return "done"
    if code == os.EX_TEMPFAIL:
        print("  stopped as requested, after saving; the same command continues", flush=True)
        sys.exit(code)
    print(f"  failed with code {code}; its log is {log}", flush=True)
    return "failed"


@contextlib.contextmanager
def stop_on_signals(go_on: str = "the same command continues") -> Iterator[None]:
    """End at SIGTERM, SIGUSR1 and Ctrl-C with the code for "continue later"; a followed training saves first.

    A second Ctrl-C ends everything at once.

    Args:
        go_on: what is printed at the end: how to continue.
    """
    asked: list[int] = []

    def leave(signum: int, _frame: object) -> NoReturn:
        asked.append(signum)
        for number in SIGNALS:  # a second signal must not end the wait for the training
            signal.signal(number, signal.SIG_IGN)
        _on_keyboard(signal.default_int_handler)
        if signum == signal.SIGINT:
            with contextlib.suppress(OSError):  # not print(), whose stream may be in use at this moment
                os.write(2, b"\nstopping: a running training saves first; press Ctrl-C again to end at once\n")
        sys.exit(os.EX_TEMPFAIL)

    earlier = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGINT)}
    for number in SIGNALS:
        signal.signal(number, leave)
    _on_keyboard(leave)
    try:
        yield
    except SystemExit:
        if asked:
            print(f"stopped: {go_on}", flush=True)
        raise
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error and end the process."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)

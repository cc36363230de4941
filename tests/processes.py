"""The command line and the scripts: in this process, or in processes of their own where a test needs one."""

import io
import logging
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO

import numpy as np
import torch

__all__ = ["ROOT", "run_ddpm", "run_ddpm_pair", "run_ddpm_process", "run_pair", "run_script"]

ROOT = Path(__file__).parents[1]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@contextmanager
def _as_in_a_process_of_its_own(arguments: list[str], cwd: Path, out: IO[str], err: IO[str]) -> Iterator[None]:
    """What a run changes in its process is put back after it; what it writes and warns of goes to ``out``, ``err``."""
    argv, path, environment = sys.argv, sys.path[:], dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in logging.root.manager.loggerDict)]
    levels = [(logger, logger.level, logger.handlers[:]) for logger in loggers]
    streams = [
        (handler, handler.stream)
        for logger in loggers
        for handler in logger.handlers
        if type(handler) is logging.StreamHandler
    ]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    backends = (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic)
    settings = torch.get_default_dtype(), torch.get_float32_matmul_precision(), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()

    def show(message: Warning | str, category: type[Warning], filename: str, line: int, *_: object) -> None:
        err.write(warnings.formatwarning(message, category, filename, line))

    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings():
            warnings.resetwarnings()
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", category=PendingDeprecationWarning)
            warnings.showwarning = show  # type: ignore[assignment]
            for handler, _ in streams:
                handler.stream = err  # not setStream, which flushes one that may be closed
            sys.argv = arguments
            yield
    finally:
        sys.argv, sys.path[:] = argv, path
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for logger, level, kept in levels:
            logger.setLevel(level)
            logger.handlers[:] = kept
        for handler, stream in streams:
            handler.stream = stream
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = backends
        torch.set_default_dtype(settings[0])
        torch.set_float32_matmul_precision(settings[1])
        torch.set_num_threads(settings[2])
        torch.use_deterministic_algorithms(deterministic)


def _status_of(program: Callable[[], object]) -> int:
    """The exit status that a process would have that runs it."""
    try:
        program()
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def run_ddpm(*arguments: str, expect: int = 0, cwd: Path = ROOT) -> str:
    """Run the command line in this process and return all it printed."""
    from ddpm_lightning.cli import main

    output = io.StringIO()
    with _as_in_a_process_of_its_own(["ddpm", *arguments], cwd, output, output):
        status = _status_of(main)
    assert status == expect, output.getvalue()[-4000:]
    return output.getvalue()


def run_script(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run one of the scripts in this process."""
    path = str(ROOT / "scripts" / name)
    out, err = io.StringIO(), io.StringIO()
    with _as_in_a_process_of_its_own([path, *arguments], ROOT, out, err):
        sys.path.insert(0, str(ROOT / "scripts"))
        status = _status_of(lambda: runpy.run_path(path, run_name="__main__"))
    return subprocess.CompletedProcess([path, *arguments], status, out.getvalue(), err.getvalue())


def run_ddpm_process(*arguments: str, expect: int = 0, cwd: Path = ROOT, **environment: str) -> str:
    """Run the command line in a process of its own, which may start others, and return all that they printed."""
    done = subprocess.run(
        [sys.executable, "-m", "ddpm_lightning", *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == expect, done.stdout[-4000:]
    return done.stdout


def _one_of_a_pair(rank: str, port: int, output: str, program: Callable[..., object], arguments: tuple) -> None:
    """As torchrun starts one of two processes on one machine."""
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(ROOT)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0", "RANK": rank, "LOCAL_RANK": rank}
    torch.set_num_threads(1)
    status = _status_of(lambda: program(*arguments))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    # what else is done at the end of a process belongs to the one that this is a copy of
    os._exit(status)


def run_pair(program: Callable[..., object], *arguments: object) -> str:
    """Run a function of a test module in two processes of one group and return all that they printed.

    The processes are copies of one that has imported torch and Lightning already.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ddpm_lightning.cli"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile("r") as output:
        ranks = [
            context.Process(target=_one_of_a_pair, args=(rank, port, output.name, program, arguments))
            for rank in ("0", "1")
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(240)
            if process.is_alive():
                process.kill()
                process.join()
        printed = output.read()
    assert [process.exitcode for process in ranks] == [0, 0], printed[-8000:]
    return printed


def _main(*arguments: str) -> None:
    from ddpm_lightning.cli import main

    sys.argv = ["ddpm", *arguments]
    main()


def run_ddpm_pair(*arguments: str) -> str:
    """Run the command line in two processes of one group and return all that they printed."""
    return run_pair(_main, *arguments)

"""``ddpm submit``: a run, or another command, as a job of SLURM."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Container, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ddpm_lightning.command_line import call
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.jobs.slurm import MARK, TASK, SlurmJob
from ddpm_lightning.runs import Run

__all__ = ["submit"]

_TRAINERS = ("fit", "validate", "test", "predict", "sample")  # one process for each GPU
_GO_ON = ("fit", "sweep")  # started again, they go on where they were
_SWITCHES = ("go", "dry_run")


def submit(words: Sequence[str], commands: Collection[str], parse: Callable[[list[str]], Any]) -> None:
    """Write the job of a command line, print it, and on demand queue it.

    Args:
        words: ``[COMMAND] [RUN] options``, those of the job among them; without a command it is ``fit``.
        commands: the names of commands.
        parse: reads the words of one of Lightning's commands into its configuration, or raises InputError.

    Raises:
        InputError: options that do not fit together or cannot be read, a script that is not ours to overwrite.
        RunError: ``sbatch`` refused the job.
    """
    own, command = _split(words, commands)
    if not command or command[0] not in commands:
        command = ["fit", *command]
    if command[0] == "submit":
        raise InputError("submit: a job cannot submit jobs")

    def run(job: SlurmJob, script: str | None = None, go: bool = False, dry_run: bool = False) -> None:
        """Write the job script of a run, or of another command, for SLURM.

        ddpm submit -c configs/mnist.yaml --nodes 2 --gpus 4 --time 8:00:00 [any option of fit]
        ddpm submit RUN [options]            go on with a run
        ddpm submit COMMAND ... [options]    a job of another command

        The script is printed and kept; it goes on with the run where this exists.

        Args:
            script: file for the script; by default job.sh in the run's folder, of other commands ddpm-COMMAND.sh here
            go: queue the job: call sbatch
            dry_run: print the script only, write nothing
        """
        _submit(job, *_resolved(command, job, parse), script, go, dry_run)

    call(run, own, "ddpm submit")


def _split(words: Sequence[str], commands: Container[str]) -> tuple[list[str], list[str]]:
    """The words that concern the job, and those of its command."""
    known = {*(field.name for field in fields(SlurmJob)), "script", *_SWITCHES}
    own, command, values = list[str](), list[str](), 0
    for word in words:
        name, equals, _ = word.removeprefix("--").partition("=")
        if word in ("-h", "--help") or (word.startswith("--") and name in known):
            own.append(word)
            values = 0 if equals or name in _SWITCHES else 99 if name in ("sbatch", "setup") else 1
        elif values and not (word.startswith("-") or word in commands or Path(word).is_dir()):
            own.append(word)
            values -= 1
        else:
            command.append(word)
            values = 0
    return own, command


def _resolved(command: list[str], job: SlurmJob, parse: Callable[[list[str]], Any]) -> tuple[list[str], Path | None]:
    """The words of the command as the job runs it, and the run's folder if it trains one."""
    name = command[0]
    if job.array is None and any(TASK in word for word in command):
        raise InputError(f"{TASK} stands for the task of a job array: say which tasks there are, as --array 0-3")
    if name not in _TRAINERS:
        if job.nodes > 1:
            raise InputError(f"--nodes {job.nodes}: {name} is one process, and uses one node")
        return command, None
    for option, instead in (("devices", "--gpus"), ("num_nodes", "--nodes"), ("accelerator", "--gpus")):
        if _value(command, f"--trainer.{option}") is not None:
            raise InputError(f"--trainer.{option} follows from the job: give {instead} instead")
    options = ["--trainer.num_nodes", str(job.nodes), "--trainer.devices", str(max(job.gpus, 1))]
    options += ["--trainer.accelerator", "gpu" if job.gpus else "cpu"]
    if name == "fit":
        if _value(command, "--ckpt_path") not in (None, "last"):
            raise InputError("--ckpt_path: a job goes on from the last checkpoint of its own run: leave it out")
        if job.array is not None and TASK not in (_value(command, "--run_dir") or "".join(command[1:2])):
            raise InputError(f"--array {job.array}: each task needs a run of its own, as --run_dir runs/seed{TASK}")
        options += ["--ckpt_path", "last"]
    config = parse([word.replace(TASK, job.first_task) for word in [*command, *options]])
    if config.trainer.strategy == "auto" and job.processes > 1:
        options += ["--trainer.strategy", "ddp"]
    one_run = name == "fit" and job.array is None
    return [*command, *options], Run(config.run_dir).folder if one_run else None


def _value(words: Sequence[str], option: str) -> str | None:
    """What a command line gives an option, last."""
    pairs = pairwise([part for word in words for part in word.split("=", 1)])
    return next((value for name, value in reversed([*pairs]) if name == option), None)


def _submit(job: SlurmJob, words: list[str], folder: Path | None, script: str | None, go: bool, dry_run: bool) -> None:
    name, here = words[0], Path.cwd()
    if go and dry_run:
        raise InputError("give --go or --dry_run, not both")
    if go and shutil.which("sbatch") is None:
        raise InputError("--go: there is no sbatch here: run it where jobs are submitted")
    path = (
        Path(script).expanduser().absolute() if script else (folder / "job.sh" if folder else here / f"ddpm-{name}.sh")
    )
    log = path.parent / f"{job.job_name}-{'%A_%a' if job.array else '%j'}.log"
    if bad := set(str(path.parent)) & set("%\\\"'#\n"):
        raise InputError(f"SLURM cannot write into a folder with {' '.join(sorted(bad))} in its name: {path.parent}")
    text = job.script(words, sys.executable, here, log, name in _TRAINERS, name in _GO_ON, name == "fit")
    if not dry_run:
        _write(path, text)
    print(f"{text}\n{path}", "not written (--dry_run)" if dry_run else "", flush=True)
    if dry_run:
        return
    if not go:
        print(f"queue it: sbatch {shlex.quote(str(path))}")
    elif status := subprocess.run(["sbatch", str(path)], check=False).returncode:
        raise RunError(f"sbatch ended with status {status}, and no job is queued; its script is {path}")


def _write(path: Path, text: str) -> None:
    try:
        if path.exists() and MARK not in path.read_text(errors="replace"):
            raise InputError(f"--script {path} exists and was not written by ddpm submit: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"--script {path} cannot be written ({error.strerror}): choose another place") from None

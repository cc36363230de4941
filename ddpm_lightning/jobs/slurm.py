"""A job of SLURM: what it asks for, and the script that ``sbatch`` takes."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_lightning.errors import InputError, at_least

__all__ = ["MARK", "TASK", "SlurmJob"]

MARK = "# written by ddpm submit"
"""The second line of each script begins with it."""
TASK = "{task}"
"""Stands for the number of the task of a job array."""

LEAD = 120
_TIME = re.compile(r"\d+(:\d\d?){0,2}|\d+-\d\d?(:\d\d?){0,2}")
_ARRAY = re.compile(r"\d+(-\d+(:[1-9]\d*)?)?(,\d+(-\d+(:[1-9]\d*)?)?)*(%[1-9]\d*)?")
_WORD = re.compile(r"[\w.@:+,/%=-]+")


def _seconds(time: str) -> int:
    """What SLURM reads: minutes, m:s, h:m:s, d-h, d-h:m or d-h:m:s."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    hours, minutes, seconds = ([*parts, 0, 0] if days or len(parts) == 3 else [0, *parts, 0])[:3]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class SlurmJob:
    """What a job asks for.

    Args:
        nodes: number of nodes
        gpus: GPUs of each node, one process for each; 0 for one process on the CPU
        time: time limit, as 8:00:00 or 2-00:00:00; the job saves, is queued again and goes on
        cpus: CPU cores of each process
        mem: memory of each node, as 64G; the cluster's own default if left out
        partition: partition of the cluster
        account: account that pays
        array: tasks of a job array, as 0-3 or 0-9%2; {task} in an option is the task's number
        job_name: name of the job
        sbatch: more options of sbatch, without their dashes, as exclusive mail-type=END
        setup: shell commands to run first, as 'module load cuda'
    """

    nodes: int = 1
    gpus: int = 1
    time: str = "4:00:00"
    cpus: int = 4
    mem: str | None = None
    partition: str | None = None
    account: str | None = None
    array: str | None = None
    job_name: str = "ddpm"
    sbatch: list[str] | None = None
    setup: list[str] | None = None

    def __post_init__(self) -> None:
        at_least(1, nodes=self.nodes, cpus=self.cpus)
        at_least(0, gpus=self.gpus)
        if self.nodes > 1 and self.gpus == 0:
            raise InputError(f"nodes = {self.nodes} need GPUs: a job without any is one process")
        if not _TIME.fullmatch(self.time):
            raise InputError(f"time = {self.time} is no time limit of SLURM: give it as 8:00:00 or 2-00:00:00")
        if _seconds(self.time) <= LEAD:
            raise InputError(f"time = {self.time} is too short: a job saves {LEAD} seconds before its end")
        if self.array is not None and not _ARRAY.fullmatch(self.array):
            raise InputError(f"array = {self.array} names no tasks: give them as 0-3, 1,5,7 or 0-9%2")
        if self.array and any(int(a) > int(b) for a, b in re.findall(r"(\d+)-(\d+)", self.array)):
            raise InputError(f"array = {self.array} goes from more to less: give it as 0-3")
        if self.mem is not None and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            raise InputError(f"mem = {self.mem} is no amount of memory: give it as 64G")
        for what in ("job_name", "mem", "partition", "account"):
            value = getattr(self, what)
            if value is not None and not _WORD.fullmatch(value):
                raise InputError(f"{what} = {value} must be one word of letters, digits and . @ : + , / % = -")
        if self.job_name in ("bash", "interactive"):
            raise InputError(
                f"job_name = {self.job_name} is what Lightning takes for a shell on the cluster: choose another"
            )
        for option in self.sbatch or []:
            if option.startswith("-") or not _WORD.fullmatch(option):
                raise InputError(f"sbatch = {option} must be one word without dashes before it, as mail-type=END")

    @property
    def processes(self) -> int:
        """Number of processes of a training, on all nodes together."""
        return self.nodes * max(self.gpus, 1)

    @property
    def first_task(self) -> str:
        """The number of the array's first task; 0 without an array."""
        return re.split(r"\D", self.array, maxsplit=1)[0] if self.array else "0"

    def script(
        self, words: Sequence[str], python: str, folder: Path, log: Path, several: bool, goes_on: bool, saves: bool
    ) -> str:
        """The script.

        Args:
            words: the words of the ``ddpm`` command that the job is.
            python: the interpreter.
            folder: the working directory.
            log: where the output goes, in SLURM's pattern.
            several: whether the command runs as one process for each GPU, rather than one that has them all.
            goes_on: whether the command, started again, goes on where it was: it is then queued again.
            saves: whether the command sees to that itself when SIGUSR1 comes; otherwise the script does.
        """
        options = {
            "job-name": self.job_name, "nodes": self.nodes, "ntasks-per-node": max(self.gpus, 1) if several else 1,
            "gpus-per-node": self.gpus or None, "cpus-per-task": self.cpus, "mem": self.mem, "time": self.time,
            "partition": self.partition, "account": self.account, "array": self.array,
            "signal": ("" if saves else "B:") + f"USR1@{LEAD}" if goes_on else None,
            "open-mode": "append", "output": shlex.quote(str(log)),
        }  # fmt: skip
        lines = [f"--{name}={value}" for name, value in options.items() if value is not None]
        lines += ["--requeue" if goes_on else "--no-requeue", *(f"--{option}" for option in self.sbatch or [])]
        command = " ".join(["srun --kill-on-bad-exit=1", shlex.quote(python), "-m ddpm_lightning", words[0]])
        body = " \\\n    ".join([command, *(self._quoted(group) for group in _grouped(words[1:]))])
        return "\n".join(
            [
                "#!/usr/bin/env bash",
                f"{MARK}: submit it with sbatch, from any folder",
                *(f"#SBATCH {line}" for line in lines),
                "set -eo pipefail",
                f"cd -- {shlex.quote(str(folder))}",
                # since SLURM 22.05 srun does not take it over from sbatch
                f"export SRUN_CPUS_PER_TASK={self.cpus}",
                *(self.setup or []),
                body if saves or not goes_on else _QUEUED_AGAIN.format(body=body),
                "",
            ]
        )

    def _quoted(self, words: Sequence[str]) -> str:
        """The words for a shell; in a job array ``{task}`` becomes the number of the task."""
        number = '"$SLURM_ARRAY_TASK_ID"'
        if self.array is None:
            return shlex.join(words)
        return " ".join(
            number.join(shlex.quote(part) if part else "" for part in word.split(TASK)) or "''" for word in words
        )


# the shell is told two minutes before the time is up; requeueing ends the job, with SIGTERM first
_QUEUED_AGAIN = """trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
{body} &
status=0
wait "$!" || status=$?
if [ "$status" -eq 138 ]; then
    wait "$!" || status=$?
fi
exit "$status\""""


def _grouped(words: Sequence[str]) -> list[list[str]]:
    """Each option with its values."""
    groups: list[list[str]] = []
    for word in words:
        if not groups or word.startswith("-"):
            groups.append([])
        groups[-1].append(word)
    return groups

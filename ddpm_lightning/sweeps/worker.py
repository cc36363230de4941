"""Workers of a sweep: each takes one trial after the other until none is left."""

import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import torch
from optuna.trial import TrialState

from ddpm_lightning.errors import RunError
from ddpm_lightning.sweeps.definition import Definition
from ddpm_lightning.sweeps.report import report, rows_of, short_names, write_hparams
from ddpm_lightning.sweeps.space import shown
from ddpm_lightning.sweeps.study import Claim, Trials, folder_of, turn
from ddpm_lightning.sweeps.trial import Fit, NoSuchValue, Outcome, Target, Watch, train

__all__ = ["WORKER", "work", "work_together"]

WORKER = "DDPM_SWEEP_WORKER"
"""Set in the processes that ``--workers`` starts: they end when their parent does, and leave the table to it."""

_SAME_FAILURES = 3


def work(definition: Definition, target: Target, fit: Fit) -> None:
    """Work on trials until there is none left."""
    is_worker = bool(os.environ.get(WORKER))
    if is_worker:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    trials = Trials(definition)
    while (claim := trials.claim(definition.trials)) is not None:
        with claim.lock:
            _work_on(claim, trials, target, fit)
        _stop_if_all_fail(trials)
    if not is_worker:
        _show(trials, target)


def _work_on(claim: Claim, trials: Trials, target: Target, fit: Fit) -> None:
    definition, number = trials.definition, claim.number
    folder = folder_of(definition.run_dir, number)
    say = partial(print, file=sys.stdout, flush=True)  # the trial's own output goes into its folder
    names = short_names(definition.space)
    values = ", ".join(f"{names[name]} {shown(value)}" for name, value in claim.values.items())
    say(f"trial {number}{'' if claim.is_new else ' goes on'}: {values}")
    watch = Watch(claim.trial, target, say)
    words = definition.trial(claim.values, folder, definition.run_dir)
    try:
        outcome = train(fit, words, folder, watch)
    except NoSuchValue as error:
        _end(claim, trials, Outcome("failed", reason=str(error)), target)
        raise
    except (SystemExit, KeyboardInterrupt):
        say(f"trial {number} is left unfinished: ddpm sweep {definition.run_dir} goes on with it")
        raise
    _end(claim, trials, outcome, target)
    ended, goal = len(trials.ended()), max(definition.trials, len(trials.all()))
    value = "" if outcome.value is None else f"{target.monitor} {outcome.value:.4f}"
    how = f"failed: {outcome.reason}" if outcome.state == "failed" else f"{outcome.state}, {value}"
    say(f"trial {number} {how}; {ended} of {goal} ended")


def _end(claim: Claim, trials: Trials, outcome: Outcome, target: Target) -> None:
    """Write down how a trial ended, and the results so far."""
    with turn(trials.folder):
        if outcome.reason:
            claim.trial.set_user_attr("reason", outcome.reason)
        row = next(row for row in rows_of(trials) if row.number == claim.number)
        write_hparams(trials.definition, replace(row, state=outcome.state), target)
        state = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[outcome.state]
        trials.study.tell(claim.trial, outcome.value if outcome.state == "complete" else None, state=state)
        report(trials, target)


def _stop_if_all_fail(trials: Trials) -> None:
    ended = trials.ended()
    reasons = [each.user_attrs.get("reason") for each in ended]
    # numbers and paths differ from trial to trial
    kinds = {re.sub(r"/\S+|[-+.\d]+", "#", reason or f"none {number}") for number, reason in enumerate(reasons)}
    if len(reasons) >= _SAME_FAILURES and all(reasons) and len(kinds) == 1:
        raise RunError(f"all {len(reasons)} trials failed in the same way, and no more are tried: {reasons[-1]}")


def _show(trials: Trials, target: Target, is_last: bool = True) -> None:
    """Print the results; RunError if there is none, and no other error follows."""
    with turn(trials.folder):
        print(report(trials, target), flush=True)
    if is_last and not trials.ended(TrialState.COMPLETE) and trials.ended():
        raise RunError(f"no trial of {trials.folder} is complete")


def work_together(definition: Definition, target: Target, workers: int) -> None:
    """Start processes that work on the trials, wait for them, and show the results."""
    command = [sys.executable, "-m", "ddpm_lightning", "sweep", str(definition.run_dir)]
    command += ["--trials", str(definition.trials)]
    # a worker ends when its standard input is closed
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, **_environment(number, workers)})
        for number in range(workers)
    ]
    try:
        statuses = [process.wait() for process in started]
    except KeyboardInterrupt:
        for process in started:  # the terminal has interrupted them, too
            process.wait()
        raise
    trials = Trials(definition)
    _show(trials, target, is_last=not any(statuses))
    if any(statuses):
        left = max(definition.trials, len(trials.all())) - len(trials.ended())
        goes_on = f", and {left} trials are left: ddpm sweep {definition.run_dir} goes on with them" if left else ""
        raise RunError(f"workers ended with status {', '.join(map(str, statuses))}{goes_on}")


def _environment(number: int, workers: int) -> dict[str, str]:
    """Variables of a worker: its share of the cores, and one of the GPUs."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    variables = {WORKER: str(number), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    gpus = visible.split(",") if visible else [str(k) for k in range(torch.cuda.device_count())]
    return variables | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})


def _end_with_parent() -> None:
    """Ask this process to stop, as a scheduler would, once its parent has ended, however it ended."""
    os.read(0, 1)  # not sys.stdin, which the interpreter could not close at its end while it is being read
    os.kill(os.getpid(), signal.SIGTERM)

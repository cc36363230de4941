"""The trials of a sweep in their storage, shared by all workers: which is next, whose worker died, how each ended."""

import fcntl
import itertools
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState

from ddpm_lightning.errors import InputError
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.lock import hold
from ddpm_lightning.sweeps.definition import Definition

__all__ = ["STORAGE", "Claim", "Trials", "folder_of", "turn"]

STORAGE = "sweep.db"
_NAME = "sweep"
_LOCK = ".trial.lock"
_STARTS = 3
"""So often a trial whose worker dies is begun without getting on, before it counts as failed."""

optuna.logging.set_verbosity(optuna.logging.ERROR)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One worker at a time: wait for the others' turns in the folder of a sweep to end."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".turn.lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_of(sweep: Path, number: int) -> Path:
    """The run of a trial."""
    return sweep / f"trial_{number:03d}"


@dataclass
class Claim:
    """A trial that this worker works on, until ``release`` is called or the process ends.

    Attributes:
        trial: an optuna.Trial.
        values: of the options, by name.
        is_new: whether no worker has begun with the trial before.
        lock: what is held.
    """

    trial: Any
    values: dict[str, Any]
    is_new: bool
    lock: ExitStack

    @property
    def number(self) -> int:
        return int(self.trial.number)


class Trials:
    """The study of a sweep, in SQLite, with a folder for each trial.

    A trial in progress is told from one whose worker was killed by a lock on its folder, which the kernel releases when
    the worker ends, however it ends.

    Args:
        definition: of the sweep.
        direction: minimize or maximize; needed for a new study.

    Raises:
        InputError: there is no study yet and no direction, or the storage is damaged.
    """

    def __init__(self, definition: Definition, direction: Literal["minimize", "maximize"] | None = None) -> None:
        self.definition, self.folder = definition, definition.run_dir
        path = self.folder / STORAGE
        if direction is None and not path.is_file():
            raise InputError(f"{self.folder} holds no sweep: there is no {STORAGE}")
        # SQLite's own wait for another worker's write, in seconds
        patience = {"connect_args": {"timeout": 120}}
        try:
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs=patience)
            if direction is None:
                self.study = optuna.load_study(study_name=_NAME, storage=storage)
            else:
                self.study = optuna.create_study(
                    storage=storage, study_name=_NAME, direction=direction, load_if_exists=True
                )
        except Exception as error:
            raise InputError(f"{path} is no storage of a sweep: {' '.join(str(error).split())[:200]}") from error
        self.study.pruner = _pruner(definition)

    def enqueue_grid(self) -> None:
        """Lay out all points of a grid as trials that wait."""
        axes = {name: option.points(name) for name, option in self.definition.space.items()}
        for values in itertools.product(*axes.values()):
            self.study.enqueue_trial(dict(zip(axes, values, strict=True)), skip_if_exists=True)

    def all(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)

    def begun(self) -> list[FrozenTrial]:
        """Trials that have values, by number."""
        return [each for each in self.all() if each.state != TrialState.WAITING]

    def ended(self, *states: TrialState) -> list[FrozenTrial]:
        """Trials in these states; in any that ends a trial if none is named."""
        return [each for each in self.all() if (each.state in states if states else each.state.is_finished())]

    def claim(self, goal: int) -> Claim | None:
        """A trial whose worker died, else a new one if there are fewer than ``goal``, else None."""
        with turn(self.folder):
            trials = self.all()
            for each in trials:
                if each.state == TrialState.RUNNING and (lock := self._lock(each.number)):
                    trial = optuna.trial.Trial(self.study, each._trial_id)
                    if self._gets_on(trial, len(each.intermediate_values)):
                        return self._claimed(trial, False, lock)
                    self.study.tell(trial, state=TrialState.FAIL)
                    lock.close()
            waiting = any(each.state == TrialState.WAITING for each in trials)
            if not waiting and (len(trials) >= goal or self.definition.sampler == "grid"):
                return None
            trial = self.study.ask()
            lock = self._lock(trial.number)
            assert lock is not None  # the number is new
            return self._claimed(trial, True, lock)

    def _claimed(self, trial: Any, is_new: bool, lock: ExitStack) -> Claim:
        self.study.sampler = _sampler(self.definition, trial.number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = {name: option.suggested(trial, name) for name, option in self.definition.space.items()}
        return Claim(trial, values, is_new, lock)

    def _lock(self, number: int) -> ExitStack | None:
        stack = ExitStack()
        try:
            stack.enter_context(hold(folder_of(self.folder, number) / _LOCK, "is worked on"))
        except InputError:
            return None
        return stack

    def _gets_on(self, trial: Any, validations: int) -> bool:
        """Whether a trial that was begun before may be begun again."""
        checkpoint = Run(folder_of(self.folder, trial.number)).newest_checkpoint()
        reached = [validations, checkpoint.stat().st_mtime if checkpoint else 0]
        starts = trial.user_attrs.get("starts", 1) + 1 if reached == trial.user_attrs.get("reached") else 1
        trial.set_user_attr("reached", reached)
        trial.set_user_attr("starts", starts)
        if starts > _STARTS:
            reason = f"its worker was killed {starts} times before the trial got on: the memory may be full"
            trial.set_user_attr("reason", reason)
        return starts <= _STARTS


def _sampler(definition: Definition, number: int) -> Any:
    """Another seed for each trial: two workers with one seed would make the same choices."""
    seed = int(np.random.SeedSequence([definition.seed, number]).generate_state(1)[0])
    if definition.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    return optuna.samplers.RandomSampler(seed=seed)


def _pruner(definition: Definition) -> Any:
    after, first = definition.prune_after, definition.prune_from
    if definition.pruner == "median":
        # steps are validations, counted from 1; a trial is never stopped at step n_warmup_steps or before
        return optuna.pruners.MedianPruner(n_startup_trials=after, n_warmup_steps=first)
    if definition.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=first, min_early_stopping_rate=0)
    return optuna.pruners.NopPruner()

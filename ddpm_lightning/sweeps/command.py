"""``ddpm sweep``: reads what is asked for, tries it before anything is trained, and sets workers to work."""

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

from ddpm_lightning.command_line import call
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.runs import Run
from ddpm_lightning.sweeps.definition import FILE, Definition
from ddpm_lightning.sweeps.space import word
from ddpm_lightning.sweeps.trial import Fit, Target, target_of
from ddpm_lightning.training.optimization import make_optimizer

__all__ = ["run_sweep", "split_words"]

_OWN = ("--trials", "--workers")


def run_sweep(words: list[str], fit: Fit, build: Fit) -> None:
    """Run ``ddpm sweep`` with the words after it.

    Args:
        words: the file or the folder, options of the sweep, and options of ``fit`` for all trials.
        fit: runs a training (``sweeps/trial.py``).
        build: the same, but stops before the training.

    Raises:
        InputError: something that does not fit, said before any trial starts.
        RunError: all trials fail in the same way, or a worker was killed.
    """
    own, options = split_words(words)

    def sweep(run: str, trials: int | None = None, workers: int = 1) -> None:
        """Train with many options, and find the best. Any option of ddpm fit, given here, is shared by all trials.

        The file names a configuration and the options to try:

          config: configs/quickstart.yaml
          run_dir: sweeps/lr
          trials: 12
          space:
            model.optimizer.lr: {low: 1.0e-3, high: 3.0e-2, log: true}
            model.schedule: [CosineChain, LinearGamma]
            model.network.width: {low: 16, high: 48, step: 16}

        Each trial is a run, RUN_DIR/trial_007. What was killed goes on with the same command, or with ddpm sweep
        RUN_DIR. The same command started twice shares the trials, on one machine or on many. Results are trials.csv
        and trials.png in the folder. More: docs/sweeps.md

        Args:
            run: the file of a sweep, or the folder of one that has begun
            trials: number of trainings in all
            workers: processes on this machine
        """
        at_least(1, trials=1 if trials is None else trials, workers=workers)
        if find_spec("optuna") is None:
            raise InputError("ddpm sweep needs the package optuna: pip install 'ddpm-lightning[sweep]'")
        definition, target = _begun(Path(run).expanduser(), options, trials, build)
        from ddpm_lightning.sweeps.worker import work, work_together

        if workers > 1:
            work_together(definition, target, workers)
        else:
            work(definition, target, fit)

    call(sweep, own, "ddpm sweep")


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of a sweep itself, and those of ``fit``."""
    own: list[str] = []
    others: list[str] = []
    for before, each in pairwise(["", *words]):
        is_first = not own and not others and not each.startswith("-")
        ours = each.partition("=")[0] in (*_OWN, "--help", "-h") or before in _OWN or is_first
        (own if ours else others).append(each)
    return own, others


def _begun(path: Path, words: list[str], trials: int | None, build: Fit) -> tuple[Definition, Target]:
    """The sweep, begun: its folder, its storage and what trials are compared by."""
    from ddpm_lightning.sweeps.study import Trials, turn

    if path.is_dir():
        if not (path / FILE).is_file():
            raise InputError(f"{path} holds no sweep: there is no {FILE}")
        if words:
            raise InputError(
                f"{words[0]}: a sweep that has begun keeps its options; start another with another run_dir"
            )
        asked = Definition.read(path / FILE, [], path)
    else:
        asked = Definition.read(path, words)
    folder = asked.run_dir
    target = None if (folder / FILE).is_file() else _tried(asked, build)
    if Run(folder).config_path.is_file():
        raise InputError(f"{folder} holds a run: choose another run_dir for the sweep")
    Run(folder).make()
    with turn(folder):
        definition = Definition(**{**vars(asked), "trials": trials or asked.trials})
        has_begun = (folder / FILE).is_file()
        if has_begun:
            kept = Definition.read(folder / FILE, [], folder)
            if other := kept.differs(asked):
                raise InputError(
                    f"{folder} already holds a sweep whose {other} is another: go on with it by ddpm sweep {folder}, "
                    "or choose another run_dir"
                )
            definition = Definition(**{**vars(kept), "trials": trials or kept.trials})
        study = Trials(definition, None if has_begun or target is None else target.direction)
        if target is not None and not has_begun:
            if definition.sampler == "grid":
                study.enqueue_grid()
            study.study.set_user_attr("mode", target.mode)
            study.study.set_user_attr("monitor", target.monitor)
        definition.save()  # at last: a sweep has begun once the file is there
        known = study.study.user_attrs
    return definition, Target(known["monitor"], known["mode"])


def _tried(definition: Definition, build: Fit) -> Target:
    """What trials are compared by; each value of a list and each end of a range is tried, without training.

    Raises:
        InputError: what the command line says of a value, with the values that were tried.
    """
    corners = {name: option.corners() for name, option in definition.space.items()}
    target: Target | None = None
    for k in range(max(map(len, corners.values()))):
        values = {name: each[k % len(each)] for name, each in corners.items()}
        shown = " ".join(f"--{name} {word(value)}" for name, value in values.items())
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
            definition.write_configs(folder)
            words = definition.trial(values, Path(folder) / "run", Path(folder))
            try:
                built = build(words)
                make_optimizer(built.model.optimizer_factory, built.model.model.parameters())
            except InputError as error:
                raise InputError(f"{error} (tried: {shown})") from error
        if built.trainer.world_size > 1:
            raise InputError("a trial trains on one device: leave out --trainer.devices, --trainer.num_nodes, torchrun")
        target = target_of(built.trainer, definition.monitor, definition.mode)
    assert target is not None
    return target

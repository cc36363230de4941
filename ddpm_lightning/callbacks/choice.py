"""Which callbacks a command runs with: the configuration's, but for those that an option of the Trainer rules out."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    Checkpoint,
    LearningRateMonitor,
    ModelSummary,
    ProgressBar,
    RichProgressBar,
    TQDMProgressBar,
)

from ddpm_lightning.callbacks.finite import StopOnNonFinite
from ddpm_lightning.callbacks.progress import EpochLines
from ddpm_lightning.callbacks.reports import BoundTable, ImageTermsWriter

__all__ = ["choose_callbacks"]


def choose_callbacks(
    command: str, options: Mapping[str, Any], configured: Sequence[Callback] | Callback | None, terminal: bool
) -> tuple[list[Callback], dict[str, Any]]:
    """The callbacks of a command, and the options of the Trainer that follow from what is asked for.

    Lightning refuses a callback that an option switches off. Here the option wins: the callback may come from a
    configuration that another one extends.

    Args:
        command: fit, validate, test, predict or sample.
        options: the Trainer's.
        configured: the callbacks of the configuration.
        terminal: progress is shown on a terminal, where a bar can be drawn.
    """
    configured = [configured] if isinstance(configured, Callback) else configured or []
    barebones = bool(options.get("barebones"))
    bar_asked_for = options.get("enable_progress_bar")
    bars = [callback for callback in configured if isinstance(callback, ProgressBar)]
    # sampling shows its own progress
    if barebones or bar_asked_for is False or command == "sample":
        bars = []
    elif not bars and (terminal or bar_asked_for):
        bars = [RichProgressBar(leave=False) if terminal else TQDMProgressBar()]
    left_out: list[type[Callback]] = [ProgressBar]
    if barebones or options.get("enable_checkpointing") is False:
        left_out.append(Checkpoint)
    if barebones or options.get("logger") is False:
        left_out.append(LearningRateMonitor)
    if barebones or options.get("enable_model_summary") is False:
        left_out.append(ModelSummary)
    callbacks = [callback for callback in configured if not isinstance(callback, tuple(left_out))] + bars[-1:]
    if command != "sample":  # which has no terms of the bound to report
        callbacks += [BoundTable(), ImageTermsWriter(), *([] if bars else [EpochLines()])]
    if command == "fit":
        callbacks.append(StopOnNonFinite())
    follow: dict[str, Any] = {"enable_progress_bar": bool(bars)}
    if barebones:  # the same for options: Lightning refuses those that it rules out
        follow |= dict.fromkeys(("enable_checkpointing", "logger", "enable_model_summary"), False)
        follow |= {"num_sanity_val_steps": 0, "log_every_n_steps": 0}
    return callbacks, follow

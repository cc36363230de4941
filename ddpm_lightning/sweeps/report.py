"""The results of a sweep: a table, a figure, TensorBoard's HPARAMS, and the best trial as a command line."""

import csv
import io
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from ddpm_lightning.callbacks.publishing import hparams_of
from ddpm_lightning.figures import drawn
from ddpm_lightning.runs import Run
from ddpm_lightning.sweeps.definition import Definition
from ddpm_lightning.sweeps.space import Option, Range, shown, word
from ddpm_lightning.sweeps.study import Trials, folder_of
from ddpm_lightning.sweeps.trial import Target

__all__ = ["Row", "best_of", "figure", "report", "rows_of", "short_names", "write_hparams"]

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "unfinished"}
_COLOURS = {"complete": "tab:blue", "pruned": "tab:gray", "unfinished": "tab:gray"}
_SHOWN = 30


@dataclass(frozen=True)
class Row:
    """A trial: its best value so far, the number of its validations, and why it failed, if it did."""

    number: int
    state: str
    value: float | None
    validations: int
    step: int
    seconds: float
    values: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def rows_of(trials: Trials) -> list[Row]:
    """All trials, by number."""
    rows = []
    for each in trials.begun():
        known, steps = each.user_attrs, each.user_attrs.get("steps", {})
        step = max(steps.values(), default=0)
        row = each.number, _STATES[each.state.name], known.get("best"), len(steps), step, known.get("seconds", 0.0)
        rows.append(Row(*row, dict(each.params), known.get("reason", "")))
    return rows


def best_of(rows: Sequence[Row], target: Target) -> Row | None:
    """The complete trial of the best value, if any is complete."""
    best: Row | None = None
    for row in rows:
        if (
            row.state == "complete"
            and row.value is not None
            and target.better(row.value, None if best is None else best.value)
        ):
            best = row
    return best


def short_names(space: Mapping[str, Option]) -> dict[str, str]:
    """Options by their last words, with as many words as tell them apart."""
    short = {}
    for name in space:
        parts = name.replace(".init_args.", ".").split(".")
        others = [other.replace(".init_args.", ".").split(".") for other in space if other != name]
        count = 1
        while count < len(parts) and any(other[-count:] == parts[-count:] for other in others):
            count += 1
        short[name] = ".".join(parts[-count:])
    return short


def report(trials: Trials, target: Target) -> str:
    """Write FOLDER/trials.csv and trials.png, and return the table and the best trial as text.

    The caller has its turn: two workers would write the same files.
    """
    definition, rows = trials.definition, rows_of(trials)
    run = Run(definition.run_dir)
    run.write("trials.csv", _csv(rows, definition, target))
    if any(row.value is not None for row in rows):
        run.write("trials.png", figure(rows, definition.space, target))
    return "\n".join([*_table(rows, definition, target), "", *_best(rows, definition, target)])


def _csv(rows: Sequence[Row], definition: Definition, target: Target) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["trial", "state", target.monitor, "validations", "step", "seconds", *definition.space, "reason", "folder"]
    )
    for row in rows:
        value = "" if row.value is None else repr(row.value)
        values = [word(row.values[name]) if name in row.values else "" for name in definition.space]
        folder = folder_of(definition.run_dir, row.number).name
        writer.writerow(
            [row.number, row.state, value, row.validations, row.step, f"{row.seconds:.1f}", *values, row.reason, folder]
        )
    return text.getvalue()


def _table(rows: Sequence[Row], definition: Definition, target: Target) -> list[str]:
    """The trials as text, the best first."""
    names = short_names(definition.space)
    sign = 1 if target.mode == "min" else -1
    order = ["complete", "pruned", "unfinished", "failed"]
    ranked = sorted(rows, key=lambda row: (order.index(row.state), row.value is None, sign * (row.value or 0)))
    cells = [["trial", "state", target.monitor, "validations", "seconds", *names.values()]]
    for row in ranked[:_SHOWN]:
        value = "" if row.value is None else f"{row.value:.4f}"
        values = [shown(row.values.get(name)) for name in names]
        cells.append([str(row.number), row.state, value, str(row.validations), f"{row.seconds:.0f}", *values])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    if len(rows) > _SHOWN:
        lines.append(f"and {len(rows) - _SHOWN} more in trials.csv")
    return lines + [f"trial {row.number} failed: {row.reason}" for row in rows if row.state == "failed"][:5]


def _best(rows: Sequence[Row], definition: Definition, target: Target) -> list[str]:
    best, folder = best_of(rows, target), _near(definition.run_dir)
    counts = {state: sum(row.state == state for row in rows) for state in ("complete", "pruned", "failed")}
    said = ", ".join(f"{count} {state}" for state, count in counts.items() if count or state == "complete")
    drawn_too = f", the figure {folder}/trials.png" if any(row.value is not None for row in rows) else ""
    lines = [f"{said}; the table is {folder}/trials.csv{drawn_too}"]
    if best is not None:
        command = definition.command(best.values, "runs/best", folder)
        lines += [f"best: trial {best.number}, {target.monitor} {best.value:.4f}", f"  ddpm {shlex.join(command)}"]
    return lines


def _near(path: Path) -> str:
    """A path from the current folder, if it lies within it."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def figure(rows: Sequence[Row], space: Mapping[str, Option], target: Target) -> Tensor:
    """The value of each trial against each option, as a picture: complete trials filled, others hollow, the best a
    star."""
    columns = min(3, len(space))
    lines = -(-len(space) // columns)
    canvas = Figure(figsize=(4.2 * columns, 3.4 * lines), layout="constrained")
    axes = canvas.subplots(lines, columns, squeeze=False).flatten()
    best, names = best_of(rows, target), short_names(space)
    for panel, (name, option) in zip(axes, space.items(), strict=False):
        ticks = None if isinstance(option, Range) else [shown(value) for value in option.values]
        for state, colour in _COLOURS.items():
            some = [row for row in rows if row.state == state and row.value is not None and name in row.values]
            at = [_place(row.values[name], option) for row in some]
            filled = colour if state == "complete" else "none"
            panel.scatter(at, [row.value for row in some], s=28, facecolors=filled, edgecolors=colour, label=state)
        if best is not None:
            panel.scatter(
                [_place(best.values[name], option)], [best.value], s=160, marker="*", c="tab:red", label="best"
            )
        if ticks is not None:
            panel.set_xticks(range(len(ticks)), ticks, rotation=20 if max(map(len, ticks)) > 9 else 0)
            panel.set_xlim(-0.5, len(ticks) - 0.5)
        elif isinstance(option, Range) and option.log:
            panel.set_xscale("log")
        panel.set_xlabel(names[name])
    for row_of_axes in range(lines):
        axes[row_of_axes * columns].set_ylabel(target.monitor)
    for panel in axes[len(space) :]:
        panel.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    kept = [pair for pair in zip(handles, labels, strict=True) if len(pair[0].get_offsets())]
    axes[0].legend(*zip(*kept, strict=True), frameon=False, fontsize="small")
    return drawn(canvas)


def _place(value: Any, option: Option) -> float:
    return float(value) if isinstance(option, Range) else float(option.values.index(value))


def write_hparams(definition: Definition, row: Row, target: Target) -> None:
    """Write a trial's options and its final value for TensorBoard's page HPARAMS, into FOLDER/hparams/trial_NNN."""
    from torch.utils.tensorboard.writer import SummaryWriter

    folder = definition.run_dir / "hparams" / folder_of(definition.run_dir, row.number).name
    shutil.rmtree(folder, ignore_errors=True)  # of a worker that was killed just here
    with SummaryWriter(str(folder)) as writer:
        events = writer._get_file_writer()
        value = {} if row.value is None else {target.monitor: row.value}
        for summary in hparams_of({**row.values, "state": row.state}, value):
            events.add_summary(summary, row.step)
        for name, number in value.items():
            writer.add_scalar(name, number, row.step)

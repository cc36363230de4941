"""What a model is told of each row of the data, and what stands for nothing."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, expand_to, rand
from ddpm_lightning.training.checks import check_part

__all__ = ["chosen_conditions", "drop_conditions"]


def chosen_conditions(
    wanted: Mapping[str, bool], sizes: Mapping[str, int | None], label_dropout: float
) -> dict[str, int]:
    """The conditions that are wanted, of ``label``, ``vector`` and ``field``, with their sizes: number of classes,
    numbers of the vector, channels of the field.

    Raises:
        InputError: conditions that the data do not have, a dropout outside [0, 1) or without conditions.
    """
    check_part("label_dropout", label_dropout)
    chosen = {}
    for name in [name for name, asked in wanted.items() if asked]:
        size = sizes[name]
        if size is None and name == "label":
            raise InputError(
                "--model.class_conditional true: the data have no classes (num_classes is null); of fields name their "
                "array with --data.label"
            )
        if size is None:
            raise InputError(
                f"--model.{name}_conditional true: the data have no {name}; name one with --data.{name}"
                + (", or give a lattice system a list of couplings" if name == "vector" else "")
            )
        chosen[name] = size
    if label_dropout > 0 and not chosen:
        raise InputError(f"--model.label_dropout {label_dropout:g} needs --model.class_conditional true")
    return chosen


def drop_conditions(
    cond: dict[str, Tensor], probability: float, num_classes: int | None, generator: Generators
) -> dict[str, Tensor]:
    """All conditions of a row replaced by none with a probability: a label by ``num_classes``, numbers by NaN. With
    probability 0 nothing is drawn."""
    if probability == 0:
        return cond
    dropped = rand(next(iter(cond.values())), generator) < probability
    nothing = {"label": cast(int, num_classes)}
    return {
        name: torch.where(expand_to(dropped, value), nothing.get(name, torch.nan), value)
        for name, value in cond.items()
    }

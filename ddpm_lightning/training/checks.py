"""What is refused before training or with a checkpoint, in one sentence that says what to do."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ElboEstimator
from ddpm_lightning.process import Decoder, DiffusionModel, ReverseVariance, TimeConditioning

__all__ = [
    "check_bounds",
    "check_finite",
    "check_network",
    "check_options",
    "check_schedule",
    "check_state",
    "is_finite",
    "is_plain_tensor",
    "schedule_marks",
]


def check_options(
    decoder: Decoder,
    levels: int,
    ema_decay: float,
    class_conditional: bool,
    num_classes: int | None,
    label_dropout: float,
) -> None:
    """Refuse numbers of a module that make no sense, or do not go together.

    Raises:
        InputError: naming the option.
    """
    if decoder.levels != levels:
        raise InputError(
            f"the decoder is made for {decoder.levels} grey levels and the data have {levels}: "
            f"set --model.decoder.init_args.levels to {levels}, or leave it out and it follows the data"
        )
    if not 0 <= ema_decay < 1:
        raise InputError(f"--model.ema_decay {ema_decay:g} must lie in [0, 1)")
    if class_conditional and num_classes is None:
        raise InputError("a class-conditional model needs to know how many classes there are: num_classes")
    if not 0 <= label_dropout < 1:
        raise InputError(f"--model.label_dropout {label_dropout:g} must lie in [0, 1)")
    if label_dropout > 0 and not class_conditional:
        raise InputError(f"--model.label_dropout {label_dropout:g} needs --model.class_conditional true")


def check_network(
    network: nn.Module, variance: ReverseVariance, shape: tuple[int, ...], last_label: int | None
) -> None:
    """Evaluate the network once, on zeros.

    Args:
        network: ``network(x, c, **cond)``.
        variance: says how many images' worth of channels it must return.
        shape: (C, H, W) of the images.
        last_label: the largest ``label`` that it will be given; None for none.

    Raises:
        InputError: it does not take images of ``shape``, or returns another one than it must.
    """
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # in half precision Lightning changes torch's default type while it has the module make its parts
    x = torch.zeros(2, *shape, device=device, dtype=torch.float32)
    cond = {} if last_label is None else {"label": torch.tensor([0, last_label], device=device)}
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            output = network(x, x.new_full((2,), 0.5), **cond)
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        labels = f" with labels from 0 to {last_label}" if cond else ""
        raise InputError(
            f"{type(network).__name__} cannot take the data's images of shape {list(shape)} "
            f"(channels, height, width){labels}: {error}"
        ) from error
    finally:
        network.train(training)
    channels, *size = shape
    expected = [variance.network_outputs * channels, *size]
    if list(output.shape) != [len(x), *expected]:
        raise InputError(
            f"{type(network).__name__} returns {list(output.shape[1:])} for images of shape {list(shape)}: "
            f"under {type(variance).__name__} it must return {expected}; "
            f"set --model.network.init_args.out_channels {expected[0]} where it has that option"
        )


def check_bounds(model: DiffusionModel, bounds: Mapping[str, Sequence[ElboEstimator]]) -> None:
    """Make every chain that an estimator asks for now, not after hours of training.

    Args:
        model: the generative model.
        bounds: estimators by stage, ``val`` and ``test``.

    Raises:
        InputError: a form named twice in a stage, or a chain with too few states.
    """
    for option, stage in (("validation_bounds", "val"), ("test_bounds", "test")):
        names = [estimator.name for estimator in bounds[stage]]
        if len(set(names)) < len(names):
            raise InputError(f"--model.{option} names a form of the bound twice: {', '.join(names)}")
        for estimator in bounds[stage]:
            try:
                model.with_steps(model.T if estimator.T is None else estimator.T)
            except InputError as error:
                raise InputError(f"--model.{option}, the {estimator.name} form: {error}") from error


def check_state(network: str, mine: Mapping[str, Tensor], theirs: Mapping[str, Any], strict: bool = True) -> None:
    """Compare a module's tensors with a checkpoint's.

    Args:
        network: the network's name, for the message.
        mine: the module's state dict.
        theirs: the checkpoint's.
        strict: False lets tensors be missing or left over.

    Raises:
        InputError: a tensor is of another shape or type or, if ``strict``, missing or left over.
    """
    for name in [*mine, *theirs] if strict else [name for name in mine if name in theirs]:
        if name not in theirs:
            difference = f"it lacks {name}"
        elif name not in mine:
            difference = f"it has {name}, which this model lacks"
        elif not is_plain_tensor(theirs[name]):
            difference = f"{name} is no plain tensor there"
        elif theirs[name].shape != mine[name].shape:
            difference = f"{name} is {list(theirs[name].shape)} there and {list(mine[name].shape)} here"
        elif _kind_of_number(theirs[name]) != _kind_of_number(mine[name]):
            difference = f"{name} is {theirs[name].dtype} there and {mine[name].dtype} here"
        else:
            continue
        raise InputError(
            f"the checkpoint is of another architecture than this {network}: "
            f"{difference}. Use the configuration that was saved beside it: -c RUN/config.yaml"
        )


def check_finite(mine: Mapping[str, Tensor], theirs: Mapping[str, Any]) -> None:
    """Refuse weights of a training that diverged.

    Args:
        mine: the module's state dict.
        theirs: the checkpoint's; what does not fit is left to :func:`check_state`.

    Raises:
        InputError: a tensor holds a NaN or an infinity, and the module's own does not.
    """
    for name, value in theirs.items():
        fits = name in mine and is_plain_tensor(value) and value.shape == mine[name].shape
        if fits and not is_finite(value) and is_finite(mine[name]):
            raise InputError(
                f"the checkpoint's weights are not finite (NaN or infinity, in {name}): take another checkpoint"
            )


def is_finite(value: Tensor) -> bool:
    """Whether all of a tensor's values are numbers, and finite."""
    return bool(value.isfinite().all())


def is_plain_tensor(value: Any) -> bool:
    """Whether a checkpoint's value is a tensor like a model's: dense, with its values in memory."""
    # a sparse, quantised or "meta" tensor could be copied into weights, and would leave nonsense there
    return isinstance(value, Tensor) and value.layout == torch.strided and not (value.is_meta or value.is_quantized)


def _kind_of_number(value: Tensor) -> tuple[bool, bool, bool]:
    return value.is_floating_point(), value.is_complex(), value.dtype == torch.bool


def schedule_marks(model: DiffusionModel) -> dict[str, Any]:
    """What a checkpoint notes of its schedule, as plain data: its name, T, and gamma at ten times."""
    schedule = model.schedule
    device = next((p.device for p in schedule.parameters()), torch.device("cpu"))
    t = torch.linspace(0.1, 1, 10, dtype=torch.float64, device=device)
    with torch.no_grad():
        return {"name": type(schedule).__name__, "T": schedule.T, "gamma": schedule.gamma(t).tolist()}


def check_schedule(model: DiffusionModel, theirs: Mapping[str, Any]) -> None:
    """A network that is told gamma may be evaluated under another schedule, one that is told the time may not.

    Args:
        model: the generative model.
        theirs: ``schedule_marks`` of the model that the checkpoint was written for.

    Raises:
        InputError: another schedule, for a network that is told the time.
    """
    if model.schedule.is_learned or not isinstance(model.denoiser.conditioning, TimeConditioning):
        return
    mine = schedule_marks(model)
    gamma: Any = theirs.get("gamma") if isinstance(theirs, Mapping) else None
    numbers = isinstance(gamma, list) and all(type(value) is float for value in gamma)
    if not numbers or np.shape(gamma) != np.shape(mine["gamma"]) or not {"name", "T"} <= theirs.keys():
        raise InputError("the checkpoint's note of its schedule is damaged: take another checkpoint")
    if not np.allclose(mine["gamma"], theirs["gamma"], rtol=1e-6, atol=1e-6):
        raise InputError(
            f"the checkpoint was trained under another schedule, {theirs['name']} of T = {theirs['T']}, than this "
            f"{mine['name']} of T = {mine['T']}, and TimeConditioning tells its network the time, not the noise: "
            "take the configuration saved beside it, and T of a bound or steps of a sampler for fewer steps"
        )

"""What is asked of a new module, checked before it is trained."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import AdaptedNetwork, LevelsUNet
from ddpm_lightning.objectives import ElboEstimator
from ddpm_lightning.own_code import failure_in_own_code
from ddpm_lightning.process import (
    CategoricalParameterization,
    Decoder,
    DiffusionModel,
    GenerativeModel,
    Parameterization,
    ReverseVariance,
)

__all__ = ["check_bounds", "check_network", "check_options", "check_part", "check_shapes"]


_CALL = (
    ": the call is network(x, c, label=None), with x [B, C, H, W] and c [B], and returns a tensor. A network of "
    "diffusers or another library fits in ddpm_lightning.networks.AdaptedNetwork: --model.network AdaptedNetwork "
    "--model.network.network diffusers.UNet2DModel; one with other inputs needs a module of your own around it"
)


def check_options(decoder: Decoder, levels: int | None, ema_decay: float) -> None:
    """Refuse, with an InputError, a decoder for other grey levels, and a decay outside [0, 1)."""
    if decoder.levels != levels:
        raise InputError(
            f"the decoder is made for {decoder.levels} grey levels and the data have {levels}: "
            f"set --model.decoder.init_args.levels to {levels}, or leave it out and it follows the data"
        )
    check_part("ema_decay", ema_decay)


def check_part(name: str, value: float) -> None:
    """Refuse, with an InputError, an option of the model that lies outside [0, 1)."""
    if not 0 <= value < 1:
        raise InputError(f"--model.{name} {value:g} must lie in [0, 1)")


def check_network(
    network: nn.Module,
    parameterization: Parameterization,
    variance: ReverseVariance,
    shape: tuple[int, ...],
    levels: int | None,
    conditions: Mapping[str, int],
    label_dropout: float = 0.0,
) -> None:
    """Evaluate the network once, on zeros ``[2, C, *space]`` and on conditions: by name the number of classes, numbers
    of the vector and channels of the field. With a dropout, the last row has none.

    Raises:
        InputError: it does not take images of ``shape``, or does not return what the parameterisation and the variance
            need.
    """
    if isinstance(network, LevelsUNet):
        _check_levels(network, parameterization, variance, levels)
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    # in half precision Lightning changes torch's default type while it has the module make its parts
    x = torch.zeros(2, *shape, device=device, dtype=torch.float32)
    name = type(network).__name__
    cond: dict[str, Tensor] = {}
    last_label = conditions.get("label", 1) - (0 if label_dropout else 1)
    if "label" in conditions:
        cond["label"] = torch.tensor([0, last_label], device=device)
    space: dict[str, tuple[int, ...]] = {"vector": (), "field": shape[1:]}
    for condition, size in space.items():
        if condition in conditions:
            cond[condition] = torch.zeros(2, conditions[condition], *size, device=device)
            if label_dropout:
                cond[condition][1] = torch.nan
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            output = network(x, x.new_full((2,), 0.5), **cond)
    except Exception as error:
        labels = f" with labels from 0 to {last_label}" if "label" in cond else ""
        what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        if isinstance(error, IndexError) and "label" in cond:
            what += f" (its num_classes must be {conditions['label']}, as the data's)"
        reason = failure_in_own_code(error) or what
        call = _CALL if isinstance(error, TypeError) and not isinstance(network, AdaptedNetwork) else ""
        raise InputError(
            f"{name} cannot take the data's images of shape {list(shape)} ({_axes(shape)}){labels}: {reason}{call}"
        ) from error
    finally:
        network.train(training)
    if not isinstance(output, Tensor):
        raise InputError(f"{name} returns a {type(output).__name__} and no tensor{_CALL}")
    channels, *rest = shape
    needed = parameterization.output_channels(channels, levels)
    expected = [needed + (variance.network_outputs - 1) * channels, *rest]
    if list(output.shape) != [len(x), *expected]:
        twice = variance.network_outputs == 1 and list(output.shape[1:]) == [needed + channels, *rest]
        learned = ", or train its variance too, with --model.variance LearnedRangeVariance" if twice else ""
        under = type(variance if needed == channels else parameterization).__name__
        inner = "network.init_args." if isinstance(network, AdaptedNetwork) else ""
        raise InputError(
            f"{name} returns {list(output.shape[1:])} for images of shape {list(shape)}: "
            f"under {under} it must return {expected}; "
            f"set --model.network.init_args.{inner}out_channels {expected[0]} where it has that option{learned}"
        )


def _check_levels(
    network: LevelsUNet, parameterization: Parameterization, variance: ReverseVariance, levels: int | None
) -> None:
    """Refuse, with an InputError, what a network of logits cannot be used with."""
    if levels is None:
        raise InputError("LevelsUNet is for grey levels, and fields have none: use UNet")
    if network.levels != levels:
        raise InputError(
            f"LevelsUNet is made for {network.levels} grey levels and the data have {levels}: "
            f"set --model.network.init_args.levels to {levels}, or leave it out and it follows the data"
        )
    if not isinstance(parameterization, CategoricalParameterization):
        raise InputError(
            "LevelsUNet returns logits of grey levels: give it --model.parameterization CategoricalParameterization, "
            "or use UNet"
        )
    if variance.network_outputs > 1:
        raise InputError(f"LevelsUNet has no output for {type(variance).__name__}: use another variance, or UNet")


def _axes(shape: Sequence[int]) -> str:
    return ", ".join(("channels", *("depth", "height", "width")[4 - len(shape) :]))


def check_shapes(model: DiffusionModel, shape: tuple[int, ...]) -> None:
    """Refuse, with an InputError, a schedule made for pixels of other images, and an encoder that does not map images
    of ``shape`` to images of ``shape``."""
    made_for = model.schedule.pixel_shape
    if made_for not in (None, shape):
        raise InputError(
            f"--model.schedule.init_args.shape {list(made_for or ())}: the data's images have the shape {list(shape)}"
        )
    name, training = type(model.encoder).__name__, model.encoder.training
    device = next((p.device for p in model.encoder.parameters()), torch.device("cpu"))
    x0 = torch.zeros(2, *shape, device=device, dtype=torch.float32)
    model.encoder.eval()
    try:
        with torch.no_grad():
            found = model.encoder(model.schedule, x0, model.grid_on(device)[-1])
    except Exception as error:
        raise InputError(
            f"--model.encoder {name} cannot take the data's images of shape {list(shape)} ({_axes(shape)}): "
            f"{failure_in_own_code(error) or error}"
        ) from error
    finally:
        model.encoder.train(training)
    if found.shape != x0.shape:
        raise InputError(f"--model.encoder {name} makes {list(found.shape[1:])} of images of shape {list(shape)}")


def check_bounds(model: GenerativeModel, bounds: Mapping[str, Sequence[ElboEstimator]]) -> None:
    """Make every chain that an estimator asks for now, not after hours of training.

    Raises:
        InputError: a form named twice for a stage (``val``, ``test``) or not for such a model, or a chain with too few
            states.
    """
    for stage, estimators in bounds.items():
        option = {"val": "validation_bounds", "test": "test_bounds"}[stage]
        names = [estimator.name for estimator in estimators]
        if len(set(names)) < len(names):
            raise InputError(f"--model.{option} names a form of the bound twice: {', '.join(names)}")
        for estimator in estimators:
            try:
                estimator.check(model)
                model.with_steps(model.T if estimator.T is None else estimator.T)
            except InputError as error:
                raise InputError(f"--model.{option}, the {estimator.name} form: {error}") from error

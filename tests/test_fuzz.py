"""Numbers that no option can mean, for every number of every shipped class and of the Trainer.

The classes and their numbers are found by inspection, so a new one is covered at once. What is refused is named; what
is accepted is a number that the option can mean, or stands in ``MEANT`` with the reason.
"""

import math
import tempfile
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import Parameter
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

import numpy as np
import pytest
import torch
from builders import refused

from ddpm_lightning.checkpoints.descriptions import parameters_of
from ddpm_lightning.errors import InputError
from ddpm_lightning.numbers import check_numbers
from ddpm_lightning.objectives import ConsistencyElbo, UniformTimes
from ddpm_lightning.process import GammaConditioning
from ddpm_lightning.samplers import DDIMSampler
from ddpm_lightning.schedules import LinearGamma
from ddpm_lightning.trainer import DiffusionTrainer

ROOMS = ("schedules", "networks", "process", "objectives", "samplers", "data", "callbacks", "sampling")
# parts of the theory that no configuration can name: bases, results, and what is made from other objects
SKIPPED = {
    "AnalyticVariance", "Batch", "Context", "Denoiser", "Drawing", "ElboTerms", "GenerativeModel", "Inpainting",
    "MultistepState", "NetworkDenoiser", "PathLogProbs", "Prediction", "Split", "TabulatedSchedule", "TimeDraw",
    "BetaChain", "DiffusionModel", "DiffusionLevel", "HierarchicalVAE", "ForwardProcess", "ReverseProcess",
    "AutoguidedDenoiser", "ClassifierDenoiser", "ClassifierFreeDenoiser", "ClippedDenoiser", "DPSDenoiser",
    "MMPSDenoiser", "ProductDenoiser",
    "LinearMeasurement", "MaskOperator", "MatrixOperator", "LogFactor", "ImageDataModule", "EDMWeighting.mean",
    "Decoder", "ElboEstimator", "OfficialData",
    "FlowLikelihood", "ReplacementSampler", "MomentMatchingSampler", "ExactDivergence", "HutchinsonDivergence",
}  # fmt: skip
_OWN = Path(tempfile.mkdtemp()) / "own.npy"
np.save(_OWN, np.zeros((20, 1, 4, 4), np.float32))
# what else a class needs, by NAME or CLASS.NAME
NEEDED: dict[str, Any] = {
    "schedule": LinearGamma(), "network": torch.nn.Identity(), "bound": ConsistencyElbo(), "times": UniformTimes(),
    "conditioning": GammaConditioning(), "shape": (1, 4, 4), "levels": 16, "channels": 1, "size": 8, "classes": 3,
    "sampler": DDIMSampler(), "gammas": [0.0], "eps_mse": [0.1], "scale": 2.0, "frequencies": (1.0,), "inputs": 1,
    "outputs": 2, "width": 8, "blocks": 1, "images": 1, "dim": 8, "Fields.path": str(_OWN), "Images.path": "docs",
}  # fmt: skip
VALUES: list[Any] = [-1, 0, None, math.nan, math.inf, -math.inf, 1e30, 1e-320, 2.5, 2**64, True]
# numbers that mean something, however strange, by NAME or CLASS.NAME, with the reason
MEANT = {
    "mean": "a position on the axis of a logarithm, of any sign",
    "gamma_min": "a logarithm, of any sign; its end is checked where a model is made",
    "gamma_max": "a logarithm, of any sign; its end is checked where a model is made",
    "power": "0 is the simple loss, and negative powers weigh clean images more",
    "interpolation_columns": "compared with what else is asked for, where a request meets a model",
    "SampleRequest.steps": "compared with T, where a request meets a model",
    "kappa": "of any sign: with a negative one neighbours differ",
    "eta": "0 is DDIM; values above 1 are refused",
    "guidance_scale": "0 is the model without classes, negative scales push away from the class",
}
# 0 switches these off, or is a count that may be none
ZERO = {
    "seed", "eval_seed", "offset", "dropout", "blocks", "vlb_weight", "eta", "free_nats", "warmup", "carry",
    "interpolate_to", "patience", "min_delta", "weight_decay", "discount", "guidance_scale", "jump", "correction",
    "simulation_seed", "split_seed", "memory_gb", "context",
}  # fmt: skip


def numeric(parameter: Parameter) -> bool:
    kinds = numbers_of(parameter.annotation)
    return bool(kinds & {int, float}) and bool not in kinds


def numbers_of(annotation: Any) -> set[Any]:
    """The types that an annotation allows by itself, not within lists."""
    return {*get_args(annotation)} if get_origin(annotation) in (Union, UnionType) else {annotation}


@cache
def options() -> list[tuple[type, str, Any]]:
    found = {}
    for room in ROOMS:
        for name in import_module(f"ddpm_lightning.{room}").__all__:
            cls = getattr(import_module(f"ddpm_lightning.{room}"), name)
            if isinstance(cls, type) and name not in SKIPPED:
                for key, parameter in parameters_of(cls).items():
                    if numeric(parameter):
                        found[cls, key] = parameter.annotation
    return [(cls, key, annotation) for (cls, key), annotation in found.items()]


def made(cls: type, key: str, value: Any) -> None:
    """As the command line would: the numbers first, then the part."""
    path = f"{cls.__module__}.{cls.__qualname__}"
    check_numbers({"part": {"class_path": path, "init_args": {key: value}}})
    known = parameters_of(cls)
    wanted = [name for name, parameter in known.items() if parameter.default in (Parameter.empty, "")]
    others = {n: NEEDED[place] for n in wanted for place in (n, f"{cls.__name__}.{n}") if place in NEEDED}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cls(**{**others, key: value})


def cases() -> Iterator[tuple[type, str, Any]]:
    for cls, key, annotation in options():
        kinds = numbers_of(annotation)
        for value in VALUES:
            # what jsonargparse refuses by its type
            if isinstance(value, float) and math.isfinite(value) and float not in kinds:
                continue
            filled_in = key in ("levels", "channels", "num_classes")  # from the data
            if value is True or (value is None and (type(None) in kinds or filled_in)):
                continue
            yield cls, key, value


def is_meant(cls: type, key: str, value: Any) -> str | None:
    """The reason why a number is accepted."""
    for name in (key, f"{cls.__name__}.{key}"):
        if name in MEANT:
            return MEANT[name]
    if value == 0 and key in ZERO:
        return "0 switches it off"
    if value is not None and value > 0 and math.isfinite(value):
        return "a positive number; its size is the machine's affair"
    return None


def test_every_number_is_named_or_meant() -> None:
    tried, named, accepted, wrong = 0, 0, {}, []
    for cls, key, value in cases():
        tried += 1
        try:
            made(cls, key, value)
        except (InputError, ValueError) as error:
            named += 1
            if key not in str(error) and cls.__name__ not in str(error):
                wrong.append(f"{cls.__name__}.{key} = {value}: not named in {str(error)!r}")
        except (MemoryError, OverflowError, RuntimeError) as error:
            # too large to be held: named by the command line's last resort
            if not isinstance(value, int | float) or value < 1e9:
                wrong.append(f"{cls.__name__}.{key} = {value}: {type(error).__name__}: {error}")
        except Exception as error:
            wrong.append(f"{cls.__name__}.{key} = {value}: {type(error).__name__}: {error}")
        else:
            reason = is_meant(cls, key, value)
            accepted[reason] = accepted.get(reason, 0) + 1
            if reason is None:
                wrong.append(f"{cls.__name__}.{key} = {value}: accepted")
    print(f"tried {tried}, named {named}, accepted {accepted}")
    assert len(options()) > 60 and tried > 400
    assert wrong == []


TRAINER = {name for name, p in parameters_of(DiffusionTrainer).items() if numeric(p)} - {"precision"}


@pytest.mark.parametrize("value", [-2, math.nan, math.inf, -math.inf, 2**64])
def test_every_number_of_the_trainer_has_a_range(value: Any) -> None:
    assert len(TRAINER) > 15
    for name in sorted(TRAINER):
        with pytest.raises(InputError, match=f"--trainer.{name} "):
            check_numbers({"trainer": {name: value}})


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--trainer.val_check_interval 0", "--trainer.val_check_interval 0 leaves nothing to do"),
        ("--trainer.accumulate_grad_batches 0", "--trainer.accumulate_grad_batches 0 must be 1 or more"),
        ("--trainer.accumulate_grad_batches -1", "--trainer.accumulate_grad_batches -1 must be 1 or more"),
        ("--trainer.gradient_clip_val -1", "--trainer.gradient_clip_val -1"),
        ("--trainer.limit_train_batches 0", "--trainer.limit_train_batches 0 leaves nothing to do"),
        ("--trainer.limit_train_batches 1.5", "it must be at most 1.0, or a whole number"),
        ("--trainer.max_steps 0", "--trainer.max_steps 0 leaves nothing to do"),
        ("--trainer.devices 2.5", "--trainer.devices 2.5 must be a number of devices"),
        ("--trainer.devices 0", "devices"),
        ("--seed_everything -1", "--seed_everything -1 must lie between 0 and 4294967295"),
        ("--model.eval_seed 18446744073709551616", "--model.eval_seed 18446744073709551616"),
        ("--model.seed -3", "--model.seed -3 must lie between 0"),
        ("--data.seed -3", "--data.seed -3 must lie between 0"),
        ("--model.network.width null", "--model.network.width null: a value is needed"),
        ("--model.schedule.T null", "--model.schedule.T null: a value is needed"),
        ("--model.optimizer.lr null", "--model.optimizer.lr null: a value is needed"),
        ("--model.optimizer.lr -1", "--model.optimizer"),
        ("--model.optimizer.lr .inf", "--model.optimizer.lr inf must be a finite number"),
        ("--model.optimizer.eps .nan", "--model.optimizer.eps nan must be a finite number"),
        ("--model.optimizer.betas [2.0,0.9]", "--model.optimizer"),
        ("--model.conditioning.scale -1", "scale"),
        ("--model.conditioning.scale .inf", "--model.conditioning.scale inf must be a finite number"),
        ("--model.schedule LinearGamma --model.schedule.gamma_min -1000", "gamma of LinearGamma runs from -1000 to 5"),
        ("--model.schedule CosineChain --model.schedule.max_beta 1e-320", "CosineChain"),
        ("--model.ema_decay 1", "--model.ema_decay 1 must lie in [0, 1)"),
        ("--model.network.dropout 1.5", "dropout"),
        ("--trainer.callbacks+ ForwardStrip --trainer.callbacks.n -1", "n = -1 must be 1 or more"),
    ],
)
def test_on_the_command_line_it_is_one_sentence(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    message = refused(capsys, "fit", "-c", "configs/digits.yaml", f"--run_dir={tmp_path / 'run'}", *words.split())
    assert sentence in message and "Traceback" not in message
    assert not (tmp_path / "run" / "config.yaml").exists()

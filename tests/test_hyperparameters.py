"""Parts described as plain data, and built again from it."""

import importlib
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    EDMWeighting,
    ElboWeighting,
    EquispacedTimes,
    HybridObjective,
    ImportanceTimes,
    ImportanceWeightedElbo,
    MinSNRWeighting,
    NegativeElbo,
    NoiseMSE,
    P2Weighting,
    StratifiedTimes,
    TrajectoryElbo,
    UniformTimes,
    UniformWeighting,
    WeightedMSE,
)
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    DiscretizedGaussian,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
    PlainGaussian,
    TimeConditioning,
    VParameterization,
)
from ddpm_lightning.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    HeunSampler,
    HutchinsonDivergence,
    ProbabilityFlow,
)
from ddpm_lightning.schedules import (
    BetaChain,
    CosineChain,
    CosineGamma,
    LearnedGamma,
    LinearChain,
    VarianceExploding,
)

PARTS = [
    LinearChain(10, 1e-3, 0.2),
    LinearChain(100, reference_T=1000),
    CosineChain(7, max_beta=0.5),
    BetaChain([0.1, 0.2, 0.3]),
    BetaChain((0.1, 0.2)),
    CosineGamma(-9.0, T=5),
    VarianceExploding(LearnedGamma(-9.0, 4.0, T=5, units=3)),
    UNet(width=8, multipliers=(1, 2), blocks=(1, 2), attention=(1,), num_classes=3),
    UNet(width=8, multipliers=(1, 2), fourier=(4.0, 2.0)),
    SimpleUNet(),
    ContinuousNegativeElbo(EquispacedTimes()),
    NoiseMSE(StratifiedTimes()),
    NegativeElbo(DenoisingElbo(steps=1)),
    WeightedMSE(EquispacedTimes()),
    WeightedMSE(ImportanceTimes(20, history=3), VParameterization(), EDMWeighting(0.3), continuous=True, T=7),
    [UniformWeighting(), MinSNRWeighting(3.0), P2Weighting(power=0.5), ElboWeighting()],
    [HybridObjective(StratifiedTimes(), 0.01), LearnedRangeVariance(), AnalyticVariance([-1.0, 2.5], [0.9, 0.1])],
    [ConsistencyElbo(), DenoisingElbo(steps=3), TrajectoryElbo(), ImportanceWeightedElbo(3, T=5)],
    [EpsParameterization(), TimeConditioning(), GammaConditioning(5.0), FixedSmallVariance()],
    [CategoricalDecoder(levels=17), DiscretizedGaussian(levels=17), PlainGaussian(levels=256)],
    {"ancestral": AncestralSampler(), "ddim": DDIMSampler(0.5)},
    [DPMSolverSampler(1, sde=True), HeunSampler(), ProbabilityFlow(7), HutchinsonDivergence(3)],
]


def build(plain: Any) -> Any:
    """What the command line does with plain data."""
    if isinstance(plain, list):
        return [build(item) for item in plain]
    if isinstance(plain, Mapping) and set(plain) == {"class_path", "init_args"}:
        module, _, name = plain["class_path"].rpartition(".")
        return getattr(importlib.import_module(module), name)(**build(plain["init_args"]))
    if isinstance(plain, Mapping):
        return {key: build(item) for key, item in plain.items()}
    return plain


def test_schedule() -> None:
    assert describe(LinearChain(T=10)) == {
        "class_path": "ddpm_lightning.schedules.chains.LinearChain",
        "init_args": {"T": 10, "beta_start": 1e-4, "beta_end": 0.02, "reference_T": None},
    }


def test_network() -> None:
    description = describe(UNet(width=8, multipliers=(1, 2)))
    assert description["class_path"] == "ddpm_lightning.networks.unet.UNet"
    assert description["init_args"]["width"] == 8
    assert description["init_args"]["multipliers"] == [1, 2]
    assert describe(SimpleUNet(2)) == {
        "class_path": "ddpm_lightning.networks.simple_unet.SimpleUNet",
        "init_args": {"channels": 2},
    }


def test_parts_within_parts() -> None:
    times = {"class_path": "ddpm_lightning.objectives.times.UniformTimes", "init_args": {}}
    assert describe([NoiseMSE(UniformTimes()), 3]) == [
        {"class_path": "ddpm_lightning.objectives.noise_mse.NoiseMSE", "init_args": {"times": times}},
        3,
    ]


@pytest.mark.parametrize("value", [True, 3, -0.5, "text", None, math.inf])
def test_plain_values_stay(value: Any) -> None:
    assert describe(value) is value


def test_collections_become_plain() -> None:
    assert describe((1, [2.5, ("a", None)])) == [1, [2.5, ["a", None]]]
    described = describe(MappingProxyType({1: (2,), "b": {"c": True}}))
    assert described == {"1": [2], "b": {"c": True}}
    assert type(described) is dict


def test_classes_and_partials() -> None:
    adam = "torch.optim.adam.Adam"
    assert describe(torch.optim.Adam) == {"class_path": adam, "init_args": {}}
    assert describe(partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 0.99))) == {
        "class_path": adam,
        "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]},
    }
    nested = describe(partial(NoiseMSE, times=StratifiedTimes()))
    assert nested["init_args"]["times"]["class_path"] == "ddpm_lightning.objectives.times.StratifiedTimes"


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_round_trip(part: Any) -> None:
    """Plain enough for JSON, and it builds a part with the same description."""
    description = describe(part)
    assert json.loads(json.dumps(description)) == description
    assert describe(build(description)) == description


class Forgetful:
    def __init__(self, size: int) -> None:
        pass


class Variadic:
    def __init__(self, *sizes: int) -> None:
        self.sizes = sizes


class Keywords:
    def __init__(self, **options: int) -> None:
        self.options = options


def local_class() -> type:
    class Local:
        pass

    return Local


def function() -> None:
    pass


INDESCRIBABLE = {
    "lambda": lambda x: x,
    "function": function,
    "built-in function": math.sqrt,
    "built-in class": int,
    "local class": local_class(),
    "object of a local class": local_class()(),
    "argument not kept": Forgetful(3),
    "within a list": [1, {"a": Forgetful(3)}],
    "*args": Variadic(1, 2),
    "**kwargs": Keywords(a=1),
    "partial with positions": partial(torch.optim.Adam, [nn.Parameter(torch.zeros(1))]),
    "partial of a function": partial(function),
    "function within a partial": partial(NoiseMSE, times=function),  # type: ignore[arg-type]
    "set": {1, 2},
    "bytes": b"bytes",
    "complex": 1j,
    "path": Path("file"),
    "tensor": torch.zeros(2),
    "layer": nn.Linear(2, 3),
}


@pytest.mark.parametrize("name", INDESCRIBABLE)
def test_type_errors(name: str) -> None:
    with pytest.raises(TypeError, match="cannot describe"):
        describe(INDESCRIBABLE[name])


def test_type_errors_name_the_missing_attribute() -> None:
    with pytest.raises(TypeError, match="Forgetful: it does not keep its argument 'size'"):
        describe(Forgetful(3))
    with pytest.raises(TypeError, match=r"Variadic: its constructor takes \*args"):
        describe(Variadic(1))


def test_betas_given_as_a_tensor() -> None:
    """BetaChain takes a tensor, so its description must do something sensible with one."""
    description = describe(BetaChain(torch.tensor([0.25, 0.5], dtype=torch.float64)))
    assert description["init_args"] == {"betas": [0.25, 0.5]}

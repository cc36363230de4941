#!/usr/bin/env python3
"""Check the three forms of the bound against exact values in a world where they are known.

    python scripts/check_bound.py [--cases FILE.json] [--seed 0] [--max_se 0.0045]

Each case is scalar data N(data_mean, data_var) under linear betas, the plain Gaussian decoder and the optimal linear
denoiser, without clipping. It is evaluated with the package's own parts on batches [B, 1, 4, 4] of independent scalars
until every term's standard error is below max_se nats (or max_se times the value, where that is larger).

A case is an object with the inputs T, beta_start, beta_end, data_mean, data_var and reverse_variance ("beta" or
"posterior"), and, where they are known, exact values in nats: reconstruction; consistency_form with prior_matching,
consistency, elbo, consistency_literal_kl; denoising_form with prior_matching, denoising_matching, elbo;
trajectory_form with elbo.

Standard output is a JSON list with one object a case: its inputs and for each term {"mean": ..., "se": ...} for one
scalar dimension. Exit status: 0; 1 where a given value is missed by more than 4 standard errors; 2 for bad input.
"""

import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning import process
from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.metrics import MeanAndError
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.schedules import LinearChain, Schedule

OWN_CASES = Path(__file__).with_name("bound_cases.json")
NUMBERS = ("T", "beta_start", "beta_end", "data_mean", "data_var")
VARIANCES = {"beta": process.FixedLargeVariance, "posterior": process.FixedSmallVariance}
FORMS: dict[str, tuple[ElboEstimator, tuple[str, ...]]] = {
    "consistency_form": (ConsistencyElbo(), ("prior_matching", "consistency", "elbo", "consistency_literal_kl")),
    "denoising_form": (DenoisingElbo(), ("prior_matching", "denoising_matching", "elbo")),
    "trajectory_form": (TrajectoryElbo(), ("elbo",)),
}
TERMS = [("", "reconstruction"), *((form, name) for form, (_, names) in FORMS.items() for name in names)]
"""Form and name; the reconstruction belongs to all forms."""


class OptimalEps(nn.Module):
    """E[eps | x_t] for pixels that are independent N(mean, var): the best denoiser there is, and a linear one."""

    def __init__(self, schedule: Schedule, mean: float, var: float) -> None:
        super().__init__()
        self.schedule, self.mean, self.var = schedule, mean, var

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        x0 = self.mean + alpha * self.var / (alpha**2 * self.var + sigma**2) * (x - alpha * self.mean)
        return (x - alpha * x0) / sigma


def part_of(tree: dict[str, Any], form: str) -> Any:
    """Where a case or a result holds the terms of a form."""
    return tree.get(form, {}) if form else tree


def is_number(value: Any) -> bool:
    """A JSON number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def build(case: dict[str, Any]) -> process.DiffusionModel:
    """The case's generative model, from the package's own parts."""
    inputs = (*NUMBERS, "reverse_variance")
    if missing := [key for key in inputs if key not in case]:
        raise InputError(f"a case lacks {', '.join(missing)}; it needs {', '.join(inputs)}")
    for key in NUMBERS:
        if not (is_number(case[key]) and math.isfinite(case[key])):
            raise InputError(f"{key} is {case[key]!r}; it must be a finite number")
    if case["T"] != int(case["T"]):
        raise InputError(f"T is {case['T']!r}; it must be a whole number")
    if case["reverse_variance"] not in list(VARIANCES):
        raise InputError(f"reverse_variance is {case['reverse_variance']!r}; it must be 'beta' or 'posterior'")
    if not case["data_var"] > 0:
        raise InputError(f"data_var = {case['data_var']} must be positive")
    for form, name in TERMS:
        part = part_of(case, form)
        if not isinstance(part, dict) or not (part.get(name) is None or is_number(part[name])):
            raise InputError(f"{form or name} does not hold numbers by name: {part if form else part[name]!r}")
    schedule = LinearChain(int(case["T"]), case["beta_start"], case["beta_end"])
    return process.DiffusionModel(
        network=OptimalEps(schedule, case["data_mean"], case["data_var"]),
        schedule=schedule,
        parameterization=process.EpsParameterization(),
        conditioning=process.TimeConditioning(),
        variance=VARIANCES[case["reverse_variance"]](),
        decoder=process.PlainGaussian(levels=256),
        clip_x0=False,
    )


def evaluate(case: dict[str, Any], *, max_se: float, batch: int, seed: int) -> dict[str, Any]:
    """Mean and standard error of each term for one scalar dimension, until all errors are small enough."""
    model, generator = build(case), torch.Generator().manual_seed(seed)
    means = {key: MeanAndError() for key in TERMS}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    while not (found and all(each["se"] <= max_se * max(1.0, abs(each["mean"])) for each in found.values())):
        x0 = torch.randn(batch, 1, 4, 4, generator=generator, dtype=torch.float64)
        x0 = case["data_mean"] + case["data_var"] ** 0.5 * x0
        for form, (estimator, names) in FORMS.items():
            values = estimator(model, x0, generator).named()
            for key in [("", "reconstruction"), *((form, name) for name in names)]:
                means[key].update(values[key[1]] / x0[0].numel())
        found = {key: mean.compute() for key, mean in means.items()}
    result = {key: case[key] for key in (*NUMBERS, "reverse_variance")}
    for (form, name), each in found.items():
        target = result.setdefault(form, {}) if form else result
        target[name] = {key: float(each[key]) for key in ("mean", "se")}
    return result


def misses(case: dict[str, Any], result: dict[str, Any]) -> list[str]:
    """A line for each expected value that is missed by more than 4 standard errors."""
    lines = []
    for form, name in TERMS:
        expected, found = part_of(case, form).get(name), part_of(result, form)[name]
        # the analytic terms have no spread but the rounding of float64 sums
        if expected is not None and not (
            abs(found["mean"] - expected) <= 4 * found["se"] + 1e-9 * max(1.0, abs(expected))
        ):
            measured = f"{found['mean']:.6g} +- {found['se']:.2g}"
            lines.append(f"{form or 'shared'}.{name}: {measured}, expected {expected:.6g}")
    return lines


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The cases in a file, each fit to be evaluated."""
    try:
        cases = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--cases {path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"--cases {path} is no JSON: {error}") from None
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise InputError(f"--cases {path} must hold a list of objects")
    for case in cases:
        build(case)
    return cases


def main(cases: Path = OWN_CASES, seed: int = 0, max_se: float = 0.0045, batch: int = 2048) -> int:
    """Evaluate all cases.

    Args:
        cases: JSON list of cases, by default the script's own
        seed: seed of data and noise
        max_se: standard error to reach
        batch: images in a batch, 2 or more
    """
    if not max_se > 0:
        raise InputError(f"--max_se {max_se:g} must be above 0")
    at_least(2, batch=batch)
    read, results, missed, start = read_cases(cases), [], False, time.perf_counter()
    work = partial(evaluate, max_se=max_se, batch=batch, seed=seed)
    # one case a process with one thread each: the tensors are too small to be worth sharing among threads
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,), mp_context=context) as pool:
        for number, (case, result) in enumerate(zip(read, pool.map(work, read), strict=True), start=1):
            results.append(result)
            lines = misses(case, result)
            missed = missed or bool(lines)
            seconds, status = time.perf_counter() - start, "missed" if lines else "ok"
            head = f"case {number} of {len(read)} (T = {case['T']}): {status}, {seconds:.0f} s since the start"
            print(head, *lines, sep="\n  ", file=sys.stderr)
    json.dump(results, sys.stdout, indent=1)
    print()
    return int(missed)


if __name__ == "__main__":
    run_script(main, __doc__)

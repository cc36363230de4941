#!/usr/bin/env python3
"""Check the forms of the bound against exact values in worlds where they are known.

    python scripts/check_bound.py [--cases FILE.json] [--seed 0] [--max_se 0.0045]

A case is an object of one of two kinds, and a file may mix them. It is evaluated with the package's own parts until
every term's standard error is small enough. Exact values are in nats and may be absent.

A Gaussian chain (no "kind") is scalar data N(data_mean, data_var) under linear betas, the plain Gaussian decoder and
the optimal linear denoiser, without clipping, on batches [B, 1, 4, 4] of independent scalars. Inputs: T, beta_start,
beta_end, data_mean, data_var and reverse_variance ("beta" or "posterior"). Exact values: reconstruction;
consistency_form with prior_matching, consistency, elbo, consistency_literal_kl; denoising_form with prior_matching,
denoising_matching, elbo; trajectory_form with elbo. They are for one scalar dimension. The standard errors reach
max_se, or max_se times the value where that is larger.

"kind": "linear_hierarchy" is a hierarchical VAE with linear levels. Inputs: x [n, d_0], and encoder and decoder, lists
of {"A", "b", "var"} from the data upwards. Exact values: exact, for each x an object with reconstruction,
prior_matching, consistency and elbo, for the whole vector. The standard errors reach max_se.

Standard output is a JSON list with one object a case: its inputs and for each term {"mean": ..., "se": ...}. Exit
status: 0; 1 where a given value is missed by more than 4 standard errors; 2 for bad input.
"""

import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ddpm_lightning import process
from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.metrics import MeanAndError
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.schedules import LinearChain, Schedule

OWN_CASES = Path(__file__).with_name("bound_cases.json")
VARIANCES = {"beta": process.FixedLargeVariance, "posterior": process.FixedSmallVariance}


class OptimalEps(nn.Module):
    """E[eps | x_t] for pixels that are independent N(mean, var): the best denoiser there is, and a linear one."""

    def __init__(self, schedule: Schedule, mean: float, var: float) -> None:
        super().__init__()
        self.schedule, self.mean, self.var = schedule, mean, var

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (f(t).reshape(-1, 1, 1, 1) for f in (self.schedule.alpha, self.schedule.sigma))
        x0 = self.mean + alpha * self.var / (alpha**2 * self.var + sigma**2) * (x - alpha * self.mean)
        return (x - alpha * x0) / sigma


def is_number(value: Any) -> bool:
    """A JSON number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def numbers(part: Any, name: str, shape: tuple[int | None, ...]) -> Tensor:
    """The array that an object holds under a name; None in its shape is any length."""
    try:
        array = torch.tensor(part[name], dtype=torch.float64)
    except (TypeError, ValueError, KeyError):
        array = torch.tensor(math.nan)
    fits = array.ndim == len(shape) and all(n and n == (m or n) for n, m in zip(array.shape, shape, strict=True))
    if not (fits and bool(array.isfinite().all())):
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise InputError(f"{name} must be finite numbers of shape [{wanted}]")
    return array


Found = dict[str, dict[str, dict[str, float]]]
"""Mean and standard error of each term by form."""


class World:
    """A case, built: a model, data, and the terms that are known."""

    keys: tuple[str, ...]  # names of the inputs
    forms: ClassVar[dict[str, tuple[ElboEstimator, tuple[str, ...]]]]  # the terms of each form that are looked at
    model: process.GenerativeModel
    dims = 1  # values are divided by it
    relative = False  # whether a standard error may grow with the value

    def __init__(self, case: dict[str, Any]) -> None:
        self.case = case
        if missing := [key for key in self.keys if key not in case]:
            raise InputError(f"a case lacks {', '.join(missing)}; it needs {', '.join(self.keys)}")

    def data(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        """Data that are evaluated each by itself, ``[batch, ...]``."""
        raise NotImplementedError

    def expected(self, row: int, form: str, name: str) -> Any:
        """What the case says of a term of the data's entry ``row``, if anything."""
        raise NotImplementedError

    def result(self, found: list[Found]) -> dict[str, Any]:
        """What is printed, beside the inputs, of what was found for each entry of the data."""
        raise NotImplementedError

    def check_expected(self, rows: int) -> None:
        for row in range(rows):
            for form, (_, names) in self.forms.items():
                for name in names:
                    value = self.expected(row, form, name)
                    if not (value is None or is_number(value)):
                        raise InputError(f"{form}.{name} is {value!r}; it must be a number")

    @torch.no_grad()
    def evaluate(self, max_se: float, batch: int, seed: int) -> list[Found]:
        """Draw until all standard errors are small enough."""
        generator = torch.Generator().manual_seed(seed)
        rows = range(len(self.data(2, torch.Generator())))
        return [self._row(row, max_se, batch, generator) for row in rows]

    def _row(self, row: int, max_se: float, batch: int, generator: torch.Generator) -> Found:
        means = {(form, name): MeanAndError() for form, (_, names) in self.forms.items() for name in names}
        while True:
            x0 = self.data(batch, generator)[row]
            for form, (estimator, names) in self.forms.items():
                values = estimator(self.model, x0, generator).named()
                for name in names:
                    means[form, name].update(values[name] / self.dims)
            scores = {
                key: {k: float(v) for k, v in mean.compute().items() if k != "count"} for key, mean in means.items()
            }
            if all(s["se"] <= max_se * (max(1.0, abs(s["mean"])) if self.relative else 1) for s in scores.values()):
                return {form: {name: scores[form, name] for name in names} for form, (_, names) in self.forms.items()}

    def misses(self, found: list[Found]) -> list[str]:
        """A line for each expected value that is missed by more than 4 standard errors."""
        lines = []
        for row, forms in enumerate(found):
            for form, terms in forms.items():
                for name, score in terms.items():
                    expected = self.expected(row, form, name)
                    # the analytic terms have no spread but the rounding of float64 sums
                    if expected is not None and not (
                        abs(score["mean"] - expected) <= 4 * score["se"] + 1e-9 * max(1.0, abs(expected))
                    ):
                        measured = f"{score['mean']:.6g} +- {score['se']:.2g}"
                        at = f"x[{row}]." if len(found) > 1 else ""
                        lines.append(f"{at}{form}.{name}: {measured}, expected {expected:.6g}")
        return lines


class GaussianChain(World):
    """Scalar data with the optimal denoiser."""

    numbers = ("T", "beta_start", "beta_end", "data_mean", "data_var")
    keys = (*numbers, "reverse_variance")
    forms: ClassVar = {
        "consistency_form": (
            ConsistencyElbo(),
            ("reconstruction", "prior_matching", "consistency", "elbo", "consistency_literal_kl"),
        ),
        "denoising_form": (DenoisingElbo(), ("prior_matching", "denoising_matching", "elbo")),
        "trajectory_form": (TrajectoryElbo(), ("elbo",)),
    }
    dims, relative = 16, True

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        for key in self.numbers:
            if not (is_number(case[key]) and math.isfinite(case[key])):
                raise InputError(f"{key} is {case[key]!r}; it must be a finite number")
        if case["T"] != int(case["T"]):
            raise InputError(f"T is {case['T']!r}; it must be a whole number")
        if case["reverse_variance"] not in list(VARIANCES):
            raise InputError(f"reverse_variance is {case['reverse_variance']!r}; it must be 'beta' or 'posterior'")
        if not case["data_var"] > 0:
            raise InputError(f"data_var = {case['data_var']} must be positive")
        self.check_expected(1)
        schedule = LinearChain(int(case["T"]), case["beta_start"], case["beta_end"])
        self.model = process.DiffusionModel(
            network=OptimalEps(schedule, case["data_mean"], case["data_var"]),
            schedule=schedule,
            parameterization=process.EpsParameterization(),
            conditioning=process.TimeConditioning(),
            variance=VARIANCES[case["reverse_variance"]](),
            decoder=process.PlainGaussian(levels=256),
            clip_x0=False,
        )

    def data(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        x0 = torch.randn(batch, 1, 4, 4, generator=generator, dtype=torch.float64)
        return [self.case["data_mean"] + self.case["data_var"] ** 0.5 * x0]

    def expected(self, row: int, form: str, name: str) -> Any:
        # the reconstruction belongs to all forms
        part = self.case if name == "reconstruction" else self.case.get(form, {})
        if not isinstance(part, dict):
            raise InputError(f"{form} does not hold numbers by name: {part}")
        return part.get(name)

    def result(self, found: list[Found]) -> dict[str, Any]:
        return {"reconstruction": found[0]["consistency_form"].pop("reconstruction"), **found[0]}


class LinearHierarchy(World):
    """A hierarchical VAE with linear levels."""

    keys = ("kind", "x", "encoder", "decoder")
    forms: ClassVar = {
        "consistency_form": (ConsistencyElbo(), ("reconstruction", "prior_matching", "consistency", "elbo")),
        "trajectory_form": (TrajectoryElbo(), ("elbo",)),
    }

    def __init__(self, case: dict[str, Any]) -> None:
        super().__init__(case)
        self.x = numbers(case, "x", (None, None))
        up, down = case["encoder"], case["decoder"]
        if not (isinstance(up, list) and isinstance(down, list) and len(up) == len(down)):
            raise InputError("encoder and decoder must be lists of one length, with an object for each level")
        levels = [process.LinearLevel(len(numbers(each, "b", (None,)))) for each in up]
        self.model = process.HierarchicalVAE(levels, process.PlainGaussian(levels=256), self.x.shape[1:]).double()
        for level, *sides in zip(levels, up, down, strict=True):
            for side, linear, log_var in zip(
                sides, (level.up, level.down), (level.log_var_up, level.log_var_down), strict=True
            ):
                var = numbers(side, "var", tuple(log_var.shape))
                if not bool((var > 0).all()):
                    raise InputError("var must be positive")
                with torch.no_grad():
                    linear.weight.copy_(numbers(side, "A", tuple(linear.weight.shape)))
                    linear.bias.copy_(numbers(side, "b", tuple(linear.bias.shape)))
                    log_var.copy_(var.log())
        exact = case.get("exact")
        if exact is not None and not (isinstance(exact, list) and len(exact) == len(self.x)):
            raise InputError(f"exact must be a list with an object for each of the {len(self.x)} entries of x")
        self.check_expected(len(self.x))

    def data(self, batch: int, generator: torch.Generator) -> list[Tensor]:
        return [x.expand(32 * batch, -1) for x in self.x]  # small vectors

    def expected(self, row: int, form: str, name: str) -> Any:
        exact = (self.case.get("exact") or [{}] * len(self.x))[row]
        if not isinstance(exact, dict):
            raise InputError(f"exact[{row}] does not hold numbers by name: {exact}")
        return exact.get(name)

    def result(self, found: list[Found]) -> dict[str, Any]:
        return {"terms": found}


WORLDS: dict[Any, type[World]] = {None: GaussianChain, "linear_hierarchy": LinearHierarchy}


def build(case: dict[str, Any]) -> World:
    """The case's model and data, from the package's own parts."""
    kind = case.get("kind")
    if not isinstance(kind, str | None) or kind not in WORLDS:
        raise InputError(f"kind is {kind!r}; it must be 'linear_hierarchy', or left out for a Gaussian chain")
    return WORLDS[kind](case)


def evaluate(case: dict[str, Any], *, max_se: float, batch: int, seed: int) -> tuple[dict[str, Any], list[str]]:
    """What is printed of a case, and a line for each value that it misses."""
    world = build(case)
    found = world.evaluate(max_se, batch, seed)
    missed = world.misses(found)
    return {key: case[key] for key in world.keys} | world.result(found), missed


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
        batch: draws in a batch, 2 or more
    """
    if not max_se > 0:
        raise InputError(f"--max_se {max_se:g} must be above 0")
    at_least(2, batch=batch)
    read, results, missed, start = read_cases(cases), [], False, time.perf_counter()
    work = partial(evaluate, max_se=max_se, batch=batch, seed=seed)
    # one case a process with one thread each: the tensors are too small to be worth sharing among threads
    # forked from a server that has imported this file once
    context = multiprocessing.get_context("forkserver")
    with ProcessPoolExecutor(initializer=torch.set_num_threads, initargs=(1,), mp_context=context) as pool:
        done = pool.map(work, read) if len(read) > 1 else map(work, read)
        for number, (case, (result, lines)) in enumerate(zip(read, done, strict=True), start=1):
            results.append(result)
            missed = missed or bool(lines)
            seconds, status = time.perf_counter() - start, "missed" if lines else "ok"
            head = (
                f"case {number} of {len(read)} (T = {build(case).model.T}): {status}, {seconds:.0f} s since the start"
            )
            print(head, *lines, sep="\n  ", file=sys.stderr)
    json.dump(results, sys.stdout, indent=1)
    print()
    return int(missed)


if __name__ == "__main__":
    run_script(main, __doc__)

"""Samples of a trained model weighed to a target density: log Z, and observables with errors."""

from collections.abc import Callable, Mapping
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.data.lattice import LatticeSystem
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import model_facts
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.lattice import Estimate, jackknife
from ddpm_lightning.ops import image_generators
from ddpm_lightning.own_code import failure_in_own_code, find_own_modules
from ddpm_lightning.process import GenerativeModel, HierarchicalVAE
from ddpm_lightning.progress import tracked
from ddpm_lightning.samplers import draw_paths, effective_sample_size, log_mean_weight

__all__ = ["reweight"]

Values = Callable[[Tensor], Tensor]
_FEW = 100.0


def reweight(
    trained: Trained,
    n: int = 2000,
    target: str | None = None,
    observable: list[str] | None = None,
    coupling: float | None = None,
    T: int | None = None,
) -> dict[str, Any]:
    """Weigh samples of a model to a target density: effective sample size, log Z, observables with errors.

    Each sample is drawn along a path, whose log ratio log q(path given the sample) - log p(path and sample) and the
    target's log density make its weight. The mean weight is Z. A small effective sample size (ESS) says that a few
    samples carry all: then neither the values nor their errors are to be believed, and this is said.

    The target of a run on Ising, Phi4 or FreeField is exp(-action); else name a function of your own. Writes
    reweight.txt and reweight.json.

    Args:
        trained: the run
        n: samples, 10 or more
        target: import path of a function that takes data ``[B, C, *space]`` in their own units and returns log
            densities ``[B]`` in nats, up to a constant
        observable: import paths of functions of the same data that return [B] numbers
        coupling: of a model that is conditioned on it; also one that it was not trained on
        T: states of the chain, by default the model's own
    """
    at_least(10, n=n)
    module, system = trained.module, trained.system
    cond, coupling = _condition(trained, system, coupling)
    log_target = _log_target(system, target, coupling)
    own = {name: _function(name, "observable") for name in observable or []}
    model: GenerativeModel = module.ema_model if T is None else module.ema_model.with_steps(T)
    states: list[Tensor] = []
    log_weights: list[Tensor] = []
    starts = range(0, n, trained.batch_size)
    parts = [torch.arange(start, min(start + trained.batch_size, n)) for start in starts]
    for index in tracked(parts, n, f"paths of {model.T} steps", count=len):
        generators = image_generators(trained.seed, index)
        like = torch.zeros(len(index), *_top(model, module.shape), device=module.device)
        given = {name: value.expand(len(index), *value.shape[1:]) for name, value in cond.items()}
        paths = draw_paths(model, model.prior(like).sample(generators), generators, **given)
        x = module.scale.to_data(paths.x0)
        # the ratio is that of the standardised field: its density in the units of the data has another constant
        constant = module.scale.density_nats(module.shape) if model.decoder.is_density else 0.0
        log_weights.append((paths.log_ratio - constant).cpu() + log_target(x).double().cpu())
        for function in own.values() if not states else ():
            function(x.cpu())  # one that fails is to fail now, and not after all paths
        states.append(x.cpu())
    x, weights = torch.cat(states), torch.cat(log_weights)
    ess, (log_z, log_z_error) = effective_sample_size(weights), log_mean_weight(weights)
    relative = torch.exp(weights - weights.max())
    measure = _measures(system, own)
    rows = {"model": measure(x, None), "reweighted": measure(x, relative)}
    exact = {} if system is None or coupling is None else system.exact(coupling)
    lines = [
        f"{n} paths of {model.T} steps; effective sample size {ess:.1f} ({ess / n:.2%})",
        f"log Z {log_z:.4f} +- {log_z_error:.4f} nats" + (f", exact {exact['log_Z']:.4f}" if "log_Z" in exact else ""),
    ]
    if ess < _FEW:
        lines.append(
            f"WARNING: an effective sample size below {_FEW:g} is too small to believe: neither the values nor their "
            "errors. Train longer, draw more (--n), or take more steps (--T)"
        )
    lines += ["", f"{'observable':<24}{'model':>24}{'reweighted':>24}{'exact':>14}"]
    for name, plain in rows["model"].items():
        known = f"{exact[name]:.6g}" if name in exact else ""
        lines.append(f"{name:<24}{plain!s:>24}{rows['reweighted'][name]!s:>24}{known:>14}")
    record = {
        **model_facts(module),
        "n": n,
        "T": model.T,
        "coupling": coupling,
        "ess": ess,
        "believable": ess >= _FEW,
        "log_Z": {"mean": log_z, "se": log_z_error},
        "exact": exact,
        **{
            row: {name: {"mean": value.mean, "se": value.se} for name, value in values.items()}
            for row, values in rows.items()
        },
    }
    trained.report("reweight", "\n".join(lines), record)
    return record


def _top(model: GenerativeModel, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of x_T."""
    return tuple(model.shapes[-1]) if isinstance(model, HierarchicalVAE) else shape


def _condition(
    trained: Trained, system: LatticeSystem | None, coupling: float | None
) -> tuple[dict[str, Tensor], float | None]:
    """What the model is told, and the coupling of the target."""
    conditions = [*trained.module.conditions]
    if conditions not in ([], ["vector"]):
        raise InputError(f"{trained.run} is told {', '.join(conditions)}: reweighting knows one coupling (vector) only")
    if conditions and coupling is None:
        raise InputError(f"{trained.run} is told a coupling: give --coupling")
    if conditions:
        assert coupling is not None
        return {"vector": torch.tensor([[coupling]], device=trained.module.device)}, coupling
    if system is None and coupling is not None:
        raise InputError(f"--coupling {coupling:g}: neither this model nor its data have a coupling; leave it out")
    return {}, coupling if system is None or coupling is not None else system.couplings[0]


def _log_target(system: LatticeSystem | None, target: str | None, coupling: float | None) -> Values:
    if target is not None:
        return _function(target, "target")
    if system is None or coupling is None:
        raise InputError("name the target's log density with --target: these data have no action of their own")
    try:
        action = system.action(coupling)
    except InputError as error:
        raise InputError(f"--coupling {coupling:g}: {error}") from None
    return lambda x: -action(system.configurations(x))


def _measures(
    system: LatticeSystem | None, own: Mapping[str, Values]
) -> Callable[[Tensor, Tensor | None], dict[str, Estimate]]:
    def measure(x: Tensor, weights: Tensor | None) -> dict[str, Estimate]:
        found = {} if system is None else system.observables(system.configurations(x), weights)
        for name, function in own.items():
            found[name] = jackknife(lambda means: means[..., 0], function(x)[:, None], weights)
        return found

    return measure


def _function(path: str, option: str) -> Values:
    find_own_modules()
    try:
        function = resolve_name(path)
    except Exception as error:  # a module of the user's may raise anything
        raise InputError(f"--{option} {path} cannot be imported: {failure_in_own_code(error) or error}") from error
    if not callable(function):
        raise InputError(f"--{option} {path} is no function")
    return partial(_checked, function, path, option)


def _checked(function: Callable[[Tensor], Any], path: str, option: str, x: Tensor) -> Tensor:
    try:
        values = function(x.clone())
    except Exception as error:
        failed = failure_in_own_code(error) or f"{type(error).__name__}: {error}"
        raise InputError(f"--{option} {path} fails: {' '.join(failed.split())}") from error
    if not isinstance(values, Tensor) or values.shape != (len(x),):
        found = f"shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"--{option} {path} returned {found} for data {list(x.shape)}: return a tensor of [{len(x)}]")
    if values.is_complex():
        raise InputError(f"--{option} {path} returned complex numbers: return real ones")
    # a target may be 0, whose logarithm is -inf
    known = (values < torch.inf) & ((values > -torch.inf) | (option == "target"))
    if not bool(known.all()):
        count = int((~known).sum())
        raise InputError(f"--{option} {path} returned NaN or infinity for {count} of {len(x)} samples: return numbers")
    return values.detach()

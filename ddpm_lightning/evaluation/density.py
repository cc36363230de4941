"""The log density, or log probability, that a model gives to each row of a file."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.data import Batch
from ddpm_lightning.data.stored import ArrayFile, StoredRows
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import csv_text, mean_and_error, model_facts
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers import ExactDivergence, HutchinsonDivergence, ProbabilityFlow

__all__ = ["density"]


def density(
    trained: Trained,
    data: str | None = None,
    n: int | None = None,
    key: str | None = None,
    label: str | None = None,
    vector: str | None = None,
    field: str | None = None,
    flow: bool = False,
    probes: int = 1,
    tolerance: float = 0.1,
    max_steps: int = 4000,
) -> dict[str, Any]:
    """Log density of each row of a file under a trained model, in nats and in the units of the file.

    The bound is a lower bound on log p, by the first of the run's test_bounds, from one draw. With --flow there is also
    the density of the probability flow, another model with the same network, with its own numerical error; of random
    signs (--probes 1 or more) it is an unbiased estimate. Pictures of grey levels have a bound on log probabilities;
    their flow's density is one in units of a grey level.

    Of a lattice system with a known log Z there is also the exact value, and how far the model lies below it. For
    samples of the system the mean of this difference is KL(data || model) by the flow's density, and no less than it by
    the bound. Writes density.csv, a line for each row, and density.txt and density.json.

    Args:
        trained: the run
        data: .npy, .npz, HDF5 or zarr file ``[N, C, *space]``, in the units of the training data; by default rows of
            the run's own test split
        n: so many rows, the first of a file; by default all
        key: name of the array in it
        label: name of the array of classes, for a model that is told them
        vector: name of the array of vectors, likewise
        field: name of the array of fields, likewise
        flow: also the density of the probability flow
        probes: random signs for each row, 0 for the exact divergence
        tolerance: numerical error of the flow, in nats a row
        max_steps: steps of the flow at most
    """
    at_least(0, probes=probes)
    at_least(2, n=2 if n is None else n)
    module, model = trained.module, trained.module.ema_model
    if flow and not isinstance(model, DiffusionModel):
        raise InputError(f"--flow is for diffusion models, and {trained.run} holds a {type(model).__name__}")
    names = {"key": key, "label": label, "vector": vector, "field": field}
    if data is None:
        if given := [f"--{name}" for name, value in names.items() if value is not None]:
            raise InputError(f"{given[0]} names an array of a file: give the file with --data")
        split = trained.data.split("test")
        rows = split.batch(torch.arange(len(split))[:n])
    else:
        rows = _rows(trained, ArrayFile(data, "--data"), names, n)
    constant = module.scale.density_nats(module.shape)
    bound = module.bounds["test"][0]
    found: dict[str, list[Tensor]] = {"bound_nats": []}
    solver = ProbabilityFlow(tolerance=tolerance, max_steps=max_steps)
    divergence = HutchinsonDivergence(probes) if probes else ExactDivergence()
    for part in trained.batches(rows, "density"):
        with torch.inference_mode():
            nats = module.bound(bound, part)["elbo"]
        found["bound_nats"].append((nats + (constant if model.decoder.is_density else 0.0)).cpu())
        if flow and isinstance(model, DiffusionModel):
            generators, cond = image_generators(trained.seed, part.index), module.condition(part)
            x0 = module.scale.to_model(part.image)
            of = solver.image_log_likelihood(model, x0, divergence=divergence, generators=generators, **cond)
            columns = {"flow_nats": of.log_prob + constant, "flow_error_nats": of.error, "evaluations": of.evaluations}
            for name, values in columns.items():
                found.setdefault(name, []).append(values.cpu())
    if (exact := _exact(trained, rows)) is not None:
        found["exact_nats"] = [exact]
    columns = {name: torch.cat(parts).double() for name, parts in found.items()}
    grey, count = module.levels is not None, len(rows.index)
    units = "nats a row; " + ("of grey levels" if grey else "a density in the units of the data")
    lines = [f"{count} rows of {data or 'the test split'}; {units}; errors are standard errors over rows"]
    figures: dict[str, Any] = {}
    whats = {"bound_nats": f"bound ({bound.name} form)", "flow_nats": "probability flow", "exact_nats": "exact"}
    for name, what in whats.items():
        if name not in columns:
            continue
        mean, error = mean_and_error(columns[name])
        figures[name] = {"mean": mean, "se": error}
        line = f"{what:<28} {mean:.4f} +- {error:.4f}"
        if exact is not None and name != "exact_nats":
            below, its_error = mean_and_error((exact - columns[name]) / module.dims)
            figures[name] |= {"below_exact_a_site": {"mean": below, "se": its_error}}
            line += f"; below the exact one by {below:.5f} +- {its_error:.5f} a site"
        lines.append(line)
    if flow:
        errors = columns["flow_error_nats"]
        lines.append(f"{'numerical error of the flow':<28} {errors.mean():.4f} in the mean, {errors.max():.4f} at most")
    if not grey:
        lines.append(
            f"of this the Jacobian of the standardisation is {constant:.4f}: the sum of -log std over all values"
        )
    record = {**model_facts(module), "data": data or "test split", "rows": count, "units": units, "figures": figures}
    table = {"row": [*range(count)], **{name: values.tolist() for name, values in columns.items()}}
    trained.report("density", "\n".join(lines), record, {"density.csv": csv_text(table)})
    return record


def _exact(trained: Trained, rows: Batch) -> Tensor | None:
    """Exact log density or probability of the rows, float64 ``[n]``; None where it is not known."""
    system = trained.system
    if system is None:
        return None
    phi = system.configurations(rows.image.cpu())
    if "vector" in trained.module.conditions:
        couplings = rows.cond["vector"][:, 0].cpu()
    elif len(system.couplings) == 1:
        couplings = torch.full((len(phi),), system.couplings[0])
    else:
        return None  # the model is one of the mixture, whose density is another one
    values = torch.empty(len(phi), dtype=torch.float64)
    for coupling in couplings.unique().tolist():
        these = couplings == coupling
        known = system.exact(coupling)
        if "log_Z" not in known:
            return None
        values[these] = -system.action(coupling)(phi[these]).double() - known["log_Z"]
    return values


def _rows(trained: Trained, file: ArrayFile, names: dict[str, str | None], n: int | None) -> Batch:
    """Rows of a file, with the conditions that the model is told."""
    module = trained.module
    array = file.array(names["key"], "--key")
    shape, grey = tuple(array.shape[1:]), module.levels is not None
    if shape not in (module.shape, module.shape[1:] if module.shape[0] == 1 else module.shape):
        raise InputError(f"--data {file.path}: has rows of shape {list(shape)}; the model's are {list(module.shape)}")
    if (array.dtype.kind == "f") == grey:
        wanted = "uint8 grey levels" if grey else "real numbers"
        raise InputError(f"--data {file.path}: holds {array.dtype}, and the model is one of {wanted}")
    index = np.arange(array.shape[0])[:n]
    if len(index) < 2:
        raise InputError(f"--data {file.path}: holds {len(index)} rows; give two or more")
    if grey:
        levels = StoredRows(array, index, shape, f"--data {file.path}")[:]
        if not bool(((levels >= 0) & (levels < module.grey_levels)).all()):
            raise InputError(
                f"--data {file.path}: holds {levels.min():g} to {levels.max():g}, and the model's grey levels are "
                f"0..{module.grey_levels - 1}"
            )
        images = levels.to(torch.uint8).reshape(-1, *module.shape)
    else:
        images = StoredRows(array, index, module.shape, str(file.path)).in_memory()
    labels, cond = torch.zeros(len(index), dtype=torch.int64), {}
    for name in module.conditions:
        if names[name] is None:
            raise InputError(f"this model is told a {name} of each row: name its array with --{name}")
        values = file.array(names[name], f"--{name}")
        if values.shape[:1] != array.shape[:1]:
            raise InputError(f"--{name} {names[name]}: has {list(values.shape)} for {array.shape[0]} rows")
        if name == "label":
            last = (module.num_classes or 0) - (0 if module.label_dropout else 1)
            labels = StoredRows(values, index, (), f"--label {names[name]}").classes(last)
        else:
            space = () if name == "vector" else module.shape[1:]
            size = (module.hparams["vector_size" if name == "vector" else "field_channels"], *space)
            cond[name] = StoredRows(values, index, size, f"{file.path}, {names[name]}")[:]
    return Batch(images, labels, torch.from_numpy(index), cond)

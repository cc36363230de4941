"""Observables of samples beside those of the data, and beside exact values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ddpm_lightning.data.lattice import LatticeSystem, by_chain
from ddpm_lightning.lattice import Estimate, Spectrum, power_spectrum

__all__ = ["Observed", "observables_report", "observe"]


@dataclass(frozen=True, eq=False)
class Observed:
    """Samples and data of one coupling."""

    coupling: float | None
    """None for a model that is not told the couplings of its data."""
    samples: Mapping[str, Estimate]
    data: Mapping[str, Estimate]
    exact: Mapping[str, float]
    spectra: Mapping[str, Spectrum]
    """Of ``samples`` and ``data``."""
    magnetisation: Mapping[str, Tensor]
    """Of each of the ``samples`` and of the ``data``, ``[n]``."""


def observe(system: LatticeSystem, coupling: float | None, samples: Tensor, data: Tensor) -> Observed:
    """Compare samples ``[n, 1, *space]`` with the configurations of a split, both as they lie in a batch."""
    phi, (chains, block) = system.configurations(samples), by_chain(system.configurations(data))
    known = {"samples": (phi, 1), "data": (chains, block)}
    values = {name: system.observables(fields, block=of) for name, (fields, of) in known.items()}
    spectra = {name: power_spectrum(fields, block=of) for name, (fields, of) in known.items()}
    means = {name: fields.double().flatten(1).mean(1) for name, (fields, _) in known.items()}
    exact = {} if coupling is None else system.exact(coupling)
    return Observed(coupling, values["samples"], values["data"], exact, spectra, means)


def observables_report(observed: Sequence[Observed], how: str) -> tuple[str, list[dict[str, Any]]]:
    """A table for each coupling as text, and as plain data. ``how`` says how the samples were drawn."""
    lines, records = [how], []
    for each in observed:
        lines += [""] if each.coupling is None else ["", f"coupling {each.coupling:g}"]
        lines.append(f"{'observable':<18}{'samples':>24}{'data':>24}{'apart (se)':>12}{'exact':>14}")
        record: dict[str, Any] = {"coupling": each.coupling}
        for name, found in each.samples.items():
            data = each.data[name]
            error = (found.se**2 + data.se**2) ** 0.5
            apart = (found.mean - data.mean) / error if error else float("nan")
            exact = f"{each.exact[name]:.6g}" if name in each.exact else ""
            lines.append(f"{name:<18}{found!s:>24}{data!s:>24}{apart:>12.1f}{exact:>14}")
            record[name] = {
                "samples": {"mean": found.mean, "se": found.se},
                "data": {"mean": data.mean, "se": data.se},
                "exact": each.exact.get(name),
            }
        records.append(record)
    return "\n".join(lines), records

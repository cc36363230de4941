r"""Lattice systems whose answers are known: the Ising model, the free scalar field and :math:`\phi^4`.

They test a generative model where pictures cannot: the entropy of the data is exact, so a bound of so many bits/spin is
so many bits/spin above the best possible one; and observables of samples have exact values.

Everything is periodic. A configuration is ``[1, *space]``, a batch ``[B, 1, *space]``, with any number of space
dimensions unless it is said otherwise. A site is a place of the lattice, and N is the number of sites.
"""

from ddpm_lightning.lattice.actions import Action, FreeFieldAction, IsingAction, Phi4Action
from ddpm_lightning.lattice.errors import Estimate, integrated_autocorrelation_time, jackknife
from ddpm_lightning.lattice.exact import free_field_exact, ising_exact, phi4_ring_exact
from ddpm_lightning.lattice.observables import (
    Spectrum,
    binder_cumulant,
    energy,
    magnetisation,
    mean_action,
    mean_square,
    neighbour_product,
    power_spectrum,
    specific_heat,
    susceptibility,
)
from ddpm_lightning.lattice.simulation import Chains, simulate_free_field, simulate_ising, simulate_phi4

__all__ = [
    "Action",
    "Chains",
    "Estimate",
    "FreeFieldAction",
    "IsingAction",
    "Phi4Action",
    "Spectrum",
    "binder_cumulant",
    "energy",
    "free_field_exact",
    "integrated_autocorrelation_time",
    "ising_exact",
    "jackknife",
    "magnetisation",
    "mean_action",
    "mean_square",
    "neighbour_product",
    "phi4_ring_exact",
    "power_spectrum",
    "simulate_free_field",
    "simulate_ising",
    "simulate_phi4",
    "specific_heat",
    "susceptibility",
]

r"""Actions: functions of a configuration with :math:`p(\phi) = e^{-S(\phi)} / Z`.

So ``-action(phi)`` is the log density, up to log Z: what samples of a model are reweighted with."""

from dataclasses import dataclass

from torch import Tensor

from ddpm_lightning.errors import InputError, positive
from ddpm_lightning.lattice.sites import bond_sum, check_fields, neighbour_sum, site_sum

__all__ = ["Action", "FreeFieldAction", "IsingAction", "Phi4Action"]


class Action:
    """S of configurations on periodic lattices with any number of space dimensions."""

    def __call__(self, phi: Tensor) -> Tensor:
        """S in nats, float64: ``[B, 1, *space]`` -> ``[B]``."""
        raise NotImplementedError

    def gradient(self, phi: Tensor) -> Tensor:
        """The derivative of S by the field at each site, of the shape and the dtype of ``phi``."""
        raise NotImplementedError


@dataclass(frozen=True)
class IsingAction(Action):
    r""":math:`S = -\beta \sum_x \sum_\mu s_x s_{x + \mu}`, spins -1 and 1.

    Args:
        beta: inverse temperature, positive.
    """

    beta: float

    def __post_init__(self) -> None:
        positive(beta=self.beta)

    def __call__(self, phi: Tensor) -> Tensor:
        return -self.beta * bond_sum(check_fields(phi))

    def gradient(self, phi: Tensor) -> Tensor:
        """The derivative of S read as a function of real numbers."""
        return -self.beta * neighbour_sum(check_fields(phi))


@dataclass(frozen=True)
class FreeFieldAction(Action):
    r""":math:`S = \sum_x [ \tfrac12 \sum_\mu (\phi(x + \mu) - \phi(x))^2 + \tfrac{m^2}{2} \phi(x)^2 ]`.

    Args:
        m2: the squared mass in lattice units, positive.
    """

    m2: float

    def __post_init__(self) -> None:
        positive(m2=self.m2)

    def __call__(self, phi: Tensor) -> Tensor:
        dim = check_fields(phi).ndim - 2
        return (0.5 * self.m2 + dim) * site_sum(phi.square()) - bond_sum(phi)

    def gradient(self, phi: Tensor) -> Tensor:
        return (self.m2 + 2 * (check_fields(phi).ndim - 2)) * phi - neighbour_sum(phi)


@dataclass(frozen=True)
class Phi4Action(Action):
    r""":math:`S = \sum_x [ -2 \kappa \sum_\mu \phi(x) \phi(x + \mu) + (1 - 2 \lambda) \phi^2 + \lambda \phi^4 ]`.

    Args:
        kappa: hopping parameter.
        lam: coupling, positive. Without it there is no lowest action for a large kappa: take FreeFieldAction.
    """

    kappa: float
    lam: float

    def __post_init__(self) -> None:
        positive(lam=self.lam)
        if not abs(self.kappa) < 1e38:  # the end of float32
            raise InputError(f"kappa = {self.kappa} must be finite, and below 1e38")

    def __call__(self, phi: Tensor) -> Tensor:
        squared = check_fields(phi).square()
        return site_sum(squared * (1 - 2 * self.lam + self.lam * squared)) - 2 * self.kappa * bond_sum(phi)

    def gradient(self, phi: Tensor) -> Tensor:
        local = phi * (2 - 4 * self.lam + 4 * self.lam * phi.square())
        return local.sub_(neighbour_sum(check_fields(phi)), alpha=2 * self.kappa)

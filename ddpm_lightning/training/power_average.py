r"""Averages of the weights whose width is chosen after training (Karras et al. 2023, arXiv 2312.02696, section 3).

After t optimiser steps, with the weights theta held constant over each step,

.. math:: \hat\theta_\gamma(t) = \int_0^t p_{\gamma, t}(\tau) \, \theta(\tau) \, d\tau, \qquad
    p_{\gamma, t}(\tau) = (\gamma + 1) \, \tau^\gamma / t^{\gamma + 1},

is kept up by a decay of (1 - 1/t)^(gamma + 1) at step t, and forgets the first weights. The relative width of the
profile p is its standard deviation over the length of training,

.. math:: \sigma_\text{rel}^2 = \frac{\gamma + 1}{(\gamma + 2)^2 (\gamma + 3)}.

The average with any other profile p is approximated by snapshots of two averages: sum_i x_i p_i is fitted to p.
"""

import numpy as np
from numpy.typing import NDArray

from ddpm_lightning.errors import InputError

__all__ = ["exponent", "fit_profile", "power_decay"]

Array = NDArray[np.float64]


def exponent(sigma_rel: float) -> float:
    """gamma of a profile of relative width ``sigma_rel``, 0.01 to 0.28.

    Raises:
        InputError: another width.
    """
    if not 0.01 <= sigma_rel <= 0.28:
        raise InputError(f"sigma_rel = {sigma_rel:g} must lie between 0.01 and 0.28")
    return float(np.roots([1, 7, 16 - sigma_rel**-2, 12 - sigma_rel**-2]).real.max())


def power_decay(step: int, gamma: float) -> float:
    """Decay of the average after ``step`` >= 1 optimiser steps; 0 at the first."""
    return float((1 - 1 / step) ** (gamma + 1))


def fit_profile(steps: Array, gammas: Array, step: float, gamma: float) -> tuple[Array, float]:
    """Weights x_i of snapshots, and how well sum_i x_i p_i fits the profile p of ``gamma`` at ``step``.

    Least squares over all x of sum 1, so that weights that stood still stay what they were. A profile that is among
    the snapshots is returned to the bit.

    Args:
        steps: of the snapshots, ``[n]``, each from 1 to ``step``.
        gammas: of the snapshots, ``[n]``.
        step: of the profile.
        gamma: of the profile.

    Returns:
        x ``[n]``, and the norm of sum_i x_i p_i - p relative to that of p, over time.
    """
    t, g = steps / step, gammas
    known = _product(t[:, None], g[:, None], t, g)
    wanted = _product(t, g, 1.0, gamma)
    norm2 = float(_product(1.0, gamma, 1.0, gamma))
    # in differences from the nearest profile, whose weight takes up the rest of the sum
    near = int(np.argmin(known.diagonal() - 2 * wanted))
    differences = known - known[near] - known[:, near, None] + known[near, near]
    x = np.linalg.lstsq(differences, wanted - wanted[near] - known[near] + known[near, near], rcond=1e-12)[0]
    x[near] = 0
    x[near] = 1 - x.sum()
    square = x @ known @ x - 2 * x @ wanted + norm2
    return x, float(np.sqrt(max(square, 0.0) / norm2))


def _product(t: Array | float, a: Array | float, s: Array | float, b: Array | float) -> Array:
    """Integral over time of p_{a, t} p_{b, s}."""
    t, a, s, b = np.broadcast_arrays(t, a, s, b)
    first, last = np.minimum(t, s), np.maximum(t, s)
    return np.asarray((a + 1) * (b + 1) / (a + b + 1) * (first / last) ** np.where(t <= s, b, a) / last)

r"""The common part of the three forms of the bound: states of the chain, and one sum over its reverse steps.

Every form sums over the reverse steps :math:`p(x_n | x_{n+1})`, n = 1..T-1, and adds the decoder :math:`p(x_0 | x_1)`
and the end x_T. Each step costs one evaluation of the network, the decoder one more. Only the ``[B]`` costs of a step
are kept (without gradients).
"""

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.objectives.steps import CostProfile, EqualRuns, SpreadSteps, StepChoice, StepDraw
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import DiffusionModel, GenerativeModel

__all__ = ["ChainWalk", "ElboEstimator", "Window"]


@dataclass(frozen=True)
class Window:
    """Neighbouring states :math:`x_{n-1}, x_n, x_{n+1}` of a chain, and n, a number or int64 ``[B]``."""

    n: int | Tensor
    before: Tensor
    at: Tensor
    after: Tensor


class ChainWalk:
    r"""Draws from :math:`q(x_1, \dots, x_T | x_0)`: a window :math:`(x_{n-1}, x_n, x_{n+1})` for each chosen n.

    If all n are chosen, the windows belong to one draw of the whole path. The log ratios that a form adds up are then
    those of one path, and most of their noise cancels. If some n are chosen, each window is a draw of its own. Iterate
    once; then ``x_last_but_one`` and ``x_last`` hold the end of the chain.

    Attributes:
        indices: int64 ``[K, B]``, the n of each window.
        x_first: x_1.
        q_first: q(x_1 | x_0).
    """

    x_last_but_one: Tensor
    x_last: Tensor

    def __init__(self, model: GenerativeModel, x0: Tensor, indices: Tensor, generators: Generators) -> None:
        self._model, self._x0, self._generators, self.indices = model, x0, generators, indices
        self.q_first = model.encoder_marginal(1, x0)
        self.x_first = self.q_first.sample(generators)

    def __iter__(self) -> Iterator[Window]:
        return self._along_one_path() if len(self.indices) == self._model.T - 1 else self._apart()

    def _move(self, n: int | Tensor, before: Tensor) -> Tensor:
        return self._model.encoder_step(n, before, self._x0).sample(self._generators)

    def _along_one_path(self) -> Iterator[Window]:
        before, at = self._x0, self.x_first
        for n in range(1, self._model.T):
            after = self._move(n + 1, at)
            yield Window(n, before, at, after)
            before, at = at, after
        self.x_last_but_one, self.x_last = before, at

    def _apart(self) -> Iterator[Window]:
        model, T = self._model, self._model.T
        for n in self.indices:
            before = model.encoder_marginal(n - 1, self._x0).sample(self._generators)
            at = self._move(n, before)
            yield Window(n, before, at, self._move(n + 1, at))
        self.x_last_but_one = model.encoder_marginal(T - 1, self._x0).sample(self._generators)
        self.x_last = self._move(T, self.x_last_but_one)


class ElboEstimator:
    """Base of the estimators of the bound.

    Args:
        steps: number of reverse steps to evaluate, at least 1; the choice (:meth:`choosing`) leaves the estimate
            unbiased. None for all T - 1 of them.
        T: evaluate the model as a chain of that many states, whatever it was trained as; None for its own.
    """

    name: str
    """The form's name in logs and tables."""
    term_kinds: Mapping[str, TermKind]
    """The kind of each term, by the keys of :meth:`ElboTerms.named`, in the order in which a table shows them."""
    draws: int = 1
    """Draws from q for each image."""
    needs_posterior = False
    """True for a form of diffusion models only: it needs q(x_s | x_t, x_0)."""
    choice: StepChoice = EqualRuns()
    """Which steps are evaluated where not all are."""

    def __init__(self, steps: int | None = None, T: int | None = None) -> None:
        if steps is not None:
            at_least(1, "None stands for all of the reverse steps", steps=steps)
        if T is not None:
            at_least(1, "None stands for the model's own", T=T)
        self.steps, self.T = steps, T

    @property
    def term_names(self) -> tuple[str, ...]:
        return tuple(self.term_kinds)

    def __call__(self, model: GenerativeModel, x0: Tensor, generators: Generators = None, **cond: Any) -> ElboTerms:
        self.check(model)
        return self.estimate(model if self.T is None else model.with_steps(self.T), x0, generators, **cond)

    def check(self, model: GenerativeModel) -> None:
        """Raise InputError for a model of which the form needs what it cannot give."""
        if self.needs_posterior and not isinstance(model, DiffusionModel):
            raise InputError(
                f"the {self.name} form needs q(x_s | x_t, x_0), which {type(model).__name__} does not know for learned "
                "encoders: use ConsistencyElbo or TrajectoryElbo"
            )

    def choosing(self, choice: StepChoice, steps: int | None = None) -> Self:
        """The same form with another choice of steps, and of ``steps`` of them if given."""
        other = copy(self)
        other.choice, other.steps = choice, self.steps if steps is None else steps
        return other

    def measure(
        self, profile: CostProfile, model: GenerativeModel, x0: Tensor, generators: Generators = None, **cond: Any
    ) -> None:
        """Let a profile know what the steps of this form cost the model on these images, by evaluating at most
        ``profile.points`` of them for each image."""
        spread = self.choosing(SpreadSteps(), profile.points)
        terms = spread(model, x0, generators, **cond)
        profile.measure(spread.parts(model.T), terms.step_indices[0], terms.step_costs)

    def parts(self, own_T: int) -> int:
        """For a model of ``own_T`` states, the number of steps that there are to choose from."""
        return (self.T or own_T) - 1

    def evaluated(self, own_T: int) -> tuple[int | None, int]:
        """For a model of ``own_T`` states, the numbers of states (None: infinitely many) and of steps evaluated."""
        T = self.T or own_T
        return T, T - 1 if self.steps is None else min(self.steps, T - 1)

    def steps_at(self, model: Any) -> tuple[Tensor, float] | None:
        """Where the steps lie to which ``ElboTerms.step_indices`` belong: step n from time ``edges[n - 1]`` to
        ``edges[n]``; and the share of its cost in the sum over all of them. None where a step has no cost of its own.
        """
        return (model if self.T is None else model.with_steps(self.T)).grid[1:].detach(), 1.0

    def estimate(self, model: Any, x0: Tensor, generators: Generators, **cond: Any) -> ElboTerms:
        """The bound of each image, for the model's own chain: a DiffusionModel where ``needs_posterior``."""
        raise NotImplementedError

    @staticmethod
    def assemble(
        reconstruction: Tensor,
        step_cost_name: str,
        step_costs: list[Tensor],
        draw: StepDraw,
        end_costs: Mapping[str, Tensor],
        diagnostics: Mapping[str, list[Tensor]] | None = None,
    ) -> ElboTerms:
        """Weight and add up the costs of the steps; a cost of the ends under the same name is added to them."""

        def weighted_sum(values: list[Tensor]) -> Tensor:
            return sum((w * v for w, v in zip(draw.weight, values, strict=True)), torch.zeros_like(reconstruction))

        costs = dict(end_costs)
        costs[step_cost_name] = weighted_sum(step_costs) + costs.get(step_cost_name, 0.0)
        stacked = torch.stack(step_costs, 1) if step_costs else reconstruction.new_zeros(len(reconstruction), 0)
        sums = {name: weighted_sum(values) for name, values in (diagnostics or {}).items()}
        return ElboTerms(reconstruction, costs, stacked, draw.index.T, sums)

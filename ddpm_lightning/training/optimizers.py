"""Optimisers that torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for weights that are matrices, AdamW for all others.

    A convolution's kernel ``[out, in, k, k]`` is the matrix ``[out, in k k]``. Its step is the orthogonal matrix
    nearest to the momentum, by five iterations of Newton and Schulz, times 0.2 sqrt(max(rows, columns)): so it has the
    size of a step of AdamW, and one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). Matrices of one
    shape are stacked, which spares a GPU many small kernels.

    Args:
        params: the weights.
        lr: learning rate.
        weight_decay: decoupled, for all weights.
        momentum: Nesterov's, of the matrices.
        betas: decay of AdamW's two moments.
        eps: added to AdamW's denominator.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        numbers = {"lr": (lr, float("inf")), "weight_decay": (weight_decay, float("inf")), "momentum": (momentum, 1)}
        for name, (value, end) in {**numbers, "betas": (min(betas), 1), "eps": (eps, float("inf"))}.items():
            if not 0 <= value < end or max(betas) >= 1:
                raise ValueError(f"{name} = {value if name != 'betas' else betas} must lie in [0, {end})")
        every = list(params)
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": tuple(betas), "eps": eps}
        groups = [{"params": [p for p in every if (p.ndim >= 2) == of], "matrices": of} for of in (True, False)]
        super().__init__([group for group in groups if group["params"]] or every, {**defaults, "matrices": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the loss and its gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if parameters:
                (self._muon if group["matrices"] else self._adamw)(parameters, group)
        return loss

    def _state(self, name: str, parameters: list[Any]) -> list[Tensor]:
        return [self.state[p].setdefault(name, torch.zeros_like(p)) for p in parameters]

    def _muon(self, parameters: list[Any], group: dict[str, Any]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        momenta = self._state("momentum", parameters)
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        steps = torch._foreach_lerp(gradients, momenta, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        by_shape: dict[torch.Size, list[int]] = {}
        for index, parameter in enumerate(parameters):
            by_shape.setdefault(parameter.shape, []).append(index)
        for indices in by_shape.values():
            matrices = torch.stack([steps[index].flatten(1) for index in indices])
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            for index, matrix in zip(indices, _orthogonal(matrices), strict=True):
                parameters[index].add_(matrix.view(parameters[index].shape), alpha=-scale * group["lr"])

    def _adamw(self, parameters: list[Any], group: dict[str, Any]) -> None:
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            self._state("mean", parameters),
            self._state("square", parameters),
            [],
            [self.state[p].setdefault("step", torch.zeros(())) for p in parameters],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of ``[n, rows, columns]``, roughly: singular values are about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x

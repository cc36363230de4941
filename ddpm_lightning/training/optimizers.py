"""Optimisers that torch does not have."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["MuonAdamW"]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for weights that are matrices, AdamW for all others.

    A convolution's kernel ``[out, in, k, k]`` is the matrix ``[out, in k k]``. Its step is the orthogonal matrix
    nearest to the momentum, by five iterations of Newton and Schulz, times 0.2 sqrt(max(rows, columns)): so it has the
    size of a step of AdamW, and one learning rate serves both (Liu et al. 2025, arXiv 2502.16982).

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
            update = self._muon if group["matrices"] else self._adam
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update(parameter, group), alpha=-group["lr"])
        return loss

    def _muon(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - group["momentum"])
        matrix = gradient.lerp(state["momentum"], group["momentum"]).flatten(1)
        scale: float = 0.2 * max(matrix.shape) ** 0.5
        return (scale * _orthogonal(matrix)).view(parameter.shape)

    def _adam(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        state, gradient, (beta1, beta2) = self.state[parameter], parameter.grad, group["betas"]
        assert gradient is not None
        if not state:
            state.update(step=torch.zeros(()), mean=torch.zeros_like(parameter), square=torch.zeros_like(parameter))
        state["step"] += 1
        state["mean"].lerp_(gradient, 1 - beta1)
        state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step = float(state["step"])
        deviation = (state["square"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        return state["mean"] / (1 - beta1**step) / deviation


def _orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal matrix nearest to a matrix, roughly: its singular values come to lie around 1."""
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if wide is not matrix else x

"""An optimiser and a schedule of the learning rate that torch does not have."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LRScheduler

from ddpm_lightning.errors import InputError
from ddpm_lightning.training.sharding import part_of, whole

__all__ = ["MuonAdamW", "WarmupDecay"]


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) for weights that are matrices, AdamW for all others.

    A convolution's kernel ``[out, in, k, k]`` is the matrix ``[out, in k k]``. Its step is the orthogonal matrix
    nearest to the momentum, by five iterations of Newton and Schulz, times 0.2 sqrt(max(rows, columns)): so it has the
    size of a step of AdamW, and one learning rate serves both (Liu et al. 2025, arXiv 2502.16982). Matrices of one
    shape are stacked, which spares a GPU many small kernels. Of sharded weights each process works out the whole steps.

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
        numbers = {"lr": (lr,), "weight_decay": (weight_decay,), "momentum": (momentum,), "betas": betas, "eps": (eps,)}
        for name, values in numbers.items():
            end = 1 if name in ("momentum", "betas") else float("inf")
            if not all(0 <= value < end for value in values):
                raise ValueError(f"{name} = {', '.join(map(str, values))} must lie in [0, {end})")
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
        for parameter in parameters:
            if name not in self.state[parameter]:
                self.state[parameter][name] = torch.zeros_like(parameter)
        return [self.state[parameter][name] for parameter in parameters]

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
            matrices = torch.stack([whole(steps[index]).flatten(1) for index in indices])
            scale = 0.2 * max(matrices.shape[1:]) ** 0.5
            of_shape = [parameters[index] for index in indices]
            changes = _orthogonal(matrices).view(len(indices), *of_shape[0].shape).unbind()
            parts = [part_of(change, parameter) for change, parameter in zip(changes, of_shape, strict=True)]
            torch._foreach_add_(of_shape, parts, alpha=-scale * group["lr"])

    def _adamw(self, parameters: list[Any], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros(())
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            self._state("mean", parameters),
            self._state("square", parameters),
            [],
            [self.state[parameter]["step"] for parameter in parameters],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


class WarmupDecay(LRScheduler):
    """The learning rate rises in a straight line to the optimiser's own, and falls in one to 0 at the last step.

    Args:
        optimizer: whose learning rate is the largest one.
        warm_up: share of the steps in which it rises, in [0, 1).
        total_steps: steps until it is 0; None for as many as the Trainer takes, so that a longer training needs no
            other option.
    """

    def __init__(self, optimizer: Optimizer, warm_up: float = 0.05, total_steps: int | None = None) -> None:
        if not 0 <= warm_up < 1:
            raise InputError(f"warm_up = {warm_up:g} must lie in [0, 1)")
        if total_steps is not None and total_steps < 1:
            raise InputError(f"total_steps = {total_steps} must be at least 1")
        self.warm_up, self.total_steps, self._follows_trainer = warm_up, total_steps, total_steps is None
        super().__init__(optimizer)

    def ends_at(self, steps: float) -> None:
        """Let the rate be 0 after so many steps, unless ``total_steps`` was given.

        Raises:
            InputError: infinitely many.
        """
        if not self._follows_trainer:
            return
        if steps == float("inf"):
            raise InputError(
                "--model.lr_scheduler WarmupDecay falls to 0 at the last step, and it is not known which that is: give "
                "--trainer.max_epochs, --trainer.max_steps or --model.lr_scheduler.total_steps"
            )
        self.total_steps = int(steps)
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each group at the next step."""
        if self.total_steps is None:
            return list(self.base_lrs)
        done, rise = self.last_epoch, int(self.warm_up * self.total_steps)
        share = min((done + 1) / (rise + 1), max(self.total_steps - done, 0) / (self.total_steps - rise))
        return [base * share for base in self.base_lrs]

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from a state; where it ends is the new Trainer's affair, unless ``total_steps`` was given."""
        kept = {"total_steps"} if self._follows_trainer else set()
        super().load_state_dict({name: value for name, value in state_dict.items() if name not in kept})


def _orthogonal(matrices: Tensor) -> Tensor:
    """The orthogonal matrix nearest to each of ``[n, rows, columns]``, roughly: singular values are about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(5):
        square = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x.mT if tall else x

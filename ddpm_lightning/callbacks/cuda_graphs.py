"""A network that a GPU replays in one call, where the host is too slow to start its operations one by one."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.training import GenerativeModule

__all__ = ["CudaGraphs"]


class CudaGraphs(Callback):
    """Records the network's forward and backward pass as CUDA graphs at the first training step, and replays them.

    Small batches on a GPU are bound by the host, which starts some hundred operations one by one; a graph starts them
    all at once. The operations and their results are the same. Batches of another size, as the last one of an epoch,
    run as always. On one GPU, without gradient accumulation, for networks whose forward pass has no side effects:
    dropout is fine, running statistics are not.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Raises:
        InputError: another device than one GPU; gradients are accumulated; a compiled network.
        """
        assert isinstance(pl_module, GenerativeModule)
        network = pl_module.model.network
        if trainer.strategy.root_device.type != "cuda":
            raise InputError("CudaGraphs needs a GPU: leave the callback out")
        if trainer.world_size > 1:
            raise InputError("CudaGraphs works on one GPU: leave the callback out, or give --trainer.devices 1")
        if trainer.accumulate_grad_batches > 1:
            raise InputError(
                "CudaGraphs cannot accumulate gradients: leave it or --trainer.accumulate_grad_batches out"
            )
        if network._compiled_call_impl is not None:
            raise InputError("CudaGraphs and --model.compile true exclude each other: leave one out")
        self._eager, self._network = network.forward, network
        self._key: tuple[Any, ...] | None = None
        self._waiting = False  # for a backward pass, which needs what the graph of the forward pass left
        network.forward = self._forward

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._waiting = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del self._network.forward

    def _forward(self, *args: Any, **cond: Any) -> Tensor:
        values = [*args, *cond.values()]
        if (
            self._waiting
            or not (self._network.training and torch.is_grad_enabled())
            or not all(isinstance(value, Tensor) for value in values)
        ):
            return self._eager(*args, **cond)
        key = (*cond, *((value.shape, value.dtype, value.requires_grad) for value in values))
        if self._key is None:
            self._key, self._graphed = key, _recorded(self._eager, self._network, len(args), list(cond), values)
        if key != self._key:
            return self._eager(*args, **cond)
        self._waiting = True
        return self._graphed(*values)


class _Positional(nn.Module):
    """A network whose conditions are given by position, as a recording needs it."""

    def __init__(self, eager: Any, network: nn.Module, positional: int, names: list[str]) -> None:
        super().__init__()
        self.network = network  # its weights are those of the graph
        self._eager, self._positional, self._names = eager, positional, names

    def forward(self, *values: Tensor) -> Tensor:
        args, rest = values[: self._positional], values[self._positional :]
        return self._eager(*args, **dict(zip(self._names, rest, strict=True)))


def _recorded(eager: Any, network: nn.Module, positional: int, names: list[str], values: list[Tensor]) -> Any:
    # the weights' gradients are summed on another stream than the one that records, which costs a wait and no more
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
    samples = tuple(value.detach().clone().requires_grad_(value.requires_grad) for value in values)
    enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    # the trials before the recording draw no numbers of the training's own
    with torch.random.fork_rng(), torch.autocast("cuda", dtype, enabled, cache_enabled=False):
        return torch.cuda.make_graphed_callables(_Positional(eager, network, positional, names), samples)

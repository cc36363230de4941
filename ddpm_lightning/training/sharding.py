"""Weights shared out among the processes of a training run (torch's FSDP2), each of which keeps a part of every one."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ddpm_lightning.errors import InputError

__all__ = [
    "ShardedStrategy",
    "ShardedWeights",
    "check_shardable",
    "local_part",
    "part_of",
    "refuse_unknown_sharding",
    "shard_network",
    "synchronise",
    "whole",
]


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes: ``configs/overlays/fsdp.yaml``.

    Each process keeps its part of every weight, of its gradient, of the optimiser's state and of the average. A
    checkpoint is one file of whole tensors, the same that one process writes, so that either goes on with the other's.
    Lightning's own strategy would shard within a node only, leave files behind that nothing else reads, and read
    checkpoints past the Trainer's ``CheckpointIO``.

    Nothing is sharded but in ``fit``: evaluation needs whole weights, as each process has images of its own.

    Args:
        process_group_backend: torch's name of what carries the messages; None for that of the device.
        timeout: how long a process waits for the others.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        # one mesh of the processes of all nodes
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def mesh(self) -> DeviceMesh:
        """All processes."""
        return self.device_mesh["data_parallel"]

    # checkpoints: as in every other strategy, but of whole tensors, which the first process has and writes

    restore_checkpoint_after_setup = Strategy.restore_checkpoint_after_setup
    lightning_restore_optimizer = Strategy.lightning_restore_optimizer
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint

    def lightning_module_state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = _whole_on_cpu(Strategy.lightning_module_state_dict(self))
        return state if self.is_global_zero else {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = _whole_on_cpu(Strategy.optimizer_state(self, optimizer))
        return state if self.is_global_zero else {}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        mine = Strategy.lightning_module_state_dict(self)
        state = {name: part_of(value, mine.get(name)) for name, value in checkpoint["state_dict"].items()}
        Strategy.load_model_state_dict(self, {"state_dict": state}, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        parts = [_optimizer_part(optimizer, state) for optimizer, state in states]
        Strategy.load_optimizer_state_dict(self, {"optimizer_states": parts})


def refuse_unknown_sharding(strategy: Strategy) -> None:
    """Raises InputError for Lightning's own strategies that shard weights."""
    known = isinstance(strategy, ShardedStrategy)
    if not known and isinstance(strategy, ModelParallelStrategy | FSDPStrategy):
        raise InputError(
            f"--trainer.strategy {type(strategy).__name__} (with its save_distributed_checkpoint, "
            "tensor_parallel_size, ...) is not supported: use -c configs/overlays/fsdp.yaml, which shards over "
            "all processes and writes checkpoints of one file"
        )


def check_shardable(module: nn.Module, schedule: str, channels_last: object, compiles: bool) -> None:
    """Refuse what sharded weights cannot do; those that are sharded have ``network`` in their names.

    Raises:
        InputError: another memory format, compilation, trained weights outside of the network.
    """
    if channels_last is True:
        raise InputError("--model.channels_last true: sharded weights have torch's default memory format; use auto")
    if compiles:
        raise InputError("--model.compile true is not supported with sharded weights: use --trainer.strategy ddp")
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    outside = [name for name in trained if ".network." not in f".{name}" or ".encoder." in name]
    if outside:
        whose = f"{schedule} " if "schedule" in outside[0] else ""
        raise InputError(
            f"{whose}trains {outside[0]}, and only the network's weights can be sharded: use --trainer.strategy ddp"
        )


@torch.no_grad()
def _whole_on_cpu(value: Any) -> Any:
    """A nest of containers with its sharded tensors put together, on the CPU. All processes must call it."""
    return tree_map_only(DTensor, lambda tensor: whole(tensor).cpu(), value)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together on every process, which all must call; any other tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(value: Any, like: Any) -> Any:
    """This process's part of a tensor that all have, sharded as ``like``; the tensor where that is not sharded."""
    if not (isinstance(like, DTensor) and torch.is_tensor(value) and value.shape == like.shape):
        return value
    return distribute_tensor(value.contiguous(), like.device_mesh, like.placements, src_data_rank=None)


def _optimizer_part(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    of = dict(zip(numbers, parameters, strict=False))  # the optimiser itself refuses another number of them
    parts = {
        number: {name: part_of(value, of.get(number)) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": parts}


@torch.no_grad()
def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process has, sharing its memory; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def synchronise(module: nn.Module) -> None:
    """Give all processes the first one's parameters and buffers, as DDP does."""
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), 0)


def shard_network(network: nn.Module, mesh: DeviceMesh, evaluate: Callable[[], object]) -> None:
    """Shard a network that is trained: its weights are gathered block by block when it is evaluated.

    ``evaluate`` does that once, which shows the blocks that the network calls.

    Raises:
        InputError: a weight that cannot be sharded: a scalar.
    """
    blocks = list(_blocks(network, _called(network, evaluate)))
    try:
        for block in (*blocks, network):
            fully_shard(block, mesh=mesh)
    except (ValueError, NotImplementedError) as error:
        raise InputError(f"{type(network).__name__} cannot be sharded ({error}): use --trainer.strategy ddp") from error


def _called(network: nn.Module, evaluate: Callable[[], object]) -> set[nn.Module]:
    called: set[nn.Module] = set()
    hooks = [part.register_forward_hook(lambda part, *_: called.add(part)) for part in network.modules()]
    try:
        evaluate()
    finally:
        for hook in hooks:
            hook.remove()
    return called


def _blocks(network: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """The network's children; in place of one that is not called (a list of modules), or that has more than half of all
    weights, its own children. Weights outside of them, and tied ones, are left to the network itself."""
    uses = Counter(id(p) for part in network.modules() for p in part.parameters(recurse=False))
    total = sum(p.numel() for p in network.parameters())

    def within(parent: nn.Module) -> Iterator[nn.Module]:
        for child in parent.children():
            weights = list(child.parameters())
            if not weights or any(uses[id(p)] > 1 for p in weights):
                continue
            large = 2 * sum(p.numel() for p in weights) > total and any(True for _ in child.children())
            if large or child not in called:
                yield from within(child)
            else:
                yield child

    return within(network)


class ShardedWeights:
    """Shards the weights of a network that is only evaluated, and puts them together for that.

    Unlike FSDP's, its whole weights stay until they are put away, so that processes may evaluate unequal numbers of
    images: a forward pass sends no messages. What changes is the sharded weights; the whole ones are copies.
    """

    def __init__(self, network: nn.Module, mesh: DeviceMesh) -> None:
        places = [(part, name, p) for part in network.modules() for name, p in part.named_parameters(recurse=False)]
        shards = {p: _frozen(distribute_tensor(p.detach().contiguous(), mesh, [Shard(0)])) for _, _, p in places}
        self._places = [(part, name, shards[p]) for part, name, p in places]
        self.put_away()

    @torch.no_grad()
    def gather(self) -> None:
        """Put the weights together. All processes must call it."""
        # outside of inference mode, or they could not be used outside of it
        with torch.inference_mode(False):
            # in the same order on all processes
            shards = dict.fromkeys(shard for _, _, shard in self._places)
            whole = {shard: _frozen(cast(DTensor, shard).full_tensor()) for shard in shards}
        for part, name, shard in self._places:
            setattr(part, name, whole[shard])

    def put_away(self) -> None:
        for part, name, shard in self._places:
            setattr(part, name, shard)


def _frozen(value: Any) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)

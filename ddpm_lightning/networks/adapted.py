from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.networks.arguments import at_least, positive
from ddpm_lightning.networks.conditions import refuse_conditions

__all__ = ["AdaptedNetwork"]

_LABELS = ("label", "labels", "class_labels", "y", "classes")


class AdaptedNetwork(nn.Module):
    """A network of another library under the call of this package, (x ``[B, C, *space]``, t ``[B]``, label) to a
    tensor.

    The other network is called with x, ``time_scale`` t and, where there are classes, the class under the name that it
    has for them. It returns a tensor, a tuple whose first item is the tensor, or an object that has it as ``sample``,
    as those of diffusers do. It is told of classes only, of no vector and no field.

    Args:
        network: the network, for example ``diffusers.UNet2DModel``.
        time_scale: factor on t: networks that were written for steps 0..1000 tell such times apart.
        label: name of the argument for the class; None for label, labels, class_labels, y or classes, whichever it has.
        num_classes: number of classes K; then "no class" is given as K, for which the network needs an embedding too.
            None for a network that is given no label for it. On the command line None is the data's number where the
            model is class-conditional.
    """

    def __init__(
        self, network: nn.Module, time_scale: float = 1000.0, label: str | None = None, num_classes: int | None = None
    ) -> None:
        super().__init__()
        positive(time_scale=time_scale)
        at_least(1, num_classes=1 if num_classes is None else num_classes)
        self.network, self.time_scale, self.label, self.num_classes = network, time_scale, label, num_classes
        known = signature(network.forward).parameters
        self._label = label or next((name for name in _LABELS if name in known), None)

    def forward(self, x: Tensor, t: Tensor, *, label: Tensor | None = None, **others: Tensor | None) -> Tensor:
        """See the class."""
        refuse_conditions("AdaptedNetwork passes on labels only", others)
        if label is None and self.num_classes is not None:
            label = torch.full_like(t, self.num_classes, dtype=torch.int64)
        cond: dict[str, Any] = {}
        if label is not None:
            if self._label is None:
                raise ValueError(
                    f"{type(self.network).__name__} has no argument for classes that is known: name it, label"
                )
            cond[self._label] = label
        output: Any = self.network(x, self.time_scale * t, **cond)
        output = output[0] if isinstance(output, tuple | list) else getattr(output, "sample", output)
        if not isinstance(output, Tensor):
            raise ValueError(
                f"{type(self.network).__name__} returns a {type(output).__name__}, in which there is no tensor"
            )
        return output

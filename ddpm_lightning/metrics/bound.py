"""The bound of a set of images: every term's mean with its standard error."""

from collections.abc import Mapping, Sequence
from typing import cast

from torch import Tensor, nn

from ddpm_lightning.metrics.bits_per_dim import bits_per_dim
from ddpm_lightning.metrics.mean import MeanAndError

__all__ = ["BoundMeans", "BoundScores"]

BoundScores = dict[str, dict[str, tuple[float, float]]]
"""``scores[form][name] = (mean, standard error over images)``; nats an image, and ``bits_per_dim`` of ``elbo``."""


class BoundMeans(nn.Module):
    """Accumulates the terms of one or more forms of the bound, each image once, on any number of processes.

    Args:
        term_names: the names of each form's terms; ``elbo`` among them.
    """

    def __init__(self, term_names: Mapping[str, Sequence[str]]) -> None:
        super().__init__()
        self.forms = nn.ModuleDict(
            {form: nn.ModuleDict({name: MeanAndError() for name in names}) for form, names in term_names.items()}
        )

    def _means(self) -> dict[str, dict[str, MeanAndError]]:
        return cast(dict[str, dict[str, MeanAndError]], self.forms)

    def update(self, form: str, values: Mapping[str, Tensor]) -> None:
        """Add a batch's terms, ``[B]`` nats by name."""
        for name, value in values.items():
            self._means()[form][name].update(value)

    def compute(self, dims: int) -> tuple[BoundScores, int]:
        """Scores of images of ``dims`` dimensions, and the number of images; a collective on many processes."""
        scores: BoundScores = {}
        count = 0
        for form, means in self._means().items():
            results = {name: mean.compute() for name, mean in means.items()}
            scores[form] = {name: (float(r["mean"]), float(r["se"])) for name, r in results.items()}
            mean, error = scores[form]["elbo"]
            scores[form]["bits_per_dim"] = (bits_per_dim(-mean, dims), bits_per_dim(error, dims))
            count = int(results["elbo"]["count"])
        return scores, count

    def reset(self) -> None:
        for means in self._means().values():
            for mean in means.values():
                mean.reset()

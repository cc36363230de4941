from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ddpm_lightning.metrics.bits_per_dim import bits_per_dim
from ddpm_lightning.metrics.mean import MeanAndError

__all__ = ["BoundMeans", "BoundScores", "Score"]


@dataclass(frozen=True)
class Score:
    """A mean over images and its standard error, in nats of a whole image, or in bits/dim, which are always a code
    length: the smaller, the better. ``kind`` is "log_prob" (the bound is one), "cost" (what the bound subtracts) or
    "diagnostic" (no part of the bound)."""

    mean: float
    se: float
    unit: Literal["nats", "bits/dim"]
    kind: str

    def in_bits(self, dims: int) -> "Score":
        """The same in bits a dimension, for images of ``dims`` dimensions."""
        # a probability's code length is its negative logarithm; a cost already is a length
        sign = -1 if self.kind == "log_prob" else 1
        return Score(bits_per_dim(sign * self.mean, dims), bits_per_dim(self.se, dims), "bits/dim", self.kind)


BoundScores = dict[str, dict[str, Score]]
"""``scores[form][name]``, nats of a whole image; every form has ``elbo``."""


class BoundMeans(nn.Module):
    """Means of the terms of one or more forms of the bound, each image once, on any number of processes.

    ``term_kinds[form][name]`` is the kind of each term; ``elbo`` is one of the names.
    """

    def __init__(self, term_kinds: Mapping[str, Mapping[str, str]]) -> None:
        super().__init__()
        self._kinds = {form: dict(kinds) for form, kinds in term_kinds.items()}
        means = {form: nn.ModuleDict({name: MeanAndError() for name in kinds}) for form, kinds in term_kinds.items()}
        self.forms = nn.ModuleDict(means)

    def _means(self) -> dict[str, dict[str, MeanAndError]]:
        return cast(dict[str, dict[str, MeanAndError]], self.forms)

    def update(self, form: str, values: Mapping[str, Tensor]) -> None:
        """Add a batch's terms, ``[B]`` nats by name."""
        for name, value in values.items():
            self._means()[form][name].update(value)

    def compute(self) -> tuple[BoundScores, int]:
        """The scores, and the number of images; a collective on many processes."""
        scores: BoundScores = {}
        count = 0
        for form, means in self._means().items():
            results = {name: mean.compute() for name, mean in means.items()}
            scores[form] = {
                name: Score(float(r["mean"]), float(r["se"]), "nats", self._kinds[form][name])
                for name, r in results.items()
            }
            count = int(results["elbo"]["count"])
        return scores, count

    def reset(self) -> None:
        for means in self._means().values():
            for mean in means.values():
                mean.reset()

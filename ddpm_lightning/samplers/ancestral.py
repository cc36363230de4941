from torch import Tensor

from ddpm_lightning.samplers.base import Context, Sampler, State

__all__ = ["AncestralSampler"]


class AncestralSampler(Sampler):
    """Each step draws from :math:`p(x_s | x_t)`, the reverse process (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    On a strided grid the variances are those of the strided chain.
    """

    @property
    def follows_reverse_process(self) -> bool:
        return True

    def step(self, context: Context, x_t: Tensor, t: Tensor, s: Tensor, state: State = None) -> tuple[Tensor, State]:
        reverse = context.model.reverse_process.transition(x_t, s, t, **context.cond)
        return reverse.sample(context.generators), None

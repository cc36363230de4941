"""A callback that looks at samples of a lattice system as a physicist would."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from ddpm_lightning.callbacks.publishing import publish_picture, publish_text
from ddpm_lightning.data import Batch
from ddpm_lightning.data.batches import IndexBatches
from ddpm_lightning.data.datamodule import ArrayDataModule, SplitName
from ddpm_lightning.data.lattice import LatticeSystem
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.observables import Observed, observables_report, observe
from ddpm_lightning.evaluation.trained import publish
from ddpm_lightning.figures import observable_curves
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.module import GenerativeModule

__all__ = ["LatticeObservables"]


class LatticeObservables(Callback):
    """Observables of samples of the averaged model beside those of the data, for a data module that is a lattice system
    (``Ising``, ``Phi4``, ``FreeField``).

    In ``fit``, after the validation of every ``every_n_epochs``-th epoch: ``observables/NAME`` and its standard error
    for n samples and ``observables/NAME_data`` for the validation data, and a picture of both power spectra and of the
    distribution of the magnetisation, to the loggers and RUN/observables/. In ``test``: the same numbers against the
    test data as a table, with exact values where they are known, printed, given to the loggers, and written to
    RUN/observables-test.txt and .json. A model that is told the coupling draws n samples of each. Errors of the data
    take the correlation within a Markov chain into account.

    Args:
        n: samples of each coupling.
        every_n_epochs: how often in ``fit``.
        sampler: how to sample; None for AncestralSampler.
        steps: steps of the sampler, cut to the T of a chain that has fewer; None for all T.
        batch_size: samples drawn at a time on each process.
        seed: seed of the samples.

    Raises:
        InputError: a number out of its range, or data of another kind.
    """

    def __init__(
        self,
        n: int = 500,
        every_n_epochs: int = 1,
        sampler: Sampler | None = None,
        steps: int | None = 100,
        batch_size: int = 100,
        seed: int = 0,
    ) -> None:
        at_least(2, n=n)
        at_least(1, every_n_epochs=every_n_epochs, batch_size=batch_size, steps=1 if steps is None else steps)
        at_least(0, seed=seed)
        self.request = SampleRequest(sampler, steps, seed=seed, cap_steps=True)
        self.n, self.every_n_epochs, self.batch_size = n, every_n_epochs, batch_size
        self.observed: list[Observed] = []
        self._steps = 0  # as they were cut to the model's

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if stage == "predict":
            return
        if not (isinstance(data, LatticeSystem) and isinstance(data, ArrayDataModule)):
            raise InputError(
                f"LatticeObservables is for a lattice system, and the data are {type(data).__name__}: take it out of "
                "trainer.callbacks"
            )
        if self.n < trainer.world_size:
            raise InputError(f"LatticeObservables: n = {self.n} is too few for {trainer.world_size} processes")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or trainer.sanity_checking or not due:
            return
        self._observe(trainer, pl_module, "val")
        for each in self.observed:
            at = "" if each.coupling is None or len(self.observed) == 1 else f"@{each.coupling:g}"
            for name, found in each.samples.items():
                key = f"observables/{name.replace(' ', '_')}{at}"
                pl_module.log_dict({key: found.mean, f"standard_error/{key}": found.se}, rank_zero_only=True)
                pl_module.log(f"{key}_data", each.data[name].mean, rank_zero_only=True)
            if trainer.is_global_zero:
                name = f"observables/step_{trainer.global_step:07d}{at}.png"
                publish_picture(trainer, f"observables{at}", observable_curves(each.spectra, each.magnetisation), name)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._observe(trainer, pl_module, "test")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            how = f"{self.n} samples in {self._steps} steps, against the test data; errors are standard errors"
            text, record = observables_report(self.observed, how)
            publish(Run.of(trainer), "observables-test", text, record)
            publish_text(trainer, "test/observables", text)

    def _observe(self, trainer: Trainer, module: LightningModule, split: SplitName) -> None:
        assert isinstance(module, GenerativeModule)
        system, data = self._data(trainer, split)
        told = "vector" in module.conditions
        couplings: list[float | None] = [*system.couplings] if told or len(system.couplings) == 1 else [None]
        cond = {"vector": torch.tensor(couplings)[:, None]} if told else {}
        draw = self.request.on(module, cond)
        self._steps = draw.steps
        drawn: dict[str, list[torch.Tensor]] = {"index": [], "x": []}
        for indices in IndexBatches(self.n * len(couplings), self.batch_size, trainer.global_rank, trainer.world_size):
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                drawn["x"].append(draw(indices).cpu())
            drawn["index"].append(torch.as_tensor(indices))
        parts = gather_to_all({name: torch.cat(values) for name, values in drawn.items()})
        index, x = (torch.cat([part[name] for part in parts]) for name in ("index", "x"))
        x = x[index.argsort()]
        self.observed = []
        for k, coupling in enumerate(couplings):
            rows = data.image
            if told:
                rows = rows[data.cond["vector"][:, 0] == torch.tensor(coupling)]
            self.observed.append(observe(system, coupling, x[k :: len(couplings)], rows))

    def _data(self, trainer: Trainer, name: SplitName) -> tuple[LatticeSystem, Batch]:
        data = trainer.datamodule  # type: ignore[attr-defined]  # checked in setup
        split = data.split(name)
        return data, split.batch(torch.arange(len(split))).map(torch.Tensor.cpu)

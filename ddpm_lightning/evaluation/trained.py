"""A finished run that is measured."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ddpm_lightning.data import Batch, OfficialData
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.data.lattice import LatticeSystem
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.progress import tracked
from ddpm_lightning.runs import Run
from ddpm_lightning.training.module import DiffusionModule, GenerativeModule

__all__ = ["Trained", "publish"]


@dataclass(frozen=True)
class Trained:
    """The module and the data of a run, and where results go: what every measurement is given.

    Args:
        run: folder of the run
        checkpoint: last, best or a file
        data_root: folder that holds MNIST/raw, or the like of other data, by default the one of the run's configuration
        seed: seed of the noise and of the choice of images
        batch_size: images at a time
        device: where to work, cpu or cuda
        out: folder for the results, by default one in the run
    """

    run: str
    checkpoint: str = "last"
    data_root: str | None = None
    seed: int = 0
    batch_size: int = 100
    device: str = "cpu"
    out: str | None = None

    def __post_init__(self) -> None:
        at_least(1, batch_size=self.batch_size)

    @cached_property
    def module(self) -> GenerativeModule:
        module = Run(self.run).load_module(self.checkpoint)
        try:
            return module.to(self.device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device {self.device} cannot be used: {str(error).splitlines()[0]}") from None

    @cached_property
    def diffusion(self) -> DiffusionModule:
        """The module of a run that trained a diffusion model; InputError for another run."""
        if not isinstance(self.module, DiffusionModule):
            raise InputError(
                f"{self.run} trained a {type(self.module).__name__}: only diffusion models have what this measures"
            )
        return self.module

    @cached_property
    def data(self) -> ArrayDataModule:
        data = Run(self.run).load_data()
        if not isinstance(data, ArrayDataModule):
            raise InputError(
                f"{type(data).__name__} gives its images in batches only, and this needs whole splits: derive it from "
                "ddpm_lightning.data.ImageDataModule (ddpm test and ddpm predict do without)"
            )
        if self.data_root is not None and isinstance(data, OfficialData):
            data.root = self.data_root
        return data

    @cached_property
    def system(self) -> LatticeSystem | None:
        """The data, where their distribution is known."""
        data = Run(self.run).load_data()
        return data if isinstance(data, LatticeSystem) else None

    def batches(self, images: Batch, what: str) -> Iterator[Batch]:
        """Images in batches on the device, with their progress."""
        starts = range(0, len(images.image), self.batch_size)
        images = images.map(lambda column: column.to(self.device))
        parts = (images.map(lambda column: column[start : start + self.batch_size]) for start in starts)  # noqa: B023
        return tracked(parts, len(images.image), what)

    def results(self, name: str) -> Run:
        """Where results are written (``Run.write``): RUN/name, or the folder that was given for them."""
        return Run(Run(self.run).folder / name if self.out is None else self.out)

    def report(self, name: str, text: str, record: Any, others: Mapping[str, Any] = {}) -> None:
        """Publish a result of that name."""
        publish(self.results(name), name, text, record, others)


def publish(run: Run, name: str, text: str, record: Any, others: Mapping[str, Any] = {}) -> None:
    """Print a result, and write it into a folder: NAME.txt, NAME.json, and other files by their names."""
    print(text, flush=True)
    for file, content in {f"{name}.txt": f"{text}\n", f"{name}.json": record, **others}.items():
        run.write(file, content)

"""A network replayed as CUDA graphs. What runs on a CPU is the refusals; the rest needs a GPU."""

from pathlib import Path

import pytest
import torch
from builders import QUIET, build, conditional, refused

from ddpm_lightning.callbacks import CudaGraphs
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_cpu_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="CudaGraphs needs a GPU: leave the callback out"):
        DiffusionTrainer(default_root_dir=tmp_path, callbacks=[CudaGraphs()], accelerator="cpu", **QUIET).fit(
            build(), Digits()
        )
    line = "--trainer.callbacks+=ddpm_lightning.callbacks.CudaGraphs"
    message = refused(
        capsys, "fit", "-c", "configs/digits.yaml", f"--run_dir={tmp_path}/r", "--trainer.accelerator=cpu", line
    )
    assert "CudaGraphs needs a GPU" in message


@gpu
@pytest.mark.parametrize("make", [build, conditional])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_replayed_training_is_the_same_training(tmp_path: Path, make: object, precision: str) -> None:
    """1,300 images in batches of 96: the last batch of an epoch has another size, and runs as always."""

    def trained(*callbacks: CudaGraphs) -> DiffusionModule:
        module = make()  # type: ignore[operator]
        options = {**QUIET, "max_epochs": 2, "precision": precision, "devices": 1, "accelerator": "gpu"}
        DiffusionTrainer(default_root_dir=tmp_path, callbacks=list(callbacks), **options).fit(
            module, Digits(batch_size=96)
        )
        return module

    plain, replayed = trained(), trained(CudaGraphs())
    assert replayed.model.network.forward.__func__ is type(replayed.model.network).forward
    for one, other in zip(plain.state_dict().values(), replayed.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 if precision == "32-true" else 2e-3)


@gpu
def test_gradients_are_not_accumulated(tmp_path: Path) -> None:
    options = {**QUIET, "max_epochs": 1, "devices": 1, "accelerator": "gpu", "accumulate_grad_batches": 2}
    with pytest.raises(InputError, match="CudaGraphs cannot accumulate gradients"):
        DiffusionTrainer(default_root_dir=tmp_path, callbacks=[CudaGraphs()], **options).fit(build(), Digits())

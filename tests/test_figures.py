"""Pictures of schedules: what they show, and when they are drawn."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image

from ddpm_lightning.callbacks import ScheduleCurves
from ddpm_lightning.data import Digits
from ddpm_lightning.figures import schedule_curves
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import ContinuousNegativeElbo, NoiseMSE, Objective, StratifiedTimes
from ddpm_lightning.process import (
    CategoricalDecoder,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
)
from ddpm_lightning.schedules import CosineChain, CosineGamma, LearnedGamma, LinearGamma, Schedule
from ddpm_lightning.training import DiffusionModule


def test_schedule_curves_show_one_line_for_each_schedule() -> None:
    one = schedule_curves({"a": LinearGamma()})
    two = schedule_curves({"a": LinearGamma(), "b": CosineGamma()})
    assert one.dtype == torch.uint8 and one.shape[0] == 3 and min(one.shape[1:]) > 200

    def coloured(picture: torch.Tensor) -> int:
        return int(((picture.amax(0).int() - picture.amin(0).int()) > 60).sum())

    assert 300 < coloured(one) < coloured(two)
    assert schedule_curves({"chain": CosineChain(20)}).shape == one.shape


@pytest.mark.parametrize(
    ("schedule", "objective", "drawn"),
    [
        (
            LearnedGamma(-9.0, 5.0, T=6),
            ContinuousNegativeElbo(StratifiedTimes()),
            [{"start"}, {"start", "now", "averaged"}],
        ),
        (LinearGamma(-9.0, 5.0, T=6), NoiseMSE(StratifiedTimes()), [{"LinearGamma"}]),
    ],
)
def test_a_learned_schedule_is_drawn_again(
    schedule: Schedule, objective: Objective, drawn: list[set[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = DiffusionModule(
        network=UNet(1, width=8, multipliers=(1, 2), blocks=1),
        schedule=schedule,
        parameterization=EpsParameterization(),
        conditioning=GammaConditioning(),
        variance=FixedLargeVariance(),
        decoder=CategoricalDecoder(17),
        objective=objective,
        validation_bounds=[],
        test_bounds=[],
        optimizer=partial(torch.optim.Adam, lr=0.1),
        shape=(1, 8, 8),
        levels=17,
    )
    curves: list[set[str]] = []
    callback = ScheduleCurves()
    publish = callback._publish
    monkeypatch.setattr(callback, "_publish", lambda t, c: (curves.append(set(c)), publish(t, c)))
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_steps=3,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    trainer.fit(module, datamodule=Digits(batch_size=32))
    assert curves == drawn
    assert np.asarray(Image.open(tmp_path / "schedule.png")).std() > 5

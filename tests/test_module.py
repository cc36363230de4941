"""The LightningModule: what it builds, averages, evaluates and puts into a checkpoint."""

import math
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from builders import build, conditional, equal, state, trainer
from torch import nn

from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import AdaptedNetwork, SimpleUNet, UNet
from ddpm_lightning.objectives import (
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    HybridObjective,
    NegativeElbo,
    NoiseMSE,
    Objective,
    StratifiedTimes,
    UniformTimes,
    WeightedMSE,
)
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    DiscretizedGaussian,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
    ReverseVariance,
    TimeConditioning,
)
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.schedules import LearnedGamma, LinearChain, LinearGamma, Schedule
from ddpm_lightning.training import DiffusionModule


def test_module_built_in_python_reloads_without_arguments(tmp_path: Path) -> None:
    module, runner = build(ema_decay=0.5), trainer(tmp_path, enable_checkpointing=False)
    runner.fit(module, Digits())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=True)
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert equal(state(again), state(module))
    assert again.model.T == 10 and again.ema_decay == 0.5 and isinstance(again.model.network, UNet)
    assert isinstance(again.configure_optimizers(), torch.optim.Adam)
    assert again.configure_optimizers().defaults["lr"] == 1e-3


def test_module_built_by_the_command_line_reloads_without_arguments(trained: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints/last.ckpt", weights_only=True)
    module = DiffusionModule.load_from_checkpoint(trained / "checkpoints/last.ckpt")
    assert equal(state(module), checkpoint["state_dict"])
    assert module.levels == 17 and module.model.T == 12 and module.model.decoder.levels == 17


def test_a_part_that_cannot_be_described_is_asked_for(tmp_path: Path) -> None:
    class Local(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x

    module, runner = build(network=Local(), optimizer=None), trainer(tmp_path, enable_checkpointing=False)
    runner.test(module, Digits(limit_test=8), verbose=False)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(Exception, match="network"):
        DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", network=Local())
    assert isinstance(again.model.network, Local)


def test_average_is_the_documented_one_and_counts_optimiser_steps(tmp_path: Path) -> None:
    class Record(pl.Callback):
        def __init__(self) -> None:
            self.weights: list[torch.Tensor] = []

        def on_train_batch_end(self, trainer: pl.Trainer, module: DiffusionModule, *_: object) -> None:
            if trainer.global_step > len(self.weights):
                self.weights.append(next(iter(module.model.parameters())).detach().clone())

    module, record = build(ema_decay=0.6), Record()
    average = next(iter(module.model.parameters())).detach().clone()
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path, callbacks=[record], enable_checkpointing=False, **options).fit(module, Digits())
    assert len(record.weights) == 10
    for step, weight in enumerate(record.weights, start=1):
        decay = min(0.6, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
    assert torch.allclose(next(iter(module.ema_model.parameters())), average, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in module.ema_model.parameters())


def test_evaluation_and_sampling_use_the_average(tmp_path: Path) -> None:
    module = build()
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.fill_(float("nan"))
    trainer(tmp_path).test(module, Digits(limit_test=8), verbose=False)
    assert all(abs(score.mean) < 1e6 for score in module.bound_scores["test"]["denoising"].values())
    assert SampleRequest().on(module)([0, 1]).shape == (2, 1, 8, 8)


def test_labels_are_dropped_image_by_image_from_the_training_generator() -> None:
    module, label = conditional(label_dropout=0.3), torch.arange(10_000) % 10

    def dropped(seed: int) -> torch.Tensor:
        module._generator = torch.Generator().manual_seed(seed)
        return module._with_dropped({"label": label})["label"]

    first = dropped(0)
    without = first == 10
    assert abs(float(without.double().mean()) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 10_000)
    assert torch.equal(first[~without], label[~without]) and first.dtype == torch.int64
    assert torch.equal(dropped(0), first) and not torch.equal(dropped(1), first)
    module.label_dropout = 0.0
    assert torch.equal(dropped(2), label)
    assert torch.equal(module._generator.get_state(), torch.Generator().manual_seed(2).get_state())


def test_training_drops_labels_and_evaluation_does_not(tmp_path: Path) -> None:
    seen: dict[bool, set[int]] = {True: set(), False: set()}

    class Recording(UNet):
        def forward(self, x: torch.Tensor, t: torch.Tensor, *, label: torch.Tensor | None = None) -> torch.Tensor:
            if label is not None:
                seen[self.training].update(label.tolist())
            return super().forward(x, t, label=label)

    network = Recording(1, width=8, multipliers=(1, 2), blocks=1, num_classes=10)
    module = conditional(network=network, label_dropout=0.5)
    seen[False].clear()  # the check of the network shows it "no class"
    trainer(tmp_path, enable_checkpointing=False).fit(module, Digits())
    assert seen[True] == set(range(11)) and seen[False] == set(range(10))


def test_guided_samples() -> None:
    module, generator = conditional(label_dropout=0.1), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.normal_(std=0.2, generator=generator)

    def sample(*label: int, scale: float = 1.0) -> torch.Tensor:
        return SampleRequest(labels=label, guidance_scale=scale).on(module)([0, 1])

    conditioned = sample(3, 4)
    assert torch.equal(SampleRequest(labels=[3, 4]).on(module)([0, 1]), conditioned)
    assert torch.equal(sample(3, 4, scale=0.0), sample(10, 10))
    assert not torch.equal(sample(3, 4, scale=3.0), conditioned)
    assert not torch.equal(sample(10, 10), conditioned)
    for wrong in (-1, 11):
        with pytest.raises(
            InputError, match=rf"\[3, {wrong}\]: classes must lie between 0 and 9, or be 10 for no class"
        ):
            sample(3, wrong)


def test_guidance_and_label_dropout_errors() -> None:
    for dropout in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match=r"--model\.label_dropout .* must lie in \[0, 1\)"):
            conditional(label_dropout=dropout)
    with pytest.raises(InputError, match=r"label_dropout 0\.1 needs --model\.class_conditional true"):
        build(label_dropout=0.1)
    with pytest.raises(InputError, match="needs a class-conditional model"):
        SampleRequest(guidance_scale=2.0).on(build(num_classes=10))
    with pytest.raises(InputError, match="guidance_scale 2: this model never saw an image without its class"):
        SampleRequest(guidance_scale=2.0).on(conditional())
    with pytest.raises(InputError, match=r"with labels from 0 to 9.*its num_classes must be 10"):
        conditional(network=UNet(1, width=8, multipliers=(1, 2), blocks=1, num_classes=5))


def test_the_average_is_evaluated_without_dropout() -> None:
    module = build(network=UNet(1, width=8, multipliers=(1, 2), blocks=1, dropout=0.5))
    assert module.model.network.training and not module.ema_model.network.training
    module.train()
    assert module.model.network.training and not module.ema_model.network.training


def test_test_after_fit_equals_test_of_the_checkpoint(tmp_path: Path) -> None:
    module, runner = build(), trainer(tmp_path, enable_checkpointing=False)
    runner.fit(module, Digits())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    runner.test(module, Digits(limit_test=40), verbose=False)
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path).test(again, Digits(limit_test=40), verbose=False)
    assert module.bound_scores["test"] == again.bound_scores["test"]
    runner.test(module, Digits(limit_test=40), ckpt_path=tmp_path / "a.ckpt", verbose=False, weights_only=True)
    assert module.bound_scores["test"] == again.bound_scores["test"]


def test_figures_are_means_over_images_with_their_standard_errors(tmp_path: Path) -> None:
    module, data = build(), Digits(limit_test=30, eval_batch_size=7)
    runner = trainer(tmp_path)
    runner.test(module, data, verbose=False)
    batches = runner.predict(module, data)
    values = torch.cat([batch["consistency/elbo"] for batch in batches])
    elbo = module.bound_scores["test"]["consistency"]["elbo"]
    assert module.images_evaluated["test"] == len(values) == 30
    assert elbo.mean == pytest.approx(float(values.mean()), rel=1e-12)
    assert elbo.se == pytest.approx(float(values.std() / 30**0.5), rel=1e-9)
    bits = elbo.in_bits(module.dims)
    assert bits.mean == pytest.approx(-elbo.mean / (64 * 0.6931471805599453)) and bits.se > 0


def test_scheduler_steps_with_the_optimiser(tmp_path: Path) -> None:
    scheduler = partial(torch.optim.lr_scheduler.LinearLR, start_factor=0.1, total_iters=20)
    module = build(lr_scheduler=scheduler)
    runner = trainer(tmp_path, enable_checkpointing=False, limit_val_batches=0)
    runner.fit(module, Digits())
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-3 * 0.55)


def test_class_conditional_model_sees_the_label() -> None:
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, num_classes=10)
    module = build(network=network, class_conditional=True, num_classes=10)
    with torch.no_grad():
        for parameter in module.ema_model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = [SampleRequest(labels=[label]).on(module)([0]) for label in (1, 7)]
    assert not torch.equal(*images)
    assert SampleRequest().on(module).label(torch.arange(12)).tolist() == [*range(10), 0, 1]
    assert SampleRequest().on(build()).label(torch.arange(3)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"decoder": DiscretizedGaussian(256)}, ["256", "17", "--model.decoder.init_args.levels"]),
        ({"ema_decay": 1.0}, ["--model.ema_decay"]),
        ({"network": SimpleUNet(channels=3)}, ["SimpleUNet", "[1, 8, 8]"]),
        ({"network": UNet(1, width=8, multipliers=(1, 1, 1, 1, 1))}, ["UNet", "[1, 8, 8]", "16"]),
        ({"network": UNet(1, width=8, out_channels=2)}, ["[2, 8, 8]", "[1, 8, 8]"]),
        (
            {"network": AdaptedNetwork(UNet(1, width=8, out_channels=2))},
            ["[2, 8, 8]", "--model.network.init_args.network.init_args.out_channels 1"],
        ),
        ({"class_conditional": True}, ["num_classes"]),
        ({"test_bounds": [DenoisingElbo(), DenoisingElbo(steps=2)]}, ["--model.test_bounds", "denoising"]),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, words: list[str]) -> None:
    with pytest.raises(InputError) as refusal:
        build(**changes)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_data_of_another_kind_are_refused(tmp_path: Path) -> None:
    module = build(levels=16, decoder=DiscretizedGaussian(16))
    with pytest.raises(InputError, match="levels 16 and the data have 17"):
        trainer(tmp_path).test(module, Digits(), verbose=False)


def test_fit_without_an_optimiser_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--model\.optimizer"):
        trainer(tmp_path, enable_checkpointing=False).fit(build(optimizer=None), Digits())


def test_a_learned_variance_is_trained_stored_and_evaluated(tmp_path: Path) -> None:
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, out_channels=2)
    learned = {"network": network, "variance": LearnedRangeVariance(), "objective": HybridObjective(UniformTimes())}
    module, runner = build(**learned), trainer(tmp_path, enable_checkpointing=False)
    runner.fit(module, Digits())
    mean, variance = network.out_conv.weight.detach()
    assert bool((mean != 0).any()) and bool((variance != 0).any())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert isinstance(again.model.reverse_process.variance, LearnedRangeVariance)
    runner.test(again, Digits(limit_test=8), verbose=False)
    assert math.isfinite(again.bound_scores["test"]["denoising"]["elbo"].mean)
    assert SampleRequest().on(again)([0, 1]).shape == (2, 1, 8, 8)


def test_an_analytic_variance_is_stored_with_its_table(tmp_path: Path) -> None:
    module, runner = build(variance=AnalyticVariance([-2.0, 3.0], [0.9, 0.1])), trainer(tmp_path)
    runner.test(module, Digits(limit_test=8), verbose=False)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt").ema_model.reverse_process.variance
    assert isinstance(again, AnalyticVariance)
    assert (again.gammas, again.eps_mse) == ([-2.0, 3.0], [0.9, 0.1])


@pytest.mark.parametrize(
    ("out_channels", "variance", "channels"),
    [(None, LearnedRangeVariance(), 2), (2, FixedSmallVariance(), 1), (3, LearnedRangeVariance(), 2)],
)
def test_a_network_of_too_few_or_too_many_channels(
    out_channels: int | None, variance: ReverseVariance, channels: int
) -> None:
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, out_channels=out_channels)
    name = type(variance).__name__
    with pytest.raises(InputError, match=rf"under {name} .*\[{channels}, 8, 8\].*out_channels {channels} "):
        build(network=network, variance=variance)


# --- objectives and the models that they can train


def test_a_learned_schedule_is_optimised_averaged_and_saved(tmp_path: Path) -> None:
    parts = {
        "schedule": LearnedGamma(-9.0, 5.0, T=6, units=4),
        "decoder": CategoricalDecoder(17),
        "objective": ContinuousNegativeElbo(StratifiedTimes()),
        "optimizer": partial(torch.optim.Adam, lr=0.1),
    }
    module, runner = build(**parts, ema_decay=0.5), trainer(tmp_path, enable_checkpointing=False)
    start = state(module.model.schedule)
    runner.fit(module, Digits())
    now, averaged = state(module.model.schedule), state(module.ema_model.schedule)
    assert start.keys() == now.keys() == averaged.keys() and len(start) == 5
    for name, value in start.items():
        assert bool((now[name] != value).any()) and bool((averaged[name] != value).any()), name
        assert bool((averaged[name] != now[name]).any()), name
    runner.save_checkpoint(tmp_path / "a.ckpt")
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    assert equal(state(again.ema_model.schedule), averaged)


@pytest.mark.parametrize("objective", [NoiseMSE(UniformTimes()), WeightedMSE(UniformTimes(), continuous=True)])
def test_a_learned_schedule_needs_a_bound(objective: Objective) -> None:
    with pytest.raises(InputError, match=r"learned through the bound, and .*MSE is none"):
        build(schedule=LearnedGamma(T=6), objective=objective)


@pytest.mark.parametrize(
    "objective", [NoiseMSE(UniformTimes()), NegativeElbo(ContinuousElbo()), ContinuousNegativeElbo(UniformTimes())]
)
def test_a_learned_variance_needs_a_loss_that_depends_on_it(objective: Objective) -> None:
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, out_channels=2)
    with pytest.raises(InputError, match="so LearnedRangeVariance would not be learned"):
        build(network=network, variance=LearnedRangeVariance(), objective=objective)
    build(network=network, variance=LearnedRangeVariance(), objective=NegativeElbo(DenoisingElbo(steps=1)))


def test_the_continuous_objective_refuses_what_is_discrete_only() -> None:
    class NoSlope(LinearGamma):
        gamma_slope = Schedule.gamma_slope

    objective = ContinuousNegativeElbo(UniformTimes())
    with pytest.raises(InputError, match="NoSlope defines none: give it gamma_slope"):
        build(schedule=NoSlope(), objective=objective)


def test_a_network_told_the_time_belongs_to_its_schedule(tmp_path: Path) -> None:
    """Told the time, it would take one noise level for another under another schedule; told gamma, it does not."""
    other = LinearChain(T=20, beta_start=0.02, beta_end=0.5)
    for conditioning in (TimeConditioning(), GammaConditioning()):
        runner = trainer(tmp_path, enable_checkpointing=False)
        runner.test(build(conditioning=conditioning), Digits(limit_test=8), verbose=False)
        runner.save_checkpoint(tmp_path / "a.ckpt")
        torch.load(tmp_path / "a.ckpt", weights_only=True)
        DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
        load = partial(trainer(tmp_path).test, build(conditioning=conditioning, schedule=other), verbose=False)
        if isinstance(conditioning, TimeConditioning):
            with pytest.raises(InputError, match=r"trained under another schedule, .* T = 10, .* T = 20"):
                load(datamodule=Digits(limit_test=8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)
        else:
            load(datamodule=Digits(limit_test=8), ckpt_path=tmp_path / "a.ckpt", weights_only=False)

#!/usr/bin/env python3
"""Quality of samples per minute of training: this package beside diffusers and denoising-diffusion-pytorch.

    python scripts/bench_quality.py --root data --threads 1 --minutes 2 5 10 20 40
    python scripts/bench_quality.py --root data --device cuda --minutes 0.1 0.25 0.5 1 --only mnist diffusers-small

All projects train on the same images, one after another, each in a process of its own:

    mnist, ...                              a configuration of this package, as ddpm fit trains it
    diffusers                               the network, optimiser, warm-up and average of diffusers' example of
                                            unconditional training, float32
    denoising-diffusion-pytorch             its Unet (dim 64), GaussianDiffusion and Trainer with their defaults
    NAME-small                              the same with a network of about 1.5 M parameters
    NAME-small-as-ours                      that, and its batch size and learning rate (64, 2e-3)

The clock runs from the first step. It stands still in validations and while samples are drawn and judged. Images are
not mirrored, and are framed in black where a network needs another size. At each mark --n images are drawn from the
averaged weights, by each project's own deterministic DDIM with --steps steps and x0 clipped. The figure is the Frechet
distance to all test images in the features of the classifier that ships with the package. Its error is the bootstrap's
over the samples; how much another seed of the training changes it, several runs with other --seed say. The floor is the
distance of --n training images.

Rows are added to OUT/quality.json as they come. A project that has passed its marks is not trained again, so that this
may be stopped and started, and projects and seeds may be added later, or at the same time by other processes. At the
end it writes OUT/quality.png and prints the table.
OUT/samples-*.png shows the first samples of each at its last mark.
"""

import json
import logging
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from bench_tools import flops_of, seconds_now
from filelock import FileLock
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import mse_loss, pad
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

from ddpm_lightning.cli import DiffusionCLI
from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.quality import Samples, named_classifier, points_of
from ddpm_lightning.figures import drawn, tile
from ddpm_lightning.metrics import FrechetDistance
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule

CONFIG = Path(__file__).parents[1] / "configs" / "mnist.yaml"
RESAMPLES = 200
QUIET = 20
"""Seconds between two lines of progress."""
FOREVER = 10**9

Draw = Callable[[], Tensor]
"""Draws samples, grey levels uint8 ``[n, C, H, W]``."""
Record = dict[str, Any]
Clock = Literal["wall", "cpu"]


# --- the clock and the judge


class Points(nn.Module):
    """Features that were computed before, as an extractor."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


class Judge:
    """The Frechet distance of points ``[n, d]`` from real ones ``[m, d]``, and its standard error."""

    def __init__(self, real: Tensor) -> None:
        self.metric = FrechetDistance(Points(real.shape[1]), reset_real_features=False)
        self.metric.update(real, real=True)

    def distance(self, points: Tensor) -> float:
        self.metric.update(points, real=False)
        value = float(self.metric.compute())
        self.metric.reset()
        return value

    def __call__(self, points: Tensor, seed: int = 0) -> dict[str, float]:
        """``frechet``, and as ``error`` the standard deviation over resamples of the points, as many, with
        replacement (Efron 1979). The real points are the same in all."""
        generator, n = torch.Generator().manual_seed(seed), len(points)
        rows = torch.randint(n, (RESAMPLES, n), generator=generator)
        again = torch.tensor([self.distance(points[each]) for each in rows], dtype=torch.float64)
        return {"frechet": self.distance(points), "error": float(again.std())}


@dataclass
class Training:
    """A training by the clock: it is told of each step, and at the marks it takes a row of samples.

    Args:
        name: of the project.
        marks: minutes, increasing.
        device: where it trains.
        clock: what is read.
        judge: measures samples.
        keep: is given each row.
    """

    name: str
    marks: list[float]
    device: torch.device
    clock: Clock
    judge: Callable[[Tensor], dict[str, float]]
    keep: Callable[[Record], None]
    steps: int = 0
    images: int = 0
    _spent: float = 0.0
    _since: float | None = None
    _told: float = field(default_factory=time.monotonic)

    def _now(self) -> float:
        return time.perf_counter() if self.clock == "wall" else time.process_time()

    @property
    def minutes(self) -> float:
        """Minutes of training. A GPU may still be at work on the last steps."""
        return (self._spent + (0.0 if self._since is None else self._now() - self._since)) / 60

    def go(self) -> None:
        seconds_now(self.device)
        self._since = self._now()

    def pause(self) -> None:
        seconds_now(self.device)
        self._spent, self._since = 60 * self.minutes, None

    def after_step(self, images: int, draw: Draw) -> bool:
        """Count a step on that many images, and take the rows that are due; whether the last mark has passed."""
        if not self.marks:
            return True
        self.steps, self.images = self.steps + 1, self.images + images
        if time.monotonic() > self._told + QUIET:
            self._say("")
        if self.minutes < self.marks[0]:
            return False
        self.pause()
        due = [mark for mark in self.marks if mark <= self.minutes]
        self.marks = self.marks[len(due) :]
        row = {"marks": due, "minutes": self.minutes, "steps": self.steps, "images": self.images, **self.judge(draw())}
        self.keep(row)
        self._say(f", Frechet {row['frechet']:.2f} +- {row['error']:.2f}")
        self.go()
        return not self.marks

    def _say(self, more: str) -> None:
        print(f"{self.name}: {self.minutes:.2f} min, {self.steps} steps{more}", file=sys.__stderr__, flush=True)
        self._told = time.monotonic()


# --- the projects


@dataclass(frozen=True)
class Plan:
    """What every project is given.

    Args:
        minutes: marks of the clock, by default 2 5 10 20 40
        root: folder of the data, by default the configuration's
        device: cpu or cuda
        threads: of PyTorch, by default its own choice
        clock: wall, or cpu: the time of the training process on all its threads, which hardly depends on what else the
            machine does
        n: samples at each mark, 10 or more
        steps: of DDIM, less than 1000
        batch_size: samples drawn at a time
        seed: of training and samples
        out: folder for the results
    """

    minutes: list[float] | None = None
    root: str | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int | None = None
    clock: Clock = "wall"
    n: int = 1000
    steps: int = 50
    batch_size: int = 100
    seed: int = 0
    out: Path = Path("runs/bench_quality")

    def __post_init__(self) -> None:
        at_least(10, n=self.n)
        at_least(1, steps=self.steps, batch_size=self.batch_size, threads=1 if self.threads is None else self.threads)
        if self.marks[0] <= 0 or self.steps > 999:
            raise InputError(f"--minutes {self.marks[0]:g} must be above 0, and --steps {self.steps} at most 999")
        if self.device == "cuda" and (self.clock == "cpu" or not torch.cuda.is_available()):
            raise InputError("--device cuda needs a GPU, and --clock wall")

    @property
    def marks(self) -> list[float]:
        return sorted(self.minutes or [2.0, 5.0, 10.0, 20.0, 40.0])

    @property
    def at(self) -> torch.device:
        return torch.device(self.device)

    @property
    def batches(self) -> list[int]:
        """How many samples are drawn at a time."""
        return [min(self.batch_size, self.n - start) for start in range(0, self.n, self.batch_size)]

    @property
    def words(self) -> list[str]:
        """The plan as options of the command line."""
        single = {key: value for key, value in vars(self).items() if value is not None and key != "minutes"}
        return [*(f"--{key}={value}" for key, value in single.items()), "--minutes", *map(str, self.marks)]

    def facts(self) -> Record:
        """What rows that are compared have in common."""
        gpu = self.device == "cuda"
        name = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
        facts = {"device": f"{self.device}: {name}", "threads": torch.get_num_threads(), "clock": self.clock}
        return {**facts, "n": self.n, "steps": self.steps}


@dataclass(frozen=True)
class Pictures:
    """The training images, uint8 ``[N, C, H, W]`` of that many grey levels."""

    images: Tensor
    levels: int

    def framed(self, multiple: int) -> Tensor:
        """The images in the middle of black ones whose sides are multiples."""
        height, width = self.images.shape[2:]
        more_rows, more_columns = -height % multiple, -width % multiple
        top, left = more_rows // 2, more_columns // 2
        return pad(self.images, (left, more_columns - left, top, more_rows - top))

    def levels_of(self, batches: Iterator[Tensor]) -> Tensor:
        """Grey levels of framed images in [0, 1], without the frame."""
        images = torch.cat([batch.cpu() for batch in batches])
        height, width = self.images.shape[2:]
        top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
        inner = images[:, :, top : top + height, left : left + width]
        return (inner.clamp(0, 1) * (self.levels - 1)).round().to(torch.uint8)


Facts = Callable[[Record], None]
"""Is told facts of a project before it trains."""


def facts_of(network: nn.Module, forward: Callable[[], Any], **more: Any) -> Record:
    """Facts of a network on the CPU, and of a pass of one image through it."""
    with torch.no_grad():
        flops = flops_of(forward)
    return {"parameters": sum(p.numel() for p in network.parameters()), "gflops": flops / 1e9, **more}


class OnlyBuilt(DiffusionCLI):
    """What ``ddpm fit`` makes of a configuration; nothing is trained yet."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def built(config: Path, plan: Plan, folder: Path) -> OnlyBuilt:
    """Trainer, model and data of a configuration."""
    options = [f"--run_dir={folder}", "--trainer.max_epochs=-1", "--trainer.devices=1"]
    options += [f"--trainer.accelerator={'gpu' if plan.device == 'cuda' else 'cpu'}", f"--seed_everything={plan.seed}"]
    options += [] if plan.root is None else [f"--data.root={plan.root}"]
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return OnlyBuilt(["fit", f"-c={config}", *options])


class Marks(Callback):
    """Tells a training of each step of ours."""

    def __init__(self, training: Training, samples: Samples) -> None:
        self.training, self.samples = training, samples

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.go()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.training.go()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, DiffusionModule)

        def draw() -> Tensor:
            return torch.cat([images.cpu() for images, _ in self.samples.batches(pl_module)])

        trainer.should_stop = self.training.after_step(len(batch.image), draw)


def train_ours(plan: Plan, training: Training, tell: Facts, cli: OnlyBuilt) -> None:
    """A configuration of this package."""
    module, data = cli.model, cli.datamodule
    network, one = module.model.network, torch.zeros(1, *module.shape)
    cond = {name: torch.zeros(1, dtype=torch.long) for name in module.conditions}
    precision, rate = cli.trainer.precision, cli.config["fit"].model.optimizer.init_args.get("lr")
    facts = {"batch_size": data.batch_size, "learning_rate": rate, "precision": str(precision)}
    tell(facts_of(network, lambda: module.model.denoiser(one, torch.ones(()), **cond), **facts))
    samples = Samples(steps=plan.steps, n=plan.n, batch_size=plan.batch_size, seed=plan.seed)
    cli.trainer.callbacks.append(Marks(training, samples))  # type: ignore[attr-defined]  # connectors set it
    cli.trainer.fit(module, data)


def train_diffusers(
    plan: Plan,
    pictures: Pictures,
    training: Training,
    tell: Facts,
    widths: tuple[int, ...] = (128, 128, 256, 256, 512, 512),
    layers: int = 2,
    groups: int = 32,
    attention: bool = True,
    batch_size: int = 16,
    rate: float = 1e-4,
) -> None:
    """diffusers, with the settings of its example of unconditional training."""
    from diffusers import DDIMPipeline, DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    images = levels_to_model(pictures.framed(2 ** (len(widths) - 1)), pictures.levels)
    levels = range(len(widths))
    network: Any = UNet2DModel(
        sample_size=tuple(images.shape[2:]),
        in_channels=images.shape[1],
        out_channels=images.shape[1],
        layers_per_block=layers,
        block_out_channels=widths,
        norm_num_groups=groups,
        down_block_types=["AttnDownBlock2D" if attention and k == len(widths) - 2 else "DownBlock2D" for k in levels],
        up_block_types=["AttnUpBlock2D" if attention and k == 1 else "UpBlock2D" for k in levels],
    )
    one = images[:1], torch.zeros(1, dtype=torch.long)
    facts = {"batch_size": batch_size, "learning_rate": rate, "precision": "32-true", "version": version("diffusers")}
    tell(facts_of(network, lambda: network(*one), **facts))
    network.to(plan.at)
    chain: Any = DDPMScheduler(num_train_timesteps=1000)
    loader = DataLoader(TensorDataset(images), batch_size, shuffle=True)
    weights = list(network.parameters())
    optimizer = torch.optim.AdamW(weights, lr=rate, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    warm_up = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=100 * len(loader))
    average = EMAModel(weights, decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)

    def draw() -> Tensor:
        pipeline: Any = DDIMPipeline(unet=network, scheduler=chain)
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator(plan.at).manual_seed(plan.seed)
        options = {"generator": generator, "num_inference_steps": plan.steps, "output_type": "pt"}
        average.store(weights)
        average.copy_to(weights)
        # eps follows from the clipped x0, as in the two other projects
        parts = (pipeline(size, use_clipped_model_output=True, **options).images for size in plan.batches)
        drawn_levels = pictures.levels_of(parts)
        average.restore(weights)
        return drawn_levels

    training.go()
    while True:
        for (x0,) in loader:
            x0 = x0.to(plan.at)
            noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),), device=plan.at)
            mse_loss(network(chain.add_noise(x0, noise, t), t).sample, noise).backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            average.step(weights)
            if training.after_step(len(x0), draw):
                return


def train_denoising_diffusion_pytorch(
    plan: Plan,
    pictures: Pictures,
    training: Training,
    tell: Facts,
    dim: int = 64,
    multipliers: tuple[int, ...] = (1, 2, 4, 8),
    **options: Any,
) -> None:
    """denoising-diffusion-pytorch's own Trainer, which reads a folder of pictures, with its bars silenced."""
    os.environ["ACCELERATE_USE_CPU"] = str(plan.device == "cpu").lower()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from denoising_diffusion_pytorch import Trainer as TheirTrainer

    images = pictures.framed(2 ** (len(multipliers) - 1))
    channels, *sides = images.shape[1:]
    network = Unet(dim, dim_mults=multipliers, channels=channels)
    one = torch.zeros(1, channels, *sides), torch.zeros(1, dtype=torch.long)
    facts = facts_of(
        network, lambda: network(*one), precision="32-true", version=version("denoising-diffusion-pytorch")
    )
    diffusion = GaussianDiffusion(network, image_size=tuple(sides), sampling_timesteps=plan.steps)
    with TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
        for k, image in enumerate((images.double() * (255 / (pictures.levels - 1))).round().to(torch.uint8)):
            to_pil_image(image).save(f"{folder}/{k}.png")
        trainer = TheirTrainer(
            diffusion,
            folder,
            augment_horizontal_flip=False,
            train_num_steps=FOREVER,
            save_and_sample_every=FOREVER,
            calculate_fid=False,
            results_folder=f"{folder}/results",
            **options,
        )
        tell({**facts, "batch_size": trainer.batch_size, "learning_rate": trainer.opt.param_groups[0]["lr"]})

        def draw() -> Tensor:
            average = trainer.ema.ema_model.eval()
            with torch.random.fork_rng([plan.at] if plan.device == "cuda" else []):
                torch.manual_seed(plan.seed)
                return pictures.levels_of(average.sample(size) for size in plan.batches)

        def count(*_: Any) -> None:
            if training.after_step(trainer.batch_size, draw):
                trainer.train_num_steps = 0

        trainer.opt.optimizer.register_step_post_hook(count)
        training.go()
        trainer.train()


Project = Callable[..., None]
SMALL_DIFFUSERS: dict[str, Any] = {"widths": (24, 48, 96), "layers": 1, "groups": 8, "attention": False}
SMALL_UNET: dict[str, Any] = {"dim": 24, "multipliers": (1, 2, 4)}
PEERS: dict[str, tuple[Project, dict[str, Any]]] = {
    "diffusers-small": (train_diffusers, SMALL_DIFFUSERS),
    "diffusers-small-as-ours": (train_diffusers, {**SMALL_DIFFUSERS, "batch_size": 64, "rate": 2e-3}),
    "denoising-diffusion-pytorch-small": (train_denoising_diffusion_pytorch, SMALL_UNET),
    "denoising-diffusion-pytorch-small-as-ours": (
        train_denoising_diffusion_pytorch,
        {**SMALL_UNET, "train_batch_size": 64, "train_lr": 2e-3},
    ),
    "diffusers": (train_diffusers, {}),
    "denoising-diffusion-pytorch": (train_denoising_diffusion_pytorch, {}),
}


def missing_for(name: str) -> str | None:
    """The module that a project needs and that is not installed."""
    needed = {"diffusers": ["diffusers"], "denoising": ["denoising_diffusion_pytorch"]}.get(name.split("-")[0], [])
    return next((module for module in needed if name in PEERS and find_spec(module) is None), None)


# --- results


class Results:
    """OUT/quality.json: facts that all rows share, the floor, and a record for each project and seed."""

    def __init__(self, out: Path, facts: Record) -> None:
        self.run, self.facts = Run(out), facts
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with self.changed() as record:  # so that another process finds these facts
            old = record["facts"]
            if different := [f"{key} {old[key]}" for key in facts if old[key] != facts[key]]:
                raise InputError(f"--out {out} holds rows of {', '.join(different)}: give another folder")

    def read(self) -> Record:
        path = self.run.folder / "quality.json"
        empty: Record = {"facts": self.facts, "floor": None, "projects": {}}
        return json.loads(path.read_text()) if path.is_file() else empty

    @contextmanager
    def changed(self) -> Iterator[Record]:
        """What is in the file, to be changed by one process at a time."""
        with FileLock(self.run.folder / ".quality.lock"):
            record = self.read()
            yield record
            self.run.write("quality.json", record)

    def has(self, key: str, marks: list[float]) -> bool:
        rows = self.read()["projects"].get(key, {}).get("rows", [])
        return set(marks) <= {mark for row in rows for mark in row["marks"]}


def as_table(record: Record) -> str:
    """The distances at every mark as text."""
    projects = record["projects"]
    marks = sorted({mark for project in projects.values() for row in project["rows"] for mark in row["marks"]})
    width = max(map(len, projects), default=0) + 2
    facts, floor = record["facts"], record["floor"]
    head = f"{'project':<{width}}{'parameters':>12}{'GFLOP':>7}{'batch':>6}{'precision':>12}"
    lines = [
        f"Frechet distance of {facts['n']} samples (DDIM, {facts['steps']} steps), {facts['device']}, "
        f"{facts['threads']} threads, minutes of {facts['clock']} time",
        head + "".join(f"{f'{mark:g} min':>16}" for mark in marks) + f"{'steps':>9}",
    ]
    for key, project in projects.items():
        at = {mark: f"{row['frechet']:.2f} +- {row['error']:.2f}" for row in project["rows"] for mark in row["marks"]}
        cells = [project["parameters"], f"{project['gflops']:.2f}", project["batch_size"], project["precision"]]
        line = f"{key:<{width}}{cells[0]:>12,}{cells[1]:>7}{cells[2]:>6}{cells[3]:>12}"
        last = project["rows"][-1]["steps"] if project["rows"] else 0
        lines.append(line + "".join(f"{at.get(mark, ''):>16}" for mark in marks) + f"{last:>9,}")
    return "\n".join([*lines, f"floor: as many training images, {floor['frechet']:.2f} +- {floor['error']:.2f}"])


def curves(record: Record) -> Tensor:
    """Frechet distance against minutes."""
    figure = Figure(figsize=(8, 5), dpi=110, layout="tight")
    axes, floor, facts = figure.subplots(), record["floor"], record["facts"]
    for key, project in record["projects"].items():
        rows = project["rows"]
        y, error = [row["frechet"] for row in rows], [row["error"] for row in rows]
        peer = key.split(",")[0] in PEERS
        axes.errorbar(
            [row["minutes"] for row in rows], y, error, label=key, marker="s" if peer else "o", ms=4, capsize=2,
            ls="--" if peer else "-",
        )  # fmt: skip
    axes.axhline(floor["frechet"], color="0.5", ls=":", label="training images")
    axes.set(xscale="log", yscale="log", xlabel=f"minutes of training ({facts['clock']} time)")
    axes.set(ylabel="Frechet distance", title=f"{facts['n']} samples, DDIM, {facts['steps']} steps; {facts['device']}")
    axes.legend(fontsize=7)
    return drawn(figure)


def judge_and_floor(cli: OnlyBuilt, n: int) -> tuple[Callable[[Tensor], Record], Record]:
    """What measures samples by their grey levels, and its verdict on so many training images."""
    module, data = cli.model, cli.datamodule
    _, classifier = named_classifier(module, None, data)

    def features(images: Tensor) -> Tensor:
        return points_of(images, module.grey_levels, classifier)["features"]

    judge = Judge(features(data.split("test").images))

    def measured(images: Tensor) -> Record:
        return judge(features(images))

    return measured, measured(data.split("train").chosen(n, 0).image)


def measure(name: str, plan: Plan, config: Path, results: Results, folder: Path) -> None:
    """Train one project, ``config`` itself or a peer on its data, and add its rows."""
    cli = built(config, plan, folder / "run")
    cli.datamodule.prepare_data()
    judge, floor = judge_and_floor(cli, plan.n)
    key = f"{name}, seed {plan.seed}"

    def tell(facts: Record) -> None:
        with results.changed() as record:
            record["floor"], record["projects"][key] = floor, {**facts, "torch": torch.__version__, "rows": []}

    def keep(row: Record) -> None:
        with results.changed() as record:
            record["projects"][key]["rows"].append(row)

    def shown(images: Tensor) -> Record:
        results.run.write(f"samples-{name}-{plan.seed}.png", tile(images[:64], cli.model.grey_levels))
        return judge(images)

    training = Training(name, plan.marks, plan.at, plan.clock, shown, keep)
    if name not in PEERS:
        train_ours(plan, training, tell, cli)
        return
    torch.manual_seed(plan.seed)
    train, options = PEERS[name]
    train(plan, Pictures(cli.datamodule.split("train").images, cli.model.grey_levels), training, tell, **options)


def main(plan: Plan, configs: list[Path] | None = None, only: list[str] | None = None) -> int:
    """Train and measure.

    Args:
        plan: what every project is given
        configs: configurations of this package, called by their files' names, by default configs/mnist.yaml; all
            others train on the data of the first
        only: projects, by default all that are installed
    """
    ours = {file.stem: file for file in configs or [CONFIG]}
    first = next(iter(ours.values()))
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    chosen = []
    for name in only or [*ours, *PEERS]:
        if name not in ours and name not in PEERS:
            raise InputError(f"--only {name}: there are {', '.join([*ours, *PEERS])}")
        if module := missing_for(name):
            sentence = f"{name} needs {module}, which is not installed: pip install 'ddpm-lightning[bench]'"
            if only:
                raise InputError(sentence)
            print(f"left out: {sentence}", file=sys.stderr)
        else:
            chosen.append(name)
    results = Results(plan.out, {"data": first.stem, **plan.facts()})
    due = [name for name in chosen if not results.has(f"{name}, seed {plan.seed}", plan.marks)]
    if len(due) > 1:  # in processes of their own, so that none leaves switches, caches or threads to the next
        for name in due:
            words = [*plan.words, "--configs", *map(str, ours.values()), "--only", name]
            done = subprocess.run([sys.executable, __file__, *words], stdout=subprocess.DEVNULL)
            if done.returncode:
                return done.returncode
    elif due:
        with TemporaryDirectory() as folder, redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            measure(due[0], plan, ours.get(due[0], first), results, Path(folder))
    record = results.read()
    results.run.write("quality.png", curves(record))
    print(as_table(record))
    return 0


if __name__ == "__main__":
    run_script(main, __doc__)

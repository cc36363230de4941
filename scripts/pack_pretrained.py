#!/usr/bin/env python3
"""Pack a trained run into a model that comes with the package, measure the packed files, and write their card.

    python scripts/pack_pretrained.py RUN --name digits --how "3 minutes on two CPU cores" \
        --train "ddpm fit -c digits" --limits "It draws digits of 8 x 8 pixels and nothing else."

The averaged weights go into ddpm_lightning/pretrained/NAME in half precision, over those that were there. Every figure
of the card is measured on these files, by ``ddpm test`` and, where --n asks for samples, by ``ddpm evaluate quality``.
"""

import hashlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from bench_tools import flops_of

import ddpm_lightning.pretrained
from ddpm_lightning.cli import main as ddpm
from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import Batch
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.pretrained import Packed
from ddpm_lightning.runs import Run
from ddpm_lightning.training import GenerativeModule

HOME = Path(ddpm_lightning.pretrained.__file__).parent
SAMPLED = "--sampler DPMSolverSampler --steps 20"
# names of the data on Hugging Face
HUB = {"MNIST": "ylecun/mnist", "FashionMNIST": "zalando-datasets/fashion_mnist", "CIFAR10": "uoft-cs/cifar10"}


def step_flops(module: GenerativeModule, size: int) -> int:
    """Floating point operations of one batch of training, forward and backward."""
    zeros = torch.zeros(size, *module.shape, dtype=torch.uint8)
    batch = Batch(zeros, torch.zeros(size, dtype=torch.int64), torch.arange(size))

    def step() -> None:
        x0 = module.scale.to_model(batch.image)
        module.objective(module.model, x0, torch.Generator(), **module.condition(batch)).mean().backward()

    return flops_of(step)


def figures_of(packed: Packed, test: Sequence[str], data_root: str | None, n: int) -> dict[str, Any]:
    """What the commands of the card say of the packed files."""
    with tempfile.TemporaryDirectory() as folder:
        run = packed.lay_out(Path(folder, packed.folder.name))
        root = [] if data_root is None else [f"--data.root={data_root}"]
        ddpm(["test", str(run.folder), *test, *root])
        bound = json.loads((run.folder / "bound-test.json").read_text())
        found = {
            "images": bound["images"],
            "bits_per_dim": {form: terms["bits_per_dim"] for form, terms in bound["figures"].items()},
        }
        if n:
            root = [] if data_root is None else ["--data_root", data_root]
            ddpm(["evaluate", "quality", str(run.folder), "--n", str(n), *SAMPLED.split(), *root])
            rows = json.loads((run.folder / "quality" / "quality.json").read_text())["figures"]
            found["quality"] = {
                "n": n,
                **{score: rows["samples"][score] for score in ("frechet", "precision", "recall")},
            }
    return found


def card(run: Run, packed: Packed, figures: dict[str, Any], commands: Sequence[str], how: str, limits: str) -> str:
    """The text of README.md: facts as YAML, then the same in words."""
    module, data, config = packed.load(), run.load_data(), run.config
    assert isinstance(data, ArrayDataModule)
    told = ", told their class" if module.class_conditional else ""
    told += f" but for a share of {module.label_dropout:g}" if module.label_dropout else ""
    steps, size = module.steps_trained, data.batch_size
    batches = steps * config.get("trainer", {}).get("accumulate_grad_batches", 1)
    weights = sum(p.numel() for p in module.model.parameters())
    hub = HUB.get(type(data).__name__)
    facts = {
        # what the cards of Hugging Face begin with
        "license": "mit",
        "library_name": "ddpm-lightning",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusion", "ddpm", "lightning"],
        **({"datasets": [hub]} if hub else {}),
        "model": packed.folder.name,
        "weights_sha256": hashlib.sha256(packed.weights_path.read_bytes()).hexdigest(),
        "parameters": weights,
        "steps": steps,
        "pflop": float(f"{batches * step_flops(module, size) / 1e15:.3g}"),
        "seeds": {"everything": config["seed_everything"], "noise": module.seed, "evaluation": module.eval_seed},
        "figures": figures,
    }
    parts = {
        name: config["model"][name]["class_path"].rpartition(".")[2] for name in ("network", "schedule", "objective")
    }
    rows = [f"| {form} | {each['mean']:.4f} +- {each['se']:.4f} |" for form, each in figures["bits_per_dim"].items()]
    quality = figures.get("quality")
    sampled = (
        []
        if quality is None
        else [
            "",
            f"{quality['n']:,} samples, in the features of the classifier in this package: Frechet distance "
            f"{quality['frechet']:.3f}, precision {quality['precision']:.3f}, recall {quality['recall']:.3f}.",
        ]
    )
    lines = [
        "---",
        yaml.safe_dump(facts, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {packed.folder.name}",
        "",
        f"{parts['network']} of {weights:,} weights under {parts['schedule']} with T = {module.model.T}, trained with "
        f"{parts['objective']} on the {data.sizes['train']:,} training images of {type(data).__name__}"
        f"{told}.",
        f"These are the averaged weights (decay {module.ema_decay}), the network's in half precision.",
        "",
        f"- Training: {steps:,} steps of {size} images, {how}.",
        f"- Compute: {facts['pflop']:g} PFLOP, forward and backward, without validation.",
        f"- Seeds: {config['seed_everything']} of the weights, {module.seed} of the training noise, "
        f"{module.eval_seed} of the noise in evaluation.",
        "",
        f"## Figures of these files, on {figures['images']:,} test images",
        "",
        "| form of the bound | bits/dim |",
        "|---|---|",
        *rows,
        "",
        "+- is the standard error over images.",
        *sampled,
        "",
        "## Commands",
        "",
        "```bash",
        *commands,
        "```",
        "",
        "## Limits",
        "",
        limits,
    ]
    return "\n".join(lines) + "\n"


def main(
    run: str,
    name: str,
    how: str,
    train: str,
    limits: str,
    test_options: str = "",
    data_root: str | None = None,
    n: int = 0,
    checkpoint: str = "last",
) -> None:
    """Pack, measure, and write the card.

    Args:
        run: folder of the trained run
        name: of the model
        how: for how long it was trained and on what, for the card
        train: the command that trained it, for the card
        limits: what the model cannot do, for the card
        test_options: of ddpm test, in one word, as "--data.limit_test 500"
        data_root: folder that holds MNIST/raw
        n: samples whose quality is measured, 0 for none
        checkpoint: last, best or a file
    """
    if not name.isidentifier():
        raise InputError(f"--name {name} must be a word of letters, digits and _")
    trained, options = Run(run), shlex.split(test_options)
    packed = Packed.of(trained, HOME / name, checkpoint)
    figures = figures_of(packed, options, data_root, n)
    commands = [train, shlex.join(["ddpm", "test", "--pretrained", name, *options])]
    commands += [f"ddpm evaluate quality --pretrained {name} --n {n} {SAMPLED}"] if n else []
    (packed.folder / "README.md").write_text(card(trained, packed, figures, commands, how, limits))
    print(f"{packed.folder}: {packed.weights_path.stat().st_size / 1e6:.2f} MB of weights")


if __name__ == "__main__":
    run_script(main, __doc__)

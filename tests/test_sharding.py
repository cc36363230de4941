"""Weights shared out among processes (FSDP2): two processes on the CPU, against one and against themselves."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from builders import compared, differences, losses, torn, weights
from conftest import ROOT, run_pair
from safetensors.torch import load_file
from torch import nn
from torch.distributed.tensor import DTensor

from ddpm_lightning.cli import DiffusionCLI, main
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.training.sharding import _blocks, _called

pytestmark = pytest.mark.cli

# nine images for validation in batches of two: three batches on one process, two on the other
TRAINING = [
    "--data.limit_val=9", "--data.eval_batch_size=2", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1",
    "--trainer.gradient_clip_val=0.1", "--trainer.accelerator=cpu", "--model.ema_decay=0.5",
]  # fmt: skip
# the output's kernel has one row, which one of the processes has none of
MUON = ["--model.optimizer=MuonAdamW", "--trainer.max_steps=3"]
SHARDED = ["-c", "configs/overlays/fsdp.yaml", "--trainer.devices=2"]
EVALUATION = ["--data.limit_test=25", "--data.eval_batch_size=8", "--trainer.accelerator=cpu"]
REFUSED = {
    "channels_last": ["--model.channels_last=true"],
    "compile": ["--model.compile=true"],
    "schedule": ["--model.schedule=LearnedGamma", "--model.decoder=CategoricalDecoder",
                 "--model.objective=ContinuousNegativeElbo", "--model.objective.times=EquispacedTimes"],
    "lightning": ["--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy",
                  "--trainer.strategy.data_parallel_size=2", "--trainer.strategy.tensor_parallel_size=1"],
}  # fmt: skip


def two_processes(folder: Path, tiny: list[str]) -> None:
    """What each of two processes runs, in one go, since starting them takes longest; rank 0 writes facts.json."""
    rank = int(os.environ["RANK"])

    def fit(name: str, *options: str, seed: int = 0) -> DiffusionCLI:
        # the initial weights are those of the first process
        run = [f"--run_dir={folder}/{name}", f"--seed_everything={seed + rank}"]
        return DiffusionCLI(["fit", *tiny, *TRAINING, *SHARDED, *run, *options])

    def shared(module: nn.Module) -> dict[str, list[int]]:
        return {
            name: [parameter.numel(), parameter.to_local().numel() if isinstance(parameter, DTensor) else -1]
            for name, parameter in module.named_parameters()
        }

    module = fit("two").model
    facts: dict = {"model": shared(module.model), "average": shared(module.ema_model), "refused": {}}
    fit("broken", "--trainer.max_steps=13")
    if rank == 0:
        shutil.copytree(folder / "broken", folder / "torn")
        torn(folder / "torn/checkpoints/last.ckpt")
        shutil.copytree(folder / "broken", folder / "handed_over")
    torch.distributed.barrier()
    for name in ("broken", "torn", "handed_back"):
        fit(name, "--ckpt_path=last", seed=7)
    fit("muon_two", *MUON)
    common = ["-c", f"{folder}/two/config.yaml", f"--ckpt_path={folder}/two/checkpoints/last.ckpt", *EVALUATION]
    for command in (["test"], ["sample", "--n=7", "--steps=3"]):
        main([*command, *common, f"--run_dir={folder}/two"])
    for name, options in REFUSED.items():
        try:
            fit(f"refused_{name}", *options)
        except InputError as error:
            facts["refused"][name] = str(error)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> tuple[Path, str]:
    """The folder of all runs, and what the two processes printed."""
    folder = tmp_path_factory.mktemp("sharded")
    before = Path.cwd()
    os.chdir(ROOT)
    try:
        main(["fit", *tiny, *TRAINING, f"--run_dir={folder}/one"])
        # a checkpoint with tensors of another layout than sharded ones can have
        other_layout = ["--trainer.max_steps=13", "--model.channels_last=true"]
        main(["fit", *tiny, *TRAINING, f"--run_dir={folder}/handed_back", *other_layout])
        main(["fit", *tiny, *TRAINING, f"--run_dir={folder}/muon_one", *MUON])
        output = run_pair(two_processes, folder, tiny)
        main(["fit", *tiny, *TRAINING, f"--run_dir={folder}/handed_over", "--ckpt_path=last"])
        common = ["-c", f"{folder}/two/config.yaml", f"--ckpt_path={folder}/two/checkpoints/last.ckpt", *EVALUATION]
        alone = ["--trainer.devices=1", "--trainer.strategy=auto", f"--run_dir={folder}/one"]
        for command in (["test"], ["sample", "--n=7", "--steps=3"]):
            main([*command, *common, *alone])
    finally:
        os.chdir(before)
    return folder, output


def test_each_process_has_half_of_every_weight(runs: tuple[Path, str]) -> None:
    facts = json.loads((runs[0] / "facts.json").read_text())
    for which in ("model", "average"):
        assert facts[which] and min(local for _, local in facts[which].values()) >= 0
        whole, local = (sum(sizes) for sizes in zip(*facts[which].values(), strict=True))
        # all but the 73 weights of the one output channel
        assert whole / 2 <= local <= whole / 2 + 73 / 2 + 1
    assert facts["model"] == facts["average"]


def test_two_processes_train_as_one_does(runs: tuple[Path, str]) -> None:
    folder, output = runs
    one, two = (losses(folder / name) for name in ("one", "two"))
    assert len(one) == 20 and one == pytest.approx(two, rel=1e-5)
    assert output.count("epoch 1 | step 20 ") == 4  # two, broken, torn, handed back
    a, b = (torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True) for name in ("one", "two"))
    assert list(a["state_dict"]) == list(b["state_dict"])
    for name, value in a["state_dict"].items():
        assert torch.allclose(value, b["state_dict"][name], rtol=0, atol=1e-5), name
    mine, theirs = (checkpoint["optimizer_states"][0] for checkpoint in (a, b))
    assert mine["param_groups"] == theirs["param_groups"] and list(mine["state"]) == list(theirs["state"])
    for number, values in mine["state"].items():
        assert {name: v.shape for name, v in values.items()} == {
            name: v.shape for name, v in theirs["state"][number].items()
        }
        for name, value in values.items():
            assert torch.allclose(value, theirs["state"][number][name], rtol=1e-3, atol=1e-7), (number, name)
    assert sorted(path.name for path in (folder / "two/samples").iterdir()) == ["step_0000010.png", "step_0000020.png"]


def test_muon_takes_the_same_steps(runs: tuple[Path, str]) -> None:
    one, two = (weights(runs[0] / f"muon_{name}" / "checkpoints/last.ckpt") for name in ("one", "two"))
    for name, value in one.items():
        assert torch.allclose(value, two[name], rtol=0, atol=1e-4), name


@pytest.mark.parametrize("name", ["broken", "torn"])
def test_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(name: str, runs: tuple[Path, str]) -> None:
    folder, output = runs
    straight, resumed = (compared(folder / run / "checkpoints/last.ckpt") for run in ("two", name))
    assert resumed["global_step"] == 20 and differences(straight, resumed) == []
    assert f"{folder}/torn/checkpoints/previous.ckpt of step 10" in output


@pytest.mark.parametrize("name", ["handed_over", "handed_back"])
def test_one_process_goes_on_with_the_checkpoint_of_two_and_they_with_its(name: str, runs: tuple[Path, str]) -> None:
    a, b = (weights(runs[0] / run / "checkpoints/last.ckpt") for run in ("one", name))
    for tensor in a:
        assert torch.allclose(a[tensor], b[tensor], rtol=0, atol=1e-5), tensor
    one = losses(runs[0] / "one")
    assert losses(runs[0] / name)[-7:] == pytest.approx(one[-7:], rel=1e-5)


def test_evaluation_is_that_of_one_process(runs: tuple[Path, str]) -> None:
    one, two = (json.loads((runs[0] / name / "bound-test.json").read_text()) for name in ("one", "two"))
    assert one["images"] == two["images"] == 25
    for form, terms in one["figures"].items():
        for name, figure in terms.items():
            assert two["figures"][form][name]["mean"] == pytest.approx(figure["mean"], rel=1e-6, abs=1e-6)
    a, b = (load_file(runs[0] / name / "samples.safetensors")["images"] for name in ("one", "two"))
    assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("channels_last", ["--model.channels_last true", "auto"]),
        ("compile", ["--model.compile true", "--trainer.strategy ddp"]),
        ("schedule", ["LearnedGamma", "--trainer.strategy ddp"]),
        ("lightning", ["ModelParallelStrategy", "save_distributed_checkpoint", "configs/overlays/fsdp.yaml"]),
    ],
)
def test_refusals(name: str, words: list[str], runs: tuple[Path, str]) -> None:
    refused = json.loads((runs[0] / "facts.json").read_text())["refused"]
    assert all(word in refused[name] for word in words) and "\n" not in refused[name]
    assert not list((runs[0] / f"refused_{name}").rglob("*.ckpt"))


class Odd(nn.Module):
    """A tied weight, a layer that is not called but read, a list, and one part that has most of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.read = nn.Linear(4, 4)
        self.parts = nn.ModuleList([nn.Linear(4, 4), nn.ReLU()])
        self.large = nn.Sequential(nn.Linear(4, 100), nn.Linear(100, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.last(self.first(x)) @ self.read.weight
        for part in self.parts:
            x = part(x)
        return self.large(x)


def test_blocks_are_parts_that_are_called_and_own_their_weights() -> None:
    def named(network: nn.Module, *inputs: torch.Tensor) -> list[str]:
        names = {part: name for name, part in network.named_modules()}
        return [names[block] for block in _blocks(network, _called(network, lambda: network(*inputs)))]

    assert named(Odd(), torch.zeros(1, 4)) == ["parts.0", "large.0", "large.1"]
    images, times = torch.zeros(1, 1, 8, 8), torch.zeros(1)
    assert named(SimpleUNet(), images, times) == ["encoder", "time_mlp", "decoder"]
    unet = named(UNet(1, width=8, multipliers=(1, 2), blocks=1), images, times)
    assert unet == [
        "time_mlp", "stem", "down.0.0", "down.1.0", "shrink.0", "middle.0", "grow.0", "up.0.0", "up.1.0", "out_norm",
        "out_conv",
    ]  # fmt: skip

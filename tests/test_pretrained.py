"""Trained models in the package: what is packed is what is loaded, laid out and described."""

import errno
import hashlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import OLD_RUN, BuiltOnly, refused
from conftest import ROOT, run_ddpm, run_script
from mnist_files import DATA_DIR, real_mnist
from safetensors.torch import load_file
from torch import Tensor

import ddpm_lightning
from ddpm_lightning import load_pretrained, pretrained_names
from ddpm_lightning.checkpoints.files import read_checkpoint
from ddpm_lightning.configuration import read, with_shipped
from ddpm_lightning.data import Digits
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo
from ddpm_lightning.pretrained import Packed, lay_out_pretrained, packed
from ddpm_lightning.runs import Run
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training import GenerativeModule

PACKAGE = Path(ddpm_lightning.__file__).parent
NAMES = pretrained_names()


def card(folder: Path) -> dict[str, Any]:
    """The facts at the head of a card."""
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def bits(
    module: GenerativeModule,
    data: ArrayDataModule,
    rows: Tensor,
    steps: int | None,
    form: type[DenoisingElbo | ContinuousElbo] = DenoisingElbo,
) -> Tensor:
    """A form of the bound on images of the test split, bits/dim ``[N]``."""
    data.prepare_data()
    with torch.inference_mode():
        nats = module.bound(form(steps), data.split("test").batch(rows))["elbo"]
    return -nats.double() / module.dims / torch.log(torch.tensor(2.0, dtype=torch.float64))


# --- packing


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The run of version 0.1, packed."""
    return Packed.of(Run(OLD_RUN), tmp_path_factory.mktemp("packed") / "ours")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_packed_weights_are_the_halved_averages(dtype: torch.dtype, tmp_path: Path) -> None:
    before = read_checkpoint(OLD_RUN / "checkpoints/last.ckpt")["state_dict"]
    module = Packed.of(Run(OLD_RUN), tmp_path, dtype=dtype).load()
    # version 0.1 did not know what steps cost
    state = {name: value for name, value in module.state_dict().items() if not name.startswith("profiles.")}
    assert state.keys() == before.keys() and not module.training and module.device.type == "cpu"
    changed = 0
    for name, value in state.items():
        average = before[f"ema_{name}" if name.startswith("model.") else name]
        # the objective has a state too, which is not halved
        expected = average if name.startswith("objective.") else average.to(dtype).float()
        assert value.dtype == average.dtype and torch.equal(value, expected)
        changed += not torch.equal(value, average)
    assert changed > 10
    stored = load_file(tmp_path / "weights.safetensors")
    assert {value.dtype for name, value in stored.items() if name.startswith("ema_model.")} == {dtype}
    assert not [name for name in stored if name.startswith("model.")]


def test_the_schedule_keeps_its_precision(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(OLD_RUN / "checkpoints/last.ckpt")
    third = torch.tensor([1 / 3])
    checkpoint["state_dict"] |= {f"{model}.schedule.raw": third for model in ("model", "ema_model")}
    (tmp_path / "run").mkdir()
    shutil.copy(OLD_RUN / "config.yaml", tmp_path / "run")
    torch.save(checkpoint, tmp_path / "run" / "changed.ckpt")
    made = Packed.of(Run(tmp_path / "run"), tmp_path / "packed", tmp_path / "run" / "changed.ckpt").checkpoint()
    assert torch.equal(made["state_dict"]["model.schedule.raw"], third)


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(OLD_RUN / "checkpoints/last.ckpt")
    name = next(name for name in checkpoint["state_dict"] if name.startswith("ema_model.network"))
    checkpoint["state_dict"][name] = torch.full_like(checkpoint["state_dict"][name], 7e4)
    torch.save(checkpoint, tmp_path / "large.ckpt")
    with pytest.raises(InputError, match=f"{name} has values beyond the range of torch.float16"):
        Packed.of(Run(OLD_RUN), tmp_path / "packed", tmp_path / "large.ckpt")
    assert not (tmp_path / "packed").exists()


def test_the_bound_changes_by_less_than_two_thousandths(ours: Packed) -> None:
    data, rows = Digits(), torch.arange(297)
    before, after = (bits(module, data, rows, None) for module in (Run(OLD_RUN).load_module(), ours.load()))
    assert abs(float((after - before).mean())) < 0.002


def test_a_packed_configuration_names_no_place_of_a_machine(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    config = Run(OLD_RUN).config
    config = {**config, "run_dir": "/a/place", "ckpt_path": "/a/place/last.ckpt", "data": {
        "class_path": "ddpm_lightning.data.MNIST", "init_args": {"root": "/my/data", "batch_size": 7}
    }}  # fmt: skip
    run.write("config.yaml", yaml.safe_dump(config))
    checkpoint = OLD_RUN / "checkpoints/last.ckpt"
    made = Packed.of(run, tmp_path / "packed", checkpoint)
    text = made.config_path.read_text()
    assert "/" not in text and read(made.config_path).keys() <= {"seed_everything", "module", "data", "model"}
    assert read(made.config_path)["data"]["init_args"] == {"batch_size": 7}
    config["data"] = {"class_path": "ddpm_lightning.data.Images", "init_args": {"path": "/my/photos"}}
    run = Run(tmp_path / "photos")
    run.write("config.yaml", yaml.safe_dump(config))
    with pytest.raises(InputError, match=r"--data.path /my/photos is a place on this machine"):
        Packed.of(run, tmp_path / "packed", checkpoint)


# --- laying out


def test_a_laid_out_run_is_the_loaded_module(
    ours: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = ours.lay_out("runs/ours")
    assert capsys.readouterr().out == "ours: laid out as a run in runs/ours\n"
    module, loaded = run.load_module(), ours.load()
    assert module.hparams == loaded.hparams and module.steps_trained == loaded.steps_trained == 20
    assert module.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, module.state_dict()[name]) for name, value in loaded.state_dict().items())
    first, second = (SampleRequest(seed=3).on(each)(range(2)) for each in (module, loaded))
    assert torch.equal(first, second)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"ours"}
    # again: the same, in silence
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    ours.lay_out("runs/ours")
    assert capsys.readouterr().out == ""
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


@pytest.mark.parametrize("what", ["configuration", "weights", "facts", "damage", "nothing", "a file"])
def test_a_folder_that_differs_is_left_alone(what: str, ours: Packed, tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    last = folder / "checkpoints" / "last.ckpt"
    if what not in ("nothing", "a file"):
        ours.lay_out(folder)
        checkpoint = ours.checkpoint()
    if what == "configuration":
        with (folder / "config.yaml").open("a") as file:
            file.write("seed_everything: 1\n")
    elif what == "weights":
        checkpoint["state_dict"]["ema_model.network." + _a_weight(checkpoint)] += 1e-3
        torch.save(checkpoint, last)
    elif what == "facts":
        torch.save({**checkpoint, "global_step": 21}, last)
    elif what == "damage":
        last.write_bytes(last.read_bytes()[:-100])
    elif what == "nothing":
        folder.mkdir()
    else:
        folder.write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="holds something else than ours: move it, or delete it"):
        ours.lay_out(folder)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def _a_weight(checkpoint: dict[str, Any]) -> str:
    start = "ema_model.network."
    return next(name.removeprefix(start) for name in checkpoint["state_dict"] if name.startswith(start))


@pytest.mark.parametrize("faster", [True, False])
def test_another_process_may_be_faster(
    faster: bool, ours: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rename(made: Path, folder: Path) -> None:
        if faster:
            shutil.copytree(made, folder)
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(os, "rename", rename)
    if faster:
        assert ours.lay_out(tmp_path / "ours").load_module().steps_trained == 20
    else:
        with pytest.raises(InputError, match=r"cannot be made \(Directory not empty\): work in a folder"):
            ours.lay_out(tmp_path / "ours")
    assert capsys.readouterr().out == ""


def test_what_a_packed_folder_names_is_not_trusted(ours: Packed, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    shutil.copytree(ours.folder, tmp_path / "evil")
    path = tmp_path / "evil" / "weights.safetensors"
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["checkpoint"])
    facts["hyper_parameters"]["network"] = {
        "class_path": "os.system",
        "init_args": {"command": f"touch {tmp_path}/ran"},
    }
    save_file(load_file(path), path, metadata={"checkpoint": json.dumps(facts)})
    with pytest.raises(InputError, match=r"os\.system"):
        Packed(tmp_path / "evil").load()
    run = Packed(tmp_path / "evil").lay_out(tmp_path / "run")
    with pytest.raises(InputError, match=r"os\.system"):
        run.load_module()
    assert not (tmp_path / "ran").exists()
    for broken in (b"", b"no weights"):
        path.write_bytes(broken)
        with pytest.raises(InputError, match="evil holds no packed model"):
            Packed(tmp_path / "evil").load()


# --- the command line


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("sample --pretrained nothing", "there is no pretrained model nothing: there are digits, mnist"),
        ("sample --pretrained", "there is no pretrained model without a name: there are digits, mnist"),
        ("sample --pretrained=../digits", "there is no pretrained model ../digits: there are "),
        ("sample --pretrained digits --pretrained=mnist", "give --pretrained NAME once: a command takes one model"),
        ("submit test --pretrained digits", "lays the model out as the run runs/pretrained/digits, which submit takes"),
        ("sample runs/mine --pretrained digits", "give RUN or --pretrained NAME, not both runs/mine and digits"),
        ("export runs/mine --to onnx --pretrained=digits", "give RUN or --pretrained NAME, not both"),
        ("evaluate quality runs/mine --pretrained digits", "give RUN or --pretrained NAME, not both"),
        ("fit --pretrained digits", "fit --pretrained: training cannot go on from averaged weights alone; start a run"),
    ],
)
def test_it_is_refused_in_one_sentence(
    command: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, *command.split())
    assert words in message and message.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.cli
def test_every_command_takes_a_name_for_a_run(tmp_path: Path) -> None:
    laid_out = "digits: laid out as a run in runs/pretrained/digits\n"
    output = run_ddpm("sample", "--pretrained", "digits", "--n=2", "--steps=3", cwd=tmp_path)
    assert output.startswith(laid_out)
    run = tmp_path / "runs/pretrained/digits"
    drawn = load_file(run / "samples.safetensors")["images"]
    assert torch.equal(drawn, SampleRequest(steps=3).on(load_pretrained("digits"))(range(2)))
    few = ["--data.limit_test=4", "--model.test_bounds=[{class_path: DenoisingElbo, init_args: {steps: 2}}]"]
    assert laid_out not in run_ddpm("test", *few, "--pretrained=digits", cwd=tmp_path)
    run_ddpm("predict", "--pretrained", "digits", *few, cwd=tmp_path)
    assert (run / "bound-test.json").is_file() and (run / "image_terms.csv").is_file()
    run_ddpm("evaluate", "forms", "--pretrained", "digits", *shlex.split("--T 3 --images 4 --draws 2"), cwd=tmp_path)
    assert (run / "forms" / "forms.json").is_file()
    run_ddpm("export", "--pretrained=digits", "--to", "safetensors", "--out", "d.safetensors", cwd=tmp_path)
    assert (tmp_path / "d.safetensors").is_file()


def test_a_laid_out_run_cannot_be_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = lay_out_pretrained("digits")
    message = refused(capsys, "fit", str(run.folder), "--trainer.accelerator=cpu")
    assert "it can be evaluated, but training cannot go on from it" in message


# --- what is shipped


def test_the_models_are_there_and_small() -> None:
    assert NAMES == ["digits", "mnist", "mnist_likelihood"]
    files = [
        path for path in (PACKAGE / "pretrained").rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert sorted(str(path.relative_to(PACKAGE / "pretrained")) for path in files) == sorted(
        f"{name}/{file}" for name in NAMES for file in ("README.md", "config.yaml", "weights.safetensors")
    )
    assert sum(path.stat().st_size for path in files) < 10e6
    with pytest.raises(InputError, match="no pretrained model cifar: there are digits, mnist, mnist_likelihood"):
        load_pretrained("cifar")
    with pytest.raises(AttributeError, match="no attribute 'load_pretraned'"):
        ddpm_lightning.load_pretraned  # noqa: B018


@pytest.mark.parametrize("name", NAMES)
def test_a_card_is_that_of_its_files(name: str) -> None:
    model, module = packed(name), load_pretrained(name)
    facts, text = card(model.folder), (model.folder / "README.md").read_text()
    assert facts["model"] == name
    assert (facts["license"], facts["pipeline_tag"]) == ("mit", "unconditional-image-generation")
    assert facts.get("datasets") == (None if name == "digits" else ["ylecun/mnist"])
    assert facts["weights_sha256"] == hashlib.sha256(model.weights_path.read_bytes()).hexdigest()
    assert facts["steps"] == module.steps_trained
    assert facts["parameters"] == sum(p.numel() for p in module.model.parameters())
    weights = load_file(model.weights_path)
    assert {value.dtype for key, value in weights.items() if key.startswith("ema_model.network.")} == {torch.float16}
    assert "/" not in model.config_path.read_text()
    for form, score in facts["figures"]["bits_per_dim"].items():
        assert f"| {form} | {score['mean']:.4f} +- {score['se']:.4f} |" in text
    for words in ("## Limits", f"{facts['pflop']:g} PFLOP", "Seeds", f"ddpm test --pretrained {name}"):
        assert words in text
    assert module.class_conditional == (name == "mnist")


def test_the_figure_of_the_digits_is_made_again() -> None:
    facts, module = card(packed("digits").folder)["figures"], load_pretrained("digits")
    assert facts["images"] == 297
    stored, few = facts["bits_per_dim"]["denoising"], bits(module, Digits(), torch.arange(297), 10)
    # the same images: what is left is the noise of ten steps of 49, less than the spread of its estimates
    assert abs(float(few.mean()) - stored["mean"]) < 4 * float(few.std()) / 297**0.5
    other = Run(OLD_RUN).load_module()
    worse = bits(other, Digits(), torch.arange(297), 10)
    assert abs(float(worse.mean()) - stored["mean"]) > 4 * float(worse.std()) / 297**0.5


@real_mnist
@pytest.mark.mnist
@pytest.mark.parametrize("name", [name for name in NAMES if name != "digits"])
def test_the_figure_of_mnist_is_made_again(name: str) -> None:
    facts, module = card(packed(name).folder)["figures"], load_pretrained(name)
    data = Run(packed(name).folder).load_data()
    assert isinstance(data, ArrayDataModule)
    data.root = str(DATA_DIR)  # type: ignore[attr-defined]
    # spread over the images of the figure
    rows = torch.linspace(0, facts["images"] - 1, 100).long()
    ((form, stored),) = facts["bits_per_dim"].items()
    few = bits(module, data, rows, 5, {"denoising": DenoisingElbo, "continuous": ContinuousElbo}[form])
    error = (float(few.var()) / len(rows) + stored["se"] ** 2) ** 0.5
    assert abs(float(few.mean()) - stored["mean"]) < 4 * error


# --- configurations by name


def test_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ours = PACKAGE / "configs" / "digits.yaml"
    for name in ("digits", "digits.yaml", "configs/digits.yaml"):
        assert with_shipped(["fit", "-c", name]) == ["fit", "-c", str(ours)]
        assert with_shipped(["fit", f"--config={name}"]) == ["fit", f"--config={ours}"]
    assert with_shipped(["-c", "overlays/clip"]) == ["-c", str(PACKAGE / "configs" / "overlays" / "clip.yaml")]
    others = ["fit", "--run_dir", "digits", "-c", "nothing", "-c", "/digits", "-c", "../digits", "-c={a: 1}", "x" * 999]
    assert with_shipped(others) == others
    # a file comes first, a folder does not
    (tmp_path / "mnist").mkdir()
    (tmp_path / "digits.yaml").write_text("run_dir: mine\n")
    assert with_shipped(["-c", "digits.yaml", "-c", "mnist"])[1::2] == [
        "digits.yaml",
        str(ours.with_name("mnist.yaml")),
    ]


def test_a_file_extends_a_shipped_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "mnist.yaml").write_text("run_dir: not this one\n")
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "mine.yaml").write_text("extends: mnist.yaml\nseed_everything: 3\n")
    shipped = read(PACKAGE / "configs" / "mnist.yaml")
    assert read(tmp_path / "mine.yaml") == {**shipped, "seed_everything": 3}
    # what lies beside it comes first
    (tmp_path / "mnist.yaml").write_text("run_dir: beside\n")
    assert read(tmp_path / "mine.yaml") == {"run_dir": "beside", "seed_everything": 3}


def test_an_unknown_name_lists_those_that_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, "fit", "-c", "digit")
    assert "the configuration digit cannot be read: No such file" in message and ", digits, " in message
    assert "by name" not in refused(capsys, "fit", "-c", "digit.yaml")


def test_a_shipped_configuration_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cli = BuiltOnly(with_shipped(["fit", "-c", "digits", "-c", "overlays/clip"]))
    assert cli.trainer.gradient_clip_val == 1.0 and type(cli.datamodule).__name__ == "Digits"


# --- the script


@pytest.mark.cli
def test_the_script_packs_measures_and_writes_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ddpm_lightning.pretrained as home

    monkeypatch.setattr(home, "__file__", str(tmp_path / "home" / "__init__.py"))
    options = "--data.limit_test 20"
    words = ["--name", "ours", "--how", "in a second", "--train", "ddpm fit -c digits", "--test_options", options]
    done = run_script("pack_pretrained.py", str(OLD_RUN), *words, "--limits", "It knows nothing.")
    assert done.returncode == 0, done.stderr
    facts, text = card(tmp_path / "home" / "ours"), (tmp_path / "home" / "ours" / "README.md").read_text()
    assert facts["figures"]["images"] == 20 and facts["steps"] == 20
    module, data = Packed(tmp_path / "home" / "ours").load(), Digits()
    expected = bits(module, data, torch.arange(20), None)
    assert facts["figures"]["bits_per_dim"]["denoising"]["mean"] == pytest.approx(float(expected.mean()), rel=1e-5)
    for part in ("20 steps of", "in a second", f"ddpm test --pretrained ours {options}", "It knows nothing."):
        assert part in text
    refusal = run_script("pack_pretrained.py", str(OLD_RUN), "--name", "../x", *words[2:6], "--limits", "c")
    assert refusal.returncode == 2 and "--name ../x must be a word" in refusal.stderr


def test_flops_of_a_step_are_those_of_its_products() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from pack_pretrained import step_flops
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    module = Run(OLD_RUN).load_module()
    assert (
        step_flops(module, 6) == 2 * step_flops(module, 3) > 3 * 2 * sum(p.numel() for p in module.model.parameters())
    )

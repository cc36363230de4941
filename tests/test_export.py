"""Exported models give what the model gives, and loading one runs no code of others."""

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm_lightning.cli import main
from ddpm_lightning.errors import InputError
from ddpm_lightning.export import export_onnx, export_program, load_model, save_model
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
    PlainGaussian,
    ReverseVariance,
    TimeConditioning,
    VParameterization,
)
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import (
    CosineChain,
    LearnedGamma,
    LinearChain,
    LinearGamma,
    VarianceExploding,
    strided_grid,
)

SHAPE = (1, 8, 8)


def randomised(network: nn.Module) -> nn.Module:
    """Weights that make every layer matter: a U-Net's last ones begin at 0."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


def unet(**options: Any) -> nn.Module:
    return randomised(UNet(width=8, multipliers=(1, 2), blocks=1, **options))


def models() -> dict[str, DiffusionModel]:
    """Every kind of part at least once."""
    parts = {
        "eps": (unet(), LinearChain(20), EpsParameterization(), TimeConditioning(), FixedLargeVariance()),
        "lecture": (SimpleUNet(), CosineChain(20), EpsParameterization(), GammaConditioning(), FixedSmallVariance()),
        "v": (
            unet(fourier=(1.0, 2.0), patch=2),
            LearnedGamma(),
            VParameterization(),
            GammaConditioning(),
            FixedLargeVariance(),
        ),
        "analytic": (
            unet(num_classes=3),
            LinearGamma(-5.0, 5.0),
            EpsParameterization(),
            GammaConditioning(),
            AnalyticVariance([-1.0, 2.0], [0.9, 0.2]),
        ),
        "range": (
            unet(out_channels=2),
            VarianceExploding(LinearGamma(-5.0, 5.0)),
            EpsParameterization(),
            GammaConditioning(),
            LearnedRangeVariance(),
        ),
    }
    decoders = {"eps": DiscretizedGaussian(17), "range": CategoricalDecoder(17)}
    return {
        name: DiffusionModel(*part, decoders.get(name, PlainGaussian(17)), clip_x0=name != "v").eval()
        for name, part in parts.items()
    }


def noise(count: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed))


# --- safetensors


@pytest.mark.parametrize("name", models())
def test_a_model_comes_back_from_its_file(name: str, tmp_path: Path) -> None:
    model, path = models()[name], tmp_path / "deeper" / "model.safetensors"
    save_model(model, path)
    again = load_model(path)
    assert not again.training and again.clip_x0 == model.clip_x0 and again.T == model.T
    assert torch.equal(again.grid, model.grid)
    for count in (1, 3):
        cond = {"label": torch.tensor([0, 2, 3])[:count]} if name == "analytic" else {}
        x_t, t = noise(count), torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)[:count]
        with torch.no_grad():
            prediction, other = (m.reverse_process.denoiser(x_t, t, **cond) for m in (model, again))
        assert torch.equal(prediction.x0, other.x0) and torch.equal(prediction.eps, other.eps)
    with torch.no_grad():
        first, second = (
            AncestralSampler()(m, x_t, grid=m.grid[[0, 1, -1]], generators=torch.Generator().manual_seed(0), **cond)
            for m in (model, again)
        )
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "class_path", ["os.system", "torch.hub.load", "ddpm_lightning.networks.unet.math.sqrt", "builtins.eval", "a", 3]
)
def test_foreign_classes_are_refused(class_path: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(models()["eps"], path)
    description = json.loads(_metadata(path))
    description["decoder"] = {"class_path": class_path, "init_args": {"command": f"touch {tmp_path}/executed"}}
    save_file(load_file(path), path, metadata={"ddpm_lightning": json.dumps(description)})
    with pytest.raises(InputError, match=r"which is refused"):
        load_model(path)
    assert not (tmp_path / "executed").exists()


def _metadata(path: Path) -> str:
    with safe_open(path, "pt") as file:
        return str(file.metadata()["ddpm_lightning"])


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_model(models()["eps"], path)
    description, whole = _metadata(path), path.read_bytes()
    # copies: the tensors may be mapped from the file, which is cut short below
    weights = {name: value.clone() for name, value in load_file(path).items()}
    with pytest.raises(InputError, match=r"nowhere\.safetensors holds no model"):
        load_model(tmp_path / "nowhere.safetensors")
    path.write_bytes(whole[:-100])
    with pytest.raises(InputError, match="holds no model"):
        load_model(path)
    save_file(weights, path)
    with pytest.raises(InputError, match="holds no model"):
        load_model(path)
    del weights[next(name for name in weights if name.startswith("network."))]
    save_file(weights, path, metadata={"ddpm_lightning": description})
    with pytest.raises(InputError, match="holds no model"):
        load_model(path)


class Own(nn.Module):
    """A network of a user."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x


def test_a_part_of_ones_own_is_refused_when_it_is_written(tmp_path: Path) -> None:
    model = DiffusionModel(
        Own(), LinearChain(5), EpsParameterization(), TimeConditioning(), FixedLargeVariance(), PlainGaussian(17)
    )
    with pytest.raises(InputError, match=r"the model names test_export\.Own, which is refused"):
        save_model(model, tmp_path / "model.safetensors")


# --- graphs


@pytest.mark.parametrize("name", ["eps", "analytic"])
def test_graphs_give_what_the_network_gives(name: str, tmp_path: Path) -> None:
    """For other batch sizes than the one that they were traced with."""
    model = models()[name]
    classes = 3 if name == "analytic" else None
    onnx = pytest.importorskip("onnxruntime", reason="pip install 'ddpm-lightning[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'ddpm-lightning[export]'")
    export_program(model, tmp_path / "network.pt2", SHAPE, classes)
    export_onnx(model, tmp_path / "network.onnx", SHAPE, classes)
    program = torch.export.load(tmp_path / "network.pt2").module()
    session = onnx.InferenceSession(tmp_path / "network.onnx")
    for count in (1, 5):
        inputs = {"x": noise(count), "t": torch.linspace(0.1, 0.9, count)}
        if classes:
            inputs["label"] = torch.arange(count) % 4
        cond = {"label": inputs["label"]} if classes else {}
        with torch.no_grad():
            expected = model.network(inputs["x"], inputs["t"], **cond)
            torch.testing.assert_close(program(*inputs.values()), expected, rtol=1e-5, atol=1e-6)
        (output,) = session.run(["output"], {key: value.numpy() for key, value in inputs.items()})
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
    assert float(expected.std()) > 0.1


CONDITIONS: dict[str, dict[str, int]] = {
    "vector": {"vector_size": 2},
    "field": {"field_channels": 3},
    "all": {"num_classes": 3, "vector_size": 2, "field_channels": 1},
    "none": {},
}


def told(name: str, count: int) -> dict[str, Tensor]:
    """Conditions of ``count`` images."""
    generator, sizes = torch.Generator().manual_seed(2), CONDITIONS[name]
    found = {}
    if "num_classes" in sizes:
        found["label"] = torch.arange(count) % 4
    if "vector_size" in sizes:
        found["vector"] = torch.randn(count, sizes["vector_size"], generator=generator)
    if "field_channels" in sizes:
        found["field"] = torch.randn(count, sizes["field_channels"], 8, generator=generator)
    return found


@pytest.mark.parametrize("name", ["none", "all"])
def test_a_model_of_lines_takes_its_conditions_with_it(name: str, tmp_path: Path) -> None:
    """One dimension of space, vectors and fields: the file, the program and the ONNX graph answer as the model does."""
    onnx = pytest.importorskip("onnxruntime", reason="pip install 'ddpm-lightning[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'ddpm-lightning[export]'")
    network = unet(channels=2, dims=1, padding="circular", **CONDITIONS[name])
    parts = (LinearGamma(-5.0, 5.0), VParameterization(), GammaConditioning(), FixedLargeVariance(), PlainGaussian())
    model = DiffusionModel(network, *parts, clip_x0=False).eval()
    save_model(model, tmp_path / "model.safetensors", {"mean": [1.0, 2.0], "std": [3.0, 4.0]})
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["scale"]) == {"mean": [1.0, 2.0], "std": [3.0, 4.0]}
    again = load_model(tmp_path / "model.safetensors")
    export_program(model, tmp_path / "network.pt2", (2, 8), **CONDITIONS[name])
    export_onnx(model, tmp_path / "network.onnx", (2, 8), **CONDITIONS[name])
    program = torch.export.load(tmp_path / "network.pt2").module()
    session = onnx.InferenceSession(tmp_path / "network.onnx")
    for count in (1, 5):
        x, t, cond = torch.randn(count, 2, 8), torch.linspace(0.1, 0.9, count), told(name, count)
        with torch.no_grad():
            expected = network(x, t, **cond)
            assert torch.equal(again.network(x, t, **cond), expected)
            torch.testing.assert_close(program(x, t, *cond.values()), expected, rtol=1e-5, atol=1e-6)
            assert not cond or not torch.allclose(network(x, t), expected, atol=1e-3)
        given = {key: value.numpy() for key, value in {"x": x, "t": t, **cond}.items()}
        (output,) = session.run(["output"], given)
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)


# --- diffusers


def diffusers_states(model: DiffusionModel, x: Tensor, kind: str, steps: int) -> list[Tensor]:
    """The states after x_T and diffusers' image, by its own loop."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    from ddpm_lightning.export.diffusers import to_pipeline

    pipeline = to_pipeline(model, SHAPE)
    scheduler = getattr(diffusers, kind).from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    generator, states = torch.Generator().manual_seed(7), []
    # of their own DDIM keeps eps where it has clipped x_0
    options = {"use_clipped_model_output": True} if kind == "DDIMScheduler" else {}
    for k in scheduler.timesteps:
        with torch.no_grad():
            output = pipeline.unet(x, k).sample
        x = scheduler.step(output, k, x, generator=generator, **options).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("steps", [20, 5])
@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize(
    ("sampler", "kind", "variance"),
    [
        (AncestralSampler(), "DDPMScheduler", FixedLargeVariance()),
        (AncestralSampler(), "DDPMScheduler", FixedSmallVariance()),
        (AncestralSampler(), "DDPMScheduler", LearnedRangeVariance()),
        (DDIMSampler(), "DDIMScheduler", FixedLargeVariance()),
    ],
)
def test_diffusers_walks_the_same_way(
    sampler: Sampler, kind: str, variance: ReverseVariance, clip_x0: bool, steps: int
) -> None:
    """The same noise through diffusers' scheduler and through our sampler, every state, in all steps or a few."""
    network = unet(out_channels=variance.network_outputs)
    model = DiffusionModel(
        network, LinearChain(20), VParameterization(), GammaConditioning(), variance, PlainGaussian(17), clip_x0
    ).eval()
    states: list[Tensor] = []
    with torch.no_grad():
        sampler(
            model,
            noise(),
            grid=strided_grid(model.grid, steps),
            generators=torch.Generator().manual_seed(7),
            callback=lambda x, s: states.append(x),
        )
    both = list(zip(states, diffusers_states(model, noise(), kind, steps), strict=True))
    # a step to the image that does not begin at their timestep 0 draws noise there
    for ours, theirs in both if steps == model.T or kind == "DDIMScheduler" else both[:-1]:
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_learned_range_is_the_formula_of_diffusers() -> None:
    """Mean and variance of each reverse step, in float64; theirs are float32, and its rounding is not the formula's."""
    pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    from ddpm_lightning.export.diffusers import scheduler_for, to_pipeline

    model = DiffusionModel(
        unet(out_channels=2), CosineChain(20), VParameterization(), GammaConditioning(), LearnedRangeVariance(),
        PlainGaussian(17), clip_x0=True,
    ).double().eval()  # fmt: skip
    scheduler, unet_of_theirs = scheduler_for(model), to_pipeline(model, SHAPE).unet.double()
    assert scheduler.config.variance_type == "learned_range"
    scheduler.alphas_cumprod = torch.exp(2 * model.schedule.log_alpha(model.grid[1:]))
    scheduler.one = torch.ones((), dtype=torch.float64)
    x_t = noise().double()
    zeros = torch.Generator().manual_seed(0)
    for k in range(1, 20):
        with torch.no_grad():
            output = unet_of_theirs(x_t, k).sample
            ours = model.reverse_process.transition(x_t, model.grid[k], model.grid[k + 1])
        log_var = scheduler._get_variance(k, output[:, 1:])
        torch.testing.assert_close(ours.log_var, log_var, rtol=1e-9, atol=1e-9)
        drawn = scheduler.step(output, k, x_t, generator=zeros.manual_seed(k)).prev_sample
        eps = torch.randn(x_t.shape, generator=zeros.manual_seed(k), dtype=torch.float64)
        torch.testing.assert_close(ours.mean, drawn - torch.exp(0.5 * log_var) * eps, rtol=1e-9, atol=1e-9)


def test_a_diffusers_folder_loads_and_samples(trained: Path, tmp_path: Path) -> None:
    """The command's folder, loaded by diffusers, with the weights of the run's averaged model."""
    diffusers = pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    main(["export", str(trained), "--to=diffusers", f"--out={tmp_path}/folder"])
    model = Run(trained).load_module().ema_model
    for kind in ("DDPMPipeline", "DDIMPipeline"):
        pipeline = getattr(diffusers, kind).from_pretrained(tmp_path / "folder")
        pipeline.set_progress_bar_config(disable=True)
        x, t = noise(), model.grid[5]
        with torch.no_grad():
            assert torch.equal(pipeline.unet(x, 4).sample, model.denoiser(x, t).eps)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(batch_size=2, num_inference_steps=model.T, generator=generator, output_type="np").images
        assert images.shape == (2, 8, 8, 1) and images.std() > 0.01
    # a folder that was written under the package's former name; diffusers imports no module that a folder names
    import_module("ddpm_lightning.interchange.diffusers")
    index = tmp_path / "folder" / "model_index.json"
    assert '"ddpm_lightning.export.diffusers"' in index.read_text()
    index.write_text(index.read_text().replace("ddpm_lightning.export.", "ddpm_lightning.interchange."))
    assert diffusers.DDPMPipeline.from_pretrained(tmp_path / "folder").unet.model.T == model.T


def test_what_diffusers_cannot_express_is_refused() -> None:
    pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    from ddpm_lightning.export.diffusers import scheduler_for

    with pytest.raises(InputError, match=r"diffusers' DDPM has no AnalyticVariance.*LearnedRangeVariance"):
        scheduler_for(models()["analytic"])
    exploding = DiffusionModel(
        unet(),
        VarianceExploding(LinearGamma(-5.0, 5.0)),
        EpsParameterization(),
        GammaConditioning(),
        FixedSmallVariance(),
        PlainGaussian(17),
    )
    with pytest.raises(InputError, match="no exploding variance"):
        scheduler_for(exploding)


@pytest.mark.cli
def test_the_command_writes_a_model_that_loads(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["export", str(trained), "--to=safetensors", f"--out={tmp_path}/model.safetensors"])
    assert capsys.readouterr().out == f"safetensors: {tmp_path}/model.safetensors\n"
    assert load_model(tmp_path / "model.safetensors").T == 12


def test_a_network_of_diffusers_is_told_its_own_timesteps() -> None:
    """State k + 1 of T, at the time (k + 1) / T, is timestep k = 0..T-1 there."""
    pytest.importorskip("diffusers", reason="pip install 'ddpm-lightning[export]'")
    from ddpm_lightning.export.diffusers import UNet2DNetwork

    class Told(nn.Module):
        def forward(self, x: Tensor, k: Tensor) -> SimpleNamespace:
            return SimpleNamespace(sample=k)

    model = DiffusionModel(
        UNet2DNetwork(Told(), 20),
        LinearChain(20),
        EpsParameterization(),
        TimeConditioning(),
        FixedLargeVariance(),
        PlainGaussian(17),
    )
    told = model.network(noise(20), model.denoiser.conditioning(model.schedule, model.grid[1:]))
    torch.testing.assert_close(told.float(), torch.arange(20.0), rtol=0, atol=1e-4)

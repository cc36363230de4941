"""The page for the browser: what is written, what is refused, and that its mathematics is that of the package."""

import base64
import gzip
import json
import os
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import build, refused
from chromium import CHROMIUM, Chromium
from torch import Tensor, nn

from ddpm_lightning.cli import main
from ddpm_lightning.errors import InputError
from ddpm_lightning.export.web import describe_for_page, runtime_script, write_page
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import DenoisingElbo, NegativeElbo
from ddpm_lightning.process import (
    AnalyticVariance,
    CategoricalDecoder,
    ClassifierFreeDenoiser,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
    PlainGaussian,
    ScoreParameterization,
    TimeConditioning,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.schedules import (
    CosineChain,
    LinearChain,
    LinearGamma,
    PixelwiseGamma,
    StraightPath,
    VarianceExploding,
    strided_grid,
)

PAGE = Path(__file__).parents[1] / "ddpm_lightning" / "export" / "page"
SHAPE, IMAGES, T = (1, 2, 3), 3, 20
SAMPLERS: list[Sampler] = [AncestralSampler(), DDIMSampler(), DPMSolverSampler(), HeunSampler()]


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the page of a trained model."""
    pytest.importorskip("onnxruntime", reason="pip install 'ddpm-lightning[export]'")
    pytest.importorskip("onnxscript", reason="pip install 'ddpm-lightning[export]'")
    folder = tmp_path_factory.mktemp("web") / "page"
    main(["export", str(trained), "--to=web", f"--out={folder}"])
    return folder


def written(folder: Path) -> tuple[dict[str, Any], bytes]:
    """The description and the ONNX graph in a page."""
    text = (folder / "model.js").read_text()
    found = re.fullmatch(r'"use strict";\nconst MODEL = (.*);\nconst NETWORK = "(.*)";\n', text)
    assert found is not None
    return json.loads(found[1]), gzip.decompress(base64.b64decode(found[2]))


@pytest.mark.cli
def test_the_page_holds_the_model(page: Path, trained: Path) -> None:
    import onnxruntime

    module = Run(trained).load_diffusion()
    model = module.ema_model
    assert {path.name for path in page.iterdir()} == {path.name for path in PAGE.iterdir()} | {"model.js", "runtime.js"}
    description, graph = written(page)
    log_alpha = model.schedule.log_alpha(model.grid[1:]).numpy()
    # alpha^2 = sigmoid(-gamma)
    np.testing.assert_allclose(-np.log1p(np.exp(description["gamma"])), 2 * log_alpha, rtol=1e-12)
    assert description["t"] == model.grid[1:].tolist() and len(description["gamma"]) == model.T == 12
    assert (description["shape"], description["levels"], description["classes"]) == ([1, 8, 8], 17, None)
    images = SampleRequest(sampler=DPMSolverSampler(), steps=12).on(module)(range(2))
    for example, image in zip(description["examples"], images, strict=False):
        assert base64.b64decode(example["pixels"]) == image.numpy().tobytes()
    session = onnxruntime.InferenceSession(graph)
    for count, n in ((1, 3), (4, 12)):
        x = torch.randn(count, 1, 8, 8)
        told = torch.full((count,), description["told"][n - 1])
        (output,) = session.run(["output"], {"x": x.numpy(), "t": told.numpy()})
        with torch.no_grad():
            expected = model.denoiser(x, model.grid[n]).output
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-5)
    # what the page asks for is what it loads
    named = set(re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', (page / "index.html").read_text()))
    assert named == {path.name for path in page.iterdir()} - {"index.html"}


@pytest.mark.cli
def test_bad_input_is_refused(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("mine")
    (tmp_path / "ort").mkdir()
    (tmp_path / "ort" / "ort.wasm.bundle.min.mjs").write_text("another version")
    for words, message in (
        (f"--to onnx --out {tmp_path}/a.onnx --runtime {tmp_path}", "is for --to web: leave it out"),
        (f"--to web --out {tmp_path}/a.html", "the name of web ends in no suffix: it is a folder"),
        (f"--to web --out {tmp_path}/mine", "is not empty and holds no page: choose another folder"),
        (f"--to web --out {tmp_path}/file", "cannot be written (File exists)"),
        (f"--to web --out {tmp_path}/file/page", "Not a directory"),
        (f"--to web --out {tmp_path}/a --runtime {tmp_path}/nowhere", "ort.wasm.bundle.min.mjs cannot be read"),
        (f"--to web --out {tmp_path}/a --runtime {tmp_path}/ort", "is not that of onnxruntime-web"),
    ):
        assert message in refused(capsys, "export", str(trained), *words.split())
    assert (tmp_path / "mine" / "index.html").read_text() == "mine" and not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameterization": ScoreParameterization()}, "does not know ScoreParameterization, only EpsParam"),
        (
            {"schedule": PixelwiseGamma((1, 8, 8), T=5), "objective": NegativeElbo(DenoisingElbo())},
            "one noise level for all pixels only",
        ),
        ({"shape": (2, 8, 8), "network": UNet(2, width=8, multipliers=(1, 2), blocks=1)}, r"the shape \[2, 8, 8\]"),
        (
            {"levels": None, "decoder": PlainGaussian(), "scale": {"mean": [0.0], "std": [1.0]}, "clip_x0": False},
            "a model of fields",
        ),
    ],
)
def test_models_that_the_page_cannot_show(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        write_page(build(**changes), tmp_path / "page", "name")
    assert not (tmp_path / "page").exists()


# --- the mathematics, in node: nothing of a browser is needed for it


class Stub(nn.Module):
    """A network that JavaScript can do too (NETWORK_JS). The page's network takes float32."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        flat = x.float().double().flatten(1)
        shift = 0.3 * (t + (9 if label is None else label))[:, None]
        first = 0.8 * torch.tanh(flat + 0.2 * flat.roll(-1, 1) + shift)
        second = torch.sin(3 * flat + shift)
        return torch.cat([first, second][: self.outputs], 1).reshape(len(x), -1, *x.shape[2:])


NETWORK_JS = """
  const network = async (x, told, labels) => {
    const images = x.length / size;
    const output = new Float64Array(images * size * outputs);
    for (let k = 0; k < images; k++) for (let i = 0; i < size; i++) {
      const [here, next] = [x[k * size + i], x[k * size + ((i + 1) % size)]];
      const shift = 0.3 * (told + (labels === null ? 9 : labels[k]));
      output[k * size * outputs + i] = 0.8 * Math.tanh(here + 0.2 * next + shift);
      if (outputs === 2) output[k * size * outputs + size + i] = Math.sin(3 * here + shift);
    }
    return output;
  };
"""


def models() -> dict[str, tuple[DiffusionModel, dict[str, Any]]]:
    """Every part that the page knows at least once, and the conditions of the call."""
    told = {"labels": [1, 0, 3], "guidance": 2.5}
    parts: dict[str, tuple[Any, ...]] = {
        "eps": (LinearChain(T, 0.005, 0.3), EpsParameterization(), TimeConditioning(), FixedLargeVariance()),
        "v": (CosineChain(T), VParameterization(), GammaConditioning(), FixedSmallVariance()),
        "flow": (StraightPath(0.01, 0.98, T), VelocityParameterization(), TimeConditioning(), FixedLargeVariance()),
        "range": (LinearGamma(-7.0, 4.0, T), EpsParameterization(), GammaConditioning(), LearnedRangeVariance()),
        "exploding": (
            VarianceExploding(LinearGamma(-6.0, 5.0, T)),
            X0Parameterization(),
            GammaConditioning(),
            AnalyticVariance([-5.0, 2.0], [0.9, 0.2]),
        ),
    }
    decoders = {"eps": DiscretizedGaussian(17), "v": DiscretizedGaussian(256), "range": CategoricalDecoder(17)}
    conditions = {"v": told, "range": told, "exploding": {"labels": [2, 2, 0], "guidance": 1}}
    return {
        name: (
            DiffusionModel(
                Stub(part[3].network_outputs), *part, decoders.get(name, PlainGaussian(17)), clip_x0=name != "flow"
            ),
            conditions.get(name, {}),
        )
        for name, part in parts.items()
    }


def in_node(script: str, given: Any, tmp_path: Path) -> Any:
    """What ``script``, the body of an async function of ``given``, returns, with the page's mathematics loaded."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    (tmp_path / "given.json").write_text(json.dumps(given))
    source = (
        (PAGE / "diffusion.js").read_text()
        + f"""
      const given = JSON.parse(require("fs").readFileSync("given.json"));
      (async () => {{ {script} }})().then((value) => console.log(JSON.stringify(value)));
    """
    )
    (tmp_path / "script.js").write_text(source)
    done = subprocess.run([node, "script.js"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def states(model: DiffusionModel, sampler: Sampler, steps: int, y_T: Tensor, cond: dict[str, Any]) -> list[Tensor]:
    """The states after x_T and the image, divided by their standard deviation for data of variance 1."""
    found: list[Tensor] = []

    def keep(x: Tensor, s: Tensor) -> None:
        found.append(x if s == model.grid[0] else x * torch.exp(-0.5 * model.schedule.log_unit_var(s)))

    guided, told = model, {}
    if cond:
        told = {"label": torch.tensor(cond["labels"])}
        guided = model.with_denoiser(lambda each: ClassifierFreeDenoiser(each, cond["guidance"], 9))
    x_T = y_T * torch.exp(0.5 * model.schedule.log_unit_var(model.grid[-1]))
    generator = torch.Generator().manual_seed(7)
    sampler(guided, x_T, grid=strided_grid(model.grid, steps), generators=generator, callback=keep, **told)
    return found


def test_the_samplers_walk_as_those_of_the_package(tmp_path: Path) -> None:
    """Every state, from the same x_T with the same noise, for all parts and samplers of the page."""
    y_T = torch.randn(IMAGES, *SHAPE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    noises = [torch.randn(y_T.shape, generator=generator, dtype=torch.float64) for _ in range(T)]
    given, expected = [], []
    for name, (model, cond) in models().items():
        description = {
            "shape": SHAPE,
            "levels": model.decoder.levels,
            "classes": 9 if cond else None,
            **describe_for_page(model),
        }
        for sampler in SAMPLERS:
            for steps in (1, 7, T):
                case = {"model": description, "sampler": type(sampler).__name__, "steps": steps, "cond": cond}
                given.append({**case, "outputs": model.reverse_process.variance.network_outputs})
                expected.append((f"{name} {case['sampler']} {steps}", states(model, sampler, steps, y_T, cond)))
    script = f"""
      const found = [];
      for (const {{ model: description, outputs, sampler, steps, cond }} of given.cases) {{
        const size = {y_T[0].numel()};
        {NETWORK_JS}
        const model = new Diffusion.Model(description, network);
        const noises = given.noises.map((values) => Float64Array.from(values));
        const states = [];
        const options = {{ sampler, steps, cond, normal: () => noises.shift() }};
        for await (const {{ x }} of Diffusion.draw(model, Float64Array.from(given.x), options)) states.push([...x]);
        found.push(states);
      }}
      return found;
    """
    flat = {"cases": given, "x": y_T.flatten().tolist(), "noises": [noise.flatten().tolist() for noise in noises]}
    for found, (name, walk) in zip(in_node(script, flat, tmp_path), expected, strict=True):
        assert len(found) == len(walk) + 1
        for ours, theirs in zip(found[1:], walk, strict=True):
            np.testing.assert_allclose(ours, theirs.flatten(), rtol=1e-5, atol=1e-5, err_msg=name)
        assert all(np.abs(np.subtract(a, b)).max() > 1e-3 for a, b in pairwise(found)), name


def test_the_page_takes_the_steps_of_a_strided_grid(tmp_path: Path) -> None:
    lengths = [1, 2, 12, 50, 299]
    script = "return given.map((T) => Array.from({ length: T }, (_, k) => Diffusion.strided(T, k + 1)));"
    for T, grids in zip(lengths, in_node(script, lengths, tmp_path), strict=True):
        chain = torch.arange(T + 1)
        assert grids == [strided_grid(chain, steps).tolist() for steps in range(1, T + 1)]


def test_noise_is_normal_and_that_of_an_image_its_own(tmp_path: Path) -> None:
    script = """
      const draw = (...options) => {
        const normal = Diffusion.normals(...options);
        return [[...normal()], [...normal()]];
      };
      return [draw(3, 4, 5000), draw(3, 1, 5000, 2), draw(4, 1, 5000, 2)];
    """
    both, own, other = map(np.array, in_node(script, None, tmp_path))
    np.testing.assert_array_equal(both[:, 10_000:15_000], own)
    assert abs(np.corrcoef(own.ravel(), other.ravel())[0, 1]) < 0.04
    assert abs(np.corrcoef(both[0].reshape(4, -1)) - np.eye(4)).max() < 0.06
    # 40,000 draws: five standard errors of the first four moments
    for power, moment, error in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((both**power).mean() - moment) < 5 * error / both.size**0.5


# --- in a browser, from the disk

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
RUNTIME = os.environ.get("DDPM_ONNXRUNTIME_WEB")
# until something is true, or the page tells of an error
WAIT = """new Promise((done) => {
  const status = document.getElementById("status");
  const look = () => (status.matches(".error") || %s ? done(status.textContent) : setTimeout(look, 50));
  look();
})"""


@needs_chromium
def test_a_page_without_its_runtime_says_so_and_shows_noise(page: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(page, folder)
    text = runtime_script().replace("https://cdn.jsdelivr.net", "http://127.0.0.1:9")
    (folder / "runtime.js").write_text(text)
    with Chromium(tmp_path / "profile") as browser:
        browser.open(folder / "index.html")
        assert "ort.wasm.bundle.min.mjs could not be loaded" in browser.run(WAIT % "false")
        assert browser.run("document.getElementById('draw').disabled")
        shown = """(t) => {
          const [slider, canvas] = ["time", "noisy"].map((id) => document.getElementById(id));
          slider.value = t;
          slider.dispatchEvent(new Event("input"));
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          return [...data.filter((_, i) => i % 4 === 0)];
        }"""
        clean, noisy = (np.array(browser.run(f"({shown})({t})")) for t in (1, 12))
        assert clean.shape == noisy.shape == (320**2,) and np.abs(clean - noisy).mean() > 20


@needs_chromium
@pytest.mark.skipif(RUNTIME is None, reason="DDPM_ONNXRUNTIME_WEB names no folder with onnxruntime-web's files")
def test_the_browser_draws_what_the_package_draws(page: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    shutil.copytree(page, folder)
    (folder / "runtime.js").write_text(runtime_script(Path(str(RUNTIME))))
    model = Run(trained).load_diffusion().ema_model
    x_T = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        image = DDIMSampler()(model, x_T, grid=strided_grid(model.grid, 6))
    script = f"""(async () => {{
      const model = new Diffusion.Model(MODEL, await Network.load(MODEL, () => {{}}));
      const options = {{ sampler: "DDIMSampler", steps: 6, normal: null }};
      let image;
      const noise = Float64Array.from({x_T.flatten().tolist()});
      for await (const {{ x }} of Diffusion.draw(model, noise, options)) image = x;
      return [...image];
    }})()"""
    with Chromium(tmp_path / "profile") as browser:
        browser.open(folder / "index.html")
        assert browser.run(WAIT % "document.getElementById('film').children.length === 10").startswith("Ready")
        np.testing.assert_allclose(browser.run(script), image.flatten(), atol=1e-3)

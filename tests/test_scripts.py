"""The commands that measure a run, and the script that compares trainings."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_script
from PIL import Image

from ddpm_lightning.cli import main
from ddpm_lightning.process import AnalyticVariance, LearnedRangeVariance, ReverseVariance
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule

pytestmark = pytest.mark.cli


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which a command ends that does nothing."""
    with pytest.raises(SystemExit) as stopped:
        main([*arguments])
    captured = capsys.readouterr()
    assert stopped.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("ddpm: error: ")
    return captured.err


# --- the command line


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("evaluate likes", "evaluate likes: there are quality, ood, flow, forms, variance"),
        ("evaluate flow", "missing: RUN"),
        ("export nowhere", "missing: --to, --out"),
        ("export nowhere --to onnx --out a.onnx", "nowhere holds no run"),
        ("evaluate flow nowhere", "nowhere holds no run"),
        ("evaluate flow nowhere --images few", "--images few cannot be read as int"),
        ("evaluate flow nowhere --imag 3", "unrecognized arguments: --imag 3"),
        ("evaluate forms nowhere --T 4 b", "--T b cannot be read as int"),
        ("evaluate quality nowhere --seed -1", "--seed -1 must lie between 0 and 4294967295: it is a seed"),
        ("evaluate quality nowhere --sampler Walker", "--sampler Walker cannot be read as"),
        ("evaluate quality nowhere --sampler DDIMSampler --sampler.eta 3", "eta = 3 must lie between 0 and 1"),
        (
            "evaluate quality nowhere --sampler.eta 1",
            "--sampler.eta belongs to a class: give --sampler CLASS before it",
        ),
        ("export nowhere --to png --out a.png", "--to png cannot be read as safetensors or diffusers or onnx"),
        ("export nowhere --to onnx --out a.pt2", "--out a.pt2: the name of onnx ends in .onnx"),
    ],
)
def test_bad_options_get_one_line(command: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in refused(capsys, *command.split())


def test_help_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", "--help"])
    overview = capsys.readouterr().out
    assert all(f"  {name} " in overview for name in ("quality", "ood", "flow", "forms", "variance"))
    assert len(overview.splitlines()) < 12
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "flow", "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and "probability-flow ODE" in text
    assert "--dequantization {decoder,uniform}" in text and "from density to bits (default: decoder)" in text


# --- forms


def test_forms_are_compared_at_every_T(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lightning.progress.QUIET", 0)
    main(["evaluate", "forms", str(trained), f"--out={tmp_path}", "--T", "4", "40", "--images=24", "--draws=4"])
    rows = json.loads((tmp_path / "forms.json").read_text())
    assert [(row["T"], row["form"]) for row in rows] == [
        (T, form) for T in (4, 40) for form in ("denoising", "consistency", "trajectory")
    ]
    by_key = {(row["T"], row["form"]): row for row in rows}
    for T in (4, 40):
        denoising, consistency = by_key[T, "denoising"], by_key[T, "consistency"]
        error = 4 * (denoising["elbo_se"] + consistency["elbo_se"])
        assert abs(denoising["elbo_nats"] - consistency["elbo_nats"]) < error
        assert consistency["noise_separate_steps"] > 2 * denoising["noise_separate_steps"]
    # with steps drawn apart the noise of the form of more variables grows with T, along one path it does not
    small, large = by_key[4, "consistency"], by_key[40, "consistency"]
    assert large["noise_separate_steps"] > 2 * small["noise_separate_steps"]
    assert large["noise_one_path"] < 2 * small["noise_one_path"]
    assert (tmp_path / "forms.png").stat().st_size > 10_000
    captured = capsys.readouterr()
    assert captured.out == (tmp_path / "forms.txt").read_text() and "variance ratio" in captured.out
    assert "T = 40, trajectory: 100%" in captured.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--draws=1"], "--draws 1 must be 2 or more"),
        (["--T", "0"], "T 0"),
    ],
)
def test_forms_that_cannot_be_compared(
    trained: Path, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert words in refused(capsys, "evaluate", "forms", str(trained), "--images=2", *options)


# --- variance


def test_analytic_variance_is_measured_and_raises_the_bound(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command's file laid over the run's own configuration, through the real entry point."""
    config, overlay = trained / "config.yaml", tmp_path / "analytic.yaml"
    main(["evaluate", "variance", str(trained), "--images=300", f"--out={tmp_path}"])
    assert f"ddpm test -c {config} -c {overlay} --ckpt_path last" in capsys.readouterr().out
    part = yaml.safe_load(overlay.read_text())["model"]["variance"]
    assert part["class_path"] == "ddpm_lightning.process.AnalyticVariance"
    variance = AnalyticVariance(**part["init_args"])
    module, data = Run(trained).load()
    model = module.ema_model
    # a chain of 12 steps has a place in the table for nearly each of them, and for both ends
    ends = model.schedule.gamma(model.grid[[1, 12]]).tolist()
    assert [variance.gammas[0], variance.gammas[-1]] == ends and len(variance.gammas) >= 8

    bounds = ["--model.test_bounds=[{class_path: DenoisingElbo}]", f"--run_dir={tmp_path}"]
    main(["test", f"-c={config}", f"-c={overlay}", f"--ckpt_path={trained}/checkpoints/last.ckpt", *bounds])
    assert "AnalyticVariance" in (tmp_path / "bound-test.txt").read_text()
    scores = json.loads((tmp_path / "bound-test.json").read_text())["figures"]["denoising"]

    def cost(other: ReverseVariance) -> float:
        model.reverse_process.variance = other
        with torch.no_grad():
            batch = next(iter(data.test_dataloader()))
            return float(module.bound(module.bounds["test"][0], batch)["denoising_matching"].mean())

    fixed = cost(model.reverse_process.variance)
    assert scores["denoising_matching"]["mean"] == pytest.approx(cost(variance), rel=1e-5)
    assert scores["denoising_matching"]["mean"] < fixed


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint=nowhere.ckpt"], "nowhere.ckpt does not exist"),
        (["--images=0"], "--images 0 must be 1 or more"),
        (["--points=1"], "--points 1"),
        ([], "LearnedRangeVariance, which its network gives"),
    ],
)
def test_a_variance_that_cannot_be_measured(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    if not options:

        def learned(run: Run, checkpoint: str) -> DiffusionModule:
            module = load_module(run, checkpoint)
            module.ema_model.reverse_process.variance = LearnedRangeVariance()
            return module

        load_module = Run.load_module
        monkeypatch.setattr(Run, "load_module", learned)
    assert words in refused(capsys, "evaluate", "variance", str(trained), f"--out={tmp_path}/a", *options)
    assert not (tmp_path / "a").exists()


# --- flow


def test_the_flow_has_a_likelihood(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bits = {}
    for dequantization in ("decoder", "uniform"):
        options = [f"--dequantization={dequantization}", "--images=12", "--batch_size=5", "--steps=8", "--max_steps=40"]
        main(["evaluate", "flow", str(trained), f"--out={tmp_path}", *options])
        record = json.loads((tmp_path / "flow.json").read_text())
        assert record["images"] == sum(record["steps"].values()) == 12 and set(record["steps"]) == {"35"}
        assert 0 < record["numerical_error"] < 1 and record["se"] > 0
        bits[dequantization] = record["bits_per_dim"]
        captured = capsys.readouterr().out
        assert f"standard error {record['se']:.4f} over 12 images, numerical error" in captured
        assert ("WARNING" in captured) == (record["not_converged"] > 0) == (record["largest_error_nats"] > 0.1)
    # 20 steps of training: around the 4.09 bits of a uniform distribution over 17 levels
    assert all(1 < value < 6 for value in bits.values()), bits
    assert "--steps 0 must be 1 or more" in refused(capsys, "evaluate", "flow", str(trained), "--steps=0")


def test_results_lie_in_the_run_unless_told_otherwise(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained, target_is_directory=True)
    main(["evaluate", "flow", "run", "--images=2", "--steps=1", "--max_steps=7"])
    assert sorted(path.name for path in (trained / "flow").iterdir()) == ["flow.json", "flow.txt"]


# --- compare_steps


def test_compare_steps_gives_the_noise_of_both_choices(trained: Path, tmp_path: Path) -> None:
    options = ["--images=4", "--draws=3", "--steps", "2", "4", f"--json_file={tmp_path}/steps.json"]
    done = run_script("compare_steps.py", str(trained), "--form=continuous", *options)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "steps.json").read_text())
    assert [row["steps"] for row in rows] == [2, 4] and done.stdout.count(" steps ") == 2
    for row in rows:
        assert all(value > 0 for value in (*row["noise"], *row["ratio"], row["difference"][1]))
        assert row["difference"][0] == pytest.approx(row["bits_per_dim"][1] - row["bits_per_dim"][0])


# --- compare_choices


def test_compare_choices_trains_once_and_reports_every_variance(tmp_path: Path) -> None:
    options = ["--steps=2", "--few=3", "--many=2", "--images=8", f"--out={tmp_path}"]
    done = run_script("compare_choices.py", *options, "--only=learned gamma, bound")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "choices.json").read_text())
    assert [row["variance"] for row in rows] == ["beta", "beta-tilde", "analytic"]
    assert all(0 < row[column][1] < row[column][0] for row in rows for column in ("few", "many", "continuous"))
    # the analytic variance is measured for the same denoiser, and a few steps are where it matters
    few = {row["variance"]: row["few"][0] for row in rows}
    assert few["analytic"] < min(few["beta"], few["beta-tilde"])
    stamp = (tmp_path / "learned_gamma-bound" / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    again = run_script("compare_choices.py", *options, "--only=learned gamma, bound")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "learned_gamma-bound" / "checkpoints" / "last.ckpt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    ("option", "words"),
    [("--few=1", "--few 1 must be 2 or more"), ("--only=quadratic", "--only quadratic: none of")],
)
def test_compare_choices_refuses_bad_input(option: str, words: str) -> None:
    done = run_script("compare_choices.py", option)
    assert done.returncode == 2 and words in done.stderr


# --- plot_likelihood


def test_the_points_of_the_page_are_drawn(tmp_path: Path) -> None:
    done = run_script("plot_likelihood.py", f"--out={tmp_path}/a.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (880, 616) and len(picture.convert("L").getcolors()) > 50
    wrong = run_script("plot_likelihood.py", f"--out={tmp_path}/b.png", "--table=nothing.json")
    assert wrong.returncode == 2 and "--table nothing.json is no file" in wrong.stderr
    for text in ("{bad", '[{"model": "m", "points": [[1, 2]]}]'):
        (tmp_path / "table.json").write_text(text)
        wrong = run_script("plot_likelihood.py", f"--out={tmp_path}/b.png", f"--table={tmp_path}/table.json")
        assert wrong.returncode == 2 and "table.json is no list of {model, where, points}: " in wrong.stderr
    assert not (tmp_path / "b.png").exists()


# --- compare_hierarchies


def test_compare_hierarchies_gives_each_model_the_same_compute(tmp_path: Path) -> None:
    options = ["--gflops=15", "--seeds=2", "--images=8", "--steps=3", f"--out={tmp_path}"]
    done = run_script("compare_hierarchies.py", *options, "--only=T = 8")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "hierarchies.json").read_text())
    names = ["hierarchy, T = 8", "+ one network: diffusion, T = 8"]
    assert [(row["model"], row["seed"]) for row in rows] == [(name, seed) for name in names for seed in (0, 1)]
    for row in rows:
        parts = row["reconstruction"] + row["prior matching"] + row["between levels"]
        assert row["bound"] == pytest.approx(parts) and row["reconstruction"] > 0
    cost = {row["model"]: row["steps"] for row in rows}
    spent = {
        name: cost[name] * float(re.findall(rf"{re.escape(name)}: .* of (.*) GFLOP", done.stderr)[0]) for name in names
    }
    assert all(0.6 * 15 < each <= 15 for each in spent.values()), spent
    assert rows[0]["bound"] != rows[1]["bound"] and all(name in done.stdout for name in names)


@pytest.mark.parametrize(
    ("option", "words"),
    [("--gflops=0.1", "--gflops 0.1 is less than one step of 'VAE' costs"), ("--only=GAN", "--only GAN: none of")],
)
def test_compare_hierarchies_refuses_bad_input(option: str, words: str, tmp_path: Path) -> None:
    done = run_script("compare_hierarchies.py", option, f"--out={tmp_path}")
    assert done.returncode == 2 and words in done.stderr

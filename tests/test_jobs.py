"""Jobs: the script that ``ddpm submit`` writes, the dry run, restarts by torchrun, the examples for clouds."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from builders import refused, weights
from conftest import ROOT, run_ddpm, run_pair
from torch import distributed as dist
from torch.distributed import TCPStore

from ddpm_lightning.cli import ParsedOnly
from ddpm_lightning.configuration import with_shipped
from ddpm_lightning.first_screen import COMMANDS
from ddpm_lightning.jobs.slurm import SlurmJob
from ddpm_lightning.jobs.submit import submit
from ddpm_lightning.jobs.torchrun import meet_again, processes
from ddpm_lightning.ray_train import fit_on_ray
from ddpm_lightning.runs import Run

pytestmark = pytest.mark.cli

# --- the script of a job


def tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def test_a_submitted_job_trains_and_goes_on(tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: sbatch notes what it is told, srun runs one task. The folder's name is one that shells split."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    tool(tmp_path / "bin", "sbatch", f'echo "$@" > {tmp_path}/told')
    tool(tmp_path / "bin", "srun", 'shift\nexec "$@"')
    run = Run(tmp_path / "it is $HOME")
    options = [*tiny, "--run_dir", f"{run.folder}", "--trainer.max_steps=2", "--trainer.max_epochs=-1"]
    printed = run_ddpm("submit", *options, "--gpus", "0", "--time=0:10:00", "--go")
    script = run.folder / "job.sh"
    assert (tmp_path / "told").read_text() == f"{script}\n" and script.read_text() in printed
    assert f"--output='{run.folder}/ddpm-%j.log'" in printed
    job = {"SLURM_JOB_NAME": "ddpm", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    job |= {"SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}"}
    done = subprocess.run(
        ["bash", script], cwd=tmp_path, env={**os.environ, **job}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and "training starts from scratch" in done.stdout, done.stdout + done.stderr
    assert torch.load(run.checkpoint(), weights_only=True)["global_step"] == 2
    assert "from scratch" not in run_ddpm(*words_of(script.read_text(), monkeypatch))


def words_of(script: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of the ``ddpm`` command of a job, as the shell of a task reads them."""
    command = script.partition("-m ddpm_lightning ")[2].partition(" &\n")[0]
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "7")
    shown = f"for word in {command.rstrip()}; do printf '%s\\0' \"$word\"; done".replace("\\\n", " ")
    return subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.split("\0")[:-1]


def test_the_words_reach_the_program_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "fit",
        "-c",
        "a b.yaml",
        '--x=$HOME `id` "quoted" it\'s',
        "--model.callbacks+",
        "[{a: 'b'}]",
        "--y",
        "",
        "*",
    ]
    job = SlurmJob()
    folders = {"folder": Path("/project of $me"), "log": Path("/log"), "python": sys.executable}
    text = job.script(words, **folders, several=True, goes_on=True, saves=True)
    assert words_of(text, monkeypatch) == words and "cd -- '/project of $me'" in text
    text = SlurmJob(array="0-9%2").script([*words, "--z=a {task}$b"], **folders, several=True, goes_on=True, saves=True)
    assert words_of(text, monkeypatch) == [*words, "--z=a 7$b"]
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0


def options_of(script: str) -> dict[str, str]:
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, flags=re.MULTILINE))


def test_what_a_job_asks_for(tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    job = ["--nodes", "2", "--gpus", "4", "--partition=a100", "--sbatch", "exclusive", "mail-type=END", "--dry_run"]
    text = run_ddpm("submit", *tiny, f"--run_dir={tmp_path}/run", *job)
    assert not (tmp_path / "run").exists()
    options = options_of(text)
    assert options["nodes"] == "2" and options["ntasks-per-node"] == options["gpus-per-node"] == "4"
    assert {"requeue", "exclusive"} <= options.keys() and options["signal"] == "USR1@120" and "array" not in options
    for words in ("--trainer.num_nodes 2", "--trainer.devices 4", "--trainer.strategy ddp", "--ckpt_path last"):
        assert words in text
    # another command: one task, and the shell sees to the queue where the command goes on by itself
    capsys.readouterr()
    submit(["sweep", "my sweep.yaml", "--array", "0-3", "--dry_run"], ["sweep"], lambda words: None)
    text = capsys.readouterr().out
    options = options_of(text)
    assert options["array"] == "0-3" and options["ntasks-per-node"] == "1" and options["signal"] == "B:USR1@120"
    assert "ddpm_lightning sweep \\\n    'my sweep.yaml' &" in text
    submit(
        ["--sbatch", "exclusive", "sweep", "FILE", "--setup", "a b", "-c", "x", "--dry_run"], ["sweep"], lambda _: None
    )
    text = capsys.readouterr().out
    assert (
        "exclusive" in options_of(text)
        and "a b\n" in text
        and "sweep FILE -c x" in " ".join(text.split()).replace("\\ ", "")
    )
    submit(["evaluate", "quality", "RUN", "--dry_run"], COMMANDS, lambda words: None)
    assert "no-requeue" in (options := options_of(capsys.readouterr().out)) and "signal" not in options


def test_the_shell_has_a_job_queued_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "4242")
    tool(tmp_path / "bin", "scontrol", f'echo "$@" > {tmp_path}/told')
    # the signal comes while the task runs; scontrol would then end the job
    tool(tmp_path / "bin", "srun", "kill -USR1 $PPID; sleep 0.3; exit 5")
    where = {"python": sys.executable, "folder": tmp_path, "log": tmp_path / "log"}
    text = SlurmJob().script(["sweep", "FILE"], **where, several=False, goes_on=True, saves=False)
    assert subprocess.run(["bash", "-c", text], check=False).returncode == 5
    assert (tmp_path / "told").read_text() == "requeue 4242\n"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--nodes 0", "--nodes 0 must be 1 or more"),
        ("--gpus 0 --nodes 2", "--nodes 2 need GPUs"),
        ("--time soon", "--time soon is no time limit"),
        ("--time 0-0:02", "--time 0-0:02 is too short: a job saves 120 seconds before its end"),
        ("--array 3-0", "--array 3-0 goes from more to less"),
        ("--mem banana", "--mem banana is no amount of memory"),
        ("--partition=a;b", "--partition a;b must be one word"),
        ("--array 0-", "--array 0- names no tasks"),
        ("--array 0-3", "--array 0-3: each task needs a run of its own"),
        ("--run_dir runs/{task}", "{task} stands for the task of a job array"),
        ("--go", "--go: there is no sbatch here"),
        ("--trainer.devices 3", "--trainer.devices follows from the job: give --gpus"),
        ("--ckpt_path=/x.ckpt", "--ckpt_path: a job goes on from the last checkpoint of its own run"),
        ("--model.optimizer.lrr 3", "AdamW has no such argument: did you mean lr?"),
        ("--run_dir runs/50%", "SLURM cannot write into a folder with % in its name"),
        ("--script pyproject.toml", "was not written by ddpm submit"),
        ("--job_name bash", "--job_name bash is what Lightning takes for a shell"),
    ],
)
def test_jobs_that_are_refused(
    options: str, words: str, tiny: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert words in refused(capsys, "submit", *tiny, *shlex.split(options))
    assert not (ROOT / "runs" / "50%").exists()


# --- the dry run


def test_a_dry_run_says_what_a_run_needs_and_keeps_nothing(
    tiny: list[str], trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [f"--run_dir={tmp_path}/run", "--trainer.accelerator=gpu", "--trainer.devices=4", "--trainer.num_nodes=2"]
    text = run_ddpm("fit", *tiny, "--dry_run", "--no_device_check", *asked, "--trainer.max_epochs=30")
    assert "8 (2 nodes of 4) on GPUs" in text and "uint8 [16, 1, 8, 8]" in text
    assert "300 in all, 10 batches an epoch" in text
    assert ("of the GPU's" if torch.cuda.is_available() else "a GPU was not tried") in text
    (size,) = re.search(r"checkpoints +(\S+) kB each, up to 4", text).groups()
    # each tensor of so small a model has a header of its own
    assert 0.7 < float(size) * 1000 / (trained / "checkpoints/last.ckpt").stat().st_size < 1
    assert not (tmp_path / "run").exists()
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    text = run_ddpm("fit", f"{trained}", "--dry_run", "--trainer.max_epochs=3")
    assert "20 done, 30 in all" in text
    text = run_ddpm("fit", f"{trained}", "--dry_run", "--trainer.max_epochs=-1", "--trainer.max_steps=21")
    assert "20 done, 21 in all" in text and "dry run done" in text  # one step is enough
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*")} == before
    monkeypatch.chdir(ROOT)
    for options, words in (
        (["--trainer.devices=3", "--trainer.accelerator=cpu"], "cannot be shared equally by 3 processes"),
        (["--run_dir=/proc/run"], "--run_dir /proc/run cannot be written to"),
        (["--trainer.devices=64", "--trainer.accelerator=gpu"], "--no_device_check plans for another machine"),
    ):
        assert words in refused(capsys, "fit", *tiny, f"--run_dir={tmp_path}/run", "--dry_run", *options)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=9))
    text = run_ddpm("fit", *tiny, f"--run_dir={tmp_path}/run", "--dry_run", expect=1)
    assert "has 9 B free, and the checkpoints need" in text


# --- restarts by torchrun


def _meet(port: int, restart: str) -> None:
    """What a worker does that torchrun has started on a machine with one agent, whose store is at ``port``."""
    os.environ |= {"MASTER_PORT": f"{port}", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ["TORCHELASTIC_RESTART_COUNT"] = restart
    meet_again()
    dist.init_process_group("gloo")
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2


def test_processes_meet_again_at_a_store_that_remembers_those_before() -> None:
    """scripts/elastic_restart.py kills real ones."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for restart in ("0", "1"):
        run_pair(_meet, store.port, restart)


def test_torchrun_says_how_many_train(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes("auto") == {}
    for world, each, expected in (("8", "4", {"devices": 4, "num_nodes": 2}), ("3", "2", {})):
        for name, value in (("RUN_ID", "x"), ("WORLD_SIZE", world), ("LOCAL_WORLD_SIZE", each)):
            monkeypatch.setenv(f"TORCHELASTIC_{name}" if name == "RUN_ID" else name, value)
        assert processes("auto") == expected
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes([2, 3]) == {"devices": [2, 3], "num_nodes": 2}


# --- Ray


def test_two_workers_of_ray_train_as_one_process_does(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray.train", reason="ray is not installed: pip install 'ddpm-lightning[ray]'")
    import ray

    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.chdir(ROOT)
    run, options = Run(tmp_path / "run"), [*tiny, "--trainer.accelerator=cpu", "--data.limit_val=8"]
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        fit_on_ray([*options, "--trainer.max_epochs=1", f"--run_dir={run.folder}"], 2, storage=f"{tmp_path}/ray")
    finally:
        ray.shutdown()
    run_ddpm("fit", *options, "--trainer.max_epochs=1", f"--run_dir={tmp_path}/one")
    two, one = weights(run.checkpoint()), weights(Run(tmp_path / "one").checkpoint())
    assert all(torch.allclose(two[name], one[name], rtol=1e-3, atol=1e-5) for name in one)


# --- examples for clouds


@pytest.mark.parametrize("name", ["skypilot", "kubernetes"])
def test_the_examples_for_clouds_go_on_with_a_run(name: str, tmp_path: Path) -> None:
    *_, job = yaml.safe_load_all((ROOT / f"scripts/cloud/{name}.yaml").read_text())
    if name == "skypilot":
        command = shlex.split(job["run"].replace("\\\n", "").replace("$SKYPILOT_NUM_GPUS_PER_NODE", "4"))
        assert job["resources"]["use_spot"] and job["file_mounts"]["/runs"]["mode"] == "MOUNT_CACHED"
    else:
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        command = container["command"] + container["args"]
        assert job["kind"] == "Job" and pod["restartPolicy"] == "Never" and job["spec"]["backoffLimit"] > 1
        rules = job["spec"]["podFailurePolicy"]["rules"]
        assert rules[1]["onExitCodes"]["containerName"] == container["name"]
        claims = {each["name"] for each in pod["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == claims
    assert command[:2] == ["ddpm", "fit"]
    config = ParsedOnly(with_shipped(command[1:])).read
    assert config.ckpt_path == "last" and config.run_dir.startswith("/runs/") and config.trainer.devices == "4"

"""Jobs: killed, requeued, gone on with; what the command line refuses for the run's sake; and the overlays."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from shutil import copytree

import pytest
import torch
from builders import Evil, compared, differences, refused, torn
from conftest import ROOT, run_script

from ddpm_lightning.cli import main
from ddpm_lightning.runs import Run

pytestmark = pytest.mark.cli
SLURM = ROOT / "scripts" / "slurm"


def found(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command prints that ends by itself with status 0."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_killed_runs_end_bit_for_bit_where_the_uninterrupted_one_does() -> None:
    done = run_script("kill_resume.py", "--kills=3", "--seed=1", "--configurations=batch_norm")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(
        f"kill {n + 1}, {kind}:" in done.stdout for n, kind in enumerate(("SIGKILL", "while writing", "SIGTERM"))
    )
    assert "batch_norm: 3 kills" in done.stdout and done.stdout.count("EQUAL") == 1
    assert "3 kills of 1 configurations, 1 processes, seed 1; lost: 0" in done.stdout


def test_where_one_process_cannot_save_none_is_left_waiting(tiny: list[str], tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk: logs fit, the checkpoint does not."""
    options = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp", "--trainer.max_steps=3"]
    with (tmp_path / "out.txt").open("w") as out:
        run = subprocess.Popen(
            [sys.executable, "-m", "ddpm_lightning", "fit", *tiny, f"--run_dir={tmp_path}", *options],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
        )
        assert run.wait(timeout=120) == 1
    assert "last.ckpt cannot be saved (File too large)" in (tmp_path / "out.txt").read_text()
    time.sleep(0.3)  # a process that is killed takes a moment to give its memory back
    assert alive_in_group(run.pid) == []


def alive_in_group(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # ended meanwhile
            continue
        if int(pgrp) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("script", sorted(SLURM.glob("*.sh")), ids=lambda path: path.stem)
def test_slurm_scripts(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and os.access(script, os.X_OK)
    text = script.read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, flags=re.MULTILINE))
    assert options["ntasks-per-node"] == options["gpus-per-node"]
    assert options["signal"] == "SIGUSR1@120" and "requeue" in options and "time" in options
    assert options["nodes"] == {"single_node": "1", "multi_node": "2"}[script.stem]


def test_a_job_that_runs_out_of_time_is_queued_again_and_goes_on(
    tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the commands of SLURM replaced: srun runs one task, scontrol notes what it is told."""
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\nshift\nexec "$@"\n')
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    job = {
        "SLURM_JOB_NAME": "ddpm", "SLURM_JOB_ID": "4242", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_NNODES": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost", "OMP_NUM_THREADS": "1",
        "PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    run_dir = tmp_path / "run"
    last = run_dir / "checkpoints" / "last.ckpt"
    callback = "class_path: ddpm_lightning.callbacks.LastCheckpoint, init_args: {every_n_train_steps: 20}"
    common = [*tiny, "--trainer.accelerator=cpu", f"--trainer.callbacks=[{{{callback}}}]", "--trainer.logger=false"]
    common += ["--trainer.check_val_every_n_epoch=1000", "--trainer.max_epochs=-1"]

    def submit(*options: str) -> subprocess.Popen[str]:
        command = ["bash", str(SLURM / "single_node.sh"), *common, f"--run_dir={run_dir}", *options]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **job}, start_new_session=True, **streams)

    first = submit("--trainer.max_steps=100000")
    while not last.is_file() and first.poll() is None:
        time.sleep(0.05)
    # to the task, not to the shell of the job, as --signal without B: does
    os.kill(task_of(first.pid), signal.SIGUSR1)
    output = first.communicate()[0]
    assert first.returncode == 138, output
    assert "training starts from scratch" in output and "scontrol requeue 4242: done" in output
    assert (tmp_path / "told").read_text() == "requeue 4242\n"
    step = torch.load(last, weights_only=True)["global_step"]
    assert f"SIGUSR1 at step {step}: {last} saved" in output
    second = submit(f"--trainer.max_steps={step + 3}")
    output = second.communicate()[0]
    assert second.returncode == 0 and "scratch" not in output, output
    monkeypatch.chdir(ROOT)
    main(["fit", *common, f"--run_dir={tmp_path}/straight", f"--trainer.max_steps={step + 3}"])
    assert differences(compared(tmp_path / "straight/checkpoints/last.ckpt"), compared(last)) == []


def task_of(shell: int) -> int:
    """The process that the job's shell started."""
    return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])


def test_a_torn_or_missing_last_checkpoint_and_an_evil_one(
    trained: Path, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run_dir = copytree(trained, tmp_path / "run")
    last, previous = run_dir / "checkpoints/last.ckpt", run_dir / "checkpoints/previous.ckpt"
    common = ["-c", f"{run_dir}/config.yaml", f"--run_dir={run_dir}", "--ckpt_path=last"]
    sample = ["sample", *common, "--n=1", "--steps=1"]
    capsys.readouterr()
    for damage, words in ((torn, "is torn"), (Path.unlink, "does not exist")):
        damage(last)
        main(sample)
        assert f"{last} {words}" in (output := capsys.readouterr().out) and f"{previous} of step 10" in output
    fit = ["fit", *tiny, f"--run_dir={run_dir}", "--trainer.max_epochs=2"]
    assert "already holds a run" in refused(capsys, *fit)
    main([*fit, "--ckpt_path=last"])
    assert f"{previous} of step 10" in capsys.readouterr().out
    assert differences(compared(trained / "checkpoints/last.ckpt"), compared(last)) == []
    torch.save({"state_dict": {}, "evil": Evil(f"touch {tmp_path}/proof")}, last)
    for command in (sample, [*fit, "--ckpt_path=last"]):
        message = refused(capsys, *command)
        assert message.startswith(f"ddpm: error: --ckpt_path {last} is refused") and message.count("\n") == 1
    with Run(run_dir).lock():
        assert "is being trained in by another process" in refused(capsys, *fit, f"--ckpt_path={previous}")
    assert not (tmp_path / "proof").exists()


def test_overlays_are_laid_over_a_configuration(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    overlays = {path.stem: f"-c=configs/overlays/{path.name}" for path in (ROOT / "configs/overlays").glob("*.yaml")}
    apart = {"lr_find", "batch_size", "fsdp"}  # the last one in test_sharding.py
    small = ["--data.limit_val=8", "--trainer.max_epochs=1"]
    training = [option for name, option in overlays.items() if name not in apart]
    assert len(training) == 4
    main(["fit", *tiny, *training, f"--run_dir={tmp_path}/training", *small])
    config = (tmp_path / "training/config.yaml").read_text()
    assert "gradient_clip_val: 1.0" in config and "EarlyStopping" in config and "LastCheckpoint" in config
    assert "run_training_batch" in (tmp_path / "training/fit-profile.txt").read_text()
    output = found(capsys, "fit", *tiny, overlays["lr_find"], f"--run_dir={tmp_path}/lr_find")
    steps, rate = re.search(r"(\d+) steps, the loss falls fastest at --\S+\.lr (\S+)", output).groups()
    assert int(steps) > 50 and 1e-5 < float(rate) < 1
    output = found(capsys, "fit", *tiny, overlays["batch_size"], f"--run_dir={tmp_path}/batch_size", small[0])
    assert "--data.batch_size 1024\n" in output
    assert not list(tmp_path.glob("*_*/**/*.ckpt")) and not list(tmp_path.glob("*_*/.*.ckpt"))

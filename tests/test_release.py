"""A release: both distributions are built, hold what they should, and the wheel works away from the repository."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# what a user does who has no repository, in one process
USE = """
import ddpm_lightning
from ddpm_lightning.cli import main

main(["sample", "--pretrained", "mnist", "--n", "4", "--steps", "2"])
main(["new", "my_project"])
module = ddpm_lightning.load_pretrained("digits")
print(f"{ddpm_lightning.__file__}, {ddpm_lightning.__version__}, {module.steps_trained} steps")
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """What a program prints, without the repository on its path."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, cwd=cwd, env={**kept, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


def build(kind: str, source: Path, folder: Path) -> Path:
    """An sdist or a wheel of the project in ``source``."""
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(folder)!r}))"
    return folder / run(sys.executable, "-c", code, cwd=source).split()[-1]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """The repository's files in a folder of their own, where a build leaves its traces, and their names."""
    pytest.importorskip("setuptools", minversion="77")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("no git repository")
    folder = tmp_path_factory.mktemp("clone")
    names = {name for name in listed.stdout.splitlines() if os.path.lexists(ROOT / name)}
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder, names


@pytest.fixture(scope="module")
def source(clone: tuple[Path, set[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, unpacked."""
    packed = build("sdist", clone[0], tmp_path_factory.mktemp("source"))
    assert packed.name == f"ddpm_lightning-{VERSION}.tar.gz"
    safely: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 has it
    with tarfile.open(packed) as file:
        file.extractall(packed.parent, **safely)
    return packed.parent / f"ddpm_lightning-{VERSION}"


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    """The wheel, built from the source distribution."""
    return build("wheel", source, source.parent)


def files_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_source_distribution_is_the_repository(source: Path, clone: tuple[Path, set[str]]) -> None:
    """So neither runs nor data are in it, and nothing that a test needs is missing."""
    link = "ddpm_lightning/configs"
    expected = clone[1] - {link} | {f"{link}/{name}" for name in files_in(ROOT / "configs")}
    made = {name for name in files_in(source) if re.match(r"PKG-INFO$|setup.cfg$|ddpm_lightning.egg-info/", name)}
    assert files_in(source) - made == expected and len(made) > 2


def test_the_wheel_is_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
        (metadata,) = (file.read(name).decode() for name in file.namelist() if name.endswith("dist-info/METADATA"))
    package = ROOT / "ddpm_lightning"
    inside = {f"ddpm_lightning/{name}" for name in files_in(package) if not name.endswith(".pyc")}
    assert names == inside | {f"ddpm_lightning/configs/{name}" for name in files_in(package / "configs")}
    assert f"\nVersion: {VERSION}\n" in metadata and "Requires-Dist: torch>=" in metadata
    assert sum(name.endswith(".safetensors") for name in names) == 5


@pytest.mark.cli
def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    """In a fresh environment that has its requirements from this one."""
    pytest.importorskip("pip")
    fresh, work = tmp_path / "venv", tmp_path / "work"
    venv.create(fresh, symlinks=True)
    work.mkdir()
    python = fresh / "bin" / "python"
    (packages,) = fresh.glob("lib/python*/site-packages")
    # of a folder that is named so, the .pth files are not read: what is installed here as editable stays hidden
    (packages / "requirements.pth").write_text("\n".join({sysconfig.get_path(name) for name in ("purelib", "platlib")}))
    install = ("-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, *install, cwd=work)
    printed = run(fresh / "bin" / "ddpm", "fit", "-c", "quickstart", "--trainer.max_steps", "2", cwd=work)
    assert "UNet with 436,513 parameters on Digits" in printed
    assert (work / "runs/quickstart/checkpoints/last.ckpt").is_file()
    used = run(python, "-c", USE, cwd=work).splitlines()[-1]
    assert used == f"{packages}/ddpm_lightning/__init__.py, {VERSION}, 1000 steps"
    assert (work / "runs/pretrained/mnist/samples.png").is_file()
    assert (work / "my_project/my_project/data.py").is_file()


def test_the_version_is_in_one_place() -> None:
    """And the changes are told up to it. CITATION.cff has the fields that its format asks for, and no version."""
    (first, *_) = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert first == VERSION
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and "version" not in citation


def test_hooks_and_workflow_run_what_ci_runs() -> None:
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    entries = [hook["entry"].split(" --")[0] for hook in local["hooks"]]
    lines = (ROOT / ".ci/run").read_text().splitlines()
    assert entries == [line.split(" --")[0].removesuffix(" .") for line in lines if line.startswith(("ruff", "mypy"))]
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert workflow["jobs"]["test"]["steps"][-1] == {"run": "bash .ci/run"}

"""What the README and the evaluation protocol show is what works."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from ddpm_lightning.cli import DiffusionCLI

README = (ROOT / "README.md").read_text()
SHOWN = README + "".join((ROOT / "docs" / name).read_text() for name in ("cluster.md", "evaluation.md", "sampling.md"))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SHOWN, flags=re.DOTALL)


COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for block in blocks("bash")
        for line in block.splitlines()
        if line.startswith("ddpm ")
    }
)


class ParsedOnly(DiffusionCLI):
    """Parses a command line and stops."""

    def instantiate_classes(self) -> None:
        pass

    def before_instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    # the configuration that a run saves is the resolved one that it was started with
    config = re.sub(r"runs/(quickstart|classes|mnist_classes|mnist)/config\.yaml", "", " ".join(arguments))
    if config != " ".join(arguments):
        name = "mnist" if "runs/mnist" in command else "digits"
        arguments = [f"configs/{name}.yaml" if a.endswith("/config.yaml") else a for a in arguments]
    assert ParsedOnly(arguments).config.subcommand == arguments[0]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 12 and {c.split()[1] for c in COMMANDS} == {
        "fit", "validate", "test", "predict", "sample"
    }  # fmt: skip


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_files_that_it_names_exist() -> None:
    for path in re.findall(r"\]\(((?:docs|configs|scripts)/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:configs|scripts|docs)/[\w/.]+\.\w+)`", README):
        assert (ROOT / path).is_file(), path
    package = ROOT / "ddpm_lightning"
    for cell in re.findall(r"\| (`[^|]*\.py`[^|]*) \|", README):
        for path in re.findall(r"`([\w/]+\.py)`", cell):
            assert (package / path).is_file(), path


def test_shipped_parts_exist() -> None:
    from ddpm_lightning import networks, objectives, process, schedules

    table = README[README.index("| key | what it is | shipped |") : README.index("A configuration of your own")]
    rows = [row for row in table.splitlines() if row.startswith("| `model.")]
    names = {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row.split("|")[3])}
    for name in names:
        assert any(hasattr(module, name) for module in (networks, objectives, process, schedules)), name


def test_configurations_are_small_overlays() -> None:
    for path in sorted(Path(ROOT / "configs").glob("*.yaml")):
        loaded = yaml.safe_load(path.read_text())
        assert path.name == "base.yaml" or (ROOT / "configs" / loaded["extends"]).is_file()

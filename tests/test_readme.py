"""What the README and the evaluation protocol show is what works."""

import re
import shlex
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from pages import DOCS, blocks, run_blocks

from ddpm_lightning import commands, pretrained_names
from ddpm_lightning.cli import ParsedOnly, main
from ddpm_lightning.sweeps.command import split_words

README = (ROOT / "README.md").read_text()
# the commands of one page take parts of a reader's folder: tests/test_docs.py runs them there
SHOWN = README + "".join(path.read_text() for path in DOCS if path.name != "own_parts.md")
COMMANDS = sorted(
    {
        line.partition("#")[0].strip()
        for block in blocks(SHOWN, "bash")
        for line in block.splitlines()
        if line.startswith("ddpm ")
    }
)


def parsed_only(function: Callable[..., object]) -> Callable[..., object]:
    """A function with the same arguments that does nothing."""
    return wraps(function)(lambda **arguments: None)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    pretrained = re.search(r"--pretrained (\w+)", command)
    assert pretrained is None or pretrained[1] in (*pretrained_names(), "NAME")
    subcommand, *arguments = shlex.split(re.sub(r"--pretrained \w+", "RUN", command))[1:]
    if subcommand == "sweep":  # a file or a folder, options of the sweep, and those of fit
        own, others = split_words(arguments)
        assert re.fullmatch(r"lr.yaml|sweeps/lr", own[0])
        subcommand, arguments = "fit", ["-c", "configs/quickstart.yaml", *others]
    if subcommand in ("evaluate", *commands.COMMANDS):
        for functions in (commands.COMMANDS, commands.EVALUATIONS):
            for name, function in functions.items():
                monkeypatch.setitem(functions, name, parsed_only(function))
        return commands.run_command(subcommand, arguments)
    # a run stands for the configuration that it was started with
    config = "configs/mnist.yaml" if "mnist" in command else "configs/digits.yaml"
    arguments = [config if re.fullmatch(r"(runs/\w+|RUN)/config\.yaml", a) else a for a in arguments]
    if not arguments[0].startswith("-") and arguments[0] != "sweep":
        arguments = ["-c", config, *arguments[1:]]
    if subcommand == "submit":
        return main([subcommand, *(word for word in arguments if word != "--go"), "--dry_run"])
    assert ParsedOnly([subcommand, *arguments]).config.subcommand == subcommand


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 12 and {c.split()[1] for c in COMMANDS} == {
        "fit", "validate", "test", "predict", "sample", "evaluate", "export", "density", "reweight", "average", "sweep",
        "submit", "new",
    }  # fmt: skip


def test_python_runs() -> None:
    """One block after the other, as a reader would type them."""
    names = run_blocks(blocks(README, "python"), "README.md")
    network = names["MyNet"]
    assert network(8)(torch.zeros(2, 1, 4, 4), torch.zeros(2)).shape == (2, 1, 4, 4)  # type: ignore[operator]


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert all(len(line) <= 120 for line in lines if not line.startswith(("|", "ddpm ", "[")))


def test_files_of_the_equations_exist() -> None:
    package = ROOT / "ddpm_lightning"
    cells = re.findall(r"\| (`[^|]*\.py`[^|]*) \|", (ROOT / "docs/equations.md").read_text())
    paths = [path for cell in cells for path in re.findall(r"`([\w/]+\.py)`", cell)]
    assert len(paths) > 10 and all((package / path).is_file() for path in paths)


def test_shipped_parts_exist() -> None:
    from ddpm_lightning import networks, objectives, process, schedules

    rows = [row for row in SHOWN.splitlines() if row.startswith("| `model.") and "`" in row.split("|")[-2]]
    names = {name for row in rows for name in re.findall(r"`([A-Z]\w+)`", row.split("|")[-2])}
    assert len(names) > 25
    for name in names:
        assert any(hasattr(module, name) for module in (networks, objectives, process, schedules)), name


def test_configurations_are_small_overlays() -> None:
    for path in sorted(Path(ROOT / "configs").glob("*.yaml")):
        loaded = yaml.safe_load(path.read_text())
        assert path.name == "base.yaml" or "module" in loaded or (ROOT / "configs" / loaded["extends"]).is_file()

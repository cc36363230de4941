"""Help at once: it is true, it is short, and it waits for nothing."""

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from ddpm_lightning import commands, first_screen
from ddpm_lightning.__main__ import main
from ddpm_lightning.cli import DiffusionCLI

ROOT = Path(__file__).parents[1]
ASKED = [[], ["--help"], ["-h"], ["--version"], ["evaluate"], *([name, "--help"] for name in first_screen.OPTIONS)]


@pytest.mark.parametrize("words", ASKED, ids=" ".join)
def test_a_screen_is_short(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(words)
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 40 and max(map(len, lines)) <= 120


def test_neither_torch_nor_lightning_is_waited_for() -> None:
    code = f"""
import sys
from ddpm_lightning.__main__ import main
for words in {ASKED}:
    main(words)
assert not {{"torch", "lightning", "jsonargparse", "numpy"}} & {{*sys.modules}}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("word", "meant"), [("fitt", "did you mean fit? "), ("smaple", "did you mean sample? "), ("x", "")]
)
def test_a_misspelt_command_is_answered(word: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([word, "--run_dir", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith(f"ddpm: error: there is no command {word}: {meant}there are fit, ")


def test_commands_and_evaluations_are_all_there() -> None:
    assert [*first_screen.COMMANDS] == [
        *DiffusionCLI.subcommands(),
        "evaluate",
        "density",
        "reweight",
        "average",
        "sweep",
        "export",
        "submit",
        "new",
    ]
    assert [*first_screen.EVALUATIONS] == [*commands.EVALUATIONS]


def test_every_option_is_one_of_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    for command, rows in first_screen.OPTIONS.items():
        with pytest.raises(SystemExit):
            main([command, "--help_all"])
        known = {*re.findall(r"^ +(?:-\w \w+, )?(--[\w.]+)", capsys.readouterr().out, flags=re.MULTILINE)}
        options = [option for row in rows for text in row for option in re.findall(r"--[a-z_.]+", text)]
        assert len(options) >= 7
        for option in options:
            parent = option.rpartition(".")[0]  # an argument of a class belongs to the option that names the class
            assert option in known or parent in known, (command, option)


def test_every_class_that_is_named_is_shipped() -> None:
    shipped = {
        name
        for room in ("data", "schedules", "networks", "process", "objectives", "samplers")
        for name in import_module(f"ddpm_lightning.{room}").__all__
    }
    text = " ".join(text for rows in first_screen.OPTIONS.values() for row in rows for text in row)
    named = {*re.findall(r"\b[A-Z][a-z]+[A-Z]\w+\b|\bMNIST\b|\bDigits\b", text)}
    assert len(named) > 20 and named <= shipped


def test_the_long_text_comes_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sample", "--help_all"])
    assert stop.value.code == 0 and len(capsys.readouterr().out.splitlines()) > 200

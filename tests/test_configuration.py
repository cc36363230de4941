"""Configuration files that cannot be read: one sentence with the file, and the line where there is one."""

from pathlib import Path

import pytest
from builders import refused

from ddpm_lightning.configuration import ConfigurationError, read

BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 10)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
FILES = {
    "itself": (b"extends: bad.yaml\n", "leads in a circle: bad.yaml extends bad.yaml"),
    "circle": (b"extends: other.yaml\n", "circle: bad.yaml extends other.yaml extends bad.yaml"),
    "no base": (b"extends: nothing.yaml\n", "nothing.yaml (which"),
    "extends no name": (b"extends: 3\n", "extends must be the name of one file"),
    "extends a list": (b"extends: [a.yaml]\n", "must be the name of one file"),
    "extends null": (b"extends:\na: 1\n", "must be the name of one file"),
    "extends a folder": (b"extends: .\n", "Is a directory"),
    "not UTF-8": ("model: {ema_decay: 0.9} # \xe9".encode("latin-1"), "it is not text in UTF-8"),
    "UTF-16": ("model:\n".encode("utf-16"), "it is not text in UTF-8"),
    "binary": (bytes(range(256)), "it is not text in UTF-8"),
    "NUL": (b"model:\n  ema_decay: 0.9\0\n", "is no YAML"),
    "empty": (b"", "is empty"),
    "only a remark": (b"# nothing\n", "is empty"),
    "list": (b"- 1\n- 2\n", "holds a list"),
    "scalar": (b"digits\n", "holds a str"),
    "two documents": (b"a: 1\n---\nb: 2\n", "line 2: expected a single document"),
    "key twice": (b"model:\n  ema_decay: 0.9\n  ema_decay: 0.8\n", "line 3: the key ema_decay is there twice"),
    "key twice at the top": (b"run_dir: a\nrun_dir: b\n", "line 2: the key run_dir is there twice"),
    "key twice in a list": (b"a:\n- {b: 1, b: 2}\n", "line 2: the key b is there twice"),
    "tab": (b"model:\n\tema_decay: 0.9\n", "line 2: "),
    "open bracket": (b"model: [1\n", "line 2: "),
    "aliases": (BOMB.encode(), "with its aliases"),
    "alias of itself": (b"a: &a [*a]\n", "with its aliases"),
    "deep": (b"a: " + b"[" * 5000 + b"]" * 5000, "nest"),
    "python": (b"a: !!python/object/apply:os.system [echo]\n", "line 1: could not determine a constructor"),
    "day 32": (b"a: !!timestamp 2020-01-32\n", "is no YAML"),
}


@pytest.fixture
def bad(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    content, _ = FILES[request.node.callspec.params["name"]]
    (tmp_path / "bad.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_text("extends: bad.yaml\n")
    return tmp_path / "bad.yaml"


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read(name: str, bad: Path) -> None:
    with pytest.raises(ConfigurationError) as refusal:
        read(bad)
    message = str(refusal.value)
    assert FILES[name][1] in message and "bad.yaml" in message
    assert len(message) < 400 and "\n" not in message


@pytest.mark.parametrize("name", FILES)
def test_the_command_line_says_so(name: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for option in (["-c", str(bad)], [f"--config={bad}"]):
        message = refused(capsys, "fit", *option)
        assert FILES[name][1] in message and "bad.yaml" in message and message.count("\n") == 1


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_configuration_of_a_run(name: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad.rename(bad.with_name("config.yaml"))
    (bad.parent / "checkpoints").mkdir()
    message = refused(capsys, "test", str(bad.parent))
    assert f"{bad.parent} holds no run: " in message and message.count("\n") == 1


@pytest.mark.parametrize("name", ["key twice", "aliases", "deep", "NUL", "open bracket", "not UTF-8", "itself"])
def test_a_file_for_a_part_of_the_configuration(name: str, bad: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refused(capsys, "fit", "-c", "configs/digits.yaml", f"--model={bad}")
    assert "--model" in message or "bad.yaml" in message
    assert message.count("\n") == 1, message


def test_a_file_that_does_not_exist_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no.yaml cannot be read: No such file" in refused(capsys, "fit", "-c", str(tmp_path / "no.yaml"))
    assert "cannot be read: Is a directory" in refused(capsys, "fit", "-c", str(tmp_path))


def test_what_yaml_allows_and_is_meant(tmp_path: Path) -> None:
    text = "\ufeffa: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a\n"
    (tmp_path / "good.yaml").write_text(text, encoding="utf-8")
    assert read(tmp_path / "good.yaml") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


def test_a_list_of_the_base_is_replaced_or_appended_to(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("trainer: {callbacks: [a], plugins: [b]}\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\ntrainer: {callbacks+: [c], plugins: [d], other+: [e]}\n")
    assert read(tmp_path / "mine.yaml") == {"trainer": {"callbacks": ["a", "c"], "plugins": ["d"], "other+": ["e"]}}

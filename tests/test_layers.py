"""The layering of the package, read from its imports."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ddpm_lightning

ROOT = Path(ddpm_lightning.__file__).parent
PACKAGE = ROOT.name
LAYERS = [
    ["errors", "ops", "distributions", "own_code"],
    ["schedules", "networks", "lattice"],
    ["process"],
    ["objectives", "samplers", "metrics"],
    ["data", "checkpoints", "figures", "failures", "numbers", "command_line", "configuration", "progress"],
    ["training"],
    ["runs"],
    ["sampling"],
    ["evaluation", "export", "pretrained", "projects"],
    ["callbacks", "interchange"],
    ["trainer", "commands", "links", "jobs", "loggers", "sweeps", "words"],
    ["first_screen", "parse_errors", "cli", "__main__", "ray_train"],
]
LAYER = {unit: number for number, units in enumerate(LAYERS) for unit in units}
# within the first layer and the last there is an order too
WITHIN = {
    ("ops", "errors"),
    ("distributions", "ops"),
    ("distributions", "errors"),
    ("data", "progress"),
    ("command_line", "failures"),
    ("command_line", "numbers"),
    ("numbers", "checkpoints"),
    ("cli", "first_screen"),
    ("cli", "parse_errors"),
    ("__main__", "first_screen"),
    ("__main__", "cli"),
    ("ray_train", "__main__"),
    ("", "pretrained"),  # when it is asked for
}
PLAIN = [unit for units in LAYERS[:4] for unit in units]
FILES = sorted(ROOT.rglob("*.py"))


def unit_of(path: Path) -> str:
    """ops, schedules, ...: the part of the package that a file belongs to; the package's own __init__ is ''."""
    relative = path.relative_to(ROOT)
    name = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    return "" if name == "__init__" else name


def imports(source: str, package: str) -> Iterator[str]:
    """Dotted names of everything imported anywhere in a module that lies in ``package``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def imports_of(path: Path) -> list[str]:
    package = ".".join(path.relative_to(ROOT.parent).parent.parts)
    return list(imports(path.read_text(), package))


def violations(unit: str, names: list[str]) -> list[str]:
    """Imports of the package's own parts that ``unit`` may not make."""
    wrong = []
    for name in names:
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top != PACKAGE or target == unit or target not in LAYER:
            continue
        if not (LAYER[target] < LAYER.get(unit, 0) or (unit, target) in WITHIN):
            wrong.append(name)
    return wrong


def test_every_file_belongs_to_a_layer() -> None:
    assert len(FILES) > 30
    assert {unit_of(path) for path in FILES} == {"", *LAYER}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_lower_layers_only(path: Path) -> None:
    assert violations(unit_of(path), imports_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_outside_imports(path: Path) -> None:
    tops = {name.split(".")[0] for name in imports_of(path)}
    assert not tops & {"scripts", "configs", "tests", "oracles", "pytest", "pytorch_lightning"}
    unit = unit_of(path)
    if unit in PLAIN:
        allowed = {"torch", PACKAGE, *({"torchmetrics", "safetensors"} if unit == "metrics" else set())}
        assert tops - set(sys.stdlib_module_names) <= allowed
        assert not any(name.startswith(("torch.distributed", "torch.utils.data")) for name in imports_of(path))
    if unit == "networks":
        assert all(name.split(".")[1] == "networks" for name in imports_of(path) if name.startswith(PACKAGE))


def options_in(source: str) -> list[str]:
    """Strings of a module that name an option of the command line."""
    strings = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return [value for value in strings if isinstance(value, str) and re.search(r"--[A-Za-z]", value)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_layers_0_to_3_name_no_option_of_the_command_line(path: Path) -> None:
    assert unit_of(path) not in PLAIN or options_in(path.read_text()) == []


def test_options_are_found_in_any_string() -> None:
    assert options_in('raise E(f"T = {T}: set --model.T") if a--b else "a -- b"') == [": set --model.T"]


@pytest.mark.parametrize(
    ("unit", "source", "wrong"),
    [
        ("objectives", "from ddpm_lightning.samplers import AncestralSampler", True),
        ("objectives", "from ddpm_lightning import samplers", True),
        ("objectives", "from ..samplers.base import Sampler", True),
        ("objectives", "def f():\n    import ddpm_lightning.training.module", True),
        ("objectives", "from ddpm_lightning.process import DiffusionModel", False),
        ("objectives", "from .times import TimeSampler", False),
        ("networks", "from ddpm_lightning.schedules import Schedule", True),
        ("ops", "from ddpm_lightning.distributions import DiagonalGaussian", True),
        ("distributions", "from ddpm_lightning.ops import rand", False),
        ("training", "from ddpm_lightning.cli import main", True),
        ("", "from ddpm_lightning.ops import rand", True),
        ("cli", "from ddpm_lightning import __version__", False),
    ],
)
def test_the_rules_can_be_broken(unit: str, source: str, wrong: bool) -> None:
    package = PACKAGE if unit in ("", "ops", "distributions", "cli") else f"{PACKAGE}.{unit}"
    assert bool(violations(unit, list(imports(source, package)))) == wrong


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_tests_share_is_in_no_test_file(path: Path) -> None:
    assert not [name for name in imports(path.read_text(), "tests") if name.startswith("test_")]


def test_layers_0_to_3_work_without_lightning() -> None:
    program = f"""
import sys
for name in ("lightning", "pytorch_lightning", "lightning_fabric", "jsonargparse"):
    sys.modules[name] = None
import importlib
for unit in {PLAIN!r}:
    importlib.import_module(f"{PACKAGE}.{{unit}}")
import torch
from {PACKAGE} import metrics, networks, objectives, process, samplers, schedules
model = process.DiffusionModel(
    networks.UNet(width=4, multipliers=(1,), blocks=1), schedules.CosineChain(3), process.EpsParameterization(),
    process.TimeConditioning(), process.FixedLargeVariance(), process.DiscretizedGaussian(levels=17),
)
generator = torch.Generator().manual_seed(0)
images = samplers.AncestralSampler()(model, torch.zeros(2, 1, 4, 4), generators=generator)
elbo = objectives.DenoisingElbo()(model, images, generator).total
metric = metrics.MeanAndError()
metric.update(elbo.detach())
assert metric.compute()["mean"].isfinite()
assert not [name for name in sys.modules if name.split(".")[0] == "lightning" and sys.modules[name] is not None]
print("done")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"

"""What the benchmarks share: interleaved rounds, rates with their spread, the machine's peak, tables."""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lightning.errors import at_least

__all__ = [
    "Bench",
    "Seconds",
    "Timer",
    "flops_of",
    "interleave",
    "machine",
    "peak_memory_mib",
    "peak_rates",
    "ratio",
    "report",
    "row",
    "table",
    "timed",
]


class Seconds(NamedTuple):
    """What one go took."""

    wall: float
    cpu: float
    """Of this process; on a core that others use too it is the steadier one. Says nothing of a GPU."""


class Timer:
    """A stop-watch that waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def start(self) -> None:
        """Start."""
        self._wait()
        self._start = time.perf_counter(), time.process_time()

    def stop(self) -> Seconds:
        """Seconds since the start."""
        self._wait()
        return Seconds(time.perf_counter() - self._start[0], time.process_time() - self._start[1])


def timed(step: Callable[[], Any], device: torch.device, warm: bool = True) -> Callable[[int], Seconds]:
    """``go(n)`` that takes n steps and says how long they took, ``warm`` after one that is not counted."""

    def go(steps: int) -> Seconds:
        timer = Timer(device)
        if warm:
            step()
        timer.start()
        for _ in range(steps):
            step()
        return timer.stop()

    return go


def interleave(
    variants: Mapping[str, Callable[[int], Seconds]], rounds: int, steps: int, warm_up: int
) -> dict[str, list[Seconds]]:
    """Seconds a step of each variant in each round. In a round every variant has its turn, so that what slows the
    machine down for a while slows all of them."""
    for go in variants.values():
        go(warm_up)
    seconds: dict[str, list[Seconds]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, go in variants.items():
            wall, cpu = go(steps)
            seconds[name].append(Seconds(wall / steps, cpu / steps))
    return seconds


def flops_of(step: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and convolutions of a step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_rates(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Callable[[int], Seconds], int]]:
    """A large matrix product and a 3x3 convolution, timed as a variant, and their operations: the machine's peak."""
    size, batch = (8192, 256) if device.type == "cuda" else (768, 16)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    image = torch.randn(batch, 128, 28, 28, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(128, 128, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def product() -> Tensor:
        return a @ b

    def convolution() -> Tensor:
        return conv2d(image, weight, padding=1)

    return {
        "product": (timed(product, device), flops_of(product)),
        "convolution": (timed(convolution, device), flops_of(convolution)),
    }


def ratio(base: list[Seconds], other: list[Seconds]) -> dict[str, float]:
    """How many times as fast as ``base`` the other is: median over rounds of the two of a round, with its quartiles."""

    def of(clock: str) -> tuple[float, float, float]:
        values = [getattr(a, clock) / max(getattr(b, clock), 1e-9) for a, b in zip(base, other, strict=True)]
        return (statistics.median(values), *_quartiles(values))

    median, low, high = of("wall")
    return {"ratio": median, "low": low, "high": high, "ratio_cpu": of("cpu")[0]}


def row(seconds: list[Seconds], images: int, flops: int | None, peak: float | None) -> dict[str, Any]:
    """Figures of a variant: images/s with the quartiles over rounds, FLOP/s and their share of the peak."""
    walls = [wall for wall, _ in seconds]
    low, high = _quartiles([images / wall for wall in walls])
    wall = statistics.median(walls)
    rate = None if flops is None else flops / wall
    return {
        "images_per_second": images / wall,
        "images_per_second_low": low,
        "images_per_second_high": high,
        "ms_per_step": 1e3 * wall,
        "cpu_ms_per_step": 1e3 * statistics.median(cpu for _, cpu in seconds),
        "gflops_per_second": None if rate is None else rate / 1e9,
        "share_of_peak": None if rate is None or peak is None else rate / peak,
    }


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory in use: the device's since it was last reset, on a CPU the process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__}


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows as text."""
    lines = [f"{'':32}{'images/s':>10}{'quartiles':>17}{'ms/step':>10}{'CPU ms':>9}{'GFLOP/s':>9}{'of peak':>9}"]
    for name, figures in rows.items():
        spread = f"{figures['images_per_second_low']:.0f}..{figures['images_per_second_high']:.0f}"
        rate, share = figures["gflops_per_second"], figures["share_of_peak"]
        lines.append(
            f"{name:32}{figures['images_per_second']:10.0f}{spread:>17}{figures['ms_per_step']:10.2f}"
            f"{figures['cpu_ms_per_step']:9.2f}{'' if rate is None else f'{rate:.0f}':>9}"
            f"{'' if share is None else f'{share:.0%}':>9}"
        )
    return "\n".join(lines)


def report(head: str, rows: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, Mapping[str, float]]) -> None:
    """Print a group's rows and ratios."""
    print(f"\n{head}\n{table(rows)}")
    for name, found in ratios.items():
        print(
            f"{name}: {found['ratio']:.2f} ({found['low']:.2f}..{found['high']:.2f}),"
            f" by CPU time {found['ratio_cpu']:.2f}"
        )


@dataclass(frozen=True)
class Bench:
    """What every benchmark is told.

    Args:
        device: cpu, cuda, cuda:1, ...
        batch_size: one or several
        rounds: turns of each variant
        steps: steps in a turn
        warm_up: steps that are not counted
        json: file for the results
    """

    device: str = "cpu"
    batch_size: list[int] | None = None
    rounds: int = 7
    steps: int = 3
    warm_up: int = 2
    json: Path | None = None

    def __post_init__(self) -> None:
        at_least(1, rounds=self.rounds, steps=self.steps, warm_up=self.warm_up, batch_size=min(self.batch_size or [1]))

    @property
    def at(self) -> torch.device:
        return torch.device(self.device)

    def measure(self, variants: Mapping[str, Callable[[int], Seconds]]) -> dict[str, list[Seconds]]:
        """Seconds a step of each variant in each round."""
        return interleave(variants, self.rounds, self.steps, self.warm_up)

    def write(self, record: Mapping[str, Any]) -> None:
        """Write the record, if there is a place for it."""
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(record, indent=2) + "\n")

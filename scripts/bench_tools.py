"""What the benchmarks share: variants that take turns, rates with their spread, the machine's peak, a table, JSON.

A benchmark yields groups. The variants of a group do the same work, and in each round every variant has its turn, so
that what slows the machine down for a while slows all of them. Rates are medians over rounds with their quartiles; a
ratio is the median of the ratios within a round, by the clock and by this process's CPU time.
"""

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from ddpm_lightning import process
from ddpm_lightning.errors import at_least

__all__ = [
    "Bench",
    "Go",
    "Group",
    "Seconds",
    "Variant",
    "flops_of",
    "parts",
    "peak_memory_mib",
    "seconds_now",
    "timed",
    "unet2d",
]


class Seconds(NamedTuple):
    """By the clock, and CPU time of this process: the steadier one on a core that others use too, silent on a GPU."""

    wall: float
    cpu: float

    def since(self, start: "Seconds", steps: int = 1) -> "Seconds":
        """A step's share of what has passed."""
        return Seconds((self.wall - start.wall) / steps, (self.cpu - start.cpu) / steps)


Go = Callable[[int], Seconds]
"""Takes n steps, and says what one of them took."""


def seconds_now(device: torch.device) -> Seconds:
    """The time, once the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Seconds(time.perf_counter(), time.process_time())


def timed(step: Callable[[], Any], device: torch.device, warm: bool = True, repeats: int = 1) -> Go:
    """Time a step of ``repeats`` calls, in each turn after one call that is not counted if ``warm``."""

    def go(steps: int) -> Seconds:
        if warm:
            step()
        start = seconds_now(device)
        for _ in range(steps * repeats):
            step()
        return seconds_now(device).since(start, steps)

    return go


def flops_of(step: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products and convolutions of a step, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_memory_mib(device: torch.device) -> float:
    """The largest memory in use: the device's since it was last reset, on a CPU the process's since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def unet2d(*widths: int) -> Any:
    """diffusers' UNet2DModel for images of MNIST's shape, with random weights and as many levels as widths."""
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=min(8, widths[0]),
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
    )


def parts(conditioning: process.NoiseConditioning, decoder: process.Decoder) -> dict[str, Any]:
    """What the benchmarks' models have in common, and two parts of their own."""
    common = {"parameterization": process.EpsParameterization(), "variance": process.FixedLargeVariance()}
    return {**common, "conditioning": conditioning, "decoder": decoder}


class Variant(NamedTuple):
    """One way to do a group's work, the variants that it is compared with, and whether it computes in bfloat16."""

    go: Go
    against: tuple[str, ...] = ()
    half: bool = False


@dataclass(frozen=True)
class Group:
    """Variants of the same work: what it is called, images and FLOPs in a step, steps in a turn if not the usual."""

    name: str
    images: int
    variants: dict[str, Variant]
    flops: int | None = None
    steps: int | None = None


def _spread(values: list[float]) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(values * 2 if len(values) == 1 else values, n=4, method="inclusive")
    return median, low, high


def _probes(device: torch.device, half: bool) -> dict[str, tuple[Go, int]]:
    """A large matrix product and a 3x3 convolution, and their operations: the faster one is the machine's peak."""
    size, batch = (8192, 256) if device.type == "cuda" else (768, 16)
    at: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if half else torch.float32}
    a, b = torch.randn(2, size, size, **at)
    image, weight = (
        torch.randn(n, 128, k, k, **at).contiguous(memory_format=torch.channels_last)
        for n, k in ((batch, 28), (128, 3))
    )
    work: dict[str, Callable[[], Any]] = {"product": lambda: a @ b, "conv": lambda: conv2d(image, weight, padding=1)}
    return {f"{name} {half}": (timed(step, device), flops_of(step)) for name, step in work.items()}


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

    def run(self, groups: Iterable[Group], **facts: Any) -> None:
        """Measure the groups, print them, and write them with what else is told to the file, if there is one."""
        at = self.at
        name = torch.cuda.get_device_name(at) if at.type == "cuda" else platform.processor() or platform.machine()
        machine = {"device": f"{at.type}: {name}", "threads": torch.get_num_threads(), "torch": torch.__version__}
        print(", ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
        record: dict[str, Any] = {"machine": machine, **facts, "groups": [self._measured(group) for group in groups]}
        record["peak_memory_mib"] = peak_memory_mib(at)
        print(f"peak memory {record['peak_memory_mib']:.0f} MiB")
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(record, indent=2) + "\n")

    def _measured(self, group: Group) -> dict[str, Any]:
        """Rates of each variant and its ratios."""
        halves = sorted({variant.half for variant in group.variants.values()}) if group.flops else []
        probes = {half: _probes(self.at, half) for half in halves}
        goes = {name: variant.go for name, variant in group.variants.items()}
        goes |= {name: go for pair in probes.values() for name, (go, _) in pair.items()}
        if self.at.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.at)
        for go in goes.values():
            go(self.warm_up)
        seconds: dict[str, list[Seconds]] = {name: [] for name in goes}
        for _ in range(self.rounds):
            for name, go in goes.items():
                seconds[name].append(go(group.steps or self.steps))
        median = {name: Seconds(*map(statistics.median, zip(*values, strict=True))) for name, values in seconds.items()}
        peak = {
            half: max(flops / median[name].wall for name, (_, flops) in pair.items()) for half, pair in probes.items()
        }
        peaks = {"bf16" if half else "32": rate for half, rate in peak.items()}
        work = f": {group.flops / 1e9:.2f} GFLOP a step" if group.flops else ""
        in_words = "".join(f"; peak {rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in peaks.items())
        print(f"\n{group.name}, batches of {group.images}{work}{in_words}", flush=True)
        print(f"{'':36}{'images/s':>10}{'quartiles':>17}{'ms/step':>10}{'CPU ms':>9}{'GFLOP/s':>9}{'of peak':>9}")
        rows: dict[str, dict[str, Any]] = {}
        ratios: dict[str, dict[str, float]] = {}
        for name, variant in group.variants.items():
            wall, cpu = median[name]
            rate, (_, low, high) = group.images / wall, _spread([group.images / value.wall for value in seconds[name]])
            flops = group.flops and group.flops / wall
            share = flops and flops / peak[variant.half]
            cells = ("", "") if flops is None else (f"{flops / 1e9:.0f}", f"{share:.0%}")
            print(
                f"{name:36}{rate:10.0f}{f'{low:.0f}..{high:.0f}':>17}{1e3 * wall:10.2f}{1e3 * cpu:9.2f}"
                f"{cells[0]:>9}{cells[1]:>9}"
            )
            rows[name] = {
                "images_per_second": rate,
                "images_per_second_low": low,
                "images_per_second_high": high,
                "ms_per_step": 1e3 * wall,
                "cpu_ms_per_step": 1e3 * cpu,
                "gflops_per_second": flops and flops / 1e9,
                "share_of_peak": share,
            }
            ratios |= {f"{name} / {base}": _compared(seconds[base], seconds[name]) for base in variant.against}
        for name, found in ratios.items():
            print(
                f"{name}: {found['ratio']:.2f} ({found['low']:.2f}..{found['high']:.2f}), by CPU time "
                f"{found['ratio_cpu']:.2f}; {found['more_ms']:+.3f} ms a step, CPU time {found['more_cpu_ms']:+.3f} ms"
            )
        return {
            "group": group.name,
            "batch_size": group.images,
            "flops_per_step": group.flops,
            "peak_flops_per_second": peaks,
            "rows": rows,
            "ratios": ratios,
            "peak_memory_mib": peak_memory_mib(self.at),
        }


def _compared(base: list[Seconds], other: list[Seconds]) -> dict[str, float]:
    """How many times as fast as ``base`` the other is, and how much longer it takes: medians over rounds."""
    pairs = list(zip(base, other, strict=True))
    ratio, low, high = _spread([a.wall / b.wall for a, b in pairs])
    return {
        "ratio": ratio,
        "low": low,
        "high": high,
        "ratio_cpu": statistics.median(a.cpu / max(b.cpu, 1e-9) for a, b in pairs),
        "more_ms": 1e3 * statistics.median(b.wall - a.wall for a, b in pairs),
        "more_cpu_ms": 1e3 * statistics.median(b.cpu - a.cpu for a, b in pairs),
    }

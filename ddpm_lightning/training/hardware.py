"""What suits the machine: the accelerator and the precision that ``auto`` stands for."""

import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator
from torch import nn

from ddpm_lightning.errors import InputError

__all__ = ["Choice", "Precision", "choose_accelerator", "choose_precision", "resolve"]

Precision = Literal[
    "auto", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true",
    "transformer-engine", "transformer-engine-float16", "64", "32", "16", "bf16", 64, 32, 16,
]  # fmt: skip
"""Lightning's precisions, and ``auto``."""

_GAIN = 1.15
"""Half precision is chosen where it is at least so many times as fast: the time of one block is no exact number."""


class Choice(NamedTuple):
    """What was chosen, and why in a few words."""

    value: str
    why: str


def choose_accelerator(asked: str) -> Choice | None:
    """The accelerator to take instead of the one that is asked for, or None for that one.

    Lightning's ``auto`` takes Apple's GPU where there is one. This has no float64, in which schedules and bounds are
    computed here.

    Raises:
        InputError: ``mps``.
    """
    if asked == "mps":
        raise InputError(
            "--trainer.accelerator mps: Apple's GPU has no float64, in which schedules and bounds are computed: use cpu"
        )
    if asked in ("auto", "gpu") and MPSAccelerator.is_available() and not CUDAAccelerator.is_available():
        return Choice("cpu", "Apple's GPU has no float64, in which schedules and bounds are computed")
    return None


def choose_precision(on_gpu: bool, processes: int = 1) -> Choice:
    """``bf16-mixed`` where the machine is faster with it, else ``32-true``.

    On a GPU the hardware decides. On a CPU without instructions for bfloat16 it is up to eleven times slower. With them
    it may be faster or slower, so a block of convolutions is timed, for less than a second. Several processes must
    agree without a word: they take it where the CPU has matrix units for it.

    Args:
        on_gpu: whether CUDA devices are used.
        processes: number of processes of the run.
    """
    if on_gpu:
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Choice("bf16-mixed", "the GPU has bfloat16")
        return Choice("32-true", "this GPU has no bfloat16")
    instructions = _bfloat16_instructions()
    if instructions is None:
        return Choice("32-true", "this CPU has no instructions for bfloat16")
    if processes > 1:
        half = instructions == "AMX"
        return Choice("bf16-mixed" if half else "32-true", f"this CPU has bfloat16 by {instructions}")
    ratio = _speed_of_half()
    return Choice("bf16-mixed" if ratio >= _GAIN else "32-true", f"bfloat16 has {ratio:.2f} times the speed of float32")


def resolve(
    accelerator: Any, precision: Precision | None, devices: Any = "auto", num_nodes: int = 1
) -> tuple[Any, Any, list[str]]:
    """Accelerator and precision of a Trainer with ``auto`` resolved, and a sentence for each that was chosen here.

    Args:
        accelerator: as in Lightning's Trainer.
        precision: as in Lightning's Trainer, or ``auto``.
        devices: as in Lightning's Trainer.
        num_nodes: as in Lightning's Trainer.

    Raises:
        InputError: an accelerator that cannot be used.
    """
    said = []
    if isinstance(accelerator, str) and (other := choose_accelerator(accelerator)):
        accelerator = other.value
        said.append(f"accelerator {other.value}: {other.why} (--trainer.accelerator auto)")
    if precision == "auto":
        on_gpu = accelerator in ("auto", "gpu", "cuda") and CUDAAccelerator.is_available()
        started = int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)
        # the command line hands over a number of devices as text
        processes = max(started, num_nodes, int(devices) if str(devices).isdigit() else 1)
        chosen = choose_precision(on_gpu, processes)
        return accelerator, chosen.value, [*said, f"precision {chosen.value}: {chosen.why} (--trainer.precision auto)"]
    if precision == "16-true":
        said.append("precision 16-true: gradients are not scaled, so small ones become 0; 16-mixed scales them")
    return accelerator, precision, said


def _bfloat16_instructions() -> str | None:
    """The CPU's best kind of instructions for bfloat16 that oneDNN may use."""
    if not torch.backends.mkldnn.is_available():
        return None
    allowed = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    free, has = allowed in ("", "ALL", "DEFAULT"), torch.cpu.get_capabilities()
    if has.get("amx_bf16") and (free or "AMX" in allowed):
        return "AMX"
    if has.get("avx512_bf16") and (free or any(name in allowed for name in ("BF16", "FP16", "AMX", "AVX10"))):
        return "AVX-512"
    return None


def _speed_of_half(seconds: float = 0.7) -> float:
    """The speed of a residual block's forward and backward pass in bfloat16, over the one in float32.

    Each has the memory format that ``channels_last: auto`` gives it. The two take turns on one thread, and its own
    clock is read, so that other work on the machine hardly counts.
    """
    with torch.random.fork_rng(devices=[]):
        x = torch.randn(8, 64, 14, 14)
        blocks = [
            nn.Sequential(nn.GroupNorm(8, 64), nn.SiLU(), nn.Conv2d(64, 64, 3, padding=1)).to(memory_format=layout)
            for layout in (torch.channels_last, torch.contiguous_format)
        ]

    def pass_of(block: nn.Module, half: bool) -> Callable[[], float]:
        def run() -> float:
            start = time.thread_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = block(x).square().mean()
            torch.autograd.grad(loss, list(block.parameters()))
            return time.thread_time() - start

        return run

    single, half = pass_of(blocks[0], False), pass_of(blocks[1], True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [(single(), half())]  # warm-up
        end = time.perf_counter() + seconds
        while len(times) < 4 or (time.perf_counter() < end and len(times) < 40):
            times.append((single(), half()))
    finally:
        torch.set_num_threads(threads)
    typical = [median(each) for each in zip(*times[1:], strict=True)]
    return typical[0] / typical[1]

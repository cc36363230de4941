"""``ddpm fit`` on Ray Train: ``python -m ddpm_lightning.ray_train --workers 2 -c configs/mnist.yaml``."""

import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from ddpm_lightning.errors import InputError, RunError, at_least
from ddpm_lightning.failures import end

__all__ = ["fit_on_ray"]

_OPTIONS = [
    "--trainer.strategy",
    '{"class_path": "ray.train.lightning.RayDDPStrategy"}',
    "--trainer.plugins+",
    "ray.train.lightning.RayLightningEnvironment",
    "--ckpt_path",
    "last",
]


def fit_on_ray(
    words: Sequence[str], workers: int, gpu: bool = False, storage: str | None = None, max_failures: int = 3
) -> None:
    """Train a run on the workers of a Ray cluster. After a failure all start again, from the last checkpoint.

    Args:
        words: the options of ``fit``. The run's folder must be one that all workers share.
        workers: number of processes.
        gpu: whether each has a GPU.
        storage: folder for Ray's own files; by default Ray's.
        max_failures: so many restarts at most.

    Raises:
        InputError: Ray is not installed, no workers.
        RunError: training failed, as the workers' output says.
    """
    at_least(1, workers=workers)
    at_least(0, max_failures=max_failures)
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer
    except ImportError as error:
        raise InputError(f"Ray is needed ({error}): pip install 'ddpm-lightning[ray]'") from None
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"words": [*words], "folder": os.getcwd()},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(storage_path=storage, failure_config=FailureConfig(max_failures=max_failures)),
    )
    try:
        trainer.fit()
    except Exception as error:  # Ray wraps the workers' own, of any kind
        raise RunError(f"training on Ray failed: {' '.join(str(error).split())[:500]}") from error


def _worker(config: dict[str, Any]) -> None:
    os.chdir(config["folder"])
    from ddpm_lightning.__main__ import main

    try:
        main(["fit", *config["words"], *_OPTIONS])
    except SystemExit as stop:
        if stop.code:
            raise RuntimeError(f"ddpm fit ended with status {stop.code}") from None


def _main() -> None:
    parser = ArgumentParser(prog="ray_train", description="ddpm fit on Ray Train; all other options are those of fit.")
    parser.allow_abbrev = False
    parser.add_argument("--workers", type=int, required=True, help="number of processes")
    parser.add_argument("--gpu", action="store_true", help="each has a GPU")
    parser.add_argument("--storage", help="folder for Ray's own files")
    parser.add_argument("--max_failures", type=int, default=3, help="restarts at most (default: 3)")
    own, words = parser.parse_known_args()
    try:
        fit_on_ray(words, **vars(own))
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(end(error, "ray_train"))


if __name__ == "__main__":
    _main()

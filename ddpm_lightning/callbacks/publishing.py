"""Pictures, texts and options to whatever loggers a Trainer has."""

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from ddpm_lightning.runs import Run

__all__ = ["hparams_of", "publish_options", "publish_picture", "publish_text"]

_WARNED: WeakSet[Logger] = WeakSet()


def publish_picture(trainer: Trainer, tag: str, picture: Tensor, name: str, step: int | None = None) -> None:
    """Write a picture, uint8 ``[3, height, width]``, to RUN/``name``, and give it to each logger that takes pictures:
    TensorBoard, MLflow, Weights & Biases, and any with a ``log_image`` like that of Lightning's WandbLogger. CSVLogger
    has the file. Any other logger is named in one warning, and training goes on. For the first process alone.

    Args:
        trainer: whose run and loggers.
        tag: the picture's name in the loggers.
        picture: the picture.
        name: of the file, with its suffix.
        step: of the picture; None for the Trainer's.
    """
    Run.of(trainer).write(name, picture)
    step = trainer.global_step if step is None else step
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, picture, step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, _rows(picture), artifact_file=f"{tag}/{step:07d}.png")
        elif isinstance(logger, WandbLogger):
            logger.log_image(key=tag, images=[_rows(picture)], step=step)
        elif not isinstance(logger, CSVLogger):
            _try(logger, trainer, "log_image", key=tag, images=[_rows(picture)], step=step)


def _rows(picture: Tensor) -> Any:
    return picture.permute(1, 2, 0).numpy()


def publish_text(trainer: Trainer, tag: str, text: str) -> None:
    """Give a text, or a table as it is printed, to TensorBoard, MLflow, Weights & Biases, and any logger with a
    ``log_text`` like that of Lightning's WandbLogger. Otherwise as :func:`publish_picture`."""
    for logger in trainer.loggers:
        row: dict[str, Any] = {"key": tag, "columns": ["text"], "data": [[text]], "step": trainer.global_step}
        if isinstance(logger, TensorBoardLogger):
            # Markdown: four spaces keep lines and signs as they are
            logger.experiment.add_text(tag, "".join(f"    {line}\n" for line in text.splitlines()), trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{tag}.txt")
        elif isinstance(logger, WandbLogger):
            logger.log_text(**row)
        elif not isinstance(logger, CSVLogger):
            _try(logger, trainer, "log_text", **row)


def _try(logger: Logger, trainer: Trainer, method: str, **arguments: Any) -> None:
    """Call a method of a logger that this package does not know: whatever fails there stops no training."""
    reason = f"it has no {method} like that of Lightning's WandbLogger"
    if hasattr(logger, method):
        try:
            getattr(logger, method)(**arguments)
            return
        except Exception as error:
            reason = f"{method}: {type(error).__name__}: {error}"
    if logger not in _WARNED:
        _WARNED.add(logger)
        where = f"they are files in {Run.of(trainer).folder}"
        rank_zero_warn(f"{type(logger).__name__} cannot be given all pictures and tables ({reason}): {where}")


def publish_options(trainer: Trainer, options: dict[str, Any], metrics: list[str]) -> None:
    """Give options by name to all loggers as hyper-parameters. For the first process alone.

    TensorBoard compares runs by their options and the ``metrics``, names of scalars that need not be logged yet.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # log_hyperparams would log a value for each metric that has none yet
            writer = logger.experiment._get_file_writer()
            for summary in hparams_of(options, dict.fromkeys(metrics, 0.0)):
                writer.add_summary(summary, trainer.global_step)
        else:
            logger.log_hyperparams(options)


def hparams_of(options: Mapping[str, Any], metrics: Mapping[str, float]) -> tuple[Any, Any, Any]:
    """TensorBoard's three summaries of one row of its HPARAMS page: its columns, its options, and its end."""
    from torch.utils.tensorboard.summary import hparams

    plain = {name: v if isinstance(v, bool | int | float) else str(v) for name, v in options.items()}
    return hparams(plain, dict(metrics))

"""Pictures, texts and options to whatever loggers a Trainer has."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from torch import Tensor

from ddpm_lightning.runs import Run

__all__ = ["publish_options", "publish_picture", "publish_text"]


def publish_picture(trainer: Trainer, tag: str, picture: Tensor, name: str, step: int | None = None) -> None:
    """Write a picture, uint8 ``[3, height, width]``, to RUN/``name``, and give it to each logger that takes pictures:
    TensorBoard, MLflow, and any with a ``log_image`` like that of Lightning's WandbLogger. Other loggers, such as
    CSVLogger, have the file. For the first process alone.

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
        elif hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[_rows(picture)], step=step)


def _rows(picture: Tensor) -> Any:
    return picture.permute(1, 2, 0).numpy()


def publish_text(trainer: Trainer, tag: str, text: str) -> None:
    """Give a text, shown as it is, to TensorBoard and MLflow. For the first process alone."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # Markdown: four spaces keep lines and signs as they are
            logger.experiment.add_text(tag, "".join(f"    {line}\n" for line in text.splitlines()), trainer.global_step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_text(logger.run_id, text, f"{tag}.txt")


def publish_options(trainer: Trainer, options: dict[str, Any], metrics: list[str]) -> None:
    """Give options by name to all loggers as hyper-parameters. For the first process alone.

    TensorBoard compares runs by their options and the ``metrics``, names of scalars that need not be logged yet.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            # log_hyperparams would log a value for each metric that has none yet
            from torch.utils.tensorboard.summary import hparams

            plain = {name: v if isinstance(v, bool | int | float) else str(v) for name, v in options.items()}
            writer = logger.experiment._get_file_writer()
            for summary in hparams(plain, dict.fromkeys(metrics, 0.0)):
                writer.add_summary(summary, trainer.global_step)
        else:
            logger.log_hyperparams(options)

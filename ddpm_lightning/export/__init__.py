"""Trained models as files that need no checkpoint of ours, and for other libraries."""

from ddpm_lightning.export.files import load_model, save_model
from ddpm_lightning.export.graphs import export_onnx, export_program

__all__ = ["export_onnx", "export_program", "load_model", "save_model"]

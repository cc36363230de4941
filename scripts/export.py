#!/usr/bin/env python3
"""Write a run's averaged model for use elsewhere.

    python scripts/export.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt --to diffusers --out FOLDER

safetensors   one file, weights and parts: ddpm_lightning.export.load_model(FILE) is the DiffusionModel again
diffusers     a folder: diffusers' DDPMPipeline.from_pretrained(FOLDER), DDIMPipeline too; needs this package to load
onnx          the network alone, inputs x, t (and label), for any batch size
torch_export  the same as a .pt2 of torch.export

The last two know nothing of the schedule: t is the scalar that the model's conditioning gives its network.
"""

import argparse
import sys
from pathlib import Path

from ddpm_lightning.errors import InputError
from ddpm_lightning.export import export_onnx, export_program, save_model
from ddpm_lightning.runs import load_run
from ddpm_lightning.training import DiffusionModule

SUFFIXES = {"safetensors": ".safetensors", "onnx": ".onnx", "torch_export": ".pt2", "diffusers": ""}


def export(module: DiffusionModule, kind: str, out: Path) -> None:
    """Write the averaged model."""
    model = module.ema_model
    num_classes = module.num_classes if module.class_conditional else None
    if kind == "safetensors":
        save_model(model, out)
    elif kind == "onnx":
        export_onnx(model, out, module.shape, num_classes)
    elif kind == "torch_export":
        export_program(model, out, module.shape, num_classes)
    else:
        from ddpm_lightning.export.diffusers import to_pipeline

        to_pipeline(model, module.shape).save_pretrained(out)


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--to", choices=[*SUFFIXES], required=True, help="format")
    parser.add_argument("--out", type=Path, required=True, help="the file, or for diffusers the folder")
    arguments = parser.parse_args()
    if arguments.out.suffix != SUFFIXES[arguments.to]:
        parser.error(f"--out {arguments.out}: a {arguments.to} file ends in {SUFFIXES[arguments.to] or 'nothing'}")
    try:
        module, _ = load_run(arguments.config, arguments.ckpt_path)
        export(module, arguments.to, arguments.out)
    except InputError as error:
        print(f"export: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.to}: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""MNIST, bits/dim against training FLOPs: draws a table of measured points.

    python scripts/plot_likelihood.py --out docs/likelihood_flops.png

The table says for each model on which images the points were measured. Its points are [PFLOP, bits/dim, standard
error]; those of a line belong to one training, all others to a training each.
"""

import json
from pathlib import Path

from matplotlib.figure import Figure

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import drawn, save_png


def main(out: Path, table: Path = Path("docs/likelihood.json")) -> None:
    """Draw the points.

    Args:
        out: picture, a PNG
        table: JSON file, a list of {model, where, points}
    """
    if out.suffix != ".png":
        raise InputError(f"--out {out} must end in .png")
    if not table.is_file():
        raise InputError(f"--table {table} is no file: give one such as docs/likelihood.json")
    figure = Figure(figsize=(8, 5.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    try:
        for model in json.loads(table.read_text()):
            pflop, bits, errors = zip(*model["points"], strict=True)
            if model.get("line"):
                axes.plot(pflop, bits, label=f"{model['model']}; {model['where']}", lw=1, color="0.4")
            else:
                axes.errorbar(pflop, bits, errors, label=model["model"], marker="o", ms=4, capsize=2, ls="none")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"--table {table} is no list of {{model, where, points}}: {error}") from None
    axes.set(xscale="log", xlabel="PFLOP of training (forward and backward)", ylabel="bits/dim")
    figure.legend(loc="outside lower left", frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    save_png(drawn(figure), out)


if __name__ == "__main__":
    run_script(main, __doc__)

"""Trained models that come with the package, each a folder beside this file with a card that says what it is."""

from pathlib import Path

from ddpm_lightning.errors import InputError
from ddpm_lightning.pretrained.packing import Packed
from ddpm_lightning.runs import Run
from ddpm_lightning.training import GenerativeModule

__all__ = ["Packed", "lay_out_pretrained", "load_pretrained", "packed", "pretrained_names"]

_HERE = Path(__file__).parent


def pretrained_names() -> list[str]:
    """The names of the models."""
    return sorted(path.parent.name for path in _HERE.glob("*/weights.safetensors"))


def packed(name: str) -> Packed:
    """The folder of a model; InputError for a name that there is not."""
    if name not in pretrained_names():
        known = ", ".join(pretrained_names())
        raise InputError(f"there is no pretrained model {name or 'without a name'}: there are {known}")
    return Packed(_HERE / name)


def load_pretrained(name: str) -> GenerativeModule:
    """A model by its name: the module on the CPU, in evaluation mode. No file is written::

        module = load_pretrained("mnist")
        images = SampleRequest(sampler=DDIMSampler(), steps=50).on(module)(range(16))

    Raises:
        InputError: there is no model of this name; the message lists those that there are.
    """
    return packed(name).load()


def lay_out_pretrained(name: str) -> Run:
    """The run ``runs/pretrained/NAME`` in the current folder, made of a model (:meth:`Packed.lay_out`)."""
    return packed(name).lay_out(Path("runs", "pretrained", name))

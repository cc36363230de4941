"""What is answered before torch and Lightning are imported, which takes seconds: help, version, misspelt commands."""

import sys
from difflib import get_close_matches

from ddpm_lightning import __version__

__all__ = ["COMMANDS", "EVALUATIONS", "OPTIONS", "answered"]

COMMANDS = {
    "fit": "train; go on with a run",
    "validate": "the bound on the validation images",
    "test": "the bound on the test images, in a table",
    "predict": "the bound of every test image, in image_terms.csv",
    "sample": "draw images into samples.safetensors and samples.png",
    "evaluate": "measure a run: quality, ood, flow, forms, variance",
    "density": "log density of each row of a file, in density.csv",
    "reweight": "weigh samples to a target density: effective sample size, log Z, observables",
    "average": "the averaged weights of another width, after training with PowerAverages",
    "sweep": "train with many options, and find the best: docs/sweeps.md",
    "export": "write the model for use elsewhere: safetensors, diffusers, onnx, torch_export, web",
    "submit": "write the job of a run, or of another command, for SLURM; with --go queue it",
    "new": "start a project of your own: data, network, configuration, test",
}

_MAIN = f"""usage: ddpm COMMAND ...

{chr(10).join(f"  {name:<10} {what}" for name, what in COMMANDS.items())}

  ddpm fit -c configs/mnist.yaml         train; all files go into the run's folder, here runs/mnist
  ddpm test runs/mnist                   every command takes the folder of a run, which is called RUN
  ddpm sample runs/mnist --n 64
  ddpm sample --pretrained mnist         a trained model of the package in the place of RUN

  ddpm COMMAND --help                    the options that matter most
  ddpm COMMAND --help_all                all options
  ddpm --version
"""

_RUN = "RUN|--pretrained NAME"

Options = list[tuple[str, str]]

_FIT: Options = [
    ("-c, --config FILE", "a configuration; later ones and options change what earlier ones say"),
    ("--run_dir FOLDER", "where all files of the run go"),
    ("--ckpt_path last|best|FILE", "go on from a checkpoint"),
    ("--seed_everything N", "seed of the weights' start and of dropout"),
    ("", ""),
    ("--data CLASS", "Images, Fields, Digits, MNIST, FashionMNIST, CIFAR10, Ising, Phi4, or your own"),
    ("--data.batch_size N", "images of a step, of all processes together"),
    ("--data.path FOLDER", "of Images: your pictures; --data.size 32 crops and resizes them"),
    ("--data.root FOLDER", "of MNIST: the folder that holds MNIST/raw"),
    ("", ""),
    ("--model.schedule CLASS", "LinearChain, CosineChain, LinearGamma, LearnedGamma, ..."),
    ("--model.schedule.T N", "number of steps of the chain; every argument of a class is an option"),
    ("--model.network CLASS", "UNet, SimpleUNet, or your own"),
    ("--model.parameterization CLASS", "EpsParameterization, X0Parameterization, VParameterization, ..."),
    ("--model.variance CLASS", "FixedLargeVariance, FixedSmallVariance, LearnedRangeVariance, ..."),
    ("--model.decoder CLASS", "DiscretizedGaussian, CategoricalDecoder, PlainGaussian"),
    ("--model.objective CLASS", "NoiseMSE, WeightedMSE, NegativeElbo, ContinuousNegativeElbo, ..."),
    ("--model.optimizer CLASS", "of torch.optim; --model.optimizer.lr X"),
    ("--model.lr_scheduler CLASS", "of torch.optim.lr_scheduler"),
    ("--model.ema_decay X", "decay of the average of the weights"),
    ("--model.class_conditional true", "give the network the classes; --model.label_dropout 0.1 for guidance"),
    ("", ""),
    ("--trainer.max_epochs N", "or --trainer.max_steps N, --trainer.max_time DD:HH:MM:SS"),
    ("--trainer.precision P", "auto, 32-true, bf16-mixed, ..."),
    ("--trainer.accelerator A", "auto, cpu, gpu"),
    ("--trainer.devices N", "number of devices; --trainer.num_nodes N"),
    ("--trainer.accumulate_grad_batches N", "batches of an optimiser step"),
    ("--trainer.gradient_clip_val X", "longer gradients are scaled down to it"),
    ("", ""),
    ("--dry_run", "what a job would need: two steps, a table; --no_device_check for another machine"),
    ("--print_config", "the resolved configuration, and nothing is run"),
    ("--model.schedule.help CLASS", "the arguments of a class"),
]

_SAMPLE: Options = [
    ("--n N", "number of images: 64"),
    ("--seed N", "image k of a seed is the same whatever n, batch_size, number of processes"),
    ("--sampler CLASS", "AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler"),
    ("--steps N", "steps of the sampler; all T if left out"),
    ("--grid CLASS", "where the steps are: StridedGrid, LogSNRGrid, KarrasGrid"),
    ("--labels LIST", "classes of a class-conditional model, as '[3]' or '[0,1,2]'"),
    ("--guidance_scale X", "of classifier-free guidance: 1 is none"),
    ("--guide RUN|FILE", "a weaker model, which the samples are pushed away from; --guidance_scale X"),
    ("--interpolate_to SEED", "rows from one seed to another; --interpolation_columns N"),
    ("--known FILE", "inpainting: the image; --mask FILE: which of its pixels are known"),
    ("--inpainting CLASS", "ReplacementSampler, MomentMatchingSampler"),
    ("--batch_size N", "images at a time"),
    ("--out FOLDER", "for the files; the run's folder if left out"),
    ("--format safetensors|npz", "of the file of images"),
    ("--gif true", "an animation, too"),
    ("--ckpt_path last|best|FILE", "the checkpoint: last"),
]


def _bound(stage: str, bounds: str) -> Options:
    return [
        ("--ckpt_path last|best|FILE", "the checkpoint: last"),
        (f"--data.limit_{stage} N", "the first N images only"),
        ("--data.eval_batch_size N", "images at a time"),
        (f"--model.{bounds} LIST", "the forms, '[{class_path: DenoisingElbo, init_args: {steps: 10}}]'"),
        ("--model.eval_seed N", "seed of the noise"),
        ("--trainer.precision P", "the run's own, or 32-true, ..."),
        ("--trainer.devices N", "number of devices"),
    ]


OPTIONS = {
    "fit": _FIT,
    "validate": _bound("val", "validation_bounds"),
    "test": _bound("test", "test_bounds"),
    "predict": _bound("test", "test_bounds"),
    "sample": _SAMPLE,
}
"""The options that matter most, and what they are for."""

EVALUATIONS = {
    "quality": "how good the samples are: Frechet distance, precision, recall, nearest neighbours",
    "ood": "whether the bound tells test images from images of other kinds",
    "flow": "the density of the probability flow, beside the bound",
    "forms": "the three forms of the bound, step by step",
    "variance": "the analytic reverse variance",
}


def _screen(command: str) -> str:
    if command == "evaluate":
        lines = "\n".join(f"  {name:<10} {what}" for name, what in EVALUATIONS.items())
        return f"usage: ddpm evaluate WHAT {_RUN} [options]     (ddpm evaluate WHAT --help: its options)\n\n{lines}"
    usage = "RUN [options]\n       ddpm fit -c CONFIG.yaml [-c MORE.yaml ...]" if command == "fit" else _RUN
    rows = [*OPTIONS[command], ("", ""), ("--help_all", "all options")]
    return _table(f"usage: ddpm {command} {usage} [options]     {COMMANDS[command]}", rows)


def _table(head: str, rows: Options) -> str:
    return "\n".join([head, "", *(f"  {name:<36} {what}".rstrip() for name, what in rows)])


def answered(words: list[str]) -> bool:
    """Whether the words of a command line were answered here.

    Raises:
        SystemExit: a command that there is not, status 2.
    """
    command, asks = words[0] if words else "--help", bool({"-h", "--help"} & {*words[1:]})
    if command in ("-h", "--help"):
        print(_MAIN, end="")
    elif command == "--version":
        print(f"ddpm_lightning {__version__}")
    elif (command in OPTIONS and asks) or (command == "evaluate" and len(words) == 1 + asks):
        print(_screen(command))
    elif command not in COMMANDS and not command.startswith("-"):
        near = get_close_matches(command, COMMANDS, 1)
        meant = f"did you mean {near[0]}? " if near else ""
        print(f"ddpm: error: there is no command {command}: {meant}there are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    else:
        return False
    return True

"""The reference model: each pixel's grey level is predicted from those before it, and from nothing else."""

import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run_script
from mnist_files import DATA_DIR, real_mnist

sys.path.insert(0, str(ROOT / "scripts"))
from reference_pixelcnn import PixelCNN, nats

SIZE = 6


def test_a_pixel_depends_on_those_before_it_only() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 1, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    logits = PixelCNN(8, layers=6, levels=5).double()(x).flatten(2)
    for pixel in range(SIZE**2):
        (gradient,) = torch.autograd.grad(logits[0, :, pixel].sum(), x, retain_graph=True)
        seen = gradient.flatten() != 0
        assert not seen[pixel:].any()
        above = torch.arange(SIZE**2) // SIZE == pixel // SIZE - 1
        assert seen[above].any() or pixel < SIZE


def test_the_probabilities_of_all_images_sum_to_one() -> None:
    """Images of 1 x 2 pixels with 4 of the 256 levels possible at each: the sum over the second is exactly p(first)."""
    torch.manual_seed(0)
    model, device = PixelCNN(4, layers=2), torch.device("cpu")
    first = torch.tensor(7)
    images = torch.stack([torch.stack([first, torch.tensor(level)]) for level in range(256)]).view(256, 1, 1, 2)
    with torch.no_grad():
        joint = (-nats(model, images.to(torch.uint8), device)).double().logsumexp(0)
        logits = model(images[:1].float() / 127.5 - 1)
    # the network runs in bfloat16: a relative error of 2^-8 of logits below 1
    assert float(joint) == pytest.approx(float(logits[0, :, 0, 0].log_softmax(0)[7]), abs=0.01)


@real_mnist
@pytest.mark.cli
def test_the_script_reports_bits(tmp_path: Path) -> None:
    options = ["--pflop=1e-6", "--width=4", "--layers=2", "--images=20", f"--data_root={DATA_DIR}"]
    done = run_script("reference_pixelcnn.py", *options, "--batch_size=4", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "pixelcnn.json").read_text())
    assert 0 < row["bits_per_dim"] < 9 and row["images_seen"] == 4 * row["steps"]
    assert "pflop 0 must be positive" in run_script("reference_pixelcnn.py", "--pflop=0").stderr

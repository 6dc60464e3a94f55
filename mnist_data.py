"""MNIST as tensors: loaded, normalised, split for validation, and augmented."""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils import ScriptError

IMAGE_SIDE = 28  # pixels; with 32, images get a border of 2 black pixels, as LeNet-5 expects them
CLASSES = 10
ImageSet = tuple[Tensor, Tensor]  # images and their labels


def default_batch_size(device: torch.device) -> int:
    """Return the recipe's number of images in a training step."""
    return 64 if device.type == "cpu" else 128


def load_mnist(data_dir: str | Path, train: bool, device: torch.device) -> ImageSet:
    """Return the training or test images, normalised, and their labels, both on the device.

    Images are (N, 1, IMAGE_SIDE, IMAGE_SIDE), float32; labels are (N,), int64. Raises ScriptError
    if the files are missing or damaged.
    """
    folder = Path(data_dir, "MNIST", "raw")
    part = "train" if train else "t10k"
    try:
        # NumPy reads the files because torchvision takes as long to import as torch itself
        pixels = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8, offset=16)
        pixels = pixels.reshape(-1, 1, 28, 28)
        labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    except (OSError, ValueError) as error:
        raise ScriptError(
            f"cannot read MNIST in {folder}: {error}; run download_mnist.py first"
        ) from error
    images = normalize(torch.from_numpy(pixels).to(device))
    return images, torch.from_numpy(labels).to(device, torch.int64)


def normalize(pixels: Tensor) -> Tensor:
    """Return images (N, 1, IMAGE_SIDE, IMAGE_SIDE), float32, as the networks expect them.

    `pixels` (N, 1, H, H) are 0 to 255, white on black. They get a black border if IMAGE_SIDE is
    larger. Then the mean of MNIST's training pixels is subtracted, and their deviation divides.
    """
    border = (IMAGE_SIDE - pixels.shape[-1]) // 2
    return F.pad(pixels, [border] * 4).float().div_(255).sub_(0.1307).div_(0.3081)


def hold_out(images: Tensor, labels: Tensor, size: int) -> tuple[ImageSet, ImageSet]:
    """Split images (N, 1, H, W) with labels (N,) into a training and a validation set.

    The validation set takes the last images of each digit, `size` in all, each digit in proportion
    to its share of all. It is the same for every seed.
    """
    counts = labels.cpu().bincount(minlength=CLASSES)
    exact = counts.double() * size / len(labels)
    shares = exact.long()
    by_remainder = (shares - exact).argsort(stable=True)  # the largest first
    shares[by_remainder[: size - shares.sum()]] += 1

    kept = torch.ones_like(labels, dtype=torch.bool)
    for digit, share in enumerate(shares):
        positions = torch.where(labels == digit)[0]
        kept[positions[len(positions) - share :]] = False
    return (images[kept], labels[kept]), (images[~kept], labels[~kept])


def augment(images: Tensor) -> Tensor:
    """Return square images (N, 1, H, H), each rotated, sheared, scaled and shifted at random.

    By up to 10 degrees, 10 degrees, 10 % and 3 pixels. Pixels from outside repeat the edge. The
    interpolation is bicubic because bilinear interpolation blurs thin strokes.
    """
    count = len(images)
    most = math.radians(10)
    angle, shear = images.new_empty(2, count).uniform_(-most, most)
    scale = images.new_empty(count, 1, 2).uniform_(0.9, 1.1)
    shift = images.new_empty(count, 2, 1).uniform_(-3, 3)
    shift /= images.shape[-1] / 2  # because affine_grid puts the edges at -1 and 1

    # Rotation plus shear, not rotation times shear: for small angles they differ little, and the
    # README's figures were measured with the sum
    cosine = angle.cos()
    sine = angle.sin()
    matrix = torch.stack([cosine, shear.tan() - sine, sine, cosine], 1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([matrix * scale, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(
        images,
        grid,
        "bicubic",
        padding_mode="border",
        align_corners=False,
    )

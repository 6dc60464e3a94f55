"""The pictures that the scripts draw when asked, with matplotlib, which is an optional package."""

import importlib.util
import io
import itertools
import math
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from utils import ScriptError, write_file


def require_matplotlib() -> None:
    """Raise ScriptError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ScriptError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        )


def draw_curves(path: Path, history: list[dict], title: str) -> None:
    """Draw loss and error of each epoch, a dict of the history, as PNG; raise ScriptError if that fails."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    figure.suptitle(f"{title}: loss and error of each epoch")
    epochs = [row["epoch"] for row in history]
    for axes, quantity in zip(figure.subplots(1, 2), ("loss", "error, %"), strict=True):
        for part in ("train", "val", "test"):
            if history[0][f"{part}_loss"] is not None:
                losses = [row[f"{part}_loss"] for row in history]
                errors = [100 - row[f"{part}_accuracy"] for row in history]
                axes.plot(epochs, losses if quantity == "loss" else errors, marker=".", label=part)
        axes.set(xlabel="epoch", ylabel=quantity, yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend()
    save_figure(path, figure)


def draw_receptive_fields(
    path: Path, image: Tensor, blocks: dict[str, dict[str, int]], maps: dict[str, Tensor]
) -> None:
    """Draw, as PNG, what the centre unit after each block sees of an image, and below it the block's maps.

    The image is (1, 1, H, W). A block has the pixels `top`, `left`, `height` and `width` of the rectangle, and its
    feature maps are (C, h, w), or missing. Raises ScriptError if the file cannot be written.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from torchvision.utils import make_grid

    figure = Figure(figsize=(2.4 * len(blocks), 5.2), layout="constrained")
    columns = figure.subplots(2, len(blocks), squeeze=False).T
    for (axes, below), (name, field) in zip(columns, blocks.items(), strict=True):
        axes.imshow(image[0, 0].cpu().numpy(), cmap="gray")
        corner = field["left"] - 0.5, field["top"] - 0.5  # a pixel's centre has its whole numbers
        axes.add_patch(
            Rectangle(corner, field["width"], field["height"], fill=False, color="red", linewidth=2)
        )
        axes.set_title(f"{name}: {field['height']}x{field['width']}", fontsize=9)
        axes.set(
            xlim=(-0.5, image.shape[3] - 0.5), ylim=(image.shape[2] - 0.5, -0.5)
        )  # the image, no more
        axes.set_axis_off()
        below.set_axis_off()
        if name in maps:
            count, height, width = maps[name].shape
            large = F.interpolate(
                maps[name][:, None], scale_factor=max(1, 24 // max(height, width))
            )
            below.imshow(make_grid(large, math.ceil(count**0.5), pad_value=math.nan)[0].numpy())
            below.set_title(f"{count} maps of {height}x{width}", fontsize=9)
    save_figure(path, figure)


def draw_mistakes(path: Path, images: Tensor, titles: list[str]) -> None:
    """Draw images (N, 1, 28, 28), at most 40, under their titles, as PNG; raise ScriptError if that fails."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, image, title in itertools.zip_longest(figure.subplots(5, 8).flat, images, titles):
        axes.set_axis_off()
        if image is not None:
            axes.imshow(image[0].cpu().numpy(), cmap="gray")
            axes.set_title(title, fontsize=8)
    save_figure(path, figure)


def save_figure(path: Path, figure: object) -> None:
    """Write a matplotlib Figure as PNG; raise ScriptError if that fails."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_file(path, picture.getvalue())

"""Pictures that the scripts draw when asked, most with matplotlib, an optional package."""

import contextlib
import importlib.util
import io
import math
import textwrap
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageDraw
from torch import Tensor

from utils import ScriptError, write_file


def require_matplotlib(path: Path | None = None) -> None:
    """Raise ScriptError if matplotlib is not installed or a picture cannot have that path."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ScriptError(
            "drawing needs matplotlib, which is not installed: pip install matplotlib"
        )
    if path and (path.is_dir() or not path.parent.is_dir()):
        raise ScriptError(f"cannot write {path}: name a file in a folder that exists")


@contextlib.contextmanager
def png_figure(path: Path, width: float, height: float):
    """Give a matplotlib Figure, in inches, and write it as PNG once it is drawn.

    Raises ScriptError if the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    yield figure
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_file(path, picture.getvalue())


def draw_curves(path: Path, history: list[dict], title: str) -> None:
    """Draw loss and error of each epoch, which is a dict of the history, as PNG.

    Raises ScriptError if the file cannot be written.
    """
    with png_figure(path, 10, 4) as figure:
        figure.suptitle(f"{title}: loss and error of each epoch")
        left, right = figure.subplots(1, 2)
        epochs = [row["epoch"] for row in history]
        for part in "train", "val", "test":
            if history[0][f"{part}_loss"] is not None:
                losses = [row[f"{part}_loss"] for row in history]
                errors = [100 - row[f"{part}_accuracy"] for row in history]
                left.plot(epochs, losses, marker=".", label=part)
                right.plot(epochs, errors, marker=".", label=part)
        label_curves(left, "loss")
        label_curves(right, "error, %")


def draw_comparison(path: Path, lines: list[dict]) -> None:
    """Draw the test error by epoch of each line of compare_runs.py's table, mean and range, as PNG.

    A line has the `history` of each of its `runs`. Raises ScriptError if the file cannot be
    written.
    """
    from matplotlib import colormaps

    with png_figure(path, 10, 6) as figure:
        axes = figure.subplots()
        shades = np.linspace(0.05, 0.95, len(lines))
        axes.set_prop_cycle(color=colormaps["turbo"](shades))
        for line in lines:
            histories = [run["history"] for run in line["runs"].values()]
            accuracies = [[row["test_accuracy"] for row in history] for history in histories]
            errors = 100 - np.array(accuracies)  # (runs, epochs)
            epochs = range(1, errors.shape[1] + 1)
            words = [line["model"], *line["options"]]
            label = textwrap.shorten(", ".join(words), 90)
            label = label.replace("$", r"\$")  # which would start a formula
            axes.plot(epochs, errors.mean(0), marker=".", label=label)
            axes.fill_between(epochs, errors.min(0), errors.max(0), alpha=0.2)
        label_curves(axes, "test error, %: mean and range over the seeds")


def label_curves(axes: object, ylabel: str) -> None:
    """Give a matplotlib Axes of curves by epoch a logarithmic scale, labels and a legend."""
    axes.set(xlabel="epoch", ylabel=ylabel, yscale="log")
    axes.locator_params("x", integer=True, min_n_ticks=1)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()


def draw_receptive_fields(
    path: Path, image: Tensor, blocks: dict[str, dict[str, int]], maps: dict[str, Tensor]
) -> None:
    """Draw, as PNG, what the centre unit after each block sees of an image, and the block's maps.

    The image is (1, 1, H, W). A block has the pixels `top`, `left`, `height` and `width` of the
    rectangle. Its feature maps, drawn below it, are (C, h, w) or missing. Raises ScriptError if
    the file cannot be written.
    """
    from matplotlib.patches import Rectangle

    with png_figure(path, 2.4 * len(blocks), 5.2) as figure:
        above, below = figure.subplots(2, len(blocks), squeeze=False)
        for axes, maps_axes, name in zip(above, below, blocks, strict=True):
            field = blocks[name]
            corner = field["left"] - 0.5, field["top"] - 0.5  # pixel 0 reaches from -0.5 to 0.5
            size = field["width"], field["height"]
            axes.imshow(image[0, 0].cpu().numpy(), cmap="gray")
            axes.autoscale(False)  # show the image and no more
            axes.add_patch(Rectangle(corner, *size, fill=False, color="red", linewidth=2))
            axes.set_title(f"{name}: {field['height']}x{field['width']}", fontsize=9)
            axes.set_axis_off()
            maps_axes.set_axis_off()
            if name in maps:
                draw_maps(maps_axes, maps[name])


def draw_maps(axes: object, maps: Tensor) -> None:
    """Draw a block's feature maps (C, H, W) side by side on a matplotlib Axes."""
    from torchvision.utils import make_grid

    count, height, width = maps.shape
    columns = math.ceil(count**0.5)
    grid = make_grid(maps[:, None], columns, padding=1, pad_value=math.nan)
    axes.imshow(grid[0].numpy())
    axes.set_title(f"{count} maps of {height}x{width}", fontsize=9)


def draw_mistakes(path: Path, images: Tensor, labels: Tensor, probabilities: Tensor) -> None:
    """Draw the first 40 images (N, 1, H, W), under their labels and what a model reads, as PNG.

    `labels` are (N,) and `probabilities` (N, CLASSES). Raises ScriptError if the file cannot be
    written.
    """
    with png_figure(path, 10, 7) as figure:
        for i, axes in enumerate(figure.subplots(5, 8).flat):
            axes.set_axis_off()
            if i < len(images):
                axes.imshow(images[i, 0].cpu().numpy(), cmap="gray")
                share, name = probabilities[i].max(0)
                title = f"{labels[i]} read as {name}, {share:.0%}"
                axes.set_title(title, fontsize=8)


def draw_boxes(picture: ndarray, digits: list[dict]) -> Image.Image:
    """Return a picture, (H, W, 3) in 0..1, with a box at each digit and the digit's name above it.

    The digits are those of predict_digits.read_digits.
    """
    pixels = np.uint8(255 * picture)
    image = Image.fromarray(pixels)
    pen = ImageDraw.Draw(image)
    for digit in digits:
        left, top, right, bottom = digit["box"] * (image.size * 2)  # from shares to pixels
        pen.rectangle((left, top, right, bottom), outline="red")
        pen.text((left, max(0, top - 12)), digit["name"], "red")
    return image

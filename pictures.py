"""The pictures that the scripts draw when asked, with matplotlib, which is an optional package."""

import importlib.util
import io
from pathlib import Path

from utils import ScriptError, write_file


def require_matplotlib() -> None:
    """Raise ScriptError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ScriptError("drawing needs matplotlib, which is not installed: pip install matplotlib")


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
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_file(path, picture.getvalue())

"""The pictures: the curves of a run, a model's mistakes, and the error without matplotlib."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

import pictures
from pictures import draw_curves, draw_mistakes, require_matplotlib, save_figure
from utils import ScriptError


@pytest.fixture
def draw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    """Return a function that draws a picture and returns its matplotlib Figure."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def draw(draw_picture: Callable, *options: object) -> object:
        figures = []
        monkeypatch.setattr(pictures, "save_figure", lambda path, figure: figures.append(figure))
        draw_picture(tmp_path, *options)
        (figure,) = figures
        save_figure(tmp_path / "a.png", figure)
        picture = Image.open(tmp_path / "a.png")
        assert picture.format == "PNG"
        assert picture.size == tuple(150 * figure.get_size_inches())
        return figure

    return draw


def make_history(epochs: int, parts: list[str], accuracy: float) -> list[dict]:
    """Return a run's history; an accuracy above 100 % counts as 100 %."""
    history = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "val_loss": None, "val_accuracy": None}
        for number, part in enumerate(parts):
            row[f"{part}_loss"] = (1 + number) / epoch
            row[f"{part}_accuracy"] = min(accuracy + number, 100.0)
        history.append(row)
    return history


# matplotlib warns where no epoch has an error
@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("parts", [["train", "test"], ["train", "val", "test"]])
@pytest.mark.parametrize(("epochs", "accuracy"), [(20, 90.0), (1, 90.0), (3, 99.0), (2, 100.0)])
def test_curves(epochs: int, accuracy: float, parts: list[str], draw: Callable) -> None:
    history = make_history(epochs, parts, accuracy)
    figure = draw(draw_curves, history, "Model5")
    assert figure.get_suptitle() == "Model5: loss and error of each epoch"
    losses, errors = figure.axes
    assert losses.get_ylabel() == "loss"
    assert errors.get_ylabel() == "error, %"
    for axes in figure.axes:
        assert axes.get_xlabel() == "epoch"
        assert axes.get_yscale() == "log"
        legend = axes.get_legend().get_texts()
        assert [text.get_text() for text in legend] == parts
        assert all(tick == int(tick) for tick in axes.get_xticks())
        for line in axes.lines:
            assert list(line.get_xdata()) == [row["epoch"] for row in history]
    for number, part in enumerate(parts):
        loss = losses.lines[number].get_ydata()
        error = errors.lines[number].get_ydata()
        assert list(loss) == [row[f"{part}_loss"] for row in history]
        assert list(error) == [100 - row[f"{part}_accuracy"] for row in history]


@pytest.mark.parametrize("count", [0, 2, 41])
def test_mistakes(count: int, draw: Callable) -> None:
    probabilities = torch.tensor([0.25, 0.75]).repeat(count, 1)
    labels = torch.zeros(count, dtype=torch.int64)
    images = torch.zeros(count, 1, 28, 28)
    figure = draw(draw_mistakes, images, labels, probabilities)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == (["0 read as 1, 75%"] * count + [""] * 40)[:40]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
        require_matplotlib()

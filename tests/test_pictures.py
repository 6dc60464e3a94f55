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
    """Return a function that returns the matplotlib Figure that is drawn, and its PNG's size."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    def draw(draw_picture: Callable, *options: object) -> tuple:
        figures = []
        monkeypatch.setattr(pictures, "save_figure", lambda path, figure: figures.append(figure))
        draw_picture(tmp_path, *options)
        save_figure(tmp_path / "a.png", *figures)
        picture = Image.open(tmp_path / "a.png")
        assert picture.format == "PNG"
        return figures[0], picture.size

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
    figure, size = draw(draw_curves, history, "Model5")
    assert size == (1500, 600)
    assert figure.get_suptitle() == "Model5: loss and error of each epoch"
    losses, errors = figure.axes
    assert (losses.get_ylabel(), errors.get_ylabel()) == ("loss", "error, %")
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_yscale()) == ("epoch", "log")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == parts
        assert all(tick == int(tick) for tick in axes.get_xticks())
        for part, line in zip(parts, axes.lines, strict=True):
            assert line.get_label() == part
            assert list(line.get_xdata()) == [row["epoch"] for row in history]
            drawn = list(line.get_ydata())
            if axes is losses:
                assert drawn == [row[f"{part}_loss"] for row in history]
            else:
                assert drawn == [100 - row[f"{part}_accuracy"] for row in history]


@pytest.mark.parametrize(("count", "shown"), [(0, 0), (2, 2), (41, 40)])
def test_mistakes(count: int, shown: int, draw: Callable) -> None:
    probabilities = torch.tensor([0.25, 0.75]).repeat(count, 1)
    labels = torch.zeros(count, dtype=torch.int64)
    figure, size = draw(draw_mistakes, torch.zeros(count, 1, 28, 28), labels, probabilities)
    assert size == (1500, 1050)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["0 read as 1, 75%"] * shown + [""] * (40 - shown)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
        require_matplotlib()

"""The pictures: the curves of a run, a model's mistakes, and the error without matplotlib."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from pictures import draw_curves, draw_mistakes, require_matplotlib
from utils import ScriptError


@pytest.fixture
def draw(tmp_path):
    """Return a function that draws a picture and returns its matplotlib Figure."""
    module = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    savefig = module.Figure.savefig

    def draw(draw_picture, *options):
        with patch.object(module.Figure, "savefig", autospec=True, side_effect=savefig) as save:
            draw_picture(tmp_path / "a.png", *options)
        (figure,) = save.call_args.args[:1]
        picture = Image.open(tmp_path / "a.png")
        assert picture.format == "PNG"
        assert picture.size == tuple(150 * figure.get_size_inches())
        return figure

    return draw


# matplotlib warns where no epoch has an error
@pytest.mark.filterwarnings("ignore:Data has no positive values")
@pytest.mark.parametrize("parts", [["train", "test"], ["train", "val", "test"]])
@pytest.mark.parametrize("losses", [[2.0] * 20, [1.0], [1.0, 0.5, 0.0], [0.0, 0.0]])
def test_curves(losses, parts, draw):
    history = []
    for epoch, loss in enumerate(losses, 1):
        row = {"epoch": epoch, "val_loss": None, "val_accuracy": None}
        for times, part in enumerate(parts, 1):
            row[f"{part}_loss"] = times * loss
            row[f"{part}_accuracy"] = 100 - 10 * times * loss
        history.append(row)
    figure = draw(draw_curves, history, "Model5")
    assert figure.get_suptitle() == "Model5: loss and error of each epoch"
    for axes, label, scale in zip(figure.axes, ("loss", "error, %"), (1, 10), strict=True):
        words = axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()
        assert words == ("epoch", label, "log")
        legend = axes.get_legend().get_texts()
        assert [text.get_text() for text in legend] == parts
        assert all(tick == int(tick) for tick in axes.get_xticks())
        for times, line in enumerate(axes.lines, 1):
            points = [[epoch, scale * times * loss] for epoch, loss in enumerate(losses, 1)]
            assert line.get_xydata().tolist() == points


@pytest.mark.parametrize("count", [0, 2, 41])
def test_mistakes(count, draw):
    probabilities = torch.tensor([0.25, 0.75]).repeat(count, 1)
    labels = torch.zeros(count, dtype=torch.int64)
    images = torch.zeros(count, 1, 28, 28)
    figure = draw(draw_mistakes, images, labels, probabilities)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == (["0 read as 1, 75%"] * count + [""] * 40)[:40]


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
        require_matplotlib()


def test_a_path_that_cannot_be_written(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    monkeypatch.chdir(tmp_path)
    for good in ("a.png", tmp_path / "a.png"):
        require_matplotlib(Path(good))
    for bad in ("a/b.png", ".", "/", tmp_path):
        message = f"^cannot write {bad}: name a file in a folder that exists$"
        with pytest.raises(ScriptError, match=message):
            require_matplotlib(Path(bad))

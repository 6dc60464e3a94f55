"""The pictures: the curves of a run, and the error where matplotlib is missing."""

import sys
from pathlib import Path

import pytest
from PIL import Image

from pictures import draw_curves, require_matplotlib
from utils import ScriptError


def make_history(epochs: int, parts: list[str], accuracy: float) -> list[dict]:
    """Return a run's history; an accuracy above 100 % counts as 100 %."""
    history = [
        {"epoch": epoch, "val_loss": None, "val_accuracy": None} for epoch in range(1, epochs + 1)
    ]
    for row in history:
        row |= {f"{part}_loss": (1 + number) / row["epoch"] for number, part in enumerate(parts)}
        row |= {
            f"{part}_accuracy": min(accuracy + number, 100.0) for number, part in enumerate(parts)
        }
    return history


@pytest.mark.filterwarnings(
    "ignore:Data has no positive values"
)  # matplotlib's, where no epoch has an error
@pytest.mark.parametrize("parts", [["train", "test"], ["train", "val", "test"]])
@pytest.mark.parametrize(("epochs", "accuracy"), [(20, 90.0), (1, 90.0), (3, 99.0), (2, 100.0)])
def test_curves(
    epochs: int, accuracy: float, parts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_class = pytest.importorskip(
        "matplotlib.figure", reason="matplotlib is not installed"
    ).Figure
    drawn, save = [], figure_class.savefig

    def savefig(self: object, *args: object, **options: object) -> None:
        drawn.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(figure_class, "savefig", savefig)
    history = make_history(epochs, parts, accuracy)
    draw_curves(tmp_path / "curves.png", history, "Model5")
    picture = Image.open(tmp_path / "curves.png")
    assert (picture.format, picture.size) == ("PNG", (1500, 600))
    (figure,) = drawn
    assert figure.get_suptitle() == "Model5: loss and error of each epoch"
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "error, %"]
    for axes in figure.axes:
        assert (axes.get_xlabel(), axes.get_yscale()) == ("epoch", "log")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == parts
        assert [list(line.get_xdata()) for line in axes.lines] == [
            list(range(1, epochs + 1))
        ] * len(parts)
        assert all(tick == int(tick) for tick in axes.get_xticks())
    for part, losses, errors in zip(parts, *(axes.lines for axes in figure.axes), strict=True):
        assert losses.get_label() == errors.get_label() == part
        assert list(losses.get_ydata()) == [row[f"{part}_loss"] for row in history]
        assert list(errors.get_ydata()) == [100 - row[f"{part}_accuracy"] for row in history]


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
        require_matplotlib()

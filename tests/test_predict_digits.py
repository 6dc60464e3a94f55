"""The trained model at work: the test set's mistakes, and the script's lines and errors."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FILES
from PIL import Image
from pytest import CaptureFixture, MonkeyPatch, raises
from torch import nn

import models
import predict_digits
from checkpoints import BEST
from predict_digits import format_mistakes, read_digit, worst_mistakes
from utils import ScriptError


@pytest.fixture
def predict(
    trained: tuple[Path, str], tiny_data: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> Callable:
    """Return a function that gives the script's output and errors with the given options."""

    def run(*options: object) -> tuple[str, str]:
        command = ["predict_digits.py", "--device", "cpu", "--data-dir", tiny_data]
        command += ["--checkpoint", trained[0] / BEST, *options]
        monkeypatch.setattr("sys.argv", list(map(str, command)))
        predict_digits.main()
        return capsys.readouterr()

    return run


def draw_line(path: Path) -> Path:
    image = Image.new("L", (90, 90), 255)
    image.paste(0, (43, 20, 48, 70))
    image.save(path, "PNG")
    return path


def test_mistakes_counted_by_hand() -> None:
    labels = torch.tensor([3, 3, 7, 1, 0])
    logits = torch.zeros(5, 10)
    for image, (digit, logit) in enumerate([(3, 5.0), (8, 2.0), (1, 9.0), (1, 1.0), (0, 1.0)]):
        logits[image, digit] = logit
    worst = worst_mistakes(logits, labels)
    assert worst == [2, 1]
    lines = format_mistakes(logits, labels, worst).splitlines()
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "accuracy 60.00 %, 2 of 5 wrong"
    assert words[2] == "label as 0 as 1 as 2 as 3 as 4 as 5 as 6 as 7 as 8 as 9 wrong"
    assert words[6] == "3 . . . 1 . . . . 1 . 1"
    assert words[10] == "7 . 1 . . . . . . . . 1"
    assert words[-2:] == ["2 7 1 99.9% 9.00", "1 3 8 45.1% 2.80"]
    assert len({len(line) for line in lines[2:13]}) == 1  # the columns are aligned
    assert len({len(line) for line in lines[14:]}) == 1


def test_the_test_set(predict: Callable, trained: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, errors = predict("--plot", tmp_path / "mistakes.png")
    path = trained[0] / BEST
    accuracy = torch.load(path, weights_only=True)["test_accuracy"]
    assert output.startswith(f"Model5 of {path} on the test set: accuracy {accuracy:.2f} %, ")
    matrix = output.replace(".", "0").splitlines()[3:13]
    right = sum(int(line.split()[1 + digit]) for digit, line in enumerate(matrix))
    assert right == round(accuracy)  # of 100 images
    assert errors == ""
    assert (tmp_path / "mistakes.png").exists()


def test_pictures(predict: Callable, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    data = bytearray(TINY_FILES["t10k-images-idx3-ubyte"])
    pixels = np.frombuffer(data, np.uint8, 784, 16).reshape(28, 28)
    label = TINY_FILES["t10k-labels-idx1-ubyte"][8]
    answers = {"one.png": (pixels, ""), "two.png": (pixels, "unsure: two")}
    monkeypatch.setattr(predict_digits, "read_picture", lambda path: path.name)
    monkeypatch.setattr(predict_digits, "prepare_digit", answers.get)
    output, errors = predict(*answers, "--save-prepared", tmp_path / "new" / "seen")
    first, second = output.splitlines()
    assert re.fullmatch(rf"one\.png: {label} \(\d+\.\d%\), then \d \(\d+\.\d%\)", first)
    assert second == f"two.png: unsure: two; perhaps {label}"
    assert errors == ""
    for name in ("1_one_28x28.png", "2_two_28x28.png"):
        picture = Image.open(tmp_path / "new" / "seen" / name)
        assert picture.mode == "L"
        assert (np.asarray(picture) == pixels).all()


def test_own_class(
    predict: Callable, trained: tuple[Path, str], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    class Own(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Flatten(), nn.Linear(784, 10))

    monkeypatch.setattr(models, "model_classes", lambda: {"Own": Own})
    model = Own()
    path = tmp_path / "own.pth"
    checkpoint = torch.load(trained[0] / BEST, weights_only=True)
    checkpoint |= {"model_name": "Own", "model_state_dict": model.state_dict()}
    torch.save(checkpoint | {"architecture": str(model)}, path)
    picture = draw_line(tmp_path / "one.png")
    output, _ = predict("--checkpoint", path, picture, "--test-set")
    probabilities = read_digit(model, picture)["probabilities"]
    best = max(probabilities)
    assert output.startswith(f"{picture}: {probabilities.index(best)} ({best:.1%}), then ")
    assert f"\nOwn of {path} on the test set: accuracy " in output


def test_the_page_is_served_last(predict: Callable, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(
        predict_digits, "serve_page", lambda read, port: print("page on port", port)
    )
    output, _ = predict("--test-set", "--draw", "--port", 1)
    assert "on the test set: accuracy " in output
    assert output.endswith("\npage on port 1\n")
    assert predict("--draw", "--data-dir", "none") == ("page on port 0\n", "")


def test_a_bad_picture_stops_no_other(
    predict: Callable, tmp_path: Path, capsys: CaptureFixture
) -> None:
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    draw_line(tmp_path / f"{'a' * 250}")  # too long with what --save-prepared adds
    draw_line(tmp_path / "good\x1b[2J")
    names = ["empty.png", "a" * 250, "good\x1b[2J", "none\x1b[2J"]
    with raises(SystemExit, match="1"):
        predict(*(tmp_path / name for name in names), "--save-prepared", tmp_path)
    output, errors = capsys.readouterr()
    empty, unsaved, none = errors.splitlines()
    start = f"predict_digits.py: error: {tmp_path}"
    assert empty.startswith(f"{start}/empty.png: no ink in lines")
    assert unsaved.startswith(f"{start}/{'a' * 250}: ") and "name too long" in unsaved
    assert none.startswith(f"{start}/none") and "cannot be read: No such file" in none
    assert output.startswith(f"{tmp_path}/good") and output.count("\n") == 1
    for line in (none, output):  # a terminal would obey the escape character
        assert r"\x1b" in line and "\x1b" not in line


def test_what_cannot_be_used(predict: Callable, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    missing = tmp_path / "a.pth"
    with raises(ScriptError, match=rf"^there is no {missing}: first train a model: python "):
        predict("--checkpoint", missing)
    with raises(ScriptError, match=rf"^cannot read MNIST in {tmp_path}/.*; run download_mnist\.py"):
        predict("--data-dir", tmp_path)
    monkeypatch.setattr(models.Model5, "forward", lambda self, x: torch.ones(len(x), 10) / 0)
    message = (
        "^Model5 fails on 28x28 images: it does not return 10 finite numbers for each; fix it$"
    )
    with raises(ScriptError, match=message):
        predict()

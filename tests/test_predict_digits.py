"""The trained model at work: the test set's mistakes, and the script's lines and errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FILES, split_options
from PIL import Image
from pytest import raises
from torch import nn

import models
import predict_digits
from checkpoints import BEST
from predict_digits import find_mistakes, read_digit
from utils import ScriptError

# As printed for the logits of the test
MISTAKES = """accuracy 60.00 %, 2 of 5 wrong

label   as 0   as 1   as 2   as 3   as 4   as 5   as 6   as 7   as 8   as 9  wrong
    0      1      .      .      .      .      .      .      .      .      .      0
    1      .      1      .      .      .      .      .      .      .      .      0
    2      .      .      .      .      .      .      .      .      .      .      0
    3      .      .      .      1      .      .      .      .      1      .      1
    4      .      .      .      .      .      .      .      .      .      .      0
    5      .      .      .      .      .      .      .      .      .      .      0
    6      .      .      .      .      .      .      .      .      .      .      0
    7      .      1      .      .      .      .      .      .      .      .      1
    8      .      .      .      .      .      .      .      .      .      .      0
    9      .      .      .      .      .      .      .      .      .      .      0

index  label  read as  probability    loss
    2      7        1        99.9%    9.00
    1      3        8        45.1%    2.80"""


@pytest.fixture
def best(trained):
    return trained[0] / BEST


@pytest.fixture
def predict(best, tiny_data, monkeypatch, capsys):
    """Return a function that gives the script's output and errors with the given options."""

    def run(*options):
        usual = "--device cpu --data-dir", tiny_data, "--checkpoint", best
        monkeypatch.setattr("sys.argv", split_options("predict_digits.py", *usual, *options))
        predict_digits.main()
        return capsys.readouterr()

    return run


def draw_line(path: Path) -> Path:
    image = Image.new("L", (90, 90), 255)
    image.paste(0, (43, 20, 48, 70))
    image.save(path, "PNG")
    return path


def test_mistakes_counted_by_hand():
    labels = torch.tensor([3, 3, 7, 1, 0])
    logits = torch.zeros(5, 10)
    for image, (digit, logit) in enumerate([(3, 5.0), (8, 2.0), (1, 9.0), (1, 1.0), (0, 1.0)]):
        logits[image, digit] = logit
    assert find_mistakes(logits, labels) == ([2, 1], MISTAKES)


def test_the_test_set(predict, best, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, errors = predict("--plot", tmp_path / "mistakes.png")
    accuracy = torch.load(best, weights_only=True)["test_accuracy"]
    assert output.startswith(f"Model5 of {best} on the test set: accuracy {accuracy:.2f} %, ")
    matrix = output.replace(".", "0").splitlines()[3:13]
    right = sum(int(line.split()[1 + digit]) for digit, line in enumerate(matrix))
    assert right == round(accuracy)  # of 100 images
    assert errors == ""
    assert (tmp_path / "mistakes.png").exists()


def test_pictures(predict, tmp_path, monkeypatch):
    data = bytearray(TINY_FILES["t10k-images-idx3-ubyte"])
    pixels = np.frombuffer(data, np.uint8, 784, 16).reshape(28, 28)
    label = TINY_FILES["t10k-labels-idx1-ubyte"][8]
    answers = {"one.png": (pixels, ""), "two.png": (pixels, "unsure: two")}
    monkeypatch.setattr(predict_digits, "read_picture", lambda path: path.name)
    monkeypatch.setattr(predict_digits, "prepare_digit", answers.get)
    seen = tmp_path / "new" / "seen"
    output, errors = predict(*answers, "--save-prepared", seen)
    first, second = output.splitlines()
    assert re.fullmatch(rf"one\.png: {label} \(\d+\.\d%\), then \d \(\d+\.\d%\)", first)
    assert second == f"two.png: unsure: two; perhaps {label}"
    assert errors == ""
    for name in ("1_one_28x28.png", "2_two_28x28.png"):
        picture = Image.open(seen / name)
        assert picture.mode == "L"
        assert (np.asarray(picture) == pixels).all()


def test_own_class(predict, best, tmp_path, monkeypatch):
    class Own(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(784, 10))

    monkeypatch.setattr(models, "model_classes", lambda: {"Own": Own})
    model = Own()
    path = tmp_path / "own.pth"
    checkpoint = torch.load(best, weights_only=True)
    checkpoint |= {"model_name": "Own", "model_state_dict": model.state_dict()}
    torch.save(checkpoint | {"architecture": str(model)}, path)
    picture = draw_line(tmp_path / "one.png")
    output, _ = predict("--checkpoint", path, picture, "--test-set")
    probabilities = read_digit(model, picture)["probabilities"]
    share = max(probabilities)
    assert output.startswith(f"{picture}: {probabilities.index(share)} ({share:.1%}), then ")
    assert f"\nOwn of {path} on the test set: accuracy " in output


def test_the_page_is_served_last(predict, monkeypatch):
    monkeypatch.setattr(predict_digits, "serve_page", lambda _, port: print("page on port", port))
    output, _ = predict("--test-set --draw --port 1")
    assert "on the test set: accuracy " in output
    assert output.endswith("\npage on port 1\n")
    assert predict("--draw --data-dir none") == ("page on port 0\n", "")


def test_a_bad_picture_stops_no_other(predict, tmp_path, capsys):
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    long = draw_line(tmp_path / ("a" * 250))  # too long with what --save-prepared adds
    good = draw_line(tmp_path / "good\x1b[2J")
    names = tmp_path / "empty.png", long, good, tmp_path / "none\x1b[2J"
    with raises(SystemExit, match="1"):
        predict(*names, "--save-prepared", tmp_path)
    output, errors = capsys.readouterr()
    start = f"predict_digits.py: error: {tmp_path}"
    # A terminal would obey the escape character
    expected = rf"""{start}/empty\.png: no ink in lines.*
{start}/a{{250}}: .*name too long.*
{start}/none'\\x1b'\[2J: cannot be read: No such file.*
"""
    assert re.fullmatch(expected, errors)
    assert re.fullmatch(rf"{tmp_path}/good'\\x1b'\[2J: \d .*\n", output)


def test_what_cannot_be_used(predict, tmp_path, monkeypatch):
    missing = tmp_path / "a.pth"
    with raises(ScriptError, match=rf"^there is no {missing}: first train a model: python "):
        predict("--checkpoint", missing)
    with raises(ScriptError, match=rf"^cannot read MNIST in {tmp_path}/.*; run download_mnist\.py"):
        predict("--data-dir", tmp_path)
    monkeypatch.setattr(models.Model5, "forward", lambda self, x: torch.ones(len(x), 10) / 0)
    message = "^Model5 fails on 28x28 images: it does not return 10 finite numbers for each; fix"
    with raises(ScriptError, match=f"{message} it$"):
        predict()

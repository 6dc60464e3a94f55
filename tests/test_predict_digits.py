"""The trained model at work: the test set's mistakes, and the script's lines and errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED_MODEL5, contents, split_options
from PIL import Image
from pytest import raises
from torch import nn

import models
import predict_digits
from checkpoints import BEST, load_checkpoint
from digit_images import Digit, find_digits, read_picture
from predict_digits import find_mistakes, read_digits
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
def predict(tiny_data, monkeypatch, capsys):
    """Return a function that gives the script's output and errors with the given options."""

    def run(*options):
        usual = "--device cpu --data-dir", tiny_data, "--checkpoint", TRAINED_MODEL5
        monkeypatch.setattr("sys.argv", split_options("predict_digits.py", *usual, *options))
        predict_digits.main()
        return capsys.readouterr()

    return run


def draw_lines(path: Path, count: int = 1) -> Path:
    """Draw a 1, or several below each other."""
    image = Image.new("L", (90, 90 * count), 255)
    for line in range(count):
        image.paste(0, (43, 90 * line + 20, 48, 90 * line + 70))
    image.save(path, "PNG")
    return path


def test_mistakes_counted_by_hand():
    labels = torch.tensor([3, 3, 7, 1, 0])
    logits = torch.zeros(5, 10)
    for image, (digit, logit) in enumerate([(3, 5.0), (8, 2.0), (1, 9.0), (1, 1.0), (0, 1.0)]):
        logits[image, digit] = logit
    assert find_mistakes(logits, labels) == ([2, 1], MISTAKES)


FOUR = {4: 0.9, 1: 0.1}
TWO = {2: 0.7, 3: 0.3}


@pytest.mark.parametrize(
    ("shares", "lines", "text", "answer"),
    [
        ([FOUR], [0], "4", "4 (90.0%), then 1 (10.0%)"),
        ([TWO], [0], "2?", "unsure: the network hesitates: 2 (70.0%) or 3 (30.0%)"),
        ([FOUR, TWO, {0: 1}], [0, 0, 1], "42? / 0", "42? / 0, least sure 2 (70.0%)"),
        ([FOUR, TWO], [0, 0], "42?", "unsure: the network hesitates: 42?, least sure 2 (70.0%)"),
    ],
)
def test_lines(shares, lines, text, answer, monkeypatch):
    probabilities = torch.tensor([[each.get(i, 0) for i in range(10)] for each in shares])
    digits = [Digit(np.zeros((28, 28)), np.zeros(4), line) for line in lines]
    monkeypatch.setattr(predict_digits, "find_digits", lambda picture: digits)
    monkeypatch.setattr(predict_digits, "predict", lambda model, images: probabilities.log())
    reading = read_digits(nn.Linear(1, 1), np.zeros((20, 40, 3)))
    message = answer if answer.startswith("unsure") else ""
    assert [reading[key] for key in ("text", "answer", "message")] == [text, answer, message]


def test_what_the_model_sees_is_saved_once(predict, tmp_path, capsys):
    one, two = draw_lines(tmp_path / "one.png"), draw_lines(tmp_path / "two.png", 2)
    seen = tmp_path / "new" / "seen"
    output, errors = predict(one, two, "--save-prepared", seen)
    lines = rf"{one}: 1 \(.*%\), then \d \(.*%\)\n{two}: 1 / 1, least sure 1 \(.*%\)\n"
    assert re.fullmatch(lines, output)
    assert errors == f"Reading with {TRAINED_MODEL5}\n"
    for number, path in enumerate((one, two), 1):
        images = [digit.image for digit in find_digits(read_picture(path))]
        picture = Image.open(seen / f"{number}_{path.stem}_28x28.png")
        assert picture.mode == "L"
        assert (np.asarray(picture) == np.hstack(images)).all()
    drawn = Image.open(seen / "2_two_boxes.png")
    assert drawn.getpixel((48, 160)) == (255, 0, 0)

    victim = tmp_path / "victim"
    (seen / "1_one_28x28.png").unlink()
    (seen / "1_one_28x28.png").symlink_to(victim)  # neither followed nor replaced
    before = contents(seen)
    for folder in seen, one:  # one is a file
        with raises(SystemExit, match="1"):
            predict(one, two, "--save-prepared", folder)
        output, errors = capsys.readouterr()
        assert re.fullmatch(lines, output)  # the answers are printed all the same
        reasons = re.findall(r": cannot save: .*File exists.*; name another folder\n", errors)
        assert len(reasons) == 2
    assert contents(seen) == before
    assert not victim.exists()


def test_default_checkpoint(tmp_path, monkeypatch, capsys):
    picture = draw_lines(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["predict_digits.py", "--device", "cpu", str(picture)])
    predict_digits.main()
    output, errors = capsys.readouterr()
    assert output.startswith(f"{picture}: 1 (")
    assert errors == f"Reading with {TRAINED_MODEL5}\n"
    best = Path("model_checkpoints", BEST)
    best.parent.mkdir()
    best.write_bytes(TRAINED_MODEL5.read_bytes())
    predict_digits.main()
    assert capsys.readouterr().err == f"Reading with {best}\n"


def test_own_class_and_plot(predict, train, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")

    class Own(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Dropout(), nn.Linear(784, 10))

    monkeypatch.setattr(models, "model_classes", lambda: {"Own": Own})
    train(tmp_path, "--epochs 1 --model Own")
    best, plot = tmp_path / BEST, tmp_path / "mistakes.png"
    picture = draw_lines(tmp_path / "one.png")
    output, _ = predict("--checkpoint", best, picture, "--plot", plot)
    accuracy = load_checkpoint(best)["test_accuracy"]
    start = rf"{picture}: .*\nOwn on the test set: accuracy {accuracy:.2f} %, "
    assert re.match(start, output)
    assert plot.exists()


def test_the_page_is_served_last(predict, monkeypatch):
    monkeypatch.setattr(predict_digits, "serve_page", lambda _, port: print("page on port", port))
    output, _ = predict("--test-set --draw --port 1")
    assert "on the test set: accuracy " in output
    assert output.endswith("\npage on port 1\n")
    assert predict("--draw --data-dir none").out == "page on port 0\n"


def test_plot_in_a_missing_folder(predict, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with raises(ScriptError, match=r"a/b\.png: name a file in a folder that exists$"):
        predict("--plot", tmp_path / "a" / "b.png", "--data-dir", tmp_path)  # told before the data


def test_a_bad_picture_stops_no_other(predict, tmp_path, capsys):
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    long = draw_lines(tmp_path / ("a" * 250))  # too long with what --save-prepared adds
    good = draw_lines(tmp_path / "good\x1b[2J")
    names = tmp_path / "empty.png", long, good, tmp_path / "none\x1b[2J"
    with raises(SystemExit, match="1"):
        predict(*names, "--save-prepared", tmp_path)
    output, errors = capsys.readouterr()
    start = f"predict_digits.py: error: {tmp_path}"
    # A terminal would obey the escape character
    expected = rf"""Reading with .*
{start}/empty\.png: no ink stands out.*
{start}/a{{250}}: cannot save: .*name too long.*; name another folder
{start}/none'\\x1b'\[2J: cannot be read: No such file.*
"""
    assert re.fullmatch(expected, errors)
    line = rf"{tmp_path}/.*: \d .*\n"
    assert re.fullmatch(line + rf"{tmp_path}/good'\\x1b'\[2J: \d .*\n", output)


def test_what_cannot_be_used(predict, tmp_path, monkeypatch):
    missing = tmp_path / "a.pth"
    with raises(ScriptError, match=rf"^{missing} is not an .*: .*No such file.*; name another$"):
        predict("--checkpoint", missing)
    with raises(ScriptError, match=rf"^cannot read MNIST in {tmp_path}/.*; run download_mnist\.py"):
        predict("--data-dir", tmp_path)
    monkeypatch.setattr(models.Model5, "forward", lambda self, x: torch.ones(len(x), 10) / 0)
    message = r"^Model5 fails on images \(100, 1, 28, 28\): it returns NaN or infinity; fix it$"
    with raises(ScriptError, match=message):
        predict()

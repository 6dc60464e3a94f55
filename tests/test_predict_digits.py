"""The trained model at work: the test set's mistakes, and the script's lines and errors."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_FILES, contents, split_options
from PIL import Image
from pytest import raises
from torch import nn

import models
import predict_digits
from checkpoints import BEST
from digit_images import Digit, read_picture
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
    assert output.startswith(f"Model5 on the test set: accuracy {accuracy:.2f} %, ")
    matrix = output.replace(".", "0").splitlines()[3:13]
    right = sum(int(line.split()[1 + digit]) for digit, line in enumerate(matrix))
    assert right == round(accuracy)  # of 100 images
    assert errors == f"Reading with {best}\n"
    assert (tmp_path / "mistakes.png").exists()


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
    digits = [Digit(np.zeros((28, 28)), np.array([10, 5, 20, 10]), line) for line in lines]
    monkeypatch.setattr(predict_digits, "find_digits", lambda picture: digits)
    monkeypatch.setattr(predict_digits, "predict", lambda model, images: probabilities.log())
    reading = read_digits(nn.Linear(1, 1), np.zeros((20, 40, 3)))
    message = answer if answer.startswith("unsure") else ""
    assert [reading[key] for key in ("text", "answer", "message")] == [text, answer, message]
    for digit, expected in zip(reading["digits"], probabilities, strict=True):
        assert digit["probabilities"].allclose(expected)
        assert digit["box"].tolist() == [0.25, 0.25, 0.5, 0.5]


def test_pictures(predict, best, tmp_path, monkeypatch):
    data = bytearray(TINY_FILES["t10k-images-idx3-ubyte"])
    pixels = np.frombuffer(data, np.uint8, 784, 16).reshape(28, 28)
    label = TINY_FILES["t10k-labels-idx1-ubyte"][8]
    boxes = np.array([[5, 10, 20, 40], [30, 10, 45, 40]])
    digits = [Digit(pixels, boxes[0], 0), Digit(255 - pixels, boxes[1], 1)]
    answers = {1: digits[:1], 2: digits}
    names = tmp_path / "one.png", tmp_path / "two.png"
    for count, path in enumerate(names, 1):
        Image.new("L", (50 * count, 50), 255).save(path)
    monkeypatch.setattr(
        predict_digits, "find_digits", lambda picture: answers[picture.shape[1] // 50]
    )
    monkeypatch.setattr(predict_digits, "SURE", 0)  # of a model that knows little
    seen = tmp_path / "new" / "seen"
    output, errors = predict(*names, "--save-prepared", seen)
    first, second = output.replace(f"{tmp_path}/", "").splitlines()
    assert re.fullmatch(rf"one\.png: {label} \(\d+\.\d%\), then \d \(\d+\.\d%\)", first)
    assert re.fullmatch(rf"two\.png: {label} / \d, least sure \d \(.*%\)", second)
    assert errors == f"Reading with {best}\n"
    for name, expected in (
        ("1_one_28x28.png", pixels),
        ("2_two_28x28.png", np.hstack([pixels, 255 - pixels])),
    ):
        picture = Image.open(seen / name)
        assert picture.mode == "L"
        assert (np.asarray(picture) == expected).all()
    drawn = Image.open(seen / "2_two_boxes.png")
    assert drawn.getpixel((45, 40)) == (255, 0, 0)

    (seen / "1_one_28x28.png").unlink()
    victim = tmp_path / "victim"
    (seen / "1_one_28x28.png").symlink_to(victim)  # neither followed nor replaced
    before = contents(seen)
    with raises(SystemExit, match="1"):
        predict(*names, "--save-prepared", seen)
    assert contents(seen) == before
    assert not victim.exists()


def test_what_is_there_is_kept(predict, tmp_path, capsys):
    picture = draw_line(tmp_path / "one.png")
    predict(picture, "--save-prepared", tmp_path / "seen")
    for folder in ("seen", "one.png"):  # saved before, and a file
        with raises(SystemExit, match="1"):
            predict(picture, "--save-prepared", tmp_path / folder)
        output, errors = capsys.readouterr()
        assert output.startswith(f"{picture}: ")  # the answer is printed all the same
        assert re.search(r"\n.*: cannot save: .*File exists.*; name another folder\n$", errors)


def test_default_checkpoint(best, tmp_path, monkeypatch, capsys):
    picture = draw_line(tmp_path / "one.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["predict_digits.py", "--device", "cpu", str(picture)])
    predict_digits.main()
    output, errors = capsys.readouterr()
    assert output.startswith(f"{picture}: 1 (")
    assert errors == f"Reading with {predict_digits.PRETRAINED}\n"
    Path("model_checkpoints").mkdir()
    (tmp_path / "model_checkpoints" / BEST).write_bytes(best.read_bytes())
    predict_digits.main()
    assert capsys.readouterr().err == f"Reading with model_checkpoints/{BEST}\n"


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
    monkeypatch.setattr(predict_digits, "SURE", 0)
    output, _ = predict("--checkpoint", path, picture, "--test-set")
    (digit,) = read_digits(model, read_picture(picture))["digits"]
    share, name = digit["probabilities"].max(0)
    assert output.startswith(f"{picture}: {name} ({share:.1%}), then ")
    assert "\nOwn on the test set: accuracy " in output


def test_the_page_is_served_last(predict, best, monkeypatch):
    monkeypatch.setattr(predict_digits, "serve_page", lambda _, port: print("page on port", port))
    output, _ = predict("--test-set --draw --port 1")
    assert "on the test set: accuracy " in output
    assert output.endswith("\npage on port 1\n")
    assert predict("--draw --data-dir none") == ("page on port 0\n", f"Reading with {best}\n")


def test_plot_in_a_missing_folder(predict, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    with raises(ScriptError, match=r"a/b\.png: name a file in a folder that exists$"):
        predict("--plot", tmp_path / "a" / "b.png", "--data-dir", tmp_path)  # told before the data


def test_a_bad_picture_stops_no_other(predict, best, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict_digits, "SURE", 0)
    Image.new("L", (50, 50), 255).save(tmp_path / "empty.png")
    long = draw_line(tmp_path / ("a" * 250))  # too long with what --save-prepared adds
    good = draw_line(tmp_path / "good\x1b[2J")
    names = tmp_path / "empty.png", long, good, tmp_path / "none\x1b[2J"
    with raises(SystemExit, match="1"):
        predict(*names, "--save-prepared", tmp_path)
    output, errors = capsys.readouterr()
    start = f"predict_digits.py: error: {tmp_path}"
    # A terminal would obey the escape character
    expected = rf"""Reading with {best}
{start}/empty\.png: no ink in lines.*
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

"""The trained model at work: the test set's mistakes, and the script's lines and errors."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from pytest import CaptureFixture, MonkeyPatch, raises
from torch import nn

import models
import predict_digits
from checkpoints import BEST
from mnist_data import load_mnist
from predict_digits import format_mistakes, worst_mistakes
from utils import ScriptError


@pytest.fixture
def predict(
    trained: tuple[Path, str], tiny_data: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> Callable:
    """Return a function that gives the script's output and errors with the given options."""

    def run(*options: object) -> tuple[str, str]:
        command = [
            "predict_digits.py",
            "--device",
            "cpu",
            "--data-dir",
            tiny_data,
            "--checkpoint",
            trained[0] / BEST,
        ]
        monkeypatch.setattr("sys.argv", [*map(str, [*command, *options])])
        predict_digits.main()
        return capsys.readouterr()

    return run


def test_mistakes_counted_by_hand() -> None:
    labels = torch.tensor([3, 3, 7, 1, 0])
    logits = torch.zeros(5, 10)
    for image, (digit, logit) in enumerate([(3, 5.0), (8, 2.0), (1, 9.0), (1, 1.0), (0, 1.0)]):
        logits[image, digit] = logit
    assert worst_mistakes(logits, labels) == [2, 1]
    lines = [" ".join(line.split()) for line in format_mistakes(logits, labels).splitlines()]
    assert lines[0] == "accuracy 60.00 %, 2 of 5 wrong"
    assert lines[6] == "3 . . . 1 . . . . 1 . 1"
    assert lines[10] == "7 . 1 . . . . . . . . 1"
    assert lines[-2:] == ["2 7 1 99.9% 9.00", "1 3 8 45.1% 2.80"]


def test_the_test_set(predict: Callable, trained: tuple[Path, str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    output, errors = predict("--plot", tmp_path / "mistakes.png")
    accuracy = torch.load(trained[0] / BEST, weights_only=True)["test_accuracy"]
    assert output.startswith(
        f"Model5 of {trained[0] / BEST} on the test set: accuracy {accuracy:.2f} %, "
    )
    counts = [
        list(map(int, line.replace(".", "0").split()))[1:11] for line in output.splitlines()[3:13]
    ]
    assert sum(counts[digit][digit] for digit in range(10)) == round(accuracy)  # of 100 images
    assert len({len(line) for line in output.splitlines()[2:13]}) == 1  # the columns are aligned
    assert errors == ""
    with Image.open(tmp_path / "mistakes.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (1500, 1050))


def test_pictures(
    predict: Callable, tiny_data: Path, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    images, labels = load_mnist(tiny_data, train=False, device=torch.device("cpu"))
    pixels = ((images[7, 0] * 0.3081 + 0.1307) * 255).round().byte().numpy()
    monkeypatch.setattr(predict_digits, "read_picture", lambda path: path)
    monkeypatch.setattr(
        predict_digits, "prepare_digit", lambda path: (pixels, "unsure: two" * (path.stem == "two"))
    )
    output, errors = predict("one.png", "two.png", "--save-prepared", tmp_path / "seen")
    first, second = output.splitlines()
    assert re.fullmatch(rf"one\.png: {labels[7]} \(\d+\.\d%\), then \d \(\d+\.\d%\)", first)
    assert second == f"two.png: unsure: two; perhaps {labels[7]}"
    assert errors == ""
    for name in ("1_one_28x28.png", "2_two_28x28.png"):
        with Image.open(tmp_path / "seen" / name) as picture:
            assert (picture.mode, picture.size, picture.tobytes()) == (
                "L",
                (28, 28),
                pixels.tobytes(),
            )


def test_own_class(
    predict: Callable, trained: tuple[Path, str], tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def layers(self: nn.Sequential) -> None:
        nn.Sequential.__init__(self, nn.Flatten(), nn.Linear(784, 10))

    own = type("Own", (nn.Sequential,), {"__init__": layers})
    monkeypatch.setattr(models, "model_classes", lambda: {"Own": own})
    model, checkpoint = own(), torch.load(trained[0] / BEST, weights_only=True)
    states = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), 0.1)}
    checkpoint |= {f"{name}_state_dict": state.state_dict() for name, state in states.items()}
    torch.save(checkpoint | {"model_name": "Own", "architecture": str(model)}, tmp_path / "own.pth")
    picture = Image.new("L", (90, 90), 255)
    ImageDraw.Draw(picture).line((45, 20, 45, 70), 0, 5)
    picture.save(tmp_path / "one.png")
    lines = predict("--checkpoint", tmp_path / "own.pth", tmp_path / "one.png", "--test-set")[
        0
    ].splitlines()
    probabilities = predict_digits.read_digit(model, tmp_path / "one.png")[0]
    assert lines[0].startswith(
        f"{tmp_path / 'one.png'}: {probabilities.argmax()} ({probabilities.max():.1%}), then "
    )
    assert lines[1].startswith(f"Own of {tmp_path / 'own.pth'} on the test set: accuracy ")


def test_the_page_is_served_last(predict: Callable, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(
        predict_digits, "serve_page", lambda model, port: print("page on port", port)
    )
    output = predict("--test-set", "--draw", "--port", 1)[0]
    assert "on the test set: accuracy " in output
    assert output.endswith("\npage on port 1\n")
    assert predict("--draw", "--data-dir", "none") == ("page on port 0\n", "")


def test_a_bad_picture_stops_no_other(
    predict: Callable, tmp_path: Path, capsys: CaptureFixture
) -> None:
    image = Image.new("L", (50, 50), 255)
    image.save(tmp_path / "empty.png")
    ImageDraw.Draw(image).line((25, 10, 25, 40), 0, 4)
    image.save(
        long := tmp_path / f"{'a' * 245}.png"
    )  # with what is added to it for --save-prepared, too long
    with raises(SystemExit, match="1"):
        predict(tmp_path / "empty.png", long, tmp_path / "none.png", "--save-prepared", tmp_path)
    output, errors = capsys.readouterr()
    empty, unsaved, none = errors.splitlines()
    assert output == ""
    assert unsaved.startswith(f"predict_digits.py: error: {long}: ") and "name too long" in unsaved
    assert empty.startswith(f"predict_digits.py: error: {tmp_path / 'empty.png'}: no ink in lines")
    assert none.startswith(
        f"predict_digits.py: error: {tmp_path / 'none.png'}: cannot be read: No such file"
    )


def test_what_cannot_be_used(predict: Callable, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    with raises(
        ScriptError,
        match=rf"^there is no {tmp_path / 'a.pth'}: train a model first, with python train_test_",
    ):
        predict("--checkpoint", tmp_path / "a.pth")
    with raises(
        ScriptError, match=rf"^cannot read MNIST in {tmp_path}/.*; run download_mnist\.py first$"
    ):
        predict("--data-dir", tmp_path)
    larger = type(
        "Model5",
        (models.Model5,),
        {"forward": lambda self, x: nn.functional.linear(x, torch.ones(3, 32))},
    )
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": larger})
    with raises(ScriptError, match=r"^Model5 fails on 28x28 images: "):
        predict()

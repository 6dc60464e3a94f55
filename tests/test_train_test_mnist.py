"""Training: whole runs, the loop and its parts, augmentation, schedule, seeds and options."""

import argparse
import contextlib
import fcntl
import os
import pty
import re
import shlex
import struct
import sys
import termios
from pathlib import Path
from signal import SIGINT, SIGTERM
from subprocess import PIPE, Popen
from unittest.mock import patch

import pytest
import torch
from conftest import (
    EPOCHS,
    ON_TINY_MNIST,
    ROOT,
    assert_same,
    load_all,
    read_log,
    split_options,
)
from pytest import approx, raises
from torch import Tensor, nn

import train_test_mnist as tt
from checkpoints import BEST, epoch_files, load_checkpoint
from mnist_data import load_mnist
from models import Model5, build_model
from utils import ScriptError

RECIPE = {
    "model": "Model5",
    "epochs": 20,
    "batch_size": 64,
    "lr": 0.01,
    "lr_scheduler": "constant",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "augment": False,
    "amp": False,
    "val_size": 0,
    "init_from": "none",
    "seed": 1,
}


def table(output: str) -> list[list[str]]:
    """Return the cells of each line of the table of results, header first; they must be aligned."""
    lines = [line for line in output.splitlines() if re.match(r"epoch  | +\d+ ", line)]
    cells = [list(re.finditer(r"(train|val|test) loss|[a-z]+|[\d.]+( %)?", line)) for line in lines]
    assert len({tuple(cell.end() for cell in line) for line in cells}) == 1
    return [[cell[0] for cell in line] for line in cells]


def parse(*options: object) -> argparse.Namespace:
    with patch("sys.argv", ["train_test_mnist.py", *split_options(*options)]):
        return tt.parse_args()


class Counter(nn.Module):
    """A model that records its batches and predicts each image's digit from its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        numbers = x[:, 0, 0, 0].long()
        self.batches.append(numbers)
        return self.scale * nn.functional.one_hot(numbers % 10, 10)


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) whose first pixel is their number, every fifth label wrong."""
    numbers = torch.arange(count)
    labels = (numbers + (numbers % 5 == 0)) % 10
    return numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), labels


def test_files_and_output(trained, tiny_data):
    folder, output = trained
    files = {path.name for path in folder.iterdir()}
    assert files == {*EPOCHS, BEST, "training_log.csv", ".lock"}
    rows = table(output + tt.__doc__.replace("\n    ", "\n"))  # which shows the same columns
    first, *_, last = output.splitlines()
    assert re.fullmatch(r"Model5 on cpu: epochs 4, batch_size 16, lr 0\.05, .*, seed 1", first)
    command = "python predict_digits.py --test-set --draw --checkpoint"
    assert last == f"Next: {command} {shlex.quote(str(folder / BEST))}"
    options = RECIPE | {"epochs": 4, "batch_size": 16, "lr": 0.05}
    model = build_model("Model5")
    test_set = load_mnist(tiny_data, train=False, device=torch.device("cpu"))
    fixed = {"model_name": "Model5", "architecture": str(model)}
    fixed |= {"options": options, "val_loss": None, "val_accuracy": None}
    for epoch, cells, logged in zip(range(1, 5), rows[1:-3], read_log(folder), strict=True):
        checkpoint = load_checkpoint(folder / EPOCHS[epoch - 1])
        assert checkpoint.items() >= fixed.items()
        assert type(checkpoint["test_accuracy"]) is type(checkpoint["train_accuracy"]) is float
        model.load_state_dict(checkpoint["model_state_dict"])  # what is saved is what was tested
        tested = approx(checkpoint["test_loss"], rel=1e-5), checkpoint["test_accuracy"]
        assert tt.evaluate(model, *test_set, batch_size=7) == tested
        train_loss, test_loss = (f"{checkpoint[f'{part}_loss']:.4f}" for part in ("train", "test"))
        train, test, best = (
            f"{checkpoint[f'{part}_accuracy']:.2f} %" for part in ("train", "test", "best_test")
        )
        assert cells[:-1] == [str(epoch), train_loss, train, test_loss, test, best]
        assert logged == {name: str(checkpoint[name] or "") for name in logged}  # None is ""
    assert checkpoint["best_test_accuracy"] > 50  # it has learned something; guessing gives 10


@pytest.mark.parametrize("val_size", [0, 40])
def test_best(val_size, train, tmp_path, monkeypatch):
    # Epoch 2 is the best, because epoch 3 is not strictly better
    choosing = [50.0, 70.0, 70.0, 60.0]
    tested = [90.0, 20.0, 80.0, 85.0] if val_size else choosing
    results = {val_size: iter(choosing), 100: iter(tested)}  # by number of images
    monkeypatch.setattr(tt, "evaluate", lambda _, images, *__: (1.0, next(results[len(images)])))
    best_line = f"Best: epoch 2, test accuracy {tested[1]:.2f} %"
    assert best_line in train(tmp_path, f"--epochs 4 --val-size {val_size}")
    checkpoints = load_all(tmp_path)
    for name, best in zip(EPOCHS, (1, 2, 2, 2), strict=True):
        assert checkpoints[name]["best_epoch"] == best
        assert checkpoints[name]["best_test_accuracy"] == tested[best - 1]
    assert_same(checkpoints[BEST], checkpoints[EPOCHS[1]])


def test_seed_and_epoch_decide_what_is_drawn(train, tmp_path, monkeypatch):
    def draw(*_, **options):
        return torch.rand(()).item(), 10.0

    def losses(folder):
        return [row["train_loss"] for row in read_log(tmp_path / folder)]

    monkeypatch.setattr(tt, "train_one_epoch", draw)
    for seed in "123":
        train(tmp_path / seed, "--epochs 3 --seed", seed)
    drawn = losses("1") + losses("2") + losses("3")
    assert len(set(drawn)) == 9
    resumed = tmp_path / "resumed"
    train(resumed, "--epochs 1 --seed 3")
    torch.rand(5)
    train(resumed, "--resume --epochs 3")
    assert losses(resumed) == losses("3")
    weights = load_checkpoint(resumed / BEST)["model_state_dict"]
    torch.manual_seed(3)  # the first weights depend on the seed, too
    assert_same(build_model("Model5").state_dict(), weights)


def test_dry_run(train, tmp_path):
    new = tmp_path / "new"
    output = train(new, "--dry-run --batch-size 8 --val-size 30 --model MODEL2")
    _, row = table(output)  # one epoch
    of_eight = [f"{12.5 * correct:.2f} %" for correct in range(9)]
    assert {row[2], row[4], row[6]} <= set(of_eight)
    assert output.endswith("Dry run: every step works; nothing was saved\n")
    assert not new.exists()


def test_plot(train, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    train(tmp_path, "--epochs 1 --plot")
    assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib(train, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
        train(tmp_path / "new", "--plot")
    assert not (tmp_path / "new").exists()  # no work is lost
    train(tmp_path / "new", "--epochs 1")


def test_missing_data(train, tmp_path):
    raw = tmp_path / "data" / "MNIST" / "raw"
    with raises(ScriptError, match=f"^missing or damaged in {raw}: .*by hand"):
        train(tmp_path, "--data-dir", tmp_path / "data")


@pytest.mark.parametrize(("number", "status"), [(SIGINT, 130), (SIGTERM, 143)])
def test_interrupt(number, status, train, tiny_data, tmp_path):
    options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path, "--device cpu --epochs 1000"
    script = split_options("train_test_mnist.py", *options)
    command = [sys.executable, "-c", ON_TINY_MNIST, *script]
    with Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
        next(line for line in process.stdout if line.startswith("    1 "))  # which is saved by now
        process.send_signal(number)
        process.send_signal(number)  # once more, by an impatient user
        _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert not list(tmp_path.glob("*.tmp"))
    (line,) = errors.splitlines()  # no traceback
    advice, _, path = line.partition(" --resume ")
    assert advice == "train_test_mnist.py: interrupted; to go on: python train_test_mnist.py"
    assert Path(path) in epoch_files(tmp_path)[:2]  # the last one or the one before
    assert "nothing left to do" in train(tmp_path, "--resume", Path(path), "--epochs 1")


def test_training_sees_every_image_once():
    (images, labels), model = numbered(50), Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    loss, accuracy = tt.train_one_epoch(model, optimizer, None, images, labels, 16, log_interval=1)
    assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
    order = torch.cat(model.batches).tolist()
    assert sorted(order) == list(range(50)) != order
    expected = nn.functional.cross_entropy(model(images), labels).item()
    assert (loss, accuracy) == (approx(expected, rel=1e-5), 80)  # means over images, not batches
    again = tt.train_one_epoch(model.eval(), optimizer, None, images, labels, 16)
    assert again == (approx(loss), accuracy)  # each epoch counts anew
    assert model.training


@pytest.mark.parametrize("size", [(24, 80), (0, 0)])  # Colab's terminal has no rows and columns
def test_all_of_the_bar_is_seen(size):
    (images, labels), model = numbered(50), Counter()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
    with os.fdopen(writer, "w") as terminal, contextlib.redirect_stderr(terminal):
        tt.train_one_epoch(model, optimizer, None, images, labels, 1, description="epoch 1000/1000")
        print("end", file=terminal, flush=True)
        output = ""
        while "end" not in output:  # a terminal may hand out what is written in parts
            output += os.read(reader, 9999).decode()
    os.close(reader)
    assert re.search(r"\repoch 1000/1000: [^\r]*, loss \d\.\d{4}, accuracy 80\.00 %", output)


def test_training_takes_sgd_steps_at_the_scheduled_rate():
    model, (images, labels) = Counter(), numbered(30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))
    tt.train_one_epoch(model, optimizer, scheduler, images, labels, 8)
    reference, velocity = Counter(), 0.0
    for number, batch in enumerate(model.batches):
        loss = nn.functional.cross_entropy(reference(images[batch]), labels[batch])
        velocity = 0.9 * velocity + torch.autograd.grad(loss, reference.scale)[0]
        reference.scale.data -= 0.5 / (1 + number) * velocity
    assert model.scale.item() == approx(reference.scale.item(), rel=1e-5)


def test_evaluate():
    (images, labels), model = numbered(30), build_model("Model5")
    loss, accuracy = tt.evaluate(model, images, labels, batch_size=7)
    logits = model.eval()(images)
    assert loss == approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    # No dropout, no new statistics
    assert tt.evaluate(model, images, labels, batch_size=7) == (loss, accuracy)
    clearing = nn.Sequential(nn.Threshold(1e9, 0, inplace=True), nn.Flatten(), nn.Linear(784, 10))
    tt.evaluate(clearing, images, labels, batch_size=7)
    assert images.any()
    assert tt.evaluate(Counter(), images, labels, batch_size=7)[1] == 80
    with raises(FloatingPointError, match="the loss in evaluation is nan"):
        tt.evaluate(model, images * torch.nan, labels, batch_size=7)


@pytest.mark.parametrize(("log_interval", "batches"), [(1, 3), (2, 4), (100, 5)])
def test_how_soon_training_notices_a_loss_that_is_not_finite(log_interval, batches):
    losses = 1, 1, torch.inf, -torch.inf, 1  # their mean is infinite, then NaN
    results = iter([(loss, 0) for loss in losses])
    images = torch.zeros(9, 1)
    message = f"^the loss is (inf|nan) after {batches} batches; try a lower --lr$"
    with raises(FloatingPointError, match=message):
        tt.train_one_epoch(
            nn.Identity(),
            None,
            None,
            images,
            images,
            batch_size=2,
            log_interval=log_interval,
            step=lambda *_: next(results),
        )


def test_each_option_changes_the_training(train, tmp_path):
    losses = set()
    options = "", "--augment", "--amp", "--weight-decay 0.01", "--val-size 30", "--seed 2"
    for option in (*options, "--lr-scheduler onecyclelr", "--momentum 0.5", "--lr 0.1"):
        train(tmp_path / option, *option.split(), "--epochs 1 --batch-size 16")
        losses.add(load_checkpoint(tmp_path / option / BEST)["train_loss"])
    assert len(losses) == 9


def test_amp(train, tmp_path, monkeypatch):
    types, forward = set(), Model5.forward

    def record(self, x):
        logits = forward(self, x)
        types.add((self.training, logits.dtype))
        return logits

    monkeypatch.setattr(Model5, "forward", record)
    train(tmp_path, "--amp --epochs 1 --batch-size 100")
    assert types == {(True, torch.bfloat16), (False, torch.float32)}
    weights = load_checkpoint(tmp_path / BEST)["model_state_dict"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}


def test_amp_where_it_cannot_be_used(train, tmp_path):
    failure = RuntimeError("Current CUDA Device does not support bfloat16.\nPlease switch.")
    message = r"Current CUDA .* bfloat16\.; fix it, or leave out --amp"
    with patch("torch.autocast", side_effect=failure), raises(ScriptError, match=message):
        train(tmp_path, "--amp")


def test_schedule(train, tmp_path):
    # 13 batches an epoch
    train(tmp_path, "--lr-scheduler onecyclelr --epochs 10 --batch-size 16")
    rates = [float(row["lr"]) for row in read_log(tmp_path)]
    assert rates[0] == approx(0.01 / 25)
    assert rates[3] == approx(0.01, rel=0.01)  # the peak, after 30 % of the steps
    assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
    optimizer = load_checkpoint(tmp_path / "mnist_model_epoch_10.pth")["optimizer_state_dict"]
    assert optimizer["param_groups"][0]["lr"] < 1e-5


def test_defaults_are_the_recipe(monkeypatch):
    def options(*given):
        return vars(tt.choose_options(vars(parse(*given)), None, {}))

    assert options("--device cpu") == RECIPE
    monkeypatch.setattr(tt, "device_type", torch.device)
    assert options("--device mps")["batch_size"] == 128
    assert options("--device mps --batch-size 7 --augment")["batch_size"] == 7


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--epochs", "0 1.5"),
        ("--batch-size", "-1 1000000000"),
        ("--test-batch-size", "0"),
        ("--log-interval", "0"),
        ("--lr", "nan inf -0.1 fast 1e308"),
        ("--momentum", "1 nan"),
        ("--weight-decay", "-1 1e308"),
        ("--val-size", "-1 50001"),
        ("--seed", "-1 4294967296"),
        ("--lr-scheduler", "step"),
        ("--device", "abacus meta"),
    ],
)
def test_wrong_values(option, values, capsys):
    for value in values.split():
        with raises(SystemExit, match="2"):
            parse(option, value)
        (error,) = capsys.readouterr().err.splitlines()
        assert re.search(f"argument {option}: .*{value!r}", error)


def test_help_is_complete_and_true(capsys):
    with raises(SystemExit):
        parse("--help")
    text = capsys.readouterr().out
    defaults = vars(parse()) | RECIPE | {"checkpoint_dir": "model_checkpoints"}
    for name, default in defaults.items():
        option = f"--{name.replace('_', '-')}"
        (line,) = re.findall(f"^    {option} .*", text, re.MULTILINE)
        shown = default is not None and type(default) is not bool
        special = {"batch_size": "128 on a GPU, 64 on a CPU", "device": "auto"}
        expected = f"(default: {special.get(name, default)})"
        assert ("(default: " in line, line.endswith(expected)) == (shown, shown)


@pytest.mark.parametrize("option", ["--data-dir", "--checkpoint-dir"])
def test_folder_that_is_a_file(option, train, tmp_path):
    path = tmp_path / "file"
    path.write_text("mine")
    with raises((ScriptError, OSError), match=str(path)):
        train(tmp_path, option, path)
    assert path.read_text() == "mine"

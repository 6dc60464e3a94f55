"""Training: whole runs, the loop and its parts, augmentation, schedule, seeds and options."""

import contextlib
import csv
import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import sys
import termios
from collections.abc import Callable
from itertools import product
from pathlib import Path
from signal import SIGINT, SIGTERM
from subprocess import PIPE, Popen
from unittest.mock import patch

import pytest
import torch
from conftest import FOUR_EPOCHS, ON_TINY_MNIST, ROOT, assert_same, load_all
from pytest import CaptureFixture, MonkeyPatch, approx, raises
from torch import Tensor, nn

import train_test_mnist as tt
from checkpoints import BEST, load_checkpoint
from models import Model5, build_model
from utils import ScriptError

RECIPE = {"epochs": 20, "batch_size": 64, "lr": 0.01, "lr_scheduler": "constant", "momentum": 0.9}
RECIPE |= {
    "weight_decay": 0.0,
    "augment": False,
    "amp": False,
    "val_size": 0,
    "init_from": "none",
    "seed": 1,
}
EPOCHS = [f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)]


def read_log(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log without the seconds."""
    rows = list(csv.DictReader((folder / "training_log.csv").read_text().splitlines()))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def table(output: str) -> list[list[str]]:
    """Return the cells of each line of the table of results, header first; they must be aligned."""
    lines = [line for line in output.splitlines() if re.match(r"epoch  | +\d+ ", line)]
    cells = [list(re.finditer(r"(train|val|test) loss|[a-z]+|[\d.]+( %)?", line)) for line in lines]
    assert len({tuple(cell.end() for cell in line) for line in cells}) == 1
    return [[cell[0] for cell in line] for line in cells]


def parse(*options: str) -> tuple:
    with patch("sys.argv", ["train_test_mnist.py", *options]):
        return tt.parse_args()


class Counter(nn.Module):
    """A model that records the batches it sees and predicts each image's digit from its first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.batches: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(x[:, 0, 0, 0])
        return self.scale * nn.functional.one_hot(x[:, 0, 0, 0].long() % 10, 10).float()


def numbered(count: int) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) whose first pixel is their number, and labels (N,), every fifth wrong."""
    numbers = torch.arange(count)
    return numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), (
        numbers + (numbers % 5 == 0)
    ) % 10


class TestTraining:
    """Whole runs, then the loop and its parts, then the command line."""

    def test_files_and_output(self, trained: tuple[Path, str]) -> None:
        folder, output = trained
        assert {path.name for path in folder.iterdir()} == {
            *EPOCHS,
            BEST,
            "training_log.csv",
            ".lock",
        }
        rows = table(output + tt.__doc__.replace("\n    ", "\n"))  # which shows the same columns
        lines = output.splitlines()
        assert re.fullmatch(
            r"Model5 on cpu: epochs 4, batch_size 16, lr 0\.05, .*, seed 1", lines[0]
        )
        assert [line.split(" saved as ")[1] for line in lines[6:8]] == [
            str(folder / BEST),
            str(folder / EPOCHS[3]),
        ]
        command = [
            "python",
            "predict_digits.py",
            "--test-set",
            "--draw",
            "--checkpoint",
            str(folder / BEST),
        ]
        assert shlex.split(lines[8]) == ["Next:", *command]
        recipe = RECIPE | {
            "epochs": 4,
            "batch_size": 16,
            "lr": 0.05,
            "val_loss": None,
            "val_accuracy": None,
        }
        recipe |= {"model_name": "Model5", "architecture": str(build_model("Model5"))}
        for epoch, cells, logged in zip(range(1, 5), rows[1:-3], read_log(folder), strict=True):
            checkpoint = load_checkpoint(folder / EPOCHS[epoch - 1])
            assert checkpoint.items() >= (recipe | {"epoch": epoch}).items()
            assert type(checkpoint["test_accuracy"]) is type(checkpoint["train_accuracy"]) is float
            assert checkpoint["optimizer_state_dict"]["state"][0]["momentum_buffer"].shape == (
                6,
                1,
                3,
                3,
            )
            losses = [f"{checkpoint[f'{part}_loss']:.4f}" for part in ("train", "test")]
            train, test, best = (
                f"{checkpoint[f'{part}_accuracy']:.2f} %" for part in ("train", "test", "best_test")
            )
            assert cells[:-1] == [str(epoch), losses[0], train, losses[1], test, best]
            assert logged == {
                name: "" if checkpoint[name] is None else str(checkpoint[name]) for name in logged
            }
        assert checkpoint["best_test_accuracy"] > 50  # it has learned something; guessing gives 10

    @pytest.mark.parametrize("val_size", [0, 40])
    def test_best(
        self, val_size: int, train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
    ) -> None:
        choosing = [
            50.0,
            70.0,
            70.0,
            60.0,
        ]  # epoch 2 is the best, for epoch 3 is not strictly better
        tested = [90.0, 20.0, 80.0, 85.0] if val_size else choosing
        results = {val_size: iter(choosing), 100: iter(tested)}  # by number of images
        monkeypatch.setattr(
            tt, "evaluate", lambda model, images, *args: (1.0, next(results[len(images)]))
        )
        best_line = f"Best: epoch 2, test accuracy {tested[1]:.2f} %"
        assert best_line in train(tmp_path, "--epochs", 4, "--val-size", val_size)
        checkpoints = load_all(tmp_path)
        assert [checkpoints[name]["best_epoch"] for name in EPOCHS] == [1, 2, 2, 2]
        assert [checkpoints[name]["best_test_accuracy"] for name in EPOCHS] == [
            tested[0],
            *[tested[1]] * 3,
        ]
        assert_same(checkpoints[BEST], checkpoints[EPOCHS[1]])
        assert [float(row["test_accuracy"]) for row in read_log(tmp_path)] == tested
        assert [row["val_accuracy"] for row in read_log(tmp_path)] == [
            str(v) if val_size else "" for v in choosing
        ]

    def test_the_seed_decides(
        self, train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tt, "train_one_epoch", lambda *args: (torch.rand(()).item(), 10.0))
        train(tmp_path, "--epochs", 3, "--seed", 5)
        for epoch, row in enumerate(read_log(tmp_path), start=1):
            tt.seed_epoch(5, epoch)
            assert float(row["train_loss"]) == torch.rand(()).item()
        torch.manual_seed(5)  # the first weights depend on the seed, too
        assert_same(
            build_model("Model5").state_dict(), load_checkpoint(tmp_path / BEST)["model_state_dict"]
        )

    def test_resuming_with_every_option_is_exact(
        self, train: Callable, tiny_data: Path, tmp_path: Path
    ) -> None:
        options = (
            "--augment",
            "--lr-scheduler",
            "onecyclelr",
            "--weight-decay",
            1e-3,
            "--val-size",
            30,
        )
        header, *_ = table(train(tmp_path, *options, *FOUR_EPOCHS))
        assert header.count("val loss") == 1
        whole, log = load_all(tmp_path), read_log(tmp_path)
        train(tmp_path, "--resume", tmp_path / EPOCHS[1])
        assert_same(load_all(tmp_path), whole)
        assert read_log(tmp_path) == read_log(tmp_path / "earlier_run_1") == log
        model, test_set = (
            build_model("Model5"),
            mnist_data.load_mnist(tiny_data, train=False, device=torch.device("cpu")),
        )
        for checkpoint in whole.values():  # what is saved is what was tested
            model.load_state_dict(checkpoint["model_state_dict"])
            loss, accuracy = tt.evaluate(model, *test_set, batch_size=7)
            assert (approx(loss, rel=1e-5), accuracy) == (
                checkpoint["test_loss"],
                checkpoint["test_accuracy"],
            )

    def test_dry_run(self, train: Callable, tmp_path: Path) -> None:
        options = (
            "--dry-run",
            "--batch-size",
            8,
            "--test-batch-size",
            4,
            "--val-size",
            30,
            "--model",
            "MODEL2",
        )
        output = train(tmp_path / "new", *options)
        _, row = table(output)  # one epoch
        assert float(row[2][:-2]) in [
            12.5 * correct for correct in range(9)
        ]  # of one batch of eight
        assert {row[4], row[6]} <= {"0.00 %", "25.00 %", "50.00 %", "75.00 %", "100.00 %"}
        assert output.endswith("Dry run: every step works; nothing was saved\n")
        assert not (tmp_path / "new").exists()

    def test_plot(self, train: Callable, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        train(tmp_path, "--epochs", 1, "--plot")
        assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")

    def test_plot_without_matplotlib(
        self, train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
            train(tmp_path / "new", "--plot")
        assert not (tmp_path / "new").exists()  # no work is lost
        train(tmp_path / "new", "--epochs", 1)

    def test_bad_data(self, train: Callable, tiny_data: Path, tmp_path: Path) -> None:
        file = Path(
            shutil.copytree(tiny_data, tmp_path / "data"), "MNIST", "raw", "t10k-images-idx3-ubyte"
        )
        file.write_bytes(file.read_bytes()[:999])
        with raises(
            ScriptError, match=f"^missing or damaged in {file.parent}: {file.name}\\. .*by hand.*$"
        ):
            train(tmp_path, "--data-dir", tmp_path / "data")

    @pytest.mark.parametrize(("number", "status"), [(SIGINT, 130), (SIGTERM, 143)])
    def test_interrupt(
        self, number: int, status: int, train: Callable, tiny_data: Path, tmp_path: Path
    ) -> None:
        options = (
            "--data-dir",
            tiny_data,
            "--checkpoint-dir",
            tmp_path,
            "--device",
            "cpu",
            "--epochs",
            "1000",
        )
        command = [sys.executable, "-c", ON_TINY_MNIST, "train_test_mnist.py", *options]
        with Popen(command, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True) as process:
            next(
                line for line in process.stdout if line.startswith("    1 ")
            )  # the first epoch is saved
            process.send_signal(number)
            process.send_signal(number)  # once more, by an impatient user
            _, errors = process.communicate(timeout=60)
        assert process.returncode == status
        assert not list(tmp_path.glob("*.tmp"))
        (line,) = errors.splitlines()  # no traceback
        path = line.removeprefix(
            "train_test_mnist.py: interrupted; to go on: python train_test_mnist.py --resume "
        )
        finished = len(list(tmp_path.glob("mnist_model_epoch_*.pth")))
        assert (
            load_checkpoint(Path(path))["epoch"] >= finished - 1
        )  # the last one or the one before
        assert "nothing left to do" in train(tmp_path, "--resume", path, "--epochs", 1)

    def test_training_sees_every_image_once(self) -> None:
        (images, labels), model = numbered(50), Counter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss, accuracy = tt.train_one_epoch(
            model, optimizer, None, images, labels, 16, log_interval=1
        )
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        order = torch.cat(model.batches).tolist()
        assert sorted(order) == list(range(50)) != order
        expected = nn.functional.cross_entropy(model(images), labels).item()
        assert (loss, accuracy) == (
            approx(expected, rel=1e-5),
            80,
        )  # means over images, not over batches
        again = tt.train_one_epoch(model.eval(), optimizer, None, images, labels, 16)
        assert again == (approx(loss), accuracy)  # each epoch counts anew
        assert model.training

    @pytest.mark.parametrize("size", [(24, 80), (0, 0)])  # Colab's terminal has no rows and columns
    def test_all_of_the_bar_is_seen(self, size: tuple[int, int]) -> None:
        (images, labels), model = numbered(50), Counter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        reader, writer = pty.openpty()
        fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("4H", *size, 0, 0))
        with os.fdopen(writer, "w") as terminal, contextlib.redirect_stderr(terminal):
            tt.train_one_epoch(
                model, optimizer, None, images, labels, 1, description="epoch 1000/1000"
            )
            output = os.read(reader, 9999).decode()
        os.close(reader)
        assert re.search(r"\repoch 1000/1000: [^\r]*, loss \d\.\d{4}, accuracy 80\.00 %", output)

    def test_training_takes_sgd_steps_at_the_scheduled_rate(self) -> None:
        model, (images, labels) = Counter(), numbered(30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))
        tt.train_one_epoch(model, optimizer, scheduler, images, labels, 8)
        reference, velocity = Counter(), 0.0
        for number, batch in enumerate(batch.long() for batch in model.batches):
            loss = nn.functional.cross_entropy(reference(images[batch]), labels[batch])
            velocity = 0.9 * velocity + torch.autograd.grad(loss, reference.scale)[0]
            reference.scale.data -= 0.5 / (1 + number) * velocity
        assert model.scale.item() == approx(reference.scale.item(), rel=1e-5)

    def test_shuffle_depends_on_seed_and_epoch(self) -> None:
        orders = set()
        for seed, epoch in product(range(5), range(1, 6)):
            tt.seed_epoch(seed, epoch)
            orders.add(tuple(torch.randperm(60).tolist()))
        assert len(orders) == 25

    def test_evaluate(self) -> None:
        (images, labels), model = numbered(30), build_model("Model5")
        loss, accuracy = tt.evaluate(model, images, labels, batch_size=7)
        logits = model.eval()(images)
        assert loss == approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert (loss, accuracy) == tt.evaluate(
            model, images, labels, batch_size=7
        )  # no dropout, no new statistics
        clearing = nn.Sequential(
            nn.Threshold(1e9, 0, inplace=True), nn.Flatten(), nn.Linear(784, 10)
        )
        tt.evaluate(clearing, images, labels, batch_size=7)
        assert images.any()
        assert tt.evaluate(Counter(), images, labels, batch_size=7)[1] == 80

    def test_each_option_changes_the_training(self, train: Callable, tmp_path: Path) -> None:
        losses = set()
        for option in (
            "",
            "--augment",
            "--amp",
            "--lr-scheduler onecyclelr",
            "--weight-decay 0.01",
            "--val-size 30",
            "--seed 2",
        ):
            train(tmp_path / option, *option.split(), "--epochs", 1, "--batch-size", 16)
            losses.add(load_checkpoint(tmp_path / option / BEST)["train_loss"])
        assert len(losses) == 7

    def test_amp(self, train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
        types, evaluate, forward = [], tt.evaluate, Model5.forward
        monkeypatch.setattr(tt, "evaluate", lambda *args: types.append("test") or evaluate(*args))
        monkeypatch.setattr(
            Model5, "forward", lambda self, x: types.append((y := forward(self, x)).dtype) or y
        )
        train(tmp_path, "--amp", "--epochs", 1, "--batch-size", 100)
        assert types[-4:] == [torch.bfloat16] * 2 + ["test", torch.float32]
        checkpoint = load_checkpoint(tmp_path / BEST)
        assert checkpoint["amp"] is True
        assert {tensor.dtype for tensor in checkpoint["model_state_dict"].values()} == {
            torch.float32,
            torch.int64,
        }

        def refuse(*args: object) -> None:
            raise RuntimeError("Current CUDA Device does not support bfloat16.\nPlease switch.")

        monkeypatch.setattr(torch, "autocast", refuse)
        with raises(
            ScriptError,
            match=r"^cannot train with --amp on cpu: Current CUDA .*bfloat16\.; leave it out$",
        ):
            train(tmp_path / "other", "--amp")

    def test_schedule(self, train: Callable, tmp_path: Path) -> None:
        train(
            tmp_path, "--lr-scheduler", "onecyclelr", "--epochs", 10, "--batch-size", 16
        )  # 13 batches an epoch
        rates = [float(row["lr"]) for row in read_log(tmp_path)]
        assert (rates[0], rates[3]) == (
            approx(0.01 / 25),
            approx(0.01, rel=0.01),
        )  # the peak, after 30 % of the steps
        assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
        optimizer = load_checkpoint(tmp_path / "mnist_model_epoch_10.pth")["optimizer_state_dict"]
        assert optimizer["param_groups"][0]["lr"] < 1e-5

    def test_augment(self) -> None:
        image = torch.full((1, 1, 28, 28), -0.4)
        image[0, 0, 14, 20] = 3.0  # 6.5 pixels right of the centre
        torch.manual_seed(0)
        images = mnist_data.augment(image.expand(2000, -1, -1, -1))
        assert images.shape == (2000, 1, 28, 28)
        weights = (images[:, 0] + 0.4).clamp(min=0)  # bicubic interpolation undershoots
        assert (weights[:, :, :10] < 1e-6).all()  # the background stays
        # a shift of 3, a scale of 10 % of 6.5 and a turn of 10 degrees, or 6.5 * sin(10) = 1.1 up and down
        for summed, start, reach in ((1, 20, 0.75), (2, 14, 2 * 1.15)):
            moved = (weights.sum(summed) * torch.arange(28.0)).sum(1) / weights.sum((1, 2)) - start
            assert 3 < moved.abs().max() < 3 + reach + 0.4
            assert abs(moved.mean()) < 0.2

    def test_augmentation_keeps_thin_strokes(self) -> None:
        images = torch.zeros(2000, 1, 28, 28)
        images[..., 14] = 1.0
        torch.manual_seed(0)
        assert (
            mnist_data.augment(images)[:, 0, 10:18].amax(2).mean() > 0.8
        )  # with bilinear interpolation 0.75

    def test_augmentation_is_none_at_zero(self, monkeypatch: MonkeyPatch) -> None:
        monkeypatch.setattr(
            torch.Tensor, "uniform_", lambda self, low, high: self.fill_((low + high) / 2)
        )
        images = torch.randn(3, 1, 28, 28)
        assert torch.allclose(mnist_data.augment(images), images, atol=1e-4)

    def test_defaults_are_the_recipe(self, monkeypatch: MonkeyPatch) -> None:
        args, recipe, checkpoint = parse("--device", "cpu")
        assert (recipe, checkpoint) == (RECIPE, None)
        folders = {"data_dir": Path("data"), "checkpoint_dir": Path("model_checkpoints")}
        assert (
            vars(args).items() >= (RECIPE | folders | {"model": "Model5", "resume": None}).items()
        )
        monkeypatch.setattr(tt, "device_type", torch.device)
        assert parse("--device", "mps")[1]["batch_size"] == 128
        assert parse("--device", "mps", "--batch-size", "7")[1]["batch_size"] == 7

    @pytest.mark.parametrize(
        "options",
        [
            "--epochs 0", "--epochs 1.5", "--batch-size -1", "--batch-size 1000000000", "--test-batch-size 0",
            "--log-interval 0", "--lr nan", "--lr inf", "--lr -0.1", "--lr fast", "--momentum 1", "--momentum nan",
            "--weight-decay -1", "--val-size -1", "--val-size 50001", "--seed -1", "--seed 4294967296",
            "--lr-scheduler step", "--device abacus", "--device meta", "--model nonsense", "--lr 1e308",
            "--weight-decay 1e308",
        ],
    )  # fmt: skip
    def test_wrong_values(self, options: str, capsys: CaptureFixture) -> None:
        option, value = options.split()
        with raises(SystemExit, match="2"):
            parse(option, value)
        (error,) = capsys.readouterr().err.splitlines()
        assert re.search(f"argument {option}: .*{value!r}", error)

    def test_help(self, capsys: CaptureFixture) -> None:
        with raises(SystemExit):
            parse("--help")
        text = capsys.readouterr().out
        assert len(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)) == 21
        assert len(re.findall(r"\(default:\s", text)) == 16  # not the flags

    @pytest.mark.parametrize("option", ["--data-dir", "--checkpoint-dir"])
    def test_folder_that_is_a_file(self, option: str, train: Callable, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with raises(
            ScriptError, match=f"^cannot create the folder {tmp_path / 'file'}.*; choose another$"
        ):
            train(tmp_path, option, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

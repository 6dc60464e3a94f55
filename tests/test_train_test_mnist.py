"""Training: whole runs, the loop and its parts, augmentation, schedule, seeds and options."""

import csv
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_same, run
from torch import Tensor, nn

import download_mnist as dm
import train_test_mnist as tt
from models import build_model
from utils import ScriptError

RECIPE = {"epochs": 20, "batch_size": 64, "lr": 0.01, "lr_scheduler": "constant", "momentum": 0.9}
RECIPE |= {"weight_decay": 0.0, "augment": False, "val_size": 0, "seed": 1}
THREE_EPOCHS = ("--epochs", 3, "--batch-size", 16, "--lr", 0.05)
STRONG = ("--augment", "--lr-scheduler", "onecyclelr", "--weight-decay", 1e-3, "--val-size", 30, *THREE_EPOCHS)


def load(path: Path) -> dict:
    """Load a checkpoint as a stranger would."""
    return torch.load(path, weights_only=True)


def read_log(folder: Path) -> list[dict[str, str]]:
    """Return the rows of a run's log without the seconds."""
    rows = list(csv.DictReader((folder / "training_log.csv").read_text().splitlines()))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


def table(output: str) -> list[list[re.Match]]:
    """Return the cells of each line of the table of results, header first."""
    lines = [line for line in output.splitlines() if re.match(r"epoch  | +\d+ ", line)]
    return [list(re.finditer(r"(train|val|test) loss|[a-z]+|[\d.]+( %)?", line)) for line in lines]


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
    return numbers.float().view(-1, 1, 1, 1).expand(-1, 1, 28, 28), (numbers + (numbers % 5 == 0)) % 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_command: Callable, tiny_data: Path) -> tuple[Path, str]:
    """The checkpoint folder and the output of three epochs of Model5, started as a user would."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "checkpoints"
    options = ("--data-dir", tiny_data, "--checkpoint-dir", folder, "--device", "cpu", *THREE_EPOCHS)
    result = run(*tiny_command("train_test_mnist.py", *options))
    assert (result.returncode, result.stderr) == (0, "")  # no progress bar where nobody watches
    return folder, result.stdout


class TestRun:
    """A whole run: its files, its output, and how it ends."""

    def test_checkpoints(self, trained: tuple[Path, str]) -> None:
        names = [f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3)]
        assert {path.name for path in trained[0].iterdir()} == {*names, "best_mnist_model.pth", "training_log.csv"}
        checkpoints = [load(trained[0] / name) for name in names]
        recipe, best = RECIPE | {"epochs": 3, "batch_size": 16, "lr": 0.05}, -1.0
        for epoch, checkpoint in enumerate(checkpoints, start=1):
            known = {"model_name": "Model5", "architecture": str(build_model("Model5")), "epoch": epoch, **recipe}
            assert checkpoint.items() >= known.items()
            assert type(checkpoint["test_accuracy"]) is type(checkpoint["train_accuracy"]) is float
            best = max(best, checkpoint["test_accuracy"])
            assert checkpoint["best_test_accuracy"] == best
            assert checkpoint["optimizer_state_dict"]["state"][0]["momentum_buffer"].shape == (6, 1, 3, 3)
        first_best = next(checkpoint for checkpoint in checkpoints if checkpoint["test_accuracy"] == best)
        assert_same(load(trained[0] / "best_mnist_model.pth"), first_best)
        assert best > 50  # it has learned something; guessing gives 10

    def test_report_and_log(self, trained: tuple[Path, str]) -> None:
        folder, output = trained
        lines = output.splitlines()
        assert re.fullmatch(r"Model5 on cpu: epochs 3, batch_size 16, lr 0\.05, .*, seed 1", lines[0])
        for epoch, (cells, row) in enumerate(zip(table(output)[1:], read_log(folder), strict=True), start=1):
            checkpoint = load(folder / f"mnist_model_epoch_{epoch}.pth")
            losses = [f"{checkpoint[f'{part}_loss']:.4f}" for part in ("train", "test")]
            train, test, best = (f"{checkpoint[f'{part}_accuracy']:.2f} %" for part in ("train", "test", "best_test"))
            assert [cell[0] for cell in cells[:-1]] == [str(epoch), losses[0], train, losses[1], test, best]
            assert (row["lr"], row["val_loss"], row["val_accuracy"]) == ("0.05", "", "")
            assert row == {name: "" if checkpoint[name] is None else str(checkpoint[name]) for name in row}
        assert lines[5].endswith(str(folder / "best_mnist_model.pth"))
        assert lines[6].endswith(str(folder / "mnist_model_epoch_3.pth"))
        assert lines[7:] == [f"Next: python analyze_model.py --checkpoint {folder / 'best_mnist_model.pth'}"]

    @pytest.mark.parametrize("options", [(), ("--val-size", 30)])
    def test_header_and_rows_are_aligned(self, options: tuple, train: Callable, tmp_path: Path) -> None:
        lines = table(train(tmp_path, "--epochs", 2, *options))
        assert [cell[0] for cell in lines[0]].count("val loss") == len(options) / 2
        lines += [] if options else table(tt.__doc__.replace("\n    ", "\n"))  # which shows the same columns
        assert len(lines) == (3 if options else 6)
        assert len({tuple(cell.end() for cell in line) for line in lines}) == 1

    @pytest.mark.parametrize(("seed", "equal"), [(1, True), (2, False)])
    def test_seed(self, seed: int, equal: bool, trained: tuple, train: Callable, tmp_path: Path) -> None:
        train(tmp_path, *THREE_EPOCHS, "--seed", seed)
        first, second = (load(folder / "mnist_model_epoch_3.pth") for folder in (trained[0], tmp_path))
        if equal:
            assert_same(first, second)
        else:
            for name, tensor in first["model_state_dict"].items():
                assert name.endswith("num_batches_tracked") or not tensor.equal(second["model_state_dict"][name])

    @pytest.mark.parametrize("val_size", [0, 40])
    def test_best(self, val_size: int, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        choosing = [50.0, 70.0, 70.0, 60.0]  # epoch 2 is the best, for epoch 3 is not strictly better
        tested = [90.0, 20.0, 80.0, 85.0] if val_size else choosing
        results = {val_size: iter(choosing), 100: iter(tested)}  # by number of images
        monkeypatch.setattr(tt, "evaluate", lambda model, images, *args: (1.0, next(results[len(images)])))
        output = train(tmp_path, "--epochs", 4, "--val-size", val_size)
        assert f"Best: epoch 2, test accuracy {tested[1]:.2f} %" in output
        checkpoints = [load(tmp_path / f"mnist_model_epoch_{epoch}.pth") for epoch in (1, 2, 3, 4)]
        best = [(checkpoint["best_epoch"], checkpoint["best_test_accuracy"]) for checkpoint in checkpoints]
        assert best == [(1, tested[0]), *[(2, tested[1])] * 3]
        assert_same(load(tmp_path / "best_mnist_model.pth"), checkpoints[1])
        assert [float(row["test_accuracy"]) for row in read_log(tmp_path)] == tested
        assert [row["val_accuracy"] for row in read_log(tmp_path)] == [str(v) if val_size else "" for v in choosing]

    def test_the_seed_decides(self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tt, "train_one_epoch", lambda *args: (torch.rand(()).item(), 10.0))
        train(tmp_path, "--epochs", 3, "--seed", 5)
        for epoch, row in enumerate(read_log(tmp_path), start=1):
            tt.seed_epoch(5, epoch)
            assert float(row["train_loss"]) == torch.rand(()).item()
        torch.manual_seed(5)  # the first weights depend on the seed, too
        assert_same(load(tmp_path / "best_mnist_model.pth")["model_state_dict"], build_model("Model5").state_dict())

    def test_resuming_with_every_option_is_exact(self, train: Callable, tiny_data: Path, tmp_path: Path) -> None:
        train(tmp_path, *STRONG, "--epochs", 4)
        whole, log = {path.name: load(path) for path in tmp_path.glob("*.pth")}, read_log(tmp_path)
        assert len(whole) == 5
        train(tmp_path, "--resume", tmp_path / "mnist_model_epoch_2.pth")
        assert_same({path.name: load(path) for path in tmp_path.glob("*.pth")}, whole)
        assert read_log(tmp_path) == read_log(tmp_path / "earlier_run_1") == log
        model, test_set = build_model("Model5"), dm.load_mnist(tiny_data, train=False, device=torch.device("cpu"))
        for checkpoint in whole.values():  # what is saved is what was tested
            model.load_state_dict(checkpoint["model_state_dict"])
            loss, accuracy = tt.evaluate(model, *test_set, batch_size=7)
            assert (pytest.approx(loss, rel=1e-5), accuracy) == (checkpoint["test_loss"], checkpoint["test_accuracy"])

    def test_dry_run(self, train: Callable, tmp_path: Path) -> None:
        options = "--dry-run", "--batch-size", 8, "--test-batch-size", 4, "--val-size", 30, "--model", "MODEL2"
        output = train(tmp_path / "new", *options)
        _, row = table(output)  # one epoch
        assert float(row[2][0][:-2]) in [12.5 * correct for correct in range(9)]  # of one batch of eight
        assert {row[4][0], row[6][0]} <= {"0.00 %", "25.00 %", "50.00 %", "75.00 %", "100.00 %"}
        assert output.endswith("Dry run: every step works; nothing was saved\n")
        assert not (tmp_path / "new").exists()

    def test_plot(self, train: Callable, tmp_path: Path) -> None:
        pytest.importorskip("matplotlib", reason="matplotlib is not installed")
        train(tmp_path, "--epochs", 1, "--plot")
        assert (tmp_path / "training_curves.png").read_bytes().startswith(b"\x89PNG")

    def test_plot_without_matplotlib(self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.raises(ScriptError, match=r"^drawing needs matplotlib.*: pip install matplotlib$"):
            train(tmp_path / "new", "--plot")
        assert not (tmp_path / "new").exists()  # no work is lost
        train(tmp_path / "new", "--epochs", 1)

    def test_bad_data(self, train: Callable, tiny_gz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = Path(shutil.copytree(tiny_gz, tmp_path / "data" / "MNIST" / "raw"))
        train(tmp_path, "--data-dir", tmp_path / "data", "--dry-run")
        assert len(list(raw.glob("*ubyte"))) == 4
        file = raw / "t10k-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:999])
        (raw / f"{file.name}.gz").unlink()
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setattr(dm, "MIRRORS", ())
        with pytest.raises(ScriptError, match=f"^missing or damaged in {raw}: {file.name}.*by hand.*$"):
            train(tmp_path, "--data-dir", tmp_path / "data")

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupt(
        self, number: int, status: int, train: Callable, tiny_command: Callable, tiny_data: Path, tmp_path: Path
    ) -> None:
        options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path, "--device", "cpu"
        command = [sys.executable, *tiny_command("train_test_mnist.py", *options, "--epochs", 10**6)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            while not (tmp_path / "mnist_model_epoch_1.pth").exists():
                assert process.poll() is None
                time.sleep(0.05)
            process.send_signal(number)
            process.send_signal(number)  # once more, by an impatient user
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
        assert process.returncode == status
        assert not list(tmp_path.glob("*.tmp"))
        (line,) = errors.splitlines()  # no traceback
        go_on = shlex.split(line.partition("to go on: ")[2])
        assert [go_on[0], go_on[-2]] == ["python", "--resume"]
        finished = len(list(tmp_path.glob("mnist_model_epoch_*.pth")))
        assert load(Path(go_on[-1]))["epoch"] >= finished - 1  # the last one or the one before
        assert "nothing left to do" in train(tmp_path, *go_on[2:], "--epochs", 1)


class TestLoop:
    """The parts of the loop, and what each option does to it."""

    def test_training_sees_every_image_once(self) -> None:
        (images, labels), model = numbered(50), Counter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        loss, accuracy = tt.train_one_epoch(model, optimizer, None, images, labels, 16, log_interval=1)
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        order = torch.cat(model.batches).tolist()
        assert sorted(order) == list(range(50)) != order
        assert accuracy == 80
        expected = nn.functional.cross_entropy(model(images), labels).item()
        assert loss == pytest.approx(expected, rel=1e-5)  # a mean over images, not over batches
        again = tt.train_one_epoch(model.eval(), optimizer, None, images, labels, 16)
        assert again == (pytest.approx(loss), accuracy)  # each epoch counts anew
        assert model.training

    def test_training_takes_sgd_steps_at_the_scheduled_rate(self) -> None:
        model, (images, labels) = Counter(), numbered(30)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))
        tt.train_one_epoch(model, optimizer, scheduler, images, labels, 8)
        weight, velocity = torch.ones((), requires_grad=True), 0.0
        for number, batch in enumerate(batch.long() for batch in model.batches):
            one_hot = nn.functional.one_hot(batch % 10, 10).float()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(weight * one_hot, labels[batch]), weight)
            velocity = 0.9 * velocity + gradient
            weight = (weight - 0.5 / (1 + number) * velocity).detach().requires_grad_()
        assert model.scale.item() == pytest.approx(weight.item(), rel=1e-5)

    def test_shuffle_depends_on_seed_and_epoch_alone(self) -> None:
        def draw(seed: int, epoch: int) -> tuple[int, ...]:
            torch.rand(seed + epoch)  # whatever was drawn before
            tt.seed_epoch(seed, epoch)
            return tuple(torch.randperm(60).tolist())

        draws = {(seed, epoch): draw(seed, epoch) for seed in range(5) for epoch in range(1, 6)}
        assert len(set(draws.values())) == 25
        assert all(draw(*key) == order for key, order in draws.items())

    def test_evaluate(self) -> None:
        images, labels = numbered(30)
        model = build_model("Model5").train()
        loss, accuracy = tt.evaluate(model, images, labels, batch_size=7)
        logits = model.eval()(images)
        assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
        assert (loss, accuracy) == tt.evaluate(model, images, labels, batch_size=7)  # no dropout, no new statistics
        assert tt.evaluate(Counter(), images, labels, batch_size=7)[1] == 80

    def test_each_option_changes_the_training(self, train: Callable, tmp_path: Path) -> None:
        sums = set()
        for option in ("--seed 1", "--augment", "--lr-scheduler onecyclelr", "--weight-decay 0.01", "--val-size 30"):
            train(tmp_path / option, *option.split(), "--epochs", 1, "--batch-size", 16)
            state = load(tmp_path / option / "best_mnist_model.pth")["model_state_dict"]
            sums.add(sum(tensor.double().sum().item() for tensor in state.values()))
        assert len(sums) == 5

    def test_schedule(self, train: Callable, tmp_path: Path) -> None:
        train(tmp_path, "--lr-scheduler", "onecyclelr", "--epochs", 10, "--batch-size", 16)  # 13 batches an epoch
        rates = [float(row["lr"]) for row in read_log(tmp_path)]
        assert rates[0] == pytest.approx(0.01 / 25)
        assert rates[3] == pytest.approx(0.01, rel=0.01)  # the peak, after 30 % of the steps
        assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
        assert load(tmp_path / "mnist_model_epoch_10.pth")["optimizer_state_dict"]["param_groups"][0]["lr"] < 1e-5

    def test_augment(self) -> None:
        image = torch.full((1, 1, 28, 28), -0.4)
        image[0, 0, 14, 20] = 3.0  # 6.5 pixels right of the centre
        torch.manual_seed(0)
        images = tt.augment(image.expand(2000, -1, -1, -1))
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
        assert tt.augment(images)[:, 0, 10:18].amax(2).mean() > 0.8  # with bilinear interpolation 0.75

    def test_augmentation_is_none_at_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_((low + high) / 2))
        images = torch.randn(3, 1, 28, 28)
        assert torch.allclose(tt.augment(images), images, atol=1e-4)


def parse(monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple:
    """Parse the options of a command line."""
    monkeypatch.setattr("sys.argv", ["train_test_mnist.py", *options])
    return tt.parse_args()


class TestOptions:
    """The command line."""

    def test_defaults_are_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args, recipe, checkpoint = parse(monkeypatch, "--device", "cpu")
        assert (recipe, checkpoint) == (RECIPE, None)
        folders = {"data_dir": Path("data"), "checkpoint_dir": Path("model_checkpoints")}
        assert vars(args).items() >= (RECIPE | folders | {"model": "Model5", "resume": None}).items()

    @pytest.mark.parametrize("device", ["cuda", "mps"])
    def test_batch_size_on_a_gpu(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tt, "device_type", torch.device)
        assert parse(monkeypatch, "--device", device)[1]["batch_size"] == 128
        assert parse(monkeypatch, "--device", device, "--batch-size", "7")[1]["batch_size"] == 7

    @pytest.mark.parametrize(
        "options",
        [
            "--epochs 0", "--epochs 1.5", "--batch-size -1", "--batch-size 1000000000", "--test-batch-size 0",
            "--log-interval 0", "--lr nan", "--lr inf", "--lr -0.1", "--lr fast", "--momentum 1", "--momentum nan",
            "--weight-decay -1", "--val-size -1", "--val-size 50001", "--seed -1", "--seed 4294967296",
            "--lr-scheduler step", "--device abacus", "--device meta", "--model nonsense",
        ],
    )  # fmt: skip
    def test_wrong_values(self, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        option, value = options.split()
        with pytest.raises(SystemExit) as stop:
            parse(monkeypatch, option, value)
        assert stop.value.code == 2
        (error,) = capsys.readouterr().err.splitlines()
        assert f"argument {option}:" in error
        assert repr(value) in error

    def test_help(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit):
            parse(monkeypatch, "--help")
        text = capsys.readouterr().out
        assert len(re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)) == 19
        assert len(re.findall(r"\(default:\s", text)) == 15  # all but --augment, --deterministic, --plot and --dry-run

    @pytest.mark.parametrize("option", ["--data-dir", "--checkpoint-dir"])
    def test_folder_that_is_a_file(self, option: str, train: Callable, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        with pytest.raises(ScriptError, match=f"^cannot create the folder {tmp_path / 'file'}.*; choose another$"):
            train(tmp_path, option, tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

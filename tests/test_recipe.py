"""Validation, the options beyond the default recipe, and what a run leaves to compare it by."""

import csv
import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import assert_same
from PIL import Image
from torch import nn

import train_test_mnist as tt
from models import build_model

STRONG = ("--augment", "--lr-scheduler", "onecyclelr", "--lr", 0.05, "--weight-decay", 1e-3, "--val-size", 30)


@pytest.fixture
def train(
    tiny_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tiny_mnist: None
) -> Callable[..., str]:
    """A function that trains on the tiny data set, in this process, and returns the output."""

    def run_main(folder: Path, *options: object) -> str:
        words = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--batch-size", 16, "--device", "cpu", *options
        monkeypatch.setattr("sys.argv", ["train_test_mnist.py", *map(str, words)])
        tt.main()
        return capsys.readouterr().out

    return run_main


def read_log(folder: Path) -> list[dict[str, str]]:
    """Return the lines of a run's log, without the seconds."""
    rows = list(csv.DictReader(io.StringIO((folder / "training_log.csv").read_text())))
    assert all(float(row.pop("seconds")) > 0 for row in rows)
    return rows


class TestValidation:
    """Images held out of the training set."""

    def test_held_out_images(self) -> None:
        labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 20 + [3] * 5)[torch.randperm(100)]
        images = torch.arange(100.0).view(-1, 1, 1, 1)
        (kept, kept_labels), (held, held_labels) = tt.hold_out(images, labels, 30)
        assert held_labels.bincount().tolist() == [15, 8, 6, 1]  # of 15, 7.5, 6 and 1.5 the largest remainder
        assert torch.cat([kept, held]).flatten().sort().values.equal(torch.arange(100.0))
        assert kept_labels.equal(labels[kept.flatten().long()])
        assert held_labels.equal(labels[held.flatten().long()])
        for digit in range(4):  # the last ones
            assert held[held_labels == digit].min() > kept[kept_labels == digit].max()

    def test_choice_of_the_best_epoch(self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        accuracies = iter([50.0, 90.0, 70.0, 20.0, 70.0, 80.0])  # validation and test of three epochs
        sizes = []

        def evaluate(model: nn.Module, images: torch.Tensor, *args: object) -> tuple[float, float]:
            sizes.append(len(images))
            return 1.0, next(accuracies)

        monkeypatch.setattr(tt, "evaluate", evaluate)
        output = train(tmp_path, "--val-size", 40, "--epochs", 3)
        assert sizes == [40, 100] * 3
        assert "Best: epoch 2, test accuracy 20.00 %" in output
        best = tt.load_checkpoint(tmp_path / "best_mnist_model.pth")
        assert (best["epoch"], best["val_accuracy"], best["best_test_accuracy"]) == (2, 70, 20)
        last = tt.load_checkpoint(tmp_path / "mnist_model_epoch_3.pth")
        assert (last["best_epoch"], last["best_test_accuracy"], last["test_accuracy"]) == (2, 20, 80)
        assert [row["val_accuracy"] for row in read_log(tmp_path)] == ["50.0", "70.0", "70.0"]


class TestIngredients:
    """Each option does what it says."""

    def test_augment(self) -> None:
        image = torch.full((1, 1, 28, 28), -0.4)
        image[0, 0, 14, 20] = 3.0  # 6.5 pixels right of the centre
        torch.manual_seed(0)
        images = tt.augment(image.expand(2000, -1, -1, -1))
        assert images.shape == (2000, 1, 28, 28)
        weights = (images[:, 0] + 0.4).clamp(min=0)  # bicubic interpolation undershoots
        assert (weights[:, :, :10] < 1e-6).all()  # the background stays
        grid = torch.arange(28.0)
        x = (weights.sum(1) * grid).sum(1) / weights.sum((1, 2))
        y = (weights.sum(2) * grid).sum(1) / weights.sum((1, 2))
        # a shift of 3, a scale of 10 % of 6.5 and a turn of 10 degrees, or 6.5 * sin(10) = 1.1 up and down
        assert 3 < (x - 20).abs().max() < 3 + 0.75 + 0.4
        assert 3 < (y - 14).abs().max() < 3 + 2 * 1.15 + 0.4
        assert abs(x.mean() - 20) < 0.2
        assert abs(y.mean() - 14) < 0.2

    def test_augmentation_keeps_thin_strokes(self) -> None:
        images = torch.zeros(2000, 1, 28, 28)
        images[..., 14] = 1.0
        torch.manual_seed(0)
        centre = tt.augment(images)[:, 0, 10:18]
        assert centre.amax(2).mean() > 0.8  # with bilinear interpolation 0.75

    def test_augmentation_is_none_at_zero(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.fill_((low + high) / 2))
        images = torch.randn(3, 1, 28, 28)
        assert torch.allclose(tt.augment(images), images, atol=1e-4)

    def test_augmentation_where_torch_has_none(
        self, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
    ) -> None:
        def grid_sample(*args: object, **options: object) -> None:
            raise RuntimeError("unsupported interpolation")

        monkeypatch.setattr(tt.F, "grid_sample", grid_sample)
        with pytest.raises(SystemExit):
            train(tmp_path, "--augment")
        assert "(unsupported interpolation); use --device cpu" in capsys.readouterr().err

    def test_learning_rate_of_each_step(self) -> None:
        images, labels = torch.randn(20, 1, 28, 28), torch.randint(10, (20,))
        model, expected = (nn.Sequential(nn.Flatten(), nn.Linear(784, 10)) for _ in range(2))
        expected.load_state_dict(model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda steps: 1 / (1 + steps))
        step = tt.TrainingStep(model, optimizer, images, labels, 8, scheduler=scheduler)
        for number, batch in enumerate(torch.arange(20).split(8)):
            step(batch)
            loss = nn.functional.cross_entropy(expected(images[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(expected.parameters()))
            with torch.no_grad():
                for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
                    parameter -= 0.1 / (1 + number) * gradient
        assert torch.allclose(model[1].weight, expected[1].weight, atol=1e-6)


class TestRuns:
    """Whole runs with every option."""

    def test_each_option_changes_the_training(self, train: Callable, tmp_path: Path) -> None:
        weights = []
        for option in ("--seed 1", "--augment", "--lr-scheduler onecyclelr", "--weight-decay 0.01", "--val-size 30"):
            folder = tmp_path / option
            train(folder, *option.split(), "--epochs", 1)
            weights.append(tt.load_checkpoint(folder / "best_mnist_model.pth")["model_state_dict"])
        sums = {sum(tensor.double().sum().item() for tensor in state.values()) for state in weights}
        assert len(sums) == 5

    def test_resuming_is_exact(self, train: Callable, tmp_path: Path) -> None:
        train(tmp_path / "whole", *STRONG, "--epochs", 4)
        plain = tmp_path / "parts"
        train(plain, *STRONG, "--epochs", 4)
        for name in ("mnist_model_epoch_3.pth", "mnist_model_epoch_4.pth", "best_mnist_model.pth", "training_log.csv"):
            (plain / name).unlink()
        train(plain, "--resume")
        folders = [
            {path.name: tt.load_checkpoint(path) for path in folder.glob("*.pth")}
            for folder in (tmp_path / "whole", plain)
        ]
        assert_same(*folders)
        assert len(folders[0]) == 5
        assert read_log(tmp_path / "whole") == read_log(plain)

    def test_what_is_saved_is_what_was_tested(self, train: Callable, tmp_path: Path, tiny_data: Path) -> None:
        train(tmp_path, *STRONG, "--epochs", 2)
        checkpoint = tt.load_checkpoint(tmp_path / "mnist_model_epoch_2.pth")
        model = build_model("Model5")
        model.load_state_dict(checkpoint["model_state_dict"])
        test_set = tt.load_mnist(tiny_data, train=False, device=torch.device("cpu"))
        loss, accuracy = tt.evaluate(model, *test_set, 250)
        assert accuracy == checkpoint["test_accuracy"]
        assert float(read_log(tmp_path)[1]["test_loss"]) == pytest.approx(loss, rel=1e-6)

    def test_log(self, train: Callable, tmp_path: Path) -> None:
        output = train(tmp_path, "--epochs", 2)
        rows = read_log(tmp_path)
        assert [row["epoch"] for row in rows] == ["1", "2"]
        assert [row["lr"] for row in rows] == ["0.01", "0.01"]
        assert {row["val_loss"] + row["val_accuracy"] for row in rows} == {""}
        printed = [line.split() for line in output.splitlines() if line.strip()[:1].isdigit()]
        names = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        digits = (4, 2, 4, 2)
        for row, line in zip(rows, printed, strict=True):
            words = [word for word in line[1:-1] if word != "%"]
            assert [f"{float(row[name]):.{n}f}" for name, n in zip(names, digits, strict=True)] == words[:4]
        train(tmp_path, "--resume", tmp_path / "mnist_model_epoch_1.pth", "--epochs", 3)
        assert [row["epoch"] for row in read_log(tmp_path)] == ["1", "2", "3"]
        assert read_log(tmp_path)[:2] == rows
        train(tmp_path, "--epochs", 1)  # a new run starts a new log and sets the old one aside
        assert len(read_log(tmp_path)) == 1
        assert len(read_log(tmp_path / "earlier_run_1")) == 3

    @pytest.mark.parametrize("options", [(), ("--val-size", 30)])
    def test_plot(self, options: tuple, train: Callable, tmp_path: Path) -> None:
        train(tmp_path, "--epochs", 2, "--plot", *options)
        picture = Image.open(tmp_path / "training_curves.png").convert("RGB")
        colours = {colour for _, colour in picture.getcolors(10**6)}
        assert {(31, 119, 180), (214, 39, 40)} <= colours
        assert ((44, 160, 44) in colours) == bool(options)

    def test_plot_without_errors(self, tmp_path: Path) -> None:
        row = {f"{part}_{name}": 100.0 for part in ("train", "test") for name in ("loss", "accuracy")}
        tt.save_curves(tmp_path / "curves.png", [row | {"epoch": 1, "val_loss": None}], "Perfect")
        assert Image.open(tmp_path / "curves.png").size[0] > 900

    def test_schedule(self, train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        train(tmp_path, "--lr-scheduler", "onecyclelr", "--epochs", 10)  # of 13 batches each
        rates = [float(row["lr"]) for row in read_log(tmp_path)]
        assert rates[0] == pytest.approx(0.01 / 25)
        assert rates[3] == pytest.approx(0.01, rel=0.01)  # the peak, after 30 % of the steps
        assert rates == [*sorted(rates[:4]), *sorted(rates[4:], reverse=True)]
        last = tt.load_checkpoint(tmp_path / "mnist_model_epoch_10.pth")["optimizer_state_dict"]
        assert last["param_groups"][0]["lr"] < 1e-5
        with pytest.raises(SystemExit):
            train(tmp_path, "--resume", "--epochs", 20)
        assert "whose schedule has 10 epochs" in capsys.readouterr().err

"""Training: the recipe, the checkpoints, what a seed fixes, and every way to get an option wrong."""

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
import torchvision
from conftest import ROOT, assert_one_line, assert_same, run
from torch import Tensor, nn

import train_test_mnist as tt
from models import build_model

CPU = torch.device("cpu")
KEYS = {
    "model_name", "model_state_dict", "optimizer_state_dict", "epoch",
    "train_accuracy", "test_accuracy", "best_test_accuracy",
}  # fmt: skip
ROW = r" +(\d+) +([\d.]+) +([\d.]+) % +([\d.]+) +([\d.]+) % +([\d.]+) % +[\d.]+"


def load(path: Path) -> dict:
    """Load a checkpoint as a stranger would."""
    return torch.load(path, weights_only=True)


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
    images = torch.zeros(count, 1, 28, 28)
    images[:, 0, 0, 0] = numbers
    return images, (numbers + (numbers % 5 == 0)) % 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_command: Callable, tiny_data: Path) -> tuple[Path, str]:
    """The checkpoint folder and the output of three epochs of Model5 on the tiny data set."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "checkpoints"
    options = ("--data-dir", tiny_data, "--checkpoint-dir", folder, "--epochs", 3, "--batch-size", 16, "--lr", 0.05)
    result = run(*tiny_command("train_test_mnist.py", *options))
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""  # no progress bar where nobody watches
    return folder, result.stdout


class TestRun:
    """A whole run, as a user starts it."""

    def test_files(self, trained: tuple[Path, str]) -> None:
        names = {"best_mnist_model.pth", *(f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3))}
        assert {path.name for path in trained[0].iterdir()} == names | {"training_log.csv"}

    def test_checkpoints(self, trained: tuple[Path, str]) -> None:
        checkpoints = [load(trained[0] / f"mnist_model_epoch_{epoch}.pth") for epoch in (1, 2, 3)]
        best = -1.0
        for epoch, checkpoint in enumerate(checkpoints, start=1):
            assert checkpoint.keys() >= KEYS
            assert checkpoint["model_name"] == "Model5"
            assert checkpoint["epoch"] == epoch
            assert type(checkpoint["test_accuracy"]) is type(checkpoint["train_accuracy"]) is float
            best = max(best, checkpoint["test_accuracy"])
            assert checkpoint["best_test_accuracy"] == best
            assert checkpoint["optimizer_state_dict"]["state"][0]["momentum_buffer"].shape == (6, 1, 3, 3)
            recipe = {"epochs": 3, "batch_size": 16, "lr": 0.05, "momentum": 0.9, "seed": 1, "compile": False}
            assert recipe.items() <= checkpoint.items()
        first_best = next(checkpoint for checkpoint in checkpoints if checkpoint["test_accuracy"] == best)
        assert_same(load(trained[0] / "best_mnist_model.pth"), first_best)
        assert best > 50  # it has learned something; guessing gives 10

    def test_report(self, trained: tuple[Path, str]) -> None:
        rows = re.findall(ROW, trained[1])
        assert [int(row[0]) for row in rows] == [1, 2, 3]
        for row, epoch in zip(rows, (1, 2, 3), strict=True):
            checkpoint = load(trained[0] / f"mnist_model_epoch_{epoch}.pth")
            names = ("train_accuracy", "test_accuracy", "best_test_accuracy")
            assert [row[2], row[4], row[5]] == [f"{checkpoint[name]:.2f}" for name in names]
        lines = trained[1].splitlines()
        assert len({len(line) for line in lines[1:5]}) == 1  # header and rows are aligned
        assert lines[5].endswith(str(trained[0] / "best_mnist_model.pth"))
        assert lines[6].endswith(str(trained[0] / "mnist_model_epoch_3.pth"))
        assert lines[7] == f"Next: python analyze_model.py --checkpoint {trained[0] / 'best_mnist_model.pth'}"

    def test_saved_accuracy_can_be_recomputed(self, trained: tuple[Path, str], tiny_data: Path) -> None:
        checkpoint = load(trained[0] / "best_mnist_model.pth")
        model = build_model(checkpoint["model_name"])
        model.load_state_dict(checkpoint["model_state_dict"])
        test_set = tt.load_mnist(tiny_data, train=False, device=CPU)
        assert tt.evaluate(model, *test_set, batch_size=7)[1] == checkpoint["test_accuracy"]

    @pytest.mark.parametrize(("seed", "equal"), [(1, True), (2, False)])
    def test_seed(
        self, seed: int, equal: bool, trained: tuple, tiny_command: Callable, tiny_data: Path, tmp_path: Path
    ) -> None:
        options = (
            "--data-dir",
            tiny_data,
            "--checkpoint-dir",
            tmp_path,
            "--epochs",
            3,
            "--batch-size",
            16,
            "--lr",
            0.05,
        )
        assert run(*tiny_command("train_test_mnist.py", *options, "--seed", seed)).returncode == 0
        first, second = (load(folder / "mnist_model_epoch_3.pth") for folder in (trained[0], tmp_path))
        if equal:
            assert_same(first, second)
        else:
            for name, tensor in first["model_state_dict"].items():
                assert name.endswith("num_batches_tracked") or not tensor.equal(second["model_state_dict"][name])

    def test_an_earlier_run_is_kept(self, tiny_command: Callable, tiny_data: Path, tmp_path: Path) -> None:
        options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path, "--epochs", 1, "--model", "model1"
        (tmp_path / "mnist_model_epoch_7.pth").write_bytes(b"dear")
        (tmp_path / "best_mnist_model.pth").write_bytes(b"dearest")
        (tmp_path / "notes.txt").write_text("mine")
        new = {"best_mnist_model.pth", "mnist_model_epoch_1.pth"}
        for run_number in (1, 2):
            result = run(*tiny_command("train_test_mnist.py", *options))
            assert result.returncode == 0, result.stderr
            assert f"earlier_run_{run_number}" in result.stdout
            assert {path.name for path in tmp_path.glob("*.pth")} == new
        assert {path.name for path in (tmp_path / "earlier_run_2").iterdir()} == new | {"training_log.csv"}
        assert (tmp_path / "earlier_run_1" / "mnist_model_epoch_7.pth").read_bytes() == b"dear"
        assert (tmp_path / "earlier_run_1" / "best_mnist_model.pth").read_bytes() == b"dearest"
        assert (tmp_path / "notes.txt").read_text() == "mine"

    @pytest.mark.usefixtures("tiny_mnist")
    def test_best_and_shuffle_of_each_epoch(
        self, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        accuracies, draws = iter([50.0, 70.0, 70.0, 60.0]), []

        def draw(*args: object) -> tuple[float, float]:
            draws.append(torch.randperm(60))
            return 1.0, 10.0

        monkeypatch.setattr(tt, "train_one_epoch", draw)
        monkeypatch.setattr(tt, "evaluate", lambda *args: (1.0, next(accuracies)))
        options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path, "--epochs", 4, "--seed", 5
        monkeypatch.setattr("sys.argv", ["train_test_mnist.py", *map(str, options)])
        tt.main()
        best = [load(tmp_path / f"mnist_model_epoch_{epoch}.pth")["best_test_accuracy"] for epoch in (1, 2, 3, 4)]
        assert best == [50, 70, 70, 70]
        assert load(tmp_path / "best_mnist_model.pth")["epoch"] == 2  # strictly better, so not 3
        for epoch, order in enumerate(draws, start=1):
            tt.seed_epoch(5, epoch)
            assert order.equal(torch.randperm(60))

    def test_missing_data_is_fetched(self, tiny_command: Callable, tiny_gz: Path, tmp_path: Path) -> None:
        raw = tmp_path / "data" / "MNIST" / "raw"
        raw.parent.mkdir(parents=True)
        tiny_gz.rename(raw)
        result = run(*tiny_command("train_test_mnist.py", "--data-dir", tmp_path / "data", "--dry-run"))
        assert result.returncode == 0, result.stderr
        assert len(list(raw.glob("*ubyte"))) == 4

    def test_truncated_data_is_one_line(
        self, tiny_command: Callable, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        shutil.copytree(tiny_data, tmp_path / "data")
        file = tmp_path / "data" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
        file.write_bytes(file.read_bytes()[:999])
        result = run(*tiny_command("train_test_mnist.py", "--data-dir", tmp_path / "data"))
        assert_one_line(result, str(file.parent), file.name, "by hand")

    def test_dry_run(self, tiny_command: Callable, tiny_data: Path, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoints"
        options = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--dry-run", "--test-batch-size", 4
        result = run(*tiny_command("train_test_mnist.py", *options, "--model", "MODEL2"))
        assert result.returncode == 0, result.stderr
        (row,) = re.findall(ROW, result.stdout)
        assert float(row[4]) in (0, 25, 50, 75, 100)  # one test batch of four images
        assert not folder.exists()

    @pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_interrupt(self, number: int, status: int, tiny_command: Callable, tiny_data: Path, tmp_path: Path) -> None:
        options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path, "--device", "cpu"
        command = [sys.executable, *tiny_command("train_test_mnist.py", *options, "--epochs", 10**6)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job's ignores it
        )
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
        assert "Traceback" not in errors
        assert not list(tmp_path.glob("*.tmp"))
        (line,) = errors.splitlines()
        go_on = shlex.split(line.partition("to go on: ")[2])
        assert [go_on[0], go_on[-2]] == ["python", "--resume"]
        finished = tt.load_checkpoint(Path(go_on[-1]))["epoch"]
        assert finished >= len(list(tmp_path.glob("mnist_model_epoch_*.pth"))) - 1  # the last one or the one before
        result = run(*tiny_command(*go_on[1:], "--epochs", 1))
        assert result.returncode == 0, result.stderr
        assert "nothing left to do" in result.stdout


class TestFunctions:
    """The parts of the loop."""

    def test_training_sees_every_image_once(self) -> None:
        images, labels = numbered(50)
        model = Counter()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        step = tt.TrainingStep(model, optimizer, images, labels, 16)
        loss, accuracy = tt.train_one_epoch(step, 1, "")
        assert [len(batch) for batch in model.batches] == [16, 16, 16, 2]
        order = torch.cat(model.batches)
        assert not order.equal(torch.arange(50.0))
        assert order.sort().values.equal(torch.arange(50.0))
        assert accuracy == 80
        expected = nn.functional.cross_entropy(model(images), labels).item()
        assert loss == pytest.approx(expected, rel=1e-5)  # a mean over images, not over batches
        assert tt.train_one_epoch(step, 1, "") == (pytest.approx(loss), accuracy)  # each epoch counts anew

    def test_training_takes_sgd_steps(self) -> None:
        model, (images, labels) = Counter(), numbered(32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        weight, velocity = torch.ones((), requires_grad=True), 0.0
        tt.train_one_epoch(tt.TrainingStep(model, optimizer, images, labels, 8), 10, "")
        for batch in [batch.long() for batch in model.batches]:
            one_hot = nn.functional.one_hot(batch % 10, 10).float()
            (gradient,) = torch.autograd.grad(nn.functional.cross_entropy(weight * one_hot, labels[batch]), weight)
            velocity = 0.9 * velocity + gradient
            weight = (weight - 0.5 * velocity).detach().requires_grad_()
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
        # a second time the same: no dropout, and no new statistics
        assert (loss, accuracy) == tt.evaluate(model, images, labels, batch_size=7)
        assert tt.evaluate(Counter(), images, labels, batch_size=7)[1] == 80

    def test_images_are_what_torchvision_would_give(self, tiny_data: Path) -> None:
        transform = torchvision.transforms.Compose(
            [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.1307,), (0.3081,))]
        )
        dataset = torchvision.datasets.MNIST(tiny_data, train=True, transform=transform)
        images, labels = tt.load_mnist(tiny_data, train=True, device=CPU)
        assert images.shape == (200, 1, 28, 28)
        assert len(tt.load_mnist(tiny_data, train=False, device=CPU)[0]) == 100
        for index in (0, 7, 199):
            image, label = dataset[index]
            assert torch.allclose(images[index], image, atol=1e-6)
            assert labels[index] == label

    def test_real_mnist(self, real_data: Path) -> None:
        images, labels = tt.load_mnist(real_data, train=True, device=CPU)
        assert images.shape == (60000, 1, 28, 28)
        assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
        assert images.mean().item() == pytest.approx(0, abs=1e-3)
        assert images.std().item() == pytest.approx(1, abs=1e-3)


def parse(monkeypatch: pytest.MonkeyPatch, *options: str) -> object:
    """Parse the options of a command line."""
    monkeypatch.setattr("sys.argv", ["train_test_mnist.py", *options])
    return tt.parse_args()


class TestOptions:
    """The command line."""

    def test_defaults_are_the_recipe(self, monkeypatch: pytest.MonkeyPatch) -> None:
        args = vars(parse(monkeypatch, "--device", "cpu"))
        recipe = {"model": "Model5", "epochs": 20, "batch_size": 64, "lr": 0.01, "momentum": 0.9, "seed": 1}
        assert recipe.items() <= args.items()
        assert (args["data_dir"], args["checkpoint_dir"]) == (Path("data"), Path("model_checkpoints"))

    def test_on_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tt, "device_type", torch.device)
        assert parse(monkeypatch, "--device", "cuda").cuda_graph
        assert not parse(monkeypatch, "--device", "cuda", "--no-cuda-graph").cuda_graph
        assert not parse(monkeypatch, "--device", "mps").cuda_graph
        assert parse(monkeypatch, "--device", "cuda").batch_size == 128
        assert parse(monkeypatch, "--device", "cuda", "--batch-size", "7").batch_size == 7

    @pytest.mark.parametrize(
        "options",
        [
            "--epochs 0", "--epochs 1.5", "--batch-size -1", "--batch-size 1000000000",
            "--test-batch-size 0", "--log-interval 0",
            "--lr nan", "--lr inf", "--lr -0.1", "--lr fast", "--momentum 1", "--momentum nan",
            "--seed -1", "--seed 4294967296", "--device abacus", "--device meta", "--model nonsense",
        ],
    )  # fmt: skip
    def test_wrong_values(self, options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        option, value = options.split()
        with pytest.raises(SystemExit) as stop:
            parse(monkeypatch, option, value)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert f"argument {option}:" in error
        assert repr(value) in error
        if option not in ("--model", "--device"):
            assert "number of at least" in error

    def test_help_tells_every_option_and_its_default(self) -> None:
        text = run("train_test_mnist.py", "--help").stdout
        options = re.findall(r"^  (--[\w-]+)", text, re.MULTILINE)
        assert len(options) == 21
        assert text.count("(default: ") == 17  # all but --augment, --deterministic, --dry-run and --plot

    def test_cuda_graph_needs_cuda(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        with pytest.raises(SystemExit) as stop:
            parse(monkeypatch, "--cuda-graph", "--device", "cpu")
        assert stop.value.code == 2
        assert "--cuda-graph needs a CUDA GPU, not cpu" in capsys.readouterr().err

    @pytest.mark.parametrize("option", ["--data-dir", "--checkpoint-dir"])
    def test_folder_that_is_a_file(self, option: str, tiny_command: Callable, tiny_data: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        options = {"--data-dir": tiny_data, "--checkpoint-dir": tmp_path} | {option: tmp_path / "file"}
        result = run(*tiny_command("train_test_mnist.py", *(word for pair in options.items() for word in pair)))
        assert_one_line(result, str(tmp_path / "file"), "choose another")
        assert (tmp_path / "file").read_text() == "mine"

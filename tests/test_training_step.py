"""One training step: the same results whether taken operation by operation, compiled, or replayed as a CUDA graph."""

import contextlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import benchmark_training
import pytest
import torch
from conftest import ROOT, assert_same, run
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import train_test_mnist as tt
from download_mnist import ScriptError
from models import build_model


class Graph(TorchDispatchMode):
    """Does on the CPU what a CUDA graph does: it replays the recorded operations on the recorded tensors.

    No Python of the step runs again, and recording itself leaves every tensor and the random numbers as they were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.before, self.replays = [], {}, 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        """Keep what an operation is given, let it run, and note it."""
        for tensor in tree_flatten(args)[0]:
            if isinstance(tensor, Tensor) and tensor.data_ptr() not in self.before:
                self.before[tensor.data_ptr()] = (tensor, tensor.clone())
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record the operations of a with block."""
        state = torch.get_rng_state()
        with self:
            yield
        torch.set_rng_state(state)
        with torch.no_grad():
            for tensor, before in self.before.values():
                tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do it all again, from what the recorded tensors hold now."""
        self.replays += 1
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch.cuda record and replay on the CPU."""

    class Stream:
        def wait_stream(self, other: object) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Graph.recording)


def new_step(model: nn.Module, **options: bool) -> tt.TrainingStep:
    """Return a step on 45 images in batches of 8."""
    torch.manual_seed(0)
    images, labels = torch.randn(45, 1, 28, 28), torch.randint(10, (45,))
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return tt.TrainingStep(model, optimizer, images, labels, 8, **options)


def train(step: tt.TrainingStep) -> dict:
    """Train for three epochs and return all there is to compare."""
    results = []
    for epoch in (1, 2, 3):
        tt.seed_epoch(1, epoch)
        results.append(tt.train_one_epoch(step, 2, ""))
        logits = step.model.eval()(step.images)  # something between two epochs, as a test is
    return {
        "results": dict(enumerate(results)),
        "model": step.model.state_dict(),
        "optimizer": step.optimizer.state_dict()["state"],
        "logits": logits.detach(),
        "random": torch.get_rng_state(),
    }


class Waiting(nn.Module):
    """A model that looks at a number on the GPU, of which torch warns."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> Tensor:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return self.linear(x.flatten(1)) if x.sum().item() < 1e9 else x


@pytest.mark.usefixtures("cuda")
class TestCudaGraph:
    """Recording and replaying, on a stand-in for CUDA."""

    @pytest.mark.parametrize("name", ["Model1", "Model2", "Model5"])
    def test_same_results(self, name: str) -> None:
        expected = train(new_step(build_model(name)))
        step = new_step(build_model(name), graphed=True)
        assert_same(train(step), expected)
        assert step.graph.replays == 3 * 5 - 3  # all but three warm-ups and the three short batches

    def test_recording_alone_changes_nothing(self) -> None:
        step = new_step(build_model("Model5"), graphed=True)
        plain = new_step(build_model("Model5"))
        for number in range(3):
            for each in (step, plain):
                tt.seed_epoch(1, number)
                each(torch.arange(8) + 8 * number)
        assert step.graph.replays == 0
        assert_same(step.model.state_dict(), plain.model.state_dict())
        assert step.totals.equal(plain.totals)

    @pytest.mark.filterwarnings("ignore:called a synchronizing")
    def test_a_model_that_waits_for_the_gpu(self, capsys: pytest.CaptureFixture) -> None:
        expected = train(new_step(Waiting()))
        step = new_step(Waiting(), graphed=True)
        assert_same(train(step), expected)
        assert step.graph is None
        (line,) = capsys.readouterr().err.splitlines()
        assert "without a CUDA graph" in line

    def test_a_step_that_cannot_be_recorded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @contextlib.contextmanager
        def fail(graph: Graph) -> Iterator[None]:
            yield
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        monkeypatch.setattr(torch.cuda, "graph", fail)
        with pytest.raises(ScriptError, match=r"stream is capturing more.*--no-cuda-graph"):
            train(new_step(build_model("Model1"), graphed=True))


class TestCompile:
    """torch.compile, where there is a compiler, and where there is none."""

    def test_same_results(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        model = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Dropout(0.5))  # noqa: E731
        expected = train(new_step(model()))
        step = new_step(model(), compiled=True)
        result = train(step)
        if not step.compiled:
            pytest.skip(capsys.readouterr().err)
        assert torch.allclose(result["logits"], expected["logits"], atol=1e-4)
        assert result["random"].equal(expected["random"])  # the same masks
        assert list(result["model"]) == list(expected["model"])  # no prefix in the names

    def test_without_a_compiler(self, tiny_command: Callable, tiny_data: Path, tmp_path: Path) -> None:
        env = os.environ | {
            "PATH": str(tmp_path),
            "CXX": "no-compiler",
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        }
        outputs = []
        for option in ("--compile", "--no-compile"):
            options = "--data-dir", tiny_data, "--checkpoint-dir", tmp_path / option, "--epochs", 1, option
            command = [sys.executable, *tiny_command("train_test_mnist.py", "--device", "cpu", *options)]
            result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
            assert result.returncode == 0, result.stderr
            outputs.append(result)
        assert "training goes on without" in outputs[0].stderr.splitlines()[-1]
        first, second = (
            tt.load_checkpoint(tmp_path / option / "best_mnist_model.pth") for option in ("--compile", "--no-compile")
        )
        assert (first.pop("compile"), second.pop("compile")) == (True, False)
        assert_same(first, second)


class TestBenchmark:
    """tests/benchmark_training.py, on the tiny data set; what it finds is not tested."""

    def test_variants(self, tiny_data: Path) -> None:
        args = SimpleNamespace(model="Model5", device=torch.device("cpu"), batch_size=16, data_dir=tiny_data)
        variants = benchmark_training.variants(args.device)
        assert len(variants) == 9
        for prepare, *options in variants.values():
            if options in ([], [0]):  # neither compiled nor with workers
                for work in prepare(args, *options):
                    work(2)

    @pytest.mark.usefixtures("tiny_mnist")
    def test_tables(
        self,
        tiny_data: Path,
        tiny_sums: dict,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture,
    ) -> None:
        chosen = {"classic loop": (benchmark_training.classic, 0), "this repository": (benchmark_training.shipped,)}
        monkeypatch.setattr(benchmark_training, "variants", lambda device: chosen)
        commands = []
        instead = SimpleNamespace(run=lambda command, **options: commands.append(command), DEVNULL=None)
        monkeypatch.setattr(benchmark_training, "subprocess", instead)
        options = "--rounds", 1, "--steps", 3, "--data-dir", tiny_data, "--json", tmp_path / "speed.json"
        monkeypatch.setattr("sys.argv", ["benchmark_training.py", *map(str, options)])
        benchmark_training.main()
        monkeypatch.undo()
        results = json.loads((tmp_path / "speed.json").read_text())
        rows = results["models"]["Model5"]
        assert [row["variant"] for row in rows] == list(chosen)
        assert rows[0]["times_as_fast_as_classic"] == 1
        assert all(row["epoch_seconds"] > 938 * row["step_seconds"] > 0 for row in rows)
        lines = capsys.readouterr().out.splitlines()
        assert [line[:34].strip() for line in lines[3:5]] == list(chosen)
        assert [line[:46].strip() for line in lines[7:]] == [row["start"] for row in results["start_up"]]
        # the last command goes as far as the first step, and no farther
        result = run("-c", f"import download_mnist; download_mnist.FILES = {tiny_sums}; {commands[-1][-1]}")
        assert result.returncode == 0, result.stderr
        assert "Dry run: every step works" not in result.stdout

"""The recorded training step, held against the same step as it is; skipped without a GPU."""

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import assert_same, load_all
from torch import Tensor, nn

import cuda_graph
import models
import train_test_mnist as tt
from utils import ScriptError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

# 200 images: twelve batches of 16 and one of 8
OPTIONS = "--device", "cuda", "--deterministic", "--batch-size", 16, "--epochs", 2
RECIPES = {
    "default": (),
    "stronger": ("--augment", "--lr-scheduler", "onecyclelr", "--lr", 0.2, "--weight-decay", 1e-4),
    "amp": ("--amp", "--augment"),
    "held out": ("--val-size", 30),
    "Model1": ("--model", "Model1", "--lr", 0.001),
    "Model2": ("--model", "Model2"),
}


@pytest.fixture(autouse=True)
def deterministic_no_more():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def recordings(monkeypatch):
    """Return a list that each recorded step is added to."""
    record, recorded = cuda_graph.record, []

    def spy(*args):
        recorded.append(record(*args))
        return recorded[-1]

    monkeypatch.setattr(cuda_graph, "record", spy)
    return recorded


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_weights_as_without_a_graph(recipe, train, recordings, tmp_path, monkeypatch):
    train(tmp_path / "graph", *OPTIONS, *RECIPES[recipe])
    assert len(recordings) == 1
    monkeypatch.setattr(tt, "graphed", lambda step, batch_size, device: step)
    train(tmp_path / "plain", *OPTIONS, *RECIPES[recipe])
    assert_same(load_all(tmp_path / "graph"), load_all(tmp_path / "plain"))


def test_resuming_is_exact(train, recordings, tmp_path):
    train(tmp_path, *OPTIONS, *RECIPES["stronger"])
    whole = load_all(tmp_path)
    train(
        tmp_path,
        "--device",
        "cuda",
        "--deterministic",
        "--resume",
        tmp_path / "mnist_model_epoch_1.pth",
    )
    assert len(recordings) == 2
    assert_same(load_all(tmp_path), whole)


class Awkward(nn.Module):
    """Model5 with an obstacle in its forward, a function of the images that returns a number."""

    obstacle: Callable[[Tensor], float]

    def __init__(self) -> None:
        super().__init__()
        self.network = models.Model5()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x) * (1 + self.obstacle(x) / 1000)


OBSTACLES = {
    "reads a tensor": lambda x: x.mean().item(),
    "prints a tensor": lambda x: len(str(x)),
    "selects images": lambda x: len(x[x.mean((1, 2, 3)) > 0]),
    "waits for the GPU": lambda x: torch.cuda.synchronize() or 1,
    "draws with Python": lambda x: random.random(),
    "draws with NumPy": lambda x: np.random.rand(),
    "draws with torch": lambda x: torch.rand(()),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_recorded_trains_as_it_is(obstacle, train, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Awkward, "__module__", "models")
    monkeypatch.setattr(Awkward, "obstacle", staticmethod(OBSTACLES[obstacle]), raising=False)
    monkeypatch.setattr(models, "Awkward", Awkward, raising=False)
    results = []
    for graphed, notes in ((tt.graphed, 1), (lambda step, batch_size, device: step, 0)):
        monkeypatch.setattr(tt, "graphed", graphed)
        random.seed(1)
        np.random.seed(1)
        folder = tmp_path / str(notes)
        train(folder, *OPTIONS, "--model", "Awkward")
        assert capsys.readouterr().err.count("Note: no CUDA graph") == notes
        results.append(load_all(folder))
    assert_same(*results)


def test_a_loss_that_is_no_number(train, recordings, tmp_path):
    with pytest.raises(ScriptError, match=r"^the loss is (nan|inf) after .*; try a lower --lr$"):
        train(tmp_path, *OPTIONS, "--lr", 1e30)
    assert not list(tmp_path.glob("*.pth"))

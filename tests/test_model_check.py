"""The look at a model before it is trained: what is refused, and what is worth a warning."""

import copy
from collections.abc import Callable
from functools import partial
from unittest.mock import Mock

import pytest
import torch
from conftest import assert_same
from pytest import raises
from test_receptive_fields import Net, chain
from torch import Tensor, nn

import models
from model_check import check_model
from models import build_model
from utils import ScriptError

torch.manual_seed(0)  # the images and the weights of the models below
IMAGES = torch.randn(9, 1, 28, 28)


def linear(*functions: Callable) -> Callable:
    """Return what builds a linear model, as a class does, whose logits pass through functions."""
    return partial(chain, nn.Flatten(), nn.Linear(784, 10), *functions)


def check_state(name: str, state: dict, count: int = 8, amp: bool = False) -> None:
    """Look at a model before it is trained on so many images."""
    check_model(name, state, IMAGES[:count], torch.arange(count), 4, 6, amp)


@pytest.fixture
def check(monkeypatch):
    """Return a function that looks at a model of a class, which is called Net."""

    def check_class(model_class, **options):
        monkeypatch.setattr(models, "model_classes", lambda: {"Net": model_class})
        check_state("Net", build_model("Net").state_dict(), **options)

    return check_class


def keep_output(x, layer):
    layer.kept = layer(x.flatten(1)) + getattr(layer, "kept", 0)
    return layer.kept


REFUSED = {
    "no parameters": (partial(chain, nn.Flatten()), "has no parameters to train: .*nn.ModuleList"),
    "all frozen": (partial(chain, nn.PReLU().requires_grad_(False)), "has no parameters to train"),
    "nine outputs": (linear(lambda logits: logits[:, :9]), r"returns .*\(4, 9\), not .*\(4, 10\)"),
    "a map": (linear(lambda logits: logits[..., None, None]), r"returns .*\(4, 10, 1, 1\)"),
    "squeezed": (linear(torch.squeeze), r"on a batch of 1: .*\(10,\)"),
    "a tuple": (linear(lambda logits: (logits, logits)), "returns a tuple, not"),
    "integers": (linear(Tensor.long), "returns torch.int64"),
    "three channels": (
        partial(chain, nn.Conv2d(3, 10, 28), nn.Flatten()),
        "fails in training on a batch of 4: .*3 ch",
    ),
    "float64": (
        partial(chain, nn.Flatten(), nn.Linear(784, 10).double()),
        "fails in training .*dtype",
    ),
    "NaN": (linear(lambda logits: logits / 0 * 0), "returns NaN or infinity"),
    "keeps its graph": (
        partial(Net, keep_output, nn.Linear(784, 10)),
        "fails in training .*second time",
    ),
    "in place": (linear(lambda logits: logits.exp().mul_(2)), "fails in training .*inplace"),
    "constructor": (Mock(side_effect=ValueError("no luck")), "no luck; fix it"),
}


@pytest.mark.parametrize(("model_class", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model_class, message, check):
    with raises(ScriptError, match=rf"\A(cannot build )?Net.*{message}.*\Z"):
        check(model_class)


@pytest.mark.parametrize(("size", "option"), [(4, "--batch-size"), (6, "--test-batch-size")])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to")])
def test_no_memory(size, option, error, check):
    def run_out(logits):
        if len(logits) == size:
            raise error
        return logits

    with raises(ScriptError, match=f"^Net fails in .* of {size}: .*; choose a smaller {option}$"):
        check(linear(run_out))


def test_a_last_batch_of_one_image(check, train, tmp_path):
    normalised = linear(nn.BatchNorm1d(10))
    check(normalised, count=8)
    with raises(ScriptError, match=r"on a batch of 1: .*, or choose another --batch-size$"):
        check(normalised, count=9)
    with raises(ScriptError, match="fails in training on a batch of 1"):
        train(tmp_path, "--dry-run --model Net --batch-size 199")


def test_what_bfloat16_does_not_fit(check):
    def add(logits):
        return torch.zeros(len(logits), 10).index_add(0, torch.arange(len(logits)), logits)

    check(linear(add))
    with raises(ScriptError, match=r"^Net fails in training .*; fix it, or leave out --amp$"):
        check(linear(add), amp=True)


WARNED = {
    "probabilities": (nn.Softmax(1), "returns probabilities"),
    "the same": (
        lambda logits: 0 * logits + torch.arange(10),
        "returns the same logits for all images",
    ),
    "dropout": (nn.functional.dropout, "is random in evaluation"),
    "mixing": (lambda logits: logits - logits.mean(0), "mixes the images of a batch"),
}


@pytest.mark.parametrize(("function", "message"), WARNED.values(), ids=WARNED)
def test_warned(function, message, check, capsys):
    check(linear(function))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Warning: Net {message}")


def test_an_input_changed_in_place(check, capsys):
    check(partial(chain, lambda x: x.mul_(2), nn.Flatten(), nn.Linear(784, 10)))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model5"])
def test_a_sound_model(name, capsys):
    trained = build_model(name)
    trained(IMAGES)
    before = copy.deepcopy(trained.state_dict())
    check_state(name, trained.state_dict(), count=9)
    assert_same(before, trained.state_dict())
    assert capsys.readouterr().err == ""


def test_a_network_that_is_built_at_random(check):
    widths = iter([20, 30])

    def build():
        width = next(widths)
        return chain(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10))

    with raises(ScriptError, match=r"^Net builds another network each time: fix its sizes$"):
        check(build)


def test_the_state_is_looked_at():
    state = build_model("Model1").state_dict()
    damaged = {name: tensor * torch.nan for name, tensor in state.items()}
    with raises(ScriptError, match="returns NaN or infinity"):
        check_state("Model1", damaged)


SOURCE = """from torch import nn
class Own(nn.Linear):
    def __init__(self):
        super().__init__(784, 10)
    def forward(self, x):
        return x.nonsense
"""


def test_the_place_in_models_py(check):
    namespace: dict = {}
    exec(compile(SOURCE, "/some/models.py", "exec"), namespace)
    with raises(ScriptError, match=r"models\.py, line 6: 'Tensor' object has no .* 'nonsense'"):
        check(namespace["Own"])


def test_nothing_is_written_before_the_check(train, tmp_path, monkeypatch):
    (tmp_path / "best_mnist_model.pth").write_text("dear")
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": linear(torch.mean)})
    for options in ([], ["--dry-run"]):
        with raises(ScriptError, match=r"^Net fails in .*: it returns "):
            train(tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} <= {"best_mnist_model.pth", ".lock"}

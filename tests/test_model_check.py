"""The look at a model before it is trained: what is refused, and what is worth a warning."""

from collections.abc import Callable

import pytest
import torch
from pytest import MonkeyPatch, raises
from torch import Tensor, nn

import models
from model_check import check_model
from models import build_model
from utils import ScriptError


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


class Net(nn.Module):
    """A linear model; forward(x) computes what a test asks for with its layer."""

    compute: Callable = staticmethod(lambda layer, x: layer(flat(x)))

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: Tensor) -> object:
        return type(self).compute(self.layer, x)


class Raising(nn.Module):
    """A model whose constructor fails."""

    def __init__(self) -> None:
        raise ValueError("no luck")


def model(compute: Callable) -> type[Net]:
    return type("Own", (Net,), {"compute": staticmethod(compute)})


def of_layers(*layers: nn.Module) -> type[nn.Module]:
    return type(
        "Own", (nn.Sequential,), {"__init__": lambda self: nn.Sequential.__init__(self, *layers)}
    )


def check(
    monkeypatch: MonkeyPatch, model_class: type[nn.Module], count: int = 8, amp: bool = False
) -> None:
    model_class.__name__ = "Own"
    monkeypatch.setattr(models, "model_classes", lambda: {"Own": model_class})
    torch.manual_seed(0)
    data = torch.randn(count, 1, 28, 28), torch.arange(count) % 10
    check_model("Own", build_model("Own").state_dict(), *data, 4, 6, amp)


def keep_output(layer: nn.Module, x: Tensor) -> Tensor:
    layer.kept = layer(flat(x)) + getattr(layer, "kept", 0)
    return layer.kept


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


REFUSED = {
    "no parameters": (of_layers(nn.Flatten()), "has no parameters to train: .*nn.ModuleList"),
    "all frozen": (of_layers(FLAT.requires_grad_(False)), "has no parameters to train"),
    "nine outputs": (
        model(lambda layer, x: layer(flat(x))[:, :9]),
        r"returns .*\(4, 9\), not .*\(4, 10\)",
    ),
    "a map": (
        model(lambda layer, x: layer(flat(x))[..., None, None]),
        r"returns .*\(4, 10, 1, 1\)",
    ),
    "squeezed": (model(lambda layer, x: layer(flat(x)).squeeze()), r"on a batch of 1: .*\(10,\)"),
    "a tuple": (model(lambda layer, x: (layer(flat(x)), x)), "returns a tuple, not"),
    "integers": (model(lambda layer, x: layer(flat(x)).long()), "returns torch.int64"),
    "three channels": (
        of_layers(nn.Conv2d(3, 10, 28), nn.Flatten()),
        "fails in training on a batch of 4: .*3 ch",
    ),
    "float64": (of_layers(nn.Flatten(), nn.Linear(784, 10).double()), "fails in training .*dtype"),
    "NaN": (
        model(lambda layer, x: layer(flat(x)) / 0 * 0),
        "returns NaN or infinity",
    ),
    "keeps its graph": (model(keep_output), "fails in training .*second time"),
    "in place": (
        model(lambda layer, x: layer(flat(x)).exp().mul_(2)),
        "fails in training .*inplace",
    ),
    "constructor": (Raising, "no luck; fix it"),
}


@pytest.mark.parametrize(("model_class", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model_class, message, monkeypatch):
    with raises(ScriptError, match=rf"\A(cannot build )?Own.*{message}.*\Z"):
        check(monkeypatch, model_class)


@pytest.mark.parametrize(("size", "option"), [(4, "--batch-size"), (6, "--test-batch-size")])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to")])
def test_no_memory(size, option, error, monkeypatch):
    def compute(layer, x):
        if len(x) == size:
            raise error
        return layer(flat(x))

    with raises(ScriptError, match=f"^Own fails in .* of {size}: .*; choose a smaller {option}$"):
        check(monkeypatch, model(compute))


def test_a_last_batch_of_one_image(train, tmp_path, monkeypatch):
    normalised = of_layers(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    check(monkeypatch, normalised, count=8)
    with raises(ScriptError, match=r"on a batch of 1: .*, or choose another --batch-size$"):
        check(monkeypatch, normalised, count=9)
    with raises(ScriptError, match="fails in training on a batch of 1"):
        train(tmp_path, "--dry-run --model Own --batch-size 199")


def test_what_bfloat16_does_not_fit(monkeypatch):
    def add(layer, x):
        return torch.zeros(len(x), 10).index_add(0, torch.arange(len(x)), layer(flat(x)))

    check(monkeypatch, model(add))
    with raises(ScriptError, match=r"^Own fails in training .*; fix it, or leave out --amp$"):
        check(monkeypatch, model(add), amp=True)


WARNED = {
    "probabilities": (lambda layer, x: layer(flat(x)).softmax(1), "returns probabilities"),
    "the same": (lambda layer, x: layer(0 * flat(x)), "returns the same logits for all images"),
    "dropout": (lambda layer, x: layer(nn.functional.dropout(flat(x))), "is random in evaluation"),
    "mixing": (lambda layer, x: layer(flat(x - x.mean(0))), "mixes the images of a batch"),
}


@pytest.mark.parametrize(("compute", "message"), WARNED.values(), ids=WARNED)
def test_warned(compute, message, monkeypatch, capsys):
    check(monkeypatch, model(compute))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Warning: Own {message}")


def test_an_input_changed_in_place(monkeypatch, capsys):
    check(monkeypatch, model(lambda layer, x: layer(flat(x.mul_(2)))))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model5"])
def test_a_sound_model(name, capsys):
    trained = build_model(name)
    trained(torch.randn(8, 1, 28, 28))
    before = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    data = torch.randn(9, 1, 28, 28), torch.arange(9)
    check_model(name, trained.state_dict(), *data, batch_size=4, test_batch_size=6)
    assert all(tensor.equal(before[key]) for key, tensor in trained.state_dict().items())
    assert capsys.readouterr().err == ""


def test_a_network_that_is_built_at_random(monkeypatch):
    widths = iter([20, 30])

    class Own(nn.Sequential):
        def __init__(self):
            width = next(widths)
            super().__init__(nn.Flatten(), nn.Linear(784, width), nn.Linear(width, 10))

    with raises(ScriptError, match=r"^Own builds another network each time: fix its sizes$"):
        check(monkeypatch, Own)


def test_the_state_is_looked_at():
    data = torch.randn(4, 1, 28, 28), torch.arange(4)
    state = build_model("Model1").state_dict()
    damaged = {name: tensor * torch.nan for name, tensor in state.items()}
    with raises(ScriptError, match="returns NaN or infinity"):
        check_model("Model1", damaged, *data, batch_size=4, test_batch_size=6)


SOURCE = """from torch import nn
class Own(nn.Linear):
    def __init__(self):
        super().__init__(784, 10)
    def forward(self, x):
        return x.nonsense
"""


def test_the_place_in_models_py(monkeypatch):
    namespace: dict = {}
    exec(compile(SOURCE, "/some/models.py", "exec"), namespace)
    with raises(ScriptError, match=r"models\.py, line 6: 'Tensor' object has no .* 'nonsense'"):
        check(monkeypatch, namespace["Own"])


def test_nothing_is_written_before_the_check(train, tmp_path, monkeypatch):
    (tmp_path / "best_mnist_model.pth").write_text("dear")
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": model(lambda layer, x: x)})
    for options in ([], ["--dry-run"]):
        with raises(ScriptError, match=r"^Own fails in .*: it returns "):
            train(tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} <= {"best_mnist_model.pth", ".lock"}

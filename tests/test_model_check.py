"""Before training: what is refused, what is worth a warning; after it: classes that have changed since."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch, raises
from torch import Tensor, nn

import models
from checkpoints import load_checkpoint
from model_check import check_model, describe_change
from models import build_model
from utils import ScriptError


class Net(nn.Module):
    """A linear model; forward(x) computes what a test asks for with its layer."""

    compute: Callable = staticmethod(lambda layer, x: layer(x.flatten(1)))

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


def check(monkeypatch: MonkeyPatch, model_class: type[nn.Module], count: int = 8) -> None:
    monkeypatch.setattr(models, "model_classes", lambda: {"Own": model_class})
    torch.manual_seed(0)
    images, labels = torch.randn(count, 1, 28, 28), torch.arange(count) % 10
    check_model("Own", build_model("Own").state_dict(), images, labels, batch_size=4)


def keep_output(layer: nn.Module, x: Tensor) -> Tensor:
    layer.kept = layer(x.flatten(1)) + getattr(layer, "kept", 0)
    return layer.kept


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
REFUSED = {
    "no parameters": (of_layers(nn.Flatten()), "has nothing to train: no parameters"),
    "all frozen": (of_layers(FLAT.requires_grad_(False)), "has nothing to train: .*requires_grad"),
    "nine outputs": (
        model(lambda layer, x: layer(x.flatten(1))[:, :9]),
        r"returns .*\(4, 9\) .* \(4, 10\)",
    ),
    "a map": (
        model(lambda layer, x: layer(x.flatten(1))[..., None, None]),
        r"returns .*\(4, 10, 1, 1\)",
    ),
    "squeezed": (
        model(lambda layer, x: layer(x.flatten(1)).squeeze()),
        r"returns .*\(10,\) for 1 images",
    ),
    "a tuple": (model(lambda layer, x: (layer(x.flatten(1)), x)), "returns tuple for 4 images"),
    "integers": (model(lambda layer, x: layer(x.flatten(1)).long()), "returns torch.int64"),
    "three channels": (
        of_layers(nn.Conv2d(3, 10, 28), nn.Flatten()),
        "fails in training on a 4x1x28x28 batch: .*3 ch",
    ),
    "float64": (of_layers(nn.Flatten(), nn.Linear(784, 10).double()), "fails in training .*dtype"),
    "NaN": (
        model(lambda layer, x: layer(x.flatten(1)) / 0 * 0),
        "returns NaN or infinity before any training",
    ),
    "keeps its graph": (model(keep_output), "cannot be trained: .*second time"),
    "in place": (
        model(lambda layer, x: layer(x.flatten(1)).exp().mul_(2)),
        "cannot be trained: .*inplace",
    ),
    "constructor": (Raising, "cannot be built: .*no luck; fix its constructor"),
}


@pytest.mark.parametrize(("model_class", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(model_class: type[nn.Module], message: str, monkeypatch: MonkeyPatch) -> None:
    with raises(ScriptError, match=rf"\AOwn {message}.*\Z"):
        check(monkeypatch, model_class)


def test_a_last_batch_of_one_image(
    train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    normalised = of_layers(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))
    check(monkeypatch, normalised, count=8)
    with raises(
        ScriptError,
        match=r"fails in training on a 1x1x28x28 batch: .* or choose another --batch-size$",
    ):
        check(monkeypatch, normalised, count=9)
    with raises(ScriptError, match="fails in training on a 1x1x28x28 batch"):
        train(tmp_path, "--dry-run", "--batch-size", 199)


def test_what_bfloat16_does_not_fit(monkeypatch: MonkeyPatch) -> None:
    def add(layer: nn.Module, x: Tensor) -> Tensor:
        return torch.zeros(len(x), 10).index_add(0, torch.arange(len(x)), layer(x.flatten(1)))

    monkeypatch.setattr(models, "model_classes", lambda: {"Own": model(add)})
    data = torch.randn(4, 1, 28, 28), torch.arange(4)
    check_model("Own", build_model("Own").state_dict(), *data, batch_size=4)
    with raises(
        ScriptError,
        match=r"^Own fails in training with --amp on .*; fix its forward, or leave out --amp$",
    ):
        check_model("Own", build_model("Own").state_dict(), *data, batch_size=4, amp=True)


WARNED = {
    "probabilities": (
        model(lambda layer, x: layer(x.flatten(1)).softmax(1)),
        "returns probabilities",
    ),
    "dropout": (
        model(lambda layer, x: layer(nn.functional.dropout(x.flatten(1)))),
        "is random in evaluation, too",
    ),
    "mixing": (
        model(lambda layer, x: layer((x - x.mean(0)).flatten(1))),
        "mixes the images of a batch",
    ),
}


@pytest.mark.parametrize(("model_class", "message"), WARNED.values(), ids=WARNED)
def test_warned(
    model_class: type, message: str, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    check(monkeypatch, model_class)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"Warning: Own {message}")


def test_an_input_changed_in_place(monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> None:
    check(monkeypatch, model(lambda layer, x: layer(x.mul_(2).flatten(1))))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model5"])
def test_a_sound_model(name: str, capsys: CaptureFixture) -> None:
    trained = build_model(name)
    trained(torch.randn(8, 1, 28, 28))
    before = {key: tensor.clone() for key, tensor in trained.state_dict().items()}
    check_model(
        name, trained.state_dict(), torch.randn(9, 1, 28, 28), torch.arange(9), batch_size=4
    )
    assert all(tensor.equal(before[key]) for key, tensor in trained.state_dict().items())
    assert capsys.readouterr().err == ""


def test_the_state_is_looked_at() -> None:
    state = {
        name: tensor * torch.nan for name, tensor in build_model("Model1").state_dict().items()
    }
    with raises(ScriptError, match=r"^Model1 returns NaN or infinity before any training"):
        check_model("Model1", state, torch.randn(4, 1, 28, 28), torch.arange(4), batch_size=4)


def test_the_place_in_models_py(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    source = "from torch import nn\nclass Own(nn.Linear):\n    def forward(self, x):\n        return x.nonsense\n"
    namespace: dict = {}
    exec(compile(source, "/some/models.py", "exec"), namespace)
    own = type(
        "Own", (namespace["Own"],), {"__init__": lambda self: nn.Linear.__init__(self, 784, 10)}
    )
    with raises(
        ScriptError, match=r"models\.py, line 4: 'Tensor' object has no attribute 'nonsense'"
    ):
        check(monkeypatch, own)


def test_nothing_is_written_before_the_check(
    train: Callable, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    (tmp_path / "best_mnist_model.pth").write_text("dear")
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": model(lambda layer, x: x)})
    for options in ([], ["--dry-run"]):
        with raises(ScriptError, match=r"^Model5 returns "):
            train(tmp_path, *options)
    assert {path.name for path in tmp_path.iterdir()} <= {"best_mnist_model.pth", ".lock"}


def changed_model5(block: str, number: int, layer: nn.Module) -> type[nn.Module]:
    """Model5 with one of its layers replaced."""

    def build(self: nn.Module) -> None:
        models.Model5.__init__(self)
        getattr(self, block)[number] = layer

    return type("Model5", (models.Model5,), {"__init__": build})


def test_a_changed_class(
    trained: tuple[Path, str], train: Callable, monkeypatch: MonkeyPatch
) -> None:
    folder = trained[0]
    path, remedy = (
        folder / "mnist_model_epoch_4.pth",
        "restore the class, or give the changed one a new name, or start anew",
    )
    changed = changed_model5("input_block", 0, nn.Conv2d(1, 6, 3))
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": changed})
    was = re.escape(
        "input_block.0: Conv2d(1, 6, kernel_size=(3, 3), stride=(1, 1), bias=False) is now input_block.0: Conv2d(1, 6, "
    )
    for options in (["--resume"], ["--resume", path]):  # one message, though there are four files
        with raises(
            ScriptError,
            match=rf"\A{path} was trained with another Model5: {was}.*; {remedy} without --resume\Z",
        ):
            train(folder, *options, "--epochs", 9)
    monkeypatch.setattr(models, "model_classes", lambda: {"Model6": changed})
    with raises(
        ScriptError,
        match=rf"\A{path} was trained with Model5, but models\.py has no model 'Model5'.*; {remedy}",
    ):
        train(folder, "--resume", "--epochs", 9)


def test_a_changed_class_that_fits(
    trained: tuple[Path, str], monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    path, changed = (
        trained[0] / "mnist_model_epoch_4.pth",
        changed_model5("transition_block", 2, nn.Identity()),
    )
    monkeypatch.setattr(models, "model_classes", lambda: {"Model5": changed})
    load_checkpoint(path)  # to analyze it, say
    assert capsys.readouterr().err == ""
    load_checkpoint(path, to_resume=True)
    change = (
        "transition_block.2: Dropout(p=0.1, inplace=False) is now transition_block.2: Identity()"
    )
    assert (
        capsys.readouterr().err
        == f"Warning: Model5 has changed since this run was started: {change}\n"
    )


def test_parameters_that_became_buffers(
    trained: tuple[Path, str], monkeypatch: MonkeyPatch
) -> None:
    def build(self: nn.Module) -> None:
        models.Model5.__init__(self)
        weight = self.input_block[0]._parameters.pop("weight")
        self.input_block[0].register_buffer("weight", weight.detach())

    monkeypatch.setattr(
        models,
        "model_classes",
        lambda: {"Model5": type("Model5", (models.Model5,), {"__init__": build})},
    )
    with raises(
        ScriptError,
        match=r"was trained with another Model5: .*; restore the class, or give .* a new name$",
    ):
        load_checkpoint(trained[0] / "mnist_model_epoch_4.pth")


def test_what_has_changed() -> None:
    two, swapped = nn.Sequential(), nn.Sequential()
    for model, names in ((two, "ab"), (swapped, "ba")):
        for name in names:
            model.add_module(name, {"a": nn.ReLU(), "b": nn.Tanh()}[name])
    assert describe_change(str(two), str(swapped)) == "a: ReLU() is now b: Tanh()"
    assert describe_change(str(two[:1]), str(two)) == "nothing is now b: Tanh()"
    assert describe_change("", str(two)) == describe_change(str(two), str(two)) == ""
    known, unknown = nn.Sequential(nn.LazyLinear(3)), nn.Sequential(nn.LazyLinear(3))
    known(torch.ones(1, 2))
    assert describe_change(str(known), str(unknown)) == ""


def test_a_new_run_from_old_weights(
    trained: tuple[Path, str], train: Callable, tmp_path: Path
) -> None:
    path = trained[0] / "best_mnist_model.pth"
    train(tmp_path, "--init-from", path, "--lr", 0, "--epochs", 1)
    new, old = load_checkpoint(tmp_path / "mnist_model_epoch_1.pth"), load_checkpoint(path)
    assert (new["epoch"], new["init_from"], new["lr"]) == (1, str(path), 0)
    weights = [key for key in old["model_state_dict"] if key.endswith("0.weight")]
    assert all(new["model_state_dict"][key].equal(old["model_state_dict"][key]) for key in weights)
    train(tmp_path, "--resume", "--epochs", 2)
    with raises(ScriptError, match=f"^{path} holds weights of Model5: use --model Model5$"):
        train(tmp_path / "other", "--init-from", path, "--model", "Model1")

"""The analysis: its numbers against another tool and counts by hand, its report, and models that are hard on it."""

import copy
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchinfo
import torchvision
from PIL import Image
from test_receptive_fields import Net, conv, last_field
from torch import Tensor, nn
from torch.nn import Conv2d, Linear, ReLU, Sequential

import analyze_model
from analyze_model import analyze
from checkpoints import save_checkpoint
from models import build_model
from utils import ScriptError

counts_operations = pytest.mark.skipif(
    analyze_model.FlopCounterMode is None, reason="torch counts operations since version 2.1"
)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that gives what the script prints with the given options."""

    def run_main(*options: object) -> str:
        monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--device", "cpu", *map(str, options)])
        monkeypatch.setenv("COLUMNS", "120")
        analyze_model.main()
        return capsys.readouterr().out

    return run_main


@counts_operations
@pytest.mark.parametrize(("name", "total"), [("Model1", 14_620), ("Model2", 14_796), ("Model5", 8_018)])
def test_totals_agree_with_torchinfo(name: str, total: int) -> None:
    model = build_model(name)
    analysis = analyze(model, (28, 28), batch_size=64)
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0)
    assert analysis.totals["parameters"] == theirs.total_params == total
    assert analysis.totals["macs"] == sum(layer.macs for layer in theirs.summary_list if layer.class_name == "Conv2d")
    assert last_field(analysis) == (28, 28)


def test_memory_of_model1_counted_by_hand() -> None:
    # Each ReLU's output, which is also the next layer's input; max-pool's output and its int64 indices;
    # the transition's output. The last convolution's output is kept by nobody.
    floats = 8 * 26**2 + 16 * 24**2 + 24 * 22**2 + 24 * 11**2 + 8 * 11**2 + 16 * 9**2 + 24 * 7**2 + 10 * 7**2
    kept = 3 * (4 * floats + 8 * 24 * 11**2)
    parameters, pixels, labels = 4 * 14_620, 3 * 28 * 28 * 4, 3 * 8
    largest = 3 * 4 * 2 * 24 * 22**2  # input and output of conv_block1.3
    memory = analyze(build_model("Model1"), (28, 28), batch_size=3).memory
    assert [(part.part, part.training, part.inference) for part in memory] == [
        ("parameters", parameters, parameters),
        ("gradients", parameters, 0),
        ("momentum", parameters, 0),
        ("buffers", 0, 0),
        ("input and target", pixels + labels, pixels),
        ("activations kept for backward", kept, 0),
        ("activations at work", 0, largest),
        ("sum", 3 * parameters + pixels + labels + kept, parameters + pixels + largest),
    ]


def test_parameters_are_counted_once_and_where_they_are() -> None:
    shared = Conv2d(4, 4, 3)
    frozen = Sequential(nn.BatchNorm2d(4), ReLU()).requires_grad_(False)
    net = Net(lambda net, x: net.b(net.c(net.c(net.a(x)))), a=Conv2d(1, 4, 3), b=frozen, c=shared, d=Linear(5, 6))
    analysis = analyze(net, (28, 28), batch_size=2)
    rows = [(layer.name, layer.weight, layer.bias, layer.buffers, layer.output_shape) for layer in analysis.layers]
    assert rows == [
        ("Net", 0, 0, 0, (4, 22, 22)),
        ("a", 36, 4, 0, (4, 26, 26)),
        ("c", 144, 4, 0, (4, 24, 24)),
        ("c", 0, 0, 0, (4, 22, 22)),
        ("b", 0, 0, 0, (4, 22, 22)),
        ("b.0", 4, 4, 9, (4, 22, 22)),
        ("b.1", 0, 0, 0, (4, 22, 22)),
        ("d", 30, 6, 0, None),
    ]
    totals = {"weight": 214, "bias": 18, "parameters": 232, "trainable": 224, "frozen": 8, "shared": 148, "buffers": 9}
    assert totals.items() <= analysis.totals.items()
    assert [layer.share for layer in analysis.layers][:3] == [0, round(4000 / 232, 2), round(14800 / 232, 2)]


def test_what_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sequential(Conv2d(1, 2, 3), nn.Sigmoid(), ReLU(inplace=True))  # sigmoid needs what ReLU overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        analyze(model, (28, 28), batch_size=2)
    monkeypatch.setattr(analyze_model, "build_model", lambda name: model)
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--device", "cpu"])
    with pytest.raises(ScriptError, match=r"^Model5 cannot be analyzed: one of the variables needed"):
        analyze_model.main()


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_unchanged(training: bool) -> None:
    model = build_model("Model5").train(training)
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    before = copy.deepcopy((model.state_dict(), [parameter.grad for parameter in model.parameters()]))
    random_state = torch.get_rng_state()
    analyze(model, (28, 28), batch_size=4)
    assert torch.get_rng_state().equal(random_state)
    assert all(module.training is training and not module._forward_hooks for module in model.modules())
    state, gradients = before
    assert all(tensor.equal(state[key]) for key, tensor in model.state_dict().items())
    assert all(
        parameter.grad.equal(gradient) for parameter, gradient in zip(model.parameters(), gradients, strict=True)
    )


@counts_operations
def test_report(report: Callable[..., str]) -> None:
    output = report("--model", "model1", "--batch-size", "3")
    assert output.isascii()
    assert max(map(len, output.splitlines())) <= 120
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "(conv_block2): Sequential(" in lines
    assert "2 Conv2d 24x22x22 3,456 3,456 23.64 % 1,672,704" in lines
    assert "3 ReLU 24x22x22 139,392" in lines
    assert "output_block.2 Conv2d 7 1 0 1 7 1 2 2 16 28 0 0 28x28" in lines
    assert "trainable 14,620, frozen 0, shared by several layers 0" in lines
    assert "Left out, for they change none of these: Flatten, ReLU." in lines
    assert sum(" ok " in line for line in lines) >= 4


def test_a_narrow_terminal_loses_no_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    analysis = analyze(build_model("Model5"), (28, 28), batch_size=2)
    table, *_ = analyze_model.format_fields(analysis)
    assert max(map(len, table.splitlines())) <= 60
    words = set(table.split())
    assert {*analyze_model.COLUMNS, "RF", "28x28", "output_block.1"} <= words


@counts_operations
def test_json_holds_every_number_of_the_report(report: Callable[..., str]) -> None:
    def numbers_in(value: object) -> set[float]:
        if isinstance(value, dict | list):
            return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
        if isinstance(value, str):  # a name, such as conv_block1.4
            return set(map(float, re.findall(r"\d+(?:\.\d+)?", value)))
        return {float(value)} if isinstance(value, int | float) else set()

    options = "--model", "Model1", "Model5", "--batch-size", "5"
    analyses = json.loads(report(*options, "--json"))
    assert list(analyses) == ["Model1", "Model5"]
    known = numbers_in(analyses)
    known |= {round(number / 2**20, 2) for number in known}  # MiB
    shown = re.split(r"^Architecture\n(?:.+\n)+", report(*options), flags=re.MULTILINE)
    tables = re.sub(r"(?<=\d)x(?=\d)", " ", "".join(shown).replace(",", ""))
    numbers = {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", tables)}
    assert len(numbers) > 100
    assert numbers <= known


@counts_operations
def test_all_models_end_in_a_comparison(report: Callable[..., str]) -> None:
    output = report("--model", "all", "--no-verify")
    comparison = output[output.index("Comparison") :].splitlines()
    assert comparison[2].split()[:5] == ["Model1", "skipped", "28x28", "14,620", "2,687,476"]
    assert [line.split()[0] for line in comparison[2:]] == ["Model1", "Model2", "Model5"]


def test_checkpoint(report: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model, given = tmp_path / "best.pth", build_model("Model2"), []
    accuracies = {"train_accuracy": 97.5, "test_accuracy": 98.25, "best_test_accuracy": 98.75}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    states = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    save_checkpoint(path, {"model_name": "Model2", "epoch": 7, **accuracies, **states})
    monkeypatch.setattr(analyze_model, "analyze", lambda *args: given.append(args[0]) or analyze(*args))
    output = report("--checkpoint", path, "--no-verify")
    assert output.startswith("Model2\n")
    for words in ("epoch 7", "train accuracy 97.50 %", "test accuracy 98.25 %", "best test accuracy 98.75 %"):
        assert words in output
    assert all(tensor.equal(model.state_dict()[key]) for key, tensor in given[0].state_dict().items())
    with pytest.raises(ScriptError, match="Model2: leave out --model"):
        report("--checkpoint", path, "--model", "Model1")
    with pytest.raises(ScriptError, match=r"none\.pth"):
        report("--checkpoint", tmp_path / "none.pth")


class WithoutReturn(nn.Module):
    """A model whose train() returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()

    def train(self, mode: bool = True) -> None:
        self.training = mode

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def keep_output(net: nn.Module, x: Tensor) -> Tensor:
    net.kept = [net.a(x)]
    return net.kept[0]


def with_hook() -> nn.Module:
    net = Net(keep_output, a=conv(), features=[])
    net.a.register_forward_hook(lambda module, inputs, output: net.features.append(output))
    net(torch.zeros(1, 1, 28, 28))
    return net


HARD: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "train() without return": (WithoutReturn(), (2, 28, 28)),
    "scalar": (Net(lambda net, x: net.a(x).mean(), a=conv()), ()),
    "several outputs": (Net(lambda net, x: (net.a(x), x.mean()), a=conv()), (2, 28, 28)),
    "Python module": (Net(lambda net, x: net.a(x) * net.math.pi, a=conv(), math=math), (2, 28, 28)),
    "tensors kept": (with_hook(), (2, 28, 28)),
    "no parameters": (Net(lambda net, x: x.flatten(1)), (784,)),
}


@pytest.mark.parametrize(("model", "shape"), HARD.values(), ids=HARD)
def test_models_that_are_hard_to_run(model: nn.Module, shape: tuple[int, ...]) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    assert analysis.layers[0].output_shape == shape


@counts_operations
def test_resnet18() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = Conv2d(1, 64, 7, 2, 3, bias=False)
    analysis = analyze(model, (32, 32), batch_size=64)
    assert analysis.problems() == []
    assert [layer.name for layer in analysis.layers if layer.unknown or layer.macs is None] == []
    fields = {layer.name: layer.fields[-1]["height"].r_out for layer in analysis.layers if layer.fields}
    assert fields["layer4.1.conv2"] == 435  # as in Araujo's table, before the global pooling


@counts_operations
def test_a_call_is_measured_where_it_is_made() -> None:
    twice = conv(2)
    model = Net(lambda net, x: net.c(net.b(net.b(net.a(x)))).relu(), a=conv(), b=twice, c=nn.Dropout(0.5))
    layers = analyze(model, (28, 28), batch_size=5).layers
    assert [(layer.name, layer.macs, layer.kept) for layer in layers] == [
        ("Net", 0, 5 * 2 * 28 * 28 * 4),  # what relu keeps
        ("a", 28 * 28 * 18, 0),
        ("b", 28 * 28 * 36, 5 * 2 * 28 * 28 * 4),
        ("b", 28 * 28 * 36, 5 * 2 * 28 * 28 * 4),
        ("c", 0, 5 * 2 * 28 * 28 * 4),  # the mask of dropout
        ("relu()", 0, 0),
    ]


@counts_operations
def test_work_that_no_image_enters_counts_as_a_whole() -> None:
    model = Net(lambda net, x: net.a(x) * (net.b.weight @ net.b.weight).mean(), a=conv(), b=Linear(5, 5))
    analysis = analyze(model, (28, 28), batch_size=2)
    assert analysis.problems() == []
    assert analysis.totals["macs"] == 28 * 28 * 18 + 5**3
    assert "b" in [layer.name for layer in analysis.layers if layer.output_shape == ()]  # used, though never called


def test_never_called() -> None:
    only_trained = Net(lambda net, x: net.a(net.b(x)) if net.training else net.a(x), a=conv(), b=ReLU(), c=ReLU())
    only_trained.d = nn.BatchNorm2d(3)
    layers = {layer.name: layer for layer in analyze(only_trained, (28, 28), batch_size=2).layers}
    assert [layers[name].output_shape for name in "abcd"] == [(2, 28, 28), (1, 28, 28), None, None]
    assert layers["d"].buffers == 7


def test_products_that_the_counter_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze_model, "FlopCounterMode", None)  # as with torch 2.0
    analysis = analyze(build_model("Model5"), (28, 28), batch_size=2)
    assert analysis.problems() == []
    assert analysis.totals["macs"] is None
    assert {layer.type for layer in analysis.layers if layer.macs is None} == {"Conv2d"}
    assert [check.name for check in analysis.checks if check.passed is None] == ["MACs"]


def test_a_counter_that_disagrees_fails(
    report: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if not analyze_model.FlopCounterMode:
        pytest.skip("torch has its FLOP counter since version 2.1")
    right = analyze_model.FlopCounterMode.get_total_flops
    monkeypatch.setattr(analyze_model.FlopCounterMode, "get_total_flops", lambda counter: 3 * right(counter))
    with pytest.raises(ScriptError, match=r"^Model5: MACs: wrong at input_block\.0, "):
        report()
    assert "MACs FAILED" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_mistake_in_the_parameters_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(analyze_model.Layer, "parameters", property(lambda layer: layer.weight, lambda layer, n: None))
    assert analyze(Sequential(conv()), (28, 28), 2).problems() == ["parameters: wrong at the total"]


def test_a_failure_that_has_nothing_to_do_with_the_size() -> None:
    model = Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2))
    assert analyze(model, (28, 28), 1).failure.startswith("2 fails on images of 28x28: Expected more than 1 value")


def test_images_too_small_show_the_layers_so_far(report: Callable[..., str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ScriptError, match=r"^Model5: conv_block2\.0 fails on images of 8x30: .+"):
        report("--input-size", 8, 30)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-6].startswith("0 Conv2d failed 864")
    assert "Receptive fields" not in lines


def test_image(report: Callable[..., str], tmp_path: Path, tiny_data: Path) -> None:
    report("--image", tmp_path / "fields.png", "--no-verify", "--data-dir", tiny_data)
    with Image.open(tmp_path / "fields.png") as picture:
        assert (255, 0, 0) in picture.convert("RGB").getdata()
    with pytest.raises(ScriptError, match=r"run download_mnist\.py"):
        report("--image", tmp_path / "fields.png", "--data-dir", tmp_path / "none")
    with pytest.raises(ScriptError, match="--model"):
        report("--image", tmp_path / "fields.png", "--model", "all")


def test_image_without_matplotlib(report: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(analyze_model, "analyze", None)  # it comes before any work
    with pytest.raises(ScriptError, match="pip install matplotlib"):
        report("--image", "a.png")


def test_fields_of_the_centre() -> None:
    analysis = analyze(Sequential(Conv2d(1, 2, 5, padding=2), ReLU()), (28, 28), batch_size=2)
    assert analyze_model.centre_fields(analysis) == {"0": {"top": 12, "left": 12, "height": 5, "width": 5}}

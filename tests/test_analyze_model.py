"""The analysis: numbers against another tool and counts by hand, the report, and hard models."""

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchinfo
import torchvision
from conftest import assert_same
from PIL import Image
from test_receptive_fields import Net, analyze_digits, conv, last_field
from torch import nn
from torch.nn import Conv2d, Linear, ReLU, Sequential

import analyze_model
import model_runs
from analyze_model import analyze
from checkpoints import save_checkpoint
from model_runs import module_maps
from models import build_model
from utils import ScriptError

pytestmark = pytest.mark.skipif(
    not model_runs.FlopCounterMode, reason="torch counts operations since version 2.1"
)

Report = Callable[..., str]
Patch = pytest.MonkeyPatch


@pytest.fixture
def report(monkeypatch: Patch, capsys: pytest.CaptureFixture) -> Report:
    """Return a function that gives what the script prints with the given options."""

    def run_main(*options: object) -> str:
        command = "analyze_model.py", "--device", "cpu", *options
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        analyze_model.main()
        return capsys.readouterr().out

    return run_main


def squeeze(text: str) -> list[str]:
    """Return the lines of a text with a single space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("name", "total"), [("Model1", 14_620), ("Model2", 14_796), ("Model5", 8_018)]
)
def test_totals_agree_with_torchinfo(name: str, total: int) -> None:
    model = build_model(name)
    analysis = analyze_digits(model, batch_size=64)
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0)
    assert analysis.totals["parameters"] == theirs.total_params == total
    macs = [layer.macs for layer in theirs.summary_list if layer.class_name == "Conv2d"]
    assert analysis.totals["macs"] == sum(macs)
    assert last_field(analysis) == "28x28"


def test_memory_of_model1_counted_by_hand() -> None:
    # Each ReLU's output, which is also the next layer's input; max-pool's output and its int64
    # indices; the transition's output. The last convolution's output is kept by nobody.
    floats = (
        8 * 26**2
        + 16 * 24**2
        + 24 * 22**2
        + 24 * 11**2
        + 8 * 11**2
        + 16 * 9**2
        + 24 * 7**2
        + 10 * 7**2
    )
    kept = 3 * (4 * floats + 8 * 24 * 11**2)
    parameters, pixels, labels = 4 * 14_620, 3 * 28 * 28 * 4, 3 * 8
    largest = 3 * 4 * 2 * 24 * 22**2  # input and output of conv_block1.3
    memory = analyze_digits(build_model("Model1")).memory
    training = [parameters, parameters, parameters, 0, pixels + labels, kept, 0]
    assert [part.training for part in memory] == [*training, sum(training)]
    inference = [parameters, 0, 0, 0, pixels, 0, largest]
    assert [part.inference for part in memory] == [*inference, sum(inference)]


def test_parameters_are_counted_once_and_where_they_are() -> None:
    net = Net(
        lambda x, a, b, c, d: b(b(c(c(a(x))))),
        conv(1, 4),
        Sequential(nn.BatchNorm2d(4), ReLU()).requires_grad_(False),
        conv(4, 4),
        Linear(5, 6),
    )
    analysis = analyze_digits(net)
    parts = [f"{part.name} {part.weight} {part.bias} {part.buffers}" for part in analysis.layers]
    first_block = ["b 0 0 0", "b.0 4 4 9", "b.1 0 0 0"]
    second_block = ["b 0 0 0", "b.0 0 0 0", "b.1 0 0 0"]
    convolutions = ["a 36 4 0", "c 144 4 0", "c 0 0 0"]
    assert parts == ["Net 0 0 0", *convolutions, *first_block, *second_block, "d 30 6 0"]
    totals = {
        "weight": 214,
        "bias": 18,
        "parameters": 232,
        "trainable": 224,
        "frozen": 8,
        "shared": 156,
        "buffers": 9,
    }
    assert totals.items() <= analysis.totals.items()
    shares = [layer.share for layer in analysis.layers]
    assert shares[:3] == [0, 17.24, 63.79]  # per cent: 0, 40 and 148 of 232


@pytest.mark.parametrize(
    ("layers", "name", "reason"),
    [
        ([nn.Sigmoid(), ReLU(inplace=True)], "Sequential", "inplace operation"),
        ([nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)], "2", "Expected more than 1 value"),
    ],
)
def test_what_fails_is_named(layers: list[nn.Module], name: str, reason: str) -> None:
    failure = analyze_digits(Sequential(conv(), *layers), batch_size=1).failure
    assert re.match(f"{name} fails on images of 28x28: .*{reason}", failure)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_unchanged(training: bool) -> None:
    model = build_model("Model5").train(training)
    model(torch.randn(2, 1, 28, 28)).sum().backward()

    def state() -> list[torch.Tensor]:
        gradients = [parameter.grad for parameter in model.parameters()]
        return [torch.get_rng_state(), *model.state_dict().values(), *gradients]

    before = copy.deepcopy(state())
    analyze_digits(model)
    assert all(map(torch.equal, before, state()))
    for module in model.modules():
        assert module.training is training
        assert not module._forward_hooks


def test_report(report: Report) -> None:
    output = report("--model", "model1", "--batch-size", "3")
    assert output.isascii()
    assert max(map(len, output.splitlines())) <= 120
    lines = squeeze(output)
    expected = {
        "(conv_block2): Sequential(",
        "2 Conv2d 24x22x22 3,456 3,456 23.64 % 1,672,704",
        "3 ReLU 24x22x22 139,392",
        "output_block.2 Conv2d 7 1 0 1 7 1 2 2 16 28 0 0 28x28",
        "trainable 14,620, frozen 0, shared by several layers 0",
        "Left out, not seen to change any of these: Flatten, ReLU.",
    }
    assert expected <= set(lines)
    assert sum(" ok " in line for line in lines) >= 4


def test_a_narrow_terminal_loses_no_column(report: Report, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = report().split("\nReceptive fields\n")[1].split("\nk s p d ")[0]
    assert max(map(len, table.splitlines())) <= 60
    assert {*analyze_model.COLUMNS, "RF", "28x28", "output_block.1"} <= set(table.split())


def test_json_is_the_whole_analysis(report: Report) -> None:
    output = report("--model", "Model1", "Model5", "--batch-size", 5, "--json")
    found = json.loads(output)
    assert list(found) == ["Model1", "Model5"]
    for name, analysis in found.items():
        expected = dataclasses.asdict(analyze_digits(build_model(name), batch_size=5))
        assert analysis == json.loads(json.dumps(expected))


def test_all_models_end_in_a_comparison(report: Report) -> None:
    output = report("--model", "all", "--no-verify")
    comparison = output[output.index("Comparison") :].splitlines()
    assert comparison[2].split()[:5] == ["Model1", "skipped", "28x28", "14,620", "2,687,476"]
    assert [line.split()[0] for line in comparison[2:]] == ["Model1", "Model2", "Model5"]


def test_checkpoint(report: Report, tmp_path: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "best.pth"
    model = build_model("Model2")
    checkpoint = {
        "model_name": "Model2",
        "epoch": 7,
        "train_accuracy": 97.5,
        "test_accuracy": 98.25,
        "best_test_accuracy": 98.75,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": torch.optim.SGD(model.parameters(), lr=0.01).state_dict(),
    }
    save_checkpoint(path, checkpoint)
    given = []
    monkeypatch.setattr(
        analyze_model, "analyze", lambda *args: given.append(args[0]) or analyze(*args)
    )
    lines = report("--checkpoint", path, "--no-verify").splitlines()
    accuracies = ["train accuracy 97.50 %", "test accuracy 98.25 %", "best test accuracy 98.75 %"]
    assert lines[:5] == ["Model2", "epoch 7", *accuracies]
    assert_same(given[0].state_dict(), model.state_dict())
    with pytest.raises(ScriptError, match="Model2: leave out --model"):
        report("--checkpoint", path, "--model", "Model1")


def test_resnet18() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = Conv2d(1, 64, 7, 2, 3, bias=False)
    analysis = analyze(model, (32, 32), batch_size=64)
    assert analysis.problems() == []
    assert [layer.name for layer in analysis.layers if layer.unknown or layer.macs is None] == []
    last = next(layer for layer in analysis.layers if layer.name == "layer4.1.conv2")
    assert last.fields[0]["height"].r_out == 435  # as in Araujo's table, before global pooling


def test_a_call_is_measured_where_it_is_made() -> None:
    model = Net(lambda x, a, b, c: c(b(b(a(x)))).relu(), conv(), conv(2), nn.Dropout(0.5))
    layers = analyze_digits(model, batch_size=5).layers
    n = 28 * 28
    assert "".join(layer.name for layer in layers) == "Netabbcrelu()"
    assert [layer.macs for layer in layers] == [0, 18 * n, 36 * n, 36 * n, 0, 0]
    # The model keeps what relu needs, convolutions their input but the images, dropout its mask
    assert [layer.kept for layer in layers] == [40 * n, 0, 40 * n, 40 * n, 40 * n, 0]


def test_work_that_no_image_enters_counts_as_a_whole() -> None:
    model = Net(lambda x, a, b: a(x) * (b.weight @ b.weight).mean(), conv(), Linear(5, 5))
    analysis = analyze_digits(model)
    assert analysis.problems() == []
    assert analysis.totals["macs"] == 28 * 28 * 18 + 5**3


def test_never_called() -> None:
    model = Net(
        lambda x, a, b, c, d: a(b(x)) if a.training else a(x),
        conv(),
        ReLU(),
        ReLU(),
        nn.BatchNorm2d(3),
    )
    layers = {layer.name: layer for layer in analyze_digits(model).layers}
    shapes = [layers[name].output_shape for name in "abcd"]
    assert shapes == [(2, 28, 28), (1, 28, 28), None, None]
    assert [layers[name].buffers for name in "abcd"] == [0, 0, 0, 7]


def test_products_that_the_counter_does_not_know(monkeypatch: Patch) -> None:
    monkeypatch.setattr(model_runs, "FlopCounterMode", None)  # as with torch 2.0
    analysis = analyze_digits(build_model("Model5"))
    assert analysis.problems() == []
    assert analysis.totals["macs"] is None
    assert {layer.type for layer in analysis.layers if layer.macs is None} == {"Conv2d"}
    assert [check.name for check in analysis.checks if check.passed is None] == ["MACs"]


def test_a_counter_that_disagrees_fails(
    report: Report, monkeypatch: Patch, capsys: pytest.CaptureFixture
) -> None:
    counter = model_runs.FlopCounterMode
    right = counter.get_total_flops
    monkeypatch.setattr(counter, "get_total_flops", lambda self: 3 * right(self))
    with pytest.raises(ScriptError, match=r"^Model5: MACs: wrong at input_block\.0, "):
        report()
    assert "MACs FAILED" in squeeze(capsys.readouterr().out)


def test_a_mistake_in_the_parameters_fails(monkeypatch: Patch) -> None:
    without_bias = property(lambda layer: layer.weight, lambda layer, n: None)
    monkeypatch.setattr(analyze_model.Layer, "parameters", without_bias)
    assert analyze_digits(conv()).problems() == ["parameters: wrong at the total"]


def test_images_too_small_show_the_layers_so_far(
    report: Report, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ScriptError, match=r"^Model5: conv_block2\.0 fails on images of 8x30: .+"):
        report("--input-size", 8, 30)
    lines = squeeze(capsys.readouterr().out)
    assert lines[-6].startswith("0 Conv2d failed 864")
    assert "Receptive fields" not in lines


def test_branches_that_differ_in_one_axis() -> None:
    model = Net(
        lambda x, a, b: a(x) + b(x),
        Conv2d(1, 2, 5, padding=2),
        Conv2d(1, 2, (5, 3), 1, (2, 1)),
    )
    table, *_ = analyze_model.format_fields(analyze_digits(model))
    assert squeeze(table)[-1].startswith("add() function 1x- 1x- 0x- 1x- 28 ")


def test_a_block_that_is_followed_as_a_whole() -> None:
    block = Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4), ReLU(), nn.AdaptiveAvgPool2d(1))
    analysis = analyze_digits(Sequential(block, nn.Flatten()))
    assert [layer.name for layer in analysis.layers if layer.fields] == ["0"]
    assert analyze_model.centre_fields(analysis)["0"]["height"] == 28
    assert analyze_model.format_fields(analysis)[-1].endswith("any of these: Flatten.")


def test_lazy_layers(report: Report, monkeypatch: Patch) -> None:
    def use(layer: nn.Module) -> None:
        model = Sequential(layer, nn.LazyLinear(10))
        monkeypatch.setattr(analyze_model, "build_model", lambda name: model)

    use(nn.LazyConv2d(4, 3))
    assert "0 Conv2d 4x26x26 36 4 40" in " ".join(report("--no-verify").split())
    use(conv(3))
    with pytest.raises(ScriptError, match=r"^Model5 has lazy layers .* --dry-run"):
        report()


def test_image(report: Report, tmp_path: Path, tiny_data: Path, monkeypatch: Patch) -> None:
    path = tmp_path / "fields.png"

    def draw(*options: object) -> np.ndarray:
        report("--image", path, "--data-dir", tiny_data, *options)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    first = draw("--no-verify")
    assert (first == (255, 0, 0)).all(2).any()
    changed = first != draw("--no-verify", "--digit", 99)
    digits, maps = changed[:390], changed[390:780]
    assert digits.any()
    assert maps.any()

    with pytest.raises(ScriptError, match=r"fails on images of 1x1.*; .*fields\.png is not drawn"):
        draw("--input-size", 1, 1)
    with pytest.raises(ScriptError, match=r"run download_mnist\.py"):
        draw("--data-dir", tmp_path / "none")
    with pytest.raises(ScriptError, match="--model"):
        draw("--model", "all")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScriptError, match="pip install matplotlib"):
        draw()


def test_maps_of_modules() -> None:
    model = Sequential(
        conv(),
        nn.BatchNorm2d(2),
        ReLU(inplace=True),
        nn.Flatten(),
        nn.LazyLinear(3),
    )
    image = torch.rand(1, 1, 6, 7)
    model(image)
    maps = module_maps(model, image)
    normalised = model[:2].eval()(image)
    assert maps["1"].equal(normalised[0])
    assert maps["2"].equal(normalised[0].relu())
    assert maps["4"].equal(model(image).reshape(3, 1, 1))
    assert module_maps(model, torch.rand(1, 1, 6, 8)).keys() == {"0", "1", "2", "3"}


def test_fields_of_the_centre() -> None:
    analysis = analyze_digits(Sequential(Conv2d(1, 2, 5, padding=2), ReLU()))
    expected = {"top": 12, "left": 12, "height": 5, "width": 5}
    assert analyze_model.centre_fields(analysis) == {"0": expected}

"""The analysis: its numbers against another tool and counts by hand, its report, and models that are hard on it."""

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchinfo
import torchvision
from PIL import Image
from test_receptive_fields import Net, conv, last_field
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


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Return a function that gives what the script prints with the given options."""

    def run_main(*options: object) -> str:
        monkeypatch.setattr(
            sys, "argv", ["analyze_model.py", "--device", "cpu", *map(str, options)]
        )
        analyze_model.main()
        return capsys.readouterr().out

    return run_main


@pytest.mark.parametrize(
    ("name", "total"), [("Model1", 14_620), ("Model2", 14_796), ("Model5", 8_018)]
)
def test_totals_agree_with_torchinfo(name: str, total: int) -> None:
    model = build_model(name)
    analysis = analyze(model, (28, 28), batch_size=64)
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0)
    assert analysis.totals["parameters"] == theirs.total_params == total
    assert analysis.totals["macs"] == sum(
        layer.macs for layer in theirs.summary_list if layer.class_name == "Conv2d"
    )
    assert last_field(analysis) == (28, 28)


def test_memory_of_model1_counted_by_hand() -> None:
    # Each ReLU's output, which is also the next layer's input; max-pool's output and its int64 indices;
    # the transition's output. The last convolution's output is kept by nobody.
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
    memory = analyze(build_model("Model1"), (28, 28), batch_size=3).memory
    training = [parameters, parameters, parameters, 0, pixels + labels, kept, 0]
    assert [part.training for part in memory] == [*training, sum(training)]
    inference = [parameters, 0, 0, 0, pixels, 0, largest]
    assert [part.inference for part in memory] == [*inference, sum(inference)]


def test_parameters_are_counted_once_and_where_they_are() -> None:
    layers = {
        "a": conv(1, 4),
        "b": Sequential(nn.BatchNorm2d(4), ReLU()),
        "c": conv(4, 4),
        "d": Linear(5, 6),
    }
    net = Net(lambda net, x: net.b(net.b(net.c(net.c(net.a(x))))), **layers)
    net.b.requires_grad_(False)
    analysis = analyze(net, (28, 28), batch_size=2)
    parts = [f"{part.name} {part.weight} {part.bias} {part.buffers}" for part in analysis.layers]
    expected = [
        "Net 0 0 0",
        "a 36 4 0",
        "c 144 4 0",
        "c 0 0 0",
        "b 0 0 0",
        "b.0 4 4 9",
        "b.1 0 0 0",
        "d 30 6 0",
    ]
    assert parts == [*expected[:-1], "b 0 0 0", "b.0 0 0 0", "b.1 0 0 0", expected[-1]]
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
    assert [layer.share for layer in analysis.layers][:3] == [
        0,
        round(4000 / 232, 2),
        round(14800 / 232, 2),
    ]


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        (Sequential(conv(), nn.Sigmoid(), ReLU(inplace=True)), "Sequential", "inplace operation"),
        (
            Sequential(conv(), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)),
            "2",
            "Expected more than 1 value",
        ),
    ],
)
def test_what_fails_is_named(model: nn.Module, name: str, reason: str) -> None:
    assert re.match(
        f"{name} fails on images of 28x28: .*{reason}",
        analyze(model, (28, 28), batch_size=1).failure,
    )


@pytest.mark.parametrize("training", [True, False])
def test_the_model_comes_back_unchanged(training: bool) -> None:
    model = build_model("Model5").train(training)
    model(torch.randn(2, 1, 28, 28)).sum().backward()
    before = copy.deepcopy(
        [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]
    )
    random_state = torch.get_rng_state()
    analyze(model, (28, 28), batch_size=4)
    assert torch.get_rng_state().equal(random_state)
    assert all(
        module.training is training and not module._forward_hooks for module in model.modules()
    )
    after = [*model.state_dict().values(), *(parameter.grad for parameter in model.parameters())]
    assert all(map(torch.equal, before, after))


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
    assert "Left out, not seen to change any of these: Flatten, ReLU." in lines
    assert sum(" ok " in line for line in lines) >= 4


def test_a_narrow_terminal_loses_no_column(
    report: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    table = report().split("\nReceptive fields\n")[1].split("\nk s p d ")[0]
    assert max(map(len, table.splitlines())) <= 60
    assert {*analyze_model.COLUMNS, "RF", "28x28", "output_block.1"} <= set(table.split())


def test_json_is_the_whole_analysis(report: Callable[..., str]) -> None:
    expected = {
        name: dataclasses.asdict(analyze(build_model(name), (28, 28), 5))
        for name in ("Model1", "Model5")
    }
    output = report("--model", *expected, "--batch-size", 5, "--json")
    assert json.loads(output) == json.loads(json.dumps(expected))


def test_all_models_end_in_a_comparison(report: Callable[..., str]) -> None:
    output = report("--model", "all", "--no-verify")
    comparison = output[output.index("Comparison") :].splitlines()
    assert comparison[2].split()[:5] == ["Model1", "skipped", "28x28", "14,620", "2,687,476"]
    assert [line.split()[0] for line in comparison[2:]] == ["Model1", "Model2", "Model5"]


def test_checkpoint(
    report: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, model, given = tmp_path / "best.pth", build_model("Model2"), []
    results = {
        "epoch": 7,
        "train_accuracy": 97.5,
        "test_accuracy": 98.25,
        "best_test_accuracy": 98.75,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    states = {
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
    }
    save_checkpoint(path, {"model_name": "Model2", **results, **states})
    monkeypatch.setattr(
        analyze_model, "analyze", lambda *args: given.append(args[0]) or analyze(*args)
    )
    lines = report("--checkpoint", path, "--no-verify").splitlines()
    accuracies = ["train accuracy 97.50 %", "test accuracy 98.25 %", "best test accuracy 98.75 %"]
    assert lines[:5] == ["Model2", "epoch 7", *accuracies]
    assert all(
        tensor.equal(model.state_dict()[key]) for key, tensor in given[0].state_dict().items()
    )
    with pytest.raises(ScriptError, match="Model2: leave out --model"):
        report("--checkpoint", path, "--model", "Model1")


def test_resnet18() -> None:
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = Conv2d(1, 64, 7, 2, 3, bias=False)
    analysis = analyze(model, (32, 32), batch_size=64)
    assert analysis.problems() == []
    assert [layer.name for layer in analysis.layers if layer.unknown or layer.macs is None] == []
    fields = {
        layer.name: layer.fields[-1]["height"].r_out for layer in analysis.layers if layer.fields
    }
    assert fields["layer4.1.conv2"] == 435  # as in Araujo's table, before the global pooling


def test_a_call_is_measured_where_it_is_made() -> None:
    model = Net(
        lambda net, x: net.c(net.b(net.b(net.a(x)))).relu(), a=conv(), b=conv(2), c=nn.Dropout(0.5)
    )
    layers, n = analyze(model, (28, 28), batch_size=5).layers, 28 * 28
    assert "".join(layer.name for layer in layers) == "Netabbcrelu()"
    assert [layer.macs for layer in layers] == [0, 18 * n, 36 * n, 36 * n, 0, 0]
    # The model keeps what relu needs, the convolutions their input but the images, dropout its mask
    assert [layer.kept for layer in layers] == [40 * n, 0, 40 * n, 40 * n, 40 * n, 0]


def test_work_that_no_image_enters_counts_as_a_whole() -> None:
    model = Net(
        lambda net, x: net.a(x) * (net.b.weight @ net.b.weight).mean(), a=conv(), b=Linear(5, 5)
    )
    analysis = analyze(model, (28, 28), batch_size=2)
    assert analysis.problems() == []
    assert analysis.totals["macs"] == 28 * 28 * 18 + 5**3


def test_never_called() -> None:
    only_trained = Net(
        lambda net, x: net.a(net.b(x)) if net.training else net.a(x), a=conv(), b=ReLU(), c=ReLU()
    )
    only_trained.d = nn.BatchNorm2d(3)
    layers = {
        layer.name: (layer.output_shape, layer.buffers)
        for layer in analyze(only_trained, (28, 28), 2).layers
    }
    assert [layers[name] for name in "abcd"] == [
        ((2, 28, 28), 0),
        ((1, 28, 28), 0),
        (None, 0),
        (None, 7),
    ]


def test_products_that_the_counter_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_runs, "FlopCounterMode", None)  # as with torch 2.0
    analysis = analyze(build_model("Model5"), (28, 28), batch_size=2)
    assert (analysis.problems(), analysis.totals["macs"]) == ([], None)
    assert {layer.type for layer in analysis.layers if layer.macs is None} == {"Conv2d"}
    assert [check.name for check in analysis.checks if check.passed is None] == ["MACs"]


def test_a_counter_that_disagrees_fails(
    report: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = model_runs.FlopCounterMode.get_total_flops
    monkeypatch.setattr(
        model_runs.FlopCounterMode, "get_total_flops", lambda counter: 3 * right(counter)
    )
    with pytest.raises(ScriptError, match=r"^Model5: MACs: wrong at input_block\.0, "):
        report()
    assert "MACs FAILED" in re.sub(" +", " ", capsys.readouterr().out)


def test_a_mistake_in_the_parameters_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        analyze_model.Layer,
        "parameters",
        property(lambda layer: layer.weight, lambda layer, n: None),
    )
    assert analyze(Sequential(conv()), (28, 28), 2).problems() == ["parameters: wrong at the total"]


def test_images_too_small_show_the_layers_so_far(
    report: Callable[..., str], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ScriptError, match=r"^Model5: conv_block2\.0 fails on images of 8x30: .+"):
        report("--input-size", 8, 30)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[-6].startswith("0 Conv2d failed 864")
    assert "Receptive fields" not in lines


def test_branches_that_differ_in_one_axis() -> None:
    model = Net(
        lambda net, x: net.a(x) + net.b(x),
        a=Conv2d(1, 2, 5, padding=2),
        b=Conv2d(1, 2, (5, 3), 1, (2, 1)),
    )
    table = analyze_model.format_fields(analyze(model, (28, 28), 2))[0]
    assert table.splitlines()[-1].split()[2:7] == ["1x-", "1x-", "0x-", "1x-", "28"]


def test_a_block_that_is_followed_as_a_whole() -> None:
    block = Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4), ReLU(), nn.AdaptiveAvgPool2d(1))
    analysis = analyze(Sequential(block, nn.Flatten()), (28, 28), 2)
    assert [layer.name for layer in analysis.layers if layer.fields] == ["0"]
    assert analyze_model.centre_fields(analysis)["0"]["height"] == 28
    assert analyze_model.format_fields(analysis)[-1].endswith("any of these: Flatten.")


def test_lazy_layers(report: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        analyze_model,
        "build_model",
        lambda name: Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(10)),
    )
    assert "0 Conv2d 4x26x26 36 4 40" in " ".join(report("--no-verify").split())
    monkeypatch.setattr(
        analyze_model, "build_model", lambda name: Sequential(conv(3), nn.LazyLinear(10))
    )
    with pytest.raises(ScriptError, match=r"^Model5 has lazy layers .* --dry-run"):
        report()


def test_image(
    report: Callable[..., str], tmp_path: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = {}
    for digit in (0, 99):
        report(
            "--image",
            tmp_path / "fields.png",
            "--no-verify",
            "--data-dir",
            tiny_data,
            "--digit",
            digit,
        )
        with Image.open(tmp_path / "fields.png") as picture:
            pixels[digit] = np.asarray(picture.convert("RGB"))
    assert (pixels[0] == (255, 0, 0)).all(2).any()
    (digits, maps) = ((pixels[0] != pixels[99])[half] for half in (slice(0, 390), slice(390, 780)))
    assert digits.any() and maps.any()
    with pytest.raises(ScriptError, match=r"fails on images of 1x1.*; .*fields\.png is not drawn"):
        report("--image", tmp_path / "fields.png", "--data-dir", tiny_data, "--input-size", 1, 1)
    with pytest.raises(ScriptError, match=r"run download_mnist\.py"):
        report("--image", tmp_path / "fields.png", "--data-dir", tmp_path / "none")
    with pytest.raises(ScriptError, match="--model"):
        report("--image", tmp_path / "fields.png", "--model", "all")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScriptError, match="pip install matplotlib"):
        report("--image", tmp_path / "fields.png")


def test_maps_of_modules() -> None:
    model = Sequential(
        conv(), nn.BatchNorm2d(2), ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(3)
    )
    image = torch.rand(1, 1, 6, 7)
    model(image)
    maps = module_maps(model, image)
    normalised = model[:2].eval()(image)
    assert maps["1"].equal(normalised[0]) and maps["2"].equal(normalised[0].relu())
    assert maps["4"].equal(model(image).reshape(3, 1, 1))
    assert module_maps(model, torch.rand(1, 1, 6, 8)).keys() == {"0", "1", "2", "3"}


def test_fields_of_the_centre() -> None:
    analysis = analyze(Sequential(Conv2d(1, 2, 5, padding=2), ReLU()), (28, 28), batch_size=2)
    assert analyze_model.centre_fields(analysis) == {
        "0": {"top": 12, "left": 12, "height": 5, "width": 5}
    }

"""The analysis: numbers against another tool and counts by hand, the report, and hard models."""

import copy
import dataclasses
import json
import re
import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torchinfo
import torchvision
from conftest import assert_same
from PIL import Image
from test_receptive_fields import (
    Attention,
    MultiheadAttention,
    Net,
    analyze_digits,
    assert_followed,
    chain,
    conv,
    squeeze,
    tokens,
)
from torch import nn
from torch.nn import Conv2d, Linear, ReLU, Sequential

import analyze_model
from analysis import layer_costs
from analyze_model import analyze, module_maps
from checkpoints import save_checkpoint
from models import build_model
from utils import ScriptError

pytestmark = pytest.mark.skipif(
    not layer_costs.FlopCounterMode, reason="torch counts operations since version 2.1"
)


@pytest.fixture
def report(monkeypatch, capsys):
    """Return a function that gives what the script prints with the given options."""

    def run_main(*options):
        command = "analyze_model.py", "--device", "cpu", *options
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        analyze_model.main()
        run_main.captured = capsys.readouterr()
        return run_main.captured.out

    return run_main


@pytest.fixture
def use(monkeypatch):
    """Return a function that lets the script analyze what it is given, in place of Model5."""
    return lambda build: monkeypatch.setattr(analyze_model, "build_model", lambda name: build())


@pytest.mark.parametrize("name", ["Model1", "Model2", "Model5"])
def test_totals_agree_with_torchinfo(name):
    model = build_model(name)
    totals = analyze_digits(model, batch_size=64).totals
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0)
    assert totals["parameters"] == theirs.total_params
    macs = [layer.macs for layer in theirs.summary_list if layer.class_name == "Conv2d"]
    assert totals["MACs"] == sum(macs)


def test_memory_of_model1_counted_by_hand():
    # Parameters are 4 * 14,620 bytes, images 4 * 3 * 28 * 28, labels 8 * 3.
    # Kept for backward are each ReLU's output, which is also the next layer's input, max-pool's
    # output and its int64 indices, and the transition's output. The last convolution's output is
    # kept by nobody:
    #     3 * (4 * (8 * 26**2 + 16 * 24**2 + 24 * 22**2 + 24 * 11**2 + 8 * 11**2 + 16 * 9**2
    #               + 24 * 7**2 + 10 * 7**2) + 8 * 24 * 11**2)
    # The input and the output of conv_block1.3 take 3 * 4 * 2 * 24 * 22**2 in inference.
    expected = """\
        parameters 58480 58480
        buffers 0 0
        images 9408 9408
        activations 466584 278784
        gradients 58480 0
        momentum 58480 0
        labels 24 0
        sum 651456 346672"""
    training, inference = analyze_digits(build_model("Model1")).memory.values()
    rows = [f"{part} {size} {inference.get(part, 0)}" for part, size in training.items()]
    assert rows == squeeze(expected)


def test_parameters_are_counted_once_and_where_they_are():
    class Filtered(Net):
        def parameters(self):
            return filter(lambda parameter: parameter.requires_grad, super().parameters())

    net = Filtered(
        lambda x, a, b, c, d: b(b(c(c(a(x))))),
        conv(1, 4),
        Sequential(nn.BatchNorm2d(4), ReLU()).requires_grad_(False),
        conv(4, 4),
        Linear(5, 6),
    )
    # Weight, bias, buffers, and per cent of 232
    expected = """\
        Filtered 0 0 0 0.00
        a 36 4 0 17.24
        c 144 4 0 63.79
        c 0 0 0 0.00
        b 0 0 0 0.00
        b.0 4 4 9 3.45
        b.1 0 0 0 0.00
        b 0 0 0 0.00
        b.0 0 0 0 0.00
        b.1 0 0 0 0.00
        d 30 6 0 15.52"""
    analysis = analyze_digits(net)
    rows = [
        f"{layer.name} {layer.weight} {layer.bias} {layer.buffers} {layer.share:.2f}"
        for layer in analysis.layers
    ]
    assert rows == squeeze(expected)
    totals = "{weight} {bias} {parameters} {trainable} {frozen} {shared} {buffers}"
    assert totals.format(**analysis.totals) == "214 18 232 224 8 156 9"


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Sigmoid(), ReLU(inplace=True)], "Sequential fails .*inplace operation"),
        ([nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2)], "2 fails .*Expected more than 1 value"),
    ],
)
def test_what_fails_is_named(layers, expected):
    failure = analyze_digits(Sequential(conv(), *layers), batch_size=1).failure
    assert re.match(expected, failure)


def test_the_model_comes_back_unchanged():
    model = build_model("Model5")
    model.conv_block1.eval()
    model(torch.randn(2, 1, 28, 28)).sum().backward()

    def state():
        gradients = [parameter.grad for parameter in model.parameters()]
        modules = [(module.training, len(module._forward_hooks)) for module in model.modules()]
        return [torch.get_rng_state(), model.state_dict(), gradients, modules]

    before = copy.deepcopy(state())
    analyze_digits(model)
    assert_same(before, state())


def test_report(report):
    expected = """\
        (conv_block2): Sequential(
        conv_block1.2 Conv2d 24x22x22 3,456 3,456 23.64 % 1,672,704
        conv_block1.3 ReLU 24x22x22 139,392
        output_block.2 Conv2d 7 1 0 1 7 1 2 2 16 28 0 0 28x28
        trainable 14,620, frozen 0, shared by several layers 0
        Calls that were not seen to change any of these are left out."""
    output = report("--model", "model1", "--batch-size", "3")
    assert output.isascii()
    assert max(map(len, output.splitlines())) <= 120
    lines = squeeze(output)
    assert {*squeeze(expected)} <= {*lines}
    assert "ok: 22 of 22 modules return what sees the right pixels" in lines


def test_json_is_the_whole_analysis(report):
    names = "Model1", "Model5"
    analyses = {name: analyze_digits(build_model(name), batch_size=5) for name in names}
    expected = {name: dataclasses.asdict(analysis) for name, analysis in analyses.items()}
    output = report("--model", *names, "--batch-size", 5, "--json")
    assert output == json.dumps(expected, indent=2) + "\n"


def test_all_models_end_in_a_comparison(report):
    output = report("--model", "all")
    comparison = output[output.index("Comparison") :].splitlines()
    assert comparison[2].split()[:5] == ["Model1", "ok", "28x28", "14,620", "2,687,476"]
    assert [line.split()[0] for line in comparison[2:]] == ["Model1", "Model2", "Model5"]


def test_checkpoint(report, tmp_path, monkeypatch):
    path = tmp_path / "best.pth"
    model = build_model("Model2")
    checkpoint = {
        "model_name": "Model2",
        "epoch": 7,
        "model_state_dict": model.state_dict(),
    }
    save_checkpoint(path, checkpoint)
    spy = Mock(wraps=analyze)
    monkeypatch.setattr(analyze_model, "analyze", spy)
    title, *_ = report("--checkpoint", path).splitlines()
    assert title == "Model2 after epoch 7"
    analyzed, *_ = spy.call_args.args
    assert_same(analyzed.state_dict(), model.state_dict())
    with pytest.raises(SystemExit):
        report("--checkpoint", path, "--model", "Model1")


def test_resnet18():
    model = torchvision.models.resnet18(weights=None)
    model.conv1 = Conv2d(1, 64, 7, 2, 3, bias=False)
    analysis = analyze(model, (32, 32), batch_size=64)
    assert analysis.problem is None
    assert [layer.name for layer in analysis.layers if layer.unknown or layer.MACs is None] == []
    last = next(layer for layer in analysis.layers if layer.name == "layer4.1.conv2")
    assert last.fields[0]["height"]["r_out"] == 435  # as in Araujo's table, before global pooling


def test_a_call_is_measured_where_it_is_made():
    model = Net(lambda x, a, b, c: c(b(b(a(x)))).relu(), conv(), conv(2), nn.Dropout(0.5))
    # With n = 28 * 28, a makes 18 * n products and b 36 * n. Kept are 40 * n bytes each time: the
    # model keeps what relu needs, convolutions their input but the images, dropout its mask.
    expected = """\
        Net 0 31360
        a 14112 0
        b 28224 31360
        b 28224 31360
        c 0 31360
        relu() 0 0"""
    layers = analyze_digits(model, batch_size=5).layers
    assert [f"{layer.name} {layer.MACs} {layer.kept}" for layer in layers] == squeeze(expected)


def test_work_that_no_image_enters_counts_as_a_whole():
    model = Net(lambda x, a, b: a(x) * (b.weight @ b.weight).mean(), conv(), Linear(5, 5))
    analysis = analyze_digits(model)
    assert analysis.problem is None
    assert analysis.totals["MACs"] == 28 * 28 * 18 + 5**3 // 3  # of three images


def test_modules_that_are_not_called():
    model = Net(
        lambda x, a, b, c, *_: a((b(x) if a.training else x)[:, 0]) * c[0],
        MultiheadAttention(28, 2, batch_first=True),
        ReLU(),
        nn.ParameterList([nn.Parameter(torch.ones(1))]),
        ReLU(),
        nn.BatchNorm2d(3),
    )
    expected = """\
        Net: 28x28, 0
        a: 28x28, 0
        b: 1x28x28, 0
        a.out_proj: not called itself, 0
        c: not called itself, 0
        d: never called, 0
        e: never called, 7"""
    layers = [layer for layer in analyze_digits(model).layers if layer.type != "function"]
    rows = [f"{layer.name}: {layer.output}, {layer.buffers}" for layer in layers]
    assert rows == squeeze(expected)


def test_products_that_the_counter_does_not_know(monkeypatch):
    monkeypatch.setattr(layer_costs, "FlopCounterMode", None)  # as with torch 2.0
    analysis = analyze_digits(build_model("Model5"))
    assert analysis.problem is None
    assert analysis.totals["MACs"] is None


def test_images_too_small_show_the_layers_so_far(report, capsys):
    with pytest.raises(ScriptError, match=r"^Model5: conv_block2\.0 fails on images of 8x30: .+"):
        report("--input-size", 8, 30)
    lines = squeeze(capsys.readouterr().out)
    assert "conv_block2.0 Conv2d failed 864 864 10.78 % 18,432" in lines
    assert "Receptive fields" not in lines


def test_a_block_that_is_followed_as_a_whole():
    block = Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4), ReLU(), nn.AdaptiveAvgPool2d(1))
    analysis = analyze_digits(Sequential(block, nn.Flatten()))
    assert [layer.name for layer in analysis.layers if layer.fields] == ["0"]
    assert analyze_model.centre_fields(analysis)["0"]["height"] == 28


def test_lazy_layers(report, use):
    use(lambda: Sequential(nn.LazyConv2d(4, 3), nn.LazyLinear(10)))
    assert "0 Conv2d 4x26x26 36 4 40" in " ".join(report().split())
    use(lambda: Sequential(conv(3), nn.LazyLinear(10)))
    with pytest.raises(ScriptError, match=r"^Model5 has lazy layers .* --dry-run"):
        report()


def test_image(report, tmp_path, tiny_data, monkeypatch):
    path = tmp_path / "fields.png"

    def draw(*options):
        report("--image", path, "--data-dir", tiny_data, *options)
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))

    first = draw()
    assert (first == (255, 0, 0)).all(2).any()
    changed = first != draw("--digit", 99)
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


def test_maps_of_modules():
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


def test_fields_of_the_centre():
    analysis = analyze_digits(Sequential(Conv2d(1, 2, 5, padding=2), ReLU()))
    expected = {"top": 12, "left": 12, "height": 5, "width": 5}
    assert analyze_model.centre_fields(analysis) == {"0": expected}


@pytest.mark.parametrize(
    "attention",
    [
        Attention(by_hand=True),
        Attention(by_hand=False),
        MultiheadAttention(16, 2, bias=False, batch_first=True),
    ],
)
def test_products_of_attention(attention):
    patches = Conv2d(1, 16, 4, 4, bias=False)
    analysis = analyze_digits(chain(patches, tokens, attention))
    products = 49 * 16 * 48 + 2 * (2 * 49 * 49 * 8) + 49 * 16 * 16
    assert analysis.totals["MACs"] == 49 * 16 * 16 + products
    assert_followed(analysis, "28x28")


def test_products_that_torch_does_not_count():
    model = Net(lambda x, a: a(x[:, 0].permute(1, 0, 2))[0], nn.LSTM(28, 8))
    analysis = analyze_digits(model, batch_size=64)
    assert analysis.totals["MACs"] is None
    assert [layer.output for layer in analysis.layers][-1] == "28x8"  # of one image
    assert "? if not counted" in "\n".join(analyze_model.format_layers(analysis))


def test_functions_need_memory_as_layers_do():
    layer = analyze_digits(Sequential(conv(), ReLU()))
    function = analyze_digits(Net(lambda x, a: a(x).relu(), conv()))
    assert function.memory == layer.memory
    assert function.memory["inference"]["activations"] == 2 * 3 * 2 * 28 * 28 * 4


def test_a_loop_over_the_images_is_told_in_a_few_lines(report, use):
    use(lambda: Net(lambda x, a: torch.stack([a(image[None]).relu()[0] for image in x]), conv()))
    lines = squeeze(report())
    assert len(lines) < 65
    assert sum("what comes in is not known" in line for line in lines) == 1
    assert "relu() function 2x28x28 x12" in lines


def test_what_a_model_prints_and_warns(report, use, tiny_data, tmp_path):
    def talk(x):
        print("printed")
        warnings.warn("beware", stacklevel=1)
        return x

    use(lambda: chain(talk, conv()))
    assert json.loads(report("--json"))
    assert report.captured.err == "Warning: beware\n"
    assert json.loads(report("--json", "--image", tmp_path / "a.png", "--data-dir", tiny_data))


def test_a_part_that_is_compiled(report, use):
    use(lambda: chain(torch.compile(conv())))
    assert "a Conv2d 3 1 1 1 28 28 1 1 1 3 0 1 3x3" in squeeze(report())


def test_what_is_too_large(report, capsys):
    with pytest.raises(ScriptError, match=r"^Model5: .*; try a smaller --batch-size$"):
        report("--batch-size", 10**8)
    with pytest.raises(SystemExit):
        report("--input-size", 4000, 4000)
    assert "more than 512x512 pixels: choose fewer" in capsys.readouterr().err

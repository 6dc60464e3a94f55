"""The analysis: its numbers against other tools and hand counts, on many small architectures, and its output."""

import copy
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchinfo
from conftest import assert_one_line, run
from PIL import Image, ImageChops
from torch import Tensor, nn
from torch.nn import Conv2d, GroupNorm, Linear, MaxPool2d, ReLU, Sequential

import analyze_model
from analyze_model import Analysis, Axis, analyze
from checkpoints import save_checkpoint
from models import build_model
from utils import ScriptError

RESULTS = ("epoch", "train_accuracy", "test_accuracy", "best_test_accuracy")
MODEL5_TABLE = """\
3 1 0 1 28 26  1  1  1  3 0 0
3 1 0 1 26 24  1  1  3  5 0 0
3 1 0 1 24 22  1  1  5  7 0 0
2 2 0 1 22 11  1  2  7  8 0 0
1 1 0 1 11 11  2  2  8  8 0 0
3 1 0 1 11  9  2  2  8 12 0 0
3 1 0 1  9  7  2  2 12 16 0 0
7 7 0 1  7  1  2 14 16 28 0 0
1 1 0 1  1  1 14 14 28 28 0 0"""


class Net(nn.Module):
    """A model of the given layers whose forward is the given function of itself and the images."""

    def __init__(self, run_forward: Callable[[nn.Module, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.run_forward = run_forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_forward(self, x)


def squeeze_and_excite(net: nn.Module, x: Tensor) -> Tensor:
    x = net.conv(x)
    return net.last(x * torch.sigmoid(net.gate(F.adaptive_avg_pool2d(x, 1))))


def dense(net: nn.Module, x: Tensor) -> Tensor:
    first = net.first(x)
    return torch.cat([first, net.second(torch.cat((x, first), 1))], dim=1)


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = net.conv(x)
    y += x
    return F.relu_(y) * 2 + 1


def arithmetic(net: nn.Module, x: Tensor) -> Tensor:
    x = net.conv(x).abs().clamp(0.1, 2.0).sqrt().exp().log().pow(2) - net.conv(-x) / 3
    return torch.maximum(x, x.detach().clone()).contiguous().to(x.dtype)


def classic(net: nn.Module, x: Tensor) -> Tensor:
    x = F.max_pool2d(F.relu(net.conv(x)), 2)
    x = torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
    return F.log_softmax(net.linear(F.dropout(x, 0.1, net.training)), dim=1)


# Each architecture, the image size (height, width), and the receptive field after its last layer
ARCHITECTURES: dict[str, tuple[nn.Module, tuple[int, int], tuple[int, int]]] = {
    "padding": (Sequential(Conv2d(1, 2, 3, padding=1), Conv2d(2, 2, 5, padding=2)), (28, 28), (7, 7)),
    "stride": (Sequential(Conv2d(1, 2, 3, 2), Conv2d(2, 2, 3, padding=1), Conv2d(2, 2, 5, 3, 2)), (28, 28), (15, 15)),
    "stride leaves gaps": (Sequential(Conv2d(1, 2, 1, 2), Conv2d(2, 2, 3, padding=1)), (27, 28), (5, 5)),
    "dilation": (Sequential(Conv2d(1, 2, 3, dilation=2), Conv2d(2, 2, 3, padding=3, dilation=3)), (28, 28), (11, 11)),
    "same padding": (Sequential(Conv2d(1, 2, 5, padding="same"), ReLU()), (28, 28), (5, 5)),
    "same padding, dilated": (Sequential(Conv2d(1, 2, 3, padding="same", dilation=4)), (28, 28), (9, 9)),
    "same padding, even kernel": (Sequential(Conv2d(1, 2, (4, 3), padding="same")), (28, 28), (4, 3)),
    "valid padding": (Sequential(Conv2d(1, 2, 5, padding="valid")), (28, 28), (5, 5)),
    "padding past the kernel": (Sequential(Conv2d(1, 2, 1, padding=1), Conv2d(2, 2, 3)), (28, 28), (3, 3)),
    "max pooling": (Sequential(MaxPool2d(3, 2, 1), Conv2d(1, 2, 3, padding=1), MaxPool2d(2)), (27, 28), (9, 9)),
    "max pooling, dilated": (Sequential(MaxPool2d(3, 2, dilation=2), Conv2d(1, 2, 3)), (28, 28), (9, 9)),
    "ceil mode": (Sequential(MaxPool2d(3, 2, ceil_mode=True), Conv2d(1, 2, 3)), (28, 28), (7, 7)),
    "ceil mode, padded": (Sequential(nn.AvgPool2d(2, 2, 1, ceil_mode=True), Conv2d(1, 2, 3)), (27, 28), (6, 6)),
    "average pooling": (Sequential(Conv2d(1, 2, 3), nn.AvgPool2d((1, 2))), (28, 28), (3, 4)),
    "pooling with indices": (
        Net(lambda net, x: net.pool(x)[0], pool=MaxPool2d(2, return_indices=True)),
        (8, 8),
        (2, 2),
    ),
    "global pooling": (Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), (28, 20), (28, 20)),
    "adaptive pooling": (Sequential(nn.AdaptiveMaxPool2d((14, None)), nn.AdaptiveAvgPool2d((7, 4))), (28, 28), (4, 7)),
    "mean": (Net(lambda net, x: net.a(x).mean((-1, 2)), a=Conv2d(1, 2, 3, padding=1)), (28, 28), (30, 30)),
    "depthwise": (Sequential(Conv2d(1, 8, 1), Conv2d(8, 8, 3, groups=8), Conv2d(8, 4, 1)), (28, 28), (3, 3)),
    "grouped": (Sequential(Conv2d(1, 8, 3), Conv2d(8, 12, 3, groups=4)), (28, 28), (5, 5)),
    "oblong": (Sequential(Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)), MaxPool2d((2, 1))), (20, 32), (6, 5)),
    "linear": (Sequential(Conv2d(1, 2, 3, 2), nn.Flatten(), ReLU(), Linear(338, 9), Linear(9, 5)), (28, 28), (27, 27)),
    "functional": (Net(classic, conv=Conv2d(1, 4, 3), linear=Linear(4, 10)), (28, 28), (28, 28)),
    "view": (
        Net(lambda net, x: net.a(net.b(x).view(-1, 98)), a=Linear(98, 5), b=Conv2d(1, 2, 4, 4)),
        (28, 28),
        (28, 28),
    ),
    "residual": (Net(lambda net, x: F.relu(x + net.a(x)), a=Conv2d(1, 1, 3, padding=1)), (28, 28), (3, 3)),
    "residual, projected": (
        Net(lambda net, x: net.b(x) + net.a(x), a=Conv2d(1, 2, 3, 2, padding=1), b=Conv2d(1, 2, 1, 2)),
        *((27, 28), (3, 3)),
    ),
    "concatenation": (
        Net(
            lambda net, x: torch.cat([net.a(x), net.b(x), x], 1),
            a=Conv2d(1, 2, (5, 1), padding=(2, 0)),
            b=Conv2d(1, 2, (1, 7), padding=(0, 3)),
        ),
        *((28, 28), (5, 7)),
    ),
    "dense": (Net(dense, first=Conv2d(1, 3, 3, padding=1), second=Conv2d(4, 3, 3, padding=1)), (28, 28), (5, 5)),
    "squeeze and excite": (
        Net(squeeze_and_excite, conv=Conv2d(1, 2, 3), gate=Conv2d(2, 2, 1), last=Conv2d(2, 2, 3)),
        *((28, 24), (28, 24)),
    ),
    "gate of the whole image": (
        Net(lambda net, x: net.a(x) * x.mean((2, 3), keepdim=True), a=Conv2d(1, 2, 5, padding=2)),
        *((28, 28), (32, 32)),
    ),
    "batch norm": (Sequential(Conv2d(1, 2, 3), nn.BatchNorm2d(2), ReLU(), Conv2d(2, 2, 3)), (28, 28), (5, 5)),
    "group norm": (Sequential(Conv2d(1, 4, 3), GroupNorm(2, 4), MaxPool2d(2), Conv2d(4, 2, 3)), (28, 24), (28, 24)),
    "group norm, residual": (
        Net(lambda net, x: net.b(x + net.a(x)), a=Sequential(Conv2d(1, 1, 3, padding=1), GroupNorm(1, 1)), b=ReLU()),
        *((28, 28), (30, 30)),
    ),
    "dropout": (Sequential(Conv2d(1, 2, 3), nn.Dropout(0.1), nn.Dropout2d(0.1), Conv2d(2, 2, 3)), (28, 28), (5, 5)),
    "in place": (Net(in_place, conv=Conv2d(1, 2, 3, padding=1)), (28, 28), (3, 3)),
    "arithmetic": (Net(arithmetic, conv=Conv2d(1, 2, 3)), (28, 28), (3, 3)),
    "shared module": (Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2), (28, 28), (7, 7)),
    "shared batch norm": (
        Net(lambda net, x: net.b(net.a(net.b(x))), a=Conv2d(1, 1, 3), b=nn.BatchNorm2d(1)),
        *((28, 28), (3, 3)),
    ),
    "never called": (Net(lambda net, x: net.a(x), a=Conv2d(1, 2, 3), b=Sequential(Linear(5, 5))), (28, 28), (3, 3)),
    "frozen": (Sequential(Conv2d(1, 2, 3).requires_grad_(False), ReLU(), Conv2d(2, 2, 3)), (28, 28), (5, 5)),
    "all frozen": (Sequential(Conv2d(1, 2, 3), ReLU()).requires_grad_(False), (28, 28), (3, 3)),
    "activations": (
        Sequential(
            *(Conv2d(1, 2, 3), nn.ReLU6(), nn.LeakyReLU(inplace=True), nn.PReLU(), nn.ELU(), nn.SELU(), nn.CELU()),
            *(nn.GELU(), nn.SiLU(), nn.Mish(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.Sigmoid()),
            *(nn.Tanh(), nn.Softplus(), nn.Softmax(1), nn.Identity(), nn.AlphaDropout(0.1)),
        ),
        *((28, 28), (3, 3)),
    ),
}
# What cannot be followed, the layer that says so, and the receptive field up to there
NOT_FOLLOWED: dict[str, tuple[nn.Module, str, str]] = {
    "transposed convolution": (Sequential(Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 2)), "1", "conv_transpose2d"),
    "interpolation": (Net(lambda net, x: F.interpolate(net.a(x), size=9), a=Conv2d(1, 2, 3)), "interpolate()", "not"),
    "permutation": (Net(lambda net, x: net.a(x.permute(0, 1, 3, 2)), a=Conv2d(1, 2, 3)), "permute()", "not followed"),
    "rearrangement": (Net(lambda net, x: x.reshape(-1, 1, 14, 56)), "reshape()", "rearranges"),
    "outside torch": (
        Net(lambda net, x: net.a(torch.from_numpy(x.detach().numpy())), a=Sequential(Conv2d(1, 2, 3))),
        *("a.0", "what comes in"),
    ),
    "mean over columns": (Net(lambda net, x: x.mean(3, keepdim=True)), "mean()", "both height and width"),
    "maps of different sizes": (
        Net(lambda net, x: torch.cat([x.flatten(1), net.a(x).flatten(1)], 1), a=Conv2d(1, 2, 3)),
        *("cat()", "different sizes"),
    ),
    "pooling without channels": (Net(lambda net, x: F.max_pool2d(x.squeeze(1), 2)), "max_pool2d()", "4-dimensional"),
    "indexing": (Net(lambda net, x: net.a(x)[:, :1], a=Conv2d(1, 2, 3)), "getitem()", "not followed"),
    "uneven adaptive pooling": (Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(5)), "1", "vary"),
    "circular padding": (Sequential(Conv2d(1, 2, 3, padding=1, padding_mode="circular")), "0", "pad()"),
    "no running statistics": (Sequential(nn.BatchNorm2d(1, track_running_stats=False), ReLU()), "0", "of a batch"),
    "softmax over pixels": (Sequential(nn.Softmax(3)), "0", "mixes"),
    "linear over columns": (Sequential(Linear(28, 5)), "0", "columns"),
    "side by side": (Net(lambda net, x: torch.cat([x, x * 2], 3)), "cat()", "side by side"),
    "different jumps": (
        Net(lambda net, x: net.a(x) + net.b(x), a=Conv2d(1, 2, 2, 2), b=Conv2d(1, 2, 15)),
        *("add()", "jumps 2 and 1"),
    ),
    "attention": (
        Net(
            lambda net, x: net.b(*[net.a(x).flatten(2).transpose(1, 2)] * 3)[0],
            a=Conv2d(1, 4, 7, 7),
            b=nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        *("transpose()", "not followed"),
    ),
    "recurrence": (Net(lambda net, x: net.a(x.squeeze(1))[0], a=nn.LSTM(28, 8, batch_first=True)), "a", "lstm"),
}


def last_fields(analysis: Analysis) -> dict[str, Axis]:
    return [field for layer in analysis.layers for field in layer.fields][-1]


@pytest.mark.parametrize(("model", "size", "expected"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_architectures(model: nn.Module, size: tuple[int, int], expected: tuple[int, int]) -> None:
    analysis = analyze(model, size, batch_size=3)
    assert analysis.problems() == []
    assert [layer.unknown for layer in analysis.layers] == [None] * len(analysis.layers)
    field = last_fields(analysis)
    assert (field["height"].r_out, field["width"].r_out) == expected
    assert sum(layer.buffers for layer in analysis.layers) == analysis.totals["buffers"]


@pytest.mark.parametrize(("model", "layer_name", "reason"), NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_what_cannot_be_followed_says_why(model: nn.Module, layer_name: str, reason: str) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    name, why = next((layer.name, layer.unknown) for layer in analysis.layers if layer.unknown)
    assert name == layer_name
    assert reason in why
    assert "ReLU" not in [layer.type for layer in analysis.layers if layer.unknown]  # it would change nothing


def test_model5_receptive_field_table() -> None:
    layers = analyze(build_model("Model5"), (28, 28), batch_size=2).layers
    expected = [Axis(*map(int, line.split())) for line in MODEL5_TABLE.splitlines()]
    assert [field for layer in layers for field in layer.fields] == [{"height": a, "width": a} for a in expected]


def test_geometry_on_both_axes() -> None:
    model = Sequential(
        Conv2d(1, 2, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.AvgPool2d(2),
        Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.AdaptiveMaxPool2d((3, 4)),
        nn.Flatten(),
        Linear(24, 10),
    )
    fields = [field for layer in analyze(model, (26, 32), batch_size=2).layers for field in layer.fields]
    assert [field["height"] for field in fields] == [
        Axis(3, 1, 1, 2, 26, 24, 1, 1, 1, 5, 0, 1),
        Axis(2, 2, 0, 1, 24, 12, 1, 2, 5, 6, 1, 1),
        Axis(3, 1, 2, 2, 12, 12, 2, 2, 6, 14, 1, 5),
        Axis(4, 4, 0, 1, 12, 3, 2, 8, 14, 20, 5, 5),
        Axis(3, 3, 0, 1, 3, 1, 8, 24, 20, 36, 5, 5),
    ]
    assert [field["width"] for field in fields] == [
        Axis(5, 2, 2, 1, 32, 16, 1, 2, 1, 5, 0, 2),
        Axis(2, 2, 0, 1, 16, 8, 2, 4, 5, 7, 2, 2),
        Axis(3, 1, 2, 2, 8, 8, 4, 4, 7, 23, 2, 10),
        Axis(2, 2, 0, 1, 8, 4, 4, 8, 23, 27, 10, 10),
        Axis(4, 4, 0, 1, 4, 1, 8, 32, 27, 51, 10, 10),
    ]


@pytest.mark.parametrize(("name", "total"), [("Model1", 14_620), ("Model2", 14_796), ("Model5", 8_018)])
def test_totals_agree_with_torchinfo(name: str, total: int) -> None:
    model = build_model(name)
    analysis = analyze(model, (28, 28), batch_size=64)
    theirs = torchinfo.summary(model, (1, 1, 28, 28), verbose=0)
    assert analysis.totals["parameters"] == theirs.total_params == total
    assert analysis.totals["macs"] == sum(layer.macs for layer in theirs.summary_list if layer.class_name == "Conv2d")
    assert (last_fields(analysis)["height"].r_out, last_fields(analysis)["width"].r_out) == (28, 28)


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


def forget_padding(view: analyze_model.View) -> analyze_model.View:
    return view._replace(axis=dataclasses.replace(view.axis, P_out=view.axis.P_in))


def forget_dilation(view: analyze_model.View) -> analyze_model.View:
    axis = view.axis
    return view._replace(axis=dataclasses.replace(axis, r_out=axis.r_in + (axis.k - 1) * axis.j_in))


def see_too_much(view: analyze_model.View) -> analyze_model.View:
    return view._replace(axis=dataclasses.replace(view.axis, r_out=view.axis.r_out + 1))


def forget_jump(view: analyze_model.View) -> analyze_model.View:
    return view._replace(axis=dataclasses.replace(view.axis, j_out=view.axis.s))


def forget_ceil_mode(view: analyze_model.View) -> analyze_model.View:
    n = view.axis.n_out - 1
    return view._replace(axis=dataclasses.replace(view.axis, n_out=n), seen=view.seen[:n])


def shift(view: analyze_model.View) -> analyze_model.View:
    return view._replace(seen=view.seen.roll(1, dims=1))


EVERYTHING = Sequential(
    Conv2d(1, 4, 3, padding=1, stride=2), Conv2d(4, 8, 3, dilation=2, groups=4), MaxPool2d(2, 2), Conv2d(8, 2, 3)
)


@pytest.mark.parametrize(
    ("mistake", "check", "layer"),
    [
        (forget_padding, "receptive field", "0"),
        (forget_dilation, "receptive field", "1"),
        (see_too_much, "receptive field", "0"),
        (forget_jump, "receptive field", "1"),
        (forget_ceil_mode, "shapes", "0"),
        (shift, "receptive field", "0"),
    ],
)
def test_a_mistake_in_a_recurrence_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable, check: str, layer: str
) -> None:
    right = analyze_model.slide
    assert analyze(EVERYTHING, (28, 28), batch_size=2).problems() == []
    monkeypatch.setattr(analyze_model, "slide", lambda *window, **names: mistake(right(*window, **names)))
    found = {check.name: check for check in analyze(EVERYTHING, (28, 28), batch_size=2).checks}
    assert found[check].passed is False
    assert f"wrong at {layer}" in found[check].finding


saved_tensors, describe = analyze_model.saved_tensors, analyze_model.Recorder.describe


def macs_without_groups(call: analyze_model.Call, batch_size: int) -> int:
    weight = list(analyze_model.tensors_in(call.args))[1:2]
    return sum(call.outputs[0].numel() // batch_size * call.args[0].shape[1] * w[0, 0].numel() for w in weight)


def saved_without_indices(nodes: list, visited: set) -> Iterator[Tensor]:
    return (tensor for tensor in saved_tensors(nodes, visited) if tensor.dtype != torch.int64)


def describe_without_bias(
    self: analyze_model.Recorder, name: str, module: nn.Module, depth: int
) -> analyze_model.Layer:
    layer = describe(self, name, module, depth)
    layer.parameters = layer.weight
    return layer


def test_a_mistake_in_a_window_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = analyze_model.slide
    monkeypatch.setattr(analyze_model, "slide", lambda view, k, s, p, d, n: right(view, k, s, 0, d, n))
    found = {check.name: check for check in analyze(EVERYTHING, (28, 28), batch_size=2).checks}
    assert found["receptive field"].finding == "wrong at 0, 1, 2, 3"


@pytest.mark.parametrize(
    ("name", "mistake", "check", "layer"),
    [
        ("count_macs", macs_without_groups, "MACs", "1"),
        ("saved_tensors", saved_without_indices, "kept for backward", "2"),
        ("Recorder.describe", describe_without_bias, "parameters", "the total"),
    ],
)
def test_a_mistake_in_another_number_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, name: str, mistake: Callable, check: str, layer: str
) -> None:
    if check == "MACs" and not analyze_model.FlopCounterMode:
        pytest.skip("torch has its FLOP counter since version 2.1")
    monkeypatch.setattr(f"analyze_model.{name}", mistake)
    found = {check.name: check for check in analyze(EVERYTHING, (28, 28), batch_size=2).checks}
    assert [name for name, check in found.items() if check.passed is False] == [check]
    assert found[check].finding == f"wrong at {layer}"


def test_a_failed_check_is_one_line_and_an_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(analyze_model, "saved_tensors", saved_without_indices)
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--device", "cpu"])
    with pytest.raises(ScriptError, match=r"^Model5: kept for backward: wrong at transition_block\.0$"):
        analyze_model.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "kept for backward FAILED wrong at transition_block.0" in lines


def test_forward_that_differs_in_evaluation_mode_fails() -> None:
    model = Net(lambda net, x: net.a(x) if net.training else net.a(x) * 2, a=Conv2d(1, 2, 3))
    assert "evaluation" in analyze(model, (28, 28), batch_size=2).problems()[0]


def test_forward_that_differs_from_time_to_time_fails() -> None:
    times = iter(range(9))
    model = Net(lambda net, x: net.a(x) * 2 if next(times) % 2 else net.a(x), a=Conv2d(1, 2, 3))
    assert "every time" in analyze(model, (28, 28), batch_size=2).problems()[0]


def test_what_cannot_be_trained_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Sequential(Conv2d(1, 2, 3), nn.Sigmoid(), ReLU(inplace=True))  # sigmoid needs what ReLU overwrites
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        analyze(model, (28, 28), batch_size=2)
    monkeypatch.setattr(analyze_model, "build_model", lambda name: model)
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--device", "cpu"])
    with pytest.raises(ScriptError, match=r"^Model5 cannot be analyzed: one of the variables needed"):
        analyze_model.main()


def test_operations_on_no_image_are_not_passed_over() -> None:
    if not analyze_model.FlopCounterMode:
        pytest.skip("torch has its FLOP counter since version 2.1")
    model = Net(lambda net, x: net.a(x) * (net.b.weight @ net.b.weight).mean(), a=Conv2d(1, 2, 3), b=Linear(5, 5))
    assert analyze(model, (28, 28), batch_size=2).problems() == ["MACs: wrong at functions of no image"]


def test_a_failure_that_has_nothing_to_do_with_the_size_does_not_blame_it() -> None:
    model = Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(2))
    analysis = analyze(model, (28, 28), batch_size=1)
    assert analysis.failure.startswith("2 fails on 1 images of 28x28: Expected more than 1 value")
    assert "smallest" not in analysis.failure


def test_without_checks_only_what_torch_counts_is_missing() -> None:
    model = Sequential(Conv2d(1, 2, 3), nn.ConvTranspose2d(2, 2, 2))
    analysis = analyze(model, (28, 28), batch_size=2, verify=False)
    assert analysis.checks == []
    assert [layer.macs for layer in analysis.layers] == [0, 2 * 26**2 * 9, None]
    assert analysis.totals["macs"] is None
    if analyze_model.FlopCounterMode:
        verified = analyze(model, (28, 28), batch_size=2)
        assert [layer.macs for layer in verified.layers] == [0, 2 * 26**2 * 9, 26**2 * 2 * 2 * 4]


def test_functions_get_lines_of_their_own() -> None:
    model = Net(classic, conv=Conv2d(1, 4, 3), linear=Linear(4, 10))
    layers = analyze(model, (28, 28), batch_size=2).layers
    names = ["conv", "relu()", "max_pool2d()", "adaptive_avg_pool2d()", "flatten()", "dropout()", "linear"]
    assert [layer.name for layer in layers] == ["Net", *names, "log_softmax()"]
    assert layers[3].kept == 2 * 4 * 13 * 13 * 8  # int64 indices; a mean does not keep its input


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


def test_report() -> None:
    result = run("analyze_model.py", "--model", "model1", "--batch-size", "3", "--device", "cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert max(map(len, result.stdout.splitlines())) <= 120
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
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


def test_json_holds_every_number_of_the_report() -> None:
    def numbers_in(value: object) -> set[float]:
        if isinstance(value, dict | list):
            return set().union(*map(numbers_in, value.values() if isinstance(value, dict) else value))
        if isinstance(value, str):  # a name, such as conv_block1.4
            return set(map(float, re.findall(r"\d+(?:\.\d+)?", value)))
        return {float(value)} if isinstance(value, int | float) else set()

    command = "analyze_model.py", "--model", "Model1", "Model5", "--batch-size", "5"
    text, result = run(*command), run(*command, "--json")
    assert (text.returncode, result.returncode, result.stderr) == (0, 0, "")
    analyses = json.loads(result.stdout)
    assert list(analyses) == ["Model1", "Model5"]
    known = numbers_in(analyses)
    known |= {round(number / 2**20, 2) for number in known}  # MiB
    shown = re.split(r"^Architecture\n(?:.+\n)+", text.stdout, flags=re.MULTILINE)
    tables = re.sub(r"(?<=\d)x(?=\d)", " ", "".join(shown).replace(",", ""))
    numbers = {float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?(?![\w.])", tables)}
    assert len(numbers) > 100
    assert numbers <= known


def test_all_models_end_in_a_comparison() -> None:
    result = run("analyze_model.py", "--model", "all", "--no-verify")
    assert result.returncode == 0, result.stderr
    comparison = result.stdout[result.stdout.index("Comparison") :].splitlines()
    assert comparison[2].split()[:5] == ["Model1", "skipped", "28x28", "14,620", "2,687,476"]
    assert [line.split()[0] for line in comparison[2:]] == ["Model1", "Model2", "Model5"]


def test_images_too_small_show_the_layers_so_far_and_the_smallest_size() -> None:
    result = run("analyze_model.py", "--input-size", "8", "30")
    assert_one_line(result, "conv_block2.0", "8x30", "16x16")
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert lines[-6].startswith("0 Conv2d failed 864")
    assert "Receptive fields" not in lines
    fits = run("analyze_model.py", "--input-size", "16", "16", "--no-verify")
    assert fits.returncode == 0, fits.stderr


def test_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "best.pth"
    model = build_model("Model2")
    accuracies = {"train_accuracy": 97.5, "test_accuracy": 98.25, "best_test_accuracy": 98.75}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    states = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    save_checkpoint(path, {"model_name": "Model2", "epoch": 7, **accuracies, **states})
    result = run("analyze_model.py", "--checkpoint", path, "--no-verify")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("Model2\n")
    for words in ("epoch 7", "train accuracy 97.50 %", "test accuracy 98.25 %", "best test accuracy 98.75 %"):
        assert words in result.stdout
    assert_one_line(run("analyze_model.py", "--checkpoint", path, "--model", "Model1"), str(path), "Model2", "--model")
    assert_one_line(run("analyze_model.py", "--checkpoint", tmp_path / "none.pth"), str(tmp_path / "none.pth"))
    save_checkpoint(path, {"model_name": "Model2", "epoch": 7, **states})
    assert_one_line(run("analyze_model.py", "--checkpoint", path), str(path), "train_accuracy")


def test_trained_weights_are_the_ones_analyzed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build_model("Model1")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    stored = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
    save_checkpoint(tmp_path / "a.pth", stored | {"model_name": "Model1"} | dict.fromkeys(RESULTS, 50))
    given = []
    monkeypatch.setattr(analyze_model, "analyze", lambda model, *_: given.append(model) or analyze(model, (28, 28), 1))
    monkeypatch.setattr(sys, "argv", ["analyze_model.py", "--checkpoint", str(tmp_path / "a.pth"), "--device", "cpu"])
    analyze_model.main()
    assert all(tensor.equal(stored["model_state_dict"][key]) for key, tensor in given[0].state_dict().items())


def red_box(picture: Image.Image, left: int, right: int) -> tuple[int, int, int, int]:
    part = picture.crop((left, 0, right, picture.height)).convert("RGB")
    red, green, _ = part.split()
    return ImageChops.subtract(red, green).getbbox()  # red alone: elsewhere all is grey


def test_image_shows_the_receptive_fields_of_the_centre(tmp_path: Path) -> None:
    path = tmp_path / "fields.png"
    result = run("analyze_model.py", "--image", path, "--no-verify", "--data-dir", tmp_path / "no data")
    assert result.returncode == 0, result.stderr
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        left, top, right, bottom = red_box(picture, 0, 16 + 224 + 8)
        assert (right - left, bottom - top) == (3 * 8, 3 * 8)  # input_block: 3x3 pixels, 8 times enlarged
        assert (left - 16, top - 16) == (13 * 8, 13 * 8)  # the centre of 26 units is unit 13
        left, top, right, bottom = red_box(picture, picture.width - 16 - 224 - 4, picture.width)
        assert (right - left, bottom - top) == (28 * 8, 28 * 8)
    assert_one_line(run("analyze_model.py", "--image", tmp_path / "no" / "a.png", "--no-verify"), "a.png")
    assert_one_line(run("analyze_model.py", "--image", path, "--model", "all"), str(path), "--model")


def test_image_of_a_padded_layer() -> None:
    analysis = analyze(Sequential(Conv2d(1, 2, 5, padding=2), ReLU()), (28, 28), batch_size=2)
    left, top, right, bottom = red_box(analyze_model.draw_receptive_fields(analysis, Image.new("L", (28, 28))), 0, 999)
    assert (left - 16, top - 16, right - left, bottom - top) == (12 * 8, 12 * 8, 5 * 8, 5 * 8)


def test_image_shows_a_real_digit_where_there_is_one(tiny_data: Path, tiny_files: dict[str, bytes]) -> None:
    digit = analyze_model.sample_digit(tiny_data)
    assert digit.tobytes() == tiny_files["t10k-images-idx3-ubyte"][16 : 16 + 28 * 28]
    assert analyze_model.sample_digit(tiny_data / "elsewhere").getbbox() is not None

"""Receptive fields of many small architectures: the right ones, and what cannot be followed."""

import dataclasses
import math
import random
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import Conv2d, Flatten, LayerNorm, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import StochasticDepth

import receptive_fields
from analyze_model import Analysis, analyze, format_field
from models import build_model
from receptive_fields import Axis
from replays import Call, tensors_in

torch.manual_seed(0)  # the weights of the architectures below


class Net(nn.Module):
    """A model whose forward is a function of the images and of its layers, named a, b, c, d."""

    def __init__(self, function: Callable, *layers: object) -> None:
        super().__init__()
        self.function = function
        self.names = "abcd"[: len(layers)]
        for name, layer in zip(self.names, layers, strict=True):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(x, *(getattr(self, name) for name in self.names))


def conv(inputs: int = 1, outputs: int = 2) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


def after_conv(function: Callable) -> Net:
    return Net(lambda x, a: function(a(x)), conv())


def before_conv(function: Callable, channels: int = 1) -> Net:
    return Net(lambda x, a: a(function(x)), conv(channels))


def between_convs(function: Callable, first: int = 2, last: int = 2) -> Net:
    """Return a function between two convolutions, which get `first` and give `last` channels."""
    return Net(lambda x, a, b: b(function(a(x))), conv(1, first), conv(last))


class KeepsOutputs(nn.Module):
    """Keeps a module of Python and results, which cannot be copied; its `train` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.math = math
        self.features = []
        self.a.register_forward_hook(lambda module, x, output: self.features.append(output))
        self(torch.zeros(1, 1, 28, 28))

    def train(self, mode: bool = True) -> None:
        pass

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.kept = [self.a(x)]
        return self.kept[0], self.kept[0] * self.math.pi


class Double(torch.autograd.Function):
    forward = backward = staticmethod(lambda context, x: 2 * x)


@dataclasses.dataclass
class Result:
    features: Tensor


def written_by_index(x: Tensor) -> Tensor:
    canvas = torch.zeros(len(x), 1, 30, 30)
    canvas[:, :, 1:-1, 1:-1] = x
    return canvas


def shifted_channels(features: Tensor) -> Tensor:
    features[:, 0] = features[:, 1]
    return features


def changed_through_a_view(features: Tensor) -> Tensor:
    features[:, :1].add_(features[:, 1:].mean((2, 3), True))
    return features


def check_no_nan(x: Tensor) -> Tensor:
    assert not torch.isnan(x).any()
    assert x.dtype == torch.float32
    return x


def of_patches(function: Callable, layer: nn.Module) -> Net:
    """Return a function of patches as tokens (N, tokens, channels), and of a layer."""
    return Net(
        lambda x, a, b: function(a(x).flatten(2).transpose(1, 2), b),
        Conv2d(1, 4, 7, 7),
        layer,
    )


NAMES = """
ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU CELU
GELU Sigmoid SiLU Mish Softplus Softshrink Softsign Tanh Tanhshrink Softmax2d
"""
ACTIVATIONS = [getattr(nn, name)() for name in NAMES.split()]
ACTIVATIONS += [nn.Softmin(1), nn.Softmax(1), nn.LogSoftmax(1), nn.Threshold(0.1, 20), nn.GLU(1)]
new_weight_norm = getattr(parametrizations, "weight_norm", weight_norm)  # since torch 2.1
ENCODER_LAYER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

# Functions that leave the receptive field of two 3x3 convolutions around them as it is, 5x5
NOTHING_CHANGES = {
    "arithmetic": lambda x: 1 / torch.square(1 - x.float() / 255),
    "padding": lambda x: F.pad(nn.ZeroPad2d((1, 0, 1, 2))(x), (0, 1, 2, 3)),
    "unflatten, expand": (
        lambda x: x[:, :1].flatten(2).unflatten(2, (28, 28)).expand(-1, 2, -1, -1)
    ),
    "where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0),
    "mask": lambda x: x * (x > 0),
    "chunk, split": lambda x: torch.cat([*x.chunk(2, 1)[1:], *x.split(1, 1)[:1]], 1),
    "unbind, stack": lambda x: torch.stack(x.unbind(1), 1),
    "NHWC": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2),
    "in place": lambda x: F.relu_(x.add_(1)),
    "in place, flattened": lambda x: F.relu_(x.flatten(2)).view(x.shape),
    "from part to part": shifted_channels,
    "custom autograd function": Double.apply,
    "integers": lambda x: (255 * x).long().float(),
}

# Small architectures by their receptive field; images are 28x28
FOLLOWED = {
    "2x2": {
        "pooling with indices": Net(lambda x, a: a(x)[0], MaxPool2d(2, return_indices=True)),
    },
    "3x3": {
        "padding past the kernel": Sequential(
            Conv2d(1, 2, 1, padding=1),
            Conv2d(2, 2, 3, padding="valid"),
        ),
        "depthwise": Sequential(
            Conv2d(1, 8, 1),
            Conv2d(8, 8, 3, groups=8),
            Conv2d(8, 4, 1),
        ),
        "activations": Sequential(conv(1, 4), *ACTIVATIONS),
        "written by index": before_conv(written_by_index),
        "max of two": Net(lambda x, a: torch.min(torch.max(a(x), x), x), conv(1, 1)),
        "dataclass": Net(
            lambda x, a, b: b(Result(a(x))),
            conv(),
            Net(lambda result: result.features.relu()),
        ),
        "embedding": Net(
            lambda x, a, b: b(a((255 * x[:, 0]).long()).movedim(3, 1)),
            nn.Embedding(256, 2),
            conv(2),
        ),
        "residual": Net(
            lambda x, a, b: F.relu(b(x) + a(x)),
            Conv2d(1, 2, 3, 2, 1),
            Conv2d(1, 2, 1, 2),
        ),
        "parameters": Net(
            lambda x, a, b, c: a(x * b(a.weight).sum()) * b(c),
            conv(),
            ReLU(),
            nn.Parameter(torch.rand(1, 2, 1, 1)),
        ),
        # No false alarm
        "tensors kept, several outputs": KeepsOutputs(),
        "first state": after_conv(lambda x: x + torch.zeros(len(x), 2, 28, 28)),
        "stochastic depth": Net(
            lambda x, a, b: x + b(a(x)),
            conv(),
            StochasticDepth(0.1, "row"),
        ),
        "assertions": before_conv(check_no_nan),
    },
    "5x3": {
        "crossed": Net(
            lambda x, a, b, c: a(x) + b(x) + c(x),
            conv(),
            Conv2d(1, 2, (1, 3), padding=(0, 1)),
            Conv2d(1, 2, (5, 1), padding=(2, 0)),
        ),
    },
    "5x5": {
        **{name: between_convs(function) for name, function in NOTHING_CHANGES.items()},
        "max over channels": between_convs(lambda x: torch.max(x, 1, keepdim=True)[0], last=1),
        "channel shuffle": between_convs(
            lambda x: x.view(-1, 2, 2, 28, 28).transpose(1, 2).reshape(-1, 4, 28, 28), 4, 4
        ),
        "einsum": between_convs(
            lambda x: torch.einsum("nchw,dc->ndhw", x, torch.ones(3, 2)),
            last=3,
        ),
        "ceil mode": Sequential(
            MaxPool2d(3, 2, ceil_mode=True),
            nn.AvgPool2d(2, 2, 1, ceil_mode=True),
        ),
        "local response norm": Sequential(
            conv(),
            nn.LocalResponseNorm(3),
            nn.BatchNorm2d(2),
            conv(2),
        ),
        "dropout": Sequential(
            conv(),
            nn.Dropout(),
            nn.Dropout2d(),
            nn.AlphaDropout(),
            nn.Identity(),
            conv(2),
        ),
        "parametrized": Sequential(
            new_weight_norm(conv()), parametrizations.spectral_norm(conv(2))
        ),
        "scripted": Sequential(torch.jit.script(Sequential(conv(), ReLU())), conv(2)),
        "growing list": Net(
            lambda x, a, b: b(torch.cat([x, a(torch.cat([x], 1))], 1)), conv(), conv(3)
        ),
    },
    "6x5": {
        "oblong": Sequential(
            Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
            MaxPool2d((2, 1)),
        ),
    },
    "6x6": {
        "pixel_unshuffle": before_conv(lambda x: F.pixel_unshuffle(x, 2), 4),
    },
    "4x7": {
        "adaptive pooling": Sequential(
            nn.AdaptiveMaxPool2d((14, None)),
            nn.AdaptiveAvgPool2d((7, 4)),
        ),
    },
    "7x7": {
        "shared": Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2),
        "conv2d by keywords": between_convs(
            lambda x: F.conv2d(weight=torch.ones(2, 2, 3, 3), input=x)
        ),
        "crop, strided slice": between_convs(lambda x: x[:, :, 2:-2, 1:][:, :, ::2, ::2]),
        "norms of weights": Sequential(
            weight_norm(conv()),
            spectral_norm(conv(2)),
            prune.identity(conv(2), "weight"),
        ),
        "tokens": of_patches(lambda x, layer: layer(x), LayerNorm(4)),
    },
    "8x7": {
        "same padding": Sequential(
            Conv2d(1, 2, 5, padding="same"),
            Conv2d(2, 2, (4, 3), padding="same"),
        ),
    },
    "11x11": {
        "dilation": Sequential(
            Conv2d(1, 2, 3, dilation=2),
            Conv2d(2, 2, 3, padding=3, dilation=3),
        ),
    },
    "15x15": {
        "stride": Sequential(Conv2d(1, 2, 3, 2), conv(2), Conv2d(2, 2, 5, 3, 2)),
        "max pooling": Sequential(MaxPool2d(3, 2, 1), conv(), MaxPool2d(3, 2, dilation=2)),
    },
    "27x27": {
        "linear": Sequential(Conv2d(1, 2, 3, 2), Flatten(), ReLU(), Linear(338, 9), Linear(9, 5)),
    },
    "28x28": {
        "global pooling": Sequential(
            Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), Flatten(), Linear(2, 9)
        ),
        "attention": of_patches(
            lambda x, layer: layer(x, x, x)[0],
            nn.MultiheadAttention(4, 2, batch_first=True),
        ),
        "transformer": of_patches(
            lambda x, layer: layer(x).mean(1),
            nn.TransformerEncoder(ENCODER_LAYER, 2),
        ),
    },
    # All of the image and the padding of the first convolution
    "30x30": {
        "gate by indexing with None": between_convs(lambda x: x * x.mean((2, 3))[:, :, None, None]),
        "squeeze and excite": between_convs(
            lambda x: x * (1 - F.adaptive_avg_pool2d(x, 1)).sigmoid()
        ),
        "mean of the flattened": Net(
            lambda x, a, b: b(a(x).flatten(2).mean(-1)), conv(), Linear(2, 9)
        ),
        "max over the map": after_conv(lambda x: x.flatten(2).max(2).values),
        "amin and amax, several outputs": Net(lambda x, a: (a(x).amin(3).amax(2), x), conv()),
        "layer norm": Sequential(conv(), LayerNorm([2, 28, 28]), conv(2)),
        "instance norm": between_convs(F.instance_norm),
        "group norm": Sequential(conv(), nn.GroupNorm(2, 2), MaxPool2d(2), conv(2)),
    },
    "42x42": {
        "padded window on a small map": Sequential(Conv2d(1, 2, 14, 14), conv(2)),
    },
    "86x86": {
        "mean in two steps": between_convs(lambda x: x.mean(2, True).mean(3, True)),
    },
}

# What cannot be followed, by a part of the reason
NOT_FOLLOWED = {
    "no window": {
        "transposed": after_conv(lambda x: x.permute(0, 3, 2, 1)),
        "flip": before_conv(lambda x: x.flip(3)),
        "reflection": Sequential(Conv2d(1, 2, 3, padding=1, padding_mode="reflect")),
        "interpolation": after_conv(lambda x: F.interpolate(x, size=20, mode="bilinear")),
        "transposed convolution": Sequential(conv(), nn.ConvTranspose2d(2, 2, 2, 2)),
        "pixel_shuffle": Sequential(conv(1, 4), nn.PixelShuffle(2)),
        "rows in time": Net(lambda x, a: a(x[:, 0])[0], nn.LSTM(28, 8, batch_first=True)),
        "rows, both ways": Net(
            lambda x, a: a(x[:, 0])[0],
            nn.GRU(28, 8, batch_first=True, bidirectional=True),
        ),
    },
    "folds the batch": {
        "patches": before_conv(lambda x: x.reshape(-1, 1, 14, 14)),
        "scalar": after_conv(lambda x: x.mean()),
    },
    "mixes the images": {
        "batch statistics": Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
        "rolled batch": before_conv(lambda x: x.roll(1, 0)),
    },
    "run to run": {
        "random crop": before_conv(lambda x: x[:, :, random.randint(0, 9) :]),
        "random crop by torch": before_conv(lambda x: x[:, :, torch.randint(9, ()) :]),
    },
    "side by side": {
        "two maps": Net(lambda x: torch.cat([x, 2 * x], 3)),
    },
    "jumps 1 and 2": {
        "jumps": Net(
            lambda x, a, b: a(x) + b(x),
            Conv2d(1, 2, 2, 2),
            Conv2d(1, 2, 15),
        ),
    },
    "through a view": {
        "added to a channel": between_convs(changed_through_a_view),
    },
    "no call": {
        "outside torch": before_conv(lambda x: torch.from_numpy(x.detach().numpy())),
    },
    "replay": {
        "qint8": before_conv(
            lambda x: torch.quantize_per_tensor(x, 1, 0, torch.qint8).dequantize()
        ),
    },
}


def analyze_digits(model: nn.Module, batch_size: int = 3) -> Analysis:
    return analyze(model, (28, 28), batch_size)


def axes_of(analysis: Analysis, direction: str) -> list[Axis]:
    return [field[direction] for layer in analysis.layers for field in layer.fields]


def last_field(analysis: Analysis) -> str:
    fields = [field for layer in analysis.layers for field in layer.fields]
    return format_field(fields[-1])


def assert_followed(analysis: Analysis, expected: str) -> None:
    assert analysis.problems() == []
    assert [layer.unknown for layer in analysis.layers if layer.unknown] == []
    assert last_field(analysis) == expected


def each_model(table: dict[str, dict]) -> pytest.MarkDecorator:
    """Give a test each model of a table, with what is expected of it."""
    rows = [
        pytest.param(key, model, id=name)
        for key, models in table.items()
        for name, model in models.items()
    ]
    return pytest.mark.parametrize(("expected", "model"), rows)


@each_model(FOLLOWED)
def test_followed(expected: str, model: nn.Module) -> None:
    analysis = analyze_digits(model)
    assert_followed(analysis, expected)
    output, *_ = tensors_in(model(torch.zeros(2, 1, 28, 28)))
    assert analysis.layers[0].output_shape == output.shape[1:]


def test_large_maps_are_sampled() -> None:
    model = Sequential(conv(), ReLU(), nn.AvgPool2d(2), nn.GroupNorm(1, 2))
    assert_followed(analyze(model, (150, 120), batch_size=2), "152x122")


@each_model(NOT_FOLLOWED)
def test_not_followed(expected: str, model: nn.Module) -> None:
    analysis = analyze_digits(model)
    assert analysis.problems() == []
    assert expected in next(layer.unknown for layer in analysis.layers if layer.unknown)


def test_the_table_of_the_readme() -> None:
    analysis = analyze_digits(build_model("Model5"))
    text = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\w+\.\d +\w+ +((?:\d+ +){12})\d+x\d+$", text, re.MULTILINE)
    axes = axes_of(analysis, "height")
    assert axes == [Axis(*map(int, row.split())) for row in rows]
    assert axes == axes_of(analysis, "width")


def test_both_axes() -> None:
    model = Sequential(
        Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
        nn.AvgPool2d(2),
        Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.AdaptiveMaxPool2d((3, 4)),
        Flatten(),
        Linear(24, 10),
    )
    # Those of Linear, in which what the others do adds up
    field = analyze(model, (26, 32), batch_size=2).layers[-1].fields[0]
    assert field["height"] == Axis(3, 3, 0, 1, 3, 1, 8, 24, 20, 36, 5, 5)
    assert field["width"] == Axis(4, 4, 0, 1, 4, 1, 8, 32, 27, 51, 10, 10)


def test_a_call_that_changes_one_axis_changes_nothing_in_the_other() -> None:
    model = Net(lambda x, a: F.pad(a(x), (2, 2)), Conv2d(1, 2, 5, 2))
    analysis = analyze_digits(model)
    assert axes_of(analysis, "height")[-1] == Axis(1, 1, 0, 1, 12, 12, 2, 2, 5, 5, 0, 0)
    assert axes_of(analysis, "width")[-1] == Axis(1, 1, 2, 1, 12, 16, 2, 2, 5, 5, 0, 4)


def test_what_comes_in_where_branches_meet_is_the_largest() -> None:
    model = Net(lambda x, a, b: a(x) + x + b(x), conv(1, 1), Conv2d(1, 1, 7, padding=3))
    axes = axes_of(analyze_digits(model), "height")
    sums = [(axis.r_in, axis.r_out, axis.P_in, axis.P_out) for axis in axes if axis.k is None]
    assert sums == [(3, 3, 1, 1), (7, 7, 3, 3)]


MISTAKES = {
    "padding": lambda axis: {"P_out": axis.P_in},
    "dilation": lambda axis: {"r_out": axis.r_in + (axis.k - 1) * axis.j_in},
    "one pixel more": lambda axis: {"r_out": axis.r_out + 1},
    "stride": lambda axis: {"j_out": axis.s},
    "another pixel": None,
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable | None
) -> None:
    model = Sequential(
        Conv2d(1, 2, 3, 2, 1),
        Conv2d(2, 2, 3, dilation=2),
        MaxPool2d(2, 2),
        conv(2),
    )
    assert analyze_digits(model).problems() == []
    right = receptive_fields.apply_window

    def wrong(*args: object) -> receptive_fields.View:
        view = right(*args)
        if mistake:
            return view._replace(axis=dataclasses.replace(view.axis, **mistake(view.axis)))
        return view._replace(seen=view.seen.roll(1, 1))

    monkeypatch.setattr(receptive_fields, "apply_window", wrong)
    assert analyze_digits(model).problems()[0].startswith("receptive field: wrong at ")


def test_a_declared_window_that_a_replay_does_not_show_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Call, "declared_windows", lambda call: [(4, 1, 1, 1)] * 2)
    analysis = analyze_digits(Sequential(Sequential(conv())))
    assert analysis.problems() == ["windows: wrong at 0.0"]

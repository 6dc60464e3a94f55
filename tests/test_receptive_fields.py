"""Receptive fields of many small architectures: what each should have, and what cannot be followed."""

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
from torch.nn import Conv2d, Flatten, GroupNorm, LayerNorm, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import StochasticDepth

import receptive_fields
from analyze_model import Analysis, analyze
from models import build_model
from receptive_fields import Axis
from replays import Call, tensors_in

torch.manual_seed(0)  # the weights of the architectures below


class Net(nn.Module):
    """A model of the given layers, whose forward is a function of itself and the images."""

    def __init__(
        self, run_forward: Callable[[nn.Module, Tensor], object], **layers: object
    ) -> None:
        super().__init__()
        self.run_forward = run_forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.run_forward(self, x)


def conv(inputs: int = 1, outputs: int = 2) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


def between(function: Callable[[Tensor], Tensor], channels: int = 2, after: int = 2) -> nn.Module:
    """A function between two padded 3x3 convolutions: the receptive field is 5x5 if it changes nothing."""
    return Net(lambda net, x: net.b(function(net.a(x))), a=conv(1, channels), b=conv(after))


Result = dataclasses.make_dataclass("Result", ["features"])
DOUBLING = {
    "forward": staticmethod(lambda context, x: 2 * x),
    "backward": staticmethod(lambda context, g: 2 * g),
}
Double = type("Double", (torch.autograd.Function,), DOUBLING)


def growing_list(net: nn.Module, x: Tensor) -> Tensor:
    features = [x]
    for layer in (net.a, net.b):
        features.append(layer(torch.cat(features, 1)))
    return features[-1]


def written_by_index(net: nn.Module, x: Tensor) -> Tensor:
    canvas = torch.zeros(len(x), 1, 30, 30)
    canvas[:, :, 1:-1, 1:-1] = x
    return net.a(canvas)


def shifted_channels(net: nn.Module, x: Tensor) -> Tensor:
    features = net.a(x)
    features[:, 0] = features[:, 1]
    return net.b(features)


def changed_through_a_view(net: nn.Module, x: Tensor) -> Tensor:
    features = net.a(x)
    features[:, :1].add_(net.c(x))
    return net.b(features)


def patches(net: nn.Module, x: Tensor) -> Tensor:
    return net.a(x).flatten(2).transpose(1, 2)  # (N, tokens, channels)


def keep_outputs(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    net.kept = [net.a(x)]
    return net.kept[0], net.kept[0] * net.math.pi


KEEPING = Net(keep_outputs, a=conv(), features=[], math=math)
KEEPING.a.register_forward_hook(lambda module, inputs, output: KEEPING.features.append(output))
KEEPING(torch.zeros(1, 1, 28, 28))
KEEPING.train = lambda mode=True: None  # returns nothing


def check_no_nan(net: nn.Module, x: Tensor) -> Tensor:
    assert not torch.isnan(x).any()
    assert x.dtype == torch.float32
    return net.a(x)


NAMES = """ELU Hardshrink Hardsigmoid Hardtanh Hardswish LeakyReLU LogSigmoid PReLU ReLU ReLU6 RReLU SELU CELU GELU
Sigmoid SiLU Mish Softplus Softshrink Softsign Tanh Tanhshrink Softmin Softmax Softmax2d LogSoftmax"""
ACTIVATIONS = [
    getattr(nn, name)(*[1] * (name in ("Softmin", "Softmax", "LogSoftmax")))
    for name in NAMES.split()
]
ATTENTION = {"a": Conv2d(1, 4, 7, 7), "b": nn.MultiheadAttention(4, 2, batch_first=True)}
CROSS = {
    "a": conv(),
    "b": Conv2d(1, 2, (1, 3), padding=(0, 1)),
    "c": Conv2d(1, 2, (5, 1), padding=(2, 0)),
}
WEIGHTED = {"a": conv(), "b": ReLU(), "w": nn.Parameter(torch.rand(1, 2, 1, 1))}
EMBEDDING = {"a": nn.Embedding(256, 2), "b": conv(2)}
new_weight_norm = getattr(parametrizations, "weight_norm", weight_norm)  # since torch 2.1
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

# Each architecture and the receptive field after its last line, (height, width) if they differ; images are 28x28
FOLLOWED: dict[str, tuple[nn.Module, int | tuple[int, int]]] = {
    "stride": (Sequential(Conv2d(1, 2, 3, 2), conv(2), Conv2d(2, 2, 5, 3, 2)), 15),
    "dilation": (
        Sequential(Conv2d(1, 2, 3, dilation=2), Conv2d(2, 2, 3, padding=3, dilation=3)),
        11,
    ),
    "same padding": (
        Sequential(Conv2d(1, 2, 5, padding="same"), Conv2d(2, 2, (4, 3), padding="same")),
        (8, 7),
    ),
    "padding past the kernel": (
        Sequential(Conv2d(1, 2, 1, padding=1), Conv2d(2, 2, 3, padding="valid")),
        3,
    ),
    "oblong": (Sequential(Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)), MaxPool2d((2, 1))), (6, 5)),
    "depthwise": (Sequential(Conv2d(1, 8, 1), Conv2d(8, 8, 3, groups=8), Conv2d(8, 4, 1)), 3),
    "max pooling": (Sequential(MaxPool2d(3, 2, 1), conv(), MaxPool2d(3, 2, dilation=2)), 15),
    "ceil mode": (
        Sequential(MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 2, 1, ceil_mode=True)),
        5,
    ),
    "pooling with indices": (
        Net(lambda net, x: net.a(x)[0], a=MaxPool2d(2, return_indices=True)),
        2,
    ),
    "adaptive pooling": (
        Sequential(nn.AdaptiveMaxPool2d((14, None)), nn.AdaptiveAvgPool2d((7, 4))),
        (4, 7),
    ),
    "global pooling": (
        Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), Flatten(), Linear(2, 9)),
        28,
    ),
    "linear": (Sequential(Conv2d(1, 2, 3, 2), Flatten(), ReLU(), Linear(338, 9), Linear(9, 5)), 27),
    "padded window on a small map": (Sequential(Conv2d(1, 2, 14, 14), conv(2)), 42),
    "conv2d by keywords": (between(lambda x: F.conv2d(weight=torch.ones(2, 2, 3, 3), input=x)), 7),
    # Arithmetic, slices and shapes
    "arithmetic": (between(lambda x: 1 / torch.square(1 - x.float() / 255)), 5),
    "crop, strided slice": (between(lambda x: x[:, :, 2:-2, 1:][:, :, ::2, ::2]), 7),
    "padding": (between(lambda x: F.pad(nn.ZeroPad2d((1, 0, 1, 2))(x), (0, 1, 2, 3))), 5),
    "gate by indexing with None": (between(lambda x: x * x.mean((2, 3))[:, :, None, None]), 30),
    "unflatten, expand": (
        between(lambda x: x[:, :1].flatten(2).unflatten(2, (28, 28)).expand(-1, 2, -1, -1)),
        5,
    ),
    "where": (between(lambda x: torch.where(x > 0, x, torch.zeros(()))), 5),
    "masked_fill": (between(lambda x: x.masked_fill(x < 0, 0), 1, 1), 5),
    "mask": (between(lambda x: x * (x > 0)), 5),
    "tensors kept, several outputs": (KEEPING, 3),
    "max of two": (Net(lambda net, x: torch.min(torch.max(net.a(x), x), x), a=conv(1, 1)), 3),
    "max over channels": (between(lambda x: torch.max(x, 1, keepdim=True)[0], 2, 1), 5),
    "max over the map": (Net(lambda net, x: net.a(x).flatten(2).max(2).values, a=conv()), 30),
    "amax, several outputs": (Net(lambda net, x: (net.a(x).amax((2, 3)), x), a=conv()), 30),
    "amin and sum": (Net(lambda net, x: net.a(x).amin(3).sum(-1), a=conv()), 30),
    "mean in two steps": (
        Net(lambda net, x: net.b(net.a(x).mean(2, True).mean(3, True)), a=conv(), b=conv(2)),
        86,
    ),
    "mean of the flattened": (
        Net(lambda net, x: net.b(net.a(x).flatten(2).mean(-1)), a=conv(), b=Linear(2, 9)),
        30,
    ),
    "pixel_unshuffle": (Net(lambda net, x: net.a(F.pixel_unshuffle(x, 2)), a=conv(4)), 6),
    "chunk, split": (between(lambda x: torch.cat([*x.chunk(2, 1)[1:], *x.split(1, 1)[:1]], 1)), 5),
    "unbind, stack": (between(lambda x: torch.stack(x.unbind(1), 1)), 5),
    "channel shuffle": (
        between(lambda x: x.view(-1, 2, 2, 28, 28).transpose(1, 2).reshape(-1, 4, 28, 28), 4, 4),
        5,
    ),
    "einsum": (between(lambda x: torch.einsum("nchw,dc->ndhw", x, torch.ones(3, 2)), 2, 3), 5),
    "NHWC": (between(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2)), 5),
    "in place": (between(lambda x: F.relu_(x.add_(1))), 5),
    "written by index": (Net(written_by_index, a=Conv2d(1, 2, 3)), 3),
    "from part to part": (Net(shifted_channels, a=conv(), b=conv(2)), 5),
    "in place, flattened": (between(lambda x: F.relu_(x.flatten(2)).view(x.shape)), 5),
    "activations": (Sequential(conv(1, 4), *ACTIVATIONS, nn.Threshold(0.1, 20), nn.GLU(1)), 3),
    "layer norm": (Sequential(conv(), LayerNorm([2, 28, 28]), conv(2)), 30),
    "instance norm": (Sequential(conv(), nn.InstanceNorm2d(2), conv(2)), 30),
    "group norm": (Sequential(conv(), GroupNorm(2, 2), MaxPool2d(2), conv(2)), 30),
    "local response norm": (
        Sequential(conv(), nn.LocalResponseNorm(3), nn.BatchNorm2d(2), conv(2)),
        5,
    ),
    "dropout": (
        Sequential(conv(), nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.Identity(), conv(2)),
        5,
    ),
    "norms of weights": (
        Sequential(weight_norm(conv()), spectral_norm(conv(2)), prune.identity(conv(2), "weight")),
        7,
    ),
    "parametrized": (
        Sequential(new_weight_norm(conv()), parametrizations.spectral_norm(conv(2))),
        5,
    ),
    "scripted": (Sequential(torch.jit.script(Sequential(conv(), ReLU())), conv(2)), 5),
    "custom autograd function": (between(Double.apply), 5),
    "dataclass": (
        Net(
            lambda net, x: net.b(Result(net.a(x))), a=conv(), b=Net(lambda _, r: r.features.relu())
        ),
        3,
    ),
    "tokens": (Net(lambda net, x: net.b(patches(net, x)), a=Conv2d(1, 4, 7, 7), b=LayerNorm(4)), 7),
    "attention": (Net(lambda net, x: net.b(*[patches(net, x)] * 3)[0], **ATTENTION), 28),
    "transformer": (
        Net(lambda net, x: net.b(patches(net, x)).mean(1), a=Conv2d(1, 4, 7, 7), b=ENCODER),
        28,
    ),
    "embedding": (
        Net(lambda net, x: net.b(net.a((255 * x[:, 0]).long()).movedim(3, 1)), **EMBEDDING),
        3,
    ),
    "residual": (
        Net(
            lambda net, x: F.relu(net.b(x) + net.a(x)),
            a=Conv2d(1, 2, 3, 2, 1),
            b=Conv2d(1, 2, 1, 2),
        ),
        3,
    ),
    "crossed": (Net(lambda net, x: net.a(x) + net.b(x) + net.c(x), **CROSS), (5, 3)),
    "squeeze and excite": (between(lambda x: x * (1 - F.adaptive_avg_pool2d(x, 1)).sigmoid()), 30),
    "growing list": (Net(growing_list, a=conv(), b=conv(3)), 5),
    "parameters": (
        Net(lambda net, x: net.a(x * net.b(net.a.weight).sum()) * net.b(net.w), **WEIGHTED),
        3,
    ),
    # No false alarm
    "first state": (Net(lambda net, x: net.a(x) + torch.zeros(len(x), 2, 28, 28), a=conv()), 3),
    "stochastic depth": (
        Net(lambda net, x: x + net.b(net.a(x)), a=conv(), b=StochasticDepth(0.1, "row")),
        3,
    ),
    "assertions": (Net(check_no_nan, a=conv()), 3),
    "integers": (between(lambda x: (255 * x).long().float()), 5),
    "shared": (Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2), 7),
}
# What cannot be followed, and a part of the reason
NOT_FOLLOWED: dict[str, tuple[nn.Module, str]] = {
    "transposed": (Net(lambda net, x: net.a(x).permute(0, 3, 2, 1), a=conv(1, 3)), "no window"),
    "flip": (Net(lambda net, x: net.a(x.flip(3)), a=conv()), "no window"),
    "reflection": (Sequential(Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "no window"),
    "interpolation": (
        Net(lambda net, x: F.interpolate(net.a(x), size=20, mode="bilinear"), a=conv()),
        "no window",
    ),
    "transposed convolution": (Sequential(conv(), nn.ConvTranspose2d(2, 2, 2, 2)), "no window"),
    "pixel_shuffle": (Sequential(conv(1, 4), nn.PixelShuffle(2)), "no window"),
    "rows in time": (
        Net(lambda net, x: net.a(x[:, 0])[0], a=nn.LSTM(28, 8, batch_first=True)),
        "no window",
    ),
    "rows, both ways": (
        Net(lambda net, x: net.a(x[:, 0])[0], a=nn.GRU(28, 8, 1, True, True, 0, True)),
        "no window",
    ),
    "patches": (Net(lambda net, x: net.a(x.reshape(-1, 1, 14, 14)), a=conv()), "folds the batch"),
    "batch statistics": (
        Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
        "mixes the images",
    ),
    "rolled batch": (Net(lambda net, x: net.a(x.roll(1, 0)), a=conv()), "mixes the images"),
    "random crop": (
        Net(lambda net, x: net.a(x[:, :, random.randint(0, 9) :]), a=conv()),
        "run to run",
    ),
    "random crop by torch": (
        Net(lambda net, x: net.a(x[:, :, torch.randint(9, ()) :]), a=conv()),
        "run to run",
    ),
    "scalar": (Net(lambda net, x: net.a(x).mean(), a=conv()), "folds the batch"),
    "side by side": (Net(lambda net, x: torch.cat([x, 2 * x], 3)), "side by side"),
    "jumps": (
        Net(lambda net, x: net.a(x) + net.b(x), a=Conv2d(1, 2, 2, 2), b=Conv2d(1, 2, 15)),
        "jumps 1 and 2",
    ),
    "through a view": (
        Net(changed_through_a_view, a=conv(), b=conv(2), c=Conv2d(1, 1, 5, 1, 2)),
        "through a view",
    ),
    "outside torch": (
        Net(lambda net, x: net.a(torch.from_numpy(x.detach().numpy())), a=conv()),
        "no call",
    ),
    "qint8": (
        Net(
            lambda n, x: n.a(torch.quantize_per_tensor(x, 1, 0, torch.qint8).dequantize()), a=conv()
        ),
        "replay",
    ),
}


def axes_of(analysis: Analysis, direction: str) -> list[Axis]:
    return [field[direction] for layer in analysis.layers for field in layer.fields]


def last_field(analysis: Analysis) -> tuple[int, int]:
    return axes_of(analysis, "height")[-1].r_out, axes_of(analysis, "width")[-1].r_out


@pytest.mark.parametrize(("model", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_followed(model: nn.Module, expected: int | tuple[int, int]) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    assert {layer.name: layer.unknown for layer in analysis.layers if layer.unknown} == {}
    assert last_field(analysis) == (
        expected if isinstance(expected, tuple) else (expected, expected)
    )
    assert (
        analysis.layers[0].output_shape == tensors_in(model(torch.zeros(2, 1, 28, 28)))[0].shape[1:]
    )


@pytest.mark.parametrize(("model", "reason"), NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_not_followed(model: nn.Module, reason: str) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    assert reason in next(layer.unknown for layer in analysis.layers if layer.unknown)


def test_the_table_of_the_readme() -> None:
    analysis = analyze(build_model("Model5"), (28, 28), batch_size=2)
    rows = re.findall(
        r"^\w+\.\d +\w+ +((?:\d+ +){12})\d+x\d+$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    assert axes_of(analysis, "height") == [Axis(*map(int, row.split())) for row in rows]
    assert axes_of(analysis, "height") == axes_of(analysis, "width")


def test_both_axes() -> None:
    model = Sequential(
        *(
            Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
            nn.AvgPool2d(2),
            Conv2d(2, 2, 3, padding="same", dilation=2),
        ),
        *(nn.AdaptiveMaxPool2d((3, 4)), Flatten(), Linear(24, 10)),
    )
    fields = (
        analyze(model, (26, 32), batch_size=2).layers[-1].fields
    )  # of Linear; what the others do adds up in it
    assert fields[0]["height"] == Axis(3, 3, 0, 1, 3, 1, 8, 24, 20, 36, 5, 5)
    assert fields[0]["width"] == Axis(4, 4, 0, 1, 4, 1, 8, 32, 27, 51, 10, 10)


def test_a_call_that_changes_one_axis_changes_nothing_in_the_other() -> None:
    analysis = analyze(
        Net(lambda net, x: F.pad(net.a(x), (2, 2)), a=Conv2d(1, 2, 5, 2)), (28, 28), batch_size=2
    )
    assert axes_of(analysis, "height")[-1] == Axis(1, 1, 0, 1, 12, 12, 2, 2, 5, 5, 0, 0)
    assert axes_of(analysis, "width")[-1] == Axis(1, 1, 2, 1, 12, 16, 2, 2, 5, 5, 0, 4)


def test_what_comes_in_where_branches_meet_is_the_largest() -> None:
    model = Net(lambda net, x: net.a(x) + x + net.b(x), a=conv(1, 1), b=Conv2d(1, 1, 7, padding=3))
    axes = [axis for axis in axes_of(analyze(model, (28, 28), 2), "height") if axis.k is None]
    assert [(axis.r_in, axis.r_out, axis.P_in, axis.P_out) for axis in axes] == [
        (3, 3, 1, 1),
        (7, 7, 3, 3),
    ]


def test_large_maps_are_sampled() -> None:
    analysis = analyze(
        Sequential(conv(), ReLU(), nn.AvgPool2d(2), GroupNorm(1, 2)), (150, 120), batch_size=2
    )
    assert analysis.problems() == []
    assert [layer.unknown for layer in analysis.layers] == [None] * 5
    assert last_field(analysis) == (150 + 2, 120 + 2)


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
    model = Sequential(Conv2d(1, 2, 3, 2, 1), Conv2d(2, 2, 3, dilation=2), MaxPool2d(2, 2), conv(2))
    assert analyze(model, (28, 28), 2).problems() == []
    right = receptive_fields.slide

    def wrong(*args: object) -> receptive_fields.View:
        axis, seen = right(*args)
        axis, seen = (
            (dataclasses.replace(axis, **mistake(axis)), seen)
            if mistake
            else (axis, seen.roll(1, 1))
        )
        return receptive_fields.View(axis, seen)

    monkeypatch.setattr(receptive_fields, "slide", wrong)
    assert analyze(model, (28, 28), 2).problems()[0].startswith("receptive field: wrong at ")


def test_a_declared_window_that_a_replay_does_not_show_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Call, "declared_windows", lambda call: [(4, 1, 1, 1)] * 2)
    assert analyze(Sequential(Sequential(conv())), (28, 28), 2).problems() == [
        "windows: wrong at 0.0"
    ]

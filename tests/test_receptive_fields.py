"""Receptive fields of many small architectures: what each should have, and what cannot be followed."""

import dataclasses
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import Conv2d, Flatten, GroupNorm, LayerNorm, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import receptive_fields
from analyze_model import Analysis, analyze
from models import build_model
from receptive_fields import Axis

torch.manual_seed(0)  # the weights of the architectures below

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
    """A model of the given layers, whose forward is a function of itself and the images."""

    def __init__(self, run_forward: Callable[[nn.Module, Tensor], object], **layers: object) -> None:
        super().__init__()
        self.run_forward = run_forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.run_forward(self, x)


def conv(inputs: int = 1, outputs: int = 2) -> Conv2d:
    """A padded 3x3 convolution."""
    return Conv2d(inputs, outputs, 3, padding=1)


def between(function: Callable[[Tensor], Tensor], channels: int = 2, after: int = 2) -> nn.Module:
    """A function between two padded 3x3 convolutions: the receptive field is 5x5 if it changes nothing."""
    return Net(lambda net, x: net.b(function(net.a(x))), a=conv(1, channels), b=conv(after))


@dataclasses.dataclass
class Result:
    """What a module may return in place of a tensor."""

    features: Tensor


class Cube(torch.autograd.Function):
    """A custom autograd function."""

    @staticmethod
    def forward(context: object, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return 3 * context.saved_tensors[0] ** 2 * gradient


class Residual(nn.Module):
    """A block to be scripted."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.a(x))


def squeeze_and_excite(net: nn.Module, x: Tensor) -> Tensor:
    x = net.a(x)
    return net.c(x * torch.sigmoid(net.b(F.adaptive_avg_pool2d(x, 1))))


def growing_list(net: nn.Module, x: Tensor) -> Tensor:
    features = [x]
    for layer in (net.a, net.b):
        features.append(layer(torch.cat(features, 1)))
    return features[-1]


def written_by_index(net: nn.Module, x: Tensor) -> Tensor:
    canvas = torch.zeros(len(x), 1, 30, 30)
    canvas[:, :, 1:-1, 1:-1] = x
    return net.a(canvas)


def shuffle_channels(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def patches(net: nn.Module, x: Tensor) -> Tensor:
    return net.a(x).flatten(2).transpose(1, 2)  # (N, tokens, channels)


def random_crop(net: nn.Module, x: Tensor) -> Tensor:
    top = random.randint(0, 15)
    return net.a(x[:, :, top : top + 12])


def random_crop_by_torch(net: nn.Module, x: Tensor) -> Tensor:
    top = int(torch.randint(0, 16, ()))
    return net.a(x[:, :, top : top + 12])


def check_no_nan(net: nn.Module, x: Tensor) -> Tensor:
    assert not torch.isnan(x).any()
    assert x.dtype == torch.float32
    return net.a(x)


def stochastic_depth(net: nn.Module, x: Tensor) -> Tensor:
    branch = net.a(x)
    if net.training:
        branch = branch * torch.bernoulli(torch.full((len(x), 1, 1, 1), 0.9)) / 0.9
    return x + branch


def in_place(net: nn.Module, x: Tensor) -> Tensor:
    y = net.a(x)
    y += x
    return F.relu_(y) * 2 + 1


ACTIVATIONS = [
    *(nn.ELU(), nn.Hardshrink(), nn.Hardsigmoid(), nn.Hardtanh(), nn.Hardswish(), nn.LeakyReLU(), nn.LogSigmoid()),
    *(nn.PReLU(), nn.ReLU(), nn.ReLU6(), nn.RReLU(), nn.SELU(), nn.CELU(), nn.GELU(), nn.Sigmoid(), nn.SiLU()),
    *(nn.Mish(), nn.Softplus(), nn.Softshrink(), nn.Softsign(), nn.Tanh(), nn.Tanhshrink(), nn.Threshold(0.1, 20)),
    *(nn.Softmin(1), nn.Softmax(1), nn.Softmax2d(), nn.LogSoftmax(1)),
]
ATTENTION = {"a": Conv2d(1, 4, 7, 7), "b": nn.MultiheadAttention(4, 2, batch_first=True)}
ENCODER = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2)

# Each architecture and the receptive field after its last line, (height, width) if they differ; images are 28x28
FOLLOWED: dict[str, tuple[nn.Module, int | tuple[int, int]]] = {
    # Windows
    "stride": (Sequential(Conv2d(1, 2, 3, 2), conv(2), Conv2d(2, 2, 5, 3, 2)), 15),
    "dilation": (Sequential(Conv2d(1, 2, 3, dilation=2), Conv2d(2, 2, 3, padding=3, dilation=3)), 11),
    "same padding": (Sequential(Conv2d(1, 2, 5, padding="same"), Conv2d(2, 2, (4, 3), padding="same")), (8, 7)),
    "valid padding": (Sequential(Conv2d(1, 2, 5, padding="valid")), 5),
    "padding past the kernel": (Sequential(Conv2d(1, 2, 1, padding=1), Conv2d(2, 2, 3)), 3),
    "oblong": (Sequential(Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)), MaxPool2d((2, 1))), (6, 5)),
    "depthwise": (Sequential(Conv2d(1, 8, 1), Conv2d(8, 8, 3, groups=8), Conv2d(8, 4, 1)), 3),
    "max pooling": (Sequential(MaxPool2d(3, 2, 1), conv(), MaxPool2d(2)), 9),
    "max pooling, dilated": (Sequential(MaxPool2d(3, 2, dilation=2), Conv2d(1, 2, 3)), 9),
    "ceil mode": (Sequential(MaxPool2d(3, 2, ceil_mode=True), nn.AvgPool2d(2, 2, 1, ceil_mode=True)), 5),
    "pooling with indices": (Net(lambda net, x: net.a(x)[0], a=MaxPool2d(2, return_indices=True)), 2),
    "adaptive pooling": (Sequential(nn.AdaptiveMaxPool2d((14, None)), nn.AdaptiveAvgPool2d((7, 4))), (4, 7)),
    "global pooling": (Sequential(Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), Flatten(), Linear(2, 9)), 28),
    "linear": (Sequential(Conv2d(1, 2, 3, 2), Flatten(), ReLU(), Linear(338, 9), Linear(9, 5)), 27),
    "padded window on a small map": (Sequential(Conv2d(1, 2, 14, 14), conv(2)), 42),
    "conv2d by keywords": (
        Net(lambda net, x: F.conv2d(weight=net.w, input=x), w=nn.Parameter(torch.rand(2, 1, 3, 3))),
        3,
    ),
    # Arithmetic, slices and shapes
    "1 - x": (between(lambda x: 1 - x), 5),
    "1 / x": (between(lambda x: 1 / x), 5),
    "square": (between(torch.square), 5),
    "crop": (between(lambda x: x[:, :, 2:-2, 1:]), 5),
    "strided slice": (between(lambda x: x[:, :, ::2, ::2]), 7),
    "F.pad": (between(lambda x: F.pad(x, (0, 1, 2, 3))), 5),
    "ZeroPad2d": (Sequential(nn.ZeroPad2d((1, 0, 1, 2)), Conv2d(1, 2, 3)), 3),
    "expand": (between(lambda x: x[:, :1].expand(-1, 3, -1, -1), after=3), 5),
    "gate by indexing with None": (between(lambda x: x * x.mean((2, 3))[:, :, None, None]), 30),
    "unflatten": (between(lambda x: x.flatten(2).unflatten(2, (28, 28))), 5),
    "where": (between(lambda x: torch.where(x > 0, x, torch.zeros(()))), 5),
    "masked_fill": (between(lambda x: x.masked_fill(x < 0, 0), 1, 1), 5),
    "mask": (between(lambda x: x * (x > 0)), 5),
    "max of two": (Net(lambda net, x: torch.min(torch.max(net.a(x), x), x), a=conv(1, 1)), 3),
    "max over channels": (between(lambda x: torch.max(x, 1, keepdim=True)[0], 2, 1), 5),
    "max over the map": (Net(lambda net, x: net.a(x).flatten(2).max(2).values, a=conv()), 30),
    "amax": (Net(lambda net, x: net.a(x).amax((2, 3)), a=conv()), 30),
    "amin in two steps": (Net(lambda net, x: net.a(x).amin(3).amin(2), a=conv()), 30),
    "sum in two steps": (Net(lambda net, x: net.a(x).sum(2).sum(-1), a=conv()), 30),
    "mean in two steps": (Net(lambda net, x: net.b(net.a(x).mean(2, True).mean(3, True)), a=conv(), b=conv(2)), 86),
    "mean of the flattened": (Net(lambda net, x: net.b(net.a(x).flatten(2).mean(-1)), a=conv(), b=Linear(2, 9)), 30),
    "pixel_unshuffle": (Net(lambda net, x: net.a(F.pixel_unshuffle(x, 2)), a=conv(4)), 6),
    "chunk": (between(lambda x: torch.cat(x.chunk(2, 1), 1)), 5),
    "split": (between(lambda x: x.split(1, 1)[0] * x.split(1, 1)[1], 2, 1), 5),
    "unbind": (between(lambda x: torch.stack(x.unbind(1), 1)), 5),
    "channel shuffle": (between(shuffle_channels, 4, 4), 5),
    "einsum": (between(lambda x: torch.einsum("nchw,dc->ndhw", x, torch.rand(3, 2)), 2, 3), 5),
    "NHWC": (between(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2)), 5),
    "in place": (Net(in_place, a=conv(1, 1)), 3),
    "written by index": (Net(written_by_index, a=Conv2d(1, 2, 3)), 3),
    # Layers
    "activations": (Sequential(conv(1, 4), *ACTIVATIONS, nn.GLU(1)), 3),
    "layer norm": (Sequential(conv(), LayerNorm([2, 28, 28]), conv(2)), 30),
    "instance norm": (Sequential(conv(), nn.InstanceNorm2d(2), conv(2)), 30),
    "group norm": (Sequential(conv(), GroupNorm(2, 2), MaxPool2d(2), conv(2)), 30),
    "local response norm": (Sequential(conv(), nn.LocalResponseNorm(3), nn.BatchNorm2d(2), conv(2)), 5),
    "dropout": (Sequential(conv(), nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.Identity(), conv(2)), 5),
    "norms of weights": (Sequential(weight_norm(conv()), spectral_norm(conv(2)), prune.identity(conv(2), "weight")), 7),
    "parametrized": (
        Sequential(
            getattr(parametrizations, "weight_norm", parametrizations.spectral_norm)(conv()),
            parametrizations.spectral_norm(conv(2)),
        ),
        5,
    ),
    "scripted": (Sequential(torch.jit.script(Residual()), conv()), 5),
    "custom autograd function": (between(Cube.apply), 5),
    "dataclass": (Net(lambda net, x: net.b(Result(net.a(x))), a=conv(), b=Net(lambda _, r: r.features.relu())), 3),
    "tokens": (Net(lambda net, x: net.b(patches(net, x)), a=Conv2d(1, 4, 7, 7), b=LayerNorm(4)), 7),
    "attention": (Net(lambda net, x: net.b(*[patches(net, x)] * 3)[0], **ATTENTION), 28),
    "transformer": (Net(lambda net, x: net.b(patches(net, x)).mean(1), a=Conv2d(1, 4, 7, 7), b=ENCODER), 28),
    "embedding": (
        Net(lambda net, x: net.b(net.a((255 * x[:, 0]).long()).movedim(3, 1)), a=nn.Embedding(256, 2), b=conv(2)),
        3,
    ),
    # Branches
    "residual": (Net(lambda net, x: F.relu(net.b(x) + net.a(x)), a=Conv2d(1, 2, 3, 2, 1), b=Conv2d(1, 2, 1, 2)), 3),
    "crossed": (
        Net(
            lambda net, x: net.a(x) + net.b(x) + net.c(x),
            a=conv(),
            b=Conv2d(1, 2, (1, 3), padding=(0, 1)),
            c=Conv2d(1, 2, (5, 1), padding=(2, 0)),
        ),
        (5, 3),
    ),
    "squeeze and excite": (Net(squeeze_and_excite, a=conv(), b=Conv2d(2, 2, 1), c=conv(2)), 30),
    "growing list": (Net(growing_list, a=conv(), b=conv(3)), 5),
    "module of a parameter": (
        Net(lambda net, x: net.a(x) * net.b(net.w), a=conv(), b=ReLU(), w=nn.Parameter(torch.rand(1, 2, 1, 1))),
        3,
    ),
    "parameters first": (
        Net(lambda net, x: net.a(x * (net.w @ net.w).sum()), a=conv(), w=nn.Parameter(torch.eye(3))),
        3,
    ),
    # No false alarm
    "uint8 images": (Net(lambda net, x: net.a(x.float() / 255), a=conv()), 3),
    "first state": (Net(lambda net, x: net.a(x) + torch.zeros(len(x), 2, 28, 28), a=conv()), 3),
    "fixed kernel": (Net(lambda net, x: F.conv2d(x, torch.ones(1, 1, 3, 3))), 3),
    "stochastic depth": (Net(stochastic_depth, a=conv(1, 1)), 3),
    "assertions": (Net(check_no_nan, a=conv()), 3),
    "integers": (between(lambda x: (255 * x).long().float()), 5),
    "shared": (Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2), 7),
}
# What cannot be followed, and a part of the reason
NOT_FOLLOWED: dict[str, tuple[nn.Module, str]] = {
    "transposed": (Net(lambda net, x: net.a(x.transpose(2, 3)), a=conv()), "no window"),
    "transposed, several channels": (Net(lambda net, x: net.a(x).permute(0, 3, 2, 1), a=conv(1, 3)), "no window"),
    "flip": (Net(lambda net, x: net.a(x.flip(3)), a=conv()), "no window"),
    "reflection": (Sequential(Conv2d(1, 2, 3, padding=1, padding_mode="reflect")), "no window"),
    "interpolation": (Net(lambda net, x: F.interpolate(net.a(x), size=20, mode="bilinear"), a=conv()), "no window"),
    "transposed convolution": (Sequential(conv(), nn.ConvTranspose2d(2, 2, 2, 2)), "no window"),
    "pixel_shuffle": (Sequential(conv(1, 4), nn.PixelShuffle(2)), "no window"),
    "rows in time": (Net(lambda net, x: net.a(x[:, 0])[0], a=nn.LSTM(28, 8, batch_first=True)), "no window"),
    "rows, both ways": (Net(lambda net, x: net.a(x[:, 0])[0], a=nn.GRU(28, 8, 1, True, True, 0, True)), "no window"),
    "patches": (Net(lambda net, x: net.a(x.reshape(-1, 1, 14, 14)), a=conv()), "folds the batch"),
    "batch statistics": (Sequential(nn.BatchNorm2d(1, track_running_stats=False)), "mixes the images"),
    "rolled batch": (Net(lambda net, x: net.a(x.roll(1, 0)), a=conv()), "mixes the images"),
    "random crop": (Net(random_crop, a=conv()), "differ from run to run"),
    "random crop by torch": (Net(random_crop_by_torch, a=conv()), "differ from run to run"),
    "scalar": (Net(lambda net, x: net.a(x).mean(), a=conv()), "folds the batch"),
    "side by side": (Net(lambda net, x: torch.cat([x, 2 * x], 3)), "side by side"),
    "jumps": (Net(lambda net, x: net.a(x) + net.b(x), a=Conv2d(1, 2, 2, 2), b=Conv2d(1, 2, 15)), "jumps 1 and 2"),
    "outside torch": (Net(lambda net, x: net.a(torch.from_numpy(x.detach().numpy())), a=conv()), "no call"),
    "refuses a replay": (
        Net(lambda net, x: F.grid_sample(x, net.w.expand(len(x), -1, -1, -1)), w=torch.rand(1, 9, 9, 2)),
        "",
    ),
}


def last_field(analysis: Analysis) -> tuple[int, int]:
    field = [field for layer in analysis.layers for field in layer.fields][-1]
    return field["height"].r_out, field["width"].r_out


@pytest.mark.parametrize(("model", "expected"), FOLLOWED.values(), ids=FOLLOWED)
def test_followed(model: nn.Module, expected: int | tuple[int, int]) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    assert {layer.name: layer.unknown for layer in analysis.layers if layer.unknown} == {}
    assert last_field(analysis) == (expected if isinstance(expected, tuple) else (expected, expected))


@pytest.mark.parametrize(("model", "reason"), NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_not_followed(model: nn.Module, reason: str) -> None:
    analysis = analyze(model, (28, 28), batch_size=3)
    assert analysis.problems() == []
    assert reason in next(layer.unknown for layer in analysis.layers if layer.unknown)


def test_model5_table() -> None:
    layers = analyze(build_model("Model5"), (28, 28), batch_size=2).layers
    expected = [Axis(*map(int, line.split())) for line in MODEL5_TABLE.splitlines()]
    assert [field for layer in layers for field in layer.fields] == [
        {"height": axis, "width": axis} for axis in expected
    ]


def test_both_axes() -> None:
    model = Sequential(
        *(Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)), nn.AvgPool2d(2), Conv2d(2, 2, 3, padding="same", dilation=2)),
        *(nn.AdaptiveMaxPool2d((3, 4)), Flatten(), Linear(24, 10)),
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


def test_what_comes_in_where_branches_meet_is_the_largest() -> None:
    model = Net(lambda net, x: net.a(x) + x + net.b(x), a=conv(1, 1), b=Conv2d(1, 1, 7, padding=3))
    fields = [layer.fields[0]["height"] for layer in analyze(model, (28, 28), 2).layers if layer.type == "function"]
    assert fields == [
        Axis(None, None, None, None, 28, 28, 1, 1, 3, 3, 1, 1),
        Axis(None, None, None, None, 28, 28, 1, 1, 7, 7, 3, 3),
    ]


def test_large_maps_are_sampled() -> None:
    analysis = analyze(Sequential(conv(), ReLU(), nn.AvgPool2d(2), GroupNorm(1, 2)), (150, 120), batch_size=2)
    assert analysis.problems() == []
    assert [layer.unknown for layer in analysis.layers] == [None] * 5
    assert last_field(analysis) == (150 + 2, 120 + 2)


@pytest.mark.parametrize(
    ("mistake", "layer"),
    [
        (lambda axis: {"P_out": axis.P_in}, "0"),
        (lambda axis: {"r_out": axis.r_in + (axis.k - 1) * axis.j_in}, "1"),
        (lambda axis: {"r_out": axis.r_out + 1}, "0"),
        (lambda axis: {"j_out": axis.s}, "1"),
    ],
)
def test_a_mistake_in_a_recurrence_fails_its_check(
    monkeypatch: pytest.MonkeyPatch, mistake: Callable, layer: str
) -> None:
    model = Sequential(Conv2d(1, 2, 3, 2, 1), Conv2d(2, 2, 3, dilation=2), MaxPool2d(2, 2), conv(2))
    assert analyze(model, (28, 28), 2).problems() == []
    right = receptive_fields.slide

    def wrong(*args: object) -> receptive_fields.View:
        view = right(*args)
        return view._replace(axis=dataclasses.replace(view.axis, **mistake(view.axis)))

    monkeypatch.setattr(receptive_fields, "slide", wrong)
    assert analyze(model, (28, 28), 2).problems()[0].startswith(f"receptive field: wrong at {layer}")


def test_a_wrong_pixel_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    right = receptive_fields.slide
    monkeypatch.setattr(
        receptive_fields, "slide", lambda *args: right(*args)._replace(seen=right(*args).seen.roll(1, 1))
    )
    assert analyze(Sequential(conv()), (28, 28), 2).problems() == ["receptive field: wrong at 0, Sequential"]


def test_a_declared_window_that_a_replay_does_not_show_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = receptive_fields.declared_windows
    wider = lambda call: [(k + 1, s, p, d) for k, s, p, d in windows] if (windows := right(call)) else None  # noqa: E731
    monkeypatch.setattr(receptive_fields, "declared_windows", wider)
    assert analyze(Sequential(conv()), (28, 28), 2).problems() == ["windows: wrong at 0"]

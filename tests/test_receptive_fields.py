"""Receptive fields of many small architectures: the right ones, and what cannot be followed."""

import dataclasses
import math
import random
import string
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import Conv2d, LayerNorm, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import StochasticDepth

from analysis import receptive_fields
from analysis.layer_costs import tensors_in
from analyze_model import Analysis, analyze, format_fields
from models import build_model

torch.manual_seed(0)  # the weights of the architectures below


class Net(nn.Module):
    """A model whose forward is a function of the images and of its layers, named a, b, c..."""

    def __init__(self, function: Callable, *layers: object) -> None:
        super().__init__()
        self.function = function
        self.layers = layers
        for name, layer in zip(string.ascii_lowercase, layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.layers)


def in_turn(x: Tensor, *steps: Callable) -> object:
    for step in steps:
        x = step(x)
    return x


def chain(*steps: Callable) -> Net:
    """Return a model of layers and of functions, each of which takes what the last one returns."""
    return Net(in_turn, *steps)


def conv(inputs: int = 1, outputs: int = 2) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


def between_convs(function: Callable) -> Net:
    """Return a function of maps with 4 channels between two 3x3 convolutions."""
    return chain(conv(1, 4), function, conv(4))


def tokens(features: Tensor) -> Tensor:
    """Return the units of maps as (N, tokens, channels)."""
    return features.flatten(2).mT


class KeepsOutputs(nn.Module):
    """Keeps, and uses, its last result, which cannot be copied; its `train` returns nothing.

    It keeps a module of Python, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.math = math
        self.kept = [torch.zeros(1)]
        self(torch.zeros(1, 1, 28, 28))

    def train(self, mode: bool = True) -> None:
        pass

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        last = self.kept[0].detach()
        self.kept = [self.a(x + 0 * last.mean())]
        return self.kept[0], self.kept[0] * self.math.pi


class Double(torch.autograd.Function):
    forward = backward = staticmethod(lambda context, x: 2 * x)


@dataclasses.dataclass
class Result:
    features: Tensor


def written_by_index(x):
    canvas = torch.zeros(len(x), 4, 30, 30)
    canvas[:, :, 1:-1, 1:-1] = x
    return canvas


def shifted_channels(features):
    features[:, 0] = features[:, 1]
    return features


def changed_through_a_view(features):
    features[:, :1].add_(features.flip(3)[:, :1])
    return features


def add_neighbours_in_place(features):
    features[..., 1:] += features[..., :-1].clone()
    return features.flip(3).flip(3)  # which can only be followed as a whole


def changed_through_data(features):
    features.data += features.flip(3)
    return features


def changed_below_a_view(features):
    view = features.flatten(2)
    features += features.flip(3)
    return view.unflatten(2, (28, 28))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x + x.flip(3)


class Attention(nn.Module):
    """Attention with two heads, as torch computes it or written by hand."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.a = Linear(16, 48, bias=False)
        self.b = Linear(16, 16, bias=False)
        self.by_hand = by_hand

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.a(x).reshape(n, t, 3, 2, 8)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.by_hand:
            heads = (q @ k.mT / 8**0.5).softmax(-1) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v)
        return self.b(heads.transpose(1, 2).reshape(n, t, 16))


class MultiheadAttention(nn.MultiheadAttention):
    """Attention of the tokens to each other, without its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def vision_transformer(x, patches, block, head):
    x = tokens(patches(x))
    token = torch.zeros(1, 1, 16)
    x = torch.cat([token.expand(len(x), -1, -1), x], 1)
    x = x + block(x)
    return head(x[:, 0])


def mixer(x, patches, mix, head):
    x = tokens(patches(x))
    x = x + mix(x.mT).mT
    return head(x.mean(1))


def patches_as_tokens(x):
    x = x.reshape(-1, 1, 4, 7, 4, 7)
    x = x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, 16, 49)


def space_to_depth(x):
    x = x.view(-1, 14, 2, 14, 2)
    x = x.permute(0, 2, 4, 1, 3)
    return x.reshape(-1, 4, 14, 14)


def arithmetic(x):
    """Use constants that are made like the input, too."""
    x = x * torch.ones(4, 1, 1).type_as(x)
    x = x + torch.ones(4, 1, 1).to(x)
    return 1 / torch.square(x.new_ones(1) - x.float() / 255)


def rearranged_means(x):
    means = x.mean((2, 3))
    return means.flip(1)[:, None].repeat(1, 2, 1)


def check_no_nan(x):
    assert not torch.isnan(x).any()
    assert x.dtype == torch.float32
    return x


def divided_by_four(x):
    assert len(x) % 4 == 0
    return x.view(-1, 4, *x.shape[1:]).flatten(0, 1)


NAMES = """
ReLU ReLU6 RReLU PReLU LeakyReLU ELU CELU SELU GELU SiLU Mish
Sigmoid LogSigmoid Hardsigmoid Hardswish
Tanh Hardtanh Tanhshrink
Softplus Softsign Softshrink Hardshrink
Softmax2d
Identity Dropout Dropout2d AlphaDropout
"""
NO_WINDOW = [getattr(nn, name)() for name in NAMES.split()]
NO_WINDOW += [nn.Softmin(1), nn.Softmax(1), nn.LogSoftmax(1), nn.Threshold(0.1, 20)]
NO_WINDOW += [nn.LocalResponseNorm(3), StochasticDepth(0.1, "row"), nn.BatchNorm2d(4), nn.GLU(1)]
new_weight_norm = getattr(parametrizations, "weight_norm", weight_norm)  # since torch 2.1
ENCODER_LAYER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

# What is done to 4 channels between two 3x3 convolutions, by the receptive field after them
BETWEEN_CONVS = {
    "5x5: arithmetic": arithmetic,
    "5x5: padding": lambda x: F.pad(nn.ZeroPad2d((1, 0, 1, 2))(x), (0, 1, 2, 3)),
    "5x5: written by index": written_by_index,
    "5x5: flatten, unflatten": lambda x: x[:, :1].flatten(2).unflatten(2, (28, 28)).expand_as(x),
    "5x5: where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "5x5: mask": lambda x: x * (x > 0),
    "5x5: chunk, split": lambda x: torch.cat([*x.chunk(2, 1)[1:], *x.split(2, 1)[:1]], 1),
    "5x5: unbind, stack": lambda x: torch.stack(x.unbind(1), 1),
    "5x5: NHWC": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (4,)).permute(0, 3, 1, 2),
    "5x5: in place": lambda x: F.relu_(x.add_(1)),
    "5x5: in place, another shape": lambda x: x.unsqueeze_(2).squeeze_(2),
    "5x5: in place, flattened": lambda x: F.relu_(x.flatten(2)).view(x.shape),
    "5x5: from part to part": shifted_channels,
    "5x5: custom autograd function": Double.apply,
    "5x5: integers": lambda x: (255 * x).long().float(),
    "5x5: max over channels": lambda x: torch.max(x, 1, True)[0].expand_as(x),
    "5x5: channel shuffle": lambda x: x.unflatten(1, (2, 2)).transpose(1, 2).flatten(1, 2),
    "5x5: einsum": lambda x: torch.einsum("nchw,dc->ndhw", x, torch.ones(4, 4)),
    "5x5: assertions": check_no_nan,
    "5x5: first state": lambda x: x + torch.zeros(len(x), 4, 28, 28),
    "7x7: conv2d by keywords": lambda x: F.conv2d(weight=torch.ones(4, 4, 3, 3), input=x),
    "7x7: crop, strided slice": lambda x: x[:, :, 2:-2, 1:][:, :, ::2, ::2],
    # All of the image and the padding of the first convolution
    "30x30: squeeze and excite": lambda x: x * x.mean((2, 3)).sigmoid()[:, :, None, None],
    "30x30: instance norm": F.instance_norm,
    "86x86: mean in two steps": lambda x: x.mean(2, True).mean(3, True),
}

# Small architectures by their receptive field; images are 28x28
FOLLOWED = {name: between_convs(function) for name, function in BETWEEN_CONVS.items()} | {
    "2x1: oblong pooling with indices": chain(
        MaxPool2d((2, 1), return_indices=True),
        lambda results: results[0],
    ),
    "3x3: depthwise, padding past the kernel": Sequential(
        Conv2d(1, 2, 1, padding=1),
        Conv2d(2, 2, 3, padding="valid", groups=2),
    ),
    "3x3: dataclass": chain(conv(), Result, Net(lambda result: result.features.relu())),
    "3x3: embedding": Net(
        lambda x, a, b: b(a((255 * x[:, 0]).long()).movedim(3, 1)),
        nn.Embedding(256, 2),
        conv(2),
    ),
    "3x3: parameters": Net(
        lambda x, a, b, c: a(x * b(a.weight).sum()) * b(c),
        conv(),
        ReLU(),
        nn.Parameter(torch.rand(1, 2, 1, 1)),
    ),
    "3x3: keeps its last output, returns two": KeepsOutputs(),
    "5x3: crossed": Net(
        lambda x, a, b: a(x) + b(x),
        Conv2d(1, 2, (1, 3), padding=(0, 1)),
        Conv2d(1, 2, (5, 1), padding=(2, 0)),
    ),
    "5x5: layers without a window": Sequential(conv(1, 4), *NO_WINDOW, conv(2)),
    "5x5: padding by reflection": Sequential(
        Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    ),
    "5x5: transposed": chain(
        Conv2d(1, 2, (3, 5)),
        lambda x: x.mT,
        Conv2d(2, 2, (1, 3)),
    ),
    "5x5: ceil mode": Sequential(
        MaxPool2d(3, 2, ceil_mode=True),
        nn.AvgPool2d(2, 2, 1, ceil_mode=True),
    ),
    "5x5: scripted": Sequential(torch.jit.script(Sequential(conv(), ReLU())), conv(2)),
    "5x6: a block that changes what it is given": Sequential(
        conv(),
        Net(add_neighbours_in_place),
        conv(2),
    ),
    "5x5: growing list": Net(
        lambda x, a, b: b(torch.cat([x, a(torch.cat([x], 1))], 1)),
        conv(),
        conv(3),
    ),
    "6x6: pixel_unshuffle": Sequential(nn.PixelUnshuffle(2), conv(4)),
    "4x7: adaptive pooling": Sequential(
        nn.AdaptiveMaxPool2d((14, None)),
        nn.AdaptiveAvgPool2d((7, 4)),
    ),
    "2x2: space to depth": chain(space_to_depth, Conv2d(4, 3, 1)),
    "3x3: as many channels as images": conv(1, 12),
    "5x5: unfold": chain(nn.Unfold(3, dilation=2), lambda x: x.mT, Linear(9, 8)),
    "7x7: patches as tokens": chain(patches_as_tokens, Linear(49, 16)),
    "7x7: unfolded patches": chain(nn.Unfold(7, stride=7), lambda x: x.mT, Linear(49, 8)),
    "7x7: shared": Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2),
    "8x7: same padding": Sequential(
        Conv2d(1, 2, 5, padding="same"),
        Conv2d(2, 2, (4, 3), padding="same"),
    ),
    "11x11: norms of weights": Sequential(
        weight_norm(conv()),
        spectral_norm(conv(2)),
        prune.identity(conv(2), "weight"),
        new_weight_norm(conv(2)),
        parametrizations.spectral_norm(conv(2)),
    ),
    "15x15: max pooling": Sequential(
        MaxPool2d(3, 2, 1),
        conv(),
        MaxPool2d(3, 2, dilation=2),
    ),
    "27x27: linear": Sequential(
        Conv2d(1, 2, 3, 2),
        nn.Flatten(),
        ReLU(),
        Linear(338, 9),
        Linear(9, 5),
    ),
    "28x28: attention": Net(
        lambda x, a, b: b(*[tokens(a(x))] * 3)[0],
        Conv2d(1, 4, 7, 7),
        nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "28x28: transformer": chain(
        Conv2d(1, 4, 7, 7),
        tokens,
        nn.TransformerEncoder(ENCODER_LAYER, 2),
        lambda x: x.mean(1),
    ),
    "28x28: class token": Net(
        vision_transformer,
        Conv2d(1, 16, 4, 4),
        Attention(by_hand=True),
        Linear(16, 10),
    ),
    # All of the image and the padding of the first convolution
    "30x30: flattened with the channels last": chain(
        conv(),
        lambda x: x.permute(0, 2, 3, 1).flatten(1),
        Linear(1568, 9),
    ),
    "30x3: a window across rows and channels": Net(
        lambda x, a, b: F.conv2d(a(x).permute(0, 2, 3, 1), b.weight),
        conv(1, 28),
        Conv2d(28, 2, 1),
    ),
    "30x30: rearranged where all is seen": chain(conv(), rearranged_means, Linear(2, 9)),
    "30x30: padded window on a unit with the channels last": chain(
        Conv2d(1, 2, 28),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2),
        conv(2),
    ),
    "30x30: max of the flattened": chain(
        conv(),
        lambda x: x.flatten(2).max(2).values,
        Linear(2, 9),
    ),
    "30x30: amin and amax": chain(conv(), lambda x: x.amin(3).amax(2)),
    "30x30: layer norm, group norm": Sequential(
        conv(),
        LayerNorm([2, 28, 28]),
        nn.GroupNorm(2, 2),
        MaxPool2d(2),
        conv(2),
    ),
    "42x42: padded window on a small map": Sequential(Conv2d(1, 2, 14, 14), conv(2)),
}

# What cannot be followed, by a part of the reason
NOT_FOLLOWED = {
    "no window: flip": chain(lambda x: x.flip(3), conv()),
    "no window: circular padding": Sequential(
        Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
    ),
    "no window: interpolation": nn.Upsample(20, mode="bilinear"),
    "no window: transposed convolution": Sequential(conv(), nn.ConvTranspose2d(2, 2, 2, 2)),
    "no window: pixel_shuffle": Sequential(conv(1, 4), nn.PixelShuffle(2)),
    "no window: rows in time": Net(
        lambda x, a: a(x[:, 0])[0],
        nn.LSTM(28, 8, batch_first=True),
    ),
    "no window: rows, both ways": Net(
        lambda x, a: a(x[:, 0])[0],
        nn.GRU(28, 8, batch_first=True, bidirectional=True),
    ),
    "folds the batch: patches": chain(lambda x: x.reshape(-1, 1, 14, 14), conv()),
    "folds the batch: divided by four": between_convs(divided_by_four),
    "folds the batch: last image": chain(conv(), lambda x: x + x.narrow(0, -1, 1)),
    "folds the batch: scalar": chain(conv(), torch.mean),
    "mixes the images: batch statistics": Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
    "mixes the images: rolled batch": chain(lambda x: x.roll(1, 0), conv()),
    "run to run: by Python": chain(lambda x: x[:, :, random.randint(0, 9) :], conv()),
    "run to run: by torch": chain(lambda x: x[:, :, torch.randint(9, ()) :], conv()),
    "side by side: two maps": chain(lambda x: torch.cat([x, 2 * x], 3)),
    "jumps 1 and 2: branches": Net(
        lambda x, a, b: a(x) + b(x),
        Conv2d(1, 2, 2, 2),
        Conv2d(1, 2, 15),
    ),
    "shares its memory: a view": between_convs(changed_through_a_view),
    "shares its memory: data": between_convs(changed_through_data),
    "shares its memory: below a view": between_convs(changed_below_a_view),
    "no call: scripted": between_convs(lambda x: scripted(x)),
    "no call: outside torch": chain(lambda x: torch.from_numpy(x.detach().numpy()), conv()),
    "replay: qint8": chain(lambda x: torch.quantize_per_tensor(x, 1, 0, torch.qint8).dequantize()),
}


def squeeze(text: str) -> list[str]:
    """Return the lines of a text with a single space between words."""
    return [" ".join(line.split()) for line in text.splitlines()]


def analyze_digits(model: nn.Module, batch_size: int = 3) -> Analysis:
    return analyze(model, (28, 28), batch_size)


def field_rows(analysis: Analysis) -> list[str]:
    """Return the rows of the table of receptive fields without its heading."""
    table, *_ = format_fields(analysis)
    return squeeze(table)[1:]


def last_field(analysis: Analysis) -> str:
    return field_rows(analysis)[-1].split()[-1]


def assert_followed(analysis: Analysis, expected: str) -> None:
    assert analysis.problem is None
    assert [layer.unknown for layer in analysis.layers if layer.unknown] == []
    assert last_field(analysis) == expected


@pytest.mark.parametrize("name", FOLLOWED)
def test_followed(name):
    model = FOLLOWED[name]
    expected, _ = name.split(": ")
    analysis = analyze_digits(model)
    assert_followed(analysis, expected)
    output, *_ = tensors_in(model(torch.zeros(2, 1, 28, 28)))
    assert analysis.layers[0].output_shape == output.shape[1:]


def test_large_maps_are_sampled():
    model = Sequential(conv(), ReLU(), nn.AvgPool2d(2), nn.GroupNorm(1, 2))
    assert_followed(analyze(model, (150, 120), batch_size=2), "152x122")
    windows_that_show = Sequential(nn.LPPool2d(2, 3, 2))
    assert_followed(analyze(windows_that_show, (150, 120), batch_size=2), "3x3")


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_not_followed(name):
    expected, _ = name.split(": ")
    analysis = analyze_digits(NOT_FOLLOWED[name], batch_size=4)
    assert analysis.problem is None
    assert expected in " ".join(layer.unknown for layer in analysis.layers if layer.unknown)


def test_the_table_of_the_readme():
    table, *_ = format_fields(analyze_digits(build_model("Model5")))
    assert f"\n{table}\n" in (ROOT / "README.md").read_text()


# The last rows of the table
ROWS = {
    "both axes; in Linear's row, what the others do adds up": (
        Sequential(
            Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
            nn.AvgPool2d(2),
            Conv2d(2, 2, 3, padding="same", dilation=2),
            nn.AdaptiveMaxPool2d((3, 4)),
            nn.Flatten(),
            Linear(24, 10),
        ),
        "5 Linear 3x4 3x4 0 1 3x4 1 8 24x32 22x31 38x55 5x14 5x14 38x55",
    ),
    "a call that changes one axis changes nothing in the other": (
        chain(Conv2d(1, 2, 5, 2), lambda x: F.pad(x, (2, 2))),
        "pad() function 1 1 0x2 1 12 12x16 2 2 5 5 0 0x4 5x5",
    ),
    "what comes in where branches meet is the largest": (
        Net(lambda x, a, b: a(x) + x + b(x), conv(1, 1), Conv2d(1, 1, 7, padding=3)),
        """\
        a     Conv2d   3 1 1 1 28 28 1 1 1 3 0 1 3x3
        add() function - - - - 28 28 1 1 3 3 1 1 3x3
        b     Conv2d   7 1 3 1 28 28 1 1 1 7 0 3 7x7
        add() function - - - - 28 28 1 1 7 7 3 3 7x7""",
    ),
    "branches that differ in one axis": (
        Net(
            lambda x, a, b: a(x) + b(x),
            Conv2d(1, 2, 5, padding=2),
            Conv2d(1, 2, (5, 3), 1, (2, 1)),
        ),
        "add() function 1x- 1x- 0x- 1x- 28 28 1 1 5 5 2 2 5x5",
    ),
    "a gate that comes first changes nothing in what it scales": (
        chain(F.instance_norm, lambda x: x.mean((2, 3), True) * x),
        "mean() function 28 28 0 1 28 1 0 0 28 28 0 0 28x28",
    ),
    "a window along images and columns": (
        Net(
            lambda x, a, b: F.conv2d(a(x).permute(1, 2, 0, 3), b.weight),
            conv(1, 1),
            Conv2d(28, 2, (1, 3)),
        ),
        "conv2d() function 28x3 28x1 0 1 28 1x26 1 28x1 3 30x5 1 1 30x5",
    ),
    "channels are no units": (
        chain(lambda x: x.squeeze(1), Linear(28, 16), lambda x: x.mean(1), Linear(16, 10)),
        """\
        b      Linear   1x28 1x28 0 1 28   28x1 1    1x28 1    1x28 0 0 1x28
        mean() function 28x1 28x1 0 1 28x1 1    1x28 28   1x28 28   0 0 28x28""",
    ),
    "channels of patches are no units": (
        Net(mixer, Conv2d(1, 16, 7, 7), Linear(16, 16), Linear(16, 9)),
        "mean() function 4 4 0 1 4 1 0 0 28 28 0 0 28x28",
    ),
}


@pytest.mark.parametrize(("model", "expected"), ROWS.values(), ids=ROWS)
def test_rows(model, expected):
    expected = squeeze(expected)
    assert field_rows(analyze_digits(model))[-len(expected) :] == expected


MISTAKES = {
    "padding": lambda axis: {"P": axis.before.P},
    "dilation": lambda axis: {"r": axis.before.r + 2 * axis.before.j},
    "one pixel more": lambda axis: {"r": axis.r + 1},
    "stride": lambda axis: {"j": 2},
    "another pixel": lambda axis: {"P": axis.P + 1},
}


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_fails_the_check(mistake, monkeypatch):
    model = Sequential(
        Conv2d(1, 2, 3, 2, 1),
        Conv2d(2, 2, 3, dilation=2),
        MaxPool2d(2, 2),
        conv(2),
    )
    assert analyze_digits(model).problem is None
    right = receptive_fields.apply_window

    def wrong(*args):
        axis = right(*args)
        return axis._replace(**mistake(axis))

    monkeypatch.setattr(receptive_fields, "apply_window", wrong)
    assert analyze_digits(model).problem.startswith("FAILED: wrong at ")


def test_a_block_that_does_not_depend_on_the_image():
    model = Net(
        lambda x, a, b: a(b(x)) + a(x),
        conv(),
        Sequential(Net(torch.zeros_like), conv(1, 1)),
    )
    layers = {layer.name: layer for layer in analyze_digits(model).layers}
    assert layers["b"].unknown == "what it returns does not depend on the image"
    assert layers["b.1"].output_shape == (1, 28, 28)
    assert layers["a"].fields

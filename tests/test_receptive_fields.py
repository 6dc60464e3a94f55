"""Receptive fields of many small architectures: the right ones, and what cannot be followed."""

import dataclasses
import math
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn
from torch.nn import Conv2d, Flatten, LayerNorm, Linear, MaxPool2d, ReLU, Sequential
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torchvision.ops import StochasticDepth

from analysis import receptive_fields
from analysis.layer_costs import tensors_in
from analyze_model import Analysis, analyze, format_fields
from models import build_model

torch.manual_seed(0)  # the weights of the architectures below


class Net(nn.Module):
    """A model whose forward is a function of the images and of its layers, named a, b, c, d."""

    def __init__(self, function: Callable, *layers: object) -> None:
        super().__init__()
        self.function = function
        self.layers = layers
        for name, layer in zip("abcd", layers, strict=False):
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> object:
        return self.function(x, *self.layers)


def conv(inputs: int = 1, outputs: int = 2) -> Conv2d:
    return Conv2d(inputs, outputs, 3, padding=1)


def between_convs(function: Callable) -> Net:
    """Return a function of maps with 4 channels between two 3x3 convolutions."""
    return Net(lambda x, a, b: b(function(a(x))), conv(1, 4), conv(4))


def of_patches(function: Callable, layer: nn.Module) -> Net:
    """Return a function of patches as tokens (N, tokens, channels), and of a layer."""
    return Net(
        lambda x, a, b: function(a(x).flatten(2).transpose(1, 2), b),
        Conv2d(1, 4, 7, 7),
        layer,
    )


class KeepsOutputs(nn.Module):
    """Keeps a module of Python and results, which cannot be copied; its `train` returns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.math = math
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
    canvas = torch.zeros(len(x), 4, 30, 30)
    canvas[:, :, 1:-1, 1:-1] = x
    return canvas


def shifted_channels(features: Tensor) -> Tensor:
    features[:, 0] = features[:, 1]
    return features


def changed_through_a_view(features: Tensor) -> Tensor:
    features[:, :1].add_(features.flip(3)[:, :1])
    return features


def add_neighbours_in_place(features: Tensor) -> Tensor:
    features[..., 1:] += features[..., :-1].clone()
    return features.flip(3).flip(3)  # which can only be followed as a whole


def changed_through_data(features: Tensor) -> Tensor:
    features.data += features.flip(3)
    return features


def changed_below_a_view(features: Tensor) -> Tensor:
    view = features.flatten(2)
    features += features.flip(3)
    return view.unflatten(2, (28, 28))


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return x + x.flip(3)


class KeepsItsLastOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = conv()
        self.last = torch.zeros(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x + 0 * self.last.mean())
        self.last = y.detach()
        return y


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
            heads = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1) @ v
        else:
            heads = F.scaled_dot_product_attention(q, k, v)
        return self.b(heads.transpose(1, 2).reshape(n, t, 16))


class MultiheadAttention(nn.MultiheadAttention):
    """Attention of the tokens to each other, without its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, x, x, need_weights=False)[0]


def attending(attention: nn.Module) -> Net:
    """Return a classifier of 7x7 tokens that attend to each other."""
    return Net(
        lambda x, a, b, c: c(b(a(x).flatten(2).transpose(1, 2)).mean(1)),
        Conv2d(1, 16, 4, 4, bias=False),
        attention,
        Linear(16, 10, bias=False),
    )


def vision_transformer(x: Tensor, patches: Conv2d, block: nn.Module, head: Linear) -> Tensor:
    x = patches(x).flatten(2).transpose(1, 2)
    token = torch.zeros(1, 1, 16)
    x = torch.cat([token.expand(len(x), -1, -1), x], 1)
    x = x + block(x)
    return head(x[:, 0])


def mixer(x: Tensor, patches: Conv2d, tokens: Linear, head: Linear) -> Tensor:
    x = patches(x).flatten(2).transpose(1, 2)
    x = x + tokens(x.transpose(1, 2)).transpose(1, 2)
    return head(x.mean(1))


def patches_as_tokens(x: Tensor) -> Tensor:
    x = x.reshape(-1, 1, 4, 7, 4, 7)
    x = x.permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, 16, 49)


def space_to_depth(x: Tensor) -> Tensor:
    x = x.view(-1, 14, 2, 14, 2)
    x = x.permute(0, 2, 4, 1, 3)
    return x.reshape(-1, 4, 14, 14)


def times_constants(x: Tensor) -> Tensor:
    """Use constants that are made like the input."""
    x = x * torch.ones(4, 1, 1).type_as(x)
    x = x + torch.ones(4, 1, 1).to(x)
    return x + x.new_ones(1)


def rearranged_means(x: Tensor, convolution: Conv2d, linear: Linear) -> Tensor:
    means = convolution(x).mean((2, 3))
    return linear(means.flip(1)[:, None].repeat(1, 2, 1))


def check_no_nan(x: Tensor) -> Tensor:
    assert not torch.isnan(x).any()
    assert x.dtype == torch.float32
    return x


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
NO_WINDOW += [nn.LocalResponseNorm(3), nn.BatchNorm2d(4), nn.GLU(1)]
new_weight_norm = getattr(parametrizations, "weight_norm", weight_norm)  # since torch 2.1
ENCODER_LAYER = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)

# What is done to 4 channels between two 3x3 convolutions, by the receptive field after them
BETWEEN_CONVS = {
    "5x5: arithmetic": lambda x: 1 / torch.square(1 - x.float() / 255),
    "5x5: padding": lambda x: F.pad(nn.ZeroPad2d((1, 0, 1, 2))(x), (0, 1, 2, 3)),
    "5x5: written by index": written_by_index,
    "5x5: flatten, unflatten": lambda x: x[:, :1].flatten(2).unflatten(2, (28, 28)).expand_as(x),
    "5x5: where": lambda x: torch.where(x > 0, x, torch.zeros(())),
    "5x5: masked_fill": lambda x: x.masked_fill(x < 0, 0),
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
    "5x5: channel shuffle": (
        lambda x: x.view(-1, 2, 2, 28, 28).transpose(1, 2).reshape(-1, 4, 28, 28)
    ),
    "5x5: einsum": lambda x: torch.einsum("nchw,dc->ndhw", x, torch.ones(4, 4)),
    "5x5: assertions": check_no_nan,
    "5x5: constants made like the input": times_constants,
    "5x5: permuted twice": lambda x: x.permute(0, 3, 2, 1).permute(0, 3, 2, 1),
    "5x5: first state": lambda x: x + torch.zeros(len(x), 4, 28, 28),
    "7x7: conv2d by keywords": lambda x: F.conv2d(weight=torch.ones(4, 4, 3, 3), input=x),
    "7x7: crop, strided slice": lambda x: x[:, :, 2:-2, 1:][:, :, ::2, ::2],
    # All of the image and the padding of the first convolution
    "30x30: gate by indexing with None": lambda x: x * x.mean((2, 3))[:, :, None, None],
    "30x30: squeeze and excite": lambda x: x * (1 - F.adaptive_avg_pool2d(x, 1)).sigmoid(),
    "30x30: instance norm": F.instance_norm,
    "86x86: mean in two steps": lambda x: x.mean(2, True).mean(3, True),
}

# Small architectures by their receptive field; images are 28x28
FOLLOWED = {name: between_convs(function) for name, function in BETWEEN_CONVS.items()} | {
    "2x2: pooling with indices": Net(lambda x, a: a(x)[0], MaxPool2d(2, return_indices=True)),
    "3x3: padding past the kernel": Sequential(
        Conv2d(1, 2, 1, padding=1),
        Conv2d(2, 2, 3, padding="valid"),
    ),
    "3x3: depthwise": Sequential(
        Conv2d(1, 8, 1),
        Conv2d(8, 8, 3, groups=8),
        Conv2d(8, 4, 1),
    ),
    "3x3: max of two": Net(lambda x, a: torch.min(torch.max(a(x), x), x), conv(1, 1)),
    "3x3: dataclass": Net(
        lambda x, a, b: b(Result(a(x))),
        conv(),
        Net(lambda result: result.features.relu()),
    ),
    "3x3: embedding": Net(
        lambda x, a, b: b(a((255 * x[:, 0]).long()).movedim(3, 1)),
        nn.Embedding(256, 2),
        conv(2),
    ),
    "3x3: residual": Net(
        lambda x, a, b: F.relu(b(x) + a(x)),
        Conv2d(1, 2, 3, 2, 1),
        Conv2d(1, 2, 1, 2),
    ),
    "3x3: parameters": Net(
        lambda x, a, b, c: a(x * b(a.weight).sum()) * b(c),
        conv(),
        ReLU(),
        nn.Parameter(torch.rand(1, 2, 1, 1)),
    ),
    "3x3: tensors kept, several outputs": KeepsOutputs(),
    "3x3: stochastic depth": Net(
        lambda x, a, b: x + b(a(x)),
        conv(),
        StochasticDepth(0.1, "row"),
    ),
    "5x3: crossed": Net(
        lambda x, a, b, c: a(x) + b(x) + c(x),
        conv(),
        Conv2d(1, 2, (1, 3), padding=(0, 1)),
        Conv2d(1, 2, (5, 1), padding=(2, 0)),
    ),
    "5x5: layers without a window": Sequential(conv(1, 4), *NO_WINDOW, conv(2)),
    "5x5: padding by reflection": Sequential(
        Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        Conv2d(2, 2, 3, padding=1, padding_mode="replicate"),
    ),
    "5x5: transposed": Net(
        lambda x, a, b: b(a(x).transpose(2, 3)),
        Conv2d(1, 2, (3, 5)),
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
    "6x5: oblong": Sequential(
        Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
        MaxPool2d((2, 1)),
    ),
    "6x6: pixel_unshuffle": Net(lambda x, a: a(F.pixel_unshuffle(x, 2)), conv(4)),
    "4x7: adaptive pooling": Sequential(
        nn.AdaptiveMaxPool2d((14, None)),
        nn.AdaptiveAvgPool2d((7, 4)),
    ),
    "2x2: space to depth": Net(lambda x, a: a(space_to_depth(x)), Conv2d(4, 3, 1)),
    "3x3: keeps its last output": KeepsItsLastOutput(),
    "3x3: unfold": Net(lambda x, a: a(F.unfold(x, 3).transpose(1, 2)), Linear(9, 8)),
    "7x7: patches as tokens": Net(lambda x, a: a(patches_as_tokens(x)), Linear(49, 16)),
    "7x7: unfolded patches": Net(lambda x, a: a(F.unfold(x, 7, stride=7).mT), Linear(49, 8)),
    "7x7: shared": Sequential(Conv2d(1, 2, 3), *[Conv2d(2, 2, 3)] * 2),
    "7x7: tokens": of_patches(lambda x, layer: layer(x), LayerNorm(4)),
    "8x7: same padding": Sequential(
        Conv2d(1, 2, 5, padding="same"),
        Conv2d(2, 2, (4, 3), padding="same"),
    ),
    "11x11: dilation": Sequential(
        Conv2d(1, 2, 3, dilation=2),
        Conv2d(2, 2, 3, padding=3, dilation=3),
    ),
    "11x11: norms of weights": Sequential(
        weight_norm(conv()),
        spectral_norm(conv(2)),
        prune.identity(conv(2), "weight"),
        new_weight_norm(conv(2)),
        parametrizations.spectral_norm(conv(2)),
    ),
    "15x15: stride": Sequential(Conv2d(1, 2, 3, 2), conv(2), Conv2d(2, 2, 5, 3, 2)),
    "15x15: max pooling": Sequential(
        MaxPool2d(3, 2, 1),
        conv(),
        MaxPool2d(3, 2, dilation=2),
    ),
    "27x27: linear": Sequential(
        Conv2d(1, 2, 3, 2),
        Flatten(),
        ReLU(),
        Linear(338, 9),
        Linear(9, 5),
    ),
    "28x28: global pooling": Sequential(
        Conv2d(1, 2, 3),
        nn.AdaptiveAvgPool2d(1),
        Flatten(),
        Linear(2, 9),
    ),
    "28x28: attention": of_patches(
        lambda x, layer: layer(x, x, x)[0],
        nn.MultiheadAttention(4, 2, batch_first=True),
    ),
    "28x28: transformer": of_patches(
        lambda x, layer: layer(x).mean(1),
        nn.TransformerEncoder(ENCODER_LAYER, 2),
    ),
    "28x28: attention by hand": attending(Attention(by_hand=True)),
    "28x28: class token": Net(
        vision_transformer,
        Conv2d(1, 16, 4, 4),
        Attention(by_hand=True),
        Linear(16, 10),
    ),
    # All of the image and the padding of the first convolution
    "30x30: flattened with the channels last": Net(
        lambda x, a, b: b(a(x).permute(0, 2, 3, 1).flatten(1)),
        conv(),
        Linear(1568, 9),
    ),
    "30x3: a window across rows and channels": Net(
        lambda x, a, b: F.conv2d(a(x).permute(0, 2, 3, 1), b.weight),
        conv(1, 28),
        Conv2d(28, 2, 1),
    ),
    "30x30: rearranged where all is seen": Net(rearranged_means, conv(), Linear(2, 9)),
    "30x30: padded window on a unit with the channels last": Net(
        lambda x, a, b: b(F.layer_norm(a(x).permute(0, 2, 3, 1), (2,)).permute(0, 3, 1, 2)),
        Conv2d(1, 2, 28),
        conv(2),
    ),
    "30x30: mean of the flattened": Net(
        lambda x, a, b: b(a(x).flatten(2).mean(-1)),
        conv(),
        Linear(2, 9),
    ),
    "30x30: max over the map": Net(lambda x, a: a(x).flatten(2).max(2).values, conv()),
    "30x30: amin and amax, several outputs": Net(lambda x, a: (a(x).amin(3).amax(2), x), conv()),
    "30x30: layer norm": Sequential(conv(), LayerNorm([2, 28, 28]), conv(2)),
    "30x30: group norm": Sequential(
        conv(),
        nn.GroupNorm(2, 2),
        MaxPool2d(2),
        conv(2),
    ),
    "42x42: padded window on a small map": Sequential(Conv2d(1, 2, 14, 14), conv(2)),
}

# What cannot be followed, by a part of the reason
NOT_FOLLOWED = {
    "no window: flip": Net(lambda x, a: a(x.flip(3)), conv()),
    "no window: circular padding": Sequential(
        Conv2d(1, 2, 3, padding=1, padding_mode="circular"),
    ),
    "no window: interpolation": Net(lambda x: F.interpolate(x, size=20, mode="bilinear")),
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
    "folds the batch: patches": Net(lambda x, a: a(x.reshape(-1, 1, 14, 14)), conv()),
    "folds the batch: last image": Net(lambda x, a: a(x) + x.narrow(0, -1, 1), conv()),
    "folds the batch: scalar": Net(lambda x, a: a(x).mean(), conv()),
    "mixes the images: batch statistics": Sequential(nn.BatchNorm2d(1, track_running_stats=False)),
    "mixes the images: rolled batch": Net(lambda x, a: a(x.roll(1, 0)), conv()),
    "run to run: random crop": Net(lambda x, a: a(x[:, :, random.randint(0, 9) :]), conv()),
    "run to run: by torch": Net(lambda x, a: a(x[:, :, torch.randint(9, ()) :]), conv()),
    "side by side: two maps": Net(lambda x: torch.cat([x, 2 * x], 3)),
    "jumps 1 and 2: branches": Net(
        lambda x, a, b: a(x) + b(x),
        Conv2d(1, 2, 2, 2),
        Conv2d(1, 2, 15),
    ),
    "shares its memory: a view": between_convs(changed_through_a_view),
    "shares its memory: data": between_convs(changed_through_data),
    "shares its memory: below a view": between_convs(changed_below_a_view),
    "no call: scripted": Net(lambda x, a, b: b(scripted(a(x))), conv(), conv(2)),
    "no call: outside torch": Net(
        lambda x, a: a(torch.from_numpy(x.detach().numpy())),
        conv(),
    ),
    "replay: qint8": Net(lambda x: torch.quantize_per_tensor(x, 1, 0, torch.qint8).dequantize()),
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
    analysis = analyze_digits(NOT_FOLLOWED[name])
    assert analysis.problem is None
    assert expected in " ".join(layer.unknown for layer in analysis.layers if layer.unknown)


def test_the_table_of_the_readme():
    table, *_ = format_fields(analyze_digits(build_model("Model5")))
    assert f"\n{table}\n" in (ROOT / "README.md").read_text()


def test_both_axes():
    model = Sequential(
        Conv2d(1, 2, (3, 5), (1, 2), (1, 2), (2, 1)),
        nn.AvgPool2d(2),
        Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.AdaptiveMaxPool2d((3, 4)),
        Flatten(),
        Linear(24, 10),
    )
    # In Linear's row, what the others do adds up
    rows = field_rows(analyze(model, (26, 32), batch_size=2))
    assert rows[-1] == "5 Linear 3x4 3x4 0 1 3x4 1 8 24x32 20x27 36x51 5x10 5x10 36x51"


def test_a_call_that_changes_one_axis_changes_nothing_in_the_other():
    model = Net(lambda x, a: F.pad(a(x), (2, 2)), Conv2d(1, 2, 5, 2))
    rows = field_rows(analyze_digits(model))
    assert rows[-1] == "pad() function 1 1 0x2 1 12 12x16 2 2 5 5 0 0x4 5x5"


def test_what_comes_in_where_branches_meet_is_the_largest():
    model = Net(
        lambda x, a, b: a(x) + x + b(x),
        conv(1, 1),
        Conv2d(1, 1, 7, padding=3),
    )
    expected = """\
        a     Conv2d   3 1 1 1 28 28 1 1 1 3 0 1 3x3
        add() function - - - - 28 28 1 1 3 3 1 1 3x3
        b     Conv2d   7 1 3 1 28 28 1 1 1 7 0 3 7x7
        add() function - - - - 28 28 1 1 7 7 3 3 7x7"""
    assert field_rows(analyze_digits(model)) == squeeze(expected)


MISTAKES = {
    "padding": lambda axis: {"P": axis.before.P},
    "dilation": lambda axis: {"r": axis.before.r + 2 * axis.before.j},
    "one pixel more": lambda axis: {"r": axis.r + 1},
    "stride": lambda axis: {"j": 2},
    "another pixel": lambda axis: {"P": axis.P + 1},
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_the_check(name, monkeypatch):
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
        return axis._replace(**MISTAKES[name](axis))

    monkeypatch.setattr(receptive_fields, "apply_window", wrong)
    assert analyze_digits(model).problem.startswith("FAILED: wrong at ")


def test_a_block_that_does_not_depend_on_the_image():
    constant = Net(torch.zeros_like)
    model = Net(
        lambda x, a, b: a(b(x)) + a(x),
        conv(),
        Sequential(constant, conv(1, 1)),
    )
    layers = {layer.name: layer for layer in analyze_digits(model).layers}
    assert layers["b"].unknown == "what it returns does not depend on the image"
    assert layers["b.1"].output_shape == (1, 28, 28)
    assert layers["a"].fields


def test_a_batch_that_is_divided():
    def by_four(x):
        assert len(x) % 4 == 0
        return x.view(-1, 4, *x.shape[1:]).flatten(0, 1)

    analysis = analyze_digits(between_convs(by_four), batch_size=64)
    assert analysis.problem is None
    assert "it folds the batch" in {layer.unknown for layer in analysis.layers}


def test_channels_are_no_units():
    model = Net(
        lambda x, a, b: b(a(x.squeeze(1)).mean(1)),
        Linear(28, 16),
        Linear(16, 10),
    )
    expected = """\
        a      Linear   1x28 1x28 0 1 28   28x1 1    1x28 1    1x28 0 0 1x28
        mean() function 28x1 28x1 0 1 28x1 1    1x28 28   1x28 28   0 0 28x28"""
    assert field_rows(analyze_digits(model)) == squeeze(expected)
    mixing = Net(mixer, Conv2d(1, 16, 7, 7), Linear(16, 16), Linear(16, 9))
    assert field_rows(analyze_digits(mixing))[-1] == (
        "mean() function 4 4 0 1 4 1 0 0 28 28 0 0 28x28"
    )

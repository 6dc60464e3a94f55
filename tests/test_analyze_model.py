"""The analysis: its numbers, what it does with models it cannot follow, and its report."""

import copy

import pytest
import torch
from conftest import assert_one_line, run
from torch import Tensor, nn

from analyze_model import Axis, analyze
from models import build_model

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


class Functional(nn.Module):
    """A model with something between its layers that is no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.second = nn.Conv2d(4, 10, 3)
        self.unused = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x))).mean((2, 3))


def test_model5_receptive_field_table() -> None:
    layers = analyze(build_model("Model5"), (28, 28), batch_size=2).layers
    shown = [layer.axes for layer in layers if layer.type in (nn.Conv2d, nn.MaxPool2d, nn.AdaptiveAvgPool2d)]
    expected = [Axis(*map(int, line.split())) for line in MODEL5_TABLE.splitlines()]
    assert shown == [(axis, axis) for axis in expected]


@pytest.mark.parametrize(("name", "total"), [("Model1", 14_620), ("Model2", 14_796), ("Model5", 8_018)])
def test_totals(name: str, total: int) -> None:
    analysis = analyze(build_model(name), (28, 28), batch_size=64)
    assert analysis.parameters == sum(layer.parameters for layer in analysis.layers) == total
    assert analysis.layers[-1].axes[0].r_out == 28
    memory = analysis.memory
    assert memory["parameters"] == memory["gradients"] == memory["momentum"] == 4 * total
    assert memory["input images"] == 64 * 28 * 28 * 4
    assert memory["total"] == sum(memory.values()) - memory["total"]


def test_activations_of_model1_counted_by_hand() -> None:
    # Each ReLU's output, which is also the next layer's input; max-pool's output and its int64 indices;
    # the transition's output. The last convolution's output is kept by nobody.
    floats = 8 * 26**2 + 16 * 24**2 + 24 * 22**2 + 24 * 11**2 + 8 * 11**2 + 16 * 9**2 + 24 * 7**2 + 10 * 7**2
    activations = analyze(build_model("Model1"), (28, 28), batch_size=3).memory["activations kept for backward"]
    assert activations == 3 * (4 * floats + 8 * 24 * 11**2)


def test_geometry_on_both_axes() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, (3, 5), stride=(1, 2), padding=(1, 2), dilation=(2, 1)),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 2, 3, padding="same", dilation=2),
        nn.AdaptiveMaxPool2d((3, 4)),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    layers = analyze(model, (26, 32), batch_size=2).layers
    height, width = zip(*(layer.axes for layer in layers), strict=True)
    assert height == (
        Axis(3, 1, 1, 2, 26, 24, 1, 1, 1, 5, 0, 1),
        Axis(2, 2, 0, 1, 24, 12, 1, 2, 5, 6, 1, 1),
        Axis(3, 1, 2, 2, 12, 12, 2, 2, 6, 14, 1, 5),
        Axis(4, 4, 0, 1, 12, 3, 2, 8, 14, 20, 5, 5),
        Axis(1, 1, 0, 1, 3, 3, 8, 8, 20, 20, 5, 5),
        Axis(3, 3, 0, 1, 3, 1, 8, 24, 20, 36, 5, 5),
    )
    assert width == (
        Axis(5, 2, 2, 1, 32, 16, 1, 2, 1, 5, 0, 2),
        Axis(2, 2, 0, 1, 16, 8, 2, 4, 5, 7, 2, 2),
        Axis(3, 1, 2, 2, 8, 8, 4, 4, 7, 23, 2, 10),
        Axis(2, 2, 0, 1, 8, 4, 4, 8, 23, 27, 10, 10),
        Axis(1, 1, 0, 1, 4, 4, 8, 8, 27, 27, 10, 10),
        Axis(4, 4, 0, 1, 4, 1, 8, 32, 27, 51, 10, 10),
    )


def test_receptive_field_is_what_the_model_sees() -> None:
    model = build_model("Model5").double().eval()
    corner = nn.Sequential(model.input_block, model.conv_block1, model.transition_block, model.conv_block2)
    seen = torch.zeros(28, 28, dtype=torch.bool)
    for pixel in range(28 * 28):
        image = torch.zeros(1, 1, 28, 28, dtype=torch.float64)
        image.view(-1)[pixel] = torch.nan
        seen.view(-1)[pixel] = corner(image)[0, :, 0, 0].isnan().any()
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[:16, :16] = True  # RF 16 after conv_block2, and the first unit starts at the image's corner
    assert seen.equal(expected)


def test_what_cannot_be_followed_is_not_guessed() -> None:
    analysis = analyze(Functional(), (28, 28), batch_size=2)
    assert [layer.axes is None for layer in analysis.layers] == [False, True]
    assert analysis.parameters - sum(layer.parameters for layer in analysis.layers) == 30  # never called


def test_shared_parameters_count_once() -> None:
    shared = nn.Conv2d(4, 4, 3, bias=False)
    analysis = analyze(nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), shared, shared), (28, 28), batch_size=2)
    assert [layer.parameters for layer in analysis.layers] == [36, 144, 0]
    assert analysis.parameters == 180
    assert analysis.layers[-1].axes[0].r_out == 7


def test_the_model_comes_back_unchanged() -> None:
    model = build_model("Model5").train()
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    analyze(model, (28, 28), batch_size=4)
    assert torch.get_rng_state().equal(random_state)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.equal(before[key]) for key, tensor in model.state_dict().items())


def test_report() -> None:
    result = run("analyze_model.py", "--model", "model1", "--batch-size", "3")
    assert result.returncode == 0, result.stderr
    assert result.stdout.isascii()
    assert max(map(len, result.stdout.splitlines())) <= 120
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "(conv_block2): Sequential(" in lines
    assert "conv_block1.2 Conv2d 24x22x22 3,456" in lines
    assert "total 14,620" in lines
    assert "layer type k s p d n_in n_out j_in j_out r_in r_out P_in P_out RF" in lines
    assert "output_block.2 Conv2d 7 1 0 1 7 1 2 2 16 28 0 0 28x28" in lines
    assert "momentum 58,480 bytes 0.06 MiB" in lines


def test_images_too_small_are_one_line() -> None:
    result = run("analyze_model.py", "--input-size", "8", "8")
    assert_one_line(result, "conv_block2.0", "8x8", "--input-size")

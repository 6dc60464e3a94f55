"""Print a model's architecture, its layers, their receptive fields, and the memory that training takes.

    python analyze_model.py                      # Model5 on MNIST's 28x28 images
    python analyze_model.py --model Model1 --input-size 32 32 --batch-size 128

From the first command's output, with torch 2.15.0:

    layer               type               k  s  p  d  n_in  n_out  j_in  j_out  r_in  r_out  P_in  P_out     RF
    input_block.0       Conv2d             3  1  0  1    28     26     1      1     1      3     0      0    3x3
    ...
    output_block.0      AdaptiveAvgPool2d  7  7  0  1     7      1     2     14    16     28     0      0  28x28
"""

import argparse
import copy
from collections import namedtuple
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from download_mnist import ScriptError, run_script
from models import build_model, find_model_name, model_classes
from train_test_mnist import number_type

LEGEND = """\
k s p d      kernel, stride, padding, dilation
n_in n_out   feature-map size
j_in j_out   jump: the cumulative stride, in input pixels
r_in r_out   receptive field of one unit before and after the layer, in input pixels
P_in P_out   accumulated padding: pixels by which the first unit's receptive field passes the image's edge
RF           receptive field after the layer, height x width"""

# Layers that leave receptive fields as they are: in evaluation mode a unit sees what the unit before it sees
POINTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.Tanh),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity),
)


# One layer along one axis, height or width; LEGEND explains the names
Axis = namedtuple("Axis", "k s p d n_in n_out j_in j_out r_in r_out P_in P_out")


class Layer(NamedTuple):
    """A layer that the forward pass calls."""

    name: str
    type: type[nn.Module]
    output_shape: tuple[int, ...]  # of one image
    parameters: int  # without those an earlier layer shares
    axes: tuple[Axis, Axis] | None  # height and width; None where the receptive field cannot be followed


class Analysis(NamedTuple):
    """What `analyze` finds."""

    architecture: str
    layers: list[Layer]
    parameters: int
    memory: dict[str, int]  # bytes of each part, for one training step


def analyze(model: nn.Module, input_size: tuple[int, int], batch_size: int) -> Analysis:
    """Analyze a model on grey images of input_size (height, width); the model itself stays as it is.

    Raises ValueError, naming the layer, where the model cannot take such images.
    """
    model = copy.deepcopy(model)
    images = torch.zeros(batch_size, 1, *input_size)
    with torch.random.fork_rng(devices=[]):
        layers = trace_layers(model.eval(), images[:1])
        activations = bytes_kept_for_backward(model.train(), images)
    trainable = total_bytes(parameter for parameter in model.parameters() if parameter.requires_grad)
    memory = {
        "parameters": total_bytes(model.parameters()),
        "gradients": trainable,
        "momentum": trainable,
        "buffers": total_bytes(model.buffers()),
        "input images": total_bytes([images]),
        "activations kept for backward": activations,
    }
    memory["total"] = sum(memory.values())
    return Analysis(str(model), layers, sum(parameter.numel() for parameter in model.parameters()), memory)


def trace_layers(model: nn.Module, image: Tensor) -> list[Layer]:
    """Run the model on one image (1, 1, H, W) and describe each layer it calls, in that order.

    Receptive fields are followed for as long as every layer reads exactly what the layer before it wrote.
    """
    layers: list[Layer] = []
    counted: set[nn.Parameter] = set()
    axes = tuple(Axis(1, 1, 0, 1, size, size, 1, 1, 1, 1, 0, 0) for size in image.shape[2:])
    previous, running = image, ""

    def enter(name: str, layer: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal running
        running = name

    def leave(name: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal axes, previous
        axes = next_axes(axes, layer, output) if axes and inputs[0] is previous else None
        previous = output
        new = set(layer.parameters(recurse=False)) - counted
        counted.update(new)
        parameters = sum(parameter.numel() for parameter in new)
        layers.append(Layer(name, type(layer), tuple(output.shape[1:]), parameters, axes))

    hooks = []
    for name, module in model.named_modules():
        if not list(module.children()) or list(module.parameters(recurse=False)):  # not just a container
            hooks.append(module.register_forward_pre_hook(partial(enter, name)))
            hooks.append(module.register_forward_hook(partial(leave, name)))
    try:
        with torch.no_grad():
            model(image)
    except RuntimeError as error:
        size = format_shape(image.shape[2:])
        raise ValueError(f"{running} fails on images of {size}: {str(error).splitlines()[0]}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return layers


def next_axes(axes: tuple[Axis, Axis], layer: nn.Module, output: Tensor) -> tuple[Axis, Axis] | None:
    """Return height and width after one more layer, or None where its receptive field is not known."""
    n_in = [axis.n_out for axis in axes]
    n_out = output.shape[2:] if output.dim() == 4 else n_in
    k, s, p, d = (1, 1), (1, 1), (0, 0), (1, 1)
    if isinstance(layer, nn.Conv2d | nn.MaxPool2d | nn.AvgPool2d):
        k, s, d = pair(layer.kernel_size), pair(layer.stride), pair(getattr(layer, "dilation", 1))
        if layer.padding == "same":
            p = (d[0] * (k[0] - 1) // 2, d[1] * (k[1] - 1) // 2)
        elif layer.padding != "valid":
            p = pair(layer.padding)
    elif isinstance(layer, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        if n_in[0] % n_out[0] or n_in[1] % n_out[1]:
            return None  # its windows differ in size
        k = s = (n_in[0] // n_out[0], n_in[1] // n_out[1])
    elif isinstance(layer, nn.Linear) and output.dim() == 2:  # after Flatten: each output sees the whole map
        k, s, n_out = n_in, n_in, (1, 1)
    elif not isinstance(layer, POINTWISE):
        return None
    return tuple(map(next_axis, axes, k, s, p, d, n_out))


def next_axis(before: Axis, k: int, s: int, p: int, d: int, n_out: int) -> Axis:
    """Carry jump, receptive field and accumulated padding across one more layer.

    The recurrences are those of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural
    Networks", Distill 2019.
    """
    n_in, j, r, padding = before.n_out, before.j_out, before.r_out, before.P_out
    return Axis(k, s, p, d, n_in, n_out, j, j * s, r, r + d * (k - 1) * j, padding, padding + p * j)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    """Return a layer's setting as (height, width)."""
    return value if isinstance(value, tuple) else (value, value)


def bytes_kept_for_backward(model: nn.Module, images: Tensor) -> int:
    """Return the bytes autograd keeps between forward and backward, beyond images, parameters and buffers."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    for tensor in (images, *model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in kept.values())


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all elements."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def format_table(rows: list[list[str]], text_columns: int) -> str:
    """Align the rows: the first columns, which hold text, to the left and the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if column < text_columns else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def print_report(analysis: Analysis) -> None:
    """Print every section."""
    print(f"Architecture\n{analysis.architecture}")

    rows = [["layer", "type", "output", "parameters"]]
    for layer in analysis.layers:
        rows.append([layer.name, layer.type.__name__, format_shape(layer.output_shape), f"{layer.parameters:,}"])
    uncalled = analysis.parameters - sum(layer.parameters for layer in analysis.layers)
    if uncalled:
        rows.append(["never called", "", "", f"{uncalled:,}"])
    rows.append(["total", "", "", f"{analysis.parameters:,}"])
    print(f"\nLayers, with the shape of one image after each\n{format_table(rows, text_columns=3)}")

    rows = [["layer", "type", *Axis._fields, "RF"]]
    folded = set()
    for layer in analysis.layers:
        if layer.axes is None:
            rows.append([layer.name, layer.type.__name__, *"?" * 13])
        elif issubclass(layer.type, POINTWISE):
            folded.add(layer.type.__name__)
        else:
            height, width = layer.axes
            cells = [str(h) if h == w else f"{h}x{w}" for h, w in zip(height, width, strict=True)]
            rows.append([layer.name, layer.type.__name__, *cells, f"{height.r_out}x{width.r_out}"])
    print(f"\nReceptive fields\n{format_table(rows, text_columns=2)}\n{LEGEND}")
    if folded:
        print(f"Left out, for they change none of these: {', '.join(sorted(folded))}.")
    if None in [layer.axes for layer in analysis.layers]:
        print("?            not known: the layer, or what runs before it outside any layer, cannot be followed")

    rows = [[part, f"{size:,} bytes", f"{size / 2**20:.2f} MiB"] for part, size in analysis.memory.items()]
    print(f"\nMemory of a training step (SGD with momentum)\n{format_table(rows, text_columns=1)}")


def format_shape(shape: tuple[int, ...]) -> str:
    """Return 8x26x26 for (8, 26, 26)."""
    return "x".join(map(str, shape))


def main() -> None:
    """Print the report, section by section."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, number_type(int, 1, 10**9)
    models = list(model_classes())
    add("--model", default="Model5", type=find_model_name, choices=models, help="class (default: %(default)s)")
    add("--input-size", default=(28, 28), type=count, nargs=2, metavar=("H", "W"), help="pixels (default: 28 28)")
    add("--batch-size", default=64, type=count, help="images in a training step (default: %(default)s)")
    args = parser.parse_args()
    try:
        analysis = analyze(build_model(args.model), tuple(args.input_size), args.batch_size)
    except (ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ScriptError(f"{args.model}: {reason}; try another --input-size or --batch-size") from error

    print_report(analysis)


if __name__ == "__main__":
    run_script(main)

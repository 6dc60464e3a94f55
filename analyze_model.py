"""Print a model's layers, operations, receptive fields and memory, each number checked on the running model.

    python analyze_model.py                                # Model5 on MNIST's 28x28 images
    python analyze_model.py --model all --batch-size 128   # every class of models.py, then a comparison
    python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth --image fields.png

From the first command's output, with torch 2.15.0:

    layer               type               k  s  p  d  n_in  n_out  j_in  j_out  r_in  r_out  P_in  P_out     RF
    input_block.0       Conv2d             3  1  0  1    28     26     1      1     1      3     0      0    3x3
    ...
    output_block.0      AdaptiveAvgPool2d  7  7  0  1     7      1     2     14    16     28     0      0  28x28

How it works: the model runs once in training mode, and every torch function it calls on what comes from the images
is recorded. From the functions' arguments follow shapes, operations and receptive fields; the autograd graph tells
what is kept for the backward pass. Then the model runs again, in other ways, to check these numbers.
"""

import argparse
import copy
import dataclasses
import io
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.overrides import TorchFunctionMode

from checkpoints import load_checkpoint
from models import build_model, default_model_name, find_model_name, model_classes
from utils import ScriptError, default_batch_size, device_type, number_type, run_script, write_file

try:
    from torch.utils.flop_counter import FlopCounterMode
except ImportError:  # before torch 2.1
    FlopCounterMode = None

LAYERS_LEGEND = """\
weight bias total  parameters; those that several layers share count for the first
buffers            numbers that are stored but not trained
MACs               multiply-accumulates of convolutions and matrix products, per image
kept               bytes kept for the backward pass of a batch; what several layers keep counts for the first"""
FIELDS_LEGEND = """\
k s p d      kernel, stride, padding, dilation; - where branches meet
n_in n_out   feature-map size
j_in j_out   jump: the cumulative stride, in input pixels; 0 where every unit sees the same pixels
r_in r_out   receptive field of one unit before and after the layer, in input pixels
P_in P_out   accumulated padding: pixels by which the first unit's receptive field passes the image's edge
RF           receptive field after the layer, height x width"""

COLUMNS = ("k", "s", "p", "d", "n_in", "n_out", "j_in", "j_out", "r_in", "r_out", "P_in", "P_out")
Axis = dataclasses.make_dataclass("Axis", COLUMNS, frozen=True)  # one layer along height or width; see FIELDS_LEGEND
Setting = int | tuple[int, int]  # for both axes, or for height and width


@dataclasses.dataclass
class Layer:
    """A line of the tree: a block, a layer, or a function that a block calls outside any layer."""

    name: str
    depth: int
    type: str
    is_block: bool = False
    output_shape: tuple[int, ...] | None = None  # of one image; None where no output came
    weight: int = 0
    bias: int = 0
    parameters: int = 0
    share: float = 0.0  # per cent of the model's parameters
    buffers: int = 0
    macs: int | None = 0  # per image; None where not known
    kept: int = 0  # bytes, for the batch
    fields: list[dict[str, Axis]] = dataclasses.field(default_factory=list)  # height and width, if it changes them
    unknown: str | None = None  # why the receptive field is not known


@dataclasses.dataclass
class Memory:
    """Bytes that one part takes in a training step and in inference."""

    part: str
    meaning: str
    training: int
    inference: int


@dataclasses.dataclass
class Check:
    """The verdict of one self-check; passed is None where it could not be made."""

    name: str
    passed: bool | None
    finding: str


@dataclasses.dataclass
class Analysis:
    """What `analyze` finds."""

    architecture: str
    input_size: tuple[int, int]
    batch_size: int
    device: str
    layers: list[Layer]
    totals: dict[str, int | None]
    memory: list[Memory]
    measured_peak: int | None  # bytes that a CUDA device held at most during one training step
    checks: list[Check]
    failure: str | None  # why forward does not take the images; the layers then end where it failed
    checkpoint: dict[str, int | float] | None = None  # epoch and accuracies that came with the weights

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        failed = [f"{check.name}: {check.finding}" for check in self.checks if check.passed is False]
        return [self.failure] if self.failure else failed


class View(NamedTuple):
    """What the units of a feature map see along one axis."""

    axis: Axis  # unit i sees pixels i * j_out - P_out to i * j_out - P_out + r_out - 1 ...
    seen: Tensor  # (n_out, image size), bool: ... of which these remain without padding and dilation's gaps


@dataclasses.dataclass(eq=False)
class Call:
    """One call of a torch function on something that comes from the images."""

    layer: Layer
    function: str
    args: tuple
    kwargs: dict
    outputs: list[Tensor]
    nodes: list  # ends of the autograd graph just after the call
    hooked: list[Tensor]  # what autograd passed to its hooks
    flops: int  # by torch's counter
    views: tuple[View, View] | None = None  # height and width after it, where they are known
    kept: int = 0  # bytes


class CannotFollowError(Exception):
    """Says why receptive fields are not known after a call."""


def analyze(model: nn.Module, input_size: tuple[int, int], batch_size: int, verify: bool = True) -> Analysis:
    """Analyze a model on grey images (batch_size, 1, *input_size) on the model's device; the model stays as it is.

    Images that the model does not take are no error: then `failure` says why. Raises RuntimeError where an in-place
    function destroys what autograd has kept, for then the model cannot be trained. Without `verify` no check is made.
    """
    model = copy.deepcopy(model).train()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    images = torch.zeros(batch_size, 1, *input_size, device=device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        run = Recorder(model, images)
        follow_receptive_fields(run, images)
        visited: set = set()
        saved = [[*saved_tensors(call.nodes, visited)] for call in run.calls]
        for call, size in zip(run.calls, count_bytes(saved, apart_from=[images, model]), strict=True):
            call.kept = size
            call.layer.kept += size
            call.layer.macs = add_known([call.layer.macs, count_macs(call, batch_size)])
        checks = run_checks(model, images, run) if verify and not run.failure else []
        peak = measure_training_step(model, images) if device.type == "cuda" and not run.failure else None

    failure = run.failure and run.failure + smallest_input(model, input_size)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    totals = {
        "weight": sum(layer.weight for layer in run.layers),
        "bias": sum(layer.bias for layer in run.layers),
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trainable in counts if trainable),
        "frozen": sum(count for count, trainable in counts if not trainable),
        "shared": sum(parameter.numel() for parameter in run.shared),
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
        "macs": add_known([layer.macs for layer in run.layers]),
        "kept": sum(layer.kept for layer in run.layers),
    }
    for layer in run.layers:
        layer.share = round(100 * layer.parameters / max(totals["parameters"], 1), 2)
    memory = add_up_memory(model, images, run.calls)
    where = input_size, batch_size, str(device)
    return Analysis(str(model), *where, run.layers, totals, memory, peak, checks, failure)


class Recorder(TorchFunctionMode):
    """Runs a model, and records its layers and its calls of torch functions on what comes from the images."""

    def __init__(self, model: nn.Module, images: Tensor, counter: object = None, hook: bool = False) -> None:
        super().__init__()
        self.layers: list[Layer] = []
        self.calls: list[Call] = []
        self.failure: str | None = None
        self.shared: set[nn.Parameter] = set()  # in several layers, or in one that is called several times
        self.derived = {id(images): images}  # what comes from the images; held, so that no id is used twice
        self.described: set[Tensor] = set()
        self.running: list[tuple[Layer, nn.Module]] = []
        self.function = ""
        self.counter, self.hooked = counter, []
        modules = dict(model.named_modules())
        handles = [module.register_forward_pre_hook(partial(self.enter, name)) for name, module in modules.items()]
        handles += [module.register_forward_hook(self.leave) for module in modules.values()]
        hooks = saved_tensors_hooks(lambda tensor: self.hooked.append(tensor) or tensor, lambda tensor: tensor)
        try:
            with counter or nullcontext(), hooks if hook else nullcontext(), self:
                model(images)
            called = {layer.name for layer in self.layers}
            for name, module in modules.items():
                if name and name not in called and (is_layer(module) or list(module.parameters(recurse=False))):
                    self.layers.append(self.describe(name, module, depth=1))
        except Exception as error:  # whatever a user's forward raises
            layer, module = self.running[-1]
            where = layer.name if is_layer(module) or not self.function else f"{self.function}() in {layer.name}"
            reason = (str(error) or type(error).__name__).splitlines()[0]
            self.failure = f"{where} fails on {len(images)} images of {format_shape(images.shape[2:])}: {reason}"
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str, module: nn.Module, inputs: tuple) -> None:
        """Add a line to the tree for a module that starts to run; what it is given counts as coming from the images."""
        layer = self.describe(name or type(module).__name__, module, depth=len(self.running))
        self.layers.append(layer)
        self.running.append((layer, module))
        self.derived.update((id(tensor), tensor) for tensor in tensors_in(inputs))

    def leave(self, module: nn.Module, inputs: tuple, output: object) -> None:
        """Note what a module returns; that, too, counts as coming from the images."""
        layer, _ = self.running.pop()
        for tensor in tensors_in(output):
            layer.output_shape = tuple(tensor.shape[1:])
            self.derived[id(tensor)] = tensor

    def describe(self, name: str, module: nn.Module, depth: int) -> Layer:
        """Return a module's line of the tree, with the parameters and buffers that no line before it has."""
        layer = Layer(name, depth, type(module).__name__, is_block=not is_layer(module))
        for key, parameter in module.named_parameters(recurse=False):
            if parameter in self.described:
                self.shared.add(parameter)
            elif "bias" in key:
                layer.bias += parameter.numel()
            else:
                layer.weight += parameter.numel()
            self.described.add(parameter)
        layer.parameters = layer.weight + layer.bias
        buffers = set(module.buffers(recurse=False)) - self.described
        layer.buffers = sum(buffer.numel() for buffer in buffers)
        self.described |= buffers
        return layer

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        """Make the call; record it where it computes something from the images."""
        kwargs = kwargs or {}
        if not any(id(tensor) in self.derived for tensor in tensors_in((args, kwargs))):
            return func(*args, **kwargs)
        self.function = func.__name__.strip("_").removesuffix("_with_indices")  # relu for relu_, too
        flops = self.counter and self.counter.get_total_flops()
        output = func(*args, **kwargs)
        outputs = list(tensors_in(output))
        if outputs:
            layer, module = self.running[-1]
            if not is_layer(module):
                name = f"{layer.name}.{self.function}()" if layer.depth else f"{self.function}()"
                layer = Layer(name, len(self.running), "function", output_shape=tuple(outputs[0].shape[1:]))
                self.layers.append(layer)
            self.derived.update((id(tensor), tensor) for tensor in outputs)
            nodes = [tensor.grad_fn for tensor in outputs]
            flops = self.counter and self.counter.get_total_flops() - flops
            self.calls.append(Call(layer, self.function, args, kwargs, outputs, nodes, self.hooked, flops))
            self.hooked = []
        self.function = ""
        return output


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own without parts, so that the functions it calls are its own."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield a tensor itself, a module's parameters and buffers, or what lists, tuples and dicts hold of these."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item)


# Receptive fields: from call to call, along height and width


def follow_receptive_fields(run: Recorder, images: Tensor) -> None:
    """Fill in what the units see after each call, and the layers' fields; None, and why, where that is not known."""
    start = tuple(View(Axis(1, 1, 0, 1, n, n, 1, 1, 1, 1, 0, 0), torch.eye(n) > 0) for n in images.shape[2:])
    known: dict[int, tuple[View, View] | None] = {id(images): start}
    for call in run.calls:
        sources = dict.fromkeys(id(tensor) for tensor in tensors_in((call.args, call.kwargs)))
        inputs = [known.get(source) for source in sources if source in run.derived]
        try:
            require(None not in inputs, "what comes in is not known")
            call.views = next_views(call, inputs, len(images))
            if call.views[0] is not inputs[0][0]:
                call.layer.fields.append({"height": call.views[0].axis, "width": call.views[1].axis})
        except CannotFollowError as reason:
            if call.function not in POINTWISE or None not in inputs:
                call.layer.unknown = call.layer.unknown or str(reason)
        known.update((id(tensor), call.views) for tensor in call.outputs)


def next_views(call: Call, inputs: list[tuple[View, View]], batch_size: int) -> tuple[View, View]:
    """Return height and width after a call from those of its inputs; raises CannotFollowError."""
    function, first = call.function, next(tensors_in((call.args, call.kwargs)))
    sizes = [tuple(view.axis.n_out for view in views) for views in inputs]
    require(function in POINTWISE or function in RULES, f"{function}() is not followed")
    require(len(inputs) == 1 or function in MEETING, f"{function}() of several branches is not followed")
    require(function != "cat" or len(set(sizes)) == 1, "branches of different sizes are joined")
    try:
        windows = RULES[function](sizes[0], *call.args, **call.kwargs) if function in RULES else None
    except TypeError:
        raise CannotFollowError(f"{function}() is not followed with these arguments") from None
    if windows:
        require(first.dim() == 4 or function in ("linear", "group_norm"), "the maps are not 4-dimensional")
        return tuple(slide(view, *window) for view, window in zip(inputs[0], windows, strict=True))
    after = tuple(reduce(meet, views) for views in zip(*inputs, strict=True))
    whole_maps = len(call.outputs[0]) == batch_size and fits(call.outputs[0], after)
    require(whole_maps, f"{function}() rearranges the map")
    return after


def slide(view: View, k: int, s: int, p: int, d: int, n: int) -> View:
    """Carry jump, receptive field and accumulated padding across a window that stops at n places.

    The recurrences are those of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural
    Networks", Distill 2019. A window that does not move (s = 0) leaves a jump of 0.
    """
    n_in, j, r, padding = view.axis.n_out, view.axis.j_out, view.axis.r_out, view.axis.P_out
    taps = torch.arange(n)[:, None] * s - p + torch.arange(k) * d  # (n, k): the units that the window reads
    real = (taps >= 0) & (taps < n_in)  # the others are padding
    seen = (view.seen[taps.clamp(0, n_in - 1)] & real[..., None]).any(1)
    return View(Axis(k, s, p, d, n_in, n, j, j * s, r, r + d * (k - 1) * j, padding, padding + p * j), seen)


def meet(one: View, other: View) -> View:
    """Combine two branches: a unit sees what either sees; a map of one unit meets every unit of the other."""
    n = max(one.axis.n_out, other.axis.n_out)
    one, other = (view if view.axis.n_out == n else slide(view, k=1, s=0, p=0, d=1, n=n) for view in (one, other))
    seen, a, b = one.seen | other.seen, one.axis, other.axis
    same_for_all = bool((seen == seen[0]).all())
    require(a.j_out == b.j_out or same_for_all, f"branches with jumps {a.j_out} and {b.j_out} meet")
    j = a.j_out if a.j_out == b.j_out else 0
    start = min(-a.P_out, -b.P_out)
    end = max(axis.r_out - axis.P_out + (n - 1) * (axis.j_out - j) for axis in (a, b))
    return View(Axis(None, None, None, None, a.n_out, n, a.j_out, j, a.r_out, end - start, a.P_out, -start), seen)


def fits(output: Tensor, views: tuple[View, View]) -> bool:
    """Tell whether an output (N, C, H, W), or one flattened from that, has as many units as the views."""
    size = tuple(view.axis.n_out for view in views)
    return output.shape[2:] == size if output.dim() == 4 else output[0].numel() % (size[0] * size[1]) == 0


def require(condition: bool, otherwise: str) -> None:
    """Raise CannotFollowError, with the reason, unless the condition holds."""
    if not condition:
        raise CannotFollowError(otherwise)


def sliding(
    sizes: tuple, kernel_size: Setting, stride: Setting, padding: Setting | str, dilation: Setting, ceil: bool = False
) -> list[tuple]:
    """Return the windows (k, s, p, d, n_out) of a convolution or a pooling, along height and width."""
    windows = []
    for size, k, s, p, d in zip(sizes, *map(both, (kernel_size, stride, padding, dilation)), strict=True):
        reach = d * (k - 1)
        before, after = {"valid": (0, 0), "same": (reach // 2, reach - reach // 2)}.get(p, (p, p))
        span = size + before + after - reach - 1
        n = span // s + 1
        if ceil and span % s and n * s < size + before:  # one more, unless it would start in the padding
            n += 1
        windows.append((k, s, before, d, n))
    return windows


def adaptive(sizes: tuple, output_size: Setting) -> list[tuple]:
    """Return the windows of adaptive pooling."""
    sizes = [(size, size if n is None else n) for size, n in zip(sizes, both(output_size), strict=True)]
    require(all(size % n == 0 for size, n in sizes), "its windows vary in size")
    return [(size // n, size // n, 0, 1, n) for size, n in sizes]


def average(sizes: tuple, x: Tensor, dim: Setting | None = None, keepdim: bool = False) -> list[tuple]:
    """Return the windows of a mean."""
    dims = {axis % x.dim() for axis in ((dim,) if isinstance(dim, int) else dim or ())}
    require(x.dim() == 4 and dims == {2, 3}, "it is no mean over both height and width")
    return whole(sizes)


def whole(sizes: tuple) -> list[tuple]:
    """Return the windows of a layer with a single output unit, which sees the whole map."""
    return [(n, n, 0, 1, 1) for n in sizes]


def along_channels(sizes: tuple, x: Tensor, dim: int) -> None:
    """Accept a function that works along the channels and on nothing else."""
    require(dim % x.dim() == 1 and (x.dim() == 4 or sizes == (1, 1)), "it mixes the units of a map")


def both(setting: Setting) -> tuple:
    """Return a setting as (height, width)."""
    return tuple(setting) * (2 // len(setting)) if isinstance(setting, list | tuple) else (setting, setting)


# What torch functions do to a map. Each rule takes the map's size and the function's arguments, and returns windows
# (k, s, p, d, n_out) along height and width, or None where every unit goes on seeing what it saw.
RULES: dict[str, Callable[..., list[tuple] | None]] = {
    "conv2d": lambda n, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1: sliding(
        n, tuple(weight.shape[2:]), stride, padding, dilation
    ),
    "max_pool2d": lambda n, x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, **_: sliding(
        n, kernel_size, stride or kernel_size, padding, dilation, ceil_mode
    ),
    "avg_pool2d": lambda n, x, kernel_size, stride=None, padding=0, ceil_mode=False, *_, **__: sliding(
        n, kernel_size, stride or kernel_size, padding, 1, ceil_mode
    ),
    "adaptive_avg_pool2d": lambda n, x, output_size: adaptive(n, output_size),
    "adaptive_max_pool2d": lambda n, x, output_size, **_: adaptive(n, output_size),
    "mean": average,
    "linear": lambda n, x, *_, **__: require(x.dim() == 2, "it mixes the columns of a map") or whole(n),
    "group_norm": lambda n, *_, **__: [(size, 0, 0, 1, size) for size in n],  # its statistics are of the whole map
    "batch_norm": lambda n, x, mean, *_, **__: require(mean is not None, "it mixes the images of a batch"),
    "softmax": lambda n, x, dim, **_: along_channels(n, x, dim),
    "log_softmax": lambda n, x, dim, **_: along_channels(n, x, dim),
    "cat": lambda n, tensors, dim=0: require(dim % tensors[0].dim() == 1, "it joins maps side by side"),
}
MEETING = {"add", "sub", "mul", "div", "maximum", "minimum", "cat"}  # may join branches
POINTWISE = {  # with these, every unit goes on seeing what it saw
    *MEETING,
    *("batch_norm", "softmax", "log_softmax", "dropout", "dropout2d", "alpha_dropout"),
    *("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "hardtanh", "hardswish"),
    *("hardsigmoid", "sigmoid", "tanh", "softplus", "clamp", "abs", "neg", "exp", "log", "sqrt", "pow"),
    *("flatten", "view", "reshape", "squeeze", "unsqueeze", "contiguous", "clone", "detach", "to", "float", "double"),
}


# Operations and memory


def count_macs(call: Call, batch_size: int) -> int | None:
    """Return a call's multiply-accumulates per image: every output is a sum over the weights of one filter."""
    if call.function in ("conv2d", "linear"):
        _, weight, *_ = tensors_in((call.args, call.kwargs))
        return call.outputs[0].numel() // batch_size * weight[0].numel()
    return 0 if call.function in POINTWISE or call.function in RULES else None


def add_known(numbers: list[int | None]) -> int | None:
    """Return the sum, None where a number is not known."""
    return None if None in numbers else sum(numbers)


def saved_tensors(nodes: list, visited: set) -> Iterator[Tensor]:
    """Yield what nodes of the autograd graph, and the ones before them not yet visited, hold for the backward pass."""
    nodes = list(nodes)
    while nodes:
        node = nodes.pop()
        if node is not None and node not in visited:
            visited.add(node)
            nodes += [before for before, _ in node.next_functions]
            for name in dir(node):
                if name.startswith("_saved_") or name == "saved_tensors":
                    yield from tensors_in(getattr(node, name))


def count_bytes(groups: Iterable[list[Tensor]], apart_from: list) -> list[int]:
    """Return the bytes in memory of each group of tensors, single numbers not counted.

    Memory that several groups share counts for the first, and that of the tensors in apart_from for none.
    """
    seen = {tensor.untyped_storage().data_ptr() for tensor in tensors_in(apart_from)}
    totals = []
    for group in groups:
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in group if tensor.dim()}
        totals.append(sum(storage.nbytes() for address, storage in storages.items() if address not in seen))
        seen.update(storages)
    return totals


def add_up_memory(model: nn.Module, images: Tensor, calls: list[Call]) -> list[Memory]:
    """Return the parts of a training step with SGD and momentum, and of inference, and their sum."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [list(model.parameters()), trained, list(model.buffers()), [images]]
    parameters, trainable, buffers, pixels = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    inputs_and_outputs = [[*tensors_in((call.args, call.kwargs)), *call.outputs] for call in calls]
    largest = max((count_bytes([group], [images, model])[0] for group in inputs_and_outputs), default=0)
    memory = [
        Memory("parameters", "weights and biases", parameters, parameters),
        Memory("gradients", "one for each trainable parameter", trainable, 0),
        Memory("momentum", "SGD's running sum of gradients", trainable, 0),
        Memory("buffers", "stored but not trained", buffers, buffers),
        Memory("input and target", "images, and in training int64 labels", pixels + 8 * len(images), pixels),
        Memory("activations kept for backward", "the layers' column `kept`", sum(call.kept for call in calls), 0),
        Memory("activations at work", "input and output of the largest layer", 0, largest),
    ]
    return [*memory, Memory("sum", "", sum(part.training for part in memory), sum(part.inference for part in memory))]


def measure_training_step(model: nn.Module, images: Tensor) -> int:
    """Return the most bytes that a CUDA device holds for a training step, the second one: it has momentum."""
    own = sum(tensor.untyped_storage().nbytes() for tensor in tensors_in([images, model]))
    others = torch.cuda.memory_allocated(images.device) - own
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats(images.device)
        optimizer.zero_grad()
        labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated(images.device) - others


# Self-checks


def run_checks(model: nn.Module, images: Tensor, run: Recorder) -> list[Check]:
    """Compare what was computed with what the model does when it runs again; fill in MACs that have no formula."""
    functions = [call.function for call in run.calls]
    hooked_run = Recorder(model, images, hook=True)
    if [call.function for call in hooked_run.calls] != functions:
        return [Check("repetition", False, "forward does not call the same functions every time")]
    height, width = images.shape[2:]
    counter = FlopCounterMode(display=False) if FlopCounterMode else None
    flops, all_flops, blind = dict.fromkeys(map(id, run.layers), 0), 0, []
    evaluated = copy.deepcopy(model).cpu().double().eval()  # in float64 no faster algorithm spreads a NaN
    for probes in torch.arange(height + width).split(64):
        with torch.no_grad():
            again = Recorder(evaluated, nan_images(height, width)[probes], counter)
        if again.failure or [call.function for call in again.calls] != functions:
            return [Check("evaluation mode", False, again.failure or "forward does not call what it calls in training")]
        all_flops += counter.get_total_flops() if counter else 0
        for call, repeated in zip(run.calls, again.calls, strict=True):
            flops[id(call.layer)] += repeated.flops or 0
            if call.views and not sees_what_is_computed(repeated.outputs[0], call.views, probes):
                blind.append(call.layer.name)
    counted = {name: count // (height + width) for name, count in flops.items()}
    wrong_macs = [] if all_flops == sum(flops.values()) else ["functions of no image"]
    for layer in run.layers if counter else []:
        layer.macs = counted[id(layer)] // 2 if layer.macs is None else layer.macs
        wrong_macs += [layer.name] if 2 * layer.macs != counted[id(layer)] else []

    hooked = count_bytes((call.hooked for call in hooked_run.calls), [images, model])
    misjudged = [call.layer.name for call, size in zip(run.calls, hooked, strict=True) if call.kept != size]
    followed = [call for call in run.calls if call.views]
    misshapen = [call.layer.name for call in followed if not fits(call.outputs[0], call.views)]
    listed = sum(layer.parameters for layer in run.layers)
    uncounted = ["the total"] if listed != sum(parameter.numel() for parameter in model.parameters()) else []
    scope = f"{len(followed)} of {len(run.calls)} feature maps"
    return [
        verdict("shapes", misshapen, f"{scope} are followed, and have the computed size"),
        verdict("parameters", uncounted, f"those of the layers add up to the model's {listed:,}"),
        verdict("MACs", wrong_macs, "twice as many are the operations that torch's FLOP counter counts")
        if counter
        else Check("MACs", None, "torch has its FLOP counter since version 2.1"),
        verdict(
            "receptive field", blind, f"in {scope} a NaN in a row or column of pixels reaches the computed units only"
        ),
        verdict("kept for backward", misjudged, f"autograd's hooks report the same {sum(hooked):,} bytes"),
    ]


def nan_images(height: int, width: int) -> Tensor:
    """Return an image for each row of pixels, then one for each column (H + W, 1, H, W), with NaN there."""
    images = torch.zeros(height + width, 1, height, width, dtype=torch.float64)
    images[range(height), 0, range(height)] = torch.nan
    images[range(height, height + width), 0, :, range(width)] = torch.nan
    return images


def sees_what_is_computed(output: Tensor, views: tuple[View, View], probes: Tensor) -> bool:
    """Tell whether the NaN of each probed row and column reaches those units that should see it, and no others."""
    rows, columns = (view.seen for view in views)  # (h, H) and (w, W)
    by_row = rows.T[:, :, None] & columns.any(1)  # (H, h, w)
    by_column = columns.T[:, None, :] & rows.any(1)[:, None]  # (W, h, w)
    if not fits(output, views):
        return False
    reached = output.reshape(len(probes), -1, len(rows), len(columns)).isnan().any(1)
    return reached.equal(torch.cat([by_row, by_column])[probes]) and all(map(is_consistent, views))


def is_consistent(view: View) -> bool:
    """Tell whether jump, receptive field and accumulated padding say what the units see."""
    first = torch.arange(view.axis.n_out) * view.axis.j_out - view.axis.P_out
    last = first + view.axis.r_out - 1
    pixels = torch.arange(view.seen.shape[1])
    outside = (pixels < first[:, None]) | (pixels > last[:, None])
    inner = (first >= 0) & (last < len(pixels))  # units whose whole receptive field lies in the image
    ends = view.seen[inner].gather(1, torch.stack([first, last], dim=1)[inner])
    return bool(ends.all() and not (view.seen & outside).any())


def verdict(name: str, wrong: list[str], finding: str) -> Check:
    """Return a check that names the layers that are wrong, or else says what was found."""
    return Check(name, not wrong, f"wrong at {', '.join(dict.fromkeys(wrong))}" if wrong else finding)


def smallest_input(model: nn.Module, input_size: tuple[int, int]) -> str:
    """Say which square images are the smallest that the model takes, if they are larger than these."""
    model = copy.deepcopy(model).cpu().eval()
    for size in range(1, 129):
        try:
            with torch.no_grad():
                model(torch.zeros(1, 1, size, size))
        except Exception:  # whatever a user's forward raises
            continue
        return f"; the smallest that work are {size}x{size}" if size > min(input_size) else ""
    return "; no square images up to 128x128 work"


# The report


def format_shape(shape: tuple[int, ...]) -> str:
    """Return 8x26x26 for (8, 26, 26)."""
    return "x".join(map(str, shape))


def format_table(rows: list[list[object]], text_columns: int) -> str:
    """Align text to the left and numbers to the right; columns that the terminal has no room for go below."""
    limit = min(120, shutil.get_terminal_size((120, 24)).columns)
    columns = [
        [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in column] for column in zip(*rows, strict=True)
    ]
    for index, column in enumerate(columns):
        width = max(map(len, column))
        columns[index] = [cell.ljust(width) if index < text_columns else cell.rjust(width) for cell in column]
    parts = [[columns[0]]]
    for column in columns[1:]:
        if sum(len(cells[0]) + 2 for cells in [*parts[-1], column]) - 2 > limit and len(parts[-1]) > 1:
            parts.append([columns[0]])
        parts[-1].append(column)
    return "\n\n".join("\n".join("  ".join(cells).rstrip() for cells in zip(*part, strict=True)) for part in parts)


def format_report(name: str, analysis: Analysis) -> str:
    """Return the sections as text."""
    stored = analysis.checkpoint or {}
    numbers = {key: f"{value:.2f} %" if isinstance(value, float) else value for key, value in stored.items()}
    lines = [name, *(f"{key.replace('_', ' ')} {number}" for key, number in numbers.items())]
    where = f"{format_shape(analysis.input_size)} images in batches of {analysis.batch_size} on {analysis.device}"
    lines += ["\nArchitecture", analysis.architecture, f"\nLayers, for {where}", *format_layers(analysis)]
    if analysis.failure:
        return "\n".join(lines)
    lines += ["\nReceptive fields", *format_fields(analysis)]
    lines += ["\nMemory of a training step (SGD with momentum) and of inference, in bytes", *format_memory(analysis)]
    verdicts = {True: "ok", False: "FAILED", None: "skipped"}
    checks = [[check.name, verdicts[check.passed], check.finding] for check in analysis.checks]
    lines += ["\nSelf-checks", format_table(checks, text_columns=3) if checks else "skipped"]
    return "\n".join(lines)


def format_layers(analysis: Analysis) -> list[str]:
    """Return the tree of layers with its legend."""
    rows: list[list[object]] = [
        ["layer", "type", "output", "weight", "bias", "total", "share", "buffers", "MACs", "kept"]
    ]
    prefixes = [""]
    missing = "failed" if analysis.failure else "never called"
    for layer in analysis.layers:
        prefixes[layer.depth :] = [f"{layer.name}." if layer.depth else ""]
        label = "  " * layer.depth + layer.name.removeprefix(prefixes[max(layer.depth - 1, 0)])
        output = missing if layer.output_shape is None else format_shape(layer.output_shape)
        share = f"{layer.share:.2f} %" if layer.parameters else 0
        numbers = layer.weight, layer.bias, layer.parameters, share, layer.buffers, layer.macs, layer.kept
        rows.append([label, layer.type, output, *("?" if number is None else number or "" for number in numbers)])
    if analysis.failure:
        return [format_table(rows, text_columns=3), LAYERS_LEGEND]
    totals = {key: "?" if number is None else number for key, number in analysis.totals.items()}
    numbers = [totals[key] for key in ("weight", "bias", "parameters", "buffers", "macs", "kept")]
    rows.append(["total", "", "", *numbers[:3], "", *numbers[3:]])
    trained = "trainable {trainable:,}, frozen {frozen:,}, shared by several layers {shared:,}".format(**totals)
    return [format_table(rows, text_columns=3), trained, LAYERS_LEGEND]


def format_fields(analysis: Analysis) -> list[str]:
    """Return the table of receptive fields with its legend, and what is left out or not known."""
    rows: list[list[object]] = [["layer", "type", *COLUMNS, "RF"]]
    left_out, reasons = set(), []
    for layer in analysis.layers:
        for field in layer.fields:
            axes = [dataclasses.astuple(field[name]) for name in ("height", "width")]
            cells = ["-" if h is None else str(h) if h == w else f"{h}x{w}" for h, w in zip(*axes, strict=True)]
            rows.append([layer.name, layer.type, *cells, f"{field['height'].r_out}x{field['width'].r_out}"])
        if layer.unknown:
            rows.append([layer.name, layer.type, *"?" * 13])
            reasons.append(f"?            at {layer.name}: {layer.unknown}")
        elif not layer.fields and not layer.is_block and layer.output_shape is not None:
            left_out.add(layer.name.split(".")[-1] if layer.type == "function" else layer.type)
    note = [f"Left out, for they change none of these: {', '.join(sorted(left_out))}."] if left_out else []
    return [format_table(rows, text_columns=2), FIELDS_LEGEND, *reasons, *note]


def format_memory(analysis: Analysis) -> list[str]:
    """Return the table of memory, and what a CUDA device measured."""
    rows: list[list[object]] = [["part", "what it is", "training", "inference"]]
    for part in analysis.memory:
        sizes = [f"{size:,} {size / 2**20:7.2f} MiB" for size in (part.training, part.inference)]
        rows.append([part.part, part.meaning, *sizes])
    if analysis.measured_peak is None:
        return [format_table(rows, text_columns=2)]
    measured = f"measured: {analysis.measured_peak:,} bytes, torch.cuda.max_memory_allocated during a training step"
    why = "It differs by the loss, gradients of activations, what cuDNN works with, and rounding up to 512 bytes."
    return [format_table(rows, text_columns=2), measured, why]


def format_comparison(analyses: dict[str, Analysis]) -> str:
    """Return a table with one line a model."""
    rows: list[list[object]] = [["model", "checks", "RF", "parameters", "MACs", "training bytes", "inference bytes"]]
    for name, analysis in analyses.items():
        fields = [field for layer in analysis.layers for field in layer.fields]
        known = fields and not any(layer.unknown for layer in analysis.layers)
        size = f"{fields[-1]['height'].r_out}x{fields[-1]['width'].r_out}" if known else "?"
        checks = "failed" if analysis.problems() else "passed" if analysis.checks else "skipped"
        macs = "?" if analysis.totals["macs"] is None else analysis.totals["macs"]
        memory = analysis.memory[-1].training, analysis.memory[-1].inference
        rows.append([name, checks, size, analysis.totals["parameters"], macs, *memory])
    return f"Comparison\n{format_table(rows, text_columns=2)}"


def draw_receptive_fields(analysis: Analysis, image: Image.Image) -> Image.Image:
    """Draw on an image of the analyzed size what the centre unit after each block sees, block beside block."""
    blocks: dict[str, dict[str, Axis]] = {}
    block = ""
    for layer in analysis.layers:
        block = layer.name if layer.depth == 1 else block
        if layer.fields:
            blocks[block] = layer.fields[-1]
    scale, margin = max(1, 224 // max(image.size)), 16
    enlarged = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    captions = [f"{block}: {field['height'].r_out}x{field['width'].r_out}" for block, field in blocks.items()]
    step = margin + max([enlarged.width, *(7 * len(caption) for caption in captions)])
    picture = Image.new("RGB", (margin + step * len(blocks), enlarged.height + 3 * margin), "white")
    draw = ImageDraw.Draw(picture)
    for left, caption, field in zip(range(margin, picture.width, step), captions, blocks.values(), strict=True):
        picture.paste(enlarged, (left, margin))
        corners = []
        for axis, pixels in ((field["width"], image.width), (field["height"], image.height)):
            first = axis.n_out // 2 * axis.j_out - axis.P_out
            corners.append((max(first, 0) * scale, min(first + axis.r_out, pixels) * scale - 1))
        (x0, x1), (y0, y1) = corners
        draw.rectangle((left + x0, margin + y0, left + x1, margin + y1), outline="red", width=3)
        draw.text((left, margin + enlarged.height + 4), caption, fill="black")
    return picture


def sample_digit(data_dir: Path) -> Image.Image:
    """Return MNIST's first test image, or a drawn seven where data_dir has no MNIST."""
    from torchvision.datasets import MNIST  # here, for its import takes longer than analyzing a model

    try:
        return MNIST(data_dir, train=False)[0][0]
    except RuntimeError:
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).line([(6, 7), (20, 7), (12, 24)], fill=255, width=3)
        return image


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, models = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    add("--model", nargs="+", type=find_model_name, choices=[*models, "all"], help="classes, or all (default: Model5)")
    add("--checkpoint", type=Path, help="analyze the trained weights of this file, and the class it names")
    add("--input-size", default=(28, 28), type=count, nargs=2, metavar=("H", "W"), help="pixels (default: 28 28)")
    add("--batch-size", type=count, help="images in a training step (default: 128 on a GPU, 64 on a CPU)")
    add("--device", default="auto", type=device_type, help="auto, cpu, cuda, mps, xpu (default: %(default)s)")
    add("--verify", default=True, action=argparse.BooleanOptionalAction, help="make the self-checks (default: yes)")
    add("--json", action="store_true", help="print the same numbers as JSON, and nothing else")
    add("--image", type=Path, help="PNG file to draw the receptive fields into (default: none)")
    add("--data-dir", default="data", type=Path, help="where --image looks for MNIST/raw (default: %(default)s)")
    args = parser.parse_args()
    args.batch_size = args.batch_size or default_batch_size(args.device)
    args.model = models if "all" in (args.model or ()) else args.model
    return args


def main() -> None:
    """Analyze model after model, and print and draw what was found."""
    args = parse_args()
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    names = args.model or [checkpoint["model_name"] if checkpoint else default_model_name()]
    if checkpoint and names != [checkpoint["model_name"]]:
        raise ScriptError(f"{args.checkpoint} holds weights of {checkpoint['model_name']}: leave out --model")
    if args.image and len(names) > 1:
        raise ScriptError(f"{args.image} is to show one model: give --model one name")
    analyses, problems = {}, []
    for name in names:
        model = build_model(name).to(args.device)
        if checkpoint:
            model.load_state_dict(checkpoint["model_state_dict"])
        try:
            analysis = analyze(model, tuple(args.input_size), args.batch_size, args.verify)
        except RuntimeError as error:
            raise ScriptError(f"{name} cannot be analyzed: {str(error).splitlines()[0]}") from error
        if checkpoint:
            results = ("epoch", "train_accuracy", "test_accuracy", "best_test_accuracy")
            analysis.checkpoint = {key: checkpoint[key] for key in results}
        analyses[name] = analysis
        problems += [f"{name}: {problem}" for problem in analysis.problems()]
        if not args.json:
            print(format_report(name, analysis).encode("ascii", "backslashreplace").decode(), end="\n\n")
    if args.json:
        print(json.dumps({name: dataclasses.asdict(analysis) for name, analysis in analyses.items()}, indent=2))
    elif len(analyses) > 1:
        print(format_comparison(analyses))
    if args.image:
        digit = sample_digit(args.data_dir).resize(args.input_size[::-1])
        buffer = io.BytesIO()
        draw_receptive_fields(analysis, digit).save(buffer, "PNG")
        write_file(args.image, buffer.getvalue())
    if problems:
        raise ScriptError("; ".join(problems))


if __name__ == "__main__":
    run_script(main)

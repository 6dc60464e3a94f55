"""Print a model's layers, operations, receptive fields and memory, as measured on the running model.

    python analyze_model.py                                # Model5 on MNIST's 28x28 images
    python analyze_model.py --model all --batch-size 128   # every class of models.py, then a comparison
    python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth --image fields.png

From the first command's output, with torch 2.15.0:

    layer               type               k  s  p  d  n_in  n_out  j_in  j_out  r_in  r_out  P_in  P_out     RF
    input_block.0       Conv2d             3  1  0  1    28     26     1      1     1      3     0      0    3x3
    ...
    output_block.0      AdaptiveAvgPool2d  7  7  0  1     7      1     2     14    16     28     0      0  28x28

The model runs on a few images in training mode, where autograd's hooks show what each layer keeps for the backward
pass and torch's counter counts operations; then in evaluation mode, where receptive_fields.py follows each call.
"""

import argparse
import copy
import dataclasses
import json
import operator
import shutil
import types
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from download_mnist import ScriptError, run_script
from models import build_model, find_model_name, model_classes
from pictures import draw_receptive_fields, require_matplotlib
from receptive_fields import Axis, Call, FeatureMap, Picture, View, WindowMismatchError
from receptive_fields import as_map, follow_call, image_map, map_tensors, results, take_pictures, tensors_in, version
from train_test_mnist import RESULTS, default_batch_size, device_type, load_checkpoint, load_mnist, number_type

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


UNKNOWN_INPUT = "what comes in is not known"
RANDOM = "its arguments differ from run to run"
OUTSIDE = "what it returns comes from no call of a torch function on what it is given"
COLUMNS = tuple(field.name for field in dataclasses.fields(Axis))


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
    followed: bool = False  # whether the receptive field after it is known
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
    checks: list[Check]
    failure: str | None  # why forward does not take the images; the layers then end where it failed
    checkpoint: dict[str, int | float] | None = None  # epoch and accuracies that came with the weights

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        failed = [f"{check.name}: {check.finding}" for check in self.checks if check.passed is False]
        return [self.failure] if self.failure else failed


def analyze(model: nn.Module, input_size: tuple[int, int], batch_size: int, verify: bool = True) -> Analysis:
    """Analyze a model on grey images (batch_size, 1, *input_size) on the model's device; the model stays as it is.

    Images that the model does not take are no error: then `failure` says why. Raises RuntimeError where an in-place
    function destroys what autograd has kept, for then the model cannot be trained. Without `verify` no check is made.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    twins = [(copy_model(model).cpu().double(), torch.float64), (copy_model(model).cpu(), torch.float32)]
    for twin, _ in twins:
        twin.eval()
    model = copy_model(model)
    model.train()
    lines: list[Layer] = []
    checks: list[Check] = []
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        # What grows with the batch and what does not shows in two small batches. One image alone is a special case.
        batches = [torch.rand(n, 1, *input_size, device=device) for n in ((2, 3) if batch_size > 1 else (1,))]
        runs = [Measurement(model, images, lines) for images in batches]
        failure = next((run.failure for run in runs if run.failure), None)
        shared = describe_layers(model, lines, used=set().union(*(run.used for run in runs)))
        for line in lines:
            line.kept, line.macs = extrapolate(runs, "kept", line, batch_size), extrapolate(runs, "flops", line, 1) // 2
            if any(id(line) in run.uncounted for run in runs):
                line.macs = None
        if not failure:
            try_backward(model, batches[0])
            model.cpu().eval()
            images = torch.rand(images_at_once(input_size), 1, *input_size)
            with torch.no_grad():
                earlier = [Recorder(model, images, list(lines)).arguments for _ in range(3)]
                torch.manual_seed(0)
                fields = FieldRun(model, images, lines, earlier, twins)
                checks = run_checks(model, lines, runs, fields) if verify else []
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    totals = {
        "weight": sum(line.weight for line in lines),
        "bias": sum(line.bias for line in lines),
        "parameters": sum(count for count, _ in counts),
        "trainable": sum(count for count, trainable in counts if trainable),
        "frozen": sum(count for count, trainable in counts if not trainable),
        "shared": shared,
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
        "macs": None if any(line.macs is None for line in lines) else sum(line.macs for line in lines),
        "kept": sum(line.kept for line in lines),
    }
    for line in lines:
        line.share = round(100 * line.parameters / max(totals["parameters"], 1), 2)
    largest = max((extrapolate(runs, "work", line, batch_size) for line in lines), default=0)
    memory = add_up_memory(model, batch_size, input_size, totals["kept"], largest)
    return Analysis(str(model), input_size, batch_size, str(device), lines, totals, memory, checks, failure)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that shares what cannot be copied: Python modules, and tensors left over from a computation."""
    values = [value for module in model.modules() for value in vars(module).values()]
    shared = [value for value in values if isinstance(value, types.ModuleType)]
    shared += [tensor for tensor in tensors_in(values) if not tensor.is_leaf]
    return copy.deepcopy(model, {id(value): value for value in shared})


# Running the model


class Recorder(TorchFunctionMode):
    """Runs a model once, and finds the line of the report for each module, and each call that the images enter.

    A call within one of torch's layers belongs to the layer's line, any other has a line of its own. Lines that an
    earlier run has made are used again.
    """

    def __init__(self, model: nn.Module, images: Tensor, lines: list[Layer]) -> None:
        super().__init__()
        self.lines, self.position = lines, 0  # position: behind the line used last
        self.running: list[tuple[str, Layer, nn.Module, int]] = []
        self.function = ""
        self.busy = False  # with a replay
        self.failure: str | None = None
        self.arguments: list[str] = []  # of each call, without the tensors that come from the images
        self.parameters = {id(parameter) for parameter in model.parameters()}
        self.used: set[int] = set()  # ids of all that took part in these calls
        # What comes from the images: its map, or why that is not known. Tensors are held, so that no id is used twice.
        self.maps: dict[int, FeatureMap | str] = {id(images): image_map(*images.shape[2:])}
        self.held = [images]
        handles = []
        for name, module in model.named_modules():
            handles.append(nn.Module.register_forward_pre_hook(module, partial(self.enter, name), with_kwargs=True))
            handles.append(nn.Module.register_forward_hook(module, partial(self.leave, name), with_kwargs=True))
        try:
            with self:
                model(images)
        except Exception as error:  # whatever a user's forward raises
            where = type(model).__name__
            if self.running:
                _, line, module, _ = self.running[-1]
                where = line.name if is_layer(module) or not self.function else f"{self.function}() in {line.name}"
                line.unknown = "it fails in evaluation mode"
            self.failure = f"{where} fails on images of {format_shape(images.shape[2:])}: {first_line(error)}"
        finally:
            for handle in handles:
                handle.remove()

    def find_line(self, name: str, type_name: str, is_block: bool = False) -> Layer:
        """Return the next line of that name, or a new one behind the line used last."""
        names = [line.name for line in self.lines]
        if name in names[self.position :]:
            self.position = names.index(name, self.position)
        else:
            self.lines.insert(self.position, Layer(name, len(self.running), type_name, is_block))
        self.position += 1
        return self.lines[self.position - 1]

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run."""
        line = self.find_line(name or type(module).__name__, type(module).__name__, not is_layer(module))
        self.running.append((name, line, module, self.position))

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Note what a module returns; it counts as coming from the images if something given to it does."""
        _, line, _, _ = self.running.pop()
        tensors = tensors_in(output)
        if any(id(tensor) in self.maps for tensor in tensors_in((args, kwargs))):
            self.note(tensors, [self.maps.get(id(tensor), OUTSIDE) for tensor in tensors])
        for tensor in tensors[:1]:
            line.output_shape = line.output_shape or tuple(tensor.shape[1:])

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        """Make the call; record it where it computes something from the images."""
        given = tensors_in((args, kwargs))
        if self.busy or not self.running or not any(id(tensor) in self.maps for tensor in given):
            return func(*args, **(kwargs or {}))
        self.function = func.__name__.strip("_").removesuffix("_with_indices")  # relu for relu_, too
        before = {id(tensor): tensor.detach() for tensor in given}  # in the shape that they have now
        versions = [version(tensor) for tensor in given]
        output = func(*args, **(kwargs or {}))
        tensors = results(output, given, versions)
        if tensors:
            _, line, module, _ = self.running[-1]
            if not is_layer(module):
                name = f"{line.name}.{self.function}()" if len(self.running) > 1 else f"{self.function}()"
                line = self.find_line(name, "function")
            line.output_shape = line.output_shape or tuple(tensors[0].shape[1:])
            args, kwargs = map_tensors(lambda tensor: before[id(tensor)], (args, kwargs or {}))
            self.record(line, Call(func, args, kwargs), before, tensors)
            for tensor in tensors:  # what shares memory with a tensor that was changed has changed, too
                if id(tensor) in before:
                    for other in [*self.held, *([] if tensor._base is None else [tensor._base])]:
                        if other is not tensor and address(other) == address(tensor):
                            self.note([other], ["it was changed by way of another tensor"])
            self.used |= before.keys()
        self.function = ""
        return output

    def record(self, line: Layer, call: Call, before: dict[int, Tensor], tensors: list[Tensor]) -> None:
        """Take note of a call, of what was given to it, by id, and of its results."""
        constants = {id(before[key]) for key in before.keys() - self.maps.keys()}
        told = map_tensors(
            lambda t: t.tolist() if id(t) in constants and not t.is_floating_point() else None, call[1:3]
        )
        self.arguments.append(f"{line.name} {told}")
        self.note(tensors, [""] * len(tensors))

    def note(self, tensors: list[Tensor], maps: list[FeatureMap | str | None]) -> None:
        """Remember what is known of tensors; None: they do not come from the images."""
        for tensor, known in zip(tensors, maps, strict=True):
            self.held.append(tensor)
            self.maps.pop(id(tensor), None)
            if known is not None:
                self.maps[id(tensor)] = known


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own without parts, so that the functions it calls are its own."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


class Measurement(Recorder):
    """Measures, by the ids of lines, operations and the bytes that are kept for the backward pass and at work."""

    def __init__(self, model: nn.Module, images: Tensor, lines: list[Layer]) -> None:
        self.flops, self.kept, self.work = Counter(), Counter(), Counter()
        self.uncounted: set[int] = set()  # lines with a product that torch's counter does not know
        self.miscounted: list[str] = []  # names of lines where it disagrees with the formula
        self.counter, self.counted = FlopCounterMode(display=False) if FlopCounterMode else None, 0
        self.packed: list[Tensor] = []
        self.known = [images, *model.parameters(), *model.buffers()]
        self.storages = {address(tensor) for tensor in self.known}
        self.of_model = set(self.storages)
        hooks = saved_tensors_hooks(lambda tensor: self.packed.append(tensor) or tensor, lambda tensor: tensor)
        with hooks, self.counter or nullcontext():
            super().__init__(model, images, lines)

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Count what happened since the last call, too."""
        self.settle(self.running[-1][1])
        super().leave(name, module, args, kwargs, output)

    def record(self, line: Layer, call: Call, before: dict[int, Tensor], tensors: list[Tensor]) -> None:
        """Count what a call did."""
        super().record(line, call, before, tensors)
        flops = self.settle(line)
        at_work = {address(t): t.untyped_storage().nbytes() for t in [*before.values(), *tensors] if t.dim()}
        self.work[id(line)] = max(self.work[id(line)], sum(at_work[key] for key in at_work.keys() - self.of_model))
        weights = [before[key] for key in before.keys() & self.parameters if before[key].dim() > 1]
        if self.function in ("conv2d", "linear"):
            weight = call.kwargs["weight"] if "weight" in call.kwargs else call.args[1]
            if flops and flops != 2 * tensors[0].numel() * weight[0].numel():
                self.miscounted.append(line.name)
        if not flops and any(not spreads_over(weight, tensors[0]) for weight in weights):
            self.uncounted.add(id(line))

    def settle(self, line: Layer) -> int:
        """Add what was counted and kept since the last time to a line; return the operations."""
        flops = self.counter.get_total_flops() - self.counted if self.counter else 0
        self.counted += flops
        self.flops[id(line)] += flops
        for tensor in self.packed:
            if tensor.dim() and address(tensor) not in self.storages:
                self.kept[id(line)] += tensor.untyped_storage().nbytes()
                self.storages.add(address(tensor))
                self.known.append(tensor)  # so that no address is used twice
        self.packed.clear()
        return flops


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def spreads_over(weight: Tensor, output: Tensor) -> bool:
    """Tell whether a weight can be added to an output, or multiplied with it number by number: that is no product."""
    pairs = zip(reversed(weight.shape), reversed(output.shape), strict=False)
    return weight.dim() <= output.dim() and all(n in (1, m) for n, m in pairs)


class FieldRun(Recorder):
    """Follows the receptive fields through a model in evaluation mode."""

    def __init__(
        self, model: nn.Module, images: Tensor, lines: list[Layer], earlier: list[list[str]], twins: list
    ) -> None:
        self.earlier = earlier  # what another run's calls were given: what differs is random
        self.parts = [(dict(twin.named_modules()), dtype) for twin, dtype in twins]
        self.mismatches: list[str] = []  # names of lines that do not read what their window says
        self.outputs: list[tuple[str, FeatureMap | str | None]] = []  # of each module: its name and what it returns
        self.entered: list[list[tuple[Tensor, FeatureMap | str]]] = []
        self.nan_passes = True
        super().__init__(model, images, lines)

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Keep what is known of what a module is given."""
        super().enter(name, module, args, kwargs)
        given = {id(tensor): tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self.maps}
        self.entered.append([(tensor, self.maps[key]) for key, tensor in given.items()])

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Follow a module as a whole where a call in it cannot be followed."""
        _, line, _, start = self.running[-1]
        super().leave(name, module, args, kwargs, output)
        sources, tensors = self.entered.pop(), tensors_in(output)
        known = sources and all(isinstance(source, FeatureMap) for _, source in sources)
        if self.running and known and any(isinstance(self.maps.get(id(tensor)), str) for tensor in tensors):
            for modules, dtype in self.parts:
                found = self.follow(line, Call(modules[name], args, kwargs, dtype), sources, len(tensors))
                if found and not isinstance(found[0], str):
                    self.note(tensors, found)
                    self.show(line, sources, found)
                    for inner in self.lines[start : self.position]:
                        inner.unknown = None
                    break
        returned = self.maps.get(id(tensors[0])) if tensors else None
        line.unknown = OUTSIDE if returned == OUTSIDE else line.unknown
        self.outputs.append((name, returned))

    def record(self, line: Layer, call: Call, before: dict[int, Tensor], tensors: list[Tensor]) -> None:
        """Follow a call."""
        sources = [(before[key], self.maps[key]) for key in before if key in self.maps]
        super().record(line, call, before, tensors)
        found = self.follow(line, call, sources, len(tensors))
        number = len(self.arguments)
        if any(arguments[number - 1 : number] != self.arguments[-1:] for arguments in self.earlier):
            found = [RANDOM] * len(tensors)
        self.note(tensors, found)
        self.show(line, sources, found)

    def follow(self, line: Layer, call: Call, sources: list, count: int) -> list[FeatureMap | str | None]:
        """Return the maps in the results of a call, or why they are not known."""
        if any(isinstance(known, str) for _, known in sources):
            return [UNKNOWN_INPUT] * count
        self.busy = True
        try:
            found, passes = follow_call(call, sources)
        except WindowMismatchError as mismatch:
            self.mismatches.append(line.name)
            return [str(mismatch)] * count
        except Exception as error:  # whatever a function does not like about a replay
            return [f"it refuses a replay: {first_line(error)}"] * count
        finally:
            self.busy = False
        self.nan_passes &= passes
        return found if len(found) == count else ["a replay returns something else"] * count

    def show(self, line: Layer, sources: list, found: list[FeatureMap | str | None]) -> None:
        """Enter the first result into the report's line."""
        first = next((each for each in found if each is not None), None)
        if isinstance(first, str):
            line.unknown = line.unknown or first
        elif first:
            line.followed = True
            if not any(all(map(operator.is_, first.views, source.views)) for _, source in sources):
                line.fields.append({"height": first.views[0].axis, "width": first.views[1].axis})


# What the report adds up and checks


def describe_layers(model: nn.Module, lines: list[Layer], used: set[int]) -> int:
    """Fill in parameters and buffers, each at the first line that has it; add lines for modules never called.

    Return how many parameters several lines share.
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    called = {line.name for line in lines}
    for name, module in modules.items():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name not in called and (own or is_layer(module)):
            output = () if any(id(tensor) in used for tensor in own) else None
            lines.append(Layer(name, 1, type(module).__name__, not is_layer(module), output))
    described, shared = set(), set()
    for line in lines:
        for name, parameter in modules[line.name].named_parameters(recurse=False) if line.name in modules else ():
            if parameter in described:
                shared.add(parameter)
            elif "bias" in name:
                line.bias += parameter.numel()
            else:
                line.weight += parameter.numel()
            described.add(parameter)
        buffers = set(modules[line.name].buffers(recurse=False)) - described if line.name in modules else set()
        line.buffers = sum(buffer.numel() for buffer in buffers)
        described |= buffers
        line.parameters = line.weight + line.bias
    return sum(parameter.numel() for parameter in shared)


def extrapolate(runs: list[Measurement], what: str, line: Layer, n: int) -> int:
    """Return what a line would measure on n images, from the runs on 2 and 3, or on 1."""
    first, last = (getattr(run, what)[id(line)] for run in (runs[0], runs[-1]))
    return max(0, first + (last - first) * (n - 2))


def try_backward(model: nn.Module, images: Tensor) -> None:
    """Raise RuntimeError where an in-place function has destroyed what autograd kept."""
    outputs = [tensor for tensor in tensors_in(model(images)) if tensor.requires_grad]
    try:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    except RuntimeError as error:
        if "inplace operation" in str(error):
            raise


def images_at_once(size: tuple[int, int]) -> int:
    """Return how many images go through the model at once: one for each row and column, fewer if they are large."""
    return min(sum(size) + 1, max(5, 2**17 // (size[0] * size[1])))


def add_up_memory(model: nn.Module, batch_size: int, size: tuple[int, int], kept: int, largest: int) -> list[Memory]:
    """Return the parts of a training step with SGD and momentum, and of inference, and their sum."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [list(model.parameters()), trained, list(model.buffers())]
    parameters, trainable, buffers = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    pixels = 4 * batch_size * size[0] * size[1]
    memory = [
        Memory("parameters", "weights and biases", parameters, parameters),
        Memory("gradients", "one for each trainable parameter", trainable, 0),
        Memory("momentum", "SGD's running sum of gradients", trainable, 0),
        Memory("buffers", "stored but not trained", buffers, buffers),
        Memory("input and target", "images, and in training int64 labels", pixels + 8 * batch_size, pixels),
        Memory("activations kept for backward", "the layers' column `kept`", kept, 0),
        Memory("activations at work", "input and output of the largest layer", 0, largest),
    ]
    return [*memory, Memory("sum", "", sum(part.training for part in memory), sum(part.inference for part in memory))]


def run_checks(model: nn.Module, lines: list[Layer], runs: list[Measurement], fields: FieldRun) -> list[Check]:
    """Compare numbers that are known in two ways."""
    listed, total = sum(line.parameters for line in lines), sum(p.numel() for p in model.parameters())
    miscounted = [name for run in runs for name in run.miscounted]
    return [
        verdict(
            "parameters",
            [] if listed == total else ["the total"],
            f"those of the layers add up to the model's {total:,}",
        ),
        verdict("MACs", miscounted, "torch's FLOP counter agrees with the formula for convolutions and linear layers")
        if FlopCounterMode
        else Check("MACs", None, "torch has its FLOP counter since version 2.1"),
        verdict("windows", fields.mismatches, "what convolutions and poolings declare is what a replay shows"),
        check_fields(fields),
    ]


def check_fields(fields: FieldRun) -> Check:
    """Probe the whole model with NaN in rows and columns of pixels: each module's units must see what the table says."""
    images, start = fields.held[0], image_map(*fields.held[0].shape[2:])
    followed = [(name, known) for name, known in fields.outputs if isinstance(known, FeatureMap)]
    reason = fields.failure or ("" if followed else "no module's output is followed")
    for modules, dtype in [] if reason else fields.parts:
        call = Call(partial(units_of_modules, modules[""], fields.outputs), (images,), {}, dtype)
        try:
            if any(units.isnan().any() for units in call.replay({})):
                return Check("receptive field", None, "there is NaN without NaN in the images")
            pictures = take_pictures(call, images, start)
        except Exception as error:  # whatever a user's forward raises
            reason = f"the model refuses NaN: {first_line(error)}"
            continue
        wrong = [
            name
            for (name, known), picture in zip(followed, pictures, strict=True)
            if isinstance(picture, str) or not sees(known, picture, fields.nan_passes)
        ]
        finding = f"NaN in a row or column of pixels reaches the units that should see it, after {len(followed)} of {len(fields.outputs)} modules"
        return verdict("receptive field", wrong, finding)
    return Check("receptive field", None, reason)


def units_of_modules(
    model: nn.Module, outputs: list[tuple[str, FeatureMap | str | None]], images: Tensor
) -> list[Tensor]:
    """Run a model; return for each output that is followed its units (N, rows, columns): NaN where they hold any."""
    units, awaited = [], iter(outputs)

    def leave(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        expected, known = next(awaited)
        if name != expected:
            raise RuntimeError("it does not call the same modules again")
        if isinstance(known, FeatureMap):
            numbers = as_map(tensors_in(output)[0], known.layout, known.size)
            units.append(torch.where(numbers.reshape(*numbers.shape[:3], -1).isnan().any(-1), torch.nan, 0.0))

    handles = [module.register_forward_hook(partial(leave, name)) for name, module in model.named_modules()]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return units


def sees(known: FeatureMap, picture: Picture, nan_passes: bool) -> bool:
    """Tell whether the units that probed rows and columns of pixels reach are those that the map says."""
    rows, columns = (view.seen for view in known.views)  # (units, pixels)
    by_row = rows[:, picture.rows].T[:, :, None] & columns.any(1)
    by_column = columns[:, picture.columns].T[:, None, :] & rows.any(1)[:, None]
    expected = torch.cat([by_row, by_column])
    complete = picture.changed.equal(expected) or not (nan_passes or (picture.changed & ~expected).any())
    return complete and all(map(is_consistent, known.views))


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


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


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
        elif not layer.fields and not layer.is_block and layer.followed:
            left_out.add(layer.name.split(".")[-1] if layer.type == "function" else layer.type)
    note = [f"Left out, for they change none of these: {', '.join(sorted(left_out))}."] if left_out else []
    return [format_table(rows, text_columns=2), FIELDS_LEGEND, *reasons, *note]


def format_memory(analysis: Analysis) -> list[str]:
    """Return the table of memory, and what a CUDA device measured."""
    rows: list[list[object]] = [["part", "what it is", "training", "inference"]]
    for part in analysis.memory:
        sizes = [f"{size:,} {size / 2**20:7.2f} MiB" for size in (part.training, part.inference)]
        rows.append([part.part, part.meaning, *sizes])
    return [format_table(rows, text_columns=2)]


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
    names = args.model or [checkpoint["model_name"] if checkpoint else "Model5"]
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
            analysis.checkpoint = {key: checkpoint[key] for key in RESULTS}
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

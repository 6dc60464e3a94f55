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
import math
import operator
import shutil
import types
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from checkpoints import load_checkpoint
from download_mnist import load_mnist
from models import build_model, default_model_name, find_model_name, model_classes
from pictures import draw_receptive_fields, require_matplotlib
from receptive_fields import (
    Axis,
    Call,
    CannotFollowError,
    FeatureMap,
    Picture,
    View,
    WindowMismatchError,
    as_map,
    follow_call,
    image_map,
    map_tensors,
    results_of,
    take_pictures,
    tensors_in,
)
from utils import ScriptError, default_batch_size, device_type, number_type, run_script

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
UNRECORDED = "what it returns comes from no call of a torch function on what it is given"
COLUMNS = [field.name for field in dataclasses.fields(Axis)]


@dataclasses.dataclass
class Layer:
    """A line of the tree: a block, a layer, or a function that a block calls outside any layer."""

    name: str
    depth: int
    type: str
    is_block: bool = False
    output_shape: tuple[int, ...] | None = None  # of one image; None if no output came
    weight: int = 0
    bias: int = 0
    parameters: int = 0
    share: float = 0.0  # per cent of the model's parameters
    buffers: int = 0
    macs: int | None = 0  # per image; None if not known
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
    """The verdict of one self-check; passed is None if it could not be made."""

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

    Images that the model does not take are no error: then `failure` says why. Raises RuntimeError if an in-place
    function destroys what autograd has kept, because then the model cannot be trained. No checks without `verify`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    architecture, model, twin = str(model), copy_model(model), copy_model(model).cpu().double()
    model.train()
    twin.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # the same noise every time
        # Of two small batches, the second shows what grows with the batch. One image alone is a case of its own.
        batches = [torch.rand(n, 1, *input_size, device=device) for n in ((2, 3) if batch_size > 1 else (1,))]
        runs = [Measurement(model, images) for images in batches]
        failure = runs[0].failure or runs[-1].failure
        if not failure:
            try_backward(model, batches[0])
        model.cpu().eval()
        n = 13 if math.prod(input_size) < 2**14 else 3  # one more than the probes in a replay: memory sets the limit
        images = torch.rand(n, 1, *input_size)
        with torch.no_grad():
            rehearsals = [FieldRun(model, images).arguments for _ in range(3)]
            torch.manual_seed(0)  # as in replays
            fields = FieldRun(model, images, twin, rehearsals)
            lines, shared = complete_lines(fields, model, runs, batch_size)
            checks = run_checks(model, lines, runs, fields) if verify and not failure else []
    totals = {
        "weight": sum(line.weight for line in lines),
        "bias": sum(line.bias for line in lines),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trainable": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "frozen": sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad),
        "shared": shared,
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
        "macs": None if any(line.macs is None for line in lines) else sum(line.macs for line in lines),
        "kept": sum(line.kept for line in lines),
    }
    at_work = max((extrapolate(runs, key, "at work", batch_size) for key in runs[0].measured), default=0)
    memory = add_up_memory(model, batch_size, input_size, totals["kept"], at_work)
    return Analysis(architecture, input_size, batch_size, str(device), lines, totals, memory, checks, failure)


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that shares what cannot be copied: Python modules, and tensors left over from a computation."""
    values = [value for module in model.modules() for value in vars(module).values()]
    shared = [value for value in values if isinstance(value, types.ModuleType)]
    shared += [tensor for tensor in tensors_in(values) if not tensor.is_leaf]
    return copy.deepcopy(model, {id(value): value for value in shared})


def add_hooks(model: nn.Module, enter: Callable, leave: Callable) -> list:
    """Call enter(name, module, args, kwargs) before each module and leave(..., output) after it; return the handles."""
    handles = []
    for name, module in model.named_modules():  # through nn.Module because scripted modules offer no hooks
        handles.append(nn.Module.register_forward_pre_hook(module, partial(enter, name), with_kwargs=True))
        handles.append(nn.Module.register_forward_hook(module, partial(leave, name), with_kwargs=True))
    return handles


def describe_failure(name: str, images: Tensor, error: Exception) -> str:
    """Say in one line what fails on the images."""
    return f"{name} fails on images of {format_shape(images.shape[2:])}: {first_line(error)}"


class Measurement:
    """What each call of a module costs in a run in training mode, apart from the modules in it.

    `measured` holds, by name and number of the call, operations ("flops") and bytes ("kept", "at work").
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.measured: dict[tuple[str, int], Counter] = defaultdict(Counter)  # by name and number of the call
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.failure: str | None = None
        self.miscounted: list[str] = []  # where torch's counter disagrees with the formula
        self.calls, self.running = Counter(), [("", 1)]
        self.counter, self.counted = FlopCounterMode(display=False) if FlopCounterMode else None, 0
        self.held = [images, *model.parameters(), *model.buffers()]  # so that no address is used twice
        self.given = {address(tensor) for tensor in self.held}
        self.seen = set(self.given)
        handles = add_hooks(model, self.enter, self.leave)
        try:
            with saved_tensors_hooks(self.keep, lambda tensor: tensor), self.counter or nullcontext():
                model(images)
        except Exception as error:  # whatever a user's forward raises
            self.failure = describe_failure(self.running[-1][0] or type(model).__name__, images, error)
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps; memory that several calls keep counts for the first."""
        if tensor.dim() and address(tensor) not in self.seen:
            self.measured[self.running[-1]]["kept"] += tensor.untyped_storage().nbytes()
            self.seen.add(address(tensor))
            self.held.append(tensor)
        return tensor

    def count(self) -> None:
        """Add the operations since the last time to the module that runs."""
        flops = self.counter.get_total_flops() if self.counter else 0
        self.measured[self.running[-1]]["flops"] += flops - self.counted
        self.counted = flops

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run."""
        self.count()
        self.calls[name] += 1
        self.running.append((name, self.calls[name]))

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Note what a module did."""
        self.count()
        key, outputs = self.running.pop(), tensors_in(output)
        sizes = {address(t): t.untyped_storage().nbytes() for t in [*tensors_in((args, kwargs)), *outputs]}
        self.measured[key]["at work"] = sum(size for at, size in sizes.items() if at not in self.given)
        self.shapes[key] = tuple(outputs[0].shape[1:]) if outputs else ()
        flops = self.measured[key]["flops"]
        if isinstance(module, nn.Conv2d | nn.Linear) and flops not in (
            0,
            2 * outputs[0].numel() * module.weight[0].numel(),
        ):
            self.miscounted.append(name)
        if is_layer(module) and not flops and tensors_in((args, kwargs))[0].is_floating_point():
            weights = [weight for weight in module.parameters() if weight.dim() > 1]
            self.measured[key]["uncounted"] = sum(not spreads_over(weight, outputs[0]) for weight in weights)


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def spreads_over(weight: Tensor, output: Tensor) -> bool:
    """Tell whether a weight can be multiplied with an output number by number; else it makes a matrix product."""
    pairs = zip(reversed(weight.shape), reversed(output.shape), strict=False)
    return weight.dim() <= output.dim() and all(n in (1, m) for n, m in pairs)


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own without parts, so that the functions it calls are its own."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


def try_backward(model: nn.Module, images: Tensor) -> None:
    """Raise RuntimeError if an in-place function has destroyed what autograd kept."""
    outputs = [tensor for tensor in tensors_in(model(images)) if tensor.requires_grad]
    try:
        torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    except RuntimeError as error:
        if "inplace operation" in str(error):
            raise


def extrapolate(runs: list[Measurement], key: tuple[str, int], what: str, n: int) -> int:
    """Return what a call would measure on n images, from the runs on 2 and on 3, or from the only one on 1."""
    first, last = runs[0].measured[key][what], runs[-1].measured[key][what]
    return max(0, first + (last - first) * (n - 2))


class FieldRun(TorchFunctionMode):
    """Runs a model in evaluation mode; notes a line for each module, and one for each call outside torch's layers.

    With a `twin`, a copy of the model in float64 for replays, it follows receptive fields. The arguments in
    `rehearsals` are those of earlier runs: a call whose arguments differ from run to run is not followed.
    """

    def __init__(
        self, model: nn.Module, images: Tensor, twin: nn.Module | None = None, rehearsals: list[list[str]] | None = None
    ) -> None:
        super().__init__()
        self.lines: list[Layer] = []
        self.arguments: list[str] = []  # of each call, but for tensors that come from the images
        self.mismatches: list[str] = []  # lines that do not read what their window says
        self.returned: list[tuple[str, FeatureMap | str | None]] = []  # by each module
        self.nan_passes = True
        self.used: set[int] = set()  # ids of all that took part in a call
        self.failure: str | None = None
        # What comes from the images: its map, or why that is not known. Tensors are held, so that no id is used twice.
        self.maps: dict[int, FeatureMap | str] = {id(images): image_map(images.shape[2:])}
        self.held, self.images = [images], images
        self.running: list[tuple] = []  # a module's line, where the lines in it begin, and the maps it is given
        self.twin = dict(twin.named_modules()) if twin else {}
        self.rehearsals, self.replaying = rehearsals or [], False
        handles = add_hooks(model, self.enter, self.leave)
        try:
            with self:
                model(images)
        except Exception as error:  # whatever a user's forward raises
            self.failure = describe_failure(type(model).__name__, images, error)
            for line, *_ in self.running:
                self.failure, line.unknown = describe_failure(line.name, images, error), "it fails in evaluation mode"
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run, and what is known of what it is given."""
        line = Layer(name or type(module).__name__, len(self.running), type(module).__name__, not is_layer(module))
        sources = {id(tensor): tensor for tensor in tensors_in((args, kwargs)) if id(tensor) in self.maps}
        self.lines.append(line)
        self.running.append((line, len(self.lines), [(tensor, self.maps[key]) for key, tensor in sources.items()]))

    def leave(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        """Note what a module returns; follow it as a whole if a call in it cannot be followed."""
        line, start, sources = self.running.pop()
        tensors, inside = tensors_in(output), self.lines[start:]
        if sources:
            self.note(tensors, [self.maps.get(id(tensor), UNRECORDED) for tensor in tensors])
        returned = [self.maps.get(id(tensor)) for tensor in tensors]
        is_random = any(inner.unknown == RANDOM for inner in inside)
        is_lost = any(isinstance(each, str) for each in returned)
        if self.running and self.twin and line.is_block and is_lost and not is_random:
            found = self.follow(line, Call(self.twin[name], args, kwargs), sources, len(tensors))
            if not isinstance(found[0], str):
                self.note(tensors, found)
                self.show(line, sources, found)
                for inner in inside:
                    inner.unknown = None
        elif UNRECORDED in returned:
            line.unknown = UNRECORDED
        line.output_shape = tuple(tensors[0].shape[1:]) if tensors else ()
        self.returned.append((name, self.maps.get(id(tensors[0])) if tensors else None))

    def __torch_function__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        """Make the call; follow it if something comes from the images, and give it a line outside torch's layers."""
        given, kwargs = tensors_in((args, kwargs)), kwargs or {}
        self.used.update(map(id, given))
        if self.replaying or not self.running or not any(id(tensor) in self.maps for tensor in given):
            return func(*args, **kwargs)
        before = {id(tensor): tensor.detach() for tensor in given}  # in the shape that they have before the call
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        tensors = results_of(output, given, versions)
        if tensors and (tensors[0].dim() or tensors[0].dtype != torch.bool):  # but not for the truth of an assertion
            line, *_ = self.running[-1]
            if line.is_block:
                function = func.__name__.strip("_").removesuffix("_with_indices")  # relu for relu_, too
                name = f"{line.name}.{function}()" if line.depth else f"{function}()"
                line = Layer(name, len(self.running), "function", output_shape=tuple(tensors[0].shape[1:]))
                self.lines.append(line)
            call = Call(func, *map_tensors(lambda tensor: before[id(tensor)], (args, kwargs)))
            sources = [(before[key], self.maps[key]) for key in before if key in self.maps]
            constants = {
                id(before[key]) for key in before if key not in self.maps and not before[key].is_floating_point()
            }
            told = map_tensors(lambda tensor: tensor.tolist() if id(tensor) in constants else None, (args, kwargs))
            self.arguments.append(f"{line.name} {told}")
            found = self.follow(line, call, sources, len(tensors))
            self.note(tensors, found)
            self.show(line, sources, found)
        return output

    def follow(self, line: Layer, call: Call, sources: list, count: int) -> list[FeatureMap | str | None]:
        """Return the maps in the results of a call, or why they are not known."""
        number = len(self.arguments)
        if any(isinstance(known, str) for _, known in sources) or not self.twin:
            return [UNKNOWN_INPUT] * count
        if any(arguments[number - 1 : number] != self.arguments[-1:] for arguments in self.rehearsals):
            return [RANDOM] * count
        self.replaying = True
        try:
            found, passes = follow_call(call, sources)
        except WindowMismatchError as mismatch:
            self.mismatches.append(line.name)
            return [str(mismatch)] * count
        except Exception as error:  # whatever a function or a module does not like about a replay
            return [f"it refuses a replay: {first_line(error)}"] * count
        finally:
            self.replaying = False
        self.nan_passes &= passes
        return found if len(found) == count else ["it returns something else in a replay"] * count

    def note(self, tensors: list[Tensor], maps: list[FeatureMap | str | None]) -> None:
        """Remember what is known of tensors; None if they do not come from the images."""
        for tensor, known in zip(tensors, maps, strict=True):
            self.held.append(tensor)
            self.maps.pop(id(tensor), None)
            if known is not None:
                self.maps[id(tensor)] = known

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


def complete_lines(
    fields: FieldRun, model: nn.Module, runs: list[Measurement], batch_size: int
) -> tuple[list[Layer], int]:
    """Return the lines with what was measured, with parameters and buffers, each where it comes first, and with modules
    never called; and how many parameters several layers share, or one that is called several times.
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    lines, listed = fields.lines, {line.name for line in fields.lines}
    for name, module in modules.items() if not runs[-1].failure else ():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name not in listed and (own or is_layer(module)):
            # It may run in training alone, or another module may use what it has
            shape = runs[0].shapes.get((name, 1), () if fields.used.intersection(map(id, own)) else None)
            lines.append(Layer(name, 1, type(module).__name__, not is_layer(module), shape))
    calls, described, shared = Counter(), set(), set()
    total = sum(parameter.numel() for parameter in model.parameters())
    for line in [line for line in lines if line.name in modules]:
        calls[line.name] += 1
        key = (line.name if line.depth else "", calls[line.name])
        line.kept = extrapolate(runs, key, "kept", batch_size)
        line.macs = None if runs[0].measured[key]["uncounted"] else extrapolate(runs, key, "flops", 1) // 2
        own = dict(modules[line.name].named_parameters(recurse=False))
        shared.update(described.intersection(own.values()))
        sizes = {name: parameter.numel() for name, parameter in own.items() if parameter not in described}
        line.bias = sum(size for name, size in sizes.items() if "bias" in name)
        line.weight = sum(sizes.values()) - line.bias
        line.parameters = line.weight + line.bias
        line.share = round(100 * line.parameters / max(total, 1), 2)
        buffers = set(modules[line.name].buffers(recurse=False))
        line.buffers = sum(buffer.numel() for buffer in buffers - described)
        described.update(own.values(), buffers)
    return lines, sum(parameter.numel() for parameter in shared)


def add_up_memory(model: nn.Module, batch_size: int, size: tuple[int, int], kept: int, at_work: int) -> list[Memory]:
    """Return the parts of a training step with SGD and momentum, and of inference, and their sum."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [list(model.parameters()), trained, list(model.buffers())]
    parameters, trainable, buffers = (sum(t.numel() * t.element_size() for t in group) for group in tensors)
    pixels = 4 * batch_size * math.prod(size)
    memory = [
        Memory("parameters", "weights and biases", parameters, parameters),
        Memory("gradients", "one for each trainable parameter", trainable, 0),
        Memory("momentum", "SGD's running sum of gradients", trainable, 0),
        Memory("buffers", "stored but not trained", buffers, buffers),
        Memory("input and target", "images, and in training int64 labels", pixels + 8 * batch_size, pixels),
        Memory("activations kept for backward", "the layers' column `kept`", kept, 0),
        Memory("activations at work", "input and output of the largest layer", 0, at_work),
    ]
    return [*memory, Memory("sum", "", sum(part.training for part in memory), sum(part.inference for part in memory))]


def run_checks(model: nn.Module, lines: list[Layer], runs: list[Measurement], fields: FieldRun) -> list[Check]:
    """Compare numbers that are known in two ways."""
    listed, total = sum(line.parameters for line in lines), sum(p.numel() for p in model.parameters())
    miscounted = [name for run in runs for name in run.miscounted]
    return [
        verdict("parameters", [] if listed == total else ["the total"], f"those of the layers add up to {total:,}"),
        verdict("MACs", miscounted, "torch's FLOP counter agrees with the formula for convolutions and linear layers")
        if FlopCounterMode
        else Check("MACs", None, "torch has its FLOP counter since version 2.1"),
        verdict("windows", fields.mismatches, "convolutions and poolings read what they declare, as far as probed"),
        check_fields(fields),
    ]


def check_fields(fields: FieldRun) -> Check:
    """Probe the whole model with NaN in rows and columns of pixels: units must see what the table says."""
    size = fields.images.shape[2:]
    run = 10 if math.prod(size) <= 2**10 else 2 if math.prod(size) < 2**14 else 1  # see `take_pictures`
    which = "all" if max(size) <= 3 * run else f"the first, middle, last {run}"
    followed = [
        (name or fields.lines[0].name, known) for name, known in fields.returned if isinstance(known, FeatureMap)
    ]
    try:
        if fields.failure or not followed:
            raise CannotFollowError(fields.failure or "no module's output is followed")
        call = Call(partial(units_of_modules, fields.twin[""], fields.returned), (fields.images,), {})
        if any(units.isnan().any() for units in call.replay({})):
            raise CannotFollowError("there is NaN without NaN in the images")
        pictures = take_pictures(call, fields.images, image_map(size), run)
    except Exception as error:  # whatever a user's forward raises
        return Check("receptive field", None, first_line(error))
    passes = fields.nan_passes
    wrong = [name for (name, known), seen in zip(followed, pictures, strict=True) if not agrees(known, seen, passes)]
    scope = f"{len(followed)} of {len(fields.returned)} modules return what sees the right pixels"
    return verdict("receptive field", wrong, f"{scope}: NaN in {which} rows, columns")


def units_of_modules(
    model: nn.Module, returned: list[tuple[str, FeatureMap | str | None]], images: Tensor
) -> list[Tensor]:
    """Run a model; return, of each output that is followed, the units (N, rows, columns), NaN if they hold any."""
    units, awaited = [], iter(returned)

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        expected, known = next(awaited)
        if name != expected:
            raise CannotFollowError("the model does not call the same modules again")
        if isinstance(known, FeatureMap):
            numbers = as_map(tensors_in(output)[0], known.place, known.size)
            units.append(torch.where(numbers.reshape(*numbers.shape[:3], -1).isnan().any(3), torch.nan, 0.0))

    handles = add_hooks(model, lambda *_: None, leave)
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return units


def agrees(known: FeatureMap, picture: Picture | str, nan_passes: bool) -> bool:
    """Tell whether probed rows and columns of pixels reach the units that a map says, as far as NaN passes at all."""
    rows, columns = (view.seen for view in known.views)  # (units, pixels)
    if isinstance(picture, str) or not all(map(is_consistent, known.views)):
        return False
    by_row = rows[:, picture.probed[0]].T[:, :, None] & columns.any(1)
    by_column = columns[:, picture.probed[1]].T[:, None, :] & rows.any(1)[:, None]
    expected = torch.cat([by_row, by_column])
    return picture.changed.equal(expected) if nan_passes else not (picture.changed & ~expected).any()


def is_consistent(view: View) -> bool:
    """Tell whether jump, receptive field and accumulated padding say what the units see, and no more."""
    first = torch.arange(view.axis.n_out) * view.axis.j_out - view.axis.P_out
    last = first + view.axis.r_out - 1
    pixels = torch.arange(view.seen.shape[1])
    outside = (pixels < first[:, None]) | (pixels > last[:, None])
    inner = (first >= 0) & (last < len(pixels))  # of these, those that read no padding see both ends
    ends = view.seen[inner].gather(1, torch.stack([first, last], dim=1)[inner])
    return bool((ends.all(1).any() or not len(ends)) and not (view.seen & outside).any())


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
    sampled = "Of maps with more than 30 rows or columns, the first, middle and last 10 were probed; of large ones, 4."
    note = [sampled] if max(analysis.input_size) > 30 else []
    note += [f"Left out, for they change none of these: {', '.join(sorted(left_out))}."] if left_out else []
    return [format_table(rows, text_columns=2), FIELDS_LEGEND, *reasons, *note]


def format_memory(analysis: Analysis) -> list[str]:
    """Return the table of memory."""
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


def centre_fields(analysis: Analysis) -> dict[str, dict[str, int]]:
    """Return the pixels that the centre unit sees after each block, some beyond the edge of the image."""
    blocks, block = {}, ""
    for layer in analysis.layers:
        block = layer.name if layer.depth <= 1 else block
        for field in layer.fields[-1:]:
            (top, height), (left, width) = (
                (axis.n_out // 2 * axis.j_out - axis.P_out, axis.r_out) for axis in (field["height"], field["width"])
            )
            blocks[block] = {"top": top, "left": left, "height": height, "width": width}
    return blocks


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, models = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    default = f"classes, or all (default: {default_model_name()})"
    add("--model", nargs="+", type=find_model_name, choices=[*models, "all"], help=default)
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
    if args.image:
        require_matplotlib()
        try:
            images, _ = load_mnist(args.data_dir, train=False, device=torch.device("cpu"))
        except OSError as error:
            raise ScriptError(f"{args.data_dir} has no test set to draw a digit of: run download_mnist.py") from error
        digit = nn.functional.interpolate(images[:1], tuple(args.input_size))[0, 0]
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
        draw_receptive_fields(args.image, digit, centre_fields(analysis))
    if problems:
        raise ScriptError("; ".join(problems))


if __name__ == "__main__":
    run_script(main)

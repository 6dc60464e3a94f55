"""Runs of a model that show what each call in it costs, and what it does to the maps that come from the images."""

import copy
import dataclasses
import math
import operator
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from receptive_fields import (
    MISMATCH,
    Axis,
    Dependence,
    FeatureMap,
    as_map,
    image_map,
    is_consistent,
    slide,
)
from replays import Call, follow_call, map_tensors, probe, results_of, tensors_in
from utils import describe_error

try:
    from torch.utils.flop_counter import FlopCounterMode
except ImportError:  # before torch 2.1
    FlopCounterMode = None

UNKNOWN_INPUT = "what comes in is not known"
THROUGH_VIEW = "it depends on a tensor that was changed through a view"
UNRECORDED = "what it returns comes from no call of a torch function on what it is given"
RANDOM = "the model's output differs from run to run"


@dataclasses.dataclass
class Layer:
    """A line of the report: a block, a layer, or a function that a block calls outside any layer."""

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
    fields: list[dict[str, Axis]] = dataclasses.field(
        default_factory=list
    )  # height and width, if it changes them
    unknown: str | None = None  # why the receptive field is not known
    is_merged: bool = False  # whether a block's line tells of it


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of torch's own without parts, so that the functions it calls are its own."""
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


@contextmanager
def hooks(model: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    """Let enter(name, module, args, kwargs) be called before each module, and leave(..., output) after it."""
    handles = []
    for (
        name,
        module,
    ) in model.named_modules():  # through nn.Module because scripted modules offer no hooks
        handles.append(
            nn.Module.register_forward_pre_hook(module, partial(enter, name), with_kwargs=True)
        )
        handles.append(
            nn.Module.register_forward_hook(module, partial(leave, name), with_kwargs=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that shares what cannot be copied: Python modules, and tensors left over from a computation."""
    values = [value for module in model.modules() for value in vars(module).values()]
    shared = [value for value in values if isinstance(value, types.ModuleType)]
    shared += [tensor for tensor in tensors_in(values) if not tensor.is_leaf]
    return copy.deepcopy(model, {id(value): value for value in shared})


def describe_failure(name: str, images: Tensor, error: Exception) -> str:
    """Say in one line what fails on the images."""
    height, width = images.shape[2:]
    return f"{name} fails on images of {height}x{width}: {describe_error(error)}"


@torch.no_grad()
def module_maps(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Return what each module makes of an image (1, 1, H, W): feature maps (C, h, w), or numbers as (C, 1, 1)."""
    maps = {}

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() in (2, 4):
            maps[name] = (
                output[0].reshape(output.shape[1], *(output.shape[2:] or (1, 1))).cpu().clone()
            )

    with (
        suppress(Exception),
        hooks(model.eval(), lambda *_: None, leave),
    ):  # the report tells what fails
        model(image)
    return maps


# What calls cost


class CostRun:
    """A run in training mode, with a backward pass if the batch is smaller than 3.

    `costs[name, n]` holds operations and bytes ("flops", "kept", "at work") of the nth call of a module, without those
    of the modules in it.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.costs: dict[tuple[str, int], Counter] = defaultdict(Counter)
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.failure: str | None = None
        self.miscounted: list[
            str
        ] = []  # modules for which torch's counter disagrees with the formula
        self.calls, self.running = Counter(), [("", 1)]
        self.counter, self.counted = FlopCounterMode(display=False) if FlopCounterMode else None, 0
        self.held = [
            images,
            *model.parameters(),
            *model.buffers(),
        ]  # so that no address is used twice
        self.given = {address(tensor) for tensor in self.held}
        self.seen = set(self.given)
        try:
            with (
                hooks(model, self.enter, self.leave),
                saved_tensors_hooks(self.keep, lambda tensor: tensor),
                self.counter or nullcontext(),
            ):
                model(images)
            self.held.clear()
            if len(images) < 3:  # once is enough, and the smaller batch needs less memory
                outputs = [tensor for tensor in tensors_in(model(images)) if tensor.requires_grad]
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
                model.zero_grad()
        except Exception as error:  # whatever a user's forward raises
            self.failure = describe_failure(
                self.running[-1][0] or type(model).__name__, images, error
            )

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps; memory that several calls keep counts for the first."""
        if tensor.dim() and address(tensor) not in self.seen:
            self.costs[self.running[-1]]["kept"] += tensor.untyped_storage().nbytes()
            self.seen.add(address(tensor))
            self.held.append(tensor)
        return tensor

    def count(self) -> None:
        """Add the operations since the last time to the module that runs."""
        flops = self.counter.get_total_flops() if self.counter else 0
        self.costs[self.running[-1]]["flops"] += flops - self.counted
        self.counted = flops

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run."""
        self.count()
        self.calls[name] += 1
        self.running.append((name, self.calls[name]))

    def leave(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        """Note what a module did."""
        self.count()
        key, inputs, outputs = self.running.pop(), tensors_in((args, kwargs)), tensors_in(output)
        sizes = {
            address(tensor): tensor.untyped_storage().nbytes() for tensor in [*inputs, *outputs]
        }
        self.costs[key]["at work"] = sum(size for at, size in sizes.items() if at not in self.given)
        self.shapes[key] = tuple(outputs[0].shape[1:]) if outputs else ()
        if is_layer(module) and inputs and inputs[0].is_floating_point():
            flops, weights = (
                self.costs[key]["flops"],
                [weight for weight in module.parameters() if weight.dim() > 1],
            )
            if not flops:
                self.costs[key]["uncounted"] = sum(
                    not spreads_over(weight, outputs[0]) for weight in weights
                )
            elif isinstance(module, nn.Conv2d | nn.Linear):
                wrong = flops != 2 * outputs[0].numel() * module.weight[0].numel()
                self.miscounted += [name] * wrong


def extrapolate(runs: list[CostRun], key: tuple[str, int], what: str, n: int) -> int:
    """Return what a call would measure on n images, from the runs on 2 and on 3, or from the only one on 1."""
    first, last = runs[0].costs[key][what], runs[-1].costs[key][what]
    return max(0, first + (last - first) * (n - 2))


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def spreads_over(weight: Tensor, output: Tensor) -> bool:
    """Tell whether a weight can be multiplied with an output number by number; else it makes a matrix product."""
    pairs = zip(reversed(weight.shape), reversed(output.shape), strict=False)
    return weight.dim() <= output.dim() and all(n in (1, m) for n, m in pairs)


# What calls do to maps


def map_of(tensor: Tensor) -> FeatureMap | str | None:
    """Return the map in a tensor, or why it is not known; None if it does not come from the images."""
    return getattr(tensor, "feature_map", None)


class FieldRun(TorchFunctionMode):
    """A run in evaluation mode: a line for each module, and for each call of a function outside torch's layers.

    A tensor that comes from the images has what `map_of` returns as its attribute `feature_map`. Modules are replayed
    in `twin`, a copy of the model in float64.
    """

    def __init__(self, model: nn.Module, images: Tensor, twin: nn.Module) -> None:
        super().__init__()
        self.lines: list[Layer] = []
        self.returned: list[tuple[str, FeatureMap | str | None]] = []  # by each module
        self.failure: str | None = None
        self.running: list[
            tuple
        ] = []  # a module's line, where the lines in it begin, and the maps it is given
        self.images, self.twin, self.replaying, self.nan_passes = (
            images,
            dict(twin.named_modules()),
            False,
            True,
        )
        images.feature_map = image_map(images.shape[2:])
        try:
            with hooks(model, self.enter, self.leave), self:
                model(images)
        except Exception as error:  # whatever a user's forward raises
            for line, *_ in self.running:
                self.failure, line.unknown = (
                    describe_failure(line.name, images, error),
                    "it fails in evaluation mode",
                )
        else:
            if is_random(model, images):
                self.failure = RANDOM
                for line in self.lines:
                    line.unknown = RANDOM if line.fields else line.unknown
                    line.fields.clear()

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run, and what is known of what it is given."""
        line = Layer(
            name or type(module).__name__,
            len(self.running),
            type(module).__name__,
            not is_layer(module),
        )
        self.lines.append(line)
        sources = [
            (tensor, map_of(tensor)) for tensor in tensors_in((args, kwargs)) if map_of(tensor)
        ]
        self.running.append((line, len(self.lines), sources))

    def leave(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        """Note what a module returns; follow it as a whole if a call in it cannot be followed."""
        line, start, sources = self.running.pop()
        tensors, inside = tensors_in(output), self.lines[start:]
        for tensor in tensors if sources else ():
            tensor.feature_map = map_of(tensor) or UNRECORDED
        maps = [map_of(tensor) for tensor in tensors]
        is_lost = any(isinstance(each, str) for each in maps)
        is_wrong = any(inner.unknown and inner.unknown.startswith(MISMATCH) for inner in inside)
        if self.running and line.is_block and is_lost and not is_wrong:
            found = self.follow(Call(self.twin[name], args, kwargs), sources, len(tensors))
            if not isinstance(found[0], str):
                settle(line, sources, tensors, found)
                for inner in inside:  # the block's line now says it all
                    inner.unknown, inner.is_merged = None, True
                    inner.fields.clear()
        elif UNRECORDED in maps:
            line.unknown = UNRECORDED
        line.output_shape = tuple(tensors[0].shape[1:]) if tensors else ()
        self.returned.append((line.name, map_of(tensors[0]) if tensors else None))

    def __torch_function__(
        self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        """Make the call; follow it if something comes from the images, and give it a line outside torch's layers."""
        given, kwargs = tensors_in((args, kwargs)), kwargs or {}
        if self.replaying or not self.running or not any(map(map_of, given)):
            return func(*args, **kwargs)
        before = {
            id(tensor): tensor.detach() for tensor in given
        }  # in the shape that they have before the call
        sources = [(before[id(tensor)], map_of(tensor)) for tensor in given if map_of(tensor)]
        call = Call(func, *map_tensors(lambda tensor: before[id(tensor)], (args, kwargs)))
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        tensors = results_of(output, given, versions)
        if tensors and (
            tensors[0].dim() or tensors[0].dtype != torch.bool
        ):  # but not for the truth of an assertion
            line, *_ = self.running[-1]
            if line.is_block:
                function = func.__name__.strip("_").removesuffix(
                    "_with_indices"
                )  # relu for relu_, too
                name = f"{line.name}.{function}()" if line.depth else f"{function}()"
                line = Layer(
                    name, len(self.running), "function", output_shape=tuple(tensors[0].shape[1:])
                )
                self.lines.append(line)
            settle(line, sources, tensors, self.follow(call, sources, len(tensors)))
            for tensor, before in zip(given, versions, strict=True):
                whole = tensor._base
                if (
                    tensor._version != before
                    and map_of(whole)
                    and not any(each is whole for each in given)
                ):
                    whole.feature_map = THROUGH_VIEW
        return output

    def follow(self, call: Call, sources: list, count: int) -> list[FeatureMap | str | None]:
        """Return the maps in the results of a call, or why they are not known."""
        if any(isinstance(known, str) for _, known in sources):
            return [
                THROUGH_VIEW
                if any(known == THROUGH_VIEW for _, known in sources)
                else UNKNOWN_INPUT
            ] * count
        self.replaying = True
        try:
            found, passes = follow_call(call, sources)
        except Exception as error:  # whatever a function or a module does not like about a replay
            return [f"it refuses a replay: {describe_error(error)}"] * count
        finally:
            self.replaying = False
        self.nan_passes &= passes
        return found if len(found) == count else ["it returns something else in a replay"] * count


def settle(
    line: Layer, sources: list, tensors: list[Tensor], found: list[FeatureMap | str | None]
) -> None:
    """Enter what a call does into its results and, of the first that comes from the images, into the report's line."""
    for tensor, known in zip(tensors, found, strict=True):
        tensor.feature_map = known
    first = next((each for each in found if each is not None), None)
    if isinstance(first, str):
        line.unknown = line.unknown or first
    elif first and not any(
        all(map(operator.is_, first.views, source.views)) for _, source in sources
    ):
        line.fields.append({})
        for name, view in zip(("height", "width"), first.views, strict=True):
            if any(
                view is each for _, source in sources for each in source.views
            ):  # only the other one changes
                view = slide(view, (1, 1, 0, 1), view.axis.n_out)
            line.fields[-1][name] = view.axis


def is_random(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a model returns something else when it is given the same images again."""
    runs = [[tensor.nan_to_num() for tensor in tensors_in(model(images))] for _ in range(4)]
    return not all(
        first.equal(again) for run in runs for first, again in zip(runs[0], run, strict=False)
    )


# The check of the whole model


def find_wrong_maps(fields: FieldRun) -> tuple[list[str] | None, str]:
    """Probe the whole model with rows and columns of pixels; return modules whose units see others, and the scope.

    If that cannot be done, return None and the reason.
    """
    followed = [(name, known) for name, known in fields.returned if isinstance(known, FeatureMap)]
    if fields.failure or not followed:
        return None, fields.failure or "no module's output is followed"
    images, size = fields.images, fields.images.shape[2:]
    run = 10 if math.prod(size) <= 2**10 else 2 if math.prod(size) < 2**14 else 1
    which = "all" if max(size) <= 3 * run else f"the first, middle, last {run}"
    call = Call(
        partial(units_of_modules, fields.twin[""], [known for _, known in fields.returned]),
        (images,),
        {},
    )
    try:
        dependence = next(probe(call, images, image_map(size), run))
    except Exception as error:  # whatever a user's forward raises in float64
        return None, f"in float64, {describe_error(error)}"
    wrong = []
    for (name, known), seen in zip(followed, dependence, strict=True):
        if isinstance(seen, str) or not agrees(known, seen, fields.nan_passes):
            wrong.append(name)
    scope = f"{len(followed)} of {len(fields.returned)} modules return what sees the right pixels"
    return wrong, f"{scope}: NaN in {which} rows, columns"


def units_of_modules(
    model: nn.Module, maps: list[FeatureMap | str | None], images: Tensor
) -> list[Tensor]:
    """Run a model; return the units (N, rows, columns) of each output that has a map, NaN if they hold any."""
    units, awaited = [], iter(maps)

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        known = next(awaited)
        if isinstance(known, FeatureMap):
            numbers = as_map(tensors_in(output)[0], known.place, known.size)
            units.append(
                torch.where(numbers.reshape(*numbers.shape[:3], -1).isnan().any(3), torch.nan, 0.0)
            )

    with hooks(model, lambda *_: None, leave):
        model(images)
    return units


def agrees(known: FeatureMap, seen: Dependence, nan_passes: bool) -> bool:
    """Tell whether probed rows and columns of pixels reach those units that a map says, all if NaN passes."""
    rows, columns = (view.seen for view in known.views)  # (units, pixels)
    by_row = rows[:, seen.probed[0]].T[:, :, None] & columns.any(1)
    by_column = columns[:, seen.probed[1]].T[:, None, :] & rows.any(1)[:, None]
    expected = torch.cat([by_row, by_column])
    same = seen.changed.equal(expected) if nan_passes else not (seen.changed & ~expected).any()
    return same and all(map(is_consistent, known.views))

"""Runs of a model that show what each call in it costs, and what it does to feature maps."""

import copy
import dataclasses
import math
import operator
import types
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
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
    apply_window,
    as_map,
    image_map,
    is_consistent,
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
    """A line of the report: a block, a layer, or a function called outside any layer."""

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

    # Height and width, if it changes them
    fields: list[dict[str, Axis]] = dataclasses.field(default_factory=list)
    unknown: str | None = None  # why the receptive field is not known
    is_merged: bool = False  # whether a block's line tells of it


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is a leaf module of torch.nn.

    The functions that it calls then have no lines of their own.
    """
    return type(module).__module__.startswith("torch.nn.") and not list(module.children())


@contextmanager
def hooks(model: nn.Module, enter: Callable, leave: Callable) -> Iterator[None]:
    """Call enter(name, module, args, kwargs) before each module and leave(..., output) after it."""
    # Through nn.Module because scripted modules offer no hooks
    add_before = nn.Module.register_forward_pre_hook
    add_after = nn.Module.register_forward_hook
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.enter_context(add_before(module, partial(enter, name), with_kwargs=True))
            stack.enter_context(add_after(module, partial(leave, name), with_kwargs=True))
        yield


def copy_model(model: nn.Module) -> nn.Module:
    """Return a copy that shares what cannot be copied.

    These are Python modules, and tensors left over from a computation.
    """
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
    """Return what each module makes of an image (1, 1, H, W).

    These are feature maps (C, h, w), or numbers as (C, 1, 1). If the model fails, those so far.
    """
    maps = {}

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        if isinstance(output, Tensor) and output.dim() in (2, 4):
            channels = output.shape[1]
            size = output.shape[2:] or (1, 1)
            maps[name] = output[0].reshape(channels, *size).cpu().clone()

    # The report tells what fails
    with suppress(Exception), hooks(model.eval(), lambda *_: None, leave):
        model(image)
    return maps


# What calls cost


class CostRun:
    """A run in training mode, with a backward pass if the batch is smaller than 3.

    `costs[name, n]` holds operations and bytes ("flops", "kept", "at work") of the nth call of a
    module, without those of the modules in it.
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.costs: dict[tuple[str, int], Counter] = defaultdict(Counter)
        self.shapes: dict[tuple[str, int], tuple[int, ...]] = {}
        self.failure = None

        # Modules for which torch's counter disagrees with the formula
        self.miscounted = []

        self.calls = Counter()
        self.running = [("", 1)]
        self.counter = FlopCounterMode(display=False) if FlopCounterMode else None
        self.counted = 0

        # Tensors kept alive, so that no address is used twice
        self.held = [images, *model.parameters(), *model.buffers()]
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
            name, _ = self.running[-1]
            self.failure = describe_failure(name or type(model).__name__, images, error)

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor that autograd keeps, for the first of the calls that keep its memory."""
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
        key = self.running.pop()
        costs = self.costs[key]
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(output)

        storages = [tensor.untyped_storage() for tensor in [*inputs, *outputs]]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        costs["at work"] = sum(size for at, size in sizes.items() if at not in self.given)
        self.shapes[key] = tuple(outputs[0].shape[1:]) if outputs else ()

        if not is_layer(module) or not inputs or not inputs[0].is_floating_point():
            return
        if not costs["flops"]:
            weights = [weight for weight in module.parameters() if weight.dim() > 1]
            costs["uncounted"] = sum(not spreads_over(weight, outputs[0]) for weight in weights)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            macs = outputs[0].numel() * module.weight[0].numel()
            if costs["flops"] != 2 * macs:
                self.miscounted.append(name)


def extrapolate(runs: list[CostRun], key: tuple[str, int], what: str, n: int) -> int:
    """Return what a call would measure on n images.

    The runs are one on 2 images and one on 3, or a single one on 1.
    """
    first = runs[0].costs[key][what]
    last = runs[-1].costs[key][what]
    return max(0, first + (last - first) * (n - 2))


def address(tensor: Tensor) -> int:
    """Return where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr()


def spreads_over(weight: Tensor, output: Tensor) -> bool:
    """Tell whether a weight can be multiplied with an output number by number.

    If not, the layer makes a matrix product.
    """
    pairs = zip(reversed(weight.shape), reversed(output.shape), strict=False)
    return weight.dim() <= output.dim() and all(n in (1, m) for n, m in pairs)


# What calls do to maps


def map_of(tensor: Tensor) -> FeatureMap | str | None:
    """Return the map in a tensor, or why it is not known.

    None if the tensor does not come from the images.
    """
    return getattr(tensor, "feature_map", None)


class FieldRun(TorchFunctionMode):
    """A run in evaluation mode.

    It makes a line for each module, and for each call of a function outside torch's layers. A
    tensor that comes from the images has what `map_of` returns as its attribute `feature_map`.
    Modules are replayed in `twin`, a copy of the model in float64.
    """

    def __init__(self, model: nn.Module, images: Tensor, twin: nn.Module) -> None:
        super().__init__()
        self.lines = []
        self.returned: list[tuple[str, FeatureMap | str | None]] = []  # by each module
        self.failure = None

        # A module's line, where the lines in it begin, and the maps it is given
        self.running = []

        self.images = images
        self.twin = dict(twin.named_modules())
        self.replaying = False
        self.nan_passes = True
        images.feature_map = image_map(images.shape[2:])
        try:
            with hooks(model, self.enter, self.leave), self:
                model(images)
        except Exception as error:  # whatever a user's forward raises
            for line, *_ in self.running:
                self.failure = describe_failure(line.name, images, error)
                line.unknown = "it fails in evaluation mode"
        else:
            if is_random(model, images):
                self.failure = RANDOM
                for line in self.lines:
                    line.unknown = RANDOM if line.fields else line.unknown
                    line.fields.clear()

    def enter(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note that a module starts to run, and what is known of what it is given."""
        class_name = type(module).__name__
        depth = len(self.running)
        line = Layer(name or class_name, depth, class_name, not is_layer(module))
        self.lines.append(line)
        given = tensors_in((args, kwargs))
        sources = [(tensor, map_of(tensor)) for tensor in given if map_of(tensor)]
        self.running.append((line, len(self.lines), sources))

    def leave(
        self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: object
    ) -> None:
        """Note what a module returns; follow it as a whole if a call in it cannot be followed."""
        line, start, sources = self.running.pop()
        inside = self.lines[start:]
        tensors = tensors_in(output)
        for tensor in tensors if sources else ():
            tensor.feature_map = map_of(tensor) or UNRECORDED
        maps = [map_of(tensor) for tensor in tensors]
        is_lost = any(isinstance(each, str) for each in maps)
        is_wrong = any(inner.unknown and inner.unknown.startswith(MISMATCH) for inner in inside)
        if self.running and line.is_block and is_lost and not is_wrong:
            found = self.follow(Call(self.twin[name], args, kwargs), sources, len(tensors))
            if not isinstance(found[0], str):
                record_maps(line, sources, tensors, found)
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
        """Make the call, and follow it if something comes from the images.

        It has a line of its own outside torch's layers.
        """
        kwargs = kwargs or {}
        given = tensors_in((args, kwargs))
        if self.replaying or not self.running or not any(map(map_of, given)):
            return func(*args, **kwargs)

        # In the shape that they have before the call
        before = {id(tensor): tensor.detach() for tensor in given}
        sources = [(before[id(tensor)], map_of(tensor)) for tensor in given if map_of(tensor)]
        call = Call(func, *map_tensors(lambda tensor: before[id(tensor)], (args, kwargs)))
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        tensors = results_of(output, given, versions)
        if not tensors or (tensors[0].dtype == torch.bool and not tensors[0].dim()):
            return output  # nothing to follow, or the truth of an assertion

        line, *_ = self.running[-1]
        if line.is_block:
            # relu for relu_, too
            function = func.__name__.strip("_").removesuffix("_with_indices")
            name = f"{line.name}.{function}()" if line.depth else f"{function}()"
            shape = tuple(tensors[0].shape[1:])
            line = Layer(name, len(self.running), "function", output_shape=shape)
            self.lines.append(line)
        found = self.follow(call, sources, len(tensors))
        record_maps(line, sources, tensors, found)

        for tensor, version in zip(given, versions, strict=True):
            whole = tensor._base
            is_given = any(each is whole for each in given)
            if tensor._version != version and map_of(whole) and not is_given:
                whole.feature_map = THROUGH_VIEW
        return output

    def follow(self, call: Call, sources: list, count: int) -> list[FeatureMap | str | None]:
        """Return the maps in the results of a call, or why they are not known."""
        reasons = [known for _, known in sources if isinstance(known, str)]
        if reasons:
            return [THROUGH_VIEW if THROUGH_VIEW in reasons else UNKNOWN_INPUT] * count

        self.replaying = True
        try:
            found, passes = follow_call(call, sources)
        except Exception as error:  # whatever a function or a module does not like about a replay
            return [f"it refuses a replay: {describe_error(error)}"] * count
        finally:
            self.replaying = False
        self.nan_passes &= passes
        if len(found) != count:
            return ["it returns something else in a replay"] * count
        return found


def record_maps(
    line: Layer, sources: list, tensors: list[Tensor], found: list[FeatureMap | str | None]
) -> None:
    """Record the maps that a call returns in its results, and the change in the report's line.

    The line tells of the first result that comes from the images.
    """
    for tensor, known in zip(tensors, found, strict=True):
        tensor.feature_map = known
    first = next((each for each in found if each is not None), None)
    if isinstance(first, str):
        line.unknown = line.unknown or first
    if not isinstance(first, FeatureMap):
        return

    views = [source.views for _, source in sources]
    if any(all(map(operator.is_, first.views, pair)) for pair in views):
        return  # nothing changes

    field = {}
    for name, view in zip(("height", "width"), first.views, strict=True):
        if any(view is each for pair in views for each in pair):  # only the other axis changes
            view = apply_window(view, (1, 1, 0, 1), view.axis.n_out)
        field[name] = view.axis
    line.fields.append(field)


def is_random(model: nn.Module, images: Tensor) -> bool:
    """Tell whether a model returns something else when it is given the same images again."""
    first, *others = (
        [tensor.nan_to_num() for tensor in tensors_in(model(images))] for _ in range(4)
    )
    return not all(all(map(Tensor.equal, first, other)) for other in others)


# The check of the whole model


def find_wrong_maps(fields: FieldRun) -> tuple[list[str] | None, str]:
    """Probe the whole model with rows and columns of pixels.

    Return the names of modules whose units see other pixels than their maps say, and the scope of
    the check; or None and the reason if that cannot be done.
    """
    followed = [(name, known) for name, known in fields.returned if isinstance(known, FeatureMap)]
    if fields.failure or not followed:
        return None, fields.failure or "no module's output is followed"

    images = fields.images
    size = images.shape[2:]
    pixels = math.prod(size)
    count = 10 if pixels <= 2**10 else 2 if pixels < 2**14 else 1
    which = "all" if max(size) <= 3 * count else f"the first, middle, last {count}"

    maps = [known for _, known in fields.returned]
    call = Call(partial(units_of_modules, fields.twin[""], maps), (images,), {})
    try:
        dependence = next(probe(call, images, image_map(size), count))
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
    """Run a model and return the units (N, rows, columns) of each output that has a map.

    A unit that holds any NaN is NaN, any other 0.
    """
    units = []
    awaited = iter(maps)

    def leave(name: str, module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        known = next(awaited)
        if isinstance(known, FeatureMap):
            numbers = as_map(tensors_in(output)[0], known.place, known.size)
            is_nan = numbers.reshape(*numbers.shape[:3], -1).isnan().any(3)
            units.append(torch.where(is_nan, torch.nan, 0.0))

    with hooks(model, lambda *_: None, leave):
        model(images)
    return units


def agrees(known: FeatureMap, seen: Dependence, nan_passes: bool) -> bool:
    """Tell whether probed rows and columns of pixels reach only those units that a map says.

    If NaN passes, they must reach all of them.
    """
    rows, columns = (view.seen for view in known.views)  # (units, pixels)
    by_row = rows[:, seen.probed[0]].T[:, :, None] & columns.any(1)
    by_column = columns[:, seen.probed[1]].T[:, None, :] & rows.any(1)[:, None]
    expected = torch.cat([by_row, by_column])
    if nan_passes and not seen.changed.equal(expected):
        return False
    if (seen.changed & ~expected).any():
        return False
    return all(map(is_consistent, known.views))

"""Replays: a call repeated with something else in one row, or one column, of a map that goes in.

What changes in the map that comes out depends on that row. NaN shows the most: nearly every
function passes it on.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from receptive_fields import CannotFollowError, Dependence, FeatureMap, Window, as_map, find_map


def map_tensors(function: Callable[[Tensor], object], value: object) -> object:
    """Return a copy of a value with function(tensor) in place of each tensor.

    Tensors are looked for in lists, tuples, dicts and dataclasses.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        if isinstance(value, list):
            return items
        is_named = hasattr(value, "_fields")
        return type(value)(*items) if is_named else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        vars(value).update(map_tensors(function, vars(value)))
    return value


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors that `map_tensors` finds, each once."""
    found = {}
    map_tensors(lambda tensor: found.setdefault(id(tensor), tensor), value)
    return list(found.values())


def results_of(output: object, given: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Return the tensors that a call returned, then those given to it that it changed in place.

    Of tensors that share their memory, which seem to change together, only the first.
    """
    changed = {}
    for tensor, before in zip(given, versions, strict=True):
        if tensor._version != before:
            changed.setdefault(tensor.untyped_storage().data_ptr(), tensor)
    return tensors_in([output, changed])


class Call(NamedTuple):
    """A call to repeat in float64, in which no fast algorithm spreads a NaN."""

    func: Callable
    args: tuple
    kwargs: dict

    def replay(self, replaced: dict[int, Tensor]) -> list[Tensor]:
        """Return the results on copies of the arguments.

        `replaced` holds tensors to take instead, by the ids of the arguments that they replace.
        """
        copies = []

        def copy_of(tensor: Tensor) -> Tensor:
            tensor = replaced.get(id(tensor), tensor)
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
            copies.append(tensor)
            return tensor

        args, kwargs = map_tensors(copy_of, (self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            output = self.func(*args, **kwargs)
            return results_of(output, copies, [0] * len(copies))

    def declared_windows(self) -> list[Window] | None:
        """Return the windows along height and width that a convolution or a pooling is called with.

        None for any other call.
        """
        pooling = "input", "kernel_size", "stride", "padding"
        convolution = "input", "weight", "bias", "stride", "padding", "dilation"
        names = {
            "conv2d": convolution,
            "max_pool2d": (*pooling, "dilation"),
            "avg_pool2d": pooling,
        }
        function = getattr(self.func, "__name__", "").lstrip("_").removesuffix("_with_indices")
        if function not in names:
            return None

        given = {"padding": 0, "dilation": 1}
        given.update(zip(names[function], self.args, strict=False))
        given.update(self.kwargs)
        if function == "conv2d":
            kernel = given["weight"].shape[2:]
            stride = given.get("stride") or 1
        else:
            kernel = given["kernel_size"]
            stride = given.get("stride") or kernel

        windows = []
        for axis in (0, 1):
            settings = kernel, stride, given["padding"], given["dilation"]
            k, s, p, d = (v[axis % len(v)] if isinstance(v, list | tuple) else v for v in settings)
            padding = {"valid": 0, "same": d * (k - 1) // 2}.get(p, p)
            windows.append((k, s, padding, d))
        return windows


def units_to_probe(n: int, count: int) -> Tensor:
    """Return all of n rows or columns, or the first, middle and last `count` if there are more."""
    if n <= 3 * count:
        return torch.arange(n)
    starts = 0, (n - count) // 2, n - count
    return torch.cat([torch.arange(count) + start for start in starts])


def probe(
    call: Call, source: Tensor, known: FeatureMap, count: int
) -> Iterator[list[Dependence | str]]:
    """Yield how each result of a call depends on one of its arguments, or why that is not known.

    Each answer is better than the one before. Of more than 3 * count rows or columns only the
    first, the middle and the last `count` are probed. Each image has one probe, but the last has
    none, to show if images are mixed. After NaN, other values are tried; then NaN again, with
    boolean arguments such as masks inverted, because a number that is not chosen does not show.
    """
    probed = tuple(units_to_probe(n, count) for n in known.size)
    probes = [(axis, unit) for axis in (0, 1) for unit in probed[axis].tolist()]
    inverted = {}
    for tensor in tensors_in((call.args, call.kwargs)):
        if tensor.dtype == torch.bool and tensor is not source:
            inverted[id(tensor)] = ~tensor

    found = []
    attempts = [(torch.nan, {}), (1e4, {}), (-1e4, {}), (torch.nan, inverted)]
    for attempt, (value, replaced) in enumerate(attempts):
        plain = call.replay(replaced)
        for result in plain if not found else ():
            if result.dim() and len(result) == len(source):
                changed = torch.zeros(len(probes), *result.shape[1:]) > 0
                found.append(Dependence(known, probed, changed))
            else:
                found.append("it folds the batch")

        if source.is_floating_point():
            other = source.new_tensor(value)
        elif source.dtype == torch.bool:
            other = ~source
        else:
            other = source.roll(1 + attempt, 0)

        for numbers in torch.arange(len(probes)).split(len(source) - 1):
            hidden = torch.zeros(source.shape) > 0
            hidden_map = as_map(hidden, known.place, known.size)
            for image, number in enumerate(numbers.tolist()):
                hidden_map[image].select(*probes[number]).fill_(True)

            changed_source = torch.where(hidden, other, source)
            shown = call.replay(replaced | {id(source): changed_source})
            for index, (result, base) in enumerate(zip(shown, plain, strict=True)):
                if isinstance(found[index], str):
                    continue
                changed = found[index].changed
                differs = (result != base) & (base == base)
                new = differs[: len(numbers)] & ~changed[numbers]
                changed[numbers] |= new
                is_nan = result != result
                if differs[len(numbers) :].any():
                    found[index] = "it mixes the images of a batch"
                elif new.any() and (attempt or not is_nan[differs].all()):
                    found[index] = found[index]._replace(by_nan=False)
        yield found


def follow_call(
    call: Call, sources: list[tuple[Tensor, FeatureMap]]
) -> tuple[list[FeatureMap | str | None], bool]:
    """Return the map in each result of a call, from the maps in its arguments.

    A result that cannot be followed has the reason instead, one that does not depend on these
    arguments has None. Also return whether NaN passes the call.
    """
    declared = call.declared_windows()
    probing = []
    for tensor, known in sources:
        if known.place != (tensor.dim() - 2, tensor.dim() - 1):
            declared = None

        # A declared window is only compared, and large maps take long: then fewer rows are probed
        is_large = math.prod(known.size) >= 2**14
        few, many = (1, 2) if declared else (4, 10)
        count = few if is_large else many
        probing.append(probe(call, tensor, known, count))

    found = []
    for by_source in zip(*probing, strict=True):
        by_result = list(zip(*by_source, strict=True))
        found = [find_result(branches, declared) for branches in by_result]
        if all(isinstance(each, FeatureMap) for each in found):
            break
    parts = [part for branches in by_result for part in branches]
    parts = [part for part in parts if isinstance(part, Dependence)]
    return found, all(part.by_nan for part in parts if part.changed.any())


def find_result(
    branches: tuple[Dependence | str, ...], declared: list[Window] | None
) -> FeatureMap | str | None:
    """Return the map in a result, or why it is not known.

    None if nothing shows that the result depends on any of the maps that go in.
    """
    for branch in branches:
        if isinstance(branch, str):
            return branch
    branches = [branch for branch in branches if branch.changed.any()]
    try:
        return find_map(branches, declared) if branches else None
    except CannotFollowError as reason:
        return str(reason)

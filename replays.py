"""Replays: a call repeated with something else in one row, or one column, of a map that goes in.

What changes in the map that comes out depends on that row. NaN shows the most: nearly every function passes it on.
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
    """Return a copy of a value with function(tensor) for each tensor that is in its lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return (
            items
            if isinstance(value, list)
            else type(value)(*items)
            if hasattr(value, "_fields")
            else tuple(items)
        )
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        vars(value).update(map_tensors(function, vars(value)))
    return value


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors that `map_tensors` finds, each once."""
    found: dict[int, Tensor] = {}
    map_tensors(lambda tensor: found.setdefault(id(tensor), tensor), value)
    return list(found.values())


def results_of(output: object, given: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Return the tensors that a call returned, then those given to it that it changed in place.

    Of tensors that share their memory, which seem to change together, only the first.
    """
    changed: dict[int, Tensor] = {}
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
        """Return the results on copies of the arguments, or of the tensors that replace them, by the ids of those."""
        copies: list[Tensor] = []

        def copy_of(tensor: Tensor) -> Tensor:
            tensor = replaced.get(id(tensor), tensor)
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            copies.append(tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
            return copies[-1]

        args, kwargs = map_tensors(copy_of, (self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return results_of(self.func(*args, **kwargs), copies, [0] * len(copies))

    def declared_windows(self) -> list[Window] | None:
        """Return the windows along height and width that a convolution or a pooling is called with, None for others."""
        pooling = ("input", "kernel_size", "stride", "padding")
        convolution = ("input", "weight", "bias", "stride", "padding", "dilation")
        names = {"conv2d": convolution, "max_pool2d": (*pooling, "dilation"), "avg_pool2d": pooling}
        function = getattr(self.func, "__name__", "").lstrip("_").removesuffix("_with_indices")
        if function not in names:
            return None
        given = (
            {"padding": 0, "dilation": 1}
            | dict(zip(names[function], self.args, strict=False))
            | self.kwargs
        )
        kernel = given["weight"].shape[2:] if function == "conv2d" else given["kernel_size"]
        stride = given.get("stride") or (1 if function == "conv2d" else kernel)
        windows = []
        for axis in (0, 1):
            settings = kernel, stride, given["padding"], given["dilation"]
            k, s, p, d = (v[axis % len(v)] if isinstance(v, list | tuple) else v for v in settings)
            windows.append((k, s, {"valid": 0, "same": d * (k - 1) // 2}.get(p, p), d))
        return windows


def probe(
    call: Call, source: Tensor, known: FeatureMap, run: int
) -> Iterator[list[Dependence | str]]:
    """Yield how each result of a call depends on one of its arguments, or why that is not known, better each time.

    Of more than 3 * run rows or columns only the first, the middle and the last run are probed. Each image has one
    probe, but the last has none, to show if images are mixed. After NaN, other values are tried; then NaN again, with
    boolean arguments such as masks inverted, because a number that is not chosen does not show.
    """
    some = [
        torch.cat([torch.arange(run) + start for start in (0, (n - run) // 2, n - run)])
        for n in known.size
    ]
    probed = tuple(
        torch.arange(n) if n <= 3 * run else part for n, part in zip(known.size, some, strict=True)
    )
    probes = [(axis, unit) for axis in (0, 1) for unit in probed[axis].tolist()]
    given = tensors_in((call.args, call.kwargs))
    inverted = {
        id(tensor): ~tensor
        for tensor in given
        if tensor.dtype == torch.bool and tensor is not source
    }
    found: list[Dependence | str] = []
    for attempt, (value, replaced) in enumerate(
        [(torch.nan, {}), (1e4, {}), (-1e4, {}), (torch.nan, inverted)]
    ):
        plain = call.replay(replaced)
        for result in plain if not found else ():
            is_batch = result.dim() and len(result) == len(source)
            changed = torch.zeros(len(probes), *result.shape[1:]) > 0
            found.append(Dependence(known, probed, changed) if is_batch else "it folds the batch")
        other = ~source if source.dtype == torch.bool else source.roll(1 + attempt, 0)
        other = source.new_tensor(value) if source.is_floating_point() else other
        for numbers in torch.arange(len(probes)).split(len(source) - 1):
            hidden = torch.zeros(source.shape) > 0
            for image, number in enumerate(numbers.tolist()):
                as_map(hidden, known.place, known.size)[image].select(*probes[number]).fill_(True)
            shown = call.replay(replaced | {id(source): torch.where(hidden, other, source)})
            for index, (result, base) in enumerate(zip(shown, plain, strict=True)):
                if isinstance(found[index], Dependence):
                    differs = (result != base) & (base == base)
                    new = differs[: len(numbers)] & ~found[index].changed[numbers]
                    found[index].changed[numbers] |= new
                    if differs[len(numbers) :].any():
                        found[index] = "it mixes the images of a batch"
                    elif new.any() and (attempt or (result == result)[differs].any()):
                        found[index] = found[index]._replace(by_nan=False)
        yield found


def follow_call(
    call: Call, sources: list[tuple[Tensor, FeatureMap]]
) -> tuple[list[FeatureMap | str | None], bool]:
    """Return the map in each result of a call, from the maps in its arguments, and whether NaN passes it.

    A result that cannot be followed has the reason instead, one that does not depend on these arguments has None.
    """
    declared, probing = call.declared_windows(), []
    for tensor, known in sources:
        is_large = math.prod(known.size) >= 2**14  # then few rows are probed, for time's sake
        declared = declared if known.place == (tensor.dim() - 2, tensor.dim() - 1) else None
        run = (
            (1 if is_large else 2) if declared else 4 if is_large else 10
        )  # a declared window is only compared
        probing.append(probe(call, tensor, known, run))
    found: list[FeatureMap | str | None] = []
    for by_source in zip(*probing, strict=True):
        by_result = list(zip(*by_source, strict=True))
        found = [find_result(branches, declared) for branches in by_result]
        if all(isinstance(each, FeatureMap) for each in found):
            break
    parts = [part for branches in by_result for part in branches if isinstance(part, Dependence)]
    return found, all(part.by_nan for part in parts if part.changed.any())


def find_result(
    branches: tuple[Dependence | str, ...], declared: list[Window] | None
) -> FeatureMap | str | None:
    """Return the map in a result, why it is not known, or None if nothing shows that the result depends on any."""
    reasons = [branch for branch in branches if isinstance(branch, str)]
    if reasons:
        return reasons[0]
    branches = [branch for branch in branches if branch.changed.any()]
    try:
        return find_map(branches, declared) if branches else None
    except CannotFollowError as reason:
        return str(reason)

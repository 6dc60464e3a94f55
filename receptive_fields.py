"""Receptive fields: what the units of a feature map see of the image, measured call by call.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019. They need the window of each call: kernel size, stride, padding and dilation. Convolutions and
poolings declare theirs. For any other function `follow_call` finds it by experiment: it repeats the call with NaN in
one row, or one column, of the map that goes in; what changes in the map that comes out depends on that row. A window
that explains all of this is the window of the call. Where there is none, as for a flip, CannotFollowError says so.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Place = tuple[int, int]  # the axes of a tensor (N, ...) along which rows and columns of a map lie; see `as_map`
Size = tuple[int, int]  # rows and columns


class CannotFollowError(Exception):
    """Says why receptive fields are not known after a call."""


class WindowMismatchError(Exception):
    """Says that a call does not read what the window that it declares reads."""


# The recurrences


@dataclasses.dataclass(frozen=True)
class Axis:
    """One layer along height or width. r and P count pixels of the image, p and n units of a map.

    After it, unit i sees pixels i * j_out - P_out to i * j_out - P_out + r_out - 1, those outside the image left out.
    """

    k: int | None  # the window; None if branches meet. s is 0 if all units read the same
    s: int | None
    p: int | None  # negative if the map is cropped
    d: int | None
    n_in: int  # size of the map
    n_out: int
    j_in: int  # jump: pixels from one unit to the next
    j_out: int
    r_in: int  # receptive field of a unit
    r_out: int
    P_in: int  # accumulated padding: how far the first unit's receptive field reaches past the image's edge
    P_out: int


class View(NamedTuple):
    """What the units of a map see along one axis."""

    axis: Axis
    seen: Tensor  # (n_out, image size) bool: the pixels, without padding and the gaps of dilation


class FeatureMap(NamedTuple):
    """A map in a tensor: where it lies there, and what its units see along height and width."""

    place: Place
    views: tuple[View, View]

    @property
    def size(self) -> Size:
        """Rows and columns."""
        return self.views[0].axis.n_out, self.views[1].axis.n_out


def image_map(size: Size) -> FeatureMap:
    """Return the map of images (N, 1, *size), where each unit is a pixel and sees itself."""
    height, width = (View(Axis(1, 1, 0, 1, n, n, 1, 1, 1, 1, 0, 0), torch.eye(n) > 0) for n in size)
    return FeatureMap((2, 3), (height, width))


def slide(view: View, window: Window, n_out: int) -> View:
    """Carry what the units see through a window that stops at n_out places."""
    k, s, p, d = window
    n, j, r, padding = view.axis.n_out, view.axis.j_out, view.axis.r_out, view.axis.P_out
    axis = Axis(k, s, p, d, n, n_out, j, j * s, r, r + d * (k - 1) * j, padding, padding + p * j)
    return View(axis, (reads_of(window, n_out, n).float() @ view.seen.float()) > 0)


def meet(before: list[View], after: list[View]) -> View:
    """Join branches, given before and after the call that joins them: a unit sees what it sees in any of them."""
    seen = torch.stack([view.seen for view in after])
    axes = [view.axis for view in after]
    if all(axis == axes[0] for axis in axes) and (seen == seen[0]).all():
        return after[0]
    if not seen.any(2).all(0).any():
        raise CannotFollowError("it puts maps side by side")
    seen, jumps = seen.any(0), sorted({axis.j_out for axis in axes})
    if len(jumps) > 1 and not (seen == seen[0]).all():
        raise CannotFollowError(f"branches with jumps {' and '.join(map(str, jumps))} meet")
    n, j = len(seen), jumps[0] if len(jumps) == 1 else 0
    padding = max(axis.P_out for axis in axes)
    end = max(axis.r_out - axis.P_out + (n - 1) * (axis.j_out - j) for axis in axes)
    widest = max((view.axis for view in before), key=lambda axis: axis.n_out)
    r_in, padding_in = (max(getattr(view.axis, name) for view in before) for name in ("r_out", "P_out"))
    return View(
        Axis(None, None, None, None, widest.n_out, n, widest.j_out, j, r_in, end + padding, padding_in, padding), seen
    )


# Windows


def reads_of(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which of n_in units a window reads at each of its n_out places, (n_out, n_in) bool."""
    k, s, p, d = window
    offset = torch.arange(n_in) + p - s * torch.arange(n_out)[:, None]  # from the first unit of the window
    return (offset >= 0) & (offset <= d * (k - 1)) & (offset % d == 0)


def fit_window(reads: Tensor, probed: Tensor, n_in: int) -> Window | None:
    """Return a window that reads, of the units `probed`, those in `reads` (n_out, len(probed)), or None."""
    counts = reads.sum(1)
    if not counts.any():
        return None
    place = int(counts.argmax())  # where the whole window is in the map
    units = probed[reads[place]]
    d = int(units.diff().min()) if len(units) > 1 else 1
    k = int(units[-1] - units[0]) // d + 1
    # The stride shows between two whole windows. A single one is that of a running sum, say, and tells no stride.
    strides = [k] if len(reads) == 1 else range(n_in + 1) if (counts == counts[place]).sum() > 1 else []
    windows = [(k, s, place * s - int(units[0]), d) for s in strides]
    return next((w for w in windows if reads_of(w, len(reads), n_in)[:, probed].equal(reads)), None)


def declared_windows(call: "Call") -> list[Window] | None:
    """Return the windows along height and width that a convolution or a pooling is called with, None for others."""
    pooling = ("input", "kernel_size", "stride", "padding")
    convolution = ("input", "weight", "bias", "stride", "padding", "dilation")
    names = {"conv2d": convolution, "max_pool2d": (*pooling, "dilation"), "avg_pool2d": pooling}
    function = getattr(call.func, "__name__", "").lstrip("_").removesuffix("_with_indices")
    if function not in names:
        return None
    given = {"padding": 0, "dilation": 1} | dict(zip(names[function], call.args, strict=False)) | call.kwargs
    kernel = given["weight"].shape[2:] if function == "conv2d" else given["kernel_size"]
    stride = given.get("stride") or (1 if function == "conv2d" else kernel)
    windows = []
    for axis in (0, 1):
        settings = kernel, stride, given["padding"], given["dilation"]
        k, s, p, d = (v[axis % len(v)] if isinstance(v, list | tuple) else v for v in settings)
        windows.append((k, s, {"valid": 0, "same": d * (k - 1) // 2}.get(p, p), d))
    return windows


# What a replay shows


def map_tensors(function: Callable[[Tensor], object], value: object) -> object:
    """Return a copy of a value with function(tensor) for each tensor that is in its lists, dicts and dataclasses."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [map_tensors(function, item) for item in value]
        return items if isinstance(value, list) else type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = copy.copy(value)
        vars(value).update(map_tensors(function, vars(value)))
    return value


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors that `map_tensors` finds."""
    found: list[Tensor] = []
    map_tensors(found.append, value)
    return found


def results_of(output: object, given: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Return the tensors that a call returned, then those given to it that it changed in place."""
    changed = [tensor for tensor, before in zip(given, versions, strict=True) if tensor._version != before]
    return list({id(tensor): tensor for tensor in [*tensors_in(output), *changed]}.values())


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


def as_map(tensor: Tensor, place: Place, size: Size) -> Tensor:
    """Return a view (N, rows, columns, the rest) of a tensor.

    An axis of -2 or -1 means a single row or column; twice the same axis means that it holds rows * columns units,
    behind the channels if it is longer.
    """
    row, column = place
    if row == column:
        tensor, row, column = tensor.unflatten(row, (-1, *size)), row + 1, row + 2
    return tensor[..., None, None].movedim((row, column), (1, 2))


def possible_maps(shape: torch.Size, source: FeatureMap) -> list[tuple[Place, Size]]:
    """Return where in a tensor (N, ...) a map made from `source` may lie, and its size, likelier ones first."""
    axes, units = range(1, len(shape)), math.prod(source.size)
    flat = [(a, a) for a in axes if shape[a] == units or (len(axes) == 1 and shape[a] % units == 0)]
    pairs = [(row, column) for column in reversed(axes) for row in reversed(axes) if row < column]
    one_unit, lines = (-2, -1), [line for axis in axes for line in ((axis, -1), (-2, axis))]
    size = {place: tuple(shape[axis] if axis > 0 else 1 for axis in place) for place in [*pairs, one_unit, *lines]}
    size |= dict.fromkeys(flat, source.size)
    own = [source.place] if source.place in size else []
    order = [place for place in [*own, *pairs, *flat] if size[place] == source.size]
    order = [*order, *own, one_unit, *pairs, *lines] if pairs else [one_unit, *flat, *lines]
    return [(place, size[place]) for place in order]


class Picture(NamedTuple):
    """What changes in a result with each probed row, then column, of the map that goes in."""

    source: FeatureMap
    probed: tuple[Tensor, Tensor]  # the rows and the columns
    changed: Tensor  # (rows and columns probed, *shape of one image's result) bool
    by_nan: bool  # whether NaN alone, coming out as NaN, shows all of it

    def read(self, place: Place, size: Size) -> tuple[Tensor, Tensor] | None:
        """Return which rows depend on which, (rows, probed), and which columns; None if the picture is no such map."""
        numbers = as_map(self.changed, place, size)
        numbers = numbers.reshape(*numbers.shape[:3], -1).split([len(units) for units in self.probed])
        by_row, by_column = (part.any(3) for part in numbers)
        rows, columns = by_row.any(2).T, by_column.any(1).T
        alive = by_row.any(0) | by_column.any(0)
        if not by_row.equal(rows.T[:, :, None] & alive.any(0)):
            return None
        if not by_column.equal(columns.T[:, None, :] & alive.any(1)[:, None]):
            return None
        # The numbers of a unit may see different parts of what the unit sees, as after pixel_unshuffle; but if all
        # units see the same, they must see all of it. Otherwise the rows or columns of this place are channels.
        used = numbers[0].any(0) | numbers[1].any(0)
        for reads, part in ((rows, numbers[0]), (columns, numbers[1])):
            if (reads == reads[0]).all() and not part.equal(reads[0][:, None, None, None] & used):
                return None
        return rows, columns


def take_pictures(call: Call, source: Tensor, source_map: FeatureMap, run: int) -> list[Picture | str]:
    """Repeat a call with probes in one of its arguments; return a picture of each result, or why there is none.

    Of more than 3 * run rows or columns only the first, the middle and the last run are probed. Each image has one
    probe, but the last has none, so that it shows if images are mixed. If NaN does not come out as NaN, other
    values are tried, too; and what a choice between two tensors hides shows when the choice is inverted.
    """
    some = [torch.cat([torch.arange(run) + start for start in (0, (n - run) // 2, n - run)]) for n in source_map.size]
    probed = tuple(torch.arange(n) if n <= 3 * run else s for n, s in zip(source_map.size, some, strict=True))
    probes = [(axis, unit) for axis in (0, 1) for unit in probed[axis].tolist()]
    given = tensors_in((call.args, call.kwargs))
    choices = {id(tensor): ~tensor for tensor in given if tensor.dtype == torch.bool and tensor is not source}
    pictures: list[Picture | str] = []
    for attempt, value in enumerate((torch.nan, 1e4, -1e4, torch.nan)):
        replaced = choices if attempt == 3 else {}
        plain = call.replay(replaced)
        if not attempt:
            for result in plain:
                is_batch = result.dim() and len(result) == len(source)
                changed = torch.zeros(len(probes), *result.shape[1:]) > 0
                picture = Picture(source_map, probed, changed, by_nan=True)
                pictures.append(picture if is_batch else "it folds the batch into something else")
        other = source.roll(1 + attempt, 0) if source.dtype != torch.bool else ~source
        other = torch.full_like(source, value) if source.is_floating_point() else other
        for numbers in torch.arange(len(probes)).split(len(source) - 1):
            hidden = torch.zeros(source.shape) > 0
            for image, number in enumerate(numbers.tolist()):
                as_map(hidden, source_map.place, source_map.size)[image].select(*probes[number]).fill_(True)
            shown = call.replay(replaced | {id(source): torch.where(hidden, other, source)})
            for index, (result, base) in enumerate(zip(shown, plain, strict=True)):
                if isinstance(pictures[index], Picture):
                    differs = (result != base) & (base == base)
                    new = differs[: len(numbers)] & ~pictures[index].changed[numbers]
                    pictures[index].changed[numbers] |= new
                    if differs[len(numbers) :].any():
                        pictures[index] = "it mixes the images of a batch"
                    elif new.any() and (attempt or (result == result)[differs].any()):
                        pictures[index] = pictures[index]._replace(by_nan=False)
        seen = all(isinstance(picture, str) or (picture.by_nan and picture.changed.any()) for picture in pictures)
        if seen and not choices:
            break
    return pictures


def follow_call(call: Call, sources: list[tuple[Tensor, FeatureMap]]) -> tuple[list[FeatureMap | str | None], bool]:
    """Return the map in each result of a call, from the maps in its arguments, and whether NaN passes it.

    A result that cannot be followed has the reason instead, one that does not depend on these arguments has None.
    Raises WindowMismatchError.
    """
    taken = []
    for tensor, feature_map in sources:
        is_large = math.prod(feature_map.size) >= 2**14  # then few rows are probed, for time's sake
        run = 4 if is_large else 10
        if declared_windows(call) and feature_map.place == (tensor.dim() - 2, tensor.dim() - 1):  # only compared
            run = 1 if is_large else 2
        taken.append(take_pictures(call, tensor, feature_map, run))
    found: list[FeatureMap | str | None] = []
    passed = True
    for of_result in zip(*taken, strict=True):
        reasons = [picture for picture in of_result if isinstance(picture, str)]
        pictures = [picture for picture in of_result if isinstance(picture, Picture) and picture.changed.any()]
        passed &= all(picture.by_nan for picture in pictures)
        try:
            found.append(reasons[0] if reasons else find_map(call, pictures) if pictures else None)
        except CannotFollowError as reason:
            found.append(str(reason))
    return found, passed


def find_map(call: Call, pictures: list[Picture]) -> FeatureMap:
    """Return the map in a result that all pictures of it agree on."""
    shape = pictures[0].changed.shape
    last_axes = (len(shape) - 2, len(shape) - 1)
    declared = declared_windows(call) if pictures[0].source.place == last_axes else None
    if declared and (len(pictures) > 1 or not pictures[0].by_nan):
        raise CannotFollowError("its window depends on the image")
    for place, size in [guess for picture in pictures for guess in possible_maps(shape, picture.source)]:
        found = [picture.read(place, size) for picture in pictures]
        if None in found or (declared and place != last_axes):
            continue
        windows = declared or (None, None)
        views = []
        for axis in (0, 1):
            before = [picture.source.views[axis] for picture in pictures]
            probed = [picture.probed[axis] for picture in pictures]
            reads = [both[axis] for both in found]
            after = [carry(*branch, windows[axis]) for branch in zip(before, reads, probed, strict=True)]
            views += [] if None in after else [meet(before, after)]
        if len(views) == 2:
            return FeatureMap(place, tuple(views))
    raise CannotFollowError("no window explains which rows and columns it reads")


def carry(view: View, reads: Tensor, probed: Tensor, declared: Window | None) -> View | None:
    """Return what the units see after a call that reads, of the units `probed`, those in `reads` (n_out, probed)."""
    n_in, n_out = view.axis.n_out, len(reads)
    window = declared or fit_window(reads, probed, n_in)
    if declared and not reads_of(declared, n_out, n_in)[:, probed].equal(reads):
        raise WindowMismatchError(f"it does not read what a window k, s, p, d = {declared} reads")
    changes_nothing = not declared and window == (1, 1, 0, 1) and n_out == n_in
    return None if window is None else view if changes_nothing else slide(view, window, n_out)

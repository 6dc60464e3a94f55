"""Receptive fields: what the units of a feature map see of the image, measured call by call.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019. They need each call's window: kernel size, stride, padding and dilation. Convolutions and
poolings are given theirs. For every other function, `follow_call` finds it by experiment: it repeats the call with
NaN in one row, or one column, of the feature map that goes in. What changes in the map that comes out depends on that
row, and a window that explains every such dependence is the window of the call, whatever the function is. Where there
is none, as for a flip or an interpolation, CannotFollowError says so.
"""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Layout = tuple[int, int]  # the axes of a tensor (N, ...) along which the rows and the columns of a map lie
IDENTITY: Window = (1, 1, 0, 1)
FOLDED = "it folds the batch into something else"


class CannotFollowError(Exception):
    """Says why receptive fields are not known after a call."""


class WindowMismatchError(Exception):
    """Says that a call does not read what the window that it declares reads."""


# The recurrences


@dataclasses.dataclass(frozen=True)
class Axis:
    """One layer along height or width, in pixels of the image except where noted.

    Unit i sees the pixels from i * j_out - P_out to i * j_out - P_out + r_out - 1, as far as they are in the image.
    """

    k: int | None  # kernel size, in units; these four are None where branches meet
    s: int | None  # stride, in units; 0 where every unit reads the same
    p: int | None  # padding, in units; negative where the map is cropped
    d: int | None  # dilation, in units
    n_in: int  # units before the layer
    n_out: int  # units after it
    j_in: int  # jump: pixels from one unit to the next; 0 where every unit sees the same pixels
    j_out: int
    r_in: int  # receptive field of one unit
    r_out: int
    P_in: int  # accumulated padding: by how far the first unit's receptive field reaches past the image's edge
    P_out: int


class View(NamedTuple):
    """What the units of a feature map see along one axis."""

    axis: Axis
    seen: Tensor  # (n_out, image size) bool: the pixels without padding and without the gaps of dilation


class FeatureMap(NamedTuple):
    """A feature map in a tensor: where it lies there, and what its units see along height and width."""

    layout: Layout
    views: tuple[View, View]

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.views[0].axis.n_out, self.views[1].axis.n_out


def image_map(height: int, width: int) -> FeatureMap:
    """Return the map of images (N, 1, height, width), where each unit is a pixel that sees itself."""
    views = [View(Axis(1, 1, 0, 1, n, n, 1, 1, 1, 1, 0, 0), torch.eye(n) > 0) for n in (height, width)]
    return FeatureMap((2, 3), tuple(views))


def slide(view: View, window: Window, n_out: int) -> View:
    """Carry what the units see through a window that stops at n_out places."""
    k, s, p, d = window
    n, j, r, padding = view.axis.n_out, view.axis.j_out, view.axis.r_out, view.axis.P_out
    axis = Axis(k, s, p, d, n, n_out, j, j * s, r, r + d * (k - 1) * j, padding, padding + p * j)
    return View(axis, (taps(window, n_out, n).float() @ view.seen.float()) > 0)


def meet(before: list[View], after: list[View]) -> View:
    """Combine branches, each given before and after the call that joins them: a unit sees what it sees in any."""
    if all(view.axis == after[0].axis and view.seen.equal(after[0].seen) for view in after):
        return after[0]
    seen = torch.stack([view.seen for view in after]).any(0)
    jumps = {view.axis.j_out for view in after}
    if len(jumps) > 1 and not (seen == seen[0]).all():
        raise CannotFollowError(f"branches with jumps {' and '.join(map(str, sorted(jumps)))} meet")
    if not torch.stack([view.seen.any(1) for view in after]).all(0).any():
        raise CannotFollowError("it puts maps side by side")
    n, j = len(seen), jumps.pop() if len(jumps) == 1 else 0
    first = min(-view.axis.P_out for view in after)
    end = max(view.axis.r_out - view.axis.P_out + (n - 1) * (view.axis.j_out - j) for view in after)
    widest = max((view.axis for view in before), key=lambda axis: axis.n_out)
    r_in, padding_in = (max(getattr(view.axis, key) for view in before) for key in ("r_out", "P_out"))
    axis = Axis(None, None, None, None, widest.n_out, n, widest.j_out, j, r_in, end - first, padding_in, -first)
    return View(axis, seen)


# Windows


def taps(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which units a window reads at each place, (n_out, n_in) bool."""
    k, s, p, d = window
    offset = torch.arange(n_in) + p - s * torch.arange(n_out)[:, None]  # from the window's first unit
    return (offset >= 0) & (offset <= d * (k - 1)) & (offset % d == 0)


def fit_window(reads: Tensor, probed: Tensor, n_in: int) -> Window | None:
    """Return a window that reads, of the units `probed`, those in `reads` (n_out, len(probed)), or None."""
    fullest = int(reads.sum(1).argmax())  # a place where the window does not reach into the padding
    units = probed[reads[fullest]]
    first, last = int(units[0]), int(units[-1])
    d = int(units.diff().min()) if len(units) > 1 else 1
    k = (last - first) // d + 1
    whole = int((reads.sum(1) == len(units)).sum())  # the places where all of it is read
    for s in [k] if len(reads) == 1 else range(n_in + 1) if whole > 1 else ():
        window = (k, s, fullest * s - first, d)
        if taps(window, len(reads), n_in)[:, probed].equal(reads):
            return window
    return None


def declared_windows(func: Callable, args: tuple, kwargs: dict) -> list[Window] | None:
    """Return the windows along height and width that a convolution or a pooling is called with, None for others."""
    names = {
        "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
        "max_pool2d": ("input", "kernel_size", "stride", "padding", "dilation"),
        "avg_pool2d": ("input", "kernel_size", "stride", "padding"),
    }.get(getattr(func, "__name__", "").lstrip("_").removesuffix("_with_indices"))
    if names is None:
        return None
    given = dict(zip(names, args, strict=False)) | kwargs
    kernel = given["weight"].shape[2:] if "weight" in given else given["kernel_size"]
    stride = given.get("stride") or (1 if "weight" in given else kernel)
    settings = kernel, stride, given.get("padding", 0), given.get("dilation", 1)
    windows = []
    for axis in (0, 1):
        k, s, p, d = (v[axis % len(v)] if isinstance(v, list | tuple) else v for v in settings)
        windows.append((k, s, {"valid": 0, "same": d * (k - 1) // 2}.get(p, p), d))
    return windows


# What a replay shows


def map_tensors(function: Callable[[Tensor], Tensor], value: object) -> object:
    """Return a copy of a value in which function(tensor) stands for each tensor that lists, dicts and the like hold."""
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
    """Return the tensors that `map_tensors` replaces."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor), value)
    return found


class Call(NamedTuple):
    """A call to repeat; dtype is that of the floating tensors in a replay: float64, where no fast algorithm spreads NaN."""

    func: Callable
    args: tuple
    kwargs: dict
    dtype: torch.dtype = torch.float64

    def replay(self, replaced: dict[int, Tensor]) -> list[Tensor]:
        """Repeat the call on copies of its tensors, or of those that `replaced` names by id; return `results`."""
        copies: list[Tensor] = []

        def copy_of(tensor: Tensor) -> Tensor:
            tensor = replaced.get(id(tensor), tensor)
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            copies.append(tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
            return copies[-1]

        args, kwargs = map_tensors(copy_of, (self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return results(self.func(*args, **kwargs), copies, [0] * len(copies))


def results(output: object, given: list[Tensor], versions: list[int]) -> list[Tensor]:
    """Return the tensors that a call returned, then those given to it that it changed in place."""
    changed = [tensor for tensor, before in zip(given, versions, strict=True) if version(tensor) != before]
    return list({id(tensor): tensor for tensor in [*tensors_in(output), *changed]}.values())


def version(tensor: Tensor) -> int:
    """Return a number that grows with each change in place."""
    return 0 if tensor.is_inference() else tensor._version


def as_map(tensor: Tensor, layout: Layout, size: tuple[int, int]) -> Tensor:
    """Return a view (N, rows, columns, the rest) of a tensor that holds a map."""
    row, column = layout
    if row == column:  # one axis of rows * columns, maybe behind the channels
        tensor, row, column = tensor.unflatten(row, (-1, *size)), row + 1, row + 2
    return tensor[..., None, None].movedim((row, column), (1, 2))


def possible_maps(shape: torch.Size, source: FeatureMap) -> list[tuple[Layout, tuple[int, int]]]:
    """Return where in a tensor (N, ...) a map that comes from `source` may lie, and its size, likelier ones first."""
    axes = range(1, len(shape))
    pairs = [(row, column) for column in reversed(axes) for row in reversed(axes) if row < column]
    flat = [(axis, axis) for axis in axes if shape[axis] == math.prod(source.size)]
    if len(axes) == 1 and shape[1] % math.prod(source.size) == 0:
        flat = [(1, 1)]
    one_unit, lines = (-2, -1), [line for axis in axes for line in ((axis, -1), (-2, axis))]
    own = [layout for layout in (*pairs, *flat, one_unit, *lines) if layout == source.layout]
    size = {layout: tuple(shape[axis] if axis > 0 else 1 for axis in layout) for layout in (*pairs, one_unit, *lines)}
    size |= dict.fromkeys(flat, source.size)
    order = [one_unit, *flat, *lines]
    if len(axes) > 1:
        order = [layout for layout in (*own, *pairs, *flat) if size[layout] == source.size]
        order += [*own, one_unit, *pairs, *lines]
    return [(layout, size[layout]) for layout in order]


def probed_units(n: int) -> Tensor:
    """Return which of n rows or columns are probed: all, or of more than 64 the first, the middle and the last 16."""
    return torch.arange(n) if n <= 64 else torch.cat([torch.arange(16) + at for at in (0, n // 2 - 8, n - 16)])


class Picture(NamedTuple):
    """Which numbers of a result change with each probed row, then column, of the map that goes in."""

    changed: Tensor  # (rows and columns probed, *shape of one image's result) bool
    rows: Tensor  # the rows probed
    columns: Tensor
    full: bool  # whether NaN alone, which comes out as NaN, shows all of it

    def read(self, layout: Layout, size: tuple[int, int]) -> tuple[Tensor, Tensor] | None:
        """Return which rows depend on which (n_out, probed), and which columns; None where that is not the picture."""
        numbers = as_map(self.changed, layout, size)
        numbers = numbers.reshape(*numbers.shape[:3], -1)
        units, cut = numbers.any(3), len(self.rows)
        rows, columns, alive = units[:cut].any(2).T, units[cut:].any(1).T, units.any(0)
        product = [rows.T[:, :, None] & alive.any(0), columns.T[:, None, :] & alive.any(1)[:, None]]
        if not units.equal(torch.cat(product)):
            return None
        # Numbers of one unit may see different parts of what it sees, but not if all units see the same: then a part
        # of the map lies where the layout has channels.
        for seen, part in ((rows, numbers[:cut]), (columns, numbers[cut:])):
            if (seen == seen[:1]).all() and not part.equal(
                part.any(3).any(2).any(1)[:, None, None, None] & numbers.any(0)
            ):
                return None
        return rows, columns


def take_pictures(call: Call, source: Tensor, feature_map: FeatureMap) -> list[Picture | str]:
    """Repeat a call with probes in one of its arguments; return a picture of each result, or why there is none.

    Each image has its own probe, the last one none: it shows whether images are mixed. Where NaN does not come out
    as NaN, other values are tried, too; what a choice hides shows when the choice is inverted.
    """
    rows, columns = map(probed_units, feature_map.size)
    probes = [(0, row) for row in rows.tolist()] + [(1, column) for column in columns.tolist()]
    choices = [
        tensor for tensor in tensors_in((call.args, call.kwargs)) if tensor.dtype == torch.bool and tensor is not source
    ]
    pictures: list[Picture | str] = []
    for way, value in enumerate((torch.nan, 1e4, -1e4, torch.nan)):
        given = {id(tensor): ~tensor for tensor in choices if way == 3}
        plain = call.replay(given)
        if way == 0:
            for result in plain:
                shown = torch.zeros(len(probes), *result.shape[1:]) > 0
                one_each = result.dim() and len(result) == len(source)
                pictures.append(Picture(shown, rows, columns, not choices) if one_each else FOLDED)
        other = torch.full_like(source, value) if source.is_floating_point() else source.roll(1 + way, 0)
        other = ~source if source.dtype == torch.bool else other
        for some in torch.arange(len(probes)).split(len(source) - 1):
            mask = torch.zeros(source.shape) > 0
            for image, probe in enumerate(some.tolist()):
                as_map(mask, feature_map.layout, feature_map.size)[image].select(*probes[probe]).fill_(True)
            probed = call.replay(given | {id(source): torch.where(mask, other, source)})
            for index, (result, base) in enumerate(zip(probed, plain, strict=True)):
                if isinstance(pictures[index], Picture):
                    differs = (result != base) & (base == base)
                    pictures[index].changed[some] |= differs[: len(some)]
                    if differs[-1].any():
                        pictures[index] = "it mixes the images of a batch"
                    elif not (result[differs] != result[differs]).all():
                        pictures[index] = pictures[index]._replace(full=False)
        if all(isinstance(picture, str) or (picture.full and picture.changed.any()) for picture in pictures):
            break
    return pictures


def follow_call(call: Call, sources: list[tuple[Tensor, FeatureMap]]) -> tuple[list[FeatureMap | str | None], bool]:
    """Return the map in each result of a call, given the tensors among its arguments that hold maps.

    A result that does not depend on these has None, one that cannot be followed the reason. The second value tells
    whether NaN passes the call. Raises WindowMismatchError.
    """
    taken = [take_pictures(call, tensor, feature_map) for tensor, feature_map in sources]
    outcome, passes = [], True
    for pictures in zip(*taken, strict=True):
        reasons = [picture for picture in pictures if isinstance(picture, str)]
        if reasons:
            outcome.append(reasons[0])
            continue
        found = [
            (feature_map, tensor.dim(), picture)
            for (tensor, feature_map), picture in zip(sources, pictures, strict=True)
            if picture.changed.any()
        ]
        passes &= all(picture.full for *_, picture in found)
        try:
            outcome.append(find_map(call, found) if found else None)
        except CannotFollowError as reason:
            outcome.append(str(reason))
    return outcome, passes


def find_map(call: Call, found: list[tuple[FeatureMap, int, Picture]]) -> FeatureMap:
    """Return the map that all pictures of a result agree on; raises CannotFollowError."""
    declared = declared_windows(call.func, call.args, call.kwargs) if len(found) == 1 else None
    shape = found[0][2].changed.shape
    for source, _, _ in found:
        for layout, size in possible_maps(shape, source):
            matrices = [picture.read(layout, size) for *_, picture in found]
            if None in matrices:
                continue
            views = []
            for axis in (0, 1):
                before, after = [feature_map.views[axis] for feature_map, *_ in found], []
                for view, (_, _, picture), reads in zip(before, found, matrices, strict=True):
                    probed, reads = (picture.rows, picture.columns)[axis], reads[axis]
                    window = fit_window(reads, probed, view.axis.n_out)
                    if declared and source.layout == layout == (len(shape) - 2, len(shape) - 1):
                        window = declared[axis]
                        if not taps(window, size[axis], view.axis.n_out)[:, probed].equal(reads):
                            raise WindowMismatchError(f"{window}")
                    elif window is None:
                        break
                    unchanged = window == IDENTITY and size[axis] == view.axis.n_out and not declared
                    after.append(view if unchanged else slide(view, window, size[axis]))
                if len(after) == len(before):
                    views.append(meet(before, after))
            if len(views) == 2:
                return FeatureMap(layout, tuple(views))
    raise CannotFollowError("no window explains which rows and columns it reads")

"""Receptive fields: what the units of a feature map see of the image.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of Convolutional Neural
Networks", Distill 2019. They need the window of each call: kernel size, stride, padding and dilation. Convolutions and
poolings declare theirs. For any other call, `find_map` looks at which rows and columns of the map that comes out depend
on which of the map that goes in; a window that explains all of this is the window of the call. If there is none, as for
a flip, CannotFollowError says so.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Place = tuple[
    int, int
]  # the axes of a tensor (N, ...) along which rows and columns of a map lie; see `as_map`
Size = tuple[int, int]  # rows and columns

MISMATCH = "it does not read what its window says"


class CannotFollowError(Exception):
    """Says why receptive fields are not known after a call."""


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
    seen, axes = torch.stack([view.seen for view in after]), [view.axis for view in after]
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
    n_in, j_in = max((view.axis.n_out, view.axis.j_out) for view in before)
    r_in, padding_in = (
        max(getattr(view.axis, name) for view in before) for name in ("r_out", "P_out")
    )
    return View(Axis(*[None] * 4, n_in, n, j_in, j, r_in, end + padding, padding_in, padding), seen)


def is_consistent(view: View) -> bool:
    """Tell whether jump, receptive field and accumulated padding say what the units see, and no more."""
    first = torch.arange(view.axis.n_out) * view.axis.j_out - view.axis.P_out
    last = first + view.axis.r_out - 1
    pixels = torch.arange(view.seen.shape[1])
    outside = (pixels < first[:, None]) | (pixels > last[:, None])
    inner = (first >= 0) & (
        last < len(pixels)
    )  # of these, those that read no padding see both ends
    ends = view.seen[inner].gather(1, torch.stack([first, last], dim=1)[inner])
    return bool((ends.all(1).any() or not len(ends)) and not (view.seen & outside).any())


# Windows


def reads_of(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which of n_in units a window reads at each of its n_out places, (n_out, n_in) bool."""
    k, s, p, d = window
    offset = (
        torch.arange(n_in) + p - s * torch.arange(n_out)[:, None]
    )  # from the first unit of the window
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
    # The stride shows between two whole windows. A single one, as of a running sum, shows no stride.
    strides = (
        [k] if len(reads) == 1 else range(n_in + 1) if (counts == counts[place]).sum() > 1 else []
    )
    windows = [(k, s, place * s - int(units[0]), d) for s in strides]
    return next((w for w in windows if reads_of(w, len(reads), n_in)[:, probed].equal(reads)), None)


def carry(view: View, reads: Tensor, probed: Tensor, declared: Window | None) -> View | None:
    """Return what the units see after a call that reads, of the units `probed`, those in `reads` (n_out, probed)."""
    n_in, n_out = view.axis.n_out, len(reads)
    window = declared or fit_window(reads, probed, n_in)
    if declared and not reads_of(declared, n_out, n_in)[:, probed].equal(reads):
        raise CannotFollowError(f"{MISMATCH}, k, s, p, d = {declared}")
    changes_nothing = not declared and window == (1, 1, 0, 1) and n_out == n_in
    return None if window is None else view if changes_nothing else slide(view, window, n_out)


# Maps in tensors


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
    axes, units = range(len(shape) - 1, 0, -1), math.prod(source.size)
    pairs = [(row, column) for column in axes for row in axes if row < column]
    lines = [line for axis in axes for line in ((axis, -1), (-2, axis))]
    size = {
        place: tuple(shape[axis] if axis > 0 else 1 for axis in place)
        for place in [(-2, -1), *pairs, *lines]
    }
    flat = [
        axis
        for axis in axes
        if shape[axis] == units or (len(axes) == 1 and shape[axis] % units == 0)
    ]
    size |= {(axis, axis): source.size for axis in flat}
    return sorted(size.items(), key=lambda item: (item[1] != source.size, item[0] != source.place))


class Dependence(NamedTuple):
    """What changes in a result with each probed row, then column, of the map that goes in."""

    source: FeatureMap
    probed: tuple[Tensor, Tensor]  # the rows and the columns
    changed: Tensor  # (rows and columns probed, *shape of one image's result) bool
    by_nan: bool = True  # whether NaN alone, coming out as NaN, shows all of it

    def read(self, place: Place, size: Size) -> tuple[Tensor, Tensor] | None:
        """Return which rows depend on which, (rows, probed), and which columns; None if this is no such map."""
        numbers = as_map(self.changed, place, size)
        numbers = numbers.reshape(*numbers.shape[:3], -1).split(
            [len(units) for units in self.probed]
        )
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


def find_map(branches: list[Dependence], declared: list[Window] | None) -> FeatureMap:
    """Return the map in a result, from its dependence on each argument and the windows declared for height and width.

    Raises CannotFollowError.
    """
    shape = branches[0].changed.shape
    for place, size in [
        guess for branch in branches for guess in possible_maps(shape, branch.source)
    ]:
        found = [branch.read(place, size) for branch in branches]
        if None in found or (declared and place != (len(shape) - 2, len(shape) - 1)):
            continue
        views = []
        for axis in (0, 1):
            before = [branch.source.views[axis] for branch in branches]
            reads, probed = (
                [both[axis] for both in found],
                [branch.probed[axis] for branch in branches],
            )
            window = declared[axis] if declared else None
            after = [carry(*branch, window) for branch in zip(before, reads, probed, strict=True)]
            views += [] if None in after else [meet(before, after)]
        if len(views) == 2:
            return FeatureMap(place, tuple(views))
    raise CannotFollowError("no window explains which rows and columns it reads")

"""Receptive fields: what the units of a feature map see of the image.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of
Convolutional Neural Networks", Distill 2019. They need the window of each call: kernel size,
stride, padding and dilation. Convolutions and poolings declare theirs. For any other call,
`find_map` looks at which rows and columns of the map that comes out depend on which of the map that
goes in; a window that explains all of this is the window of the call. If there is none, as for a
flip, CannotFollowError says so.
"""

import dataclasses
import math
from typing import NamedTuple

import torch
from torch import Tensor

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Size = tuple[int, int]  # rows and columns

# The axes of a tensor (N, ...) along which rows and columns of a map lie; see `as_map`
Place = tuple[int, int]

MISMATCH = "it does not read what its window says"


class CannotFollowError(Exception):
    """Says why receptive fields are not known after a call."""


# The recurrences


@dataclasses.dataclass(frozen=True)
class Axis:
    """One layer along height or width. r and P count pixels of the image, p and n units of a map.

    After it, unit i sees pixels i * j_out - P_out to i * j_out - P_out + r_out - 1, without those
    outside the image.
    """

    # The window; None if branches meet
    k: int | None
    s: int | None  # 0 if all units read the same
    p: int | None  # negative if the map is cropped
    d: int | None

    # Size of the map
    n_in: int
    n_out: int

    # Jump: pixels from one unit to the next
    j_in: int
    j_out: int

    # Receptive field of a unit
    r_in: int
    r_out: int

    # Accumulated padding: how far the first unit's receptive field reaches past the image's edge
    P_in: int
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
    views = []
    for n in size:
        axis = Axis(1, 1, 0, 1, n, n, 1, 1, 1, 1, 0, 0)
        views.append(View(axis, torch.eye(n) > 0))
    return FeatureMap((2, 3), tuple(views))


def apply_window(view: View, window: Window, n_out: int) -> View:
    """Return what the units see after a window that stops at n_out places."""
    k, s, p, d = window
    before = view.axis
    axis = Axis(
        *window,
        n_in=before.n_out,
        n_out=n_out,
        j_in=before.j_out,
        j_out=before.j_out * s,
        r_in=before.r_out,
        r_out=before.r_out + d * (k - 1) * before.j_out,
        P_in=before.P_out,
        P_out=before.P_out + p * before.j_out,
    )
    reads = reads_of(window, n_out, before.n_out)
    return View(axis, (reads.float() @ view.seen.float()) > 0)


def merge_branches(before: list[View], after: list[View]) -> View:
    """Join branches, given before and after the call that joins them.

    A unit sees what it sees in any of them. Raises CannotFollowError.
    """
    axes = [view.axis for view in after]
    by_branch = torch.stack([view.seen for view in after])
    if all(axis == axes[0] for axis in axes) and (by_branch == by_branch[0]).all():
        return after[0]

    if not by_branch.any(2).all(0).any():
        raise CannotFollowError("it puts maps side by side")

    seen = by_branch.any(0)
    jumps = sorted({axis.j_out for axis in axes})
    if len(jumps) > 1 and not (seen == seen[0]).all():
        raise CannotFollowError(f"branches with jumps {' and '.join(map(str, jumps))} meet")

    n = len(seen)
    j = jumps[0] if len(jumps) == 1 else 0
    padding = max(axis.P_out for axis in axes)
    end = max(axis.r_out - axis.P_out + (n - 1) * (axis.j_out - j) for axis in axes)
    axes = [view.axis for view in before]
    n_in, j_in = max((axis.n_out, axis.j_out) for axis in axes)
    axis = Axis(
        *[None] * 4,
        n_in=n_in,
        n_out=n,
        j_in=j_in,
        j_out=j,
        r_in=max(axis.r_out for axis in axes),
        r_out=end + padding,
        P_in=max(axis.P_out for axis in axes),
        P_out=padding,
    )
    return View(axis, seen)


def is_consistent(view: View) -> bool:
    """Tell whether jump, receptive field and accumulated padding say what the units see.

    No unit sees more. Of those that read no padding, one sees both ends of its receptive field.
    """
    axis, seen = view
    first = torch.arange(axis.n_out) * axis.j_out - axis.P_out
    last = first + axis.r_out - 1
    pixels = torch.arange(seen.shape[1])
    outside = (pixels < first[:, None]) | (pixels > last[:, None])
    if (seen & outside).any():
        return False

    inner = (first >= 0) & (last < len(pixels))
    ends = torch.stack([first, last], dim=1)
    sees_ends = seen[inner].gather(1, ends[inner])
    return not len(sees_ends) or bool(sees_ends.all(1).any())


# Windows


def reads_of(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which of n_in units a window reads at each of its n_out places, (n_out, n_in) bool."""
    k, s, p, d = window
    starts = s * torch.arange(n_out) - p
    offset = torch.arange(n_in) - starts[:, None]
    return (offset >= 0) & (offset <= d * (k - 1)) & (offset % d == 0)


def fit_window(reads: Tensor, probed: Tensor, n_in: int) -> Window | None:
    """Return a window that reads, of the units `probed`, those in `reads` (n_out, len(probed)).

    None if there is no such window.
    """
    counts = reads.sum(1)
    if not counts.any():
        return None

    place = int(counts.argmax())  # where the whole window is in the map
    units = probed[reads[place]]
    d = int(units.diff().min()) if len(units) > 1 else 1
    k = int(units[-1] - units[0]) // d + 1

    # The stride shows between two whole windows. A single one, as of a running sum, shows none.
    if len(reads) == 1:
        strides = [k]
    elif (counts == counts[place]).sum() > 1:
        strides = range(n_in + 1)
    else:
        return None

    for s in strides:
        window = k, s, place * s - int(units[0]), d
        if reads_of(window, len(reads), n_in)[:, probed].equal(reads):
            return window
    return None


def view_after(view: View, reads: Tensor, probed: Tensor, declared: Window | None) -> View | None:
    """Return what the units see after a call, or None if no window explains it.

    The call reads, of the units `probed`, those in `reads` (n_out, len(probed)). Raises
    CannotFollowError if a declared window reads others.
    """
    n_in = view.axis.n_out
    n_out = len(reads)
    if declared:
        if not reads_of(declared, n_out, n_in)[:, probed].equal(reads):
            raise CannotFollowError(f"{MISMATCH}, k, s, p, d = {declared}")
        return apply_window(view, declared, n_out)

    window = fit_window(reads, probed, n_in)
    if window == (1, 1, 0, 1) and n_out == n_in:
        return view
    return apply_window(view, window, n_out) if window else None


# Maps in tensors


def as_map(tensor: Tensor, place: Place, size: Size) -> Tensor:
    """Return a view (N, rows, columns, the rest) of a tensor.

    An axis of -2 or -1 means a single row or column; twice the same axis means that it holds
    rows * columns units, behind the channels if it is longer.
    """
    row, column = place
    if row == column:
        tensor = tensor.unflatten(row, (-1, *size))
        row, column = row + 1, row + 2
    return tensor[..., None, None].movedim((row, column), (1, 2))


def possible_maps(shape: torch.Size, source: FeatureMap) -> list[tuple[Place, Size]]:
    """Return where in a tensor (N, ...) a map made from `source` may lie, and its size.

    Likelier places come first.
    """
    axes = range(len(shape) - 1, 0, -1)
    places = [(-2, -1)]
    places += [(row, column) for column in axes for row in axes if row < column]
    for axis in axes:
        places += [(axis, -1), (-2, axis)]
    sizes = {place: tuple(shape[axis] if axis > 0 else 1 for axis in place) for place in places}

    units = math.prod(source.size)
    for axis in axes:
        if shape[axis] == units or (len(axes) == 1 and shape[axis] % units == 0):
            sizes[axis, axis] = source.size
    return sorted(sizes.items(), key=lambda item: (item[1] != source.size, item[0] != source.place))


class Dependence(NamedTuple):
    """What changes in a result with each probed row, then column, of the map that goes in."""

    source: FeatureMap
    probed: tuple[Tensor, Tensor]  # the rows and the columns
    changed: Tensor  # (rows and columns probed, *shape of one image's result) bool
    by_nan: bool = True  # whether NaN alone, coming out as NaN, shows all of it

    def read(self, place: Place, size: Size) -> tuple[Tensor, Tensor] | None:
        """Return which rows depend on which, (rows, probed), and which columns.

        None if there is no such map.
        """
        numbers = as_map(self.changed, place, size)
        numbers = numbers.reshape(*numbers.shape[:3], -1)
        numbers = numbers.split([len(units) for units in self.probed])
        by_row, by_column = (part.any(3) for part in numbers)
        rows = by_row.any(2).T
        columns = by_column.any(1).T

        alive = by_row.any(0) | by_column.any(0)
        if not by_row.equal(rows.T[:, :, None] & alive.any(0)):
            return None
        if not by_column.equal(columns.T[:, None, :] & alive.any(1)[:, None]):
            return None

        # The numbers of a unit may see different parts of what the unit sees, as after
        # pixel_unshuffle; but if all units see the same, they must see all of it. Otherwise the
        # rows or columns of this place are channels.
        used = numbers[0].any(0) | numbers[1].any(0)
        for reads, part in zip((rows, columns), numbers, strict=True):
            all_same = (reads == reads[0]).all()
            if all_same and not part.equal(reads[0][:, None, None, None] & used):
                return None
        return rows, columns


def find_map(branches: list[Dependence], declared: list[Window] | None) -> FeatureMap:
    """Return the map in a result, from its dependence on each argument.

    `declared` holds the windows along height and width. Raises CannotFollowError.
    """
    shape = branches[0].changed.shape
    last_axes = len(shape) - 2, len(shape) - 1
    guesses = [guess for branch in branches for guess in possible_maps(shape, branch.source)]
    for place, size in guesses:
        if declared and place != last_axes:
            continue
        found = [branch.read(place, size) for branch in branches]
        if None in found:
            continue

        views = []
        for axis in (0, 1):
            window = declared[axis] if declared else None
            before = [branch.source.views[axis] for branch in branches]
            after = [
                view_after(view, reads[axis], branch.probed[axis], window)
                for view, reads, branch in zip(before, found, branches, strict=True)
            ]
            if None not in after:
                views.append(merge_branches(before, after))
        if len(views) == 2:
            return FeatureMap(place, tuple(views))
    raise CannotFollowError("no window explains which rows and columns it reads")

"""Receptive fields: what the units of a feature map see of the image.

`FieldRun` runs a model on noise and follows every call in it. The call is replayed on copies of
what it was given, with NaN in one row, or one column, of the map that goes in; what turns NaN
depends on that row or column. `find_map` looks for a map in the result, and for the window (kernel
size, stride, padding, dilation) that explains which rows and columns depend on which. The
recurrences then give jump, receptive field and accumulated padding. If no window explains a call,
its result is unknown, and so is everything that is computed from it.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of
Convolutional Neural Networks", Distill 2019.
"""

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from analysis.layer_costs import Layer, Run, address, copy_model, hooks, map_tensors, tensors_in
from utils import describe_error

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Size = tuple[int, int]  # rows and columns

FOLLOWS = "what comes in is not known"
CHANGED = "it was changed through another tensor that shares its memory"
UNSEEN = "it comes from no call of a torch function that can be seen"
INDEPENDENT = "what it returns does not depend on the image"
EVERYTHING = -1  # the number of the replay that replaces all of an argument
ATTEMPTS = 4  # replays of a call with other values
LARGE = 2**14  # so many units of a map take long: fewer of them are probed

# The arguments of calls that declare their windows
POOLING = "input", "kernel_size", "stride", "padding", "dilation"
DECLARING = {
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation"),
    "max_pool2d": POOLING,
    "avg_pool2d": POOLING[:4],
}


class CannotFollowError(Exception):
    """Says why no map is known in the result of a call."""


# What is known of a tensor


class Axis(NamedTuple):
    """What the units of a map see along its height or width.

    Unit i sees pixels i * j - P to i * j - P + r - 1 of the image, without those outside.
    """

    n: int  # size: the number of units
    j: int  # jump: pixels from one unit to the next; 0 if all see the same
    r: int  # receptive field of a unit, in pixels
    P: int  # accumulated padding: pixels by which the first unit's field passes the image's edge
    seen: Tensor  # (n, image size) bool: the pixels, without padding and the gaps of dilation

    # The call that made it: its window, None if branches meet, and the axis before it
    window: Window | None = None
    before: "Axis | None" = None


class Place(NamedTuple):
    """Where a map lies in a tensor whose images have been moved to the first axis."""

    row: int  # the axis of the rows; -3 if there is but one row
    column: int  # -2 if there is but one column

    # An axis that is split first: from this index on, into axes of these sizes
    split: tuple[int, int, tuple[int, ...]] | None = None

    batch: int = 0  # the axis of the images before it was moved


class FeatureMap(NamedTuple):
    """A map in a tensor: where it lies there, and what its units see along height and width."""

    place: Place
    axes: tuple[Axis, Axis]

    @property
    def size(self) -> Size:
        """Rows and columns."""
        return tuple(axis.n for axis in self.axes)


class Content(NamedTuple):
    """What a tensor holds of the images: a map, or something unknown, or else nothing."""

    map: FeatureMap | None = None
    unknown: str | None = None  # why no map is known


NOTHING = Content()


def image_map(size: Size) -> FeatureMap:
    """Return the map of images (N, 1, *size), where each unit is a pixel and sees itself."""
    height, width = (Axis(n, 1, 1, 0, torch.eye(n) > 0) for n in size)
    return FeatureMap(Place(2, 3), (height, width))


# The recurrences


def apply_window(axis: Axis, window: Window, n: int) -> Axis:
    """Return what the units see after a window that stops at n places."""
    k, s, p, d = window
    r = axis.r + d * (k - 1) * axis.j
    reads = reads_of(window, n, axis.n)
    seen = (reads.float() @ axis.seen.float()) > 0
    padding = axis.P + p * axis.j
    return Axis(n, axis.j * s, r, padding, seen, window, axis)


def merge_branches(before: list[Axis], after: list[Axis]) -> Axis:
    """Join branches, given before and after the call that joins them.

    A unit sees what it sees in any of them. Raises CannotFollowError.
    """
    first = after[0]
    by_branch = torch.stack([axis.seen for axis in after])
    has_same_numbers = all(axis[:4] == first[:4] for axis in after)
    if has_same_numbers and (by_branch == first.seen).all():
        pairs = zip(before, after, strict=True)
        _, largest = max(pairs, key=lambda pair: (pair[0].n, pair[0] is pair[1]))
        return largest

    if not by_branch.any(2).all(0).any():
        raise CannotFollowError("it puts maps side by side")

    seen = by_branch.any(0)
    jumps = sorted({axis.j for axis in after})
    if len(jumps) > 1 and not (seen == seen[0]).all():
        raise CannotFollowError(f"branches with jumps {' and '.join(map(str, jumps))} meet")

    j = jumps[0] if len(jumps) == 1 else 0
    padding = max(axis.P for axis in after)
    ends = []  # of the first unit's field, so wide that the last unit's is right with jump j
    for axis in after:
        surplus = (axis.n - 1) * (axis.j - j)
        ends.append(axis.r - axis.P + surplus)
    largest = max(before, key=lambda axis: axis[:2])
    r_in = max(axis.r for axis in before)
    padding_in = max(axis.P for axis in before)
    largest = largest._replace(r=r_in, P=padding_in)
    return Axis(first.n, j, max(ends) + padding, padding, seen, None, largest)


# Windows


def reads_of(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which of n_in units a window reads at each of its n_out places, (n_out, n_in) bool."""
    k, s, p, d = window
    starts = s * torch.arange(n_out) - p
    offset = torch.arange(n_in) - starts[:, None]
    return (offset >= 0) & (offset <= d * (k - 1)) & (offset % d == 0)


def find_window(reads: Tensor, probed: Tensor, n_in: int, declared: Window | None) -> Window | None:
    """Return a window that reads, of the units `probed`, those in `reads` (n_out, len(probed)).

    None if there is no such window, or if it is not the declared one.
    """
    n_out = len(reads)
    for window in [declared] if declared else possible_windows(reads, probed, n_in):
        if reads_of(window, n_out, n_in)[:, probed].equal(reads):
            return window
    return None


def possible_windows(reads: Tensor, probed: Tensor, n_in: int) -> list[Window]:
    """Return the windows that read what the unit with the most reads does."""
    counts = reads.sum(1)
    place = int(counts.argmax())  # where the whole window is in the map
    units = probed[reads[place]]
    if not len(units):
        return []
    first, last = int(units[0]), int(units[-1])
    d = 1
    if len(units) > 1:
        d = int(units.diff().min())
    k = (last - first) // d + 1

    # The stride shows between two whole windows. A single one, as of a running sum, shows none.
    has_two = (counts == counts[place]).sum() > 1
    strides = range(n_in + 1) if has_two else []
    if len(reads) == 1:
        strides = [k]
    return [(k, s, place * s - first, d) for s in strides]


def declared_windows(call: "Call") -> list[Window] | None:
    """Return the windows along height and width that a convolution or a pooling is called with.

    On a small map, only these tell what lies in the padding. None for any other call.
    """
    function = getattr(call.func, "__name__", "").lstrip("_").removesuffix("_with_indices")
    if function not in DECLARING:
        return None
    given = dict(zip(DECLARING[function], call.args, strict=False)) | call.kwargs
    kernel = given.get("kernel_size") or given["weight"].shape[2:]
    stride = given.get("stride") or given.get("kernel_size", 1)
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    if isinstance(padding, str):
        padding = np.subtract(kernel, 1) * dilation // 2 if padding == "same" else 0
    both_axes = [0, 0]
    settings = np.broadcast_arrays(kernel, stride, padding, dilation, both_axes)
    return np.stack(settings[:4], axis=1).tolist()


# Maps in tensors


def as_map(tensor: Tensor, place: Place) -> Tensor:
    """Return a view (N, rows, columns, the rest) of a tensor."""
    tensor = tensor.movedim(place.batch, 0)
    if place.split:
        axis, start, sizes = place.split
        tensor = tensor.narrow(axis, start, math.prod(sizes))
        tensor = tensor.unflatten(axis, sizes)
    tensor = tensor[..., None, None, None]  # in place of rows, columns or the rest that it lacks
    return tensor.movedim((place.row, place.column), (1, 2))


class Dependence(NamedTuple):
    """What changes in a result with each probed row, then column, of the map that goes in."""

    source: FeatureMap
    probed: tuple[Tensor, Tensor]  # the rows and the columns
    changed: Tensor  # (rows and columns probed, *shape of one image's result) bool
    batch: int  # the result's axis of the images
    windows: list[Window | None]  # along height and width, if the call declares them
    keeps_axes: bool  # whether the result has as many axes as the tensor that goes in

    def read(self, place: Place) -> list[Tensor] | None:
        """Return which rows depend on which, (rows, probed), and which columns.

        None if there is no such map.
        """
        numbers = as_map(self.changed, place).flatten(3)
        used = numbers.any(0)
        counts = [len(units) for units in self.probed]
        found = []
        for axis, part in enumerate(numbers.split(counts)):
            # The rows first; then the columns in their place
            part = part.transpose(1, 1 + axis)
            used = used.transpose(0, axis)
            by_unit = part.any(3)
            reads = by_unit.any(2)
            others = used.any(2).any(0)
            if not by_unit.equal(reads[:, :, None] & others):
                return None

            # The numbers of a unit may see different parts of what the unit sees, as after
            # pixel_unshuffle; but if all units see the same, they must see all of it. Otherwise
            # the rows or columns of this place are channels.
            same = reads[:, :1]
            all_of_it = same[..., None, None] & used
            if (reads == same).all() and not part.equal(all_of_it):
                return None
            found.append(reads.T)
        return found


def possible_places(branches: list[Dependence]) -> list[Place]:
    """Return where in a result a map may lie, first where one of the sources lies.

    A map lies along two axes, or one, or in one axis that holds its units row by row, before or
    after the channels. Numbers beside them that do not depend on the image, as those of a class
    token, are left out.
    """
    by_branch = [branch.changed.any(0) for branch in branches]
    live = torch.stack(by_branch).any(0)[None]
    axes = range(live.dim() - 1, 0, -1)
    if branches[0].windows[0]:
        return [Place(axes[1], axes[0])]

    pairs = itertools.product((-3, *axes), (-2, *axes))
    places = [Place(row, column) for row, column in pairs if row != column]
    sizes = {branch.source.size for branch in branches}
    for axis in axes:
        numbers = live.movedim(axis, 0).flatten(1)
        alive = numbers.any(1).nonzero()
        start, end = int(alive[0]), int(alive[-1])
        n = len(alive)
        factors = [(h, n // h) for h in range(1, n + 1)]
        for h, w in [*sizes, *factors]:
            channels = n // (h * w)
            if channels * h * w == n == end - start + 1:
                before, after = (channels, h, w), (h, w, channels)
                places.append(Place(axis + 1, axis + 2, (axis, start, before)))
                places.append(Place(axis, axis + 1, (axis, start, after)))

    known = {branch.source.place[:3] for branch in branches}
    return sorted(places, key=lambda place: place[:3] not in known)


def find_map(branches: list[Dependence]) -> FeatureMap:
    """Return the map in a result, from its dependence on each argument.

    Raises CannotFollowError.
    """
    sources = [branch.source for branch in branches if branch.keeps_axes]
    unchanged = {(source.place[:3], source.size) for source in sources}
    explained = []
    for place in possible_places(branches):
        axes = axes_at(place, branches)
        if axes:
            known = FeatureMap(place._replace(batch=branches[0].batch), axes)
            if (place[:3], known.size) in unchanged:
                return known
            explained.append(known)

    if explained:
        return min(explained, key=extent)
    for branch in branches:
        sees_all = all(axis.seen.all() for axis in branch.source.axes)
        if sees_all and branch.changed.any(0).all():
            axes = tuple(map(as_one_unit, branch.source.axes))
            return FeatureMap(Place(-3, -2, batch=branch.batch), axes)
    raise CannotFollowError("no window explains which rows and columns it reads")


def extent(known: FeatureMap) -> tuple[int, int]:
    """Return the area that a unit sees, and the number of units.

    Of maps that explain the same, the smallest is right. Of two axes that one was split into, the
    wrong one shows units that see further, with gaps; and channels are like units that all see the
    same.
    """
    height, width = known.axes
    return height.r * width.r, height.n * width.n


def as_one_unit(axis: Axis) -> Axis:
    """Return what a unit sees that sees what all these units see."""
    if axis.n == 1:
        return axis
    return apply_window(axis, (axis.n, axis.n, 0, 1), 1)


def axes_at(place: Place, branches: list[Dependence]) -> tuple[Axis, Axis] | None:
    """Return what the units of a map at that place see, or None if there is no such map.

    Raises CannotFollowError.
    """
    found = [branch.read(place) for branch in branches]
    if None in found:
        return None
    axes = []
    for number in (0, 1):
        before = [branch.source.axes[number] for branch in branches]
        after = []
        for axis, branch, both in zip(before, branches, found, strict=True):
            reads, declared = both[number], branch.windows[number]
            window = find_window(reads, branch.probed[number], axis.n, declared)
            if not window:
                return None
            n = len(reads)
            is_same = not declared and window == (1, 1, 0, 1) and n == axis.n
            after.append(axis if is_same else apply_window(axis, window, n))
        axes.append(merge_branches(before, after))
    return tuple(axes)


# Replays


class Call(NamedTuple):
    """A call to repeat in float64, in which no fast algorithm spreads a NaN."""

    func: Callable
    args: tuple
    kwargs: dict

    def replay(self, source: Tensor, other: Tensor, inverted: bool) -> list[Tensor]:
        """Return the results on copies of the arguments, with `other` in place of `source`.

        The results are the tensors that it returns, then the arguments that it changes in place.
        If `inverted`, other boolean arguments, such as masks, are inverted.
        """
        copies = []

        def copy_of(tensor: Tensor) -> Tensor:
            if tensor is source:
                tensor = other
            elif inverted and tensor.dtype == torch.bool:
                tensor = ~tensor
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            copies.append(tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
            return copies[-1]

        args, kwargs = map_tensors(copy_of, (self.args, self.kwargs))
        state = torch.get_rng_state()
        output = self.func(*args, **kwargs)
        torch.set_rng_state(state)
        return tensors_in([output, changed_in(copies, [0] * len(copies))])


def changed_in(given: list[Tensor], versions: list[int]) -> dict[int, Tensor]:
    """Return the tensors, by their addresses, that a call was given and has changed in place.

    Of tensors that share their memory, which seem to change together, only the first.
    """
    changed = {}
    for tensor, version in zip(given, versions, strict=True):
        if tensor._version != version:
            changed.setdefault(address(tensor), tensor)
    return changed


class Probe:
    """One argument of a call, with something else in one row, or one column, of its map.

    Each image has one probe, but the last has none, to show if images are mixed. Of many rows or
    columns, only the first, the middle and the last `count` are probed.
    """

    def __init__(self, call: Call, tensor: Tensor, known: FeatureMap, count: int | None = None):
        self.call = call
        self.tensor = tensor
        self.known = known
        self.n = tensor.shape[known.place.batch]
        self.windows = [None, None]
        last_axes = tensor.dim() - 2, tensor.dim() - 1
        if known.place[:2] == last_axes:
            self.windows = declared_windows(call) or self.windows

        # A declared window is only compared, and large maps take long: then fewer are probed
        few, many = (1, 2) if self.windows[0] else (4, 10)
        is_large = math.prod(known.size) >= LARGE
        count = count or (few if is_large else many)
        self.probed = [units_to_probe(n, count) for n in known.size]
        rows, columns = (units.tolist() for units in self.probed)
        self.probes = [(0, row) for row in rows]
        self.probes += [(1, column) for column in columns]

        # By the numbers of result and replay; the last replay replaces all of the argument
        self.differs = defaultdict(partial(defaultdict, bool))

    def replay(self, attempt: int) -> bool:
        """Repeat the call with each probe; tell whether what changes is NaN.

        If NaN does not pass, other values show more; then NaN again, with masks inverted, because
        a number that is not chosen does not show.
        """
        tensor = self.tensor
        values = torch.nan, 1e4, -1e4, torch.nan
        if tensor.is_floating_point():
            other = tensor.new_tensor(values[attempt])
        elif tensor.dtype == torch.bool:
            other = ~tensor
        else:
            other = tensor.roll(1 + attempt, self.known.place.batch)
        inverted = attempt == ATTEMPTS - 1
        plain = self.call.replay(tensor, tensor, inverted)
        is_nan = True
        step = self.n - 1
        starts = range(0, len(self.probes), step)
        for start in [*starts, EVERYTHING]:
            hidden = torch.full(tensor.shape, start == EVERYTHING)
            images = as_map(hidden, self.known.place)
            part = self.probes[start : start + step]
            for image, probe in enumerate(part):
                images[image].select(*probe).fill_(True)
            changed = torch.where(hidden, other, tensor)
            shown = self.call.replay(tensor, changed, inverted)
            for index, (result, base) in enumerate(zip(shown, plain, strict=True)):
                differs = (result != base) & (base == base)
                self.differs[index][start] |= differs
                is_nan &= bool((result != result)[differs].all())
        return is_nan

    def dependence(self, index: int) -> Dependence | None:
        """Return how a result depends on the map; None if not at all.

        Raises CannotFollowError.
        """
        *parts, everything = self.differs[index].values()
        if not everything.any():
            return None
        reason = "it folds the batch"
        differs = torch.stack(parts)
        for axis, size in enumerate(everything.shape):
            if size == self.n:
                images = differs.movedim(axis + 1, 1)
                probed, control = images.split([self.n - 1, 1], dim=1)
                probed = probed.flatten(0, 1)
                changed, unused = probed.tensor_split([len(self.probes)])
                if changed.any() and not control.any() and not unused.any():
                    keeps_axes = everything.dim() == self.tensor.dim()
                    return Dependence(
                        self.known, self.probed, changed, axis, self.windows, keeps_axes
                    )
                reason = "it mixes the images of a batch"
        raise CannotFollowError(reason)


def units_to_probe(n: int, count: int) -> Tensor:
    """Return all of n rows or columns, or the first, middle and last `count` if there are more."""
    units = torch.arange(n)
    start = max(0, n - count) // 2
    middle = units[start : start + count]
    parts = [units[:count], middle, units[-count:]]
    return torch.cat(parts).unique()


def follow_call(call: Call, sources: list) -> tuple[list[Content], bool]:
    """Return what each result of a call holds, from its arguments (tensor, map).

    Also return whether NaN passes the call.
    """
    probes = [Probe(call, tensor, known) for tensor, known in sources]
    for attempt in range(ATTEMPTS):
        is_nan = min([probe.replay(attempt) for probe in probes])
        contents = [find_content(probes, index) for index in probes[0].differs]
        if all(content.map for content in contents):
            break
    return contents, is_nan and not attempt


def find_content(probes: list[Probe], index: int) -> Content:
    """Return what a result holds."""
    try:
        branches = [probe.dependence(index) for probe in probes]
        branches = [branch for branch in branches if branch]
        return Content(find_map(branches)) if branches else NOTHING
    except CannotFollowError as reason:
        return Content(unknown=str(reason))


# A run of a model


class FieldRun(Run):
    """A run in evaluation mode on images of noise of that size, in which each call is followed.

    Functions outside torch's layers get a `Layer`, too. Modules are replayed in `twin`, a copy of
    the model in float64.
    """

    def __init__(self, model: nn.Module, twin: nn.Module, size: Size):
        # One image more than the probes in a replay; memory sets the limit
        n = 12 if math.prod(size) < LARGE else 4
        images = torch.rand(n, 1, *size)
        self.twin = dict(twin.named_modules())
        self.returned: list[tuple[str, Content]] = []  # by each module
        self.nan_passes = True
        self.given = []  # of each running module: where its inner layers begin, and its sources

        # Tensors by their ids, kept alive so that no id is used twice: what each holds, and how
        # often its memory had changed then
        self.contents: dict[int, tuple[Tensor, Content, int]] = {}
        self.changes = Counter()
        for tensor in tensors_in([vars(module) for module in model.modules()]):
            self.record(tensor, NOTHING)
        self.record(images, Content(image_map(size)))
        super().__init__(model, images)
        for layer in self.layers if self.failure else ():
            if layer.fields or layer is self.layers[-1]:
                layer.unknown = self.failure
                layer.fields.clear()

    def run(self, model: nn.Module) -> None:
        """Run the model, and again to see if it is random."""
        super().run(model)
        outputs = []
        for _ in range(4):
            tensors = tensors_in(model(self.images))
            outputs.append([tensor.nan_to_num() for tensor in tensors])
        first, *others = outputs
        if not all(all(map(Tensor.equal, first, other)) for other in others):
            self.failure = "the model's output differs from run to run"

    def record(self, tensor: Tensor, content: Content) -> None:
        """Note what a tensor holds."""
        changes = self.changes[address(tensor)]
        self.contents[id(tensor)] = tensor, content, changes

    def content_of(self, tensor: Tensor) -> Content:
        """Return what a tensor holds of the images."""
        if id(tensor) not in self.contents:
            is_batch = len(self.images) in tensor.shape
            return Content(unknown=UNSEEN) if is_batch else NOTHING
        _, content, changes = self.contents[id(tensor)]
        if changes != self.changes[address(tensor)]:
            return Content(unknown=CHANGED)
        return content

    def sources_in(self, value: object) -> list[tuple[Tensor, Content]]:
        """Return the tensors in a value that hold something of the images."""
        contents = [(tensor, self.content_of(tensor)) for tensor in tensors_in(value)]
        return [(tensor, content) for tensor, content in contents if any(content)]

    def enter(self, *args):
        """Note that a module starts to run, and what it is given."""
        super().enter(*args)
        sources = self.sources_in(args[2:])
        self.given.append((len(self.layers), sources))

    def leave(self, name, module, args, kwargs, output):
        """Note what a module returns; follow it as a whole if a call in it cannot be followed."""
        layer = self.running[-1]
        super().leave(name, module, args, kwargs, output)
        start, sources = self.given.pop()
        tensors = tensors_in(output)
        contents = [self.content_of(tensor) for tensor in tensors] or [NOTHING]
        lost = {content.unknown for content in contents} - {None}

        # A layer whose own call cannot be followed needs no second try
        has_parts = layer.is_block or FOLLOWS in lost
        if sources and self.running and lost and has_parts:

            def run_copy(*args, **kwargs):  # because a module may keep what it is given
                return copy_model(self.twin[name])(*args, **kwargs)

            whole = self.follow(Call(run_copy, args, kwargs), sources, len(tensors))
            if whole[0].map:
                for inner in self.layers[start - 1 :]:
                    inner.unknown, inner.is_merged = None, inner is not layer
                    inner.fields.clear()
                contents = whole
                self.note(layer, sources, tensors, whole)
        if contents[0].unknown == UNSEEN:
            layer.unknown = UNSEEN
        elif sources and tensors and not any(contents[0]):
            layer.unknown = INDEPENDENT
        self.returned.append((layer.name, contents[0]))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Make the call, and follow it if something comes from the images.

        It has a line of its own outside torch's layers.
        """
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)

        # Replay with the shapes before the call, which may change them in place
        given = tensors_in((args, kwargs))
        before = {id(tensor): tensor.detach() for tensor in given}
        arguments = map_tensors(lambda tensor: before[id(tensor)], (args, kwargs))
        call = Call(func, *arguments)
        sources = self.sources_in(given)
        sources = [(before[id(tensor)], content) for tensor, content in sources]
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        changed = changed_in(given, versions)
        tensors = tensors_in([output, changed])
        is_assertion = any(each.dtype == torch.bool and not each.dim() for each in tensors[:1])
        if not sources or is_assertion:
            for tensor in tensors:
                self.record(tensor, NOTHING)
        elif tensors:
            self.changes.update(changed.keys())
            layer = self.running[-1]
            if layer.is_block:
                layer = self.add_function(func, output)
            found = self.follow(call, sources, len(tensors))
            self.note(layer, sources, tensors, found)
        return output

    def add_function(self, func: Callable, output: object) -> Layer:
        """Return a new line for a function that is called outside torch's layers."""
        block = self.running[-1]
        function = func.__name__.strip("_").removesuffix("_with_indices")  # relu for relu_, too
        name = f"{block.name}.{function}()" if block.depth else f"{function}()"
        layer = Layer(name, len(self.running), "function")
        layer.output_shape = self.shape_of(output)
        self.layers.append(layer)
        return layer

    def follow(
        self, call: Call, sources: list[tuple[Tensor, Content]], count: int
    ) -> list[Content]:
        """Return what the `count` results of a call hold."""
        reasons = {content.unknown for _, content in sources if content.unknown}
        running, self.running = self.running, []  # so that replays are not followed
        try:
            if reasons:
                raise CannotFollowError([*(reasons & {CHANGED, UNSEEN}), FOLLOWS][0])
            maps = [(tensor, content.map) for tensor, content in sources]
            found, passes = follow_call(call, maps)
            self.nan_passes &= passes
        except CannotFollowError as reason:
            found = [Content(unknown=str(reason))] * count
        except Exception as error:  # whatever a function or a module does not like about a replay
            found = [Content(unknown=f"it refuses a replay: {describe_error(error)}")] * count
        self.running = running
        return found[:count]

    def note(
        self, layer: Layer, sources: list, tensors: list[Tensor], found: list[Content]
    ) -> None:
        """Note what a call returns in its results, and the change to the map in the report's line.

        The line tells of the first result that comes from the images.
        """
        for tensor, content in zip(tensors, found, strict=True):
            self.record(tensor, content)
        known, unknown = next(filter(any, found), NOTHING)
        layer.unknown = layer.unknown or unknown
        if known:
            before = {id(axis) for _, content in sources for axis in content.map.axes}
            is_new = [id(axis) not in before for axis in known.axes]
            height, width = map(table_row, known.axes, is_new)
            if any(is_new):
                layer.fields.append({"height": height, "width": width})


def table_row(axis: Axis, is_new: bool) -> dict[str, int | None]:
    """Return one layer along height or width, in the table's terms."""
    if not is_new:
        axis = axis._replace(window=(1, 1, 0, 1), before=axis)
    before = axis.before
    row = dict(zip("kspd", axis.window or [None] * 4, strict=True))
    for name in "njrP":
        row[f"{name}_in"] = getattr(before, name)
        row[f"{name}_out"] = getattr(axis, name)
    return row


# The check of the whole model


def check_fields(run: FieldRun) -> str:
    """Probe the whole model with rows and columns of pixels.

    Return "ok" if the units of all modules' outputs see those pixels that their maps say, "FAILED"
    if not, or "skipped" if that cannot be done; then what was found.
    """
    followed = [(name, content.map) for name, content in run.returned if content.map]
    if run.failure or not followed:
        return f"skipped: {run.failure or 'no output of a module is followed'}"

    def run_twin(images: Tensor) -> list[Tensor]:
        return nan_units(copy_model(run.twin[""]), run.returned, images)

    call = Call(run_twin, (run.images,), {})
    known = image_map(run.images.shape[2:])
    affordable = 10 * 2**10 // math.prod(known.size)  # because a whole model takes long
    count = max(1, min(10, affordable))
    probe = Probe(call, run.images, known, count)
    try:
        probe.replay(0)
    except Exception as error:  # whatever a user's forward raises in float64
        return f"skipped: in float64, {describe_error(error)}"
    wrong = [
        name
        for index, (name, expected) in enumerate(followed)
        if not agrees(expected, probe, index, run.nan_passes)
    ]
    if wrong:
        return f"FAILED: wrong at {', '.join(dict.fromkeys(wrong))}"
    return f"ok: {len(followed)} of {len(run.returned)} modules return what sees the right pixels"


def nan_units(
    model: nn.Module, returned: list[tuple[str, Content]], images: Tensor
) -> list[Tensor]:
    """Run a model and return the units (N, rows, columns) of each output that has a map.

    A unit that holds any NaN is NaN, any other 0.
    """
    units = []
    awaited = iter(returned)

    def leave(name, module, args, kwargs, output):
        _, content = next(awaited)
        if content.map:
            numbers = as_map(tensors_in(output)[0], content.map.place)
            is_nan = numbers.flatten(3).isnan().any(3)
            units.append(torch.where(is_nan, torch.nan, 0.0))

    with hooks(model, lambda *_: None, leave):
        model(images)
    return units


def agrees(known: FeatureMap, probe: Probe, index: int, nan_passes: bool) -> bool:
    """Tell whether probed rows and columns of pixels reach only those units that a map says.

    If NaN passes, they must reach all of them.
    """
    try:
        seen = probe.dependence(index)
    except CannotFollowError:
        return False
    rows, columns = (axis.seen for axis in known.axes)  # (units, pixels)
    probed_rows, probed_columns = probe.probed
    any_row = rows.any(1)[:, None]
    by_row = rows[:, probed_rows].T[:, :, None] & columns.any(1)
    by_column = columns[:, probed_columns].T[:, None, :] & any_row
    expected = torch.cat([by_row, by_column])
    changed = seen.changed if seen else torch.zeros_like(expected)
    if nan_passes and not changed.equal(expected):
        return False
    surplus = changed & ~expected
    return not surplus.any() and all(map(is_consistent, known.axes))


def is_consistent(axis: Axis) -> bool:
    """Tell whether jump, receptive field and accumulated padding say what the units see.

    No unit sees more. Those that read no padding do not all see less, at either end.
    """
    n, j, r, padding, seen, *_ = axis
    width = seen.shape[1]
    field = reads_of((r, j, padding, 1), n, width)
    without_first = reads_of((r - 1, j, padding - 1, 1), n, width)
    without_last = reads_of((r - 1, j, padding, 1), n, width)
    if (seen & ~field).any():
        return False
    is_whole = field.sum(1) == r
    sees_first = (seen & ~without_first)[is_whole].any()
    sees_last = (seen & ~without_last)[is_whole].any()
    return bool(sees_first and sees_last) or not is_whole.any()

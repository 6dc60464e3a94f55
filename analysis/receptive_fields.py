"""Receptive fields: what the units of a feature map see of the image.

`FieldRun` runs a model on noise and follows every call in it. The call is replayed on copies of
what it was given, with NaN in one row, or one column, of the map that goes in; what turns NaN
depends on that row or column. `find_map` tries to which rows and columns of a map the numbers of
the result may belong, and looks for the window (kernel size, stride, padding, dilation) that
explains which rows and columns depend on which. The recurrences then give jump, receptive field
and accumulated padding. If no window explains a call, its result is unknown, and so is everything
that is computed from it. In the end, the whole model is probed from the pixels.

The recurrences and their terms are those of Araujo, Norris, Sim, "Computing Receptive Fields of
Convolutional Neural Networks", Distill 2019.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from analysis.layer_costs import Layer, Run, address, copy_model, hooks, map_tensors, tensors_in
from utils import describe_error

Window = tuple[int, int, int, int]  # kernel size, stride, padding, dilation along one axis
Size = tuple[int, int]  # rows and columns

# For each number that a tensor holds of one image: the row and the column of the map that it
# belongs to, or -1 if it belongs to none. Both broadcast to the shape of `images_of(...)[0]`.
Units = tuple[Tensor, Tensor]

CHANGED = "it was changed through another tensor that shares its memory"
UNSEEN = "it comes from no call of a torch function that can be seen"
VALUES = torch.nan, 1e4, -1e4  # tried in place of a number until all that depends on it shows
LARGE = 2**14  # units of a map; in larger ones fewer are probed because each takes long

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
    pixels: int  # size of the image

    # The call that made it: its window, None if branches meet; the axis before it; and whether it
    # changes anything
    window: Window | None = None
    before: "Axis | None" = None
    is_new: bool = True

    @property
    def sees_all(self) -> bool:
        """Whether every unit's receptive field covers the image."""
        return (self.n - 1) * self.j <= self.P and self.r - self.P >= self.pixels


class FeatureMap(NamedTuple):
    """A map in a tensor: what its rows and columns see, and which numbers belong to them."""

    axes: tuple[Axis, Axis]
    units: Units
    batch: int  # the tensor's axis of the images

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
    axes = tuple(Axis(n, 1, 1, 0, n) for n in size)
    rows, columns = map(torch.arange, size)
    return FeatureMap(axes, (rows[:, None], columns), 0)


def images_of(tensor: Tensor, batch: int) -> Tensor:
    """Return a view (N, 1, 1, *the other axes) of a tensor whose images lie along axis `batch`.

    The added axes stand for rows or columns that the tensor lacks.
    """
    return tensor.movedim(batch, 0)[:, None, None]


# The recurrences


def apply_window(axis: Axis, window: Window, n: int, declared: bool = False) -> Axis:
    """Return what the units see after a window that stops at n places.

    A window that a call declares is always worth a row in the table.
    """
    k, s, p, d = window
    r = axis.r + d * (k - 1) * axis.j
    padding = axis.P + p * axis.j
    is_new = declared or n != axis.n or window != (1, 1, 0, 1)
    return Axis(n, axis.j * s, r, padding, axis.pixels, window, axis, is_new)


def merge_branches(after: tuple[Axis, ...]) -> Axis:
    """Join branches, given as each would be after the call without the others.

    A unit sees what it sees in any of them. Raises CannotFollowError.
    """
    n, j, _, _, pixels, *_ = after[0]
    if len({axis[:4] for axis in after}) == 1:
        return max(after, key=lambda axis: (axis.before.n, not axis.is_new))

    jumps = sorted({axis.j for axis in after})
    if len(jumps) > 1:
        if n > 1 and not any(axis.sees_all for axis in after):
            raise CannotFollowError(f"branches with jumps {' and '.join(map(str, jumps))} meet")
        j = 0

    # The first unit's field is so wide that the last unit's is right with jump j
    ends = [axis.r - axis.P + (n - 1) * (axis.j - j) for axis in after]
    padding = max(axis.P for axis in after)
    before = [axis.before for axis in after]
    largest = max(before, key=lambda axis: axis[:2])
    largest = largest._replace(
        r=max(axis.r for axis in before),
        P=max(axis.P for axis in before),
    )
    return Axis(n, j, max(ends) + padding, padding, pixels, None, largest)


# Windows


def reads_of(window: Window, n_out: int, n_in: int) -> Tensor:
    """Return which of n_in units a window reads at each of its n_out places, (n_out, n_in) bool."""
    k, s, p, d = window
    starts = s * torch.arange(n_out) - p
    offset = torch.arange(n_in) - starts[:, None]
    return (offset >= 0) & (offset <= d * (k - 1)) & (offset % d == 0)


def find_window(reads: Tensor, probed: Tensor) -> Window | None:
    """Return the only window that can explain which of the units `probed` are read at each place.

    `reads` is (n_out, len(probed)) bool. The places with the most reads, where the whole window is
    in the map, show kernel size, stride and dilation.
    """
    counts = reads.sum(1)
    places = (counts == counts.max()).nonzero().flatten().tolist()
    first, last = places[0], places[-1]
    units = probed[reads[first]].tolist()
    if not units:
        return None
    d = int(min(np.diff(units), default=1))
    k = (units[-1] - units[0]) // d + 1
    s = k
    if first < last:
        distance = int(probed[reads[last]][0]) - units[0]
        s = abs(distance) // (last - first)
    return k, s, first * s - units[0], d


def function_name(func: Callable) -> str:
    """Return the name of a torch function; relu_ is relu, too."""
    return func.__name__.strip("_").removesuffix("_with_indices")


def declared_windows(call: "Call") -> list[Window | None]:
    """Return the windows along height and width that a convolution or a pooling is called with.

    On a small map, only these tell what lies in the padding. None for any other call.
    """
    names = DECLARING.get(function_name(call.func))
    if not names:
        return [None, None]
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    kernel = given.get("kernel_size") or given["weight"].shape[2:]
    stride = given.get("stride") or given.get("kernel_size", 1)
    padding, dilation = given.get("padding", 0), given.get("dilation", 1)
    if isinstance(padding, str):
        padding = np.subtract(kernel, 1) * dilation // 2 if padding == "same" else 0
    settings = kernel, stride, padding, dilation
    by_setting = [np.broadcast_to(setting, 2) for setting in settings]
    return np.transpose(by_setting).tolist()


# Maps in tensors


class Dependence(NamedTuple):
    """What changes in a result with each probed row, then column, of the map that goes in."""

    probe: "Probe"
    changed: tuple[Tensor, Tensor]  # (rows or columns probed, *shape of `images_of(...)[0]`) bool
    live: Tensor  # (*shape of `images_of(...)[0]`) bool: what depends on the map at all
    batch: int  # the result's axis of the images

    def follow(self, units: Units) -> list[Axis] | None:
        """Return what rows and columns see if the numbers belong to them as `units` says.

        None if no windows explain what changes.
        """
        probe = self.probe
        marked = [mark_units(numbers, units) for numbers in self.changed]
        used = torch.cat(marked).any(0)
        axes = []
        for number, axis in enumerate(probe.known.axes):
            part = marked[number]
            by_unit = part.any(2 - number, keepdim=True)
            if not part.equal(by_unit & used.any(number, keepdim=True)):
                return None
            read = by_unit.flatten(1).T

            # The numbers of a unit may see different parts of what the unit sees, as after
            # pixel_unshuffle; but if all units see the same, they must see all of it. Otherwise
            # the rows or columns of this place are channels.
            all_of_it = read[0].sum() * self.live.sum()
            if (read == read[0]).all() and self.changed[number].sum() < all_of_it:
                return None
            n = len(read)
            probed = probe.probed[number]
            declared = probe.windows[number]
            window = declared or find_window(read, probed)
            if not window or not reads_of(window, n, axis.n)[:, probed].equal(read):
                return None
            axes.append(apply_window(axis, window, n, bool(declared)))
        return axes


def find_map(branches: list[Dependence]) -> FeatureMap:
    """Return the map in a result, from its dependence on each argument.

    Raises CannotFollowError.
    """
    lives = torch.stack([branch.live for branch in branches])
    sizes = {branch.probe.known.size for branch in branches}
    batch = branches[0].batch
    explained = []
    for units in possible_units(lives.any(0), sizes):
        followed = [branch.follow(units) for branch in branches]
        if None in followed:
            continue
        if not mark_units(lives, units).all(0).any():
            raise CannotFollowError("it puts maps side by side")
        axes = map(merge_branches, zip(*followed, strict=True))
        known = FeatureMap(tuple(axes), units, batch)
        if any(branch.probe.is_certain(units) for branch in branches):
            return known
        explained.append(known)

    if explained:
        return min(explained, key=extent)
    for branch in branches:
        before = branch.probe.known.axes
        if branch.live.all() and all(axis.sees_all for axis in before):
            axes = [apply_window(axis, (axis.n, axis.n, 0, 1), 1) for axis in before]
            return FeatureMap(tuple(axes), image_map((1, 1)).units, batch)
    raise CannotFollowError("no window explains which rows and columns it reads")


def extent(known: FeatureMap) -> tuple[int, int]:
    """Return the area that a unit sees, and the number of units.

    If several maps explain the same, the smallest is right: if an axis was split into two, the
    units of the wrong one see further, with gaps; and channels look like units that all see the
    same.
    """
    height, width = known.axes
    return height.r * width.r, height.n * width.n


def possible_units(live: Tensor, sizes: set[Size]) -> Iterator[Units]:
    """Yield each way in which the numbers of a result may belong to rows and columns of a map.

    A map lies along two axes, or one, or in one axis that holds its units row by row, before or
    after the channels, of which there may be several if it has one of the `sizes`. Numbers that do
    not depend on the image (see `live`), such as those of a class token, belong to no unit.
    """
    axes = []
    for axis, n in enumerate(reversed(live.shape)):
        axes.append(torch.arange(n).view(-1, *[1] * axis))
    for columns, rows in itertools.permutations(axes, 2):
        yield rows, columns
    for axis in axes:
        alive = live.float().sum_to_size(axis.shape) > 0
        count = int(alive.sum())
        factors = [(h, count // h) for h in range(1, count + 1)]
        for h, w in [*sizes, *factors]:
            channels = count // (h * w)
            if channels * h * w == count:
                for length in {1, channels}:
                    unit = (alive.cumsum(0) - 1) // length
                    rows, columns = unit // w % h, unit % w
                    yield torch.where(alive, rows, -1), torch.where(alive, columns, -1)


def mark_units(changed: Tensor, units: Units) -> Tensor:
    """Return the units with any number that changed, (K, rows, columns) bool.

    `changed` is (K, *shape of `images_of(...)[0]`) bool. Numbers that belong to no unit have not
    changed, so it does no harm that -1 is the last row or column here.
    """
    rows, columns = torch.broadcast_tensors(*units)
    marked = torch.zeros(len(changed), int(rows.max()) + 1, int(columns.max()) + 1)
    for image, numbers in zip(marked, changed, strict=True):
        counts = numbers.float().sum_to_size(rows.shape)
        image.index_put_((rows, columns), counts, accumulate=True)
    return marked > 0


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

        def copy_of(tensor):
            if tensor is source:
                tensor = other
            elif inverted and tensor.dtype == torch.bool:
                tensor = ~tensor
            dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
            copies.append(tensor.to(dtype, copy=True, memory_format=torch.contiguous_format))
            return copies[-1]

        args, kwargs = map_tensors(copy_of, (self.args, self.kwargs))
        with torch.random.fork_rng(devices=[]):
            output = self.func(*args, **kwargs)
        return tensors_in([output, [tensor for tensor in copies if tensor._version]])


class Probe:
    """One argument of a call, with something else in one row, or one column, of its map.

    Each image has one probe. The last image has none: if it changes, images are mixed. Of many rows
    or columns, only the first, the middle and the last are probed.
    """

    def __init__(self, call: Call, tensor: Tensor, known: FeatureMap):
        self.call = call
        self.tensor = tensor
        self.known = known
        self.n = tensor.shape[known.batch]
        self.windows = [None, None]
        usual = image_map(known.size).units
        if known.size == tensor.shape[-2:] and all(map(Tensor.equal, known.units, usual)):
            self.windows = declared_windows(call)

        # Large maps take long, and a declared window is only compared
        count = 4 if math.prod(known.size) >= LARGE else 10
        if self.windows[0]:
            count = 2
        self.probed = []
        hidden = []
        for units, n in zip(known.units, known.size, strict=True):
            starts = torch.tensor([[0], [(n - count) // 2], [n - count]])
            probed = starts + torch.arange(count)
            probed = probed.clamp(0, n - 1).unique()
            self.probed.append(probed)
            hidden += [units == unit for unit in probed]

        # The numbers to replace in each image of each replay; in the last replay, all of the map
        step = self.n - 1
        self.replays = [hidden[start : start + step] for start in range(0, len(hidden), step)]
        self.replays.append([known.units[0] >= 0] * self.n)

        # By the number of the result, then by that of the replay
        self.differs = defaultdict(lambda: defaultdict(bool))

    def is_certain(self, units: Units) -> bool:
        """Tell whether units are right for sure: the map lay there, or its windows are declared."""
        is_unmoved = all(map(Tensor.equal, units, self.known.units))
        return is_unmoved or bool(self.windows[0])

    def replay(self, value: float) -> bool:
        """Repeat the call with each probe; tell whether what changes is NaN.

        If NaN does not pass, other values show more; and masks are inverted, because a number that
        is not chosen does not show.
        """
        tensor = self.tensor
        other = (tensor == 0).to(tensor.dtype)
        if tensor.is_floating_point():
            other = tensor.new_tensor(value)
        inverted = not math.isnan(value)
        plain = self.call.replay(tensor, tensor, inverted)
        is_nan = True
        for number, hidden in enumerate(self.replays):
            mask = torch.zeros(tensor.shape, dtype=torch.bool)
            for image, numbers in zip(images_of(mask, self.known.batch), hidden, strict=False):
                image.copy_(numbers)
            changed = torch.where(mask, other, tensor)
            shown = self.call.replay(tensor, changed, inverted)
            for index, (result, base) in enumerate(zip(shown, plain, strict=True)):
                differs = (result != base) & (base == base)
                self.differs[index][number] |= differs
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
        counts = list(map(len, self.probed))
        for axis, size in enumerate(everything.shape):
            if size == self.n:
                images = differs.movedim(axis + 1, 1)
                changed = images[:, :-1].flatten(0, 1)[: sum(counts)]
                if changed.sum() == differs.sum():
                    live = images_of(everything, axis).any(0)
                    by_line = images_of(changed, 0).split(counts)
                    return Dependence(self, by_line, live, axis)
                reason = "it mixes the images of a batch"
        raise CannotFollowError(reason)


def find_content(probes: list[Probe], index: int) -> Content:
    """Return what a result holds."""
    try:
        found = [probe.dependence(index) for probe in probes]
        branches = list(filter(None, found))
        return Content(find_map(branches)) if branches else NOTHING
    except CannotFollowError as reason:
        return Content(unknown=str(reason))


# A run of a model


class FieldRun(Run):
    """A run in evaluation mode on images of noise of that size, in which each call is followed.

    Functions outside torch's layers get a `Layer`, too. Modules are replayed in a copy of the model
    in float64.
    """

    def __init__(self, model: nn.Module, size: Size):
        # One image more than the probes in a replay; memory sets the limit
        n = 12 if math.prod(size) < LARGE else 4
        images = torch.rand(n, 1, *size)
        self.twin = dict(copy_model(model).double().named_modules())
        self.returned = []  # name and content, by each module
        self.nan_passes = True
        self.given = []  # what the running modules are given that comes from the images

        # By the id of each tensor: the tensor, so that no id is used twice, and what it holds
        self.contents = {}
        self.record(tensors_in([vars(module) for module in model.modules()]), [NOTHING])
        self.record([images], [Content(image_map(size))])
        super().__init__(model, images)
        for layer in self.layers if self.failure else ():
            if layer.fields or layer is self.layers[-1]:
                layer.unknown = self.failure
                layer.fields.clear()

    def run(self, model: nn.Module) -> None:
        """Run the model, and again to see if it is random."""
        super().run(model)
        outputs = set()
        for _ in range(4):
            tensors = tensors_in(model(self.images))
            outputs.add(str([tensor.tolist() for tensor in tensors]))
        if len(outputs) > 1:
            self.failure = "the model's output differs from run to run"

    def record(self, tensors: list[Tensor], contents: list[Content]) -> None:
        """Note what tensors hold: a content for each, or one that is true of all."""
        for tensor, content in zip(tensors, itertools.cycle(contents), strict=False):
            self.contents[id(tensor)] = tensor, content

    def content_of(self, tensor: Tensor) -> Content:
        """Return what a tensor holds of the images."""
        is_batch = len(self.images) in tensor.shape
        unseen = Content(unknown=UNSEEN) if is_batch else NOTHING
        _, content = self.contents.get(id(tensor), (tensor, unseen))
        return content

    def sources_in(self, value: object) -> list[tuple[Tensor, Content]]:
        """Return the tensors in a value that hold something of the images."""
        return [
            (tensor, content)
            for tensor in tensors_in(value)
            if any(content := self.content_of(tensor))
        ]

    def enter(self, *args):
        """Note what a module is given, before it changes that."""
        self.given.append(self.sources_in(args[2:]))
        super().enter(*args)

    def leave(self, name, module, args, kwargs, output):
        """Note what a module returns; follow it as a whole if a call in it cannot be followed."""
        layer = self.running[-1]
        super().leave(name, module, args, kwargs, output)
        sources = self.given.pop()
        tensors = tensors_in(output)
        content = self.content_of(tensors[0]) if tensors else NOTHING
        if sources and self.running and content.unknown:

            def run_copy(*args, **kwargs):  # because a module may keep what it is given
                return copy_model(self.twin[name])(*args, **kwargs)

            whole = self.follow(Call(run_copy, args, kwargs), sources)
            if whole[0].map:
                for inner in self.layers[self.layers.index(layer) :]:
                    inner.unknown = None
                    inner.fields.clear()
                content = whole[0]
                self.record(tensors, whole)
                self.note(layer, whole)
        if content.unknown == UNSEEN:
            layer.unknown = UNSEEN
        elif sources and tensors and not any(content):
            layer.unknown = "what it returns does not depend on the image"
        self.returned.append((layer.name, content))

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Make the call, and follow it if something comes from the images.

        It has a line of its own outside torch's layers.
        """
        kwargs = kwargs or {}
        if not self.running:
            return func(*args, **kwargs)

        given = tensors_in((args, kwargs))
        sources = self.sources_in(given)
        found = self.follow(Call(func, args, kwargs), sources)  # before it changes what it is given
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)

        # Of tensors that share their memory, and so seem to change together, only the first
        changed = {}
        for tensor, version in zip(given, versions, strict=True):
            if tensor._version != version:
                changed.setdefault(address(tensor), tensor)
        if sources:
            void = [tensor for tensor, _ in self.contents.values() if address(tensor) in changed]
            self.record(void, [Content(unknown=CHANGED)])
        tensors = tensors_in([output, changed])
        if isinstance(output, Tensor) and not output.dim() and output.dtype == torch.bool:
            sources, found = [], [NOTHING]  # an assertion may ask for it
        self.record(tensors, found)
        if sources and tensors:
            layer = self.running[-1]
            if layer.is_block:
                layer = self.add_function(func, output)
            self.note(layer, found)
        return output

    def add_function(self, func: Callable, output: object) -> Layer:
        """Return a new line for a function that is called outside torch's layers."""
        block = self.running[-1]
        name = f"{function_name(func)}()"
        if block.depth:
            name = f"{block.name}.{name}"
        layer = Layer(name, len(self.running), "function")
        layer.output_shape = self.shape_of(output)
        self.layers.append(layer)
        return layer

    def follow(self, call: Call, sources: list[tuple[Tensor, Content]]) -> list[Content]:
        """Return what each result of a call holds, or one content that is true of all."""
        if not sources:
            return [NOTHING]
        reasons = {content.unknown for _, content in sources} - {None}
        if reasons:
            reason = min(reasons & {CHANGED, UNSEEN}, default="what comes in is not known")
            return [Content(unknown=reason)]
        running, self.running = self.running, []  # so that replays are not followed
        try:
            probes = [Probe(call, tensor, content.map) for tensor, content in sources]
            for value in VALUES:
                is_nan = min([probe.replay(value) for probe in probes])
                found = [find_content(probes, index) for index in probes[0].differs]
                if all(content.map for content in found):
                    break
            self.nan_passes &= is_nan and math.isnan(value)
        except Exception as error:  # whatever a function or a module does not like about a replay
            found = [Content(unknown=f"it refuses a replay: {describe_error(error)}")]
        self.running = running
        return found

    def note(self, layer: Layer, found: list[Content]) -> None:
        """Note in the report's line what a call does to the map.

        The line tells of the first result that comes from the images.
        """
        known, unknown = next(filter(any, found), NOTHING)
        layer.unknown = layer.unknown or unknown
        if known and any(axis.is_new for axis in known.axes):
            height, width = map(table_row, known.axes)
            layer.fields.append({"height": height, "width": width})


def table_row(axis: Axis) -> dict[str, int | None]:
    """Return what a layer does along height or width, in the table's terms."""
    row = dict(zip("kspd", axis.window or [None] * 4, strict=True))
    for name, number_in, number_out in zip("njrP", axis.before, axis, strict=False):
        row[f"{name}_in"] = number_in
        row[f"{name}_out"] = number_out
    return row


# The check of the whole model


def check_fields(run: FieldRun) -> str:
    """Probe the whole model with rows and columns of pixels.

    Return "ok" if jump, receptive field and accumulated padding of all modules' outputs say which
    pixels their units see, "FAILED" if not, or "skipped" if that cannot be done; then what was
    found.
    """
    followed = [(name, content.map) for name, content in run.returned if content.map]
    if run.failure or not followed:
        return f"skipped: {run.failure or 'no output of a module is followed'}"

    call = Call(lambda images: nan_units(run, images), (run.images,), {})
    probe = Probe(call, run.images, image_map(run.images.shape[2:]))
    try:
        probe.replay(torch.nan)
        wrong = [
            name
            for index, (name, known) in enumerate(followed)
            if not agrees(known, probe.dependence(index), run.nan_passes)
        ]
    except Exception as error:  # whatever a user's forward raises in float64
        return f"skipped: in float64, {describe_error(error)}"
    if wrong:
        return f"FAILED: wrong at {', '.join(dict.fromkeys(wrong))}"
    return f"ok: {len(followed)} of {len(run.returned)} modules return what sees the right pixels"


def nan_units(run: FieldRun, images: Tensor) -> list[Tensor]:
    """Run the model and return the units of each map that hold NaN, (N, rows, columns) bool."""
    found = []
    awaited = iter(run.returned)

    def leave(name, module, args, kwargs, output):
        _, content = next(awaited)
        if content.map:
            numbers = images_of(tensors_in(output)[0], content.map.batch)
            found.append(mark_units(numbers.isnan(), content.map.units))

    model = copy_model(run.twin[""])
    with hooks(model, lambda *_: None, leave):
        model(images)
    return found


def agrees(known: FeatureMap, seen: Dependence | None, nan_passes: bool) -> bool:
    """Tell whether the units of a map see no pixels outside their receptive fields.

    If NaN passes, units that see no padding must show both ends of the field.
    """
    if not seen:
        return not nan_passes
    for number, axis in enumerate(known.axes):
        probed = seen.probe.probed[number]
        changed = seen.changed[number][:, 0, 0]
        starts = axis.j * torch.arange(axis.n)[:, None] - axis.P
        offsets = probed - starts
        sees = set(offsets[changed.any(2 - number).T].tolist())
        is_whole = (starts >= 0) & (starts + axis.r <= axis.pixels)
        ends = {0, axis.r - 1} & set(offsets[is_whole.flatten()].flatten().tolist())
        if not sees <= {*range(axis.r)}:
            return False
        if nan_passes and not ends <= sees:
            return False
    return True

"""Pictures of handwritten digits: read from files, and prepared as those of MNIST were."""

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps

from utils import ScriptError, describe_error

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"
MAX_PIXELS = 89_000_000
MAX_JPEG_PIXELS = 256_000_000  # more, because a large JPEG is decoded at a smaller size
MAX_SIDE = 2000  # pixels of a picture that is read
SMALLEST_SIDE = 12  # pixels of its longer side

# Ink is looked for in a plane of pixels, and roughly in cells, which are squares of its pixels
PLANE_SIDE = 960  # at most so many pixels along the longer side
CELLS = 192  # at most so many cells along the longer side
MIN_CONTRAST = 0.03  # of ink; black on white has 1
MIN_SIGNAL_TO_NOISE = 9

# Shares of the darkest ink. A shape consists of cells above a weak threshold, and has one above the
# strong one. The second weak threshold is for ruled paper, whose lines are above the first.
STRONG = 0.35
WEAK = 0.12, 0.25

# Shares of the typical height of a picture's digits
SMALLEST_DIGIT = 0.5
LARGEST_DIGIT = 2.5
GAP = 0.2  # between parts of one digit

# In pixels of MNIST, where a digit fills a box of 20x20 in an image of 28x28
BOX = 20
THIN_LINE = 1.9  # a thinner line is widened
WIDENED_LINE = 2.2
WIDEST_LINE = 8  # a wider one is no digit

# In quarters of these pixels, because a digit is centred to a quarter
FINE_BOX = 74  # less than 80, because a digit between whole pixels covers up to two more
FINE_IMAGE = 112
FINE_CENTER = 57.5  # the middle of pixel 14, as in MNIST
NO_INK = "no ink in lines that stand out: write digits dark on light paper or light on dark"


class Digit(NamedTuple):
    """A digit found in a picture."""

    image: ndarray  # as MNIST has it, (28, 28) uint8
    box: ndarray  # left, top, right and bottom, in pixels of the picture
    line: int = 0  # of writing, counted from the top


def read_picture(source: Path | bytes) -> ndarray:
    """Return a picture, given by its path or its bytes, as (H, W, 3), float32 in 0..1.

    The picture is upright, the first frame if there are several, and shrunk by a whole number if
    a side has more than 2000 pixels. Transparency is laid on white, or on black if nothing would
    be seen on white. Raises ScriptError if the file is missing, damaged, too large or of another
    format.
    """
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # decode() has limits of its own
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        return decode(data)
    except Exception as error:  # whatever a decoder raises
        reason = getattr(error, "strerror", None) or describe_error(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no known format"
        raise ScriptError(
            f"cannot be read: {reason}; name a picture saved as PNG or JPEG"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def decode(data: bytes) -> ndarray:
    """Return a picture file's content as (H, W, 3), float32 in 0..1; raise what Pillow raises."""
    if data[4:8] == b"ftyp":  # the name does not tell: such files are often renamed
        raise ValueError("HEIC or a relative, as iPhones write it: export it as JPEG")
    with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
        warnings.simplefilter("ignore")  # about metadata
        size = image.width * image.height
        limit = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
        if size > limit:
            raise ValueError(f"it has {size:,} pixels, more than {limit:,}: shrink it")
        image.draft(None, (MAX_SIDE, MAX_SIDE))
        return to_array(ImageOps.exif_transpose(image))


def to_array(image: Image.Image) -> ndarray:
    """Return a Pillow image as (H, W, 3), float32 in 0..1, no side above MAX_SIDE."""
    factor = math.ceil(max(image.size) / MAX_SIDE)
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow's own conversion would clip
        grey = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        brightest = max(grey.max(), 1e-9)
        return np.stack([shrink(grey / brightest, factor)] * 3, 2)
    transparent = image.mode[-1] in "Aa" or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    pixels = np.asarray(image.reduce(factor), np.float32) / 255
    if not transparent:
        return pixels
    alpha = pixels[..., 3:]
    on_black = pixels[..., :3] * alpha
    on_white = on_black + 1 - alpha
    return on_white if np.ptp(on_white) > 0.1 else on_black


def find_digits(picture: ndarray, left: int = 0, top: int = 0) -> list[Digit]:
    """Return the digits of a picture, line by line, each line from left to right.

    `picture` is (H, W, 3), float32 in 0..1, with digits anywhere, darker or lighter than their
    paper. If there are digits in frames or dark boxes, only those are returned. `left` and `top`
    are added to the digits' boxes. Raises ScriptError if there is no ink.
    """
    ink = find_ink(picture)
    shapes = find_shapes(ink)
    corner = np.array([left, top, left, top])
    digits = []
    for shape in filter(Shape.is_frame, shapes):
        margin = max(shape.size) // 8
        x1, y1 = ink.scale * (shape.box[:2] + margin)
        x2, y2 = ink.scale * (shape.box[2:] - margin)
        with contextlib.suppress(ScriptError):
            digits += find_digits(picture[y1:y2, x1:x2], left + x1, top + y1)
    if not digits:
        for shape in join_shapes(shapes, ink.cells.shape[::-1]):
            x1, y1, x2, y2 = ink.cell * shape.box
            mask = shape.mask().repeat(ink.cell, 0).repeat(ink.cell, 1)
            image = center_digit(ink.pixels[y1:y2, x1:x2] * mask)
            if image is not None:
                digits.append(Digit(image, corner + ink.scale * shape.box))
    if not digits:
        raise ScriptError(NO_INK)
    return sort_lines(digits)


class Ink(NamedTuple):
    """How dark a picture's ink is, or how light on dark paper: 0 as the paper, 1 at most."""

    pixels: ndarray  # (H, W), the picture's pixels or means of their squares
    cells: ndarray  # (h, w), the maximum of each square of pixels
    noise: float  # standard deviation of a pixel
    cell: int  # side of a cell in these pixels
    scale: int  # side of a cell in pixels of the picture


def find_ink(picture: ndarray) -> Ink:
    """Return the ink of a picture (H, W, 3); raise ScriptError if there is none."""
    side = max(picture.shape)
    if side < SMALLEST_SIDE:
        raise ScriptError(f"no ink in {side} pixels: name a picture of {SMALLEST_SIDE} or more")
    step = math.ceil(side / CELLS)
    colour = picture[::step].std((0, 1)).argmax()  # the channel with the largest differences
    factor = math.ceil(side / PLANE_SIDE)
    while True:
        plane = shrink(picture[..., colour], factor)
        plane = np.log(plane + 0.1) / math.log(11)  # a shadow, which is a factor, becomes an offset
        cell = math.ceil(max(plane.shape) / CELLS)
        pixels = subtract_paper(plane, cell)
        squares = pixels.reshape(len(pixels) // cell, cell, -1, cell)
        cells = squares.max((1, 3))  # not the mean, so that thin lines count in full
        low, high = np.percentile(cells, (25, 99.97)).tolist()  # floats keep arrays float32
        contrast = high - low
        rows = pixels[:: 2 * cell]
        differences = abs(rows - np.roll(rows, cell, 1))
        noise = 0.6 * np.percentile(differences, 75)  # the standard deviation, if it is normal
        if contrast >= max(MIN_CONTRAST, MIN_SIGNAL_TO_NOISE * noise):
            pixels = np.clip((pixels - low) / contrast, 0, 1)
            cells = (cells - low) / contrast
            return Ink(pixels, cells, noise / contrast, cell, cell * factor)
        if max(plane.shape) < 200:
            raise ScriptError(NO_INK)
        factor *= 2  # because means of pixels have less noise


def shrink(plane: ndarray, factor: int) -> ndarray:
    """Return (H, W) with sides smaller by a factor: the mean of each square of pixels."""
    return np.asarray(Image.fromarray(plane).reduce(factor))


def subtract_paper(plane: ndarray, cell: int) -> ndarray:
    """Return how far each pixel differs from its paper towards the ink's colour.

    `plane` is (H, W). The result is padded to whole cells.
    """
    padded = np.pad(plane, [(0, -side % cell) for side in plane.shape], "edge")
    small = shrink(padded, cell)
    # The median of five, because thick ink may cover half of the picture, and a desk two sides
    parts = small, small[0], small[-1], small[:, 0], small[:, -1]
    level = np.median([np.median(part) for part in parts])
    darkest, lightest = np.percentile(padded[::4], (0.02, 99.98))
    if lightest - level > level - darkest:  # ink is what differs most from the paper
        padded = -padded
        small = -small
    paper = Image.fromarray(find_paper(small))
    return np.asarray(paper.resize(padded.shape[::-1], Image.BILINEAR)) - padded


class Shape:
    """Cells that belong together, (N, 2) of column and row.

    `box` is left, top, right and bottom of what they span, and `size` its width and height.
    """

    def __init__(self, cells: ndarray) -> None:
        self.cells = cells
        self.box = np.concatenate([cells.min(0), cells.max(0) + 1])
        self.size = self.box[2:] - self.box[:2]

    def mask(self) -> ndarray:
        """Return which cells of the box are the shape's, (height, width)."""
        mask = np.zeros(self.size, bool)
        mask[tuple((self.cells - self.box[:2]).T)] = True
        return mask.T

    def is_frame(self) -> bool:
        """Return whether it runs along all four sides of its box, and is no mere stroke."""
        turned = [np.rot90(self.mask(), i) for i in range(4)]
        depth = 1 + max(self.size) // 10
        lined = min(side[:depth].any(0).mean() for side in turned)
        return lined > 0.9 and min(self.size) > max(16, max(self.size) / 2)

    def is_at_edge(self, size: tuple[int, int]) -> bool:
        """Return whether it touches the edge of a picture of that width and height, in cells."""
        return not self.box[:2].all() or any(self.box[2:] == size)


def find_shapes(ink: Ink) -> list[Shape]:
    """Return the connected components of weak cells that hold a strong one.

    This is the hysteresis of Canny's edge detector. Cells touch at a side or a corner.
    """
    cells = np.pad(ink.cells, 1)
    row = cells.shape[1]
    neighbours = -row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1
    starts = np.flatnonzero(cells > max(STRONG, 5 * ink.noise)).tolist()
    for weak in WEAK:
        unseen = bytearray(
            cells > max(weak, 3 * ink.noise)
        )  # faster than an array for single cells
        shapes = []
        for start in starts:
            if unseen[start]:
                unseen[start] = False
                found = [start]
                for cell in found:  # a list that grows meanwhile
                    for step in neighbours:
                        if unseen[cell + step]:
                            unseen[cell + step] = False
                            found.append(cell + step)
                rows, columns = np.divmod(found, row)
                shapes.append(Shape(np.stack([columns - 1, rows - 1], 1)))
        if not any(shape.is_at_edge(ink.cells.shape[::-1]) for shape in shapes):
            break
    return shapes


def join_shapes(shapes: list[Shape], size: tuple[int, int]) -> list[Shape]:
    """Return a shape for each digit in a picture of that width and height, in cells.

    A digit may consist of several shapes. Specks, rules, and what touches the picture's edge
    beside other shapes are left out.
    """
    inner = [shape for shape in shapes if not shape.is_at_edge(size)]
    if 10 * sum(len(shape.cells) for shape in inner) < sum(len(shape.cells) for shape in shapes):
        inner = shapes
    heights = [max(shape.size / (2, 1)) for shape in inner]
    typical = np.median(np.repeat(heights, [len(shape.cells) for shape in inner]))
    digits = []
    for shape in sorted(shapes, key=lambda shape: shape.size[1], reverse=True):
        width, height = shape.size / typical
        if height > LARGEST_DIGIT or not (shape in inner or 2 / 3 < height < 3 / 2):
            continue
        is_large = max(height, 0.6 * width) >= SMALLEST_DIGIT
        distances = [distance(shape, digit, is_large) for digit in digits]
        if min(distances, default=typical) < GAP * typical:
            nearest = np.argmin(distances)
            digits[nearest] = Shape(np.concatenate([digits[nearest].cells, shape.cells]))
        elif is_large:
            digits.append(shape)
    return digits


def distance(shape: Shape, digit: Shape, is_large: bool) -> float:
    """Return the cells between a digit and a shape that may be a part of it.

    A large part stands above or below: half of its width does not count.
    """
    columns, rows = gaps(shape.box, digit.box)
    if is_large:
        columns += min(shape.size[0], digit.size[0]) / 2
    return max(columns, rows)


def gaps(first: ndarray, second: ndarray) -> ndarray:
    """Return how many columns and rows are between two boxes; negative if they overlap."""
    return np.maximum(first[:2], second[:2]) - np.minimum(first[2:], second[2:])


def sort_lines(digits: list[Digit]) -> list[Digit]:
    """Return digits line by line, each line from left to right, with the numbers of their lines.

    From left to right, each digit joins the line whose last digit it overlaps most in height, so
    that a line may lean.
    """
    lines = []
    for digit in sorted(digits, key=lambda digit: digit.box[0]):
        rows = [gaps(digit.box, line[-1].box)[1] for line in lines]
        height = digit.box[3] - digit.box[1]
        if min(rows, default=0) < -0.4 * height:
            lines[np.argmin(rows)].append(digit)
        else:
            lines.append([digit])
    lines.sort(key=lambda line: np.mean([digit.box[1::2] for digit in line]))
    return [digit._replace(line=number) for number, line in enumerate(lines) for digit in line]


def find_paper(small: ndarray) -> ndarray:
    """Return (H, W) without what is dark and narrower than four fifths of the longer side.

    This is a morphological closing. A desk beside the paper is wide enough to count as paper.
    """
    reach = 2 * max(small.shape) // 5
    padded = np.pad(small, reach, "edge")
    closed = -running_max(-running_max(padded, reach), reach)
    height, width = small.shape
    return closed[reach : reach + height, reach : reach + width]


def running_max(values: ndarray, reach: int) -> ndarray:
    """Return the maximum of (H, W) around each pixel, up to `reach` pixels to each side."""
    size = 2 * reach + 1
    values = np.pad(values, reach, "edge")
    for _ in range(2):  # once along each axis
        values = values.T
        width = 1
        while width < size:  # values[i] is the maximum of `width` values from the i-th on
            step = min(width, size - width)
            values = np.maximum(values[:-step], values[step:])
            width += step
    return values


def center_digit(ink: ndarray) -> ndarray | None:
    """Return ink (H, W) in 0..1 as MNIST's image (28, 28) uint8, or None if it is no digit.

    The ink is scaled into 20x20, and its centre of mass is put at the centre, as in LeCun et al.,
    "Gradient-Based Learning Applied to Document Recognition" (1998).
    """
    bounds = Image.fromarray(ink > 0.2).getbbox()
    if bounds is None:
        return None
    left, top, right, bottom = bounds
    ink = ink[top:bottom, left:right]
    square = np.pad(ink, [(0, max(ink.shape) - side) for side in ink.shape])
    line = line_width(Image.fromarray(square).resize((BOX, BOX), Image.BILINEAR))
    if line > WIDEST_LINE:
        return None
    if line < THIN_LINE:  # else a pencil's line is a shade of grey that MNIST does not have
        reach = round((WIDENED_LINE - line) / 2 * len(square) / BOX)
        square = running_max(np.pad(square, reach), reach)
    fine = Image.fromarray(square).resize((FINE_BOX, FINE_BOX), Image.BILINEAR)
    steps = np.arange(FINE_BOX)
    left, top = (np.average(steps, weights=np.sum(fine, axis)) for axis in (0, 1))
    page = Image.new("F", (FINE_IMAGE, FINE_IMAGE))
    page.paste(fine, (round(FINE_CENTER - left), round(FINE_CENTER - top)))
    levels = np.asarray(page.reduce(4)) * 255
    return np.rint(levels).astype(np.uint8)


def line_width(ink: Image.Image) -> float:
    """Return the mean width of an image's lines: twice their area by their perimeter."""
    padded = np.pad(ink, 1)
    steps = (abs(np.diff(padded, axis=axis)).sum() for axis in (0, 1))
    perimeter = np.pi / 4 * sum(steps)  # a slanted edge counts in both directions
    return 2 * padded.sum() / perimeter

"""Pictures of handwritten digits: read from files, and prepared as those of MNIST were."""

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

# In quarters of these pixels, to which a digit is centred
FINE_BOX = 74  # less than 80, because a digit between whole pixels covers up to two more
FINE_IMAGE = 112
FINE_CENTER = 57.5  # the middle of pixel 14, as in MNIST
NO_INK = "no ink in lines to be seen: write digits, dark on light paper or light on dark"


class Digit(NamedTuple):
    """A digit found in a picture."""

    image: ndarray  # as MNIST has it, (28, 28) uint8
    box: tuple[int, int, int, int]  # left, top, right and bottom, in pixels of the picture
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


def find_digits(picture: ndarray) -> list[Digit]:
    """Return the digits of a picture, line by line, each line from left to right.

    `picture` is (H, W, 3), float32 in 0..1, with digits anywhere, darker or lighter than their
    paper. If there are digits in frames or dark boxes, only those are returned. Raises ScriptError
    if there is no ink.
    """
    ink = find_ink(picture)
    shapes = find_shapes(ink)
    digits = []
    for shape in filter(Shape.is_frame, shapes):
        digits += look_inside(picture, shape.box(ink.scale))
    if not digits:
        for shape in join_shapes(shapes, ink.cells.shape):
            left, top, right, bottom = shape.box(ink.cell)
            mask = shape.mask().repeat(ink.cell, 0).repeat(ink.cell, 1)
            image = center_digit(ink.pixels[top:bottom, left:right] * mask)
            if image is not None:
                digits.append(Digit(image, shape.box(ink.scale)))
    if not digits:
        raise ScriptError(NO_INK)
    return sort_lines(digits)


def look_inside(picture: ndarray, box: tuple[int, int, int, int]) -> list[Digit]:
    """Return the digits inside a frame or a dark box of a picture (H, W, 3), if there are any."""
    left, top, right, bottom = box
    margin = max(right - left, bottom - top) // 8
    left += margin
    top += margin
    try:
        digits = find_digits(picture[top : bottom - margin, left : right - margin])
    except ScriptError:
        return []
    offset = left, top, left, top
    return [
        digit._replace(box=tuple(map(sum, zip(digit.box, offset, strict=True)))) for digit in digits
    ]


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
    # Paper is what most of the five show: thick ink may cover half of the picture, a desk two sides
    parts = small, small[0], small[-1], small[:, 0], small[:, -1]
    level = np.median([np.median(part) for part in parts])
    darkest, lightest = np.percentile(padded[::4], (0.02, 99.98))
    if lightest - level > level - darkest:  # ink is what differs most from the paper
        padded = -padded
        small = -small
    paper = Image.fromarray(find_paper(small))
    return np.asarray(paper.resize(padded.shape[::-1], Image.BILINEAR)) - padded


class Shape:
    """Cells that belong together, (N, 2) of row and column, and their bounding box."""

    def __init__(self, cells: ndarray) -> None:
        self.cells = cells
        self.top, self.left = cells.min(0).tolist()
        self.bottom, self.right = (cells.max(0) + 1).tolist()
        self.height = self.bottom - self.top
        self.width = self.right - self.left

    def box(self, scale: int) -> tuple[int, int, int, int]:
        """Return left, top, right and bottom in pixels, of which `scale` are a cell's side."""
        return self.left * scale, self.top * scale, self.right * scale, self.bottom * scale

    def mask(self) -> ndarray:
        """Return which cells of the box are the shape's, (height, width)."""
        mask = np.zeros((self.height, self.width), bool)
        rows, columns = (self.cells - (self.top, self.left)).T
        mask[rows, columns] = True
        return mask

    def is_frame(self) -> bool:
        """Return whether it lines all four sides of a box that is no upright or flat stroke."""
        shorter, longer = sorted((self.height, self.width))
        depth = 1 + longer // 10
        sides = [side[:depth].any(0).mean() for side in map(np.rot90, [self.mask()] * 4, range(4))]
        return shorter > max(16, longer / 2) and min(sides) > 0.9


def find_shapes(ink: Ink) -> list[Shape]:
    """Return the connected components of weak cells that hold a strong one.

    This is the hysteresis of Canny's edge detector. Cells touch at a side or a corner.
    """
    cells = np.pad(ink.cells, 1)
    row = cells.shape[1]
    neighbours = -row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1
    starts = np.flatnonzero(cells > max(STRONG, 5 * ink.noise)).tolist()
    for weak in WEAK:
        unseen = bytearray(cells > max(weak, 3 * ink.noise))  # faster than an array, one by one
        shapes = []
        for start in starts:
            if unseen[start]:
                unseen[start] = False
                found = [start]
                for cell in found:  # which grows meanwhile
                    for step in neighbours:
                        if unseen[cell + step]:
                            unseen[cell + step] = False
                            found.append(cell + step)
                rows_and_columns = np.divmod(found, row)
                shapes.append(Shape(np.stack(rows_and_columns, 1) - 1))
        if not any(is_at_edge(shape, ink.cells.shape) for shape in shapes):
            break
    return shapes


def is_at_edge(shape: Shape, size: tuple[int, int]) -> bool:
    """Return whether a shape touches the edge of a picture of `size` cells (h, w)."""
    return min(shape.top, shape.left) == 0 or shape.bottom == size[0] or shape.right == size[1]


def join_shapes(shapes: list[Shape], size: tuple[int, int]) -> list[Shape]:
    """Return a shape for each digit in a picture of `size` cells (h, w).

    A digit may consist of several shapes. Specks, rules, and what touches the picture's edge
    beside other shapes are left out.
    """
    inner = [shape for shape in shapes if not is_at_edge(shape, size)]
    if 10 * sum(len(shape.cells) for shape in inner) < sum(len(shape.cells) for shape in shapes):
        inner = shapes
    heights = [max(shape.height, shape.width / 2) for shape in inner]
    typical = np.median(np.repeat(heights, [len(shape.cells) for shape in inner]))
    digits = []
    for shape in sorted(shapes, key=lambda shape: (shape.height, shape.width), reverse=True):
        height = shape.height / typical
        if height > LARGEST_DIGIT or not (shape in inner or 2 / 3 < height < 3 / 2):
            continue
        is_large = max(height, shape.width / typical / 1.6) >= SMALLEST_DIGIT
        near = []
        for index, digit in enumerate(digits):
            rows = max(shape.top, digit.top) - min(shape.bottom, digit.bottom)
            columns = max(shape.left, digit.left) - min(shape.right, digit.right)
            overlap = min(shape.width, digit.width) / 2 if is_large else 0
            if rows < GAP * typical and columns + overlap < GAP * typical:
                near.append((max(rows, columns), index))
        if near:
            _, index = min(near)
            digits[index] = Shape(np.concatenate([digits[index].cells, shape.cells]))
        elif is_large:
            digits.append(shape)
    return digits


def sort_lines(digits: list[Digit]) -> list[Digit]:
    """Return digits line by line, each line from left to right, with the numbers of their lines.

    From left to right, each digit joins the line whose last digit it overlaps most in height, so
    that a line may lean.
    """
    lines = []
    for digit in sorted(digits, key=lambda digit: digit.box[0]):
        _, top, _, bottom = digit.box
        overlaps = [0.4 * (bottom - top)]  # what a new line needs
        for line in lines:
            _, last_top, _, last_bottom = line[-1].box
            overlaps.append(min(bottom, last_bottom) - max(top, last_top))
        best = np.argmax(overlaps)
        if best == 0:
            lines.append([])
        lines[best - 1].append(digit)
    lines.sort(key=lambda line: np.mean([digit.box[1] + digit.box[3] for digit in line]))
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

"""Pictures of handwritten digits: read from files, and prepared as those of MNIST were."""

import contextlib
import io
import math
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy import ndarray
from PIL import Image, ImageFilter, ImageOps

from utils import ScriptError, describe_error

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"
MAX_SIDE = 2000  # pixels of a picture that is read

# Ink is looked for in a plane of pixels, and roughly in cells, which are squares of its pixels
PLANE_SIDE = 960  # at most so many pixels along the longer side
SMALLEST_SIDE = 12  # at least so many
CELLS = 192  # at most so many cells along the longer side
MIN_CONTRAST = 0.08  # of ink; black on white has 1
MIN_SIGNAL_TO_NOISE = 14  # so that noise is paler than weak ink

# Shares of the darkest ink. A shape consists of weak cells and has a strong one.
STRONG = 0.4
WEAK = 0.15

# Shares of the typical height of a picture's digits
SMALLEST_DIGIT = 0.5
LARGEST_DIGIT = 2.5
GAP = 0.2  # between parts of one digit

# Shares of a digit's ink, scaled as in MNIST, that are more than a pixel from its edge
THIN = 0.07  # if less, the lines are widened
BLOB = 0.7  # if more, it is no digit
NO_INK = "no ink stands out, or it is too small: write larger, dark on light paper or light on dark"


class Digit(NamedTuple):
    """A digit found in a picture."""

    image: ndarray  # as MNIST has it, (28, 28) uint8
    box: ndarray  # left, top, right and bottom, in pixels of the picture
    line: int = 0  # of writing, counted from the top


def read_picture(source: Path | bytes) -> ndarray:
    """Return a picture, given by its path or its bytes, as (H, W, 3), float32 in 0..1.

    The picture is upright, the first frame if there are several, and shrunk by a whole number if
    a side has more than 2000 pixels. Transparency is laid on white, or on black if nothing would
    be seen on white. Raises ScriptError if the file is missing, damaged, of another format or
    larger than Pillow's limit of 178 megapixels.
    """
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        if data[4:8] == b"ftyp":  # the name does not tell: such files are often renamed
            raise ValueError("HEIC or a relative, as iPhones write it: export it as JPEG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and from half of the limit on
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            image.draft(None, (MAX_SIDE, MAX_SIDE))  # a large JPEG is decoded at a smaller size
            image = ImageOps.exif_transpose(image)
            return to_array(image)
    except Exception as error:  # whatever a decoder raises
        reason = getattr(error, "strerror", None) or describe_error(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "no known format"
        raise ScriptError(
            f"cannot be read: {reason}; name a PNG or JPEG of at most 178 megapixels"
        ) from error


def to_array(image: Image.Image) -> ndarray:
    """Return a Pillow image as (H, W, 3), float32 in 0..1, no side above MAX_SIDE."""
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow's own conversion would clip
        grey = np.asarray(image, np.float32)
        image = Image.fromarray(255 / grey.max() * grey)
    transparent = image.mode[-1] in "Aa" or "transparency" in image.info
    image = image.convert("RGBA" if transparent else "RGB")
    factor = math.ceil(max(image.size) / MAX_SIDE)
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
    paper. If there are digits in frames or dark boxes, only those are returned. Raises
    ScriptError if there is no ink.
    """
    pixels, cells, scale = find_ink(picture)
    cell = pixels.height // len(cells)
    shapes = find_shapes(cells)
    digits = []
    for frame in filter(is_frame, shapes):
        margin = max(frame.size) // 8
        x1, y1 = scale * (frame.box[:2] + margin)
        x2, y2 = scale * (frame.box[2:] - margin)
        with contextlib.suppress(ScriptError):
            for digit in find_digits(picture[y1:y2, x1:x2]):
                box = np.add(digit.box, (x1, y1, x1, y1))
                digits.append(Digit(digit.image, box))
    if not digits:
        for shape in join_shapes(shapes):
            ink = pixels.crop(tuple(cell * shape.box))
            mask = shape.cut.resize(ink.size)
            image = prepare_digit(np.multiply(ink, mask))
            if image is not None:
                digits.append(Digit(image, scale * shape.box))
    if not digits:
        raise ScriptError(NO_INK)
    return sort_lines(digits)


def find_ink(picture: ndarray) -> tuple[Image.Image, ndarray, int]:
    """Return how dark a picture's ink is, or how light on dark paper.

    `picture` is (H, W, 3). Returns a plane of its pixels, or of means of squares of pixels, as an
    image of floats, 0 for the paper and about 1 for the darkest ink; the maximum of each cell of
    this plane, (h, w); and the side of a cell in pixels of the picture. Raises ScriptError if
    there is no ink.
    """
    side = max(picture.shape)
    # The channel in which some of the rows differ most
    colour = picture[:: 1 + side // CELLS].std((0, 1)).argmax()
    channel = Image.fromarray(picture[..., colour])
    factor = math.ceil(side / PLANE_SIDE)
    while side >= factor * SMALLEST_SIDE:
        plane = np.asarray(channel.reduce(factor))  # means of squares
        cell = math.ceil(max(plane.shape) / CELLS)
        pixels = compare_with_paper(plane, cell)
        squares = pixels.reshape(len(pixels) // cell, cell, -1, cell)
        cells = squares.max((1, 3))  # not the mean, so that thin lines count in full
        low, high = np.percentile(cells, (25, 99.97)).tolist()  # floats keep arrays float32
        contrast = high - low
        differences = np.diff(pixels.ravel()[::cell])
        noise = np.median(abs(differences))  # the standard deviation, if it is normal
        if contrast >= max(MIN_CONTRAST, MIN_SIGNAL_TO_NOISE * noise):
            ink = Image.fromarray((pixels.clip(low) - low) / contrast)
            return ink, (cells - low) / contrast, cell * factor
        factor *= 2  # because means of pixels have less noise
    raise ScriptError(NO_INK)


def compare_with_paper(plane: ndarray, cell: int) -> ndarray:
    """Return by what share a pixel is darker than its paper, or how much lighter than dark paper.

    `plane` is (H, W) in 0..1. The result is padded to whole cells. A share, because a shadow makes
    ink and paper darker by the same factor.
    """
    missing = [(0, -side % cell) for side in plane.shape]
    padded = np.pad(plane + 0.1, missing, "edge")  # 0.1, or noise in the dark is a large share
    # The median of five, because thick ink may cover half of the picture, and a desk two sides
    parts = padded[::4], padded[0], padded[-1], padded[:, 0], padded[:, -1]
    level = np.median([np.median(part) for part in parts])
    if padded.min() * padded.max() > level**2:  # ink is what differs most from the paper
        return padded + find_paper(-padded, cell)
    return 1 - padded / find_paper(padded, cell)


def find_paper(plane: ndarray, cell: int) -> ndarray:
    """Return how light the paper is at each pixel of (H, W), from the means of cells.

    Each of the four rectangles between a cell and a corner has a lightest cell; the paper is as
    light as the darkest of these four. So what is dark is ink if there is light on all sides, and
    paper if it reaches a corner, as a shadow or a desk does.
    """
    small = Image.fromarray(plane).reduce(cell)
    lightest = []
    for turn in range(4):
        rows = np.maximum.accumulate(np.rot90(small, turn))
        lightest.append(np.rot90(np.maximum.accumulate(rows, 1), -turn))
    paper = Image.fromarray(np.min(lightest, 0))
    return np.asarray(paper.resize(plane.shape[::-1], Image.BILINEAR))


class Shape:
    """Cells that belong together: a mask (h, w) of a picture's cells.

    `box` is left, top, right and bottom of what they span, and `cut` the mask there as an image.
    `middle` and `size` of the box are in columns and rows.
    """

    def __init__(self, mask: ndarray) -> None:
        self.mask = mask
        self.area = mask.sum()
        self.at_edge = mask[1:-1, 1:-1].sum() < self.area
        image = Image.fromarray(mask)
        box = image.getbbox()
        self.cut = image.crop(box)
        self.box = np.array(box)
        self.size = self.box[2:] - self.box[:2]
        self.middle = self.box[:2] + self.size / 2
        self.height = max(self.size / (2, 1))  # a wide shape may be several digits, or lie


def is_frame(shape: Shape) -> bool:
    """Return whether a shape runs along all four sides of its box, and is no mere stroke."""
    depth = 1 + max(shape.size) // 10
    sides = [np.rot90(shape.cut, turn)[:depth].any(0) for turn in range(4)]
    return min(map(np.mean, sides)) > 0.9 and max(shape.size) < 2 * min(shape.size)


def find_shapes(cells: ndarray) -> list[Shape]:
    """Return the connected components of weak cells (h, w) that hold a strong one.

    This is the hysteresis of Canny's edge detector. Cells touch at a side or a corner.
    """
    padded = np.pad(cells, [(0, 0), (0, 1)])  # no row's end touches the next one's start
    width = padded.shape[1]
    steps = [width * y + x for y in (-1, 0, 1) for x in (-1, 0, 1)]
    for weak in (WEAK, STRONG):  # again if rules, which are weak, join digits with the edge
        unseen = set(np.flatnonzero(padded > weak).tolist())
        shapes = []
        for start in np.flatnonzero(padded > STRONG).tolist():
            if start in unseen:
                found = [start]
                for cell in found:  # a list that grows meanwhile
                    near = unseen.intersection([cell + step for step in steps])
                    unseen -= near
                    found += near
                mask = np.zeros_like(cells, bool)
                mask[np.divmod(found, width)] = True
                shapes.append(Shape(mask))
        if not any(shape.at_edge for shape in shapes):
            break
    return shapes


def join_shapes(shapes: list[Shape]) -> list[Shape]:
    """Return a shape for each digit.

    A digit may consist of several shapes. Specks and rules are left out, and so is what touches
    the picture's edge, unless it is about as high as the digits.
    """
    heights = [shape.height for shape in shapes]
    # What touches the edge counts a fifth, because it may be a desk or a thumb
    weights = [shape.area * (1 if shape.at_edge else 5) for shape in shapes]
    typical = np.median(np.repeat(heights, weights))
    digits = []
    for shape in sorted(shapes, key=lambda shape: -shape.height):
        height = shape.size[1] / typical
        if height > LARGEST_DIGIT or (shape.at_edge and not 2 / 3 < height < 3 / 2):
            continue
        for number, digit in enumerate(digits):
            # Parts stand above each other: the narrower one's middle is within the wider one
            columns, rows = abs(shape.middle - digit.middle)
            columns -= max(shape.size[0], digit.size[0]) / 2
            rows -= (shape.size[1] + digit.size[1]) / 2
            if max(columns, rows) < GAP * typical:
                digits[number] = Shape(shape.mask | digit.mask)
                break
        else:
            if shape.height > SMALLEST_DIGIT * typical:
                digits.append(shape)
    return digits


def sort_lines(digits: list[Digit]) -> list[Digit]:
    """Return digits line by line, each line from left to right, with the numbers of their lines.

    From left to right, each digit joins a line whose last digit has about the same top and bottom,
    so that a line may lean.
    """
    lines = []
    for digit in sorted(digits, key=lambda digit: digit.box[0]):
        for line in lines:
            shift = abs(digit.box - line[-1].box)[1::2].mean()  # of top and bottom
            if shift < 0.6 * (digit.box[3] - digit.box[1]):
                line.append(digit)
                break
        else:
            lines.append([digit])
    lines.sort(key=lambda line: line[0].box[1])
    return [digit._replace(line=number) for number, line in enumerate(lines) for digit in line]


def prepare_digit(ink: ndarray) -> ndarray | None:
    """Return ink (H, W), 0 to about 1, as MNIST's image (28, 28) uint8, or None if it is no digit.

    The ink is scaled into 20x20, and its centre of mass is put at the centre, as in LeCun et al.,
    "Gradient-Based Learning Applied to Document Recognition" (1998).
    """
    left, top, right, bottom = Image.fromarray(ink > WEAK).getbbox()
    side = max(right - left, bottom - top)
    square = Image.fromarray(255 * ink).crop((left, top, left + side, top + side))
    small = square.resize((20, 20), Image.BILINEAR)
    left, top = (np.average(range(20), weights=np.sum(small, axis)) for axis in (0, 1))
    image = Image.new("L", (28, 28))
    image.paste(small, (round(14 - left), round(14 - top)))

    inside = image.filter(ImageFilter.MinFilter(3))
    share = np.sum(inside) / np.sum(image)
    if share > BLOB:
        return None
    if share < THIN:  # else a pencil's line is a shade of grey that MNIST does not have
        blurred = image.filter(ImageFilter.GaussianBlur(0.8))
        image = ImageOps.autocontrast(blurred, (0, 3))
    return np.asarray(image)

"""Pictures of handwritten digits: read from files, and prepared as those of MNIST were."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from numpy import ndarray
from PIL import Image, ImageOps

from utils import ScriptError, describe_error

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"
MAX_PIXELS = 89_000_000
MAX_JPEG_PIXELS = 256_000_000  # more, because a large JPEG is decoded at a smaller size
MAX_SIDE = 2000  # pixels of a picture that is read

# Ink is looked for in a plane of pixels, and roughly in cells, which are squares of its pixels
PLANE_SIDE = 600  # at most so many pixels along the longer side
CELLS = 120  # at most so many cells along the longer side
MIN_CONTRAST = 0.04  # of ink; black on white has 1
MIN_SIGNAL_TO_NOISE = 6

# In pixels of MNIST, where a digit fills a box of 20x20 in an image of 28x28
BOX = 20
THIN_LINE = 1.9  # a thinner line is widened
WIDENED_LINE = 2.2
WIDEST_LINE = 8  # a wider one is no digit

# In quarters of these pixels, to which a digit is centred
FINE_BOX = 80
FINE_IMAGE = 112
FINE_CENTER = 57.5  # the middle of pixel 14, as in MNIST
NO_INK = "no ink in lines to be seen: write one digit, dark on light paper or light on dark"


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


def prepare_digit(picture: ndarray) -> tuple[ndarray, str]:
    """Return a picture's digit as MNIST has them, (28, 28) uint8, and a reason to doubt it or "".

    `picture` is (H, W, 3), float32 in 0..1, with the digit anywhere, darker or lighter than its
    paper. The digit is light on black, scaled into 20x20, and its centre of mass is put at the
    centre, as in LeCun et al., "Gradient-Based Learning Applied to Document Recognition" (1998).
    Raises ScriptError if there is no ink.
    """
    side = max(picture.shape)
    step = math.ceil(side / CELLS)
    colour = picture[::step].std((0, 1)).argmax()  # the channel with the largest differences
    plane = shrink(picture[..., colour], math.ceil(side / PLANE_SIDE))
    plane = np.log(plane + 0.1) / math.log(11)  # a shadow, which is a factor, becomes an offset
    ink, doubt = find_digit(plane)
    left, top, right, bottom = Image.fromarray(ink > 0.2).getbbox()
    return center_digit(ink[top:bottom, left:right]), doubt


def shrink(plane: ndarray, factor: int) -> ndarray:
    """Return (H, W) with sides smaller by a factor: the mean of each square of pixels."""
    return np.asarray(Image.fromarray(plane).reduce(factor))


def find_digit(plane: ndarray) -> tuple[ndarray, str]:
    """Return the ink of the digit in a plane (H, W), and a reason to doubt it or "".

    The ink is in 0..1, and 0 outside the digit. It is as large as the plane, or half as large or
    less if the ink is pale, and padded a little. Raises ScriptError if there is none.
    """
    cell = math.ceil(max(plane.shape) / CELLS)
    ink = subtract_paper(plane, cell)
    squares = ink.reshape(len(ink) // cell, cell, -1, cell)
    cells = squares.max((1, 3))  # not the mean, so that thin lines count in full
    low, high = np.percentile(cells, (25, 99.95)).tolist()  # floats, so that the ink stays float32
    rows = ink[:: 2 * cell]
    differences = abs(rows - np.roll(rows, cell, 1))
    noise = 0.6 * np.percentile(differences, 75)  # the standard deviation, if it is normal
    if high - low < max(MIN_CONTRAST, MIN_SIGNAL_TO_NOISE * noise):
        if max(plane.shape) < 200:
            raise ScriptError(NO_INK)
        return find_digit(shrink(plane, 2))  # because means of pixels have less noise
    shapes = label(cells > (high + low) / 2)
    digit, doubt = choose_shapes(shapes)
    mask = digit.repeat(cell, 0).repeat(cell, 1)
    return np.clip((ink - low) / (high - low), 0, 1) * mask, doubt


def subtract_paper(plane: ndarray, cell: int) -> ndarray:
    """Return how far each pixel differs from its paper towards the ink's colour.

    `plane` is (H, W). The result is padded to whole cells.
    """
    padded = np.pad(plane, [(0, -side % cell) for side in plane.shape], "edge")
    small = shrink(padded, cell)
    border = [small[0], small[-1], small[:, 0], small[:, -1]]
    level = np.median(np.concatenate(border))
    darkest, lightest = np.percentile(padded[::4], (0.02, 99.98))
    if lightest - level > level - darkest:  # ink is what differs most from the border
        padded = -padded
        small = -small
    paper = Image.fromarray(find_paper(small))
    return np.asarray(paper.resize(padded.shape[::-1], Image.BILINEAR)) - padded


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


def label(mask: ndarray) -> ndarray:
    """Return a number for each shape of a mask (H, W), and 0 elsewhere.

    The cells of a shape touch at a side or a corner.
    """
    mask = np.pad(mask, 1)
    numbers = np.arange(mask.size).reshape(mask.shape) * mask  # each cell has its own index
    while True:
        largest = running_max(numbers, 1) * mask
        if (largest == numbers).all():
            return numbers[1:-1, 1:-1]
        # A shape's number is the index of one of its cells. That cell takes the largest number
        # next to the shape, and the whole shape then takes it from there.
        flat = numbers.flatten()
        np.maximum.at(flat, numbers, largest)
        numbers = flat[flat].reshape(mask.shape)


def choose_shapes(labels: ndarray) -> tuple[ndarray, str]:
    """Return which cells of numbered shapes (H, W) are the digit's, and a doubt or ""."""
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    order = np.argsort(-areas)[:20]
    largest, *others = (labels == number for number in numbers[order])
    digit = largest
    doubt = ""
    columns = largest.any(0)
    side = max(largest.any(1).sum(), columns.sum())
    near = running_max(largest, side // 4)
    for shape in others:
        own_columns = shape.any(0)
        shared = (columns & own_columns).sum()
        is_beside = shared < 0.2 * min(columns.sum(), own_columns.sum())
        if is_beside and shape.sum() > 0.3 * largest.sum():
            doubt = "unsure: several shapes of similar size"
        elif (near & shape).any():  # a part, such as a 5's bar
            digit = digit | shape
    across = [side[0].any() and side[-1].any() for side in (digit, digit.T)]
    if any(across):
        doubt = doubt or "unsure: the ink touches opposite edges"
    return digit, doubt


def center_digit(ink: ndarray) -> ndarray:
    """Return ink (H, W) in 0..1 as MNIST's image (28, 28) uint8.

    The ink is scaled into 20x20, and its centre of mass is put at the centre. Raises ScriptError
    if it is too wide to be a digit's lines.
    """
    square = np.pad(ink, [(0, max(ink.shape) - side) for side in ink.shape])
    line = line_width(Image.fromarray(square).resize((BOX, BOX), Image.BILINEAR))
    if line > WIDEST_LINE:
        raise ScriptError(NO_INK)
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

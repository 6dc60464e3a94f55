"""Pictures of handwritten digits: read from files, and prepared as MNIST's authors prepared theirs."""

import io
import math
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from utils import ScriptError, describe_error

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"
MAX_PIXELS, MAX_JPEG_PIXELS, MAX_SIDE = 89_000_000, 256_000_000, 2000
INK_SIDE, CELLS = (
    600,
    120,
)  # most pixels, and cells of pixels, along the longer side where ink is looked for
CONTRAST, NOISES = (
    0.04,
    6,
)  # least contrast of ink (black on white is 1), and least multiple of the noise
THIN, WIDENED, BLOB = (
    1.9,
    2.2,
    8,
)  # pixels of 20x20: lines below THIN are widened; what is wider than BLOB is no digit
NO_INK = "no ink in lines to be seen: write one digit, dark on light paper or light on dark"


def read_picture(source: Path | bytes) -> np.ndarray:
    """Return a picture, given by its path or bytes, as (H, W, 3), float32 in 0..1, upright; only its first frame.

    A picture with a side above 2000 pixels is shrunk by a whole number. Transparency is laid on white, or on black if
    nothing would be seen on white. Raises ScriptError if the file is missing, damaged, too large or of another format.
    """
    limit, Image.MAX_IMAGE_PIXELS = (
        Image.MAX_IMAGE_PIXELS,
        None,
    )  # a large JPEG is decoded at a smaller size
    try:
        data = source.read_bytes() if isinstance(source, Path) else source
        if data[4:8] == b"ftyp":  # the content tells: such files are often renamed
            raise ValueError("HEIC or a relative, as iPhones write it: export it as JPEG")
        with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            warnings.simplefilter("ignore")  # about metadata
            most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
            if (size := image.width * image.height) > most:
                raise ValueError(f"it has {size:,} pixels, more than {most:,}: shrink it")
            image.draft(None, (MAX_SIDE, MAX_SIDE))
            return to_array(ImageOps.exif_transpose(image))
    except Exception as error:  # whatever a decoder raises
        unknown = isinstance(error, Image.UnidentifiedImageError)
        reason = (
            "no known format"
            if unknown
            else getattr(error, "strerror", None) or describe_error(error)
        )
        raise ScriptError(
            f"cannot be read: {reason}; name a picture saved as PNG or JPEG"
        ) from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def to_array(image: Image.Image) -> np.ndarray:
    """Return a Pillow image as (H, W, 3), float32 in 0..1, no side above MAX_SIDE."""
    times = -(-max(image.size) // MAX_SIDE)
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow's own conversion would clip
        grey = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        return np.stack([shrink(grey / max(grey.max(), 1e-9), times)] * 3, 2)
    clear = image.mode[-1] in "Aa" or "transparency" in image.info
    pixels = np.asarray(image.convert("RGBA" if clear else "RGB").reduce(times), np.float32) / 255
    if not clear:
        return pixels
    black = pixels[:, :, :3] * pixels[:, :, 3:]
    white = black + 1 - pixels[:, :, 3:]
    return white if np.ptp(white) > 0.1 else black


def prepare_digit(picture: np.ndarray) -> tuple[np.ndarray, str]:
    """Return a picture's digit as MNIST has them, (28, 28) uint8, light on black, and a reason to doubt it or "".

    `picture` is (H, W, 3), float32 in 0..1, with the digit anywhere, darker or lighter than its paper. Its ink is
    scaled into 20x20 and its centre of mass put at the centre, as in LeCun et al., "Gradient-Based Learning Applied
    to Document Recognition" (1998). Raises ScriptError if there is no ink.
    """
    side = max(picture.shape)
    colour = picture[:: -(-side // CELLS)].std((0, 1)).argmax()  # the one that shows most
    plane = np.log(shrink(picture[:, :, colour], -(-side // INK_SIDE)) + 0.1) / math.log(
        11
    )  # shadows become offsets
    ink, doubt = find_digit(plane)
    left, top, right, bottom = Image.fromarray(ink > 0.2).getbbox()
    return fit(ink[top:bottom, left:right]), doubt


def shrink(plane: np.ndarray, times: int) -> np.ndarray:
    """Return the means of squares of pixels of (H, W), with sides so many times smaller."""
    return np.asarray(Image.fromarray(plane).reduce(times))


def find_digit(plane: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the digit's ink in a plane (H, W), as (h, w) in 0..1, and a doubt; raise ScriptError if there is none."""
    cell = -(-max(plane.shape) // CELLS)
    padded = np.pad(plane, [(0, -side % cell) for side in plane.shape], "edge")
    small = shrink(padded, cell)
    level = np.median(np.concatenate([small[0], small[-1], small[:, 0], small[:, -1]]))
    darkest, lightest = np.percentile(padded[::4], (0.02, 99.98))
    if lightest - level > level - darkest:  # ink is what differs most from the border
        padded, small = -padded, -small
    paper = Image.fromarray(find_paper(small)).resize(padded.shape[::-1], Image.BILINEAR)
    ink = np.asarray(paper) - padded
    rows = ink[:: 2 * cell]
    noise = 0.6 * np.percentile(
        np.abs(rows - np.roll(rows, cell, 1)), 75
    )  # the standard deviation, if normal
    cells = ink.reshape(small.shape[0], cell, -1, cell).max(1).max(2)  # thin lines count in full
    ground, top = np.percentile(
        cells, (25, 99.95)
    ).tolist()  # Python floats, so that the ink stays float32
    if top - ground < max(CONTRAST, NOISES * noise):
        if max(plane.shape) < 200:
            raise ScriptError(NO_INK)
        return find_digit(
            shrink(plane, 2)
        )  # pale ink stands out from noise where pixels are averaged
    digit, doubt = choose_shapes(label(cells > (top + ground) / 2))
    mask = digit.repeat(cell, 0).repeat(cell, 1)
    return np.clip((ink - ground) / (top - ground), 0, 1) * mask, doubt


def find_paper(small: np.ndarray) -> np.ndarray:
    """Return (H, W) without what is dark and narrower than four fifths of the longer side: a morphological closing."""
    reach = 2 * max(small.shape) // 5
    wide = np.pad(small, reach, "edge")  # a desk beside the paper then counts as paper
    closed = -running_max(-running_max(wide, reach), reach)
    return closed[reach : reach + small.shape[0], reach : reach + small.shape[1]]


def running_max(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the maximum of (H, W) in the square around each pixel that reaches so far to each side."""
    for _ in range(2):
        values, width = np.pad(values.T, ((reach, reach), (0, 0)), "edge"), 1
        while width <= 2 * reach:
            step = min(width, 2 * reach + 1 - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
    return values


def label(mask: np.ndarray) -> np.ndarray:
    """Return a number for each shape of a mask (H, W), whose cells touch at a side or corner; 0 elsewhere."""
    mask = np.pad(mask, 1)
    numbers = np.arange(mask.size) * mask.ravel()
    while True:
        largest = running_max(numbers.reshape(mask.shape), 1).ravel() * mask.ravel()
        if (largest == numbers).all():
            return numbers.reshape(mask.shape)[1:-1, 1:-1]
        np.maximum.at(
            numbers, numbers.copy(), largest
        )  # the cell that gave a shape its number takes the larger one
        numbers = numbers[numbers]  # and passes it on to the whole shape


def choose_shapes(labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Return which cells of numbered shapes (H, W) are the digit's, and a doubt."""
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    shapes = [labels == number for number in numbers[np.argsort(-areas)][:20]]
    digit, doubt, columns = shapes[0], "", shapes[0].any(0)
    near = running_max(digit, max(digit.any(1).sum(), columns.sum()) // 4)
    for shape in shapes[1:]:
        both = (columns & shape.any(0)).sum()
        if shape.sum() > 0.3 * shapes[0].sum() and both < 0.2 * min(
            columns.sum(), shape.any(0).sum()
        ):
            doubt = "unsure: several shapes of similar size"
        elif (near & shape).any():  # a part, such as a 5's bar
            digit = digit | shape
    if digit[[0, -1]].any(1).all() or digit[:, [0, -1]].any(0).all():
        doubt = doubt or "unsure: the ink touches opposite edges"
    return digit, doubt


def fit(ink: np.ndarray) -> np.ndarray:
    """Return ink (H, W) in 0..1, scaled into 20x20, with its centre of mass at the centre of (28, 28) uint8."""
    square = np.pad(ink, [(0, max(ink.shape) - side) for side in ink.shape])
    small = np.pad(Image.fromarray(square).resize((20, 20), Image.BILINEAR), 1)
    outline = np.pi / 4 * sum(np.abs(np.diff(small, axis=axis)).sum() for axis in (0, 1))
    line = 2 * small.sum() / outline  # the mean width of the lines
    if line > BLOB:
        raise ScriptError(NO_INK)
    if line < THIN:  # else a pencil's line is a shade of grey that MNIST does not have
        reach = round((WIDENED - line) / 2 * len(square) / 20)
        square = running_max(np.pad(square, reach), reach)
    fine = Image.fromarray(square).resize((80, 80), Image.BILINEAR)
    left, top = (np.average(np.arange(80), weights=np.sum(fine, axis)) for axis in (0, 1))
    page = Image.new("F", (112, 112))
    page.paste(fine, (round(57.5 - left), round(57.5 - top)))  # the middle of pixel 14, as in MNIST
    return np.rint(np.asarray(page.reduce(4)) * 255).astype(np.uint8)

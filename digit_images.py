"""Pictures of handwritten digits: read from files, and prepared as MNIST's authors prepared theirs."""

import contextlib
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from utils import ScriptError

FORMATS = "PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"
MAX_PIXELS, MAX_JPEG_PIXELS, MAX_SIDE = 89_000_000, 256_000_000, 2000
PAPER_SIDE, CELLS, INK_SIDE = 80, 120, 600  # longer side on which the paper, shapes and the ink are looked for
CONTRAST, NOISES = 0.06, 7  # how much ink differs from the paper; black on white is 1
EVEN = 0.04  # how far from a smooth surface evenly lit paper may be
THIN, WIDENED = 1.9, 2.2  # pixels of 28x28: lines thinner than the one are widened to the other


def read_picture(path: Path) -> np.ndarray:
    """Return the picture in a file as (H, W, 3), float32 in 0..1, upright, its first frame if it has several.

    A picture with a side above 2000 pixels is shrunk by a whole number. Transparency is laid on white, or on black if
    nothing would be seen on white. Raises ScriptError if the file is missing, damaged, too large or of another format.
    """
    limit = Image.MAX_IMAGE_PIXELS
    try:
        with path.open("rb") as file:
            if file.read(12)[4:8] == b"ftyp":  # the content tells: such files are often renamed
                raise ScriptError(f"{path} is HEIC, as iPhones write it, or a relative: export it as JPEG")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata
            Image.init()  # which a choice of formats needs
            Image.MAX_IMAGE_PIXELS = None  # until the size is known: a large JPEG need not be decoded in full
            with Image.open(path, formats=FORMATS) as image:
                most = MAX_JPEG_PIXELS if image.format in ("JPEG", "MPO") else MAX_PIXELS
                if image.width * image.height > most:
                    size = f"{image.width}x{image.height} pixels"
                    raise ScriptError(f"{path} has {size}, more than {most // 10**6} million: shrink it")
                image.draft(None, (MAX_SIDE, MAX_SIDE))
                return to_array(image)
    except Image.UnidentifiedImageError as error:
        raise ScriptError(f"{path} is not a picture that can be read: save it as PNG or JPEG") from error
    except (ScriptError, FileNotFoundError, PermissionError, IsADirectoryError) as error:
        reason = error if isinstance(error, ScriptError) else f"cannot read {path}: {error.strerror}; check the path"
        raise ScriptError(str(reason)) from error
    except Exception as error:  # whatever a decoder raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScriptError(f"{path} is damaged ({reason}): save it again as PNG or JPEG") from error
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def to_array(image: Image.Image) -> np.ndarray:
    """Return a Pillow image as (H, W, 3), float32 in 0..1, upright, no side above MAX_SIDE."""
    times = -(-max(image.size) // MAX_SIDE)
    if image.mode[0] in "IF":  # more than 8 bits, which Pillow's own conversion would clip
        grey = np.nan_to_num(np.asarray(image, np.float32)).clip(0)
        tops = (65535,) if image.mode.startswith("I;16") else (1, 255, 65535)
        grey /= next((top for top in tops if grey.max() <= top), grey.max())
        pixels = np.stack([np.asarray(Image.fromarray(grey).reduce(times))] * 3, 2)
    else:
        clear = image.mode[-1] in "Aa" or "transparency" in image.info
        pixels = np.asarray(image.convert("RGBA" if clear else "RGB").reduce(times), np.float32) / 255
    if pixels.shape[2] == 4:
        on_black = pixels[:, :, :3] * pixels[:, :, 3:]
        on_white = on_black + 1 - pixels[:, :, 3:]
        pixels = on_white if np.ptp(on_white) > 0.1 else on_black
    turn = 1
    with contextlib.suppress(Exception):  # damaged metadata may raise anything; the picture counts
        turn = image.getexif().get(0x0112, 1)  # the EXIF orientation
    pixels = pixels[:, ::-1] if turn in (2, 4, 5, 7) else pixels
    return np.ascontiguousarray(np.rot90(pixels, {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(turn, 0)))


def prepare_digit(picture: np.ndarray) -> tuple[np.ndarray, str]:
    """Return a picture's digit as MNIST has them, (28, 28) uint8, light on black, and a reason to doubt it or "".

    `picture` is (H, W, 3), float32 in 0..1, with the digit anywhere, darker or lighter than its paper. Its ink is
    scaled into 20x20 and its centre of mass put at the centre, as in LeCun et al., "Gradient-Based Learning Applied
    to Document Recognition" (1998). Raises ScriptError if there is no ink.
    """
    side = max(picture.shape)
    closest = -(-side // INK_SIDE)
    for times in (closest, 2 * closest, 4 * closest):  # pale ink stands out from noise where pixels are averaged
        if (times == closest or side > 100 * times) and (found := find_digit(picture, times)):
            break
    else:
        raise ScriptError("no ink to be seen: write one digit, dark on light paper or light on dark")
    ink, doubt = found
    times = picture.shape[0] // ink.shape[0]
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.5) * times for axis in (1, 0))
    extent = max(np.ptp(rows), np.ptp(columns)) + times
    if times > 1 and extent < INK_SIDE // 2:  # look again, closer
        top, left = max(0, rows[0] - extent // 2), max(0, columns[0] - extent // 2)
        closer = picture[top : rows[-1] + extent // 2, left : columns[-1] + extent // 2]
        ink = (find_digit(closer, -(-max(closer.shape) // INK_SIDE)) or found)[0]
    return fit(ink), doubt


def find_digit(picture: np.ndarray, times: int) -> tuple[np.ndarray, str] | None:
    """Return how much ink of the digit blocks of `times` pixels have, (h, w) in 0..1, and a doubt; None if no ink."""
    small = shrink(picture, max(1, max(picture.shape) // PAPER_SIDE))
    surface, share = fit_paper(small)
    times *= 2 if share < 0.8 and min(picture.shape[:2]) > 200 * times else 1
    signs, found = [1, -1], []  # darker and lighter than the paper
    if share > 0.5:
        signs.sort(key=lambda sign: -strongest(small, surface, sign)[0])
        found = [find_shapes(measure_ink(picture, times, small, surface, signs[0]))]
        if share > 0.8:
            return found[0] and found[0][1:]
        if found[0] and strongest(small, surface, signs[1])[0] < strongest(small, surface, signs[0])[0] / 2:
            del signs[1]
    local = [find_shapes(measure_ink(picture, times, small, close_gaps(small, sign), sign)) for sign in signs]
    if not any(local):  # what lies off the surface is a shadow
        return None
    return min((each for each in found + local if each), key=lambda each: each[0])[1:]


def shrink(picture: np.ndarray, times: int) -> np.ndarray:
    """Return the means of blocks of pixels (H, W, C) as (C, H // times, W // times)."""
    height, width = (side // times * times for side in picture.shape[:2])
    rows = sum(picture[start:height:times] for start in range(times)) if times > 1 else picture
    means = sum(rows[:, start:width:times] for start in range(times)) / np.float32(times**2)
    return np.ascontiguousarray(np.moveaxis(means, 2, 0))


def fit_paper(small: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the quadratic surface (3, H, W) on which most of the border lies, and the share that does."""
    rows, columns = np.meshgrid(*(np.linspace(-1, 1, side) for side in small.shape[1:]), indexing="ij")
    terms = np.stack([rows**0, rows, columns, rows**2, columns**2, rows * columns], 2).astype(np.float32)
    frame = np.pad(np.zeros(rows[1:-1, 1:-1].shape, bool), 1, constant_values=True)
    border, surface = small[:, frame].T, np.median(small[:, frame], 1)
    for limit in (0.3, 2 * EVEN):  # the second time without what lies off the first surface
        on = np.abs(border - surface).max(1) < limit
        factors = np.linalg.lstsq(terms[frame][on], border[on], rcond=None)[0]
        surface = terms[frame] @ factors
    return np.moveaxis(terms @ factors, 2, 0), (np.abs(border - surface).max(1) < EVEN).mean()


def close_gaps(small: np.ndarray, sign: int) -> np.ndarray:
    """Return (3, H, W) without what is darker (sign 1) or lighter (-1) and narrower than a third of the picture."""
    reach = max(small.shape) // 6
    margin = 2 * reach + 2
    wide = np.pad(sign * small, [(0, 0), (margin, margin), (margin, margin)], "reflect", reflect_type="odd")
    closed = [-running_max(-running_max(plane, reach), reach + 2) for plane in wide]  # 2 more at a shadow's edge
    return sign * np.stack(closed)[:, margin:-margin, margin:-margin]


def running_max(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the maximum of (H, W) in the square around each pixel that reaches so far to each side."""
    for _ in range(2):
        values, width = np.pad(values.T, ((reach, reach), (0, 0)), "edge"), 1
        while width <= 2 * reach:
            step = min(width, 2 * reach + 1 - width)
            values, width = np.maximum(values[:-step], values[step:]), width + step
    return values


def contrast(values: np.ndarray, paper: np.ndarray, sign: int) -> np.ndarray:
    """Return how much darker (sign 1) or lighter (-1) than the paper the values are: in shadow, ink has less."""
    return (paper - values) / np.sqrt(np.maximum(paper, 0.1)) if sign == 1 else values - paper


def peak(ink: np.ndarray) -> float:
    """Return what the strongest 2000th of the pixels reaches."""
    top = max(1, ink.size // 2000)
    return float(np.partition(ink.ravel(), -top)[-top])


def strongest(small: np.ndarray, paper: np.ndarray, sign: int) -> tuple[float, int]:
    """Return how strong the ink is in the colour of (3, H, W) that shows it best, and this colour's number."""
    return max((peak(contrast(small[n], paper[n], sign)), n) for n in range(3))


def measure_ink(picture: np.ndarray, times: int, small: np.ndarray, paper: np.ndarray, sign: int) -> np.ndarray:
    """Return the ink (h, w) of a picture in blocks of `times` pixels, in the colour that shows it best."""
    colour = strongest(small, paper, sign)[1]
    plane = shrink(picture[:, :, colour : colour + 1], times)[0]
    level = Image.fromarray(paper[colour]).resize(plane.shape[::-1], Image.Resampling.BILINEAR)
    return contrast(plane, np.asarray(level), sign)


def find_shapes(ink: np.ndarray) -> tuple[float, np.ndarray, str] | None:
    """Return a rank (less is better), how much ink of the digit (H, W) has, in 0..1, and a doubt; None if no ink."""
    ground, step = np.percentile(ink[::3, ::3], 25), -(-max(ink.shape) // 60)
    noise = 1.05 * np.median(np.abs(ink[:, step:] - ink[:, :-step])[::3, ::3])  # also where the light varies
    top = peak(ink)
    if top - ground < max(CONTRAST, NOISES * noise):
        return None
    half, cell = (top + ground) / 2, -(-max(ink.shape) // CELLS)
    padded = np.pad(ink, [(0, -side % cell) for side in ink.shape], "edge")
    labels = label(padded.reshape(padded.shape[0] // cell, cell, -1, cell).max((1, 3)) > half)

    def enlarge(cells: np.ndarray) -> np.ndarray:
        return running_max(cells, 1).repeat(cell, 0).repeat(cell, 1)[: ink.shape[0], : ink.shape[1]]

    sides = labels[0], labels[-1], labels[:, 0], labels[:, -1]
    beside = [n for side in sides for n in np.unique(side[side > 0]) if (side == n).mean() > 0.5]
    if beside and (rest := find_shapes(np.where(enlarge(np.isin(labels, beside)), ground, ink))):
        return rest  # than a desk beside the paper or a scanner's edge
    digit, doubt = choose_shapes(labels)
    if not doubt and any(digit.take(0, axis).any() and digit.take(-1, axis).any() for axis in (0, 1)):
        doubt = "the ink touches opposite edges"
    mask = enlarge(digit)
    high = np.median(ink[mask & (ink > half)])
    rest = ink[::3, ::3][~mask[::3, ::3]]
    low = max(ground, min(np.percentile(rest, 98), 0.6 * high)) if rest.size else ground  # lines on paper are no ink
    soft = np.clip((ink - low) / (high - low), 0, 1) * mask
    border = np.concatenate([digit[0], digit[-1], digit[:, 0], digit[:, -1]]).mean()
    extent = max(np.ptp(where) + 1 for where in np.nonzero(digit))
    return 2 * border - extent / max(digit.shape) + 2 * line_width(soft) / cell / extent, soft, doubt


def choose_shapes(labels: np.ndarray) -> tuple[np.ndarray, str]:
    """Return which cells of numbered shapes (H, W) are the digit's, and a doubt."""
    numbers, areas = np.unique(labels[labels > 0], return_counts=True)
    shapes = []
    for n in np.argsort(-areas)[:20]:
        rows, columns = np.nonzero(labels == numbers[n])
        shapes.append((numbers[n], areas[n], rows.min(), rows.max() + 1, columns.min(), columns.max() + 1))
    number, area, top, bottom, left, right = shapes[0]
    height, width, kept, doubt = bottom - top, right - left, [number], ""
    for other, size, first, last, start, end in shapes[1:]:
        gap = max(first - bottom, top - last, start - right, left - end)
        apart = min(end, right) - max(start, left) < 0.2 * min(end - start, width)
        if last - first > 0.5 * height and size > 0.3 * area and apart:
            doubt = "several shapes of like size"
        elif gap <= 0.25 * max(height, width) and size >= 0.01 * area:  # a part, such as a 5's bar
            kept.append(other)
            top, bottom, left, right = min(first, top), max(last, bottom), min(start, left), max(end, right)
    return np.isin(labels, kept), doubt


def label(mask: np.ndarray) -> np.ndarray:
    """Return a number for each shape of a mask (H, W), whose cells touch at a side or corner; 0 elsewhere."""
    mask = np.pad(mask, 1)
    flat, numbers = mask.ravel(), np.arange(mask.size)
    steps = np.array([1, mask.shape[1] - 1, mask.shape[1], mask.shape[1] + 1])  # to the neighbours that follow
    cells = np.flatnonzero(flat)[:, None]
    near = flat[cells + steps]
    first, second = (cells + 0 * steps)[near], (cells + steps)[near]
    while (numbers[first] != numbers[second]).any():  # shapes that touch take the larger number
        low, high = np.sort([numbers[first], numbers[second]], 0)
        np.maximum.at(numbers, low, high)
        numbers = numbers[numbers]
    return np.where(mask, numbers.reshape(mask.shape), 0)[1:-1, 1:-1]


def line_width(ink: np.ndarray) -> float:
    """Return the mean width in pixels of lines of ink (H, W) in 0..1: twice the area over the outline."""
    edged = np.pad(ink, 1)
    outline = (np.abs(np.diff(edged, axis=0)).sum() + np.abs(np.diff(edged, axis=1)).sum()) * np.pi / 4
    return 2 * ink.sum() / outline


def fit(ink: np.ndarray) -> np.ndarray:
    """Return ink (H, W) in 0..1, scaled into 20x20, with its centre of mass at the centre of (28, 28) uint8."""
    rows, columns = (np.flatnonzero(ink.max(axis) > 0.2) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    line = line_width(ink) * 20 / max(ink.shape)
    widen = round(2 * (WIDENED - line)) if line < THIN else 0  # to each side, in quarters of a pixel as all below
    size = [max(1, round(side * (80 - 2 * widen) / max(ink.shape))) for side in ink.shape[::-1]]
    fine = np.asarray(Image.fromarray(ink).resize(size, Image.Resampling.BICUBIC)).clip(0, 1)
    centre = [np.average(np.arange(fine.shape[axis]) + 0.5, weights=fine.sum(1 - axis)) for axis in (0, 1)]
    top, left = (round(98 - float(each)) for each in centre)  # the centre of pixel 14, where MNIST has it
    page = np.zeros((192, 192), np.float32)  # with room around
    page[top : top + fine.shape[0], left : left + fine.shape[1]] = fine
    reach = range(-widen, widen + 1)
    page = np.maximum.reduce([np.roll(page, (y, x), (0, 1)) for y in reach for x in reach if y**2 + x**2 <= widen**2])
    return np.rint(page[40:152, 40:152].reshape(28, 4, 28, 4).mean((1, 3)) * 255).astype(np.uint8)

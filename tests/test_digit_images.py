"""Pictures of every kind that people bring are drawn from MNIST's digits, read from files and prepared."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

from digit_images import prepare_digit, read_picture
from download_mnist import load_mnist
from utils import ScriptError

CANVAS = {"size": (280, 280), "ink": 0, "paper": 255, "noise": 0, "width": (20,)}
PENCIL = {"ink": 90, "width": (1, 2, 3, 4)}
KINDS = {  # percent that a model should read, and the options of draw()
    "evenly lit photograph": (98, {}),
    "pencil, 1 to 4 px of 600": (95, PENCIL),
    "pencil on ruled paper": (95, PENCIL | {"lines": (1,), "turn": (0, 3)}),
    "pencil on squared paper": (95, PENCIL | {"lines": (0, 1), "turn": (0, 3)}),
    "ink on squared paper": (95, {"lines": (0, 1), "turn": (0, 3)}),
    "test digit as it is": (98, {"size": (28, 28)}),
    "canvas, brush 20": (95, CANVAS),
    "canvas, white on black": (95, CANVAS | {"ink": 255, "paper": 0}),
    "canvas cut to the ink, brush 32": (95, CANVAS | {"width": (32,), "cut": (0, 1, 2, 3)}),
    "ink at the border": (95, {"cut": (0,)}),
    "pale ink in noise": (95, {"ink": 200, "paper": 220, "noise": 8}),
    "chalk": (95, {"ink": 200, "paper": 60, "noise": 10}),
    "vignette": (95, {"light": "vignette"}),
    "desk beside the paper": (95, {"beside": (0.15, 0.25), "part": 0.25}),
    "scanner's edge": (95, {"beside": (0.02, 0.04), "part": 0.5}),
    "JPEG quality 15": (95, {"quality": 15}),
    "an eighth of the picture": (95, {"part": 1 / 8}),
    "transparent, black ink": (90, CANVAS | {"clear": True}),
    "transparent, white ink": (90, CANVAS | {"clear": True, "ink": 255}),
    "felt pen, 80 px of 600": (90, {"width": (80,)}),
    "soft shadow": (90, {"light": "soft"}),
    "a 25th of a large photograph": (90, {"size": (2250, 3000), "part": 1 / 25}),
    "hard shadow": (85, {"light": "hard"}),
}
EMPTY = ({"noise": 1}, {"noise": 8}, {"quality": 15}, {"paper": 60, "noise": 10}, {"light": "vignette", "noise": 1})


def thin(ink: np.ndarray) -> np.ndarray:
    """Return the centre lines of a mask (H, W), by the algorithm of Zhang and Suen (1984)."""
    ink, changed = np.pad(ink, 1), True
    while changed:
        changed = False
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            steps = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from the top
            around = np.stack([np.roll(ink, (-row, -column), (0, 1)) for row, column in steps])
            count, rises = around.sum(0), (~around & np.roll(around, -1, 0)).sum(0)
            gone = ink & (count >= 2) & (count <= 6) & (rises == 1)
            gone &= ~around[list(first)].all(0) & ~around[list(second)].all(0)
            ink, changed = ink & ~gone, changed or gone.any()
    return ink[1:-1, 1:-1]


def draw_ink(digit: np.ndarray, height: int, width: int | None) -> np.ndarray:
    """Return how much of each pixel a digit (28, 28) covers, cut to its ink; enlarged or with lines `width` px wide."""
    rows, columns = (np.flatnonzero(digit.max(axis) > 60)[[0, -1]] for axis in (1, 0))
    cut = Image.fromarray(digit).crop((columns[0] - 1, rows[0] - 1, columns[1] + 2, rows[1] + 2))
    scale = height / (rows[1] - rows[0] + 1)
    if width is None:
        size = round(cut.width * scale), round(cut.height * scale)
        return np.clip((np.asarray(cut.resize(size, Image.Resampling.BICUBIC), float) / 255 - 0.2) / 0.5, 0, 1)
    points = np.argwhere(thin(np.asarray(cut.resize((cut.width * 5, cut.height * 5), Image.Resampling.BICUBIC)) > 100))
    places = (points - points.min(0)) * 2 * scale / 5 + width
    ink = Image.new("L", tuple(int(side + width) for side in places.max(0)[::-1]))  # drawn twice as large
    for point, (row, column) in zip(points, places, strict=True):
        ImageDraw.Draw(ink).ellipse((column - width, row - width, column + width - 1, row + width - 1), 255)
        for near in places[np.abs(points - point).max(1) == 1]:
            ImageDraw.Draw(ink).line((column, row, near[1], near[0]), 255, 2 * width)
    return np.asarray(ink.resize((ink.width // 2, ink.height // 2), Image.Resampling.BOX), float) / 255


def draw(path: Path, seed: int, *digits: np.ndarray, size: tuple[int, int] = (600, 600), part: float = 0.6,
    width: tuple[int, ...] = (), ink: int = 50, paper: int = 225, noise: float = 3, lines: tuple[int, ...] = (),
    turn: tuple[int, ...] = (0,), light: str = "", beside: tuple[float, float] = (0, 0), cut: tuple[int, ...] = (),
    clear: bool = False, quality: int = 92,
) -> Path:  # fmt: skip
    """Write a picture of digits (28, 28) side by side, or of none, as PNG if it has no noise or else as JPEG.

    `part` is the digits' share of the height, `width` a choice of line widths in pixels; `ink`, `paper` and `noise`
    are grey levels. `lines` run along these axes of the paper, which is turned by a choice of degrees; `light` is "",
    "vignette", "soft" or "hard" (shadow); something dark covers a share between `beside` at one side; the picture is
    cut to the ink at the sides `cut`; only the ink is opaque if `clear`.
    """
    rng = np.random.default_rng(seed)
    path = path.with_suffix(".jpg" if noise and size != (28, 28) else ".png")
    height, breadth = size
    if size == (28, 28):
        Image.fromarray(digits[0]).save(path)
        return path
    row, column = np.mgrid[:height, :breadth].astype(np.float32)
    page, cover = np.full(size, ink if clear else paper, np.float32), np.zeros(size, np.float32)
    angle = np.deg2rad(rng.choice(turn))
    for axis in lines:
        along = column * np.cos(angle) + row * np.sin(angle), row * np.cos(angle) - column * np.sin(angle)
        page[along[axis] % 50 < 2] = 185
    drawn = [draw_ink(digit, round(part * height), int(rng.choice(width)) if width else None) for digit in digits]
    gap = round(0.1 * part * height)
    free = 4 + int(beside[1] * height)  # what lies beside the paper covers no digit
    top = rng.integers(free, height - free + 1 - max([each.shape[0] for each in drawn], default=0))
    left = rng.integers(free, breadth - free + 1 - sum(each.shape[1] for each in drawn) - gap * max(0, len(drawn) - 1))
    for each in drawn:
        cover[top : top + each.shape[0], left : left + each.shape[1]] = each
        left += each.shape[1] + gap
    page += cover * (ink - page)
    if light == "vignette":
        page *= 1 - 1.4 * ((row / height - 0.5) ** 2 + (column / breadth - 0.5) ** 2)
    elif light:
        direction, depth = rng.uniform(0, 2 * np.pi), 40 if light == "soft" else 1
        away = (row - height / 2) * np.sin(direction) + (column - breadth / 2) * np.cos(direction)
        page *= 1 - 0.5 / (1 + np.exp(np.clip(rng.uniform(-0.2, 0.2) * height - away, -300, 300) / depth))
    side = np.rot90(page, rng.integers(4))
    side[: int(rng.uniform(*beside) * len(side))] = 55
    tint = rng.uniform(0.94, 1, 3) if noise else np.ones(3)
    colours = page[:, :, None] * tint + rng.normal(0, noise, (*size, 3))
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    if clear:
        picture.putalpha(Image.fromarray((cover * 255).astype(np.uint8)))
    rows, columns = (np.flatnonzero(cover.max(axis) > 0.5) for axis in (1, 0))
    if cut:
        sides = zip((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1), (0, 0, breadth, height), strict=True)
        picture = picture.crop([int(pair[n not in cut]) for n, pair in enumerate(sides)])
    picture.save(path, quality=quality)
    return path


@pytest.fixture(scope="module")
def digits(real_data: Path) -> np.ndarray:
    """The last 100 digits of the test set, (100, 28, 28) uint8."""
    return load_digits(real_data, 100)[0]


def load_digits(data_dir: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the last digits of the test set, (count, 28, 28) uint8, and their labels."""
    images, labels = (part[-count:] for part in load_mnist(data_dir, False, torch.device("cpu")))
    return ((images[:, 0] * 0.3081 + 0.1307) * 255).round().byte().numpy(), labels.numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_like_mnist(kind: str, digits: np.ndarray, tmp_path: Path) -> None:
    options, likeness, doubts = KINDS[kind][1], [], 0
    for seed, digit in enumerate(digits[: 4 if "large" in kind else 12]):
        image, doubt = prepare_digit(read_picture(draw(tmp_path / "digit", seed, digit, **options)))
        assert image.shape == (28, 28) and image.dtype == np.uint8
        likeness.append(np.corrcoef(image.ravel(), digit.ravel())[0, 1])
        doubts += doubt != ""
    floor = 0.6 if "width" in options else 0.7  # other lines than MNIST's are less like it
    assert np.mean(np.array(likeness) > floor) >= KINDS[kind][0] / 100 - 0.1
    assert doubts <= 1 or "cut" in kind
    rows, columns = np.nonzero(image > 40)
    assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20, 21, 22)


@pytest.mark.parametrize("options", EMPTY, ids=str)
def test_empty_page(options: dict, tmp_path: Path) -> None:
    for seed in range(3):
        with pytest.raises(ScriptError, match="no ink"):
            prepare_digit(read_picture(draw(tmp_path / "empty", seed, **options)))


def test_two_digits(digits: np.ndarray, tmp_path: Path) -> None:
    files = (draw(tmp_path / "two", n, *digits[n : n + 2], part=0.35) for n in range(10))
    assert sum(prepare_digit(read_picture(file))[1] == "several shapes of like size" for file in files) >= 8


GREY = np.tile(np.linspace(0, 240, 40, dtype=np.uint8), (30, 1))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".gif", ".webp", ".tif"])
def test_formats(mode: str, suffix: str, tmp_path: Path) -> None:
    image, path = Image.fromarray(GREY), tmp_path / f"picture{suffix}"
    image = (
        Image.fromarray(GREY * (np.uint16(257) if mode == "I;16" else np.float32(1)))
        if mode in ("I;16", "F")
        else image.convert(mode)
    )
    if mode == "I;16" and suffix in (".gif", ".webp"):
        pytest.skip("it is clipped")
    try:
        image.save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    picture = read_picture(path)
    assert picture.shape == (30, 40, 3) and picture.dtype == np.float32
    assert np.abs(picture[:, :, 0] - GREY / 255).mean() < (0.5 if mode == "1" else 0.03)


def test_orientation(tmp_path: Path) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.kron(np.array([[0, 80, 160], [255, 120, 40]], np.uint8), np.ones((8, 8), np.uint8))).save(
            tmp_path / "turned.png", exif=exif
        )
        with Image.open(tmp_path / "turned.png") as image:
            expected = np.asarray(ImageOps.exif_transpose(image), np.float32) / 255
        assert (read_picture(tmp_path / "turned.png")[:, :, 1] == expected).all()


def png_of(width: int, height: int) -> bytes:
    """Return a PNG's start, which promises so many pixels."""
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">2I4sI", zlib.crc32(header), 0, b"IDAT", zlib.crc32(b"IDAT"))
    )


def jpeg_of(side: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (16, 16)).save(file, "JPEG")
    return file.getvalue().replace(struct.pack(">2H", 16, 16), struct.pack(">2H", side, side), 1)


@pytest.mark.parametrize(("data", "words"), [
    (None, "check the path"),
    (b"hello", "save it as PNG or JPEG"),
    (b"", "save it as PNG or JPEG"),
    (bytes(4) + b"ftypheic" + bytes(99), "export it as JPEG"),
    (png_of(10000, 9000), "more than 89 million"),
    (png_of(100000, 90000), "more than 89 million"),
    (jpeg_of(16001), "more than 256 million"),
    (png_of(100, 100), "is damaged"),
])  # fmt: skip
def test_unreadable(data: bytes | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "picture.jpg"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12345)
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ScriptError, match=words) as raised:
        read_picture(path)
    assert Image.MAX_IMAGE_PIXELS == 12345  # put back
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_large_jpeg(tmp_path: Path) -> None:
    Image.new("L", (12000, 9000), 200).save(tmp_path / "large.jpg")
    assert read_picture(tmp_path / "large.jpg").shape == (1125, 1500, 3)

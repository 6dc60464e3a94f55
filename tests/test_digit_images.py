"""Pictures of all kinds that people bring are drawn from MNIST's digits, prepared, and read."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED_MODEL5
from numpy import ndarray
from PIL import Image, ImageDraw
from torchvision.datasets import MNIST

import digit_images
from digit_images import prepare_digit, read_picture
from mnist_data import normalize
from predict_digits import load_model, predict
from utils import ScriptError

PICTURES = int(os.environ.get("PICTURES", 6))  # of each kind; PICTURES=100 measures the shares

CANVAS = {"size": (280, 280), "ink": 0, "paper": 255, "noise": 0, "width": (20,)}
PENCIL = {"ink": 90, "width": (1, 2, 3, 4)}
KINDS = {  # options of draw()
    "evenly lit photograph": {},
    "pencil, 1 to 4 px of 600": PENCIL,
    "pencil on ruled paper": PENCIL | {"lines": (1,)},
    "pencil on squared paper": PENCIL | {"lines": (0, 1)},
    "ink on squared paper": {"lines": (0, 1)},
    "test digit as it is": {"size": (28, 28), "noise": 0},
    "canvas, brush 20": CANVAS,
    "canvas, white on black": CANVAS | {"ink": 255, "paper": 0},
    "canvas cut to the ink, brush 32": CANVAS | {"width": (32,), "cut": (0, 1, 2, 3)},
    "ink at the border": {"cut": (0,)},
    "pale ink in noise": {"ink": 200, "paper": 220, "noise": 8},
    "chalk": {"ink": 200, "paper": 60, "noise": 10},
    "vignette": {"light": "vignette"},
    "desk beside the paper": {"beside": (0.15, 0.25), "part": 0.25},
    "scanner's edge": {"beside": (0.02, 0.04), "part": 0.5},
    "JPEG quality 15": {"quality": 15},
    "an eighth of the picture": {"part": 1 / 8},
    "transparent, black ink": CANVAS | {"clear": True},
    "transparent, white ink": CANVAS | {"clear": True, "ink": 255},
    "felt pen, 80 px of 600": {"width": (80,)},
    "soft shadow": {"light": "soft"},
    "a 25th of a large photograph": {"size": (2250, 3000), "part": 1 / 25},
    "hard shadow": {"light": "hard"},
}
# Percent that a model should read; 95 of the other kinds
SHARES = {
    "evenly lit photograph": 98,
    "test digit as it is": 98,
    "transparent, black ink": 90,
    "transparent, white ink": 90,
    "felt pen, 80 px of 600": 90,
    "soft shadow": 90,
    "a 25th of a large photograph": 90,
    "hard shadow": 85,
}


def to_image(levels: ndarray) -> Image.Image:
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def thin(ink: ndarray) -> ndarray:
    """Return the centre lines of a mask (H, W), by the algorithm of Zhang and Suen (1984)."""
    clockwise = [1, 2, 5, 8, 7, 6, 3, 0]  # positions around the middle of 3x3, from the top
    while True:
        before = ink
        for first, second in (([0, 2, 4], [2, 4, 6]), ([0, 2, 6], [0, 4, 6])):
            squares = np.lib.stride_tricks.sliding_window_view(np.pad(ink, 1), (3, 3))
            around = squares.reshape(*ink.shape, 9)[..., clockwise]
            count = around.sum(2)
            rises = (~around & np.roll(around, -1, 2)).sum(2)
            is_inside = around[..., first].all(2) | around[..., second].all(2)
            ink = ink & (is_inside | (count < 2) | (count > 6) | (rises != 1))
        if (ink == before).all():
            return ink


def draw_ink(digit: ndarray, height: int, width: int | None) -> ndarray:
    """Return how much of each pixel a digit (28, 28) covers, cut to its ink.

    Its lines are `width` pixels wide; None enlarges the digit as it is.
    """
    left, top, right, bottom = Image.fromarray(digit > 60).getbbox()
    cut = Image.fromarray(digit).crop((left - 1, top - 1, right + 1, bottom + 1))
    scale = height / (bottom - top)
    factor = scale if width is None else 5
    size = [round(side * factor) for side in cut.size]
    large = np.asarray(cut.resize(size, Image.BICUBIC), float)
    if width is None:
        return np.clip((large / 255 - 0.2) / 0.5, 0, 1)
    points = np.argwhere(thin(large > 100))
    # Drawn twice as large, and then reduced
    places = (points - points.min(0)) * 2 * scale / 5 + width
    bottom, right = places.max(0) + width
    ink = Image.new("L", (int(right), int(bottom)))
    pen = ImageDraw.Draw(ink)
    for point, (y, x) in zip(points, places, strict=True):
        pen.ellipse((x - width, y - width, x + width - 1, y + width - 1), 255)
        for near_y, near_x in places[abs(points - point).max(1) == 1]:
            pen.line((x, y, near_x, near_y), 255, 2 * width)
    return np.asarray(ink.reduce(2), float) / 255


def draw(
    path: Path,
    seed: int,
    *digits: ndarray,
    size: tuple = (600, 600),
    part: float = 0.6,
    width: tuple = (),
    ink: int = 50,
    paper: int = 225,
    noise: float = 3,
    lines: tuple = (),
    light: str = "",
    beside: tuple = (0, 0),
    cut: tuple = (),
    clear: bool = False,
    quality: int = 92,
) -> Path:
    """Write a picture of digits (28, 28) side by side, or of none; as JPEG if it has noise.

    `part` is the digits' share of the height, `width` a choice of line widths in pixels; `ink`,
    `paper` and `noise` are grey levels. `lines` run along these axes of the paper, which is turned
    a little; `light` is "", "vignette", "soft" or "hard" (shadow); something dark covers a share
    between `beside` at one side; the picture is cut to the ink at the sides `cut`; only the ink is
    opaque if `clear`.
    """
    path = path.with_suffix(".jpg" if noise else ".png")
    if size == (28, 28):
        Image.fromarray(digits[0]).save(path)
        return path
    rng = np.random.default_rng(seed)
    height, breadth = size
    y, x = np.mgrid[:height, :breadth].astype(np.float32)
    y -= height / 2
    x -= breadth / 2

    def along(angle: float) -> ndarray:
        return x * np.cos(angle) + y * np.sin(angle)

    page = np.full(size, ink if clear else paper, np.float32)
    turn = np.deg2rad(rng.choice((0, 3))) if lines else 0
    for axis in lines:
        page[along(turn + axis * np.pi / 2) % 50 < 2] = 185

    gap = round(0.1 * part * height)
    drawn = []
    for digit in digits:
        line = int(rng.choice(width)) if width else None
        drawn.append(draw_ink(digit, round(part * height), line))
    tall = max(map(len, drawn), default=1)
    drawn = [np.pad(each, ((0, tall - len(each)), (0, gap))) for each in drawn]
    shown = np.hstack(drawn or [np.zeros((1, gap + 1))])[:, :-gap]
    free = 4 + int(beside[1] * height)  # what lies beside the paper covers no digit
    top = rng.integers(free, height - free + 1 - len(shown))
    left = rng.integers(free, breadth - free + 1 - shown.shape[1])
    cover = np.zeros(size, np.float32)
    cover[top : top + len(shown), left : left + shown.shape[1]] = shown
    page += cover * (ink - page)

    if light == "vignette":
        page *= 1 - 1.4 * ((y / height) ** 2 + (x / breadth) ** 2)
    elif light:
        from_middle = along(rng.uniform(0, 2 * np.pi))
        from_edge = rng.uniform(-0.2, 0.2) * height - from_middle
        page *= 0.75 + 0.25 * np.tanh(from_edge / (80 if light == "soft" else 2))
    side = np.rot90(page, rng.integers(4))
    side[: int(rng.uniform(*beside) * len(side))] = 55
    tint = rng.uniform(0.94 if noise else 1, 1, 3).astype(np.float32)
    colours = page[..., None] * tint
    colours += noise * rng.standard_normal(colours.shape, np.float32)

    picture = to_image(colours)
    if clear:
        picture.putalpha(to_image(cover * 255))
    box = [0, 0, breadth, height]
    for edge in cut:
        box[edge] = Image.fromarray(cover > 0.5).getbbox()[edge]
    picture.crop(box).save(path, quality=quality)
    return path


def prepare(path: Path, seed: int, *digits: ndarray, **options: object) -> tuple[ndarray, str]:
    return prepare_digit(read_picture(draw(path / "digit", seed, *digits, **options)))


@pytest.fixture(scope="module")
def mnist(real_data: Path) -> tuple[ndarray, list[int]]:
    """The last hundred digits of the test set, (100, 28, 28) uint8, and their labels."""
    test_set = MNIST(real_data, train=False)
    labels = test_set.targets[-100:]
    return test_set.data[-100:].numpy(), labels.tolist()


@pytest.fixture(scope="module")
def read() -> Callable[[ndarray], int]:
    """A function that returns what a trained model reads in an image (28, 28)."""
    model = load_model(TRAINED_MODEL5, torch.device("cpu"))

    def read(image: ndarray) -> int:
        images = normalize(torch.from_numpy(image)[None, None])
        return predict(model, images).argmax().item()

    return read


@pytest.mark.parametrize("kind", KINDS)
def test_read(kind: str, read: Callable, mnist: tuple, tmp_path: Path) -> None:
    count = math.ceil(PICTURES / 4) if "large" in kind else PICTURES
    images, labels = mnist
    right = 0
    doubts = []
    for seed in range(-count, 0):
        image, doubt = prepare(tmp_path, seed + count, images[seed], **KINDS[kind])
        right += read(image) == labels[seed]
        doubts += [doubt] if doubt else []
    assert right >= count * SHARES.get(kind, 95) // 100
    if "cut to" in kind:
        assert set(doubts) == {"unsure: the ink touches opposite edges"}
    else:
        assert len(doubts) <= 0.02 * count


def test_size_and_place(mnist: tuple, tmp_path: Path) -> None:
    for seed, digit in enumerate(mnist[0][-20:]):
        image, _ = prepare(tmp_path, seed, digit, size=(300, 400))
        extents = [np.ptp(positions) + 1 for positions in np.nonzero(image > 40)]
        assert 19 <= max(extents) <= 22
        moments = (np.indices((28, 28)) * image).sum((1, 2))
        centre = moments / image.sum()
        assert abs(centre - 14).max() < 0.2


@pytest.mark.parametrize(
    "options",
    [
        {"noise": 1},
        {"noise": 8},
        {"quality": 15},
        {"paper": 60, "noise": 10},
        {"light": "vignette", "noise": 1},
    ],
    ids=str,
)
def test_empty_page(options: dict, tmp_path: Path) -> None:
    for seed in range(PICTURES):
        with pytest.raises(ScriptError, match="no ink"):
            prepare(tmp_path, seed, **options)


def test_two_digits(mnist: tuple, tmp_path: Path) -> None:
    digits = mnist[0][-PICTURES - 1 :]
    doubts = []
    for seed in range(PICTURES):
        _, doubt = prepare(tmp_path, seed, *digits[seed : seed + 2], part=0.35)
        doubts.append(doubt)
    assert doubts.count("unsure: several shapes of similar size") >= 0.8 * PICTURES


def test_other_peoples_digits(read: Callable) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    images, labels = datasets.load_digits(return_X_y=True)
    step = math.ceil(100 / PICTURES)
    right = []
    for image, label in zip(images[::step], labels[::step], strict=True):
        small = to_image(image.reshape(8, 8) * 255 / 16).convert("RGB")
        large = small.resize((64, 64), Image.BICUBIC)
        prepared, _ = prepare_digit(np.asarray(large, np.float32) / 255)
        right.append(read(prepared) == label)
    assert np.mean(right) > 0.87


def test_parts_and_specks() -> None:
    page = np.ones((100, 100, 3), np.float32)
    page[40:80, 40:46] = page[30:34, 40:70] = 0  # a digit of two strokes
    alone, doubt = prepare_digit(page)
    assert alone[:9, 18:].max() > 200  # the second stroke is there
    page[5:8, 90:93] = 0  # far and small
    beside_speck, doubt_beside_speck = prepare_digit(page)
    assert (beside_speck == alone).all()
    assert doubt == doubt_beside_speck == ""


@pytest.mark.parametrize("left", [40, 41])
@pytest.mark.parametrize(
    ("ink", "paper", "height"), [(255, 0, 100), ((30, 60, 200), (250, 240, 220), 150)]
)
def test_a_line_of_one_pixel_in_any_column(
    left: int, ink: object, paper: object, height: int
) -> None:
    page = np.full((height, 100, 3), paper, np.float32)
    page[20:80, left] = ink
    image, _ = prepare_digit(page / 255)
    assert image[6:22].max(1).min() > 200


def test_shapes_without_ink() -> None:
    for height, width in (1, 1), (1, 500), (2000, 2), (30, 700):
        with pytest.raises(ScriptError, match="no ink"):
            prepare_digit(np.ones((height, width, 3), np.float32))


def test_coloured_ink(mnist: tuple) -> None:
    digit = np.pad(mnist[0][-1], 14)
    for colour in range(3):
        page = np.full((56, 56, 3), 0.8, np.float32)
        page[:, :, colour] -= digit / 400
        image, _ = prepare_digit(page)
        same_part = digit[14:-14, 14:-14]
        correlation = np.corrcoef(image.ravel(), same_part.ravel())[0, 1]
        assert correlation > 0.9


GREY = np.tile(np.linspace(0, 240, 40, dtype=np.uint8), (30, 1))


@pytest.mark.parametrize(
    ("suffix", "modes"),
    [
        ("png", "L P RGB RGBA LA I;16"),
        ("jpg", "L RGB CMYK"),
        ("bmp", "L P RGB"),
        ("gif", "L P RGB"),
        ("webp", "RGB RGBA"),
        ("tif", "L RGB RGBA CMYK I;16 F"),
    ],
)
def test_formats(suffix: str, modes: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    deep = {"I;16": GREY * np.uint16(257), "F": GREY * np.float32(9)}
    for mode in modes.split():
        image = Image.fromarray(deep.get(mode, GREY))
        if mode not in deep:
            image = image.convert(mode)
        image.save(path)
        picture = read_picture(path)
        assert picture.shape == (30, 40, 3)
        assert picture.dtype == np.float32
        brightest = 240 if mode in deep else 255
        errors = picture - GREY[..., None] / brightest
        assert abs(errors).mean() < 0.03


def test_turned_and_large(tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(GREY.repeat(120, 1)).save(path, exif=exif)
    picture = read_picture(path)
    assert picture.shape == (1600, 10, 3)  # a third of 4800
    assert (np.diff(picture.mean((1, 2))) >= 0).all()


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Pillow itself raises from twice this number of pixels on
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    monkeypatch.setattr(digit_images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(digit_images, "MAX_JPEG_PIXELS", 2000)
    for name, side in {"cut.png": 31, "large.png": 32, "large.jpg": 50, "fine.jpg": 40}.items():
        Image.effect_noise((side, side), 99).save(tmp_path / name)
    whole = (tmp_path / "cut.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:500])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "phone.jpg").write_bytes(bytes(4) + b"ftypheic" + bytes(99))
    reasons = {
        "none.png": "No such file",
        "text.png": "no known format",
        "cut.png": "truncated",
        "phone.jpg": "export it as JPEG",
        "large.png": "1,024 pixels, more than 1,000: ",
        "large.jpg": "2,500 pixels",
    }
    for name, reason in reasons.items():
        message = f"^cannot be read: .*{reason}.*; name a picture saved as PNG or JPEG$"
        with pytest.raises(ScriptError, match=message):
            read_picture(tmp_path / name)
    assert read_picture(tmp_path / "fine.jpg").shape == (40, 40, 3)  # above Pillow's limit
    assert Image.MAX_IMAGE_PIXELS == 700  # put back

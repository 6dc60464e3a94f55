"""Pictures of every kind that people bring are drawn from MNIST's digits, prepared, and read by a trained model."""

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TRAINED_MODEL5
from PIL import Image, ImageDraw

import digit_images
from checkpoints import load_checkpoint
from digit_images import prepare_digit, read_picture
from mnist_data import load_mnist, normalize
from models import Model5
from predict_digits import predict
from utils import ScriptError

PICTURES = int(os.environ.get("PICTURES", 6))  # of each kind; PICTURES=100 measures the shares

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
EMPTY = (
    {"noise": 1},
    {"noise": 8},
    {"quality": 15},
    {"paper": 60, "noise": 10},
    {"light": "vignette", "noise": 1},
)


def thin(ink: np.ndarray) -> np.ndarray:
    """Return the centre lines of a mask (H, W), by the algorithm of Zhang and Suen (1984)."""
    ink, changed = np.pad(ink, 1), True
    while changed:
        changed = False
        for first, second in (((0, 2, 4), (2, 4, 6)), ((0, 2, 6), (0, 4, 6))):
            steps = (
                (-1, 0),
                (-1, 1),
                (0, 1),
                (1, 1),
                (1, 0),
                (1, -1),
                (0, -1),
                (-1, -1),
            )  # clockwise from the top
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
        return np.clip((np.asarray(cut.resize(size, Image.BICUBIC), float) / 255 - 0.2) / 0.5, 0, 1)
    points = np.argwhere(
        thin(np.asarray(cut.resize((cut.width * 5, cut.height * 5), Image.BICUBIC)) > 100)
    )
    places = (points - points.min(0)) * 2 * scale / 5 + width
    ink = Image.new(
        "L", tuple(int(side + width) for side in places.max(0)[::-1])
    )  # drawn twice as large
    for point, (row, column) in zip(points, places, strict=True):
        ImageDraw.Draw(ink).ellipse(
            (column - width, row - width, column + width - 1, row + width - 1), 255
        )
        for near in places[np.abs(points - point).max(1) == 1]:
            ImageDraw.Draw(ink).line((column, row, near[1], near[0]), 255, 2 * width)
    return np.asarray(ink.resize((ink.width // 2, ink.height // 2), Image.BOX), float) / 255


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
        along = (
            column * np.cos(angle) + row * np.sin(angle),
            row * np.cos(angle) - column * np.sin(angle),
        )
        page[along[axis] % 50 < 2] = 185
    drawn = [
        draw_ink(digit, round(part * height), int(rng.choice(width)) if width else None)
        for digit in digits
    ]
    gap, tall = round(0.1 * part * height), max([len(each) for each in drawn], default=1)
    drawn = [np.pad(each, ((0, tall - len(each)), (0, gap))) for each in drawn] or [
        np.zeros((1, gap + 1))
    ]
    shown = np.hstack(drawn)[:, :-gap]
    free = 4 + int(beside[1] * height)  # what lies beside the paper covers no digit
    top, left = (
        rng.integers(free, whole - free + 1 - each)
        for whole, each in zip(size, shown.shape, strict=True)
    )
    cover[top : top + shown.shape[0], left : left + shown.shape[1]] = shown
    page += cover * (ink - page)
    if light == "vignette":
        page *= 1 - 1.4 * ((row / height - 0.5) ** 2 + (column / breadth - 0.5) ** 2)
    elif light:
        direction, depth = rng.uniform(0, 2 * np.pi), 40 if light == "soft" else 1
        away = (row - height / 2) * np.sin(direction) + (column - breadth / 2) * np.cos(direction)
        page *= 1 - 0.5 / (
            1 + np.exp(np.clip(rng.uniform(-0.2, 0.2) * height - away, -300, 300) / depth)
        )
    side = np.rot90(page, rng.integers(4))
    side[: int(rng.uniform(*beside) * len(side))] = 55
    tint = rng.uniform(0.94, 1, 3).astype(np.float32) if noise else 1
    colours = page[:, :, None].repeat(3, 2) * tint + noise * rng.standard_normal(
        (*size, 3), np.float32
    )
    picture = Image.fromarray(np.clip(colours, 0, 255).astype(np.uint8))
    if clear:
        picture.putalpha(Image.fromarray((cover * 255).astype(np.uint8)))
    box = Image.fromarray(cover > 0.5).getbbox()
    picture = picture.crop(
        [box[n] if n in cut else side for n, side in enumerate((0, 0, breadth, height))]
    )
    picture.save(path, quality=quality)
    return path


def load_digits(data_dir: Path, count: int) -> tuple[np.ndarray, list[int]]:
    """Return the last digits of the test set, (count, 28, 28) uint8, and their labels."""
    images, labels = (part[-count:] for part in load_mnist(data_dir, False, torch.device("cpu")))
    return ((images[:, 0] * 0.3081 + 0.1307) * 255).round().byte().numpy(), labels.tolist()


def prepare(
    path: Path, seed: int, *digits: np.ndarray, **options: object
) -> tuple[np.ndarray, str]:
    return prepare_digit(read_picture(draw(path / "digit", seed, *digits, **options)))


@pytest.fixture(scope="module")
def read() -> Callable[[np.ndarray], int]:
    """A function that returns what a trained model reads in an image (28, 28)."""
    model = Model5().eval()
    model.load_state_dict(load_checkpoint(TRAINED_MODEL5)["model_state_dict"])
    return lambda image: (
        predict(model, normalize(torch.from_numpy(image)[None, None])).argmax().item()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_read(kind: str, read: Callable, real_data: Path, tmp_path: Path) -> None:
    share, options = KINDS[kind]
    right, doubts, count = 0, [], math.ceil(PICTURES / 4) if "large" in kind else PICTURES
    for seed, (digit, label) in enumerate(zip(*load_digits(real_data, count), strict=True)):
        image, doubt = prepare(tmp_path, seed, digit, **options)
        right += read(image) == label
        doubts += [doubt] if doubt else []
    assert right >= count * share // 100
    assert (
        set(doubts) == {"unsure: the ink touches opposite edges"}
        if "cut to" in kind
        else len(doubts) <= 0.02 * count
    )


def test_size_and_place(real_data: Path, tmp_path: Path) -> None:
    for seed, digit in enumerate(load_digits(real_data, 20)[0]):
        image, _ = prepare(tmp_path, seed, digit, size=(300, 400))
        rows, columns = np.nonzero(image > 40)
        assert 19 <= max(np.ptp(rows), np.ptp(columns)) + 1 <= 22
        assert np.abs((np.indices((28, 28)) * image).sum((1, 2)) / image.sum() - 14).max() < 0.2


@pytest.mark.parametrize("options", EMPTY, ids=str)
def test_empty_page(options: dict, tmp_path: Path) -> None:
    for seed in range(PICTURES):
        with pytest.raises(ScriptError, match="no ink"):
            prepare(tmp_path, seed, **options)


def test_two_digits(real_data: Path, tmp_path: Path) -> None:
    digits, _ = load_digits(real_data, PICTURES + 1)
    doubts = [prepare(tmp_path, n, *digits[n : n + 2], part=0.35)[1] for n in range(PICTURES)]
    assert doubts.count("unsure: several shapes of similar size") >= 0.8 * PICTURES


def test_other_peoples_digits(read: Callable) -> None:
    data = pytest.importorskip(
        "sklearn.datasets", reason="scikit-learn is not installed"
    ).load_digits()
    right = []
    for image, label in list(zip(data.images, data.target, strict=True))[
        :: math.ceil(100 / PICTURES)
    ]:
        large = (
            Image.fromarray((image * 255 / 16).astype(np.uint8))
            .convert("RGB")
            .resize((64, 64), Image.BICUBIC)
        )
        right.append(read(prepare_digit(np.asarray(large, np.float32) / 255)[0]) == label)
    assert np.mean(right) > 0.87


def test_parts_and_specks() -> None:
    page = np.ones((100, 100, 3), np.float32)
    page[40:80, 40:46] = page[30:34, 40:70] = 0  # a digit of two strokes
    alone = prepare_digit(page)
    assert alone[1] == "" and alone[0][:9, 18:].max() > 200  # the second stroke is there
    page[5:8, 90:93] = 0  # far and small
    assert (prepare_digit(page)[0] == alone[0]).all() and prepare_digit(page)[1] == ""


def test_a_line_of_one_pixel_in_any_column() -> None:
    blue = np.array([30, 60, 200]) / 255, np.array([250, 240, 220]) / 255
    for left in (40, 41):
        for ink, paper, height in ((1, 0, 100), (*blue, 150)):
            page = np.ones((height, 100, 3), np.float32) * np.array(paper, np.float32)
            page[20:80, left] = ink
            assert prepare_digit(page)[0][6:22].max(1).min() > 200


def test_shapes_without_ink() -> None:
    for shape in (1, 1), (1, 500), (2000, 2), (30, 700):
        with pytest.raises(ScriptError, match="no ink"):
            prepare_digit(np.full((*shape, 3), 0.5, np.float32))


def test_coloured_ink(real_data: Path) -> None:
    digit = load_digits(real_data, 1)[0][0]
    for colour in range(3):
        page = np.full((112, 112, 3), 0.8, np.float32)
        page[28:84, 28:84, colour] -= np.kron(digit, np.ones((2, 2))) / 400
        assert np.corrcoef(prepare_digit(page)[0].ravel(), digit.ravel())[0, 1] > 0.9


GREY = np.tile(np.linspace(0, 240, 40, dtype=np.uint8), (30, 1))


@pytest.mark.parametrize(("suffix", "modes"), [
    ("png", "L P RGB RGBA LA I;16"), ("jpg", "L RGB CMYK"), ("bmp", "L P RGB"), ("gif", "L P RGB"),
    ("webp", "RGB RGBA"), ("tif", "L RGB RGBA CMYK I;16 F"),
])  # fmt: skip
def test_formats(suffix: str, modes: str, tmp_path: Path) -> None:
    deep = {"I;16": GREY * np.uint16(257), "F": GREY * np.float32(9)}
    for mode in modes.split():
        image = Image.fromarray(deep[mode]) if mode in deep else Image.fromarray(GREY).convert(mode)
        image.save(tmp_path / f"a.{suffix}")
        picture = read_picture(tmp_path / f"a.{suffix}")
        assert picture.shape == (30, 40, 3) and picture.dtype == np.float32
        assert np.abs(picture - GREY[:, :, None] / (240 if mode in deep else 255)).mean() < 0.03


def test_turned_and_large(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.fromarray(np.kron(GREY, np.ones((1, 120), np.uint8))).save(
        tmp_path / "large.png", exif=exif
    )
    picture = read_picture(tmp_path / "large.png")
    assert picture.shape == (1600, 10, 3)  # a third of 4800
    assert (np.diff(picture.mean((1, 2))) >= 0).all()


def test_unreadable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Image, "MAX_IMAGE_PIXELS", 700
    )  # Pillow itself raises from twice as many on
    monkeypatch.setattr(digit_images, "MAX_PIXELS", 1000)
    monkeypatch.setattr(digit_images, "MAX_JPEG_PIXELS", 2000)
    for name, side in {"cut.png": 31, "large.png": 32, "large.jpg": 50}.items():
        Image.effect_noise((side, side), 99).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:500])
    (tmp_path / "text.png").write_bytes(b"hello")
    (tmp_path / "phone.jpg").write_bytes(bytes(4) + b"ftypheic" + bytes(99))
    reasons = {"none.png": "No such file", "text.png": "no known format", "cut.png": "truncated"}
    reasons |= {
        "phone.jpg": "export it as JPEG",
        "large.png": "1,024 pixels, more than 1,000: ",
        "large.jpg": "2,500 pixels",
    }
    for name, reason in reasons.items():
        with pytest.raises(
            ScriptError,
            match=f"^cannot be read: .*{reason}.*; name a picture saved as PNG or JPEG$",
        ):
            read_picture(tmp_path / name)
    Image.effect_noise((40, 40), 99).save(tmp_path / "large.jpg")
    assert read_picture(tmp_path / "large.jpg").shape == (
        40,
        40,
        3,
    )  # a JPEG may have more than Pillow's limit
    assert Image.MAX_IMAGE_PIXELS == 700  # put back

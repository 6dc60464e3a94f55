"""Measure how many pictures of digits, of every kind that people bring, a trained model reads right.

    python tests/benchmark_digits.py                  # 100 pictures a kind, model_checkpoints/best_mnist_model.pth
    python tests/benchmark_digits.py --count 20 --checkpoint runs/best_mnist_model.pth

The pictures are drawn from the last digits of MNIST's test set; no photograph is needed.
"""

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from test_digit_images import EMPTY, KINDS, draw, load_digits  # noqa: E402 - found through the line above

from checkpoints import load_checkpoint  # noqa: E402
from digit_images import prepare_digit, read_picture  # noqa: E402
from download_mnist import normalize  # noqa: E402
from models import build_model  # noqa: E402
from utils import ScriptError, number_type, path_type, run_script  # noqa: E402


def main() -> None:
    """Print the share read right, told as unsure and told as empty, in percent, and the time of a preparation."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", default=ROOT / "model_checkpoints" / "best_mnist_model.pth", type=path_type, help="a model")
    add("--count", default=100, type=number_type(int, 1), help="pictures of each kind (default: %(default)s)")
    add("--data-dir", default=ROOT / "data", type=path_type, help="holds MNIST/raw (default: the repository's data)")
    args = parser.parse_args()
    checkpoint = load_checkpoint(args.checkpoint)
    model = build_model(checkpoint["model_name"]).eval()
    model.load_state_dict(checkpoint["model_state_dict"])
    digits, labels = load_digits(args.data_dir, args.count + 1)
    kinds = [(kind, wanted, 1, options) for kind, (wanted, options) in KINDS.items()]
    kinds += [("two digits, to be unsure of", 0, 2, {"part": 0.35})]
    kinds += [(f"empty page {options}", 0, 0, options) for options in EMPTY]
    print(f"{f'{args.count} pictures of':48}   read  wanted  unsure  no ink   ms")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for kind, wanted, shown, options in kinds:
            files = (draw(Path(folder, "a"), n, *digits[n : n + shown], **options) for n in range(args.count))
            measure(kind, wanted, zip(map(read_picture, files), labels, strict=False), model)
        with contextlib.suppress(ImportError):
            from sklearn.datasets import load_digits as load_8x8

            images = [Image.fromarray((image * 255 / 16).astype(np.uint8)) for image in load_8x8().images]
            large = [np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)) for image in images]
            pictures = [image.astype(np.float32) / 255 for image in large]
            measure("scikit-learn's 8x8 digits at 64x64", 87, zip(pictures, load_8x8().target, strict=True), model)


def measure(kind: str, wanted: int, pictures: Iterable[tuple[np.ndarray, int]], model: nn.Module) -> None:
    """Print a line about pictures (H, W, 3) and their labels."""
    right, unsure, empty, seconds = 0, 0, 0, []
    for picture, label in pictures:
        start = time.perf_counter()
        try:
            image, doubt = prepare_digit(picture)
            seconds.append(time.perf_counter() - start)
            right += int(model(normalize(torch.from_numpy(image)[None, None])).argmax() == label)
            unsure += doubt != ""
        except ScriptError:
            seconds.append(time.perf_counter() - start)
            empty += 1
    shares = " ".join(
        f"{100 * number / len(seconds):7.0f}" for number in (right, wanted * len(seconds) / 100, unsure, empty)
    )
    print(f"{kind:48}{shares}{1000 * statistics.median(seconds):5.0f}", flush=True)


if __name__ == "__main__":
    run_script(main)

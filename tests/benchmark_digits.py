"""Measure how many pictures of digits, of every kind that people bring, a trained model reads right.

python tests/benchmark_digits.py --count 20       # pictures of each kind, drawn from MNIST's last test digits
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from test_digit_images import EMPTY, KINDS, draw, load_digits  # noqa: E402 - found through the line above

from checkpoints import load_checkpoint  # noqa: E402
from digit_images import prepare_digit, read_picture  # noqa: E402
from download_mnist import normalize  # noqa: E402
from models import build_model  # noqa: E402
from utils import ScriptError, number_type, path_type, run_script  # noqa: E402


def main() -> None:
    """Print a line for each kind of picture; the shares are in percent, the time in milliseconds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    kinds += [
        ("two digits, to be unsure of", 0, 2, {"part": 0.35}),
        *((f"empty page {options}", 0, 0, options) for options in EMPTY),
    ]
    print(f"{f'{args.count} pictures of':48}   read  wanted  unsure  no ink   ms")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for kind, wanted, shown, options in kinds:
            files = (draw(Path(folder, "a"), n, *digits[n : n + shown], **options) for n in range(args.count))
            measure(kind, wanted, zip(map(read_picture, files), labels, strict=False), model)
        with contextlib.suppress(ImportError):
            from sklearn.datasets import load_digits as load_small

            pages = [Image.fromarray((page * 255 / 16).astype(np.uint8)).convert("RGB") for page in load_small().images]
            pages = [np.float32(page.resize((64, 64), Image.Resampling.BICUBIC)) / 255 for page in pages]
            measure("scikit-learn's digits, enlarged to 64x64", 87, zip(pages, load_small().target, strict=True), model)


def measure(kind: str, wanted: int, pictures: Iterable[tuple[np.ndarray, int]], model: torch.nn.Module) -> None:
    """Print which share of pictures (H, W, 3) is read as their labels, doubted and empty, and the median time."""
    results = []
    for picture, label in pictures:
        image, doubt, start = None, "", time.perf_counter()
        with contextlib.suppress(ScriptError):
            image, doubt = prepare_digit(picture)
        seconds = time.perf_counter() - start
        right = image is not None and model(normalize(torch.from_numpy(image)[None, None])).argmax() == label
        results.append((bool(right), wanted / 100, doubt != "", image is None, seconds))
    shares = "".join(f"{100 * share:8.0f}" for share in np.mean(results, 0)[:4])
    print(f"{kind:47}{shares}{1000 * np.median(results, 0)[4]:5.0f}", flush=True)


if __name__ == "__main__":
    run_script(main)

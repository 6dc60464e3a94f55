"""Measure how many pictures of digits, of every kind that people bring, a trained model reads right.

    python tests/benchmark_digits.py                  # 100 pictures a kind, model_checkpoints/best_mnist_model.pth
    python tests/benchmark_digits.py --count 20 --checkpoint runs/best_mnist_model.pth

The pictures are drawn from the last digits of MNIST's test set; no photograph is needed.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from test_digit_images import EMPTY, KINDS, draw, load_digits  # noqa: E402 - found through the line above

from checkpoints import load_checkpoint  # noqa: E402
from digit_images import prepare_digit, read_picture  # noqa: E402
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
    print(f"{'100 pictures of':48} read  wanted  unsure  no ink  ms".replace("100", str(args.count)))
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        for kind, wanted, shown, options in kinds:
            right = unsure = empty = seconds = 0
            for n in range(args.count):
                picture = read_picture(draw(Path(folder, "picture"), n, *digits[n : n + shown], **options))
                start = time.perf_counter()
                try:
                    image, doubt = prepare_digit(picture)
                    seconds += time.perf_counter() - start
                    right += model((torch.from_numpy(image)[None, None] / 255 - 0.1307) / 0.3081).argmax() == labels[n]
                    unsure += doubt != ""
                except ScriptError:
                    seconds += time.perf_counter() - start
                    empty += 1
            read, doubted, none = (100 * float(number) / args.count for number in (right, unsure, empty))
            print(
                f"{kind:48} {read:4.0f}  {wanted:6}  {doubted:6.0f}  {none:6.0f}  {1000 * seconds / args.count:2.0f}",
                flush=True,
            )


if __name__ == "__main__":
    run_script(main)

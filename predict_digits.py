"""Read your own digits with a trained model, or see where it errs on MNIST's test set.

    python predict_digits.py photo.jpg scan.png       # a line a file: the digit, its probability, and the runner-up
    python predict_digits.py                          # the test set: accuracy, confusion matrix, worst mistakes
    python predict_digits.py --plot mistakes.png      # the worst mistakes drawn, too; needs matplotlib

The model is the best one of the last training, unless --checkpoint names another.
"""

if __name__ == "__main__":  # first, because the imports take seconds, in which Ctrl-C may come
    from utils import end_in_one_line

    end_in_one_line()

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoints import BEST, load_checkpoint
from digit_images import prepare_digit, read_picture
from download_mnist import load_mnist, normalize
from models import build_model
from pictures import draw_mistakes, require_matplotlib
from utils import ScriptError, describe_error, device_type, make_folder, path_type, run_script


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Return the logits (N, 10) of normalised images (N, 1, 28, 28); raise ScriptError if the model fails on them."""
    try:
        return torch.cat([model(batch) for batch in images.split(batch_size)])
    except Exception as error:  # whatever a user's forward raises
        raise ScriptError(f"{type(model).__name__} fails on 28x28 images: {describe_error(error)}") from error


def read_digit(model: nn.Module, path: Path, device: torch.device, save_to: Path | None) -> str:
    """Return what the model reads in a picture, as text; raise ScriptError if nothing can be read."""
    pixels, doubt = prepare_digit(read_picture(path))
    if save_to:
        Image.fromarray(pixels).save(save_to / f"{path.stem}.png")
    image = normalize(torch.from_numpy(pixels)[None, None].to(device))
    probabilities, digits = predict(model, image).softmax(1)[0].topk(2)
    first, second = (f"{digit} ({p:.1%})" for digit, p in zip(digits.tolist(), probabilities.tolist(), strict=True))
    return f"{first}, then {second}" + (f"; unsure: {doubt}" if doubt else "")


def format_mistakes(logits: Tensor, labels: Tensor) -> str:
    """Return accuracy, confusion matrix and the ten worst mistakes, from logits (N, 10) and labels (N,), as text."""
    predictions, wrong = logits.argmax(1), logits.argmax(1) != labels
    confusion = torch.stack([(predictions[labels == digit]).bincount(minlength=10) for digit in range(10)])
    lines = [f"accuracy {100 * (1 - wrong.float().mean()):.2f} %, {wrong.sum()} of {len(labels):,} wrong", ""]
    lines += ["label" + "".join(f"{f'as {digit}':>7}" for digit in range(10)) + "  wrong"]
    for digit, row in enumerate(confusion.tolist()):
        lines.append(f"{digit:5}" + "".join(f"{n or '.':>7}" for n in row) + f"{sum(row) - row[digit]:7}")
    lines += ["", "index  label  read as  probability    loss"]
    losses, probabilities = F.cross_entropy(logits, labels, reduction="none"), logits.softmax(1).amax(1)
    for index in worst_mistakes(logits, labels)[:10]:
        lines.append(
            f"{index:5}  {labels[index]:5}  {predictions[index]:7}  {probabilities[index]:11.1%}  {losses[index]:6.2f}"
        )
    return "\n".join(lines)


def worst_mistakes(logits: Tensor, labels: Tensor) -> list[int]:
    """Return the indices of all mistakes, those with the largest loss first."""
    losses = F.cross_entropy(logits, labels, reduction="none")
    order = losses.argsort(descending=True)
    return order[(logits.argmax(1) != labels)[order]].tolist()


def main() -> None:
    """Read the pictures that are named, or the test set."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, best = parser.add_argument, Path("model_checkpoints") / BEST
    add("files", nargs="*", type=path_type, metavar="FILE", help="pictures of one digit each (default: the test set)")
    add("--checkpoint", default=best, type=path_type, help="the trained model (default: %(default)s)")
    add("--test-set", action="store_true", help="look at the test set, too, when files are named")
    add("--plot", type=path_type, help="PNG file to draw the 40 worst mistakes into (default: none)")
    add("--save-prepared", type=path_type, metavar="FOLDER", help="save what the model sees (default: nowhere)")
    add("--data-dir", default="data", type=path_type, help="holds MNIST/raw (default: %(default)s)")
    add("--device", default="auto", type=device_type, help="auto, cpu, cuda, mps, xpu (default: %(default)s)")
    args = parser.parse_args()
    if args.plot:
        require_matplotlib()
    if args.save_prepared:
        make_folder(args.save_prepared)
    if not args.checkpoint.exists():
        raise ScriptError(f"there is no {args.checkpoint}: train a model first, with python train_test_mnist.py")
    checkpoint = load_checkpoint(args.checkpoint)
    model = build_model(checkpoint["model_name"]).to(args.device)
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()

    failed = False
    for path in args.files:
        try:
            print(f"{path}: {read_digit(model, path, args.device, args.save_prepared)}", flush=True)
        except ScriptError as error:  # the next picture may be fine
            print(f"predict_digits.py: error: {error}", file=sys.stderr)
            failed = True
    if args.test_set or args.plot or not args.files:
        images, labels = load_mnist(args.data_dir, train=False, device=args.device)
        logits = predict(model, images)
        print(f"{checkpoint['model_name']} of {args.checkpoint} on the test set: {format_mistakes(logits, labels)}")
        if args.plot:
            worst = worst_mistakes(logits, labels)[:40]
            probabilities, digits = logits[worst].softmax(1).max(1)
            rows = zip(labels[worst].tolist(), digits.tolist(), probabilities.tolist(), strict=True)
            draw_mistakes(args.plot, images[worst], [f"{label} read as {digit}, {p:.0%}" for label, digit, p in rows])
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

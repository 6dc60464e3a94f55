"""Read your own digits with a trained model, or see where it errs on MNIST's test set.

    python predict_digits.py photo.jpg scan.png     # a line for each picture of a digit
    python predict_digits.py                        # the test set: accuracy and mistakes
    python predict_digits.py --plot mistakes.png    # draw the mistakes, too (needs matplotlib)
    python predict_digits.py --draw                 # a page in your browser to draw digits on

The line of a picture names the two most probable digits, or says why not to trust the first:

    photo.jpg: 4 (99.0%), then 7 (0.6%)
    scan.png: unsure: several shapes of similar size; perhaps 7

Options:

    FILE ...                pictures of one digit each (default: the test set)
    --checkpoint FILE       the trained model (default: model_checkpoints/best_mnist_model.pth)
    --test-set              look at the test set, too, with files or --draw
    --draw                  then serve a page to draw digits on, until Ctrl-C
    --port N                the page's port (default: 0, one that is free)
    --plot FILE             draw the 40 worst mistakes into this PNG file; needs matplotlib
    --save-prepared FOLDER  save there what the model sees
    --data-dir FOLDER       holds MNIST/raw (default: data)
    --device NAME           cpu, cuda, mps, xpu, or auto: a GPU if there is one (default: auto)
    -h, --help              print this
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from checkpoints import BEST, load_checkpoint
from digit_images import prepare_digit, read_picture
from draw_digit import serve_page
from mnist_data import CLASSES, IMAGE_SIDE, load_mnist, normalize
from models import build_model
from pictures import draw_mistakes, require_matplotlib
from utils import (
    ScriptError,
    describe_error,
    device_type,
    number_type,
    path_type,
    printable,
    run_script,
)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, CLASSES) of normalised images (N, 1, H, W).

    Raises ScriptError if the model fails on them.
    """
    try:
        # Copies, because a model may change its input in place
        logits = torch.cat([model(batch.clone()) for batch in images.split(250)])
        if logits.shape != (len(images), CLASSES) or not logits.isfinite().all():
            raise ValueError(f"it does not return {CLASSES} finite numbers for each")
        return logits
    except Exception as error:  # whatever a user's forward raises
        reason = f"{IMAGE_SIDE}x{IMAGE_SIDE} images: {describe_error(error)}"
        raise ScriptError(f"{type(model).__name__} fails on {reason}; fix it") from error


def read_digit(model: nn.Module, source: Path | bytes) -> dict:
    """Return what a model reads in a picture, given by its path or its bytes.

    That is a dict of plain values: `probabilities`, one for each digit; `image`, 28 rows of 28
    levels, which is what the model sees; and `message`, a reason to doubt it or "". Raises
    ScriptError if there is nothing to read.
    """
    pixels, doubt = prepare_digit(read_picture(source))
    device = next(model.parameters()).device
    image = normalize(torch.from_numpy(pixels)[None, None].to(device))
    probabilities = predict(model, image).softmax(1)[0]
    return {"probabilities": probabilities.tolist(), "image": pixels.tolist(), "message": doubt}


def main() -> None:
    args = parse_args()
    if args.plot:
        require_matplotlib()
    model = load_model(args.checkpoint, args.device)
    all_read = print_readings(model, args.files, args.save_prepared)
    if args.test_set or args.plot or not (args.files or args.draw):
        images, labels = load_mnist(args.data_dir, train=False, device=args.device)
        logits = predict(model, images)
        worst, text = find_mistakes(logits, labels)
        title = f"{type(model).__name__} of {args.checkpoint} on the test set: "
        print(printable(title) + text)
        if args.plot:
            draw_mistakes(args.plot, images[worst], labels[worst], logits[worst].softmax(1))
    if args.draw:
        serve_page(lambda picture: read_digit(model, picture), args.port)
    if not all_read:
        sys.exit(1)


def load_model(path: Path, device: torch.device) -> nn.Module:
    """Return a checkpoint's model, ready to predict; raise ScriptError if it cannot be loaded."""
    if not path.exists():
        raise ScriptError(f"there is no {path}: first train a model: python train_test_mnist.py")
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["model_name"]).to(device)
    model.load_state_dict(checkpoint["model_state_dict"])
    return model.eval()


def print_readings(model: nn.Module, paths: list[Path], folder: Path | None) -> bool:
    """Print a line for each picture, and return whether all could be read.

    The line names the two most probable digits, or a doubt. If there is a folder, what the model
    sees is saved there.
    """
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
    all_read = True
    for number, path in enumerate(paths, 1):
        try:
            reading = read_digit(model, path)
            if folder:
                image = Image.fromarray(np.uint8(reading["image"]))
                image.save(folder / f"{number}_{path.stem}_28x28.png")
        except (ScriptError, OSError) as error:  # the next picture may be fine
            print(printable(f"predict_digits.py: error: {path}: {error}"), file=sys.stderr)
            all_read = False
            continue
        shares, digits = torch.tensor(reading["probabilities"]).topk(2)
        answer = f"{digits[0]} ({shares[0]:.1%}), then {digits[1]} ({shares[1]:.1%})"
        if reading["message"]:
            answer = f"{reading['message']}; perhaps {digits[0]}"
        print(printable(f"{path}: {answer}"), flush=True)
    return all_read


def find_mistakes(logits: Tensor, labels: Tensor) -> tuple[list[int], str]:
    """Return the indices of all mistakes, those with the largest loss first, and a text.

    The text is the accuracy, the confusion matrix and the ten worst mistakes. `logits` are
    (N, CLASSES) and `labels` (N,).
    """
    predictions = logits.argmax(1)
    losses = nn.functional.cross_entropy(logits, labels, reduction="none")
    order = losses.argsort(descending=True)
    wrong = predictions != labels
    worst = order[wrong[order]].tolist()
    header = "".join(f"   as {digit}" for digit in range(CLASSES))
    text = (
        f"accuracy {100 - 100 * len(worst) / len(labels):.2f} %, "
        f"{len(worst)} of {len(labels):,} wrong\n\nlabel{header}  wrong"
    )
    for digit in range(CLASSES):
        counts = predictions[labels == digit].bincount(minlength=CLASSES).tolist()
        cells = "".join(f"{count or '.':>7}" for count in counts)
        text += f"\n{digit:5}{cells}{sum(counts) - counts[digit]:7}"

    text += "\n\nindex  label  read as  probability    loss"
    for i in worst[:10]:
        share = logits[i].softmax(0).max()
        text += f"\n{i:5}  {labels[i]:5}  {predictions[i]:7}  {share:11.1%}  {losses[i]:6.2f}"
    return worst, text


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.format_help = lambda: __doc__
    add = parser.add_argument
    add("files", nargs="*", type=path_type)
    add("--checkpoint", default=f"model_checkpoints/{BEST}", type=path_type)
    add("--test-set", action="store_true")
    add("--draw", action="store_true")
    add("--port", default=0, type=number_type(int, 0, 65536))
    add("--plot", type=path_type)
    add("--save-prepared", type=path_type)
    add("--data-dir", default="data", type=path_type)
    add("--device", default="auto", type=device_type)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)

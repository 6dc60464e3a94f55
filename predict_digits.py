"""Read your own digits with a trained model, or see where it errs on MNIST's test set.

    python predict_digits.py photo.jpg page.png     # a line for each picture
    python predict_digits.py                        # the test set: accuracy and mistakes
    python predict_digits.py --plot mistakes.png    # draw the mistakes, too (needs matplotlib)
    python predict_digits.py --draw                 # a page in your browser to draw digits on

The line of one digit names the two most probable answers. Several digits are read line by line,
with a question mark after each that has less than 80 %:

    photo.jpg: 7 (100.0%), then 2 (0.0%)
    page.png: 12345 / 6879? / 88888, least sure 9 (61.3%)

Options:

    FILE ...                pictures of digits (default: the test set)
    --checkpoint FILE       the trained model (default: model_checkpoints/best_mnist_model.pth
                            or, before any training, pretrained_model5.pth)
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
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from checkpoints import BEST, load_checkpoint
from digit_images import find_digits, read_picture
from draw_digit import serve_page
from mnist_data import CLASSES, load_mnist, normalize
from model_check import compute_logits
from models import build_model
from pictures import draw_boxes, draw_mistakes, require_matplotlib
from utils import (
    ScriptError,
    describe_error,
    device_type,
    number_type,
    path_type,
    printable,
    run_script,
)

PRETRAINED = Path(__file__).with_name("pretrained_model5.pth")
SURE = 0.8  # a digit of lower probability is doubtful


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits (N, CLASSES) of normalised images (N, 1, H, W).

    Raises ScriptError if the model fails on them.
    """
    try:
        return torch.cat([compute_logits(model, batch) for batch in images.split(250)])
    except Exception as error:  # whatever a user's forward raises
        what = f"{type(model).__name__} fails on images {tuple(images.shape)}"
        raise ScriptError(f"{what}: {describe_error(error)}; fix it") from error


def read_digits(model: nn.Module, picture: ndarray) -> dict:
    """Return what a model reads in a picture, which is (H, W, 3), float32 in 0..1.

    `text` is what is read, such as "123 / 47?"; `answer` is a sentence on how sure that is; and
    `message` is the same sentence if the network hesitates, or else "". `digits` is a list of
    dicts, line by line: a digit's `name`, with a question mark if it is doubtful; its
    `probabilities` (CLASSES,); the `image` that the model sees, (28, 28); and its `box`, which is
    left, top, right and bottom as shares of the picture. Raises ScriptError if there is nothing to
    read.
    """
    found = find_digits(picture)
    pixels = np.stack([digit.image for digit in found])
    images = torch.tensor(pixels, device=next(model.parameters()).device)[:, None]
    probabilities = predict(model, normalize(images)).softmax(1).cpu()
    height, width, _ = picture.shape
    digits = []
    lines = defaultdict(str)
    for digit, shares in zip(found, probabilities, strict=True):
        share, best = shares.max(0)
        name = f"{best}?" if share < SURE else f"{best}"
        lines[digit.line] += name
        digits.append(
            {
                "name": name,
                "probabilities": shares,
                "image": digit.image,
                "box": digit.box / (width, height, width, height),
            }
        )
    text = " / ".join(lines.values())
    answer, hesitates = summarize(text, probabilities)
    message = answer if hesitates else ""
    return {"digits": digits, "text": text, "answer": answer, "message": message}


def summarize(text: str, probabilities: Tensor) -> tuple[str, bool]:
    """Return a sentence on how sure a network is of a text, and whether it hesitates.

    It hesitates if half of the digits or more are doubtful. `probabilities` are (N, CLASSES).
    """
    least_sure = probabilities.amax(1).argmin()
    shares, classes = probabilities[least_sure].topk(2)
    first, second = (f"{name} ({share:.1%})" for name, share in zip(classes, shares, strict=True))
    hesitates = 2 * text.count("?") >= len(probabilities)
    if len(probabilities) > 1:
        answer = f"{text}, least sure {first}"
    elif hesitates:
        answer = f"{first} or {second}"
    else:
        answer = f"{first}, then {second}"
    if hesitates:
        answer = f"unsure: the network hesitates: {answer}"
    return answer, hesitates


def main() -> None:
    args = parse_args()
    if args.plot:
        require_matplotlib(args.plot)
    model = load_model(args.checkpoint, args.device)
    print(printable(f"Reading with {args.checkpoint}"), file=sys.stderr)
    all_read = print_readings(model, args.files, args.save_prepared)
    if args.test_set or args.plot or not (args.files or args.draw):
        images, labels = load_mnist(args.data_dir, train=False, device=args.device)
        logits = predict(model, images)
        worst, text = find_mistakes(logits, labels)
        print(f"{type(model).__name__} on the test set: {text}")
        if args.plot:
            draw_mistakes(args.plot, images[worst], labels[worst], logits[worst].softmax(1))
    if args.draw:
        serve_page(lambda data: read_digits(model, read_picture(data)), args.port)
    if not all_read:
        sys.exit(1)


def load_model(path: Path, device: torch.device) -> nn.Module:
    """Return a checkpoint's model, ready to predict; raise ScriptError if it cannot be loaded."""
    checkpoint = load_checkpoint(path)
    model = build_model(checkpoint["model_name"]).to(device)
    model.load_state_dict(checkpoint["model_state_dict"])
    return model.eval()


def print_readings(model: nn.Module, paths: list[Path], folder: Path | None) -> bool:
    """Print a line for each picture, and return whether all could be read and saved.

    If there is a folder, what the model sees is saved there.
    """
    all_done = True
    for number, path in enumerate(paths, 1):
        try:
            picture = read_picture(path)
            reading = read_digits(model, picture)
            answer = reading["answer"]
            if reading["message"]:
                answer += "; --save-prepared FOLDER shows what the network saw"
            print(printable(f"{path}: {answer}"), flush=True)
            if folder:
                save_prepared(folder, f"{number}_{path.stem}", picture, reading["digits"])
        except ScriptError as error:  # the next picture may be fine
            print(printable(f"predict_digits.py: error: {path}: {error}"), file=sys.stderr)
            all_done = False
    return all_done


def save_prepared(folder: Path, name: str, picture: ndarray, digits: list[dict]) -> None:
    """Save what the model sees, side by side; of several digits, also the picture with their boxes.

    Raises ScriptError if a file cannot be written or is there already.
    """
    seen = np.hstack([digit["image"] for digit in digits])
    images = {"28x28": Image.fromarray(seen)}
    if len(digits) > 1:
        images["boxes"] = draw_boxes(picture, digits)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for kind, image in images.items():
            with (folder / f"{name}_{kind}.png").open("xb") as file:  # which follows no link
                image.save(file, "PNG")
    except OSError as error:
        raise ScriptError(f"cannot save: {error}; name another folder") from error


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
    best = Path("model_checkpoints", BEST)
    add("--checkpoint", default=best if best.exists() else PRETRAINED, type=path_type)
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

"""Read your own digits with a trained model, or see where it errs on MNIST's test set.

    python predict_digits.py photo.jpg page.png     # a line for each picture
    python predict_digits.py                        # the test set: accuracy and mistakes
    python predict_digits.py --plot mistakes.png    # draw the mistakes, too (needs matplotlib)
    python predict_digits.py --draw                 # a page in your browser to draw digits on

The line of one digit names the two most probable answers. Several digits are read line by line,
with a question mark after each that has less than 80 %:

    photo.jpg: 7 (99.9%), then 1 (0.0%)
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
from pathlib import Path

import numpy as np
import torch
from numpy import ndarray
from PIL import Image
from torch import Tensor, nn

from checkpoints import BEST, load_checkpoint
from digit_images import find_digits, read_picture
from draw_digit import serve_page
from mnist_data import CLASSES, IMAGE_SIDE, load_mnist, normalize
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
        # Copies, because a model may change its input in place
        logits = torch.cat([model(batch.clone()) for batch in images.split(250)])
        if logits.shape != (len(images), CLASSES) or not logits.isfinite().all():
            raise ValueError(f"it does not return {CLASSES} finite numbers for each")
        return logits
    except Exception as error:  # whatever a user's forward raises
        reason = f"{IMAGE_SIDE}x{IMAGE_SIDE} images: {describe_error(error)}"
        raise ScriptError(f"{type(model).__name__} fails on {reason}; fix it") from error


def read_digits(model: nn.Module, picture: ndarray) -> list[dict]:
    """Return what a model reads in a picture, which is (H, W, 3), float32 in 0..1.

    That is a dict of plain values for each digit, line by line: `probabilities`, one for each
    class; `image`, 28 rows of 28 levels, which is what the model sees; `box`, the digit's left,
    top, right and bottom as shares of the picture; and `line`, counted from 0. Raises ScriptError
    if there is nothing to read.
    """
    digits = find_digits(picture)
    images = torch.from_numpy(np.stack([digit.image for digit in digits]))[:, None]
    device = next(model.parameters()).device
    probabilities = predict(model, normalize(images.to(device))).softmax(1)
    size = np.array(picture.shape)[[1, 0, 1, 0]]
    return [
        {
            "probabilities": shares.tolist(),
            "image": digit.image.tolist(),
            "box": (digit.box / size).tolist(),
            "line": digit.line,
        }
        for digit, shares in zip(digits, probabilities, strict=True)
    ]


def summarize(digits: list[dict]) -> tuple[str, str]:
    """Return what is read, such as "123 / 47?", and a sentence on how sure it is.

    The sentence starts with "unsure" if the network hesitates at half of the digits or more.
    """
    text = ""
    rankings = []
    for i, digit in enumerate(digits):
        shares, classes = torch.tensor(digit["probabilities"]).topk(2)
        first, second = (f"{name} ({p:.1%})" for name, p in zip(classes, shares, strict=True))
        rankings.append((shares[0], first, second))
        if i and digit["line"] != digits[i - 1]["line"]:
            text += " / "
        text += f"{classes[0]}?" if shares[0] < SURE else f"{classes[0]}"

    _, first, second = min(rankings)
    doubtful = text.count("?")
    if 2 * doubtful < len(digits):
        sureness = f"least sure {first}" if len(digits) > 1 else f"{first}, then {second}"
    elif len(digits) > 1:
        sureness = f"unsure: the network hesitates at {doubtful} of {len(digits)} digits: {text}"
    else:
        sureness = f"unsure: the network hesitates: {first} or {second}"
    return text, sureness


def main() -> None:
    args = parse_args()
    if args.plot:
        require_matplotlib()
        if not args.plot.parent.is_dir():
            raise ScriptError(f"cannot write {args.plot}: its folder is missing; make it first")
    path = args.checkpoint or find_checkpoint()
    model = load_model(path, args.device)
    all_read = print_readings(model, args.files, args.save_prepared)
    if args.test_set or args.plot or not (args.files or args.draw):
        images, labels = load_mnist(args.data_dir, train=False, device=args.device)
        logits = predict(model, images)
        worst, text = find_mistakes(logits, labels)
        title = f"{type(model).__name__} of {path} on the test set: "
        print(printable(title) + text)
        if args.plot:
            draw_mistakes(args.plot, images[worst], labels[worst], logits[worst].softmax(1))
    if args.draw:
        serve_page(lambda data: read_for_page(model, data), args.port)
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


def find_checkpoint() -> Path:
    """Return the best checkpoint of the last training or, without one, the pretrained model."""
    best = Path("model_checkpoints", BEST)
    path = best if best.exists() else PRETRAINED
    print(f"Reading with {path}", file=sys.stderr)
    return path


def read_for_page(model: nn.Module, data: bytes) -> dict:
    """Return what draw_digit.html shows for a picture file's content."""
    digits = read_digits(model, read_picture(data))
    text, sureness = summarize(digits)
    message = sureness if sureness.startswith("unsure") else ""
    return {"digits": digits, "text": text, "message": message}


def print_readings(model: nn.Module, paths: list[Path], folder: Path | None) -> bool:
    """Print a line for each picture, and return whether all could be read and saved.

    If there is a folder, what the model sees is saved there.
    """
    all_done = True
    for number, path in enumerate(paths, 1):
        try:
            picture = read_picture(path)
            digits = read_digits(model, picture)
            text, answer = summarize(digits)
            if answer.startswith("unsure"):
                answer += "; --save-prepared FOLDER shows what the network saw"
            elif len(digits) > 1:
                answer = f"{text}, {answer}"
            print(printable(f"{path}: {answer}"), flush=True)
            if folder:
                save_prepared(folder, f"{number}_{path.stem}", picture, digits)
        except ScriptError as error:  # the next picture may be fine
            print(printable(f"predict_digits.py: error: {path}: {error}"), file=sys.stderr)
            all_done = False
    return all_done


def save_prepared(folder: Path, name: str, picture: ndarray, digits: list[dict]) -> None:
    """Save what the model sees of each digit; of several, also the picture with their boxes.

    Raises ScriptError if a file cannot be written or is there already.
    """
    images = {f"{name}_28x28.png": Image.fromarray(np.uint8(digits[0]["image"]))}
    if len(digits) > 1:
        boxes = {tuple(digit["box"]): summarize([digit])[0] for digit in digits}
        images = {f"{name}_boxes.png": draw_boxes(picture, boxes)}
        for i, digit in enumerate(digits, 1):
            images[f"{name}_{i}_28x28.png"] = Image.fromarray(np.uint8(digit["image"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, image in images.items():
            with (folder / file).open("xb") as stream:  # which follows no link
                image.save(stream, "PNG")
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
    add("--checkpoint", type=path_type)
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

"""Read your own digits with a trained model, or see where it errs on MNIST's test set.

    python predict_digits.py photo.jpg scan.png       # one line for each: digit, probability and runner-up
    python predict_digits.py                          # the test set: accuracy, confusion matrix, worst mistakes
    python predict_digits.py --plot mistakes.png      # the worst mistakes drawn, too; needs matplotlib
    python predict_digits.py --draw                   # a page in your browser: draw digits, and see them read

The model is the best one of the last training, unless --checkpoint names another.
"""

import argparse
import contextlib
import json
import sys
import threading
import webbrowser
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoints import BEST, load_checkpoint
from digit_images import prepare_digit, read_picture
from mnist_data import load_mnist, normalize
from models import build_model
from pictures import draw_mistakes, require_matplotlib
from utils import (
    ScriptError,
    describe_error,
    device_type,
    number_type,
    path_type,
    run_script,
)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, batch_size: int = 250) -> Tensor:
    """Return the logits (N, 10) of normalised images (N, 1, 28, 28); raise ScriptError if the model fails on them."""
    try:
        logits = torch.cat([model(batch.clone()) for batch in images.split(batch_size)])
        if logits.shape != (len(images), 10) or not logits.isfinite().all():
            raise ValueError("it does not return ten finite numbers for each")
        return logits
    except Exception as error:  # whatever a user's forward raises
        raise ScriptError(
            f"{type(model).__name__} fails on 28x28 images: {describe_error(error)}; fix it"
        ) from error


def read_digit(model: nn.Module, source: Path | bytes) -> tuple[Tensor, np.ndarray, str]:
    """Return a picture's probabilities (10,), its image (28, 28) uint8, and a doubt or ""; or raise ScriptError."""
    pixels, doubt = prepare_digit(read_picture(source))
    image = normalize(torch.from_numpy(pixels)[None, None].to(next(model.parameters()).device))
    return predict(model, image).softmax(1)[0].cpu(), pixels, doubt


def format_mistakes(logits: Tensor, labels: Tensor) -> str:
    """Return accuracy, confusion matrix and the ten worst mistakes, from logits (N, 10) and labels (N,), as text."""
    predictions, wrong = logits.argmax(1), logits.argmax(1) != labels
    confusion = torch.stack(
        [(predictions[labels == digit]).bincount(minlength=10) for digit in range(10)]
    )
    lines = [
        f"accuracy {100 * (1 - wrong.float().mean()):.2f} %, {wrong.sum()} of {len(labels):,} wrong",
        "",
    ]
    lines += ["label" + "".join(f"{f'as {digit}':>7}" for digit in range(10)) + "  wrong"]
    for digit, row in enumerate(confusion.tolist()):
        lines.append(
            f"{digit:5}" + "".join(f"{n or '.':>7}" for n in row) + f"{sum(row) - row[digit]:7}"
        )
    lines += ["", "index  label  read as  probability    loss"]
    losses, probabilities = (
        F.cross_entropy(logits, labels, reduction="none"),
        logits.softmax(1).amax(1),
    )
    for i in worst_mistakes(logits, labels)[:10]:
        lines.append(
            f"{i:5}  {labels[i]:5}  {predictions[i]:7}  {probabilities[i]:11.1%}  {losses[i]:6.2f}"
        )
    return "\n".join(lines)


def worst_mistakes(logits: Tensor, labels: Tensor) -> list[int]:
    """Return the indices of all mistakes, those with the largest loss first."""
    order = F.cross_entropy(logits, labels, reduction="none").argsort(descending=True)
    return order[(logits.argmax(1) != labels)[order]].tolist()


def serve_page(model: nn.Module, port: int) -> None:
    """Serve the page until Ctrl-C, on a free port if `port` is 0; raise ScriptError if the port cannot be used."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), PageRequest)
    except OSError as error:
        raise ScriptError(
            f"cannot use port {port}: {error.strerror}; leave out --port or name another"
        ) from error
    reader = ThreadPoolExecutor(
        1
    )  # one thread: a model may hold state, and torch starts helpers for each caller
    server.read = lambda data: reader.submit(read_digit, model, data).result()
    server.page = Path(__file__).with_name("draw_digit.html").read_bytes()
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"Draw digits at {address} (Ctrl-C ends the server)", flush=True)
    threading.Thread(
        target=webbrowser.open, args=[address], daemon=True
    ).start()  # a text browser would block
    server.serve_forever()


class PageRequest(BaseHTTPRequestHandler):
    """A request for the page, or one from the page with a picture to read; http.server calls all methods but `send`."""

    timeout = 10  # seconds without a byte, after which the connection is closed

    def handle(self) -> None:
        """Answer the request; it is no error if the client goes away."""
        with contextlib.suppress(OSError):
            super().handle()

    def parse_request(self) -> bool:
        """Read the request's head, and refuse other paths and the requests of other sites in the same browser."""
        if not super().parse_request():
            return False
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        is_own = host.split(":")[0] in ("127.0.0.1", "localhost") and origin in (
            None,
            f"http://{host}",
        )
        if not is_own or self.path != "/":
            self.send_error(404 if is_own else 403)
        return is_own and self.path == "/"

    def do_GET(self) -> None:
        """Send the page."""
        self.send("text/html; charset=utf-8", self.server.page)

    def do_POST(self) -> None:
        """Send what is read in the picture, or why nothing is, as JSON."""
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 6:  # a megabyte or more
            self.send_error(413 if length.isdecimal() else 400 if length else 411)
        elif len(data := self.rfile.read(int(length))) < int(length):
            self.send_error(400)
        else:
            try:
                probabilities, pixels, doubt = self.server.read(data)
                answer = {
                    "probabilities": probabilities.tolist(),
                    "image": pixels.tolist(),
                    "message": doubt,
                }
            except Exception as error:  # whatever the picture or a user's model causes
                answer = {"message": describe_error(error)}
            self.send("application/json", json.dumps(answer).encode())

    def send(self, kind: str, data: bytes) -> None:
        """Send an answer of that media type; the page may load nothing from other sites or be shown in one."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header(
            "Content-Security-Policy",
            "default-src 'self' 'unsafe-inline' data:; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Print no line for each request."""


def main() -> None:
    """Read the pictures that are named, the test set, or what is drawn."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, best = parser.add_argument, Path("model_checkpoints") / BEST
    add(
        "files",
        nargs="*",
        type=path_type,
        metavar="FILE",
        help="pictures of one digit each (default: the test set)",
    )
    add(
        "--checkpoint",
        default=best,
        type=path_type,
        help="the trained model (default: %(default)s)",
    )
    add("--test-set", action="store_true", help="look at the test set, too, with files or --draw")
    add("--draw", action="store_true", help="then serve a page to draw digits on, until Ctrl-C")
    add(
        "--port",
        default=0,
        type=number_type(int, 0, 65536),
        help="the page's port (default: one that is free)",
    )
    add(
        "--plot", type=path_type, help="PNG file to draw the 40 worst mistakes into (default: none)"
    )
    add(
        "--save-prepared",
        type=path_type,
        metavar="FOLDER",
        help="save what the model sees (default: nowhere)",
    )
    add("--data-dir", default="data", type=path_type, help="holds MNIST/raw (default: %(default)s)")
    add(
        "--device",
        default="auto",
        type=device_type,
        help="auto, cpu, cuda, mps, xpu (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.plot:
        require_matplotlib()
    if args.save_prepared:
        args.save_prepared.mkdir(parents=True, exist_ok=True)
    if not args.checkpoint.exists():
        raise ScriptError(
            f"there is no {args.checkpoint}: train a model first, with python train_test_mnist.py"
        )
    checkpoint = load_checkpoint(args.checkpoint)
    model = build_model(checkpoint["model_name"]).to(args.device)
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()

    failed = False
    for number, path in enumerate(args.files, 1):
        try:
            probabilities, pixels, doubt = read_digit(model, path)
            if args.save_prepared:
                Image.fromarray(pixels).save(args.save_prepared / f"{number}_{path.stem}_28x28.png")
            first, second = (
                f"{digit} ({p:.1%})" for p, digit in zip(*probabilities.topk(2), strict=True)
            )
            answer = f"{doubt}; perhaps {first[0]}" if doubt else f"{first}, then {second}"
            print(f"{path}: {answer}", flush=True)
        except (ScriptError, OSError) as error:  # the next picture may be fine
            print(f"predict_digits.py: error: {path}: {error}", file=sys.stderr)
            failed = True
    if args.test_set or args.plot or not (args.files or args.draw):
        images, labels = load_mnist(args.data_dir, train=False, device=args.device)
        logits = predict(model, images)
        print(
            f"{checkpoint['model_name']} of {args.checkpoint} on the test set: {format_mistakes(logits, labels)}"
        )
        if args.plot:
            worst = worst_mistakes(logits, labels)[:40]
            rows = zip(labels[worst], *logits[worst].softmax(1).max(1), strict=True)
            draw_mistakes(
                args.plot,
                images[worst],
                [f"{label} read as {digit}, {p:.0%}" for label, p, digit in rows],
            )
    if args.draw:
        serve_page(model, args.port)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

"""Train a model of models.py on MNIST and test it after every epoch.

    python train_test_mnist.py                    # Model5 for 20 epochs; downloads MNIST where it is missing
    python train_test_mnist.py --model Model2 --epochs 5 --checkpoint-dir model_checkpoints/model2
    python train_test_mnist.py --resume           # go on from the newest intact checkpoint
    python train_test_mnist.py --dry-run          # one batch through everything, nothing saved

The first command's output on 2 CPU cores with torch 2.15.0:

    Model5 on cpu: batch_size 64, lr 0.01, momentum 0.9, seed 1
    epoch   train loss   accuracy   test loss   accuracy       best   seconds
        1       0.3930    89.66 %      0.0931    97.17 %    97.17 %      16.7
        ...
       20       0.0253    99.21 %      0.0259    99.16 %    99.21 %      15.9
    Best: epoch 13, test accuracy 99.21 %, saved as model_checkpoints/best_mnist_model.pth
    Last: epoch 20, test accuracy 99.16 %, saved as model_checkpoints/mnist_model_epoch_20.pth
    Next: python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth
"""

import argparse
import contextlib
import csv
import ctypes
import io
import itertools
import math
import os
import pickle
import shlex
import shutil
import sys
import textwrap
import time
import warnings
import zipfile
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from download_mnist import ScriptError, download_mnist, make_folder, run_script, write_file
from models import build_model, find_model_name, model_classes

MEAN, STD = 0.1307, 0.3081  # of the training pixels on a scale of 0 to 1
BEST, LOG, CURVES = "best_mnist_model.pth", "training_log.csv", "training_curves.png"
STATES = ("model_state_dict", "optimizer_state_dict")
RESULTS = ("epoch", "train_accuracy", "test_accuracy", "best_test_accuracy")
RECIPE = ("batch_size", "lr", "momentum", "seed", "compile", "val_size", "lr_scheduler", "augment", "weight_decay")
RESUMED = (*RECIPE, "epochs", "best_epoch", "history")  # what a run needs to go on, beside RESULTS
HISTORY = (
    "epoch", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss", "test_accuracy", "seconds",
)  # fmt: skip


def keep_freed_memory() -> None:
    """Let glibc's malloc keep what one step frees for the next; with another C library do nothing.

    It would return large blocks to the system, and each step on the CPU would take some 2,000 page faults.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(threshold, 2**30)


def load_mnist(data_dir: str | Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return normalised images (N, 1, 28, 28), float32, and labels (N,), int64, all on the device."""
    folder, part = Path(data_dir, "MNIST", "raw"), "train" if train else "t10k"
    # Read with NumPy, for torchvision takes as long to import as torch itself
    pixels = np.fromfile(folder / f"{part}-images-idx3-ubyte", np.uint8, offset=16).reshape(-1, 1, 28, 28)
    labels = np.fromfile(folder / f"{part}-labels-idx1-ubyte", np.uint8, offset=8)
    images = torch.from_numpy(pixels).to(device).float().div_(255).sub_(MEAN).div_(STD)
    return images, torch.from_numpy(labels).to(device).long()


def seed_epoch(seed: int, epoch: int) -> None:
    """Restart torch's random numbers, so that an epoch's shuffle and dropout depend on these two alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def hold_out(images: Tensor, labels: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Split images (N, 1, 28, 28) with labels (N,) into a set to train on and one of `size` images to validate on.

    Each digit gives its last images, as many as its share of all: no seed changes the choice.
    """
    counts = labels.bincount(minlength=10)
    exact = counts.cpu().double() * size / len(labels)
    shares = exact.floor().long()
    shares[(exact - shares).argsort(descending=True, stable=True)[: size - int(shares.sum())]] += 1
    held_out = torch.zeros_like(labels, dtype=torch.bool)
    for digit, (count, share) in enumerate(zip(counts.tolist(), shares.tolist(), strict=True)):
        held_out[(labels == digit).nonzero().flatten()[count - share :]] = True
    return (images[~held_out], labels[~held_out]), (images[held_out], labels[held_out])


def load_sets(args: argparse.Namespace) -> tuple:
    """Return training, validation and test set, each images (N, 1, 28, 28) and labels (N,), on the device.

    In a dry run they are one batch; the validation set is None where none is asked for. MNIST is downloaded where it
    is missing; raises ScriptError where that fails.
    """
    download_mnist(args.data_dir)
    train_set, test_set = (load_mnist(args.data_dir, train, args.device) for train in (True, False))
    train_set, val_set = hold_out(*train_set, args.val_size) if args.val_size else (train_set, None)
    if args.dry_run:
        train_set = [tensor[: args.batch_size] for tensor in train_set]
        test_set = [tensor[: args.test_batch_size] for tensor in test_set]
        val_set = val_set and [tensor[: args.test_batch_size] for tensor in val_set]
    return train_set, val_set, test_set


def augment(images: Tensor) -> Tensor:
    """Return images (N, 1, 28, 28), each rotated, sheared, scaled and shifted at random.

    By up to 10 degrees, 10 degrees, 10 % and 3 pixels. What comes in over the edge has the edge's colour. Interpolation
    is bicubic, for bilinear blurs thin strokes.
    """
    count, device = len(images), images.device
    angle, shear = torch.empty(2, count, device=device).uniform_(-math.radians(10), math.radians(10))
    scale = torch.empty(count, 1, 2, device=device).uniform_(0.9, 1.1)
    shift = torch.empty(count, 2, 1, device=device).uniform_(-3, 3) / 14  # an image reaches from -1 to 1
    sheared = torch.stack([angle.cos(), shear.tan() - angle.sin(), angle.sin(), angle.cos()], 1).view(count, 2, 2)
    grid = F.affine_grid(torch.cat([sheared * scale, shift], 2), images.shape, align_corners=False)
    return F.grid_sample(images, grid, "bicubic", padding_mode="border", align_corners=False)


@dataclass(eq=False)
class TrainingStep:
    """Forward, loss, backward and update for one batch; called with the indices (batch,) of its images.

    Images are (N, 1, 28, 28), labels (N,). With `compiled`, the model runs through torch.compile. With `graphed`, which
    needs CUDA, a step is recorded as a CUDA graph after three others and replayed from then on: one launch starts all
    its kernels (https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs). A model that does not allow one of them
    is trained without, and a line says so. A batch smaller than batch_size always is.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    images: Tensor
    labels: Tensor
    batch_size: int
    compiled: bool = False
    graphed: bool = False
    augmented: bool = False
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None  # of the learning rate, steps with the optimizer

    def __post_init__(self) -> None:
        """Start at nothing."""
        self.totals = torch.zeros(2, device=self.images.device)  # sum of the losses, number of correct answers
        self.compiled_model = self.graph = self.graph_batch = None
        self.warm_ups = 0

    def __call__(self, batch: Tensor) -> None:
        """Take a step, and add to `totals`."""
        if not self.graphed or len(batch) < self.batch_size:
            self.take(batch)
        elif self.graph is None:
            self.warm_up(batch)
        else:
            self.graph_batch.copy_(batch)
            self.graph.replay()

    def take(self, batch: Tensor) -> None:
        """Take a step, one operation after the other."""
        self.optimizer.zero_grad()
        images = augment(self.images[batch]) if self.augmented else self.images[batch]
        logits = self.forward(images)  # (batch, 10)
        loss = F.cross_entropy(logits, self.labels[batch])
        loss.backward()
        self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()
        self.totals[0] += loss.detach() * len(batch)
        self.totals[1] += (logits.argmax(1) == self.labels[batch]).sum()

    def forward(self, images: Tensor) -> Tensor:
        """Return the model's logits (N, 10), compiled where asked for and possible."""
        if self.compiled and len(images) == self.batch_size:
            try:
                if self.compiled_model is None:  # fallback_random: dropout draws the same numbers as without
                    options = {"fallback_random": True}
                    self.compiled_model = torch.compile(self.model, dynamic=False, options=options)
                return self.compiled_model(images)
            except Exception as error:
                self.compiled = False
                reason = textwrap.shorten(str(error), 200)
                print(f"Cannot compile the model, so training goes on without: {reason}", file=sys.stderr)
        return self.model(images)

    def warm_up(self, batch: Tensor) -> None:
        """Take a step that lets torch choose kernels and create momenta; after the third, record the graph.

        Raises ScriptError where recording fails: after that torch can no longer draw random numbers on the GPU.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        torch.cuda.set_sync_debug_mode("warn")
        with torch.cuda.stream(stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.take(batch)
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        self.warm_ups += 1
        if self.warm_ups < 3:
            return
        if any("synchronizing" in str(warning.message) for warning in caught):
            self.graphed = False
            print("The model waits for the GPU, so training goes on without a CUDA graph", file=sys.stderr)
            return
        graph, self.graph_batch = torch.cuda.CUDAGraph(), batch.clone()
        try:
            with torch.cuda.graph(graph):
                self.take(self.graph_batch)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 200)
            raise ScriptError(f"cannot record the step as a CUDA graph ({reason}); add --no-cuda-graph") from error
        self.graph = graph


def train_one_epoch(step: TrainingStep, log_interval: int, description: str) -> tuple[float, float]:
    """Train once on all images in random order, the last short batch included.

    Returns mean loss and accuracy (per cent) of the batches as they were seen, each before its own update. Raises
    FloatingPointError where the loss is NaN or infinite, at the latest log_interval batches later.
    """
    step.model.train()
    step.totals.zero_()
    batches = torch.randperm(len(step.images)).to(step.images.device).split(step.batch_size)
    with tqdm(batches, desc=description, unit="batch", leave=False, disable=None) as bar:
        for number, batch in enumerate(bar, 1):
            step(batch)
            if number % log_interval == 0 or number == len(batches):
                total_loss, correct = step.totals.tolist()  # makes the CPU wait for the GPU
                seen = min(number * step.batch_size, len(step.images))
                loss, accuracy = total_loss / seen, 100 * correct / seen
                if not math.isfinite(loss):
                    raise FloatingPointError(f"the loss is {loss} after {number} batches")
                bar.set_postfix_str(f"loss {loss:.4f}, accuracy {accuracy:.2f} %")
    return loss, accuracy


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Return mean loss and accuracy (per cent) on images (N, 1, 28, 28) with labels (N,).

    Raises FloatingPointError where the loss is NaN or infinite.
    """
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])  # (N, 10)
    loss = F.cross_entropy(logits, labels).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss in evaluation is {loss}")
    return loss, 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def run_epoch(args: argparse.Namespace, epoch: int, step: TrainingStep, val_set: tuple | None, test_set: tuple) -> dict:
    """Train for an epoch, evaluate, and return what HISTORY names; the sets are images and labels.

    The learning rate is that of the epoch's first step.
    """
    start, lr = time.perf_counter(), step.optimizer.param_groups[0]["lr"]
    seed_epoch(args.seed, epoch)
    trained = train_one_epoch(step, args.log_interval, f"epoch {epoch}/{args.epochs}")
    validated = evaluate(step.model, *val_set, args.test_batch_size) if val_set else (None, None)
    tested = evaluate(step.model, *test_set, args.test_batch_size)
    seconds = time.perf_counter() - start
    return dict(zip(HISTORY, (epoch, lr, *trained, *validated, *tested, seconds), strict=True))


def format_row(row: dict, best: dict) -> str:
    """Return an epoch's line of results; both are dicts of what HISTORY names."""
    validated = "" if row["val_loss"] is None else f"   {row['val_loss']:8.4f}    {row['val_accuracy']:6.2f} %"
    return (
        f"{row['epoch']:5}   {row['train_loss']:10.4f}   {row['train_accuracy']:6.2f} %{validated}   "
        f"{row['test_loss']:9.4f}   {row['test_accuracy']:6.2f} %   {best['test_accuracy']:6.2f} %   "
        f"{row['seconds']:7.1f}"
    )


def make_checkpoint(
    args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict], best: dict
) -> dict:
    """Return the run so far as a dict of tensors and plain values; `best` is one of the history's epochs."""
    measured = ("epoch", "train_accuracy", "test_accuracy", "val_accuracy")[: 4 if args.val_size else 3]
    return {
        "model_name": args.model,
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        **{name: history[-1][name] for name in measured},
        "best_test_accuracy": best["test_accuracy"],
        "best_epoch": best["epoch"],
        "epochs": args.epochs,
        "history": history,
        **{name: getattr(args, name) for name in RECIPE},
    }


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; raises ScriptError where that fails."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def save_log(path: Path, history: list[dict]) -> None:
    """Write a line for each epoch of a run, as CSV; raises ScriptError where that fails."""
    text = io.StringIO()
    table = csv.DictWriter(text, HISTORY, lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_file(path, text.getvalue().encode())


def save_curves(path: Path, history: list[dict], title: str) -> None:
    """Draw loss and error (per cent wrong) of each epoch on logarithmic axes, as PNG.

    Drawn with Pillow, for it is there: plotting is worth no further package. Raises ScriptError where writing fails.
    """
    from PIL import Image, ImageDraw  # here, for few runs draw

    width, height, left, top = 440, 300, 60, 50  # of one of the two diagrams, and where its frame begins
    picture = Image.new("RGB", (2 * (width + left) + 80, height + top + 60), "white")
    draw = ImageDraw.Draw(picture)
    colours = {"train": "#1f77b4", "val": "#2ca02c", "test": "#d62728"}
    parts = {part: colour for part, colour in colours.items() if history[0][f"{part}_loss"] is not None}
    x_of = lambda epoch: left + width * (epoch - 0.5) / max(row["epoch"] for row in history)  # noqa: E731
    for quantity, offset in (("loss", 0), ("error, %", width + left + 40)):
        curves = {
            part: [row[f"{part}_loss"] if quantity == "loss" else 100 - row[f"{part}_accuracy"] for row in history]
            for part in parts
        }
        shown = [math.log10(max(value, 1e-3)) for curve in curves.values() for value in curve]
        low, high = min(shown) - 0.05, max(shown) + 0.05
        y_of = lambda value: top + height * (high - math.log10(max(value, 1e-3))) / (high - low)  # noqa: B023, E731
        draw.rectangle((offset + left, top, offset + left + width, top + height), outline="black")
        draw.text((offset + left, top - 40), f"{title}: {quantity}, by epoch", fill="black")
        for tick in (digit * 10.0**power for power in range(-3, 3) for digit in (1, 2, 5)):
            if low <= math.log10(tick) <= high:
                draw.line((offset + left, y_of(tick), offset + left + width, y_of(tick)), fill="#dddddd")
                draw.text((offset + left - 40, y_of(tick) - 6), f"{tick:g}", fill="black")
        for row in history[:: max(1, len(history) // 10)]:
            draw.text((offset + x_of(row["epoch"]) - 4, top + height + 6), str(row["epoch"]), fill="black")
        for number, (part, curve) in enumerate(curves.items()):
            points = [(offset + x_of(row["epoch"]), y_of(value)) for row, value in zip(history, curve, strict=True)]
            draw.line(points, fill=parts[part], width=2)
            for x, y in points:
                draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=parts[part])
            draw.text((offset + left + 140 * number, top - 20), f"{part}, at last {curve[-1]:.4g}", fill=parts[part])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path, also: Iterable[str] = ()) -> dict:
    """Return a checkpoint, its tensors on the CPU.

    Raises ScriptError where the file is not one, or not whole: all content is held against the file's checksums, and
    the names, the shapes and the numbers must be what a model of models.py needs. `also` names further numbers that
    it must have. Nothing in the file is executed.
    """
    try:
        data = path.read_bytes()
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
        if damaged:
            raise ValueError(f"{damaged} in it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0 warns of what it does itself
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        missing = [key for key in ("model_name", *STATES, *RESULTS, *also) if key not in checkpoint]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        if not all(math.isfinite(checkpoint[key]) for key in {*RESULTS, *also} - {"lr_scheduler", "history"}):
            raise ValueError("a number in it is not finite")
        model = build_model(checkpoint["model_name"])
        model.load_state_dict(checkpoint["model_state_dict"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        momenta = [(p, m) for p, state in optimizer.state.items() for m in state.values() if isinstance(m, Tensor)]
        if any(momentum.shape != parameter.shape for parameter, momentum in momenta):
            raise ValueError("its optimizer is another model's")
        tensors = (*model.state_dict().values(), *dict(momenta).values())
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise ValueError("a weight or a momentum in it is not finite")
    except Exception as error:  # a file that is no checkpoint can fail anywhere
        reason = textwrap.shorten(str(error), 200) or type(error).__name__
        if isinstance(error, OSError):
            reason = error.strerror or reason
        elif isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, numbers and text"
        raise ScriptError(f"{path} is not an intact checkpoint: {reason}; name another file") from error
    return checkpoint


def find_newest_checkpoint(folder: Path) -> tuple[Path, dict]:
    """Return path and content of the folder's newest intact checkpoint, and name newer damaged ones.

    Raises ScriptError where no checkpoint is intact.
    """
    epochs = sorted(folder.glob("mnist_model_epoch_*.pth"), key=lambda path: (len(path.name), path.name))
    damaged = []
    for path in [*reversed(epochs), *folder.glob(BEST)]:
        try:
            checkpoint = load_checkpoint(path, also=RESUMED)
        except ScriptError as error:
            damaged.append(str(error))
        else:
            if damaged:
                print(f"Resuming from {path}, for {'; '.join(damaged)}", file=sys.stderr)
            return path, checkpoint
    reasons = "; ".join(damaged) or "there is no checkpoint"
    raise ScriptError(f"cannot resume in {folder}: {reasons}. Leave out --resume to start anew")


def check_room(folder: Path, model: nn.Module, count: int) -> None:
    """Raise ScriptError unless `count` checkpoints of the model can be written to the folder."""
    make_folder(folder)
    trial = folder / "trial.pth.tmp"
    save_checkpoint(trial, {name: model.state_dict() for name in STATES})
    needed = count * trial.stat().st_size
    trial.unlink()
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ScriptError(f"{folder} has {free:,} bytes left, {count} checkpoints need {needed:,}; choose another")


def set_aside_earlier_run(folder: Path) -> None:
    """Move an earlier run's checkpoints into folder/earlier_run_N, so that a new run overwrites none."""
    checkpoints = [*folder.glob("mnist_model_epoch_*.pth"), *folder.glob(BEST)]
    results = [*folder.glob(LOG), *folder.glob(CURVES)]
    if not checkpoints:
        return
    candidates = (folder / f"earlier_run_{n}" for n in itertools.count(1))
    target = next(path for path in candidates if not path.exists())
    target.mkdir()
    for path in checkpoints + results:
        path.rename(target / path.name)
    print(f"Moved {len(checkpoints)} checkpoints of an earlier run to {target}")


def prepare_folder(folder: Path, resume: Path | None, resumed: dict, score: str) -> float:
    """Prepare a run's first save: set an earlier run aside, unless the resumed one goes on in its folder.

    The best checkpoint of the resumed run is put in its place, if need be from its epoch's file. Returns its score,
    the accuracy of that name, minus infinity where there is none.
    """
    goes_on = resume is not None and resume.resolve().parent == folder.resolve()
    best_score, source = -math.inf, None
    for name in (BEST, f"mnist_model_epoch_{resumed['best_epoch']}.pth") if resume else ():
        with contextlib.suppress(ScriptError):
            found = load_checkpoint(resume.parent / name)
            if source is None and (goes_on or found["epoch"] == resumed["best_epoch"]):
                best_score, source = found.get(score, -math.inf), resume.parent / name
    if not goes_on:
        set_aside_earlier_run(folder)
    if source and not (goes_on and source.name == BEST):
        write_file(folder / BEST, source.read_bytes())
    return best_score


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults are the recipe, or what the checkpoint to resume from was trained with.

    Of that checkpoint, resume becomes the path, and checkpoint the content.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, models = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    add("--model", default="Model5", type=find_model_name, choices=models, help="class (default: %(default)s)")
    add("--epochs", default=20, type=count, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=count, help="training images a step (default: 128 on a GPU, 64 on a CPU)")
    add("--test-batch-size", default=250, type=count, help="test images at once (default: %(default)s)")
    add("--lr", default=0.01, type=number_type(float, 0), help="learning rate of SGD (default: %(default)s)")
    add("--momentum", default=0.9, type=number_type(float, 0, 1), help="of SGD (default: %(default)s)")
    add("--weight-decay", default=0.0, type=number_type(float, 0), help="of SGD (default: %(default)s)")
    add("--lr-scheduler", default="constant", choices=["constant", "onecyclelr"], help="(default: %(default)s)")
    add("--augment", action="store_true", help="rotate, shear, scale and shift training images a little, at random")
    add(
        "--val-size",
        default=0,
        type=number_type(int, 0, 50001),
        help="training images held out to choose the best epoch with (default: 0, choose by the test set)",
    )
    add("--seed", default=1, type=number_type(int, 0, 2**32), help="of all randomness (default: %(default)s)")
    add("--device", default="auto", type=device_type, help="auto, cpu, cuda, mps, xpu (default: %(default)s)")
    add("--data-dir", default="data", type=Path, help="holds MNIST/raw (default: %(default)s)")
    add("--checkpoint-dir", default="model_checkpoints", type=Path, help="holds *.pth (default: %(default)s)")
    add("--resume", nargs="?", const="newest", metavar="FILE", help="go on from a checkpoint (default: the newest)")
    add("--compile", action=BooleanOptionalAction, default=False, help="use torch.compile (default: %(default)s)")
    add("--cuda-graph", action=BooleanOptionalAction, help="replay a recorded step (default: on a CUDA GPU)")
    add("--deterministic", action="store_true", help="let a GPU, too, give the same result every time")
    add("--log-interval", default=10, type=count, help="steps between updates of the bar (default: %(default)s)")
    add("--plot", action="store_true", help=f"draw {CURVES} after every epoch")
    add("--dry-run", action="store_true", help="one training and one test batch through it all; saves nothing")
    args, checkpoint = parser.parse_args(), None
    if args.resume:
        if args.resume == "newest":
            path, checkpoint = find_newest_checkpoint(args.checkpoint_dir)
        else:
            path, checkpoint = Path(args.resume), load_checkpoint(Path(args.resume), also=RESUMED)
        stored = {"model": checkpoint["model_name"], **{name: checkpoint[name] for name in RECIPE}}
        parser.set_defaults(**stored, epochs=checkpoint["epochs"], checkpoint_dir=path.parent)
        args = parser.parse_args()
        for name, value in stored.items():
            if getattr(args, name) != value:
                option = f"--{name.replace('_', '-')}"
                parser.error(f"{option} {getattr(args, name)} contradicts {path}, trained with {value}; leave it out")
        if args.epochs != checkpoint["epochs"] and args.lr_scheduler != "constant":
            parser.error(f"--epochs {args.epochs} contradicts {path}, whose schedule has {checkpoint['epochs']} epochs")
        args.resume = path
    args.checkpoint = checkpoint
    args.batch_size = args.batch_size or default_batch_size(args.device)
    if args.augment:
        try:
            augment(torch.zeros(1, 1, 28, 28, device=args.device))
        except RuntimeError as error:  # as on MPS before torch 2.11
            parser.error(f"--augment does not work on {args.device} with this torch ({error}); use --device cpu")
    if args.cuda_graph is None:
        args.cuda_graph = args.device.type == "cuda" and args.lr_scheduler == "constant"
    elif args.cuda_graph and args.device.type != "cuda":
        parser.error(f"--cuda-graph needs a CUDA GPU, not {args.device}; leave it out")
    elif args.cuda_graph and args.lr_scheduler != "constant":
        parser.error("--cuda-graph needs a constant learning rate: the graph repeats the one it was recorded with")
    return args


def default_batch_size(device: torch.device) -> int:
    """Return the recipe's batch size, in images."""
    return 64 if device.type == "cpu" else 128


def number_type(kind: type, low: float, below: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type that takes an int or float with low <= number < below."""

    def parse(text: str) -> float:
        try:
            number = kind(text)
        except ValueError:
            number = math.nan
        if not low <= number < below:
            noun = "whole number" if kind is int else "number"
            limit = "" if below == math.inf else f" and below {below}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {noun} of at least {low}{limit}")
        return number

    return parse


def device_type(name: str) -> torch.device:
    """Return the device of that name; `auto` is the accelerator torch offers, else the CPU."""
    if name == "auto":
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": getattr(torch, "xpu", None)}
        name = next((key for key, backend in backends.items() if backend and backend.is_available()), "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"cannot use {name!r} ({reason}); use auto or cpu") from error
    return torch.device(name)


def main() -> None:
    """Train, test and save, epoch after epoch."""
    args = parse_args()
    resumed = args.checkpoint or {"epoch": 0, "history": []}
    if resumed["epoch"] >= args.epochs:
        print(f"{args.resume} has finished epoch {resumed['epoch']}: nothing left to do; --epochs may be larger")
        return
    args.epochs = resumed["epoch"] + 1 if args.dry_run else args.epochs
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    train_set, val_set, test_set = load_sets(args)
    keep_freed_memory()

    torch.manual_seed(args.seed)
    model = build_model(args.model).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay)
    if args.checkpoint:
        model.load_state_dict(resumed["model_state_dict"])
        optimizer.load_state_dict(resumed["optimizer_state_dict"])
        print(f"Going on from {args.resume}")
    scheduler = None
    if args.lr_scheduler == "onecyclelr":
        batches = math.ceil(len(train_set[0]) / args.batch_size)  # in an epoch
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, args.epochs * batches, cycle_momentum=False, last_epoch=resumed["epoch"] * batches - 1
        )
    step = TrainingStep(
        model,
        optimizer,
        *train_set,
        args.batch_size,
        compiled=args.compile,
        graphed=args.cuda_graph,
        augmented=args.augment,
        scheduler=scheduler,
    )
    if not args.dry_run:
        check_room(args.checkpoint_dir, model, args.epochs - resumed["epoch"] + 1)
    recipe = {name: getattr(args, name) for name in RECIPE}
    named = {name: value for name, value in recipe.items() if name in RECIPE[:4] or value not in (0, "constant")}
    print(f"{args.model} on {args.device}:", ", ".join(f"{name} {value}" for name, value in named.items()))
    val_header = "   val loss    accuracy" if val_set else ""
    print(f"epoch   train loss   accuracy{val_header}   test loss   accuracy       best   seconds")

    path = last_path = args.resume
    best_path = args.checkpoint_dir / BEST
    score = "val_accuracy" if args.val_size else "test_accuracy"  # what the best epoch is chosen by
    history = resumed["history"]
    try:
        for epoch in range(resumed["epoch"] + 1, args.epochs + 1):
            history.append(run_epoch(args, epoch, step, val_set, test_set))
            best = max(history, key=lambda row: row[score])  # the first of equals
            print(format_row(history[-1], best), flush=True)
            if args.dry_run:
                print("Dry run: every step works; nothing was saved")
                return
            if epoch == resumed["epoch"] + 1:
                best_saved = prepare_folder(args.checkpoint_dir, args.resume, resumed, score)
            checkpoint = make_checkpoint(args, model, optimizer, history, best)
            if best["epoch"] == epoch and best[score] > best_saved:  # before the epoch's file, from which a run goes on
                save_checkpoint(best_path, checkpoint)
            save_log(args.checkpoint_dir / LOG, history)
            if args.plot:
                save_curves(args.checkpoint_dir / CURVES, history, args.model)
            path = args.checkpoint_dir / f"mnist_model_epoch_{epoch}.pth"
            save_checkpoint(path, checkpoint)
            last_path = path
    except FloatingPointError as error:
        last = f"the last good checkpoint is {last_path}" if last_path else "nothing was saved"
        raise ScriptError(f"epoch {epoch}: {error}; {last}; try a lower --lr") from error
    except KeyboardInterrupt as interrupt:
        last_path = path if path and path.exists() else last_path  # it may have come just after a save
        others = [word for word in sys.argv if word != "--resume" and Path(word) != args.resume]
        go_on = shlex.join(["python", *others, "--resume", str(last_path)])
        interrupt.advice = f"to go on: {go_on}" if last_path else "nothing was saved yet"
        raise

    print(f"Best: epoch {best['epoch']}, test accuracy {best['test_accuracy']:.2f} %, saved as {best_path}")
    print(f"Last: epoch {epoch}, test accuracy {history[-1]['test_accuracy']:.2f} %, saved as {last_path}")
    print(f"Next: python analyze_model.py --checkpoint {best_path}")


if __name__ == "__main__":
    run_script(main)

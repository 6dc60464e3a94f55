"""Train a model of models.py on MNIST and test it after every epoch.

    python train_test_mnist.py                    # Model5 for 20 epochs; downloads MNIST if it is missing
    python train_test_mnist.py --model Model2 --epochs 5 --checkpoint-dir model_checkpoints/model2
    python train_test_mnist.py --resume           # go on from the newest intact checkpoint

The first command's output on 2 CPU cores with torch 2.15.0:

    Model5 on cpu: epochs 20, batch_size 64, lr 0.01, lr_scheduler constant, momentum 0.9, ... seed 1
    epoch   train loss   accuracy    test loss   accuracy       best   seconds
        1       0.3930    89.66 %       0.0931    97.17 %    97.17 %      16.7
       20       0.0253    99.21 %       0.0259    99.16 %    99.21 %      15.9
"""

import argparse
import contextlib
import math
import os
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from tqdm import tqdm

import checkpoints
import pictures
from cuda_graph import graphed
from download_mnist import download_mnist
from mnist_data import augment, default_batch_size, hold_out, load_mnist
from model_check import check_model
from models import build_model, default_model_name, find_model_name, model_classes
from utils import (
    ScriptError,
    device_type,
    keep_freed_memory,
    number_type,
    path_type,
    run_script,
)


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor, amp: bool
) -> tuple[Tensor, Tensor]:
    """Update the model on one batch; return its loss and number of correct answers, on the device.

    `images` are (N, 1, 28, 28), `labels` (N,). `amp`: compute in bfloat16 where it suffices.
    """
    with torch.autocast(images.device.type, torch.bfloat16) if amp else contextlib.nullcontext():
        logits = model(images)  # (N, 10)
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    augmented: bool = False,
    amp: bool = False,
    log_interval: int = 10,
    description: str = "",
    step: Callable[..., tuple[Tensor, Tensor]] = train_step,
) -> tuple[float, float]:
    """Train once on all images (N, 1, 28, 28) with labels (N,) in random order, the last short batch included.

    Returns mean loss and accuracy (per cent) of the batches, each before its own update. Raises FloatingPointError
    if the loss is NaN or infinite, at most log_interval batches later.
    """
    model.train()
    totals = torch.zeros(2, device=images.device)  # sum of the losses, number of correct answers
    batches = torch.randperm(len(images)).to(images.device).split(batch_size)
    text = "{l_bar}{bar}| {elapsed}<{remaining}{postfix} "  # fits 80 columns; nrows because some terminals report 0
    with tqdm(batches, description, leave=False, disable=None, bar_format=text, nrows=24) as bar:
        for number, batch in enumerate(bar, 1):
            inputs, targets = images[batch], labels[batch]
            inputs = augment(inputs) if augmented else inputs
            loss, correct = step(model, optimizer, inputs, targets, amp)
            if scheduler:
                scheduler.step()
            totals[0] += loss * len(batch)
            totals[1] += correct
            if number % log_interval == 0 or number == len(batches):
                total_loss, correct = (
                    totals.tolist()
                )  # makes the CPU wait for the GPU, so not in every step
                seen = min(number * batch_size, len(images))
                mean_loss, accuracy = total_loss / seen, 100 * correct / seen
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(f"the loss is {mean_loss} after {number} batches")
                bar.set_postfix_str(f"loss {mean_loss:.4f}, accuracy {accuracy:.2f} %")
    return mean_loss, accuracy


@torch.no_grad()
def evaluate(
    model: nn.Module, images: Tensor, labels: Tensor, batch_size: int
) -> tuple[float, float]:
    """Return mean loss and accuracy (per cent) on images (N, 1, 28, 28) with labels (N,).

    Raises FloatingPointError if the loss is NaN or infinite.
    """
    model.eval()
    batches = (
        batch.clone() for batch in images.split(batch_size)
    )  # because a model may change its input in place
    logits = torch.cat([model(batch) for batch in batches])  # (N, 10)
    loss = F.cross_entropy(logits, labels).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss in evaluation is {loss}")
    return loss, 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def main() -> None:
    """Read the command line, and train in a folder that no other run is using."""
    args, recipe, resumed = parse_args()
    with contextlib.nullcontext() if args.dry_run else checkpoints.hold_folder(args.checkpoint_dir):
        run(args, recipe, resumed)


def run(args: argparse.Namespace, recipe: dict, resumed: dict | None) -> None:
    """Train, test and save, epoch after epoch."""
    folder, best_path = args.checkpoint_dir, args.checkpoint_dir / checkpoints.BEST
    done, history = (resumed["epoch"], resumed["history"]) if resumed else (0, [])
    if resumed and not args.dry_run:
        checkpoints.prepare_to_resume(folder, resumed)
    if done >= args.epochs:
        print(
            f"{args.resume} has finished epoch {done}: nothing left to do; --epochs may be larger"
        )
        return
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    step = train_step
    if args.device.type == "cuda" and hasattr(torch.Generator, "clone_state"):  # torch 2.4 or newer
        torch.cuda.set_stream(
            torch.cuda.Stream(args.device)
        )  # because the default one cannot be recorded
        step = graphed(train_step, args.batch_size)
    download_mnist(args.data_dir)
    train_set, test_set = (load_mnist(args.data_dir, train, args.device) for train in (True, False))
    train_set, val_set = hold_out(*train_set, args.val_size) if args.val_size else (train_set, None)
    torch.manual_seed(args.seed)
    model = build_model(args.model).to(args.device)
    optimizer = torch.optim.SGD(
        model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
    )
    if resumed:
        model.load_state_dict(resumed["model_state_dict"])
        optimizer.load_state_dict(resumed["optimizer_state_dict"])
        print(f"Going on from {args.resume}")
    elif args.init_from != "none":
        model.load_state_dict(checkpoints.load_weights(Path(args.init_from), args.model))
    check_model(args.model, model.state_dict(), *train_set, args.batch_size, args.amp)
    if args.dry_run:  # one batch of each
        train_set = [tensor[: args.batch_size] for tensor in train_set]
        val_set, test_set = (
            [tensor[: args.test_batch_size] for tensor in each or ()]
            for each in (val_set, test_set)
        )
    scheduler = None
    if args.lr_scheduler == "onecyclelr":
        n = math.ceil(len(train_set[0]) / args.batch_size)  # steps in an epoch
        scheduler = OneCycleLR(
            optimizer, args.lr, args.epochs * n, cycle_momentum=False, last_epoch=done * n - 1
        )

    print(
        f"{args.model} on {args.device}:",
        ", ".join(f"{name} {value}" for name, value in recipe.items()),
    )
    validation = "     val loss   accuracy" if val_set else ""
    print(f"epoch   train loss   accuracy{validation}    test loss   accuracy       best   seconds")
    path, last_path, warned = args.resume, args.resume, set()
    try:
        for epoch in range(done + 1, args.epochs + 1):
            seed_epoch(args.seed, epoch)
            start, lr, title = (
                time.perf_counter(),
                optimizer.param_groups[0]["lr"],
                f"epoch {epoch}/{args.epochs}",
            )
            options = args.batch_size, args.augment, args.amp, args.log_interval, title, step
            train_loss, train_accuracy = train_one_epoch(
                model, optimizer, scheduler, *train_set, *options
            )
            val_loss, val_accuracy = (
                evaluate(model, *val_set, args.test_batch_size) if val_set else (None, None)
            )
            test_loss, test_accuracy = evaluate(model, *test_set, args.test_batch_size)
            row = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": train_loss,
                "train_accuracy": train_accuracy,
                "val_loss": val_loss,
                "val_accuracy": val_accuracy,
                "test_loss": test_loss,
                "test_accuracy": test_accuracy,
                "seconds": time.perf_counter() - start,
            }
            history.append(row)
            best = max(
                history, key=lambda row: row["val_accuracy" if val_set else "test_accuracy"]
            )  # first of equals
            if args.dry_run:
                print(
                    format_row(row, best), "Dry run: every step works; nothing was saved", sep="\n"
                )
                return
            checkpoint = {
                "model_name": args.model,
                "architecture": str(model),
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                **row,
                "best_epoch": best["epoch"],
                "best_test_accuracy": best["test_accuracy"],
                "history": history,
                **recipe,  # after the row, because lr is to be the run's, not the epoch's
            }
            if epoch == 1:
                checkpoints.set_aside(folder, checkpoints.files_of_runs(folder))
            path = folder / f"mnist_model_epoch_{epoch}.pth"
            checkpoints.save_checkpoint(path, checkpoint)
            last_path = path
            if best is row:
                checkpoints.save_checkpoint(best_path, checkpoint)
            try:
                checkpoints.save_log(folder / checkpoints.LOG, history)
                if args.plot:
                    pictures.draw_curves(folder / checkpoints.CURVES, history, args.model)
            except Exception as error:  # a log or a curve that fails does not end the run
                if str(error) not in warned:
                    print(f"Warning: {error}", file=sys.stderr)
                warned.add(str(error))
            print(format_row(row, best), flush=True)
    except FloatingPointError as error:
        last = f"the last good checkpoint is {last_path}" if last_path else "nothing was saved"
        raise ScriptError(f"epoch {epoch}: {error}; {last}; try a lower --lr") from error
    except KeyboardInterrupt as interrupt:
        last_path = (
            path if path and path.exists() else last_path
        )  # the interrupt may have come just after a save
        command = (
            f"python train_test_mnist.py --resume {shlex.quote(last_path.as_posix())}"
            if last_path
            else ""
        )
        interrupt.advice = f"to go on: {command}" if command else "nothing was saved yet"
        raise

    path = (
        best_path if best_path.exists() else last_path
    )  # the best may have stayed in another folder
    saved = f", saved as {path}" if path == best_path else ""
    print(f"Best: epoch {best['epoch']}, test accuracy {best['test_accuracy']:.2f} %{saved}")
    print(f"Last: epoch {epoch}, test accuracy {test_accuracy:.2f} %, saved as {last_path}")
    print(
        "Next: python predict_digits.py --test-set --draw --checkpoint",
        shlex.quote(path.as_posix()),
    )


def seed_epoch(seed: int, epoch: int) -> None:
    """Restart torch's random numbers, so that an epoch's shuffle and dropout depend on these two alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def format_row(row: dict, best: dict) -> str:
    """Return an epoch's line of results; both are rows of the history."""
    parts = [part for part in ("train", "val", "test") if row[f"{part}_loss"] is not None]
    results = [f"{row[f'{part}_loss']:10.4f}   {row[f'{part}_accuracy']:6.2f} %" for part in parts]
    return f"{row['epoch']:5}   {'   '.join(results)}   {best['test_accuracy']:6.2f} %   {row['seconds']:7.1f}"


def parse_args() -> tuple[argparse.Namespace, dict, dict | None]:
    """Return all options, those of the recipe, and the checkpoint to resume from or None.

    An option is what is given, else what that checkpoint stores, else its default. A contradiction is an error.
    """
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {}

    def add_stored(option: str, default: object, help: str, **settings: object) -> None:
        """Declare an option that a checkpoint stores; parsing leaves it out unless it is given."""
        help = help.replace("%(default)s", str(default))
        action = parser.add_argument(option, default=argparse.SUPPRESS, help=help, **settings)
        defaults[action.dest] = default

    add, count, names = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    add_stored(
        "--model",
        default_model_name(),
        "class (default: %(default)s)",
        type=find_model_name,
        choices=names,
    )
    add_stored("--epochs", 20, "passes over the training set (default: %(default)s)", type=count)
    add_stored(
        "--batch-size",
        None,
        "training images a step (default: 128 on a GPU, 64 on a CPU)",
        type=count,
    )
    add_stored(
        "--lr",
        0.01,
        "learning rate of SGD (default: %(default)s)",
        type=number_type(float, 0, 1e38),
    )
    add_stored(
        "--lr-scheduler", "constant", "(default: %(default)s)", choices=["constant", "onecyclelr"]
    )
    add_stored("--momentum", 0.9, "of SGD (default: %(default)s)", type=number_type(float, 0, 1))
    add_stored(
        "--weight-decay", 0.0, "of SGD (default: %(default)s)", type=number_type(float, 0, 1e38)
    )
    add_stored(
        "--augment",
        False,
        "rotate, shear, scale and shift training images at random",
        action="store_true",
    )
    add_stored(
        "--amp",
        False,
        "compute in bfloat16 where that suffices; tests use float32",
        action="store_true",
    )
    add_stored(
        "--val-size",
        0,
        "training images held out (default: %(default)s)",
        type=number_type(int, 0, 50001),
    )
    file = {"metavar": "FILE", "type": lambda text: str(path_type(text))}
    add_stored(
        "--init-from",
        "none",
        "checkpoint whose weights a new run starts with (default: none)",
        **file,
    )
    add_stored(
        "--seed", 1, "of all randomness (default: %(default)s)", type=number_type(int, 0, 2**32)
    )
    add(
        "--test-batch-size",
        type=count,
        help="test images at once (default: 2500 on a GPU, 250 on a CPU)",
    )
    add(
        "--device",
        default="auto",
        type=device_type,
        help="auto, cpu, cuda, mps, xpu (default: %(default)s)",
    )
    add("--data-dir", default="data", type=path_type, help="holds MNIST/raw (default: %(default)s)")
    add_stored(
        "--checkpoint-dir",
        Path("model_checkpoints"),
        "holds *.pth (default: %(default)s)",
        type=path_type,
    )
    add(
        "--resume",
        nargs="?",
        const=True,
        metavar="FILE",
        type=path_type,
        help="go on from FILE (default: newest)",
    )
    add(
        "--deterministic",
        action="store_true",
        help="let a GPU, too, give the same result every time",
    )
    add(
        "--log-interval",
        default=10,
        type=count,
        help="steps between updates of the bar (default: %(default)s)",
    )
    add(
        "--plot",
        action="store_true",
        help=f"draw {checkpoints.CURVES} after every epoch; needs matplotlib",
    )
    add(
        "--dry-run",
        action="store_true",
        help="one training and one test batch through it all; saves nothing",
    )
    given, checkpoint = vars(parser.parse_args()), None
    options = defaults | given
    if given["resume"] is not None:
        if given["resume"] is True:  # it names no file
            path, checkpoint = checkpoints.find_newest_checkpoint(options["checkpoint_dir"])
        else:
            path, checkpoint = (
                given["resume"],
                checkpoints.load_checkpoint(given["resume"], to_resume=True),
            )
        stored = (
            defaults
            | checkpoint
            | {"model": checkpoint["model_name"], "checkpoint_dir": path.parent}
        )
        for name in defaults.keys() & given:
            if given[name] != stored[name] and (
                name != "epochs" or stored["lr_scheduler"] != "constant"
            ):
                option = f"--{name.replace('_', '-')} {given[name]}"
                new_run = (
                    ""
                    if name == "model"
                    else f", or start a new run with --init-from {shlex.quote(str(path))}"
                )
                parser.error(
                    f"{option} contradicts {path}, whose run has {stored[name]}; leave it out{new_run}"
                )
        options = {name: stored[name] for name in defaults} | given | {"resume": path}
    if given["plot"]:
        pictures.require_matplotlib()
    options["batch_size"] = options["batch_size"] or default_batch_size(options["device"])
    options["test_batch_size"] = options["test_batch_size"] or (
        250 if options["device"].type == "cpu" else 2500
    )
    recipe = {name: options[name] for name in defaults if name not in ("model", "checkpoint_dir")}
    return argparse.Namespace(**options), recipe, checkpoint


if __name__ == "__main__":
    run_script(main)

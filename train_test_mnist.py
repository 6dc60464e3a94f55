"""Train a model of models.py on MNIST and test it after every epoch.

    python train_test_mnist.py                  # Model5 for 20 epochs; downloads MNIST if needed
    python train_test_mnist.py --model Model2 --epochs 5 --checkpoint-dir model_checkpoints/model2
    python train_test_mnist.py --resume         # go on from the newest intact checkpoint

The first command's output on 2 CPU cores with torch 2.15.0:

    Model5 on cpu: epochs 20, batch_size 64, lr 0.01, lr_scheduler constant, ... seed 1
    epoch   train loss   accuracy    test loss   accuracy       best   seconds
        1       0.3930    89.66 %       0.0931    97.17 %    97.17 %      16.7
       20       0.0253    99.21 %       0.0259    99.16 %    99.21 %      15.9
"""

import argparse
import contextlib
import math
import os
import shlex
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
from model_check import check_model, is_out_of_memory
from models import build_model, find_model_name, model_classes
from utils import (
    ScriptError,
    device_type,
    keep_freed_memory,
    number_type,
    path_type,
    run_script,
)

RECIPE = {  # the options that decide a run's result; every checkpoint stores them
    "model": "Model5",
    "epochs": 20,
    "batch_size": None,  # as the device needs it
    "lr": 0.01,
    "lr_scheduler": "constant",
    "momentum": 0.9,
    "weight_decay": 0.0,
    "augment": False,
    "amp": False,
    "val_size": 0,
    "init_from": "none",
    "seed": 1,
}


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
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix} "  # fits 80 columns
    with tqdm(
        batches,
        description,
        leave=False,
        disable=None,  # where nobody watches
        bar_format=bar_format,
        nrows=24,  # because some terminals say that they have none
    ) as bar:
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
    """Train in a folder that no other run is using; however that ends, say how to go on."""
    args = parse_args()
    if args.plot:
        pictures.require_matplotlib()
    folder = args.checkpoint_dir or Path("model_checkpoints")
    start = folder if args.resume is True else args.resume  # a folder, a checkpoint or None
    if start:
        if not start.exists():
            raise ScriptError(f"there is no {start} to resume; leave out --resume to start anew")
        folder = start if start.is_dir() else start.parent
        if args.checkpoint_dir and folder.resolve() != args.checkpoint_dir.resolve():
            raise ScriptError(f"--checkpoint-dir contradicts {start}; leave it out")
    saved: list[Path] = []
    try:
        with contextlib.nullcontext() if args.dry_run else checkpoints.hold_folder(folder):
            train(args, folder, start, saved)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(how_to_go_on(saved)) from error
    except BrokenPipeError:
        raise
    except (ScriptError, OSError, FloatingPointError) as error:
        raise ScriptError(f"{error}; {how_to_go_on(saved)}") from error
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        remedy = "choose a smaller --batch-size or --test-batch-size, or --device cpu"
        raise ScriptError(f"no memory left: {remedy}; {how_to_go_on(saved)}") from error


def how_to_go_on(saved: list[Path]) -> str:
    there = [path for path in saved if path.exists()]
    if not there:
        return "nothing was saved yet"
    return f"to go on: python train_test_mnist.py --resume {shlex.quote(there[-1].as_posix())}"


def train(args: argparse.Namespace, folder: Path, start: Path | None, saved: list[Path]) -> None:
    """Train, test and save, epoch after epoch; add the path of each checkpoint to `saved`."""
    resumed = {}
    if start:
        start, resumed = checkpoints.find_checkpoint(start)
        saved.append(start)
    options = choose_options(vars(args), start, resumed)
    history = resumed.get("history", [])
    if start and not args.dry_run:
        if len(history) < options.epochs:
            checkpoints.set_aside(folder, after=len(history))
        checkpoints.restore_best(folder, resumed)
    if len(history) >= options.epochs:
        done = len(history)
        print(f"{start} has finished epoch {done}: nothing left to do; --epochs may be larger")
        return

    sets, model, optimizer, scheduler = prepare(args, options, resumed)
    train_set, val_set, test_set = sets
    step = train_step
    if args.device.type == "cuda" and hasattr(torch.Generator, "clone_state"):  # torch 2.4 or newer
        # Because the default stream cannot be recorded
        torch.cuda.set_stream(torch.cuda.Stream(args.device))
        step = graphed(train_step, options.batch_size)
    if start:
        print(f"Going on from {start}")
    recipe = [f"{name} {value}" for name, value in vars(options).items() if name != "model"]
    print(f"{options.model} on {args.device}: {', '.join(recipe)}")
    validation = "     val loss   accuracy" if val_set else ""
    results = f"train loss   accuracy{validation}    test loss   accuracy"
    print(f"epoch   {results}       best   seconds")

    for epoch in range(len(history) + 1, options.epochs + 1):
        seed_epoch(options.seed, epoch)
        began = time.perf_counter()
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row["train_loss"], row["train_accuracy"] = train_one_epoch(
            model,
            optimizer,
            scheduler,
            *train_set,
            options.batch_size,
            augmented=options.augment,
            amp=options.amp,
            log_interval=args.log_interval,
            description=f"epoch {epoch}/{options.epochs}",
            step=step,
        )
        row["val_loss"], row["val_accuracy"] = None, None
        if val_set:
            row["val_loss"], row["val_accuracy"] = evaluate(model, *val_set, args.test_batch_size)
        row["test_loss"], row["test_accuracy"] = evaluate(model, *test_set, args.test_batch_size)
        row["seconds"] = time.perf_counter() - began
        history.append(row)
        decisive = "val_accuracy" if val_set else "test_accuracy"
        best = max(history, key=lambda row: row[decisive])  # the first of equals
        if not args.dry_run:
            checkpoint = {
                "model_name": options.model,
                "architecture": str(model),
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                **row,
                "best_epoch": best["epoch"],
                "best_test_accuracy": best["test_accuracy"],
                "history": history,
                "options": vars(options),
            }
            saved.append(checkpoints.epoch_path(folder, epoch))
            checkpoints.save_epoch(folder, checkpoint, args.plot)
        print(format_row(row, best), flush=True)
        if args.dry_run:
            print("Dry run: every step works; nothing was saved")
            return

    path = folder / checkpoints.BEST
    in_file = f", saved as {path}"
    if not path.exists():  # the best epoch has stayed in another folder
        path, in_file = saved[-1], ""
    print(f"Best: epoch {best['epoch']}, test accuracy {best['test_accuracy']:.2f} %{in_file}")
    print(f"Last: epoch {epoch}, test accuracy {row['test_accuracy']:.2f} %, saved as {saved[-1]}")
    command = "python predict_digits.py --test-set --draw --checkpoint"
    print(f"Next: {command} {shlex.quote(path.as_posix())}")


def choose_options(given: dict, start: Path | None, resumed: dict) -> argparse.Namespace:
    """Return the recipe's options: what is given, else what the run to resume has, else defaults.

    Raises ScriptError if an option that is given contradicts the run to resume.
    """
    options = dict(RECIPE, batch_size=default_batch_size(given["device"]))
    options |= resumed.get("options", {})
    for name, value in options.items():
        if given[name] in (None, value):
            continue
        if resumed and (name != "epochs" or options["lr_scheduler"] != "constant"):
            option = f"--{name.replace('_', '-')} {given[name]}"
            remedy = f"leave it out, or start a new run with --init-from {start}"
            raise ScriptError(f"{option} contradicts {start}, whose run has {value}; {remedy}")
        options[name] = given[name]
    return argparse.Namespace(**options)


def prepare(args: argparse.Namespace, options: argparse.Namespace, resumed: dict) -> tuple:
    """Return training, validation and test set, model, optimizer and scheduler.

    Each set is a pair of images and labels, the validation set is empty without --val-size. Raises
    ScriptError if the data is missing or the model cannot be trained.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    download_mnist(args.data_dir)
    train_set = load_mnist(args.data_dir, train=True, device=args.device)
    test_set = load_mnist(args.data_dir, train=False, device=args.device)
    val_set = ()
    if options.val_size:
        train_set, val_set = hold_out(*train_set, options.val_size)

    torch.manual_seed(options.seed)
    model = build_model(options.model).to(args.device)
    if resumed:
        model.load_state_dict(resumed["model_state_dict"])
    elif options.init_from != "none":
        weights = checkpoints.load_weights(Path(options.init_from), options.model)
        model.load_state_dict(weights)
    check_model(
        options.model,
        model.state_dict(),
        *train_set,
        batch_size=options.batch_size,
        test_batch_size=args.test_batch_size,
        amp=options.amp,
    )
    optimizer = torch.optim.SGD(
        model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
    )
    if resumed:
        optimizer.load_state_dict(resumed["optimizer_state_dict"])

    sets = train_set, val_set, test_set
    if args.dry_run:  # one batch of each
        sets = [[tensor[: options.batch_size] for tensor in each] for each in sets]
    return sets, model, optimizer, make_scheduler(optimizer, options, resumed, len(sets[0][0]))


def make_scheduler(
    optimizer: torch.optim.Optimizer, options: argparse.Namespace, resumed: dict, images: int
) -> LRScheduler | None:
    """Return what changes the learning rate after each step, in epochs of so many images.

    "onecyclelr" starts at lr/25, rises to lr in the first 30 % of all steps and falls to almost 0
    in the others, each along half a cosine (Smith and Topin, "Super-Convergence", 2017). To go on,
    the optimizer must have its state already, because that holds these bounds.
    """
    if options.lr_scheduler == "constant":
        return None
    steps = math.ceil(images / options.batch_size)  # in an epoch
    last_step = resumed.get("epoch", 0) * steps - 1  # counted from 0
    total = options.epochs * steps
    return OneCycleLR(optimizer, options.lr, total, cycle_momentum=False, last_epoch=last_step)


def seed_epoch(seed: int, epoch: int) -> None:
    """Let seed and epoch number determine the epoch's shuffle and dropout.

    Their sum would not do: epoch 2 of seed 1 would then be epoch 1 of seed 2.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def format_row(row: dict, best: dict) -> str:
    """Return an epoch's line of results; both are rows of the history."""
    cells = [f"{row['epoch']:5}"]
    for part in ("train", "val", "test"):
        if row[f"{part}_loss"] is not None:
            cells.append(f"{row[f'{part}_loss']:10.4f}   {row[f'{part}_accuracy']:6.2f} %")
    cells.append(f"{best['test_accuracy']:6.2f} %   {row['seconds']:7.1f}")
    return "   ".join(cells)


def parse_args() -> argparse.Namespace:
    """Return the options; those of the recipe are None unless they are given."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = number_type(int, 1, 10**9)
    size = number_type(int, 0, 50001)
    rate = number_type(float, 0, 1e38)
    share = number_type(float, 0, 1)
    seed = number_type(int, 0, 2**32)
    classes = ", ".join(model_classes())
    add("--model", type=find_model_name, help=f"class in models.py: {classes} (default: Model5)")
    add("--epochs", type=count, help="passes over the training set (default: 20)")
    add("--batch-size", type=count, help="images in a step (default: 128 on a GPU, 64 on a CPU)")
    add("--lr", type=rate, help="learning rate of SGD (default: 0.01)")
    schedules = ["constant", "onecyclelr"]
    add("--lr-scheduler", choices=schedules, help="how the rate changes (default: constant)")
    add("--momentum", type=share, help="momentum of SGD (default: 0.9)")
    add("--weight-decay", type=rate, help="weight decay of SGD (default: 0.0)")
    flag = {"action": "store_true", "default": None}
    add("--augment", **flag, help="rotate, shear, scale and shift training images at random")
    add("--amp", **flag, help="compute in bfloat16 where that suffices; tests use float32")
    add("--val-size", type=size, help="training images set aside for validation (default: 0)")
    add("--init-from", metavar="FILE", help="checkpoint with the first weights (default: none)")
    add("--seed", type=seed, help="seed of weights, shuffling, dropout, augmentation (default: 1)")
    add(
        "--test-batch-size",
        type=count,
        help="test images at once (default: 2500 or, on a CPU, 250)",
    )
    add(
        "--device",
        default="auto",
        type=device_type,
        help="auto, cpu, cuda, mps, xpu (default: auto)",
    )
    add("--data-dir", default="data", type=path_type, help="holds MNIST/raw (default: data)")
    add("--checkpoint-dir", type=path_type, help="holds *.pth (default: model_checkpoints)")
    resume_help = "go on from FILE (default: from the newest in --checkpoint-dir)"
    add("--resume", nargs="?", const=True, metavar="FILE", type=path_type, help=resume_help)
    add("--deterministic", action="store_true", help="let a GPU repeat its results, too")
    add(
        "--log-interval",
        default=10,
        type=count,
        help="steps between updates of the bar (default: 10)",
    )
    add("--plot", action="store_true", help="draw training_curves.png; needs matplotlib")
    add(
        "--dry-run", action="store_true", help="one batch of each set through it all; saves nothing"
    )
    args = parser.parse_args()
    if not args.test_batch_size:
        args.test_batch_size = 250 if args.device.type == "cpu" else 2500
    return args


if __name__ == "__main__":
    run_script(main)

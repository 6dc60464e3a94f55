"""Train a model of models.py on MNIST and test it after every epoch.

    python train_test_mnist.py                  # Model5 for 20 epochs; downloads MNIST if needed
    python train_test_mnist.py --model Model2 --epochs 5 --checkpoint-dir model_checkpoints/model2
    python train_test_mnist.py --resume         # go on from the newest intact checkpoint

The first command's output on 2 CPU cores with torch 2.15.0:

    Model5 on cpu: epochs 20, batch_size 64, lr 0.01, lr_scheduler constant, ... seed 1
    epoch   train loss   accuracy    test loss   accuracy       best   seconds
        1       0.3930    89.66 %       0.0931    97.17 %    97.17 %      16.7
       20       0.0253    99.21 %       0.0259    99.16 %    99.21 %      15.9

The recipe, which is stored in every checkpoint:

    --model NAME             class in models.py, in upper or lower case (default: Model5)
    --epochs N               passes over the training set (default: 20)
    --batch-size N           images in a training step (default: 128 on a GPU, 64 on a CPU)
    --lr RATE                learning rate of SGD (default: 0.01)
    --lr-scheduler NAME      constant, or onecyclelr: up to RATE, then down to 0 (default: constant)
    --momentum FACTOR        momentum of SGD (default: 0.9)
    --weight-decay FACTOR    weight decay of SGD (default: 0.0)
    --augment                rotate, shear, scale and shift the training images at random
    --amp                    train in bfloat16 where that suffices; tests use float32
    --val-size N             training images set aside for validation (default: 0)
    --init-from FILE         checkpoint whose weights a new run starts with (default: none)
    --seed N                 seed of weights, shuffling, dropout, augmentation (default: 1)

How and where it runs:

    --resume [FILE]          go on from FILE, or from the newest checkpoint in --checkpoint-dir
    --device NAME            cpu, cuda, mps, xpu, or auto: a GPU if there is one (default: auto)
    --deterministic          let a GPU, too, give the same result every time
    --data-dir FOLDER        holds MNIST/raw (default: data)
    --checkpoint-dir FOLDER  where to save (default: model_checkpoints)
    --test-batch-size N      test images at once (default: 1000)
    --log-interval N         steps between updates of the progress bar (default: 10)
    --plot                   draw training_curves.png after every epoch; needs matplotlib
    --dry-run                send one batch of each set through everything; save nothing
    -h, --help               print this
"""

import math
import os
import shlex
import time
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

import checkpoints
import pictures
from cuda_graph import graphed
from download_mnist import download_mnist
from mnist_data import augment, default_batch_size, hold_out, load_mnist
from model_check import check_model, is_out_of_memory
from models import build_model, find_model_name
from utils import ScriptError, device_type, keep_freed_memory, number_type, path_type, run_script

RECIPE = {
    "epochs": 20,
    "batch_size": None,  # depends on the device
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
    model: nn.Module, optimizer: Optimizer, images: Tensor, labels: Tensor, amp: bool = False
) -> tuple[Tensor, Tensor]:
    """Update the model on one batch; return its loss and number of correct answers, on the device.

    `images` are (N, 1, 28, 28), `labels` (N,). `amp`: compute in bfloat16 where it suffices.
    """
    with torch.autocast(images.device.type, torch.bfloat16) if amp else nullcontext():
        logits = model(images)  # (N, 10)
        loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def train_one_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: OneCycleLR | None,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    augmented: bool = False,
    log_interval: int = 10,
    description: str = "",
    step: Callable = train_step,
) -> tuple[float, float]:
    """Train once on images (N, 1, 28, 28) with labels (N,), in random order, in batches.

    Returns mean loss and accuracy (per cent) of the batches, each before its own update. Raises
    FloatingPointError if the loss is NaN or infinite, at most log_interval batches later.
    """
    model.train()
    totals = torch.zeros(2, device=images.device)  # sum of the losses, number of correct answers
    batches = torch.randperm(len(images)).to(images.device).split(batch_size)
    with tqdm(
        batches,
        description,
        leave=False,
        disable=None,  # where nobody watches
        bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix} ",  # fits 80 columns
        nrows=24,  # because some terminals say that they have none
    ) as bar:
        for number, batch in enumerate(bar, 1):
            inputs, targets = images[batch], labels[batch]
            if augmented:
                inputs = augment(inputs)
            loss, correct = step(model, optimizer, inputs, targets)
            if scheduler:
                scheduler.step()
            totals[0] += loss * len(batch)
            totals[1] += correct
            if number % log_interval == 0 or number == len(batches):
                # Makes the CPU wait for the GPU, so not in every step
                total_loss, total_correct = totals.tolist()
                seen = min(number * batch_size, len(images))
                mean_loss, accuracy = total_loss / seen, 100 * total_correct / seen
                if not math.isfinite(mean_loss):
                    raise FloatingPointError(
                        f"the loss is {mean_loss} after {number} batches; try a lower --lr"
                    )
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
    # Copies, because a model may change its input in place
    logits = torch.cat([model(batch.clone()) for batch in images.split(batch_size)])  # (N, 10)
    loss = F.cross_entropy(logits, labels).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss in evaluation is {loss}; try a lower --lr")
    return loss, 100 * (logits.argmax(1) == labels).sum().item() / len(labels)


def main() -> None:
    """Train in a folder that no other run is using; however that ends, say how to go on."""
    args = parse_args()
    if args.plot:
        pictures.require_matplotlib()
    folder = args.checkpoint_dir or Path("model_checkpoints")
    if isinstance(args.resume, Path):
        folder = args.resume.parent
        if args.checkpoint_dir and args.checkpoint_dir.resolve() != folder.resolve():
            raise ScriptError(f"--checkpoint-dir contradicts {args.resume}; leave it out")
    if args.resume and not folder.is_dir():
        raise ScriptError(f"there is no {folder} to resume in; leave out --resume to start anew")
    saved = []
    try:
        with nullcontext() if args.dry_run else checkpoints.hold_folder(folder):
            train(args, folder, saved)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(how_to_go_on(saved)) from error
    except BrokenPipeError:
        raise
    except (ScriptError, OSError, FloatingPointError) as error:
        raise ScriptError(f"{error}{how_to_go_on(saved)}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise ScriptError(
            "no memory left: choose a smaller --batch-size or --test-batch-size, "
            f"or --device cpu{how_to_go_on(saved)}"
        ) from error


def how_to_go_on(saved: list[Path]) -> str:
    for path in reversed(saved):
        if path.exists():
            return f"; to go on: python train_test_mnist.py --resume {shlex.quote(path.as_posix())}"
    return ""


def train(args: Namespace, folder: Path, saved: list[Path]) -> None:
    """Train, test and save, epoch after epoch; add the path of each checkpoint to `saved`."""
    start, resumed = args.resume, {}  # a file, True for the newest one, or None
    if start is True:
        start, resumed = checkpoints.find_newest_checkpoint(folder)
    elif start:
        resumed = checkpoints.load_checkpoint(start, to_resume=True)
    options = choose_options(vars(args), start, resumed)
    history = resumed.get("history", [])
    done = len(history)
    if start:
        saved.append(start)
        if not args.dry_run:
            checkpoints.make_way(folder, resumed, options.epochs)
        if done >= options.epochs:
            print(f"{start} has finished epoch {done}: nothing left to do; --epochs may be larger")
            return
        print(f"Going on from {start}")

    model, optimizer, scheduler, (train_set, val_set, test_set) = prepare(args, options, resumed)
    # On a GPU, the step is recorded and replayed
    step = graphed(partial(train_step, amp=options.amp), options.batch_size, args.device)
    recipe = [f"{name} {getattr(options, name)}" for name in RECIPE]
    print(f"{options.model} on {args.device}: {', '.join(recipe)}")
    validation = "     val loss   accuracy" if val_set else ""
    print(f"epoch   train loss   accuracy{validation}    test loss   accuracy       best   seconds")

    for epoch in range(done + 1, options.epochs + 1):
        # Seed and epoch number determine the epoch's shuffle and dropout. Their sum would not do:
        # epoch 2 of seed 1 would then be epoch 1 of seed 2.
        seeds = np.random.SeedSequence([options.seed, epoch])
        torch.manual_seed(seeds.generate_state(1).item())
        began = time.perf_counter()
        row = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        row["train_loss"], row["train_accuracy"] = train_one_epoch(
            model,
            optimizer,
            scheduler,
            *train_set,
            options.batch_size,
            augmented=options.augment,
            log_interval=args.log_interval,
            description=f"epoch {epoch}/{options.epochs}",
            step=step,
        )
        row["val_loss"], row["val_accuracy"] = (
            evaluate(model, *val_set, args.test_batch_size) if val_set else (None, None)
        )
        row["test_loss"], row["test_accuracy"] = evaluate(model, *test_set, args.test_batch_size)
        row["seconds"] = time.perf_counter() - began
        history.append(row)
        if args.dry_run:
            print(format_row(history))
            print("Dry run: every step works; nothing was saved")
            return
        saved.append(checkpoints.epoch_path(folder, epoch))
        checkpoints.save_epoch(folder, model, optimizer, history, vars(options), args.plot)
        print(format_row(history), flush=True)

    best = checkpoints.best_row(history)
    print(f"Best: epoch {best['epoch']}, test accuracy {best['test_accuracy']:.2f} %")
    print(f"Last: epoch {epoch}, test accuracy {row['test_accuracy']:.2f} %, saved as {saved[-1]}")
    print(
        "Next: python predict_digits.py --test-set --draw --checkpoint "
        f"{shlex.quote((folder / checkpoints.BEST).as_posix())}"
    )


def choose_options(given: dict, start: Path | None, resumed: dict) -> Namespace:
    """Return the recipe's options: what is given, else what the run to resume has, else defaults.

    Raises ScriptError if an option that is given contradicts the run to resume.
    """
    options = RECIPE | {"model": "Model5", "batch_size": default_batch_size(given["device"])}
    options |= resumed.get("options", {})
    for name, value in options.items():
        if given[name] in (None, value):
            continue
        if resumed and (name != "epochs" or options["lr_scheduler"] != "constant"):
            raise ScriptError(
                f"--{name.replace('_', '-')} {given[name]} contradicts {start}, whose run has "
                f"{value}; leave it out, or start a new run with --init-from {start}"
            )
        options[name] = given[name]
    return Namespace(**options)


def prepare(args: Namespace, options: Namespace, resumed: dict) -> tuple:
    """Return model, optimizer and scheduler, and the training, validation and test set.

    A set is a pair of images and labels; without --val-size the second is empty. Raises ScriptError
    if the data is missing or the model cannot be trained.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    keep_freed_memory()
    torch.manual_seed(options.seed)
    model = build_model(options.model).to(args.device)
    download_mnist(args.data_dir)
    train_set, test_set = (load_mnist(args.data_dir, each, args.device) for each in (True, False))
    val_set = ()
    if options.val_size:
        train_set, val_set = hold_out(*train_set, options.val_size)

    if resumed:
        model.load_state_dict(resumed["model_state_dict"])
    elif options.init_from != "none":
        model.load_state_dict(checkpoints.load_weights(Path(options.init_from), options.model))
    batch_size = options.batch_size
    check_model(
        options.model, model.state_dict(), *train_set, batch_size, args.test_batch_size, options.amp
    )
    optimizer = SGD(
        model.parameters(), options.lr, options.momentum, weight_decay=options.weight_decay
    )
    if resumed:
        optimizer.load_state_dict(resumed["optimizer_state_dict"])

    scheduler = None
    if options.lr_scheduler == "onecyclelr":
        # From lr/25 up to lr in the first 30 % of all steps, then down to almost 0, each along half
        # a cosine (Smith and Topin, "Super-Convergence", 2017). To go on, the optimizer must have
        # its state already, because that holds these bounds.
        steps = math.ceil(len(train_set[0]) / batch_size)  # in an epoch
        last = resumed.get("epoch", 0) * steps - 1  # counted from 0
        scheduler = OneCycleLR(
            optimizer, options.lr, options.epochs * steps, cycle_momentum=False, last_epoch=last
        )

    sets = train_set, val_set, test_set
    if args.dry_run:  # one batch of each
        sets = [[tensor[:batch_size] for tensor in each] for each in sets]
    return model, optimizer, scheduler, sets


def format_row(history: list[dict]) -> str:
    """Return the last epoch's line of results."""
    row, best = history[-1], checkpoints.best_row(history)
    line = f"{row['epoch']:5}"
    for part in "train", "val", "test":
        if row[f"{part}_loss"] is not None:
            line += f"   {row[f'{part}_loss']:10.4f}   {row[f'{part}_accuracy']:6.2f} %"
    return f"{line}   {best['test_accuracy']:6.2f} %   {row['seconds']:7.1f}"


def parse_args() -> Namespace:
    """Return the options; those of the recipe are None unless they are given."""
    parser = ArgumentParser(usage=SUPPRESS)
    parser.format_help = lambda: __doc__
    parser.set_defaults(device="auto", data_dir="data", test_batch_size=1000, log_interval=10)
    count = number_type(int, 1, 10**9)
    factor = number_type(float, 0, 1e38)
    types = {
        "--model": find_model_name,
        "--epochs": count,
        "--batch-size": count,
        "--lr": factor,
        "--momentum": number_type(float, 0, 1),
        "--weight-decay": factor,
        "--val-size": number_type(int, 0, 50001),
        "--init-from": str,
        "--seed": number_type(int, 0, 2**32),
        "--device": device_type,
        "--data-dir": path_type,
        "--checkpoint-dir": path_type,
        "--test-batch-size": count,
        "--log-interval": count,
    }
    add = parser.add_argument
    for option, kind in types.items():
        add(option, type=kind)
    add("--lr-scheduler", choices=["constant", "onecyclelr"])
    add("--resume", nargs="?", const=True, type=path_type)
    for flag in ("--augment", "--amp", "--deterministic", "--plot", "--dry-run"):
        add(flag, action="store_true", default=None)
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)

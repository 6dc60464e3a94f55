"""Train a model of models.py on MNIST and test it after every epoch.

    python train_test_mnist.py                    # Model5 for 20 epochs; downloads MNIST where it is missing
    python train_test_mnist.py --model Model2 --epochs 5 --checkpoint-dir model_checkpoints/model2
    python train_test_mnist.py --dry-run          # one batch through everything, nothing saved

The first command's output on 2 CPU cores with torch 2.15.0:

    Model5 on cpu: batch_size 64, lr 0.01, momentum 0.9, seed 1
    epoch   train loss   accuracy   test loss   accuracy       best   seconds
        1       0.3930    89.66 %      0.0931    97.17 %    97.17 %      17.6
        ...
       20       0.0253    99.21 %      0.0259    99.16 %    99.21 %      16.0
    Best: epoch 13, test accuracy 99.21 %, saved as model_checkpoints/best_mnist_model.pth
    Last: epoch 20, test accuracy 99.16 %, saved as model_checkpoints/mnist_model_epoch_20.pth
    Next: python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth
"""

import argparse
import io
import itertools
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from download_mnist import ScriptError, download_mnist, make_folder, run_script, write_file
from models import build_model, find_model_name, model_classes

MEAN, STD = 0.1307, 0.3081  # of the training pixels on a scale of 0 to 1
CHECKPOINT_KEYS = (
    *("model_name", "model_state_dict", "optimizer_state_dict"),
    *("epoch", "train_accuracy", "test_accuracy", "best_test_accuracy"),
)


def load_mnist(data_dir: str | Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return normalised images (N, 1, 28, 28), float32, and labels (N,), int64, all on the device."""
    from torchvision.datasets import MNIST  # here, so that only those who read data wait for the import

    dataset = MNIST(data_dir, train=train)
    images = dataset.data.to(device).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
    return images, dataset.targets.to(device)


def seed_epoch(seed: int, epoch: int) -> None:
    """Restart torch's random numbers, so that an epoch's shuffle and dropout depend on these two alone."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0]))


def train_one_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    batch_size: int,
    log_interval: int,
    description: str,
) -> tuple[float, float]:
    """Train once on images (N, 1, 28, 28) with labels (N,) in random order, the last short batch included.

    Returns mean loss and accuracy (per cent) of the batches as they were seen, each before its own step.
    """
    model.train()
    order = torch.randperm(len(images)).to(images.device)
    total_loss = torch.zeros((), device=images.device)
    total_correct = torch.zeros((), device=images.device, dtype=torch.int64)
    seen = 0
    with tqdm(order.split(batch_size), desc=description, unit="batch", leave=False, disable=None) as batches:
        for step, batch in enumerate(batches, start=1):
            optimizer.zero_grad()
            logits = model(images[batch])  # (batch, 10)
            loss = F.cross_entropy(logits, labels[batch])
            loss.backward()
            optimizer.step()

            total_loss += loss.detach() * len(batch)
            total_correct += (logits.argmax(1) == labels[batch]).sum()
            seen += len(batch)
            if step % log_interval == 0:  # .item() makes the CPU wait for the GPU
                loss_so_far, accuracy_so_far = total_loss.item() / seen, 100 * total_correct.item() / seen
                batches.set_postfix_str(f"loss {loss_so_far:.4f}, accuracy {accuracy_so_far:.2f} %")
    return total_loss.item() / seen, 100 * total_correct.item() / seen


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> tuple[float, float]:
    """Return mean loss and accuracy (per cent) on images (N, 1, 28, 28) with labels (N,)."""
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(batch_size)])  # (N, 10)
    correct = (logits.argmax(1) == labels).sum().item()
    return F.cross_entropy(logits, labels).item(), 100 * correct / len(labels)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; raises ScriptError where that fails."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def load_checkpoint(path: Path) -> dict:
    """Return a checkpoint, its tensors on the CPU; raises ScriptError for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0 warns of what it does itself
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        missing = [key for key in CHECKPOINT_KEYS if key not in checkpoint]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        build_model(checkpoint["model_name"]).load_state_dict(checkpoint["model_state_dict"])
    except Exception as error:  # a file that is no checkpoint fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ScriptError(f"{path} is not a checkpoint of train_test_mnist.py ({reason}); name another file") from error
    return checkpoint


def set_aside_earlier_run(folder: Path) -> None:
    """Move an earlier run's checkpoints into folder/earlier_run_N, so that a new run overwrites none."""
    checkpoints = [*folder.glob("mnist_model_epoch_*.pth"), *folder.glob("best_mnist_model.pth")]
    if not checkpoints:
        return
    candidates = (folder / f"earlier_run_{n}" for n in itertools.count(1))
    target = next(path for path in candidates if not path.exists())
    target.mkdir()
    for path in checkpoints:
        path.rename(target / path.name)
    print(f"Moved {len(checkpoints)} checkpoints of an earlier run to {target}")


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults are the recipe."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count, models = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    add("--model", default="Model5", type=find_model_name, choices=models, help="class (default: %(default)s)")
    add("--epochs", default=20, type=count, help="passes over the training set (default: %(default)s)")
    add("--batch-size", type=count, help="training images a step (default: 128 on a GPU, 64 on a CPU)")
    add("--test-batch-size", default=1000, type=count, help="test images at once (default: %(default)s)")
    add("--lr", default=0.01, type=number_type(float, 0), help="learning rate of SGD (default: %(default)s)")
    add("--momentum", default=0.9, type=number_type(float, 0, 1), help="of SGD (default: %(default)s)")
    add("--seed", default=1, type=number_type(int, 0, 2**32), help="of all randomness (default: %(default)s)")
    add("--device", default="auto", type=device_type, help="auto, cpu, cuda, mps, xpu (default: %(default)s)")
    add("--data-dir", default="data", type=Path, help="holds MNIST/raw (default: %(default)s)")
    add("--checkpoint-dir", default="model_checkpoints", type=Path, help="holds *.pth (default: %(default)s)")
    add("--log-interval", default=10, type=count, help="steps between updates of the bar (default: %(default)s)")
    add("--dry-run", action="store_true", help="one training and one test batch through it all; saves nothing")
    args = parser.parse_args()
    args.batch_size = args.batch_size or default_batch_size(args.device)
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
    download_mnist(args.data_dir)
    train_set = load_mnist(args.data_dir, train=True, device=args.device)
    test_set = load_mnist(args.data_dir, train=False, device=args.device)
    if args.dry_run:
        args.epochs = 1
        train_set = [tensor[: args.batch_size] for tensor in train_set]
        test_set = [tensor[: args.test_batch_size] for tensor in test_set]
    else:
        make_folder(args.checkpoint_dir)

    torch.manual_seed(args.seed)
    model = build_model(args.model).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    recipe = {name: getattr(args, name) for name in ("batch_size", "lr", "momentum", "seed")}
    print(f"{args.model} on {args.device}:", ", ".join(f"{name} {value}" for name, value in recipe.items()))

    print("epoch   train loss   accuracy   test loss   accuracy       best   seconds")
    best_path = args.checkpoint_dir / "best_mnist_model.pth"
    best_accuracy, best_epoch = -math.inf, 0
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        seed_epoch(args.seed, epoch)
        train_loss, train_accuracy = train_one_epoch(
            model, optimizer, *train_set, args.batch_size, args.log_interval, f"epoch {epoch}/{args.epochs}"
        )
        test_loss, test_accuracy = evaluate(model, *test_set, args.test_batch_size)
        is_best = test_accuracy > best_accuracy
        if is_best:
            best_accuracy, best_epoch = test_accuracy, epoch
        print(
            f"{epoch:5}   {train_loss:10.4f}   {train_accuracy:6.2f} %   "
            f"{test_loss:9.4f}   {test_accuracy:6.2f} %   {best_accuracy:6.2f} %   "
            f"{time.perf_counter() - start:7.1f}",
            flush=True,
        )
        if args.dry_run:
            print("Dry run: every step works; nothing was saved")
            return
        if epoch == 1:
            set_aside_earlier_run(args.checkpoint_dir)
        last_path = args.checkpoint_dir / f"mnist_model_epoch_{epoch}.pth"
        checkpoint = {
            "model_name": args.model,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "epoch": epoch,
            "train_accuracy": train_accuracy,
            "test_accuracy": test_accuracy,
            "best_test_accuracy": best_accuracy,
            "arguments": recipe,
        }
        save_checkpoint(last_path, checkpoint)
        if is_best:
            save_checkpoint(best_path, checkpoint)

    print(f"Best: epoch {best_epoch}, test accuracy {best_accuracy:.2f} %, saved as {best_path}")
    print(f"Last: epoch {epoch}, test accuracy {test_accuracy:.2f} %, saved as {last_path}")
    print(f"Next: python analyze_model.py --checkpoint {best_path}")


if __name__ == "__main__":
    run_script(main)

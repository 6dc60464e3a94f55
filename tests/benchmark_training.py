"""Measure how fast training is, beside the usual way to write it and beside its arithmetic alone.

    python tests/benchmark_training.py                   # Model5 on the CPU, two minutes
    python tests/benchmark_training.py --model all
    python tests/benchmark_training.py --device cuda

classic loop            a DataLoader transforms each sample, as in pytorch/examples
each step from Python   this repository without a CUDA graph; on a GPU only
this repository         the functions of train_test_mnist.py, as it calls them
with --amp              the same in bfloat16; on a CPU only if it has instructions for that
compute only            training steps on one batch that never changes

Each has a process of its own because the allocator's settings belong to a process. The processes
take turns; the figures are medians over five turns. An epoch is 60,000 training and 10,000 test
images; the factor says how many times as fast as the classic loop it is.
"""

import argparse
import functools
import itertools
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch.utils.data import DataLoader
from torchvision.datasets import MNIST
from torchvision.transforms import Compose, Normalize, ToTensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # where the imports below are found

from cuda_graph import graphed
from download_mnist import download_mnist
from mnist_data import default_batch_size, load_mnist
from models import build_model
from train_test_mnist import evaluate, train_one_epoch, train_step
from utils import device_type, keep_freed_memory, run_script

TEST_BATCH_SIZE = 1000  # the trainer's default


@functools.cache
def prepare(variant, name, device, data_dir):
    """Return two functions: train(steps) and test(); once in a process."""
    batch_size = default_batch_size(device)
    model = build_model(name).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    if variant == "classic loop":
        return classic_loop(model, optimizer, batch_size, device, data_dir)

    step = functools.partial(train_step, amp=variant == "with --amp")
    if variant != "each step from Python":
        step = graphed(step, batch_size, device)
    keep_freed_memory()
    images, labels = load_mnist(data_dir, True, device)
    test_set = load_mnist(data_dir, False, device)

    def train(steps):
        train_one_epoch(
            model,
            optimizer,
            scheduler=None,
            images=images[: steps * batch_size],
            labels=labels[: steps * batch_size],
            batch_size=batch_size,
            step=step,
        )

    def repeat_one_batch(steps):
        model.train()
        batch = images[:batch_size], labels[:batch_size]
        for _ in range(steps):
            loss, _ = train_step(model, optimizer, *batch, amp=False)
        loss.item()  # waits for the GPU

    def test():
        evaluate(model, *test_set, TEST_BATCH_SIZE)

    return repeat_one_batch if variant == "compute only" else train, test


def classic_loop(model, optimizer, batch_size, device, data_dir):
    transform = Compose([ToTensor(), Normalize((0.1307,), (0.3081,))])
    train_loader = DataLoader(MNIST(data_dir, True, transform), batch_size, shuffle=True)
    test_loader = DataLoader(MNIST(data_dir, False, transform), TEST_BATCH_SIZE)

    def train(steps):
        model.train()
        for images, labels in itertools.islice(train_loader, steps):
            batch = images.to(device), labels.to(device)
            loss, _ = train_step(model, optimizer, *batch, amp=False)
            loss.item()

    def test():
        for images, labels in test_loader:
            evaluate(model, images.to(device), labels.to(device), TEST_BATCH_SIZE)

    return train, test


def time_turn(variant, steps, name, device, data_dir):
    """Return the seconds that a training step and an epoch with its test take."""
    train, test = prepare(variant, name, device, data_dir)
    start = perf_counter()
    train(steps)
    trained = perf_counter()
    test()
    tested = perf_counter()
    step = (trained - start) / steps
    return step, step * 60000 / default_batch_size(device) + tested - trained


def measure(variants, *setting):
    """Let the variants take turns, then print a row of the table for each."""
    context = multiprocessing.get_context("spawn")
    runs = [(variant, ProcessPoolExecutor(1, context), []) for variant in variants]
    for _ in range(6):
        for variant, process, turns in runs:
            turn = process.submit(time_turn, variant, *setting)
            turns.append(turn.result())
    classic_epoch = None
    for variant, _, turns in runs:
        step, epoch = map(median, zip(*turns[1:], strict=True))  # without the first, the warm-up
        classic_epoch = classic_epoch or epoch
        print(f"{variant:22}{1000 * step:12.2f}{epoch:13.2f}{classic_epoch / epoch:9.2f}")


def main():
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model", default="Model5", help="class in models.py, or all (default: Model5)")
    add("--device", default="cpu", type=device_type, help="cpu or cuda (default: cpu)")
    add("--steps", default=100, type=int, help="training steps a turn, at most 468 (default: 100)")
    add("--data-dir", default="data", help="holds MNIST/raw (default: data)")
    args = parser.parse_args()
    download_mnist(args.data_dir)

    variants = ["classic loop", "this repository", "compute only"]
    on_gpu = args.device.type == "cuda"
    if on_gpu:
        variants.insert(1, "each step from Python")
    if on_gpu or (sys.platform == "linux" and "_bf16" in Path("/proc/cpuinfo").read_text()):
        variants.insert(-1, "with --amp")
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ["Model1", "Model2", "Model5"] if args.model == "all" else [args.model]:
        print(f"{name:22}   ms a step   s an epoch   factor")
        measure(variants, args.steps, name, args.device, args.data_dir)


if __name__ == "__main__":
    run_script(main)

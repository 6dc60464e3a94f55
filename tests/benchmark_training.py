"""Measure how fast training is, beside the usual way to write it and beside its arithmetic alone.

    python tests/benchmark_training.py                   # Model5 on the CPU, two minutes
    python tests/benchmark_training.py --model all
    python tests/benchmark_training.py --device cuda

Each way to train has a process of its own because the allocator's settings belong to a process. The processes take
turns; the figures are medians over the rounds.
"""

import argparse
import contextlib
import math
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from cuda_graph import graphed  # noqa: E402
from download_mnist import download_mnist  # noqa: E402 - found through the line above
from mnist_data import default_batch_size, load_mnist  # noqa: E402
from models import build_model, find_model_name, model_classes  # noqa: E402
from train_test_mnist import evaluate, train_one_epoch, train_step  # noqa: E402
from utils import device_type, keep_freed_memory, number_type, run_script  # noqa: E402

TRAIN_IMAGES, TEST_IMAGES, TEST_BATCH = 60000, 10000, 250
Work = Callable[[int], None]  # takes that many training steps, or tests that many batches
Setting = tuple[str, int, torch.device, Path]  # model name, batch size, device, data folder


def new_model(name: str, device: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and the recipe's optimizer."""
    model = build_model(name).to(device)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def repeated(function: Callable[[], None]) -> Work:
    """Return a function that calls this one as many times as it is told."""

    def work(times: int) -> None:
        for _ in range(times):
            function()

    return work


def classic_loop(
    name: str, batch_size: int, device: torch.device, data_dir: Path
) -> tuple[Work, Work]:
    """The loop of pytorch/examples/mnist: torchvision transforms each sample, and every step reads its loss."""
    from torchvision import datasets, transforms

    transform = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    )
    model, optimizer = new_model(name, device)

    def endless(train: bool, batch_size: int) -> object:
        loader = torch.utils.data.DataLoader(
            datasets.MNIST(data_dir, train, transform), batch_size, shuffle=train
        )
        while True:
            for data, target in loader:
                yield data.to(device), target.to(device)

    train_batches, test_batches = endless(True, batch_size), endless(False, TEST_BATCH)

    def train_step() -> None:
        model.train()
        data, target = next(train_batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(data), target)
        loss.backward()
        optimizer.step()
        loss.item()

    @torch.no_grad()
    def test_batch() -> None:
        model.eval()
        data, target = next(test_batches)
        output = model(data)
        F.cross_entropy(output, target, reduction="sum").item()
        output.argmax(1).eq(target).sum().item()

    return repeated(train_step), repeated(test_batch)


def this_repository(
    name: str,
    batch_size: int,
    device: torch.device,
    data_dir: Path,
    amp: bool = False,
    graph: bool = True,
) -> tuple[Work, Work]:
    """train_one_epoch and evaluate as train_test_mnist.py calls them."""
    keep_freed_memory()
    step, test_batch = train_step, TEST_BATCH
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.Stream(device))
        if graph:
            step, test_batch = graphed(train_step, batch_size), 2500
    images, labels = load_mnist(data_dir, train=True, device=device)
    test_images, test_labels = load_mnist(data_dir, train=False, device=device)
    model, optimizer = new_model(name, device)

    def train(steps: int) -> None:
        count = steps * batch_size
        train_one_epoch(
            model, optimizer, None, images[:count], labels[:count], batch_size, amp=amp, step=step
        )

    def test(batches: int) -> None:
        count = batches * TEST_BATCH
        evaluate(model, test_images[:count], test_labels[:count], test_batch)

    return train, test


def with_amp(*setting: object) -> tuple[Work, Work]:
    """this_repository with --amp."""
    return this_repository(*setting, amp=True)


def without_graph(*setting: object) -> tuple[Work, Work]:
    """this_repository, but each step launched from Python, and tests in small batches."""
    return this_repository(*setting, graph=False)


def compute_only(
    name: str, batch_size: int, device: torch.device, data_dir: Path
) -> tuple[Work, Work]:
    """Forward, backward and update on one batch that never changes."""
    keep_freed_memory()
    model, optimizer = new_model(name, device)
    data, test_data = (
        torch.randn(size, 1, 28, 28, device=device) for size in (batch_size, TEST_BATCH)
    )
    target = torch.randint(10, (batch_size,), device=device)

    def train_step() -> None:
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(model(data), target).backward()
        optimizer.step()

    @torch.no_grad()
    def test_batch() -> None:
        model.eval()
        model(test_data)

    return repeated(train_step), repeated(test_batch)


def serve(connection: object, prepare: Callable[..., tuple[Work, Work]], setting: Setting) -> None:
    """In a process of its own: prepare a variant, and time what the connection asks for."""
    works = dict(zip(("train", "test"), prepare(*setting), strict=True))
    while request := connection.recv():
        kind, count = request
        start = time.perf_counter()
        works[kind](count)
        if setting[2].type == "cuda":
            torch.cuda.synchronize()
        connection.send((time.perf_counter() - start) / count)


def measure(setting: Setting, rounds: int, steps: int) -> list[tuple[str, float, float, float]]:
    """Return each variant's name, seconds a training step, seconds an epoch, and speed in classic loops."""
    context, connections = multiprocessing.get_context("spawn"), {}
    amp = (
        [with_amp] if setting[2].type != "cpu" or bfloat16_instructions() else []
    )  # else it takes minutes
    plain = [without_graph] if setting[2].type == "cuda" else []
    for prepare in (classic_loop, *plain, this_repository, *amp, compute_only):
        connections[prepare.__name__], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, prepare, setting), daemon=True).start()
        theirs.close()  # so that a process that dies is noticed
    turns = {name: [] for name in connections}
    for _ in range(rounds + 1):
        for name, connection in connections.items():
            connection.send(("train", steps))
            step = connection.recv()
            connection.send(("test", TEST_IMAGES // TEST_BATCH))
            epoch = (
                math.ceil(TRAIN_IMAGES / setting[1]) * step
                + TEST_IMAGES // TEST_BATCH * connection.recv()
            )
            turns[name].append((step, epoch))
    for connection in connections.values():
        connection.send(None)
    rows = []
    for name in turns:
        ratios = [
            usual / epoch
            for (_, usual), (_, epoch) in zip(turns["classic_loop"], turns[name], strict=True)
        ]
        columns = [*zip(*turns[name], strict=True), ratios]
        rows.append(
            (name.replace("_", " "), *(statistics.median(column[1:]) for column in columns))
        )  # first: warm-up
    return rows


def bfloat16_instructions() -> list[str]:
    """Return the names of the CPU's bfloat16 instructions; none on a system without /proc/cpuinfo."""
    with contextlib.suppress(OSError):
        return sorted({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    return []


def main() -> None:
    """Print one table for each model, and how long a start takes."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count = parser.add_argument, number_type(int, 1)
    names = [*model_classes(), "all"]
    add(
        "--model",
        default="Model5",
        type=find_model_name,
        choices=names,
        help="class (default: %(default)s)",
    )
    add("--device", default="cpu", type=device_type, help="cpu or cuda (default: %(default)s)")
    add("--rounds", default=5, type=count, help="turns of each variant (default: %(default)s)")
    add("--steps", default=100, type=count, help="training steps a turn (default: %(default)s)")
    add(
        "--data-dir",
        default=ROOT / "data",
        type=Path,
        help="holds MNIST/raw (default: the repository's data)",
    )
    args = parser.parse_args()
    batch_size = default_batch_size(args.device)
    download_mnist(args.data_dir)
    cpu = f"{platform.machine()}, {' and '.join(bfloat16_instructions()) or 'no'} bfloat16 instructions"
    hardware = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else cpu
    print(f"{hardware}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name in ["Model1", "Model2", "Model5"] if args.model == "all" else [args.model]:
        rows = measure((name, batch_size, args.device, args.data_dir), args.rounds, args.steps)
        print(f"{f'{name}, batches of {batch_size}':22}     step, ms   epoch, s   speed")
        for variant, step, epoch, ratio in rows:
            print(f"{variant:22} {1000 * step:12.2f}   {epoch:8.2f}   {ratio:5.2f}", flush=True)
    first_step = (
        "import os, train_test_mnist as t; t.train_one_epoch = lambda *_: os._exit(0); t.main()"
    )
    for label, code in (
        ("import torch", "import torch"),
        ("from the start to the first step", first_step),
    ):
        command = [
            sys.executable,
            "-c",
            code,
            "--dry-run",
            "--data-dir",
            str(args.data_dir.resolve()),
        ]
        run = partial(subprocess.run, command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        seconds = statistics.median(timeit.repeat(run, repeat=args.rounds, number=1))
        print(f"{label}: {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    run_script(main)

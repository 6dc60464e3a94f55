"""Measure how fast training is, beside the usual way to write it and beside what the hardware allows.

    python tests/benchmark_training.py                          # Model5 on the CPU, three minutes
    python tests/benchmark_training.py --model all --json speed.json
    python tests/benchmark_training.py --device cuda

Each way to train runs in a process of its own, because the allocator's settings and compiled code belong to a process.
The processes take turns: one works while the others wait. Figures are medians of all rounds.
"""

import argparse
import io
import json
import multiprocessing
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train_test_mnist as repository  # noqa: E402 - found through the line above
from models import build_model  # noqa: E402

Work = Callable[[int], None]  # takes that many training steps, or tests that many batches
TRAIN_IMAGES, TEST_IMAGES, TEST_BATCH = 60000, 10000, 250


def new_model(args: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model and the recipe's optimizer."""
    model = build_model(args.model).to(args.device)
    return model, torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def classic(args: argparse.Namespace, workers: int) -> tuple[Work, Work]:
    """The loop of pytorch/examples/mnist: torchvision transforms each sample, and every step reads its loss."""
    from torchvision import datasets, transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))])
    options = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": args.device.type == "cuda"}
    model, optimizer = new_model(args)

    def endless(train: bool, batch_size: int) -> object:
        dataset = datasets.MNIST(args.data_dir, train, transform)
        loader = torch.utils.data.DataLoader(dataset, batch_size, shuffle=train, **options)
        while True:
            for data, target in loader:
                yield data.to(args.device), target.to(args.device)

    train_batches, test_batches = endless(True, args.batch_size), endless(False, TEST_BATCH)

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            data, target = next(train_batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data), target)
            loss.backward()
            optimizer.step()
            loss.item()

    @torch.no_grad()
    def test(batches: int) -> None:
        model.eval()
        for _ in range(batches):
            data, target = next(test_batches)
            output = model(data)
            F.cross_entropy(output, target, reduction="sum").item()
            output.argmax(1).eq(target).sum().item()

    return train, test


def shipped(args: argparse.Namespace, compiled: bool = False) -> tuple[Work, Work]:
    """train_one_epoch and evaluate as train_test_mnist.py calls them, progress bar and statistics included."""

    class Terminal(io.StringIO):  # tqdm draws its bar on terminals only
        def isatty(self) -> bool:
            return True

    images, labels = repository.load_mnist(args.data_dir, train=True, device=args.device)
    test_images, test_labels = repository.load_mnist(args.data_dir, train=False, device=args.device)
    repository.keep_freed_memory()
    model, optimizer = new_model(args)
    graphed = args.device.type == "cuda"
    step = repository.TrainingStep(model, optimizer, images, labels, args.batch_size, compiled, graphed)

    def train(steps: int) -> None:
        sys.stderr = Terminal()
        step.images = images[: steps * args.batch_size]
        repository.train_one_epoch(step, 10, "")
        sys.stderr = sys.__stderr__

    def test(batches: int) -> None:
        count = batches * TEST_BATCH
        repository.evaluate(model, test_images[:count], test_labels[:count], TEST_BATCH)

    return train, test


def compute_only(args: argparse.Namespace, fast: bool = False) -> tuple[Work, Work]:
    """Forward, backward and update on one batch in place; with `fast` compiled, or on a GPU recorded as CUDA graphs."""
    repository.keep_freed_memory()
    model, optimizer = new_model(args)
    forward = torch.compile(model, dynamic=False) if fast and args.device.type == "cpu" else model
    data = torch.randn(args.batch_size, 1, 28, 28, device=args.device)
    target = torch.randint(10, (args.batch_size,), device=args.device)
    test_data = torch.randn(TEST_BATCH, 1, 28, 28, device=args.device)

    def take_step() -> None:
        model.train()
        optimizer.zero_grad()
        F.cross_entropy(forward(data), target).backward()
        optimizer.step()

    @torch.no_grad()
    def test_batch() -> None:
        model.eval()
        model(test_data)

    works = [take_step, test_batch]
    if fast and args.device.type == "cuda":
        works = [as_cuda_graph(function) for function in works]
    return tuple(repeated(function) for function in works)


def as_cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Return the function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def repeated(function: Callable[[], None]) -> Work:
    """Return a function that calls this one so many times."""

    def work(times: int) -> None:
        for _ in range(times):
            function()

    return work


def convolution_calls(args: argparse.Namespace, batch_size: int) -> list[tuple]:
    """Return (module, input, output) of each convolution in a forward pass."""
    calls, (model, _) = [], new_model(args)
    hook = lambda *call: calls.append((call[0], call[1][0], call[2]))  # noqa: E731
    handles = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        model(torch.randn(batch_size, 1, 28, 28, device=args.device))
    for handle in handles:
        handle.remove()
    return calls


def convolutions_alone(args: argparse.Namespace) -> tuple[Work, Work]:
    """The model's convolutions, forward and backward, each on its input in place, and nothing else."""
    repository.keep_freed_memory()
    calls, test_calls = convolution_calls(args, args.batch_size), convolution_calls(args, TEST_BATCH)

    def train() -> None:
        for number, (conv, given, result) in enumerate(calls):
            conv(given)
            torch.ops.aten.convolution_backward(
                result, given, conv.weight, None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups,
                [number > 0, True, False],  # gradients of input (not of the image), weight, bias
            )  # fmt: skip

    def test() -> None:
        for conv, given, _ in test_calls:
            conv(given)

    return repeated(torch.no_grad()(train)), repeated(torch.no_grad()(test))


def arithmetic(args: argparse.Namespace) -> tuple[Work, Work]:
    """One large matrix product with as many multiply-accumulates as the convolutions."""
    calls, size = convolution_calls(args, 1), 2048
    macs = [result.numel() * conv.weight[0].numel() for conv, _, result in calls]  # a forward pass of one image
    square = torch.randn(size, size, device=args.device)

    def product(total_macs: float) -> None:
        torch.randn(max(1, round(total_macs / size**2)), size, device=args.device) @ square

    return (
        lambda steps: product(steps * args.batch_size * (3 * sum(macs) - macs[0])),  # no gradient of the image
        lambda batches: product(batches * TEST_BATCH * sum(macs)),
    )


def traffic(args: argparse.Namespace) -> tuple[Work, Work]:
    """Copies of as many bytes as the convolutions read and write at least."""
    calls, source = convolution_calls(args, 1), torch.empty(2**27, device=args.device)
    floats = [given.numel() + result.numel() for _, given, result in calls]  # a forward pass of one image
    target = torch.empty_like(source)

    def copy(total_floats: float) -> None:  # each float copied is one read and one written
        for _ in range(max(1, round(total_floats / (2 * source.numel())))):
            target.copy_(source)

    return (
        lambda steps: copy(steps * args.batch_size * (3 * sum(floats) - floats[0])),
        lambda batches: copy(batches * TEST_BATCH * sum(floats)),
    )


def variants(device: torch.device) -> dict[str, tuple]:
    """Return each row of the table: its name, the function that prepares it, and the function's arguments."""
    if device.type == "cuda":
        fast, limit = {"compute only, as CUDA graph": (compute_only, True)}, {"bytes at copy speed": (traffic,)}
    else:
        fast = {"compute only, compiled": (compute_only, True)}
        limit = {"arithmetic at matrix-product speed": (arithmetic,)}
    return {
        **{f"classic loop, {workers} workers": (classic, workers) for workers in (0, 2, 4)},
        "this repository": (shipped,),
        "this repository, --compile": (shipped, True),
        "compute only": (compute_only,),
        **fast,
        "convolutions alone": (convolutions_alone,),
        **limit,
    }


def serve(connection: object, args: argparse.Namespace, prepare: Callable, *options: object) -> None:
    """In a process of its own: prepare a variant, and time what the connection asks for."""
    train, test = prepare(args, *options)
    works = {"train": train, "test": test}
    while request := connection.recv():
        kind, count = request
        start = time.perf_counter()
        works[kind](count)
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        connection.send((time.perf_counter() - start) / count)


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row for each variant: medians of seconds a step, of seconds a test pass, and of ratios to classic."""
    context = multiprocessing.get_context("spawn")
    connections = {}
    for name, (prepare, *options) in variants(args.device).items():
        connections[name], theirs = context.Pipe()
        context.Process(target=serve, args=(theirs, args, prepare, *options)).start()
        theirs.close()  # so that a process that dies is noticed
        for kind in ("train", "test"):  # compiles, fills caches, starts workers
            connections[name].send((kind, 10))
            connections[name].recv()
    rounds = []
    for _ in range(args.rounds):
        rounds.append({name: {} for name in connections})
        for name, connection in connections.items():
            for kind, count in (("train", args.steps), ("test", TEST_IMAGES // TEST_BATCH)):
                connection.send((kind, count))
                rounds[-1][name][kind] = connection.recv()
    for connection in connections.values():
        connection.send(None)

    steps = -(-TRAIN_IMAGES // args.batch_size)
    for times in (times for turn in rounds for times in turn.values()):
        times["test"] *= TEST_IMAGES / TEST_BATCH
        times["epoch"] = steps * times["train"] + times["test"]
    median = lambda name, kind: statistics.median(turn[name][kind] for turn in rounds)  # noqa: E731
    usual = min((name for name in connections if name.startswith("classic")), key=lambda name: median(name, "epoch"))
    return [
        {
            "variant": name,
            "step_seconds": median(name, "train"),
            "test_pass_seconds": median(name, "test"),
            "epoch_seconds": median(name, "epoch"),
            "times_as_fast_as_classic": statistics.median(
                turn[usual]["epoch"] / turn[name]["epoch"] for turn in rounds
            ),
        }
        for name in connections
        if name == usual or not name.startswith("classic")
    ]


def measure_start_up(args: argparse.Namespace) -> list[dict]:
    """Return the median seconds that imports take, and all from the shell prompt to the first training step."""
    options = ["--model", args.model, "--device", str(args.device), "--data-dir", str(args.data_dir.resolve())]
    first_step = (
        f"import os, sys, train_test_mnist as t; sys.argv = ['train_test_mnist.py', '--dry-run', *{options}]; "
        "t.train_one_epoch = lambda *args: os._exit(0); t.main()"
    )
    codes = {
        "python alone": "",
        "import numpy": "import numpy",
        "import torch": "import torch",
        "import torch, torchvision": "import torch, torchvision",
        "import torch, torch._inductor (for --compile)": "import torch, torch._inductor.compile_fx",
        "train_test_mnist.py to its first step": first_step,
    }
    seconds = {name: [] for name in codes}
    for _ in range(args.rounds):
        for name, code in codes.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(time.perf_counter() - start)
    return [{"start": name, "seconds": statistics.median(values)} for name, values in seconds.items()]


def describe_hardware(device: torch.device) -> str:
    """Return one line with the processor, the number of threads and the versions."""
    processor = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    if device.type == "cuda":
        processor = f"{torch.cuda.get_device_name(device)}, {processor}"
    return (
        f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}"
    )


def main() -> None:
    """Print one table for each model, and one for the start."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, repository.number_type(int, 1)
    add("--model", default="Model5", help="a class of models.py, or all (default: %(default)s)")
    add("--device", default="cpu", type=repository.device_type, help="cpu or cuda (default: %(default)s)")
    add("--batch-size", type=count, help="images a step (default: 128 on a GPU, 64 on a CPU)")
    add("--rounds", default=5, type=count, help="turns of each variant (default: %(default)s)")
    add("--steps", default=100, type=count, help="training steps a turn (default: %(default)s)")
    add("--data-dir", default=ROOT / "data", type=Path, help="holds MNIST/raw (default: the repository's data)")
    add("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    args = parser.parse_args()
    args.batch_size = args.batch_size or repository.default_batch_size(args.device)
    repository.download_mnist(args.data_dir)
    hardware = describe_hardware(args.device)
    print(hardware)
    results = {"hardware": hardware, "batch_size": args.batch_size, "models": {}}
    for name in ["Model1", "Model2", "Model5"] if args.model == "all" else [args.model]:
        args.model = repository.find_model_name(name)
        rows = results["models"][args.model] = measure(args)
        print(f"\n{args.model}, batches of {args.batch_size}   step, ms   test, ms   epoch, s   speed")
        for row in rows:
            print(
                f"{row['variant']:34} {1000 * row['step_seconds']:8.2f}   {1000 * row['test_pass_seconds']:8.1f}   "
                f"{row['epoch_seconds']:8.2f}   {row['times_as_fast_as_classic']:5.2f}",
                flush=True,
            )
    results["start_up"] = measure_start_up(args)
    print("\nStart                                          seconds")
    for row in results["start_up"]:
        print(f"{row['start']:46} {row['seconds']:7.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    repository.run_script(main)

"""Print a model's layers, operations, receptive fields and memory, measured on the running model.

    python analyze_model.py                                # Model5 on MNIST's 28x28 images
    python analyze_model.py --model all --batch-size 128   # every class, then a comparison
    python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth --image fields.png

What is known in two ways is compared; if the two differ, the exit status is 1.
"""

import argparse
import dataclasses
import json
import math
import shutil
from collections import Counter
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from checkpoints import load_checkpoint
from mnist_data import IMAGE_SIDE, default_batch_size, load_mnist
from model_runs import (
    CostRun,
    FieldRun,
    Layer,
    copy_model,
    extrapolate,
    find_wrong_maps,
    is_layer,
    module_maps,
)
from models import build_model, find_model_name, model_classes
from pictures import draw_receptive_fields, require_matplotlib
from receptive_fields import MISMATCH, Axis
from utils import ScriptError, device_type, number_type, path_type, run_script

LAYERS_LEGEND = """\
weight bias total  parameters; those that several layers share count for the first
buffers            numbers that are stored but not trained
MACs               multiply-accumulates of convolutions and matrix products, per image
kept               bytes kept for the backward pass of a batch; what several layers keep counts \
for the first"""
FIELDS_LEGEND = """\
k s p d      kernel, stride, padding, dilation; - where branches meet
n_in n_out   feature-map size
j_in j_out   jump: the cumulative stride, in input pixels; 0 where every unit sees the same pixels
r_in r_out   receptive field of one unit before and after the layer, in input pixels
P_in P_out   accumulated padding: pixels by which the first unit's receptive field passes the \
image's edge
RF           receptive field after the layer, height x width"""

SAMPLED = """\
Of maps with more than 30 rows or columns, the first, middle and last 10 were probed; \
of large ones, 4."""

COLUMNS = [field.name for field in dataclasses.fields(Axis)]


@dataclasses.dataclass
class Memory:
    """Bytes that one part takes in a training step and in inference."""

    part: str
    meaning: str
    training: int
    inference: int


@dataclasses.dataclass
class Check:
    """The verdict of one self-check; passed is None if it could not be made."""

    name: str
    passed: bool | None
    finding: str


@dataclasses.dataclass
class Analysis:
    """What `analyze` finds."""

    architecture: str
    input_size: tuple[int, int]
    batch_size: int
    device: str
    layers: list[Layer]
    totals: dict[str, int | None]
    memory: list[Memory]
    checks: list[Check]
    failure: str | None  # why forward or backward fails; the layers then end where it failed

    # Epoch and accuracies that came with the weights
    checkpoint: dict[str, int | float] | None = None

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        if self.failure:
            return [self.failure]
        return [f"{check.name}: {check.finding}" for check in self.checks if check.passed is False]


def analyze(
    model: nn.Module, input_size: tuple[int, int], batch_size: int, verify: bool = True
) -> Analysis:
    """Analyze a model on grey images (batch_size, 1, *input_size) on the model's device.

    The model stays as it is. One that fails on the images is no error: then `failure` says why. No
    checks without `verify`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    architecture = str(model)
    twin = copy_model(model).cpu().double()
    twin.eval()
    model = copy_model(model)
    model.train()

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # the same noise every time

        # Of two small batches, the second shows what grows with the batch. One image alone is a
        # case of its own.
        sizes = (2, 3) if batch_size > 1 else (1,)
        batches = [torch.rand(n, 1, *input_size, device=device) for n in sizes]
        runs = [CostRun(model, images) for images in batches]
        failure = runs[0].failure or runs[-1].failure
        model.cpu().eval()

        # One image more than the probes in a replay; memory sets the limit
        n = 13 if math.prod(input_size) < 2**14 else 2
        with torch.no_grad():
            fields = FieldRun(model, torch.rand(n, 1, *input_size), twin)
            lines = add_costs(fields.lines, model, runs, batch_size)
            totals = add_up_layers(model, lines)
            checks = run_checks(lines, totals, runs, fields) if verify and not failure else []

    by_call = [extrapolate(runs, key, "at work", batch_size) for key in runs[0].costs]
    at_work = max(by_call, default=0)
    memory = add_up_memory(model, batch_size, input_size, totals["kept"], at_work)
    return Analysis(
        architecture, input_size, batch_size, str(device), lines, totals, memory, checks, failure
    )


# What the report adds up and checks


def count_numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def add_costs(
    lines: list[Layer], model: nn.Module, runs: list[CostRun], batch_size: int
) -> list[Layer]:
    """Enter costs, and parameters at their first use.

    Return the lines and those of modules that are never called.
    """
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    called = {line.name for line in lines}
    for name, module in modules.items() if not runs[-1].failure else ():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name not in called and (own or is_layer(module)):
            shape = runs[0].shapes.get((name, 1))  # of one that runs in training alone
            lines.append(Layer(name, 1, type(module).__name__, not is_layer(module), shape))

    calls = Counter()
    counted = set()
    total = count_numbers(model.parameters())
    for line in lines:
        if line.name not in modules:
            continue
        module = modules[line.name]
        calls[line.name] += 1
        key = (line.name if line.depth else "", calls[line.name])
        line.kept = extrapolate(runs, key, "kept", batch_size)
        is_counted = not runs[0].costs[key]["uncounted"]
        line.macs = extrapolate(runs, key, "flops", 1) // 2 if is_counted else None

        own = dict(module.named_parameters(recurse=False))
        new = {name: tensor for name, tensor in own.items() if tensor not in counted}
        line.bias = count_numbers(tensor for name, tensor in new.items() if "bias" in name)
        line.weight = count_numbers(new.values()) - line.bias
        line.parameters = line.weight + line.bias
        line.share = round(100 * line.parameters / max(total, 1), 2)
        buffers = set(module.buffers(recurse=False))
        line.buffers = count_numbers(buffers - counted)
        counted.update(own.values(), buffers)
    return lines


def add_up_layers(model: nn.Module, lines: list[Layer]) -> dict[str, int | None]:
    """Return the totals of the lines, and how many parameters are trainable, frozen and shared."""
    modules = dict(model.named_modules())
    uses = Counter()
    for line in lines:
        if line.name in modules:
            uses.update(modules[line.name].parameters(recurse=False))

    total = count_numbers(model.parameters())
    trainable = count_numbers(tensor for tensor in model.parameters() if tensor.requires_grad)
    macs = [line.macs for line in lines]
    return {
        "weight": sum(line.weight for line in lines),
        "bias": sum(line.bias for line in lines),
        "kept": sum(line.kept for line in lines),
        "parameters": total,
        "trainable": trainable,
        "frozen": total - trainable,
        "shared": count_numbers(tensor for tensor, count in uses.items() if count > 1),
        "buffers": count_numbers(model.buffers()),
        "macs": None if None in macs else sum(macs),
    }


def add_up_memory(
    model: nn.Module, batch_size: int, size: tuple[int, int], kept: int, at_work: int
) -> list[Memory]:
    """Return the parts of a training step with SGD and momentum and of inference, and their sum."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    parameters, trainable, buffers = (
        sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        for tensors in (model.parameters(), trained, model.buffers())
    )
    pixels = 4 * batch_size * math.prod(size)
    labels = 8 * batch_size
    memory = [
        Memory("parameters", "weights and biases", parameters, parameters),
        Memory("gradients", "one for each trainable parameter", trainable, 0),
        Memory("momentum", "SGD's running sum of gradients", trainable, 0),
        Memory("buffers", "stored but not trained", buffers, buffers),
        Memory("input and target", "images, and in training int64 labels", pixels + labels, pixels),
        Memory("activations kept for backward", "the layers' column `kept`", kept, 0),
        Memory("activations at work", "input and output of the largest layer", 0, at_work),
    ]
    training = sum(part.training for part in memory)
    inference = sum(part.inference for part in memory)
    return [*memory, Memory("sum", "", training, inference)]


def run_checks(
    lines: list[Layer], totals: dict, runs: list[CostRun], fields: FieldRun
) -> list[Check]:
    """Compare numbers that are known in two ways."""
    listed = sum(line.parameters for line in lines)
    wrong_total = [] if listed == totals["parameters"] else ["the total"]
    if runs[0].counter:
        miscounted = [name for run in runs for name in run.miscounted]
        counted = "torch's FLOP counter agrees with the formula for convolutions and linear layers"
    else:
        miscounted = None
        counted = "torch has its FLOP counter since version 2.1"
    mismatches = [line.name for line in lines if line.unknown and line.unknown.startswith(MISMATCH)]
    windows = "convolutions and poolings read what they declare, as far as probed"
    return [
        verdict("parameters", wrong_total, f"those of the layers add up to {listed:,}"),
        verdict("MACs", miscounted, counted),
        verdict("windows", mismatches, windows),
        verdict("receptive field", *find_wrong_maps(fields)),
    ]


def verdict(name: str, wrong: list[str] | None, finding: str) -> Check:
    """Return a check that names the layers that are wrong, or else says what was found.

    If `wrong` is None, the check was not made.
    """
    passed = None if wrong is None else not wrong
    if wrong:
        finding = f"wrong at {', '.join(dict.fromkeys(wrong))}"
    return Check(name, passed, finding)


# The report


def format_shape(shape: tuple[int, ...]) -> str:
    """Return 8x26x26 for (8, 26, 26)."""
    return "x".join(map(str, shape))


def format_table(rows: list[list[object]], text_columns: int) -> str:
    """Align the first columns, of text, to the left and numbers to the right.

    None is printed as ?. Columns that do not fit the terminal go below, beside the first one again.
    """
    limit = min(120, shutil.get_terminal_size((120, 24)).columns)
    parts = []  # of columns, which are lists of cells
    for index, column in enumerate(zip(*rows, strict=True)):
        cells = [format_cell(cell) for cell in column]
        width = max(map(len, cells))
        align = str.ljust if index < text_columns else str.rjust
        cells = [align(cell, width) for cell in cells]
        if not parts:
            parts.append([])
        elif len("  ".join(cells[0] for cells in [*parts[-1], cells])) > limit:
            parts.append(parts[0][:1])
        parts[-1].append(cells)

    tables = []
    for part in parts:
        lines = ["  ".join(cells).rstrip() for cells in zip(*part, strict=True)]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def format_cell(value: object) -> str:
    if value is None:
        return "?"
    return f"{value:,}" if isinstance(value, int) else value


def format_report(name: str, analysis: Analysis) -> str:
    """Return the sections as text."""
    lines = [name]
    for key, value in (analysis.checkpoint or {}).items():
        number = f"{value:.2f} %" if isinstance(value, float) else value
        lines.append(f"{key.replace('_', ' ')} {number}")

    lines += ["\nArchitecture", analysis.architecture]
    images = f"{format_shape(analysis.input_size)} images in batches of {analysis.batch_size}"
    lines += [f"\nLayers, for {images} on {analysis.device}", *format_layers(analysis)]
    if analysis.failure:
        return "\n".join(lines)
    lines += ["\nReceptive fields", *format_fields(analysis)]

    memory = [["part", "what it is", "training", "inference"]]
    for part in analysis.memory:
        sizes = [f"{size:,} {size / 2**20:7.2f} MiB" for size in (part.training, part.inference)]
        memory.append([part.part, part.meaning, *sizes])
    lines.append("\nMemory of a training step (SGD with momentum) and of inference, in bytes")
    lines.append(format_table(memory, text_columns=2))

    verdicts = {True: "ok", False: "FAILED", None: "skipped"}
    checks = [[check.name, verdicts[check.passed], check.finding] for check in analysis.checks]
    lines += ["\nSelf-checks", format_table(checks, text_columns=3) if checks else "skipped"]
    return "\n".join(lines)


def format_layers(analysis: Analysis) -> list[str]:
    """Return the tree of layers with its legend."""
    rows = [
        ["layer", "type", "output", "weight", "bias", "total", "share", "buffers", "MACs", "kept"]
    ]
    prefixes = [""]
    missing = "failed" if analysis.failure else "never called"
    for layer in analysis.layers:
        prefixes[layer.depth :] = [f"{layer.name}." if layer.depth else ""]
        label = "  " * layer.depth + layer.name.removeprefix(prefixes[max(layer.depth - 1, 0)])
        output = missing if layer.output_shape is None else format_shape(layer.output_shape)
        share = f"{layer.share:.2f} %" if layer.parameters else 0
        numbers = [layer.weight, layer.bias, layer.parameters, share]
        numbers += [layer.buffers, layer.macs, layer.kept]
        cells = ["" if number == 0 else number for number in numbers]
        rows.append([label, layer.type, output, *cells])
    if analysis.failure:
        return [format_table(rows, text_columns=3), LAYERS_LEGEND]

    keys = "weight", "bias", "parameters", "buffers", "macs", "kept"
    numbers = [analysis.totals[key] for key in keys]
    rows.append(["total", "", "", *numbers[:3], "", *numbers[3:]])
    trained = "trainable {trainable:,}, frozen {frozen:,}, shared by several layers {shared:,}"
    return [format_table(rows, text_columns=3), trained.format(**analysis.totals), LAYERS_LEGEND]


def format_fields(analysis: Analysis) -> list[str]:
    """Return the table of receptive fields with its legend, and what is left out or not known."""
    rows = [["layer", "type", *COLUMNS, "RF"]]
    left_out = set()
    reasons = []
    for layer in analysis.layers:
        for field in layer.fields:
            cells = []
            for pair in zip(*map(dataclasses.astuple, field.values()), strict=True):
                h, w = ("-" if n is None else str(n) for n in pair)
                cells.append(h if h == w else f"{h}x{w}")
            rows.append([layer.name, layer.type, *cells, format_field(field)])
        if layer.unknown:
            rows.append([layer.name, layer.type, *"?" * 13])
            reasons.append(f"?            at {layer.name}: {layer.unknown}")
        elif not (layer.fields or layer.is_block or layer.is_merged) and layer.output_shape:
            left_out.add(layer.name.split(".")[-1] if layer.type == "function" else layer.type)

    notes = []
    if max(analysis.input_size) > 30:
        notes.append(SAMPLED)
    if left_out:
        names = ", ".join(sorted(left_out))
        notes.append(f"Left out, not seen to change any of these: {names}.")
    return [format_table(rows, text_columns=2), FIELDS_LEGEND, *reasons, *notes]


def format_field(field: dict[str, Axis]) -> str:
    """Return the receptive field after a layer as 5x5."""
    return f"{field['height'].r_out}x{field['width'].r_out}"


def format_comparison(analyses: dict[str, Analysis]) -> str:
    """Return a table with one line a model."""
    rows = [["model", "checks", "RF", "parameters", "MACs", "training bytes", "inference bytes"]]
    for name, analysis in analyses.items():
        fields = [field for layer in analysis.layers for field in layer.fields]
        known = fields and not any(layer.unknown for layer in analysis.layers)
        size = format_field(fields[-1]) if known else None
        checks = "passed" if analysis.checks else "skipped"
        if analysis.problems():
            checks = "failed"
        counts = [analysis.totals["parameters"], analysis.totals["macs"]]
        memory = analysis.memory[-1]
        rows.append([name, checks, size, *counts, memory.training, memory.inference])
    return f"Comparison\n{format_table(rows, text_columns=2)}"


def centre_fields(analysis: Analysis) -> dict[str, dict[str, int]]:
    """Return the pixels that the centre unit sees after each block.

    Some may lie beyond the edge of the image.
    """
    blocks = {}
    block = ""
    for layer in analysis.layers:
        if layer.depth <= 1:
            block = layer.name
        for field in layer.fields[-1:]:
            rows, columns = field["height"], field["width"]
            blocks[block] = {
                "top": rows.n_out // 2 * rows.j_out - rows.P_out,
                "left": columns.n_out // 2 * columns.j_out - columns.P_out,
                "height": rows.r_out,
                "width": columns.r_out,
            }
    return blocks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    count = number_type(int, 1, 10**9)
    models = list(model_classes())
    known = f"{', '.join(models)}, or all (default: Model5)"
    add("--model", nargs="+", type=find_model_name, metavar="NAME", help=known)
    add(
        "--checkpoint",
        type=path_type,
        help="analyze the trained weights of this file, and the class it names",
    )
    add(
        "--input-size",
        default=(IMAGE_SIDE, IMAGE_SIDE),
        type=count,
        nargs=2,
        metavar=("H", "W"),
        help=f"pixels (default: {IMAGE_SIDE} {IMAGE_SIDE})",
    )
    add(
        "--batch-size",
        type=count,
        help="images in a training step (default: 128 on a GPU, 64 on a CPU)",
    )
    add(
        "--device",
        default="auto",
        type=device_type,
        help="auto, cpu, cuda, mps, xpu (default: %(default)s)",
    )
    add(
        "--verify",
        default=True,
        action=argparse.BooleanOptionalAction,
        help="make the self-checks (default: yes)",
    )
    add("--json", action="store_true", help="print the same numbers as JSON, and nothing else")
    add(
        "--image",
        type=path_type,
        help="PNG file for a drawing of receptive fields and feature maps (default: none)",
    )
    add(
        "--digit",
        default=0,
        type=number_type(int, 0, 10000),
        help="test image that it shows (default: %(default)s)",
    )
    add(
        "--data-dir",
        default="data",
        type=path_type,
        help="where --image looks for MNIST/raw (default: %(default)s)",
    )

    args = parser.parse_args()
    args.batch_size = args.batch_size or default_batch_size(args.device)
    args.model = models if "all" in (args.model or ()) else args.model
    return args


def main() -> None:
    """Analyze model after model, and print and draw what was found."""
    args = parse_args()
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else None
    names = args.model or [checkpoint["model_name"] if checkpoint else "Model5"]
    if checkpoint and names != [checkpoint["model_name"]]:
        raise ScriptError(
            f"{args.checkpoint} holds weights of {checkpoint['model_name']}: leave out --model"
        )
    if args.image and len(names) > 1:
        raise ScriptError(f"{args.image} is to show one model: give --model one name")
    if args.image:
        require_matplotlib()
        images, _ = load_mnist(args.data_dir, train=False, device=args.device)
        digit = nn.functional.interpolate(images[None, args.digit], tuple(args.input_size))

    analyses = {}
    problems = []
    for name in names:
        model = build_model(name).to(args.device)
        tensors = [*model.parameters(), *model.buffers()]
        if any(map(is_lazy, tensors)):
            # A first image gives lazy layers their shapes
            module_maps(model, torch.zeros(1, 1, *args.input_size, device=args.device))
            if any(map(is_lazy, tensors)):
                raise ScriptError(
                    f"{name} has lazy layers that no image reaches: "
                    "train it with --dry-run to see why"
                )
        if checkpoint:
            model.load_state_dict(checkpoint["model_state_dict"])

        analysis = analyze(model, tuple(args.input_size), args.batch_size, args.verify)
        if checkpoint:
            results = ("epoch", "train_accuracy", "test_accuracy", "best_test_accuracy")
            analysis.checkpoint = {key: checkpoint[key] for key in results}
        analyses[name] = analysis
        problems += [f"{name}: {problem}" for problem in analysis.problems()]
        if not args.json:
            report = format_report(name, analysis)
            print(report.encode("ascii", "backslashreplace").decode(), end="\n\n")

    if args.json:
        found = {name: dataclasses.asdict(analysis) for name, analysis in analyses.items()}
        print(json.dumps(found, indent=2))
    elif len(analyses) > 1:
        print(format_comparison(analyses))

    if args.image and (blocks := centre_fields(analysis)):
        draw_receptive_fields(args.image, digit, blocks, module_maps(model, digit))
    elif args.image:
        problems.append(f"{args.image} is not drawn because no receptive field is known")
    if problems:
        raise ScriptError("; ".join(problems))


if __name__ == "__main__":
    run_script(main)

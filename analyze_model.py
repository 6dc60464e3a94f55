"""Print a model's layers, operations, receptive fields and memory, as measured on the running model.

    python analyze_model.py                                # Model5 on MNIST's 28x28 images
    python analyze_model.py --model all --batch-size 128   # every class of models.py, then a comparison
    python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth --image fields.png

What is known in two ways is compared; if the two differ, the exit status is 1.
"""

import argparse
import dataclasses
import json
import math
import shutil
from collections import Counter

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from checkpoints import load_checkpoint
from mnist_data import default_batch_size, load_mnist
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
from models import build_model, default_model_name, find_model_name, model_classes
from pictures import draw_receptive_fields, require_matplotlib
from receptive_fields import MISMATCH, Axis
from utils import ScriptError, device_type, number_type, path_type, run_script

LAYERS_LEGEND = """\
weight bias total  parameters; those that several layers share count for the first
buffers            numbers that are stored but not trained
MACs               multiply-accumulates of convolutions and matrix products, per image
kept               bytes kept for the backward pass of a batch; what several layers keep counts for the first"""
FIELDS_LEGEND = """\
k s p d      kernel, stride, padding, dilation; - where branches meet
n_in n_out   feature-map size
j_in j_out   jump: the cumulative stride, in input pixels; 0 where every unit sees the same pixels
r_in r_out   receptive field of one unit before and after the layer, in input pixels
P_in P_out   accumulated padding: pixels by which the first unit's receptive field passes the image's edge
RF           receptive field after the layer, height x width"""

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
    checkpoint: dict[str, int | float] | None = (
        None  # epoch and accuracies that came with the weights
    )

    def problems(self) -> list[str]:
        """Return what is wrong, in words."""
        failed = [
            f"{check.name}: {check.finding}" for check in self.checks if check.passed is False
        ]
        return [self.failure] if self.failure else failed


def analyze(
    model: nn.Module, input_size: tuple[int, int], batch_size: int, verify: bool = True
) -> Analysis:
    """Analyze a model on grey images (batch_size, 1, *input_size) on the model's device; the model stays as it is.

    A model that fails on the images is no error: then `failure` says why. No checks without `verify`.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    architecture, model, twin = str(model), copy_model(model), copy_model(model).cpu().double()
    model.train()
    twin.eval()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # the same noise every time
        # Of two small batches, the second shows what grows with the batch. One image alone is a case of its own.
        batches = [
            torch.rand(n, 1, *input_size, device=device)
            for n in ((2, 3) if batch_size > 1 else (1,))
        ]
        runs = [CostRun(model, images) for images in batches]
        failure = runs[0].failure or runs[-1].failure
        model.cpu().eval()
        n = (
            13 if math.prod(input_size) < 2**14 else 2
        )  # one more than the probes in a replay: memory sets the limit
        with torch.no_grad():
            fields = FieldRun(model, torch.rand(n, 1, *input_size), twin)
            lines = add_costs(fields.lines, model, runs, batch_size)
            totals = add_up_layers(model, lines)
            checks = run_checks(lines, totals, runs, fields) if verify and not failure else []
    at_work = max(
        (extrapolate(runs, key, "at work", batch_size) for key in runs[0].costs), default=0
    )
    memory = add_up_memory(model, batch_size, input_size, totals["kept"], at_work)
    return Analysis(
        architecture, input_size, batch_size, str(device), lines, totals, memory, checks, failure
    )


# What the report adds up and checks


def add_costs(
    lines: list[Layer], model: nn.Module, runs: list[CostRun], batch_size: int
) -> list[Layer]:
    """Enter costs, and parameters at their first use; return the lines and those of modules that are never called."""
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    for name, module in modules.items() if not runs[-1].failure else ():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if name not in {line.name for line in lines} and (own or is_layer(module)):
            shape = runs[0].shapes.get((name, 1))  # of one that runs in training alone
            lines.append(Layer(name, 1, type(module).__name__, not is_layer(module), shape))
    calls, described = Counter(), set()
    total = sum(parameter.numel() for parameter in model.parameters())
    for line in [line for line in lines if line.name in modules]:
        calls[line.name] += 1
        key = (line.name if line.depth else "", calls[line.name])
        line.kept = extrapolate(runs, key, "kept", batch_size)
        line.macs = (
            None if runs[0].costs[key]["uncounted"] else extrapolate(runs, key, "flops", 1) // 2
        )
        own = dict(modules[line.name].named_parameters(recurse=False))
        sizes = {
            name: parameter.numel() for name, parameter in own.items() if parameter not in described
        }
        line.bias = sum(size for name, size in sizes.items() if "bias" in name)
        line.weight = sum(sizes.values()) - line.bias
        line.parameters = line.weight + line.bias
        line.share = round(100 * line.parameters / max(total, 1), 2)
        buffers = set(modules[line.name].buffers(recurse=False))
        line.buffers = sum(buffer.numel() for buffer in buffers - described)
        described.update(own.values(), buffers)
    return lines


def add_up_layers(model: nn.Module, lines: list[Layer]) -> dict[str, int | None]:
    """Return the totals of the lines, and how many parameters are trainable, frozen and shared."""
    modules, parameters = dict(model.named_modules()), list(model.parameters())
    called = [modules[line.name] for line in lines if line.name in modules]
    uses = Counter(parameter for module in called for parameter in module.parameters(recurse=False))
    totals = {key: sum(getattr(line, key) for line in lines) for key in ("weight", "bias", "kept")}
    return totals | {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "frozen": sum(parameter.numel() for parameter in parameters if not parameter.requires_grad),
        "shared": sum(parameter.numel() for parameter, count in uses.items() if count > 1),
        "buffers": sum(buffer.numel() for buffer in model.buffers()),
        "macs": None
        if any(line.macs is None for line in lines)
        else sum(line.macs for line in lines),
    }


def add_up_memory(
    model: nn.Module, batch_size: int, size: tuple[int, int], kept: int, at_work: int
) -> list[Memory]:
    """Return the parts of a training step with SGD and momentum, and of inference, and their sum."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tensors = [list(model.parameters()), trained, list(model.buffers())]
    parameters, trainable, buffers = (
        sum(t.numel() * t.element_size() for t in group) for group in tensors
    )
    pixels = 4 * batch_size * math.prod(size)
    memory = [
        Memory("parameters", "weights and biases", parameters, parameters),
        Memory("gradients", "one for each trainable parameter", trainable, 0),
        Memory("momentum", "SGD's running sum of gradients", trainable, 0),
        Memory("buffers", "stored but not trained", buffers, buffers),
        Memory(
            "input and target",
            "images, and in training int64 labels",
            pixels + 8 * batch_size,
            pixels,
        ),
        Memory("activations kept for backward", "the layers' column `kept`", kept, 0),
        Memory("activations at work", "input and output of the largest layer", 0, at_work),
    ]
    return [
        *memory,
        Memory(
            "sum", "", sum(part.training for part in memory), sum(part.inference for part in memory)
        ),
    ]


def run_checks(
    lines: list[Layer], totals: dict, runs: list[CostRun], fields: FieldRun
) -> list[Check]:
    """Compare numbers that are known in two ways."""
    listed, total = sum(line.parameters for line in lines), totals["parameters"]
    miscounted = [name for run in runs for name in run.miscounted]
    counted = "torch's FLOP counter agrees with the formula for convolutions and linear layers"
    if not runs[0].counter:
        miscounted, counted = None, "torch has its FLOP counter since version 2.1"
    mismatches = [line.name for line in lines if line.unknown and line.unknown.startswith(MISMATCH)]
    return [
        verdict(
            "parameters",
            [] if listed == total else ["the total"],
            f"those of the layers add up to {listed:,}",
        ),
        verdict("MACs", miscounted, counted),
        verdict(
            "windows",
            mismatches,
            "convolutions and poolings read what they declare, as far as probed",
        ),
        verdict("receptive field", *find_wrong_maps(fields)),
    ]


def verdict(name: str, wrong: list[str] | None, finding: str) -> Check:
    """Return a check that names the layers that are wrong, or else says what was found; None means not checked."""
    found = f"wrong at {', '.join(dict.fromkeys(wrong))}" if wrong else finding
    return Check(name, None if wrong is None else not wrong, found)


# The report


def format_shape(shape: tuple[int, ...]) -> str:
    """Return 8x26x26 for (8, 26, 26)."""
    return "x".join(map(str, shape))


def format_table(rows: list[list[object]], text_columns: int) -> str:
    """Align text to the left and numbers to the right, ? for None; columns that do not fit the terminal go below."""
    limit = min(120, shutil.get_terminal_size((120, 24)).columns)
    parts: list[list[list[str]]] = []
    for index, column in enumerate(zip(*rows, strict=True)):
        cells = [
            "?" if cell is None else f"{cell:,}" if isinstance(cell, int) else cell
            for cell in column
        ]
        width = max(map(len, cells))
        cells = [cell.ljust(width) if index < text_columns else cell.rjust(width) for cell in cells]
        if not parts or len("  ".join(cells[0] for cells in [*parts[-1], cells])) > limit:
            parts.append(parts[0][:1] if parts else [])
        parts[-1].append(cells)
    return "\n\n".join(
        "\n".join("  ".join(cells).rstrip() for cells in zip(*part, strict=True)) for part in parts
    )


def format_report(name: str, analysis: Analysis) -> str:
    """Return the sections as text."""
    stored = analysis.checkpoint or {}
    numbers = {
        key: f"{value:.2f} %" if isinstance(value, float) else value
        for key, value in stored.items()
    }
    lines = [name, *(f"{key.replace('_', ' ')} {number}" for key, number in numbers.items())]
    where = f"{format_shape(analysis.input_size)} images in batches of {analysis.batch_size} on {analysis.device}"
    lines += [
        "\nArchitecture",
        analysis.architecture,
        f"\nLayers, for {where}",
        *format_layers(analysis),
    ]
    if analysis.failure:
        return "\n".join(lines)
    lines += ["\nReceptive fields", *format_fields(analysis)]
    memory = [["part", "what it is", "training", "inference"]]
    for part in analysis.memory:
        sizes = [f"{size:,} {size / 2**20:7.2f} MiB" for size in (part.training, part.inference)]
        memory.append([part.part, part.meaning, *sizes])
    lines += [
        "\nMemory of a training step (SGD with momentum) and of inference, in bytes",
        format_table(memory, 2),
    ]
    verdicts = {True: "ok", False: "FAILED", None: "skipped"}
    checks = [[check.name, verdicts[check.passed], check.finding] for check in analysis.checks]
    lines += ["\nSelf-checks", format_table(checks, text_columns=3) if checks else "skipped"]
    return "\n".join(lines)


def format_layers(analysis: Analysis) -> list[str]:
    """Return the tree of layers with its legend."""
    rows: list[list[object]] = [
        ["layer", "type", "output", "weight", "bias", "total", "share", "buffers", "MACs", "kept"]
    ]
    prefixes = [""]
    missing = "failed" if analysis.failure else "never called"
    for layer in analysis.layers:
        prefixes[layer.depth :] = [f"{layer.name}." if layer.depth else ""]
        label = "  " * layer.depth + layer.name.removeprefix(prefixes[max(layer.depth - 1, 0)])
        output = missing if layer.output_shape is None else format_shape(layer.output_shape)
        share = f"{layer.share:.2f} %" if layer.parameters else 0
        numbers = (
            layer.weight,
            layer.bias,
            layer.parameters,
            share,
            layer.buffers,
            layer.macs,
            layer.kept,
        )
        rows.append(
            [label, layer.type, output, *("" if number == 0 else number for number in numbers)]
        )
    if analysis.failure:
        return [format_table(rows, text_columns=3), LAYERS_LEGEND]
    numbers = [
        analysis.totals[key] for key in ("weight", "bias", "parameters", "buffers", "macs", "kept")
    ]
    rows.append(["total", "", "", *numbers[:3], "", *numbers[3:]])
    trained = "trainable {trainable:,}, frozen {frozen:,}, shared by several layers {shared:,}"
    return [format_table(rows, text_columns=3), trained.format(**analysis.totals), LAYERS_LEGEND]


def format_fields(analysis: Analysis) -> list[str]:
    """Return the table of receptive fields with its legend, and what is left out or not known."""
    rows: list[list[object]] = [["layer", "type", *COLUMNS, "RF"]]
    left_out, reasons = set(), []
    for layer in analysis.layers:
        for field in layer.fields:
            axes = [
                ["-" if n is None else str(n) for n in dataclasses.astuple(axis)]
                for axis in field.values()
            ]
            cells = [h if h == w else f"{h}x{w}" for h, w in zip(*axes, strict=True)]
            rows.append(
                [layer.name, layer.type, *cells, f"{field['height'].r_out}x{field['width'].r_out}"]
            )
        if layer.unknown:
            rows.append([layer.name, layer.type, *"?" * 13])
            reasons.append(f"?            at {layer.name}: {layer.unknown}")
        elif not (layer.fields or layer.is_block or layer.is_merged) and layer.output_shape:
            left_out.add(layer.name.split(".")[-1] if layer.type == "function" else layer.type)
    sampled = "Of maps with more than 30 rows or columns, the first, middle and last 10 were probed; of large ones, 4."
    note = [sampled] if max(analysis.input_size) > 30 else []
    note += (
        [f"Left out, not seen to change any of these: {', '.join(sorted(left_out))}."]
        if left_out
        else []
    )
    return [format_table(rows, text_columns=2), FIELDS_LEGEND, *reasons, *note]


def format_comparison(analyses: dict[str, Analysis]) -> str:
    """Return a table with one line a model."""
    rows: list[list[object]] = [
        ["model", "checks", "RF", "parameters", "MACs", "training bytes", "inference bytes"]
    ]
    for name, analysis in analyses.items():
        fields = [field for layer in analysis.layers for field in layer.fields]
        known = fields and not any(layer.unknown for layer in analysis.layers)
        size = f"{fields[-1]['height'].r_out}x{fields[-1]['width'].r_out}" if known else None
        checks = "failed" if analysis.problems() else "passed" if analysis.checks else "skipped"
        totals, memory = analysis.totals, analysis.memory[-1]
        rows.append(
            [
                name,
                checks,
                size,
                totals["parameters"],
                totals["macs"],
                memory.training,
                memory.inference,
            ]
        )
    return f"Comparison\n{format_table(rows, text_columns=2)}"


def centre_fields(analysis: Analysis) -> dict[str, dict[str, int]]:
    """Return the pixels that the centre unit sees after each block, some beyond the edge of the image."""
    blocks, block = {}, ""
    for layer in analysis.layers:
        block = layer.name if layer.depth <= 1 else block
        for field in layer.fields[-1:]:
            (top, height), (left, width) = (
                (axis.n_out // 2 * axis.j_out - axis.P_out, axis.r_out)
                for axis in (field["height"], field["width"])
            )
            blocks[block] = {"top": top, "left": left, "height": height, "width": width}
    return blocks


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, count, models = parser.add_argument, number_type(int, 1, 10**9), list(model_classes())
    default = f"classes, or all (default: {default_model_name()})"
    add("--model", nargs="+", type=find_model_name, choices=[*models, "all"], help=default)
    add(
        "--checkpoint",
        type=path_type,
        help="analyze the trained weights of this file, and the class it names",
    )
    add(
        "--input-size",
        default=(28, 28),
        type=count,
        nargs=2,
        metavar=("H", "W"),
        help="pixels (default: 28 28)",
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
    names = args.model or [checkpoint["model_name"] if checkpoint else default_model_name()]
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
    analyses, problems = {}, []
    for name in names:
        model = build_model(name).to(args.device)
        if any(map(is_lazy, tensors := [*model.parameters(), *model.buffers()])):
            module_maps(
                model, torch.zeros(1, 1, *args.input_size, device=args.device)
            )  # gives them their shapes
            if any(map(is_lazy, tensors)):
                raise ScriptError(
                    f"{name} has lazy layers that no image reaches: train it with --dry-run to see why"
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
            print(
                format_report(name, analysis).encode("ascii", "backslashreplace").decode(),
                end="\n\n",
            )
    if args.json:
        print(
            json.dumps(
                {name: dataclasses.asdict(analysis) for name, analysis in analyses.items()},
                indent=2,
            )
        )
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

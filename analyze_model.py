"""Print a model's layers, operations, receptive fields and memory, measured on the running model.

    python analyze_model.py                                # Model5 on MNIST's 28x28 images
    python analyze_model.py --model all --batch-size 128   # every class, then a comparison
    python analyze_model.py --checkpoint model_checkpoints/best_mnist_model.pth --image fields.png

The whole model is probed from the pixels, too. If that differs from the table of receptive fields,
the exit status is 1. Options:

    --model NAME ...   classes in models.py, in upper or lower case, or all (default: Model5)
    --checkpoint FILE  in place of --model: the class that this file names, with its weights
    --input-size H W   pixels (default: 28 28)
    --batch-size N     images in a training step (default: 128 on a GPU, 64 on a CPU)
    --device NAME      cpu, cuda, mps, xpu, or auto: a GPU if there is one (default: auto)
    --json             print the same numbers as JSON, and nothing else
    --image FILE       draw receptive fields and feature maps into this PNG file; needs matplotlib
    --digit N          the test image that it shows (default: 0)
    --data-dir FOLDER  where --image looks for MNIST/raw (default: data)
    -h, --help         print this
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import re
import sys
import warnings
from collections import Counter, defaultdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from analysis.layer_costs import CostRun, Layer, copy_model, hooks
from analysis.receptive_fields import FieldRun, check_fields
from checkpoints import load_checkpoint
from mnist_data import IMAGE_SIDE, default_batch_size, load_mnist
from model_check import is_out_of_memory
from models import build_model, find_model_name, model_classes
from pictures import draw_receptive_fields, require_matplotlib
from utils import ScriptError, describe_error, device_type, number_type, path_type, run_script

# The attributes of a layer that the table shows, and what they are
LAYER_COLUMNS = {
    "type": "class of the layer; x3 at the end of a line: three calls like this one",
    "output": "shape for one image",
    "weight": "parameters other than biases",
    "bias": "parameters with bias in their names",
    "parameters": "weight and bias; those that several layers share count for the first",
    "share": "of the model's parameters",
    "buffers": "numbers that are stored but not trained",
    "MACs": "multiply-accumulates of matrix products, per image; ? if not counted by torch",
    "kept": "bytes kept for the backward pass of a batch; shared ones count for the first",
}
SUMMED = [*LAYER_COLUMNS][2:]  # those of numbers, which have totals

# The keys of a row, several in one text, and what they are
FIELD_COLUMNS = {
    "k s p d": "kernel, stride, padding, dilation; - where branches meet",
    "n_in n_out": "feature-map size",
    "j_in j_out": (
        "jump: the cumulative stride, in input pixels; 0 where every unit sees the same pixels"
    ),
    "r_in r_out": "receptive field of one unit before and after the layer, in input pixels",
    "P_in P_out": (
        "accumulated padding: pixels by which the first unit's receptive field passes the image's "
        "edge"
    ),
    "RF": "receptive field after the layer, height x width",
}
FIELD_KEYS = " ".join(FIELD_COLUMNS).split()

SAMPLED = """\
Of maps with more than 30 rows or columns, the first, middle and last 10 were probed; \
of large ones, 4."""


@dataclasses.dataclass
class Analysis:
    """What `analyze` finds."""

    architecture: str
    input_size: tuple[int, int]
    batch_size: int
    device: str
    layers: list[Layer]
    totals: dict[str, int | None]
    memory: dict[str, dict[str, int]]  # bytes of each part, in training and in inference
    failure: str | None  # why forward or backward fails; the layers then end where it failed
    check: str  # the verdict of the self-check and what it found

    @property
    def problem(self) -> str | None:
        """What is wrong, in words."""
        return self.check if self.check.startswith("FAILED") else self.failure


def analyze(model: nn.Module, input_size: tuple[int, int], batch_size: int) -> Analysis:
    """Analyze a model on grey images (batch_size, 1, *input_size) on the model's device.

    The model stays as it is. One that fails on the images is no error: then `failure` says why.
    """
    device = next(iter(model.state_dict().values()), torch.zeros(())).device
    model = copy_model(model)
    model.train()
    check = "skipped: training fails"
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)  # the same noise every time
        costs = CostRun(model, torch.rand(batch_size, 1, *input_size, device=device))
        layers = costs.layers
        if not costs.failure:
            model.cpu().eval()
            with torch.no_grad():
                fields = FieldRun(model, input_size)
                layers = join_layers(costs.layers, fields.layers)
                check = check_fields(fields)

    totals = count_parameters(model, layers)
    memory = add_up_memory(model, costs, totals["kept"])
    return Analysis(
        str(model),
        input_size,
        batch_size,
        str(device),
        layers,
        totals,
        memory,
        costs.failure,
        check,
    )


def join_layers(costs: list[Layer], layers: list[Layer]) -> list[Layer]:
    """Return the layers that evaluation calls, with their costs, then those that it does not."""
    rest = list(costs)
    for layer in layers:
        cost = next((cost for cost in rest if cost.name == layer.name), None)
        if cost:
            layer.MACs, layer.kept = cost.MACs, cost.kept
            rest.remove(cost)
    return layers + rest


def count_parameters(model: nn.Module, layers: list[Layer]) -> dict[str, int | None]:
    """Enter parameters and buffers at the first layer that has them; return the totals."""
    modules = {name or type(model).__name__: module for name, module in model.named_modules()}
    parameters = [*nn.Module.parameters(model)]
    total = sum(each.numel() for each in parameters)
    uses = Counter()
    for layer in layers:
        module = modules.get(layer.name, nn.Module())  # an empty one for a function
        for name, parameter in module.named_parameters(recurse=False):
            uses[parameter] += 1
            if uses[parameter] > 1:
                continue
            layer.parameters += parameter.numel()
            if "bias" in name:
                layer.bias += parameter.numel()
        for buffer in module.buffers(recurse=False):
            uses[buffer] += 1
            if uses[buffer] == 1:
                layer.buffers += buffer.numel()
        layer.weight = layer.parameters - layer.bias
        layer.share = 100 * layer.parameters / max(total, 1)

    totals = {}
    for column in SUMMED:
        numbers = [getattr(layer, column) for layer in layers]
        totals[column] = None if None in numbers else sum(numbers)
    trainable = sum(each.numel() for each in parameters if each.requires_grad)
    shared = sum(each.numel() for each in parameters if uses[each] > 1)
    return totals | {"trainable": trainable, "frozen": total - trainable, "shared": shared}


def add_up_memory(model: nn.Module, costs: CostRun, kept: int) -> dict[str, dict[str, int]]:
    """Return the bytes that a training step with SGD and momentum takes, and inference.

    `kept` are those that the layers keep for the backward pass.
    """
    tensors = [*nn.Module.parameters(model)]
    trained = [tensor for tensor in tensors if tensor.requires_grad]
    parameters, trainable, buffers = (
        sum(tensor.numel() * tensor.element_size() for tensor in part)
        for part in (tensors, trained, model.buffers())
    )
    inference = {
        "parameters": parameters,
        "buffers": buffers,
        "images": 4 * costs.images.numel(),
        "activations": costs.at_work,
    }
    training = inference | {
        "activations": kept,
        "gradients": trainable,
        "momentum": trainable,
        "labels": 8 * len(costs.images),
    }
    for parts in training, inference:
        parts["sum"] = sum(parts.values())
    return {"training": training, "inference": inference}


# The report


def format_table(rows: list[tuple], names: int = 2) -> str:
    """Align the first columns, which are names, to the left and the others to the right.

    Equal rows become one, with their number behind it.
    """
    counts = Counter(rows)
    columns = []
    for index, column in enumerate(zip(*counts, strict=True)):
        cells = [format_cell(value) for value in column]
        align = "<" if index < names else ">"
        width = max(map(len, cells))
        columns.append([f"{cell:{align}{width}}" for cell in cells])
    columns.append([f"x{count}" if count > 1 else "" for count in counts.values()])
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))


def format_cell(value: object) -> str:
    """Return a number or a text as it is printed: nothing for 0, ? for None."""
    if value is None:
        return "?"
    if isinstance(value, str):
        return value
    number = f"{value:,}" if isinstance(value, int) else f"{value:.2f} %"
    return number if value else ""


def format_report(title: str, analysis: Analysis) -> str:
    """Return the sections as text."""
    height, width = analysis.input_size
    images = f"{height}x{width} images in batches of {analysis.batch_size}"
    lines = [title, "\nArchitecture", analysis.architecture]
    lines += [f"\nLayers, for {images} on {analysis.device}", *format_layers(analysis)]
    if analysis.failure:
        return "\n".join(lines)
    lines += ["\nReceptive fields", *format_fields(analysis)]

    lines.append(
        "\nMemory of a training step (SGD with momentum; activations kept for the backward pass)\n"
        "and of inference (activations: input and output of the largest call), in bytes"
    )
    training, inference = analysis.memory.values()
    memory = [(part, size, inference.get(part, 0)) for part, size in training.items()]
    lines.append(format_table([("part", *analysis.memory), *memory], names=1))
    lines += ["\nSelf-check", analysis.check]
    return "\n".join(lines)


def format_layers(analysis: Analysis) -> list[str]:
    """Return the tree of layers with its legend."""
    rows = [("layer", *LAYER_COLUMNS)]
    for layer in analysis.layers:
        cells = [getattr(layer, column) for column in LAYER_COLUMNS]
        rows.append(("  " * layer.depth + layer.name, *cells))
    if not analysis.failure:
        totals = [analysis.totals[column] for column in SUMMED]
        rows.append(("total", "", "", *totals))
    trained = "trainable {trainable:,}, frozen {frozen:,}, shared by several layers {shared:,}"
    legend = format_table(list(LAYER_COLUMNS.items()))
    return [format_table(rows), trained.format(**analysis.totals), legend]


def format_fields(analysis: Analysis) -> list[str]:
    """Return the table of receptive fields with its legend, and why some are not known."""
    reasons = defaultdict(list)
    for layer in analysis.layers:
        if layer.unknown:
            reasons[layer.unknown].append(layer.name)
    legend = list(FIELD_COLUMNS.items())
    for reason, names in reasons.items():
        legend.append(("?", f"{reason}: {', '.join(dict.fromkeys(names))}"))
    rows = [("layer", "type", *FIELD_KEYS), *field_rows(analysis)]
    lines = [format_table(rows), format_table(legend)]
    if max(analysis.input_size) > 30:
        lines.append(SAMPLED)
    return [*lines, "Calls that were not seen to change any of these are left out."]


def field_rows(analysis: Analysis) -> list[tuple]:
    """Return the rows of the table of receptive fields, with ? where one is not known."""
    rows = []
    for layer in analysis.layers:
        cells = [format_field(field) for field in layer.fields]
        if layer.unknown:
            cells.append("?" * len(FIELD_KEYS))
        rows += [(layer.name, layer.type, *each) for each in cells]
    return rows


def format_field(field: dict[str, dict[str, int | None]]) -> list[str]:
    """Return the cells of a row: 3, or 3x5 if height and width differ. The last is always 5x5."""
    height, width = field.values()
    cells = []
    for pair in zip(height.values(), width.values(), strict=True):
        h, w = ("-" if n is None else str(n) for n in pair)
        cells.append(h if h == w else f"{h}x{w}")
    return [*cells, f"{height['r_out']}x{width['r_out']}"]


def format_comparison(analyses: dict[str, Analysis]) -> str:
    """Return a table with one line a model."""
    rows = [("model", "check", "RF", "parameters", "MACs", "training bytes", "inference bytes")]
    for name, analysis in analyses.items():
        # The size in the last row of the receptive fields, if there is one
        *_, size = "?", *(row[-1] for row in field_rows(analysis))
        check = analysis.check.split(":")[0]
        counts = analysis.totals["parameters"], analysis.totals["MACs"]
        memory = [parts["sum"] for parts in analysis.memory.values()]
        rows.append((name, check, size, *counts, *memory))
    return f"Comparison\n{format_table(rows)}"


# The picture


def centre_fields(analysis: Analysis) -> dict[str, dict[str, int]]:
    """Return the pixels that the centre unit sees after each block.

    Some may lie beyond the edge of the image.
    """
    blocks = {}
    for layer in analysis.layers:
        if layer.depth <= 1:
            block = layer.name
        for field in layer.fields:
            top, left = (row["n_out"] // 2 * row["j_out"] - row["P_out"] for row in field.values())
            height, width = (row["r_out"] for row in field.values())
            blocks[block] = {"top": top, "left": left, "height": height, "width": width}
    return blocks


@torch.no_grad()
def module_maps(model: nn.Module, image: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what each module makes of an image (1, 1, H, W).

    These are feature maps (C, h, w), or numbers as (C, 1, 1). If the model fails, those so far.
    """
    maps = {}

    def leave(name, module, args, kwargs, output):
        if isinstance(output, torch.Tensor) and output.dim() in (2, 4):
            size = output.shape[2:] or (1, 1)
            maps[name] = output[0].reshape(-1, *size).cpu().clone()

    # The report tells what fails
    with contextlib.suppress(Exception), hooks(model.eval(), lambda *_: None, leave):
        model(image)
    return maps


# The script


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS)
    parser.format_help = lambda: __doc__
    add = parser.add_argument
    count = number_type(int, 1, 10**9)
    models = parser.add_mutually_exclusive_group()
    models.add_argument("--model", nargs="+", type=find_model_name)
    models.add_argument("--checkpoint", type=path_type)
    add("--input-size", default=[IMAGE_SIDE, IMAGE_SIDE], type=count, nargs=2)
    add("--batch-size", type=count)
    add("--device", default="auto", type=device_type)
    add("--json", action="store_true")
    add("--image", type=path_type)
    add("--digit", default=0, type=number_type(int, 0, 10000))
    add("--data-dir", default="data", type=path_type)
    args = parser.parse_args()
    args.batch_size = args.batch_size or default_batch_size(args.device)
    if math.prod(args.input_size) > 2**18:
        parser.error("--input-size is more than 512x512 pixels: choose fewer, the windows stay")
    if "all" in (args.model or ()):
        args.model = list(model_classes())
    return args


def limit_memory() -> None:
    """Make allocations beyond the free memory fail; otherwise Linux kills the process."""
    with contextlib.suppress(ImportError, OSError):  # another system
        import resource

        text = Path("/proc/meminfo").read_text() + Path("/proc/self/status").read_text()
        kibibytes = dict(re.findall(r"(\w+):\s+(\d+)", text))
        limit = 1024 * (int(kibibytes["MemAvailable"]) + int(kibibytes["VmData"]))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def prepare_model(name: str, args: argparse.Namespace, checkpoint: dict) -> nn.Module:
    """Return a new model on the device, with the checkpoint's weights; raise ScriptError."""
    model = build_model(name).to(args.device)
    if any(map(is_lazy, nn.Module.parameters(model))):
        # A first image gives lazy layers their shapes
        module_maps(model, torch.zeros(1, 1, *args.input_size, device=args.device))
        if any(map(is_lazy, nn.Module.parameters(model))):
            raise ScriptError(
                f"{name} has lazy layers that no image reaches: train it with --dry-run to see why"
            )
    if checkpoint:
        model.load_state_dict(checkpoint["model_state_dict"])
    return model


def main() -> None:
    """Analyze model after model, and print and draw what was found."""
    args = parse_args()
    # What a model warns of, once and without the line that it comes from
    warnings.simplefilter("once")
    warnings.showwarning = lambda message, *_: print(f"Warning: {message}", file=sys.stderr)
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # what a class compiles runs as it is
    if args.device.type == "cpu":
        limit_memory()
    checkpoint = load_checkpoint(args.checkpoint) if args.checkpoint else {}
    names = args.model or [checkpoint.get("model_name", "Model5")]
    if args.image:
        if len(names) > 1:
            raise ScriptError(f"{args.image} is to show one model: give --model one name")
        require_matplotlib(args.image)
        images, _ = load_mnist(args.data_dir, train=False, device=args.device)
        digit = nn.functional.interpolate(images[None, args.digit], args.input_size)

    analyses = {}
    problems = []
    for name in names:
        try:
            # A model may print each time it runs
            with contextlib.redirect_stdout(io.StringIO()):
                model = prepare_model(name, args, checkpoint)
                analysis = analyze(model, tuple(args.input_size), args.batch_size)
                if args.image:
                    maps = module_maps(model, digit)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = describe_error(error)
            raise ScriptError(f"{name}: {reason}; try a smaller --batch-size") from error
        analyses[name] = analysis
        if analysis.problem:
            problems.append(f"{name}: {analysis.problem}")
        if not args.json:
            title = f"{name} after epoch {checkpoint['epoch']}" if checkpoint else name
            print(format_report(title, analysis), end="\n\n")

    if args.json:
        print(json.dumps(analyses, indent=2, default=vars))
    elif len(analyses) > 1:
        print(format_comparison(analyses))

    if args.image and (blocks := centre_fields(analysis)):
        draw_receptive_fields(args.image, digit, blocks, maps)
    elif args.image:
        problems.append(f"{args.image} is not drawn because no receptive field is known")
    if problems:
        raise ScriptError("; ".join(problems))


if __name__ == "__main__":
    run_script(main)

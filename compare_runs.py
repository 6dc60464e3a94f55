"""Compare training runs: which model or recipe is better, and is the difference luck?

    python compare_runs.py                       # all runs in model_checkpoints and below
    python compare_runs.py --plot compare.png    # draw the test errors, too (needs matplotlib)

Runs that differ in the seed alone are one line of the table, which goes on with the best epoch, the
difference to the first line and its standard error, and seconds:

    model     parameters  options that differ                          seeds  epochs  last epoch
    Model5         8,018  augment, lr 0.2, onecyclelr, weight_decay …  1-5        20  99.47 ± 0.05
    Model5         8,018  lr 0.2, onecyclelr, weight_decay 0.0001      1-5         5  99.30 ± 0.06
    Model5         8,018  constant, lr 0.01                            1-5        20  99.21 ± 0.13

Options:

    FOLDER ...   where to look for runs, also below (default: model_checkpoints)
    --plot FILE  draw the test error by epoch into this PNG file; needs matplotlib
    --json       print the same numbers, and those of each run, for a program
    -h, --help   print this
"""

import json
import math
import re
import sys
import textwrap
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path
from statistics import mean, stdev

from checkpoints import describe_change, find_newest_checkpoint
from models import build_model
from pictures import draw_comparison, require_matplotlib
from utils import ScriptError, path_type, printable, run_script

LEGEND = """

seeds       of the runs, which differ in the seed alone: the first and the last
epochs      10/20 if a run has finished 10 of 20
last epoch  test accuracy in per cent, mean ± sample standard deviation over the runs
validation  the same for held-out images; if every line has it, it is what is compared
best epoch  test accuracy of the best epoch; too good, because it decided which epoch that is
difference  to the first line ± its standard error (Welch); less than three standard errors may be
            luck, and with only two or three runs in a line even more may be
s/epoch     seconds that the last epoch took"""

METRICS = "test_accuracy", "val_accuracy", "best_test_accuracy", "seconds"


def summarize(values: list[float]) -> list[float]:
    """Return mean, sample standard deviation and standard error of the mean.

    The latter two are NaN for a single value.
    """
    deviation = stdev(values) if len(values) > 1 else math.nan
    return [mean(values), deviation, deviation / len(values) ** 0.5]


def find_difference(second: list[float], first: list[float]) -> list[float]:
    """Return the difference of the means of two summaries, and its standard error.

    The standard error allows for unequal variances: B. L. Welch, "The generalization of 'Student's'
    problem when several different population variances are involved", Biometrika 34, 1947.
    """
    return [second[0] - first[0], math.hypot(second[2], first[2])]


def main() -> None:
    parser = ArgumentParser(usage=SUPPRESS)
    parser.format_help = lambda: __doc__
    parser.add_argument("folders", nargs="*", default=[Path("model_checkpoints")], type=path_type)
    parser.add_argument("--plot", type=path_type)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.plot:
        require_matplotlib(args.plot)

    lines = find_runs(args.folders)
    shared = set.intersection(*({*line["options"]} for line in lines))
    for line in lines:
        line["options"] = sorted({*line["options"]} - shared)
        for metric in METRICS:
            values = [run[metric] for run in line["runs"].values()]
            line[metric] = None if None in values else summarize(values)
    decisive = "val_accuracy" if all(line["val_accuracy"] for line in lines) else "test_accuracy"
    lines.sort(key=lambda line: line[decisive], reverse=True)
    for line in lines[1:]:
        line["difference"] = find_difference(line[decisive], lines[0][decisive])

    if args.json:
        print(re.sub(r"NaN(?=,?\n)", "null", json.dumps(lines, indent=2)))  # JSON has no NaN
    else:
        print(format_table(lines))
    if args.plot:
        draw_comparison(args.plot, lines)


def find_runs(folders: list[Path]) -> list[dict]:
    """Return the lines of the table with their runs in these folders and below.

    Says which runs are left out, and why. Raises ScriptError if there is no run.
    """
    lines = {}
    paths = [path for each in folders for path in each.rglob("*mnist_model*.pth")]
    for folder in sorted({path.parent for path in paths}):
        try:
            add_run(lines, folder)
        except Exception as error:  # a file that is no checkpoint can fail anywhere
            print(printable(f"Skipping {folder}: {error}"), file=sys.stderr)
    if not lines:
        raise ScriptError(
            f"there is no run in {', '.join(map(str, folders))}; "
            "first train a model: python train_test_mnist.py"
        )
    return list(lines.values())


def add_run(lines: dict, folder: Path) -> None:
    """Add the run in a folder to the line of its model and options, which may be a new one.

    The newest intact checkpoint tells of the run. Numbers that the model stores but does not train
    count as parameters, except for batch norm's. Raises an exception if there is no checkpoint, if
    it holds something else, if its class has gone, or if another run has the same seed.
    """
    _, checkpoint = find_newest_checkpoint(folder, any_class=True)
    options = checkpoint["options"]
    model, seed, epochs = (options.pop(key) for key in ("model", "seed", "epochs"))
    architecture = checkpoint["architecture"]
    options["class changed:"] = describe_change(architecture, str(build_model(model)))
    line = {
        "model": model,
        "architecture": architecture,
        "parameters": sum(
            tensor.numel()
            for name, tensor in checkpoint["model_state_dict"].items()
            if not name.endswith(("running_mean", "running_var", "_tracked", "_extra_state"))
        ),
        "options": [
            f"{name} {value}".removeprefix("lr_scheduler ").removesuffix(" True")
            for name, value in options.items()
            if value
        ],
        "epochs": f"{checkpoint['epoch']}/{epochs}".removesuffix(f"/{checkpoint['epoch']}"),
        "runs": {},
    }
    runs = lines.setdefault(str(line), line)["runs"]
    if seed in runs:
        raise ScriptError(f"{runs[seed]['folder']} has the same options and seed")
    checkpoint["folder"] = str(folder)
    runs[seed] = {key: checkpoint[key] for key in ("folder", "history", *METRICS)}


def format_table(lines: list[dict]) -> str:
    """Return the table and its legend."""
    gap = 14 * any(line["val_accuracy"] for line in lines)
    rows = [
        f"{'model':8}  parameters  {'options that differ':43}  seeds  epochs  last epoch    "
        f"{'validation':{gap}.{gap}}best epoch    difference    s/epoch"
    ]
    for line in lines:
        options = textwrap.shorten(", ".join(line["options"]), 43, placeholder=" …")
        seeds = f"{min(line['runs'])}-{max(line['runs'])}".removesuffix(f"-{min(line['runs'])}")
        last, validation, best, difference = (
            f"{line[key][0]:.2f} ± {line[key][1]:.2f}".replace("nan", "?") if line.get(key) else ""
            for key in ("test_accuracy", "val_accuracy", "best_test_accuracy", "difference")
        )
        row = (
            f"{line['model']:8}  {line['parameters']:10,}  {options:43}  {seeds:5}"
            f"  {line['epochs']:>6}  {last:12}  {validation:{gap}}{best:12}  {difference:12}"
            f"  {line['seconds'][0]:7.1f}"
        )
        rows.append(printable(row))
    return "\n".join(rows) + LEGEND


if __name__ == "__main__":
    run_script(main)

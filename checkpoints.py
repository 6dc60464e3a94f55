"""What a training run leaves in its folder, and how the next run finds it.

1. After epoch X a run writes mnist_model_epoch_X.pth, always whole, and best_mnist_model.pth if X is its best so far.
2. A new run moves the files of an earlier one to earlier_run_N just before it writes its first, so nothing is
   overwritten.
3. A resumed run goes on in the folder of its checkpoint and ends with the files of a run that was never interrupted.
4. If it resumes from an older epoch, the files of the later epochs are moved to earlier_run_N first.
5. Every checkpoint holds the whole run so far; training_log.csv and training_curves.png are made from it.
"""

import contextlib
import csv
import io
import itertools
import math
import pickle
import re
import sys
import textwrap
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from models import build_model
from utils import ScriptError, write_file

BEST, LOG, CURVES = "best_mnist_model.pth", "training_log.csv", "training_curves.png"


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; raise ScriptError if that fails."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    write_file(path, buffer.getvalue())


def save_log(path: Path, history: list[dict]) -> None:
    """Write a line for each epoch of a run as CSV; raise ScriptError if that fails."""
    text = io.StringIO()
    table = csv.DictWriter(text, history[0], lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_file(path, text.getvalue().encode())


def load_checkpoint(path: Path, to_resume: bool = False) -> dict:
    """Return a checkpoint with its tensors on the CPU; raise ScriptError if it is damaged or does not fit its model.

    All content is held against the file's checksums; names, shapes and numbers must be what the model of that name
    needs, and with `to_resume` also what a run needs to go on. Nothing in the file is executed.
    """
    try:
        data = path.read_bytes()
        archive = zipfile.ZipFile(io.BytesIO(data))
        if archive.testzip() or any(part.external_attr & 0x10 for part in archive.infolist()):  # torch skips folders
            raise ValueError("it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.0 warns about what it does itself
            checkpoint = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        states = ["model_name", "model_state_dict", "optimizer_state_dict"]
        numbers = ["epoch", "train_accuracy", "test_accuracy", "best_test_accuracy"]
        if to_resume:
            states += ["history"]
            numbers += ["best_epoch", "epochs", "batch_size", "lr", "momentum", "seed"]
        missing = [key for key in states + numbers if key not in checkpoint]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
        if not all(math.isfinite(checkpoint[key]) for key in numbers):
            raise ValueError("a number in it is not finite")
        check_states(checkpoint)
    except Exception as error:  # a file that is no checkpoint can fail anywhere
        reason = getattr(error, "strerror", None) or textwrap.shorten(str(error), 200) or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors, numbers and text"
        raise ScriptError(f"{path} is not an intact checkpoint: {reason}; name another file") from error
    return checkpoint


def check_states(checkpoint: dict) -> None:
    """Raise an exception unless the states fit the model that the checkpoint names and are finite."""
    model = build_model(checkpoint["model_name"])
    model.load_state_dict(checkpoint["model_state_dict"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    momenta = [(p, m) for p, state in optimizer.state.items() for m in state.values() if isinstance(m, Tensor)]
    if any(momentum.shape != parameter.shape for parameter, momentum in momenta):
        raise ValueError("its optimizer is another model's")
    tensors = [*model.state_dict().values(), *(momentum for _, momentum in momenta)]
    if not all(tensor.isfinite().all() for tensor in tensors):
        raise ValueError("a weight or a momentum in it is not finite")


def epoch_files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of single epochs in a folder, oldest first."""
    matches = [re.fullmatch(r"mnist_model_epoch_([1-9][0-9]*)\.pth", path.name) for path in folder.glob("*.pth")]
    epochs = sorted(int(match[1]) for match in matches if match)
    return {epoch: folder / f"mnist_model_epoch_{epoch}.pth" for epoch in epochs}


def find_newest_checkpoint(folder: Path) -> tuple[Path, dict]:
    """Return path and content of the folder's newest intact checkpoint, and name newer damaged ones.

    Raises ScriptError if no checkpoint is intact.
    """
    damaged = []
    for path in [*reversed(epoch_files(folder).values()), *folder.glob(BEST)]:
        try:
            checkpoint = load_checkpoint(path, to_resume=True)
        except ScriptError as error:
            damaged.append(str(error))
        else:
            if damaged:
                print(f"Skipping damaged checkpoints: {'; '.join(damaged)}. Resuming from {path}", file=sys.stderr)
            return path, checkpoint
    reasons = "; ".join(damaged) or "there is no checkpoint"
    raise ScriptError(f"cannot resume in {folder}: {reasons}. Leave out --resume to start anew")


def prepare_new_run(folder: Path) -> None:
    """Move the files of an earlier run out of the way."""
    others = [path for name in (BEST, LOG, CURVES) for path in folder.glob(name)]
    set_aside(folder, [*epoch_files(folder).values(), *others])


def prepare_to_resume(folder: Path, checkpoint: dict) -> None:
    """Move the files of later epochs out of the way, and see that the best of the others and the log are there."""
    best, best_epoch = folder / BEST, 0
    with contextlib.suppress(ScriptError):  # missing or damaged
        best_epoch = load_checkpoint(best)["epoch"]
    later = [path for epoch, path in epoch_files(folder).items() if epoch > checkpoint["epoch"]]
    later += [best] if best_epoch > checkpoint["epoch"] else []
    if later:
        set_aside(folder, [*later, *folder.glob(LOG), *folder.glob(CURVES)])
    if best_epoch != checkpoint["best_epoch"]:
        with contextlib.suppress(ScriptError):
            save_checkpoint(best, load_checkpoint(folder / f"mnist_model_epoch_{checkpoint['best_epoch']}.pth"))
    save_log(folder / LOG, checkpoint["history"])


def set_aside(folder: Path, paths: list[Path]) -> None:
    """Move files to folder/earlier_run_N, the first of that name that is free."""
    if paths:
        target = next(path for n in itertools.count(1) if not (path := folder / f"earlier_run_{n}").exists())
        target.mkdir()
        for path in paths:
            path.rename(target / path.name)
        print(f"Moved {len(paths)} files of an earlier run to {target}")

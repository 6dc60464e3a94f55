"""What a training run leaves in its folder, and how the next run finds it.

1. The folder is locked during a run. Files that no run has written are left alone.
2. After epoch X the run writes mnist_model_epoch_X.pth, always whole, and best_mnist_model.pth if
   X is its best epoch so far.
3. Just before its first file, it moves the files of an earlier run to earlier_run_N, so that
   nothing is overwritten.
4. A resumed run goes on in the folder of its checkpoint. It moves the files of later epochs to
   earlier_run_N first, and ends with the files of a run that was never interrupted.
5. Every checkpoint holds the whole run so far; training_log.csv and training_curves.png are made
   from it.
"""

import contextlib
import csv
import io
import pickle
import re
import sys
import textwrap
import warnings
import zipfile
from itertools import zip_longest
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch.optim import SGD, Optimizer

import pictures
from models import build_model
from utils import ScriptError, describe_error, write_file

BEST = "best_mnist_model.pth"
LOG = "training_log.csv"
CURVES = "training_curves.png"
ZIP_FOLDER = 0x10  # marks an entry of a zip file as a folder, whose content torch ignores


def save_epoch(
    folder: Path,
    model: torch.nn.Module,
    optimizer: Optimizer,
    history: list[dict],
    options: dict,
    plot: bool,
) -> None:
    """Write all files of the last epoch in the history.

    Raises ScriptError if a checkpoint cannot be written. A log or a picture that fails ends no run.
    """
    row, best = history[-1], best_row(history)
    checkpoint = {
        "model_name": options["model"],
        "architecture": str(model),
        "model_state_dict": model.state_dict(),
        "optimizer_state_dict": optimizer.state_dict(),
        **row,
        "best_epoch": best["epoch"],
        "best_test_accuracy": best["test_accuracy"],
        "history": history,
        "options": options,
    }
    if row["epoch"] == 1:
        set_aside(folder)
    save_checkpoint(epoch_path(folder, row["epoch"]), checkpoint)
    if best is row:
        save_checkpoint(folder / BEST, checkpoint)
    try:
        save_log(folder, history)
        if plot:
            pictures.draw_curves(folder / CURVES, history, options["model"])
    except Exception as error:
        print(f"Warning: {error}", file=sys.stderr)


def best_row(history: list[dict]) -> dict:
    """Return the best epoch of a run by its validation accuracy or, without one, test accuracy."""
    decisive = "test_accuracy" if history[0]["val_accuracy"] is None else "val_accuracy"
    return max(history, key=lambda row: row[decisive])  # the first of equals


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; raise ScriptError if it could not be read again."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data = buffer.getvalue()
    try:
        unpack(data)
    except ValueError as error:
        raise ScriptError(f"cannot save {path}: {error}; see get_extra_state") from error
    write_file(path, data)


def save_log(folder: Path, history: list[dict]) -> None:
    """Write a line for each epoch of a run as CSV; raise ScriptError if that fails."""
    text = io.StringIO()
    table = csv.DictWriter(text, history[0], lineterminator="\n")
    table.writeheader()
    table.writerows(history)
    write_file(folder / LOG, text.getvalue().encode())


def load_checkpoint(path: Path, to_resume: bool = False, any_class: bool = False) -> dict:
    """Return a checkpoint with its tensors on the CPU; nothing in the file is executed.

    Its weights fit the model of its name and are finite; with `to_resume`, it also holds what a run
    needs to go on. Raises ScriptError if that is not so, or if the file is damaged, and
    ChangedModelError if it is not so because the class has changed. With `any_class`, the weights
    are not looked at.
    """
    try:
        data = path.read_bytes()
        archive = zipfile.ZipFile(io.BytesIO(data))
        if archive.testzip() or any(each.external_attr & ZIP_FOLDER for each in archive.infolist()):
            raise ValueError("it is damaged")
        checkpoint = unpack(data)
        if epoch_in(path) not in (0, checkpoint.get("epoch")):
            raise ValueError(f"it holds epoch {checkpoint.get('epoch')}")
        needed = ["model_name", "model_state_dict", "epoch"]
        if to_resume:
            needed += ["optimizer_state_dict", "best_epoch", "history", "options"]
        missing = [key for key in needed if key not in checkpoint]
        if missing:
            raise ScriptError(
                f"{path} has no {', '.join(missing)}: "
                "another program or an older version has saved it; name another"
            )
        if not any_class:
            check_states(path, checkpoint, to_resume)
    except ScriptError:
        raise
    except Exception as error:  # a file that is no checkpoint can fail anywhere
        raise ScriptError(
            f"{path} is not an intact checkpoint: {describe_error(error)}; name another"
        ) from error
    return checkpoint


def unpack(data: bytes) -> dict:
    """Return what torch.save has written, on the CPU; raise ValueError if it is not plain data."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about what it does itself
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError("it holds more than tensors, numbers and text") from error


class ChangedModelError(ScriptError):
    """A checkpoint does not fit the class that it names, because the class has changed."""


def check_states(path: Path, checkpoint: dict, to_resume: bool) -> None:
    """Raise an exception unless the weights fit the class and are finite.

    With `to_resume`, the same goes for the optimizer's state.
    """
    name = checkpoint["model_name"]
    change = ""
    try:
        model = build_model(name)
        now = str(model)
        change = describe_change(checkpoint.get("architecture", now), now)
        model.load_state_dict(checkpoint["model_state_dict"])
        if to_resume:
            optimizer = SGD(model.parameters(), lr=0.01)
            optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    except (ScriptError, RuntimeError, ValueError) as error:
        key = next(iter(checkpoint["model_state_dict"]), "")
        if key.startswith(("module.", "_orig_mod.")):
            raise ScriptError(
                f"{path} holds {key} and the like: save the model without its wrapper"
            ) from error
        reason = f"{name}, but {change or textwrap.shorten(str(error), 300)}"
        remedy = "restore the class, or give the changed one a new name, or start anew"
        raise ChangedModelError(f"{path} was trained with {reason}; {remedy}") from error
    if change and to_resume:
        print(f"Warning: {name} has changed since this run was started: {change}", file=sys.stderr)
    tensors = [each for each in model.parameters() if each.requires_grad]  # a mask may be infinite
    if to_resume:
        for parameter, state in optimizer.state.items():
            for momentum in filter(torch.is_tensor, state.values()):
                if momentum.shape != parameter.shape:
                    raise ValueError("its optimizer is another model's")
                tensors.append(momentum)
    if not all(tensor.to_dense().isfinite().all() for tensor in tensors):
        raise ValueError("a weight or a momentum in it is not finite")


def describe_change(before: str, now: str) -> str:
    """Return the first layer that differs between two models, given as str(model), or ""."""
    find_layers = re.compile(r"\(.+\): .+").findall  # name, type and arguments of each
    for old, new in zip_longest(find_layers(before), find_layers(now), fillvalue="nothing"):
        if old != new and "Lazy" not in new:  # a lazy layer changes its name when it is first run
            return f"{old} is now {new}"
    return ""


def load_weights(path: Path, model_name: str) -> dict:
    """Return the weights in a checkpoint; raise ScriptError if they are another model's."""
    checkpoint = load_checkpoint(path)
    if checkpoint["model_name"] != model_name:
        raise ScriptError(f"{path} holds weights of {checkpoint['model_name']}: use that --model")
    return checkpoint["model_state_dict"]


def epoch_path(folder: Path, epoch: int) -> Path:
    return folder / f"mnist_model_epoch_{epoch}.pth"


def epoch_in(path: Path) -> int:
    """Return the number in the name of an epoch's checkpoint, 0 for other names."""
    match = re.fullmatch(r"mnist_model_epoch_([1-9][0-9]*)\.pth", path.name)
    return int(match[1]) if match else 0


def epoch_files(folder: Path, after: int = 0) -> list[Path]:
    """Return the checkpoints of the epochs after that one, the newest first."""
    paths = [path for path in folder.glob("*.pth") if epoch_in(path) > after]
    return sorted(paths, key=epoch_in, reverse=True)


def best_epoch_in(folder: Path) -> int:
    """Return the epoch of a folder's best checkpoint, 0 if it is missing or damaged."""
    try:
        return load_checkpoint(folder / BEST)["epoch"]
    except ScriptError:
        return 0


def find_newest_checkpoint(folder: Path, any_class: bool = False) -> tuple[Path, dict]:
    """Return path and content of the newest intact checkpoint, and say which newer ones are not.

    With `any_class`, the class may have changed. Raises ScriptError if no checkpoint is intact.
    """
    skipped = ""
    for path in [*epoch_files(folder), *folder.glob(BEST)]:
        try:
            checkpoint = load_checkpoint(path, to_resume=True, any_class=any_class)
        except ChangedModelError:  # the older files do not fit either
            raise
        except ScriptError as error:
            skipped += f"{error}. "
            continue
        if skipped:
            print(f"Skipping: {skipped}Using {path}", file=sys.stderr)
        return path, checkpoint
    raise ScriptError(f"{skipped or f'{folder}: there is no checkpoint. '}Start a new run")


@contextlib.contextmanager
def hold_folder(folder: Path):
    """Keep other runs out of a folder while this process lives, and clear what a killed one left.

    Raises ScriptError if another run is using it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with contextlib.suppress(NotImplementedError):  # the file system has no locks
            lock.acquire()
        for half_written in folder.glob(f"*.{'[0-9a-f]' * 32}.tmp"):
            half_written.unlink(missing_ok=True)
        yield
    except Timeout as error:
        raise ScriptError(f"another run is using {folder}; wait, or choose another") from error
    finally:
        lock.release()


def set_aside(folder: Path, after: int = 0) -> None:
    """Move the files of all epochs after that one to folder/earlier_run_N, the first free name.

    A move that was interrupted is finished.
    """
    paths = epoch_files(folder, after)
    if after == 0 or best_epoch_in(folder) > after:
        paths += folder.glob(BEST)
    if after == 0 or paths:
        paths += [*folder.glob(LOG), *folder.glob(CURVES)]
    moving = folder / "earlier_run_incomplete"
    if paths:
        moving.mkdir(exist_ok=True)
    for path in paths:
        path.rename(moving / path.name)
    if moving.exists():
        number = 1
        while (folder / f"earlier_run_{number}").exists():
            number += 1
        target = moving.rename(folder / f"earlier_run_{number}")
        print(f"Moved {len(list(target.iterdir()))} files of an earlier run to {target}")


def make_way(folder: Path, checkpoint: dict, epochs: int) -> None:
    """Prepare the folder to resume from a checkpoint and train up to that number of epochs.

    Files of later epochs are moved aside; best checkpoint and log are restored if needed.
    """
    done, best_epoch = checkpoint["epoch"], checkpoint["best_epoch"]
    if done < epochs:
        set_aside(folder, after=done)
    elif epoch_files(folder, after=done):
        return  # nothing will be trained, so the later epochs keep their files
    try:
        save_log(folder, checkpoint["history"])
        if best_epoch_in(folder) != best_epoch:
            save_checkpoint(folder / BEST, load_checkpoint(epoch_path(folder, best_epoch)))
    except ScriptError as error:
        print(f"Warning: {folder / BEST} is not the best epoch: {error}", file=sys.stderr)

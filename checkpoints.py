"""What a training run leaves in its folder, and how the next run finds it.

1. From start to end a run holds its folder, so that no other run writes there; what is not a run's stays as it is.
2. After epoch X it writes mnist_model_epoch_X.pth, always whole, and best_mnist_model.pth if X is its best so far.
3. Just before it writes the first it moves the files of an earlier run to earlier_run_N, so nothing is overwritten.
4. A resumed run goes on in the folder of its checkpoint, moves the files of later epochs to earlier_run_N first, and
   ends with the files of a run that was never interrupted.
5. Every checkpoint holds the whole run so far; training_log.csv and training_curves.png are made from it.
"""

import contextlib
import csv
import io
import itertools
import math
import os
import pickle
import re
import stat
import sys
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from model_check import ChangedModelError, check_states
from utils import ScriptError, write_file

NOT_PLAIN = "more than tensors, numbers and text"
BEST, LOG, CURVES = "best_mnist_model.pth", "training_log.csv", "training_curves.png"


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write a dict of tensors and plain values; raise ScriptError if that fails or if it cannot be read again."""
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    data = buffer.getvalue()
    try:
        unpack(data)
    except pickle.UnpicklingError as error:
        raise ScriptError(
            f"cannot save {path}: the model's state holds {NOT_PLAIN}; see get_extra_state"
        ) from error
    write_file(path, data)


def unpack(data: bytes) -> dict:
    """Return what torch.save has written, on the CPU; nothing in it is executed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.0 warns about what it does itself
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


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
        if archive.testzip() or any(
            part.external_attr & 0x10 for part in archive.infolist()
        ):  # torch skips folders
            raise ValueError("it is damaged")
        checkpoint = unpack(data)
        states = ["model_name", "model_state_dict", "optimizer_state_dict"]
        numbers = ["epoch", "train_accuracy", "test_accuracy", "best_test_accuracy"]
        if to_resume:
            states += ["history"]
            numbers += ["best_epoch", "epochs", "batch_size", "lr", "momentum", "seed"]
        missing = [key for key in states + numbers if key not in checkpoint]
        if missing:
            whose = "it is another program's and" if "model_name" in missing else "it"
            raise ValueError(f"{whose} has no {', '.join(missing)}")
        if not all(math.isfinite(checkpoint[key]) for key in numbers):
            raise ValueError("a number in it is not finite")
        if epoch_in(path) not in (None, checkpoint["epoch"]):
            raise ValueError(f"it holds epoch {checkpoint['epoch']}")
        check_states(checkpoint, to_resume)
    except ChangedModelError as error:
        raise ChangedModelError(f"{path} {error}") from error
    except Exception as error:  # a file that is no checkpoint can fail anywhere
        reason = (
            getattr(error, "strerror", None)
            or textwrap.shorten(str(error), 200)
            or type(error).__name__
        )
        if isinstance(error, pickle.UnpicklingError):
            reason = f"it holds {NOT_PLAIN}"
        raise ScriptError(
            f"{path} is not an intact checkpoint: {reason}; name another file"
        ) from error
    return checkpoint


def load_weights(path: Path, model_name: str) -> dict:
    """Return the weights in a checkpoint; raise ScriptError if it cannot be loaded, or if they are another model's."""
    checkpoint = load_checkpoint(path)
    if checkpoint["model_name"] != model_name:
        raise ScriptError(
            f"{path} holds weights of {checkpoint['model_name']}: use --model {checkpoint['model_name']}"
        )
    return checkpoint["model_state_dict"]


def epoch_in(path: Path) -> int | None:
    """Return the number in the name of an epoch's checkpoint, None for other names."""
    match = re.fullmatch(r"mnist_model_epoch_([1-9][0-9]*)\.pth", path.name)
    return int(match[1]) if match else None


def epoch_files(folder: Path) -> dict[int, Path]:
    """Return the checkpoints of single epochs in a folder, oldest first."""
    return dict(sorted((epoch, path) for path in folder.glob("*.pth") if (epoch := epoch_in(path))))


def files_of_runs(folder: Path) -> list[Path]:
    """Return all that runs have left in a folder, the newest epochs first."""
    others = [path for name in (BEST, LOG, CURVES) for path in folder.glob(name)]
    return [*reversed(epoch_files(folder).values()), *others]


def find_newest_checkpoint(folder: Path) -> tuple[Path, dict]:
    """Return path and content of the folder's newest intact checkpoint, and name newer damaged ones.

    Raises ScriptError if no checkpoint is intact.
    """
    damaged = []
    for path in [*reversed(epoch_files(folder).values()), *folder.glob(BEST)]:
        try:
            checkpoint = load_checkpoint(path, to_resume=True)
        except ChangedModelError:  # the older files do not fit either
            raise
        except ScriptError as error:
            damaged.append(str(error))
        else:
            if damaged:
                print(
                    f"Skipping damaged checkpoints: {'; '.join(damaged)}. Resuming from {path}",
                    file=sys.stderr,
                )
            return path, checkpoint
    reasons = "; ".join(damaged) or "there is no checkpoint"
    raise ScriptError(f"cannot resume in {folder}: {reasons}. Leave out --resume to start anew")


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder while this process lives; raise ScriptError if one is using it already."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        with contextlib.suppress(NotImplementedError):  # the file system has no locks
            lock.acquire()
    except Timeout as error:
        raise ScriptError(
            f"another run is using {folder}; wait for its end, or choose another folder"
        ) from error
    except OSError as error:
        raise ScriptError(
            f"cannot write to {folder}: {error.strerror}; choose another folder"
        ) from error
    try:
        user, status = getattr(os, "geteuid", int)(), folder.stat()
        only_owners_move = status.st_mode & stat.S_ISVTX and user not in (0, status.st_uid)
        if only_owners_move and any(path.lstat().st_uid != user for path in files_of_runs(folder)):
            raise ScriptError(
                f"{folder} holds another user's run, which cannot be moved; choose another folder"
            )
        yield
    finally:
        lock.release()


def prepare_to_resume(folder: Path, checkpoint: dict) -> None:
    """Move the files of later epochs out of the way, and see that the best of the others and the log are there."""
    best, best_epoch, done = folder / BEST, 0, checkpoint["epoch"]
    with contextlib.suppress(ScriptError):  # missing or damaged
        best_epoch = load_checkpoint(best)["epoch"]
    later = [
        path
        for epoch, path in [*reversed(epoch_files(folder).items()), (best_epoch, best)]
        if epoch > done
    ]
    set_aside(folder, [*later, *folder.glob(LOG), *folder.glob(CURVES)] if later else [])
    try:
        if best_epoch != checkpoint["best_epoch"]:
            save_checkpoint(
                best, load_checkpoint(folder / f"mnist_model_epoch_{checkpoint['best_epoch']}.pth")
            )
    except ScriptError as error:
        print(f"Warning: {best} does not hold the best epoch so far: {error}", file=sys.stderr)
    with contextlib.suppress(ScriptError):
        save_log(folder / LOG, checkpoint["history"])


def set_aside(folder: Path, paths: list[Path]) -> None:
    """Move files to folder/earlier_run_N, the first free name, and finish a move that was interrupted."""
    moving = folder / "earlier_run_incomplete"
    if paths:
        moving.mkdir(exist_ok=True)
    for path in paths:
        if path.is_symlink():  # a relative one would break
            (moving / path.name).unlink(missing_ok=True)
            (moving / path.name).symlink_to(path.resolve())
            path.unlink()
        else:
            path.rename(moving / path.name)
    if moving.exists():
        target = next(
            path for n in itertools.count(1) if not (path := folder / f"earlier_run_{n}").exists()
        )
        moving.rename(target)
        print(f"Moved {len(list(target.iterdir()))} files of an earlier run to {target}")

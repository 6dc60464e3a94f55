"""What every script needs: expected errors, files that are written whole, argument types."""

import contextlib
import math
import os
import signal
import sys
import uuid
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

import torch


class ScriptError(Exception):
    """An expected failure; the message is one line that says what happened and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Call main(); an expected failure ends in one line and status 1, Ctrl-C in status 130 and SIGTERM in 143."""

    def interrupt(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # the script is ending already
            signal.signal(each, lambda *_: None)  # Python complains if one is pending when SIG_IGN is set
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt as interrupted:
        print(f"{script}: interrupted; {getattr(interrupted, 'advice', 'run it again')}", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # if exiting takes long, a second Ctrl-C ends it at once
        sys.exit(128 + (interrupted.args or [signal.SIGINT])[0])
    except (ScriptError, OSError) as error:
        sys.exit(f"{script}: error: {error}")


def make_folder(path: Path) -> None:
    """Create the folder and its parents; raise ScriptError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScriptError(f"cannot create the folder {path}: {error.strerror}; choose another") from error


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which never holds half a file; raise ScriptError if that fails."""
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise ScriptError(f"cannot write {path}: {error.strerror}; make room there or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError), contextlib.ExitStack() as stack:  # not every system can open or sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        stack.callback(os.close, folder)
        os.fsync(folder)
    for left_over in path.parent.glob(f"{path.name}.{'[0-9a-f]' * 32}.tmp"):  # of a killed process
        with contextlib.suppress(OSError):  # another process may have removed it
            if path.stat().st_mtime - left_over.stat().st_mtime > 600:  # seconds; no write takes that long
                left_over.unlink()


def number_type(kind: type, low: float, below: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type that takes an int or float with low <= number < below."""
    noun = "whole number" if kind is int else "number"
    limit = "" if below == math.inf else f" and below {below}"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            if low <= (number := kind(text)) < below:
                return number
        raise ArgumentTypeError(f"{text!r} is not a {noun} of at least {low}{limit}")

    return parse


def device_type(name: str) -> torch.device:
    """Return the device of that name, for argparse; `auto` is the accelerator that torch offers, else the CPU."""
    if name == "auto":
        backends = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": getattr(torch, "xpu", None)}
        name = next((key for key, backend in backends.items() if backend and backend.is_available()), "cpu")
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise ArgumentTypeError(f"cannot use {name!r} ({str(error).splitlines()[0]}); use auto or cpu") from error
    return torch.device(name)


def default_batch_size(device: torch.device) -> int:
    """Return the recipe's batch size in images."""
    return 64 if device.type == "cpu" else 128

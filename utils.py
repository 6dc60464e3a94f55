"""What every script needs: expected errors, files that are written whole, argument types."""

import contextlib
import ctypes
import math
import os
import signal
import sys
import textwrap
import traceback
import uuid
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path


class ScriptError(Exception):
    """An expected failure; the message is one line that says what happened and what to do."""


def run_script(main: Callable[[], None]) -> None:
    """Call main(), and end in one line if it fails as expected or is interrupted.

    The exit status is 1 after a ScriptError or an OSError, 130 after Ctrl-C and 143 after SIGTERM.
    A KeyboardInterrupt's argument, if it has one, is printed as advice.
    """
    script = Path(sys.argv[0]).name
    received = signal.SIGINT

    def interrupt(number: int, frame: object) -> None:
        nonlocal received
        received = number
        for each in previous:  # a second one changes nothing: the script is ending already
            signal.signal(each, lambda *_: None)
        raise KeyboardInterrupt

    previous = {each: signal.signal(each, interrupt) for each in (signal.SIGINT, signal.SIGTERM)}
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # it is closed, or a notebook's
            stream.reconfigure(errors="backslashreplace")  # it may lack letters of a path
    try:
        main()
        print(end="", flush=True)
    except KeyboardInterrupt as error:
        advice = "".join(error.args) or "; run it again"
        print(f"{script}: interrupted{advice}", file=sys.stderr)
        sys.exit(128 + received)
    except BrokenPipeError:  # nobody reads the output any more
        os._exit(1)  # without Python's complaint about what it cannot write
    except ScriptError as error:
        sys.exit(f"{script}: error: {printable(str(error))}")
    except OSError as error:
        sys.exit(f"{script}: error: {error}; check it, or name another file or folder")
    finally:  # because an IPython session goes on after %run
        for each, handler in previous.items():
            signal.signal(each, handler)


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
        remedy = "see that its folder is there and has room"
        raise ScriptError(f"cannot write {path}: {error.strerror}; {remedy}") from error
    finally:
        temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system can open or sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def number_type(kind: type, low: float, below: float = math.inf) -> Callable[[str], float]:
    """Return an argparse type that takes an int or float with low <= number < below."""
    noun = "whole number" if kind is int else "number"

    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            number = kind(text)
            if low <= number < below:
                return number
        raise ArgumentTypeError(f"{text!r} is not a {noun} of at least {low} and below {below}")

    return parse


def path_type(text: str) -> Path:
    """Return a path for argparse; ~ is the user's home."""
    if not text:
        raise ArgumentTypeError("the path is empty; name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArgumentTypeError(f"'{text}': there is no such home; name another path") from error


def device_type(name: str):
    """Return the torch.device of that name, for argparse.

    `auto` is a GPU that torch can use, or the CPU if there is none.
    """
    import torch  # here because it takes seconds, and downloading needs no torch

    is_auto = name == "auto"
    if is_auto:
        gpus = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": getattr(torch, "xpu", None)}
        usable = [key for key, backend in gpus.items() if backend and backend.is_available()]
        name = [*usable, "cpu"][0]
    try:
        torch.zeros(1, device=name).item()
    except Exception as error:  # of a kind that depends on the device
        problem = f"cannot use {name!r} ({describe_error(error)})"
        if not is_auto:
            raise ArgumentTypeError(f"{problem}; use auto or cpu") from error
        print(f"Warning: {problem}; using the CPU", file=sys.stderr)
        name = "cpu"
    return torch.device(name)


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, because returning it costs a step some 2,000 page faults."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(threshold, 2**30)


def printable(text: str) -> str:
    """Return the text with control characters escaped, because a terminal obeys them."""
    return "".join(each if each.isprintable() else repr(each) for each in text)


def describe_error(error: BaseException) -> str:
    """Return the first line of an error's message, at most 200 characters of it.

    If the error comes from models.py, the line there is named first.
    """
    message = textwrap.shorten((str(error) or type(error).__name__).splitlines()[0], 200)
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno for frame in frames if Path(frame.filename).name == "models.py"]
    return f"models.py, line {numbers[-1]}: {message}" if numbers else message

"""What every script needs: expected errors, files that are written whole, argument types."""

import atexit
import contextlib
import ctypes
import errno
import io
import math
import os
import signal
import sys
import traceback
import uuid
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch


class ScriptError(Exception):
    """An expected failure; the message is one line that says what happened and what to do."""


class LastingStream:
    """A standard stream that drops its output once a write has failed, so that a closed pipe does not end a run."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or io.StringIO()  # it is None if the user has closed it
        self.failure: OSError | None = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(
                errors="backslashreplace"
            )  # its encoding may lack a letter of a path

    def write(self, text: str) -> int:
        """Write the text at once, or nothing from the first failure on."""
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError as error:
            self.failure = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)

    def __getattr__(self, name: str) -> object:
        """Return whatever else a stream has."""
        return getattr(self.stream, name)


def end_in_one_line() -> None:
    """Until run_script takes over, end in one line after Ctrl-C, SIGTERM or a syntax error in models.py."""
    script = Path(sys.argv[0]).name

    def end(number: int, frame: object) -> None:
        print(f"{script}: interrupted; run it again", file=sys.stderr, flush=True)
        os._exit(128 + number)

    def report(kind: type, error: BaseException, traceback: object) -> None:
        if isinstance(error, SyntaxError):
            print(
                f"{script}: error: {error.filename}, line {error.lineno}: {error.msg}; fix it",
                file=sys.stderr,
            )
        else:
            sys.__excepthook__(kind, error, traceback)

    sys.excepthook = report
    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def run_script(main: Callable[[], None]) -> None:
    """Call main(); an expected failure ends in one line and status 1, Ctrl-C in status 130 and SIGTERM in 143."""

    def interrupt(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # the script is ending already
            signal.signal(
                each, lambda *_: None
            )  # Python complains if one is pending when SIG_IGN is set
        raise KeyboardInterrupt(number)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    script, output, errors = (
        Path(sys.argv[0]).name,
        LastingStream(sys.stdout),
        LastingStream(sys.stderr),
    )
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            main()
        except KeyboardInterrupt as interrupted:
            print(
                f"{script}: interrupted; {getattr(interrupted, 'advice', 'run it again')}",
                file=sys.stderr,
            )
            sys.exit(128 + (interrupted.args or [signal.SIGINT])[0])
        except ScriptError as error:
            sys.exit(f"{script}: error: {error}")
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else error
            sys.exit(
                f"{script}: error: cannot use {reason}; check it, or name another file or folder"
            )
        finally:  # put Python's own handlers back because an IPython session goes on after %run
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            atexit.register(
                signal.signal, signal.SIGINT, signal.SIG_DFL
            )  # Ctrl-C ends a slow exit at once
    if output.failure and output.failure.errno not in (
        errno.EPIPE,
        errno.EIO,
    ):  # a closed pipe or terminal
        sys.exit(
            f"{script}: error: cannot write the standard output: {output.failure.strerror}; send it elsewhere"
        )


def make_folder(path: Path) -> None:
    """Create the folder and its parents; raise ScriptError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScriptError(
            f"cannot create the folder {path}: {error.strerror}; choose another"
        ) from error


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
        raise ScriptError(
            f"cannot write {path}: {error.strerror}; make room there or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with (
        contextlib.suppress(OSError),
        contextlib.ExitStack() as stack,
    ):  # not every system can open or sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        stack.callback(os.close, folder)
        os.fsync(folder)
    for left_over in path.parent.glob(f"{path.name}.{'[0-9a-f]' * 32}.tmp"):  # of a killed process
        with contextlib.suppress(OSError):  # another process may have removed it
            if (
                path.stat().st_mtime - left_over.stat().st_mtime > 600
            ):  # seconds; no write takes that long
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


def path_type(text: str) -> Path:
    """Return a path for argparse; ~ is the user's home."""
    if not text:
        raise ArgumentTypeError("the path is empty; name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ArgumentTypeError(
            f"there is no home folder for '{text}'; name another path"
        ) from error


def device_type(name: str) -> "torch.device":
    """Return the device of that name, for argparse; `auto` is an accelerator that torch can use, else the CPU."""
    import torch  # takes seconds, which the scripts' --help and early errors need not wait for

    if auto := (name == "auto"):
        backends = {
            "cuda": torch.cuda,
            "mps": torch.backends.mps,
            "xpu": getattr(torch, "xpu", None),
        }
        name = next(
            (key for key, backend in backends.items() if backend and backend.is_available()), "cpu"
        )
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        problem = f"cannot use {name!r} ({first_line(error)})"
        if not auto:
            raise ArgumentTypeError(f"{problem}; use auto or cpu") from error
        print(f"Warning: {problem}; using the CPU", file=sys.stderr)
        name = "cpu"
    return torch.device(name)


def default_batch_size(device: "torch.device") -> int:
    """Return the recipe's batch size in images."""
    return 64 if device.type == "cpu" else 128


def keep_freed_memory() -> None:
    """Let glibc's malloc keep freed memory: returning it to the system costs a step some 2,000 page faults."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another C library
        for threshold in (-1, -3):  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD, in bytes
            ctypes.CDLL(None).mallopt(threshold, 2**30)


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error) or type(error).__name__).splitlines()[0]


def describe_error(error: Exception) -> str:
    """Return the first line of an error's message, after the line of models.py that it comes from, if it does."""
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno for frame in frames if Path(frame.filename).name == "models.py"]
    return f"models.py, line {numbers[-1]}: {first_line(error)}" if numbers else first_line(error)

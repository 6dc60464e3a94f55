"""Files that are written whole, scripts that end in one line, and the argument types."""

import os
import shlex
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import ROOT, run
from pytest import raises

from utils import (
    ScriptError,
    describe_error,
    device_type,
    number_type,
    path_type,
    printable,
    run_script,
    write_file,
)

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("owner", "step", "number"), [(Path, "open", 13), (os, "fsync", 28), (Path, "replace", 28)]
)
def test_a_failed_write_changes_nothing(owner, step, number, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    failure = patch.object(owner, step, side_effect=OSError(number, "reason"))
    with failure, raises(ScriptError, match=r"^cannot write .*file: reason; see that its folder"):
        write_file(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    def record(number):
        target = Path(f"/proc/self/fd/{number}").readlink()
        events.append("folder" if target == tmp_path else target.read_bytes())

    events, replace, umask = [], Path.replace, os.umask(0o027)
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(
        Path, "replace", lambda path, to: events.append(path.name) or replace(path, to)
    )
    for data in (b"all of it", b"more"):
        write_file(tmp_path / "file", data)
    os.umask(umask)
    assert events == [b"all of it", events[1], "folder", b"more", events[4], "folder"]
    assert events[1] != events[4]  # two processes never write into one temporary file
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("step", "results"), [("fsync", [None, OSError]), ("open", OSError), ("fsync", [None, None])]
)
def test_a_folder_that_cannot_be_synced(step, results, tmp_path):
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with patch.object(os, step, side_effect=results):
        write_file(tmp_path / "a.pth", b"")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def receive(*numbers: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.raise_signal(number)  # to this thread; another one would not wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # all of them arrive now
    time.sleep(9)


INTERRUPTED = "script.py: interrupted; run it again\n"
ENDS = {
    "expected": (Mock(side_effect=ScriptError("no\x1b room")), "script.py: error: no'\\x1b' room"),
    "missing file": (
        Path("none").read_bytes,
        "script.py: error: [Errno 2] No such file or directory: 'none'; "
        "check it, or name another file or folder",
    ),
    "defect": (Mock(side_effect=ZeroDivisionError), ZeroDivisionError),  # keeps its traceback
    "interrupt": (Mock(side_effect=KeyboardInterrupt), 130),
    "advice": (Mock(side_effect=KeyboardInterrupt("; run it again")), 130),
    "SIGTERM": (partial(receive, TERM), 143),
    "twice": (partial(receive, INT, INT), 130),
    "both": (partial(receive, INT, TERM), 130),
}


@pytest.mark.parametrize(("main", "status"), ENDS.values(), ids=ENDS)
@pytest.mark.filterwarnings("error")  # also what Python prints without raising it
def test_how_a_script_ends(main, status, capsys):
    handlers = [signal.getsignal(each) for each in (INT, TERM)]
    with patch("sys.argv", ["some/script.py"]), raises((SystemExit, ZeroDivisionError)) as stop:
        run_script(main)
    assert getattr(stop.value, "code", stop.type) == status
    assert capsys.readouterr().err == (INTERRUPTED if isinstance(status, int) else "")
    assert [signal.getsignal(each) for each in (INT, TERM)] == handlers


PRINTING = """
import sys
from utils import run_script
def main():
    for number in range(9999):
        print("a letter that ASCII lacks: \u0440", file=sys.stderr if number == 1 else sys.stdout)
run_script(main)
"""


@pytest.mark.parametrize(
    ("redirection", "status", "error"),
    [
        ("> out", 0, "a letter that ASCII lacks: \\u0440\n"),
        ("2>&1 | head -c 1 > out", 1, ""),  # quietly
        (">&- 2>&-", 0, ""),
        ("2> out > /dev/full", 1, ""),
    ],
)
def test_streams_that_take_less(redirection, status, error, tmp_path):
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c '{PRINTING}' {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    bash = ["bash", "-c", command]
    result = subprocess.run(bash, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (status, error)
    assert "Traceback" not in "".join(path.read_text() for path in tmp_path.iterdir())


@pytest.mark.parametrize(("kind", "good", "bad"), [(int, "9", "1.5"), (float, "9.99", "0.99")])
def test_number_type(kind, good, bad):
    assert [number_type(kind, 1, 10)(text) for text in ("1", good)] == [kind("1"), kind(good)]
    for text in ("0", "10", "nan", "inf", "fast", "", bad):
        message = f"^'{text}' is not a (whole )?number of at least 1 and below 10$"
        with raises(ArgumentTypeError, match=message):
            number_type(kind, 1, 10)(text)


@pytest.mark.parametrize("offered", [["cpu"], ["mps"], ["cuda", "mps"], ["xpu"]])
def test_auto_device_is_the_first_that_is_offered(offered, monkeypatch):
    # torch 2.0 has no xpu
    for name, owner in (("cuda", torch), ("mps", torch.backends), ("xpu", torch)):
        backend = Mock(is_available=Mock(return_value=name in offered))
        monkeypatch.setattr(owner, name, backend, raising=False)
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    assert device_type("auto") == torch.device(offered[0])


def test_auto_where_the_gpu_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    failure = RuntimeError("no kernel image\nmore lines")
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=failure))
    assert device_type("auto") == torch.device("cpu")
    warning = "Warning: cannot use 'cuda' (no kernel image); using the CPU\n"
    assert capsys.readouterr() == ("", warning)


@pytest.mark.parametrize("name", ["abacus", "meta", "mps", "hpu", "privateuseone", "vulkan", ""])
def test_wrong_device(name):
    with raises(ArgumentTypeError, match=rf"^cannot use '{name}' \(.{{,200}}\); use auto or cpu$"):
        device_type(name)


def test_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert path_type("~/runs") == Path("/home/me/runs")
    for text, message in (("", "empty"), ("~nobody-here/a", "^'~nobody-here/a': .*name another")):
        with raises(ArgumentTypeError, match=message):
            path_type(text)


def test_errors_in_one_line():
    assert describe_error(ValueError("first\nsecond")) == "first"
    assert describe_error(MemoryError()) == "MemoryError"
    assert len(describe_error(ValueError("many words " * 99))) <= 200
    assert printable("a \x1b[31m \n é") == "a '\\x1b'[31m '\\n' é"


def test_pytest_finds_the_modules_from_any_folder(tmp_path):
    options = "--collect-only", "-pno:cacheprovider", ROOT / "tests/test_models.py"
    result = run("-m", "pytest", *options, cwd=tmp_path)
    assert result.returncode == 0, result.stdout

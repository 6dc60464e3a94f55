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
from conftest import ROOT, contents, run
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


@pytest.mark.parametrize("step", ["pathlib.Path.open", "os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_changes_nothing(step, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    failure = patch(step, side_effect=OSError(28, "reason"))
    with failure, raises(ScriptError, match=r"^cannot write .*file: reason; see that its folder"):
        write_file(tmp_path / "file", b"new")
    assert contents(tmp_path) == {"file": b"old"}


def test_synced_before_it_is_renamed_and_the_folder_after(tmp_path, monkeypatch):
    def fsync(number):
        target = Path(f"/proc/self/fd/{number}").readlink()
        events.append((target, contents(tmp_path)))
        if target == tmp_path:
            raise OSError

    events, umask = [], os.umask(0o027)
    monkeypatch.setattr(os, "fsync", fsync)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    write_file(tmp_path / "file", b"old")
    with patch("os.open", side_effect=OSError):  # opens the folder only
        write_file(tmp_path / "file", b"new")
    os.umask(umask)
    first, second = events[0][0], events[2][0]
    assert first != second  # two processes never write into one temporary file
    assert events == [
        (first, {first.name: b"old"}),
        (tmp_path, {"file": b"old"}),
        (second, {second.name: b"new", "file": b"old"}),
    ]
    assert contents(tmp_path) == {"file": b"new"}
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def receive(first, *later):
    """Get a signal, and others while the script is ending."""
    try:
        signal.raise_signal(first)
        time.sleep(9)
    finally:
        for number in later:
            signal.raise_signal(number)


@pytest.mark.parametrize(
    ("main", "status"),
    [
        (Mock(side_effect=ScriptError("no\x1b room")), "script.py: error: no'\\x1b' room"),
        (
            Path("none").read_bytes,
            "script.py: error: [Errno 2] No such file or directory: 'none'; "
            "check it, or name another file or folder",
        ),
        (Mock(side_effect=ZeroDivisionError), ZeroDivisionError),  # keeps its traceback
        (Mock(side_effect=KeyboardInterrupt), 130),
        (partial(receive, TERM), 143),
        (partial(receive, INT, TERM), 130),
    ],
)
@pytest.mark.filterwarnings("error")  # also what Python prints without raising it
def test_how_a_script_ends(main, status, capsys):
    handlers = [signal.getsignal(each) for each in (INT, TERM)]
    with patch("sys.argv", ["some/script.py"]), raises((SystemExit, ZeroDivisionError)) as stop:
        run_script(main)
    assert getattr(stop.value, "code", stop.type) == status
    interrupted = "script.py: interrupted; run it again\n"
    assert capsys.readouterr().err == (interrupted if isinstance(status, int) else "")
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
    parse = number_type(kind, 1, 10)
    assert (parse("1"), parse(good)) == (1, kind(good))
    for text in ("0", "10", "nan", "fast", bad):
        message = f"^'{text}' is not a (whole )?number of at least 1 and below 10$"
        with raises(ArgumentTypeError, match=message):
            parse(text)


@pytest.mark.parametrize("offered", [["cpu"], ["mps"], ["cuda", "mps"], ["xpu"]])
def test_auto_device_is_the_first_that_is_offered(offered, monkeypatch):
    # torch 2.0 has no xpu
    for name, owner in (("cuda", torch), ("mps", torch.backends), ("xpu", torch)):
        backend = Mock()
        backend.is_available.return_value = name in offered
        monkeypatch.setattr(owner, name, backend, raising=False)
    monkeypatch.setattr(torch, "zeros", Mock())
    assert device_type("auto") == torch.device(offered[0])


def test_auto_where_the_gpu_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    failure = RuntimeError("no kernel image\nmore lines")
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=failure))
    assert device_type("auto") == torch.device("cpu")
    warning = "Warning: cannot use 'cuda' (no kernel image); using the CPU\n"
    assert capsys.readouterr() == ("", warning)


@pytest.mark.parametrize("name", ["abacus", "meta", "hpu", "vulkan"])
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

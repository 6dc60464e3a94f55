"""Files that are written whole, scripts that end in one line, and the argument types."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import Mock, patch

import pytest
import torch
from conftest import ROOT, assert_one_line, run
from pytest import CaptureFixture, FixtureRequest, MonkeyPatch, raises

from utils import (
    ScriptError,
    default_batch_size,
    device_type,
    end_in_one_line,
    number_type,
    path_type,
    run_script,
    write_file,
)


@pytest.mark.parametrize(
    ("owner", "step", "number"), [(Path, "open", 13), (os, "fsync", 28), (Path, "replace", 28)]
)
def test_a_failed_write_changes_nothing(
    owner: object, step: str, number: int, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    failure = patch.object(owner, step, side_effect=OSError(number, "reason"))
    with failure, raises(ScriptError, match=r"^cannot write .*file: reason; make room"):
        write_file(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_synced_before_it_is_renamed_and_the_folder_after(
    tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    def record(number: int) -> None:
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
    ("step", "results"), [("fsync", [None, None]), ("fsync", [None, OSError]), ("open", OSError)]
)
def test_left_overs_are_removed(step: str, results: object, tmp_path: Path) -> None:
    left_over = "a.pth." + "0123456789abcdef" * 2 + ".tmp"  # of a killed process
    ages = {
        left_over: 660,
        left_over.replace("0", "f"): 540,
        left_over.replace("f", "g"): 3600,
        "a.pth.tmp": 3600,
    }
    for name, age in ages.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with patch.object(os, step, side_effect=results):  # not every system can open or sync a folder
        write_file(tmp_path / "a.pth", b"")
    assert {path.name for path in tmp_path.iterdir()} == ages.keys() - {left_over} | {"a.pth"}
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def receive(*numbers: int) -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    for number in numbers:
        signal.raise_signal(number)  # to this thread; another one would not wait
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # all of them arrive now
    time.sleep(9)


CHECK = "check it, or name another file or folder"
INT, TERM = signal.SIGINT, signal.SIGTERM
ENDS = [
    (Mock(side_effect=ScriptError("no room")), "script.py: error: no room"),
    (
        Path("none").read_bytes,
        f"script.py: error: cannot use none: No such file or directory; {CHECK}",
    ),
    (Mock(side_effect=OSError("no room")), f"script.py: error: cannot use no room; {CHECK}"),
    (Mock(side_effect=ZeroDivisionError), ZeroDivisionError),  # a defect keeps its traceback
    (Mock(side_effect=KeyboardInterrupt), 130),
    *[
        (partial(receive, *numbers), 128 + numbers[0])
        for numbers in ([TERM], [INT, INT], [INT, TERM])
    ],
]


@pytest.mark.parametrize("first", [end_in_one_line, int])  # int does nothing
@pytest.mark.parametrize(("main", "status"), ENDS)
@pytest.mark.filterwarnings("error")  # also what Python prints without raising it
def test_how_a_script_ends(
    main: Callable, status: object, first: Callable, request: FixtureRequest, capsys: CaptureFixture
) -> None:
    for each in (INT, TERM):
        request.addfinalizer(partial(signal.signal, each, signal.signal(each, print)))
    first()
    with patch("sys.argv", ["some/script.py"]), raises((SystemExit, ZeroDivisionError)) as stop:
        run_script(main)
    assert getattr(stop.value, "code", stop.type) == status
    assert capsys.readouterr().err == "script.py: interrupted; run it again\n" * isinstance(
        status, int
    )
    assert [signal.getsignal(each) for each in (INT, TERM)] == [
        signal.default_int_handler,
        signal.SIG_DFL,
    ]


def test_ctrl_c_ends_a_slow_exit_at_once() -> None:
    interrupt = "os.kill(os.getpid(), signal.SIGINT)"
    main = f"[atexit.register(print, 1), atexit.register(lambda: {interrupt}), {interrupt}]"
    result = run(
        "-c",
        f"import atexit, os, signal, utils; utils.end_in_one_line(); utils.run_script(lambda: {main})",
    )
    assert (result.returncode, result.stdout, result.stderr) == (
        -INT,
        "",
        "-c: interrupted; run it again\n",
    )


@pytest.mark.parametrize(("kind", "good", "bad"), [(int, "9", "1.5"), (float, "9.99", "0.99")])
def test_number_type(kind: type, good: str, bad: str) -> None:
    assert [number_type(kind, 1, 10)(text) for text in ("1", good)] == [kind("1"), kind(good)]
    for text in ("0", "10", "nan", "inf", "fast", "", bad):
        with raises(
            ArgumentTypeError,
            match=f"^'{text}' is not a (whole )?number of at least 1 and below 10$",
        ):
            number_type(kind, 1, 10)(text)
    with raises(ArgumentTypeError, match=r"number of at least 1$"):
        number_type(kind, 1)("0")


@pytest.mark.parametrize(
    "offered", [["cpu"], ["mps"], ["cuda", "mps"], ["xpu"]]
)  # the first is to be chosen
def test_auto_device(offered: list[str], monkeypatch: MonkeyPatch) -> None:
    for name, owner in (
        ("cuda", torch),
        ("mps", torch.backends),
        ("xpu", torch),
    ):  # torch 2.0 has no xpu
        monkeypatch.setattr(
            owner, name, Mock(is_available=Mock(return_value=name in offered)), raising=False
        )
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    assert device_type("auto") == torch.device(offered[0])
    assert default_batch_size(torch.device(offered[0])) == (64 if offered == ["cpu"] else 128)


def test_auto_where_the_gpu_cannot_be_used(
    monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch, "zeros", Mock(side_effect=RuntimeError("no kernel image\nmore lines"))
    )
    assert device_type("auto") == torch.device("cpu")
    assert capsys.readouterr() == (
        "",
        "Warning: cannot use 'cuda' (no kernel image); using the CPU\n",
    )
    with raises(
        ArgumentTypeError, match=r"^cannot use 'cuda' \(no kernel image\); use auto or cpu$"
    ):
        device_type("cuda")


def test_wrong_device() -> None:
    for name in ("abacus", "meta"):
        with raises(ArgumentTypeError, match=rf"^cannot use '{name}' \(.*\); use auto or cpu$"):
            device_type(name)


PRINTING = """
import sys
from pathlib import Path
from utils import run_script
def main():
    for number in range(3):
        print("a letter that ASCII lacks: \u0440", file=sys.stderr if number == 1 else sys.stdout)
        Path(str(number)).touch()
run_script(main)
"""
FULL = "-c: error: cannot write the standard output: No space left on device; send it elsewhere\n"


@pytest.mark.parametrize(
    ("redirection", "errors"),
    [
        ("> out", "a letter"),
        ("2>&1 | head -c 1 > out", ""),
        (">&- 2>&-", ""),
        ("2> /dev/full > out", ""),
        ("> /dev/full", FULL),
    ],
)
def test_no_print_ends_a_script(redirection: str, errors: str, tmp_path: Path) -> None:
    command = f"set -o pipefail; {shlex.quote(sys.executable)} -c '{PRINTING}' {redirection}"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    result = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert errors in result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr
    assert result.returncode == (errors == FULL)
    assert {"0", "1", "2"} <= {path.name for path in tmp_path.iterdir()}


def test_an_interrupt_while_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint(1 / 0)\n"
    )
    for script in ("analyze_model.py", "download_mnist.py", "train_test_mnist.py"):
        result = subprocess.run(
            [sys.executable, ROOT / script],
            env={"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr) == (130, f"{script}: interrupted; run it again\n")


def test_paths(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert path_type("~/runs") == Path("/home/me/runs")
    with raises(ArgumentTypeError, match="empty"):
        path_type("")
    with raises(
        ArgumentTypeError,
        match=r"^there is no home folder for '~nobody-here/a'; name another path$",
    ):
        path_type("~nobody-here/a")


def test_a_mistake_in_the_syntax_of_models(tmp_path: Path) -> None:
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "models.py").write_text("class Mine:\n    x = (1\n    y = 2\n")
    for script in ("analyze_model.py", "train_test_mnist.py"):
        assert_one_line(
            run(script, cwd=tmp_path),
            f"{script}: error: {tmp_path / 'models.py'}, line 2: ",
            "; fix it",
        )


def test_pytest_finds_the_modules_from_any_folder(tmp_path: Path) -> None:
    result = run(
        "-m",
        "pytest",
        "--collect-only",
        "-pno:cacheprovider",
        ROOT / "tests/test_models.py",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stdout

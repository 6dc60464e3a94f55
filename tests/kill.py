"""Kill training or the download with SIGKILL at random moments, again and again, and check what is left each time.

    python tests/kill.py training 200
    python tests/kill.py download 200

It runs on a tiny data set, in processes forked from this one, which has imported torch already. After each kill every
checkpoint (every data file) must load whole; the next process goes on; and the end must equal that of a run which
nobody disturbed. Needs a system with fork.
"""

import contextlib
import functools
import gzip
import io
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import TINY_FILES, TINY_SUMS, assert_same

import download_mnist
import train_test_mnist
from checkpoints import load_checkpoint

EPOCHS = 4


def start(function: Callable[[], None]) -> int:
    """Run a function in a process of its own whose writes to the disk take longer, and return its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        torch.set_num_threads(1)
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(random.random() * 0.02), fsync(file))
        with contextlib.redirect_stdout(io.StringIO()):
            function()
        status = 0
    finally:
        os._exit(status)


def train(data_dir: Path, folder: Path) -> None:
    """Train for EPOCHS, from the newest checkpoint if there is one."""
    sys.argv = ["train_test_mnist.py", "--data-dir", str(data_dir), "--checkpoint-dir", str(folder)]
    sys.argv += ["--epochs", str(EPOCHS), "--batch-size", "16", "--device", "cpu"]
    sys.argv += ["--resume"] if list(folder.glob("mnist_model_epoch_*.pth")) else []
    train_test_mnist.main()


def kill_again_and_again(function: Callable[[], None], check: Callable[[], object], kills: int, longest: float) -> int:
    """Start and kill a function until it comes to its end, at most `kills` times; return how many kills there were."""
    for count in range(kills):
        number = start(function)
        time.sleep(random.random() * longest)
        os.kill(number, signal.SIGKILL)
        _, status = os.waitpid(number, 0)
        check()
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, "it failed before it was killed"
            return count
    assert os.waitpid(start(function), 0)[1] == 0, f"it does not recover after {kills} kills"
    check()
    return kills


def load_all(folder: Path) -> dict[str, dict]:
    """Load every checkpoint of a folder."""
    return {path.name: load_checkpoint(path) for path in folder.glob("*.pth")}


def kill_training(data_dir: Path, workplace: Path, kills: int) -> None:
    """Compare runs that were killed with one that was not."""
    undisturbed = workplace / "undisturbed"
    started = time.monotonic()
    assert os.waitpid(start(lambda: train(data_dir, undisturbed)), 0)[1] == 0
    duration = time.monotonic() - started
    expected = load_all(undisturbed)
    assert len(expected) == EPOCHS + 1
    done = runs = 0
    while done < kills:
        folder = workplace / f"run {runs}"
        run, check = functools.partial(train, data_dir, folder), functools.partial(load_all, folder)
        done += kill_again_and_again(run, check, kills - done, duration * 0.6)
        assert_same(load_all(folder), expected)
        assert {path.name for path in folder.iterdir()} >= {path.name for path in undisturbed.iterdir()}
        runs += 1
    print(f"{done} kills in {runs} runs of {EPOCHS} epochs: every checkpoint whole, every end as if undisturbed")


def kill_download(source: Path, workplace: Path, kills: int) -> None:
    """Check that the files in place are always the originals, and in the end all there."""
    done = runs = 0
    while done < kills:
        raw = workplace / f"run {runs}" / "MNIST" / "raw"
        run = functools.partial(download_mnist.download_mnist, workplace / f"run {runs}", str(source))
        done += kill_again_and_again(run, functools.partial(check_files, raw), kills - done, 0.1)
        assert len(list(raw.glob("*ubyte"))) == len(download_mnist.FILES)
        runs += 1
    print(f"{done} kills in {runs} downloads: no file in place that is not the original, all complete in the end")


def check_files(raw: Path) -> None:
    """Check that the data files in a folder are originals."""
    for path in raw.glob("*ubyte"):
        assert download_mnist.is_original(path.name, path.read_bytes()), path


def main() -> None:
    """Run one of the two."""
    what, kills = sys.argv[1], int(sys.argv[2])
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)  # imports much of torch, which no child then has to
    download_mnist.FILES = TINY_SUMS
    with tempfile.TemporaryDirectory() as folder:
        source, workplace = Path(folder, "source"), Path(folder, "workplace")
        source.mkdir()
        for name, data in TINY_FILES.items():
            (source / f"{name}.gz").write_bytes(gzip.compress(data))
        if what == "training":
            download_mnist.download_mnist(Path(folder, "data"), str(source))
            kill_training(Path(folder, "data"), workplace, kills)
        else:
            kill_download(source, workplace, kills)


if __name__ == "__main__":
    main()

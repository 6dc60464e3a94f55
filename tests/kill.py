"""Kill training or the download with SIGKILL at random moments and check what is left each time.

    python tests/kill.py training 200
    python tests/kill.py download 200

It runs on a tiny data set, in processes forked from this one, which has imported torch already.
After each kill every checkpoint (every data file) must load whole; the next process goes on; and
the end must equal that of a run which nobody disturbed. Training starts in the folder of an earlier
run, which must come to no harm, and a second process tries to enter the folder at a random moment.
Needs a system with fork.
"""

import contextlib
import io
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import (
    FOUR_EPOCHS,
    TINY_FILES,
    TINY_SUMS,
    assert_same,
    contents,
    load_all,
    split_options,
    write_tiny_files,
)

import download_mnist
import train_test_mnist
from utils import ScriptError

REFUSED = 7  # exit status


def start(function: Callable, *args: object) -> int:
    """Run a function in a process of its own, with slow writes to disk; return its number."""
    number = os.fork()
    if number:
        return number
    status = 1
    try:
        torch.set_num_threads(1)
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(random.random() * 0.02), fsync(file))
        with contextlib.redirect_stdout(io.StringIO()):
            function(*args)
        status = 0
    except ScriptError as error:
        # Refused, or it has looked at a file that the other process then moved
        status = REFUSED if re.search("another run is using|No such file", str(error)) else 1
    finally:
        os._exit(status)


def train(folder: Path, data_dir: Path, seed: int = 1) -> None:
    """Train for four epochs, from the newest checkpoint if there is one of this seed."""
    where = "--data-dir", data_dir, "--checkpoint-dir", folder, "--device cpu"
    sys.argv = split_options("train_test_mnist.py", *where, FOUR_EPOCHS, "--seed", seed)
    if seed in {checkpoint["options"]["seed"] for checkpoint in load_all(folder).values()}:
        sys.argv.append("--resume")
    train_test_mnist.main()


def download(folder: Path, data_dir: Path) -> None:
    download_mnist.download_mnist(folder, str(data_dir / "MNIST" / "raw"))


def load_originals(folder: Path) -> dict[str, bytes]:
    files = {path.name: path.read_bytes() for path in folder.glob("MNIST/raw/*ubyte")}
    assert files.items() <= TINY_FILES.items()
    return files


def kill(what: str, kills: int, workplace: Path) -> None:
    """Compare runs that were killed with one that was not."""
    data_dir = workplace / "data"
    earlier = workplace / "earlier"
    undisturbed = workplace / "undisturbed"
    write_tiny_files(data_dir / "MNIST" / "raw", packed=what == "download")
    earlier.mkdir()
    if what == "download":
        function, load = download, load_originals
    else:
        function, load = train, load_all
        assert os.waitpid(start(train, earlier, data_dir, 2), 0)[1] == 0
    started = time.monotonic()
    assert os.waitpid(start(function, undisturbed, data_dir), 0)[1] == 0
    longest = 0.4 * (time.monotonic() - started)
    expected = load(undisturbed)
    assert expected
    done = runs = refused = 0
    while done < kills:
        runs += 1
        statuses = []
        folder = Path(shutil.copytree(earlier, workplace / f"run {runs}"))
        while 0 not in statuses:
            processes = []
            for _ in range(2):
                processes.append(start(function, folder, data_dir))
                time.sleep(random.random() * longest)
            for process in processes if done < kills else ():
                os.kill(process, signal.SIGKILL)
            statuses = [os.waitpid(process, 0)[1] for process in processes]
            assert set(statuses) <= {0, signal.SIGKILL, REFUSED << 8}, f"it failed: {statuses}"
            done += statuses.count(signal.SIGKILL)
            refused += statuses.count(REFUSED << 8)
            load(folder)
        assert_same(load(folder), expected)
        files = {(Path(name).name, data) for name, data in contents(folder).items()}
        assert {(name, data) for name, data in contents(earlier).items() if data} <= files
        assert not (folder / "earlier_run_incomplete").exists()
        names = {path.name for path in folder.iterdir()}
        assert names >= {path.name for path in undisturbed.iterdir()}
    print(f"{done} kills in {runs} runs, {refused} intruders refused:", end=" ")
    print("every file whole after each, every end undisturbed")


if __name__ == "__main__":
    # An optimizer imports much of torch, which no child then has to
    torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)
    download_mnist.FILES = TINY_SUMS
    with tempfile.TemporaryDirectory() as name:
        kill(sys.argv[1], int(sys.argv[2]), Path(name))

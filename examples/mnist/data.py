"""MNIST: found on disk, or fetched and checked; scikit-learn's digits, clearly labelled, where there is neither."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
import urllib.request
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["DataError", "Dataset", "Split", "load", "read_idx"]

VALIDATION = 5_000
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
# SHA-256 of the decompressed bytes: the mirrors' gzip containers differ, what they hold does not.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}


class DataError(RuntimeError):
    """The data asked for is missing, broken, or not what it says it is."""


@dataclass(frozen=True)
class Split:
    """Images (N, 1, 28, 28), float32 in [0, 1], and labels (N,), int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> Split:
        """The first `n` samples (all of them for None or for an `n` beyond the end)."""
        return Split(self.images[:n], self.labels[:n])

    def to(self, device: torch.device) -> Split:
        """The same samples on `device`."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Training, validation and test samples; `banner` warns where they are not MNIST."""

    name: str
    train: Split
    validation: Split
    test: Split
    banner: str | None = None

    def first(self, train: int | None, validation: int | None, test: int | None) -> Dataset:
        """The same data cut to the first samples of each split."""
        cut = self.train.first(train), self.validation.first(validation), self.test.first(test)
        return Dataset(self.name, *cut, self.banner)

    def to(self, device: torch.device) -> Dataset:
        """The same data on `device`."""
        moved = self.train.to(device), self.validation.to(device), self.test.to(device)
        return Dataset(self.name, *moved, self.banner)


def load(where: str | Path | None = None, *, say: Callable[[str], None] = print) -> Dataset:
    """Load MNIST from `where`, else from $ODELAYERS_MNIST, else from the cache folder, else from a public mirror.

    A folder that was named must hold the data. Only the last step, the download, falls back to scikit-learn's digits,
    under a banner; `where="digits"` asks for those outright.

    Raises:
        DataError: a file is missing in a named folder, truncated, or its SHA-256 is not MNIST's.
    """
    named = where or os.environ.get("ODELAYERS_MNIST")
    if named == "digits":
        return _digits("asked for by name")
    if named:
        source = "--data" if where else "ODELAYERS_MNIST"
        return _mnist(_existing_folder(Path(named).expanduser(), source))
    cache = cache_folder()
    missing = [name for name in SHA256 if _find(cache, name) is None]
    failure = _download(missing, cache, MIRRORS, say)
    if failure:
        say(failure)
        return _digits("MNIST was neither found nor could it be fetched")
    return _mnist(cache)


def cache_folder() -> Path:
    """Where downloads are kept: $XDG_CACHE_HOME/odelayers/mnist, by default ~/.cache/odelayers/mnist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "odelayers" / "mnist"


def read_idx(path: Path, sha256: str | None = None) -> Tensor:
    """Read an IDX file of unsigned bytes, gzipped or raw, into a uint8 tensor of the shape its header gives.

    Raises:
        DataError: the gzip container, the checksum, the header or the length is wrong; names the file and both sums.
    """
    content = _decompressed(path)
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(
            f"{path}: broken or not MNIST: expected SHA-256 {sha256} of the decompressed bytes, "
            f"found {found} ({len(content):,} bytes); delete the file and fetch it again"
        )
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes (it begins 00 00 08), found {content[:4].hex()}"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise DataError(f"{path}: truncated: expected a header of {header} bytes, found {len(content)} bytes in all")
    shape = struct.unpack(f">{content[3]}I", content[4:header])
    expected = header + torch.Size(shape).numel()
    if len(content) != expected:
        raise DataError(
            f"{path}: expected {expected:,} bytes for the shape {shape} in its header, found {len(content):,}"
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=header).reshape(shape)


def _decompressed(path: Path) -> bytes:
    raw = path.read_bytes()
    if not raw.startswith(b"\x1f\x8b"):
        return raw
    try:
        return gzip.decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        expected = SHA256.get(path.name.removesuffix(".gz"), "unknown")
        raise DataError(
            f"{path}: the gzip container is truncated or broken ({error}): expected SHA-256 {expected} of the "
            f"decompressed bytes, found a container with SHA-256 {hashlib.sha256(raw).hexdigest()} "
            f"({len(raw):,} bytes); delete the file and fetch it again"
        ) from error


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _existing_folder(folder: Path, source: str) -> Path:
    if not folder.is_dir():
        raise DataError(f"{source}: expected a folder with MNIST's four IDX files, found no folder at {folder}")
    missing = [name for name in SHA256 if _find(folder, name) is None]
    if missing:
        raise DataError(f"{source}: {folder} lacks {', '.join(missing)} (raw, or gzipped with .gz)")
    return folder


def _mnist(folder: Path) -> Dataset:
    arrays = {}
    for name, sha256 in SHA256.items():
        path = _find(folder, name)
        if path is None:
            raise DataError(f"{folder} lacks {name} (raw, or gzipped with .gz)")
        arrays[name] = read_idx(path, sha256)
    seen = _split(arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"])
    test = _split(arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"])
    cut = len(seen) - VALIDATION
    return Dataset("MNIST", seen.first(cut), Split(seen.images[cut:], seen.labels[cut:]), test)


def _split(images: Tensor, labels: Tensor) -> Split:
    return Split(images.unsqueeze(1).float() / 255, labels.long())


def _download(names: Sequence[str], folder: Path, mirrors: Sequence[str], say: Callable[[str], None]) -> str | None:
    """Fetch the files into `folder`; return None, or why it could not be done."""
    for name in names:
        failures = []
        for mirror in mirrors:
            say(f"fetching {mirror}{name}.gz")
            try:
                _fetch(f"{mirror}{name}.gz", folder / f"{name}.gz", SHA256[name])
                break
            except (OSError, DataError) as error:  # URLError and timeouts are OSErrors
                failures.append(f"{mirror}: {error}")
        else:
            return f"{name} could not be fetched: " + "; ".join(failures)
    return None


def _fetch(url: str, target: Path, sha256: str) -> None:
    """Download to a temporary name, check it, and only then give it its own name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            partial.write_bytes(response.read())
        read_idx(partial, sha256)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _digits(why: str) -> Dataset:
    """scikit-learn's 1,797 real 8x8 digits, enlarged to 28x28, in a fixed order: 1,257 / 180 / 360."""
    from sklearn.datasets import load_digits  # wanted only here

    raw = load_digits()
    small = torch.as_tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
    labels = torch.as_tensor(raw.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    parts = [Split(images[i], labels[i]) for i in order.split([1257, 180, 360])]
    banner = f"NOT MNIST: these are scikit-learn's 1,797 digits of 8x8 pixels, enlarged to 28x28 ({why})."
    return Dataset("scikit-learn digits", *parts, banner)

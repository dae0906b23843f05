"""The study's data: what is read is MNIST bit for bit, and whatever is not says so."""

from __future__ import annotations

import gzip
import hashlib
import os
import struct
from pathlib import Path

import pytest
import torch

from examples.mnist import data

TINY = {  # four small files in MNIST's layout
    "train-images-idx3-ubyte": struct.pack(">IIII", 2051, 12, 28, 28) + bytes(i % 251 for i in range(12 * 784)),
    "train-labels-idx1-ubyte": struct.pack(">II", 2049, 12) + bytes(i % 10 for i in range(12)),
    "t10k-images-idx3-ubyte": struct.pack(">IIII", 2051, 4, 28, 28) + bytes(i % 241 for i in range(4 * 784)),
    "t10k-labels-idx1-ubyte": struct.pack(">II", 2049, 4) + bytes(range(4)),
}


@pytest.fixture(autouse=True)
def tiny_mnist(monkeypatch, tmp_path):
    """Stand the four small files in for MNIST, with their own sums, away from the user's cache and environment."""
    monkeypatch.setattr(data, "SHA256", {name: hashlib.sha256(raw).hexdigest() for name, raw in TINY.items()})
    monkeypatch.setattr(data, "VALIDATION", 2)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("ODELAYERS_MNIST", raising=False)


def write(folder: Path, *, zipped: bool) -> Path:
    folder.mkdir(parents=True)
    for name, raw in TINY.items():
        if zipped:
            (folder / f"{name}.gz").write_bytes(gzip.compress(raw))
        else:
            (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_bit_for_bit(tmp_path, zipped):
    """Pixels and labels equal the bytes that were written, raw or gzipped; the last training images are validation."""
    found = data.load(write(tmp_path / "idx", zipped=zipped))
    pixels = torch.tensor(list(TINY["train-images-idx3-ubyte"][16:])).reshape(12, 1, 28, 28)
    seen = torch.cat([found.train.images, found.validation.images])
    assert torch.equal((seen * 255).round().long(), pixels)
    assert found.train.labels.tolist() == list(range(10))
    assert found.validation.labels.tolist() == [0, 1]
    assert found.test.labels.tolist() == [0, 1, 2, 3]
    assert found.banner is None
    assert 0 <= seen.min() and seen.max() <= 1


def test_the_environment_names_the_folder(tmp_path, monkeypatch):
    """ODELAYERS_MNIST is used when --data is not given, and --data goes before it."""
    folder = write(tmp_path / "idx", zipped=False)
    monkeypatch.setenv("ODELAYERS_MNIST", str(folder))
    assert data.load().name == "MNIST"
    monkeypatch.setenv("ODELAYERS_MNIST", str(tmp_path / "nowhere"))
    assert data.load(folder).name == "MNIST"
    with pytest.raises(data.DataError, match="ODELAYERS_MNIST: expected a folder.*nowhere"):
        data.load()


def test_a_missing_file_in_a_named_folder_is_an_error_not_a_fallback(tmp_path):
    """A folder the user named is never silently replaced by other data."""
    folder = write(tmp_path / "idx", zipped=True)
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(data.DataError, match="--data: .*lacks t10k-labels-idx1-ubyte"):
        data.load(folder)


def test_a_changed_byte_names_the_file_and_both_sums(tmp_path):
    """One flipped pixel is refused with the file's path, the expected and the found SHA-256."""
    folder = write(tmp_path / "idx", zipped=False)
    path = folder / "train-images-idx3-ubyte"
    broken = bytearray(path.read_bytes())
    broken[100] ^= 1
    path.write_bytes(bytes(broken))
    with pytest.raises(data.DataError) as error:
        data.load(folder)
    for part in (str(path), data.SHA256[path.name], hashlib.sha256(bytes(broken)).hexdigest()):
        assert part in str(error.value)


def test_a_truncated_container_names_the_file_and_the_expected_sum(tmp_path):
    """A download that stopped half way is refused with the path and the sum it should have had."""
    folder = write(tmp_path / "idx", zipped=True)
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(data.DataError, match="truncated or broken") as error:
        data.load(folder)
    assert str(path) in str(error.value) and data.SHA256["train-images-idx3-ubyte"] in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "expected an IDX file"),
        (b"", "expected an IDX file"),
        (struct.pack(">II", 2051, 3), "truncated: expected a header of 16 bytes"),
        (struct.pack(">II", 2049, 9) + bytes(8), "expected 17 bytes for the shape"),
    ],
)
def test_what_is_no_idx_file_is_refused(tmp_path, content, message):
    """Wrong magic numbers, short headers and short bodies each give their own error."""
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(data.DataError, match=message):
        data.read_idx(tmp_path / "file")


def test_the_download_fills_the_cache_and_is_used_again(tmp_path, monkeypatch):
    """A first load fetches from the first mirror that serves the right bytes; a second needs no mirror."""
    good = write(tmp_path / "good", zipped=True)
    bad = tmp_path / "bad"
    bad.mkdir()
    for name in TINY:
        (bad / f"{name}.gz").write_bytes(gzip.compress(b"something else"))
    monkeypatch.setattr(data, "MIRRORS", (f"{bad.as_uri()}/", f"{good.as_uri()}/"))
    said = []
    assert data.load(say=said.append).name == "MNIST"
    assert len(said) == 8  # each file was asked of both mirrors
    assert sorted(os.listdir(data.cache_folder())) == sorted(f"{name}.gz" for name in TINY)  # no partial file is left
    monkeypatch.setattr(data, "MIRRORS", ())
    assert data.load().name == "MNIST"


def test_without_data_or_network_the_digits_come_under_a_banner(tmp_path, monkeypatch):
    """The fallback is real digits in MNIST's shape, and says that it is not MNIST and why."""
    monkeypatch.setattr(data, "MIRRORS", ((tmp_path / "nowhere").as_uri() + "/",))
    said = []
    found = data.load(say=said.append)
    assert found.name == "scikit-learn digits"
    assert found.banner.startswith("NOT MNIST") and "could not be fetched" in said[-1]
    assert [len(found.train), len(found.validation), len(found.test)] == [1257, 180, 360]
    assert found.train.images.shape[1:] == (1, 28, 28)
    assert 0 <= found.train.images.min() and found.train.images.max() <= 1
    assert set(found.test.labels.tolist()) == set(range(10))


def test_a_broken_file_in_the_cache_is_an_error_not_a_fallback(monkeypatch):
    """What was fetched once and broke since is reported, not replaced by digits."""
    write(data.cache_folder(), zipped=False)
    (data.cache_folder() / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + bytes(8))
    with pytest.raises(data.DataError, match="t10k-labels-idx1-ubyte: broken or not MNIST"):
        data.load()


def test_cutting_keeps_the_first_samples():
    """`Dataset.first` cuts each split by itself and None keeps it whole."""
    whole = data.load("digits")
    cut = whole.first(20, None, 5)
    assert [len(cut.train), len(cut.validation), len(cut.test)] == [20, 180, 5]
    assert torch.equal(cut.train.images, whole.train.images[:20])
    assert cut.banner == whole.banner

"""Weights files are read and written in pieces: through the system's cache, or past it."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3
from qeff_proxy.artifact.hashes import hash_weights_file
from qeff_proxy.common.direct_io import PIECE, FileReader, FileWriter
from qeff_proxy.errors import CheckpointError
from qeff_proxy.export.write_weights import check_and_hash, save_weights
from qeff_proxy.load.safetensors_header import read_header
from qeff_proxy.load.weight_sources import StoredWeight, WeightSources
from safetensors.torch import load_file

SIZE = 9 * PIECE + 1234  # several blocks, and an end that no direct read can end at
WAYS = pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(SIZE)


@pytest.fixture
def file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(data)
    return path


def forget(path: Path) -> None:
    """Take a file out of the system's cache."""
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@WAYS
@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, SIZE), (8, 4096), (5000, 5008), (4096 * 3 + 16, SIZE - 3), (13, SIZE), (77, 77)],
)
@pytest.mark.parametrize("known", [False, True], ids=["forgotten", "known"])
def test_a_range_is_read(
    file: Path, data: bytes, begin: int, end: int, direct: bool, known: bool
) -> None:
    if not known:
        forget(file)
    with FileReader(file, direct=direct) as reader:
        assert b"".join(map(bytes, reader.pieces(begin, end))) == data[begin:end]


@WAYS
def test_pieces_are_small_and_of_whole_elements(file: Path, direct: bool) -> None:
    with FileReader(file, direct=direct) as reader:
        for piece in reader.pieces(8 * 1001, 8 * 1001 + 6 * PIECE):
            assert 0 < len(piece) <= PIECE
            assert len(piece) % 8 == 0
            assert np.frombuffer(piece, np.float64).flags.aligned


def in_cache(file: Path, offset: int) -> bool:
    """Whether the system's cache holds some byte of a file."""
    with file.open("rb") as opened:
        try:
            return os.preadv(opened.fileno(), [bytearray(1)], offset, os.RWF_NOWAIT) > 0
        except BlockingIOError:
            return False


@pytest.mark.parametrize("part", [0, 5 * PIECE])
def test_what_is_large_is_not_left_in_the_cache(file: Path, part: int, monkeypatch: Any) -> None:
    found = []
    for limit in (SIZE, SIZE - 1):
        monkeypatch.setattr("qeff_proxy.common.direct_io._LARGE", limit)
        forget(file)
        with file.open("rb", buffering=0) as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            opened.read(part)
        hash_weights_file(file)
        found.append(in_cache(file, 8 * PIECE))
    assert found == [True, False]


def test_what_the_cache_holds_is_read_from_there(file: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("qeff_proxy.common.direct_io._LARGE", SIZE - 1)
    with FileReader(file) as reader:
        assert reader.direct is None
    forget(file)
    with FileReader(file) as reader:
        assert reader.direct is not None


@WAYS
@pytest.mark.parametrize("step", [1000, PIECE, 5 * PIECE])
def test_what_is_written_is_read(tmp_path: Path, data: bytes, step: int, direct: bool) -> None:
    path = tmp_path / "written"
    with FileWriter(path, SIZE, direct=direct) as writer:
        for begin in range(0, SIZE, step):
            writer.write(data[begin : begin + step])
        writer.finish()
    assert path.read_bytes() == data


@WAYS
def test_holes_stay_holes(tmp_path: Path, data: bytes, direct: bool) -> None:
    path = tmp_path / "written"
    hole = 8 * PIECE + 100
    with FileWriter(path, hole + 2 * SIZE, direct=direct) as writer:
        writer.write(data)
        writer.skip(hole)
        writer.write(data)
        writer.finish()
    assert path.read_bytes() == data + bytes(hole) + data
    assert path.stat().st_blocks * 512 < 2 * SIZE + PIECE
    with FileReader(path) as reader:
        assert [span[0] for span in reader.spans(0, reader.size)] == [True, False, True]


@pytest.mark.parametrize("name", ["preadv", "pwrite"])
def test_a_disk_without_direct_ways_serves(
    tmp_path: Path, data: bytes, name: str, monkeypatch: Any
) -> None:
    plain, refused = getattr(os, name), []

    def refuse(descriptor: int, *rest: Any) -> int:
        if _flags_of(descriptor) & os.O_DIRECT:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "no")
        return plain(descriptor, *rest)

    monkeypatch.setattr(os, name, refuse)
    path = tmp_path / "written"
    with FileWriter(path, SIZE, direct=True) as writer:
        writer.write(data)
        writer.finish()
    forget(path)
    with FileReader(path, direct=True) as reader:
        assert b"".join(map(bytes, reader.pieces(0, SIZE))) == data
    assert len(refused) == 1  # and not asked again


def _flags_of(descriptor: int) -> int:
    text = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    return int(text.split("flags:")[1].split()[0], 8)


def test_a_file_that_becomes_shorter_is_an_error(file: Path) -> None:
    with FileReader(file) as reader:
        os.truncate(file, 100)
        with pytest.raises(OSError, match="became shorter"):
            list(reader.pieces(0, SIZE))


class _Part:
    """As much of a traced part as is written."""

    def __init__(self, **weights: torch.Tensor) -> None:
        self.weights = weights


def stored_in(path: Path) -> WeightSources:
    places = read_header(path)
    return WeightSources({name: StoredWeight(path, name, one) for name, one in places.items()})


def write_odd(path: Path, tensor: torch.Tensor) -> None:
    """A safetensors file whose data begin at an odd offset, as the format allows."""
    bits = tensor.view(torch.uint8).numpy().tobytes()
    text = f'{{"w":{{"dtype":"F32","shape":[{tensor.numel()}],"data_offsets":[0,{len(bits)}]}}}}'
    text += " " * (1 - len(text) % 2)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + bits)


@pytest.mark.parametrize("place", [0, 300_000, 1_999_999])
@pytest.mark.parametrize("reference", [False, True])
def test_nan_is_found_at_any_offset(tmp_path: Path, place: int, reference: bool) -> None:
    tensor = torch.ones(2_000_000)
    tensor[place] = float("nan")
    source, target = tmp_path / "source.safetensors", tmp_path / "to" / "target.safetensors"
    target.parent.mkdir()
    write_odd(source, tensor)
    assert read_header(source)["w"].offset % 2 == 1
    part: Any = _Part(w=torch.empty(2_000_000, device="meta"))
    stored = stored_in(source)

    def write() -> None:
        saved = save_weights(target, [part], stored, reference=reference)
        check_and_hash(target.parent / source.name, {"w": saved.places["w"].place}, stored)

    with pytest.raises(CheckpointError, match=r"w of .*source\.safetensors has NaN"):
        write()


def test_a_copy_is_hashed_as_it_is_written(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    write_odd(source, torch.randn(2_000_000))
    stored = stored_in(source)
    part: Any = _Part(w=torch.empty(2_000_000, device="meta"), own=torch.randn(3, 5))
    saved = save_weights(target, [part], stored)
    assert saved.digest == f"blake3:{blake3(target.read_bytes()).hexdigest()}"
    assert saved.digest == hash_weights_file(target)
    places = {name: one.place for name, one in saved.places.items()}
    assert saved.digest == check_and_hash(target, places)
    written = load_file(target)
    assert torch.equal(written["own"], part.weights["own"])
    assert written["w"].numpy().tobytes() == source.read_bytes()[-8_000_000:]


def test_a_sparse_weight_is_copied_as_one(tmp_path: Path) -> None:
    source, target = tmp_path / "source.safetensors", tmp_path / "target.safetensors"
    text = '{"w":{"dtype":"F32","shape":[8000000],"data_offsets":[0,32000000]}}     '
    with source.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        file.seek(16_000_000)
        file.write(b"\1" * 8000)
        file.truncate(8 + len(text) + 32_000_000)
    part: Any = _Part(w=torch.empty(8_000_000, device="meta"))
    saved = save_weights(target, [part], stored_in(source))
    assert target.read_bytes()[-32_000_000:] == source.read_bytes()[-32_000_000:]
    assert target.stat().st_blocks * 512 < 1_000_000
    assert saved.digest == hash_weights_file(target)

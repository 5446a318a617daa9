"""The direct reader gives what zarr-python gives, for any run of rows, and never anything else."""

import struct
from typing import Any

import numpy as np
import pytest
import zarr
from crc32c import crc32c
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import blosc, zstd
from numpy.typing import NDArray
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

from kdcache.codecs import Part
from kdcache.errors import CorruptObjectError
from kdcache.store.arrays import array_metadata, encode_shard
from kdcache.store.chunks import ShardSizes, decode_rows

SHARD, CHUNK = 64, 16
PARTS = [
    Part(dtype, shape, compressor=compressor)
    for dtype in ("uint8", "uint16", "int16", "float32")
    for shape in ((), (5,), (3, 2))
    for compressor in ("none", "zstd", "shuffle", "bitshuffle")
]


def values_of(part: Part, rows: int, seed: int = 0) -> NDArray[Any]:
    random = np.random.default_rng(seed)
    return random.integers(0, 200, (rows, *part.shape)).astype(part.dtype)


def decoded(data: bytes, part: Part, rows: slice, *, shard: int = SHARD, chunk: int = CHUNK) -> NDArray[Any]:
    view = memoryview(data)
    return decode_rows(
        lambda start, stop: view[start:stop], ShardSizes(len(data), shard, chunk), part, rows, where="here"
    )


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part.dtype}{list(part.shape)}-{part.compressor}")
def test_it_is_what_zarr_reads(part: Part) -> None:
    values = values_of(part, 50)
    suffix, data = encode_shard(part, values, shard_rows=SHARD, chunk_rows=CHUNK)
    held = {
        "zarr.json": cpu.Buffer.from_bytes(array_metadata(part, 1, shard_rows=SHARD, chunk_rows=CHUNK)),
        f"c/0{suffix}": cpu.Buffer.from_bytes(data),
    }
    array = zarr.open_array(store=MemoryStore(held), mode="r")
    assert np.array_equal(decoded(data, part, slice(0, SHARD)), np.asarray(array[:]))
    for rows in (slice(0, 0), slice(3, 4), slice(15, 17), slice(16, 48), slice(5, 50)):
        found = decoded(data, part, rows)
        assert found.dtype == values.dtype
        assert np.array_equal(found, values[rows])


@given(st.integers(0, SHARD), st.integers(0, SHARD))
def test_any_run_of_rows_is_a_slice_of_the_whole(a: int, b: int) -> None:
    part = Part("uint16", (3,), compressor="bitshuffle")
    values = values_of(part, SHARD)
    _, data = encode_shard(part, values, shard_rows=SHARD, chunk_rows=CHUNK)
    assert np.array_equal(decoded(data, part, slice(min(a, b), max(a, b))), values[min(a, b) : max(a, b)])


def test_only_the_chunks_of_the_rows_are_asked_for() -> None:
    part = Part("float32", (4,))
    _, data = encode_shard(part, values_of(part, SHARD), shard_rows=SHARD, chunk_rows=CHUNK)
    asked: list[int] = []

    def get(start: int, stop: int) -> memoryview:
        asked.append(stop - start)
        return memoryview(data)[start:stop]

    decode_rows(get, ShardSizes(len(data), SHARD, CHUNK), part, slice(17, 20), where="here")
    assert len(asked) == 2  # the index and one chunk
    assert sum(asked) < len(data) / 2


@pytest.mark.parametrize("compressor", ["none", "zstd", "shuffle", "bitshuffle"])
def test_no_flipped_bit_is_read_as_data(compressor: Any) -> None:
    part = Part("uint16", (3,), compressor=compressor)
    values = values_of(part, SHARD)
    _, data = encode_shard(part, values, shard_rows=SHARD, chunk_rows=CHUNK)
    for place in range(len(data)):
        broken = bytearray(data)
        broken[place] ^= 1 << place % 8
        with pytest.raises(CorruptObjectError):
            decoded(bytes(broken), part, slice(0, SHARD))


@pytest.mark.parametrize("length", [0, 3, 4, 20, 67])
def test_a_truncated_object_is_damage(length: int) -> None:
    part = Part("uint8", ())
    _, data = encode_shard(part, values_of(part, SHARD), shard_rows=SHARD, chunk_rows=CHUNK)
    with pytest.raises(CorruptObjectError):
        decoded(data[:length], part, slice(0, SHARD))


def crafted(body: bytes, offset: int = 0, length: int | None = None) -> bytes:
    """One chunk and an index whose checksums are all right."""
    chunk = body + struct.pack("<I", crc32c(body))
    index = struct.pack("<QQ", offset, len(chunk) if length is None else length)
    return chunk + index + struct.pack("<I", crc32c(index))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (crafted(b"", length=2**64 - 1, offset=2**64 - 1), "missing"),
        (crafted(b"x" * 16, offset=1), "outside"),
        (crafted(b"x" * 16, length=2**63), "outside"),
        (crafted(b""), "empty"),
        (crafted(b"x" * 15), "15 bytes|decompresses to -1"),
        (crafted(b"x" * 17), "17 bytes|decompresses to -1|decompresses to 2021161080"),
        (crafted(zstd.compress(bytes(1 << 24), 1)), "bytes, not 16|16777216"),
        (crafted(zstd.compress(bytes(8), 1)), "bytes, not 16|decompresses to 8"),
        (crafted(blosc.compress(bytes(1 << 24), b"zstd", 1)), "bytes, not 16"),
        (crafted(zstd.compress(bytes(16), 1)[:-1]), "bytes, not 16|not decompress|-1"),
    ],
)
@pytest.mark.parametrize("compressor", ["none", "zstd", "shuffle"])
def test_chunks_that_are_not_of_their_size_are_refused_before_they_are_decompressed(
    data: bytes, what: str, compressor: Any
) -> None:
    part = Part("uint8", (), compressor=compressor)
    if compressor == "none" and len(data) == 16 + 4 + 20:
        return  # sixteen raw bytes are what a chunk of sixteen bytes holds
    with pytest.raises(CorruptObjectError, match=what):
        decoded(data, part, slice(0, 16), shard=16, chunk=16)


def test_rows_go_where_they_are_asked_to() -> None:
    part = Part("uint8", (4,))
    room = np.full((60, 4), 99, dtype=np.uint8)
    for rows, seed in ((40, 0), (50, 1), (3, 2)):
        values = values_of(part, rows, seed)
        _, data = encode_shard(part, values, shard_rows=SHARD, chunk_rows=CHUNK)
        view = memoryview(data)
        sizes = ShardSizes(len(data), SHARD, CHUNK)
        found = decode_rows(lambda a, b, view=view: view[a:b], sizes, part, slice(0, rows), where="here", out=room)
        assert np.array_equal(found, values)
        assert np.shares_memory(found, room)
    assert (room[50:] == 99).all()

"""The direct way from an object's bytes to rows: the shard index, then its chunks, each checked and decompressed.

What `arrays.py` writes through zarr-python is read here without it, because a slice through it costs a millisecond
whatever its size. The layout is Zarr v3's sharding codec: chunks anywhere in the object, and at its end an index
of (offset, length) pairs in uint64 with a CRC-32C. Decompression and checksums release the interpreter's lock.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from crc32c import crc32c
from numcodecs import blosc, zstd
from numpy.typing import NDArray

from kdcache.codecs import Part
from kdcache.errors import CorruptObjectError

Array = NDArray[Any]

CHECKSUM_BYTES = 4


@dataclass(frozen=True, slots=True)
class ShardSizes:
    """Sizes of one shard's object.

    Attributes:
        object: In bytes.
        shard_rows: Rows of the shard, fill included; a part with one entry a shard has 1 whatever stands here.
        chunk_rows: Rows of a chunk.
    """

    object: int
    shard_rows: int
    chunk_rows: int


def decode_rows(
    part: Callable[[int, int], memoryview],
    sizes: ShardSizes,
    layout: Part,
    rows: slice,
    *,
    where: str,
    out: Array | None = None,
) -> Array:
    """Return a run of rows of one shard's object; only its chunks are read, each once.

    Args:
        part: Gives bytes start to stop of the object; each call may write over what the one before gave.
        sizes: Of the object and of its shard.
        layout: What the object holds.
        rows: Counted from the shard's first.
        where: Name of the object, for errors.
        out: Where the rows go, [at least as many, *shape] and contiguous; default: fresh memory.

    Raises:
        CorruptObjectError: A checksum is wrong, or a chunk is missing or not of its size.
    """
    shard, chunk = (sizes.shard_rows, sizes.chunk_rows) if layout.per == "row" else (1, 1)
    index = _index(part, sizes.object, shard // chunk, where)
    count = rows.stop - rows.start
    out = np.empty((count, *layout.shape), dtype=layout.dtype) if out is None else out[:count]
    row_bytes = out.itemsize * int(np.prod(layout.shape, dtype=np.int64))
    flat = out.reshape(-1).view(np.uint8)
    for number in range(rows.start // chunk, -(-rows.stop // chunk)):
        first, last = max(rows.start, number * chunk), min(rows.stop, (number + 1) * chunk)
        here = flat[(first - rows.start) * row_bytes : (last - rows.start) * row_bytes]
        whole = here if last - first == chunk else np.empty(chunk * row_bytes, dtype=np.uint8)
        offset, length = (int(value) for value in index[number])
        _chunk(part(offset, offset + length), layout, whole, f"{where}, chunk {number}")
        if whole is not here:
            begin = (first - number * chunk) * row_bytes
            here[:] = whole[begin : begin + len(here)]
    return out


def _index(part: Callable[[int, int], memoryview], size: int, chunks: int, where: str) -> NDArray[np.uint64]:
    room = size - 16 * chunks - CHECKSUM_BYTES
    if room < 0:
        raise _damaged("it is shorter than its index", where)
    tail = part(room, size)
    if crc32c(tail[:-CHECKSUM_BYTES]) != int.from_bytes(tail[-CHECKSUM_BYTES:], "little"):
        raise _damaged("the checksum of its index is wrong", where)
    index = np.frombuffer(tail[:-CHECKSUM_BYTES], dtype="<u8").reshape(chunks, 2).copy()
    offsets, lengths = index[:, 0], index[:, 1]
    # an absent chunk has both numbers at 2**64 - 1: it would read as fill, and no chunk of ours is absent
    if (lengths > np.uint64(room)).any() or (offsets > np.uint64(room) - lengths).any():
        raise _damaged("a chunk is missing or outside of it", where)
    return index


def _chunk(data: memoryview, layout: Part, out: NDArray[np.uint8], where: str) -> None:
    if len(data) <= CHECKSUM_BYTES:
        raise _damaged("it is empty", where)
    body, checksum = data[:-CHECKSUM_BYTES], data[-CHECKSUM_BYTES:]
    if crc32c(body) != int.from_bytes(checksum, "little"):
        raise _damaged("its checksum is wrong", where)
    if layout.compressor == "none":
        if len(body) != len(out):
            raise _damaged(f"it has {len(body)} bytes, not {len(out)}", where)
        out[:] = np.frombuffer(body, dtype=np.uint8)
        return
    plain_zstd = layout.compressor in ("zstd", "fast")
    declared = _zstd_size(body) if plain_zstd else _blosc_size(body)
    if declared != len(out):
        raise _damaged(f"it decompresses to {declared} bytes, not {len(out)}", where)
    try:
        (zstd if plain_zstd else blosc).decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise _damaged(f"it does not decompress: {error}", where) from error


def _blosc_size(body: memoryview) -> int:
    # Blosc 1 header: version, version of the compressor, flags, type size, then the uncompressed and compressed sizes
    return -1 if len(body) < 16 else int(struct.unpack_from("<I", body, 4)[0])


def _zstd_size(body: memoryview) -> int:
    """The content size a zstd frame declares (RFC 8878, section 3.1.1.1), or -1 where it declares none."""
    if len(body) < 6 or bytes(body[:4]) != b"\x28\xb5\x2f\xfd":
        return -1
    descriptor = body[4]
    flag, single = descriptor >> 6, descriptor >> 5 & 1
    size = (1 if single else 0, 2, 4, 8)[flag]
    start = 5 + (not single) + (0, 1, 2, 4)[descriptor & 3]
    if size == 0 or len(body) < start + size:
        return -1
    return int.from_bytes(body[start : start + size], "little") + (256 if size == 2 else 0)


def _damaged(what: str, where: str) -> CorruptObjectError:
    return CorruptObjectError(
        f"An object is damaged: {what}.",
        where=where,
        hint="Run `kdcache verify` to list all damage; copy the store again, or capture it again.",
    )

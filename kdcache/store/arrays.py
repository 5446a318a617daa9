"""The writing side of Zarr: one shard's rows to the bytes of its objects, and the metadata that describes them.

All compression, sharding and checksums are zarr-python's, which is imported when something is written: readers do
without. What is ours: a shard is encoded in memory, so that it can be written atomically and digested. `chunks.py` and
`layout.py` are the reading side.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import Compressor, Part
from kdcache.store.schema import RANKED, Column

if TYPE_CHECKING:
    import zarr
    from zarr.core.buffer import Buffer

Array = NDArray[Any]


def encode_shard(part: Part, values: Array, *, shard_rows: int, chunk_rows: int) -> tuple[str, bytes]:
    """Return the key suffix (after `c/<shard>`) and the bytes of one shard of an array.

    Args:
        part: What the array holds.
        values: [N, *shape] with N <= shard_rows (one entry for a per-shard part); the rest is filled with zeros.
        shard_rows: Rows of the shard.
        chunk_rows: Rows of an inner chunk.
    """
    rows, chunk = (shard_rows, chunk_rows) if part.per == "row" else (1, 1)
    held: dict[str, Buffer] = {}
    array = _create(held, part, rows, rows, chunk)
    padded = np.zeros((rows, *part.shape), dtype=part.dtype)
    padded[: len(values)] = values
    array[...] = padded
    key = "/".join(["c", "0", *("0" for _ in part.shape)])
    return key.removeprefix("c/0"), held[key].to_bytes()


def encode_column(
    column: Column, values: Array, ranks: NDArray[np.int32], *, shard_rows: int, chunk_rows: int
) -> dict[tuple[str, str], bytes]:
    """Return the objects of one shard of a column: (path of the array, key suffix after `c/<shard>`) to bytes.

    Args:
        column: Which.
        values: [N, *shape], decoded.
        ranks: [V], of the ids; used by columns that keep ranks.
        shard_rows: Rows of the shard.
        chunk_rows: Rows of an inner chunk.

    Raises:
        ValueError: A value that the column's codec cannot keep.
    """
    parts = column.build().encode(values if column.codec != RANKED else ranks[values])
    found = {}
    for part, (path, layout) in column.arrays().items():
        suffix, data = encode_shard(layout, parts[part], shard_rows=shard_rows, chunk_rows=chunk_rows)
        found[path, suffix] = data
    return found


def encoded_bytes(columns: Sequence[Column], values: Mapping[str, Array], ranks: NDArray[np.int32]) -> int:
    """Return the size of the objects that hold N rows of some columns as one chunk.

    Args:
        columns: Which.
        values: Column to [N, *shape], decoded.
        ranks: [V], of the ids.

    Raises:
        ValueError: A value that its column's codec cannot keep.
    """
    total = 0
    for column in columns:
        rows = len(values[column.name])
        found = encode_column(column, values[column.name], ranks, shard_rows=rows, chunk_rows=rows)
        total += sum(map(len, found.values()))
    return total


def array_metadata(part: Part, shards: int, *, shard_rows: int, chunk_rows: int) -> bytes:
    """Return the `zarr.json` of the whole array: all shards, one after the other."""
    rows, chunk = (shard_rows, chunk_rows) if part.per == "row" else (1, 1)
    held: dict[str, Buffer] = {}
    _create(held, part, rows * shards, rows, chunk)
    return held["zarr.json"].to_bytes()


def group_metadata() -> bytes:
    """Return the `zarr.json` of a group."""
    import zarr
    from zarr.storage import MemoryStore

    held: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(held))
    return held["zarr.json"].to_bytes()


def _create(held: "dict[str, Buffer]", part: Part, rows: int, shard: int, chunk: int) -> "zarr.Array[Any]":
    import zarr
    from zarr.codecs import Crc32cCodec
    from zarr.storage import MemoryStore

    return zarr.create_array(
        store=MemoryStore(held),
        shape=(rows, *part.shape),
        shards=(shard, *part.shape),
        chunks=(chunk, *part.shape),
        dtype=part.dtype,
        compressors=(*_compressor(part.compressor, np.dtype(part.dtype).itemsize), Crc32cCodec()),
        filters=None,
        fill_value=0,
        # an absent chunk would read as fill: every chunk is written, so that absence is damage
        config={"write_empty_chunks": True},
    )


def _compressor(name: Compressor, itemsize: int) -> tuple[Any, ...]:
    from zarr.codecs import BloscCodec, ZstdCodec

    if name == "none":
        return ()
    if name == "zstd":
        return (ZstdCodec(level=3),)
    if name == "fast":
        return (ZstdCodec(level=1),)
    return (BloscCodec(typesize=itemsize, cname="zstd", clevel=3, shuffle=name),)

"""Zarr on both sides: one shard's rows to the bytes of its objects, and verified objects back to rows.

All compression, sharding and checksums are zarr-python's. What is ours: a shard is encoded in memory, so that it
can be written atomically and digested; and zarr reads through `VerifiedObjects`, which hands out no byte of an
object before its length and digest agreed with the manifest.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, BufferPrototype, default_buffer_prototype
from zarr.storage import MemoryStore

from kdcache.codecs import Compressor, Part
from kdcache.errors import CorruptObjectError, KdcacheError
from kdcache.store.objects import Object, locate, read_object

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


def array_metadata(part: Part, shards: int, *, shard_rows: int, chunk_rows: int) -> bytes:
    """Return the `zarr.json` of the whole array: all shards, one after the other."""
    rows, chunk = (shard_rows, chunk_rows) if part.per == "row" else (1, 1)
    held: dict[str, Buffer] = {}
    _create(held, part, rows * shards, rows, chunk)
    return held["zarr.json"].to_bytes()


def group_metadata() -> bytes:
    """Return the `zarr.json` of a group."""
    held: dict[str, Buffer] = {}
    zarr.create_group(store=MemoryStore(held))
    return held["zarr.json"].to_bytes()


def open_array(objects: "VerifiedObjects", path: str) -> "zarr.Array[Any]":
    """Return the array at a path, whose every read is verified."""
    return zarr.open_array(store=objects, path=path, mode="r", zarr_format=3)


def read(array: "zarr.Array[Any]", start: int, stop: int) -> Array:
    """Return entries start to stop of an array.

    Raises:
        CorruptObjectError: A chunk does not decode, or its own checksum is wrong.
    """
    try:
        return np.asarray(array[start:stop])
    except KdcacheError:
        raise
    except Exception as error:
        raise CorruptObjectError(
            f"A chunk does not decode: {error}.", where=str(array.path), hint="Run `kdcache verify`."
        ) from error


class VerifiedObjects(Store):
    """A read-only Zarr store over the objects of a manifest; each is verified once, before its first byte is used."""

    supports_writes = False
    supports_deletes = False
    supports_listing = True

    def __init__(self, root: Path, objects: Mapping[str, Object]) -> None:
        super().__init__(read_only=True)
        self.root = root
        self.objects = objects
        self._verified: set[str] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifiedObjects) and (self.root, self.objects) == (other.root, other.objects)

    __hash__ = None  # type: ignore[assignment]

    def content(self, key: str) -> bytes:
        """Return a whole object, verified."""
        data = read_object(self.root, key, self.objects[key])
        self._verified.add(key)
        return data

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object or a range of it; None only for a key the manifest does not name."""
        if key not in self.objects:
            return None
        buffer = (prototype or default_buffer_prototype()).buffer
        if key not in self._verified or byte_range is None:
            return buffer.from_bytes(_cut(self.content(key), byte_range))
        start, stop = _bounds(self.objects[key].bytes, byte_range)
        with locate(self.root, key).open("rb") as file:
            file.seek(start)
            return buffer.from_bytes(file.read(stop - start))

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return several ranges."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        """Say whether the manifest names the key."""
        return key in self.objects

    async def list(self) -> AsyncIterator[str]:
        """Yield the names in the manifest."""
        for key in self.objects:
            yield key

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Yield the names that begin with a prefix."""
        for key in self.objects:
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Yield what lies directly below a folder."""
        folder = prefix.rstrip("/") + "/" if prefix else ""
        below = {key.removeprefix(folder).split("/")[0] for key in self.objects if key.startswith(folder)}
        for name in sorted(below):
            yield name

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse: a store is never changed through Zarr."""
        raise PermissionError("a kdcache store is read-only")

    async def delete(self, key: str) -> None:
        """Refuse: a store is never changed through Zarr."""
        raise PermissionError("a kdcache store is read-only")


def _create(held: dict[str, Buffer], part: Part, rows: int, shard: int, chunk: int) -> "zarr.Array[Any]":
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
    if name == "none":
        return ()
    if name == "zstd":
        return (ZstdCodec(level=3),)
    return (BloscCodec(typesize=itemsize, cname="zstd", clevel=3, shuffle=name),)


def _cut(data: bytes, byte_range: ByteRequest | None) -> bytes:
    start, stop = _bounds(len(data), byte_range)
    return data[start:stop]


def _bounds(length: int, byte_range: ByteRequest | None) -> tuple[int, int]:
    match byte_range:
        case None:
            return 0, length
        case RangeByteRequest(start=start, end=end):
            return start, min(end, length)
        case OffsetByteRequest(offset=offset):
            return offset, length
        case SuffixByteRequest(suffix=suffix):
            return max(0, length - suffix), length
        case _:
            raise TypeError(f"unknown byte range {byte_range!r}")

"""How an array lies in Zarr v3, spelled out: what its `zarr.json` must say. The reading side's; imports no zarr.

`arrays.py` has zarr-python write the metadata; a test holds the two together. Reading needs no more than this, and
importing zarr-python takes longer than opening a store.
"""

from typing import Any

import numpy as np

from kdcache.codecs import Part
from kdcache.errors import CorruptObjectError
from kdcache.store.manifest import strict_json

_LEVELS = {"zstd": 3, "fast": 1}


def layout_of(part: Part, shards: int, *, shard_rows: int, chunk_rows: int) -> dict[str, Any]:
    """Return the members of `zarr.json` that say where every value of an array lies.

    Args:
        part: What the array holds.
        shards: Of the array.
        shard_rows: Rows of a shard.
        chunk_rows: Rows of an inner chunk.
    """
    rows, chunk = (shard_rows, chunk_rows) if part.per == "row" else (1, 1)
    inner = [_little(np.dtype(part.dtype).itemsize), *_compressor(part), {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [chunk, *part.shape],
        "codecs": inner,
        "index_codecs": [_little(8), {"name": "crc32c"}],
        "index_location": "end",
    }
    return {
        "shape": [rows * shards, *part.shape],
        "data_type": part.dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [rows, *part.shape]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "zarr_format": 3,
        "node_type": "array",
    }


HARMLESS = {"attributes", "dimension_names", "storage_transformers"}
"""Members that say nothing about the bytes, or must be empty."""


def require_layout(metadata: bytes, expected: dict[str, Any], where: str) -> None:
    """Refuse an array whose `zarr.json` lays it out in another way; another wording of the same passes.

    Raises:
        CorruptObjectError: It does.
    """
    found = strict_json(metadata, where)
    if found.keys() - expected.keys() - HARMLESS or found.get("storage_transformers"):
        raise CorruptObjectError("An array has members that no array of ours has.", where=where)
    if any(_plain(found.get(key)) != _plain(value) for key, value in expected.items()):
        raise CorruptObjectError("An array is not laid out as the manifest says.", where=where)


def _plain(value: Any) -> Any:
    """Return a JSON value without the empty configurations that some writers spell out and others leave away."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items() if (key, one) != ("configuration", {})}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _little(itemsize: int) -> dict[str, Any]:
    return {"name": "bytes", "configuration": {"endian": "little"}} if itemsize > 1 else {"name": "bytes"}


def _compressor(part: Part) -> list[dict[str, Any]]:
    if part.compressor == "none":
        return []
    if part.compressor in _LEVELS:
        return [{"name": "zstd", "configuration": {"level": _LEVELS[part.compressor], "checksum": False}}]
    blosc = {
        "typesize": np.dtype(part.dtype).itemsize,
        "cname": "zstd",
        "clevel": 3,
        "shuffle": part.compressor,
        "blocksize": 0,
    }
    return [{"name": "blosc", "configuration": blosc}]

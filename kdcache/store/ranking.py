"""A store's ranking: all ids of the vocabulary, those that stand in heads most often first.

Legend: `V` vocabulary, `K` kept entries.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kdcache.codecs import Part
from kdcache.errors import CorruptObjectError
from kdcache.fingerprint import digest_bytes
from kdcache.store.arrays import array_metadata, encode_shard
from kdcache.store.chunks import ShardSizes, decode_rows
from kdcache.store.objects import Objects

ARRAY = "ranking"
_PART = Part("uint32", (), compressor="shuffle")


def rank_by_count(counts: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the ids [V] by falling count, ties by lower id (tokenizers give common tokens lower ids)."""
    return np.argsort(-counts, kind="stable").astype(np.int32)


def ranks(ranking: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the rank [V] of every id."""
    inverse = np.empty(len(ranking), dtype=np.int32)
    inverse[ranking] = np.arange(len(ranking), dtype=np.int32)
    return inverse


def ranking_objects(ranking: NDArray[np.int32]) -> Iterator[tuple[str, bytes]]:
    """Yield the objects of a ranking by name."""
    size = len(ranking)
    _, data = encode_shard(_PART, ranking.astype(np.uint32), shard_rows=size, chunk_rows=size)
    yield f"{ARRAY}/zarr.json", array_metadata(_PART, 1, shard_rows=size, chunk_rows=size)
    yield f"{ARRAY}/c/0", data


def read_ranking(objects: Objects, size: int, digest: str) -> NDArray[np.int32]:
    """Return the ranking [V] of a store, or of one that was begun.

    Raises:
        CorruptObjectError: It is damaged, or lists an id twice or not at all.
    """
    name = f"{ARRAY}/c/0"
    data = memoryview(objects.content(name))
    found = decode_rows(
        lambda start, stop: data[start:stop], ShardSizes(len(data), size, size), _PART, slice(0, size), where=name
    )
    ids = found.astype(np.int32)
    whole = np.array_equal(np.sort(found), np.arange(size, dtype=np.uint32))
    if not whole or digest_bytes(ids.astype("<i4").tobytes()) != digest:
        raise CorruptObjectError(
            "The ranking is not a list of all ids.", where=name, hint="Copy the store again, or capture it again."
        )
    return ids

"""What a store consists of, as bytes by name: what comes before its first shard, and a shard.

Legend: `N` positions of a shard, `S` its samples.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.codecs import codec
from kdcache.errors import TeacherNumericsError
from kdcache.fingerprint import digest_bytes
from kdcache.store.arrays import array_metadata, encode_column, encode_shard, group_metadata
from kdcache.store.ranking import ranking_objects
from kdcache.store.schema import HEAD_CHUNK_ROWS, OutputHead, StorePlan

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class SampleTable:
    """The samples of one shard, in order.

    Attributes:
        ids: One stable, unique id each.
        rows: int [S], positions of each.
        extra: Further columns of the sample table, each [S, ...] float32 (pooled features).
        digests: Of what a classifier was given, 16 bytes each; None where the tokens are in the columns.
    """

    ids: Sequence[str]
    rows: Array
    extra: Mapping[str, Array] = field(default_factory=dict)
    digests: Sequence[bytes] | None = None


def start_objects(plan: StorePlan) -> Iterator[tuple[str, bytes]]:
    """Yield what a store has before its first shard, by name."""
    for name in ["zarr.json", "columns/zarr.json"] + (["output_head/zarr.json"] if plan.output_head else []):
        yield name, group_metadata()
    for column in plan.columns:
        for path, layout in column.arrays().values():
            rows = {"shard_rows": plan.shard_rows, "chunk_rows": plan.chunk_rows}
            yield f"{path}/zarr.json", array_metadata(layout, len(plan.shards), **rows)
    for file, content in plan.tokenizer_files.items():
        yield f"tokenizer/{file}", content
    if plan.output_head:
        yield from _head_objects(plan.output_head)
    if plan.ranking is not None:
        yield from ranking_objects(plan.ranking)


def _head_objects(head: OutputHead) -> Iterator[tuple[str, bytes]]:
    for name, values in (("weight", head.weight), ("bias", head.bias)):
        if values is None:
            continue
        kept = codec(head.codec)
        rows = -(-len(values) // HEAD_CHUNK_ROWS) * HEAD_CHUNK_ROWS
        part = kept.parts(values.shape[1:])[""]
        path = f"output_head/{name}"
        suffix, data = encode_shard(part, kept.encode(values)[""], shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        yield f"{path}/zarr.json", array_metadata(part, 1, shard_rows=rows, chunk_rows=HEAD_CHUNK_ROWS)
        yield f"{path}/c/0{suffix}", data


def shard_objects(
    plan: StorePlan, ranks: NDArray[np.int32], index: int, columns: Mapping[str, Array], samples: SampleTable
) -> Iterator[tuple[str, bytes]]:
    """Yield the objects of a shard by name.

    Args:
        plan: Of the store.
        ranks: [V], of the ids, where columns are kept as ranks.
        index: Which shard.
        columns: Decoded values [N, *shape] of every column of the plan.
        samples: Its samples.

    Raises:
        TeacherNumericsError: A value that the column's codec cannot keep.
    """
    for column in plan.columns:
        values = np.asarray(columns[column.name])
        rows = {"shard_rows": plan.shard_rows, "chunk_rows": plan.chunk_rows}
        try:
            made = encode_column(column, values, ranks, **rows)
        except ValueError as error:
            raise TeacherNumericsError(
                f"The column {column.name} cannot be kept: {error}.",
                where=f"shard {index}",
                hint="Set targets.logits (or the layer's dtype) to float32, or on_invalid to skip.",
            ) from error
        for (path, suffix), data in made.items():
            yield f"{path}/c/{index}{suffix}", data
    yield f"samples/{index:05d}.parquet", _sample_table(plan, index, columns, samples)


def _sample_table(plan: StorePlan, index: int, columns: Mapping[str, Array], samples: SampleTable) -> bytes:
    rows = np.asarray(samples.rows, dtype=np.int64)
    ends = np.cumsum(rows)
    shifted = int(plan.kind == "causal_lm")
    digests = samples.digests or [
        token_digest(columns["input_ids"][end - count : end], columns["labels"][end - count : end])
        for end, count in zip(ends.tolist(), rows.tolist(), strict=True)
    ]
    table: dict[str, Any] = {
        "sample_id": pa.array(list(samples.ids), pa.string()),
        "first_row": pa.array(index * plan.shard_rows + ends - rows, pa.int64()),
        "rows": pa.array(rows, pa.int32()),
        "tokens": pa.array(rows + shifted, pa.int32()),
        "token_digest": pa.array(digests, pa.binary(16)),
    }
    for name, values in samples.extra.items():
        flat = pa.array(np.ascontiguousarray(values, dtype=np.float32).reshape(-1))
        table[name] = pa.FixedSizeListArray.from_arrays(flat, int(np.prod(values.shape[1:])))
    sink = io.BytesIO()
    pq.write_table(pa.table(table), sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def token_digest(input_ids: Array, labels: Array) -> bytes:
    """Return the 16-byte identity of a sample's tokens: BLAKE3 over its inputs and last label as int64."""
    tokens = np.append(np.asarray(input_ids, dtype="<i8"), np.asarray(labels[-1:], dtype="<i8"))
    return bytes.fromhex(digest_bytes(tokens.tobytes())[:32])

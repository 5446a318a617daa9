"""The sample table of a shard: a Parquet file, whose sizes and types are looked at before anything is decoded."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kdcache.store.pages import decompressed_bytes

COLUMNS = {
    "sample_id": pa.string(),
    "first_row": pa.int64(),
    "rows": pa.int32(),
    "tokens": pa.int32(),
    "token_digest": pa.binary(16),
}
"""Besides them there may be `hidden.<layer>`, fixed-size lists of float32: features pooled over a sample."""

LEAST, SAMPLE = 8 << 20, 1 << 16
"""Bytes that a table may have when decompressed, and for each of its samples."""


def read_samples(data: bytes, samples: int) -> pa.Table:
    """Return the sample table in the bytes of its object.

    Args:
        data: Verified bytes.
        samples: That it must have.

    Raises:
        ValueError, pyarrow.ArrowException, OSError: It is no such table.
    """
    # no thread of Arrow's: one that still holds the bytes when the interpreter ends aborts the process
    # ids stay as they lie there: a text that comes a million times is there once
    options = {"page_checksum_verification": True, "pre_buffer": False, "read_dictionary": ["sample_id"]}
    file = pq.ParquetFile(pa.BufferReader(data), **options)
    found = file.metadata
    if found.num_rows != samples:
        raise ValueError(f"it has {found.num_rows} samples, not {samples}")
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    size = sum(group.column(number).total_uncompressed_size for group in groups for number in range(found.num_columns))
    size = max(size, decompressed_bytes(data, found))
    if size > LEAST + SAMPLE * samples:
        raise ValueError(f"it would have {size:,} bytes")
    for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True):
        pooled = name.startswith("hidden.") and pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
        if not pooled and COLUMNS.get(name) != (kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise ValueError(f"its column {name!r} is of the type {kind}")
    if missing := COLUMNS.keys() - set(file.schema_arrow.names):
        raise ValueError(f"it has no column {min(missing)!r}")
    table = file.read(use_threads=False)
    if table.num_rows != samples:  # its pages may hold less than its footer says
        raise ValueError(f"it holds {table.num_rows} samples, not {samples}")
    texts = sum(_length(chunk) for chunk in table["sample_id"].chunks)
    if texts > LEAST + SAMPLE * samples:
        raise ValueError(f"its ids would have {texts:,} bytes")
    return table.cast(pa.schema([field.with_type(COLUMNS.get(field.name, field.type)) for field in table.schema]))


def _length(texts: pa.Array) -> int:
    """Return the bytes of all texts, without writing any of them twice."""
    if pa.types.is_dictionary(texts.type):
        texts = pc.binary_length(texts.dictionary).take(texts.indices)
    else:
        texts = pc.binary_length(texts)
    return int(pc.sum(texts.cast(pa.int64())).as_py() or 0)

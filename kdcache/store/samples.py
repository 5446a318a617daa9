"""The sample table of a shard: a Parquet file, whose sizes and types are looked at before anything is decoded."""

import pyarrow as pa
import pyarrow.parquet as pq

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
    file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True, pre_buffer=False)
    found = file.metadata
    if found.num_rows != samples:
        raise ValueError(f"it has {found.num_rows} samples, not {samples}")
    groups = [found.row_group(number) for number in range(found.num_row_groups)]
    size = sum(group.column(number).total_uncompressed_size for group in groups for number in range(found.num_columns))
    if size > LEAST + SAMPLE * samples:
        raise ValueError(f"it would have {size:,} bytes")
    for name, kind in zip(file.schema_arrow.names, file.schema_arrow.types, strict=True):
        pooled = name.startswith("hidden.") and pa.types.is_fixed_size_list(kind) and kind.value_type == pa.float32()
        if not pooled and COLUMNS.get(name) != kind:
            raise ValueError(f"its column {name!r} is of the type {kind}")
    if missing := COLUMNS.keys() - set(file.schema_arrow.names):
        raise ValueError(f"it has no column {min(missing)!r}")
    return file.read(use_threads=False)

"""Lists of lists in Parquet, as rectangles: what every format here is made of.

Legend: `N` positions of a sample, `C` entries a position.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from kdcache.errors import SourceError

Array = NDArray[Any]

AT_ONCE = 16
"""Samples read at a time."""


def columns_in(files: Sequence[Path]) -> list[str]:
    """Return the columns that all files have.

    Raises:
        SourceError: One of them is no Parquet.
    """
    return sorted(set.intersection(*(set(_open(file).schema_arrow.names) for file in files)))


def count_in(files: Sequence[Path]) -> int:
    """Return the rows of all files."""
    return sum(_open(file).metadata.num_rows for file in files)


def rows_of(files: Sequence[Path], columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield, of every row of all files in order, where it stands and its Arrow scalars.

    Raises:
        SourceError: A file is damaged.
    """
    for file in files:
        number = 0
        try:
            for batch in _open(file).iter_batches(AT_ONCE, columns=list(columns), use_threads=False):
                for row in range(len(batch)):
                    yield f"{file.name}:{number}", {name: batch.column(name)[row] for name in columns}
                    number += 1
        except (pa.ArrowException, OSError) as error:
            raise SourceError(f"The file is damaged: {str(error).splitlines()[0]}", where=str(file)) from error


def vector(scalar: Any, dtype: str) -> Array:
    """Return the numbers [N] of a list.

    Raises:
        SourceError: It holds none, or something else.
    """
    try:
        flat: Array = scalar.values.to_numpy(zero_copy_only=False)
        return flat.astype(dtype)
    except (AttributeError, TypeError, ValueError, pa.ArrowException) as error:
        raise SourceError(f"A list of numbers is due, not {scalar.type}.") from error


def rectangle(scalar: Any, dtype: str, fill: float) -> Array:
    """Return the numbers [N, C] of a list of lists, shorter ones filled up, missing ones wholly.

    Raises:
        SourceError: It holds something else.
    """
    inner = scalar.values
    if inner is None or not (pa.types.is_list(inner.type) or pa.types.is_fixed_size_list(inner.type)):
        raise SourceError(f"A list of lists of numbers is due, not {scalar.type}.")
    lengths = pc.fill_null(pc.list_value_length(inner), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    try:
        flat = inner.drop_null().flatten().to_numpy(zero_copy_only=False).astype(dtype)
    except (TypeError, ValueError) as error:
        raise SourceError(f"A list of lists of numbers is due, not {scalar.type}.") from error
    return ragged(flat, lengths, dtype, fill)


def ragged(flat: Array, lengths: Array, dtype: str, fill: float) -> Array:
    """Return rows [N, C] of these lengths, filled up."""
    width = int(lengths.max(initial=0))
    found = np.full((len(lengths), width), fill, dtype=dtype)
    found[np.arange(width) < lengths[:, None]] = flat
    return found


def lists(values: Array, lengths: Sequence[int]) -> pa.Array:
    """Return a list a sample of the rows [all N, ...] of all samples; wider rows are fixed-size lists."""
    flat: pa.Array = pa.array(np.ascontiguousarray(values).reshape(-1))
    if values.ndim == 2:
        flat = pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32()), flat)


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"This is no Parquet that can be read: {str(error).splitlines()[0]}", where=str(file)
        ) from error

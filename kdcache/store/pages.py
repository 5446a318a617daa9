"""What the pages of a Parquet file say of their own sizes, before anything is decompressed.

A reader of Parquet makes room for what a page's header says, and the sizes in the file's footer need not agree. The
headers are Thrift's compact protocol: a field is a byte of (distance to the last field's number, type), numbers are
base-128 with the sign in the lowest bit (Apache Thrift, thrift-compact-protocol.md; Apache Parquet, parquet.thrift).
"""

from typing import Any

TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, STRUCT = 1, 2, 3, 7, 8, 9, 10, 12
NUMBERS = (4, 5, 6)
DEEPEST = 8


def decompressed_bytes(data: bytes, metadata: Any) -> int:
    """Return the bytes that all pages of a file say they have when decompressed.

    Args:
        data: The file.
        metadata: Its `pyarrow.parquet.FileMetaData`.

    Raises:
        ValueError: A page is not where the footer says, or its header is none.
    """
    total = 0
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            starts = [column.data_page_offset, column.dictionary_page_offset if column.has_dictionary_page else None]
            at = min(one for one in starts if one is not None)
            end = at + column.total_compressed_size
            if not 0 <= at <= end <= len(data):
                raise ValueError("a column is said to lie outside the file")
            while at < end:
                (uncompressed, compressed), at = _header(data, at)
                if uncompressed < 0 or not 0 <= compressed <= end - at:
                    raise ValueError("a page is said to be larger than its column")
                total += uncompressed
                at += compressed
    return total


def _header(data: bytes, at: int) -> tuple[tuple[int, int], int]:
    """Return the sizes of a page, decompressed and compressed (fields 2 and 3), and where its header ends."""
    try:
        found, at = _struct(data, at, 0)
        return (found[2], found[3]), at
    except (IndexError, KeyError) as error:
        raise ValueError("a page has no header") from error


def _struct(data: bytes, at: int, depth: int) -> tuple[dict[int, int], int]:
    if depth > DEEPEST:
        raise ValueError("a page's header is nested too deep")
    numbers, field = dict[int, int](), 0
    while kind := data[at] & 15:
        step = data[at] >> 4
        at += 1
        if step:
            field += step
        else:
            field, at = _number(data, at)
        if kind in NUMBERS:
            numbers[field], at = _number(data, at)
        else:
            at = _skip(data, at, kind, depth)
    return numbers, at + 1


def _skip(data: bytes, at: int, kind: int, depth: int) -> int:
    if kind in (TRUE, FALSE):
        return at
    if kind == BYTE:
        return at + 1
    if kind == DOUBLE:
        return at + 8
    if kind in NUMBERS:
        return _number(data, at)[1]
    if kind == BINARY:
        size, at = _unsigned(data, at)
        return at + size
    if kind == STRUCT:
        return _struct(data, at, depth + 1)[1]
    if kind in (LIST, SET):
        size, of = data[at] >> 4, data[at] & 15
        size, at = _unsigned(data, at + 1) if size == 15 else (size, at + 1)
        if size > len(data):
            raise ValueError("a list in a page's header is longer than the file")
        for _ in range(size):
            at = at + 1 if of in (TRUE, FALSE) else _skip(data, at, of, depth + 1)
        return at
    raise ValueError(f"a page's header has a field of the type {kind}")


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number in a page's header has too many bytes")


def _number(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at

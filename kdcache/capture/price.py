"""What a capture keeps, in bytes, said before the teacher runs over the data: attention maps and layers are not cheap.

Bytes are those of the columns as their codecs write them, before compression, which takes targets to a third or less
and features hardly down at all. Arrays that are not compressed are written for all the rows that a shard has room for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np

from kdcache.store import Column, StorePlan

FEATURE = "hidden."
"""Before the names of columns that hold features."""


@dataclass(frozen=True, slots=True)
class Price:
    """What one column takes before it is compressed, if it is.

    Attributes:
        name: Of the column.
        codec: Of the column.
        shape: Of an entry.
        per: What has one entry: what a row is, a sample, or the store.
        entry_bytes: Of one entry.
        bytes: Of all.
        feature: Whether it holds features, and not inputs or targets.
    """

    name: str
    codec: str
    shape: tuple[int, ...]
    per: str
    entry_bytes: int
    bytes: int
    feature: bool = False


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What a capture is about to do.

    Attributes:
        stage: "plan".
        row: What a row is: a position, or of examples a sample, a view or a token.
        samples: In the store.
        rows: In the store.
        shards: It is cut into.
        vocab_size: Outputs of the teacher.
        k: Of them kept in a row.
        columns: What each takes.
        bytes: Of all of them.
        feature_bytes: Of features among them.
        notes: Sentences about what takes much.
    """

    stage: ClassVar[str] = "plan"
    row: str
    samples: int
    rows: int
    shards: int
    vocab_size: int
    k: int
    columns: tuple[Price, ...]
    bytes: int
    feature_bytes: int
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Extent:
    """How much there is of what.

    Attributes:
        samples: All.
        rows: All.
        shards: All.
        room: Rows that they have room for.
        row: What one row is.
    """

    samples: int
    rows: int
    shards: int
    room: int
    row: str = "position"

    @staticmethod
    def of(plan: StorePlan, row: str = "position") -> "Extent":
        """Return that of a store."""
        samples, rows = (sum(getattr(one, name) for one in plan.shards) for name in ("samples", "rows"))
        return Extent(samples, rows, len(plan.shards), len(plan.shards) * plan.shard_rows, row)


def priced(
    columns: Sequence[Column],
    extent: Extent,
    *,
    vocab_size: int,
    k: int,
    pooled: Mapping[str, int] | None = None,
    head_width: int | None = None,
) -> CapturePlan:
    """Return what columns take in a store.

    Args:
        columns: Of the store.
        extent: How much there is.
        vocab_size: Outputs of the teacher.
        k: Kept of a row.
        pooled: Layer to width, of features kept once a sample.
        head_width: Of the output layer, where that is kept.
    """
    prices = [_price(column, extent) for column in columns]
    for layer, width in (pooled or {}).items():
        own = 4 * width  # the sample table holds float32
        prices.append(
            Price(f"{FEATURE}{layer}", "float32", (width,), "sample", own, own * extent.samples, feature=True)
        )
    if head_width is not None:
        exact = next(one.codec for one in columns if one.name == f"{FEATURE}final")
        own = vocab_size * head_width * (2 if exact == "bfloat16" else 4)
        prices.append(Price("output_head", exact, (vocab_size, head_width), "store", own, own))
    total, features = sum(one.bytes for one in prices), sum(one.bytes for one in prices if one.feature)
    return CapturePlan(
        row=extent.row,
        samples=extent.samples,
        rows=extent.rows,
        shards=extent.shards,
        vocab_size=vocab_size,
        k=k,
        columns=tuple(prices),
        bytes=total,
        feature_bytes=features,
        notes=tuple(_notes(prices, total - features, features, extent)),
    )


def _price(column: Column, extent: Extent) -> Price:
    entry = total = 0
    for _, part in column.arrays().values():
        own = math.prod(part.shape, start=np.dtype(part.dtype).itemsize)
        if part.per == "row":
            entry += own
            total += own * (extent.room if part.compressor == "none" else extent.rows)
        else:
            total += own * extent.shards
    return Price(
        column.name, column.codec, column.shape, extent.row, entry, total, feature=column.name.startswith(FEATURE)
    )


def _notes(prices: Sequence[Price], others: int, features: int, extent: Extent) -> list[str]:
    unused = sum(one.bytes - one.entry_bytes * extent.rows for one in prices if one.per == extent.row)
    notes = []
    if 2 * unused > others + features:
        notes.append(
            f"{unused:,} bytes are of rows that shards have room for and no {extent.row} is in: columns that are not "
            "compressed are written whole. Lower store.shard_positions and chunk_positions."
        )
    if features <= others:
        return notes
    largest = max((one for one in prices if one.feature), key=lambda one: one.bytes)
    smaller = (
        "Keep fewer layers, or dtype: int8 or keep: pooled of them."
        if extent.row == "position"
        else "Keep fewer, or of a tap |mean, |first or |heads, or dtype: int8."
    )
    notes.append(
        f"Features take {features:,} bytes, {features / max(1, others):.1f} times what all else does; the most is "
        f"{largest.name} with {largest.entry_bytes:,} a {largest.per}. {smaller}"
    )
    if extent.row == "token":
        notes.append(
            "A feature is kept with each of a sample's tokens that count, on average "
            f"{extent.rows / extent.samples:.1f} times."
        )
    return notes

"""What a store's reader hands out: samples, decoded shards, and shards that are still packed.

Legend: `N` positions, `S` samples, `L` tokens of a sample, `K` kept entries, `D` hidden width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.store.schema import Column
from kdcache.targets import Targets

Array = NDArray[Any]

HEAD = ("head_ids", "head_logits", "tail_log_partition", "label_logit")


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample and what the teacher said about it.

    Attributes:
        id: Stable id given by the source.
        input_ids: int64 [L], all its tokens; none of a classifier's sample, whose inputs are examples.
        labels: int64 [L-1], the next token at every position.
        loss_mask: bool [L-1], where the label counts.
        targets: The teacher's compact distribution of every label, [L-1] rows.
        hidden: Layer name to float32 [L-1, D], or [D] for features pooled over the sample.
    """

    id: str
    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]
    targets: Targets
    hidden: Mapping[str, NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Shard:
    """The decoded rows of one shard.

    Attributes:
        index: Which shard of the store.
        first_sample: Number of its first sample in the store.
        offsets: int64 [S+1], sample i has rows offsets[i] to offsets[i+1].
        columns: Decoded values [N, ...] of the columns that were asked for.
        table: Its part of the sample table.
        vocab_size: Of the teacher.
    """

    index: int
    first_sample: int
    offsets: NDArray[np.int64]
    columns: Mapping[str, Array]
    table: pa.Table
    vocab_size: int

    def targets(self, rows: slice = slice(None)) -> Targets | None:
        """Return the targets of a run of rows; None when their columns were not asked for."""
        if not all(name in self.columns for name in HEAD):
            return None
        return targets_of({name: values[rows] for name, values in self.columns.items()}, self.vocab_size)


@dataclass(frozen=True, slots=True)
class PackedShard:
    """A shard as its parts lie in the store, decompressed and not decoded.

    Attributes:
        index: Which shard of the store.
        first_sample: Number of its first sample in the store.
        offsets: int64 [S+1], sample i has rows offsets[i] to offsets[i+1].
        parts: Column to part to array [N, ...]; a column of a codec with per-shard parts is decoded, as its part "".
    """

    index: int
    first_sample: int
    offsets: NDArray[np.int64]
    parts: Mapping[str, Mapping[str, Array]]


def is_packed(column: Column) -> bool:
    """Say whether a column's parts all have an entry a row, so that any rows of them can be decoded alone."""
    return all(part.per == "row" for _, part in column.arrays().values())


def targets_of(columns: Mapping[str, Array], vocab_size: int) -> Targets:
    """Return the targets held by decoded columns."""
    return Targets(
        ids=columns["head_ids"].astype(np.int32, copy=False),
        logits=columns["head_logits"],
        tail=columns["tail_log_partition"],
        label_logit=columns["label_logit"],
        vocab_size=vocab_size,
        draw_ids=columns["draw_ids"].astype(np.int32, copy=False) if "draw_ids" in columns else None,
        draw_logits=columns.get("draw_logits"),
    )

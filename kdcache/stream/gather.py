"""Batches out of shards that are decompressed ahead of time.

Legend: `N` positions of a batch, `S` samples of the store.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.errors import CorruptObjectError, KdcacheError
from kdcache.store import PackedShard, Store, is_packed
from kdcache.store.schema import COUNTS, RANKED
from kdcache.stream.config import StreamConfig
from kdcache.stream.decoders import Decoders
from kdcache.targets.tensor import TensorTargets
from kdcache.unpack import PackedColumn, PackedTargets, RankTable, unpack

TOKENS = "input_ids"
LABELS = ("labels", "loss_mask")
TARGETS = ("head_ids", "head_logits", "tail_log_partition", "label_logit")
DRAWS = ("draw_ids", "draw_logits")

FIELDS = {
    "head_ids": "ids",
    "head_logits": "logits",
    "tail_log_partition": "tail",
    "label_logit": "label_logit",
    "draw_ids": "draw_ids",
    "draw_logits": "draw_logits",
}
"""Field of the targets that a column becomes."""

GATHERED_POSITIONS = 4096
"""Positions gathered and unpacked at a time: enough to make a call's cost small, few enough to stay in the cache."""

RECYCLED_BYTES = (1 << 25) - (1 << 13)
"""The largest memory that glibc's allocator learns to keep when it is freed (32 MiB with its header)."""


def columns_read(config: StreamConfig, store: Store) -> list[str]:
    """Return the names of the columns that a stream reads; a classifier's store has no tokens."""
    names = [TOKENS, *LABELS] if store.manifest.kind == "causal_lm" else list(LABELS)
    if config.targets:
        names += TARGETS
    if config.draws:
        names += DRAWS
    return [*names, *(f"hidden.{layer}" for layer in config.hidden), *config.extra]


class ShardReader:
    """Makes batches of samples in a known order, while the shards that come next are decompressed.

    It holds the shards of a pool and, ahead, those of the next: memory does not depend on the store's size.

    Args:
        store: Where from.
        config: What.
        samples: int64, their numbers in the order of the batches.
        bounds: Batch i has the samples at places bounds[i] to bounds[i+1].
        decoders: What decompresses, and where to.
    """

    def __init__(
        self,
        store: Store,
        config: StreamConfig,
        samples: NDArray[np.int64],
        bounds: Sequence[int],
        decoders: Decoders,
    ) -> None:
        self._store = store
        self._config = config
        self._columns = columns_read(config, store)
        self._samples, self._bounds = samples, bounds
        firsts = np.asarray([shard.first_sample for shard in store.shards])
        self._shards = np.searchsorted(firsts, samples, side="right") - 1
        # dictionaries keep the order of first appearance
        self._last = dict(zip(self._shards.tolist(), range(len(samples)), strict=True))
        self._needed = list(self._last)
        self._turns = {index: turn for turn, index in enumerate(self._needed)}
        self._asked = 0
        ranked = any(store.columns[name].codec == RANKED for name in self._columns)
        self._ids_by_rank = torch.from_numpy(store.ids_by_rank) if ranked else torch.zeros(0, dtype=torch.int32)
        self._table = RankTable(self._ids_by_rank)
        # room for three pools is enough for nearly every order, and costs nothing until it is used
        needed = max(_most_at_once(self._shards, bounds) + config.pool_shards, 3 * config.pool_shards)
        decoders.make_room(min(len(store.shards), needed), max((shard.rows for shard in store.shards), default=0))
        self._decoders, self._memory = decoders, decoders.memory
        self._free = list(range(self._memory.slots))
        # freed once, and the allocator keeps what later batches free: page faults were a third of the cost without
        np.empty(RECYCLED_BYTES, dtype=np.uint8)
        self._held: dict[int, tuple[int, Future[PackedShard]]] = {}
        self._starts: dict[int, tuple[int, list[int]]] = {}

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        # whoever reads next uses the same memory: nothing may write into it any more
        wait([task for _, task in self._held.values() if not task.cancel()])

    def __iter__(self) -> Iterator[list[Batch]]:
        """Yield the batches, those together that were gathered together."""
        bounds, number = self._bounds, 0
        while number < len(bounds) - 1:
            first, ended, positions = number, False, 0
            starts, stops = list[int](), list[int]()
            while number < len(bounds) - 1 and positions < GATHERED_POSITIONS and not ended:
                here = slice(bounds[number], bounds[number + 1])
                for sample, index in zip(self._samples[here].tolist(), self._shards[here].tolist(), strict=True):
                    first_sample, rows = self._starts.get(index) or self._shard(index)
                    starts.append(rows[sample - first_sample])
                    stops.append(rows[sample - first_sample + 1])
                    positions += stops[-1] - starts[-1]
                    ended = ended or self._last[index] < here.stop
                number += 1
            begins = np.asarray(starts)
            yield list(self._gathered(first, number, begins, np.asarray(stops) - begins))
            for index in [one for one in self._held if self._last[one] < bounds[number]]:
                self._free.append(self._held.pop(index)[0])
                del self._starts[index]

    def _shard(self, index: int) -> tuple[int, list[int]]:
        """Return a shard's first sample, and where in memory the rows of each of its samples begin, and the last end.

        It has been asked for in time if those before it have been; those that come after it are asked for here.
        """
        turn = self._turns[index]
        try:
            while self._asked <= min(turn + self._config.pool_shards, len(self._needed) - 1) and self._free:
                slot, one = self._free.pop(), self._needed[self._asked]
                self._held[one] = (slot, self._decoders.submit(one, slot))
                self._asked += 1
            slot, task = self._held[index]
            shard = task.result()
        except BrokenProcessPool as error:
            self._decoders.close()
            raise KdcacheError(
                "A process that reads shards was killed.",
                where=str(self._store.path),
                hint="Most often memory ran out: lower workers or pool_shards.",
            ) from error
        self._starts[index] = shard.first_sample, (shard.offsets + slot * self._memory.rows).tolist()
        return self._starts[index]

    def _gathered(
        self, first: int, last: int, starts: NDArray[np.int64], lengths: NDArray[np.int64]
    ) -> Iterator[Batch]:
        """Yield batches first to last as views of what is unpacked for all of them together."""
        ends = np.cumsum(lengths)
        rows = np.repeat(starts - (ends - lengths), lengths) + np.arange(int(ends[-1]) if len(ends) else 0)
        packs = self._config.packed and self._config.targets
        columns = {name: self._column(name, rows) for name in self._columns if not packs or name not in FIELDS}
        packed = {name: self._packed(name, rows) for name in self._columns if packs and name in FIELDS}
        offsets = np.concatenate([[0], ends])
        origin = self._bounds[first]
        for number in range(first, last):
            begin, end = self._bounds[number], self._bounds[number + 1]
            inside = offsets[begin - origin : end - origin + 1]
            span = slice(int(inside[0]), int(inside[-1]))
            here = {name: values[span] for name, values in columns.items()}
            yield Batch(
                input_ids=here["input_ids"].long() if "input_ids" in here else torch.zeros(0, dtype=torch.int64),
                labels=here["labels"].long(),
                mask=here["loss_mask"] == COUNTS,
                offsets=torch.from_numpy(inside - inside[0]),
                sample_index=torch.from_numpy(self._samples[begin:end].astype(np.int64)),
                targets=_targets(here, self._store.vocab_size) if self._config.targets and not packs else None,
                packed=self._packed_targets(packed, span) if packs else None,
                hidden={name: here[f"hidden.{name}"] for name in self._config.hidden},
                extra={name: here[name] for name in self._config.extra},
            )

    def _column(self, name: str, rows: NDArray[np.int64]) -> torch.Tensor:
        column = self._store.columns[name]
        parts = self._parts(name, rows)
        if column.unit == "id" and parts.keys() == {""} and parts[""].dtype == np.uint32:
            # a vocabulary ends far below 2**31: once that is checked, its ids are int32 as they lie there
            self._require_ids(name, int(parts[""].max(initial=0)))
            return torch.from_numpy(parts[""].view(np.int32))
        values = unpack(column.build(), parts) if is_packed(column) else torch.from_numpy(parts[""])
        if column.codec == RANKED:
            values = self._ids_by_rank.index_select(0, values.view(-1)).view(values.shape)
        if column.unit == "id":
            self._require_ids(name, int(values.max()) if values.numel() else 0)
        return values

    def _packed(self, name: str, rows: NDArray[np.int64]) -> PackedColumn:
        column = self._store.columns[name]
        codec, parts = column.build(), self._parts(name, rows)
        if not is_packed(column):
            return PackedColumn(None, {"": torch.from_numpy(parts[""])}, None)
        if column.unit == "id" and len(rows):
            # the highest byte alone says of nearly every row that its ids are small enough
            *_, top = parts.values()
            limit = (self._store.vocab_size - 1) >> 8 * (len(parts) - 1)
            if int(top.max()) >= limit:
                doubtful = (top >= limit).reshape(len(rows), -1).any(1)
                highest = codec.decode({part: values[doubtful] for part, values in parts.items()}).max(initial=0)
                self._require_ids(name, int(highest))
        return PackedColumn.of(codec, parts, self._table)

    def _packed_targets(self, columns: dict[str, PackedColumn], rows: slice) -> PackedTargets:
        fields = {FIELDS[name]: column.each(lambda part: part[rows]) for name, column in columns.items()}
        return PackedTargets(fields, self._store.vocab_size)

    def _parts(self, name: str, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        return {part: values.take(rows, axis=0) for part, values in self._memory.arrays[name].items()}

    def _require_ids(self, name: str, highest: int) -> None:
        if highest >= self._store.vocab_size:
            raise CorruptObjectError(
                f"The column {name} has an id beyond the vocabulary of {self._store.vocab_size}.",
                where=str(self._store.path),
                hint="Do not use this store; it was not written by kdcache.",
            )


def _most_at_once(shards: NDArray[np.int64], bounds: Sequence[int]) -> int:
    """Return how many shards are in use at once at most, each from its first batch to its last."""
    batch = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    change = np.zeros(len(bounds) + 1, dtype=np.int64)
    _, first = np.unique(shards, return_index=True)
    _, last = np.unique(shards[::-1], return_index=True)
    np.add.at(change, batch[first], 1)
    np.add.at(change, batch[len(shards) - 1 - last] + 1, -1)
    return int(np.cumsum(change).max(initial=0))


def _targets(columns: dict[str, torch.Tensor], vocab_size: int) -> TensorTargets:
    # ids stay int32: twice the bytes would cost more than reading them did, and what indexes with them widens them
    values = {field: columns[name] for name, field in FIELDS.items() if name in columns}
    return TensorTargets(**values, vocab_size=vocab_size)

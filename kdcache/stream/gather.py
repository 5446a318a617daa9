"""Batches out of shards that threads decompress ahead of time.

Legend: `N` positions of a batch, `S` samples of the store.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.batch import Batch
from kdcache.errors import CorruptObjectError
from kdcache.store import PackedShard, Store, is_packed
from kdcache.store.schema import COUNTS, RANKED
from kdcache.stream.config import StreamConfig
from kdcache.targets.tensor import TensorTargets
from kdcache.unpack import unpack

INPUTS = ("input_ids", "labels", "loss_mask")
TARGETS = ("head_ids", "head_logits", "tail_log_partition", "label_logit")
DRAWS = ("draw_ids", "draw_logits")

GATHERED_POSITIONS = 8192
"""Positions gathered and unpacked at a time: enough to make a call's cost small, few enough to stay in the cache."""


def columns_read(config: StreamConfig) -> list[str]:
    """Return the names of the columns that a stream reads."""
    names = list(INPUTS)
    if config.targets:
        names += TARGETS
    if config.draws:
        names += DRAWS
    return names + [f"hidden.{layer}" for layer in config.hidden]


class ShardReader:
    """Makes batches of samples in a known order; threads decode the shards that come next.

    It holds the shards of a pool and decodes those of the next: memory does not depend on the store's size.

    Args:
        store: Where from.
        config: What.
        samples: int64, their numbers in the order in which they will be asked for.
        threads: That decode.
        spare: Shards whose memory may be written over; those that are done with are added.
    """

    def __init__(
        self,
        store: Store,
        config: StreamConfig,
        samples: NDArray[np.int64],
        *,
        threads: int,
        spare: list[PackedShard],
    ) -> None:
        self._store = store
        self._config = config
        self._columns = columns_read(config)
        self._samples = samples
        firsts = np.asarray([shard.first_sample for shard in store.shards])
        self._shards = np.searchsorted(firsts, samples, side="right") - 1
        self._last = dict(zip(self._shards.tolist(), range(len(samples)), strict=True))
        self._needed = list(self._last)  # a dictionary keeps the order of first appearance
        self._turns = {index: turn for turn, index in enumerate(self._needed)}
        self._asked = 0
        ranked = any(store.columns[name].codec == RANKED for name in self._columns)
        self._ids_by_rank = torch.from_numpy(store.ids_by_rank) if ranked else torch.zeros(0, dtype=torch.int32)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kdcache-decode")
        self._held: dict[int, Future[PackedShard]] = {}
        self._spare = spare

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)
        done = [one for one in self._held.values() if one.done() and not one.cancelled() and not one.exception()]
        self._spare += [one.result() for one in done]

    def batches(self, bounds: Sequence[int]) -> Iterator[Batch]:
        """Yield the batches whose samples stand at places bounds[i] to bounds[i+1] of the order."""
        number = 0
        while number < len(bounds) - 1:
            first, places, rows = number, list[tuple[PackedShard, slice]](), 0
            ends = []
            while number < len(bounds) - 1 and rows < GATHERED_POSITIONS:
                places += self._places(bounds[number], bounds[number + 1])
                rows = sum(place.stop - place.start for _, place in places)
                ends.append(rows)
                number += 1
            yield from self._gathered(places, bounds[first : number + 1], ends)
            for index in [one for one in self._held if self._last[one] < bounds[number]]:
                self._spare.append(self._held.pop(index).result())

    def _places(self, begin: int, end: int) -> Iterator[tuple[PackedShard, slice]]:
        for number, index in zip(self._samples[begin:end].tolist(), self._shards[begin:end].tolist(), strict=True):
            shard = self._shard(index)
            inside = number - shard.first_sample
            yield shard, slice(int(shard.offsets[inside]), int(shard.offsets[inside + 1]))

    def _gathered(
        self, places: list[tuple[PackedShard, slice]], bounds: Sequence[int], ends: Sequence[int]
    ) -> Iterator[Batch]:
        """Yield batches as views of what is unpacked for all of them together."""
        columns = {name: self._column(name, places) for name in self._columns}
        lengths = np.asarray([place.stop - place.start for _, place in places], dtype=np.int64)
        for number, rows in enumerate(pairwise([0, *ends])):
            begin, end = bounds[number], bounds[number + 1]
            here = {name: values[rows[0] : rows[1]] for name, values in columns.items()}
            inside = lengths[begin - bounds[0] : end - bounds[0]]
            yield Batch(
                input_ids=here["input_ids"].long(),
                labels=here["labels"].long(),
                mask=here["loss_mask"] == COUNTS,
                offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(inside)])),
                sample_index=torch.from_numpy(self._samples[begin:end].astype(np.int64)),
                targets=_targets(here, self._store.vocab_size) if self._config.targets else None,
                hidden={name: here[f"hidden.{name}"] for name in self._config.hidden},
            )

    def _column(self, name: str, places: list[tuple[PackedShard, slice]]) -> torch.Tensor:
        column = self._store.columns[name]
        parts = {
            part: np.concatenate([shard.parts[name][part][rows] for shard, rows in places])
            for part in places[0][0].parts[name]
        }
        values = unpack(column.build(), parts) if is_packed(column) else torch.from_numpy(parts[""])
        if column.codec == RANKED:
            values = self._ids_by_rank.index_select(0, values.view(-1)).view(values.shape)
        if column.unit == "id" and values.numel() and int(values.max()) >= self._store.vocab_size:
            raise CorruptObjectError(
                f"The column {name} has an id beyond the vocabulary of {self._store.vocab_size}.",
                where=str(self._store.path),
                hint="Do not use this store; it was not written by kdcache.",
            )
        return values

    def _shard(self, index: int) -> PackedShard:
        for one in self._needed[self._asked : self._turns[index] + self._config.pool_shards + 1]:
            spare = self._spare.pop() if self._spare else None
            self._held[one] = self._threads.submit(self._store.read_packed, one, self._columns, spare)
            self._asked += 1
        return self._held[index].result()


def _targets(columns: dict[str, torch.Tensor], vocab_size: int) -> TensorTargets:
    return TensorTargets(
        # twice the bytes would cost more than reading them did: what indexes with ids widens them
        ids=columns["head_ids"],
        logits=columns["head_logits"],
        tail=columns["tail_log_partition"],
        label_logit=columns["label_logit"],
        vocab_size=vocab_size,
        draw_ids=columns.get("draw_ids"),
        draw_logits=columns.get("draw_logits"),
    )

"""Stage 2 input: a store as ordered, resumable batches.

Legend: `N` positions of a batch, `S` samples of the store.

The order is a pure function of (seed, epoch, shard layout), and of the teacher's scores where hard samples come more
often. Global batch g is the g-th run of batch_size * world_size
samples in it; rank r takes every world_size-th of them from r. Neither workers nor prefetching change it, so the
state that resumes a run is one number: the batches consumed.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Store, open_store
from kdcache.stream.config import StreamConfig
from kdcache.stream.decoders import Decoders
from kdcache.stream.gather import ShardReader, columns_read
from kdcache.stream.order import sample_order
from kdcache.stream.prefetch import prefetched
from kdcache.stream.sampling import SamplingConfig, sample_weights
from kdcache.targets.tensor import OutputHead

STATE_VERSION = 1


class StreamDataset(IterableDataset[Batch]):
    """The batches of one epoch for one rank, for any torch DataLoader with `batch_size=None`.

    Worker w of n gives every n-th batch from w, so the DataLoader's round robin restores the order. Each of them
    decompresses the shards of all batches; `Loader` with `workers` does so once. Fork and spawn both work.

    Attributes:
        epoch: Which epoch to give.
        start: Batches of it to leave out.
    """

    def __init__(self, store: Store | Path | str, config: StreamConfig) -> None:
        self._store = store if isinstance(store, Store) else open_store(store)
        self._config = config
        self.epoch = 0
        self.start = 0
        self._spare: list[Decoders] = []
        _require_columns(self._store, config)
        self._weights = None if config.sampling is None else sample_weights(self._store, config.sampling)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_spare": []}

    def __len__(self) -> int:
        """Batches an epoch."""
        whole = self._config.batch_size * self._config.world_size
        count = len(self._store)
        return count // whole if self._config.world_size > 1 else -(-count // whole)

    def __iter__(self) -> Iterator[Batch]:
        return (batch for some in self.gathered() for batch in some)

    def gathered(self) -> Iterator[list[Batch]]:
        """Yield the same batches, those together that were gathered together."""
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        config, shards = self._config, self._store.shards
        if config.shuffle:
            counts = [shard.samples for shard in shards]
            order = sample_order(
                counts, seed=config.seed, epoch=self.epoch, pool_shards=config.pool_shards, weights=self._weights
            )
        else:
            order = np.arange(len(self._store))
        whole = config.batch_size * config.world_size
        place = np.arange(min(len(order), len(self) * whole))
        number = place // whole - self.start - first
        mine = (number >= 0) & (number % step == 0) & (place % whole % config.world_size == config.rank)
        ends = np.flatnonzero(np.diff(number[mine], append=-1)) + 1
        own, bounds = order[: len(place)][mine], [0, *ends.tolist()]
        decoders = self._decoders()
        try:
            with ShardReader(self._store, config, own, bounds, decoders) as reader:
                yield from reader
        finally:
            self._spare = [decoders]

    def _decoders(self) -> Decoders:
        """Return what decompresses: it goes from epoch to epoch, and never to two iterators at once."""
        while self._spare:
            if (one := self._spare.pop()).usable:
                return one
        columns = columns_read(self._config, self._store)
        if get_worker_info() is not None:
            return Decoders(self._store, columns, threads=1)
        return Decoders(self._store, columns, processes=self._config.workers)


class Loader:
    """Batches of a store, epoch after epoch, with exact resume in the middle of one.

    Iterating gives the rest of the current epoch, then moves to the next. Not safe to iterate twice at once.

    Args:
        store: An open store, or its folder.
        config: How to read it.

    Attributes:
        epoch: The current epoch.
        batches: Batches of it that were consumed.
    """

    def __init__(self, store: Store | Path | str, config: StreamConfig | None = None) -> None:
        self.config = config or StreamConfig()
        self.store = store if isinstance(store, Store) else open_store(store)
        self.epoch = 0
        self.batches = 0
        self._dataset = StreamDataset(self.store, self.config)

    def __len__(self) -> int:
        """Batches an epoch."""
        return len(self._dataset)

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch."""
        self.epoch, self.batches = epoch, 0

    def __iter__(self) -> Iterator[Batch]:
        self._dataset.epoch, self._dataset.start = self.epoch, self.batches
        for some in prefetched(self._dataset.gathered()):
            for batch in some:
                self.batches += 1
                yield batch
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes after the batches given so far: a few numbers, JSON-ready."""
        sampling = self.config.sampling
        return {
            **({} if sampling is None else {"sampling": sampling.model_dump(mode="json")}),
            "version": STATE_VERSION,
            "digest": self.store.digest,
            "seed": self.config.seed,
            "shuffle": self.config.shuffle,
            "pool_shards": self.config.pool_shards,
            "global_batch": self.config.batch_size * self.config.world_size,
            "epoch": self.epoch,
            "batches": self.batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken, with any number of workers or ranks.

        Raises:
            MismatchError: The state is of another store, order or global batch.
        """
        mine = self.state_dict()
        settled = [key for key in {**state, **mine} if key not in ("epoch", "batches")]
        wrong = [key for key in settled if state.get(key) != mine.get(key)]
        if wrong:
            raise MismatchError(
                "The state belongs to another stream: "
                + "; ".join(f"{key} was {state.get(key)!r}, now {mine.get(key)!r}" for key in wrong)
                + ".",
                hint="Resume with the store and the data settings that the run began with.",
            )
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])


def output_head_of(store: Store) -> OutputHead:
    """Return a store's output head as tensors, in the dtype it was captured in.

    Raises:
        MismatchError: The store keeps none.
    """
    kept = store.output_head()
    if kept is None:
        raise MismatchError(
            "The store keeps no output layer of the teacher.",
            where=str(store.path),
            hint="Capture with targets.exact=true.",
        )
    dtype = torch.bfloat16 if kept.codec == "bfloat16" else torch.float32
    bias = None if kept.bias is None else torch.from_numpy(kept.bias).to(dtype)
    return OutputHead(torch.from_numpy(kept.weight).to(dtype), bias, kept.scale, kept.softcap)


def _require_columns(store: Store, config: StreamConfig) -> None:
    for name in columns_read(config, store):
        if name not in store.columns:
            layers = [column.removeprefix("hidden.") for column in store.columns if column.startswith("hidden.")]
            raise ConfigError(
                f"The store has no column {name!r}.",
                where=str(store.path),
                hint=f"It keeps hidden layers {layers} and "
                f"{'has' if 'draw_ids' in store.columns else 'no'} tail draws; capture again with what is needed.",
            )


__all__ = ["Loader", "SamplingConfig", "StreamConfig", "StreamDataset", "output_head_of", "sample_order"]

"""Stage 2 input: a store as ordered, resumable batches.

Legend: `N` positions of a batch, `S` samples of the store.

The order is a pure function of (seed, epoch, shard layout). Global batch g is the g-th run of batch_size * world_size
samples in it; rank r takes every world_size-th of them from r. Neither workers nor prefetching change it, so the
state that resumes a run is one number: the batches consumed.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from kdcache.batch import Batch
from kdcache.config import Section
from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Shard, Store, open_store
from kdcache.store.schema import COUNTS
from kdcache.targets.tensor import OutputHead, TensorTargets

INPUTS = ("input_ids", "labels", "loss_mask")
TARGETS = ("head_ids", "head_logits", "tail_log_partition", "label_logit")
DRAWS = ("draw_ids", "draw_logits")

STATE_VERSION = 1
PREFETCH = 4
"""Batches made ahead by the prefetch thread, or by each worker."""


class StreamConfig(Section):
    """How a store is read.

    Attributes:
        batch_size: Samples a batch and rank.
        seed: Of the order.
        shuffle: Permute shards, and samples within pools of shards; else the store's own order.
        pool_shards: Shards whose samples are mixed; a process holds these and as many of the next decoded.
        targets: Read the teacher's rows.
        draws: Read the tail draws too.
        hidden: Layers whose features are read.
        workers: Processes that read; 0 reads in a thread of this process.
        rank: This process's number.
        world_size: Processes that share the epoch; with more than one, an unfilled last global batch is left out.
    """

    batch_size: int = 8
    seed: int = 0
    shuffle: bool = True
    pool_shards: int = 4
    targets: bool = True
    draws: bool = False
    hidden: tuple[str, ...] = ()
    workers: int = 0
    rank: int = 0
    world_size: int = 1


def sample_order(counts: Sequence[int], *, seed: int, epoch: int, pool_shards: int) -> NDArray[np.int64]:
    """Return the numbers [S] of all samples in the shuffled order of an epoch.

    Shards are permuted, taken `pool_shards` at a time, and the samples of each such pool permuted; a Philox
    generator keyed by (seed, epoch) draws both.

    Args:
        counts: Samples of each shard.
        seed: Of the run.
        epoch: Counts from 0.
        pool_shards: Shards of a pool.
    """
    random = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    firsts = np.concatenate([[0], np.cumsum(counts)])
    shards = random.permutation(len(counts))
    pools = []
    for start in range(0, len(shards), pool_shards):
        members = [np.arange(firsts[one], firsts[one + 1]) for one in shards[start : start + pool_shards]]
        pools.append(random.permutation(np.concatenate(members)))
    return np.concatenate(pools) if pools else np.zeros(0, dtype=np.int64)


class StreamDataset(IterableDataset[Batch]):
    """The batches of one epoch for one rank, for any torch DataLoader with `batch_size=None`.

    Worker w of n gives every n-th batch from w, so the DataLoader's round robin restores the order. The store
    is opened in the process that reads it, so fork and spawn both work.

    Attributes:
        epoch: Which epoch to give.
        start: Batches of it to leave out.
    """

    def __init__(self, store: Store | Path | str, config: StreamConfig) -> None:
        self._store = store if isinstance(store, Store) else open_store(store)
        self._config = config
        self.epoch = 0
        self.start = 0
        _require_columns(self._store, config)

    def __len__(self) -> int:
        """Batches an epoch."""
        whole = self._config.batch_size * self._config.world_size
        count = len(self._store)
        return count // whole if self._config.world_size > 1 else -(-count // whole)

    def __iter__(self) -> Iterator[Batch]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        config, shards = self._config, self._store.shards
        if config.shuffle:
            counts = [shard.samples for shard in shards]
            order = sample_order(counts, seed=config.seed, epoch=self.epoch, pool_shards=config.pool_shards)
        else:
            order = np.arange(len(self._store))
        whole = config.batch_size * config.world_size
        place = np.arange(min(len(order), len(self) * whole))
        number = place // whole - self.start - first
        mine = (number >= 0) & (number % step == 0) & (place % whole % config.world_size == config.rank)
        ends = np.flatnonzero(np.diff(number[mine], append=-1)) + 1
        with _ShardReader(self._store, config, order[: len(place)][mine], threads=2 if worker is None else 1) as reader:
            for begin, end in pairwise([0, *ends.tolist()]):
                yield reader.batch(begin, end)


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
        if self.config.workers:
            source: Iterator[Batch] = iter(
                DataLoader(self._dataset, batch_size=None, num_workers=self.config.workers, prefetch_factor=PREFETCH)
            )
        else:
            source = _prefetched(iter(self._dataset))
        for batch in source:
            self.batches += 1
            yield batch
        self.set_epoch(self.epoch + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return what resumes after the batches given so far: a few numbers, JSON-ready."""
        return {
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
        wrong = [key for key in mine if key not in ("epoch", "batches") and state.get(key) != mine[key]]
        if wrong:
            raise MismatchError(
                "The state belongs to another stream: "
                + "; ".join(f"{key} was {state.get(key)!r}, now {mine[key]!r}" for key in wrong)
                + ".",
                hint="Resume with the store and the data settings that the run began with.",
            )
        self.epoch, self.batches = int(state["epoch"]), int(state["batches"])


class _ShardReader:
    """Makes batches of samples in a known order; threads decode the shards that come next.

    It holds the shards of a pool and decodes those of the next: memory does not depend on the store's size.

    Args:
        store: Where from.
        config: What.
        samples: int64, their numbers in the order in which they will be asked for.
        threads: That decode.
    """

    def __init__(self, store: Store, config: StreamConfig, samples: NDArray[np.int64], *, threads: int) -> None:
        self._store = store
        self._config = config
        self._columns = _columns(store, config)
        self._samples = samples
        firsts = np.asarray([shard.first_sample for shard in store.shards])
        self._shards = np.searchsorted(firsts, samples, side="right") - 1
        self._last = dict(zip(self._shards.tolist(), range(len(samples)), strict=True))
        self._needed = list(self._last)  # a dictionary keeps the order of first appearance
        self._turns = {index: turn for turn, index in enumerate(self._needed)}
        self._asked = 0
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="kdcache-decode")
        self._held: dict[int, Future[Shard]] = {}

    def __enter__(self) -> "_ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def batch(self, begin: int, end: int) -> Batch:
        """Return the samples at places begin to end of the order as one batch."""
        numbers, shards = self._samples[begin:end], self._shards[begin:end].tolist()
        places = []
        for number, index in zip(numbers.tolist(), shards, strict=True):
            shard = self._shard(index)
            inside = number - shard.first_sample
            places.append((shard, slice(int(shard.offsets[inside]), int(shard.offsets[inside + 1]))))
        columns = {
            name: np.concatenate([shard.columns[name][rows] for shard, rows in places]) for name in self._columns
        }
        for index in {index for index in shards if self._last[index] < end}:
            del self._held[index]
        lengths = [rows.stop - rows.start for _, rows in places]
        return Batch(
            input_ids=_ids(columns["input_ids"]),
            labels=_ids(columns["labels"]),
            mask=torch.from_numpy(columns["loss_mask"] == COUNTS),
            offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)),
            sample_index=torch.from_numpy(numbers.astype(np.int64)),
            targets=_targets(columns, self._store.vocab_size) if self._config.targets else None,
            hidden={name: torch.from_numpy(columns[f"hidden.{name}"]) for name in self._config.hidden},
        )

    def _shard(self, index: int) -> Shard:
        for one in self._needed[self._asked : self._turns[index] + self._config.pool_shards + 1]:
            self._held[one] = self._threads.submit(self._store.read_shard, one, self._columns)
            self._asked += 1
        return self._held[index].result()


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


def _columns(store: Store, config: StreamConfig) -> list[str]:
    names = list(INPUTS)
    if config.targets:
        names += TARGETS
    if config.draws:
        names += DRAWS
    return names + [f"hidden.{layer}" for layer in config.hidden]


def _require_columns(store: Store, config: StreamConfig) -> None:
    for name in _columns(store, config):
        if name not in store.columns:
            layers = [column.removeprefix("hidden.") for column in store.columns if column.startswith("hidden.")]
            raise ConfigError(
                f"The store has no column {name!r}.",
                where=str(store.path),
                hint=f"It keeps hidden layers {layers} and "
                f"{'has' if 'draw_ids' in store.columns else 'no'} tail draws; capture again with what is needed.",
            )


def _targets(columns: dict[str, NDArray[Any]], vocab_size: int) -> TensorTargets:
    return TensorTargets(
        ids=_narrow(columns["head_ids"]),
        logits=torch.from_numpy(columns["head_logits"]),
        tail=torch.from_numpy(columns["tail_log_partition"]),
        label_logit=torch.from_numpy(columns["label_logit"]),
        vocab_size=vocab_size,
        draw_ids=_narrow(columns["draw_ids"]) if "draw_ids" in columns else None,
        draw_logits=torch.from_numpy(columns["draw_logits"]) if "draw_logits" in columns else None,
    )


def _narrow(values: NDArray[Any]) -> torch.Tensor:
    # twice the bytes would cost more than reading them did: what indexes with them widens them
    return torch.from_numpy(values.astype(np.int32, copy=False))


def _ids(values: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.int64))


def _prefetched(source: Iterator[Batch]) -> Iterator[Batch]:
    """Give the items of an iterator, made ahead by a thread that stops when the consumer does."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=PREFETCH)
    stop = threading.Event()
    end = object()

    def put(item: Any) -> bool:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return True
        return False

    def produce() -> None:
        try:
            for item in source:
                if not put(item):
                    return
            put(end)
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=produce, name="kdcache-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not end:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()

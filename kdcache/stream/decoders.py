"""Threads or processes that decompress shards into memory that the reader of batches shares with them.

A process gets the memory by being forked with it: nothing but a shard's number goes to it, and nothing but sample
offsets comes back. Each shard is decompressed once, whatever the number of processes, and none of them imports torch's
kernels or waits for the interpreter lock of the training process.
"""

import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.store import PackedShard, Store, is_packed

Array = NDArray[Any]

THREADS = 2
"""Threads that decompress where no number is given: one is not enough for the fastest of readers."""

FORKS = sys.platform == "linux"
"""Whether processes can be had: elsewhere forking is unsafe or unknown, and as many threads do the work."""


class Memory:
    """Room for some shards, column by column and part by part; it goes from epoch to epoch.

    Args:
        shared: Forked processes write into it too. Such memory is anonymous: no name, no file, gone with its last user,
            and not bounded by the size of /dev/shm.

    Attributes:
        slots: Shards it has room for.
        rows: Of a slot.
        arrays: Column to part to array [slots * rows, ...].
    """

    def __init__(self, *, shared: bool = False) -> None:
        self.slots = self.rows = 0
        self.arrays: dict[str, dict[str, Array]] = {}
        self._shared = shared

    def make(self, store: Store, columns: Sequence[str], slots: int, rows: int) -> bool:
        """Make the room unless it is there; return whether it was made."""
        if slots <= self.slots and rows == self.rows and list(columns) == list(self.arrays):
            return False
        self.slots, self.rows = slots, rows
        for name in columns:
            column = store.columns[name]
            kinds = {"": (column.build().dtype, column.shape)}
            if is_packed(column):
                kinds = {part: (layout.dtype, layout.shape) for part, (_, layout) in column.arrays().items()}
            self.arrays[name] = {
                part: self._array((slots * rows, *shape), np.dtype(dtype)) for part, (dtype, shape) in kinds.items()
            }
        return True

    def slot(self, number: int) -> dict[str, dict[str, Array]]:
        """Return the room of one shard."""
        here = slice(number * self.rows, (number + 1) * self.rows)
        return {name: {part: values[here] for part, values in parts.items()} for name, parts in self.arrays.items()}

    def _array(self, shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
        return shared_array(shape, dtype) if self._shared else np.empty(shape, dtype=dtype)


def shared_array(shape: tuple[int, ...], dtype: "np.dtype[Any]") -> Array:
    """Return an array of zeros that processes forked from this one read and write too."""
    count = int(np.prod(shape))
    return np.frombuffer(mmap.mmap(-1, max(1, count * dtype.itemsize)), dtype=dtype, count=count).reshape(shape)


class Decoders:
    """Decompress shards of a store into the slots of a memory.

    Args:
        store: Where from.
        columns: Names of the columns that are read.
        processes: How many; 0 for threads of this process.
        threads: How many, where no processes are asked for.

    Attributes:
        memory: Where the shards go.
    """

    def __init__(self, store: Store, columns: Sequence[str], *, processes: int = 0, threads: int = THREADS) -> None:
        self._store = store
        self._columns = list(columns)
        # what fetches a store from somewhere else does not live on in a forked process
        forks = FORKS and store.origin is None
        self._processes = processes if forks else 0
        self._threads = threads if forks else max(processes, threads)
        self._owner = os.getpid()
        self._pool: Executor | None = None
        self._end: weakref.finalize[Any, Decoders] | None = None
        self._verified = shared_array((len(store.shards),), np.dtype(np.uint8)) if self._processes else None
        self.memory = Memory(shared=self._processes > 0)

    @property
    def usable(self) -> bool:
        """Whether this process made them: what a fork inherits has no threads."""
        return self._owner == os.getpid()

    def make_room(self, slots: int, rows: int) -> None:
        """Make room for so many shards of so many rows, and start what is to fill it."""
        made = self.memory.make(self._store, self._columns, slots, rows)
        if self._pool is not None and not (made and self._processes):
            return
        self.close()
        if self._processes:
            self._pool = ProcessPoolExecutor(
                self._processes,
                mp_context=multiprocessing.get_context("fork"),
                initializer=_inherit,
                initargs=(self._store, self._columns, self.memory, self._verified, self._owner),
            )
        else:
            self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="kdcache-decode")
        self._end = weakref.finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)

    def submit(self, index: int, slot: int) -> Future[PackedShard]:
        """Have a shard decompressed into a slot; the result says where its samples lie."""
        assert self._pool is not None  # make_room comes first
        if self._processes:
            return self._pool.submit(_decode, index, slot)
        return self._pool.submit(self._store.read_packed, index, self._columns, self.memory.slot(slot))

    def close(self) -> None:
        """End the threads or processes."""
        if self._pool is not None and self._end is not None:
            self._end.detach()
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


_inherited: tuple[Store, list[str], Memory, Array] | None = None


def _inherit(store: Store, columns: list[str], memory: Memory, verified: Array | None, parent: int) -> None:
    global _inherited  # a forked process's own; it serves one reader
    assert verified is not None  # made with every pool of processes
    _inherited = (store, columns, memory, verified)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the training process, which ends this one
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after the one that forked it, which may have been killed and so has told nobody."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _decode(index: int, slot: int) -> PackedShard:
    assert _inherited is not None  # the initializer has run
    store, columns, memory, verified = _inherited
    if verified[index]:
        store.trust(index, columns)
    shard = store.read_packed(index, columns, memory.slot(slot))
    verified[index] = 1
    return PackedShard(shard.index, shard.first_sample, shard.offsets, {})

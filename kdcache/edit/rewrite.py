"""Write samples of finished stores to a new one, in any order: what all editing is made of.

Samples are decoded and encoded again, by the writer that captures use: killed, the same call goes on, and several
processes share the work. Codecs give back what they were given when it comes from them; int8 features, whose scale is a
shard's, are rounded once more where their shards change.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import SourceError
from kdcache.store import Column, SampleTable, Shard, Store, StorePlan, StoreWriter, open_store, plan_shards
from kdcache.store.filling import write_shards
from kdcache.store.schema import RANKED

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Picked:
    """Samples of some stores, in the order in which they are written.

    Attributes:
        stores: Where they are from.
        store: int64 [S], which of them.
        number: int64 [S], the sample's number in it.
    """

    stores: Sequence[Store]
    store: NDArray[np.int64]
    number: NDArray[np.int64]

    def lengths(self) -> NDArray[np.int64]:
        """Return the positions of every sample."""
        counts = [sample_rows(one) for one in self.stores]
        return np.asarray(
            [counts[at][number] for at, number in zip(self.store, self.number, strict=True)], dtype=np.int64
        )


@dataclass(frozen=True, slots=True)
class Edited:
    """What an edit has written.

    Attributes:
        digest: Of the new store.
        samples: In it.
        positions: In it.
        bytes: Of its objects.
    """

    digest: str
    samples: int
    positions: int
    bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return {"digest": self.digest, "samples": self.samples, "positions": self.positions, "bytes": self.bytes}


def sample_rows(store: Store) -> NDArray[np.int64]:
    """Return the positions of every sample of a store, from its sample tables."""
    tables = [store.sample_table(index) for index in range(len(store.shards))]
    return np.concatenate([table["rows"].to_numpy().astype(np.int64) for table in tables])


def sample_ids(store: Store) -> list[str]:
    """Return the id of every sample of a store."""
    return [name for index in range(len(store.shards)) for name in store.sample_table(index)["sample_id"].to_pylist()]


def rewrite(
    picked: Picked,
    out: Path | str,
    *,
    columns: Sequence[Column],
    k: int,
    said: dict[str, Any],
    change: Callable[[dict[str, Array], int, Array], dict[str, Array]] = lambda columns, _store, _numbers: columns,
    progress: Callable[[int, int], None] | None = None,
) -> Edited:
    """Write samples to a new store; everything that is not said here is as in the first of the stores.

    Args:
        picked: The samples.
        out: Folder of the new store.
        columns: Of the new store.
        k: Of the new store.
        said: What was done, for the manifest's `source`.
        change: Makes the new columns of a run of samples from its old ones; it is also given which store they are
            from and their numbers.
        progress: Called with positions done and all.

    Raises:
        SourceError: No sample is left.
        MismatchError: The folder holds another store.
        StorageFullError, Interrupted: The same call goes on.
    """
    first = picked.stores[0]
    if not len(picked.number):
        raise SourceError("No sample is left.", where=first.location)
    lengths = picked.lengths()
    source = dict(first.manifest.part("source") or {})
    ranked = any(column.codec == RANKED for column in columns)
    plan = StorePlan(
        kind=first.manifest.kind,
        columns=tuple(columns),
        shard_rows=first.manifest.shard_rows,
        chunk_rows=first.manifest.chunk_rows,
        vocab_size=first.vocab_size,
        k=k,
        teacher=first.manifest.part("teacher"),
        tokenizer=first.manifest.part("tokenizer"),
        source={**source, "edited": [*source.get("edited", []), said]},
        capture=first.manifest.part("capture"),
        licences=first.manifest.part("licences"),
        skipped=first.manifest.part("skipped"),
        shards=tuple(plan_shards(lengths, first.manifest.shard_rows)),
        tokenizer_files=first.tokenizer_files(),
        output_head=first.output_head(),
        ranking=first.ids_by_rank[: first.vocab_size] if ranked else None,
    )
    writer = StoreWriter.open(out, plan)
    needed = sorted({name for store in picked.stores for name in store.columns})
    read = lru_cache(maxsize=2)(
        lambda at, index: picked.stores[at].read_shard(index, [n for n in needed if n in picked.stores[at].columns])
    )

    def made(index: int) -> tuple[dict[str, Array], SampleTable]:
        shard = plan.shards[index]
        here = slice(shard.first_sample, shard.first_sample + shard.samples)
        parts = list(_runs(picked, here, read))
        changed = [change(*part[:3]) for part in parts]
        values = {column.name: np.concatenate([one[column.name] for one in changed]) for column in columns}
        extra = _joined([part[4] for part in parts])
        seen = None if plan.kind == "causal_lm" else [one for part in parts for one in part[5]]
        return values, SampleTable([name for part in parts for name in part[3]], lengths[here], extra, seen)

    write_shards(writer, made, progress)
    writer.finish({"edited": said})
    return Edited(str(writer.digest), len(picked.number), int(lengths.sum()), open_store(out).nbytes)


Run = tuple[dict[str, Array], int, Array, list[str], dict[str, Array], list[bytes]]


def _runs(picked: Picked, here: slice, read: Callable[[int, int], Shard]) -> Iterator[Run]:
    """Yield columns, store, numbers, ids, pooled features and digests of samples in the same shard of a store."""
    firsts = [np.asarray([one.first_sample for one in store.shards]) for store in picked.stores]
    at, number = picked.store[here], picked.number[here]
    shards = [int(np.searchsorted(firsts[a], n, side="right")) - 1 for a, n in zip(at, number, strict=True)]
    for (store, index), places in groupby(range(len(number)), key=lambda place: (int(at[place]), shards[place])):
        numbers = number[list(places)]
        shard = read(store, index)
        inside = numbers - shard.first_sample
        rows = np.concatenate([np.arange(shard.offsets[one], shard.offsets[one + 1]) for one in inside])
        table = shard.table.take(inside)
        pooled = {
            name: np.asarray(table[name].to_pylist(), dtype=np.float32)
            for name in table.column_names
            if name.startswith("hidden.")
        }
        columns = {name: values[rows] for name, values in shard.columns.items()}
        yield columns, store, numbers, table["sample_id"].to_pylist(), pooled, table["token_digest"].to_pylist()


def _joined(parts: list[dict[str, Array]]) -> dict[str, Array]:
    shared = [name for name in parts[0] if all(name in part for part in parts)]
    return {name: np.concatenate([part[name] for part in parts]) for name in shared}

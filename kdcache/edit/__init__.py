"""Make new stores out of finished ones: a part of one, several as one, one with columns of another."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.edit.rewrite import Array, Edited, Picked, rewrite, sample_ids
from kdcache.errors import ConfigError, MismatchError
from kdcache.store import Column, Store, open_store
from kdcache.store.rows import HEAD, targets_of
from kdcache.store.writer import differing

INPUTS = ("input_ids", "labels", "loss_mask", "label_values", "augmentation")
DRAWS = ("draw_ids", "draw_logits")
SAME = ("kind", "teacher", "tokenizer", "vocab_size", "k", "columns")
"""Members of the manifest in which stores must agree to become one."""

Progress = Callable[[int, int], None]


def select(
    store: Store | Path | str,
    out: Path | str,
    *,
    columns: Sequence[str] | None = None,
    top: int | None = None,
    shards: str | None = None,
    samples: str | None = None,
    progress: Progress | None = None,
) -> Edited:
    """Write a part of a store to a new one. Of a store that is somewhere else only what is needed is fetched.

    Args:
        store: An open store, its folder or URL.
        out: Folder of the new store.
        columns: Optional columns to keep, such as "hidden.final"; inputs and targets are always kept. None for all.
        top: Entries to keep of each head; those that go join the tail, as if captured so. Tail draws go.
        shards: "0:10" or "3": those of a range, counted as in the store.
        samples: "0:1000": those of a range, within the shards.
        progress: Called with positions done and all.

    Raises:
        ConfigError: There is no such column, shard or sample, or k is smaller than `top`.
        Others as `kdcache.edit.rewrite.rewrite`.
    """
    opened = store if isinstance(store, Store) else open_store(store)
    optional = [name for name in opened.columns if name not in (*INPUTS, *HEAD)]
    wanted = optional if columns is None else [name for name in columns if name not in (*INPUTS, *HEAD)]
    if unknown := [name for name in wanted if name not in optional]:
        raise ConfigError(
            f"The store has no column {unknown[0]!r}.",
            where=opened.location,
            hint=f"It has {', '.join(opened.columns)}.",
        )
    k = opened.k if top is None else top
    if not 1 <= k <= opened.k:
        raise ConfigError(f"{k} entries cannot be kept of {opened.k}.", where="--top")
    if k < opened.k:
        wanted = [name for name in wanted if name not in DRAWS]
    span = _range(shards, len(opened.shards), "--shards")
    first = opened.shards[span.start].first_sample
    last = opened.shards[span.stop - 1].first_sample + opened.shards[span.stop - 1].samples
    inside = _range(samples, last - first, "--samples")
    numbers = np.arange(first + inside.start, first + inside.stop)

    def narrowed(values: dict[str, Array], _store: int, _numbers: Array) -> dict[str, Array]:
        if k == opened.k:
            return values
        kept = {name: one for name, one in values.items() if name not in DRAWS}
        targets = targets_of(kept, opened.vocab_size).narrow(k)
        return {
            **kept,
            "head_ids": targets.ids,
            "head_logits": targets.logits,
            "tail_log_partition": targets.tail,
        }

    kept = [name for name in (*INPUTS, *HEAD, *wanted) if name in opened.columns]
    new = [_resized(one, k) for one in opened.columns.values() if one.name in kept]
    said = {"select": opened.digest, "columns": kept, "k": k, "samples": [int(numbers[0]), int(numbers[-1]) + 1]}
    picked = Picked([_without(opened, kept)], np.zeros(len(numbers), dtype=np.int64), numbers)
    return rewrite(picked, out, columns=new, k=k, said=said, change=narrowed, progress=progress)


def merge(
    stores: Sequence[Path | str],
    out: Path | str,
    *,
    skip_duplicates: bool = False,
    progress: Progress | None = None,
) -> Edited:
    """Write the samples of several stores of one teacher and the same columns to one, one store after the other.

    Args:
        stores: Folders or URLs.
        out: Folder of the new store.
        skip_duplicates: Leave out samples whose id has come before, instead of refusing.
        progress: Called with positions done and all.

    Raises:
        MismatchError: Teacher, tokenizer or columns differ, or an id comes twice.
        Others as `kdcache.edit.rewrite.rewrite`.
    """
    opened = [open_store(one) for one in stores]
    first, seen = opened[0].manifest, set[str]()
    for other in opened[1:]:
        wrong = differing({name: first.part(name) for name in SAME}, {name: other.manifest.part(name) for name in SAME})
        if wrong:
            raise MismatchError(
                "The stores cannot be one: " + "; ".join(wrong[:8]) + ".",
                where=other.location,
                hint="Merge stores of one teacher; `kdcache select` makes their columns and k equal.",
            )
    which, numbers = list[int](), list[int]()
    for at, store in enumerate(opened):
        for number, name in enumerate(sample_ids(store)):
            if name in seen and not skip_duplicates:
                raise MismatchError(
                    f"The sample {name!r} comes twice.",
                    where=store.location,
                    hint="Use --skip-duplicates to keep the first of them.",
                )
            if name not in seen:
                seen.add(name)
                which.append(at)
                numbers.append(number)
    picked = Picked(opened, np.asarray(which, dtype=np.int64), np.asarray(numbers, dtype=np.int64))
    said = {"merge": [one.digest for one in opened]}
    return rewrite(picked, out, columns=list(opened[0].columns.values()), k=opened[0].k, said=said, progress=progress)


def add(
    store: Path | str,
    other: Path | str,
    out: Path | str,
    *,
    columns: dict[str, str],
    progress: Progress | None = None,
) -> Edited:
    """Write a store with columns of another, joined by sample id: another layer, or features of another teacher.

    Args:
        store: Folder or URL; its samples, in its order.
        other: Folder or URL of a store that has all of them, with the same tokens.
        out: Folder of the new store.
        columns: Name in the other to the name it gets, such as {"hidden.12": "hidden.12"}.
        progress: Called with positions done and all.

    Raises:
        ConfigError: The other has no such column, or the name is taken.
        MismatchError: A sample is missing in the other, or has other tokens there.
        Others as `kdcache.edit.rewrite.rewrite`.
    """
    base, more = open_store(store), open_store(other)
    for old, new in columns.items():
        if old not in more.columns or not old.startswith("hidden."):
            have = [name for name in more.columns if name.startswith("hidden.")]
            raise ConfigError(f"The other store has no features {old!r}.", where=more.location, hint=f"It has {have}.")
        if new in base.columns or not new.startswith("hidden."):
            raise ConfigError(
                f"The column cannot be called {new!r}.",
                where=base.location,
                hint="Rename it with OLD=NEW; names of features begin with hidden. and must be free.",
            )
    there = _matched(base, more)
    firsts = [shard.first_sample for shard in more.shards]
    read = lru_cache(maxsize=4)(lambda index: more.read_shard(index, list(columns)))

    def found(number: int) -> dict[str, Array]:
        shard = read(bisect_right(firsts, number) - 1)
        inside = number - shard.first_sample
        rows = slice(int(shard.offsets[inside]), int(shard.offsets[inside + 1]))
        return {name: values[rows] for name, values in shard.columns.items()}

    def joined(values: dict[str, Array], _store: int, numbers: Array) -> dict[str, Array]:
        rows = [found(int(there[number])) for number in numbers]
        features = {new: np.concatenate([one[old] for one in rows]) for old, new in columns.items()}
        return {**values, **features}

    renamed = [replace(more.columns[old], name=new) for old, new in columns.items()]
    said = {
        "add": more.digest,
        "columns": columns,
        "to": base.digest,
        "teacher": (more.manifest.part("teacher") or {}).get("weights"),
    }
    picked = Picked([base], np.zeros(len(base), dtype=np.int64), np.arange(len(base)))
    new_columns = [*base.columns.values(), *renamed]
    return rewrite(picked, out, columns=new_columns, k=base.k, said=said, change=joined, progress=progress)


def _matched(base: Store, more: Store) -> Array:
    """Return the number in the other store of every sample of the first, whose tokens are the same."""
    numbers = {name: number for number, name in enumerate(sample_ids(more))}
    digests = [_token_digests(one) for one in (base, more)]
    found = np.empty(len(base), dtype=np.int64)
    for number, name in enumerate(sample_ids(base)):
        if name not in numbers:
            raise MismatchError(
                f"The other store has no sample {name!r}.",
                where=more.location,
                hint="Capture it from the same source, with the same tokenizer and samples.",
            )
        found[number] = numbers[name]
        if digests[0][number] != digests[1][numbers[name]]:
            raise MismatchError(
                f"The sample {name!r} has other tokens in the other store.",
                where=more.location,
                hint="Features are joined position by position: both teachers must share tokenizer and samples.",
            )
    return found


def _token_digests(store: Store) -> list[bytes]:
    tables = (store.sample_table(index) for index in range(len(store.shards)))
    return [digest for table in tables for digest in table["token_digest"].to_pylist()]


def _resized(column: Column, k: int) -> Column:
    return replace(column, shape=(k,)) if column.name in ("head_ids", "head_logits") else column


def _without(store: Store, kept: Sequence[str]) -> Any:
    """Return the store as if it had only some of its columns, so that no other is read or fetched."""
    return store if set(store.columns) == set(kept) else store.with_columns(kept)


def _range(text: str | None, count: int, where: str) -> range:
    """Return the numbers that "first:last", "first:", ":last" or "one" means; last is not among them."""
    if text is None:
        return range(count)
    first, colon, last = text.partition(":")
    try:
        start = int(first or 0)
        stop = int(last or count) if colon else start + 1
    except ValueError as error:
        raise ConfigError(f"{text!r} is not a range.", where=where, hint="Write it as 0:10, 10: or 3.") from error
    if not 0 <= start < stop <= count:
        raise ConfigError(f"{text!r} is not within 0:{count}.", where=where)
    return range(start, stop)


__all__ = ["Edited", "add", "merge", "select"]

"""Find all damage of a store instead of stopping at the first."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kdcache.errors import ConfigError, KdcacheError
from kdcache.remotes import listing
from kdcache.store.encode import token_digest
from kdcache.store.objects import locate
from kdcache.store.reader import Store


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault: the object or shard it is in, and what is wrong."""

    path: str
    what: str


def check(store: Store, *, quick: bool = False, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Return every fault of a store; an empty list means it is what its manifest says.

    Quick: every object is present with its length. Full: every digest too, and every shard decodes, its sample table
    fits, its ids are in the vocabulary and unique, its logits descend, its tokens have their digests.

    Args:
        store: An open store.
        quick: Skip digests and content.
        progress: Called with objects done and all.
    """
    problems = []
    names = list(store.manifest.objects)
    there = None if store.origin is None or not quick else listed_sizes(store)
    for number, name in enumerate(names):
        try:
            if quick:
                expected = store.manifest.objects[name].bytes
                found = locate(store.path, name).stat().st_size if there is None else there.get(name, -1)
                if found < 0:
                    problems.append(Problem(name, "it is missing"))
                elif found != expected:
                    problems.append(Problem(name, f"it has {found:,} bytes, and the manifest says {expected:,}"))
            else:
                store.content(name)
        except KdcacheError as error:
            problems.append(Problem(name, error.what))
        if progress:
            progress(number + 1, len(names))
    if quick or problems:
        return problems
    for index in range(len(store.shards)):
        problems += [Problem(f"shard {index}", what) for what in _content(store, index)]
    return problems


def listed_sizes(store: Store) -> dict[str, int]:
    """Return the bytes of every object where a store is shared from.

    Raises:
        ConfigError: The place lists nothing.
    """
    assert store.origin is not None  # asked of stores that are somewhere else
    found = listing(store.origin.place)
    if not found:
        raise ConfigError(
            "This place does not list what it has, so presence and sizes alone cannot be checked.",
            where=store.location,
            hint="Leave out --quick: every object is fetched and its digest compared.",
        )
    return found


def _content(store: Store, index: int) -> Iterator[str]:
    try:
        shard = store.read_shard(index)
    except KdcacheError as error:
        yield error.what
        return
    ids, logits = shard.columns["head_ids"], shard.columns["head_logits"]
    ranked = np.sort(ids, axis=1)
    if (ranked[:, 1:] == ranked[:, :-1]).any():
        yield "a row of head_ids has an id twice"
    if (logits[:, 1:] > logits[:, :-1]).any() or np.isnan(logits).any():
        yield "a row of head_logits does not descend"
    if store.manifest.kind != "causal_lm":
        return
    inputs, labels = shard.columns["input_ids"], shard.columns["labels"]
    digests = shard.table["token_digest"].to_pylist()
    for number, (start, stop) in enumerate(zip(shard.offsets[:-1], shard.offsets[1:], strict=True)):
        if token_digest(inputs[start:stop], labels[start:stop]) != digests[number]:
            yield f"the tokens of sample {shard.table['sample_id'][number].as_py()!r} are not those of the sample table"
        if (inputs[start + 1 : stop] != labels[start : stop - 1]).any():
            yield f"the labels of sample {shard.table['sample_id'][number].as_py()!r} are not its next tokens"

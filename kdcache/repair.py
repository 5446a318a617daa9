"""Mend a damaged store: from a copy elsewhere, or by running the teacher over its damaged shards again.

Whatever the bytes come from, they are put in place only if they have the digest of the manifest: a mended store is the
store that it was.
"""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.capture import planned
from kdcache.capture.answers import ExampleRows
from kdcache.capture.config import CaptureConfig
from kdcache.capture.rows import RowMaker
from kdcache.classifiers import load_classifier
from kdcache.errors import MismatchError
from kdcache.examples import Examples
from kdcache.fingerprint import digest_bytes
from kdcache.samples import prepare
from kdcache.sources import open_source
from kdcache.store import Begun, Problem, SampleTable, Store, StorePlan, open_store, shard_objects, start_objects
from kdcache.store.objects import locate, write_object
from kdcache.store.schema import RANKED
from kdcache.store.writer import differing
from kdcache.teachers import load_teacher
from kdcache.tokenizer import tokenizer_fingerprint

Array = NDArray[Any]

SAME = ("kind", "vocab_size", "k", "shard_rows", "chunk_rows", "columns", "teacher", "tokenizer", "source", "capture")
"""Members of the manifest that a capture has to agree with to mend the store."""


@dataclass(frozen=True, slots=True)
class _Made:
    """A store that is made again.

    Attributes:
        plan: Of it.
        shard: Gives the columns and the samples of a shard.
    """

    plan: StorePlan
    shard: Callable[[int], tuple[dict[str, Array], SampleTable]]


def repair(
    path: Path | str, problems: tuple[Problem, ...], *, mirror: str | None = None, config: CaptureConfig | None = None
) -> list[str]:
    """Put damaged objects of a store anew; return the names of those that are whole again.

    Args:
        path: Folder of the store.
        problems: What verification found.
        mirror: Folder or URL of a copy.
        config: The capture that made the store, for what no mirror has; of examples with its batch size, which
            changes what some models say in the last bit.

    Raises:
        MismatchError: The copy is another store, or the config is not the one that made this.
        AccessError, StorageFullError: The copy cannot be reached, or the store not be written.
    """
    store = open_store(path)
    damaged = [one.path for one in problems if one.path in store.manifest.objects]
    mended = []
    if mirror is not None:
        copy = open_store(mirror, digest=store.digest)
        for name in damaged:
            _put(store, name, copy.content(name))
            mended.append(name)
    left = set(damaged) - set(mended)
    if config is not None and left:
        mended += list(_captured(store, config, left))
    return mended


def _captured(store: Store, config: CaptureConfig, damaged: set[str]) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        made = _of_examples(store, config) if config.source is None else _of_text(store, config, damaged, Path(folder))
        told = made.plan.as_json()
        if wrong := differing({key: store.manifest.part(key) for key in SAME}, {key: told[key] for key in SAME}):
            raise MismatchError(
                "This is not the capture that made the store: " + "; ".join(wrong[:8]) + ".",
                where=str(store.path),
                hint="Use the config, the data and the teacher that it was made with.",
            )
        for name, data in start_objects(made.plan):
            if name in damaged and _is_it(store, name, data):
                yield name
        ranks = np.zeros(0, np.int32) if made.plan.ranking is None else np.argsort(made.plan.ranking).astype(np.int32)
        for index in sorted({_shard_of(name) for name in damaged} - {None}, key=str):
            assert index is not None  # taken out
            for name, data in shard_objects(made.plan, ranks, index, *made.shard(index)):
                if name in damaged and _is_it(store, name, data):
                    yield name


def _of_examples(store: Store, config: CaptureConfig) -> _Made:
    assert config.examples is not None  # the config has looked
    rows = ExampleRows(config, Examples(config.examples.path), load_classifier(config.teacher))
    return _Made(_cut_alike(rows.plan, store), rows.shard_of)


def _of_text(store: Store, config: CaptureConfig, damaged: set[str], folder: Path) -> _Made:
    assert config.source is not None  # who calls this has looked
    model = load_teacher(config.teacher)
    source, tokenizer = open_source(config.source), model.tokenizer()
    samples = prepare(
        source,
        tokenizer,
        config.samples,
        limits=(model.max_length, model.vocab_size),
        identity={"tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer)},
        folder=folder / "samples",
    )
    ranked = any(column.codec == RANKED for column in store.columns.values())
    # a ranking is a look at the teacher; the store's own fixes its bytes, if it is not what is damaged
    known = ranked and not any(name.startswith("ranking/") for name in damaged)
    begun = Begun(store.k, store.ids_by_rank[: store.vocab_size] if known else None)
    settled, plan = planned(
        config, model, samples, begun if known or not ranked else None, source.fingerprint, tokenizer
    )
    rows = RowMaker(settled, model, samples)

    def shard(index: int) -> tuple[dict[str, Array], SampleTable]:
        own = plan.shards[index]
        made = rows.shard(own.first_sample, own.samples, lambda positions: None)
        names, lengths = rows.identities(own.first_sample, own.samples)
        return made.columns, SampleTable(names, lengths, made.pooled)

    return _Made(_cut_alike(plan, store), shard)


def _cut_alike(plan: StorePlan, store: Store) -> StorePlan:
    """Return a plan with the store's room: an older release gave small stores more of it than they have rows."""
    return replace(plan, shard_rows=store.manifest.shard_rows, chunk_rows=store.manifest.chunk_rows)


def _is_it(store: Store, name: str, data: bytes) -> bool:
    """Put bytes in place if they are those of the manifest; say whether they are."""
    if digest_bytes(data) != store.manifest.objects[name].digest:
        return False
    _put(store, name, data)
    return True


def _put(store: Store, name: str, data: bytes) -> None:
    path = store.path / name
    if path.exists() or path.is_symlink():
        locate(store.path, name)  # a link is refused, not written through
        path.unlink()
    write_object(store.path, name, data)


def _shard_of(name: str) -> int | None:
    parts = name.split("/")
    if parts[0] == "samples":
        return int(parts[1].split(".")[0])
    return int(parts[3]) if parts[0] == "columns" and len(parts) > 3 else None

"""A store made of foreign files, by the writer that captures use: killed, the same call goes on.

Legend: `S` samples, `L` tokens of a sample, `K` kept entries, `V` vocabulary.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.convert import Converted, Progress, Reading, Source, find
from kdcache.errors import ConfigError, SourceError
from kdcache.fingerprint import digest_file, digest_parts
from kdcache.store import Column, Kept, SampleTable, StorePlan, StoreWriter, plan_shards, standard_columns
from kdcache.store.filling import write_shards
from kdcache.store.told import Told, columns_of, entries
from kdcache.tokenizer import load_tokenizer, tokenizer_files, tokenizer_fingerprint

SHARD_ROWS, CHUNK_ROWS = 65536, 4096


def take_in(
    path: Path | str,
    out: Path | str,
    name: str,
    reading: Reading | None = None,
    *,
    progress: Progress | None = None,
) -> Converted:
    """Write a store from files of a foreign format.

    Args:
        path: File or folder.
        out: Folder of the store.
        name: Of the format.
        reading: How to read it.
        progress: Called with positions done and all.

    Raises:
        ConfigError: No vocabulary size is known, or k is larger than it.
        SourceError, CorruptObjectError: The files are not of the format, or contradict themselves.
        MismatchError: The folder holds a store of other files or settings.
        StorageFullError, Interrupted: The same call goes on.
    """
    reading = reading or Reading()
    source = find(name).read(Path(path), reading)
    tokenizer = None if reading.tokenizer is None else load_tokenizer(reading.tokenizer)
    vocab_size = reading.vocab_size or source.vocab_size or (0 if tokenizer is None else len(tokenizer))
    if not vocab_size:
        raise ConfigError(
            "The files do not say how large the vocabulary is.",
            where="--vocab-size",
            hint="Give the length of the teacher's row of logits, or its --tokenizer.",
        )
    seen = _look(source, vocab_size, reading.top)
    plan = _plan(name, reading, source, seen, vocab_size, tokenizer)
    writer = StoreWriter.open(out, plan)
    counts: Counter[str] = Counter()
    samples = _Samples(source)

    def made(index: int) -> tuple[dict[str, Any], SampleTable]:
        shard = plan.shards[index]
        here = samples.run(shard.first_sample, shard.samples)
        parts = [columns_of(one, k=plan.k, vocab_size=vocab_size, counts=counts) for one in here]
        columns = {one.name: np.concatenate([part[one.name] for part in parts]) for one in plan.columns}
        return columns, SampleTable([one.id for one in here], np.asarray([len(one.tokens) - 1 for one in here]))

    done = write_shards(writer, made, progress)
    writer.finish({"converted": {"from": name}})
    return Converted(len(seen.lengths), done, len(source.files), str(writer.digest), list(source.lost), dict(+counts))


class _Samples:
    """Runs of a source's samples; going back begins at its first again."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._at = 0
        self._rest: Iterator[Told] = source.samples()

    def run(self, first: int, count: int) -> list[Told]:
        if first < self._at:
            self._at, self._rest = 0, self._source.samples()
        found = list(islice(self._rest, first - self._at, first - self._at + count))
        self._at = first + count
        if len(found) != count:
            raise SourceError("The files have changed while they were read.")
        return found


class _Seen:
    """What a first pass over the samples settles."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.widths: Counter[int] = Counter()
        self.columns: tuple[Column, ...] | None = None


def _look(source: Source, vocab_size: int, top: int | None) -> _Seen:
    seen, names = _Seen(), set[str]()
    for sample in source.samples():
        if len(sample.tokens) < 2:
            raise SourceError("A sample has fewer than 2 tokens.", where=sample.id)
        if sample.id in names:
            raise SourceError(f"The sample id {sample.id!r} comes twice.")
        names.add(sample.id)
        seen.lengths.append(len(sample.tokens))
        if sample.columns is not None:
            seen.widths[int(sample.columns["head_ids"].shape[1])] += len(sample.counts)
        elif bool(sample.counts.any()):
            seen.widths.update(entries(sample, vocab_size)[sample.counts].tolist())
    usual = seen.widths.most_common(1)
    if not seen.lengths or not usual or (usual[0][0] == 0 and top is None):
        raise SourceError("The files tell nothing of any position.", where=str(source.files[0]))
    return seen


def _plan(name: str, reading: Reading, source: Source, seen: _Seen, vocab_size: int, tokenizer: Any) -> StorePlan:
    first = next(source.samples())
    k = reading.top or seen.widths.most_common(1)[0][0]
    if k > vocab_size or (first.columns is not None and k != first.columns["head_ids"].shape[1]):
        raise ConfigError(f"{k} entries cannot be kept of these files.", where="--top")
    whole = first.columns is None or first.columns["tail_log_partition"].shape[1] > 1
    kept = Kept("bits", {"kind": source.kind}, differences=2, any_temperature=first.columns is not None and whole)
    return StorePlan(
        kind="causal_lm",
        columns=standard_columns(k=k, vocab_size=vocab_size, kept=kept),
        shard_rows=SHARD_ROWS,
        chunk_rows=CHUNK_ROWS,
        vocab_size=vocab_size,
        k=k,
        teacher={"kind": name, "name": None, "weights": None, "vocab_size": vocab_size},
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        source={
            "source": {"kind": name, "files": [[one.name, digest_file(one)] for one in source.files]},
            "samples": digest_parts(str(length).encode() for length in seen.lengths),
        },
        capture={"converted": {"from": name, "top": reading.top, "pad_id": reading.pad_id, "field": reading.field}},
        licences={"teacher": None, "data": None},
        skipped={"samples": len(seen.lengths)},
        shards=tuple(plan_shards(np.asarray(seen.lengths) - 1, SHARD_ROWS)),
        tokenizer_files={} if tokenizer is None else tokenizer_files(tokenizer),
    )


__all__ = ["take_in"]

"""A black box's capture: what a teacher tells of its likeliest tokens, kept as partial targets.

Legend: `L` tokens of a sample, `K` kept entries.

The teacher is asked about runs of samples, and every shard is written once all of its samples are told. What is asked
to settle k is not asked twice.
"""

import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kdcache.capture.config import CaptureConfig, TargetsConfig
from kdcache.capture.price import CapturePlan, Extent, priced
from kdcache.capture.result import CaptureProgress, CaptureResult, result_of
from kdcache.capture.run import WORK
from kdcache.errors import ConfigError, CorruptObjectError, Interrupted, MismatchError, SourceError, TeacherError
from kdcache.process import peak_memory_bytes, stop_signals
from kdcache.samples import SampleSet
from kdcache.store import (
    Column,
    Kept,
    SampleTable,
    Store,
    StorePlan,
    StoreWriter,
    open_store,
    plan_shards,
    standard_columns,
)
from kdcache.store.filling import write_shards
from kdcache.store.told import Told, columns_of, entries
from kdcache.teachers import BlackBox, Candidates, Teacher
from kdcache.tokenizer import tokenizer_files, tokenizer_fingerprint

LOOK_POSITIONS = 2048
"""Positions that settle k."""

UNREFUSED = ("k", "on_invalid", "steps_per_nat")
"""Keys of `targets` that are not refused: k is a limit, and the others say nothing of what is told."""


class Telling(Teacher, BlackBox, Protocol):
    """A teacher that tells, and says of itself what all teachers say."""


def require_tellable(targets: TargetsConfig) -> None:
    """Refuse what a black box cannot give.

    Raises:
        ConfigError: A key of `targets` asks for rows, features or other logits than those told.
    """
    usual = TargetsConfig()
    for name in TargetsConfig.model_fields:
        if name not in UNREFUSED and getattr(targets, name) != getattr(usual, name):
            raise ConfigError(
                f"The teacher tells log-probabilities of a few tokens, which is not enough for targets.{name}.",
                where=f"targets.{name}",
                hint="Leave it out, or use a teacher with weights: a folder or a hub name.",
            )


def capture_told(
    config: CaptureConfig,
    root: Path,
    teacher: Telling,
    samples: SampleSet,
    about: dict[str, dict[str, Any]],
    progress: Callable[[CaptureProgress | CapturePlan], None] | None = None,
) -> CaptureResult:
    """Ask a black box about all samples and write a store of partial targets; go on with one that was begun.

    Positions of which too little is told are kept as invalid ones and counted.

    Args:
        config: The capture; of `targets`, k is what is kept at most.
        root: Folder of the store.
        teacher: Which tells.
        samples: All samples.
        about: What the plan says of `source` and `capture`.
        progress: Called before the first and after every run of samples.

    Raises:
        MismatchError: The folder holds a store of other settings.
        TeacherError: The teacher failed, or tells nothing that can be kept.
        AccessError, OutageError, StorageFullError, Interrupted: The same call goes on.
    """
    with stop_signals() as stopped:
        asking = _Asking(config, root, teacher, samples, stopped)
        writer = _writer(root, lambda k: _plan(config, teacher, samples, about, k), asking)
        price = priced(writer.plan.columns, Extent.of(writer.plan), vocab_size=writer.plan.vocab_size, k=writer.plan.k)
        if progress is not None:
            progress(price)
        return replace(_Capture(asking, writer, progress).run(), plan=price)


class _Asking:
    """Asks about runs of samples, and remembers what was asked to settle k."""

    def __init__(
        self, config: CaptureConfig, root: Path, teacher: Telling, samples: SampleSet, stopped: threading.Event
    ) -> None:
        self.config, self.samples, self.vocab_size = config, samples, teacher.vocab_size
        self.stopped = stopped
        self.lost: Counter[str] = Counter()
        self._root, self._teacher = root, teacher
        self._seen: dict[int, Told] = {}

    def entries(self) -> int:
        """Return k: as many candidates as most positions of the first samples have, but not over `targets.k`.

        Raises:
            TeacherError: Most have none.
        """
        number = positions = 0
        while positions < LOOK_POSITIONS and number < len(self.samples):
            for told in self.run(number, self._fitting(number, len(self.samples))):
                self._seen[number] = told
                number, positions = number + 1, positions + len(told.counts)
        found = np.concatenate([entries(one, self.vocab_size)[one.counts] for one in self._seen.values()])
        usual = Counter(found.tolist()).most_common(1)
        if not usual or usual[0][0] == 0:
            raise TeacherError(
                "The teacher tells nothing of most positions that could be kept: "
                + (", ".join(f"{count} {why}" for why, count in self.lost.items()) or "no label counts")
                + ".",
                where=str(self._teacher.fingerprint.get("name")),
                hint="Use a server that names candidates by their ids, as vLLM does with return_tokens_as_token_ids.",
            )
        return min(self.config.targets.k, int(usual[0][0]))

    def runs(self, first: int, count: int) -> Iterator[list[Told]]:
        """Yield what is told of samples first to first + count, a few at a time."""
        number = first
        while number < first + count:
            taken = self._fitting(number, first + count)
            yield self.run(number, taken)
            number += taken

    def run(self, first: int, count: int) -> list[Told]:
        """Return what is told of some samples.

        Raises:
            Interrupted: SIGTERM or Ctrl-C.
        """
        if self.stopped.is_set():
            raise Interrupted(
                "The capture was stopped; finished shards are kept.",
                where=str(self._root),
                hint="Run the same command again to go on.",
            )
        numbers = range(first, first + count)
        unknown = [number for number in numbers if number not in self._seen]
        answers = self._teacher.tell([self.samples[number].tokens for number in unknown]) if unknown else []
        for answer in answers:
            self.lost.update(answer.lost)
        new = {number: self._told(number, answer) for number, answer in zip(unknown, answers, strict=True)}
        return [new[number] if number in new else self._seen.pop(number) for number in numbers]

    def _told(self, number: int, answer: Candidates) -> Told:
        one, own = self.samples[number], answer.label_log_probabilities
        return Told(one.id, one.tokens, one.loss_mask, answer.ids, answer.log_probabilities, None, own)

    def _fitting(self, first: int, stop: int) -> int:
        """Return how many samples from the first on are asked about together: one at least."""
        within = np.cumsum(self.samples.lengths[first:stop]) <= self.config.teacher.batch_positions
        return max(1, int(within.sum()))


class _Capture:
    """One process's work on the store."""

    def __init__(
        self, asking: _Asking, writer: StoreWriter, progress: Callable[[CaptureProgress], None] | None
    ) -> None:
        self._asking, self._writer, self._progress = asking, writer, progress
        self._counts: Counter[str] = Counter()
        self._made = 0
        self._before = sum(writer.plan.shards[index].rows for index in writer.committed)
        self._began = time.perf_counter()

    def run(self) -> CaptureResult:
        """Write every shard that is not committed, then seal the store."""
        write_shards(self._writer, self._shard, stopped=self._asking.stopped)
        seconds = time.perf_counter() - self._began
        del self._counts["too few candidates"]  # the store's invalid positions
        changed = dict(sorted((+(self._counts + self._asking.lost)).items()))
        if self._writer.digest is None:
            rate = round(self._made / max(1e-9, seconds), 1)
            self._writer.finish(
                {
                    "seconds": round(seconds, 1),
                    "positions_per_second": rate,
                    "peak_memory_bytes": peak_memory_bytes(),
                    "packages": {"kdcache": version("kdcache")},
                    "told": changed,
                }
            )
        shutil.rmtree(self._writer.root / WORK, ignore_errors=True)
        return told_result(open_store(self._writer.root), seconds=seconds, made=self._made)

    def _shard(self, index: int) -> tuple[dict[str, Any], SampleTable]:
        plan, shard = self._writer.plan, self._writer.plan.shards[index]
        parts, names, rows = [], list[str](), list[int]()
        for told in self._asking.runs(shard.first_sample, shard.samples):
            for one in told:
                parts.append(self._columns(one))
                names.append(one.id)
                rows.append(len(one.counts))
                self._made += rows[-1]
            self._report(index)
        columns = {one.name: np.concatenate([part[one.name] for part in parts]) for one in plan.columns}
        return columns, SampleTable(names, np.asarray(rows))

    def _columns(self, told: Told) -> dict[str, Any]:
        plan = self._writer.plan
        try:
            return columns_of(told, k=plan.k, vocab_size=plan.vocab_size, counts=self._counts)
        except (SourceError, CorruptObjectError) as error:
            raise TeacherError(error.what, where=f"sample {told.id}", hint=error.hint) from error

    def _report(self, index: int) -> None:
        if self._progress is None:
            return
        shards, total = self._writer.plan.shards, self._asking.samples.num_positions
        rate = self._made / max(1e-9, time.perf_counter() - self._began)
        left = max(0, total - self._before - self._made)
        self._progress(CaptureProgress(total - left, total, rate, 0, left / max(rate, 1e-9), index, len(shards)))


def told_result(store: Store, **ran: Any) -> CaptureResult:
    """Return the result of a finished capture; `ran` is what this process did, as `result_of` takes it."""
    result = result_of(store, **ran)
    left_out = {name: count for name, count in result.skipped.items() if not name.startswith("rows with")}
    told = (store.manifest.part("provenance") or {}).get("told") or {}
    if invalid := sum(shard.invalid_rows for shard in store.shards):
        left_out["positions of which too little was told"] = invalid
    return replace(result, skipped={**left_out, **{f"told: {name}": count for name, count in told.items()}})


def _writer(root: Path, plan: Callable[[int], StorePlan], asking: _Asking) -> StoreWriter:
    begun = StoreWriter.begun(root)
    k = asking.entries() if begun is None else begun.k
    try:
        return StoreWriter.open(root, plan(k))
    except MismatchError:
        # another process may have begun the store while this one looked at the teacher, and settled another k
        if begun is not None or (begun := StoreWriter.begun(root)) is None or begun.k == k:
            raise
    return StoreWriter.open(root, plan(begun.k))


def told_columns(config: CaptureConfig, vocab_size: int, k: int) -> tuple[Column, ...]:
    """Return the columns of a black box's store with k entries."""
    # what is told is rounded already: it is kept to the last bit
    raw = config.store.preset == "raw"
    kept = Kept("float32", compressed=False) if raw else Kept("bits", {"kind": "float32"})
    return standard_columns(k=k, vocab_size=vocab_size, kept=replace(kept, any_temperature=False))


def _plan(
    config: CaptureConfig, teacher: Telling, samples: SampleSet, about: dict[str, dict[str, Any]], k: int
) -> StorePlan:
    tokenizer, (shard_rows, chunk_rows) = teacher.tokenizer(), config.store.rows(samples.num_positions)
    return StorePlan(
        kind="causal_lm",
        columns=told_columns(config, teacher.vocab_size, k),
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        vocab_size=teacher.vocab_size,
        k=k,
        teacher=teacher.fingerprint,
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        source=about["source"],
        capture=about["capture"],
        licences=config.licences.model_dump(),
        skipped=samples.counts,
        shards=tuple(plan_shards(samples.lengths - 1, config.store.shard_positions)),
        tokenizer_files={} if tokenizer is None else tokenizer_files(tokenizer),
    )

"""Stage 1: run the teacher once over a source and write what it knew, resumable by shard."""

import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from kdcache.capture.config import CaptureConfig
from kdcache.capture.keep import columns_of, output_head_of
from kdcache.capture.rows import RowMaker
from kdcache.capture.survey import MOST, entries_within, survey
from kdcache.errors import ConfigError, Interrupted
from kdcache.process import peak_memory_bytes, stop_signals
from kdcache.samples import SampleSet, prepare
from kdcache.sources import open_source
from kdcache.store import Begun, SampleTable, ShardPlan, Store, StorePlan, StoreWriter, open_store
from kdcache.store.manifest import FILE
from kdcache.store.objects import storage_errors
from kdcache.store.schema import RANKED
from kdcache.teachers import Teacher, load_teacher
from kdcache.tokenizer import tokenizer_files, tokenizer_fingerprint

WORK = "work"
"""Folder inside the store where samples are spooled; removed when the store is complete."""


@dataclass(frozen=True, slots=True)
class CaptureProgress:
    """How far a capture is; times in seconds.

    Attributes:
        stage: "capture".
    """

    stage: ClassVar[str] = "capture"
    positions_done: int
    positions_total: int
    positions_per_second: float
    bytes_written: int
    eta_seconds: float
    shard: int
    shards: int


@dataclass(frozen=True, slots=True)
class SamplesProgress:
    """How far the making of samples is, before the teacher begins.

    Attributes:
        stage: "samples".
    """

    stage: ClassVar[str] = "samples"
    documents_done: int
    documents_total: int


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """How a capture ended.

    Attributes:
        digest: Of the store.
        samples: In the store.
        positions: In the store.
        bytes: Of all objects.
        bytes_per_position: Of columns and sample table.
        k: Logits kept a position.
        already_complete: Nothing had to be done.
        seconds: Of this run's capture, samples and model loading not counted.
        positions_per_second: Of this run, or of the one that finished the store.
        peak_memory_bytes: Of that run's process.
        accelerator_memory_bytes: Of this process's accelerator, 0 without one.
        memory_retries: Batches that were halved for want of memory.
        skipped: Documents and samples left out, and rows masked, by reason.
    """

    digest: str
    samples: int
    positions: int
    bytes: int
    bytes_per_position: float
    k: int
    already_complete: bool = False
    seconds: float = 0.0
    positions_per_second: float = 0.0
    peak_memory_bytes: int = 0
    accelerator_memory_bytes: int = 0
    memory_retries: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)


def capture(
    config: CaptureConfig,
    out: Path | str,
    *,
    progress: Callable[[CaptureProgress | SamplesProgress], None] | None = None,
    teacher: Teacher | None = None,
) -> CaptureResult:
    """Run a teacher over a source and write a store; go on with one that was begun; do nothing if it is complete.

    Args:
        config: What to run and what to keep.
        out: Folder of the store.
        progress: Called after every batch of documents, then of positions.
        teacher: A teacher to use in place of `config.teacher`.

    Raises:
        SourceError, SampleError, ConfigError: The data or settings do not fit.
        MismatchError: The folder holds a store of other settings.
        TeacherError: The teacher failed.
        StorageFullError: No space; finished shards are kept.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
    """
    root = Path(out)
    model = teacher or load_teacher(config.teacher)
    source = open_source(config.source)
    tokenizer = model.tokenizer()
    identity = None if tokenizer is None else tokenizer_fingerprint(tokenizer)
    if (root / FILE).is_file():
        store = open_store(root)
        config = _settled(config, store.k)
        recorded = store.manifest.part("source") or {}
        same = (store.manifest.part("capture"), store.manifest.part("teacher"), recorded.get("source")) == (
            _settings(config),
            model.fingerprint,
            source.fingerprint,
        )
        if same and store.manifest.part("tokenizer") == identity:
            return _result(store, already_complete=True)
    with storage_errors(root):
        samples = prepare(
            source,
            tokenizer,
            config.samples,
            limits=(model.max_length, model.vocab_size),
            identity={"tokenizer": identity},
            folder=root / WORK,
            progress=None if progress is None else lambda done, total: progress(SamplesProgress(done, total)),
        )
    config, ranking = _looked(config, model, samples, StoreWriter.begun(root))
    plan = StorePlan(
        kind="causal_lm",
        columns=columns_of(config, model),
        shard_rows=config.store.shard_positions,
        chunk_rows=min(config.store.chunk_positions, config.store.shard_positions),
        vocab_size=model.vocab_size,
        k=config.targets.k,
        teacher=model.fingerprint,
        tokenizer=identity,
        source={"source": source.fingerprint, "samples": samples.digest},
        capture=_settings(config),
        licences=config.licences.model_dump(),
        skipped=samples.counts,
        shards=tuple(plan_shards(samples.lengths - 1, config.store.shard_positions)),
        tokenizer_files={} if tokenizer is None else tokenizer_files(tokenizer),
        output_head=output_head_of(model) if config.targets.exact else None,
        ranking=ranking,
    )
    writer = StoreWriter.open(root, plan)
    return _Run(config, model, samples, writer, progress).run()


def _looked(
    config: CaptureConfig, model: Teacher, samples: SampleSet, begun: Begun | None
) -> "tuple[CaptureConfig, np.ndarray[Any, Any] | None]":
    """Return the config with its k settled, and the ranking if ids are kept as ranks: begun ones, or from a look."""
    if begun is not None:
        return _settled(config, begun.k), begun.ranking
    budget = config.targets.bytes_per_position
    most = config.targets.k if budget is None else min(MOST, model.vocab_size)
    if budget is None and not any(column.codec == RANKED for column in columns_of(config, model)):
        return config, None
    seen = survey(model, samples, most)
    if budget is not None:
        config = _settled(config, entries_within(budget, seen, lambda k: columns_of(_settled(config, k), model)))
    ranked = any(column.codec == RANKED for column in columns_of(config, model))
    return config, seen.ranking(config.targets.k) if ranked else None


def _settled(config: CaptureConfig, k: int) -> CaptureConfig:
    """Return the config with the k that its budget bought; without a budget, as it is."""
    if config.targets.bytes_per_position is None:
        return config
    return config.model_copy(update={"targets": config.targets.model_copy(update={"k": k})})


def plan_shards(rows: "np.ndarray[Any, Any]", room: int) -> Iterator[ShardPlan]:
    """Yield the shards that hold samples of these many rows in order, none straddling.

    Raises:
        ConfigError: A sample has more rows than a shard has room for.
    """
    if len(rows) and int(rows.max()) > room:
        raise ConfigError(
            f"A sample has {int(rows.max())} positions, and a shard has room for {room}.",
            where="store.shard_positions",
            hint="Raise store.shard_positions, or lower samples.max_length.",
        )
    first, held = 0, 0
    for number, count in enumerate(rows.tolist()):
        if held + count > room:
            yield ShardPlan(first, number - first, held)
            first, held = number, 0
        held += count
    yield ShardPlan(first, len(rows) - first, held)


class _Run:
    """One process's work on a store: what is left of its shards, written behind the teacher's back."""

    def __init__(
        self,
        config: CaptureConfig,
        teacher: Teacher,
        samples: SampleSet,
        writer: StoreWriter,
        progress: Callable[[CaptureProgress], None] | None,
    ) -> None:
        self._config = config
        self._teacher = teacher
        self._samples = samples
        self._writer = writer
        self._progress = progress
        self._done = sum(writer.plan.shards[index].rows for index in writer.committed)
        self._made = 0
        self._bytes = 0
        self._retries = 0
        self._began = time.perf_counter()
        self._pending: Future[int] | None = None

    def run(self) -> CaptureResult:
        """Capture every shard that is not committed, then seal the store."""
        rows = RowMaker(self._config, self._teacher, self._samples)
        with stop_signals() as stopped, ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as behind:
            try:
                for index in range(len(self._writer.plan.shards)):
                    if index not in self._writer.committed:
                        self._shard(index, rows, stopped, behind)
                self._settle()
            except Interrupted:
                self._settle()
                raise
        seconds = time.perf_counter() - self._began
        if self._writer.digest is None:
            self._writer.finish(self._provenance(seconds))
        shutil.rmtree(self._writer.root / WORK, ignore_errors=True)
        return _result(open_store(self._writer.root), seconds=seconds, made=self._made, retries=self._retries)

    def _shard(self, index: int, rows: RowMaker, stopped: threading.Event, behind: ThreadPoolExecutor) -> None:
        plan = self._writer.plan.shards[index]

        def done(positions: int) -> None:
            self._made += positions
            self._report(index)
            if self._pending is not None and self._pending.done():
                self._settle()  # a writer's error stops the teacher at once
            if stopped.is_set():
                raise Interrupted(
                    "The capture was stopped; finished shards are kept.",
                    where=str(self._writer.root),
                    hint="Run the same command again to go on.",
                )

        made = rows.shard(plan.first_sample, plan.samples, done)
        self._retries += made.retries
        numbers = range(plan.first_sample, plan.first_sample + plan.samples)
        table = SampleTable(
            [self._samples[number].id for number in numbers],
            self._samples.lengths[plan.first_sample : plan.first_sample + plan.samples] - 1,
            made.pooled,
        )
        self._settle()
        self._pending = behind.submit(self._writer.write_shard, index, made.columns, table)

    def _settle(self) -> None:
        """Wait for the shard being written; its error, if any, is raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._bytes += pending.result()

    def _report(self, shard: int) -> None:
        if self._progress is None:
            return
        rate = self._made / max(1e-9, time.perf_counter() - self._began)
        total = self._samples.num_positions
        self._progress(
            CaptureProgress(
                positions_done=self._done + self._made,
                positions_total=total,
                positions_per_second=rate,
                bytes_written=self._bytes,
                eta_seconds=(total - self._done - self._made) / max(rate, 1e-9),
                shard=shard,
                shards=len(self._writer.plan.shards),
            )
        )

    def _provenance(self, seconds: float) -> dict[str, Any]:
        packages = ("kdcache", "torch", "transformers", "zarr", "numcodecs", "pyarrow")
        found = {}
        for name in packages:
            try:
                found[name] = version(name)
            except ModuleNotFoundError:
                continue
        return {
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds, 1),
            "positions_per_second": round(self._made / seconds, 1),
            "peak_memory_bytes": peak_memory_bytes(),
            "python": sys.version.split()[0],
            "system": platform.system(),
            "packages": found,
            "batch_positions": self._config.teacher.batch_positions,
        }


def _result(
    store: Store, *, already_complete: bool = False, seconds: float = 0.0, made: int = 0, retries: int = 0
) -> CaptureResult:
    recorded = store.manifest.part("provenance") or {}
    counts = _skipped(store.manifest.part("skipped") or {})
    if invalid := sum(shard.invalid_rows for shard in store.shards):
        counts["rows with NaN or infinite logits"] = invalid
    return CaptureResult(
        digest=store.digest,
        samples=len(store),
        positions=store.num_positions,
        bytes=store.nbytes,
        bytes_per_position=round(store.bytes_per_position, 3),
        k=store.k,
        already_complete=already_complete,
        seconds=round(seconds, 3),
        positions_per_second=round(made / seconds, 1) if made else recorded.get("positions_per_second", 0.0),
        peak_memory_bytes=peak_memory_bytes() if made else recorded.get("peak_memory_bytes", 0),
        accelerator_memory_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        memory_retries=retries,
        skipped=counts,
    )


def _settings(config: CaptureConfig) -> dict[str, Any]:
    """What of a config fixes the numbers; where they are read from and how fast they are made does not."""
    return {
        "samples": config.samples.model_dump(mode="json"),
        "targets": config.targets.model_dump(mode="json"),
        "store": config.store.model_dump(mode="json"),
        "seed": config.seed,
    }


def _skipped(counts: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in counts.items() if name.startswith(("skipped", "truncated"))}

"""One process's work on a store: shards that no other process makes, written behind the teacher's back."""

import platform
import shutil
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from kdcache.capture.config import CaptureConfig
from kdcache.capture.result import CaptureProgress, CaptureResult, result_of
from kdcache.capture.rows import RowMaker
from kdcache.errors import Interrupted
from kdcache.process import peak_memory_bytes, stop_signals
from kdcache.samples import SampleSet
from kdcache.store import SampleTable, StoreWriter, open_store
from kdcache.teachers import Teacher

WORK = "work"
"""Folder inside the store where samples are spooled; removed when the store is complete."""


class _Overtaken(BaseException):
    """Another writer has committed the shard that this one is making."""


class Run:
    """What one process does until the store is complete, whoever completes it.

    Args:
        config: The capture, its k settled.
        teacher: The frozen model.
        samples: All samples.
        writer: Of the store.
        progress: Called after every batch.
    """

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
        self._others = 0
        self._mine = set[int]()
        self._made = 0
        self._wasted = 0
        self._bytes = 0
        self._retries = 0
        self._began = time.perf_counter()
        self._pending: Future[int] | None = None

    def run(self) -> CaptureResult:
        """Capture every shard that is not committed, then seal the store."""
        rows = RowMaker(self._config, self._teacher, self._samples)
        with stop_signals() as stopped, ThreadPoolExecutor(1, thread_name_prefix="kdcache-write") as behind:
            try:
                for index in self._writer.unmade():
                    self._shard(index, rows, stopped, behind)
                self._settle()
            except Interrupted:
                self._settle()
                raise
        seconds = time.perf_counter() - self._began
        if self._writer.digest is None:
            self._writer.finish(self._provenance(seconds))
        shutil.rmtree(self._writer.root / WORK, ignore_errors=True)
        return result_of(
            open_store(self._writer.root), seconds=seconds, made=self._made, retries=self._retries, wasted=self._wasted
        )

    def _shard(self, index: int, rows: RowMaker, stopped: threading.Event, behind: ThreadPoolExecutor) -> None:
        shards = self._writer.plan.shards
        plan, begun = shards[index], self._made
        self._others = sum(shards[one].rows for one in self._writer.committed - self._mine)

        def done(positions: int) -> None:
            self._made += positions
            self._report(index)
            if self._writer.overtaken(index):
                raise _Overtaken
            if self._pending is not None and self._pending.done():
                self._settle()  # a writer's error stops the teacher at once
            if stopped.is_set():
                raise Interrupted(
                    "The capture was stopped; finished shards are kept.",
                    where=str(self._writer.root),
                    hint="Run the same command again to go on.",
                )

        try:
            made = rows.shard(plan.first_sample, plan.samples, done)
        except _Overtaken:
            self._wasted += self._made - begun
            return
        self._retries += made.retries
        table = SampleTable(*rows.identities(plan.first_sample, plan.samples), made.pooled)
        self._settle()
        self._pending = behind.submit(self._write, index, made.columns, table)

    def _write(self, index: int, columns: dict[str, Any], table: SampleTable) -> int:
        count = self._writer.write_shard(index, columns, table)
        if count:
            self._mine.add(index)
        else:
            self._wasted += self._writer.plan.shards[index].rows
        return count

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
                positions_done=min(total, self._others + self._made - self._wasted),
                positions_total=total,
                positions_per_second=rate,
                bytes_written=self._bytes,
                eta_seconds=max(0, total - self._others - self._made + self._wasted) / max(rate, 1e-9),
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

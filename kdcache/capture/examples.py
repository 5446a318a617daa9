"""Run a classifier over examples and write a store of what it said."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from kdcache.capture.answers import ExampleRows
from kdcache.capture.config import CaptureConfig
from kdcache.capture.price import CapturePlan
from kdcache.capture.result import CaptureProgress, CaptureResult, result_of
from kdcache.classifiers import Classifier, load_classifier
from kdcache.examples import Examples
from kdcache.store import StoreWriter, open_store
from kdcache.store.filling import write_shards
from kdcache.store.manifest import FILE


def capture_examples(
    config: CaptureConfig,
    root: Path,
    *,
    classifier: Classifier | None = None,
    progress: Callable[[CaptureProgress | CapturePlan], None] | None = None,
) -> CaptureResult:
    """Write a store of a classifier's answers; go on with one that was begun; do nothing if it is complete.

    Raises:
        As `kdcache.capture.capture`.
    """
    assert config.examples is not None  # who calls this has looked
    examples = Examples(config.examples.path)
    model = classifier or load_classifier(config.teacher)
    run = ExampleRows(config, examples, model)
    plan = run.plan
    complete = (root / FILE).is_file()
    writer = StoreWriter.open(root, plan)
    if complete:
        return result_of(open_store(root), already_complete=True)
    price = run.price
    if progress is not None:
        progress(price)
    began, before = time.perf_counter(), sum(plan.shards[index].rows for index in writer.committed)

    def told(done: int, total: int) -> None:
        if progress is not None:
            rate = (done - before) / max(1e-9, time.perf_counter() - began)
            left = (total - done) / max(1e-9, rate)
            progress(CaptureProgress(done, total, rate, run.written, left, run.shard, len(plan.shards)))

    made = write_shards(writer, run.shard_of, told) - before
    seconds = time.perf_counter() - began
    writer.finish({"positions_per_second": round(made / max(1e-9, seconds), 1)})
    return replace(result_of(open_store(root), seconds=seconds, made=made), plan=price)

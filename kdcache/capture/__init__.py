"""Stage 1: run the teacher once over a source and write what it knew, resumable by shard."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from kdcache.capture.answers import ExampleRows
from kdcache.capture.config import CaptureConfig
from kdcache.capture.examples import capture_examples
from kdcache.capture.keep import columns_of, feature_width, output_head_of
from kdcache.capture.price import CapturePlan, Extent, priced
from kdcache.capture.result import CaptureProgress, CaptureResult, SamplesProgress, result_of
from kdcache.capture.run import WORK, Run
from kdcache.capture.survey import MOST, entries_within, survey
from kdcache.capture.told import capture_told, require_tellable, told_columns, told_result
from kdcache.classifiers import Classifier, load_classifier
from kdcache.errors import MismatchError
from kdcache.examples import Examples
from kdcache.samples import SampleSet, prepare
from kdcache.sources import Source, open_source
from kdcache.store import Begun, Column, StorePlan, StoreWriter, open_store, plan_shards
from kdcache.store.commit import clear
from kdcache.store.disk import storage_errors
from kdcache.store.manifest import FILE
from kdcache.store.schema import RANKED
from kdcache.teachers import BlackBox, Teacher, load_teacher
from kdcache.tokenizer import tokenizer_files, tokenizer_fingerprint


def capture(
    config: CaptureConfig,
    out: Path | str,
    *,
    progress: Callable[[CaptureProgress | SamplesProgress | CapturePlan], None] | None = None,
    teacher: Teacher | None = None,
    classifier: Classifier | None = None,
) -> CaptureResult:
    """Run a teacher over a source and write a store; go on with one that was begun; do nothing if it is complete.

    Args:
        config: What to run and what to keep.
        out: Folder of the store.
        progress: Called after every batch of documents, with what the store will take, then after every batch of
            positions.
        teacher: A teacher to use in place of `config.teacher`.
        classifier: The same where the config names examples.

    Raises:
        SourceError, SampleError, ConfigError: The data or settings do not fit.
        MismatchError: The folder holds a store of other settings.
        TeacherError: The teacher failed.
        StorageFullError: No space; finished shards are kept.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
    """
    root = Path(out)
    if config.examples is not None:
        return capture_examples(config, root, classifier=classifier, progress=progress)
    assert config.source is not None  # the config has looked
    model = teacher or load_teacher(config.teacher)
    if isinstance(model, BlackBox):
        require_tellable(config.targets)
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
            clear(root)  # what the last writer had no time to clear away
            finished = told_result if isinstance(model, BlackBox) else result_of
            return finished(store, already_complete=True)
    with storage_errors(root):
        samples = _samples(config, model, source, tokenizer, root / WORK, progress)
    if isinstance(model, BlackBox):
        about = {"source": {"source": source.fingerprint, "samples": samples.digest}, "capture": _settings(config)}
        return capture_told(config, root, model, samples, about, progress)
    begun = StoreWriter.begun(root)
    while True:
        settled, plan = planned(config, model, samples, begun, source.fingerprint, tokenizer)
        try:
            writer = StoreWriter.open(root, plan)
            break
        except MismatchError:
            # another process may have begun the store while this one looked at the teacher, and seen a little else
            if begun is not None or (begun := StoreWriter.begun(root)) is None:
                raise
    price = _priced(settled, model, plan.columns, Extent.of(plan))
    if progress is not None:
        progress(price)
    return replace(Run(settled, model, samples, writer, progress).run(), plan=price)


def plan_capture(
    config: CaptureConfig,
    *,
    progress: Callable[[SamplesProgress], None] | None = None,
    teacher: Teacher | None = None,
    classifier: Classifier | None = None,
) -> CapturePlan:
    """Return what a capture would keep and what that takes; nothing is written where a store would be.

    The teacher is loaded. It is run over two examples, or over a few samples of text where a budget has to buy k. A
    black box is not asked: k is then what it may tell at most.

    Args:
        config: The capture.
        progress: Called after every batch of documents.
        teacher: A teacher to use in place of `config.teacher`.
        classifier: The same where the config names examples.

    Raises:
        As `capture`.
    """
    if config.examples is not None:
        return ExampleRows(config, Examples(config.examples.path), classifier or load_classifier(config.teacher)).price
    assert config.source is not None  # the config has looked
    model = teacher or load_teacher(config.teacher)
    with TemporaryDirectory() as folder:
        samples = _samples(config, model, open_source(config.source), model.tokenizer(), Path(folder) / WORK, progress)
        shards = sum(1 for _ in plan_shards(samples.lengths - 1, config.store.shard_positions))
        room = shards * config.store.rows(samples.num_positions)[0]
        extent = Extent(len(samples), samples.num_positions, shards, room)
        if isinstance(model, BlackBox):
            require_tellable(config.targets)
            columns = told_columns(config, model.vocab_size, config.targets.k)
        else:
            if config.targets.bytes_per_position is not None:
                config, _ = _looked(config, model, samples, None)
            columns = columns_of(config, model)
        return _priced(config, model, columns, extent)


def _samples(
    config: CaptureConfig,
    model: Teacher,
    source: Source,
    tokenizer: Any,
    folder: Path,
    progress: Callable[[SamplesProgress], None] | None,
) -> SampleSet:
    return prepare(
        source,
        tokenizer,
        config.samples,
        limits=(model.max_length, model.vocab_size),
        identity={"tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer)},
        folder=folder,
        progress=None if progress is None else lambda done, total: progress(SamplesProgress(done, total)),
    )


def _priced(config: CaptureConfig, model: Teacher, columns: Sequence[Column], extent: Extent) -> CapturePlan:
    return priced(
        columns,
        extent,
        vocab_size=model.vocab_size,
        k=config.targets.k,
        pooled={
            one.layer: feature_width(config, model, one.layer) for one in config.targets.hidden if one.keep == "pooled"
        },
        head_width=model.hidden_width("final") if config.targets.exact else None,
    )


def planned(
    config: CaptureConfig,
    model: Teacher,
    samples: SampleSet,
    begun: Begun | None,
    source: dict[str, Any],
    tokenizer: Any,
) -> tuple[CaptureConfig, StorePlan]:
    """Return the config with its k settled, and the plan of the store that it makes.

    Args:
        config: The capture.
        model: Its teacher.
        samples: All samples.
        begun: What a store has settled already, or None.
        source: Fingerprint of the source.
        tokenizer: The teacher's, or None.
    """
    config, ranking = _looked(config, model, samples, begun)
    shard_rows, chunk_rows = config.store.rows(samples.num_positions)
    plan = StorePlan(
        kind="causal_lm",
        columns=columns_of(config, model),
        shard_rows=shard_rows,
        chunk_rows=chunk_rows,
        vocab_size=model.vocab_size,
        k=config.targets.k,
        teacher=model.fingerprint,
        tokenizer=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
        source={"source": source, "samples": samples.digest},
        capture=_settings(config),
        licences=config.licences.model_dump(),
        skipped=samples.counts,
        shards=tuple(plan_shards(samples.lengths - 1, config.store.shard_positions)),
        tokenizer_files={} if tokenizer is None else tokenizer_files(tokenizer),
        output_head=output_head_of(model) if config.targets.exact else None,
        ranking=ranking,
    )
    return config, plan


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


def _settings(config: CaptureConfig) -> dict[str, Any]:
    """What of a config fixes the numbers; where they are read from and how fast they are made does not."""
    return {
        "samples": config.samples.model_dump(mode="json"),
        "targets": config.targets.model_dump(mode="json"),
        "store": config.store.model_dump(mode="json"),
        "seed": config.seed,
    }


__all__ = [
    "CapturePlan",
    "CaptureProgress",
    "CaptureResult",
    "SamplesProgress",
    "capture",
    "plan_capture",
    "plan_shards",
    "planned",
]

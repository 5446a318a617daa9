"""Run a classifier over examples and write what it said: one row for each label of a sample and each of its views.

Legend: `S` samples, `V` views, `T` tokens, `C` outputs, `N` rows.

Rows of a sample stand view by view, within a view token by token. A model that answers once a sample has one row a
view; one that answers for every token has a row for each token with a label (0 or more).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache import augment
from kdcache.capture.config import CaptureConfig
from kdcache.capture.result import CaptureProgress, CaptureResult, result_of
from kdcache.classifiers import Classifier, load_classifier
from kdcache.errors import ConfigError, TeacherError, TeacherNumericsError
from kdcache.examples import LABEL, Examples, view_inputs, views_digest
from kdcache.store import (
    Column,
    HiddenSpec,
    Kept,
    SampleTable,
    StorePlan,
    StoreWriter,
    open_store,
    plan_shards,
    standard_columns,
)
from kdcache.store.filling import write_shards
from kdcache.store.manifest import FILE
from kdcache.store.schema import COUNTS, MASKED
from kdcache.targets.measure import measure_rows

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a first batch says of the model: outputs, whether it answers for tokens, shapes of its features."""

    classes: int
    tokens: bool
    features: dict[str, tuple[int, ...]]
    dtype: torch.dtype


def capture_examples(
    config: CaptureConfig,
    root: Path,
    *,
    classifier: Classifier | None = None,
    progress: Callable[[CaptureProgress], None] | None = None,
) -> CaptureResult:
    """Write a store of a classifier's answers; go on with one that was begun; do nothing if it is complete.

    Raises:
        As `kdcache.capture.capture`.
    """
    assert config.examples is not None  # who calls this has looked
    examples = Examples(config.examples.path)
    model = classifier or load_classifier(config.teacher)
    run = _Capture(config, examples, model)
    plan = run.plan
    complete = (root / FILE).is_file()
    writer = StoreWriter.open(root, plan)
    if complete:
        return result_of(open_store(root), already_complete=True)
    began, before = time.perf_counter(), sum(plan.shards[index].rows for index in writer.committed)

    def told(done: int, total: int) -> None:
        if progress is not None:
            rate = (done - before) / max(1e-9, time.perf_counter() - began)
            left = (total - done) / max(1e-9, rate)
            progress(CaptureProgress(done, total, rate, run.written, left, run.shard, len(plan.shards)))

    made = write_shards(writer, run.shard_of, told) - before
    seconds = time.perf_counter() - began
    writer.finish({"positions_per_second": round(made / max(1e-9, seconds), 1)})
    return result_of(open_store(root), seconds=seconds, made=made)


class _Capture:
    """One process's work on a store of examples."""

    def __init__(self, config: CaptureConfig, examples: Examples, model: Classifier) -> None:
        assert config.examples is not None
        self._config, self._own = config, config.examples
        self._examples, self._model = examples, model
        self._fields = self._own.fields or {name: name for name in examples.fields if name != LABEL}
        self._views = self._own.augment.views if self._own.augment else 1
        self._taps = {one.name: one.tap or one.name for one in self._own.features}
        self.shard = self.written = 0
        self._require_sense()
        self._seen = self._look()
        self._label = self._labels()
        self._rows = self._views * (np.ones(len(examples), dtype=np.int64) if not self._seen.tokens else self._counts())

    def _require_sense(self) -> None:
        if len(self._taps) != len(self._own.features):
            raise ConfigError("A feature is named twice.", where="examples.features")
        targets = self._config.targets
        if targets.hidden or targets.exact or targets.draws or targets.bytes_per_position:
            raise ConfigError(
                "Of examples, targets.hidden, exact, draws and bytes_per_position are not kept.",
                where="targets",
                hint="Name features in examples.features; a classifier's whole row fits targets.k.",
            )
        if self._own.augment and self._own.augment.field not in self._fields.values():
            raise ConfigError(
                f"The model is given no field {self._own.augment.field!r}.", where="examples.augment.field"
            )

    def _look(self) -> _Seen:
        places = np.arange(min(2, len(self._examples)))
        first = view_inputs(self._examples, places, self._fields, None, None)[0]
        answer = self._model.forward(first, list(self._taps.values()))
        count = len(next(iter(first.values())))
        if answer.logits.ndim not in (2, 3) or len(answer.logits) != count:
            raise TeacherError(
                f"The model gave logits of shape {tuple(answer.logits.shape)} for {count} samples.",
                where=self._config.teacher.model,
                hint="It must return [samples, classes], or [samples, tokens, classes].",
            )
        features = {name: tuple(answer.features[tap].shape[1:]) for name, tap in self._taps.items()}
        return _Seen(answer.logits.shape[-1], answer.logits.ndim == 3, features, answer.logits.dtype)

    def _labels(self) -> Array | None:
        label = self._examples.label
        if self._seen.tokens and (label is None or label.ndim != 2 or label.dtype.kind not in "iu"):
            raise ConfigError(
                "The model answers for every token, and the examples do not say which of them count.",
                where="examples.path",
                hint="Add label.npy of whole numbers [samples, tokens], below 0 where a token does not count.",
            )
        if label is not None and label.dtype.kind in "iu" and label.size and int(label.max()) >= self._seen.classes:
            raise ConfigError(
                f"A label is {int(label.max())}, and the model has {self._seen.classes} outputs.", where="label.npy"
            )
        return label

    def _counts(self) -> NDArray[np.int64]:
        assert self._label is not None  # _labels has looked
        counts: NDArray[np.int64] = (np.asarray(self._label) >= 0).sum(1)
        if not counts.all():
            raise ConfigError("A sample has no token that counts.", where="label.npy", hint="Leave it out.")
        return counts

    @property
    def _values(self) -> bool:
        """Whether labels are values, one a output."""
        return self._label is not None and self._label.dtype.kind == "f"

    @cached_property
    def plan(self) -> StorePlan:
        config, seen = self._config, self._seen
        k = min(config.targets.k, seen.classes)
        computed = str(seen.dtype).removeprefix("torch.")
        kept = {"compact": "levels", "lossless": "bits", "raw": computed}[config.store.preset]
        logits = config.targets.logits or kept
        parameters: dict[str, dict[str, Any]] = {
            "bits": {"kind": computed},
            "levels": {"steps_per_nat": config.targets.steps_per_nat},
        }
        columns = standard_columns(
            k=k,
            vocab_size=seen.classes,
            kept=Kept(logits, parameters.get(logits, {}), compressed=config.store.preset != "raw"),
            hidden=[HiddenSpec(one.name, seen.features[one.name], one.dtype) for one in self._own.features],
            inputs=False,
        )
        if self._values:
            said = "what the output should be"
            columns += (Column("label_values", "float32", {}, (seen.classes,), "1", said),)
        if self._own.augment:
            said = "what was done to the view's image; see the capture's settings and kdcache/augment.py"
            columns += (Column("augmentation", "float32", {}, (augment.NUMBERS,), "1", said),)
        chunk_rows = min(config.store.chunk_positions, config.store.shard_positions)
        # rows that a shard has room for and no sample are written too: a small store's only shard is as small
        shard_rows = min(config.store.shard_positions, -(-int(self._rows.sum()) // chunk_rows) * chunk_rows)
        settings = self._own.model_dump(mode="json", exclude={"path", "batch_size"})
        return StorePlan(
            kind="classifier",
            columns=columns,
            shard_rows=shard_rows,
            chunk_rows=chunk_rows,
            vocab_size=seen.classes,
            k=k,
            teacher={**self._model.fingerprint, "vocab_size": seen.classes},
            tokenizer=None,
            source={"source": self._examples.fingerprint},
            capture={
                "augmentation_version": augment.VERSION,
                "labelled": self._label is not None,
                "examples": {**settings, "fields": self._fields, "tokens": seen.tokens},
                "targets": config.targets.model_dump(mode="json"),
                "store": config.store.model_dump(mode="json"),
            },
            licences=config.licences.model_dump(),
            skipped={"samples": len(self._examples)},
            shards=tuple(plan_shards(self._rows, shard_rows)),
        )

    def shard_of(self, index: int) -> tuple[dict[str, Array], SampleTable]:
        shard, size = self.plan.shards[index], self._own.batch_size
        self.shard = index
        stop = shard.first_sample + shard.samples
        parts, digests = [], list[bytes]()
        for start in range(shard.first_sample, stop, size):
            columns, seen = self._batch(np.arange(start, min(start + size, stop)))
            parts.append(columns)
            digests += seen
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.written += sum(values.nbytes for values in columns.values())
        here = slice(shard.first_sample, stop)
        return columns, SampleTable(self._examples.ids[here], self._rows[here], digests=digests)

    def _batch(self, places: NDArray[np.int64]) -> tuple[dict[str, Array], list[bytes]]:
        drawn = None
        if self._own.augment:
            ids = [self._examples.ids[place] for place in places]
            drawn = augment.draw(self._own.augment, ids, places, len(self._examples))
        views = view_inputs(self._examples, places, self._fields, self._own.augment, drawn)
        made = [self._answered(places, inputs) for inputs in views]
        if drawn is not None:
            for view, (columns, rows) in enumerate(made):
                columns["augmentation"] = np.repeat(drawn[:, view], rows, axis=0)
        # of each sample its views together
        order = np.argsort(np.concatenate([np.repeat(np.arange(len(rows)), rows) for _, rows in made]), kind="stable")
        columns = {name: np.concatenate([one[name] for one, _ in made])[order] for name in made[0][0]}
        return columns, [views_digest(views, row) for row in range(len(places))]

    def _answered(self, places: NDArray[np.int64], inputs: dict[str, Array]) -> tuple[dict[str, Array], Array]:
        """Return the columns of a view of some samples, and how many rows each sample has."""
        answer = self._model.forward(inputs, list(self._taps.values()))
        counted = None if not self._seen.tokens else np.asarray(self._label)[places] >= 0
        rows = np.ones(len(places), dtype=np.int64) if counted is None else counted.sum(1)
        logits = answer.logits if counted is None else answer.logits[torch.from_numpy(counted)]
        if not bool(torch.isfinite(logits).all()):
            bad = int((~torch.isfinite(logits).all(-1)).nonzero()[0])
            name = self._examples.ids[int(places[np.searchsorted(np.cumsum(rows), bad, side="right")])]
            raise TeacherNumericsError("The model's logits are NaN or infinite.", where=f"sample {name}")
        labels, mask = self._labelled(places, counted, len(logits))
        found = measure_rows(logits, torch.from_numpy(labels).to(logits.device), k=self.plan.k).numpy()
        columns: dict[str, Array] = {
            "labels": labels.clip(0).astype(np.int32),
            "loss_mask": mask,
            "head_ids": found.ids,
            "head_logits": found.logits,
            "tail_log_partition": found.tail,
            "label_logit": found.label_logit,
        }
        for name, tap in self._taps.items():
            columns[f"hidden.{name}"] = np.repeat(answer.features[tap].float().cpu().numpy(), rows, axis=0)
        if self._values:
            columns["label_values"] = np.repeat(np.asarray(self._label)[places].astype(np.float32), rows, axis=0)
        return columns, rows

    def _labelled(self, places: Array, counted: Array | None, rows: int) -> tuple[NDArray[np.int64], Array]:
        if self._label is None or self._values:
            return np.zeros(rows, dtype=np.int64), np.full(rows, COUNTS, dtype=np.int32)
        own = np.asarray(self._label)[places]
        labels = own.astype(np.int64) if counted is None else own[counted].astype(np.int64)
        return labels, np.where(labels >= 0, COUNTS, MASKED).astype(np.int32)

"""What a classifier says of examples, as the rows of a store: one for each label of a sample and each of its views.

Legend: `S` samples, `V` views, `T` tokens, `C` outputs, `N` rows.

Rows of a sample stand view by view, within a view token by token. A model that answers once a sample has one row a
view; one that answers for every token has a row for each token with a label (0 or more).
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache import augment
from kdcache.capture.config import CaptureConfig
from kdcache.capture.price import CapturePlan, Extent, priced
from kdcache.classifiers import Classifier
from kdcache.errors import ConfigError, TeacherError, TeacherNumericsError
from kdcache.examples import LABEL, Examples, view_inputs, views_digest
from kdcache.store import Column, HiddenSpec, Kept, SampleTable, StorePlan, plan_shards, standard_columns
from kdcache.store.schema import COUNTS, MASKED
from kdcache.targets.measure import measure_rows

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a first batch says of the model.

    Attributes:
        classes: C.
        answers: T, of a model that answers for every token; else None.
        features: Name to the shape of a sample's.
        dtype: Of its logits.
    """

    classes: int
    answers: int | None
    features: dict[str, tuple[int, ...]]
    dtype: torch.dtype


class ExampleRows:
    """The rows of a classifier's store, a shard or some samples at a time.

    Args:
        config: The capture.
        examples: That it names.
        model: Which is run over two of them at once, to see its outputs.

    Attributes:
        shard: The shard that is being made.
        written: Bytes made so far, decoded.

    Raises:
        ConfigError: The settings, the labels or the examples do not fit the model.
        TeacherError: The model failed, or its answers have no shape that is kept.
    """

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
        self._rows = self._views * (np.ones(len(examples), dtype=np.int64) if not self.tokens else self._counts())

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
        views = self._own.augment
        changed = () if views is None else augment.kind_of(views).touched(views)
        if missing := sorted(set(changed) - set(self._fields.values())):
            raise ConfigError(f"The model is given no field {missing[0]!r}.", where="examples.augment")

    def _look(self) -> _Seen:
        places = np.arange(min(2, len(self._examples)))
        first = view_inputs(self._examples, places, self._fields, self._own.augment, None)[0]
        answer = self._model.forward(first, list(self._taps.values()))
        count = len(next(iter(first.values())))
        if answer.logits.ndim not in (2, 3) or len(answer.logits) != count:
            raise TeacherError(
                f"The model gave logits of shape {tuple(answer.logits.shape)} for {count} samples.",
                where=self._config.teacher.model,
                hint="It must return [samples, classes], or [samples, tokens, classes].",
            )
        features = {name: tuple(answer.features[tap].shape[1:]) for name, tap in self._taps.items()}
        answers = answer.logits.shape[1] if answer.logits.ndim == 3 else None
        return _Seen(answer.logits.shape[-1], answers, features, answer.logits.dtype)

    @property
    def tokens(self) -> bool:
        """Whether the model answers for every token."""
        return self._seen.answers is not None

    def _labels(self) -> Array | None:
        label, views = self._examples.label, self._own.augment
        if self.tokens and views is not None and not augment.kind_of(views).aligned(views):
            raise ConfigError(
                "The model answers for every token, and the views move tokens away from their labels.",
                where="examples.augment",
                hint="Of kind tokens, leave token_swap and token_drop at 0.",
            )
        if self.tokens and (label is None or label.ndim != 2 or label.dtype.kind not in "iu"):
            raise ConfigError(
                "The model answers for every token, and the examples do not say which of them count.",
                where="examples.path",
                hint="Add label.npy of whole numbers [samples, tokens], below 0 where a token does not count.",
            )
        if label is not None and self.tokens and label.shape[1] != self._seen.answers:
            raise ConfigError(
                f"The model answers for {self._seen.answers} tokens a sample, and the labels are of {label.shape[1]}.",
                where="label.npy",
                hint="Of sound they are labels of frames, after the model's strides.",
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
    def price(self) -> CapturePlan:
        """What the store takes."""
        row = "token" if self.tokens else "view" if self._views > 1 else "sample"
        plan = self.plan
        return priced(plan.columns, Extent.of(plan, row), vocab_size=plan.vocab_size, k=plan.k)

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's logits."""
        return self._seen.dtype

    @property
    def _values(self) -> bool:
        """Whether labels are values, one a output."""
        return self._label is not None and self._label.dtype.kind == "f"

    @cached_property
    def plan(self) -> StorePlan:
        """The plan of the store."""
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
        kind = None if self._own.augment is None else augment.kind_of(self._own.augment)
        if kind is not None:
            said = f"of the view, with the capture's settings: {kind.SAID}"
            columns += (Column("augmentation", "float32", {}, (kind.NUMBERS,), "1", said),)
        shard_rows, chunk_rows = config.store.rows(int(self._rows.sum()))
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
                "augmentation_version": 1 if kind is None else kind.VERSION,
                "labelled": self._label is not None,
                "examples": {**settings, "fields": self._fields, "tokens": self.tokens},
                "targets": config.targets.model_dump(mode="json"),
                "store": config.store.model_dump(mode="json"),
            },
            licences=config.licences.model_dump(),
            skipped={"samples": len(self._examples)},
            shards=tuple(plan_shards(self._rows, shard_rows)),
        )

    def shard_of(self, index: int) -> tuple[dict[str, Array], SampleTable]:
        """Return the columns and the samples of a shard."""
        shard, size = self.plan.shards[index], self._own.batch_size
        self.shard = index
        stop = shard.first_sample + shard.samples
        parts, digests = [], list[bytes]()
        for start in range(shard.first_sample, stop, size):
            columns, seen = self.batch(np.arange(start, min(start + size, stop)))
            parts.append(columns)
            digests += seen
        columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        self.written += sum(values.nbytes for values in columns.values())
        here = slice(shard.first_sample, stop)
        return columns, SampleTable(self._examples.ids[here], self._rows[here], digests=digests)

    def batch(self, places: NDArray[np.int64]) -> tuple[dict[str, Array], list[bytes]]:
        """Return the columns of some samples, their rows one sample after the other, and digests of what was given.

        Args:
            places: int [S], where the samples stand among the examples.

        Raises:
            TeacherNumericsError: The model's logits are NaN or infinite.
        """
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
        counted = None if not self.tokens else np.asarray(self._label)[places] >= 0
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

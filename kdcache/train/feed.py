"""What a student of examples is given: fields of a folder, joined to the store by sample id, augmented as captured.

Legend: `S` samples of a batch, `N` rows, `V` views of a sample, `T` tokens, `P` numbers of an augmentation.

The student may be given other fields than the teacher was, or those of another folder with the same ids: another
modality of the same things. Where the fields that the teacher saw are there, the first samples are made again, and
their digest must be the store's.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.augment import views_of
from kdcache.batch import Batch
from kdcache.errors import ConfigError, MismatchError
from kdcache.examples import LABEL, Examples, view_inputs, views_digest
from kdcache.losses.difficulty import OF_LABELS
from kdcache.store import Store
from kdcache.train.config import DataConfig, LossConfig
from kdcache.train.schedule import extremes

Array = NDArray[Any]

PROVED = 32
"""Samples whose inputs are made again and compared before the first step."""

EXTRA = ("augmentation", "label_values")


class Feed:
    """Adds to batches of a classifier's store what the student is given.

    Args:
        store: Of the kind `classifier`.
        data: Names the examples and their fields.

    Attributes:
        views: V.
        extra: Columns that the batches must have.

    Raises:
        ConfigError: No examples are named, or they have no such field.
        SourceError: They are not there, or lack samples of the store.
        MismatchError: They are not what the teacher saw.
    """

    def __init__(self, store: Store, data: DataConfig) -> None:
        if data.examples is None:
            raise ConfigError(
                "A classifier's store does not hold its inputs.",
                where="data.examples",
                hint="Give the folder of examples that it was captured from, or others with the same ids.",
            )
        self._store, self._data = store, data
        self._examples = Examples(data.examples)
        capture: dict[str, Any] = store.manifest.part("capture") or {}
        self._seen: dict[str, Any] = capture.get("examples") or {}
        drawn = self._seen.get("augment")
        version = capture.get("augmentation_version")
        self._augment = None if drawn is None else views_of(drawn, int(version or 0))
        self.views = 1 if self._augment is None else self._augment.views
        self._fields: dict[str, str] = data.inputs or self._seen["fields"]
        tables = [store.sample_table(index)["sample_id"].to_pylist() for index in range(len(store.shards))]
        self._places = self._examples.places(name for names in tables for name in names)
        self.extra = tuple(name for name in EXTRA if name in store.columns)
        self._examples.batch(self._places[:1], list(self._fields.values()))
        self._require_proof()

    @property
    def labelled(self) -> bool:
        """Whether the store says what the labels are."""
        return bool((self._store.manifest.part("capture") or {}).get("labelled"))

    def require_labels(self, loss: LossConfig) -> None:
        """Refuse a loss of labels that the store does not have, and scores of what it does not say.

        Raises:
            MismatchError: There are none, or they are classes where values are needed, or the other way round.
        """
        self._require_scores(loss)
        if extremes(loss.alpha)[0] == 1:
            return
        values = "label_values" in self._store.columns
        if not self.labelled or values != (loss.hard != "cross_entropy"):
            have = "no labels" if not self.labelled else "values" if values else "classes"
            raise MismatchError(
                f"The loss counts labels as {loss.hard}, and the store has {have}.",
                where="loss.alpha",
                hint="Set loss.alpha=1, or loss.hard as the labels are.",
            )

    def _require_scores(self, loss: LossConfig) -> None:
        values = "label_values" in self._store.columns or loss.divergence in ("sigmoid", "regression")
        for where, one in (("data.sampling", self._data.sampling), ("loss.weights", loss.weights)):
            if one is None or one.by == "student_loss":
                continue
            if values or (one.by in OF_LABELS and not self.labelled):
                raise MismatchError(
                    f"The score {one.by} is of classes, and the store's "
                    + ("outputs are values." if values else "examples have no labels."),
                    where=f"{where}.by",
                    hint=f"Leave {where} out" + ("." if values else ", or use entropy, confidence or margin."),
                )

    def fill(self, batch: Batch, epoch: int) -> Batch:
        """Return a batch with one view of each sample, that of the epoch's turn, and the student's inputs."""
        offsets = batch.offsets.numpy()
        rows = np.diff(offsets) // self.views
        view = epoch % self.views
        begins = offsets[:-1] + view * rows
        kept = np.repeat(begins - np.cumsum(rows) + rows, rows) + np.arange(int(rows.sum()))
        ends = torch.from_numpy(np.concatenate([[0], np.cumsum(rows)]))
        places = self._places[batch.sample_index.numpy()]
        some = batch.rows(torch.from_numpy(kept), ends)
        drawn = None if self._augment is None else batch.extra["augmentation"].numpy()[begins][:, None]
        inputs = view_inputs(self._examples, places, self._fields, self._augment, drawn)[0]
        some = replace(some, inputs={name: _tensor(one) for name, one in inputs.items()})
        if not self._seen.get("tokens"):
            return some
        label = np.asarray(self._examples.fields[LABEL][places])
        return replace(some, places=torch.from_numpy(np.flatnonzero(label >= 0)), answers=label.shape[1])

    def probe(self, count: int = 2) -> dict[str, torch.Tensor]:
        """Return the inputs of the first samples of the store, as they are; of copies, the first.

        Args:
            count: Of them, at most.
        """
        inputs = view_inputs(self._examples, self._places[:count], self._fields, self._augment, None)[0]
        return {name: _tensor(one) for name, one in inputs.items()}

    def _require_proof(self) -> None:
        fields: dict[str, str] = self._seen["fields"]
        if not set(fields.values()) <= set(self._examples.fields):
            return  # another modality
        shard = self._store.read_shard(0, ["augmentation"] if self._augment else [])
        count = min(PROVED, len(shard.offsets) - 1)
        drawn = None
        if self._augment is not None:
            rows = np.diff(shard.offsets)[:count] // self.views
            first = shard.offsets[:count, None] + np.arange(self.views) * rows[:, None]
            drawn = shard.columns["augmentation"][first]
        views = view_inputs(self._examples, self._places[:count], fields, self._augment, drawn)
        known = shard.table["token_digest"].to_pylist()
        for row in range(count):
            if views_digest(views, row) != known[row]:
                raise MismatchError(
                    f"The sample {shard.table['sample_id'][row].as_py()!r} is not what the teacher was given.",
                    where=str(self._examples.folder),
                    hint="Give the examples that the store was captured from.",
                )


def held_out_feed(store: Store, data: DataConfig) -> Feed:
    """Return what a student is given of a held-out store; raises as `Feed`."""
    return Feed(store, data.model_copy(update={"examples": data.validation_examples or data.examples}))


def _tensor(values: Array) -> torch.Tensor:
    wide = values.astype(np.int64) if values.dtype.kind in "iu" and values.dtype != np.uint8 else values
    wide = wide.astype(np.float32) if wide.dtype == np.float64 else wide  # as numpy makes them, and no student is
    return torch.from_numpy(np.ascontiguousarray(wide))
